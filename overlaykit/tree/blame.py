"""Which layer does what to a path, and which bytes of a stack nobody sees. Layers are listed bottom first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from overlaykit.errors import NotFound
from overlaykit.tree.changes import reasons
from overlaykit.tree.fingerprint import Fingerprints
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
    ATTRIBUTES = "attributes"  # an upper layer has the same content there: only mode, owner, time or xattrs changed


@dataclass(frozen=True, slots=True)
class Waste:
    """A file that a layer carries and nobody sees: in which layer, why, which layer hides it, and its size in bytes.

    A file of several names is hidden by the layer that takes the last of them. changed: what of an ATTRIBUTES file did
    change, in the words of `Change.reasons`.
    """

    layer: int
    path: str
    reason: Reason
    hidden_by: int
    size: int
    changed: tuple[str, ...] = ()


def waste(layers: Sequence[Tree], *, fingerprints: Callable[[int, Rows], Fingerprints] | None = None) -> Iterator[Waste]:
    """Every file of `layers` whose content no one sees in their merge, layer by layer, in tree order.

    The names of one file count as one: its content is seen while one of them is. fingerprints(layer, rows): of the contents
    of these files, uint64[k, 2], by which a file that is in two layers is known; without it one of the same size and time
    is taken for the same.
    """
    merged = merge(layers)
    hidden = [
        _hidden(layers, number, row)
        for number, tree in enumerate(layers)
        for row in np.flatnonzero(_unseen(tree, number, merged)).tolist()
    ]
    same = _same(layers, hidden, fingerprints)
    for each, is_same in zip(hidden, same, strict=True):
        tree, upper = layers[each.layer], layers[each.above]
        path, size = tree.path(each.row), int(tree.size[each.row])
        if each.over < 0:
            yield Waste(each.layer, path, Reason.REMOVED, each.above, size)
        elif is_same:
            (changed,) = reasons(tree, np.array([each.row]), upper, np.array([each.over]))
            yield Waste(each.layer, path, Reason.ATTRIBUTES, each.above, size, changed)
        else:
            yield Waste(each.layer, path, Reason.CHANGED, each.above, size)


class _Hidden(NamedTuple):
    """File `row` of a layer, the layer above that hides it, and the row there that has its name (-1: none)."""

    layer: int
    row: int
    above: int
    over: int


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


def _hidden(layers: Sequence[Tree], number: int, row: int) -> _Hidden:
    tree = layers[number]
    group = int(tree.hardlink[row])
    names = [row] if group < 0 else np.flatnonzero(tree.hardlink == group).tolist()
    # The content was seen until the last of its names went.
    above, over = max(_hider(layers, number, tree.path(name)) for name in names)
    return _Hidden(number, row, above, over)


def _hider(layers: Sequence[Tree], number: int, path: str) -> tuple[int, int]:
    """The lowest layer above `number` that hides `path` of it, and the row there that has its name (-1: none)."""
    for above in range(number + 1, len(layers)):
        touch = _touch(layers[above], path, Kind.FILE)
        if touch is not None:
            return above, layers[above].find(path) if touch[0] in (Verb.CHANGES, Verb.ADDS) else -1
    raise AssertionError(f"{path} of layer {number} is hidden by no layer")


def _same(
    layers: Sequence[Tree], hidden: list[_Hidden], fingerprints: Callable[[int, Rows], Fingerprints] | None
) -> list[bool]:
    """Of which of `hidden` the layer that hides it has the same content under the name."""
    alike = [each.over >= 0 and _alike(layers, each) for each in hidden]
    if fingerprints is None:
        return [
            a and layers[h.above].mtime_ns[h.over] == layers[h.layer].mtime_ns[h.row]
            for a, h in zip(alike, hidden, strict=True)
        ]
    wanted = [h for a, h in zip(alike, hidden, strict=True) if a]
    places = [(h.layer, h.row) for h in wanted] + [(h.above, h.over) for h in wanted]
    prints: dict[tuple[int, int], bytes] = {}
    for number in sorted({number for number, _ in places}):
        rows = np.unique(np.array([row for layer, row in places if layer == number], np.int64))
        for row, found in zip(rows.tolist(), fingerprints(number, rows), strict=True):
            prints[number, row] = found.tobytes()
    return [a and prints[h.layer, h.row] == prints[h.above, h.over] for a, h in zip(alike, hidden, strict=True)]


def _alike(layers: Sequence[Tree], each: _Hidden) -> bool:
    """Whether kind and size are the same."""
    lower, upper = layers[each.layer], layers[each.above]
    is_file = upper.kind[each.over] == Kind.FILE and not upper.flags[each.over] & Flag.LOWER_LINK
    return bool(is_file and upper.size[each.over] == lower.size[each.row])
