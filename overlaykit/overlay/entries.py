"""What scandir gives: names of a merged directory, each with what is known of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from overlaykit.overlay.layers import Look

Name = TypeVar("Name", str, bytes)


class DirEntry(Generic[Name]):
    """One name, in os.DirEntry's shape. What a layer already told costs nothing to ask again."""

    __slots__ = ("_followed", "_kind", "_look", "_st", "name", "path")

    def __init__(self, name: Name, path: Name, look: Callable[[Name, bool], os.stat_result], kind: int) -> None:
        self.name: Name = name
        self.path: Name = path
        self._look: Callable[[Name, bool], os.stat_result] = look
        self._kind = kind
        self._st: os.stat_result | None = None
        self._followed: os.stat_result | None = None

    def __fspath__(self) -> Name:
        return self.path

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        if self._st is None:
            self._st = self._look(self.path, False)
        if not (follow_symlinks and stat.S_ISLNK(self._st.st_mode)):
            return self._st
        if self._followed is None:
            self._followed = self._look(self.path, True)
        return self._followed

    def inode(self) -> int:
        return self.stat(follow_symlinks=False).st_ino

    def _mode(self) -> int:
        """What a symlink leads to."""
        try:
            return self.stat().st_mode
        except FileNotFoundError:  # a dangling symlink, or gone since
            return 0

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        if self._kind != Look.LINK or not follow_symlinks:
            return self._kind == Look.DIR
        return stat.S_ISDIR(self._mode())

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        if self._kind != Look.LINK or not follow_symlinks:
            return self._kind == Look.FILE
        return stat.S_ISREG(self._mode())

    def is_symlink(self) -> bool:
        return self._kind == Look.LINK


class Entries(Generic[Name]):
    """The iterator and context manager that scandir gives."""

    def __init__(self, entries: Iterator[DirEntry[Name]]) -> None:
        self._entries: Iterator[DirEntry[Name]] = entries

    def __iter__(self) -> Iterator[DirEntry[Name]]:
        return self

    def __next__(self) -> DirEntry[Name]:
        return next(self._entries)

    def __enter__(self) -> Entries[Name]:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._entries = iter(())
