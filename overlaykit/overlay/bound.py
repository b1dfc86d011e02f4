"""What is mounted in a tree (overlay/mounted.py): a directory or a file of the host, or a tmpfs that goes with the tree."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from overlaykit._ext import inroot
from overlaykit.overlay.folder import Folder
from overlaykit.overlay.mount import Mount, mount_detached
from overlaykit.overlay.nodes import Handle
from overlaykit.overlay.resolve import AnyPath
from overlaykit.tree.table import StrPath

MEMORY = "/dev/shm"  # a tmpfs that everybody may write to, where there is one


@dataclass(frozen=True, slots=True)
class Bound:
    """What is to be mounted: `source`, a directory or file of the host or a new file system, at the path `target`."""

    target: str
    source: StrPath | Mount
    read_only: bool = False


class Bind(Folder):
    """What is mounted. Its paths have no symlinks left in them, and none is followed; "" is what is mounted itself."""

    def __init__(self, source: StrPath | Mount, *, read_only: bool) -> None:
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        super().__init__(Handle(self._open_source(source)))
        self.read_only = read_only
        self.is_dir = stat.S_ISDIR(os.fstat(self._root.fd).st_mode)

    def _open_source(self, source: StrPath | Mount) -> int:
        if not isinstance(source, Mount):
            return os.open(source, os.O_PATH | os.O_CLOEXEC)
        try:
            return mount_detached(source)
        except OSError as e:
            if source.type != "tmpfs" or e.errno not in (errno.EPERM, errno.ENOSYS):
                raise
        # Only root mounts: for others a directory has to do, which no size limits.
        self._scratch = tempfile.TemporaryDirectory(
            prefix="overlaykit-tmpfs-", dir=MEMORY if os.path.isdir(MEMORY) else None
        )
        modes = [option.removeprefix("mode=") for option in source.options if option.startswith("mode=")]
        os.chmod(self._scratch.name, int(modes[0] if modes else "1777", 8))
        return os.open(self._scratch.name, os.O_PATH | os.O_CLOEXEC)

    def close(self) -> None:
        """Remove what stood for a tmpfs. The descriptor goes with the last who uses it."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def _open(self, path: AnyPath, flags: int, mode: int = 0) -> int:
        if path and path != "/":
            return inroot.open_beneath(self._root.fd, os.fsencode(path), flags | os.O_CLOEXEC, mode)
        end = "/." if self.is_dir else ""
        return os.open(f"/proc/self/fd/{self._root.fd}{end}", flags & ~os.O_NOFOLLOW | os.O_CLOEXEC)

    @contextmanager
    def _there(self, path: AnyPath, follow: bool) -> Iterator[str]:
        if path:
            with super()._there(path, follow) as there:
                yield there
        else:
            yield f"/proc/self/fd/{self._root.fd}"  # no way leads there that somebody could forbid
