"""Mounted: an overlay at / and directories or files of the host at places in it, as one tree. What the kernel shows when
they are mounted so, in process. A tmpfs may be at such a place too, which goes when the tree is closed.

Symlinks are followed in the whole tree, so that one in the image may lead into a volume and one in a volume to the image;
none leads out of it. Between two mounts there is no rename and no link (EXDEV), a mount point cannot be removed (EBUSY),
and one that is read-only refuses changes (EROFS).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from overlaykit.overlay.bound import Bind, Bound
from overlaykit.overlay.entries import DirEntry, Entries
from overlaykit.overlay.layers import Look
from overlaykit.overlay.osnames import OsNames, join
from overlaykit.overlay.resolve import AnyPath, names_path, text
from overlaykit.overlay.stack import fail
from overlaykit.overlay.view import View
from overlaykit.overlay.writable import Overlay

R = TypeVar("R")
Part = View | Bind  # what shows a path: the overlay, or one of the mounts in it
MAX_LINKS = 40  # symlinks in one path, as the kernel has it


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a path leads: `inner` of `part`, with no symlinks left.

    path    in the whole tree
    st      None if nothing is there
    busy    it is a mount point itself
    dots    the "." or ".." that the path ended in
    slash   a slash came after it
    """

    path: str
    part: Part
    inner: str
    st: os.stat_result | None
    busy: bool
    dots: str
    slash: bool

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.st.st_mode) if self.st is not None else 0

    @property
    def read_only(self) -> bool:
        """Whether it is in a mount that takes no changes. An overlay that takes none says so itself."""
        return isinstance(self.part, Bind) and self.part.read_only


class Mounted(OsNames):
    """`root` with `mounts` in it, which may lie in each other; a context manager that closes both.

    Mount points that are missing are made, as Docker does it: directories 0755, files empty.
    """

    def __init__(self, root: View, mounts: Iterable[Bound], *, with_it: ExitStack | None = None) -> None:
        """root, and all that is to be closed with_it, belong to this object from now on, and are closed if a mount fails."""
        self._root = root
        self._with_it = with_it or ExitStack()
        self._binds: dict[str, Bind] = {}
        try:
            for mount in sorted(mounts, key=lambda mount: mount.target.count("/")):
                bind = Bind(mount.source, read_only=mount.read_only)
                self._with_it.callback(bind.close)
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
        self._with_it.close()

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
                part, inner = self._owner("/" + "/".join(here))
                target = part.readlink(inner)
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
        part, inner = self._owner(path)
        return Spot(path, part, inner, st, path in self._binds or path == "/", last if last in (".", "..") else "", slash)

    def _owner(self, path: str) -> tuple[Part, str]:
        """What shows `path`, and the path there."""
        head = path
        while head:
            if (bind := self._binds.get(head)) is not None:
                return bind, path[len(head) + 1 :]
            head = head.rpartition("/")[0]
        return self._root, path

    def _holder(self, spot: Spot) -> tuple[Part, str]:
        """The same, but of a mount point what has its name."""
        part, inner = self._owner(spot.path.rpartition("/")[0])
        name = spot.path.rpartition("/")[2]
        return part, spot.path if part is self._root else join(inner, name) if inner else name

    def _lstat(self, at: list[str]) -> os.stat_result | None:
        part, inner = self._owner("/" + "/".join(at))
        try:
            return part.lstat(inner)
        except FileNotFoundError:
            return None

    def _there(self, path: AnyPath, *, follow: bool = True) -> Spot:
        spot = self._find(path, follow=follow)
        if spot.st is None:
            raise fail(errno.ENOENT)
        return spot

    def host_paths(self, path: AnyPath, *, below: bool = False) -> list[str]:
        """The directory of the host that is shown at `path`, if a mount has it; below: those too that lie under it."""
        spot = self._there(path)
        found = spot.part.host_paths(spot.inner)
        if below:
            under = (bind for point, bind in self._binds.items() if point.startswith(f"{spot.path.rstrip('/')}/"))
            found += [path for bind in under for path in bind.host_paths("")]
        return found

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

    def _ask(self, path: AnyPath, follow: bool, ask: Callable[[Part, str, bool], R]) -> R:
        """What `ask` gives for the part of the tree that has `path`, the path there, and whether to follow it."""
        spot = self._there(path, follow=follow)
        return ask(spot.part, spot.inner, spot.kind != stat.S_IFLNK)

    @names_path
    def statvfs(self, path: AnyPath = "/") -> os.statvfs_result:
        """os.statvfs of the file system that `path` is on."""
        return self._ask(path, True, lambda part, p, _: part.statvfs(p))

    @names_path
    def access(self, path: AnyPath, mode: int, *, effective_ids: bool = False, follow_symlinks: bool = True) -> bool:
        """Whether the caller may do `mode` with `path`, as View.access."""
        try:
            spot = self._there(path, follow=follow_symlinks)
            if mode & os.W_OK and spot.read_only:
                return False
            through = spot.kind != stat.S_IFLNK
            return spot.part.access(spot.inner, mode, effective_ids=effective_ids, follow_symlinks=through)
        except OSError:
            return False

    @names_path
    def readlink(self, path: AnyPath) -> str:
        """The target of symlink `path`, as it is written. EINVAL if it is none."""
        spot = self._there(path, follow=False)
        if spot.kind != stat.S_IFLNK:
            raise fail(errno.EINVAL)
        return spot.part.readlink(spot.inner)

    @names_path
    def _names(self, path: AnyPath) -> dict[str, int]:
        spot = self._there(path)
        if spot.kind != stat.S_IFDIR:
            raise fail(errno.ENOTDIR)
        names = spot.part._names(spot.inner)
        if spot.part is not self._root:
            return names
        heads = (point.rpartition("/") for point in self._binds)
        points = {name: int(Look.OTHER) for head, _, name in heads if (head or "/") == spot.path}
        return points | names if points else names

    def listdir(self, path: AnyPath = "/") -> list[str]:
        """The names in directory `path`, in no order."""
        return list(self._names(path))

    def scandir(self, path: AnyPath = "/") -> Entries[str]:
        """The entries of directory `path`, as os.scandir has them."""
        base = text(path)
        names = self._names(path)
        return Entries(DirEntry(name, join(base, name), self._stat_entry, look & 3) for name, look in names.items())

    def _stat_entry(self, path: str | bytes, follow: bool) -> os.stat_result:
        return self.stat(path, follow_symlinks=follow)

    @names_path
    def getxattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> bytes:
        """The value of an xattr."""
        return self._ask(path, follow_symlinks, lambda part, p, follow: part.getxattr(p, attribute, follow_symlinks=follow))

    @names_path
    def listxattr(self, path: AnyPath = "/", *, follow_symlinks: bool = True) -> list[str]:
        """The names of all xattrs."""
        return self._ask(path, follow_symlinks, lambda part, p, follow: part.listxattr(p, follow_symlinks=follow))

    # --- opening ------------------------------------------------------------------------------------------------------

    @names_path
    def open_fd(self, path: AnyPath, flags: int, mode: int = 0o777) -> int:
        """os.open: a file descriptor of the real file."""
        exclusive = flags & os.O_CREAT and flags & os.O_EXCL
        spot = self._find(path, follow=not (flags & os.O_NOFOLLOW or exclusive))
        if isinstance(spot.part, View):
            return spot.part.open_fd(spot.inner + "/" * (spot.slash and spot.st is None), flags, mode)
        if spot.st is None:
            if not flags & os.O_CREAT:
                raise fail(errno.ENOENT)
            if spot.slash:
                raise fail(errno.EISDIR)
        elif exclusive:
            raise fail(errno.EEXIST)
        elif flags & os.O_CREAT and spot.kind == stat.S_IFDIR:
            raise fail(errno.EISDIR)
        if spot.read_only and _writes(flags, spot.st):
            raise fail(errno.EROFS)
        return spot.part.open_fd(spot.inner, flags | os.O_NOFOLLOW, mode)

    # --- names --------------------------------------------------------------------------------------------------------

    def _make(self, path: AnyPath, make: Callable[[Part, str], None], *, dir: bool = False) -> None:
        spot = self._find(path, follow=False)
        if spot.st is not None:
            raise fail(errno.EEXIST)
        if spot.part is not self._root:
            if spot.slash and not dir:
                raise fail(errno.ENOENT)
            if spot.read_only:
                raise fail(errno.EROFS)
        make(spot.part, spot.inner + "/" * spot.slash)

    @names_path
    def mkdir(self, path: AnyPath, mode: int = 0o777) -> None:
        """os.mkdir."""
        self._make(path, lambda part, p: part.mkdir(p, mode), dir=True)

    @names_path
    def mknod(self, path: AnyPath, mode: int = 0o600, device: int = 0) -> None:
        """os.mknod."""
        self._make(path, lambda part, p: part.mknod(p, mode, device))

    def mkfifo(self, path: AnyPath, mode: int = 0o666) -> None:
        """os.mkfifo."""
        self.mknod(path, stat.S_IFIFO | mode)

    def symlink(self, src: AnyPath, dst: AnyPath, target_is_directory: bool = False) -> None:
        """os.symlink."""
        self._symlink(dst, text(src))

    @names_path
    def _symlink(self, path: AnyPath, target: str) -> None:
        self._make(path, lambda part, p: part.symlink(target, p))

    def _remove(self, path: AnyPath, remove: Callable[[Part, str], None], *, dir: bool = False) -> None:
        spot = self._find(path, follow=False)
        part, inner = self._holder(spot)
        if isinstance(part, Bind):
            if part.read_only:
                raise fail(errno.EROFS)
            if spot.st is None:
                raise fail(errno.ENOENT)
        if spot.busy and spot.path != "/" and not _is_read_only(part):
            raise fail(_busy(spot, dir))
        remove(part, inner + "/" * (spot.slash and part is self._root))

    @names_path
    def unlink(self, path: AnyPath) -> None:
        """os.unlink. EBUSY for a mount point."""
        self._remove(path, lambda part, p: part.unlink(p))

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
        self._remove(path, lambda part, p: part.rmdir(p), dir=True)

    def rename(self, src: AnyPath, dst: AnyPath, *, flags: int = 0) -> None:
        """os.rename; flags as of Overlay.rename. EXDEV between mounts; EBUSY for a mount point and what has one."""
        try:
            old, new = self._find(src, follow=False), self._find(dst, follow=False)
            (part, source), (other, target) = self._holder(old), self._holder(new)
            if part is not other:
                raise fail(errno.EXDEV)
            if old.dots or new.dots or "/" in (old.path, new.path):
                raise fail(errno.EBUSY)
            if _is_read_only(part):
                raise fail(errno.EROFS)
            if old.st is None:
                raise fail(errno.ENOENT)
            # the kernel would let mount points go along with a directory; here their paths are what holds them
            if any((point + "/").startswith(spot.path + "/") for spot in (old, new) for point in self._binds):
                raise fail(errno.EBUSY)
            part.rename(source + "/" * old.slash, target + "/" * new.slash, flags=flags)
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
            if _is_read_only(new.part):
                raise fail(errno.EROFS)
            if old.part is not new.part:
                raise fail(errno.EXDEV)
            old.part.link(old.inner, new.inner + "/" * new.slash)
        except OSError as e:
            e.filename, e.filename2 = os.fspath(src), os.fspath(dst)
            raise

    # --- attributes ---------------------------------------------------------------------------------------------------

    def _change(self, path: AnyPath, follow: bool, change: Callable[[Part, str, bool], None]) -> None:
        """Have `change` done to what `_ask` would ask. EROFS in a mount that is read-only."""
        spot = self._there(path, follow=follow)
        if spot.read_only:
            raise fail(errno.EROFS)
        change(spot.part, spot.inner, spot.kind != stat.S_IFLNK)

    @names_path
    def chmod(self, path: AnyPath, mode: int, *, follow_symlinks: bool = True) -> None:
        """os.chmod."""
        self._change(path, follow_symlinks, lambda part, p, follow: part.chmod(p, mode, follow_symlinks=follow))

    @names_path
    def chown(self, path: AnyPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """os.chown."""
        self._change(path, follow_symlinks, lambda part, p, follow: part.chown(p, uid, gid, follow_symlinks=follow))

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
        self._change(path, follow_symlinks, lambda part, p, follow: part.utime(p, times, ns=ns, follow_symlinks=follow))

    @names_path
    def truncate(self, path: AnyPath, length: int) -> None:
        """os.truncate."""
        self._change(path, True, lambda part, p, _: part.truncate(p, length))

    @names_path
    def setxattr(
        self, path: AnyPath, attribute: str | bytes, value: bytes, flags: int = 0, *, follow_symlinks: bool = True
    ) -> None:
        """os.setxattr."""
        self._change(
            path, follow_symlinks, lambda part, p, follow: part.setxattr(p, attribute, value, flags, follow_symlinks=follow)
        )

    @names_path
    def removexattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> None:
        """os.removexattr."""
        self._change(path, follow_symlinks, lambda part, p, follow: part.removexattr(p, attribute, follow_symlinks=follow))


def _is_read_only(part: Part) -> bool:
    return part.read_only if isinstance(part, Bind) else not isinstance(part, Overlay)


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
