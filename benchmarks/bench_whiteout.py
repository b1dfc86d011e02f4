"""Whiteouts: marks in names read and a layer made regular; layers full of whiteouts squashed. The kernel, the reference,
and GNU grep, which only finds the marks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import reference
from measuring import measure, need, run
from synthetic import Stack

from overlaykit.tree import Entry, Kind, Strings, Tree, from_entries, regular, squash
from overlaykit.tree.table import replace
from overlaykit.tree.whiteout import read_oci_names

MARKED = 0.2  # of a layer's rows are marks: many, but so is a layer that removes a package
COMPARED = "tests/reference.py, LC_ALL=C grep"


def marked(tree: Tree, seed: int) -> Tree:
    """The table of a layer as a tar would give it: one row in five a .wh. file, one directory in fifty opaque."""
    rng = random.Random(seed)
    paths, rows = [], []
    for row, path in enumerate(tree.paths):
        kind = tree.kind[row]
        paths.append(path)
        rows.append(row)
        if kind == Kind.DIR and rng.random() < 0.02:
            paths.append((path + b"/" if path else b"") + b".wh..wh..opq")
            rows.append(row)
        elif kind != Kind.DIR and rng.random() < MARKED:
            head, slash, name = path.rpartition(b"/")
            paths[-1] = head + slash + b".wh." + name
    table = tree.take(np_rows(rows))
    kinds = table.kind.copy()
    kinds[[b".wh." in path for path in paths]] = Kind.FILE
    return replace(table.with_columns(kind=kinds), paths=Strings.of(paths))


def np_rows(rows: list[int]) -> Any:
    import numpy as np

    return np.array(rows, np.int64)


@pytest.fixture(scope="session")
def layer(stack: Stack) -> Tree:
    """One layer of all paths, with marks."""
    return marked(stack.merged, 7)


@pytest.fixture(scope="session")
def plain(layer: Tree) -> list[Entry]:
    return list(layer)


def test_marks_kernel(benchmark: Any, layer: Tree, size: int) -> None:
    measure(benchmark, lambda: read_oci_names(layer), name="marks", entries=size, compared_with=COMPARED)


def test_marks_reference(benchmark: Any, plain: list[Entry], size: int) -> None:
    work = lambda: [(reference.mark_of(e.path), reference.strip(e.path)) for e in plain]  # noqa: E731
    measure(benchmark, work, name="marks", entries=size, compared_with=COMPARED, slow=True)


def test_marks_grep(benchmark: Any, layer: Tree, size: int, scratch: Path) -> None:
    paths = scratch / "marked"
    paths.write_bytes(b"\n".join(layer.paths) + b"\n")
    work = lambda: run(need("grep"), "-c", r"\(^\|/\)\.wh\.", paths)  # noqa: E731
    measure(benchmark, work, name="marks", entries=size, compared_with=COMPARED)


def test_regular_kernel(benchmark: Any, layer: Tree, plain: list[Entry], size: int) -> None:
    work = lambda: regular(layer, oci_names=True)  # noqa: E731
    tree = measure(benchmark, work, name="one layer made regular", entries=size, compared_with="tests/reference.py")
    assert isinstance(tree, Tree)
    if size <= 1_000:
        expected = from_entries(reference.regular(plain).values())
        assert [(e.path, e.kind, e.flags) for e in tree] == [(e.path, e.kind, e.flags) for e in expected]


def test_regular_reference(benchmark: Any, plain: list[Entry], size: int) -> None:
    work = lambda: reference.regular(plain)  # noqa: E731
    measure(benchmark, work, name="one layer made regular", entries=size, compared_with="tests/reference.py", slow=True)


@pytest.fixture(scope="session")
def whiteouts(stack: Stack) -> list[Tree]:
    """The layers of the stack, each with marks."""
    return [regular(marked(tree, seed), oci_names=True) for seed, tree in enumerate(stack.trees)]


def test_hiding_kernel(benchmark: Any, whiteouts: list[Tree], size: int) -> None:
    work = lambda: squash(whiteouts)  # noqa: E731
    measure(benchmark, work, name="ten layers with whiteouts", entries=size, compared_with="tests/reference.py")


def test_hiding_reference(benchmark: Any, whiteouts: list[Tree], size: int) -> None:
    layers = [{e.path: e for e in tree} for tree in whiteouts]
    work = lambda: reference.squash(layers)  # noqa: E731
    measure(benchmark, work, name="ten layers with whiteouts", entries=size, compared_with="tests/reference.py", slow=True)
