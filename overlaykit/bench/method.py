"""What a measurement says: a result, or what did not run and why; and what can run on this machine at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from overlaykit.bench.spread import doubt, middle
from overlaykit.bench.targets import Scene, Target
from overlaykit.bench.workload import Workload
from overlaykit.errors import OverlaykitError


@dataclass(frozen=True, slots=True)
class Missing:
    """What did not run, and why. workload or target is "" if it stands for all of them."""

    workload: str
    target: str
    reason: str

    @property
    def name(self) -> str:
        return " on ".join(filter(None, (self.workload, self.target))) or "file system"


@dataclass(slots=True)
class Result:
    """One workload on one target: seconds and CPU seconds of a run in each round, and their ratio to the host's.

    amount: operations or bytes (`unit`) a run. copied, shared: bytes that the first run of a copy-up workload left in the
    writable layer, written or by reflink; copied is None where there is no such layer.
    """

    workload: str
    target: str
    kind: str
    what: str
    unit: str
    filesystem: str = ""
    amount: int = 0
    copied: int | None = None
    shared: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def time(self) -> float:
        """Seconds of a run."""
        return middle(self.seconds)

    @property
    def ratio(self) -> float | None:
        """How many times the host directory's time that is, in the same rounds; None if that did not run."""
        return middle(self.ratios) if self.ratios else None

    @property
    def doubt(self) -> float:
        """How far from it the true ratio may be, as part of it, with a certainty of 95 %; infinite after one round."""
        return doubt(self.ratios or self.seconds)


def usable(targets: Sequence[Target], place: Path, *, rootless: bool) -> Iterator[Target | Missing]:
    """Each target that makes a writable layer here, and why each other does not: tried, never guessed."""
    for target in targets:
        base = place / f"trial-{target.name}"
        (base / "lower").mkdir(parents=True)
        (base / "lower" / "file").write_text("x")
        try:
            with target.fresh(Scene(base, base / "lower", rootless)) as files:
                os.close(files.open(files.root + "/file", os.O_RDWR))
        except (OSError, OverlaykitError) as e:
            yield Missing("", target.name, why(e))
        else:
            yield target
        shutil.rmtree(base)


def why(e: Exception) -> str:
    """An exception in one line."""
    if isinstance(e, OSError):
        return "; ".join([e.strerror or str(e), *getattr(e, "__notes__", ())]).replace("\n", " ")
    return str(e)


def obstacle(workload: Workload, place: Path) -> str:
    """Why `workload` cannot run on this machine; "" if it can."""
    for program in workload.programs:
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if workload.cold:
        if not os.access("/proc/sys/vm/drop_caches", os.W_OK):
            return "only root drops caches"
        from overlaykit.bench.machine import filesystem

        if filesystem(place) == "tmpfs":
            return "tmpfs has its files in memory and nowhere else"
    return ""
