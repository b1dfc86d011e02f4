"""Kernel overlay mounts for tests: the oracle. Skips with a reason where the machine does not let us mount."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from overlaykit.overlay.mount import bind_mount, mount, overlay_mount, unmount

PATIENCE = 200  # times 50 ms
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@cache
def why_not() -> str:
    """Why no overlay can be mounted here; "" if one can."""
    if os.geteuid() != 0:
        return "needs root to mount the kernel's overlay"
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        base = Path(name)
        for part in ("lower", "upper", "work", "merged"):
            (base / part).mkdir()
        try:
            mount(overlay_mount([base / "lower"], base / "upper", base / "work", base / "merged"))
        except OSError as e:
            return f"the kernel does not mount an overlay here: {e}"
        unmount(base / "merged")
    return ""


needs_kernel_overlay = pytest.mark.skipif(bool(why_not()), reason=why_not())


@contextlib.contextmanager
def mounted(
    lowers: Sequence[Path | str], upper: Path | str | None, work: Path | str | None, merged: Path | str, **options: bool
) -> Iterator[Path]:
    """The kernel's merged tree at `merged` for as long as the context lasts."""
    what = overlay_mount(lowers, upper, work, merged, **options)  # type: ignore[arg-type]
    for left in range(PATIENCE, -1, -1):
        try:
            mount(what)
            break
        except OSError as e:
            # With index=on the kernel refuses an upper that is still mounted; and another program that began a mount
            # namespace meanwhile keeps a copy of what was mounted before, for as long as it takes to let go of it.
            if e.errno != errno.EBUSY or not left:
                raise
            time.sleep(0.05)
    try:
        yield Path(merged)
    finally:
        unmount(merged)


@contextlib.contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    """Directory `source` bound on `target` for as long as the context lasts."""
    mount(bind_mount(source, target))
    try:
        yield
    finally:
        unmount(target)


class Chroot:
    """Runs calls with a directory as the root, so that a mount's absolute symlinks stay in it; needs root."""

    def __init__(self, directory: Path | str) -> None:
        self.root = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        self.here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        self.directory = str(directory)

    def __enter__(self) -> None:
        os.chroot(self.directory)
        os.chdir("/")

    def __exit__(self, *_: object) -> None:
        os.fchdir(self.root)
        os.chroot(".")
        os.fchdir(self.here)

    def close(self) -> None:
        os.close(self.root)
        os.close(self.here)
