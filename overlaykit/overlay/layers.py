"""Lower layers, asked for one name or for a whole directory: on disk, or in the Tree of a layer that is committed.

A layer answers in terms of its own paths ("usr/lib", no slash in front, "" for its root); what hides what is the
business of stack.py. With a Tree no system call is made until content or attributes are wanted.
"""

from __future__ import annotations

import os
import stat
from enum import IntEnum
from typing import Protocol

import numpy as np

from overlaykit._ext import inroot, listing
from overlaykit.overlay.markers import Markers
from overlaykit.overlay.nodes import Handle
from overlaykit.tree.table import Flag, Kind, Tree
from overlaykit.tree.whiteout import OPAQUE


class Look(IntEnum):
    """What a layer has under a name. The first four fit two bits: see Node.names."""

    OTHER = 0  # a device, a pipe, a socket
    DIR = 1
    LINK = 2
    FILE = 3
    WHITEOUT = 4
    ABSENT = 5


LOOKS = np.full(max(Kind) + 1, Look.OTHER, np.uint8)  # of each Kind
LOOKS[Kind.DIR], LOOKS[Kind.SYMLINK], LOOKS[Kind.FILE] = Look.DIR, Look.LINK, Look.FILE
LOOKS[Kind.WHITEOUT] = Look.WHITEOUT


class Layer(Protocol):
    """One lower layer. `root` is its directory; a `live` one wants to be handed directories that are open."""

    root: Handle
    live: bool

    def look(self, directory: Handle | None, path: str) -> Look:
        """What `path` is; `directory` is its parent, where the caller has it open."""

    def put_names(self, directory: Handle | None, path: str, number: int, names: dict[str, int]) -> list[str]:
        """Put into `names` what directory `path` has and `names` lacks: name -> number << 2 | its Look.

        Gives the names of whiteouts, which stand there until all layers are in.
        """

    def is_opaque(self, directory: Handle | None, path: str) -> bool: ...

    def redirect(self, directory: Handle | None, path: str) -> str | None:
        """Where directory or metacopy `path` says that its lower part is."""


def open_directory(root: int, path: str) -> Handle:
    """Directory `path` of a layer, for *at calls only. No symlink on the way is followed."""
    return Handle(inroot.open_beneath(root, os.fsencode(path) or b".", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW))


def last(path: str) -> str:
    return path.rpartition("/")[2] or "."


def look_of(st: os.stat_result, directory: int, name: str, markers: Markers) -> Look:
    """What `name` in descriptor `directory` is, which looks like `st`."""
    if stat.S_ISDIR(st.st_mode):
        return Look.DIR
    if markers.is_whiteout(st, directory, name):
        return Look.WHITEOUT
    return Look.FILE if stat.S_ISREG(st.st_mode) else Look.LINK if stat.S_ISLNK(st.st_mode) else Look.OTHER


def read_names(directory: int, markers: Markers, number: int, names: dict[str, int]) -> list[str]:
    """Layer.put_names for a directory on disk, given its descriptor."""
    gone: list[str] = []
    unsure: list[str] = []
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        listing.from_disk(fd, number, names, unsure, markers.has_xattr_whiteouts(directory))
    finally:
        os.close(fd)
    for name in unsure:
        try:
            look = look_of(os.stat(name, dir_fd=directory, follow_symlinks=False), directory, name, markers)
        except FileNotFoundError:  # removed since; a lower name would not show, but for a whiteout
            look = Look.WHITEOUT
        if look is Look.WHITEOUT:
            gone.append(name)
        else:
            names[name] = number << 2 | look
    return gone


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
        return look_of(st, parent.fd, name, self.markers)

    def put_names(self, directory: Handle | None, path: str, number: int, names: dict[str, int]) -> list[str]:
        directory = directory or open_directory(self.root.fd, path)
        return read_names(directory.fd, self.markers, number, names)

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
        return Look.ABSENT if row < 0 else Look(LOOKS[self.tree.kind[row]])

    def put_names(self, directory: Handle | None, path: str, number: int, names: dict[str, int]) -> list[str]:
        tree, gone = self.tree, list[str]()
        row = tree.find(path)
        if row >= 0:
            listing.from_tree(tree.paths.arena, tree.paths.start, tree.kind, tree.ends, LOOKS, row, number, names, gone)
        return gone

    def is_opaque(self, directory: Handle | None, path: str) -> bool:
        row = self.tree.find(path)
        return row >= 0 and bool(self.tree.flags[row] & Flag.OPAQUE)

    def redirect(self, directory: Handle | None, path: str) -> str | None:
        return None  # a Tree has none: see View, trees


__all__ = ["DiskLayer", "Layer", "Look", "TreeLayer", "last", "open_directory", "read_names"]
