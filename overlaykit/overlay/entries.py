"""What scandir gives: names of a merged directory, each with what is known of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from overlaykit.overlay.layers import Look

Name = TypeVar("Name", str, bytes)
DIR, LINK, FILE = Look.DIR.value, Look.LINK.value, Look.FILE.value  # to compare numbers with, for each of many names


class DirEntry(Generic[Name]):
    """One name, in os.DirEntry's shape. What a layer already told costs nothing to ask again.

    The slots _st and _followed are empty until somebody asks for them: a listing makes thousands of these.
    """

    __slots__ = ("_followed", "_kind", "_look", "_st", "name", "path")
    _st: os.stat_result
    _followed: os.stat_result

    def __init__(self, name: Name, path: Name, look: Callable[[Name, bool], os.stat_result], kind: int) -> None:
        self.name: Name = name
        self.path: Name = path
        self._look: Callable[[Name, bool], os.stat_result] = look
        self._kind = kind

    def __fspath__(self) -> Name:
        return self.path

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        try:
            st = self._st
        except AttributeError:
            st = self._st = self._look(self.path, False)
        if not (follow_symlinks and stat.S_ISLNK(st.st_mode)):
            return st
        try:
            return self._followed
        except AttributeError:
            st = self._followed = self._look(self.path, True)
            return st

    def inode(self) -> int:
        return self.stat(follow_symlinks=False).st_ino

    def _mode(self) -> int:
        """What a symlink leads to."""
        try:
            return self.stat().st_mode
        except FileNotFoundError:  # a dangling symlink, or gone since
            return 0

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        if self._kind != LINK or not follow_symlinks:
            return self._kind == DIR
        return stat.S_ISDIR(self._mode())

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        if self._kind != LINK or not follow_symlinks:
            return self._kind == FILE
        return stat.S_ISREG(self._mode())

    def is_symlink(self) -> bool:
        return self._kind == LINK


class Entries(Generic[Name]):
    """The iterator and context manager that scandir gives."""

    def __init__(self, entries: Generator[DirEntry[Name], None, None]) -> None:
        self._entries: Generator[DirEntry[Name], None, None] = entries

    def __iter__(self) -> Iterator[DirEntry[Name]]:
        return self._entries  # which a loop asks without our help

    def __next__(self) -> DirEntry[Name]:
        return next(self._entries)

    def __enter__(self) -> Entries[Name]:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._entries.close()


def leads_to_directory(entry: DirEntry[str]) -> bool:
    """Whether it is a directory, or a symlink to one. A symlink that leads round in a circle is none, nor one into what
    may not be searched: it must not cost its neighbours."""
    try:
        return entry.is_dir()
    except OSError:
        return False
