"""Fingerprints of file contents: XXH3-128, to see whether a file changed. What names content for good is SHA-256 (oci/)."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import xxhash

from overlaykit._ext import contenthash
from overlaykit.tree.table import Kind, StrPath, Tree, first_names

BUFFER = 1 << 20  # bytes: files read before they are hashed, few enough to be still in the cache

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
