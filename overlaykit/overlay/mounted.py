"""Mounted: an overlay at / and directories or files of the host at places in it, as one tree. What the kernel shows when
they are mounted so, in process.

Symlinks are followed in the whole tree, so that one in the image may lead into a volume and one in a volume to the image;
none leads out of it. Between two mounts there is no rename and no link (EXDEV), a mount point cannot be removed (EBUSY),
and one that is read-only refuses changes (EROFS).
"""

from __future__ import annotations

import builtins
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from overlaykit._ext import copyup, inroot
from overlaykit.overlay.entries import DirEntry, Entries
from overlaykit.overlay.layers import Look
from overlaykit.overlay.nodes import Handle
from overlaykit.overlay.osnames import OsNames, join
from overlaykit.overlay.resolve import AnyPath, names_path, text
from overlaykit.overlay.stack import fail
from overlaykit.overlay.view import View
from overlaykit.overlay.writable import Overlay
from overlaykit.tree.table import StrPath

R = TypeVar("R")
MAX_LINKS = 40  # symlinks in one path, as the kernel has it
PARENT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
ITSELF = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Bound:
    """What is to be mounted: `source`, a directory or file of the host, at the path `target`."""

    target: str
    source: StrPath
    read_only: bool = False


class Bind:
    """A directory or file of the host that is mounted. Paths below it have no symlinks left in them; none is followed."""

    def __init__(self, source: StrPath, *, read_only: bool) -> None:
        self._handle = Handle(os.open(source, os.O_PATH | os.O_CLOEXEC))
        self.fd = self._handle.fd
        self.read_only = read_only
        self.is_dir = stat.S_ISDIR(os.fstat(self.fd).st_mode)

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        if path:
            return inroot.open_beneath(self.fd, os.fsencode(path), flags | os.O_CLOEXEC, mode)
        return os.open(f"/proc/self/fd/{self.fd}{'/.' if self.is_dir else ''}", flags & ~os.O_NOFOLLOW | os.O_CLOEXEC)

    @contextmanager
    def at(self, path: str) -> Iterator[tuple[int, str]]:
        """A descriptor of the directory that has `path`, and its name there."""
        head, _, name = path.rpartition("/")
        fd = self.open(head, PARENT)
        try:
            yield fd, name
        finally:
            os.close(fd)

    @contextmanager
    def there(self, path: str) -> Iterator[tuple[str, bool]]:
        """A path of the host for `path`, and whether a call has to follow it."""
        if not path:
            yield f"/proc/self/fd/{self.fd}", True
            return
        fd = self.open(path, ITSELF)
        try:
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                with self.at(path) as (parent, name):
                    yield f"/proc/self/fd/{parent}/{name}", False
            else:
                yield f"/proc/self/fd/{fd}", True
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a path leads. path: absolute, no symlinks left. bind: the mount that has it, None for the overlay; `inner` is
    the path there. st: None if nothing is there. busy: it is a mount point itself. dots: the path ended in "." or ".."."""

    path: str
    bind: Bind | None
    inner: str
    st: os.stat_result | None
    busy: bool
    dots: str
    slash: bool


class Mounted(OsNames):
    """`root` with `mounts` in it, which may lie in each other; a context manager that closes both.

    Mount points that are missing are made, as Docker does it: directories 0755, files empty.
    """

    def __init__(self, root: View, mounts: Iterable[Bound]) -> None:
        """root: belongs to this object from now on, and is closed if a mount fails."""
        self._root = root
        self._binds: dict[str, Bind] = {}
        try:
            for mount in sorted(mounts, key=lambda mount: mount.target.count("/")):
                bind = Bind(mount.source, read_only=mount.read_only)
                if (point := self._mount_point(mount.target, bind)) is not None:
                    self._binds[point] = bind
        except BaseException:
            self.close()
            raise

    def _mount_point(self, target: str, bind: Bind) -> str | None:
        """The clean path of `target`, which is there now. ENOTDIR, EISDIR if it is of the other kind.

        In a View nothing can be made: None if there is no directory that could show it.
        """
        if not self.exists(target):
            if not isinstance(self._root, Overlay):
                head, _, name = target.rpartition("/")
                return join(self._find(head or "/").path, name) if self.isdir(head or "/") else None
            if bind.is_dir:
                self.makedirs(target, 0o755, exist_ok=True)
            else:
                self.makedirs(target.rpartition("/")[0] or "/", 0o755, exist_ok=True)
                os.close(self.open_fd(target, os.O_WRONLY | os.O_CREAT, 0o644))
        spot = self._there(target)
        assert spot.st is not None
        if stat.S_ISDIR(spot.st.st_mode) != bind.is_dir:
            raise fail(errno.ENOTDIR if bind.is_dir else errno.EISDIR, target)
        return spot.path

    @property
    def points(self) -> list[str]:
        """The clean paths of the mount points, in the order in which they are mounted."""
        return list(self._binds)

    @property
    def closed(self) -> bool:
        return self._root.closed

    def close(self) -> None:
        """Let go of all directories. Files that were opened stay open; closing twice is no error."""
        self._binds.clear()
        self._root.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- finding ------------------------------------------------------------------------------------------------------

    def _find(self, path: AnyPath, *, follow: bool = True) -> Spot:
        """Where `path` leads; errors of the way there. The last name may be missing."""
        given = text(path)
        if not given:
            raise fail(errno.ENOENT)
        if "\0" in given:
            raise ValueError("embedded null byte")
        slash, last = given.endswith("/"), given.rstrip("/").rpartition("/")[2]
        todo = [name for name in reversed(given.split("/")) if name not in ("", ".")]
        at: list[str] = []
        st: os.stat_result | None = None
        hops = 0
        while todo:
            name = todo.pop()
            if name == "..":
                at = at[:-1]
                continue
            here = [*at, name]
            st = self._lstat(here)
            if st is None:
                if todo:
                    raise fail(errno.ENOENT)
                return self._spot(here, None, last, slash)
            if stat.S_ISLNK(st.st_mode) and (todo or follow or slash):
                hops += 1
                if hops > MAX_LINKS:
                    raise fail(errno.ELOOP)
                target = self._readlink(here)
                at = [] if target.startswith("/") else at
                slash = slash or (not todo and target.endswith("/"))
                todo += [part for part in reversed(target.split("/")) if part not in ("", ".")]
                continue
            if (todo or last == "." or (slash and not todo)) and not stat.S_ISDIR(st.st_mode):
                raise fail(errno.ENOTDIR)
            at = here
        return self._spot(at, self._lstat(at), last, slash)

    def _spot(self, at: list[str], st: os.stat_result | None, last: str, slash: bool) -> Spot:
        path = "/" + "/".join(at)
        bind, inner = self._owner(path)
        return Spot(path, bind, inner, st, path in self._binds or path == "/", last if last in (".", "..") else "", slash)

    def _owner(self, path: str) -> tuple[Bind | None, str]:
        """The mount that shows `path`, and the path there."""
        head = path
        while head:
            if (bind := self._binds.get(head)) is not None:
                return bind, path[len(head) + 1 :]
            head = head.rpartition("/")[0]
        return None, path

    def _parent(self, spot: Spot) -> tuple[Bind | None, str]:
        """The same, but of a mount point the mount that has its name."""
        bind, inner = self._owner(spot.path.rpartition("/")[0])
        name = spot.path.rpartition("/")[2]
        return bind, spot.path if bind is None else join(inner, name) if inner else name

    def _lstat(self, at: list[str]) -> os.stat_result | None:
        bind, inner = self._owner("/" + "/".join(at))
        try:
            if bind is None:
                return self._root.lstat(inner)
            fd = bind.open(inner, ITSELF)
            try:
                return os.fstat(fd)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return None

    def _readlink(self, at: list[str]) -> str:
        bind, inner = self._owner("/" + "/".join(at))
        if bind is None:
            return self._root.readlink(inner)
        with bind.at(inner) as (fd, name):
            return os.readlink(name, dir_fd=fd)

    def _there(self, path: AnyPath, *, follow: bool = True) -> Spot:
        spot = self._find(path, follow=follow)
        if spot.st is None:
            raise fail(errno.ENOENT)
        return spot

    # --- reading ------------------------------------------------------------------------------------------------------

    @names_path
    def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> os.stat_result:
        """os.stat of `path`."""
        st = self._there(path, follow=follow_symlinks).st
        assert st is not None
        return st

    def lstat(self, path: AnyPath) -> os.stat_result:
        """os.lstat of `path`."""
        return self.stat(path, follow_symlinks=False)

    def _ask(
        self,
        path: AnyPath,
        follow: bool,
        ours: Callable[[str], R],
        theirs: Callable[[str, bool], R],
        *,
        change: bool = False,
    ) -> R:
        """What `ours` gives for a path of the overlay, or `theirs` for one of the host and whether to follow it."""
        spot = self._there(path, follow=follow)
        if spot.bind is None:
            return ours(spot.inner)
        if change and spot.bind.read_only:
            raise fail(errno.EROFS)
        with spot.bind.there(spot.inner) as (there, through):
            return theirs(there, through)

    @names_path
    def statvfs(self, path: AnyPath = "/") -> os.statvfs_result:
        """os.statvfs of the file system that `path` is on."""
        return self._ask(path, True, self._root.statvfs, lambda there, _: os.statvfs(there))

    @names_path
    def access(self, path: AnyPath, mode: int, *, effective_ids: bool = False, follow_symlinks: bool = True) -> bool:
        """Whether the caller may do `mode` with `path`, as View.access."""
        try:
            spot = self._there(path, follow=follow_symlinks)
            if mode & os.W_OK and spot.bind is not None and spot.bind.read_only:
                return False
            return self._ask(
                path,
                follow_symlinks,
                lambda p: self._root.access(p, mode, effective_ids=effective_ids, follow_symlinks=False),
                lambda there, through: os.access(there, mode, effective_ids=effective_ids, follow_symlinks=through),
            )
        except OSError:
            return False

    @names_path
    def readlink(self, path: AnyPath) -> str:
        """The target of symlink `path`, as it is written. EINVAL if it is none."""
        spot = self._there(path, follow=False)
        assert spot.st is not None
        if not stat.S_ISLNK(spot.st.st_mode):
            raise fail(errno.EINVAL)
        return self._readlink([part for part in spot.path.split("/") if part])

    @names_path
    def _names(self, path: AnyPath) -> dict[str, int]:
        spot = self._there(path)
        assert spot.st is not None
        if not stat.S_ISDIR(spot.st.st_mode):
            raise fail(errno.ENOTDIR)
        if spot.bind is None:
            heads = (point.rpartition("/") for point in self._binds)
            points = {name: Look.OTHER for head, _, name in heads if (head or "/") == spot.path}
            names = self._root._names(spot.inner)
            return points | names if points else names
        fd = spot.bind.open(spot.inner, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(fd) as entries:
                return {entry.name: _look(entry) for entry in entries}
        finally:
            os.close(fd)

    def listdir(self, path: AnyPath = "/") -> list[str]:
        """The names in directory `path`, in no order."""
        return list(self._names(path))

    def scandir(self, path: AnyPath = "/") -> Entries[str]:
        """The entries of directory `path`, as os.scandir has them."""
        base = text(path)
        return Entries(DirEntry(name, join(base, name), self._stat_entry, look) for name, look in self._names(path).items())

    def _stat_entry(self, path: str | bytes, follow: bool) -> os.stat_result:
        return self.stat(path, follow_symlinks=follow)

    @names_path
    def getxattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> bytes:
        """The value of an xattr."""
        return self._ask(
            path,
            follow_symlinks,
            lambda p: self._root.getxattr(p, attribute, follow_symlinks=False),
            lambda there, through: os.getxattr(there, attribute, follow_symlinks=through),
        )

    @names_path
    def listxattr(self, path: AnyPath = "/", *, follow_symlinks: bool = True) -> list[str]:
        """The names of all xattrs."""
        return self._ask(
            path,
            follow_symlinks,
            lambda p: self._root.listxattr(p, follow_symlinks=False),
            lambda there, through: os.listxattr(there, follow_symlinks=through),
        )

    # --- opening ------------------------------------------------------------------------------------------------------

    @names_path
    def open_fd(self, path: AnyPath, flags: int, mode: int = 0o777) -> int:
        """os.open: a file descriptor of the real file."""
        exclusive = flags & os.O_CREAT and flags & os.O_EXCL
        spot = self._find(path, follow=not (flags & os.O_NOFOLLOW or exclusive))
        if spot.bind is None:
            return self._root.open_fd(spot.inner + "/" * (spot.slash and spot.st is None), flags, mode)
        if spot.st is None:
            if not flags & os.O_CREAT:
                raise fail(errno.ENOENT)
            if spot.slash:
                raise fail(errno.EISDIR)
        elif exclusive:
            raise fail(errno.EEXIST)
        elif flags & os.O_CREAT and stat.S_ISDIR(spot.st.st_mode):
            raise fail(errno.EISDIR)
        if spot.bind.read_only and _writes(flags, spot.st):
            raise fail(errno.EROFS)
        return spot.bind.open(spot.inner, flags | os.O_NOFOLLOW, mode if flags & (os.O_CREAT | os.O_TMPFILE) else 0)

    def open(self, path: AnyPath, mode: str = "r", **options: Any) -> IO[Any]:
        """builtins.open of `path`, with the same options."""
        return builtins.open(os.fspath(path), mode, opener=lambda _, flags: self.open_fd(path, flags, 0o666), **options)

    # --- names --------------------------------------------------------------------------------------------------------

    def _make(
        self, path: AnyPath, ours: Callable[[str], None], theirs: Callable[[str, int], None], *, dir: bool = False
    ) -> None:
        spot = self._find(path, follow=False)
        if spot.st is not None:
            raise fail(errno.EEXIST)
        if spot.bind is None:
            ours(spot.inner + "/" * spot.slash)
            return
        if spot.slash and not dir:
            raise fail(errno.ENOENT)
        if spot.bind.read_only:
            raise fail(errno.EROFS)
        with spot.bind.at(spot.inner) as (fd, name):
            theirs(name, fd)

    @names_path
    def mkdir(self, path: AnyPath, mode: int = 0o777) -> None:
        """os.mkdir."""
        self._make(path, lambda p: self._root.mkdir(p, mode), lambda n, fd: os.mkdir(n, mode, dir_fd=fd), dir=True)

    @names_path
    def mknod(self, path: AnyPath, mode: int = 0o600, device: int = 0) -> None:
        """os.mknod."""
        self._make(path, lambda p: self._root.mknod(p, mode, device), lambda n, fd: os.mknod(n, mode, device, dir_fd=fd))

    def mkfifo(self, path: AnyPath, mode: int = 0o666) -> None:
        """os.mkfifo."""
        self.mknod(path, stat.S_IFIFO | mode)

    def symlink(self, src: AnyPath, dst: AnyPath, target_is_directory: bool = False) -> None:
        """os.symlink."""
        self._symlink(dst, text(src))

    @names_path
    def _symlink(self, path: AnyPath, target: str) -> None:
        self._make(path, lambda p: self._root.symlink(target, p), lambda n, fd: os.symlink(target, n, dir_fd=fd))

    def _remove(
        self, path: AnyPath, ours: Callable[[str], None], theirs: Callable[[str, int], None], *, dir: bool = False
    ) -> None:
        spot = self._find(path, follow=False)
        bind, inner = self._parent(spot)
        if bind is None:
            if spot.busy and spot.path != "/":
                raise fail(_busy(spot, dir))
            ours(inner + "/" * spot.slash)
            return
        if bind.read_only:
            raise fail(errno.EROFS)
        if spot.st is None:
            raise fail(errno.ENOENT)
        if spot.busy:
            raise fail(_busy(spot, dir))
        with bind.at(inner) as (fd, name):
            theirs(name, fd)

    @names_path
    def unlink(self, path: AnyPath) -> None:
        """os.unlink. EBUSY for a mount point."""
        self._remove(path, self._root.unlink, lambda name, fd: os.unlink(name, dir_fd=fd))

    def remove(self, path: AnyPath) -> None:
        """os.remove."""
        self.unlink(path)

    @names_path
    def rmdir(self, path: AnyPath) -> None:
        """os.rmdir. EBUSY for a mount point."""
        last = text(path).rstrip("/").rpartition("/")[2]
        if last in (".", ".."):
            self._there(path)
            raise fail(errno.EINVAL if last == "." else errno.ENOTEMPTY)
        self._remove(path, self._root.rmdir, lambda name, fd: os.rmdir(name, dir_fd=fd), dir=True)

    def rename(self, src: AnyPath, dst: AnyPath, *, flags: int = 0) -> None:
        """os.rename; flags as of Overlay.rename. EXDEV between mounts; EBUSY for a mount point and what has one."""
        try:
            old, new = self._find(src, follow=False), self._find(dst, follow=False)
            (from_bind, source), (to_bind, target) = self._parent(old), self._parent(new)
            if from_bind is not to_bind:
                raise fail(errno.EXDEV)
            if old.dots or new.dots or "/" in (old.path, new.path):
                raise fail(errno.EBUSY)
            if from_bind is not None and from_bind.read_only:
                raise fail(errno.EROFS)
            if old.st is None:
                raise fail(errno.ENOENT)
            # the kernel would let mount points go along with a directory; here their paths are what holds them
            if any((point + "/").startswith(spot.path + "/") for spot in (old, new) for point in self._binds):
                raise fail(errno.EBUSY)
            if from_bind is None or to_bind is None:
                self._root.rename(source + "/" * old.slash, target + "/" * new.slash, flags=flags)
                return
            with from_bind.at(source) as (old_fd, old_name), to_bind.at(target) as (new_fd, new_name):
                ends = (os.fsencode(name + "/" * spot.slash) for name, spot in ((old_name, old), (new_name, new)))
                copyup.rename_at(old_fd, next(ends), new_fd, next(ends), flags)
        except OSError as e:
            e.filename, e.filename2 = os.fspath(src), os.fspath(dst)
            raise

    def replace(self, src: AnyPath, dst: AnyPath) -> None:
        """os.replace."""
        self.rename(src, dst)

    def link(self, src: AnyPath, dst: AnyPath, *, follow_symlinks: bool = False) -> None:
        """os.link. EXDEV from one mount to another."""
        try:
            old, new = self._there(src, follow=follow_symlinks), self._find(dst, follow=False)
            if new.st is not None:
                raise fail(errno.EEXIST)
            if new.bind is not None and new.bind.read_only:
                raise fail(errno.EROFS)
            if old.bind is not new.bind:
                raise fail(errno.EXDEV)
            if old.bind is None or new.bind is None:
                self._root.link(old.inner, new.inner + "/" * new.slash)
                return
            with old.bind.at(old.inner) as (old_fd, old_name), new.bind.at(new.inner) as (new_fd, new_name):
                there = new_name + "/" * new.slash
                os.link(old_name, there, src_dir_fd=old_fd, dst_dir_fd=new_fd, follow_symlinks=False)
        except OSError as e:
            e.filename, e.filename2 = os.fspath(src), os.fspath(dst)
            raise

    # --- attributes ---------------------------------------------------------------------------------------------------

    @names_path
    def chmod(self, path: AnyPath, mode: int, *, follow_symlinks: bool = True) -> None:
        """os.chmod."""
        self._ask(
            path,
            follow_symlinks,
            lambda p: self._root.chmod(p, mode, follow_symlinks=follow_symlinks),
            lambda there, through: os.chmod(there, mode, follow_symlinks=through),
            change=True,
        )

    @names_path
    def chown(self, path: AnyPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """os.chown."""
        self._ask(
            path,
            follow_symlinks,
            lambda p: self._root.chown(p, uid, gid, follow_symlinks=False),
            lambda there, through: os.chown(there, uid, gid, follow_symlinks=through),
            change=True,
        )

    def lchown(self, path: AnyPath, uid: int, gid: int) -> None:
        """os.lchown."""
        self.chown(path, uid, gid, follow_symlinks=False)

    @names_path
    def utime(
        self,
        path: AnyPath,
        times: tuple[float, float] | None = None,
        *,
        ns: tuple[int, int] | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        """os.utime."""
        given: dict[str, Any] = {"times": times} if ns is None else {"ns": ns}
        self._ask(
            path,
            follow_symlinks,
            lambda p: self._root.utime(p, **given, follow_symlinks=False),
            lambda there, through: os.utime(there, **given, follow_symlinks=through),
            change=True,
        )

    @names_path
    def truncate(self, path: AnyPath, length: int) -> None:
        """os.truncate."""
        self._ask(
            path, True, lambda p: self._root.truncate(p, length), lambda there, _: os.truncate(there, length), change=True
        )

    @names_path
    def setxattr(
        self, path: AnyPath, attribute: str | bytes, value: bytes, flags: int = 0, *, follow_symlinks: bool = True
    ) -> None:
        """os.setxattr."""
        self._ask(
            path,
            follow_symlinks,
            lambda p: self._root.setxattr(p, attribute, value, flags, follow_symlinks=False),
            lambda there, through: os.setxattr(there, attribute, value, flags, follow_symlinks=through),
            change=True,
        )

    @names_path
    def removexattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> None:
        """os.removexattr."""
        self._ask(
            path,
            follow_symlinks,
            lambda p: self._root.removexattr(p, attribute, follow_symlinks=False),
            lambda there, through: os.removexattr(there, attribute, follow_symlinks=through),
            change=True,
        )


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


def _busy(spot: Spot, dir: bool) -> int:
    """Why a mount point cannot be removed: the kernel sees first that it is of the other kind."""
    assert spot.st is not None
    if stat.S_ISDIR(spot.st.st_mode) == dir:
        return errno.EBUSY
    return errno.ENOTDIR if dir else errno.EISDIR


def _writes(flags: int, st: os.stat_result | None) -> bool:
    """Whether such an open changes the file system; a device, fifo or socket takes data on a read-only one too."""
    if st is None or flags & os.O_TMPFILE == os.O_TMPFILE:
        return True
    if flags & os.O_PATH or not stat.S_ISREG(st.st_mode):
        return False
    return flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)


def _look(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return Look.LINK
    if entry.is_dir(follow_symlinks=False):
        return Look.DIR
    return Look.FILE if entry.is_file(follow_symlinks=False) else Look.OTHER
