"""View: several directories seen as one, read-only. Reading is here; overlay/writable.py adds an upper.

Paths are the merged tree's own: "/etc/motd" and "etc/motd" are the same file, ".." stops at the root, and a symlink leads
nowhere but into the merged tree. str or bytes, as in os.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Iterator, Sequence
from os import stat as os_stat
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self, overload

from overlaykit.overlay.entries import DirEntry, Entries
from overlaykit.overlay.layers import DiskLayer, Layer, TreeLayer, read_names
from overlaykit.overlay.markers import Markers, place
from overlaykit.overlay.nodes import Found, Handle, Node
from overlaykit.overlay.readonly import ReadOnly
from overlaykit.overlay.resolve import DOTS, AnyPath, Last, Place, Raced, Resolver, names_path, text
from overlaykit.overlay.stack import Stack, fail
from overlaykit.tree.table import StrPath, Tree
from overlaykit.tree.whiteout import WhiteoutFormat

WRITES = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
DIRECTORY_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
PATH_ONLY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # the flags that O_PATH leaves a meaning


def most_open() -> int:
    """Directory descriptors to keep: a quarter of what the process may have, so that its own files find room."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(soft // 4, 8192)) if soft != resource.RLIM_INFINITY else 8192


def open_layers(lowers: Sequence[StrPath], trees: Sequence[Tree | None] | None, markers: Markers) -> list[Layer]:
    """The layers of directories `lowers`, which the trees (if given) describe."""
    if isinstance(lowers, str | bytes):
        raise TypeError(f"lowers are a list of directories, and not one: {lowers!r}")
    if trees is not None and len(trees) != len(lowers):
        raise ValueError(f"{len(lowers)} lowers, but {len(trees)} trees")
    roots = [Handle(os.open(lower, DIRECTORY_FLAGS)) for lower in lowers]
    return [
        DiskLayer(root, markers) if tree is None else TreeLayer(root, tree)
        for root, tree in zip(roots, trees or [None] * len(roots), strict=True)
    ]


@functools.cache
def is_protected(what: str) -> bool:
    """The fs.protected_* setting of the running kernel."""
    try:
        return Path(f"/proc/sys/fs/protected_{what}").read_text().strip() != "0"
    except OSError:
        return False


class View(ReadOnly):
    """A read-only merged view of `lowers`, bottom first; a context manager. All changes are refused with EROFS.

    trees      one Tree per lower, for layers that are committed: then lookups make no system calls. None for a layer
               that has to be asked itself, such as one with redirects, of which a Tree knows nothing
    userxattr  marks are user.overlay.* and not trusted.overlay.*
    data       directories that hold data for metacopies only, bottom first
    """

    def __init__(
        self,
        lowers: Sequence[StrPath],
        *,
        trees: Sequence[Tree | None] | None = None,
        userxattr: bool = False,
        data: Sequence[StrPath] = (),
    ) -> None:
        if not lowers:
            raise ValueError("a view needs at least one lower directory")
        markers = Markers(WhiteoutFormat.USERXATTR if userxattr else WhiteoutFormat.OVERLAY)
        self._setup(Stack(open_layers(lowers, trees, markers), markers, data=open_layers(data, None, markers)))

    def _setup(self, stack: Stack) -> None:
        self._stack = stack
        self._markers = stack.markers
        self._resolver = Resolver(stack, most_open=most_open())
        self._known = self._resolver.known
        self._closed = False

    def close(self) -> None:
        """Let go of all directories. Files that were opened stay open; closing twice is no error."""
        if not self._closed:
            self._closed = True
            self._resolver.forget()
            root = self._stack.root
            root.forget_children()
            root.handles.clear()
            root.set_upper(None)
            root.lowers, root.names, root.dead = (), {}, True
            self._stack.layers.clear()
            self._stack.data.clear()

    @property
    def closed(self) -> bool:
        return self._closed

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._what()}>"

    def _what(self) -> str:
        return "closed" if self._closed else f"of {len(self._stack.layers)} lowers"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} can be neither copied nor pickled: it has directories open")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _walk(
        self, path: AnyPath, *, follow: bool = True, parent: bool = False, look: bool = True, creating: bool = False
    ) -> Place:
        if self._closed:
            raise ValueError("the overlay is closed")
        return self._resolver.walk(text(path), follow=follow, parent=parent, look=look, creating=creating)

    def _reach(self, path: AnyPath, *, follow: bool = True) -> Place:
        """Where `path` leads; ENOENT if nothing is there."""
        place = self._walk(path, follow=follow)
        if place.found is None:
            raise fail(errno.ENOENT)
        return place

    def _real(self, place: Place) -> tuple[Handle, str]:
        """The directory on disk that has what is at `place`, and its name there."""
        assert place.found is not None
        return self._stack.handle(place.node, place.found.layer), place.found.entry or place.name

    def _if_still_there(self, place: Place) -> None:
        """For a system call that failed outside the lock: Raced if that is because another thread was there in between."""
        assert place.found is not None
        now, before = self._stack.find(place.node, place.name), place.found
        if now is None or (now.layer, now.st.st_ino, now.st.st_mode) != (before.layer, before.st.st_ino, before.st.st_mode):
            raise Raced

    # --- attributes -----------------------------------------------------------------------------------------------

    def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> os.stat_result:
        """os.stat of `path`. A copy goes on having the number of its lower file, as far as that can be known."""
        if type(path) is str:
            head, _, name = path.rpartition("/")
            node = self._known.get(head)
            if node is not None and not node.dead and name not in DOTS:
                # The short way: a directory somebody has been to, and a file or directory that upper or a lower has.
                if node.upper_fd >= 0:
                    try:
                        st = os_stat(name, dir_fd=node.upper_fd, follow_symlinks=False)
                    except OSError:
                        pass
                    else:
                        kind = st.st_mode & 0o170000
                        if (kind == 0o100000 and st.st_size) or kind == 0o040000:
                            return st if node.impure is False else self._numbered(st, node, name)
                        return self._stat(path, follow_symlinks)
                names = node.names
                if names is not None and (value := names.get(name, 0)) & 1:  # Look.FILE or Look.DIR
                    try:
                        st = os_stat(name, dir_fd=node.handles[value >> 2].fd, follow_symlinks=False)
                    except (OSError, KeyError):
                        pass
                    else:
                        if self._stack.index is None or st.st_nlink == 1:
                            return st
        return self._stat(path, follow_symlinks)

    @names_path
    def _stat(self, path: AnyPath, follow_symlinks: bool) -> os.stat_result:
        return self._shown(self._reach(path, follow=follow_symlinks))

    def _shown(self, place: Place) -> os.stat_result:
        """What stat says of `place`."""
        assert place.found is not None
        return place.found.st

    def _numbered(self, st: os.stat_result, node: Node, name: str) -> os.stat_result:
        """`st` of `name`, which upper's directory of `node` has, as it is shown."""
        return st

    def lstat(self, path: AnyPath) -> os.stat_result:
        """os.lstat of `path`."""
        return self.stat(path, follow_symlinks=False)

    @names_path
    def statvfs(self, path: AnyPath = "/") -> os.statvfs_result:
        """os.statvfs of the file system that `path` is on: upper's, once it is copied up."""
        handle, _ = self._real(self._reach(path))
        return os.statvfs(handle.fd)

    @names_path
    def access(self, path: AnyPath, mode: int, *, effective_ids: bool = False, follow_symlinks: bool = True) -> bool:
        """Whether the caller may do `mode` (os.R_OK | os.W_OK | os.X_OK) with `path`; os.F_OK: whether it is there."""
        try:
            place = self._reach(path, follow=follow_symlinks)
        except OSError:
            return False
        assert place.found is not None
        if mode & os.W_OK and not self._accepts_writes(place.found):
            return False
        handle, name = self._real(place)
        return os.access(name, mode, dir_fd=handle.fd, effective_ids=effective_ids, follow_symlinks=False)

    def _accepts_writes(self, found: Found) -> bool:
        return not (stat.S_ISREG(found.st.st_mode) or stat.S_ISDIR(found.st.st_mode) or stat.S_ISLNK(found.st.st_mode))

    @overload
    def readlink(self, path: bytes | os.PathLike[bytes]) -> bytes: ...
    @overload
    def readlink(self, path: str | os.PathLike[str]) -> str: ...
    def readlink(self, path: AnyPath) -> str | bytes:
        """The target of symlink `path`, as it is written. EINVAL if it is none."""
        target = self._readlink(path)
        return os.fsencode(target) if isinstance(os.fspath(path), bytes) else target

    @names_path
    def _readlink(self, path: AnyPath) -> str:
        place = self._reach(path, follow=False)
        handle, name = self._real(place)
        try:
            return os.readlink(name, dir_fd=handle.fd)
        except OSError:
            self._if_still_there(place)
            raise

    @names_path
    def getxattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> bytes:
        """The value of an xattr. The overlay's own are hidden (ENODATA), as in a mount."""
        found = self._reach(path, follow=follow_symlinks)
        handle, base = self._real(found)
        name = self._markers.escape(os.fsdecode(attribute))
        try:
            return os.getxattr(place(handle.fd, base), name, follow_symlinks=False)
        except OSError:
            self._if_still_there(found)
            raise

    @names_path
    def listxattr(self, path: AnyPath = "/", *, follow_symlinks: bool = True) -> list[str]:
        """The names of all xattrs but the overlay's own."""
        found = self._reach(path, follow=follow_symlinks)
        handle, base = self._real(found)
        return self._markers.visible(os.listxattr(place(handle.fd, base), follow_symlinks=False))

    # --- directories ----------------------------------------------------------------------------------------------

    @overload
    def listdir(self, path: bytes | os.PathLike[bytes]) -> list[bytes]: ...
    @overload
    def listdir(self, path: str | os.PathLike[str] = "/") -> list[str]: ...
    def listdir(self, path: AnyPath = "/") -> list[str] | list[bytes]:
        """The names in directory `path`, in no order; never a whiteout."""
        names = list(self._names(path))
        return list(map(os.fsencode, names)) if isinstance(os.fspath(path), bytes) else names

    @names_path
    def _names(self, path: AnyPath) -> dict[str, int]:
        place = self._reach(path)
        if not place.is_dir:
            raise fail(errno.ENOTDIR)
        return self._listing(self._resolver.directory(place))

    def _listing(self, node: Node) -> dict[str, int]:
        """The names in `node`, the last two bits of each its Look. Nobody may change it."""
        if node.dead:
            return {}
        if node.upper_fd < 0:  # whoever may not read the directory must not be served from memory
            handle = self._stack.handle(node, node.lowers[0][0])
            os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=handle.fd))
            return self._stack.lower_names(node)
        names: dict[str, int] = {}
        gone = read_names(node.upper_fd, self._markers, 0, names)
        lower = self._stack.lower_names(node)
        if lower:
            names = {**lower, **names} if names else lower
        for name in gone:
            del names[name]
        return names

    @overload
    def scandir(self, path: bytes | os.PathLike[bytes]) -> Entries[bytes]: ...
    @overload
    def scandir(self, path: str | os.PathLike[str] = "/") -> Entries[str]: ...
    def scandir(self, path: AnyPath = "/") -> Entries[str] | Entries[bytes]:
        """The entries of directory `path`, as os.scandir has them."""
        given = os.fspath(path)
        names = self._names(path)
        if isinstance(given, bytes):
            prefix = given if given.endswith(b"/") else given + b"/"
            return Entries(
                DirEntry(os.fsencode(name), prefix + os.fsencode(name), self._look, look & 3) for name, look in names.items()
            )
        base = given if given.endswith("/") else given + "/"
        return Entries(DirEntry(name, base + name, self._look, look & 3) for name, look in names.items())

    def _look(self, path: str | bytes, follow: bool) -> os.stat_result:
        return self.stat(path, follow_symlinks=follow)

    # --- opening --------------------------------------------------------------------------------------------------

    def open_fd(self, path: AnyPath, flags: int, mode: int = 0o777) -> int:
        """os.open: a file descriptor of the real file, so that reading and writing cost what they cost on the host.

        A directory's descriptor is that of one layer, the topmost: good for fsync, fstat and fchdir, not for its names.
        """
        return self._open(path, flags, mode)

    @names_path
    def _open(self, path: AnyPath, flags: int, mode: int) -> int:
        flags |= os.O_CLOEXEC
        if flags & os.O_PATH:
            flags &= PATH_ONLY
        creating, exclusive = flags & os.O_CREAT, flags & os.O_EXCL
        temporary = flags & os.O_TMPFILE == os.O_TMPFILE
        if (creating and flags & os.O_DIRECTORY) or (temporary and not flags & os.O_ACCMODE):
            raise fail(errno.EINVAL)
        follow = not (flags & os.O_NOFOLLOW or (creating and exclusive))
        place = self._walk(path, follow=follow, creating=bool(creating))
        if creating and place.last is not Last.NAME:
            raise fail(errno.EEXIST if exclusive else errno.EISDIR)
        if place.found is None:
            if not creating:
                raise fail(errno.ENOENT)
            return self._create(place, flags, mode)
        if creating and exclusive:
            raise fail(errno.EEXIST)
        if creating:
            self._may_open_in_sticky(place)
        kind = place.found.st.st_mode
        if flags & os.O_DIRECTORY and not stat.S_ISDIR(kind):
            raise fail(errno.ENOTDIR)
        if temporary:
            return self._create_unnamed(place, flags, mode)
        if stat.S_ISLNK(kind) and not flags & os.O_PATH:
            raise fail(errno.ELOOP)
        if stat.S_ISDIR(kind) and (creating or flags & WRITES):
            raise fail(errno.EISDIR)
        return self._open_found(place, flags & ~(os.O_CREAT | os.O_EXCL))

    def _may_open_in_sticky(self, place: Place) -> None:
        """EACCES for an O_CREAT that finds somebody else's file in a world-writable sticky directory.

        fs/namei.c, may_create_in_sticky. Asked for here, since what exists is opened without O_CREAT.
        """
        assert place.found is not None
        parent, st = self._stack.find_self(place.node).st, place.found.st
        if parent.st_mode & 0o1002 != 0o1002 or st.st_uid in (parent.st_uid, os.geteuid()):
            return
        if stat.S_ISREG(st.st_mode) and not is_protected("regular"):
            return
        if stat.S_ISFIFO(st.st_mode) and not is_protected("fifos"):
            return
        if not stat.S_ISDIR(st.st_mode) and not stat.S_ISLNK(st.st_mode):
            raise fail(errno.EACCES)

    def _open_found(self, place: Place, flags: int) -> int:
        """A descriptor of what is there; `flags` no longer create anything."""
        assert place.found is not None
        if stat.S_ISREG(place.found.st.st_mode) and not flags & os.O_PATH:
            if flags & WRITES:
                raise fail(errno.EROFS)
            handle, name = self._stack.source(place.node, place.name, place.found)
        else:
            handle, name = self._real(place)
        return self._open_real(place, handle, name, flags)

    def _open_real(self, place: Place, handle: Handle, name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW, dir_fd=handle.fd)
        except OSError:
            self._if_still_there(place)
            raise

    def _create(self, place: Place, flags: int, mode: int) -> int:
        raise fail(errno.EROFS)

    def _create_unnamed(self, place: Place, flags: int, mode: int) -> int:
        raise fail(errno.EROFS)

    def names(self, path: AnyPath = "/") -> Iterator[str]:
        """The names in directory `path`, one after another."""
        return iter(self._names(path))
