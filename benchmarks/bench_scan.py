"""A directory to a tree: the kernel with and without xattrs, the reference in plain Python, GNU find -printf; and what two
trees differ in, which needs no directory any more."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_files
from measuring import compare, measure, need, run
from synthetic import layer_paths

from overlaykit.tree import Tree, diff, scan

COMPARED = "tests/reference_files.py, find -printf"
FORMAT = r"%y %m %U %G %s %T@ %p %l\n"


@pytest.fixture(scope="session")
def directory(size: int, scratch: Path) -> Iterator[Path]:
    """`size` entries on disk: empty files, directories, one symlink in ten."""
    folder = scratch / f"scan-{size}"
    (paths,), directories = layer_paths(size, 1)
    for number, path in enumerate(sorted(paths)):
        target = f"{folder}/{path}"
        if path in directories:
            os.makedirs(target, exist_ok=True)
        elif number % 10 == 0:
            os.symlink("../lib/libx.so.1", target)
        else:
            os.mknod(target)
    yield folder
    shutil.rmtree(folder)


def find(directory: Path) -> None:
    run(need("find"), directory, "-printf", FORMAT)


@pytest.mark.parametrize("way", ["kernel", "kernel with xattrs", "reference", "find"])
def test_directory(benchmark: Any, directory: Path, size: int, way: str) -> None:
    work = {
        "kernel": lambda: scan(directory, xattrs=False),
        "kernel with xattrs": lambda: scan(directory),
        "reference": lambda: list(reference_files.scan(directory)),
        "find": lambda: find(directory),
    }[way]
    slow = way == "reference"
    found = measure(benchmark, work, name="scan", entries=size, compared_with=COMPARED, slow=slow)
    if size <= 1_000 and isinstance(found, Tree):
        assert [e.path for e in found] == [path for path, _, _ in reference_files.scan(directory)]


@pytest.mark.parametrize("xattrs", [False, True], ids=["stat", "stat and xattrs"])
def test_bar_scan(benchmark: Any, directory: Path, size: int, xattrs: bool) -> None:
    compare(
        benchmark, "scan with xattrs" if xattrs else "scan", lambda: scan(directory, xattrs=xattrs),
        lambda: find(directory), entries=size, tool="find -printf", most=None if xattrs else 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("changed", [0, 50], ids=["same", "2%"])
def test_bar_diff(benchmark: Any, directory: Path, size: int, changed: int) -> None:
    """Two trees already indexed, both as fresh as if they had just been loaded."""
    tree = scan(directory)
    later = tree.mtime_ns.copy()
    if changed:
        later[::changed] += 1
    rows = np.arange(len(tree))
    trees: list[Tree] = []

    def fresh() -> None:
        trees[:] = [tree.take(rows), tree.take(rows).with_columns(mtime_ns=later)]

    compare(
        benchmark, f"diff ({'one row in fifty changed' if changed else 'nothing changed'})", lambda: diff(*trees),
        lambda: find(directory), entries=size, tool="find -printf", most=0.1, before=fresh,
    )  # fmt: skip
