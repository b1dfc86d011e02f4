"""What a changeset does to the tree below it, a line a path, as docker diff prints it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

import numpy as np

from overlaykit.tree.diff import hidden, rows_in
from overlaykit.tree.table import Entry, Flag, Kind, Mask, Rows, Tree, from_entries, unlike_links, unlike_xattrs


class Change(NamedTuple):
    """One line of `docker diff`: kind A added, C changed, D deleted; the path begins with "/".

    reasons says what differs: "kind", "mode", "owner", "device", "content", "time", "link", "xattrs", or "below" for a
    directory that is listed because something in it is. Sizes in bytes; those of a removed directory count all below it.
    """

    kind: Literal["A", "C", "D"]
    path: str
    reasons: tuple[str, ...] = ()
    size_before: int = 0
    size_after: int = 0


def changes(lower: Tree, changeset: Tree, *, edited: Collection[str] = ()) -> Iterator[Change]:
    """What `changeset` does to the merged tree `lower`, as docker diff says it, in tree order.

    A directory counts as changed by its mode, its owner or its file capability, or because something below it changed: not
    by its time or size. A removed directory is one D, a replaced one a C, and the root is never listed. Unlike Docker, any
    xattr counts, and so does a time that differs by less than a second. edited: paths of files whose content is known to
    differ, although the size is the same.
    """
    if not len(lower):
        lower = from_entries([Entry("", Kind.DIR)])  # so that every row has one to look at
    before = rows_in(lower, changeset)
    below_opaque = hidden(changeset)
    changed = np.zeros(len(changeset), np.bool_)
    changed[[row for path in edited if (row := changeset.find(path)) >= 0]] = True
    paths = ["/" + path for path in changeset.paths.decoded()]
    own = _own(lower, before, changeset, paths, below_opaque, changed)
    extra = _hidden_names(lower, before, changeset, below_opaque)
    # A directory above something changed is changed too; children stand after parents, so go backwards.
    parents = changeset.parents.tolist()
    busy = [change is not None or row in extra for row, change in enumerate(own)]
    for row in range(len(own) - 1, 0, -1):
        if busy[row]:
            busy[parents[row]] = True
    found: list[Change] = []
    for row, change in enumerate(own):
        if row and busy[row]:
            found.append(change or Change("C", paths[row], ("below",)))
        found += extra.get(row, ())
    return iter(sorted(found, key=lambda c: os.fsencode(c.path).replace(b"/", b"\0")) if extra else found)


def _own(
    lower: Tree, before: Rows, changeset: Tree, paths: list[str], below_opaque: Mask, edited: Mask
) -> list[Change | None]:
    """What each row of the changeset does to its row of lower (-1: there is none); None if nothing."""
    own: list[Change | None] = [None] * len(changeset)
    gone, there = changeset.kind == Kind.WHITEOUT, before >= 0
    size = changeset.size.tolist()
    for row in np.flatnonzero(~gone & ~there).tolist():
        own[row] = Change("A", paths[row], size_after=size[row])
    removed = np.flatnonzero(gone & there)
    names = [paths[row] for row in removed.tolist()]
    for row, change in zip(removed.tolist(), _removed(lower, before[removed], names), strict=True):
        own[row] = change
    # What nobody wrote is as it is below, if that is a directory that shows.
    implied = ((changeset.flags & Flag.IMPLIED) != 0) & ~below_opaque & (lower.kind[before] == Kind.DIR)
    compared = np.flatnonzero(~gone & there & ~implied)
    lower_size = lower.size[before].tolist()
    why_each = reasons(lower, before[compared], changeset, compared, edited=edited[compared])
    for row, why in zip(compared.tolist(), why_each, strict=True):
        if why:
            own[row] = Change("C", paths[row], why, lower_size[row], size[row])
    if len(own):
        own[0] = None
    return own


def reasons(lower: Tree, mine: Rows, upper: Tree, theirs: Rows, *, edited: Mask | None = None) -> list[tuple[str, ...]]:
    """What differs between rows `mine` of lower and rows `theirs` of upper, one by one, as a Change says it; () for nothing.

    edited: where the content differs whatever the sizes say.
    """
    kind = upper.kind[theirs]
    unlike = {name: getattr(lower, name)[mine] != getattr(upper, name)[theirs] for name in UNLIKE}
    tests = {
        "mode": unlike["mode"],
        "owner": unlike["uid"] | unlike["gid"],
        "device": unlike["rdev"],
        "content": unlike["size"] if edited is None else unlike["size"] | edited,
        "link": unlike_links(lower, upper, mine, theirs),
        "xattrs": unlike_xattrs(lower, upper, mine, theirs),
        "time": unlike["mtime_ns"] & (kind != Kind.DIR),
    }
    other_kind = lower.kind[mine] != kind
    weights = sum((mask.astype(np.int64) << bit for bit, mask in enumerate(tests.values())), np.zeros(len(mine), np.int64))
    weights[other_kind] = -1
    # Few combinations serve many rows.
    words = {w: tuple(name for bit, name in enumerate(tests) if w >> bit & 1) for w in np.unique(weights).tolist()}
    words[-1] = ("kind",)
    return [words[w] for w in weights.tolist()]


UNLIKE = ("mode", "uid", "gid", "rdev", "size", "mtime_ns")


def _hidden_names(lower: Tree, before: Rows, changeset: Tree, below_opaque: Mask) -> dict[int, list[Change]]:
    """The names that each opaque directory, or one below such a one, takes away, by row of the changeset."""
    opaque = below_opaque | ((changeset.flags & Flag.OPAQUE) != 0)
    both = opaque & (before >= 0) & (changeset.kind == Kind.DIR) & (lower.kind[before] == Kind.DIR)
    extra = {}
    for row in np.flatnonzero(both).tolist():
        children = lower.children(int(before[row]))
        gone = [child for child in children if changeset.find(lower.paths[child]) < 0]
        if gone:
            extra[row] = _removed(lower, np.array(gone), ["/" + lower.path(child) for child in gone])
    return extra


def _removed(lower: Tree, rows: Rows, paths: list[str]) -> list[Change]:
    """That `rows` of lower, whose paths are `paths`, are gone, with all below them."""
    ends, sizes = lower.ends[rows], lower.size[rows]
    for i in np.flatnonzero(ends > rows + 1).tolist():
        sizes[i] = lower.size[rows[i] : ends[i]].sum()
    return [Change("D", path, size_before=size) for path, size in zip(paths, sizes.tolist(), strict=True)]
