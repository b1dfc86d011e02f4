"""Paths of a merged tree as objects, in pathlib's shape: the pure part is a PurePosixPath, the rest asks the overlay."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import stat
from collections.abc import Iterator
from functools import total_ordering
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TextIO, overload

from overlaykit.overlay.resolve import MAX_LINKS
from overlaykit.overlay.stack import fail

if TYPE_CHECKING:
    from _typeshed import OpenBinaryMode, OpenTextMode

    from overlaykit.overlay.osnames import OsNames


@total_ordering
class OverlayPath:
    """A path in `fs`, a View or an Overlay. Two are equal if the paths and the overlays are."""

    __slots__ = ("fs", "pure")

    def __init__(self, fs: OsNames, *parts: str | os.PathLike[str]) -> None:
        self.fs = fs
        self.pure = PurePosixPath(*parts) if parts else PurePosixPath("/")

    def _make(self, pure: PurePosixPath) -> OverlayPath:
        return OverlayPath(self.fs, pure)

    # --- the path itself ------------------------------------------------------------------------------------------

    def __fspath__(self) -> str:
        return str(self.pure)

    def __str__(self) -> str:
        return str(self.pure)

    def __bytes__(self) -> bytes:
        return bytes(self.pure)

    def __repr__(self) -> str:
        return f"OverlayPath({str(self.pure)!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OverlayPath):
            return NotImplemented
        return self.fs is other.fs and self.pure == other.pure

    def __lt__(self, other: OverlayPath) -> bool:
        return self.pure < other.pure

    def __hash__(self) -> int:
        return hash((id(self.fs), self.pure))

    def __truediv__(self, other: str | os.PathLike[str]) -> OverlayPath:
        return self._make(self.pure / os.fspath(other))

    def joinpath(self, *others: str | os.PathLike[str]) -> OverlayPath:
        return self._make(self.pure.joinpath(*others))

    def as_posix(self) -> str:
        return self.pure.as_posix()

    @property
    def root(self) -> str:
        return self.pure.root

    anchor = root

    @property
    def name(self) -> str:
        return self.pure.name

    @property
    def stem(self) -> str:
        return self.pure.stem

    @property
    def suffix(self) -> str:
        return self.pure.suffix

    @property
    def suffixes(self) -> list[str]:
        return self.pure.suffixes

    @property
    def parts(self) -> tuple[str, ...]:
        return self.pure.parts

    @property
    def parent(self) -> OverlayPath:
        return self._make(self.pure.parent)

    @property
    def parents(self) -> tuple[OverlayPath, ...]:
        return tuple(map(self._make, self.pure.parents))

    def with_name(self, name: str) -> OverlayPath:
        return self._make(self.pure.with_name(name))

    def with_stem(self, stem: str) -> OverlayPath:
        return self._make(self.pure.with_stem(stem))

    def with_suffix(self, suffix: str) -> OverlayPath:
        return self._make(self.pure.with_suffix(suffix))

    def relative_to(self, *other: str | os.PathLike[str]) -> OverlayPath:
        return self._make(self.pure.relative_to(*other))

    def is_relative_to(self, *other: str | os.PathLike[str]) -> bool:
        return self.pure.is_relative_to(*other)

    def absolute(self) -> OverlayPath:
        """The path from the merged root, which is where all of them begin."""
        return self._make("/" / self.pure)

    def is_absolute(self) -> bool:
        return self.pure.is_absolute()

    def match(self, pattern: str) -> bool:
        return self.pure.match(pattern)

    # --- what is there --------------------------------------------------------------------------------------------

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return self.fs.stat(str(self), follow_symlinks=follow_symlinks)

    def lstat(self) -> os.stat_result:
        return self.fs.lstat(str(self))

    def exists(self) -> bool:
        return self.fs.exists(str(self))

    def is_dir(self) -> bool:
        return self.fs.isdir(str(self))

    def is_file(self) -> bool:
        return self.fs.isfile(str(self))

    def is_symlink(self) -> bool:
        return self.fs.islink(str(self))

    def is_fifo(self) -> bool:
        return self._kind() == stat.S_IFIFO

    def is_socket(self) -> bool:
        return self._kind() == stat.S_IFSOCK

    def is_block_device(self) -> bool:
        return self._kind() == stat.S_IFBLK

    def is_char_device(self) -> bool:
        return self._kind() == stat.S_IFCHR

    def _kind(self) -> int:
        return stat.S_IFMT(self.stat().st_mode) if self.exists() else 0

    def samefile(self, other: str | os.PathLike[str]) -> bool:
        return os.path.samestat(self.stat(), self.fs.stat(other))

    def readlink(self) -> OverlayPath:
        return self._make(PurePosixPath(self.fs.readlink(str(self))))

    def resolve(self, strict: bool = False) -> OverlayPath:
        """The path without symlinks and dots, as seen from the merged root. strict: OSError if it leads to nothing.

        RuntimeError if its symlinks lead round in a circle, as with pathlib.
        """
        if strict:
            self.stat()
        done = PurePosixPath("/")
        todo, hops = list(reversed(self.pure.parts)), 0
        while todo:
            part = todo.pop()
            if part == "/":
                done = PurePosixPath("/")
            elif part == "..":
                done = done.parent
            elif self.fs.islink(str(done / part)):
                hops += 1
                if hops > MAX_LINKS:
                    raise RuntimeError(f"symlink loop from {str(self)!r}") from fail(errno.ELOOP, str(self))
                todo.extend(reversed(PurePosixPath(self.fs.readlink(str(done / part))).parts))
            else:
                done = done / part
        return self._make(done)

    def iterdir(self) -> Iterator[OverlayPath]:
        for entry in self.fs.scandir(str(self)):
            yield self / entry.name

    def glob(self, pattern: str) -> Iterator[OverlayPath]:
        """pathlib's glob: "**" is any number of directories, and alone all of them. ValueError for no pattern."""
        if not pattern:
            raise ValueError(f"unacceptable pattern: {pattern!r}")
        if pattern.startswith("/"):
            raise NotImplementedError("a pattern begins in this directory, and not at the root")
        # That is no symlinks, and this directory whatever it is.
        everything = pattern.rstrip("/").rpartition("/")[2] == "**"
        base, own = posixpath.join(_quoted(str(self)), pattern + "/" * everything), str(self)
        for found in self.fs.iglob(base, recursive=True, include_hidden=True):
            path = found.rstrip("/") or "/"
            if not everything or path == own or not self.fs.islink(path):
                yield self._make(PurePosixPath(path))

    def rglob(self, pattern: str) -> Iterator[OverlayPath]:
        """glob in this directory and all below."""
        return self.glob(posixpath.join("**", pattern))

    # --- content and changes --------------------------------------------------------------------------------------

    @overload
    def open(
        self,
        mode: OpenTextMode = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> TextIO: ...
    @overload
    def open(
        self,
        mode: OpenBinaryMode,
        buffering: int = -1,
        encoding: None = None,
        errors: None = None,
        newline: None = None,
    ) -> BinaryIO: ...
    @overload
    def open(
        self,
        mode: str,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]: ...
    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        return self.fs.open(str(self), mode, buffering, encoding, errors, newline)

    def read_bytes(self) -> bytes:
        return self.fs.read_bytes(str(self))

    def read_text(self, encoding: str = "utf-8", errors: str | None = None) -> str:
        with io.TextIOWrapper(self.open("rb"), encoding, errors) as f:
            return f.read()

    def write_bytes(self, data: bytes) -> int:
        return self.fs.write_bytes(str(self), data)

    def write_text(self, data: str, encoding: str = "utf-8", errors: str | None = None, newline: str | None = None) -> int:
        with io.TextIOWrapper(self.open("wb"), encoding, errors, newline) as f:
            return f.write(data)

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if exist_ok and self.exists():
            self.fs.utime(str(self))
            return
        os.close(self.fs.open_fd(str(self), os.O_WRONLY | os.O_CREAT | (0 if exist_ok else os.O_EXCL), mode))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if parents:
            self.fs.makedirs(str(self), mode, exist_ok)
            return
        try:
            self.fs.mkdir(str(self), mode)
        except FileExistsError:
            if not exist_ok or not self.is_dir():
                raise

    def rmdir(self) -> None:
        self.fs.rmdir(str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.fs.unlink(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: str | os.PathLike[str]) -> OverlayPath:
        self.fs.rename(str(self), os.fspath(target))
        return self._make(PurePosixPath(os.fspath(target)))

    replace = rename

    def symlink_to(self, target: str | os.PathLike[str], target_is_directory: bool = False) -> None:
        self.fs.symlink(os.fspath(target), str(self))

    def hardlink_to(self, target: str | os.PathLike[str]) -> None:
        self.fs.link(os.fspath(target), str(self))

    def chmod(self, mode: int, *, follow_symlinks: bool = True) -> None:
        self.fs.chmod(str(self), mode, follow_symlinks=follow_symlinks)

    def lchmod(self, mode: int) -> None:
        self.chmod(mode, follow_symlinks=False)


def _quoted(path: str) -> str:
    """`path` as a pattern that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)
