"""Folder: a directory of the host under the names that an Overlay has, for who copies between the two.

Paths are the folder's own: ".." stops at it, and a symlink leads nowhere but into it, whoever wrote it and whenever.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from overlaykit._ext import copyup, inroot
from overlaykit.overlay.entries import DirEntry, Entries
from overlaykit.overlay.layers import Look
from overlaykit.overlay.markers import place
from overlaykit.overlay.nodes import Handle
from overlaykit.overlay.osnames import OsNames, join
from overlaykit.overlay.resolve import AnyPath, names_path, text
from overlaykit.overlay.stack import fail
from overlaykit.tree.table import StrPath

PARENT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
ITSELF = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Folder(OsNames):
    """What is in `directory`, to read and to write. Errors are the kernel's, with the path that was given."""

    def __init__(self, directory: StrPath | Handle) -> None:
        self._root = directory if isinstance(directory, Handle) else Handle(os.open(directory, PARENT))

    def close(self) -> None:
        """Let go of the directory, so that what is mounted there can be unmounted. Nothing can be asked afterwards."""
        del self._root

    def _open(self, path: AnyPath, flags: int, mode: int = 0) -> int:
        return inroot.open_in_root(self._root.fd, os.fsencode(text(path)) or b"", flags, mode)

    @contextmanager
    def _at(self, path: AnyPath) -> Iterator[tuple[int, str]]:
        """A descriptor of the directory that has the last name of `path`, and that name; "." where it ends in none."""
        given = text(path)
        head, _, name = given.rpartition("/")
        if name in ("", ".", ".."):
            head, name = given, "."
        fd = self._open(head or "/", PARENT)
        try:
            yield fd, name
        finally:
            os.close(fd)

    @contextmanager
    def _end(self, path: AnyPath) -> Iterator[tuple[int, str]]:
        """As _at, with the slash behind the name, which only a directory may have: for the call to say so."""
        given = text(path)
        bare = given.rstrip("/")
        with self._at(bare) as (fd, name):
            yield fd, name + "/" * (bare != given)

    @names_path
    def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> os.stat_result:
        fd = self._open(path, os.O_PATH | os.O_CLOEXEC if follow_symlinks else ITSELF)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def host_paths(self, path: AnyPath, *, below: bool = False) -> list[str]:
        """The directory of the host that `path` is."""
        with self._there(path, True) as there:
            return [os.readlink(there)]

    def lstat(self, path: AnyPath) -> os.stat_result:
        return self.stat(path, follow_symlinks=False)

    def scandir(self, path: AnyPath = "/") -> Entries[str]:
        base = text(path)
        return Entries(DirEntry(name, join(base, name), self._look, look) for name, look in self._names(base).items())

    @names_path
    def _names(self, path: AnyPath) -> dict[str, int]:
        fd = self._open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(fd) as entries:
                return {entry.name: _look(entry) for entry in entries}
        finally:
            os.close(fd)

    def _look(self, path: str | bytes, follow: bool) -> os.stat_result:
        return self.stat(path, follow_symlinks=follow)

    def listdir(self, path: AnyPath = "/") -> list[str]:
        return list(self._names(path))

    @names_path
    def readlink(self, path: AnyPath) -> str:
        with self._at(path) as (fd, name):
            return os.readlink(name, dir_fd=fd)

    @names_path
    def open_fd(self, path: AnyPath, flags: int, mode: int = 0o777) -> int:
        makes = flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE
        return self._open(path, flags | os.O_CLOEXEC, mode if makes else 0)

    @names_path
    def mkdir(self, path: AnyPath, mode: int = 0o777) -> None:
        with self._at(text(path).rstrip("/")) as (fd, name):
            os.mkdir(name, mode, dir_fd=fd)

    @names_path
    def mknod(self, path: AnyPath, mode: int = 0o600, device: int = 0) -> None:
        with self._at(path) as (fd, name):
            os.mknod(name, mode, device, dir_fd=fd)

    def symlink(self, src: AnyPath, dst: AnyPath) -> None:
        self._symlink(dst, src)

    @names_path
    def _symlink(self, path: AnyPath, target: AnyPath) -> None:
        with self._at(path) as (fd, name):
            os.symlink(target, os.fsencode(name) if isinstance(os.fspath(target), bytes) else name, dir_fd=fd)

    @names_path
    def unlink(self, path: AnyPath) -> None:
        with self._at(path) as (fd, name):
            os.unlink(name, dir_fd=fd)

    @names_path
    def rmdir(self, path: AnyPath) -> None:
        with self._at(text(path).rstrip("/")) as (fd, name):
            os.rmdir(name, dir_fd=fd)

    @names_path
    def rename(self, src: AnyPath, dst: AnyPath, *, flags: int = 0) -> None:
        with self._end(src) as (from_fd, old), self._end(dst) as (to_fd, new):
            copyup.rename_at(from_fd, os.fsencode(old), to_fd, os.fsencode(new), flags)

    @names_path
    def link(self, src: AnyPath, dst: AnyPath) -> None:
        with self._end(src) as (from_fd, old), self._end(dst) as (to_fd, new):
            os.link(old, new, src_dir_fd=from_fd, dst_dir_fd=to_fd, follow_symlinks=False)

    @names_path
    def link_fd(self, path: AnyPath, fd: int) -> None:
        with self._at(path) as (to, name):
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=to)

    # --- attributes ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _there(self, path: AnyPath, follow: bool) -> Iterator[str]:
        """A path for calls that know no way to start from a descriptor; the call itself follows it just as `follow` says."""
        if follow:
            fd = self._open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                yield f"/proc/self/fd/{fd}"
            finally:
                os.close(fd)
        else:
            with self._at(path) as (fd, name):
                yield place(fd, name)

    @names_path
    def statvfs(self, path: AnyPath = "/") -> os.statvfs_result:
        with self._there(path, True) as there:
            return os.statvfs(there)

    @names_path
    def access(self, path: AnyPath, mode: int, *, effective_ids: bool = False, follow_symlinks: bool = True) -> bool:
        with self._there(path, follow_symlinks) as there:
            return os.access(there, mode, effective_ids=effective_ids, follow_symlinks=follow_symlinks)

    @names_path
    def chmod(self, path: AnyPath, mode: int, *, follow_symlinks: bool = True) -> None:
        if not follow_symlinks and stat.S_ISLNK(self.lstat(path).st_mode):
            raise fail(errno.EOPNOTSUPP)  # Linux gives it no mode
        with self._there(path, follow_symlinks) as there:
            os.chmod(there, mode, follow_symlinks=follow_symlinks)

    @names_path
    def chown(self, path: AnyPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        with self._there(path, follow_symlinks) as there:
            os.chown(there, uid, gid, follow_symlinks=follow_symlinks)

    @names_path
    def utime(
        self,
        path: AnyPath,
        times: tuple[float, float] | None = None,
        *,
        ns: tuple[int, int] | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        with self._there(path, follow_symlinks) as there:
            if ns is not None:
                os.utime(there, ns=ns, follow_symlinks=follow_symlinks)
            else:
                os.utime(there, times, follow_symlinks=follow_symlinks)

    @names_path
    def truncate(self, path: AnyPath, length: int) -> None:
        with self._there(path, True) as there:
            os.truncate(there, length)

    @names_path
    def listxattr(self, path: AnyPath, *, follow_symlinks: bool = True) -> list[str]:
        with self._there(path, follow_symlinks) as there:
            return os.listxattr(there, follow_symlinks=follow_symlinks)

    @names_path
    def getxattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> bytes:
        with self._there(path, follow_symlinks) as there:
            return os.getxattr(there, attribute, follow_symlinks=follow_symlinks)

    @names_path
    def setxattr(
        self, path: AnyPath, attribute: str | bytes, value: bytes, flags: int = 0, *, follow_symlinks: bool = True
    ) -> None:
        with self._there(path, follow_symlinks) as there:
            os.setxattr(there, attribute, value, flags, follow_symlinks=follow_symlinks)

    @names_path
    def removexattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> None:
        with self._there(path, follow_symlinks) as there:
            os.removexattr(there, attribute, follow_symlinks=follow_symlinks)


@contextmanager
def inside(root: StrPath, path: str) -> Iterator[str]:
    """A name of what `path` leads to in directory `root`, whose symlinks lead nowhere else. OSError with both."""
    root_fd = os.open(root, PARENT)
    try:
        fd = inroot.open_in_root(root_fd, os.fsencode(path), os.O_PATH | os.O_CLOEXEC)
    except OSError as e:
        e.filename = join(os.fspath(root), path.lstrip("/"))
        raise
    finally:
        os.close(root_fd)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _look(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return Look.LINK
    if entry.is_dir(follow_symlinks=False):
        return Look.DIR
    return Look.FILE if entry.is_file(follow_symlinks=False) else Look.OTHER
