"""The overlay in process: beside os.* on a host directory, and beside a kernel mount of the same layers."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kernel_overlay import mounted, needs_kernel_overlay
from measuring import bars, compare, need, run

from overlaykit.overlay import Overlay
from overlaykit.tree import Tree, WhiteoutFormat, scan

FILES = 20_000
NAMES = 100_000
PIECE = b"x" * 4096
LARGE = 1 << 30  # bytes of the file that is copied up
LAYERS, ENTRIES = 10, 110_000  # of the stack that is opened

opened = itertools.count()


@pytest.fixture
def place(scratch: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


@pytest.fixture
def files(request: pytest.FixtureRequest) -> int:
    return FILES if request.config.option.benchmark_enable else 200


def directories(place: Path, *names: str) -> list[Path]:
    made = [place / name for name in names]
    for path in made:
        path.mkdir(parents=True)
    return made


def paths(head: str, count: int) -> list[str]:
    return [f"{head}/file-{i:06}" for i in range(count)]


def fill(head: Path, count: int, data: bytes) -> None:
    for path in paths(str(head), count):
        with open(path, "wb") as f:
            f.write(data)


def tree(directory: Path) -> Tree:
    return scan(directory, whiteouts=WhiteoutFormat.OVERLAY)


def create(open_fd: Callable[[str, int], int], names: list[str]) -> None:
    for name in names:
        fd = open_fd(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(fd, PIECE)
        os.close(fd)


def each(call: Callable[[str], object], names: list[str]) -> None:
    for name in names:
        call(name)


# --- beside os.* on a host directory ----------------------------------------------------------------------------------


@pytest.fixture
def pair(place: Path) -> Iterator[tuple[Overlay, str, str]]:
    """An overlay, a directory in its upper and one on the host; both have no files."""
    lower, upper, work, host = directories(place, "lower", "upper", "work", "host")
    (lower / "d").mkdir()
    with Overlay([lower], upper, work, trees=[tree(lower)]) as overlay:
        overlay.mkdir("/new")
        yield overlay, "/new", str(host)


def test_bar_create_and_write(benchmark: Any, pair: tuple[Overlay, str, str], files: int) -> None:
    overlay, head, host = pair

    def clear() -> None:
        shutil.rmtree(host)
        os.mkdir(host)
        overlay.rmtree(head)
        overlay.mkdir(head)

    ours, theirs = paths(head, files), paths(host, files)
    compare(
        benchmark, "create and write 4 KiB files", lambda: create(overlay.open_fd, ours), lambda: create(os.open, theirs),
        entries=files, tool="os.open in a host directory", most=1.25, before=clear,
    )  # fmt: skip


def test_bar_stat(benchmark: Any, pair: tuple[Overlay, str, str], files: int) -> None:
    overlay, head, host = pair
    ours, theirs = paths(head, files), paths(host, files)
    create(overlay.open_fd, ours)
    create(os.open, theirs)
    compare(
        benchmark, "stat files of upper", lambda: each(overlay.stat, ours), lambda: each(os.stat, theirs),
        entries=files, tool="os.stat in a host directory", most=1.5,
    )  # fmt: skip


def test_bar_unlink(benchmark: Any, pair: tuple[Overlay, str, str], files: int) -> None:
    overlay, head, host = pair
    ours, theirs = paths(head, files), paths(host, files)

    def make() -> None:
        create(overlay.open_fd, [name for name in ours if not overlay.exists(name)])
        create(os.open, [name for name in theirs if not os.path.exists(name)])

    compare(
        benchmark, "unlink files of upper", lambda: each(overlay.unlink, ours), lambda: each(os.unlink, theirs),
        entries=files, tool="os.unlink in a host directory", most=1.5, before=make,
    )  # fmt: skip


def test_bar_append(benchmark: Any, pair: tuple[Overlay, str, str], files: int) -> None:
    overlay, head, host = pair
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND

    def append(open_fd: Callable[[str, int], int], path: str) -> None:
        for _ in range(files):
            fd = open_fd(path, flags)
            os.write(fd, PIECE)
            os.close(fd)

    def clear() -> None:
        os.close(overlay.open_fd(f"{head}/log", flags | os.O_TRUNC))
        os.close(os.open(f"{host}/log", flags | os.O_TRUNC))

    compare(
        benchmark, "open, append 4 KiB, close", lambda: append(overlay.open_fd, f"{head}/log"),
        lambda: append(os.open, f"{host}/log"), entries=files, tool="os.open on the host", most=1.4, before=clear,
    )  # fmt: skip


def test_bar_rename(benchmark: Any, pair: tuple[Overlay, str, str], files: int) -> None:
    overlay, head, host = pair
    ours, theirs = paths(head, files), paths(host, files)
    create(overlay.open_fd, ours)
    create(os.open, theirs)

    def there_and_back(rename: Callable[[str, str], None], names: list[str]) -> None:
        for name in names:
            rename(name, f"{name}~")
        for name in names:
            rename(f"{name}~", name)

    compare(
        benchmark, "rename files of upper", lambda: there_and_back(overlay.rename, ours),
        lambda: there_and_back(os.rename, theirs), entries=2 * files, tool="os.rename on the host", most=1.4,
    )  # fmt: skip


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_bar_writes_in_an_open_file(benchmark: Any, pair: tuple[Overlay, str, str], files: int, order: str) -> None:
    """Of one file, by two names: how fast another is depends on where in memory it happens to lie."""
    overlay, head, host = pair
    overlay.open(f"{head}/file", "x").close()
    os.link(Path(host).parent / "upper" / head[1:] / "file", f"{host}/file")
    at = [i * len(PIECE) for i in range(files)]
    if order == "random":
        random.Random(1).shuffle(at)

    def write(open_fd: Callable[[str, int], int], path: str) -> None:
        fd = open_fd(path, os.O_RDWR | os.O_CREAT)
        for offset in at:
            os.pwrite(fd, PIECE, offset)
        os.close(fd)

    compare(
        benchmark, f"{order} writes of 4 KiB", lambda: write(overlay.open_fd, f"{head}/file"),
        lambda: write(os.open, f"{host}/file"), entries=files, tool="os.pwrite on the host", most=1.0,
    )  # fmt: skip


# --- beside the kernel's mount ----------------------------------------------------------------------------------------


@needs_kernel_overlay
@pytest.mark.parametrize("layer", ["committed", "on disk"])
def test_bar_stat_of_lower_files(benchmark: Any, place: Path, files: int, layer: str) -> None:
    lower, upper, work, merged, other, scrap = directories(place, "lower", "upper", "work", "merged", "other", "scrap")
    (lower / "usr").mkdir()
    fill(lower / "usr", files, b"x")
    trees = [tree(lower)] if layer == "committed" else None
    with mounted([lower], upper, work, merged), Overlay([lower], other, scrap, trees=trees) as overlay:
        ours, theirs = paths("/usr", files), paths(f"{merged}/usr", files)
        compare(
            benchmark, f"stat files of a lower {layer}", lambda: each(overlay.stat, ours), lambda: each(os.stat, theirs),
            entries=files, tool="os.stat in a kernel mount", most=1.0,
        )  # fmt: skip


@needs_kernel_overlay
@pytest.mark.parametrize("layer", ["committed", "on disk"])
@pytest.mark.parametrize("how", ["first", "next"])
def test_bar_listing_of_a_merged_directory(benchmark: Any, place: Path, files: int, layer: str, how: str) -> None:
    """Two layers give half of the names each. first: by a mount and an overlay that are new."""
    count = files * NAMES // FILES
    bottom, top, merged = directories(place, "bottom", "top", "merged")
    for i, lower in enumerate((bottom, top)):
        (lower / "usr").mkdir()
        for path in paths(f"{lower}/usr", count)[i::2]:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
    trees = [tree(bottom), tree(top)] if layer == "committed" else None
    with contextlib.ExitStack() as both:
        overlay: Overlay

        def fresh() -> None:
            nonlocal overlay
            if how == "next" and opened_here:
                return
            both.close()
            for made in opened_here:
                shutil.rmtree(made)
            opened_here[:] = directories(place, *(f"{name}{next(opened)}" for name in ("upper", "work", "other", "scrap")))
            both.enter_context(mounted([bottom, top], *opened_here[:2], merged))
            overlay = both.enter_context(Overlay([bottom, top], *opened_here[2:], trees=trees))

        opened_here: list[Path] = []
        compare(
            benchmark, f"{how} listing of a merged directory, lowers {layer}", lambda: overlay.listdir("/usr"),
            lambda: os.listdir(f"{merged}/usr"), entries=count, tool="os.listdir in a kernel mount", most=1.0, before=fresh,
        )  # fmt: skip
        assert len(overlay.listdir("/usr")) == count


# --- copy-up of a large file ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_system(kind: str, place: Path, size: int) -> Iterator[Path]:
    """A file system of its own at a directory in `place`, in a file there."""
    target, image = place / "fs", place / "image"
    target.mkdir()
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", target)
    else:
        with image.open("wb") as f:
            f.truncate(size)
        run(need(f"mkfs.{kind}"), "-q", *{"ext4": ["-F"], "xfs": ["-m", "reflink=1"], "btrfs": []}[kind], image)
        run("mount", "-o", "loop", image, target)
    try:
        yield target
    finally:
        run("umount", target)
        image.unlink(missing_ok=True)


@needs_kernel_overlay
@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs", "btrfs"])
def test_bar_first_write_to_a_large_lower_file(benchmark: Any, place: Path, kind: str) -> None:
    """Open for writing, write one byte, close: all of the copy-up and its fsync."""
    size = LARGE if benchmark.enabled else 1 << 20
    with file_system(kind, place, 2 * size + (size // 2 if kind == "tmpfs" else 600 << 20)) as base:
        lower, merged = directories(base, "lower", "merged")
        with (lower / "large").open("wb") as f:
            for _ in range(size >> 20):
                f.write(os.urandom(1 << 20))
        run("sync", "-f", base)

        def first_write(begin: Callable[[Path, Path], contextlib.AbstractContextManager[Any]], how: str) -> None:
            upper, work = directories(base, "upper", "work")
            with begin(upper, work) as fs:
                fd = fs.open_fd("/large", os.O_WRONLY) if how == "ours" else os.open(f"{merged}/large", os.O_WRONLY)
                os.write(fd, b"x")
                os.close(fd)
            shutil.rmtree(upper)
            shutil.rmtree(work)

        compare(
            benchmark, f"first write to a large lower file on {kind}",
            lambda: first_write(lambda upper, work: Overlay([lower], upper, work), "ours"),
            lambda: first_write(lambda upper, work: mounted([lower], upper, work, merged), "kernel"),
            entries=1, tool="the kernel's overlay", most=1.0,
        )  # fmt: skip


# --- opening ----------------------------------------------------------------------------------------------------------

MEASURE_MEMORY = """
import os, sys
from pathlib import Path
from overlaykit.overlay import View
from overlaykit.tree import Tree
base = Path(sys.argv[1])
def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
before = private()
lowers = sorted(base.glob("layer*"))
with View(lowers, trees=[Tree.load(base / f"tree-{lower.name}") for lower in lowers]) as view:
    names = sum(1 + len(d) + len(f) for _, d, f in view.walk())
    print(private() - before, names)
"""


@pytest.fixture
def stack_of_layers(place: Path, files: int) -> list[Path]:
    """Ten layers of 110,000 entries in all, with their trees saved beside them."""
    each_layer = ENTRIES // LAYERS if files == FILES else 100
    lowers = directories(place, *(f"layer{i}" for i in range(LAYERS)))
    rng = random.Random(7)
    for number, lower in enumerate(lowers):
        made = 0
        while made < each_layer:
            home = lower / f"usr/lib/python{rng.randrange(20)}/package{rng.randrange(60)}"
            if not home.is_dir():
                home.mkdir(parents=True)
                made += 1
            for i in range(rng.randrange(4, 16)):
                (home / f"module_{number}_{made + i}.py").touch()
            made += 10
        saved = place / f"tree-{lower.name}"
        saved.mkdir()
        tree(lower).save(saved)
    return lowers


@needs_kernel_overlay
def test_bar_open_and_list_the_root(benchmark: Any, place: Path, stack_of_layers: list[Path]) -> None:
    lowers = stack_of_layers
    upper, work, other, scrap, merged = directories(place, "upper", "work", "other", "scrap", "merged")

    def ours() -> None:
        trees = [Tree.load(place / f"tree-{lower.name}") for lower in lowers]
        with Overlay(lowers, other, scrap, trees=trees) as overlay:
            assert overlay.listdir("/") == ["usr"]

    with mounted(lowers, upper, work, merged):
        compare(
            benchmark, "open ten committed layers and list the root", ours, lambda: run(need("find"), merged),
            entries=ENTRIES, tool="find over the kernel's mount", most=0.04,
        )  # fmt: skip


def test_bar_memory(benchmark: Any, place: Path, stack_of_layers: list[Path]) -> None:
    """Bytes an entry for trees that are loaded and directories that were all listed, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, str(place)], capture_output=True, text=True, check=True
    ).stdout.split()
    benchmark.pedantic(lambda: None, rounds=1)
    size, entries = int(done[0]), int(done[1])
    benchmark.extra_info.update(bytes=size, entries=entries, bytes_per_entry=size // entries)
    if benchmark.enabled:
        bars.append(f"memory of ten layers, all directories listed, {entries:,} entries: {size // entries} bytes an entry")
