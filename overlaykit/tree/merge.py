"""Stacks of layers: what one sees of them, and one changeset that does what all do. Lists of layers run bottom first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from overlaykit._ext import treemerge, whiteout
from overlaykit.errors import InvalidLayer
from overlaykit.tree.regular import normal_target, regular
from overlaykit.tree.table import IMPLIED_MODE, Flag, Kind, Rows, Strings, Tree, concat, from_entries


def merge(trees: Sequence[Tree]) -> Tree:
    """What one sees of the layers `trees`: whiteouts carried out, directories merged. Row i's `layer` says where it is from.

    InvalidLayer for a hard link to a lower file that is not there. Follows image-spec layer.md and overlayfs.rst; the same
    in plain Python is `resolve` in tests/reference.py.
    """
    return _resolve(trees, keep_whiteouts=False)


def squash(trees: Sequence[Tree]) -> Tree:
    """One changeset that does to any tree below it what the changesets `trees` do one after another."""
    return _resolve(trees, keep_whiteouts=True)


def merge_order(trees: Sequence[Tree], paths: Strings) -> tuple[Rows, npt.NDArray[np.uint8]]:
    """The rows of all trees (whose paths are `paths`) in tree order, and where a path repeats the one before (uint8)."""
    n = len(paths)
    layer_start = np.zeros(len(trees) + 1, np.int64)
    np.cumsum([len(t) for t in trees], out=layer_start[1:])
    order, same = np.empty(n, np.int64), np.empty(n, np.uint8)
    treemerge.merge_order(paths.arena, paths.start, layer_start, order, same)
    return order, same


def _resolve(trees: Sequence[Tree], *, keep_whiteouts: bool) -> Tree:
    if not trees:
        return regular(from_entries([]))
    table = concat(trees)
    order, same = merge_order(trees, table.paths)
    row, attr, flags = np.empty(len(table), np.int64), np.empty(len(table), np.int64), np.empty(len(table), np.uint8)
    made = whiteout.visible(
        table.paths.arena,
        table.paths.start,
        order,
        same,
        table.kind,
        table.flags,
        table.layer.astype(np.int64),
        keep_whiteouts,
        row,
        attr,
        flags,
    )
    row, attr, flags = row[:made], attr[:made], flags[:made]
    # One `take` by the row that has the attributes; what nobody wrote is a directory like any other.
    unwritten = attr < 0
    source = np.where(unwritten, row, attr)
    result = table.take(source)
    columns: dict[str, npt.NDArray[Any]] = {"flags": flags, "layer": table.layer[row]}
    if unwritten.any():
        for name, value in (("mode", IMPLIED_MODE), ("uid", 0), ("gid", 0), ("mtime_ns", 0), ("xattrs", -1)):
            column = getattr(result, name).copy()
            column[unwritten] = value
            columns[name] = column
    result = result.with_columns(**columns)
    if (flags & Flag.LOWER_LINK).any():
        result = _resolve_lower_links(result, trees, must=not keep_whiteouts)
    return result


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
