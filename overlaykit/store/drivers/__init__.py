"""Volume drivers: where a volume's files are, and how they come to be seen at its _data.

    local       in the store; or whatever mount(8) mounts, with Docker's options type, o, device
    encrypted   in the store, encrypted by gocryptfs
    remote      on another machine, through rclone or sshfs

A volume is mounted when it is first used and unmounted when nobody uses it any more (volumes.py). Others' drivers are entry
points of the group overlaykit.volume_drivers: an object like these, or what makes one when it is called.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from overlaykit.errors import NotFound, Unsupported
from overlaykit.overlay.mount import unmount as unmount_as_root

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "overlaykit.volume_drivers"
OURS = {"local": "Local", "encrypted": "Encrypted", "remote": "Remote"}
FUSE = "/dev/fuse"
DATA = "_data"  # where in a volume's directory its files are seen
Options = Mapping[str, str]


class Driver(Protocol):
    """What keeps the files of volumes. `directory` is the volume's own in the store, with an empty directory _data in it."""

    def create(self, directory: Path, options: Options) -> None:
        """Make what a new volume needs beside its _data. InvalidReference for options that there are not, Unsupported."""

    def stored(self, options: Options) -> str | None:
        """The name in `directory` of what the store itself keeps of the volume's files; None if they are elsewhere."""

    def mounts(self, options: Options) -> bool:
        """Whether the files are to be seen only once `mount` was called."""

    def mount(self, directory: Path, options: Options) -> None:
        """Let _data show the files. One at a time calls it, when nothing is mounted there. OSError, OverlaykitError."""

    def unmount(self, directory: Path) -> None:
        """Undo that. OSError; EBUSY while somebody has a file open in it."""

    def remove(self, directory: Path, options: Options) -> None:
        """Undo `create`, but for what is in `directory`, which goes afterwards. Nothing is mounted."""


class Mounting:
    """What drivers have in common whose files are to be mounted."""

    def stored(self, options: Options) -> str | None:
        return None

    def mounts(self, options: Options) -> bool:
        return True

    def unmount(self, directory: Path) -> None:
        unmount(directory / DATA)

    def remove(self, directory: Path, options: Options) -> None:
        pass


def find(name: str) -> Driver:
    """The driver of that name. NotFound; Unsupported if another package brings it and it cannot be imported."""
    if name in OURS:
        made: Driver = getattr(import_module(f"{__name__}.{name}"), OURS[name])()
        return made
    points = _others()
    if name not in points:
        hint = f"there are {', '.join([*OURS, *sorted(points)])}; a package may bring more"
        raise NotFound(f"no volume driver {name}", hint=hint)
    return _load(name)


def _others() -> dict[str, EntryPoint]:
    """What other packages bring."""
    from importlib.metadata import entry_points  # and with it a library for mail

    return {point.name: point for point in entry_points(group=GROUP)}


@cache
def _load(name: str) -> Driver:
    point = _others()[name]
    try:
        loaded = point.load()
        driver: Driver = loaded() if callable(loaded) else loaded
    except Exception as e:  # whatever another's code does, it must not look like ours
        raise Unsupported(f"volume driver {name} ({point.value}) cannot be loaded: {e}") from e
    return driver


def unmount(place: Path) -> None:
    """umount2(2), or fusermount for who is not root. OSError; EBUSY while somebody has a file open in it."""
    if os.geteuid() == 0:
        unmount_as_root(place)
        return
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if program is None:
        raise Unsupported("fusermount is not installed", hint="apt install fuse3")
    done = subprocess.run([program, "-u", place], capture_output=True, text=True, check=False)
    if done.returncode:
        number = errno.EBUSY if "busy" in done.stderr.lower() else errno.EPERM
        raise OSError(number, done.stderr.strip() or os.strerror(number), str(place))


def program(name: str, package: str = "") -> str:
    """The path of the program `name`. Unsupported, with the package to install."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")
    if found is None:
        raise Unsupported(f"{name} is not installed", hint=f"apt install {package or name}")
    return found


def need_fuse() -> None:
    """Unsupported if this process may not ask the kernel for a FUSE mount, which programs say in their own words."""
    try:
        os.close(os.open(FUSE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        hint = f"as root: modprobe fuse; chmod 666 {FUSE}"
        raise Unsupported(f"nothing can be mounted by FUSE here: {FUSE}: {e.strerror}", hint=hint) from e


def run(argv: Sequence[str | Path], *, input: bytes = b"", env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code of a program that gets `input`, and what it said last. It may leave a daemon behind."""
    with tempfile.TemporaryFile() as said:  # a daemon would keep a pipe open for ever
        done = subprocess.run(argv, input=input, stdout=said, stderr=said, check=False, env=env)
        said.seek(0)
        lines = said.read().decode(errors="replace").split("\n")
    return done.returncode, next((line.strip() for line in reversed(lines) if line.strip()), "")


__all__ = ["DATA", "Driver", "Mounting", "Options", "find", "need_fuse", "program", "run", "unmount"]
