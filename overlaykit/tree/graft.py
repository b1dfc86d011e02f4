"""Parts of trees: the rows of some paths with all that is below them, taken alone or put into another tree."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from overlaykit.tree.merge import merge
from overlaykit.tree.table import Flag, Kind, Mask, Tree


def below(tree: Tree, paths: Iterable[str]) -> Mask:
    """bool[n]: which rows are at one of `paths` or under it."""
    found = np.zeros(len(tree), np.bool_)
    for path in paths:
        row = tree.find(path)
        if row >= 0:
            found[row : int(tree.ends[row])] = True
    return found


def restrict(tree: Tree, paths: Iterable[str]) -> Tree:
    """`tree`, a changeset perhaps, with nothing but `paths` and what is under them. Their parents are IMPLIED."""
    chosen = below(tree, paths)
    held = _parents(tree, chosen) & ~chosen
    return _implied(tree, held).take(chosen | held)


def without(tree: Tree, paths: Iterable[str]) -> Tree:
    """`tree` but for `paths` and what is under them."""
    return tree.take(~below(tree, paths))


def graft(base: Tree, donor: Tree, paths: Iterable[str]) -> Tree:
    """The merged tree `base`, but that `paths` and what is under them are as in the merged tree `donor`.

    A directory on the way that base lacks comes from donor as well.
    """
    wanted = list(paths)
    chosen = below(donor, wanted)
    parents = _parents(donor, chosen) & ~chosen
    shared = parents.copy()
    for row in np.flatnonzero(parents).tolist():
        found = base.find(donor.paths[row])
        shared[row] = found >= 0 and base.kind[found] == Kind.DIR
    part = _implied(donor, shared).take(chosen | parents)
    return merge([without(base, wanted), part])


def _parents(tree: Tree, chosen: Mask) -> Mask:
    """Which rows hold one that is chosen; the root does always."""
    rows = np.concatenate([np.flatnonzero(chosen), [0]])
    found = np.zeros(len(tree), np.bool_)
    while len(rows):
        found[rows] = True
        rows = np.unique(tree.parents[rows])
        rows = rows[rows >= 0]
        rows = rows[~found[rows]]
    return found


def _implied(tree: Tree, rows: Mask) -> Tree:
    flags = np.where(rows, np.uint8(Flag.IMPLIED), tree.flags)
    return tree.with_columns(flags=flags)


__all__ = ["below", "graft", "restrict", "without"]
