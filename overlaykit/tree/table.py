"""Trees as columns: what a layer, a directory or an upper says, one row a path, in tree order.

Tree order is bytewise with "/" below every other byte: a directory is followed at once by all that lies under it
("etc", "etc/passwd", "etc-old"), so a subtree is a slice and two trees merge in one pass.

A Tree is *regular*: one row a path, every parent present (IMPLIED where nobody wrote it down), nothing below what is not
a directory. The root is the row with the empty path. A tree with whiteouts or opaque directories is a changeset.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from overlaykit._ext import treemerge
from overlaykit.errors import InvalidLayer
from overlaykit.tree.entry import IMPLIED_MODE, Entry, Flag, Kind, Xattrs
from overlaykit.tree.strings import Mask, Rows, Strings

StrPath = str | os.PathLike[str]

COLUMNS: dict[str, npt.DTypeLike] = {
    "kind": np.uint8,
    "flags": np.uint8,
    "mode": np.uint32,  # permission bits, 0o7777
    "uid": np.uint32,
    "gid": np.uint32,
    "size": np.int64,  # bytes of content; 0 for what is not a file
    "mtime_ns": np.int64,  # since 1970
    "rdev": np.uint64,  # device number of CHAR and BLOCK, as makedev gives it
    "offset": np.int64,  # where the content begins in the layer's uncompressed tar; -1: on disk
    "layer": np.uint16,  # which layer the row came from, 0 is the bottom
    "link": np.int32,  # index into links: a symlink's target, a LOWER_LINK's; -1: none
    "xattrs": np.int32,  # index into xattr_sets; -1: none
    "hardlink": np.int32,  # names of one file share a number; -1: a file of one name
}
# A saved tree: MAGIC, the length of a JSON header (8 bytes), the header, and the arrays it names, each ALIGNed.
COLUMNS_FILE = "columns"
MAGIC = b"overlaykit tree 1\n"
ALIGN = 64
DEFAULTS = {"offset": -1, "link": -1, "xattrs": -1, "hardlink": -1}
KINDS = tuple(Kind)
FLAGS = tuple(Flag(number) for number in range(8))
AT_ONCE = 4096  # rows
PROVENANCE = ("offset", "layer")  # where a row came from: no part of what it says


@dataclass(frozen=True, eq=False)
class Tree:
    """n rows as columns; see COLUMNS for the arrays' types and units. Immutable: every operation gives a new Tree."""

    paths: Strings
    kind: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    mode: npt.NDArray[np.uint32]
    uid: npt.NDArray[np.uint32]
    gid: npt.NDArray[np.uint32]
    size: npt.NDArray[np.int64]
    mtime_ns: npt.NDArray[np.int64]
    rdev: npt.NDArray[np.uint64]
    offset: npt.NDArray[np.int64]
    layer: npt.NDArray[np.uint16]
    link: npt.NDArray[np.int32]
    xattrs: npt.NDArray[np.int32]
    hardlink: npt.NDArray[np.int32]
    links: Strings
    xattr_sets: tuple[Xattrs, ...]

    def __len__(self) -> int:
        return len(self.paths)

    # --- reading ------------------------------------------------------------------------------------------------

    def path(self, row: int) -> str:
        return os.fsdecode(self.paths[row])

    def entry(self, row: int) -> Entry:
        """Row `row` as one value. IndexError past the end."""
        return self._entry(self.paths[row], *(int(getattr(self, name)[row]) for name in COLUMNS))

    def entries(self, rows: Rows) -> Iterator[Entry]:
        """Rows `rows`, in that order, each as one value."""
        # Numbers leave numpy a column at a time, but only of some thousand rows, so that memory stays flat.
        for start in range(0, len(rows), AT_ONCE):
            chosen = rows[start : start + AT_ONCE]
            columns = [getattr(self, name)[chosen].tolist() for name in COLUMNS]
            yield from map(self._entry, self.paths.take(chosen), *columns)

    def _entry(
        self,
        path: bytes,
        kind: int,
        flags: int,
        mode: int,
        uid: int,
        gid: int,
        size: int,
        mtime_ns: int,
        rdev: int,
        offset: int,
        layer: int,
        link: int,
        xattrs: int,
        hardlink: int,
    ) -> Entry:
        """The values of COLUMNS in one row."""
        return Entry(
            path=os.fsdecode(path),
            kind=KINDS[kind],
            mode=mode,
            uid=uid,
            gid=gid,
            size=size,
            mtime_ns=mtime_ns,
            rdev=rdev,
            link=None if link < 0 else os.fsdecode(self.links[link]),
            xattrs={} if xattrs < 0 else self.xattr_sets[xattrs],
            hardlink=hardlink,
            flags=FLAGS[flags],
            offset=offset,
            layer=layer,
        )

    def __iter__(self) -> Iterator[Entry]:
        return self.entries(np.arange(len(self)))

    def find(self, path: str | bytes) -> int:
        """The row of `path` (relative, as in the table), or -1. Binary search."""
        want = os.fsencode(path)
        row = treemerge.find(self.paths.arena, self.paths.start, want)
        return row if row < len(self) and self.paths[row] == want else -1

    @cached_property
    def _family(self) -> tuple[Rows, Rows]:
        parents, ends = np.empty(len(self), np.int64), np.empty(len(self), np.int64)
        treemerge.family(self.paths.arena, self.paths.start, parents, ends)
        return parents, ends

    @property
    def parents(self) -> Rows:
        """int64[n]: the row of each row's directory; -1 for the root."""
        return self._family[0]

    @property
    def ends(self) -> Rows:
        """int64[n]: the first row after row i that is not below it, so a subtree is rows i:ends[i]."""
        return self._family[1]

    def children(self, row: int) -> Iterator[int]:
        """The rows directly under directory row `row`, in order."""
        child, end = row + 1, int(self.ends[row])
        while child < end:
            yield child
            child = int(self.ends[child])

    @property
    def is_changeset(self) -> bool:
        """Whether anything here acts on a lower tree."""
        return bool((self.kind == Kind.WHITEOUT).any() or (self.flags & (Flag.OPAQUE | Flag.LOWER_LINK)).any())

    # --- making another -----------------------------------------------------------------------------------------

    def take(self, rows: Rows | Mask) -> Tree:
        """The tree of `rows` (numbers in tree order, or a mask). It is regular if the rows are: parents must be kept."""
        numbers: Rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else np.ascontiguousarray(rows, np.int64)
        columns = {name: getattr(self, name)[numbers] for name in COLUMNS}
        return Tree(self.paths.take(numbers), **columns, links=self.links, xattr_sets=self.xattr_sets)

    def with_columns(self, **columns: npt.NDArray[Any]) -> Tree:
        """The same tree with some columns replaced (arrays of n; cast to the column's type)."""
        cast: dict[str, Any] = {k: np.ascontiguousarray(v, COLUMNS[k]) for k, v in columns.items()}
        return replace(self, **cast)

    # --- comparing ----------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        """Whether both say the same: everything but where the content comes from (layer, offset)."""
        if not isinstance(other, Tree):
            return NotImplemented
        return (
            len(self) == len(other)
            and np.array_equal(self.paths.start, other.paths.start)
            and np.array_equal(self.paths.arena, other.paths.arena)
            and not differing(self, other).any()
        )

    __hash__ = None  # type: ignore[assignment]  # compared by content, as a list is

    def __repr__(self) -> str:
        return f"<Tree of {len(self):,} rows, {int(self.size.sum()):,} bytes>"

    # --- keeping ------------------------------------------------------------------------------------------------

    def save(self, directory: StrPath) -> None:
        """Write the tree into `directory`, as one file. The caller syncs and renames."""
        arrays = {name: getattr(self, name) for name in COLUMNS}
        arrays |= {"paths": self.paths.arena, "paths_start": self.paths.start, "parents": self.parents, "ends": self.ends}
        arrays |= {"links": self.links.arena, "links_start": self.links.start}
        places, at = {}, 0
        for name, array in arrays.items():
            places[name] = [array.dtype.str, at, len(array)]
            at += -(-array.nbytes // ALIGN) * ALIGN
        sets = [{name: value.hex() for name, value in s.items()} for s in self.xattr_sets]
        head = json.dumps({"arrays": places, "xattr_sets": sets}).encode()  # ASCII: what is no UTF-8 is escaped
        head = MAGIC + len(head).to_bytes(8, "little") + head
        with open(Path(directory, COLUMNS_FILE), "wb") as out:
            out.write(head + bytes(-len(head) % ALIGN))
            for array in arrays.values():
                out.write(np.ascontiguousarray(array).data)
                out.write(bytes(-array.nbytes % ALIGN))

    @staticmethod
    def load(directory: StrPath) -> Tree:
        """The tree that `save` wrote; the columns are mapped, not read. InvalidLayer if the file is not what it wrote."""
        path = Path(directory, COLUMNS_FILE)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        begin = len(MAGIC) + 8
        end = begin + int.from_bytes(data[len(MAGIC) : begin], "little")
        try:
            if data[: len(MAGIC)] != MAGIC or end > size:
                raise ValueError("no header")
            head = json.loads(data[begin:end])
            body = -(-end // ALIGN) * ALIGN
            arrays = {
                name: np.frombuffer(data, dtype, count, body + at) for name, (dtype, at, count) in head["arrays"].items()
            }
            sets = tuple({name: bytes.fromhex(value) for name, value in s.items()} for s in head["xattr_sets"])
            columns: dict[str, Any] = {name: arrays[name] for name in COLUMNS}
            tree = Tree(
                Strings(arrays["paths"], arrays["paths_start"]),
                **columns,
                links=Strings(arrays["links"], arrays["links_start"]),
                xattr_sets=sets,
            )
            family = (arrays["parents"], arrays["ends"])
            wanted = [*COLUMNS.items(), ("parents", np.int64), ("ends", np.int64)]
            if any(len(arrays[name]) != len(tree.paths) or arrays[name].dtype != dtype for name, dtype in wanted):
                raise ValueError(f"the columns do not all have {len(tree.paths)} rows")
            for strings in (tree.paths, tree.links):
                if strings.start.dtype != np.int64 or strings.start[0] != 0 or strings.start[-1] != len(strings.arena):
                    raise ValueError("offsets that do not fit")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
            raise InvalidLayer(f"{path}: not a tree as overlaykit keeps them: {e}") from e
        tree.__dict__["_family"] = family  # as cached_property would
        return tree


def empty_columns(n: int) -> dict[str, npt.NDArray[Any]]:
    """Every column at its default, n long."""
    return {name: np.full(n, DEFAULTS.get(name, 0), dtype) for name, dtype in COLUMNS.items()}


def concat(trees: Sequence[Tree], *, relabel: bool = True) -> Tree:
    """The rows of all trees, one after another: a table, not yet a Tree, since paths repeat.

    relabel: row i's layer is the number of the tree it came from; else the layers stay as they are.
    """
    parts: dict[str, npt.NDArray[Any]] = {
        name: np.concatenate([getattr(t, name) for t in trees]) if trees else np.empty(0, dtype)
        for name, dtype in COLUMNS.items()
    }
    begin = links = sets = groups = 0
    for number, tree in enumerate(trees):
        rows = slice(begin, begin + len(tree))
        if relabel:
            parts["layer"][rows] = number
        for name, base in (("link", links), ("xattrs", sets), ("hardlink", groups)):
            if base:
                column = parts[name][rows]
                column[column >= 0] += base
        begin += len(tree)
        links += len(tree.links)
        sets += len(tree.xattr_sets)
        groups += int(tree.hardlink.max(initial=-1)) + 1
    return Tree(
        Strings.concat([t.paths for t in trees]),
        **parts,
        links=Strings.concat([t.links for t in trees]),
        xattr_sets=tuple(s for t in trees for s in t.xattr_sets),
    )


def from_entries(entries: Iterable[Entry]) -> Tree:
    """The table of `entries`, in their order; `regular` makes a Tree of one that is not."""
    rows = list(entries)
    columns = empty_columns(len(rows))
    links: list[bytes] = []
    sets: list[Xattrs] = []
    for i, e in enumerate(rows):
        for name in ("kind", "flags", "mode", "uid", "gid", "size", "mtime_ns", "rdev", "offset", "layer", "hardlink"):
            columns[name][i] = getattr(e, name)
        if e.link is not None:
            columns["link"][i] = len(links)
            links.append(os.fsencode(e.link))
        if e.xattrs:
            columns["xattrs"][i] = len(sets)
            sets.append(e.xattrs)
    paths = Strings.of([os.fsencode(e.path) for e in rows])
    return Tree(paths, **columns, links=Strings.of(links), xattr_sets=tuple(sets))


# --- comparing two tables of the same paths --------------------------------------------------------------------------


def first_names(tree: Tree) -> Rows:
    """int64[n]: for each row the first row that is the same file: itself, unless it is a later name of a hard link."""
    return _first_of_group(tree.hardlink)


def _first_of_group(hardlink: npt.NDArray[np.int32]) -> Rows:
    first = np.arange(len(hardlink), dtype=np.int64)
    linked = np.flatnonzero(hardlink >= 0)
    if len(linked):
        group = hardlink[linked]
        of_group = np.empty(int(group.max()) + 1, np.int64)
        of_group[group[::-1]] = linked[::-1]  # of equal indices the last assignment stays
        first[linked] = of_group[group]
    return first


def unlike_links(a: Tree, b: Tree, mine: Rows | slice, theirs: Rows | slice) -> Mask:
    """bool[n]: where the symlinks among rows `mine` of a and `theirs` of b, one by one, lead elsewhere."""
    link, other_link = a.link[mine], b.link[theirs]
    unlike: Mask = (link >= 0) != (other_link >= 0)
    rows = np.flatnonzero((link >= 0) & ~unlike)
    unlike[rows] = a.links.take(link[rows].astype(np.int64)).unlike(b.links.take(other_link[rows].astype(np.int64)))
    return unlike


def unlike_xattrs(a: Tree, b: Tree, mine: Rows | slice, theirs: Rows | slice) -> Mask:
    """bool[n]: where the xattrs of rows `mine` of a and `theirs` of b differ, one by one."""
    xattrs, other_xattrs = a.xattrs[mine], b.xattrs[theirs]
    unlike = np.zeros(len(xattrs), np.bool_)
    rows = np.flatnonzero((xattrs >= 0) | (other_xattrs >= 0))
    if len(rows):
        # Few sets serve many rows: each two of them are compared once.
        sets = np.stack([xattrs[rows], other_xattrs[rows]])
        each, which = np.unique(sets, axis=1, return_inverse=True)
        empty: Xattrs = {}
        verdict = [
            dict(a.xattr_sets[x] if x >= 0 else empty) != dict(b.xattr_sets[y] if y >= 0 else empty)
            for x, y in each.T.tolist()
        ]
        unlike[rows] = np.array(verdict)[which.reshape(-1)]
    return unlike


def differing(a: Tree, b: Tree, *, pairs: tuple[Rows, Rows] | None = None, links: bool = True) -> Mask:
    """bool[n]: which rows of two tables with the same paths say different things.

    pairs: compare only these rows of a with those of b, one by one, as if they were all there are.
    links: names of one file must be names of one file in both, which only whole trees can tell.
    """
    unlike = np.zeros(len(a) if pairs is None else len(pairs[0]), np.bool_)
    mine, theirs = pairs or (slice(None), slice(None))
    for name in COLUMNS:
        if name not in (*PROVENANCE, "link", "xattrs", "hardlink"):
            unlike |= getattr(a, name)[mine] != getattr(b, name)[theirs]
    unlike |= unlike_links(a, b, mine, theirs)
    unlike |= unlike_xattrs(a, b, mine, theirs)
    if links:
        hardlink, other_hardlink = a.hardlink[mine], b.hardlink[theirs]
        if ((hardlink >= 0) | (other_hardlink >= 0)).any():
            unlike |= _first_of_group(hardlink) != _first_of_group(other_hardlink)
    return unlike


__all__ = [
    "COLUMNS",
    "IMPLIED_MODE",
    "Entry",
    "Flag",
    "Kind",
    "Mask",
    "Rows",
    "StrPath",
    "Strings",
    "Tree",
    "Xattrs",
    "concat",
    "differing",
    "empty_columns",
    "first_names",
    "from_entries",
    "unlike_links",
    "unlike_xattrs",
]
