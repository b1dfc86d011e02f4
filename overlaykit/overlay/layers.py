"""Lower layers, asked for one name or for a whole directory: on disk, or in the Tree of a layer that is committed.

A layer answers in terms of its own paths ("usr/lib", no slash in front, "" for its root); what hides what is the
business of stack.py. With a Tree no system call is made until content or attributes are wanted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from enum import IntEnum
from typing import Protocol

from overlaykit._ext import inroot
from overlaykit.overlay.markers import Markers, is_whiteout_device
from overlaykit.overlay.nodes import Handle
from overlaykit.tree.table import Flag, Kind, Tree
from overlaykit.tree.whiteout import OPAQUE, WHITEOUT


class Look(IntEnum):
    """What a layer has under a name. The first four fit two bits: see Node.names."""

    OTHER = 0  # a device, a pipe, a socket
    DIR = 1
    LINK = 2
    FILE = 3
    WHITEOUT = 4
    ABSENT = 5


LOOKS = [Look.OTHER] * (max(Kind) + 1)
LOOKS[Kind.DIR], LOOKS[Kind.SYMLINK], LOOKS[Kind.FILE] = Look.DIR, Look.LINK, Look.FILE
LOOKS[Kind.WHITEOUT] = Look.WHITEOUT


FEW = 64  # children of a directory that are looked at one by one, before all that lies below it is read at once


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
        if self.markers.is_whiteout(st, parent.fd, name):
            return Look.WHITEOUT
        return Look.FILE if stat.S_ISREG(st.st_mode) else Look.LINK if stat.S_ISLNK(st.st_mode) else Look.OTHER

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
                        yield entry.name, Look.WHITEOUT if gone else Look.FILE
                    elif entry.is_dir(follow_symlinks=False):
                        yield entry.name, Look.DIR
                    elif entry.is_symlink():
                        yield entry.name, Look.LINK
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
        return Look.ABSENT if row < 0 else LOOKS[self.tree.kind[row]]

    def entries(self, directory: Handle | None, path: str) -> Iterator[tuple[str, Look]]:
        tree = self.tree
        row = tree.find(path)
        if row < 0:
            return
        skip = len(os.fsencode(path)) + (1 if path else 0)
        ends, end, child = tree.ends, int(tree.ends[row]), row + 1
        for _ in range(FEW):
            if child >= end:
                return
            yield os.fsdecode(tree.paths[child][skip:]), LOOKS[tree.kind[child]]
            child = int(ends[child])
        # Many names: one slice for the rest of the subtree, since a call into numpy a row would cost more than all else.
        start = tree.paths.start[child : end + 1].tolist()
        last_rows, kinds = ends[child:end].tolist(), tree.kind[child:end].tolist()
        base, first = start[0], child
        data = tree.paths.arena[base : start[-1]].tobytes()
        while child < end:
            at = child - first
            yield os.fsdecode(data[start[at] - base + skip : start[at + 1] - base]), LOOKS[kinds[at]]
            child = last_rows[at]

    def is_opaque(self, directory: Handle | None, path: str) -> bool:
        row = self.tree.find(path)
        return row >= 0 and bool(self.tree.flags[row] & Flag.OPAQUE)

    def redirect(self, directory: Handle | None, path: str) -> str | None:
        return None  # a Tree has none: see View, trees


__all__ = ["DiskLayer", "Layer", "Look", "TreeLayer", "last", "open_directory"]
