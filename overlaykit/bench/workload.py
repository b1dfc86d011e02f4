"""A workload: the files that the image has, what is prepared in the writable layer, the loop that is timed, and how to have
it back as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from overlaykit.bench.files import Files


def nothing(_: object) -> None:
    """What a workload does that needs nothing before it."""


@dataclass(frozen=True, slots=True)
class Workload:
    """run(files): the timed part; gives how many operations (or bytes) it did.

    kind      write, read (which changes no file), copy-up or program: what stands together in a report
    lower     writes the image's files into a directory, once
    before    prepares a new writable layer, untimed
    again     undoes what run did, untimed, so that it can run once more; None: only a new layer will do. What was copied
              up stays so: there it is used for plain directories alone
    unit      what run counts: "ops" or "bytes"
    programs  that have to be installed
    by_path   why it needs a path, and so cannot run in process; "" if it can
    full      only in a full run
    cold      page cache dropped before each run; root only, and not on tmpfs, which has nothing else
    """

    name: str
    what: str
    kind: str
    run: Callable[[Files], int]
    lower: Callable[[Path], None] = nothing
    before: Callable[[Files], None] = nothing
    again: Callable[[Files], None] | None = None
    unit: str = "ops"
    programs: tuple[str, ...] = ()
    by_path: str = ""
    full: bool = False
    cold: bool = False
