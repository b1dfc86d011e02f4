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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from overlaykit._ext import treemerge
from overlaykit.errors import InvalidLayer

StrPath = str | os.PathLike[str]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Kind(IntEnum):
    """What a row is. The numbers are stored: never change one."""

    FILE = 0
    DIR = 1
    SYMLINK = 2
    CHAR = 3
    BLOCK = 4
    FIFO = 5
    SOCKET = 6
    WHITEOUT = 7


class Flag(IntFlag):
    """What else a row says. The numbers are stored: never change one."""

    NONE = 0
    OPAQUE = 1  # a directory that hides all lower names under it
    IMPLIED = 2  # a directory nobody wrote down: it says nothing but that it is one
    LOWER_LINK = 4  # a hard link to a name of a lower layer, `link`; what it is, only the lower layer knows


Xattrs = Mapping[str, bytes]
IMPLIED_MODE = 0o755  # of a directory that no layer wrote; owned by root, at time 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One row. `path` is relative without a leading slash, "" for the root; bytes that are no UTF-8 as os.fsdecode has them.

    `size` counts bytes and is 0 for what is not a file; `hardlink` is the number that all names of one file share, -1 for a
    file of one name; `offset` is where the content begins in the layer's uncompressed tar, -1 where it is on disk.
    """

    path: str
    kind: Kind = Kind.FILE
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    link: str | None = None
    xattrs: Xattrs = field(default_factory=dict)
    hardlink: int = -1
    flags: Flag = Flag.NONE
    offset: int = -1
    layer: int = 0


@dataclass(frozen=True, eq=False)
class Strings:
    """Byte strings back to back: string i is arena[start[i]:start[i+1]]. arena uint8[m], start int64[n+1]."""

    arena: npt.NDArray[np.uint8]
    start: npt.NDArray[np.int64]

    @staticmethod
    def of(strings: Sequence[bytes]) -> Strings:
        start = np.zeros(len(strings) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, strings), np.int64, len(strings)), out=start[1:])
        return Strings(np.frombuffer(b"".join(strings), np.uint8), start)

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.arena[self.start[i] : self.start[i + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        data, start = self.arena.tobytes(), self.start.tolist()
        return (data[a:b] for a, b in pairwise(start))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.start)

    def take(self, rows: Rows, sizes: Rows | None = None) -> Strings:
        """The strings of `rows`, in that order; of each only the first `sizes` bytes where sizes are given."""
        start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.lengths[rows] if sizes is None else sizes, out=start[1:])
        arena = np.empty(int(start[-1]), np.uint8)
        treemerge.gather(self.arena, self.start, rows, arena, start)
        return Strings(arena, start)

    def unlike(self, other: Strings) -> Mask:
        """bool[n]: which strings differ from those of as many others."""
        unlike: Mask = self.lengths != other.lengths
        same = np.flatnonzero(~unlike)
        if len(same) < len(unlike):
            self, other = self.take(same), other.take(same)
        # Of equal lengths all begin at equal places, so it is enough to look at the bytes.
        bytes_apart = np.flatnonzero(self.arena != other.arena)
        unlike[same[np.searchsorted(self.start, bytes_apart, "right") - 1]] = True
        return unlike

    @staticmethod
    def concat(parts: Sequence[Strings]) -> Strings:
        start = np.zeros(sum(map(len, parts)) + 1, np.int64)
        if parts:
            np.cumsum(np.concatenate([p.lengths for p in parts]), out=start[1:])
            return Strings(np.concatenate([p.arena for p in parts]), start)
        return Strings(np.empty(0, np.uint8), start)


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
        link, xattrs = int(self.link[row]), int(self.xattrs[row])
        return Entry(
            path=self.path(row),
            kind=Kind(self.kind[row]),
            mode=int(self.mode[row]),
            uid=int(self.uid[row]),
            gid=int(self.gid[row]),
            size=int(self.size[row]),
            mtime_ns=int(self.mtime_ns[row]),
            rdev=int(self.rdev[row]),
            link=None if link < 0 else os.fsdecode(self.links[link]),
            xattrs={} if xattrs < 0 else self.xattr_sets[xattrs],
            hardlink=int(self.hardlink[row]),
            flags=Flag(int(self.flags[row])),  # an enum knows a numpy number only once it has met the value
            offset=int(self.offset[row]),
            layer=int(self.layer[row]),
        )

    def __iter__(self) -> Iterator[Entry]:
        return map(self.entry, range(len(self)))

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
    link, other_link = a.link[mine], b.link[theirs]
    unlike |= (link >= 0) != (other_link >= 0)
    rows = np.flatnonzero((link >= 0) & ~unlike)
    unlike[rows] = a.links.take(link[rows].astype(np.int64)).unlike(b.links.take(other_link[rows].astype(np.int64)))
    xattrs, other_xattrs = a.xattrs[mine], b.xattrs[theirs]
    rows = np.flatnonzero(((xattrs >= 0) | (other_xattrs >= 0)) & ~unlike)
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
]
