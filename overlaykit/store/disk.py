"""Directories on disk: what they take, how they go, and that they are there after a power cut."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overlaykit.tree.table import StrPath


@dataclass(frozen=True, slots=True)
class Usage:
    """What a directory takes on disk: bytes (allocated, each hard-linked file once) and entries."""

    size: int
    inodes: int


def usage(directory: StrPath) -> Usage:
    """What `directory` and all in it take; nothing if it is not there."""
    size = inodes = 0
    linked: set[tuple[int, int]] = set()
    for st in _stats(directory):
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            if (st.st_dev, st.st_ino) in linked:
                continue
            linked.add((st.st_dev, st.st_ino))
        size += st.st_blocks * 512
        inodes += 1
    return Usage(size, inodes)


def _stats(directory: StrPath) -> Iterator[os.stat_result]:
    try:
        yield os.lstat(directory)
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _stats(entry.path)
                else:
                    yield entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # somebody else is removing it too
        pass


def remove_tree(directory: Path) -> int:
    """Remove `directory` with all in it, if it is there: bytes that came free on disk."""
    if os.geteuid() != 0:
        _open_up(directory)
    freed = usage(directory).size
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        if directory.exists():
            raise
        return 0
    return freed


def _open_up(directory: StrPath) -> None:
    """Give the owner back what an image's modes take from all but root: nothing goes from a directory without them."""
    try:
        os.chmod(directory, 0o700)
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    _open_up(entry.path)
    except FileNotFoundError:
        pass


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
