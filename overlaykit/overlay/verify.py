"""Files of a directory held against the tar of the layer that they were unpacked from, content by content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np

from overlaykit.overlay.contents import Contents
from overlaykit.tree.fingerprint import Fingerprints, fingerprint, fingerprint_files, fingerprint_layers
from overlaykit.tree.table import Kind, Rows, StrPath, Tree
from overlaykit.tree.tarball import Readable


def unlike_contents(
    said: Tree, opened: Callable[[], AbstractContextManager[Readable]], on_disk: Tree, directory: StrPath
) -> Iterator[tuple[str, OSError | None]]:
    """The paths of files in `directory` with another content than the layer's, or why that cannot be told.

    said: the layer's Tree; opened: its uncompressed tar, which is read to its end; on_disk: what `directory` has. A file of
    another kind or size is passed over, and so is a hard link into a lower layer, whose content is not in this tar.
    """
    rows = np.flatnonzero((said.kind == Kind.FILE) & (said.size > 0) & (said.offset >= 0))
    places = np.array([on_disk.find(said.paths[row]) for row in rows.tolist()], np.int64)
    same = (places >= 0) & (on_disk.kind[places] == Kind.FILE) & (on_disk.size[places] == said.size[rows])
    rows, places = rows[same], places[same]
    wanted = fingerprint_layers(said, rows, lambda _: opened())
    found, failed = _prints(on_disk, places, directory)
    for at in np.flatnonzero((wanted != found).any(axis=1)).tolist():
        yield said.path(int(rows[at])), failed.get(at)


def _prints(tree: Tree, rows: Rows, directory: StrPath) -> tuple[Fingerprints, dict[int, OSError]]:
    """uint64[k, 2]: the fingerprints of files `rows`; and which of the k cannot be read, whose fingerprints are zeroes."""
    try:
        return fingerprint(tree, directory)[rows], {}
    except OSError:
        pass  # which of them it is, is found one by one
    contents = Contents(tree, directory)
    found: Fingerprints = np.zeros((len(rows), 2), np.uint64)
    failed = {}
    for at in range(len(rows)):
        try:
            found[at] = fingerprint_files(tree, rows[at : at + 1], contents)[0]
        except OSError as e:
            failed[at] = e
    return found, failed
