"""Files that survive: written aside, synced, renamed, the directory synced; and locks that die with their holder.

A file being written is in ROOT/ingest and flocked until it is closed, so that whoever clears up can tell a live writer's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def new_ingest(folder: Path) -> tuple[int, Path]:
    """A new empty file in `folder`, flocked until it is closed: by that a collector knows its writer lives."""
    folder.mkdir(mode=0o700, exist_ok=True)
    while True:
        path = folder / secrets.token_hex(16)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:  # else a collector was quicker than our lock
                return fd, path
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        os.close(fd)


@contextmanager
def locked(root: str | os.PathLike[str]) -> Iterator[None]:
    """Hold ROOT/lock: one process and one thread at a time. A holder that dies lets go."""
    fd = os.open(os.path.join(root, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Put `data` into the file `path` whole: a reader sees the old or the new, now and after a power cut.

    It is written in ingest/ beside `path`, where a dead writer's is cleared away.
    """
    fd, temporary = new_ingest(path.parent / "ingest")
    try:
        write_all(fd, temporary, memoryview(data))
        publish(fd, temporary, path, mode=0o644)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """An open file that gets the name `path` once it is whole and on disk; an error leaves what was there.

    A device or a pipe is written to as it is: its name is not ours to give away.
    """
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(target.stat().st_mode):
            with open(target, "wb") as out:  # IsADirectoryError is the right answer for a directory
                yield out
            return
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.rename(temporary, target)
    except BaseException as e:
        with suppress(OSError):  # its folder may not be one
            temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename == str(temporary):
            e.filename = os.fspath(path)
        raise
    sync_directory(target.parent)


def write_all(fd: int, path: Path, view: memoryview) -> None:
    done = 0
    try:
        while done < len(view):
            done += os.write(fd, view[done:])
    except OSError as e:
        e.filename = str(path)
        raise


def publish(fd: int, path: Path, target: Path, *, mode: int) -> None:
    """Make the file `path`, open as `fd`, the file `target`, so that it stays so after a power cut."""
    try:
        os.fchmod(fd, mode)
        os.fsync(fd)
    except OSError as e:
        e.filename = str(path)
        raise
    os.rename(path, target)
    sync_directory(target.parent)


def sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Let the names in `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and FUSE file systems cannot sync a directory
            raise
    finally:
        os.close(fd)
