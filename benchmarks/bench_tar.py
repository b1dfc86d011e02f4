"""Layer tars read and written: index_tar and write_tar beside GNU tar and Python's tarfile. Files have no content, so that
what is measured is the work per entry."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measuring import compare, measure, need, run
from synthetic import Stack

from overlaykit.tree import Tree, index_tar, write_tar

COMPARED = "GNU tar, Python's tarfile"


@pytest.fixture(scope="session")
def layer(stack: Stack) -> Tree:
    """A layer of all paths of the stack, its files empty, times in whole seconds."""
    merged = stack.merged
    seconds = merged.mtime_ns // 10**9 * 10**9
    return merged.with_columns(size=np.zeros(len(merged)), mtime_ns=seconds)


@pytest.fixture(scope="session")
def tar(layer: Tree, size: int, scratch: Path) -> Iterator[Path]:
    path = scratch / f"layer-{size}.tar"
    with path.open("wb") as out:
        write_tar(layer, no_content, out)
    yield path
    path.unlink()


def no_content(row: int) -> io.BytesIO:
    return io.BytesIO()


def index(tar: Path) -> Tree:
    with tar.open("rb") as stream:
        return index_tar(stream)


def with_tarfile(tar: Path) -> int:
    with tarfile.open(tar) as archive:
        return len(archive.getmembers())


@pytest.mark.parametrize("way", ["kernel", "tarfile", "tar"])
def test_read(benchmark: Any, tar: Path, layer: Tree, size: int, way: str) -> None:
    work = {
        "kernel": lambda: index(tar),
        "tarfile": lambda: with_tarfile(tar),
        "tar": lambda: run(need("tar"), "--list", "--verbose", "--file", tar),
    }[way]
    found = measure(
        benchmark, work, name="tar read", entries=size, size=tar.stat().st_size, compared_with=COMPARED,
        slow=way == "tarfile",
    )  # fmt: skip
    if isinstance(found, Tree):
        assert len(found) == len(layer)


def write(layer: Tree, path: Path) -> None:
    with path.open("wb") as out:
        write_tar(layer, no_content, out)


def write_with_tarfile(layer: Tree, path: Path) -> None:
    kinds = {0: tarfile.REGTYPE, 1: tarfile.DIRTYPE, 2: tarfile.SYMTYPE}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for entry in layer:
            info = tarfile.TarInfo(entry.path or ".")
            info.type, info.mode, info.mtime = kinds[entry.kind], entry.mode, entry.mtime_ns // 10**9
            info.linkname = entry.link or ""
            archive.addfile(info)


@pytest.mark.parametrize("way", ["kernel", "tarfile"])
def test_write(benchmark: Any, layer: Tree, size: int, scratch: Path, way: str) -> None:
    path = scratch / "written.tar"
    work = {"kernel": lambda: write(layer, path), "tarfile": lambda: write_with_tarfile(layer, path)}[way]
    measure(benchmark, work, name="tar written", entries=size, compared_with="Python's tarfile", slow=True)
    path.unlink()


def test_bar_read(benchmark: Any, tar: Path, size: int) -> None:
    compare(
        benchmark, "tar read", lambda: index(tar), lambda: run(need("tar"), "--list", "--verbose", "--file", tar),
        entries=size, tool="tar --list --verbose",
    )  # fmt: skip
