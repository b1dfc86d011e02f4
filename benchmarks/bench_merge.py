"""Merging ten layers: the kernel, tests/reference.py, and GNU sort's merge of the same path lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
from measuring import compare, measure, sort_merge
from synthetic import Stack

from overlaykit.tree import Tree, diff, merge, squash
from overlaykit.tree.table import COLUMNS

COMPARED = "tests/reference.py, LC_ALL=C sort -m"


def merge_whole(trees: list[Tree]) -> Tree:
    """merge, and every column of the result: they are put together when they are asked for."""
    merged = merge(trees)
    for name in (*COLUMNS, "links"):
        getattr(merged, name)
    return merged


def test_kernel(benchmark: Any, stack: Stack, size: int) -> None:
    merged = measure(benchmark, lambda: merge(stack.trees), name="merge", entries=size, compared_with=COMPARED)
    assert isinstance(merged, Tree)
    if size <= 1_000:
        assert [e.path for e in merged] == [*reference.merge(stack.plain)]


def test_kernel_all_columns(benchmark: Any, stack: Stack, size: int) -> None:
    measure(benchmark, lambda: merge_whole(stack.trees), name="merge", entries=size, compared_with=COMPARED)


def test_kernel_squash(benchmark: Any, stack: Stack, size: int) -> None:
    measure(benchmark, lambda: squash(stack.trees), name="merge", entries=size, compared_with=COMPARED)


def test_reference(benchmark: Any, stack: Stack, size: int) -> None:
    layers = stack.plain
    measure(benchmark, lambda: reference.merge(layers), name="merge", entries=size, compared_with=COMPARED, slow=True)


def test_sort(benchmark: Any, stack: Stack, size: int, scratch: Path) -> None:
    out = scratch / "sorted"
    measure(benchmark, lambda: sort_merge(stack.lists, out), name="merge", entries=size, compared_with=COMPARED)


def test_diff(benchmark: Any, stack: Stack, size: int) -> None:
    """From what nine layers show to what all ten show."""
    before, after = merge_whole(stack.trees[:9]), merge_whole(stack.trees)
    measure(benchmark, lambda: diff(before, after), name="diff", entries=size, compared_with="tests/reference.py")


def test_diff_reference(benchmark: Any, stack: Stack, size: int) -> None:
    before, after = reference.merge(stack.plain[:9]), reference.merge(stack.plain)
    work = lambda: reference.diff(before, after)  # noqa: E731
    measure(benchmark, work, name="diff", entries=size, compared_with="tests/reference.py", slow=True)


# The bars: in all 100,000 entries no longer than sort -m, of 1,000,000 half of it. Against a result in a file in memory,
# as the tree is one, and against one that is thrown away.
MOST = {100_000: 1.0, 1_000_000: 0.5}


@pytest.mark.parametrize("out", ["file", "nowhere"])
@pytest.mark.parametrize("columns", ["paths", "all columns"])
def test_bar_merge(benchmark: Any, stack: Stack, size: int, scratch: Path, out: str, columns: str) -> None:
    work = merge if columns == "paths" else merge_whole
    target = scratch / "sorted" if out == "file" else Path("/dev/null")
    kept: list[Tree] = []

    def ours() -> None:
        # The last result goes when the next is begun, as sort's file does. A virtual machine gives what lies free for a
        # second back to its host, and to get half a gigabyte anew takes longer than to merge ten million paths.
        kept.clear()
        kept.append(work(stack.trees))

    compare(
        benchmark,
        f"merge ({columns})",
        ours,
        lambda: sort_merge(stack.lists, target),
        entries=size,
        tool=f"sort -m -o {'file' if out == 'file' else target}",
        most=MOST.get(size),
    )
