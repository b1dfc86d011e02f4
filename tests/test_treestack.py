"""What one sees of a stack of layers: the kernel against the reference on layers large enough for runs, and its door."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import reference

from overlaykit._ext import treecolumns, treestack
from overlaykit.errors import InvalidLayer
from overlaykit.tree import Entry, Kind, Tree, from_entries, merge, regular, squash

NAMES = [f"{stem}{number}" for stem in ("a", "a-", "b", "lib", "lib.") for number in range(12)]


def layer(rng: random.Random, files: int, everywhere: list[str]) -> tuple[Tree, reference.Layer]:
    """A layer with directories of its own, some that others have too, whiteouts, opaque marks and entries under those."""
    table: dict[str, Entry] = {}
    homes = [rng.choice(everywhere) for _ in range(3)] + [
        "/".join(rng.choices(NAMES, k=rng.randint(1, 4))) for _ in range(6)
    ]
    for home in homes:
        if rng.random() < 0.7:
            table[home] = Entry(home, Kind.DIR, mode=rng.choice([0o755, 0o700]))
        for _ in range(rng.randint(0, files)):
            path = f"{home}/{rng.choice(NAMES)}"
            kind = rng.choice([Kind.FILE, Kind.FILE, Kind.FILE, Kind.DIR])
            table[path] = Entry(path, kind, mode=rng.choice([0o644, 0o755]), size=rng.randint(0, 9) * (kind == Kind.FILE))
        if rng.random() < 0.3:
            table[home + "/.wh..wh..opq"] = Entry(home + "/.wh..wh..opq")
        for name in rng.sample(NAMES, rng.choice([0, 0, 1, 5])):
            table[f"{home}/.wh.{name}"] = Entry(f"{home}/.wh.{name}")
    for home in rng.sample(everywhere, 2):
        table[f"{home}/.wh.gone"] = Entry(f"{home}/.wh.gone")
        up, _, name = home.rpartition("/")
        mark = f"{up}/.wh.{name}" if up else f".wh.{name}"
        if rng.random() < 0.3:
            table[mark] = Entry(mark)
        elif rng.random() < 0.3:  # a file where others have a directory
            table = {path: entry for path, entry in table.items() if not path.startswith(home + "/")}
            table[home] = Entry(home, Kind.FILE, size=3)
    rows = list(table.values())
    return regular(from_entries(rows), oci_names=True), reference.regular(rows)


def said(tree: Tree) -> list[tuple[object, ...]]:
    return [(e.path, e.kind, e.mode, e.uid, e.size, e.flags) for e in tree]


@pytest.mark.parametrize("seed", range(60))
def test_long_runs_of_one_layer_are_seen_as_row_by_row(seed: int) -> None:
    rng = random.Random(seed)
    everywhere = ["/".join(rng.choices(NAMES, k=rng.randint(1, 3))) for _ in range(8)]
    pairs = []
    while len(pairs) < rng.choice([1, 2, 3, 5, 9, 17]):
        try:
            pairs.append(layer(rng, rng.choice([3, 40, 200]), everywhere))
        except InvalidLayer:
            continue  # an entry under a file of its own layer
    trees, layers = [t for t, _ in pairs], [r for _, r in pairs]
    for ours, theirs in ((merge, reference.merge), (squash, reference.squash)):
        assert said(ours(trees)) == said(from_entries(theirs(layers).values()))


def test_a_merged_tree_is_put_together_when_asked_and_copies_whole() -> None:
    base = regular(from_entries([Entry("a", size=1, uid=7), Entry("b", Kind.SYMLINK, link="a")]))
    top = regular(from_entries([Entry("c", Kind.SYMLINK, link="b"), Entry("d", xattrs={"user.k": b"v"})]))
    merged = merge([base, top])
    assert "uid" not in vars(merged)
    assert [e.link for e in merged] == [None, None, "a", "b", None]
    assert dict(merged.entry(4).xattrs) == {"user.k": b"v"}
    assert list(merged.layer) == [1, 0, 0, 1, 1]
    for twin in (pickle.loads(pickle.dumps(merge([base, top]))), copy.copy(merged), merged.take(np.arange(5))):
        assert twin == merged
    with pytest.raises(AttributeError, match="nothing"):
        _ = merged.nothing  # type: ignore[attr-defined]


def test_a_layer_out_of_order_is_refused() -> None:
    paths = from_entries([Entry("", Kind.DIR), Entry("b"), Entry("a")])
    with pytest.raises(ValueError, match="layer 0 is not in tree order at row 2"):
        merge([paths])


def test_arrays_that_do_not_fit_are_refused() -> None:
    tree = regular(from_entries([Entry("a")]))
    kinds, flags = [tree.kind], [tree.flags]
    arena, start = [tree.paths.arena], [tree.paths.start]
    room = (np.empty(2, np.uint16), np.empty(2, np.uint8), np.empty(3, np.int64), np.empty(1, np.uint8))
    pieces = (np.empty(2, np.uint16), np.empty(2, np.int64), np.empty(3, np.int64))
    assert treestack.resolve(arena, start, kinds, flags, False, *room, *pieces) == (2, 1, 1)
    with pytest.raises(ValueError, match="kinds"):
        treestack.resolve(arena, start, [], flags, False, *room, *pieces)
    with pytest.raises(ValueError, match="rows, 1 kinds"):
        treestack.resolve(arena, start, [tree.kind[:1]], flags, False, *room, *pieces)
    with pytest.raises(ValueError, match="run from 0"):
        treestack.resolve([tree.paths.arena[:0]], start, kinds, flags, False, *room, *pieces)
    with pytest.raises(ValueError, match="shapes"):
        treestack.resolve(arena, start, kinds, flags, False, *room[:3], np.empty(0, np.uint8), *pieces)


def test_rows_that_are_not_there_are_refused() -> None:
    column = [np.arange(4, dtype=np.uint8), np.arange(4, 6, dtype=np.uint8)]
    out = np.empty(3, np.uint8)

    def gather(source: list[int], row: list[int], begin: list[int]) -> list[int]:
        treecolumns.gather(column, np.array(source, np.uint16), np.array(row), np.array(begin), 1, out)
        return out.tolist()

    assert gather([1, 0], [1, 2], [0, 1, 3]) == [5, 2, 3]
    for wrong in (
        ([2, 0], [0, 0], [0, 1, 3]),
        ([1, 0], [2, 0], [0, 1, 3]),
        ([0, 1], [0, 1], [0, 1, 3]),
        ([0], [-1], [0, 3]),
    ):
        with pytest.raises(IndexError):
            gather(*wrong)
    with pytest.raises(ValueError, match="room"):
        gather([0], [0], [0, 4])


def test_a_column_of_one_value_is_known() -> None:
    zeros, ones = np.zeros(3, np.uint8), np.ones(3, np.uint8)
    assert treecolumns.uniform([zeros, zeros[:0], zeros], 1)
    assert not treecolumns.uniform([zeros, ones], 1)
    assert not treecolumns.uniform([np.array([0, 0, 1], np.uint8)], 1)
    assert not treecolumns.uniform([zeros[:0]], 1)
