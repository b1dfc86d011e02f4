"""From a path to a directory and a name in it. Symlinks and ".." stay inside the merged root, whatever they say."""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, TypeVar, cast

from overlaykit.overlay.nodes import UPPER, Found, Node
from overlaykit.overlay.stack import Stack, fail

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

PATH_MAX = 4096  # bytes, the terminating NUL included
MAX_LINKS = 40  # symlinks in one path (fs/namei.c)
DOTS = frozenset(("", ".", ".."))  # names that are none


class Raced(Exception):
    """What a path led to has been replaced before it could be used."""


F = TypeVar("F", bound=Callable[..., Any])


def names_path(method: F) -> F:
    """`method`, whose OSErrors name the path that it was given and not the piece that some system call was given.

    It begins again if another thread took away what it had just looked up.
    """

    @functools.wraps(method)
    def wrapper(self: Any, path: AnyPath = "/", *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return method(self, path, *args, **kwargs)
            except Raced:
                continue
            except OSError as e:
                e.filename = os.fspath(path)
                raise

    return cast(F, wrapper)


class Last(Enum):
    """What a path ends in."""

    NAME = 0
    DOT = 1
    DOTDOT = 2
    ROOT = 3


class Place(NamedTuple):
    """Where a path leads: `name` in directory `node`, or `node` itself (name ".").

    found  what is there, None: nothing
    slash  a slash follows the name, so only a directory will do
    last   what the path ends in; only NAME can be made, removed or renamed
    """

    node: Node
    name: str
    found: Found | None
    slash: bool
    last: Last

    @property
    def is_dir(self) -> bool:
        return self.found is not None and stat.S_ISDIR(self.found.st.st_mode)


def text(path: AnyPath) -> str:
    """`path` as str, bytes that are no UTF-8 as surrogates."""
    path = os.fsdecode(path)
    if "\0" in path:
        raise ValueError("embedded null byte")
    return path


class Resolver:
    """Walks paths through a Stack, and remembers the directories that it came through."""

    def __init__(self, stack: Stack, *, most_open: int) -> None:
        self.stack = stack
        self.most_open = most_open  # descriptors of directories to keep
        # Directories by the path somebody used for them, as far as the last slash. Only ever a short cut.
        self.known: dict[str, Node] = {}
        self.known_by_links = False

    def forget(self) -> None:
        """Paths may mean something else now."""
        self.known.clear()
        self.known_by_links = False

    def forget_through(self, old: str, new: str) -> None:
        """Directory `old` moved, to where `new` may have been."""
        if self.known_by_links:
            self.forget()
            return
        for path in list(self.known):
            if old in path or new in path:  # as a part of a name too: then it is forgotten for nothing
                self.known.pop(path, None)

    def forget_links(self) -> None:
        """A symlink went away or moved."""
        if self.known_by_links:
            self.forget()

    def trim(self) -> None:
        """Let go of all directories once too many are open. Those in use close when their users are done."""
        if self.stack.opened > self.most_open:
            self.stack.opened = 0
            self.forget()
            self.stack.root.forget_children()

    def walk(self, path: str, *, follow: bool, parent: bool = False, look: bool = True, creating: bool = False) -> Place:
        """Where `path` leads. OSError for what is wrong on the way: ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG, EACCES.

        follow    a last symlink is followed (one with a slash behind it always is)
        parent    for making, removing and renaming: the last name stands for itself, slash or not
        look      False: nobody looks yet whether the last name is there
        creating  for O_CREAT: a slash behind the last name is EISDIR
        """
        if not path:
            raise fail(errno.ENOENT)
        if len(path) * 4 >= PATH_MAX and len(os.fsencode(path)) >= PATH_MAX:
            raise fail(errno.ENAMETOOLONG)
        self.trim()
        if (place := self._short_cut(path, follow=follow and not parent, look=look)) is not None:
            return place
        stack = self.stack
        node, rest, hops, own = stack.root, path, 0, True
        last = Last.ROOT
        while True:
            rest = rest.lstrip("/")
            if not rest:
                return Place(node, ".", stack.find_self(node), False, last)
            name, slash, rest = rest.partition("/")
            if slash:
                rest = rest.lstrip("/")
            if name in (".", ".."):
                last = Last.DOT if name == "." else Last.DOTDOT
                if name == "..":
                    node = node.parent or node
                if not rest:
                    return Place(node, ".", stack.find_self(node), bool(slash), last)
                self.searchable(node)
                continue
            last = Last.DOT
            if creating and slash and not rest:
                raise fail(errno.EISDIR)
            found = stack.find(node, name) if look or rest else None
            is_link = found is not None and stat.S_ISLNK(found.st.st_mode)
            if not rest:
                if not (is_link and not parent and (follow or slash)):
                    if own and not slash:
                        self.known[path.rpartition("/")[0]] = node
                        self.known_by_links |= hops > 0
                    if slash and not parent and found is not None and not stat.S_ISDIR(found.st.st_mode):
                        raise fail(errno.ENOTDIR)
                    return Place(node, name, found, bool(slash), Last.NAME)
                own = False
            if found is None:
                raise fail(errno.ENOENT)
            if is_link:
                hops += 1
                if hops > MAX_LINKS:
                    raise fail(errno.ELOOP)
                handle = stack.handle(node, found.layer)
                target = os.readlink(found.entry or name, dir_fd=handle.fd)
                if target[0] == "/":
                    node = stack.root
                    last = Last.ROOT
                rest = target + slash + rest
                if len(rest) * 4 >= PATH_MAX and len(os.fsencode(rest)) >= 2 * PATH_MAX:
                    raise fail(errno.ENAMETOOLONG)
                continue
            if not stat.S_ISDIR(found.st.st_mode):
                raise fail(errno.ENOTDIR)
            node = stack.child(node, name)

    def _short_cut(self, path: str, *, follow: bool, look: bool) -> Place | None:
        """Where `path` leads, if it goes on from a directory that is known; None: it has to be walked."""
        head, _, name = path.rpartition("/")
        if name in DOTS:
            return None
        node = self.known.get(head) or self._next(head)
        if node is None or node.dead:
            return None
        found = self.stack.find(node, name) if look else None
        if follow and found is not None and stat.S_ISLNK(found.st.st_mode):
            return None  # who follows it counts the links before it, too
        return Place(node, name, found, False, Last.NAME)

    def _next(self, path: str) -> Node | None:
        """The directory `path` in one that is known: who goes down a tree walks no path twice."""
        head, _, name = path.rpartition("/")
        node = self.known.get(head)
        if node is None or node.dead or name in DOTS:
            return None
        found = self.stack.find(node, name)
        if found is None or not stat.S_ISDIR(found.st.st_mode):
            return None
        kid = self.known[path] = self.stack.child(node, name)
        return kid

    def searchable(self, node: Node) -> None:
        """EACCES if the caller may not look names up in directory `node`. Any other lookup finds out by itself."""
        handle = self.stack.handle(node, UPPER if node.upper_fd >= 0 else node.lowers[0][0])
        os.stat("./.", dir_fd=handle.fd)

    def directory(self, place: Place) -> Node:
        """The directory that `place` is."""
        return place.node if place.name == "." else self.stack.child(place.node, place.name)
