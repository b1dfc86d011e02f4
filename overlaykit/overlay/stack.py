"""Which layer gives a name: lookups through upper and lowers, one directory at a time.

The rules are the kernel's (fs/overlayfs/namei.c). From the top: the first layer that has a name decides. A whiteout: it
is gone. What is no directory: it shows, and hides all below. A directory merges with the directories of that name below,
down to a whiteout, a non-directory or, inclusive, an opaque directory. A redirect says under which name to go on.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING

from overlaykit.overlay.layers import Layer, Look, last, open_directory
from overlaykit.overlay.markers import Markers
from overlaykit.overlay.nodes import INDEX, UPPER, Found, Handle, Node
from overlaykit.tree.whiteout import WhiteoutFormat

if TYPE_CHECKING:
    from overlaykit.overlay.index import Index

ASK = 4  # lookups in a directory before all its lower names are read at once: a listing costs as much as a few lookups
KEEP_OPEN = 16  # lowers in a stack up to which directories of lowers stay open: descriptors against system calls


def fail(code: int, path: str | bytes = "", other: str | bytes | None = None) -> OSError:
    """The OSError to raise for errno `code`."""
    if other is not None:
        return OSError(code, os.strerror(code), path, None, other)
    return OSError(code, os.strerror(code), path)


def join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


class Stack:
    """The layers of one overlay and the directories it has open.

    lowers  bottom first
    data    layers that only a metacopy's redirect can reach, bottom first
    index   where the copies of lower files with several names are; None: such names break apart
    """

    index: Index | None = None

    def __init__(
        self, lowers: Sequence[Layer], markers: Markers, *, upper: Handle | None = None, data: Sequence[Layer] = ()
    ) -> None:
        self.layers = list(lowers)
        self.data = list(data)
        self.markers = markers
        # redirects in user xattrs are whoever's who owns the file; the kernel refuses them too
        self.follows = markers.form is not WhiteoutFormat.USERXATTR
        self.keep_open = len(self.layers) <= KEEP_OPEN
        self.opened = 0  # descriptors that nodes have taken since the last trim
        self.root = Node(None, "", upper, tuple((i, "") for i in reversed(range(len(self.layers)))))
        self.root.handles.update((i, layer.root) for i, layer in enumerate(self.layers))

    # --- lowers ---------------------------------------------------------------------------------------------------

    def lower(self, node: Node, layer: int) -> Handle:
        """The directory of `node` in lower `layer`, which it merges."""
        handle = node.handles.get(layer)
        if handle is None:
            path = next(path for number, path in node.lowers if number == layer)
            handle = open_directory(self.layers[layer].root.fd, path)
            if self.keep_open:
                node.handles[layer] = handle
                self.opened += 1
        return handle

    def live(self, node: Node, layer: int) -> Handle | None:
        return self.lower(node, layer) if self.layers[layer].live else None

    def find_lower(self, node: Node, name: str) -> int:
        """The lower layer that gives `name` to directory `node`, -1 if none does."""
        names = node.names
        if names is None:
            node.asked += 1
            if node.asked <= ASK:
                for layer, path in node.lowers:
                    look = self.layers[layer].look(self.live(node, layer), join(path, name))
                    if look is not Look.ABSENT:
                        return -1 if look is Look.WHITEOUT else layer
                return -1
            names = self.lower_names(node)
        return names.get(name, -1) >> 2

    def lower_names(self, node: Node) -> dict[str, int]:
        """Every name that the lowers give to `node`: layer << 2 | its Look."""
        if node.names is not None:
            return node.names
        names: dict[str, int] = {}
        gone: list[str] = []
        for layer, path in node.lowers:
            gone += self.layers[layer].put_names(self.live(node, layer), path, layer, names)
        for name in gone:
            del names[name]
        node.names = names
        return names

    # --- one name -------------------------------------------------------------------------------------------------

    def find(self, node: Node, name: str) -> Found | None:
        """What `name` in directory `node` is; None if there is no such name. OSError from the file system."""
        if name == ".":
            return self.find_self(node)
        if node.upper_fd >= 0:
            try:
                st = os.stat(name, dir_fd=node.upper_fd, follow_symlinks=False)
            except FileNotFoundError:
                pass
            else:
                return None if self.markers.is_whiteout(st, node.upper_fd, name) else Found(st, UPPER)
        if node.dead or not node.lowers:
            if len(os.fsencode(name)) > 255:
                raise fail(errno.ENAMETOOLONG, name)
            return None
        layer = self.find_lower(node, name)
        if layer < 0:
            if len(os.fsencode(name)) > 255:
                raise fail(errno.ENAMETOOLONG, name)
            return None
        directory = self.lower(node, layer)
        st = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
        if self.layers[layer].live and self.markers.is_whiteout(st, directory.fd, name):
            return None
        if self.index is not None and st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            return self.index.find(directory.fd, name, layer, st) or Found(st, layer)
        return Found(st, layer)

    def find_self(self, node: Node) -> Found:
        if node.upper_fd >= 0:
            return Found(os.stat(".", dir_fd=node.upper_fd), UPPER)
        layer = node.lowers[0][0]
        return Found(os.stat(".", dir_fd=self.lower(node, layer).fd), layer)

    def handle(self, node: Node, layer: int) -> Handle:
        """`node`'s directory in `layer` (UPPER and INDEX too). Hold on to it while its descriptor is in use."""
        if layer == UPPER:
            assert node.upper is not None
            return node.upper
        if layer == INDEX:
            assert self.index is not None
            return self.index.handle
        return self.lower(node, layer)

    # --- directories ----------------------------------------------------------------------------------------------

    def child(self, node: Node, name: str) -> Node:
        """The directory `name` in `node`, which `find` has seen to be one."""
        kid = node.children.get(name)
        if kid is not None:
            return kid
        upper, redirect, opaque = None, None, False
        if node.upper_fd >= 0:
            try:
                flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                upper = Handle(os.open(name, flags, dir_fd=node.upper_fd))
            except FileNotFoundError:
                pass
            except NotADirectoryError:  # removed since the caller looked
                raise fail(errno.ENOENT) from None
            else:
                self.opened += 1
                opaque = self.markers.is_opaque(upper.fd)
                if not opaque:
                    redirect = self.markers.redirect(upper.fd, ".")
        lowers = () if opaque else self.lower_directories(node, name, redirect)
        if redirect and lowers and not self.follows:
            raise fail(errno.EPERM, join(node.path(), name))
        kid = Node(node, name, upper, lowers)
        kid.redirect = redirect or ""
        return node.children.setdefault(name, kid)

    def lower_directories(self, node: Node, name: str, redirect: str | None) -> tuple[tuple[int, str], ...]:
        """The lower directories that make up `name` of `node`, topmost first: (layer, path in that layer)."""
        out: list[tuple[int, str]] = []
        absolute = ""
        todo = list(node.lowers)
        if redirect is not None:
            if redirect[0] == "/":
                absolute, todo = redirect[1:], list(self.root.lowers)
            else:
                name = redirect
        while todo:
            number, path = todo.pop(0)
            layer = self.layers[number]
            handle, stop = None, False
            if absolute:
                path, stop, absolute = self.follow(layer, absolute)
            else:
                handle = self.live(node, number)
                path = join(path, name)
            look = layer.look(handle, path) if path else Look.ABSENT
            if look is Look.ABSENT and not stop:
                continue
            if look is not Look.DIR:
                break
            if out and out[-1][1] == path:
                path = out[-1][1]  # nearly always, and then one text is enough for all layers
            out.append((number, path))
            # The bottom can say nothing about what is below; any other may redirect to layers its parent does not merge.
            if stop or number == 0 or layer.is_opaque(handle, path):
                break
            onward = layer.redirect(handle, path)
            if onward is None:
                continue
            if not self.follows:
                raise fail(errno.EPERM, join(node.path(), name))
            if onward[0] == "/":
                absolute, todo = onward[1:], [lower for lower in self.root.lowers if lower[0] < number]
            elif absolute:
                absolute = join(absolute.rpartition("/")[0], onward)
            else:
                name = onward
        return tuple(out)

    def follow(self, layer: Layer, path: str) -> tuple[str, bool, str]:
        """Where `path` from the root of one layer leads there ("": nowhere), whether the layers below are out of sight,
        and the path to ask them for: directories on the way may have redirects of their own."""
        names = path.split("/")
        done, stop = "", False
        below: list[str] = []
        for name in names[:-1]:
            done = join(done, name)
            below.append(name)
            look = layer.look(None, done)
            if look is not Look.DIR:
                return "", stop or look is not Look.ABSENT, path
            if layer.is_opaque(None, done):
                stop = True
                continue
            onward = layer.redirect(None, done)
            if onward is None:
                continue
            if onward[0] == "/":
                below, stop = onward[1:].split("/"), False
            else:
                below[-1] = onward
        return join(done, names[-1]), stop, "/".join([*below, names[-1]])

    # --- data that is not where its attributes are ----------------------------------------------------------------

    def source(self, node: Node, name: str, found: Found) -> tuple[Handle, str]:
        """The directory and name of the file that has the data of `name`: itself, unless it is a metacopy.

        EPERM where redirects are not followed, EIO if there is no data anywhere.
        """
        number = found.layer
        handle, base = self.handle(node, number), found.entry or name
        if not self.markers.is_metacopy(found.st, handle.fd, base):
            return handle, base
        absolute, todo = "", [lower for lower in node.lowers if number < 0 or lower[0] < number]
        redirect = self.markers.redirect(handle.fd, base)
        stop = False
        while self.follows:
            if redirect is not None:
                if redirect[0] == "/":
                    absolute = redirect[1:]
                    todo = [lower for lower in self.root.lowers if number < 0 or lower[0] < number]
                elif absolute:
                    absolute = join(absolute.rpartition("/")[0], redirect)
                else:
                    name = redirect
                redirect = None
            if stop or not todo:
                break
            number, path = todo.pop(0)
            layer = self.layers[number]
            if absolute:
                path, stop, absolute = self.follow(layer, absolute)
            else:
                path = join(path, name)
            look = layer.look(None, path) if path else Look.ABSENT
            if look is Look.ABSENT:
                continue
            handle, base = open_directory(layer.root.fd, path.rpartition("/")[0]), last(path)
            st = os.stat(base, dir_fd=handle.fd, follow_symlinks=False)
            if not stat.S_ISREG(st.st_mode):
                break
            if not self.markers.is_metacopy(st, handle.fd, base):
                return handle, base
            redirect = self.markers.redirect(handle.fd, base)
        else:
            raise fail(errno.EPERM, join(node.path(), name))
        for layer in reversed(self.data) if absolute else ():
            try:
                handle, base = open_directory(layer.root.fd, absolute.rpartition("/")[0]), last(absolute)
                if stat.S_ISREG(os.stat(base, dir_fd=handle.fd, follow_symlinks=False).st_mode):
                    return handle, base
            except (FileNotFoundError, NotADirectoryError):
                continue
        raise fail(errno.EIO, join(node.path(), name))
