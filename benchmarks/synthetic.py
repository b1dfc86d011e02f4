"""Trees and layers out of a seed: the names, depths and proportions of container images, in any size.

Debian's minbase has one directory to eight entries, two thirds of its paths have 4 to 7 components, a path 38 bytes; in a
Python image they have 60 to 70. The same seed gives the same bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from overlaykit.tree import Kind, Strings, Tree
from overlaykit.tree.table import empty_columns

TOP = ["usr/lib/x86_64-linux-gnu", "usr/lib/python3/dist-packages", "usr/share/doc", "usr/share/locale", "usr/include"]
TOP += ["usr/bin", "usr/src", "etc", "opt/app/node_modules", "var/lib/dpkg/info", "usr/local/lib/python3.11/site-packages"]
WORDS = ["core", "utils", "test", "data", "config", "locale", "common", "base", "client", "server", "http", "parser", "model"]
WORDS += ["stream", "cache", "doc", "__pycache__", "include", "lib", "api", "format", "codec", "index", "schema"]
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
