"""Putting copies down: each name whole or not at all, made under another name beside its own and renamed.

Directories only give way to directories and other things to other things, as with Docker: a copy takes no tree away.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from overlaykit.errors import InvalidReference, Unsupported
from overlaykit.overlay.stack import fail
from overlaykit.store.items import Fill, Item
from overlaykit.store.places import Place
from overlaykit.tree import Entry, Kind, Loss, Losses
from overlaykit.tree.tarwrite import HOST_XATTRS

Owner = tuple[int, int] | None  # uid and gid; None: whoever copies

TEMPORARY = ".overlaykit-cp-"  # what a killed copy can leave behind begins so
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
NODES = {Kind.CHAR: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO}
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)  # a file system, or a kernel, that has no unnamed files
CANNOT = (errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL)  # what an xattr is refused with
IMPLIED_MODE = 0o755  # of directories that a tar does not mention


class Owners:
    """Whose the copies become.

    source     whoever owned the original, by number
    container  who the container's programs run as
    keep       whoever owned what was there before; a new name goes to the owner of its directory
    caller     whoever copies
    UID:GID    they
    """

    WORDS = ("source", "container", "keep", "caller")

    def __init__(self, how: str | None, target: Place) -> None:
        """how: None is what Docker does: source in a container, caller on the host. InvalidReference, Unsupported."""
        self.fixed: tuple[int, int] | None = None
        self.said = how is not None
        self.how = how or ("caller" if target.is_host else "source")
        if self.how == "container":
            if target.user is None:
                raise Unsupported("owner=container: the copy does not go to a container", hint="say UID:GID")
            self.fixed = target.user()
        elif self.how not in self.WORDS:
            uid, colon, gid = self.how.partition(":")
            if not (uid.isdecimal() and gid.isdecimal() and colon and max(int(uid), int(gid)) < 2**32 - 1):
                raise InvalidReference(f"owner {how!r} is none", hint=f"one of {', '.join(self.WORDS)}, UID:GID")
            self.fixed = int(uid), int(gid)

    def of(self, entry: Entry, look: Callable[[], os.stat_result]) -> Owner:
        """Whose the copy of `entry` becomes, None for the caller. look: what was there, else its directory."""
        if self.fixed is not None:
            return self.fixed
        if self.how == "keep":
            st = look()
            return st.st_uid, st.st_gid
        return None if self.how == "caller" else (entry.uid, entry.gid)


class Putter:
    """Puts items down at the path of `place`. What could not be kept is appended to `losses`.

    into           a directory that is at `path` keeps its own attributes: only what goes into it is copied
    makes_parents  directories that no item says are made: a tar may leave them out
    """

    def __init__(
        self,
        place: Place,
        owners: Owners,
        losses: Losses,
        *,
        into: bool = False,
        makes_parents: bool = False,
    ) -> None:
        self.place, self.fs, self.path, self.owners, self.losses = place, place.fs, place.path, owners, losses
        self.into, self.makes_parents = into, makes_parents
        self._parent = ""  # the last one made
        self._directories: list[tuple[str, Entry]] = []  # whose times and modes are set last: writing changes the former

    def place_of(self, relative: str) -> str:
        return f"{self.path.rstrip('/')}/{relative}" if relative else self.path

    def put(self, item: Item) -> None:
        """Put one item down; a directory comes before what is in it. OSError with its path."""
        path = self.place_of(item.entry.path)
        try:
            self._put(item, path)
        except OSError as e:
            if not getattr(e, "has_place", False):
                e.filename, e.filename2 = path, None
            raise

    def _put(self, item: Item, path: str) -> None:
        entry = item.entry
        if entry.kind == Kind.SOCKET:
            self._lose(entry, "a socket: no copy could be connected to")
            return
        parent = path.rpartition("/")[0] or "/"
        if self.makes_parents and parent != self._parent:
            self.fs.makedirs(parent, IMPLIED_MODE, exist_ok=True)
            self._parent = parent
        before = self._gives_way(path, entry)
        owner = self.owners.of(entry, lambda: before or self.fs.stat(parent))
        if entry.kind == Kind.DIR:
            if before is None:
                self.fs.mkdir(path, 0o700)
            elif not entry.path and self.into:
                return
            self._dress(path, entry, owner, mode=entry.mode | 0o700)
            self._set_xattrs(path, entry)
            self._directories.append((path, entry))
        elif item.link is not None:
            self._link(item, path, owner)
        elif entry.kind == Kind.FILE:
            assert item.fill is not None
            self._file(path, entry, item.fill, owner, is_new=before is None)
        else:
            self._special(path, entry, owner)

    def _gives_way(self, path: str, entry: Entry) -> os.stat_result | None:
        """What is at `path` now, None if nothing is. EISDIR, ENOTDIR for what must not be replaced by `entry`."""
        try:
            st = self.fs.lstat(path)
        except FileNotFoundError:
            return None
        if stat.S_ISDIR(st.st_mode) != (entry.kind == Kind.DIR):
            raise fail(errno.EISDIR if stat.S_ISDIR(st.st_mode) else errno.ENOTDIR)
        return st

    @contextmanager
    def _beside(self, path: str) -> Iterator[str]:
        """A free name in the same directory; what is made there takes the place of `path`, or goes again."""
        temporary = f"{path.rpartition('/')[0]}/{TEMPORARY}{secrets.token_hex(8)}"
        try:
            yield temporary
            self.fs.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                self.fs.unlink(temporary)
            raise

    def _file(self, path: str, entry: Entry, fill: Fill, owner: Owner, *, is_new: bool) -> None:
        if is_new and not entry.xattrs and self._unnamed(path, entry, fill, owner):
            return
        with self._beside(path) as temporary:
            if not self._unnamed(temporary, entry, fill, owner):
                fd = self.fs.open_fd(temporary, NEW, 0o600)
                try:
                    fill(fd)
                    self._dress(temporary, entry, owner, fd=fd)
                finally:
                    os.close(fd)
            self._set_xattrs(temporary, entry)

    def _unnamed(self, path: str, entry: Entry, fill: Fill, owner: Owner) -> bool:
        """Make a file that gets its name when it is whole: who is killed leaves nothing half there. False: not here."""
        link_fd = getattr(self.fs, "link_fd", None)
        if link_fd is None:
            return False
        try:
            fd = self.fs.open_fd(path.rpartition("/")[0] or "/", os.O_TMPFILE | os.O_WRONLY, 0o600)
        except OSError as e:
            if e.errno not in NO_TMPFILE:
                raise
            return False
        try:
            fill(fd)
            self._dress(path, entry, owner, fd=fd)
            link_fd(path, fd)
        finally:
            os.close(fd)
        return True

    def _special(self, path: str, entry: Entry, owner: Owner) -> None:
        try:
            with self._beside(path) as temporary:
                if entry.kind == Kind.SYMLINK:
                    self.fs.symlink(entry.link or "", temporary)
                else:
                    self.fs.mknod(temporary, NODES[entry.kind] | 0o600, entry.rdev)
                self._dress(temporary, entry, owner)
                self._set_xattrs(temporary, entry)
        except PermissionError:
            if entry.kind not in (Kind.CHAR, Kind.BLOCK):
                raise
            why = "only root can make devices" if os.geteuid() else "in a container it would be a whiteout"
            self._lose(entry, f"device {os.major(entry.rdev)}:{os.minor(entry.rdev)}: not made: {why}")

    def _link(self, item: Item, path: str, owner: Owner) -> None:
        assert item.link is not None
        try:
            with self._beside(path) as temporary:
                self.fs.link(self.place_of(item.link), temporary)
            # rename(2) does nothing if both are names of one file already.
            with suppress(FileNotFoundError):
                self.fs.unlink(temporary)
        except OSError as e:
            if e.errno not in (errno.EXDEV, errno.EMLINK) or item.fill is None:
                raise
            self._file(path, item.entry, item.fill, owner, is_new=False)  # a volume begins in between

    # --- attributes ---------------------------------------------------------------------------------------------------

    def _dress(self, path: str, entry: Entry, owner: Owner, *, mode: int | None = None, fd: int = -1) -> None:
        """Owner, mode and time of `entry`, in the order in which none undoes another; fd: of a file, if open."""
        if owner is not None and os.geteuid() == 0:
            os.chown(fd, *owner) if fd >= 0 else self.fs.chown(path, *owner, follow_symlinks=False)
        elif owner is not None and self.owners.said and owner != (os.geteuid(), os.getegid()):
            self._lose(entry, f"owner {owner[0]}:{owner[1]}: only root can give files away")
        if entry.kind != Kind.SYMLINK:
            mode = entry.mode if mode is None else mode
            os.chmod(fd, mode) if fd >= 0 else self.fs.chmod(path, mode)
        times = entry.mtime_ns, entry.mtime_ns
        os.utime(fd, ns=times) if fd >= 0 else self.fs.utime(path, ns=times, follow_symlinks=False)

    def _set_xattrs(self, path: str, entry: Entry) -> None:
        """After the owner, which takes a capability away; by path, where an overlay has its own names to keep apart."""
        for name, value in entry.xattrs.items():
            self._set_xattr(path, entry, name, value)

    def _set_xattr(self, path: str, entry: Entry, name: str, value: bytes) -> None:
        if name in HOST_XATTRS:
            self._lose(entry, f"xattr {name}: belongs to the host")
            return
        try:
            self.fs.setxattr(path, name, value, follow_symlinks=False)
        except OSError as e:
            if e.errno not in CANNOT:
                raise
            self._lose(entry, f"xattr {name}: {e.strerror}")

    def finish(self) -> None:
        """Give directories their modes and times, the deepest first: whatever was put in them changed the latter."""
        for path, entry in reversed(self._directories):
            if entry.mode != entry.mode | 0o700:
                self.fs.chmod(path, entry.mode)
            self.fs.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)

    def _lose(self, entry: Entry, what: str) -> None:
        inside = self.place_of(entry.path)
        self.losses.append(Loss((self.place.prefix + inside if self.place.is_host else inside).lstrip("/"), what))
