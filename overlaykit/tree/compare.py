"""Two whole trees compared, with an eye on content: what changed from one to the other, and by how much.

Size and times tell most of it. Where they cannot, the contents' fingerprints are asked for, and for those files only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from overlaykit.tree.changes import Change, changes
from overlaykit.tree.diff import diff, pairs
from overlaykit.tree.fingerprint import Fingerprints
from overlaykit.tree.merge import merge
from overlaykit.tree.regular import regular
from overlaykit.tree.table import Flag, Kind, Mask, Rows, Strings, Tree, concat
from overlaykit.tree.whiteout import oci_names

SECOND = 10**9


@dataclass(frozen=True)
class Side:
    """One of the two: a tree without whiteouts, and how to come by its contents.

    fingerprints  uint64[k, 2] of the files `rows`; None: only size and time are known
    layers        names of the layers that the tree's rows come from: where two sides share one, nothing need be read
    """

    tree: Tree
    fingerprints: Callable[[Rows], Fingerprints] | None = None
    layers: Sequence[str] = ()


def compare(lower: Side, upper: Side, *, content: bool = False) -> list[Change]:
    """What leads from `lower` to `upper`, as `changes` says it, in tree order; "content" among the reasons where it differs.

    Files of one size are read on both sides where their times differ, or are whole seconds, as most layers have them, so
    that an edit within the second would not show. content: read all of one size. A time in whole seconds is the same as one
    to the nanosecond within that second: a layer's tar has cut it.
    """
    mine, theirs = pairs(lower.tree, upper.tree)
    both = np.flatnonzero((mine >= 0) & (theirs >= 0))
    mine, theirs = mine[both], theirs[both]
    doubtful = _doubtful(lower, upper, mine, theirs, everything=content)
    same = np.ones(len(upper.tree), np.bool_)
    if lower.fingerprints and upper.fingerprints and doubtful.any():
        ours, others = lower.fingerprints(mine[doubtful]), upper.fingerprints(theirs[doubtful])
        same[theirs[doubtful]] = (ours == others).all(axis=1)
    edited = {upper.tree.path(row) for row in np.flatnonzero(~same).tolist()}
    after = upper.tree.mtime_ns.copy()
    after[theirs] = np.where(
        _same_second(lower.tree.mtime_ns[mine], after[theirs]), lower.tree.mtime_ns[mine], after[theirs]
    )
    changeset = diff(lower.tree, upper.tree.with_columns(mtime_ns=after), same_content=same)
    return list(changes(lower.tree, changeset, edited=edited))


def _doubtful(lower: Side, upper: Side, mine: Rows, theirs: Rows, *, everything: bool) -> Mask:
    """bool[k]: of which pairs of rows only the contents can tell whether they are the same."""
    a, b = lower.tree, upper.tree
    doubtful: Mask = (a.kind[mine] == Kind.FILE) & (b.kind[theirs] == Kind.FILE) & (a.size[mine] == b.size[theirs])
    doubtful &= a.size[mine] > 0
    if not everything:
        before, after = a.mtime_ns[mine], b.mtime_ns[theirs]
        doubtful &= (before != after) | (before % SECOND == 0)
    number = {name: i for i, name in enumerate(dict.fromkeys([*lower.layers, *upper.layers]))}
    if len(number) < len(lower.layers) + len(upper.layers):
        ours, others = (np.array([number[name] for name in side.layers] or [-1]) for side in (lower, upper))
        if lower.layers and upper.layers:
            one_layer = ours[a.layer[mine]] == others[b.layer[theirs]]
            doubtful &= ~(one_layer & (a.offset[mine] == b.offset[theirs]))
    return doubtful


def _same_second(before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> Mask:
    """bool[k]: which times, in nanoseconds, are the same but that one of them was cut to seconds."""
    same: Mask = (before // SECOND == after // SECOND) & ((before % SECOND == 0) | (after % SECOND == 0))
    return same


def as_files(layer: Tree) -> Tree:
    """A changeset as a plain tree, to be compared with others: its whiteouts and opaque marks as the .wh. files that a tar
    has, a hard link to a lower file as an empty file with that link."""
    if not layer.is_changeset:
        return merge([layer])
    gone = np.flatnonzero(layer.kind == Kind.WHITEOUT)
    opaque = np.flatnonzero((layer.flags & Flag.OPAQUE) != 0)
    names = oci_names(layer, gone, opaque)
    flags = layer.flags & ~np.uint8(Flag.OPAQUE | Flag.LOWER_LINK)
    rest = layer.with_columns(flags=flags).take(layer.kind != Kind.WHITEOUT)
    marks = replace(layer.take(np.concatenate([gone, opaque])), paths=Strings.of(names))
    zero = np.zeros(len(marks))
    marks = marks.with_columns(
        **dict.fromkeys(("kind", "flags", "mode", "uid", "gid", "size", "mtime_ns", "rdev"), zero),
        **dict.fromkeys(("link", "xattrs", "hardlink", "offset"), zero - 1),
    )
    return merge([regular(concat([rest, marks], relabel=False))])
