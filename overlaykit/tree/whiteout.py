"""Whiteouts: names that a layer takes away. As OCI files (.wh.NAME, .wh..wh..opq), as overlayfs inodes (char device 0:0,
trusted.overlay.opaque=y), as user xattrs (user.overlay.*). The constants of all forms stand here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import replace
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from overlaykit._ext import whiteout
from overlaykit.errors import InvalidLayer, Unsupported
from overlaykit.tree.table import Flag, Kind, Rows, Strings, Tree, Xattrs

# image-spec layer.md, "Whiteouts"
PREFIX = ".wh."
OPAQUE_NAME = ".wh..wh..opq"


class WhiteoutFormat(Enum):
    """How a tree on disk or in a tar says that a lower name is gone."""

    NONE = "none"  # it cannot: every entry is what it seems
    OCI = "oci"  # files named .wh.NAME and .wh..wh..opq
    OVERLAY = "overlay"  # char devices 0:0 and trusted.overlay.* xattrs: root's overlayfs
    USERXATTR = "userxattr"  # the same under user.overlay.*, with xattr whiteouts: overlayfs mounted with userxattr
    FUSE = "fuse"  # all of these, side by side: what fuse-overlayfs leaves; written as OVERLAY, which it reads too

    @property
    def xattr_prefix(self) -> str:
        """What overlayfs's own xattrs begin with. ValueError for a format that has none."""
        if self in (WhiteoutFormat.OVERLAY, WhiteoutFormat.FUSE):
            return "trusted.overlay."
        if self is WhiteoutFormat.USERXATTR:
            return "user.overlay."
        raise ValueError(f"{self.value} trees have no overlay xattrs")


# Overlayfs's own xattrs, after the prefix; kernel Documentation/filesystems/overlayfs.rst
OPAQUE = "opaque"  # "y": hides lower names; "x": has xattr whiteouts
WHITEOUT = "whiteout"  # an empty file with it is a whiteout, in a directory whose `opaque` is "x"
REDIRECT = "redirect"  # where the lower directory or data is: /from/the/root, or a sibling's name
METACOPY = "metacopy"  # a file's metadata without its data
ESCAPE = "overlay."  # what a nested overlay's own xattrs get behind the prefix
# Bookkeeping that says nothing about content
BOOKKEEPING = frozenset({"origin", "impure", "nlink", "upper", "uuid", "protattr"})
# What xattrs of fuse-overlayfs's own begin with (its main.c), and a device that it makes beside each .wh..wh..opq.
FUSE_PREFIXES = ("trusted.overlay.", "user.overlay.", "user.fuseoverlayfs.", "security.fuseoverlayfs.")
FUSE_OPAQUE_NAME = b".wh..opq"
# With xattr_permissions it keeps owner and mode in one of these, "UID:GID:MODE" and in later versions a kind.
OVERRIDES = tuple(f"{place}.override_stat" for place in ("user.containers", "user.fuseoverlayfs", "security.fuseoverlayfs"))
OVERRIDE = re.compile(rb"(\d{1,10}):(\d{1,10}):([0-7]{1,7})(?::(?:file|dir|symlink))?")


class Mark(IntEnum):
    """What a name is to the OCI format; the numbers of ext/whiteout.pyx."""

    PLAIN = 0
    WHITEOUT = 1
    OPAQUE = 2
    METADATA = 3  # .wh..wh.plnk and the like: AUFS kept its own books there
    INVALID = 4


def read_oci_names(table: Tree) -> tuple[Tree, npt.NDArray[np.uint8]]:
    """`table` with its marks' names taken off (a/.wh.b is a/b, a/.wh..wh..opq is a), and each row's Mark.

    AUFS metadata is dropped. InvalidLayer names the first row whose mark is no name at all.
    """
    marks = np.zeros(len(table), np.uint8)
    if whiteout.classify(table.paths.arena, table.paths.start, marks) == 0:
        return table, marks
    bad = np.flatnonzero(marks == Mark.INVALID)
    if len(bad):
        raise InvalidLayer(
            f"{table.path(int(bad[0]))!r}: not a whiteout that image-spec knows: a bare {PREFIX!r}, one of '.' or '..', "
            "or one used as a directory"
        )
    plain = marks != Mark.METADATA
    if not plain.all():
        table, marks = table.take(plain), marks[plain]
    arena, start = np.empty_like(table.paths.arena), np.empty_like(table.paths.start)
    size = whiteout.strip(table.paths.arena, table.paths.start, marks, arena, start)
    return replace(table, paths=Strings(arena[:size], start)), marks


def oci_names(tree: Tree, gone: Rows, opaque: Rows) -> list[bytes]:
    """The paths of the files by which a tar says that rows `gone` are whiteouts, and then that rows `opaque` are opaque."""
    names = []
    for row in gone.tolist():
        head, slash, name = tree.paths[row].rpartition(b"/")
        names.append(head + slash + PREFIX.encode() + name)
    for row in opaque.tolist():
        path = tree.paths[row]
        names.append((path + b"/" if path else b"") + OPAQUE_NAME.encode())
    return names


def read_overlay_marks(tree: Tree, prefix: str) -> Tree:
    """`tree` of an overlay's upper or layer directory with the overlay's marks read: WHITEOUT kinds, OPAQUE flags.

    Xattrs that begin with `prefix` are the overlay's own and go, but for the redirect and metacopy marks, which the overlay
    itself must resolve; escaped ones (prefix + "overlay.") are a nested overlay's and lose one level. Follows the kernel's
    overlayfs.rst, "whiteouts and opaque directories" and "Nesting overlayfs mounts".
    """
    sets: list[Xattrs] = []
    opaque, whiteout, bare = (np.zeros(len(tree.xattr_sets) + 1, np.bool_) for _ in range(3))
    for number, own in enumerate(tree.xattr_sets):
        kept = own_to_inner(own, prefix)
        opaque[number] = own.get(prefix + OPAQUE) == b"y"
        whiteout[number] = prefix + WHITEOUT in own
        for name in (prefix + REDIRECT, prefix + METACOPY):
            if name in own:
                kept[name] = own[name]
        bare[number] = not kept
        sets.append(kept)
    # Index -1, a row without xattrs, finds the last element, which is False.
    kind = np.where((tree.kind == Kind.CHAR) & (tree.rdev == 0), np.uint8(Kind.WHITEOUT), tree.kind)
    kind[whiteout[tree.xattrs] & (tree.kind == Kind.FILE) & (tree.size == 0)] = Kind.WHITEOUT
    flags = tree.flags | np.where(opaque[tree.xattrs] & (tree.kind == Kind.DIR), np.uint8(Flag.OPAQUE), np.uint8(0))
    xattrs = np.where(bare[tree.xattrs], np.int32(-1), tree.xattrs)
    gone = kind == Kind.WHITEOUT
    columns: dict[str, npt.NDArray[Any]] = {"kind": kind, "flags": flags, "xattrs": xattrs}
    if gone.any():
        for name in ("mode", "uid", "gid", "mtime_ns"):
            columns[name] = np.where(gone, 0, getattr(tree, name))
        columns["hardlink"] = np.where(gone, -1, tree.hardlink)  # the kernel links all its whiteouts together
        columns["xattrs"] = np.where(gone, -1, xattrs)
    return replace(tree.with_columns(**columns), xattr_sets=tuple(sets))


def read_fuse_marks(tree: Tree) -> Tree:
    """`tree` of an upper directory of fuse-overlayfs with its marks read, but for those that are names: `regular` does that.

    It shows no xattrs under its prefixes to whoever is in the mount, and so none is a nested overlay's.
    """
    spare = [row for row in np.flatnonzero((tree.kind == Kind.CHAR) & (tree.rdev == 0)).tolist()
             if tree.paths[row].rpartition(b"/")[2] == FUSE_OPAQUE_NAME]  # fmt: skip
    keep = np.ones(len(tree), np.bool_)
    keep[spare] = False
    tree = _overridden(tree.take(keep))
    for prefix in FUSE_PREFIXES:
        tree = read_overlay_marks(tree, prefix)
    return tree


def _overridden(tree: Tree) -> Tree:
    """`tree` with the owners and modes that stand in OVERRIDES in place of those on disk."""
    columns = {name: getattr(tree, name).copy() for name in ("uid", "gid", "mode")}
    sets = list(tree.xattr_sets)
    for number, own in enumerate(tree.xattr_sets):
        value = next((own[name] for name in OVERRIDES if name in own), None)
        rows = np.flatnonzero(tree.xattrs == number)
        if value is None or not len(rows):
            continue
        found = OVERRIDE.fullmatch(value)
        if found is None:
            raise Unsupported(f"{tree.path(int(rows[0]))!r}: its owner and mode are kept as {value!r}")
        for name, text, base in zip(columns, found.groups(), (10, 10, 8), strict=True):
            columns[name][rows] = int(text, base) & (0o7777 if name == "mode" else 0xFFFFFFFF)
        sets[number] = {name: kept for name, kept in own.items() if name not in OVERRIDES}
    return replace(tree.with_columns(**columns), xattr_sets=tuple(sets))


def own_to_inner(xattrs: Xattrs, prefix: str) -> dict[str, bytes]:
    """The xattrs that a mounted overlay shows of a file that has `xattrs` on disk: its own gone, escaped ones unescaped."""
    shown = {}
    for name, value in xattrs.items():
        if name.startswith(prefix + ESCAPE):
            shown[prefix + name[len(prefix + ESCAPE) :]] = value
        elif not name.startswith(prefix):
            shown[name] = value
    return shown


def inner_to_own(xattrs: Xattrs, prefix: str) -> dict[str, bytes]:
    """The xattrs to put on disk so that a mounted overlay shows `xattrs`: what looks like the overlay's own is escaped."""
    return {
        prefix + ESCAPE + name[len(prefix) :] if name.startswith(prefix) else name: value for name, value in xattrs.items()
    }
