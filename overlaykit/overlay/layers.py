"""Lower layers, asked for one name or for a whole directory: on disk, or in the Tree of a layer that is committed.

A layer answers in terms of its own paths ("usr/lib", no slash in front, "" for its root); what hides what is the
business of stack.py. With a Tree no system call is made until content or attributes are wanted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from enum import Enum
from typing import Protocol

from overlaykit._ext import inroot
from overlaykit.overlay.markers import Markers, is_whiteout_device
from overlaykit.overlay.nodes import Handle
from overlaykit.tree.table import Flag, Kind, Tree
from overlaykit.tree.whiteout import OPAQUE, WHITEOUT


class Look(Enum):
    """What a layer has under a name."""

    ABSENT = 0
    WHITEOUT = 1
    DIR = 2
    OTHER = 3


class Layer(Protocol):
    """One lower layer. `root` is its directory; a `live` one wants to be handed directories that are open."""

    root: Handle
    live: bool

    def look(self, directory: Handle | None, path: str) -> Look:
        """What `path` is; `directory` is its parent, where the caller has it open."""

    def entries(self, directory: Handle | None, path: str) -> Iterator[tuple[str, Look]]:
        """Every name in directory `path`, whiteouts included."""

    def is_opaque(self, directory: Handle | None, path: str) -> bool: ...

    def redirect(self, directory: Handle | None, path: str) -> str | None:
        """Where directory or metacopy `path` says that its lower part is."""


def open_directory(root: int, path: str) -> Handle:
    """Directory `path` of a layer, for *at calls only. No symlink on the way is followed."""
    return Handle(inroot.open_beneath(root, os.fsencode(path) or b".", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW))


def last(path: str) -> str:
    return path.rpartition("/")[2] or "."


class DiskLayer:
    """A layer known only from its directory."""

    live = True

    def __init__(self, root: Handle, markers: Markers) -> None:
        self.root = root
        self.markers = markers

    def parent(self, directory: Handle | None, path: str) -> Handle:
        return directory or open_directory(self.root.fd, path.rpartition("/")[0])

    def look(self, directory: Handle | None, path: str) -> Look:
        parent, name = self.parent(directory, path), last(path)
        try:
            st = os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return Look.ABSENT
        if stat.S_ISDIR(st.st_mode):
            return Look.DIR
        return Look.WHITEOUT if self.markers.is_whiteout(st, parent.fd, name) else Look.OTHER

    def entries(self, directory: Handle | None, path: str) -> Iterator[tuple[str, Look]]:
        directory = directory or open_directory(self.root.fd, path)
        xattr_whiteouts = self.markers.has_xattr_whiteouts(directory.fd)
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory.fd)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        gone = (
                            xattr_whiteouts
                            and entry.stat(follow_symlinks=False).st_size == 0
                            and self.markers.get(directory.fd, entry.name, WHITEOUT) is not None
                        )
                        yield entry.name, Look.WHITEOUT if gone else Look.OTHER
                    elif entry.is_dir(follow_symlinks=False):
                        yield entry.name, Look.DIR
                    elif entry.is_symlink():
                        yield entry.name, Look.OTHER
                    else:
                        gone = is_whiteout_device(entry.stat(follow_symlinks=False))
                        yield entry.name, Look.WHITEOUT if gone else Look.OTHER
        finally:
            os.close(fd)

    def is_opaque(self, directory: Handle | None, path: str) -> bool:
        parent = self.parent(directory, path)
        return self.markers.get(parent.fd, last(path), OPAQUE) == b"y"

    def redirect(self, directory: Handle | None, path: str) -> str | None:
        parent = self.parent(directory, path)
        return self.markers.redirect(parent.fd, last(path))


class TreeLayer:
    """A layer that is committed, so that its Tree says what is in it."""

    live = False

    def __init__(self, root: Handle, tree: Tree) -> None:
        self.root = root
        self.tree = tree

    def look(self, directory: Handle | None, path: str) -> Look:
        row = self.tree.find(path)
        return Look.ABSENT if row < 0 else self.kind(int(self.tree.kind[row]))

    @staticmethod
    def kind(kind: int) -> Look:
        if kind == Kind.DIR:
            return Look.DIR
        return Look.WHITEOUT if kind == Kind.WHITEOUT else Look.OTHER

    def entries(self, directory: Handle | None, path: str) -> Iterator[tuple[str, Look]]:
        tree = self.tree
        row = tree.find(path)
        if row < 0:
            return
        end = int(tree.ends[row])
        below = slice(row + 1, end + 1)
        start = tree.paths.start[below].tolist()
        if len(start) < 2:
            return
        # One slice for the whole subtree: a call into numpy a row would cost more than all the rest.
        ends, kinds = tree.ends[row + 1 : end].tolist(), tree.kind[row + 1 : end].tolist()
        base, skip = start[0], len(os.fsencode(path)) + (1 if path else 0)
        data = tree.paths.arena[base : start[-1]].tobytes()
        child = 0
        while child < len(ends):
            name = data[start[child] - base + skip : start[child + 1] - base]
            yield os.fsdecode(name), self.kind(kinds[child])
            child = ends[child] - row - 1

    def is_opaque(self, directory: Handle | None, path: str) -> bool:
        row = self.tree.find(path)
        return row >= 0 and bool(self.tree.flags[row] & Flag.OPAQUE)

    def redirect(self, directory: Handle | None, path: str) -> str | None:
        return None  # a Tree has none: see View, trees


__all__ = ["DiskLayer", "Layer", "Look", "TreeLayer", "last", "open_directory"]
