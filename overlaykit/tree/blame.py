"""Which layer does what to a path, and which bytes of a stack nobody sees. Layers are listed bottom first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from overlaykit.errors import NotFound
from overlaykit.tree.merge import merge
from overlaykit.tree.table import Flag, Kind, Mask, Rows, Tree, first_names


class Verb(Enum):
    """What a layer does to a path."""

    ADDS = "adds"  # there was nothing below
    CHANGES = "changes"  # there was something below
    REMOVES = "removes"  # a whiteout of it, or of a directory above it
    REPLACES = "replaces"  # an opaque directory or a file above it takes it away


@dataclass(frozen=True, slots=True)
class Touch:
    """One layer's part in what a path is: its number, what it does, and the path of the row that does it."""

    layer: int
    verb: Verb
    by: str


def blame(layers: Sequence[Tree], path: str) -> list[Touch]:
    """What each of `layers` does to `path` (relative, as in a Tree), bottom first; the last one decides.

    A directory is changed only by who writes it down, not by what is put into it. NotFound if no layer knows the path.
    """
    touches: list[Touch] = []
    there: Kind | None = None
    for number, tree in enumerate(layers):
        touch = _touch(tree, path, there)
        if touch is None:
            continue
        verb, by = touch
        if there is not None or verb not in (Verb.REMOVES, Verb.REPLACES):
            touches.append(Touch(number, verb, by))
        there = Kind(tree.kind[tree.find(path)]) if verb in (Verb.ADDS, Verb.CHANGES) else None
    if not touches:
        raise NotFound(f"no layer has /{path}")
    return touches


def _touch(tree: Tree, path: str, there: Kind | None) -> tuple[Verb, str] | None:
    """What one layer does to `path`, which is a `there` below (None: nothing), and the path of the row that does it."""
    parts = path.split("/")
    replaced = None
    for end in range(len(parts)):
        above = "/".join(parts[:end])
        row = tree.find(above)
        if row < 0:
            break
        if tree.kind[row] == Kind.WHITEOUT:
            return Verb.REMOVES, above
        if tree.kind[row] != Kind.DIR:
            return Verb.REPLACES, above
        if tree.flags[row] & Flag.OPAQUE:
            replaced = above
    row = tree.find(path)
    if row >= 0 and tree.kind[row] == Kind.WHITEOUT:
        return Verb.REMOVES, path
    if row < 0:
        return None if replaced is None else (Verb.REPLACES, replaced)
    if there is None or replaced is not None:
        return Verb.ADDS, path
    # A directory that this layer only implies leaves one below as it is, but not a file.
    if tree.flags[row] & Flag.IMPLIED and there == Kind.DIR:
        return None
    return Verb.CHANGES, path


class Reason(Enum):
    """Why bytes of a layer are never seen."""

    REMOVED = "removed"  # an upper layer took the name away
    CHANGED = "changed"  # an upper layer has other content under the name
    ATTRIBUTES = "attributes"  # an upper layer has the same size and time there: only mode, owner or xattrs changed


@dataclass(frozen=True, slots=True)
class Waste:
    """A file that a layer carries and nobody sees: in which layer, why, which layer hides it, and its size in bytes."""

    layer: int
    path: str
    reason: Reason
    hidden_by: int
    size: int


def waste(layers: Sequence[Tree]) -> Iterator[Waste]:
    """Every file of `layers` whose content no one sees in their merge, layer by layer, in tree order.

    The names of one file count as one: its content is seen while one of them is.
    """
    merged = merge(layers)
    for number, tree in enumerate(layers):
        for row in np.flatnonzero(_unseen(tree, number, merged)).tolist():
            yield _waste(layers, number, row)


def _unseen(tree: Tree, number: int, merged: Tree) -> Mask:
    """bool[n]: the files of layer `number` that no row of the merge shows, the first name of each."""
    first = first_names(tree)
    from_here: Rows = np.flatnonzero(merged.layer == number)
    seen = np.zeros(len(tree), np.bool_)
    for path in merged.paths.take(from_here):
        row = tree.find(path)
        if row >= 0:
            seen[first[row]] = True
    unseen: Mask = (tree.kind == Kind.FILE) & (first == np.arange(len(tree))) & ~seen & (tree.size > 0)
    unseen &= (tree.flags & Flag.LOWER_LINK) == 0
    return unseen


def _waste(layers: Sequence[Tree], number: int, row: int) -> Waste:
    tree = layers[number]
    path, size = tree.path(row), int(tree.size[row])
    for above in range(number + 1, len(layers)):
        touch = _touch(layers[above], path, Kind.FILE)
        if touch is None:
            continue
        verb, by = touch
        upper = layers[above]
        over = upper.find(by)
        same = (
            verb is Verb.CHANGES
            and upper.kind[over] == Kind.FILE
            and upper.size[over] == size
            and upper.mtime_ns[over] == tree.mtime_ns[row]
        )
        if verb in (Verb.CHANGES, Verb.ADDS):
            return Waste(number, path, Reason.ATTRIBUTES if same else Reason.CHANGED, above, size)
        return Waste(number, path, Reason.REMOVED, above, size)
    raise AssertionError(f"{path} of layer {number} is hidden by no layer")
