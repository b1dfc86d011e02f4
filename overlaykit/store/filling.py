"""Filling an empty volume with what the image has at its place: mode, owner, times, xattrs, hard links and holes kept.

The copy is made beside the volume's files and moved in when all of it is on disk:

    VOLUME/filling    a copy under way, or what a killed process left of one
    VOLUME/filled     a whole copy on its way in: whoever next uses the volume moves the rest
    VOLUME/_data      the volume's files

So who is killed leaves an empty volume or a full one. One at a time does it, by a lock on VOLUME.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overlaykit.oci.durable import sync_directory
from overlaykit.overlay import View
from overlaykit.overlay.copyout import copy_tree, move_names
from overlaykit.store.disk import remove_tree, sync_file_system


@contextmanager
def locked_volume(directory: Path) -> Iterator[None]:
    """Hold the lock on a volume's directory. A holder that dies lets go."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def fill(directory: Path, data: Path, view: View, path: str) -> bool:
    """Fill the empty directory `data` with what is in `path` of `view`; whether that was done.

    directory: where the copy is made, on the file system of `data`. A directory that has any entry stays as it is, and so
    it does if `path` is no directory.
    """
    with locked_volume(directory):
        settle(directory, data)
        if os.listdir(data) or not view.isdir(path):
            return False
        aside = directory / "filling"
        copy_tree(view, path, aside)
        sync_file_system(aside)
        os.rename(aside, directory / "filled")  # from here on it is done, whoever does the rest
        sync_directory(directory)
        settle(directory, data)
        return True


def settle(directory: Path, data: Path) -> None:
    """Move in what somebody copied whole and was killed over, and remove what is not whole. Under the lock."""
    filled = directory / "filled"
    if filled.exists():
        move_names(filled, data)  # a container that has the volume too may have been there first: what it wrote stays
        remove_tree(filled)
    remove_tree(directory / "filling")
