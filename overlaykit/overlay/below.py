"""What is done below one directory descriptor, a component at a time, no symlink followed."""

from __future__ import annotations

import errno
import os
import stat
import uuid

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


def remove_tree(parent_fd: int, name: bytes) -> None:
    """Remove directory `name` and all below. What lies deep is brought up first: a tree may be deeper than a process has
    descriptors, or Python recursion."""
    top = os.open(name, DIRECTORY, dir_fd=parent_fd)
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
    fd = os.open(name, DIRECTORY, dir_fd=top)
    try:
        for child in os.listdir(fd):
            try:
                os.unlink(child, dir_fd=fd)
            except IsADirectoryError:
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
