"""Trees and layers out of a seed: the names, depths and proportions of container images, in any size.

Debian's minbase has one directory to eight entries, two thirds of its paths have 4 to 7 components, a path 38 bytes; in a
Python image they have 60 to 70. The same seed gives the same bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from overlaykit.tree import Entry, Kind, Strings, Tree, merge
from overlaykit.tree.table import empty_columns

TOP = ["usr/lib/x86_64-linux-gnu", "usr/lib/python3/dist-packages", "usr/share/doc", "usr/share/locale", "usr/include"]
TOP += ["usr/bin", "usr/src", "etc", "opt/app/node_modules", "var/lib/dpkg/info", "usr/local/lib/python3.11/site-packages"]
WORDS = ["core", "utils", "test", "data", "config", "locale", "common", "base", "client", "server", "http", "parser"]
WORDS += ["model", "stream", "cache", "doc", "__pycache__", "include", "lib", "api", "format", "codec", "index", "schema"]
ENDINGS = [".py", ".pyc", ".so", ".h", ".js", ".json", ".mo", ".txt", ".gz", "", ".conf", ".md5sums"]
MTIME_NS = 1_700_000_000 * 10**9  # 2023-11-14
JOINS = ["", "-", "_", "-ng", "lib"]
DEEPEST = 7  # components of a directory


def directories(rng: random.Random, count: int, owners: int) -> dict[str, int]:
    """About `count` directories, parents first, and the layer each belongs to; -1: it is everybody's.

    What lies in a package's directory is the package's, all the way down; the directories that packages share are few.
    """
    found: dict[str, int] = {}
    for path in TOP:
        above = path.split("/")
        for i in range(1, len(above) + 1):
            found.setdefault("/".join(above[:i]), -1)
    homes = [p for p in TOP for _ in range(1 + count // 500)]
    while len(found) < count:
        home = rng.choice(homes)
        path = f"{home}/{rng.choice(WORDS)}{rng.choice(JOINS)}{rng.randrange(100)}"
        if path in found:
            continue
        shared = found[home] < 0
        found[path] = rng.randrange(owners) if shared and rng.random() < 0.97 else found[home]
        if path.count("/") + 1 < DEEPEST:
            homes.append(path)
    return found


def layer_paths(size: int, count: int, seed: int = 1) -> tuple[list[set[str]], set[str]]:
    """The paths of `count` layers with `size` in all, each with its parents; and all directories there are.

    Two paths of a hundred are in more than one layer, and a layer's rows come in runs of about eleven before another's do:
    that is what ten installations of a seventy Debian packages each have.
    """
    rng = random.Random(seed)
    owners = directories(rng, size // 9 + len(TOP), count)
    found = list(owners)
    layers: list[set[str]] = [set() for _ in range(count)]
    left = [size // count] * count
    last = ""
    while any(n > 0 for n in left):
        home = rng.choice(found)
        number = owners[home]
        path = f"{home}/{rng.choice(WORDS)}_{rng.randrange(10 ** rng.randrange(1, 6))}{rng.choice(ENDINGS)}"
        if last and rng.random() < 0.01:
            path, number = last, -1
        if number < 0:
            number = rng.choice([n for n in range(count) if left[n] > 0])
        elif left[number] <= 0:
            continue
        layer, before = layers[number], len(layers[number])
        layer.add(path)
        up = path.rpartition("/")[0]
        while up and up not in layer:
            layer.add(up)
            up = up.rpartition("/")[0]
        left[number] -= len(layer) - before
        last = path
    return layers, {"", *found}


def tree_of(paths: Iterable[str], directories: set[str], seed: int) -> Tree:
    """A tree with these paths: files, one in fourteen a symlink, one in a hundred a whiteout, and the directories."""
    names = [p.replace(b"\0", b"/") for p in sorted(path.encode().replace(b"/", b"\0") for path in {"", *paths})]
    n = len(names)
    rng = np.random.default_rng(seed)
    columns = empty_columns(n)
    is_dir = np.fromiter((name.decode() in directories for name in names), np.bool_, n)
    draw = rng.random(n)
    kind = np.select([is_dir, draw < 0.07, draw < 0.08], [Kind.DIR, Kind.SYMLINK, Kind.WHITEOUT], Kind.FILE)
    written = kind != Kind.WHITEOUT
    is_link = kind == Kind.SYMLINK
    columns["kind"] = kind.astype(np.uint8)
    columns["mode"] = np.where(written, np.where(is_dir, 0o755, 0o644), 0).astype(np.uint32)
    columns["size"] = np.where(kind == Kind.FILE, rng.integers(0, 40_000, n), 0)
    columns["mtime_ns"] = np.where(written, MTIME_NS + rng.integers(0, 10**15, n), 0)
    columns["offset"] = np.where(kind == Kind.FILE, np.cumsum(columns["size"]), -1)
    columns["link"][is_link] = np.arange(is_link.sum())
    links = Strings.of([b"../lib/lib%d.so.1" % i for i in range(int(is_link.sum()))])
    return Tree(Strings.of(names), **columns, links=links, xattr_sets=())


@dataclass(frozen=True)
class Stack:
    """Layers, bottom first, and each one's paths as a list in a file, in the order of `LC_ALL=C sort`."""

    trees: list[Tree]
    lists: list[Path]

    @cached_property
    def plain(self) -> list[dict[str, Entry]]:
        """The layers as tests/reference.py takes them."""
        return [{entry.path: entry for entry in tree} for tree in self.trees]

    @cached_property
    def merged(self) -> Tree:
        return merge(self.trees)


def stack(size: int, folder: Path, count: int = 10) -> Stack:
    """`count` layers with `size` entries in all, the path lists in `folder`."""
    layers, found = layer_paths(size, count)
    lists = []
    for number, paths in enumerate(layers):
        lists.append(folder / str(number))
        lists[-1].write_text("".join(f"{path}\n" for path in sorted(paths)))
    return Stack([tree_of(paths, found, seed) for seed, paths in enumerate(layers)], lists)


@dataclass(frozen=True)
class Files:
    """A directory of files with content, a hundred to a directory: half under 3 KB, 8 KB on average, 128 KB at most."""

    directory: Path
    names: list[str]
    size: int  # bytes


def files(count: int, directory: Path, seed: int = 1) -> Files:
    rng = random.Random(seed)
    noise = rng.randbytes(1 << 18)
    names, size = [], 0
    for number in range(count):
        home = f"{number // 10_000:02}/{number // 100 % 100:02}"
        if number % 100 == 0:
            (directory / home).mkdir(parents=True)
        names.append(f"{home}/{rng.choice(WORDS)}_{number}")
        length = min(int(rng.lognormvariate(7.9, 1.5)), 1 << 17)
        at = rng.randrange(len(noise) - length)
        with open(directory / names[-1], "wb", buffering=0) as out:
            out.write(noise[at : at + length])
        size += length
    return Files(directory, names, size)
