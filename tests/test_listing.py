"""Names of one directory taken up by a merged listing: from disk as os.scandir has them, from a Tree as its rows do."""

from __future__ import annotations

import contextlib
import os
import random
import stat
from pathlib import Path

import numpy as np
import pytest

from overlaykit._ext import listing
from overlaykit.overlay.layers import LOOKS, Look
from overlaykit.tree import Tree, WhiteoutFormat, scan


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Every kind of name, and one that is no UTF-8; d has names of its own."""
    (tmp_path / "d" / "inner").mkdir(parents=True)
    (tmp_path / "d" / "x").touch()
    (tmp_path / "e").mkdir()
    (tmp_path / "f").write_text("f")
    (tmp_path / "l").symlink_to("d")
    (tmp_path / "\udcff").touch()
    os.mkfifo(tmp_path / "p")
    if os.geteuid() == 0:
        os.mknod(tmp_path / "w", stat.S_IFCHR, 0)
    return tmp_path


def from_disk(path: Path, layer: int, names: dict[str, int], **options: bool) -> list[str]:
    unsure: list[str] = []
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        listing.from_disk(fd, layer, names, unsure, **options)
    finally:
        os.close(fd)
    return sorted(unsure)


def from_tree(tree: Tree, path: str, layer: int, names: dict[str, int]) -> list[str]:
    gone: list[str] = []
    row = tree.find(path)
    listing.from_tree(tree.paths.arena, tree.paths.start, tree.kind, tree.ends, LOOKS, row, layer, names, gone)
    return gone


def in_python(path: Path, layer: int) -> dict[str, int]:
    def look(entry: os.DirEntry[str]) -> Look:
        if entry.is_dir(follow_symlinks=False):
            return Look.DIR
        return Look.LINK if entry.is_symlink() else Look.FILE if entry.is_file() else Look.OTHER

    return {entry.name: layer << 2 | look(entry) for entry in os.scandir(path)}


def test_disk_gives_what_scandir_gives(directory: Path) -> None:
    names: dict[str, int] = {}
    unsure = from_disk(directory, 7, names)
    assert names == in_python(directory, 7)
    assert unsure == sorted({"p", "w"} & names.keys())


def test_the_layer_above_keeps_its_say(directory: Path) -> None:
    names = {"f": 9 << 2 | Look.DIR, "p": 9 << 2}
    assert from_disk(directory, 3, names, doubt_files=True) == sorted({"w", "\udcff"} & names.keys())
    assert names == in_python(directory, 3) | {"f": 9 << 2 | Look.DIR, "p": 9 << 2}


def test_ten_thousand_names_take_more_than_one_call(tmp_path: Path) -> None:
    for i in range(10_000):
        (tmp_path / f"{i:050}").touch()
    names: dict[str, int] = {}
    from_disk(tmp_path, 1, names)
    assert names == in_python(tmp_path, 1)


@pytest.mark.parametrize("path", ["", "d", "e", "d/inner"])
def test_a_tree_gives_what_its_directory_gives(directory: Path, path: str) -> None:
    tree = scan(directory)
    names: dict[str, int] = {}
    assert from_tree(tree, path, 5, names) == []
    assert names == in_python(directory / path, 5)


@pytest.mark.skipif(os.geteuid() != 0, reason="devices 0:0 need root")
def test_a_name_that_two_layers_hide_is_gone_once(directory: Path) -> None:
    """Whiteouts of all layers had one value, so the second looked like the first put again, and was removed twice."""
    tree = scan(directory, whiteouts=WhiteoutFormat.OVERLAY)
    names: dict[str, int] = {}
    assert from_tree(tree, "", 5, names) == ["w"]
    assert from_tree(tree, "", 4, names) == []
    assert names["w"] >> 2 == 5


def test_columns_that_do_not_fit_together_are_refused(directory: Path) -> None:
    tree = scan(directory)
    good = (tree.paths.arena, tree.paths.start, tree.kind, tree.ends, LOOKS, 0, 0)
    listing.from_tree(*good, {}, [])
    for at, wrong in [
        (1, tree.paths.start[:-1]), (2, tree.kind[1:]), (3, tree.ends[1:]), (3, np.zeros_like(tree.ends) + 99),
        (4, LOOKS[:1]), (4, LOOKS + 9), (5, -1), (5, len(tree)), (1, tree.paths.start[::-1].copy()),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="from_tree"):
            listing.from_tree(*good[:at], wrong, *good[at + 1 :], {}, [])  # type: ignore[arg-type, misc]


def test_random_columns_never_leave_the_arrays(directory: Path) -> None:
    """For the sanitizers: whatever the columns say, names or ValueError."""
    tree, rng = scan(directory), random.Random(1)
    for _ in range(2000):
        start, ends = tree.paths.start.copy(), tree.ends.copy()
        for column in (start, ends):
            column[rng.randrange(len(column))] = rng.choice([-1, 0, 1, 3, 50, 1 << 62])
        with contextlib.suppress(ValueError):
            listing.from_tree(tree.paths.arena, start, tree.kind, ends, LOOKS, rng.randrange(len(tree)), 0, {}, [])
