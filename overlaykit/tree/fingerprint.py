"""Fingerprints of file contents: XXH3-128, to see whether a file changed. What names content for good is SHA-256 (oci/)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import xxhash

from overlaykit._ext import contenthash
from overlaykit.errors import InvalidLayer
from overlaykit.tree.sparse import Pieces, sparse_map, sparse_rows, sparse_size
from overlaykit.tree.table import Kind, Rows, StrPath, Tree, first_names
from overlaykit.tree.tarball import Readable, TarReader, Window

BUFFER = 1 << 20  # bytes: files read before they are hashed, few enough to be still in the cache

ZEROS = memoryview(bytes(BUFFER))

Fingerprints = npt.NDArray[np.uint64]


def fingerprint(tree: Tree, directory: StrPath | int) -> Fingerprints:
    """uint64[n, 2]: the XXH3-128 of each file's content in `directory` (a path, or a descriptor that stays open).

    Zeroes where there is no content: for what is no file, and for empty ones. The names of one file are read once. Raises
    OSError with the path of the first file that could not be read; EIO for one whose size is not the tree's.
    """
    first = first_names(tree)
    rows = np.flatnonzero((tree.kind == Kind.FILE) & (tree.size > 0) & (first == np.arange(len(tree))))
    digests, errnos = np.zeros((len(rows), 16), np.uint8), np.zeros(len(rows), np.int32)
    fd = directory if isinstance(directory, int) else os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        failures = contenthash.hash_files(
            fd,
            tree.paths.arena,
            tree.paths.start,
            rows,
            tree.size[rows],
            xxhash.xxh3_128_digest,
            xxhash.xxh3_128,
            np.empty(BUFFER, np.uint8),
            digests,
            errnos,
        )
    finally:
        if fd is not directory:
            os.close(fd)
    if failures:
        bad = int(np.flatnonzero(errnos)[0])
        path = tree.path(int(rows[bad]))
        name = path if isinstance(directory, int) else os.path.join(directory, path)
        raise OSError(int(errnos[bad]), os.strerror(int(errnos[bad])), name)
    found = np.zeros((len(tree), 2), np.uint64)
    found[rows] = digests.view(">u8")  # as xxhash prints it: the high half first
    return found[first]


def fingerprint_files(tree: Tree, rows: Rows, content: Callable[[int], int]) -> Fingerprints:
    """uint64[k, 2]: the same for files `rows` of a tree that lies in several places: content(row) is a descriptor of one."""
    found = np.zeros((len(rows), 2), np.uint64)
    for at, row in enumerate(rows.tolist()):
        hashed = xxhash.xxh3_128()
        with open(content(row), "rb", buffering=0) as file:
            while data := file.read(BUFFER):
                hashed.update(data)
        found[at] = np.frombuffer(hashed.digest(), ">u8")
    return found


def fingerprint_layers(tree: Tree, rows: Rows, opened: Callable[[int], AbstractContextManager[Readable]]) -> Fingerprints:
    """uint64[k, 2]: the same for files `rows` of a tree that was made of layer tars: `opened(layer)` is the tar of one.

    Each tar is read once, to its end. Raises what `opened` and its streams do, and InvalidLayer.
    """
    found = np.zeros((len(rows), 2), np.uint64)
    layers = tree.layer[rows]
    for layer in np.unique(layers).tolist():
        mine = np.flatnonzero(layers == layer)
        offsets, index = np.unique(tree.offset[rows[mine]], return_inverse=True)
        with opened(layer) as stream:
            found[mine] = fingerprint_tar(stream, offsets)[index]
    return found


def fingerprint_tar(stream: Readable, offsets: Rows) -> Fingerprints:
    """uint64[k, 2]: the XXH3-128 of the contents that begin at `offsets` of an uncompressed layer tar, as its Tree has them.

    Holes of sparse files count as the zeros that they read as. The stream is read to its end. Raises InvalidLayer for what
    is no layer, or has no content at one of the offsets.
    """
    found: dict[int, bytes] = {}
    current: _Content | None = None
    for window in TarReader(stream):
        if current is not None and window.first:
            current.feed(window.buffer[: window.first])
        sparse = set(sparse_rows(window))
        for row in np.flatnonzero(np.isin(window.rows["offset"], offsets)).tolist():
            current = _Content(window, row, found, sparse=row in sparse)
            begin, here = int(window.rows["data"][row]), int(window.rows["here"][row])
            current.feed(window.buffer[begin : begin + here])
        if current is not None and not current.left:
            current = None
    if missing := set(offsets.tolist()) - found.keys():
        raise InvalidLayer(f"no file's content begins at byte {min(missing)}")
    return np.frombuffer(b"".join(found[at] for at in offsets.tolist()), ">u8").astype(np.uint64).reshape(-1, 2)


class _Content:
    """One file of a tar being hashed, in as many pieces as its content comes in."""

    def __init__(self, window: Window, row: int, found: dict[int, bytes], *, sparse: bool) -> None:
        self.left = int(window.rows["size"][row])
        self._offset = int(window.rows["offset"][row])
        self._found = found
        self._hash = xxhash.xxh3_128()
        self._pieces = Pieces(sparse_map(window, row)) if sparse else None
        self._size, self._at = sparse_size(window, row) if sparse else self.left, 0

    def feed(self, data: memoryview) -> None:
        self.left -= len(data)
        if self._pieces is None:
            self._hash.update(data)
        else:
            for offset, part in self._pieces.place(data):
                self._hole(offset)
                self._hash.update(part)
                self._at += len(part)
        if not self.left:
            if self._pieces is not None:
                self._pieces.complete()
                self._hole(self._size)
            self._found[self._offset] = self._hash.digest()

    def _hole(self, end: int) -> None:
        while self._at < end:
            zeros = ZEROS[: end - self._at]
            self._hash.update(zeros)
            self._at += len(zeros)
