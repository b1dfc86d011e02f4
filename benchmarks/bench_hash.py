"""Content hashing of warm files: the kernel, the same reads without hashing, the reference, cat, and hashing tools."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_files
import xxhash
from measuring import compare, measure, need, run
from synthetic import Files

from overlaykit._ext import contenthash
from overlaykit.tree import Kind, Tree, fingerprint, scan
from overlaykit.tree.fingerprint import BUFFER

COMPARED = "tests/reference_files.py, cat, b3sum, sha256sum, xxhsum -H2"
NOTHING = bytes(16)


class NoHash:
    """What hashlib's objects can do, doing nothing."""

    def update(self, data: object) -> None:
        pass

    def digest(self) -> bytes:
        return NOTHING


class Hashing:
    """The ways of hashing all files once."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.tree: Tree = scan(files.directory)
        self.rows = np.flatnonzero((self.tree.kind == Kind.FILE) & (self.tree.size > 0))
        self.fd = os.open(files.directory, os.O_RDONLY | os.O_DIRECTORY)
        self.list = "\0".join(files.names).encode()

    def kernel(self) -> None:
        fingerprint(self.tree, self.fd)

    def _batches(self, digest: Callable[[memoryview], bytes], new: Callable[[], Any]) -> None:
        failed = contenthash.hash_files(
            self.fd, self.tree.paths.arena, self.tree.paths.start, self.rows, self.tree.size[self.rows], digest, new,
            np.empty(BUFFER, np.uint8), np.empty((len(self.rows), 16), np.uint8), np.empty(len(self.rows), np.int32),
        )  # fmt: skip
        assert failed == 0

    def reading(self) -> None:
        self._batches(lambda data: NOTHING, NoHash)

    def reference(self) -> None:
        reference_files.hash_files([self.files.directory / name for name in self.files.names])

    def tool(self, *command: str) -> None:
        run("xargs", "-0", *command, stdin=self.list, directory=self.files.directory)


@pytest.fixture
def hashing(files: Files) -> Iterator[Hashing]:
    hashing = Hashing(files)
    yield hashing
    os.close(hashing.fd)


TOOLS = {"cat": ["cat"], "b3sum": ["b3sum", "--num-threads=1"], "sha256sum": ["sha256sum"], "xxhsum": ["xxhsum", "-H2"]}


@pytest.mark.parametrize("way", ["kernel", "reading", "reference", *TOOLS])
def test_files(benchmark: Any, hashing: Hashing, files: Files, size: int, way: str) -> None:
    """reading: the kernel's own system calls and calls of Python, with nothing hashed.

    A million entries are a hundred thousand, ten times: the times are those of one such part.
    """
    parts = max(1, size // len(files.names))
    if way in TOOLS:
        command = [need(TOOLS[way][0]), *TOOLS[way][1:]]
        work: Callable[[], None] = lambda: hashing.tool(*command)  # noqa: E731
    else:
        work = getattr(hashing, way)
    measure(
        benchmark, work, name="hash", entries=size, size=files.size * parts, compared_with=COMPARED, parts=parts,
        slow=way in ("reference", "sha256sum"),
    )  # fmt: skip


def test_kernel_says_what_the_reference_says(hashing: Hashing, files: Files) -> None:
    found = fingerprint(hashing.tree, hashing.fd)
    some: list[Path] = [files.directory / name for name in files.names[:1_000]]
    for path, digest in zip(some, reference_files.hash_files(some), strict=True):
        row = hashing.tree.find(str(path.relative_to(files.directory)))
        expected = digest if path.stat().st_size else NOTHING
        assert found[row].astype(">u8").tobytes() == expected
    assert xxhash.xxh3_128_digest(b"") != NOTHING


def test_bar_hash(benchmark: Any, hashing: Hashing, files: Files, size: int) -> None:
    if size > len(files.names):
        pytest.skip("the files are the same 100,000")
    compare(
        benchmark, "hash", hashing.kernel, hashing.reading, entries=size, tool="the same reads, nothing hashed", most=1.25
    )  # fmt: skip
