"""One layer, made regular: a path has one row, every parent is there, nothing lies under what is not a directory.

Of two rows for one path the later wins, as extraction would have it. A whiteout beside rows at or under its path means
that the path was replaced: a directory becomes opaque, anything else just drops the whiteout. After that the order of rows
carries no meaning.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from overlaykit._ext import treemerge, whiteout
from overlaykit.errors import InvalidLayer
from overlaykit.tree.table import IMPLIED_MODE, Flag, Kind, Rows, Strings, Tree, empty_columns
from overlaykit.tree.whiteout import Mark, read_oci_names

MAX_LINKS = 40  # symlinks on the way to one path, as the kernel counts them


def regular(table: Tree, *, oci_names: bool = False, strict: bool = False) -> Tree:
    """The Tree that the rows of `table` mean, in the order in which they arrived.

    oci_names: .wh. names are marks. strict: two rows of one path are an error, as image-spec layer.md has it.
    Rows flagged LOWER_LINK are hard links to the path `link`: those whose target is in the layer become names of it.
    Raises InvalidLayer: a path twice (strict), an entry under a file, a link to a directory or to itself.
    """
    marks = np.zeros(len(table), np.uint8)
    if oci_names:
        table, marks = read_oci_names(table)
    table, marks = _without_self_links(table, marks)
    if len(table) == 0:
        return _root_only()
    columns = _regular_rows(table, marks)
    if isinstance(columns, int):
        # An entry lies under a symlink of its own layer. Extraction would follow it, so the paths are rewritten to where it
        # leads, inside the root, and tried once more.
        table = _follow_symlinked_parents(table, marks)
        columns = _regular_rows(table, marks)
        if isinstance(columns, int):
            raise InvalidLayer(f"{table.path(columns)!r} lies under an entry that is not a directory")
    row, name, size, kind, flags = columns
    if strict:
        _refuse_duplicates(table, marks)
    result = _pick(table, row, Strings(table.paths.arena, table.paths.start).take(name, size), kind, flags)
    return _resolve_links(result)


def _regular_rows(
    table: Tree, marks: npt.NDArray[np.uint8]
) -> tuple[Rows, Rows, Rows, npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | int:
    """Deciding row, name row, name size, kind and flags of each row of the result; or the row that lies under a file."""
    n = len(table)
    arena, start = table.paths.arena, table.paths.start
    order, same = np.empty(n, np.int64), np.empty(n, np.uint8)
    treemerge.sort_order(arena, start, order, same)
    room = n + n // 8 + 64
    while True:
        row, name, size = (np.empty(room, np.int64) for _ in range(3))
        kind, flags = np.empty(room, np.uint8), np.empty(room, np.uint8)
        made = whiteout.regular(arena, start, order, same, table.kind, marks, row, name, size, kind, flags)
        if made < 0:
            return -1 - made
        if made <= room:
            return row[:made], name[:made], size[:made], kind[:made], flags[:made]
        room = made


def _pick(table: Tree, row: Rows, paths: Strings, kind: npt.NDArray[np.uint8], flags: npt.NDArray[np.uint8]) -> Tree:
    written = row >= 0
    columns = empty_columns(len(row))
    for name, column in columns.items():
        column[written] = getattr(table, name)[row[written]]
    columns["mode"][~written] = IMPLIED_MODE
    columns["kind"] = kind
    columns["flags"] = flags | (columns["flags"] & np.uint8(Flag.LOWER_LINK | Flag.IMPLIED | Flag.OPAQUE))
    gone = kind == Kind.WHITEOUT
    if gone.any():
        for name, default in (("mode", 0), ("uid", 0), ("gid", 0), ("size", 0), ("mtime_ns", 0), ("rdev", 0)):
            columns[name][gone] = default
        for name in ("offset", "link", "xattrs", "hardlink"):
            columns[name][gone] = -1
        columns["flags"][gone] = 0
    return Tree(paths, **columns, links=table.links, xattr_sets=table.xattr_sets)


def _root_only() -> Tree:
    columns = empty_columns(1)
    columns["kind"][0], columns["flags"][0], columns["mode"][0] = Kind.DIR, Flag.IMPLIED, IMPLIED_MODE
    return Tree(Strings.of([b""]), **columns, links=Strings.of([]), xattr_sets=())


def _without_self_links(table: Tree, marks: npt.NDArray[np.uint8]) -> tuple[Tree, npt.NDArray[np.uint8]]:
    """A hard link to its own path says nothing new: archivers write one when they are given a file twice."""
    links = np.flatnonzero((table.flags & Flag.LOWER_LINK) != 0)
    selfish = [i for i in links.tolist() if table.links[int(table.link[i])] == table.paths[i]]
    if not selfish:
        return table, marks
    keep = np.ones(len(table), np.bool_)
    keep[selfish] = False
    return table.take(keep), marks[keep]


def _refuse_duplicates(table: Tree, marks: npt.NDArray[np.uint8]) -> None:
    rows = np.flatnonzero(marks == Mark.PLAIN)
    paths = table.paths.take(rows)
    order, same = np.empty(len(rows), np.int64), np.empty(len(rows), np.uint8)
    treemerge.sort_order(paths.arena, paths.start, order, same)
    twice = np.flatnonzero(same)
    if len(twice):
        raise InvalidLayer(f"{os.fsdecode(paths[int(order[twice[0]])])!r} stands in the layer twice")


def _follow_symlinked_parents(table: Tree, marks: npt.NDArray[np.uint8]) -> Tree:
    """`table` with every path whose parents are symlinks of the layer rewritten to where they lead inside the root."""
    links: dict[bytes, bytes] = {}
    paths: list[bytes] = []
    for i, path in enumerate(table.paths):
        parent, _, name = path.rpartition(b"/")
        if parent and links:
            parent = inside(parent, links)
            path = parent + b"/" + name if parent else name
        paths.append(path)
        if marks[i] == Mark.PLAIN:
            if table.kind[i] == Kind.SYMLINK:
                links[path] = table.links[int(table.link[i])]
            else:
                links.pop(path, None)
    return replace(table, paths=Strings.of(paths))


def inside(path: bytes, links: dict[bytes, bytes]) -> bytes:
    """Where directory `path` leads when symlinks are followed and the root is the top: '..' stops there."""
    done: list[bytes] = []
    todo = path.split(b"/")[::-1]
    hops = 0
    while todo:
        part = todo.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            del done[-1:]
            continue
        target = links.get(b"/".join([*done, part]))
        if target is None:
            done.append(part)
            continue
        hops += 1
        if hops > MAX_LINKS:
            raise InvalidLayer(f"{os.fsdecode(path)!r}: too many symlinks on the way")
        if target.startswith(b"/"):
            done = []
        todo += target.split(b"/")[::-1]
    return b"/".join(done)


def _resolve_links(tree: Tree) -> Tree:
    """`tree` with its LOWER_LINK rows that name a file of the layer made names of that file: same hardlink number, same
    attributes. The others stay: their file is in a lower layer."""
    links = np.flatnonzero((tree.flags & Flag.LOWER_LINK) != 0)
    if not len(links):
        return tree
    columns = {name: getattr(tree, name).copy() for name in ("flags", "hardlink", "link")}
    target = np.arange(len(tree), dtype=np.int64)
    for i in links.tolist():
        target[i] = tree.find(normal_target(tree.links[int(tree.link[i])]))
    source = np.arange(len(tree), dtype=np.int64)
    group = int(tree.hardlink.max(initial=-1)) + 1
    for i in links.tolist():
        end, hops = i, 0
        while end >= 0 and tree.flags[end] & Flag.LOWER_LINK:
            end = int(target[end])
            hops += 1
            if hops > len(links):
                raise InvalidLayer(f"{tree.path(i)!r}: a hard link that leads back to itself")
        if end < 0 or tree.kind[end] == Kind.WHITEOUT:
            continue
        if tree.kind[end] == Kind.DIR:
            raise InvalidLayer(f"{tree.path(i)!r}: a hard link to the directory {tree.path(end)!r}")
        if columns["hardlink"][end] < 0:
            columns["hardlink"][end] = group
            group += 1
        source[i] = end
        columns["hardlink"][i] = columns["hardlink"][end]
        columns["flags"][i] &= ~np.uint8(Flag.LOWER_LINK)
    for name in ("kind", "mode", "uid", "gid", "size", "mtime_ns", "rdev", "offset", "link", "xattrs"):
        columns[name] = getattr(tree, name)[source]
    return tree.with_columns(**columns)


def normal_target(target: bytes) -> bytes:
    """The path in the table that a hard link's target names: relative, without '.' and doubled slashes."""
    return posixpath.normpath(b"/" + target).lstrip(b"/")
