"""Glob patterns on a merged tree: a name for a name, "*", "?" and "[...]" in one, "**" for any number of directories."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from overlaykit.overlay.entries import leads_to_directory

if TYPE_CHECKING:
    from overlaykit.overlay.osnames import OsNames

MAGIC = re.compile("[*?[]")


class Pattern:
    """A glob pattern at work in `fs`. slash: only directories match, and with a slash behind them."""

    def __init__(self, fs: OsNames, root: str, slash: bool, recursive: bool, hidden: bool) -> None:
        self.fs = fs
        self.root = root
        self.slash = slash
        self.recursive = recursive
        self.hidden = hidden

    def match(self, base: str, parts: list[str]) -> Iterator[str]:
        """The paths from directory `base` (from the root if it begins with a slash) on that match the `parts`."""
        if not parts:
            if base and (not self.slash or self.fs.isdir(self._place(base))):
                yield base + "/" if self.slash and not base.endswith("/") else base
            return
        part, rest = parts[0], parts[1:]
        if self.recursive and part == "**":
            while rest and rest[0] == "**":
                rest = rest[1:]  # says the same again
            yield from self._anywhere(base, rest)
        elif not MAGIC.search(part):
            path = posixpath.join(base, part)
            if self.fs.lexists(self._place(path)):
                yield from self.match(path, rest)
        else:
            for name, is_dir in self._names(base, self.hidden or part.startswith(".")):
                if fnmatch.fnmatchcase(name, part) and (is_dir or not rest):
                    yield from self.match(posixpath.join(base, name), rest)

    def _anywhere(self, base: str, rest: list[str]) -> Iterator[str]:
        if not rest and base and self.fs.isdir(self._place(base)):
            yield posixpath.join(base, "")  # as glob has it
        todo = [base]
        while todo:
            at = todo.pop()
            if rest or at != base:
                yield from self.match(at, rest)
            for name, is_dir in self._names(at, self.hidden):
                path = posixpath.join(at, name)
                if is_dir and not self.fs.islink(self._place(path)):
                    todo.append(path)
                elif not rest:
                    yield from self.match(path, rest)

    def _place(self, path: str) -> str:
        return path if path.startswith("/") else posixpath.join(self.root, path)

    def _names(self, base: str, hidden: bool) -> list[tuple[str, bool]]:
        try:
            entries = self.fs.scandir(self._place(base))
            return [(e.name, leads_to_directory(e)) for e in entries if hidden or not e.name.startswith(".")]
        except OSError:  # not a directory, or not ours to read: no match
            return []
