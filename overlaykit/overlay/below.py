"""What is done below one directory descriptor, a component at a time, no symlink followed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_directory(root_fd: int, path: bytes) -> int:
    """A descriptor of directory `path` below root_fd, a component at a time, no symlink followed. The caller closes it."""
    fd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
    for part in path.split(b"/") if path else ():
        try:
            below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def enter(folder: int, name: bytes) -> int | None:
    """A descriptor of directory `name` in `folder`; None if it is not there, or a symlink. NotADirectoryError for a file."""
    try:
        return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            return None
        raise


def symlink_target(folder: int, name: bytes) -> bytes | None:
    """Where symlink `name` in `folder` leads; None if it is not there."""
    try:
        return os.readlink(name, dir_fd=folder)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def changeable(fd: int) -> Iterator[None]:
    """Its owner may change directory `fd` meanwhile, and move it, whatever its mode says. Root always may."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if os.geteuid() == 0 or mode & 0o700 == 0o700:
        yield
        return
    os.chmod(_place(fd), mode | 0o700)
    try:
        yield
    finally:
        os.chmod(_place(fd), mode)


def open_to_change(parent_fd: int, name: bytes | str) -> int:
    """A descriptor of directory `name`, which its owner may change from now on, whatever its mode said."""
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if os.geteuid() != 0 and mode & 0o700 != 0o700:
            os.chmod(_place(fd), mode | 0o700)
        return os.open(".", DIRECTORY, dir_fd=fd)
    finally:
        os.close(fd)


def _place(fd: int) -> bytes:
    return b"/proc/self/fd/%d" % fd  # fchmod does not take what was opened with O_PATH


def remove(parent_fd: int, name: bytes | str) -> None:
    """Remove `name`, with all below if it is a directory."""
    try:
        os.unlink(name, dir_fd=parent_fd)
    except IsADirectoryError:
        remove_tree(parent_fd, os.fsencode(name))


def remove_tree(parent_fd: int, name: bytes) -> None:
    """Remove directory `name` and all below. What lies deep is brought up first: a tree may be deeper than a process has
    descriptors, or Python recursion."""
    top = open_to_change(parent_fd, name)
    try:
        while below := os.listdir(top):
            for child in below:
                try:
                    os.unlink(child, dir_fd=top)
                except IsADirectoryError:
                    _empty(top, child)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent_fd)


def _empty(top: int, name: str) -> None:
    """Remove directory `name` in `top`, the directories in it put beside it."""
    fd = open_to_change(top, name)
    try:
        for child in os.listdir(fd):
            try:
                os.unlink(child, dir_fd=fd)
            except IsADirectoryError:
                os.close(open_to_change(fd, child))  # who moves a directory writes its ".."
                os.rename(child, uuid.uuid4().hex, src_dir_fd=fd, dst_dir_fd=top)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=top)


def umask_at(root_fd: int) -> int:
    """What the kernel takes off the modes of new files here; all bits if that cannot be known without changing it."""
    try:
        if "system.posix_acl_default" in os.listxattr(root_fd):
            return 0o777  # new files would get their modes from it
    except OSError as e:
        if e.errno != errno.ENOTSUP:
            raise
    try:
        with open("/proc/thread-self/status", "rb") as f:
            for line in f:
                if line.startswith(b"Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass  # no /proc: every file gets its mode by fchmod
    return 0o777
