"""Layer tars in: a stream of windows for who unpacks, a Tree for who only wants to know."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt

from overlaykit._ext import tarindex
from overlaykit.errors import InvalidLayer, UnsafePath
from overlaykit.tree.regular import regular
from overlaykit.tree.sparse import sparse_rows, sparse_size
from overlaykit.tree.table import COLUMNS, Flag, Kind, Strings, Tree, Xattrs, empty_columns

WINDOW = 1 << 20  # bytes parsed at a time: enough to spread a call's cost, little enough to stay in a cache
TOGETHER = 2048  # rows put into the table at a time

# As ext/tarindex.pyx packs a row.
ROW = np.dtype(
    [(n, "<i8") for n in ("offset", "size", "mtime_ns")]
    + [("rdev", "<u8")]
    + [(n, "<i8") for n in ("path_end", "link_end", "head", "records", "records_end", "data", "here")]
    + [(n, "<u4") for n in ("mode", "uid", "gid")]
    + [(n, "u1") for n in ("kind", "flags")]
)
LINK = 8  # the kind of a hard link
HAS_XATTRS = 1  # a flag; SPARSE_OLD and SPARSE_PAX are others
END, GLOBAL = 1, 2  # statuses; 0 is more, below it stands what is wrong
WRONG = {
    -1: "a header whose checksum is wrong",
    -2: "a number in a header that is none, or out of range",
    -3: "a pax record that is none",
    -4: "a path with '..'",
    -5: "a name that is empty or has a NUL",
    -6: "an entry of a type that layers do not have",
    -7: "a size that cannot be",
    -8: "a device number that Linux has no room for",
    -9: "more headers for one entry than the limit",
    -10: "a path or a symlink's target longer than Linux has room for",
}
BLOCK = 512
# Keys of a global header that would change what entries are; one that only comments is common (git archive).
_MEANINGFUL = ("uid", "gid", "mtime", "SCHILY.xattr.", "LIBARCHIVE.xattr.")
_FORBIDDEN = ("path", "linkpath", "size", "GNU.sparse.")
_GLOBAL_LIMIT = 1 << 16  # bytes of global records in all: they are read again for every entry


class Readable(Protocol):
    """What a layer is read from: a binary file, a socket's, or a pipeline's end. One with `read1` gives pieces uncopied."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What a layer may cost those who read it, beside its content; InvalidLayer for more.

    header   bytes of headers one entry may have; xattrs are at most 64 KiB each on Linux
    entries  how many entries; each takes about 150 bytes of memory
    """

    header: int = 1 << 20
    entries: int = 1 << 24


USUAL = Limits()


@dataclass(frozen=True, slots=True)
class Window:
    """The entries of one stretch of a tar stream.

    rows is a structured array (see ROW), paths and links belong to it; `first` bytes at the beginning of `buffer` go on the
    content of the last row of the window before. defaults: the pax records that hold for all entries.
    """

    rows: npt.NDArray[Any]
    paths: Strings
    links: Strings
    buffer: memoryview
    first: int
    defaults: bytes = b""

    def own_records(self, row: int) -> bytes:
        """The pax header of entry `row` as it stands there; b"" if it has none."""
        begin, end = int(self.rows["records"][row]), int(self.rows["records_end"][row])
        return b"" if begin < 0 else bytes(self.buffer[begin:end])

    def records(self, row: int) -> dict[str, bytes]:
        """The pax records that hold for entry `row`."""
        return parse_records(self.defaults + self.own_records(row))

    def name(self, row: int) -> str:
        """Entry `row` as error messages have it."""
        return repr(os.fsdecode(self.paths[row]))


class TarReader:
    """The windows of an uncompressed tar, read once from beginning to end, in flat memory.

    Iterating raises InvalidLayer (UnsafePath for "..") with the entry's number and offset, and whatever `stream` raises.
    The stream is read to its end, so that who verifies it sees every byte.
    """

    def __init__(self, stream: Readable, limits: Limits = USUAL) -> None:
        self._read: Callable[[int], bytes] = getattr(stream, "read1", None) or partial(_read, stream)
        self.limits = limits
        self.entries = 0
        self._defaults = b""

    def __iter__(self) -> Iterator[Window]:
        state = np.zeros(8, np.int64)
        data, status = b"", 0
        while status != END:
            at_end = False
            if status != GLOBAL:  # else there may be more in what we have
                before = len(data)
                data = self._more(data, int(state[7]))
                at_end = len(data) == before
            window, used, status = self._parse(data, state)
            self.entries += len(window.rows)
            if self.entries > self.limits.entries:
                raise InvalidLayer(f"more than the {self.limits.entries:,} entries allowed")
            yield window
            if status < 0:
                raise self._wrong(status, int(state[0]), data[used:])
            if status == GLOBAL:
                self._globals(data[int(state[5]) : int(state[6])])
            elif status != END and used == 0:
                if at_end:
                    self._check_end(len(data), state)
                    break
                if int(state[7]) > max(WINDOW, self.limits.header + 4 * BLOCK):
                    raise self._wrong(-9, int(state[0]), data)
            data = data[used:]
        while self._read(WINDOW):
            pass

    def _more(self, data: bytes, need: int) -> bytes:
        """`data` and the piece behind it: as many pieces as it takes for `need` bytes in all, fewer only at the end.

        A piece that nothing is left to stand before is not copied.
        """
        parts, have = [data], len(data)
        while piece := self._read(WINDOW):
            parts.append(piece)
            have += len(piece)
            if have >= need:
                break
        return b"".join(parts[not data :])

    def _parse(self, data: bytes, state: npt.NDArray[np.int64]) -> tuple[Window, int, int]:
        rows = np.empty((len(data) // BLOCK + 1) * ROW.itemsize, np.uint8)
        paths, links = np.empty(len(data) + 1, np.uint8), np.empty(len(data) + 1, np.uint8)
        status, used = tarindex.parse(data, len(data), self._defaults, self.limits.header, rows, paths, links, state)
        made = int(state[3])
        table = rows[: made * ROW.itemsize].view(ROW)
        window = Window(
            table,
            _strings(paths, table["path_end"]),
            _strings(links, table["link_end"]),
            memoryview(data),
            int(state[4]),
            self._defaults,
        )
        return window, used, status

    def _check_end(self, have: int, state: npt.NDArray[np.int64]) -> None:
        """The stream is at its end: between two entries that is fine, as GNU tar has it; elsewhere something is missing."""
        if have or state[1]:
            missing = f"{int(state[1])} bytes of content" if state[1] else "the rest of a header"
            raise InvalidLayer(f"entry {self.entries} at byte {int(state[0])}: the tar ends early, {missing} missing")

    def _wrong(self, status: int, offset: int, data: bytes) -> InvalidLayer:
        kind = UnsafePath if status == -4 else InvalidLayer
        where = f"entry {self.entries + 1} at byte {offset}{_name_of(data)}"
        if self.entries == 0 and status == -1:
            where = "not a tar"
        return kind(f"{where}: {WRONG[status]}")

    def _globals(self, records: bytes) -> None:
        where = f"the global header after entry {self.entries}"
        try:
            keys = list(parse_records(records))
        except InvalidLayer as e:
            raise InvalidLayer(f"{where}: {e}") from None
        for key in keys:
            if key.startswith(_FORBIDDEN):
                raise InvalidLayer(f"{where} sets {key!r}")
        if any(key.startswith(_MEANINGFUL) for key in keys):
            self._defaults += records
        if len(self._defaults) > _GLOBAL_LIMIT:
            raise InvalidLayer(f"{where}: more than {_GLOBAL_LIMIT} bytes of global records")


def _read(stream: Readable, size: int) -> bytes:
    """What `stream` gives at a time, for one that has no read1."""
    buffer = bytearray(size)
    return bytes(memoryview(buffer)[: stream.readinto(memoryview(buffer)) or 0])


def _name_of(data: bytes) -> str:
    """ ", NAME" of the entry whose headers begin `data`, as far as they can be read; "" if not even its name can."""
    name, at = b"", 0
    while at + BLOCK <= len(data):
        kind, field = data[at + 156 : at + 157], data[at + 124 : at + 136].strip(b"\0 ")
        size = int(field, 8) if field and not field.strip(b"01234567") else 0
        content = data[at + BLOCK : at + BLOCK + size]
        if kind == b"L":
            name = content
        elif kind in (b"x", b"X"):
            name = content.partition(b" path=")[2].partition(b"\n")[0] or name
        elif kind not in (b"g", b"K"):
            name = name or data[at : at + 100]
        if kind not in (b"g", b"K", b"L", b"x", b"X") or name:
            break
        at += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
    name = name.partition(b"\0")[0][:200]
    return f", {os.fsdecode(name)!r}" if name else ""


def _strings(arena: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> Strings:
    start = np.zeros(len(ends) + 1, np.int64)
    start[1:] = ends
    return Strings(arena[: start[-1]], start)


def parse_records(data: bytes) -> dict[str, bytes]:
    """pax records by key. InvalidLayer for what is none; ext/tarindex.pyx has checked those of an entry already."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        try:
            end = at + int(data[at:space])
            key, equals, value = data[space + 1 : end - 1].partition(b"=")
        except ValueError:
            raise InvalidLayer("a pax record that is none") from None
        if space < 0 or not equals or end > len(data) or end <= space + 1 or data[end - 1 : end] != b"\n":
            raise InvalidLayer("a pax record that is none")
        found[os.fsdecode(key)] = value
        at = end
    return found


def xattrs_of(records: dict[str, bytes]) -> Xattrs:
    """The xattrs among pax records: SCHILY.xattr.* as they are, LIBARCHIVE.xattr.* in base64 under a quoted name.

    In a SCHILY name %3D is "=" and %25 is "%", as GNU tar writes them: a key ends at its first "=".
    """
    found: dict[str, bytes] = {}
    for key, value in records.items():
        if key.startswith("LIBARCHIVE.xattr."):
            name = os.fsdecode(unquote_to_bytes(os.fsencode(key.removeprefix("LIBARCHIVE.xattr."))))
            if "\0" in name:
                raise InvalidLayer(f"an xattr named {name!r}")
            try:
                found.setdefault(name, base64.b64decode(value + b"=="))
            except ValueError as e:
                raise InvalidLayer(f"xattr {name}: not base64: {e}") from None
        elif key.startswith("SCHILY.xattr."):
            found[key.removeprefix("SCHILY.xattr.").replace("%3D", "=").replace("%25", "%")] = value
    return found


class TableBuilder:
    """The rows of windows, put together as one table in the order in which they came."""

    def __init__(self) -> None:
        # Grown in place and handed on as they are: memory never holds a row twice.
        self._columns = {name: bytearray() for name in COLUMNS}
        self._paths, self._links = _StringsBuilder(), _StringsBuilder()
        self._sets: dict[tuple[tuple[str, bytes], ...], int] = {}
        # A window has some fifty rows, far too few for what a call of numpy costs: they wait for others.
        self._waiting: list[bytes] = []
        self._links_waiting: list[Strings] = []
        self._rows_waiting = 0
        self._xattrs_waiting: dict[int, int] = {}  # by row among those waiting, the set it has

    def add(self, window: Window, real_sizes: dict[int, int]) -> None:
        """Append the window's rows. real_sizes: of sparse files, by row."""
        rows = window.rows
        if real_sizes:
            rows = rows.copy()
            rows["size"][list(real_sizes)] = list(real_sizes.values())
        for row in (rows["flags"] & HAS_XATTRS).nonzero()[0].tolist():
            try:
                found = xattrs_of(window.records(row))
            except InvalidLayer as e:
                raise InvalidLayer(f"{window.name(row)}: {e}") from None
            if found:
                number = self._sets.setdefault(tuple(sorted(found.items())), len(self._sets))
                self._xattrs_waiting[self._rows_waiting + row] = number
        self._paths.add(window.paths)
        self._waiting.append(rows.tobytes())
        self._links_waiting.append(window.links.copy())
        self._rows_waiting += len(rows)
        if self._rows_waiting >= TOGETHER:
            self._put_together()

    def _put_together(self) -> None:
        rows = np.frombuffer(b"".join(self._waiting), ROW)
        columns = empty_columns(len(rows))
        is_link = rows["kind"] == LINK
        columns["kind"] = np.where(is_link, np.uint8(Kind.FILE), rows["kind"])
        columns["flags"][is_link] = Flag.LOWER_LINK
        is_file, is_symlink = columns["kind"] == Kind.FILE, columns["kind"] == Kind.SYMLINK
        columns["mode"] = np.where(is_symlink, np.uint32(0o777), rows["mode"])
        for name in ("uid", "gid", "mtime_ns", "rdev"):
            columns[name] = rows[name]
        columns["size"] = np.where(is_file, rows["size"], 0)
        columns["offset"] = np.where(is_file & ~is_link, rows["offset"], -1)
        linked = np.flatnonzero(is_link | is_symlink)
        columns["link"][linked] = np.arange(len(self._links), len(self._links) + len(linked))
        columns["xattrs"][list(self._xattrs_waiting)] = list(self._xattrs_waiting.values())
        for name, column in self._columns.items():
            column += columns[name].astype(COLUMNS[name]).tobytes()
        self._links.add(Strings.concat(self._links_waiting).take(linked))
        self._waiting.clear()
        self._links_waiting.clear()
        self._xattrs_waiting.clear()
        self._rows_waiting = 0

    def table(self) -> Tree:
        """All of it. Nothing can be added after that."""
        if self._waiting:
            self._put_together()
        columns = {name: np.frombuffer(column, COLUMNS[name]) for name, column in self._columns.items()}
        sets = tuple(dict(s) for s in self._sets)
        return Tree(self._paths.strings(), **columns, links=self._links.strings(), xattr_sets=sets)


class _StringsBuilder:
    def __init__(self) -> None:
        self._arena, self._start = bytearray(), bytearray(8)

    def __len__(self) -> int:
        return len(self._start) // 8 - 1

    def add(self, strings: Strings) -> None:
        self._start += (strings.start[1:] + len(self._arena)).tobytes()
        self._arena += strings.arena.tobytes()

    def strings(self) -> Strings:
        return Strings(np.frombuffer(self._arena, np.uint8), np.frombuffer(self._start, np.int64))


def index_tar(stream: Readable, *, strict: bool = False, limits: Limits = USUAL) -> Tree:
    """The Tree that an uncompressed OCI layer tar says: a changeset, .wh. names read as whiteouts, rows in tree order.

    strict: a path that stands twice is an error, as image-spec layer.md has it; else the later counts. `offset` says where
    in the stream a file's content begins. Raises InvalidLayer and UnsafePath for what is no layer. Follows POSIX pax and
    GNU tar's formats. Memory: the columns, about 100 bytes an entry, and one window.
    """
    return regular(_table(stream, limits), oci_names=True, strict=strict)


def _table(stream: Readable, limits: Limits) -> Tree:
    """What the tar says, row by row. Its windows are gone when this returns."""
    builder = TableBuilder()
    for window in TarReader(stream, limits):
        builder.add(window, {row: sparse_size(window, row) for row in sparse_rows(window)})
    return builder.table()
