"""Stacks of layers: what one sees of them, and one changeset that does what all do. Lists of layers run bottom first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from overlaykit._ext import treecolumns, treestack
from overlaykit.errors import InvalidLayer
from overlaykit.tree.regular import find_target, regular
from overlaykit.tree.table import COLUMNS, IMPLIED_MODE, Flag, Kind, Rows, Strings, Tree, concat, from_entries

# What nobody wrote is a directory like any other.
UNWRITTEN = {"mode": IMPLIED_MODE, "uid": 0, "gid": 0, "mtime_ns": 0, "xattrs": -1}


def merge(trees: Sequence[Tree]) -> Tree:
    """What one sees of the layers `trees`: whiteouts carried out, directories merged. Row i's `layer` says where it is from.

    InvalidLayer for a hard link to a lower file that is not there. Follows image-spec layer.md and overlayfs.rst; the same
    in plain Python is `resolve` in tests/reference.py.
    """
    return _resolve(trees, keep_whiteouts=False)


def squash(trees: Sequence[Tree]) -> Tree:
    """One changeset that does to any tree below it what the changesets `trees` do one after another."""
    return _resolve(trees, keep_whiteouts=True)


def _resolve(trees: Sequence[Tree], *, keep_whiteouts: bool) -> Tree:
    if not trees:
        return regular(from_entries([]))
    # The highest flag, so that one look at the largest value tells whether a tree has it.
    if all(t.flags.max(initial=0) < Flag.LOWER_LINK for t in trees):
        return _visible(trees, range(len(trees)), keep_whiteouts=keep_whiteouts)
    table, runs = trees[0], [len(trees[0])]
    table = table.with_columns(layer=np.zeros(len(table)))
    first = 1  # the lowest tree that is not in the table yet
    for number, tree in enumerate(trees):
        if number and (tree.flags & Flag.LOWER_LINK).any():
            # What the layers below show comes first: it says which file the links name.
            table, runs = _stacked(table, runs, trees, first, number)
            below = _visible_rows(table, runs, keep_whiteouts=keep_whiteouts)
            table, runs = _stacked(below, [len(below)], trees, number, number + 1)
            table = _name_lower_files(below, table)
            first = number + 1
    table, runs = _stacked(table, runs, trees, first, len(trees))
    result = _visible_rows(table, runs, keep_whiteouts=keep_whiteouts)
    missing = np.flatnonzero((result.flags & Flag.LOWER_LINK) != 0)
    if len(missing) and not keep_whiteouts:
        row = int(missing[0])
        target = os.fsdecode(result.links[int(result.link[row])])
        raise InvalidLayer(f"{result.path(row)!r}: a hard link to {target!r}, which no layer has")
    return result


def _stacked(table: Tree, runs: list[int], trees: Sequence[Tree], first: int, end: int) -> tuple[Tree, list[int]]:
    """`table`, whose layers have `runs` rows, with trees first..end on top, their `layer` their numbers."""
    if first == end:
        return table, runs
    more = [len(t) for t in trees[first:end]]
    layer = np.concatenate([table.layer, np.repeat(np.arange(first, end), more)])
    return concat([table, *trees[first:end]], relabel=False).with_columns(layer=layer), runs + more


def _visible_rows(table: Tree, runs: Sequence[int], *, keep_whiteouts: bool) -> Tree:
    """What shows of the layers, `runs` rows each, that `table` is made of; side lists and numbers stay the table's."""
    ends = np.cumsum(runs).tolist()
    parts = [table.take(np.arange(end - n, end)) for n, end in zip(runs, ends, strict=True)]
    numbers = [int(part.layer[0]) if len(part) else 0 for part in parts]
    return _visible(parts, numbers, keep_whiteouts=keep_whiteouts, table=table)


def _visible(trees: Sequence[Tree], numbers: Sequence[int], *, keep_whiteouts: bool, table: Tree | None = None) -> Tree:
    """What shows of the layers `trees`; `layer` is their number, but what a `table` says of content stays.

    table: the trees are parts of this one, and share its side lists.
    """
    rows, size = sum(map(len, trees)), sum(len(t.paths.arena) for t in trees)
    layer, flags = np.empty(rows, np.uint16), np.empty(rows, np.uint8)
    start, arena = np.empty(rows + 1, np.int64), np.empty(size, np.uint8)
    source, row, begin = np.empty(rows, np.uint16), np.empty(rows, np.int64), np.empty(rows + 1, np.int64)
    made, pieces, unwritten = treestack.resolve(
        [t.paths.arena for t in trees],
        [t.paths.start for t in trees],
        [t.kind for t in trees],
        [t.flags for t in trees],
        keep_whiteouts,
        layer,
        flags,
        start,
        arena,
        source,
        row,
        begin,
    )
    start, layer = start[: made + 1], layer[:made]
    picked = _Pieces(
        trees, source[:pieces], row[:pieces], begin[: pieces + 1], unwritten=bool(unwritten), shared=table is not None
    )
    if table is not None:
        # Of the lowest layer, and of what is no directory, the row that shows is the one picked. It says where its content
        # is: in another layer than its own, for a name of a lower file.
        own = (layer == 0) | (picked.column("kind") != Kind.DIR)
        layer = np.where(own, picked.column("layer"), np.array(numbers, np.uint16)[layer])
    return _Merged(
        picked,
        paths=Strings(arena[: start[-1]], start),
        flags=flags[:made],
        layer=layer,
        xattr_sets=tuple(s for t in trees for s in t.xattr_sets) if table is None else table.xattr_sets,
    )


class _Merged(Tree):
    """A tree whose columns are put together when they are first asked for: many a merge is only asked for its paths."""

    def __init__(self, pieces: _Pieces, **known: Any) -> None:
        self.__dict__.update(known, _pieces=pieces)

    if not TYPE_CHECKING:  # to the type checker every column is there

        def __getattr__(self, name: str) -> Any:
            if name in COLUMNS:
                value = self._pieces.column(name)
            elif name == "links":
                value = self._pieces.links()
            else:
                raise AttributeError(name)
            return self.__dict__.setdefault(name, value)

    def with_columns(self, **columns: npt.NDArray[Any]) -> Tree:
        return self._whole().with_columns(**columns)

    def _whole(self) -> Tree:
        return Tree(**{f.name: getattr(self, f.name) for f in fields(Tree)})

    def __reduce__(self) -> tuple[Any, ...]:
        return _whole_tree, (self._whole().__dict__,)


@dataclass(frozen=True)
class _Pieces:
    """Rows of several trees: as `treestack.resolve` gives them, in pieces, each so many neighbours of one tree.

    unwritten  there are directories among them whose attributes no tree wrote
    shared     the trees are parts of one table: their indices into side lists, and their hard links, count alike
    """

    trees: Sequence[Tree]
    source: npt.NDArray[np.uint16]
    row: Rows
    begin: Rows
    unwritten: bool
    shared: bool

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of these rows; an index into a side list counts as after `concat`."""
        column = self._gather(name)
        if self.unwritten and name in UNWRITTEN:
            column[(self._gather("flags") & np.uint8(Flag.IMPLIED)) != 0] = UNWRITTEN[name]
        base = self._bases(name)
        if base.any():
            has = np.flatnonzero(column >= 0)
            column[has] += base[np.repeat(self.source, np.diff(self.begin))[has]]
        return column

    def links(self) -> Strings:
        return self.trees[0].links if self.shared else Strings.concat([t.links for t in self.trees])

    def _gather(self, name: str) -> npt.NDArray[Any]:
        columns = [getattr(t, name) for t in self.trees]
        parts, dtype, n = [c.view(np.uint8) for c in columns], np.dtype(COLUMNS[name]), int(self.begin[-1])
        if treecolumns.uniform(parts, dtype.itemsize):
            # One owner, no devices, no hard links: so it mostly is, and zeros come as pages that nobody has touched.
            value = next(c[0] for c in columns if len(c))
            return np.full(n, value, dtype) if value else np.zeros(n, dtype)
        column = np.empty(n, dtype)
        treecolumns.gather(parts, self.source, self.row, self.begin, dtype.itemsize, column.view(np.uint8))
        return column

    def _bases(self, name: str) -> npt.NDArray[np.int32]:
        """What to add to each tree's numbers in a column: how many the trees before it have."""
        counts = [0]
        if self.shared:
            pass
        elif name == "link":
            counts = [len(t.links) for t in self.trees]
        elif name == "xattrs":
            counts = [len(t.xattr_sets) for t in self.trees]
        elif name == "hardlink":
            counts = [int(t.hardlink.max(initial=-1)) + 1 for t in self.trees]
        return np.cumsum([0, *counts[:-1]]).astype(np.int32)


def _whole_tree(columns: dict[str, Any]) -> Tree:
    """What a pickled _Merged becomes."""
    return Tree(**columns)


def _name_lower_files(below: Tree, table: Tree) -> Tree:
    """`table`, whose first rows are `below`, with each hard link of the others made a name of the file that it names there:
    they share a hardlink number, so that they stay one file whatever shows in the end.

    A link to a link that `below` could not resolve either is one to the same place. What `below` does not have stays.
    """
    names = ("kind", "mode", "uid", "gid", "size", "mtime_ns", "rdev", "offset", "layer", "link", "xattrs", "hardlink")
    columns = {name: getattr(table, name).copy() for name in (*names, "flags")}
    group = int(table.hardlink.max(initial=-1)) + 1
    for i in np.flatnonzero((table.flags[len(below) :] & Flag.LOWER_LINK) != 0).tolist():
        row = len(below) + i
        found = find_target(below, table.links[int(table.link[row])])
        if found < 0 or below.kind[found] == Kind.WHITEOUT:
            continue
        if below.flags[found] & Flag.LOWER_LINK:
            columns["link"][row] = columns["link"][found]
            continue
        if below.kind[found] == Kind.DIR:
            raise InvalidLayer(f"{table.path(row)!r}: a hard link to the directory {below.path(found)!r}")
        if columns["hardlink"][found] < 0:
            columns["hardlink"][found] = group
            group += 1
        for name in names:
            columns[name][row] = columns[name][found]
        columns["flags"][row] &= ~np.uint8(Flag.LOWER_LINK)
    return table.with_columns(**columns)
