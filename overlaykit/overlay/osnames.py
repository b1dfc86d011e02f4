"""What Python people reach for on top of the system calls: makedirs, walk, rmtree, copytree, glob, exists."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Protocol, TextIO, TypeVar, overload

from overlaykit._ext import copyup
from overlaykit.overlay.entries import Entries, leads_to_directory
from overlaykit.overlay.patterns import Pattern
from overlaykit.overlay.resolve import AnyPath, text

if TYPE_CHECKING:
    from _typeshed import OpenBinaryMode, OpenTextMode

    from overlaykit.overlay.paths import OverlayPath

OnError = Callable[[OSError], object]
Text = str | os.PathLike[str]
Bytes = bytes | os.PathLike[bytes]
Name = TypeVar("Name", str, bytes)
Ignore = Callable[[str, list[str]], Iterable[str]]
Step = tuple[Name, list[Name], list[Name]]  # of a walk: a directory, the directories in it, its other names


def join(directory: str, name: str) -> str:
    return directory + name if directory.endswith("/") or not directory else f"{directory}/{name}"


def in_bytes(steps: Iterable[Step[str]]) -> Iterator[Step[bytes]]:
    """The steps of a walk in bytes; what is taken out of a list of directories is not gone into, as with the others."""
    for directory, dirs, files in steps:
        names = list(map(os.fsencode, dirs))
        yield os.fsencode(directory), names, list(map(os.fsencode, files))
        dirs[:] = map(os.fsdecode, names)


class OsNames(Protocol):
    """Methods of a View in terms of its system calls, which are declared first and made elsewhere."""

    def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> os.stat_result: ...
    def lstat(self, path: AnyPath) -> os.stat_result: ...
    def scandir(self, path: str) -> Entries[str]: ...
    def readlink(self, path: str) -> str: ...
    def open_fd(self, path: AnyPath, flags: int, mode: int = 0o777) -> int: ...
    def mkdir(self, path: AnyPath, mode: int = 0o777) -> None: ...
    def rmdir(self, path: AnyPath) -> None: ...
    def unlink(self, path: AnyPath) -> None: ...
    def symlink(self, src: AnyPath, dst: AnyPath) -> None: ...
    def mknod(self, path: AnyPath, mode: int = 0o600, device: int = 0) -> None: ...
    def chmod(self, path: AnyPath, mode: int, *, follow_symlinks: bool = True) -> None: ...
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

    def host_paths(self, path: AnyPath, *, below: bool = False) -> list[str]:
        """The directory of the host that is shown at `path`; below: those too that are under it. None of a merged tree."""
        return []

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
        except (OSError, UnicodeError):
            return 0
        except ValueError:  # a NUL, which no name has; or a closed overlay, of which there is nothing to say
            if "\0" in os.fsdecode(path):
                return 0
            raise

    def path(self, path: AnyPath = "/") -> OverlayPath:
        """`path` as an object in pathlib's shape."""
        from overlaykit.overlay.paths import OverlayPath

        return OverlayPath(self, text(path))

    @overload
    def open(
        self,
        path: AnyPath,
        mode: OpenTextMode = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> TextIO: ...
    @overload
    def open(
        self,
        path: AnyPath,
        mode: OpenBinaryMode,
        buffering: int = -1,
        encoding: None = None,
        errors: None = None,
        newline: None = None,
    ) -> BinaryIO: ...
    @overload
    def open(
        self,
        path: AnyPath,
        mode: str,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]: ...
    def open(
        self,
        path: AnyPath,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """A file object, as the builtin open makes it: of the real file, on a real descriptor."""
        return builtins.open(
            os.fspath(path),
            mode,
            buffering,
            encoding,
            errors,
            newline,
            opener=lambda p, flags: self.open_fd(p, flags, 0o666),
        )

    def read_bytes(self, path: AnyPath) -> bytes:
        with self.open(path, "rb") as f:
            return f.read()

    def write_bytes(self, path: AnyPath, data: bytes) -> int:
        with self.open(path, "wb") as f:
            return f.write(data)

    # --- whole trees ----------------------------------------------------------------------------------------------
    #
    # Without recursion: a tree may be deeper than Python goes.

    @overload
    def walk(
        self, top: Bytes, topdown: bool = True, onerror: OnError | None = None, followlinks: bool = False
    ) -> Iterator[Step[bytes]]: ...
    @overload
    def walk(
        self, top: Text = "/", topdown: bool = True, onerror: OnError | None = None, followlinks: bool = False
    ) -> Iterator[Step[str]]: ...
    def walk(
        self, top: AnyPath = "/", topdown: bool = True, onerror: OnError | None = None, followlinks: bool = False
    ) -> Iterator[Step[str]] | Iterator[Step[bytes]]:
        """os.walk: (directory, names of directories in it, other names), and `dirs` may be edited when topdown."""
        steps = self._steps(text(top), topdown, onerror, followlinks)
        return in_bytes(steps) if isinstance(os.fspath(top), bytes) else steps

    def _steps(self, top: str, topdown: bool, onerror: OnError | None, followlinks: bool) -> Iterator[Step[str]]:
        todo: list[str | Step[str]] = [top]
        while todo:
            at = todo.pop()
            if isinstance(at, tuple):
                yield at
                continue
            dirs: list[str] = []
            files: list[str] = []
            try:
                for entry in self.scandir(at):
                    (dirs if leads_to_directory(entry) else files).append(entry.name)
            except OSError as e:
                if onerror is not None:
                    onerror(e)
                continue
            if topdown:
                yield at, dirs, files
            else:
                todo.append((at, dirs, files))
            for name in reversed(dirs):
                path = join(at, name)
                if followlinks or not self.islink(path):
                    todo.append(path)

    @overload
    def fwalk(
        self, top: Bytes, topdown: bool = True, onerror: OnError | None = None, *, follow_symlinks: bool = False
    ) -> Iterator[tuple[bytes, list[bytes], list[bytes], int]]: ...
    @overload
    def fwalk(
        self, top: Text = "/", topdown: bool = True, onerror: OnError | None = None, *, follow_symlinks: bool = False
    ) -> Iterator[tuple[str, list[str], list[str], int]]: ...
    def fwalk(
        self, top: Any = "/", topdown: bool = True, onerror: OnError | None = None, *, follow_symlinks: bool = False
    ) -> Iterator[tuple[Any, list[Any], list[Any], int]]:
        """os.fwalk: as walk, with a descriptor of the directory (one layer's: see open_fd), closed at the next step.

        What is wrong with `top` is raised, and not for onerror; a symlink gives nothing unless symlinks are followed.
        """
        self.stat(top)
        if not follow_symlinks and not stat.S_ISDIR(self.lstat(top).st_mode):
            return
        for directory, dirs, files in self.walk(top, topdown, onerror, follow_symlinks):
            try:
                fd = self.open_fd(directory, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as e:  # gone since, or not ours to open
                if onerror is not None:
                    onerror(e)
                continue
            try:
                yield directory, dirs, files, fd
            finally:
                os.close(fd)

    def makedirs(self, name: AnyPath, mode: int = 0o777, exist_ok: bool = False) -> None:
        """os.makedirs: `name` and every directory above it that is missing."""
        path = text(name)
        missing: list[str] = []
        head = path.rstrip("/").rpartition("/")[0]
        while head and not self.exists(head):
            missing.append(head)
            head = head.rpartition("/")[0]
        for head in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another thread was faster
                self.mkdir(head)
        if missing and path.endswith("/."):
            return
        try:
            self.mkdir(name, mode)
        except OSError:
            if not exist_ok or not self.isdir(path):
                raise

    def rmtree(self, path: AnyPath, ignore_errors: bool = False) -> None:
        """shutil.rmtree: remove directory `path` and all that is in it. A symlink is refused (ENOTDIR).

        ignore_errors: what can be removed goes, and the rest stays.
        """
        ignored = (OSError,) if ignore_errors else ()
        todo = [(text(path), False)]
        while todo:
            at, is_empty = todo.pop()
            with contextlib.suppress(*ignored):
                if is_empty:
                    self.rmdir(at)
                    continue
                if not stat.S_ISDIR(self.lstat(at).st_mode):  # also if it has just become a symlink
                    raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), at)
                todo.append((at, True))
                for entry in list(self.scandir(at)):
                    if entry.is_dir(follow_symlinks=False):
                        todo.append((entry.path, False))
                        continue
                    with contextlib.suppress(*ignored):
                        self.unlink(entry.path)

    def copytree(
        self,
        src: AnyPath,
        dst: AnyPath,
        symlinks: bool = False,
        ignore: Ignore | None = None,
        *,
        ignore_dangling_symlinks: bool = False,
        dirs_exist_ok: bool = False,
    ) -> str:
        """shutil.copytree inside the merged tree, with modes, times and xattrs; gives `dst`.

        symlinks                  they are copied as such; else what they point to is
        ignore                    which of a directory's names to leave out, such as shutil.ignore_patterns makes
        ignore_dangling_symlinks  leave out those that point to nothing; else they are errors
        Names that cannot be copied do not keep the others back: shutil.Error tells of all of them at the end.
        """
        source, target = text(src), text(dst)
        errors: list[tuple[str, str, str]] = []
        todo: list[tuple[str, str, bool]] = [(source, target, False)]
        while todo:
            at, to, is_full = todo.pop()
            try:
                if is_full:
                    self._copy_attributes(at, to, self.stat(at))
                    continue
                entries = list(self.scandir(at))
                left_out = ignore(at, [entry.name for entry in entries]) if ignore else ()
                self.makedirs(to, exist_ok=dirs_exist_ok)
            except OSError as e:
                if at == source and not is_full:
                    raise
                errors.append((at, to, str(e)))
                continue
            todo.append((at, to, True))
            for entry in entries:
                if entry.name in left_out:
                    continue
                path = join(to, entry.name)
                try:
                    if ignore_dangling_symlinks and entry.is_symlink() and not symlinks and not self.exists(entry.path):
                        continue
                    st = entry.stat(follow_symlinks=not symlinks)
                    if stat.S_ISDIR(st.st_mode):
                        todo.append((entry.path, path, False))
                    else:
                        self._copy_name(entry.path, path, st)
                except OSError as e:
                    errors.append((entry.path, path, str(e)))
        if errors:
            raise shutil.Error(errors)
        return target

    def _copy_name(self, src: str, dst: str, st: os.stat_result) -> None:
        """Copy what is no directory, and looks like `st`."""
        if stat.S_ISLNK(st.st_mode):
            self.symlink(self.readlink(src), dst)
        elif stat.S_ISREG(st.st_mode):
            self._copy_file(src, dst)
        else:
            self.mknod(dst, st.st_mode, st.st_rdev)
        self._copy_attributes(src, dst, st, link=stat.S_ISLNK(st.st_mode))

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

    @overload
    def glob(
        self, pathname: bytes, *, root_dir: AnyPath = "/", recursive: bool = False, include_hidden: bool = False
    ) -> list[bytes]: ...
    @overload
    def glob(
        self, pathname: Text, *, root_dir: AnyPath = "/", recursive: bool = False, include_hidden: bool = False
    ) -> list[str]: ...
    def glob(
        self, pathname: Any, *, root_dir: AnyPath = "/", recursive: bool = False, include_hidden: bool = False
    ) -> list[str] | list[bytes]:
        """glob.glob: the paths that match; "**" is any number of directories if `recursive`.

        Unlike glob's, "**" goes through no symlink: in an image some lead back to where they are.
        """
        return list(self.iglob(pathname, root_dir=root_dir, recursive=recursive, include_hidden=include_hidden))

    @overload
    def iglob(
        self, pathname: bytes, *, root_dir: AnyPath = "/", recursive: bool = False, include_hidden: bool = False
    ) -> Iterator[bytes]: ...
    @overload
    def iglob(
        self, pathname: Text, *, root_dir: AnyPath = "/", recursive: bool = False, include_hidden: bool = False
    ) -> Iterator[str]: ...
    def iglob(
        self, pathname: Text | bytes, *, root_dir: AnyPath = "/", recursive: bool = False, include_hidden: bool = False
    ) -> Iterator[str] | Iterator[bytes]:
        """glob, one path after another."""
        given = text(pathname)
        parts = [part for part in given.split("/") if part]
        pattern = Pattern(self, text(root_dir), given.endswith("/"), recursive, include_hidden)
        found = pattern.match("/" if given.startswith("/") else "", parts)
        return map(os.fsencode, found) if isinstance(pathname, bytes) else found
