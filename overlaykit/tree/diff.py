"""What changed: the changeset that leads from one tree to another, and how a layer best says one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from overlaykit._ext import treemerge
from overlaykit.errors import InvalidLayer
from overlaykit.tree.regular import regular
from overlaykit.tree.table import (
    IMPLIED_MODE,
    Flag,
    Kind,
    Mask,
    Rows,
    Tree,
    concat,
    differing,
    empty_columns,
)


def diff(lower: Tree, upper: Tree, *, same_content: Mask | None = None) -> Tree:
    """The changeset that leads from `lower` to `upper`, in tree order: merge([lower, diff(lower, upper)]) == upper.

    Modified means another kind, mode, owner, size, time, device, link or xattrs. same_content: bool[len(upper)], False where
    the caller knows that the content differs although size and time agree.
    All names of a file come when one does, so that hard links stay together. Raises InvalidLayer if either has whiteouts.
    """
    for name, tree in (("lower", lower), ("upper", upper)):
        if tree.is_changeset:
            raise InvalidLayer(f"diff: {name} is a changeset; merge it with what is below it first")
    mine, theirs = pairs(lower, upper)
    both = np.flatnonzero((mine >= 0) & (theirs >= 0))
    chosen = np.zeros(len(upper), np.bool_)
    chosen[theirs[mine < 0]] = True
    # Among the names that both have: one that came or went makes no other file of those that stay.
    unlike = differing(lower, upper, pairs=(mine[both], theirs[both]))
    chosen[theirs[both[unlike]]] = True
    if same_content is not None:
        chosen |= ~same_content
    _add_names(upper, chosen)
    # A name that is gone is worth a whiteout only where its directory is still one: elsewhere it went with it.
    gone_place = np.flatnonzero(theirs < 0)
    gone = mine[gone_place]
    upper_row = np.full(len(lower), -1, np.int64)
    upper_row[mine[both]] = theirs[both]
    home = upper_row[lower.parents[gone]] if len(gone) else gone
    stays = (home >= 0) & (upper.kind[home] == Kind.DIR)
    implied = _missing_parents(upper, chosen, home[stays])
    return _changeset(lower, upper, chosen, implied, gone[stays], np.flatnonzero(theirs >= 0), gone_place[stays])


def pairs(lower: Tree, upper: Tree) -> tuple[Rows, Rows]:
    """For each path of either tree, in order: its row in lower and its row in upper, -1 where it has none."""
    n = len(lower) + len(upper)
    mine, theirs = np.empty(n, np.int64), np.empty(n, np.int64)
    a, b = lower.paths, upper.paths
    made = treemerge.match(a.arena, a.start, b.arena, b.start, mine, theirs)
    return mine[:made], theirs[:made]


def rows_in(lower: Tree, tree: Tree) -> Rows:
    """int64[len(tree)]: for each path of `tree` its row in `lower`, -1 where it has none."""
    mine, theirs = pairs(lower, tree)
    found = np.full(len(tree), -1, np.int64)
    found[theirs[theirs >= 0]] = mine[theirs >= 0]
    return found


def _add_names(upper: Tree, chosen: Mask) -> None:
    """Choose all names of every file of which one is chosen."""
    linked = upper.hardlink >= 0
    if linked.any():
        chosen |= linked & np.isin(upper.hardlink, upper.hardlink[chosen & linked])


def _missing_parents(upper: Tree, chosen: Mask, homes: Rows) -> Mask:
    """Which rows of upper must stand in the changeset just to hold others: IMPLIED directories."""
    implied = np.zeros(len(upper), np.bool_)
    rows = np.concatenate([upper.parents[np.flatnonzero(chosen)], homes, [0]])
    while len(rows):
        more = np.zeros(len(upper), np.bool_)
        more[rows[rows >= 0]] = True
        more &= ~implied
        implied |= more
        rows = upper.parents[np.flatnonzero(more)]
    return implied & ~chosen


def _changeset(
    lower: Tree, upper: Tree, chosen: Mask, implied: Mask, gone: Rows, upper_place: Rows, gone_place: Rows
) -> Tree:
    """The rows of upper that are chosen or implied, and whiteouts of the rows `gone` of lower, sorted by their places."""
    kept = np.flatnonzero(chosen | implied)
    order = np.argsort(np.concatenate([gone_place, upper_place[kept]]), kind="stable")
    picked = concat([lower.take(gone), upper.take(kept)]).take(order)
    is_gone = order < len(gone)
    is_held = np.concatenate([np.zeros(len(gone), np.bool_), implied[kept]])[order]
    blank = empty_columns(len(picked))
    blank["kind"][is_gone] = Kind.WHITEOUT
    blank["kind"][is_held] = Kind.DIR
    blank["flags"][is_held] = Flag.IMPLIED
    blank["mode"][is_held] = IMPLIED_MODE
    plain = ~(is_held | is_gone)
    for name, column in blank.items():
        column[plain] = getattr(picked, name)[plain]
    return picked.with_columns(**blank)


def hidden(changeset: Tree) -> Mask:
    """bool[n]: which rows lie below an opaque directory, so that not even a directory of theirs shows from lower."""
    opaque = np.flatnonzero((changeset.flags & Flag.OPAQUE) != 0)
    depth = np.zeros(len(changeset) + 1, np.int64)
    np.add.at(depth, opaque + 1, 1)
    np.add.at(depth, changeset.ends[opaque], -1)
    below: Mask = np.cumsum(depth[:-1]) > 0
    return below


def against(changeset: Tree, lower: Tree) -> Tree:
    """`changeset` as a layer on top of the merged tree `lower` best says it; both do the same to `lower`.

    Directories that nobody wrote get what `lower` says of them, since tools that unpack a layer alone would make them up.
    Whiteouts of what `lower` does not have go. An opaque mark goes where `lower` has no such directory, and becomes explicit
    whiteouts where no name under it comes back (image-spec layer.md, "Opaque Whiteout", prefers those). A root that is as
    below says nothing.
    """
    found = rows_in(lower, changeset)
    keep = ~((changeset.kind == Kind.WHITEOUT) & (found < 0))
    columns = {n: getattr(changeset, n).copy() for n in ("flags", "mode", "uid", "gid", "mtime_ns")}
    implied = np.flatnonzero(((changeset.flags & Flag.IMPLIED) != 0) & (found >= 0) & ~hidden(changeset))
    implied = implied[lower.kind[found[implied]] == Kind.DIR]
    borrowed = np.zeros(len(changeset), np.bool_)
    borrowed[implied] = True
    for name in ("mode", "uid", "gid", "mtime_ns"):
        columns[name][implied] = getattr(lower, name)[found[implied]]
    columns["flags"][implied] &= ~np.uint8(Flag.IMPLIED)
    extra: list[int] = []  # rows of lower to take away by name
    for row in np.flatnonzero((changeset.flags & Flag.OPAQUE) != 0).tolist():
        below = int(found[row])
        children = list(lower.children(below)) if below >= 0 and lower.kind[below] == Kind.DIR else []
        if any(changeset.find(lower.paths[c]) >= 0 for c in children):
            continue  # a name that comes back must not be merged with what it was
        columns["flags"][row] &= ~np.uint8(Flag.OPAQUE)
        extra += children
    if (
        len(changeset)
        and found[0] >= 0
        and not differing(lower.take(found[:1]), changeset.take(np.array([0])), links=False)[0]
    ):
        columns["flags"][0] |= np.uint8(Flag.IMPLIED)
    if borrowed[0]:
        columns["flags"][0] |= np.uint8(Flag.IMPLIED)
    kept = _borrow_xattrs(changeset.with_columns(**columns), lower, borrowed, found).take(keep)
    gone = lower.take(np.array(extra, np.int64))
    blank = empty_columns(len(gone))
    blank["kind"][:] = Kind.WHITEOUT
    return regular(concat([kept, gone.with_columns(**blank)], relabel=False))


def _borrow_xattrs(changeset: Tree, lower: Tree, borrowed: Mask, found: Rows) -> Tree:
    """`changeset` with the xattrs that `lower` has for the rows whose attributes are borrowed from there."""
    rows = np.flatnonzero(borrowed)
    rows = rows[lower.xattrs[found[rows]] >= 0]
    if not len(rows):
        return changeset
    xattrs = changeset.xattrs.copy()
    xattrs[rows] = lower.xattrs[found[rows]] + len(changeset.xattr_sets)
    return replace(changeset.with_columns(xattrs=xattrs), xattr_sets=changeset.xattr_sets + lower.xattr_sets)
