"""The file operations that workloads use: the os module's own functions, or an Overlay's methods of the same meaning.

No wrapper stands between: a workload calls os.open on the host and Overlay.open_fd in process, and the loop is the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlaykit.overlay import Overlay


@dataclass(frozen=True, slots=True)
class Files:
    """The root of a tree, and what can be done in it.

    root   what every path begins with: "/the/directory" on the host, "" in process
    path   where programs find the tree; None if no path leads there
    upper  the directory that takes the writes, to look at afterwards; None if there is none apart
    """

    root: str
    path: Path | None
    upper: Path | None
    open: Callable[..., int]
    stat: Callable[..., os.stat_result]
    listdir: Callable[[str], list[str]]
    scandir: Callable[[str], Any]
    mkdir: Callable[..., None]
    unlink: Callable[[str], None]
    rename: Callable[[str, str], None]
    chmod: Callable[[str, int], None]
    chown: Callable[[str, int, int], None]
    rmtree: Callable[[str], None]


def on_host(directory: Path, *, upper: Path | None = None) -> Files:
    """A directory of the host, or the mount on it."""
    return Files(
        str(directory), directory, upper, os.open, os.stat, os.listdir, os.scandir, os.mkdir, os.unlink, os.rename,
        os.chmod, os.chown, shutil.rmtree,
    )  # fmt: skip


def in_process(fs: Overlay, *, upper: Path | None = None) -> Files:
    """An overlay in this process."""
    return Files(
        "", None, upper, fs.open_fd, fs.stat, fs.listdir, fs.scandir, fs.mkdir, fs.unlink, fs.rename, fs.chmod, fs.chown,
        fs.rmtree,
    )  # fmt: skip
