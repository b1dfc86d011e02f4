"""ext/treemerge.pyx against plain Python, on random paths; and what its doors refuse."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import paths

from overlaykit._ext import treemerge
from overlaykit.tree.table import Strings

# Long common prefixes, names that sort around "/", and lengths around the eight bytes that are compared at a time.
odd_paths = st.one_of(st.just(""), paths, st.text("a-/.0", max_size=20).map(lambda p: "/".join(filter(None, p.split("/")))))
tables = st.lists(odd_paths, max_size=30)


def strings(names: list[str]) -> Strings:
    return Strings.of([name.encode("utf-8", "surrogateescape") for name in names])


def i64(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, np.int64)


@given(tables)
def test_sort_order_is_sorted_by_tree_key_the_later_row_first(names: list[str]) -> None:
    table, n = strings(names), len(names)
    order, same = np.empty(n, np.int64), np.empty(n, np.uint8)
    treemerge.sort_order(table.arena, table.start, order, same)
    expected = sorted(range(n), key=lambda i: (reference.tree_key(names[i]), -i))
    assert order.tolist() == expected
    assert same.tolist() == [i > 0 and names[row] == names[expected[i - 1]] for i, row in enumerate(expected)]


@given(st.sets(odd_paths, max_size=20), st.sets(odd_paths, max_size=20))
def test_match_pairs_the_rows_of_two_trees(mine: set[str], theirs: set[str]) -> None:
    a, b = (sorted(names, key=reference.tree_key) for names in (mine, theirs))
    room = len(a) + len(b)
    out_a, out_b = np.empty(room, np.int64), np.empty(room, np.int64)
    x, y = strings(a), strings(b)
    made = treemerge.match(x.arena, x.start, y.arena, y.start, out_a, out_b)
    both = sorted(mine | theirs, key=reference.tree_key)
    assert out_a[:made].tolist() == [a.index(name) if name in mine else -1 for name in both]
    assert out_b[:made].tolist() == [b.index(name) if name in theirs else -1 for name in both]


@given(st.sets(odd_paths, max_size=20), odd_paths)
def test_find_is_bisect_left(names: set[str], want: str) -> None:
    ordered = sorted(names, key=reference.tree_key)
    table = strings(ordered)
    row = treemerge.find(table.arena, table.start, want.encode("utf-8", "surrogateescape"))
    assert row == bisect_left(ordered, reference.tree_key(want), key=reference.tree_key)


@given(st.sets(odd_paths, max_size=20))
def test_family_knows_the_nearest_directory_and_where_a_subtree_ends(names: set[str]) -> None:
    ordered = sorted(names, key=reference.tree_key)
    table, n = strings(ordered), len(ordered)
    parents, ends = np.empty(n, np.int64), np.empty(n, np.int64)
    treemerge.family(table.arena, table.start, parents, ends)
    above = [[ordered.index(up) for up in reference.ancestors(path) if up in names] for path in ordered]
    assert parents.tolist() == [ups[0] if ups else -1 for ups in above]
    below = [sum(row in ups for ups in above) for row in range(n)]
    assert ends.tolist() == [row + 1 + below[row] for row in range(n)]


@given(tables, st.data())
def test_gather_takes_strings_and_their_beginnings(names: list[str], data: st.DataObject) -> None:
    table = strings(names)
    rows = data.draw(st.lists(st.integers(0, len(names) - 1), max_size=20)) if names else []
    sizes = [data.draw(st.integers(0, len(table[row]))) for row in rows]
    assert list(table.take(i64(*rows))) == [table[row] for row in rows]
    assert list(table.take(i64(*rows), i64(*sizes))) == [table[row][:n] for row, n in zip(rows, sizes, strict=True)]


def test_nothing_has_an_order_too() -> None:
    empty, none, zero = np.empty(0, np.uint8), i64(), i64(0)
    treemerge.sort_order(empty, zero, none, empty)
    treemerge.family(empty, zero, none, none)
    treemerge.gather(empty, zero, none, empty, zero)
    assert treemerge.find(empty, zero, b"a") == 0


def test_bytes_compare_as_unsigned_and_a_slash_comes_before_all_others() -> None:
    names = ["a", "a/\udcff", "a/\x01", "a\x01", "a\udcff", "aaaaaaaaaaaaaaa\udc80", "aaaaaaaaaaaaaaa\x7f"]
    table = strings(names)
    order, same = np.empty(len(names), np.int64), np.empty(len(names), np.uint8)
    treemerge.sort_order(table.arena, table.start, order, same)
    assert [names[row] for row in order] == sorted(names, key=reference.tree_key)


TEXT = np.frombuffer(b"abc", np.uint8)
ONE, NONE = np.empty(1, np.uint8), np.empty(0, np.uint8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: treemerge.sort_order(TEXT, i64(0, 3), i64(), ONE),
        lambda: treemerge.sort_order(TEXT, i64(0, 3), i64(0), NONE),
        lambda: treemerge.sort_order(TEXT, i64(), i64(), NONE),
        lambda: treemerge.sort_order(TEXT, i64(1, 3), i64(0), ONE),
        lambda: treemerge.sort_order(TEXT, i64(0, 4), i64(0), ONE),
        lambda: treemerge.sort_order(TEXT, i64(0, 2), i64(0), ONE),
        lambda: treemerge.sort_order(TEXT, i64(0, 5, 3), i64(0, 0), np.empty(2, np.uint8)),
        lambda: treemerge.match(TEXT, i64(0, 3), TEXT, i64(0, 3), i64(0), i64(0)),
        lambda: treemerge.match(TEXT, i64(0, 2), TEXT, i64(0, 3), i64(0, 0), i64(0, 0)),
        lambda: treemerge.find(TEXT, i64(), b"a"),
        lambda: treemerge.find(TEXT, i64(0, 9), b"a"),
        lambda: treemerge.find(TEXT, i64(0, -9, 3), b"b"),
        lambda: treemerge.family(TEXT, i64(0, 3), i64(), i64(0)),
        lambda: treemerge.family(TEXT, i64(0, 3), i64(0), i64()),
        lambda: treemerge.gather(TEXT, i64(0, 3), i64(0), ONE, i64(0)),
        lambda: treemerge.gather(TEXT, i64(0, 3), i64(0), ONE, i64(0, 2)),
        lambda: treemerge.gather(TEXT, i64(0, 2), i64(0), ONE, i64(0, 1)),
    ],
)
def test_shapes_that_disagree_are_refused(call: object) -> None:
    with pytest.raises(ValueError):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(("row", "size"), [(-1, 1), (1, 1), (0, 4), (0, -1)])
def test_gather_names_a_row_that_is_not_there_or_too_short(row: int, size: int) -> None:
    with pytest.raises((IndexError, ValueError)):
        treemerge.gather(TEXT, i64(0, 3), i64(row), np.empty(max(size, 0), np.uint8), i64(0, size))


def test_gather_does_not_believe_a_damaged_tree() -> None:
    """Saved trees are mapped as they lie on disk. One whose offsets were damaged there would have been read far outside
    the mapping, and the process killed."""
    with pytest.raises(IndexError):
        treemerge.gather(TEXT, i64(0, 1 << 40, (1 << 40) + 1, 3), i64(1), ONE, i64(0, 1))
