"""What Python people reach for on top of the system calls: makedirs, walk, rmtree, copytree, glob, exists."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, Protocol

from overlaykit._ext import copyup
from overlaykit.overlay.entries import Entries
from overlaykit.overlay.resolve import AnyPath, text

if TYPE_CHECKING:
    from overlaykit.overlay.paths import OverlayPath

DOTS = frozenset(("", ".", ".."))
MAGIC = re.compile("[*?[]")
OnError = Callable[[OSError], object]


def join(directory: str, name: str) -> str:
    return directory + name if directory.endswith("/") or not directory else f"{directory}/{name}"


class OsNames(Protocol):
    """Methods of a View in terms of its system calls, which are declared first and made elsewhere."""

    def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> os.stat_result: ...
    def lstat(self, path: AnyPath) -> os.stat_result: ...
    def scandir(self, path: str) -> Entries[str]: ...
    def readlink(self, path: str) -> str: ...
    def open_fd(self, path: AnyPath, flags: int, mode: int = 0o777) -> int: ...
    def open(self, path: AnyPath, mode: str = "r") -> IO[Any]: ...
    def mkdir(self, path: AnyPath, mode: int = 0o777) -> None: ...
    def rmdir(self, path: AnyPath) -> None: ...
    def unlink(self, path: AnyPath) -> None: ...
    def symlink(self, src: AnyPath, dst: AnyPath) -> None: ...
    def mknod(self, path: AnyPath, mode: int = 0o600, device: int = 0) -> None: ...
    def chmod(self, path: AnyPath, mode: int) -> None: ...
    def chown(self, path: AnyPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None: ...
    def rename(self, src: AnyPath, dst: AnyPath) -> None: ...
    def link(self, src: AnyPath, dst: AnyPath) -> None: ...
    def utime(
        self, path: AnyPath, times: None = None, *, ns: tuple[int, int] | None = None, follow_symlinks: bool = True
    ) -> None: ...
    def listxattr(self, path: AnyPath, *, follow_symlinks: bool = True) -> list[str]: ...
    def getxattr(self, path: AnyPath, attribute: str, *, follow_symlinks: bool = True) -> bytes: ...
    def setxattr(
        self, path: AnyPath, attribute: str, value: bytes, flags: int = 0, *, follow_symlinks: bool = True
    ) -> None: ...

    # --- asking ---------------------------------------------------------------------------------------------------

    def exists(self, path: AnyPath) -> bool:
        """os.path.exists: False for a dangling symlink, and for what cannot be reached."""
        return self._mode(path, True) != 0

    def lexists(self, path: AnyPath) -> bool:
        """os.path.lexists: True for a dangling symlink too."""
        return self._mode(path, False) != 0

    def isdir(self, path: AnyPath) -> bool:
        return stat.S_ISDIR(self._mode(path, True))

    def isfile(self, path: AnyPath) -> bool:
        return stat.S_ISREG(self._mode(path, True))

    def islink(self, path: AnyPath) -> bool:
        return stat.S_ISLNK(self._mode(path, False))

    def _mode(self, path: AnyPath, follow: bool) -> int:
        try:
            return self.stat(path, follow_symlinks=follow).st_mode
        except (OSError, ValueError):
            return 0

    def path(self, path: AnyPath = "/") -> OverlayPath:
        """`path` as an object in pathlib's shape."""
        from overlaykit.overlay.paths import OverlayPath

        return OverlayPath(self, text(path))

    def read_bytes(self, path: AnyPath) -> bytes:
        with self.open(path, "rb") as f:
            data: bytes = f.read()
            return data

    def write_bytes(self, path: AnyPath, data: bytes) -> int:
        with self.open(path, "wb") as f:
            return f.write(data)

    # --- whole trees ----------------------------------------------------------------------------------------------

    def walk(
        self, top: AnyPath = "/", topdown: bool = True, onerror: OnError | None = None, followlinks: bool = False
    ) -> Iterator[tuple[str, list[str], list[str]]]:
        """os.walk: (directory, names of directories in it, other names), and `dirs` may be edited when topdown."""
        directory = text(top)
        dirs: list[str] = []
        files: list[str] = []
        try:
            for entry in self.scandir(directory):
                (dirs if entry.is_dir() else files).append(entry.name)
        except OSError as e:
            if onerror is not None:
                onerror(e)
            return
        if topdown:
            yield directory, dirs, files
        for name in dirs:
            path = join(directory, name)
            if followlinks or not self.islink(path):
                yield from self.walk(path, topdown, onerror, followlinks)
        if not topdown:
            yield directory, dirs, files

    def fwalk(
        self, top: AnyPath = "/", topdown: bool = True, onerror: OnError | None = None, *, follow_symlinks: bool = False
    ) -> Iterator[tuple[str, list[str], list[str], int]]:
        """os.fwalk: as walk, with a descriptor of the directory (one layer's: see open_fd), closed at the next step."""
        for directory, dirs, files in self.walk(top, topdown, onerror, follow_symlinks):
            fd = self.open_fd(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield directory, dirs, files, fd
            finally:
                os.close(fd)

    def makedirs(self, name: AnyPath, mode: int = 0o777, exist_ok: bool = False) -> None:
        """os.makedirs: `name` and every directory above it that is missing."""
        path = text(name).rstrip("/") or "/"
        head = path.rpartition("/")[0]
        if head and not self.exists(head):
            with contextlib.suppress(FileExistsError):  # another thread was faster
                self.makedirs(head, exist_ok=True)
        if path.rpartition("/")[2] == ".":
            return
        try:
            self.mkdir(path, mode)
        except OSError:
            if not exist_ok or not self.isdir(path):
                raise

    def rmtree(self, path: AnyPath, ignore_errors: bool = False) -> None:
        """shutil.rmtree: remove directory `path` and all that is in it. A symlink is refused (ENOTDIR)."""
        top = text(path)
        try:
            if not stat.S_ISDIR(self.lstat(top).st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), top)
            for entry in list(self.scandir(top)):
                if entry.is_dir(follow_symlinks=False):
                    self.rmtree(entry.path, ignore_errors)
                else:
                    self.unlink(entry.path)
            self.rmdir(top)
        except OSError:
            if not ignore_errors:
                raise

    def copytree(self, src: AnyPath, dst: AnyPath, symlinks: bool = False, *, dirs_exist_ok: bool = False) -> str:
        """shutil.copytree inside the merged tree, with modes, times and xattrs; gives `dst`.

        symlinks: they are copied as such; else what they point to is.
        """
        source, target = text(src), text(dst)
        entries = list(self.scandir(source))
        self.makedirs(target, exist_ok=dirs_exist_ok)
        for entry in entries:
            to = join(target, entry.name)
            st = entry.stat(follow_symlinks=not symlinks)
            if stat.S_ISDIR(st.st_mode):
                self.copytree(entry.path, to, symlinks, dirs_exist_ok=dirs_exist_ok)
            elif stat.S_ISLNK(st.st_mode):
                self.symlink(self.readlink(entry.path), to)
                self._copy_attributes(entry.path, to, st, link=True)
            elif stat.S_ISREG(st.st_mode):
                self._copy_file(entry.path, to)
                self._copy_attributes(entry.path, to, st)
            else:
                self.mknod(to, st.st_mode, st.st_rdev)
                self._copy_attributes(entry.path, to, st)
        self._copy_attributes(source, target, self.stat(source))
        return target

    def _copy_file(self, src: str, dst: str) -> None:
        source = self.open_fd(src, os.O_RDONLY)
        try:
            target = self.open_fd(dst, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                copyup.copy_data(source, target, os.fstat(source).st_size)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _copy_attributes(self, src: str, dst: str, st: os.stat_result, *, link: bool = False) -> None:
        if not link:
            self.chmod(dst, stat.S_IMODE(st.st_mode))
        for name in self.listxattr(src, follow_symlinks=not link):
            try:
                self.setxattr(dst, name, self.getxattr(src, name, follow_symlinks=not link), follow_symlinks=not link)
            except OSError as e:  # as shutil.copystat: what the file system or our rights do not let through
                if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENODATA, errno.EINVAL, errno.EACCES):
                    raise
        self.utime(dst, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=not link)

    # --- patterns -------------------------------------------------------------------------------------------------

    def glob(self, pattern: AnyPath, *, recursive: bool = False, include_hidden: bool = False) -> list[str]:
        """glob.glob: the paths that match; "**" is any number of directories if `recursive`."""
        return list(self.iglob(pattern, recursive=recursive, include_hidden=include_hidden))

    def iglob(self, pattern: AnyPath, *, recursive: bool = False, include_hidden: bool = False) -> Iterator[str]:
        """glob, one path after another."""
        given = text(pattern)
        parts = [part for part in given.split("/") if part]
        yield from self._match("/" if given.startswith("/") else "", parts, given.endswith("/"), recursive, include_hidden)

    def _match(self, base: str, parts: list[str], slash: bool, recursive: bool, hidden: bool) -> Iterator[str]:
        if not parts:
            if base and (not slash or self.isdir(base)):
                yield base + "/" if slash and not base.endswith("/") else base
            return
        part, rest = parts[0], parts[1:]
        if recursive and part == "**":
            yield from self._match(base, rest, slash, recursive, hidden)
            for name, is_dir in self._names_below(base, hidden):
                path = join(base, name)
                if is_dir and not self.islink(path):
                    yield from self._match(path, parts, slash, recursive, hidden)
                elif not rest and not slash:
                    yield path
        elif not MAGIC.search(part):
            path = join(base, part)
            if self.lexists(path):
                yield from self._match(path, rest, slash, recursive, hidden)
        else:
            for name, is_dir in self._names_below(base, hidden or part.startswith(".")):
                if fnmatch.fnmatchcase(name, part) and (is_dir or not rest):
                    yield from self._match(join(base, name), rest, slash, recursive, hidden)

    def _names_below(self, base: str, hidden: bool) -> list[tuple[str, bool]]:
        try:
            entries = self.scandir(base or "/")
            return [(e.name, e.is_dir()) for e in entries if hidden or not e.name.startswith(".")]
        except OSError:  # not a directory, or not ours to read: no match
            return []
