"""Tars by hand and by other tools, for what reads them: headers as bytes, and what Python's tarfile says of an archive."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence

from overlaykit.tree import Entry, Flag, Kind, Tree, from_entries, regular

BLOCK = 512
END = bytes(2 * BLOCK)
PYTHON_KINDS = {
    tarfile.DIRTYPE: Kind.DIR,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.CHRTYPE: Kind.CHAR,
    tarfile.BLKTYPE: Kind.BLOCK,
    tarfile.FIFOTYPE: Kind.FIFO,
}


def header(
    name: str | bytes,
    kind: str = "0",
    size: int | bytes = 0,
    *,
    link: str | bytes = "",
    mode: int | bytes | None = None,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = 0,
    device: tuple[int | bytes, int | bytes] = (0, 0),
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    tail: bytes = b"",
) -> bytes:
    """One header block with a checksum that holds. Numbers as octal, or as the bytes given; `tail` begins at byte 345."""
    block = bytearray(BLOCK)
    if mode is None:
        mode = 0o755 if kind == "5" else 0o644
    fields: list[tuple[int, int, str | bytes | int]] = [
        (0, 100, name),
        (100, 8, mode),
        (108, 8, uid),
        (116, 8, gid),
        (124, 12, size),
        (136, 12, mtime),
        (156, 1, kind),
        (157, 100, link),
        (257, 8, magic),
        (329, 8, device[0]),
        (337, 8, device[1]),
        (345, 155, prefix),
    ]
    for at, width, value in fields:
        if isinstance(value, int):
            value = b"%0*o\0" % (width - 1, value)
        raw = os.fsencode(value) if isinstance(value, str) else value
        assert len(raw) <= width, f"{raw!r} is longer than {width}"
        block[at : at + len(raw)] = raw
    block[345 : 345 + len(tail)] = tail
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def member(name: str | bytes, content: bytes = b"", kind: str = "0", **fields: object) -> bytes:
    return header(name, kind, len(content), **fields) + padded(content)  # type: ignore[arg-type]


def record(key: str | bytes, value: str | bytes) -> bytes:
    """A pax record: its length counts itself."""
    body = b" %s=%s\n" % (os.fsencode(key), os.fsencode(value))
    size = len(body)
    while size != len(body) + len(str(size)):
        size = len(body) + len(str(size))
    return b"%d" % size + body


def pax(kind: str = "x", /, **records: str | bytes) -> bytes:
    """A pax header; "__" in a keyword stands for ".", so that they can be written down."""
    return member("PaxHeaders/x", b"".join(record(k.replace("__", "."), v) for k, v in records.items()), kind)


def by_python(data: bytes) -> Tree:
    """What Python's tarfile says of an archive, made regular like any layer."""
    rows = []
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape", encoding="utf-8") as tar:
        for m in tar:
            kind = PYTHON_KINDS.get(m.type, Kind.FILE)
            xattrs = {
                key.removeprefix("SCHILY.xattr."): value.encode("utf-8", "surrogateescape")
                for key, value in m.pax_headers.items()
                if key.startswith("SCHILY.xattr.")
            }
            whole, _, part = m.pax_headers.get("mtime", str(m.mtime)).partition(".")
            mtime_ns = abs(int(whole or 0)) * 10**9 + int(part[:9].ljust(9, "0") or 0)
            mtime_ns = -mtime_ns if whole.startswith("-") else mtime_ns
            rows.append(
                Entry(
                    os.path.normpath("/" + m.name).lstrip("/"),
                    kind,
                    mode=0o777 if kind == Kind.SYMLINK else m.mode & 0o7777,
                    uid=m.uid,
                    gid=m.gid,
                    size=m.size if kind == Kind.FILE and not m.islnk() else 0,
                    mtime_ns=mtime_ns,
                    rdev=os.makedev(m.devmajor, m.devminor) if kind in (Kind.CHAR, Kind.BLOCK) else 0,
                    link=m.linkname if m.issym() or m.islnk() else None,
                    xattrs=xattrs,
                    flags=Flag.LOWER_LINK if m.islnk() else Flag.NONE,
                )
            )
    return regular(from_entries(rows), oci_names=True)


class Slow(io.RawIOBase):
    """A stream that gives its bytes in pieces of `sizes`, over and over."""

    def __init__(self, data: bytes, sizes: Sequence[int]) -> None:
        self.data = data
        self.at = self.calls = 0
        self.sizes = sizes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[call-overload]
        n = min(len(view), self.sizes[self.calls % len(self.sizes)], len(self.data) - self.at)
        self.calls += 1
        view[:n] = self.data[self.at : self.at + n]
        self.at += n
        return n
