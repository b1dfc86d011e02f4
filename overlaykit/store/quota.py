"""Limits on writable layers: bytes on disk and entries, as `create --storage-opt` says them.

by the kernel   where the store's file system has project quota (xfs, ext4 or f2fs, mounted with prjquota; Linux 5.14 on; as
                root): upper and work are a project of their own, so that nobody gets past the limit, however he writes
in process      elsewhere: overlay/limited.py counts, and what a mount or a program writes is not limited

The limit is on all that a container has of its own. What was frozen of it (`snapshot`) stays counted: a new upper gets what
that leaves.

A project's number comes from the name of the snapshot's directory, which is random and never used again, and is taken only
if the kernel knows of no file and no limit under it. It is the files' attribute, and written down nowhere else.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from overlaykit.overlay.mount import call
from overlaykit.store.limits import Limits

# linux/fs.h: struct fsxattr, of which flags and projid matter here
FSGETXATTR, FSSETXATTR = 0x801C581F, 0x401C5820
FSXATTR = struct.Struct("=5I8s")
PROJECT_INHERIT = 0x200
# linux/quota.h: struct if_dqblk; block limits in KiB, space in bytes
SYS_QUOTACTL_FD = 443  # the same on every architecture
GETQUOTA, SETQUOTA, PROJECTS = 0x800007, 0x800008, 2
DQBLK = struct.Struct("=8QI4x")
BLOCK_LIMITS, INODE_LIMITS = 1, 4
KIB = 1024

FIRST = 1 << 31  # our projects; others begin at small numbers
OVERHEAD = 3  # entries of every upper and work: fs, work, work/work
ROOM = 1 << 20, 16  # bytes and entries that the kernel needs to mount: it makes work/work anew, and tries a few things
# No such ioctl or call, not for this user, no quota here or not this kind
CANNOT = (errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.ESRCH, errno.EINVAL, errno.ENOENT)


def enforce(directory: Path, limits: Limits) -> bool:
    """Let the kernel hold the new upper and work in `directory` to `limits`; False if it cannot here."""
    with _opened(directory / "fs") as fd:
        try:
            project = _free_project(fd, directory.name)
            _set_limits(fd, project, limits)
        except OSError as e:
            if e.errno not in CANNOT:
                raise
            return False
        _join(fd, project)
    join(directory)
    return True


def is_enforced(directory: Path) -> bool:
    """Whether the kernel holds the upper in `directory` to some limits."""
    with _opened(directory / "fs") as fd:
        project = _project(fd)
        return bool(project) and _has_limits(fd, project)


@contextmanager
def room(directory: Path, limits: Limits | None) -> Iterator[Callable[[], None]]:
    """Room in the upper in `directory`, which may be full, for what opening or mounting an overlay makes in work and removes
    again. Taken back at the end of the block, or before by what comes."""
    if limits is None or not is_enforced(directory):
        yield lambda: None
        return

    def set_limits(size: int, entries: int) -> None:
        more = Limits(*(None if a is None else max(a, 0) + b for a, b in ((limits.size, size), (limits.entries, entries))))
        with _opened(directory / "fs") as fd:
            _set_limits(fd, _project(fd), more)

    set_limits(*ROOM)
    try:
        yield lambda: set_limits(0, 0)
    finally:
        set_limits(0, 0)


def _has_limits(fd: int, project: int) -> bool:
    try:
        blocks, _, _, inodes, *_ = _account(fd, project)
    except OSError as e:
        if e.errno not in CANNOT:
            raise
        return False  # it was mounted with project quota once
    return bool(blocks or inodes)


def join(directory: Path) -> None:
    """Let the work in `directory` belong to the project of the upper beside it, if that has one: else nothing could be
    renamed from one to the other."""
    with _opened(directory / "fs") as fd:
        project = _project(fd)
    if project:
        with _opened(directory / "work") as fd:
            _join(fd, project)


def release(directory: Path) -> None:
    """Take the limits of the project in `directory` back, if it is one: it is about to be removed."""
    try:
        with _opened(directory / "fs") as fd:
            if project := _project(fd):
                _set_limits(fd, project, Limits())
    except OSError as e:
        if e.errno not in (*CANNOT, errno.EACCES, errno.ENOTDIR, errno.ELOOP):  # another's, or no snapshot any more
            raise


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _project(fd: int) -> int:
    """The number of the project of ours that the directory is; 0 if it is none."""
    try:
        number = int(_attributes(fd)[3])
    except OSError as e:
        if e.errno not in CANNOT:
            raise
        return 0
    return number if number >= FIRST else 0


def _attributes(fd: int) -> list[int]:
    buffer = bytearray(FSXATTR.size)
    fcntl.ioctl(fd, FSGETXATTR, buffer)
    return list(FSXATTR.unpack(buffer))


def _join(fd: int, project: int) -> None:
    attributes = _attributes(fd)
    attributes[0] |= PROJECT_INHERIT
    attributes[3] = project
    fcntl.ioctl(fd, FSSETXATTR, FSXATTR.pack(*attributes))


def _free_project(fd: int, name: str) -> int:
    """A number for the project of snapshot directory `name` that no file has."""
    number = int(name, 16) % FIRST
    while any(_account(fd, FIRST + number)):
        number = (number + 1) % FIRST
    return FIRST + number


def _account(fd: int, project: int) -> tuple[int, ...]:
    """Hard and soft limit (KiB) and bytes used, hard and soft limit of inodes and inodes used; zeros for no such project."""
    buffer = ctypes.create_string_buffer(DQBLK.size)
    try:
        call(SYS_QUOTACTL_FD, fd, GETQUOTA << 8 | PROJECTS, project, buffer)
    except FileNotFoundError:
        return (0,) * 6
    return tuple(DQBLK.unpack(buffer.raw)[:6])


def _set_limits(fd: int, project: int, limits: Limits) -> None:
    # What is used up is not 0, which means no limit.
    blocks = 0 if limits.size is None else max(1, limits.size // KIB)
    inodes = 0 if limits.entries is None else OVERHEAD + max(0, limits.entries)
    values = (blocks, blocks, 0, inodes, inodes, 0, 0, 0, BLOCK_LIMITS | INODE_LIMITS)
    call(SYS_QUOTACTL_FD, fd, SETQUOTA << 8 | PROJECTS, project, DQBLK.pack(*values))
