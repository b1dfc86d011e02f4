"""Sparse files of a tar: of old GNU tar (type S), and of pax 0.0, 0.1 and 1.0. Their content stands without its holes; a
map says where each piece of it goes. Follows GNU tar's manual, "Storing Sparse Files"."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from overlaykit.errors import InvalidLayer

if TYPE_CHECKING:
    from overlaykit.tree.tarball import Window

SPARSE_OLD, SPARSE_PAX = 2, 4  # flags of a window's rows
BLOCK = 512
LARGEST = 1 << 62  # bytes in a file; more is a lie, and sums of such numbers must fit int64
MAP_LINE = 21  # bytes: a number's 19 digits, a newline, and one more
MAP_LIMIT = 1 << 20  # pieces


class Pieces:
    """Where the content of one sparse file goes. `pieces`: (offset, size) of each; None: a map in front of it says so."""

    def __init__(self, pieces: list[tuple[int, int]] | None) -> None:
        self._pieces = None if pieces is None else deque(pieces)
        self._head = b""

    def place(self, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """The next bytes of the content, each part with its offset in the file. InvalidLayer for a map that is none."""
        if self._pieces is None:
            self._head += data
            found = read_map(self._head)
            if found is None:
                return
            self._pieces = deque(found[0])
            data = memoryview(self._head)[found[1] :]
        while len(data) and self._pieces:
            offset, size = self._pieces[0]
            part = data[:size]
            yield offset, part
            data = data[len(part) :]
            self._pieces[0] = (offset + len(part), size - len(part))
            if len(part) == size:
                self._pieces.popleft()

    def complete(self) -> None:
        """InvalidLayer if content is missing, all that there is being placed."""
        if self._pieces is None:
            raise InvalidLayer("a sparse file whose map is not whole")
        if any(size for _, size in self._pieces):
            raise InvalidLayer("a sparse file with less content than its map says")


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
    records = window.records(row)
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
