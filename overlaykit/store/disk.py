"""Directories on disk: what they take, how they go, and that they are there after a power cut."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from overlaykit.overlay import below
from overlaykit.overlay.below import DIRECTORY, open_to_change
from overlaykit.tree.table import StrPath


@dataclass(frozen=True, slots=True)
class Usage:
    """What a directory takes on disk: bytes (allocated, each hard-linked file once) and entries."""

    size: int
    inodes: int


def usage(directory: StrPath) -> Usage:
    """What `directory` and all in it take; nothing if it is not there."""
    return _sum(_stats(directory, _open))


def _sum(stats: Iterable[os.stat_result]) -> Usage:
    size = inodes = 0
    linked: set[tuple[int, int]] = set()
    for st in stats:
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            if (st.st_dev, st.st_ino) in linked:
                continue
            linked.add((st.st_dev, st.st_ino))
        size += st.st_blocks * 512
        inodes += 1
    return Usage(size, inodes)


def _open(parent_fd: int, name: str) -> int:
    return os.open(name, DIRECTORY, dir_fd=parent_fd)


def _stats(directory: StrPath, open: Callable[[int, str], int]) -> Iterator[os.stat_result]:
    """What is at `directory` and below; open gives the descriptor of a directory, to go into it.

    The way back is "..": a tree may be deeper than a path is long, Python recurses, or a process has descriptors.
    """
    parent, name = os.path.split(os.path.abspath(directory))
    try:
        fd = os.open(parent, DIRECTORY)
    except FileNotFoundError:
        return
    levels = [[name]]  # of each depth, the directories still to go into
    try:
        while True:
            if not levels[-1]:
                levels.pop()
                if len(levels) <= 1:
                    return
                fd = _exchange(fd, os.open("..", DIRECTORY, dir_fd=fd))
                continue
            name = levels[-1].pop()
            try:
                yield os.stat(name, dir_fd=fd, follow_symlinks=False)
                fd = _exchange(fd, open(fd, name))
            except FileNotFoundError:  # somebody else is removing it too
                continue
            levels.append([])
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        levels[-1].append(entry.name)
                        continue
                    with suppress(FileNotFoundError):
                        yield entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        pass
    finally:
        os.close(fd)


def _exchange(old: int, new: int) -> int:
    os.close(old)
    return new


def remove_tree(directory: Path) -> int:
    """Remove `directory` with all in it, if it is there: bytes that came free on disk."""
    # The owner gets back what an image's modes take from all but root: nothing goes from a directory without them.
    freed = _sum(_stats(directory, open_to_change)).size
    try:
        parent = os.open(directory.parent, DIRECTORY)
        try:
            below.remove_tree(parent, os.fsencode(directory.name))
        finally:
            os.close(parent)
    except FileNotFoundError:
        if directory.exists():
            raise
        return 0
    return freed


def copy_directory_attributes(source: Path, target: Path, *, without: str) -> None:
    """Give directory `target` mode, owner, times and xattrs of `source`, but for xattrs that begin with `without`."""
    st = source.stat()
    if os.geteuid() == 0:
        os.chown(target, st.st_uid, st.st_gid)
    os.chmod(target, stat.S_IMODE(st.st_mode))
    for name in os.listxattr(source):
        if not name.startswith(without):
            try:
                os.setxattr(target, name, os.getxattr(source, name))
            except OSError as e:
                if e.errno not in (errno.EPERM, errno.EACCES):  # a security label, which the host gives and not we
                    raise
    os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns))


def keeps_xattr(directory: StrPath, name: str) -> bool:
    """Whether this process may set the xattr `name` on `directory`, and the file system keeps it."""
    try:
        os.setxattr(directory, name, b"n")
        os.removexattr(directory, name)
    except OSError:  # whatever the reason, it cannot be used
        return False
    return True


def sync_file_system(path: Path) -> None:
    """syncfs(2): everything written so far to the file system of `path` is on disk. One call beats an fsync a file."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(fd)
