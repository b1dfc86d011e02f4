"""Filling an empty directory of a volume or a bind with what the image has at its place: mode, owner, times, xattrs, hard
links and holes kept.

The copy is made aside, on the same file system, and moved in when all of it is on disk. For a volume that is

    VOLUME/filling       a copy under way, or what a killed process left of one
    VOLUME/filled        a whole copy on its way in: whoever next uses the volume moves the rest
        into             a link whose text is the directory of the volume that it goes into
        files            the copy
        seed             what it was filled with (reseeding.py), if it is the whole volume
    VOLUME/swapping      files that are made anew beside the old ones, and
    VOLUME/swapped       when they are whole and on their way to the place of those, with their `inode` and `seed`
    VOLUME/_data         the volume's files
    VOLUME/seed          the seed of what is in _data

and for what is mounted there or bound from elsewhere the first two lie in that directory, under names of their own. So who
is killed leaves an empty volume or a full one. One at a time does it, by a lock on VOLUME, or on the bind's source.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from overlaykit.oci.durable import sync_directory
from overlaykit.overlay import View
from overlaykit.overlay.copyout import copy_tree, exchange, move_names
from overlaykit.overlay.folder import inside
from overlaykit.store.disk import remove_tree, sync_file_system

HIDDEN = ".overlaykit-"  # what the names aside begin with where they lie among the files
Seeding = Callable[[Path, Path], object]  # is given the copy, and the file to write its seed to


@contextmanager
def locked_volume(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock on a volume's directory. A holder that dies lets go. wait: for another, or else BlockingIOError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Site:
    """Where something is filled. lock: the directory whose lock is held meanwhile; data: the root of the files."""

    lock: Path
    data: Path
    prefix: str = HIDDEN

    @classmethod
    def of_volume(cls, directory: Path, *, mounted: bool) -> Site:
        """mounted: its files are on another file system, and cannot be moved in from beside them."""
        data = directory / "_data"
        return cls(directory, data) if mounted else cls(directory, data, "")

    @classmethod
    def of_bind(cls, source: Path) -> Site:
        return cls(source, source)

    def aside(self, name: str) -> Path:
        return (self.data if self.prefix else self.lock) / f"{self.prefix}{name}"

    def fill(self, view: View, path: str, *, into: str = "", seeding: Seeding | None = None) -> bool:
        """Fill the empty directory `into` of the files with what is in `path` of `view`; whether that was done.

        A directory that has any entry stays as it is, and so it does if `path` is no directory, or `into` none.
        """
        with locked_volume(self.lock):
            self.settle()
            if not view.isdir(path) or not self._is_empty(into):
                return False
            aside = self.aside("filling")
            aside.mkdir(mode=0o700)
            (aside / "into").symlink_to(into or ".")
            copy_tree(view, path, aside / "files")
            if seeding is not None and not into:
                seeding(aside / "files", aside / "seed")
            sync_file_system(aside)
            os.rename(aside, self.aside("filled"))  # from here on it is done, whoever does the rest
            sync_directory(self.aside("filled").parent)
            self.settle()
            return True

    def _is_empty(self, into: str) -> bool:
        try:
            with inside(self.data, into or ".") as there:
                return not os.listdir(there)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def settle(self) -> None:
        """Move in what somebody copied whole and was killed over, and remove what is not whole. Under the lock."""
        filled, filling = self.aside("filled"), self.aside("filling")
        if filled.exists():
            # a container that has the volume too may have been there first: what it wrote stays, what it removed is gone
            with suppress(FileNotFoundError, NotADirectoryError), inside(self.data, os.readlink(filled / "into")) as there:
                move_names(filled / "files", f"{there}/.")  # the directory, not the link to it
            if (filled / "seed").exists():
                os.replace(filled / "seed", self.lock / "seed")
            remove_tree(filling)
            os.rename(filled, filling)  # what is half removed must not be taken for what is to be moved in
        remove_tree(filling)
        if not self.prefix:
            self._swap()

    def _swap(self) -> None:
        """Let the files that were made anew take the place of the old ones, which go."""
        swapped, swapping = self.lock / "swapped", self.lock / "swapping"
        if swapped.exists():
            if str(self.data.stat().st_ino) != os.readlink(swapped / "inode"):  # else that was done before somebody died
                exchange(swapped / "files", self.data)
                sync_directory(self.lock)
            if (swapped / "seed").exists():
                os.replace(swapped / "seed", self.lock / "seed")
            remove_tree(swapping)
            os.rename(swapped, swapping)
        remove_tree(swapping)

    def needs_settling(self) -> bool:
        names = ("filled", "filling") if self.prefix else ("filled", "filling", "swapped", "swapping")
        return any(self.aside(name).exists() for name in names)

    def swap(self, make: Callable[[Path], object]) -> None:
        """Let `files` and `seed`, which `make` puts into the directory it is given, become those of the volume.

        All or nothing, also if somebody is killed. Of a volume in the store, under the lock.
        """
        aside = self.lock / "swapping"
        aside.mkdir(mode=0o700)
        make(aside)
        (aside / "inode").symlink_to(str((aside / "files").stat().st_ino))
        sync_file_system(aside)
        os.rename(aside, self.lock / "swapped")  # from here on it is done, whoever does the rest
        sync_directory(self.lock)
        self._swap()
