"""Copy-up: many small files and a large one. The kernel, the reference in plain Python, and GNU cp."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_files
from measuring import compare, measure, need, run
from synthetic import Files

from overlaykit._ext import copyup
from overlaykit.tree import Strings

COMPARED = "tests/reference_files.py, cp -a --reflink=auto"
OPEN_AT_ONCE = 200  # directories, two descriptors each
LARGE = 256 << 20  # bytes


class Place:
    """Where copies go: the directories of the source, empty, and a work directory beside them."""

    def __init__(self, source: Files, root: Path) -> None:
        self.source = source
        self.root = root
        self.homes = sorted({name.rpartition("/")[0] for name in source.names})
        self.by_home: dict[str, list[bytes]] = {home: [] for home in self.homes}
        for path in source.names:
            home, _, name = path.rpartition("/")
            self.by_home[home].append(name.encode())

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        for home in self.homes:
            (self.root / "upper" / home).mkdir(parents=True)
        (self.root / "work").mkdir()

    # --- the ways -----------------------------------------------------------------------------------------------------

    def kernel(self) -> None:
        with os_open(self.root / "work") as work:
            homes = iter(self.homes)
            while some := list(islice(homes, OPEN_AT_ONCE)):
                names, sources, targets = [], [], []
                with descriptors(self.source.directory, some) as src, descriptors(self.root / "upper", some) as dst:
                    for home, a, b in zip(some, src.fds, dst.fds, strict=True):
                        names += self.by_home[home]
                        sources += [a] * len(self.by_home[home])
                        targets += [b] * len(self.by_home[home])
                    strings, errnos = Strings.of(names), np.zeros(len(names), np.int32)
                    failed = copyup.copy_up_many(
                        np.array(sources, np.int32), np.array(targets, np.int32), strings.arena, strings.start,
                        work.fds[0], b"trusted.overlay.", copyup.KEEP_TIMES, errnos,
                    )  # fmt: skip
                    assert failed == 0

    def reference(self) -> None:
        work, upper = self.root / "work", self.root / "upper"
        for name in self.source.names:
            reference_files.copy_up(self.source.directory / name, work, upper / name)

    def cp(self) -> None:
        run(need("cp"), "-a", "--reflink=auto", f"{self.source.directory}/.", self.root / "upper")


class descriptors:
    """Open directories below one."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.fds = [os.open(root / name, os.O_RDONLY | os.O_DIRECTORY) for name in names]

    def __enter__(self) -> descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds:
            os.close(fd)


def os_open(path: Path) -> descriptors:
    return descriptors(path, ["."])


@pytest.fixture
def place(files: Files, scratch: Path) -> Iterator[Place]:
    place = Place(files, scratch / "copies")
    yield place
    shutil.rmtree(place.root, ignore_errors=True)


@pytest.mark.parametrize("way", ["kernel", "reference", "cp"])
def test_small_files(benchmark: Any, place: Place, size: int, way: str) -> None:
    """A million entries are a hundred thousand, ten times, each onto an empty upper: the times are of one such part."""
    parts = max(1, size // len(place.source.names))
    measure(
        benchmark,
        getattr(place, way),
        name="copy-up",
        entries=size,
        size=place.source.size * parts,
        compared_with=COMPARED,
        slow=True,
        parts=parts,
        setup=place.clear,
    )
    assert sum(len(names) for _, _, names in os.walk(place.root / "upper")) == len(place.source.names)


def test_bar_small_files(benchmark: Any, place: Place, size: int) -> None:
    if size > len(place.source.names):
        pytest.skip("the files are the same 100,000")
    compare(
        benchmark, "copy-up", place.kernel, place.cp, entries=size, tool="cp -a --reflink=auto", before=place.clear
    )  # fmt: skip


@pytest.fixture(scope="module")
def large(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory with one large file; a small one where nothing is measured."""
    folder = scratch / "large"
    folder.mkdir()
    with (folder / "file").open("wb") as out:
        for _ in range((LARGE if request.config.option.benchmark_enable else 1 << 20) >> 20):
            out.write(os.urandom(1 << 20))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("way", ["kernel", "reference", "cp"])
def test_one_large_file(benchmark: Any, large: Path, way: str) -> None:
    source, work, target = large / "file", large / "work", large / "target"
    work.mkdir(exist_ok=True)
    fds = os_open(large), os_open(work)

    def kernel() -> None:
        (here,), (there,) = fds[0].fds, fds[1].fds
        copyup.copy_up(here, b"file", there, b"#0", here, b"target", b"trusted.overlay.", 0)

    ways: dict[str, Callable[[], None]] = {
        "kernel": kernel,
        "reference": lambda: reference_files.copy_up(source, work, target),
        "cp": lambda: run(need("cp"), "-a", "--reflink=auto", source, target),
    }
    size = source.stat().st_size
    measure(
        benchmark, ways[way], name="copy-up of one large file", entries=1, size=size, compared_with=COMPARED,
        setup=lambda: target.unlink(missing_ok=True),
    )  # fmt: skip
    assert target.stat().st_size == size
    for opened in fds:
        opened.__exit__()
