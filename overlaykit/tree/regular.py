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
# What implied directories may cost: a path of 32 KiB in a header of 34 has 16,000 parents, 256 MiB of names together.
IMPLIED_ROWS, IMPLIED_BYTES = 1 << 20, 1 << 26
LONGEST_PATH = 4096  # bytes; where symlinks lead further, nothing but harm is meant


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
        # An entry lies under a symlink of its own layer, or under what was one until something took its place. Extraction
        # would follow it, so the paths are rewritten to where it leads, inside the root, and tried once more.
        table, marks = _in_order(table, marks)
        columns = _regular_rows(table, marks, in_order=True)
        if isinstance(columns, int):
            raise InvalidLayer(f"{table.path(columns)!r} lies under an entry that is not a directory")
    row, name, size, kind, flags = columns
    if strict:
        _refuse_duplicates(table, marks)
    result = _pick(table, row, table.paths.take(name, size), kind, flags)
    del table, marks, columns, row, name, size, kind, flags  # what comes needs room for as much again
    return _resolve_links(result)


def _regular_rows(
    table: Tree, marks: npt.NDArray[np.uint8], *, in_order: bool = False
) -> tuple[Rows, Rows, Rows, npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | int:
    """Deciding row, name row, name size, kind and flags of each row of the result; or a row for which order matters."""
    n = len(table)
    arena, start = table.paths.arena, table.paths.start
    order, same = np.empty(n, np.int64), np.empty(n, np.uint8)
    treemerge.sort_order(arena, start, order, same)
    if not in_order and same.any():
        replaced = _replaced_directory(table, marks, order, same)
        if replaced is not None:
            return replaced
    room = n + n // 8 + 64
    while True:
        row, name, size = (np.empty(room, np.int64) for _ in range(3))
        kind, flags = np.empty(room, np.uint8), np.empty(room, np.uint8)
        made = whiteout.regular(arena, start, order, same, table.kind, marks, row, name, size, kind, flags)
        if made < 0:
            return -1 - made
        if made - n > max(n, IMPLIED_ROWS):
            raise InvalidLayer(f"{made - n} directories that no entry of {n} wrote")
        if made <= room:
            if int(size[:made][row[:made] < 0].sum()) > max(16 * len(arena), IMPLIED_BYTES):
                longest = table.path(int(name[size[:made].argmax()]))
                raise InvalidLayer(f"{longest[:200]!r}...: too deep to make up the directories that no entry wrote")
            return row[:made], name[:made], size[:made], kind[:made], flags[:made]
        room = made


def _replaced_directory(table: Tree, marks: npt.NDArray[np.uint8], order: Rows, same: npt.NDArray[np.uint8]) -> int | None:
    """A row, if any, whose path stands twice, was no directory at least once, and has something below it."""
    for i in np.flatnonzero((same[:-1] == 1) & (same[1:] == 0)).tolist():
        if table.paths[int(order[i + 1])].startswith(table.paths[int(order[i])] + b"/"):
            while True:
                row = int(order[i])
                if marks[row] == Mark.PLAIN and table.kind[row] != Kind.DIR:
                    return row
                if not same[i]:
                    break
                i -= 1
    return None


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
    links = np.flatnonzero(((table.flags & Flag.LOWER_LINK) != 0) & (marks == Mark.PLAIN))
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


def _in_order(table: Tree, marks: npt.NDArray[np.uint8]) -> tuple[Tree, npt.NDArray[np.uint8]]:
    """`table` as extraction in its order would leave it: paths lead through the symlinks that stood on their way by then,
    inside the root, and what lay under a directory that something else replaced is gone. InvalidLayer for a row under a
    file."""
    # By path: the last row that was no directory, with a symlink's target; and the last that was one.
    other: dict[bytes, tuple[int, bytes | None]] = {}
    dirs: dict[bytes, int] = {}
    paths: list[bytes] = []
    for i, path in enumerate(table.paths):
        parent, _, name = path.rpartition(b"/")
        if parent and other:
            parent = _leads_to(path, parent, other, dirs, is_mark=marks[i] != Mark.PLAIN)
            path = parent + b"/" + name if parent else name
        paths.append(path)
        if marks[i] != Mark.PLAIN:
            continue
        if table.kind[i] != Kind.DIR:
            is_symlink = table.kind[i] == Kind.SYMLINK
            other[path] = i, table.links[int(table.link[i])] if is_symlink else None
        elif path in other and table.flags[other[path][0]] & Flag.LOWER_LINK:
            raise InvalidLayer(f"{table.path(i)!r}: a hard link and then a directory")
        else:
            dirs[path] = i
    keep = np.array([marks[i] != Mark.PLAIN or not _replaced(path, i, other) for i, path in enumerate(paths)], np.bool_)
    return replace(table, paths=Strings.of(paths)).take(keep), marks[keep]


def _replaced(path: bytes, i: int, other: dict[bytes, tuple[int, bytes | None]]) -> bool:
    """Whether a directory above `path`, which row `i` made, gave its place to something else after that."""
    slash = path.rfind(b"/")
    while slash > 0:
        if other.get(path[:slash], (-1,))[0] > i:
            return True
        slash = path.rfind(b"/", 0, slash)
    return False


def _leads_to(
    whole: bytes, path: bytes, other: dict[bytes, tuple[int, bytes | None]], dirs: dict[bytes, int], *, is_mark: bool
) -> bytes:
    """Where directory `path` leads when symlinks are followed and the root is the top: '..' stops there."""
    done: list[bytes] = []
    since = [-1]  # of each directory on the way: the row after which it is a new one, so that nothing older lies in it
    todo = path.split(b"/")[::-1]
    hops = length = 0
    while todo:
        part = todo.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            if done:
                length -= len(done.pop()) + 1
                since.pop()
            continue
        here = b"/".join([*done, part])
        row, target = other.get(here, (-1, None))
        if row <= since[-1] or dirs.get(here, -1) > row:
            done.append(part)
            since.append(max(row, since[-1]))
            length += len(part) + 1
        elif target is None:
            if is_mark:
                return path  # it takes away what is below, and there is nothing to take away
            raise InvalidLayer(f"{os.fsdecode(whole)!r} lies under {os.fsdecode(here)!r}, which is not a directory")
        else:
            hops += 1
            if target.startswith(b"/"):
                done, since, length = [], [-1], 0
            todo += target.split(b"/")[::-1]
        if hops > MAX_LINKS or length > LONGEST_PATH:
            raise InvalidLayer(f"{os.fsdecode(whole)!r}: too many symlinks on the way")
    return b"/".join(done)


def _resolve_links(tree: Tree) -> Tree:
    """`tree` with its LOWER_LINK rows that name a file of the layer made names of that file: same hardlink number, same
    attributes. The others stay: their file is in a lower layer."""
    links = np.flatnonzero((tree.flags & Flag.LOWER_LINK) != 0)
    if not len(links):
        return tree
    target = {i: find_target(tree, tree.links[int(tree.link[i])]) for i in links.tolist()}
    for i in links.tolist():
        chain, end = [], i
        while end in target:
            chain.append(end)
            end = target[end]
            if len(chain) > len(links):
                raise InvalidLayer(f"{tree.path(i)!r}: a hard link that leads back to itself")
        for link in chain:
            target[link] = end  # the next one's way is short
    ends = np.fromiter(target.values(), np.int64, len(links))
    here = (ends >= 0) & (tree.kind[ends] != Kind.WHITEOUT)
    links, ends = links[here], ends[here]
    wrong = np.flatnonzero(tree.kind[ends] == Kind.DIR)
    if len(wrong):
        link, end = int(links[wrong[0]]), int(ends[wrong[0]])
        raise InvalidLayer(f"{tree.path(link)!r}: a hard link to the directory {tree.path(end)!r}")
    columns = {name: getattr(tree, name).copy() for name in ("flags", "hardlink")}
    files = np.unique(ends)
    files = files[tree.hardlink[files] < 0]
    columns["hardlink"][files] = int(tree.hardlink.max(initial=-1)) + 1 + np.arange(len(files))
    columns["hardlink"][links] = columns["hardlink"][ends]
    columns["flags"][links] &= ~np.uint8(Flag.LOWER_LINK)
    source = np.arange(len(tree), dtype=np.int64)
    source[links] = ends
    for name in ("kind", "mode", "uid", "gid", "size", "mtime_ns", "rdev", "offset", "link", "xattrs"):
        columns[name] = getattr(tree, name)[source]
    return tree.with_columns(**columns)


def find_target(tree: Tree, target: bytes) -> int:
    """The row that a hard link's target names, directories that are symlinks followed inside the root; -1: none."""
    path = normal_target(target)
    row = tree.find(path)
    todo = path.split(b"/")[::-1]
    done: list[bytes] = []
    hops = 0
    while row < 0 and todo and hops <= MAX_LINKS:
        part = todo.pop()
        if part in (b"", b".", b".."):
            del done[len(done) - (part == b"..") :]
            continue
        done.append(part)
        here = tree.find(b"/".join(done))
        if here < 0:
            return -1
        if not todo:
            return here  # a link to a symlink is one, wherever that leads
        if tree.kind[here] == Kind.SYMLINK:
            hops += 1
            leads_to = tree.links[int(tree.link[here])]
            done = [] if leads_to.startswith(b"/") else done[:-1]
            todo += leads_to.split(b"/")[::-1]
    return row


def normal_target(target: bytes) -> bytes:
    """The path in the table that a hard link's target names: relative, without '.' and doubled slashes."""
    return posixpath.normpath(b"/" + target).lstrip(b"/")
