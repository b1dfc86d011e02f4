"""Directories of the merged tree, kept open while they are in use."""

from __future__ import annotations

import os
from typing import NamedTuple, NoReturn

UPPER = -1  # the layer number of what is in upper; lowers count from 0, the bottom
INDEX = -2  # of what is in upper, but not under that name: index.py


class Handle:
    """A descriptor that is closed when the last who holds it lets go: threads may still be using a forgotten directory."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)

    def __reduce__(self) -> NoReturn:
        # A copy would close the same number a second time, whosever that is by then.
        raise TypeError("a directory that is open can be neither copied nor pickled")


class Found(NamedTuple):
    """A name that exists: what it looks like on disk, and the layer that gives it (UPPER, INDEX, or the number of a lower).

    entry  under which name it is in the index
    """

    st: os.stat_result
    layer: int
    entry: str = ""


class Node:
    """One merged directory.

    lowers     the lower directories it merges, topmost first: (layer, path in that layer)
    upper_fd   its directory in upper, -1 while it has none
    names      every name that the lowers give it: layer << 2 | its Look; None until somebody needs them all
    redirect   what its upper directory says about where its lowers are, "" if nothing
    """

    __slots__ = (
        "asked", "children", "dead", "foreign", "handles", "impure", "lowers", "name", "names", "parent", "redirect",
        "upper", "upper_fd",
    )  # fmt: skip

    def __init__(self, parent: Node | None, name: str, upper: Handle | None, lowers: tuple[tuple[int, str], ...]) -> None:
        self.parent = parent
        self.name = name
        self.lowers = lowers
        self.redirect = ""
        self.children: dict[str, Node] = {}
        self.handles: dict[int, Handle] = {}
        self.names: dict[str, int] | None = None if lowers else {}
        self.asked = 0  # lookups in the lowers so far
        self.dead = False  # removed: a path that was remembered for it is void
        # Whether upper has whiteouts or redirected directories under names that no lower has; None: not looked yet.
        self.foreign: bool | None = None
        self.impure: bool | None = None  # whether upper's is marked as having names that came up; None: not looked yet
        self.upper: Handle | None
        self.upper_fd: int
        self.set_upper(upper)

    def set_upper(self, upper: Handle | None) -> None:
        self.upper = upper
        self.upper_fd = -1 if upper is None else upper.fd

    def path(self) -> str:
        """The path in the merged tree, with a leading slash."""
        parts: list[str] = []
        node: Node = self
        while node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return "/" + "/".join(reversed(parts))

    def die(self) -> None:
        """Be void, and all below: removed from the merged tree, though somebody may still hold it."""
        self.forget_children(dead=True)

    def forget_children(self, *, dead: bool = False) -> None:
        """Let go of all directories below. Each holds its parent, so only a clean cut closes them at once."""
        todo = [self]
        while todo:
            node = todo.pop()
            node.dead = node.dead or dead
            todo.extend(node.children.values())
            node.children = {}
