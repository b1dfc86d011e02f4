"""Layer tars in: a stream of windows for who unpacks, a Tree for who only wants to know."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt

from overlaykit._ext import tarindex
from overlaykit.errors import InvalidLayer, UnsafePath
from overlaykit.tree.regular import regular
from overlaykit.tree.table import Flag, Kind, Strings, Tree, Xattrs, empty_columns

WINDOW = 1 << 20  # bytes parsed at a time: enough to spread a call's cost, little enough to stay in a cache
HEADER_LIMIT = 1 << 20  # bytes of headers one entry may have; xattrs are at most 64 KiB each on Linux

# As ext/tarindex.pyx packs a row.
ROW = np.dtype(
    [(n, "<i8") for n in ("offset", "size", "mtime_ns")]
    + [("rdev", "<u8")]
    + [(n, "<i8") for n in ("path_end", "link_end", "head", "records", "records_end", "data", "here")]
    + [(n, "<u4") for n in ("mode", "uid", "gid")]
    + [(n, "u1") for n in ("kind", "flags")]
)
LINK = 8  # the kind of a hard link
HAS_XATTRS, SPARSE_OLD, SPARSE_PAX = 1, 2, 4  # flags
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
LARGEST = 1 << 62  # bytes in a file; more is a lie, and sums of such numbers must fit int64
# Keys of a global header that would change what entries are; one that only comments is common (git archive).
_MEANINGFUL = ("uid", "gid", "mtime", "SCHILY.xattr.", "LIBARCHIVE.xattr.")
_FORBIDDEN = ("path", "linkpath", "size", "GNU.sparse.")
_GLOBAL_LIMIT = 1 << 16  # bytes of global records in all: they are read again for every entry


class Readable(Protocol):
    """What a layer is read from: a binary file, a socket's, or a pipeline's end."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Window:
    """The entries of one stretch of a tar stream. Valid until the next one is asked for: the buffer is used again.

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

    def __init__(self, stream: Readable, *, header_limit: int = HEADER_LIMIT) -> None:
        self.stream = stream
        self.limit = header_limit
        self.entries = 0
        self._defaults = b""

    def __iter__(self) -> Iterator[Window]:
        buffer = bytearray(WINDOW)
        state = np.zeros(8, np.int64)
        have = 0
        ended = False
        while not ended:
            got = self._fill(buffer, have)
            have += got
            window, used, status = self._parse(buffer, have, state)
            self.entries += len(window.rows)
            yield window
            if status < 0:
                raise self._wrong(status, int(state[0]), bytes(buffer[used:have]))
            if status == GLOBAL:
                self._globals(bytes(buffer[int(state[5]) : int(state[6])]))
            ended = status == END
            if not ended and got == 0 and status == 0 and used == 0:
                self._check_end(have, state)
                ended = True
            if used == 0 and int(state[7]) > len(buffer) and have == len(buffer):
                if int(state[7]) > self.limit + 4 * BLOCK:
                    raise self._wrong(-9, int(state[0]), bytes(buffer[:have]))
                # Not in place: the window that was handed out still looks at the old one.
                buffer = buffer + bytes(int(state[7]) - len(buffer))
            buffer[: have - used] = buffer[used:have]
            have -= used
        while self.stream.readinto(memoryview(buffer)):
            pass

    def _fill(self, buffer: bytearray, have: int) -> int:
        if have == len(buffer):
            return 0
        with memoryview(buffer) as view, view[have:] as rest:
            return self.stream.readinto(rest) or 0

    def _parse(self, buffer: bytearray, have: int, state: npt.NDArray[np.int64]) -> tuple[Window, int, int]:
        rows = np.empty((have // BLOCK + 1) * ROW.itemsize, np.uint8)
        paths, links = np.empty(have + 1, np.uint8), np.empty(have + 1, np.uint8)
        status, used = tarindex.parse(buffer, have, self._defaults, self.limit, rows, paths, links, state)
        made = int(state[3])
        table = rows[: made * ROW.itemsize].view(ROW)
        window = Window(
            table,
            _strings(paths, table["path_end"]),
            _strings(links, table["link_end"]),
            memoryview(buffer),
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
        self._parts: list[dict[str, npt.NDArray[Any]]] = []
        self._paths: list[Strings] = []
        self._links: list[Strings] = []
        self._sets: dict[tuple[tuple[str, bytes], ...], int] = {}
        self._link_count = 0

    def add(self, window: Window, real_sizes: dict[int, int]) -> list[Xattrs | None]:
        """Append the window's rows; returns the xattrs of each (None: none). real_sizes: of sparse files, by row."""
        rows = window.rows
        n = len(rows)
        columns = empty_columns(n)
        is_link = rows["kind"] == LINK
        columns["kind"] = np.where(is_link, np.uint8(Kind.FILE), rows["kind"])
        columns["flags"][is_link] = Flag.LOWER_LINK
        is_file = columns["kind"] == Kind.FILE
        columns["mode"] = np.where(columns["kind"] == Kind.SYMLINK, np.uint32(0o777), rows["mode"])
        for name in ("uid", "gid", "mtime_ns", "rdev"):
            columns[name] = rows[name].copy()  # of one row, ascontiguousarray would give the window's own
        columns["size"] = np.where(is_file, rows["size"], 0)
        columns["offset"] = np.where(is_file & ~is_link, rows["offset"], -1)
        for row, size in real_sizes.items():
            columns["size"][row] = size
        linked = np.flatnonzero(is_link | (columns["kind"] == Kind.SYMLINK))
        columns["link"][linked] = np.arange(self._link_count, self._link_count + len(linked))
        self._link_count += len(linked)
        xattrs: list[Xattrs | None] = [None] * n
        for row in np.flatnonzero(rows["flags"] & HAS_XATTRS).tolist():
            try:
                found = xattrs_of(window.records(row))
            except InvalidLayer as e:
                raise InvalidLayer(f"{window.name(row)}: {e}") from None
            if found:
                xattrs[row] = found
                columns["xattrs"][row] = self._sets.setdefault(tuple(sorted(found.items())), len(self._sets))
        self._parts.append(columns)
        # The window's arrays have room for a whole buffer: keep only what is used.
        self._paths.append(Strings(window.paths.arena.copy(), window.paths.start))
        self._links.append(window.links.take(linked))
        return xattrs

    def table(self) -> Tree:
        names = empty_columns(0)
        parts = {n: np.concatenate([p[n] for p in self._parts] or [names[n]]) for n in names}
        return Tree(
            Strings.concat(self._paths),
            **parts,
            links=Strings.concat(self._links),
            xattr_sets=tuple(dict(s) for s in self._sets),
        )


def index_tar(stream: Readable, *, strict: bool = False) -> Tree:
    """The Tree that an uncompressed OCI layer tar says: a changeset, .wh. names read as whiteouts, rows in tree order.

    strict: a path that stands twice is an error, as image-spec layer.md has it; else the later counts. `offset` says where
    in the stream a file's content begins. Raises InvalidLayer and UnsafePath for what is no layer. Follows POSIX pax and
    GNU tar's formats. Memory: the columns, about 100 bytes an entry, and one window.
    """
    builder = TableBuilder()
    for window in TarReader(stream):
        builder.add(window, {row: sparse_size(window, row) for row in sparse_rows(window)})
    return regular(builder.table(), oci_names=True, strict=strict)


# --- sparse files ---------------------------------------------------------------------------------------------------


def sparse_rows(window: Window) -> list[int]:
    return np.flatnonzero(window.rows["flags"] & (SPARSE_OLD | SPARSE_PAX)).tolist()


def sparse_size(window: Window, row: int) -> int:
    """The size in bytes that sparse file `row` has once its holes are there."""
    try:
        return _sparse_size(window, row)
    except InvalidLayer as e:
        raise InvalidLayer(f"{window.name(row)}: {e}") from None


def _sparse_size(window: Window, row: int) -> int:
    if window.rows["flags"][row] & SPARSE_OLD:
        return _number(bytes(window.buffer[int(window.rows["head"][row]) :][:BLOCK])[483:495])
    records = window.records(row)
    for key in ("GNU.sparse.realsize", "GNU.sparse.size"):
        if key in records:
            return _digits(records[key])
    return int(window.rows["size"][row])


def sparse_map(window: Window, row: int) -> list[tuple[int, int]] | None:
    """(offset, size) of each piece of content of sparse file `row`; None where the map is in front of the content (1.0)."""
    try:
        return _sparse_map(window, row)
    except InvalidLayer as e:
        raise InvalidLayer(f"{window.name(row)}: {e}") from None


def _sparse_map(window: Window, row: int) -> list[tuple[int, int]] | None:
    if window.rows["flags"][row] & SPARSE_OLD:
        head, data = int(window.rows["head"][row]), int(window.rows["data"][row])
        blocks = bytes(window.buffer[head:data])
        fields = [blocks[386 + 24 * i : 410 + 24 * i] for i in range(4)]
        for at in range(BLOCK, len(blocks), BLOCK):
            fields += [blocks[at + 24 * i : at + 24 * (i + 1)] for i in range(21)]
        return _checked([(_number(f[:12]), _number(f[12:])) for f in fields if f.strip(b"\0")])
    packed = window.own_records(row)
    records = parse_records(packed)
    if records.get("GNU.sparse.major") == b"1":
        return None
    if "GNU.sparse.map" in records:
        numbers = [_digits(n) for n in records["GNU.sparse.map"].split(b",") if n]
        return _checked(list(zip(numbers[::2], numbers[1::2], strict=False)))
    # 0.0 repeats two keys, so that a dictionary of records keeps only the last pair.
    offsets = [_digits(r.partition(b"=")[2]) for r in _repeated(packed, b"GNU.sparse.offset=")]
    sizes = [_digits(r.partition(b"=")[2]) for r in _repeated(packed, b"GNU.sparse.numbytes=")]
    return _checked(list(zip(offsets, sizes, strict=False)))


def read_map(data: bytes) -> tuple[list[tuple[int, int]], int] | None:
    """The map at the beginning of a 1.0 sparse file's content and the bytes it takes; None if more of it is needed."""
    first, newline, _ = data[:MAP_LINE].partition(b"\n")
    if not newline:
        if len(data) >= MAP_LINE:
            raise InvalidLayer("a sparse map that does not begin with a number")
        return None
    count = _digits(first)
    if count > MAP_LIMIT:
        raise InvalidLayer(f"a sparse map of {count} pieces")
    if data.count(b"\n") < 2 * count + 1:
        if len(data) > (2 * count + 1) * MAP_LINE:
            raise InvalidLayer("a sparse map with something else than numbers in it")
        return None
    lines = data.split(b"\n", 2 * count + 1)
    numbers = [_digits(n) for n in lines[1 : 2 * count + 1]]
    used = sum(len(line) + 1 for line in lines[: 2 * count + 1])
    size = (used + BLOCK - 1) // BLOCK * BLOCK
    if size > len(data):
        return None
    return _checked(list(zip(numbers[::2], numbers[1::2], strict=True))), size


MAP_LINE = 21  # bytes: a number's 19 digits, a newline, and one more
MAP_LIMIT = 1 << 20  # pieces


def _repeated(data: bytes, key: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        space = data.index(b" ", at)
        end = at + int(data[at:space])
        if data.startswith(key, space + 1):
            yield data[space + 1 : end - 1]
        at = end


def _checked(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    end = 0
    for offset, size in pieces:
        if offset < end or size < 0 or offset + size > LARGEST:
            raise InvalidLayer(f"a sparse map that goes back: {size} bytes at {offset} after {end}")
        end = offset + size
    return pieces


def _digits(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise InvalidLayer(f"{text[:24]!r} where a number should be")
    if int(text) > LARGEST:
        raise InvalidLayer(f"a number that cannot be: {int(text)}")
    return int(text)


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    else:
        text = field.strip(b"\0 ")
        if text.strip(b"01234567"):
            raise InvalidLayer(f"{field!r} where an octal number should be")
        value = int(text or b"0", 8)
    if value > LARGEST:
        raise InvalidLayer(f"a number that cannot be: {value}")
    return value
