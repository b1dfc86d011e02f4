"""How to undo what was done to a directory: names that went are kept aside, and who changed what is written down."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from overlaykit.overlay.below import changeable, open_directory
from overlaykit.overlay.mounttable import mounted_below


class Journal:
    """The steps by which the tree below root_fd changes. aside_fd: a folder on the same file system, for what has gone.

    A step is written down before it is made, since Ctrl-C may come in between. keep: False for who never undoes any.
    """

    def __init__(self, root_fd: int, aside_fd: int, *, keep: bool = True) -> None:
        self._root_fd = root_fd
        self._aside_fd = aside_fd
        self._keep = keep
        self._steps: list[Callable[[], None]] = []
        self._spots = map(b"%d".__mod__, count())  # names in the folder
        root = Path(os.readlink(f"/proc/self/fd/{root_fd}"))
        self._mounts = [os.fsencode(place.relative_to(root)) for place in mounted_below(root)]

    def entered(self, path: bytes, fd: int, before: os.stat_result) -> None:
        """Directory `path` is going to change: it looks like `before`, and `fd` is open on it."""
        if not self._keep:
            return
        xattrs = {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
        self._steps.append(lambda: self._restore(path, before, xattrs))

    def set_aside(self, folder: int, path: bytes, name: bytes, *, replaced: bool) -> None:
        """Keep `name` of directory `path`, which is open as `folder`. replaced: it stays until another takes its place.

        EBUSY if something is mounted there or below: it would go along, and be removed with what it shows.
        """
        whole = path + b"/" + name if path else name
        if any(place == whole or place.startswith(whole + b"/") for place in self._mounts):
            raise OSError(errno.EBUSY, "something is mounted there, or below", os.fsdecode(whole))
        if replaced and not self._keep:
            return
        spot = next(self._spots)
        if self._keep:
            self._steps.append(lambda: self._move_back(path, spot, name))
        if not (replaced and self._link(folder, name, spot)):
            move(name, folder, spot, self._aside_fd)

    def _link(self, folder: int, name: bytes, spot: bytes) -> bool:
        try:
            os.link(name, spot, src_dir_fd=folder, dst_dir_fd=self._aside_fd, follow_symlinks=False)
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):  # somebody else's file; one link too many
                raise
            return False
        return True

    def placed(self, path: bytes, name: bytes) -> None:
        """`name` is going to be new in directory `path`."""
        if self._keep:
            self._steps.append(lambda: self._take_out(path, name, next(self._spots)))

    def undo(self) -> None:
        """Go back to the beginning, the last step first."""
        while self._steps:
            self._steps.pop()()

    def _restore(self, path: bytes, before: os.stat_result, xattrs: dict[str, bytes]) -> None:
        with self._at(path) as fd:
            place = b"/proc/self/fd/%d" % fd
            now = os.fstat(fd)
            if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
                os.chown(place, before.st_uid, before.st_gid)
            for name in os.listxattr(place):
                if name not in xattrs:
                    os.removexattr(place, name)
            for name, value in xattrs.items():
                os.setxattr(place, name, value)
            os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
        with self._at(path, change=False) as fd:
            os.chmod(b"/proc/self/fd/%d" % fd, stat.S_IMODE(before.st_mode))

    def _move_back(self, path: bytes, spot: bytes, name: bytes) -> None:
        with self._at(path) as folder, contextlib.suppress(FileNotFoundError):
            move(spot, self._aside_fd, name, folder)

    def _take_out(self, path: bytes, name: bytes, spot: bytes) -> None:
        with self._at(path) as folder, contextlib.suppress(FileNotFoundError):
            move(name, folder, spot, self._aside_fd)

    @contextlib.contextmanager
    def _at(self, path: bytes, *, change: bool = True) -> Iterator[int]:
        fd = open_directory(self._root_fd, path)
        try:
            with changeable(fd) if change else contextlib.nullcontext():
                yield fd
        finally:
            os.close(fd)


def move(name: bytes, source_fd: int, target: bytes, target_fd: int) -> None:
    """Rename `name` in directory source_fd to `target` in target_fd, a directory that is read-only too."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=source_fd, follow_symlinks=False).st_mode):
        os.rename(name, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)
        return
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source_fd)
    try:
        with changeable(fd):  # who moves a directory writes its ".."
            os.rename(name, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)
    finally:
        os.close(fd)
