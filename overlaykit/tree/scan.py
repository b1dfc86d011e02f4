"""Directories to trees: what lies on disk, one row an entry, hard links known by device and inode, nothing followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from overlaykit._ext import treescan
from overlaykit.tree.regular import regular
from overlaykit.tree.table import Kind, Strings, StrPath, Tree, Xattrs, empty_columns
from overlaykit.tree.whiteout import BOOKKEEPING, WhiteoutFormat, read_fuse_marks, read_overlay_marks

# As ext/treescan.pyx packs a row.
ROW = np.dtype(
    [(n, "<u8") for n in ("dev", "ino", "rdev")]
    + [(n, "<i8") for n in ("size", "mtime_ns", "ctime_ns", "blocks", "path_end", "link_end", "xattr_end")]
    + [(n, "<u4") for n in ("mode", "uid", "gid", "nlink")]
)
# st_mode's type, shifted down by 12, to Kind
KINDS = np.full(16, Kind.FILE, np.uint8)
for _type, _kind in (
    (1, Kind.FIFO),
    (2, Kind.CHAR),
    (4, Kind.DIR),
    (6, Kind.BLOCK),
    (10, Kind.SYMLINK),
    (12, Kind.SOCKET),
):
    KINDS[_type] = _kind


def scan(directory: StrPath | int, *, whiteouts: WhiteoutFormat = WhiteoutFormat.NONE, xattrs: bool = True) -> Tree:
    """What lies in `directory` (a path, or a descriptor that stays open), the root row being the directory itself.

    whiteouts: OVERLAY or USERXATTR reads an upper or layer directory of an overlay: devices 0:0 and marked files become
    WHITEOUT rows, opaque marks a flag, and the overlay's own xattrs go; OCI does so with .wh. files, FUSE with both.
    xattrs: False leaves all of them out, and with them an overlay's marks. Raises OSError with the path of what could not
    be read.
    """
    fd = directory if isinstance(directory, int) else os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    marked = whiteouts in (WhiteoutFormat.OVERLAY, WhiteoutFormat.USERXATTR)
    # Each copied-up file has an origin of its own: a call to read it, and a set of xattrs that no other file has.
    skip = tuple(os.fsencode(whiteouts.xattr_prefix + name) for name in BOOKKEEPING) if marked else ()
    try:
        packed, paths, links, values = treescan.scan(fd, xattrs, skip)
    except OSError as e:
        if not isinstance(directory, int):
            e.filename = os.path.join(directory, e.filename)
        raise
    finally:
        if fd is not directory:
            os.close(fd)
    tree = _from_rows(np.frombuffer(packed, ROW), paths, links, values)
    if marked:
        return read_overlay_marks(tree, whiteouts.xattr_prefix)
    if whiteouts is WhiteoutFormat.FUSE:
        return regular(read_fuse_marks(tree), oci_names=True)
    if whiteouts is WhiteoutFormat.OCI:
        return regular(tree, oci_names=True)
    return tree


def _from_rows(rows: npt.NDArray[Any], paths: bytes, links: bytes, values: bytes) -> Tree:
    n = len(rows)
    columns = empty_columns(n)
    columns["kind"] = KINDS[rows["mode"] >> 12]
    for name in ("uid", "gid", "mtime_ns"):
        columns[name] = np.ascontiguousarray(rows[name])
    columns["mode"] = rows["mode"] & np.uint32(0o7777)
    is_device = (columns["kind"] == Kind.CHAR) | (columns["kind"] == Kind.BLOCK)
    columns["size"] = np.where(columns["kind"] == Kind.FILE, rows["size"], 0)
    columns["rdev"] = np.where(is_device, rows["rdev"], np.uint64(0))
    columns["hardlink"] = _hardlinks(rows, columns["kind"])
    is_link = columns["kind"] == Kind.SYMLINK
    columns["link"][is_link] = np.arange(int(is_link.sum()), dtype=np.int32)
    link_start = np.concatenate([[0], rows["link_end"][is_link]])
    sets, columns["xattrs"] = _xattr_sets(rows["xattr_end"], values)
    path_start = np.concatenate([[0], rows["path_end"]])
    return Tree(
        Strings(np.frombuffer(paths, np.uint8), path_start),
        **columns,
        links=Strings(np.frombuffer(links, np.uint8), link_start),
        xattr_sets=sets,
    )


def _hardlinks(rows: npt.NDArray[Any], kind: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """The number that all names of one inode share; -1 for a name alone in this tree."""
    number = np.full(len(rows), -1, np.int32)
    linked = np.flatnonzero((rows["nlink"] > 1) & (kind != Kind.DIR))
    if len(linked):
        inodes = rows[["dev", "ino"]][linked]
        _, inverse, count = np.unique(inodes, return_inverse=True, return_counts=True)
        number[linked] = np.where(count[inverse] > 1, inverse, -1)
    return number


def _xattr_sets(ends: npt.NDArray[np.int64], values: bytes) -> tuple[tuple[Xattrs, ...], npt.NDArray[np.int32]]:
    """Each different set of xattrs once, and each row's index into them (-1: none)."""
    index = np.full(len(ends), -1, np.int32)
    known: dict[bytes, int] = {}
    begin = 0
    starts = np.concatenate([[0], ends[:-1]])
    for row in np.flatnonzero(ends > starts).tolist():
        begin, end = int(starts[row]), int(ends[row])
        index[row] = known.setdefault(values[begin:end], len(known))
    return tuple(dict(_unpack(block)) for block in known), index


def _unpack(block: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at < len(block):
        nul = block.index(b"\0", at)
        size = int.from_bytes(block[nul + 1 : nul + 5], "little")
        yield os.fsdecode(block[at:nul]), block[nul + 5 : nul + 5 + size]
        at = nul + 5 + size
