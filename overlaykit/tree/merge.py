"""Stacks of layers: what one sees of them, and one changeset that does what all do. Lists of layers run bottom first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from overlaykit._ext import treestack
from overlaykit.errors import InvalidLayer
from overlaykit.tree.regular import normal_target, regular
from overlaykit.tree.table import COLUMNS, IMPLIED_MODE, Flag, Kind, Rows, Strings, Tree, from_entries

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
    start, flags = start[: made + 1], flags[:made]
    result = _Merged(
        _Pieces(trees, source[:pieces], row[:pieces], begin[: pieces + 1], bool(unwritten)),
        paths=Strings(arena[: start[-1]], start),
        flags=flags,
        layer=layer[:made],
        links=Strings.concat([t.links for t in trees]),
        xattr_sets=tuple(s for t in trees for s in t.xattr_sets),
    )
    if (flags & np.uint8(Flag.LOWER_LINK)).any():
        return _resolve_lower_links(result, trees, must=not keep_whiteouts)
    return result


class _Merged(Tree):
    """A tree whose columns are put together when they are first asked for: many a merge is only asked for its paths."""

    def __init__(self, pieces: _Pieces, **known: Any) -> None:
        self.__dict__.update(known, _pieces=pieces)

    if not TYPE_CHECKING:  # to the type checker every column is there

        def __getattr__(self, name: str) -> npt.NDArray[Any]:
            if name not in COLUMNS:
                raise AttributeError(name)
            return self.__dict__.setdefault(name, self._pieces.column(name))

    def with_columns(self, **columns: npt.NDArray[Any]) -> Tree:
        return self._whole().with_columns(**columns)

    def _whole(self) -> Tree:
        return Tree(**{f.name: getattr(self, f.name) for f in fields(Tree)})

    def __reduce__(self) -> tuple[Any, ...]:
        return _whole_tree, (self._whole().__dict__,)


@dataclass(frozen=True)
class _Pieces:
    """Rows of several trees: as `treestack.resolve` gives them, in pieces, each so many neighbours of one tree.

    unwritten: there are directories among them whose attributes no tree wrote.
    """

    trees: Sequence[Tree]
    source: npt.NDArray[np.uint16]
    row: Rows
    begin: Rows
    unwritten: bool

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

    def _gather(self, name: str) -> npt.NDArray[Any]:
        columns = [getattr(t, name) for t in self.trees]
        parts, dtype, n = [c.view(np.uint8) for c in columns], np.dtype(COLUMNS[name]), int(self.begin[-1])
        if treestack.uniform(parts, dtype.itemsize):
            # One owner, no devices, no hard links: so it mostly is, and zeros come as pages that nobody has touched.
            value = next(c[0] for c in columns if len(c))
            return np.full(n, value, dtype) if value else np.zeros(n, dtype)
        column = np.empty(n, dtype)
        treestack.gather(parts, self.source, self.row, self.begin, dtype.itemsize, column.view(np.uint8))
        return column

    def _bases(self, name: str) -> npt.NDArray[np.int32]:
        """What to add to each tree's numbers in a column: how many the trees before it have."""
        counts = [0]
        if name == "link":
            counts = [len(t.links) for t in self.trees]
        elif name == "xattrs":
            counts = [len(t.xattr_sets) for t in self.trees]
        elif name == "hardlink":
            counts = [int(t.hardlink.max(initial=-1)) + 1 for t in self.trees]
        return np.cumsum([0, *counts[:-1]]).astype(np.int32)


def _whole_tree(columns: dict[str, Any]) -> Tree:
    """What a pickled _Merged becomes."""
    return Tree(**columns)


def _resolve_lower_links(result: Tree, trees: Sequence[Tree], *, must: bool) -> Tree:
    """`result` with each hard link into a lower layer made a name of the file that it names there.

    The file is what the layers below the link's own show. If it still shows, both become names of one file; if an upper
    layer has replaced it since, the link alone keeps it. must: a link to what is not there is an error.
    """
    names = ("kind", "mode", "uid", "gid", "size", "mtime_ns", "rdev", "offset", "layer", "link", "xattrs", "hardlink")
    columns = {name: getattr(result, name).copy() for name in (*names, "flags")}
    group = int(result.hardlink.max(initial=-1)) + 1
    beneath: dict[int, Tree] = {}
    for i in np.flatnonzero((result.flags & Flag.LOWER_LINK) != 0).tolist():
        layer = int(result.layer[i])
        target = normal_target(result.links[int(result.link[i])])
        if layer not in beneath:
            beneath[layer] = _resolve(trees[:layer], keep_whiteouts=not must)
        lower = beneath[layer]
        j = lower.find(target)
        if j < 0 or lower.kind[j] == Kind.WHITEOUT or lower.flags[j] & Flag.LOWER_LINK:
            if must:
                raise InvalidLayer(
                    f"{result.path(i)!r}: a hard link to {target.decode(errors='replace')!r}, which no layer has"
                )
            continue
        if lower.kind[j] == Kind.DIR:
            raise InvalidLayer(f"{result.path(i)!r}: a hard link to a directory")
        shown = result.find(target)
        if shown >= 0 and result.layer[shown] < layer:
            if columns["hardlink"][shown] < 0:
                columns["hardlink"][shown] = group
                group += 1
            for name in names:
                columns[name][i] = columns[name][shown]
        else:
            for name in ("kind", "mode", "uid", "gid", "size", "mtime_ns", "rdev", "offset", "layer"):
                columns[name][i] = getattr(lower, name)[j]
            # `lower` was made by concatenating the same trees from the bottom, so its side lists begin ours.
            columns["link"][i], columns["xattrs"][i], columns["hardlink"][i] = lower.link[j], lower.xattrs[j], -1
        columns["flags"][i] &= ~np.uint8(Flag.LOWER_LINK)
    return result.with_columns(**columns)
