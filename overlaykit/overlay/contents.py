"""The content of files: of a tree that lies in a directory, opened for whoever packs them; of one file into another."""

from __future__ import annotations

import os
from collections.abc import Callable

from overlaykit._ext import copyup
from overlaykit.overlay.layers import open_directory
from overlaykit.overlay.nodes import Handle
from overlaykit.tree.table import StrPath, Tree


class Contents:
    """Opens file `row` of `tree` in `directory`: a `content` for write_tar. No symlink is followed, whoever changes the
    directory meanwhile. OSError with the path."""

    def __init__(self, tree: Tree, directory: StrPath) -> None:
        self._tree = tree
        self._root = Handle(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        self._parent, self._handle = "", self._root

    def __call__(self, row: int) -> int:
        path = self._tree.path(row)
        parent, _, name = path.rpartition("/")
        if parent != self._parent:  # rows come directory by directory
            self._handle, self._parent = open_directory(self._root.fd, parent), parent
        # O_NONBLOCK: what was a file may be a fifo by now, and nobody may be at its other end.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(name, flags, dir_fd=self._handle.fd)
        except OSError as e:
            e.filename = path
            raise


def copy_content(source: int, target: int, advance: Callable[[int], object]) -> None:
    """Fill the empty file `target` with what file `source` has, both descriptors: by reflink where that works, holes kept.

    advance: told how many bytes more are done, now and then. OSError; EIO if the source gets shorter meanwhile.
    """
    size, told = os.fstat(source).st_size, 0

    def progress(done: int) -> None:
        nonlocal told
        advance(done - told)
        told = done

    copyup.copy_data(source, target, size, progress)
    progress(size)
