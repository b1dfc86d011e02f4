"""Compressed bytes to plain ones and back: gzip (isal), zstd (zstandard), none; to read also bzip2 and xz.

What a blob is, its first bytes say and not its media type, since Docker and others have called plain layers gzip.
Whatever is wrong with a compressed stream (damaged, cut off, something else behind it) is an InvalidLayer in plain
words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Protocol, cast

from overlaykit.errors import InvalidLayer, Unsupported
from overlaykit.oci.digest import Readable

# isal and zstandard are imported where they are used: a program that only reads documents does not pay for them.

INPUT = 256 << 10  # bytes of compressed input a step
OUTPUT = 1 << 20  # bytes of plain output a step at most, so that a bomb costs no memory
BLOCK = 128 << 10  # bytes that one zstd block can become (RFC 8878, 3.1.1.2.4)
MAX_WINDOW = 128 << 20  # bytes zstd may look back, and so what it may make us hold; zstd's own default

MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame; a skippable frame
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),  # a block; an empty stream's end
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
FIELDS = 0x1E  # flags of a gzip header: FHCRC, FEXTRA, FNAME, FCOMMENT (RFC 1952, 2.3.1)
SNIFF = 512  # bytes that `compression_of` looks at


def compression_of(start: bytes) -> str:
    """What a stream that begins with `start` (SNIFF bytes if it has them) is: gzip, zstd, bzip2, xz or none."""
    if is_tar_header(start):
        return "none"  # a first name that begins like gzip does not make a tar a gzip file
    return next((name for name, magic in MAGIC.items() if magic.match(start)), "none")


def is_tar_header(block: bytes) -> bool:
    """Whether `block` begins as a tar does: 512 bytes and their checksum (POSIX pax, "ustar Interchange Format")."""
    if len(block) < 512:
        return False
    try:
        want = int(block[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    rest = block[:148] + b" " * 8 + block[156:512]
    # Some old tars summed signed chars.
    return want in (sum(rest), sum(b - 256 if b > 127 else b for b in rest))


# --- reading ----------------------------------------------------------------------------------------------------------


def decompressed(
    source: Readable, *, what: str = "layer", found: Callable[[str], None] | None = None, checked: bool = False
) -> Iterator[bytes]:
    """The plain bytes of `source`, in pieces of at most OUTPUT bytes, whatever it is compressed with.

    found: told once what the compression is. checked: the caller knows the digest of the plain bytes and compares it, so
    that zstd's own checksum of them would be work done twice. Raises InvalidLayer, naming `what`, for a stream that is
    damaged, cut off or has anything but NULs behind its end; Unsupported for a zstd window beyond MAX_WINDOW.
    """
    start = b""
    while len(start) < SNIFF and (more := source.read(SNIFF - len(start))):
        start += more
    compression = compression_of(start)
    if found is not None:
        found(compression)
    if compression == "none":
        return _plain(source, start)
    if compression == "zstd":
        return _unzstd(source, start, what, checked)
    return _members(source, start, compression, what)


def _plain(source: Readable, start: bytes) -> Iterator[bytes]:
    if start:
        yield start
    while data := source.read(OUTPUT):
        yield data


class _Member(Protocol):
    """One gzip member, bzip2 or xz stream being read, as bz2.BZ2Decompressor has it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


def _codec(compression: str) -> tuple[Callable[[], _Member], tuple[type[Exception], ...]]:
    """A new decompressor, and what it raises for bytes it cannot take."""
    if compression == "gzip":
        from isal import igzip_lib

        return (lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)), (
            cast("type[Exception]", igzip_lib.error),
            EOFError,
        )
    if compression == "bzip2":
        import bz2

        return bz2.BZ2Decompressor, (OSError, ValueError, EOFError)
    import lzma

    return (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW * 2)), (lzma.LZMAError, EOFError)


def _members(source: Readable, data: bytes, compression: str, what: str) -> Iterator[bytes]:
    """The plain bytes of one or more `compression` streams back to back, of which `data` is the beginning."""
    new, errors = _codec(compression)
    magic = MAGIC[compression]
    while True:
        if compression == "gzip" and (int.from_bytes(data[3:4]) & FIELDS).bit_count() > 1:
            # isal loses its place in a header with several fields that comes in pieces
            while len(data) < INPUT and (more := source.read(INPUT)):
                data += more
        member = new()
        while not member.eof:
            if member.needs_input and not data:
                data = source.read(INPUT)
                if not data:
                    raise InvalidLayer(f"{what}: the {compression} stream is cut off: it ends before its end mark")
            try:
                out = member.decompress(data, OUTPUT)
            except errors as e:
                raise InvalidLayer(f"{what}: damaged {compression} data: {e}") from e
            data = b""
            if out:
                yield out
        data = member.unused_data
        while len(data) < SNIFF and (more := source.read(INPUT)):
            data += more
        if not data:
            return
        if not magic.match(data):
            # gzip(1) takes NULs behind the last member for a tape's padding; so does everyone, but for nothing else.
            _only_padding(source, data, compression, what)
            return


def _only_padding(source: Readable, data: bytes, compression: str, what: str) -> None:
    while data:
        if data.strip(b"\0"):
            raise InvalidLayer(f"{what}: something else follows the end of the {compression} data")
        data = source.read(INPUT)


def _unzstd(source: Readable, data: bytes, what: str, checked: bool) -> Iterator[bytes]:
    """The plain bytes of zstd frames back to back, of which `data` is the beginning.

    zstandard's stream reader gives as many bytes as one asks for, but takes a stream that is cut off for one that ends. So
    frames are walked here, block header by block header (RFC 8878, 3.1), and it is told where one does not go on.
    """
    import zstandard

    walk = _Feed(source, data, what)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    while walk.more(4):
        if MAGIC["zstd"].match(walk.peek(4)) is None:
            _only_padding(source, walk.rest(), "zstd", what)
            return
        if walk.peek(4)[0] != 0x28:  # a skippable frame: magic, length, and that much that means nothing
            walk.take(4)
            walk.skip(int.from_bytes(walk.take(4), "little"))
            continue
        frame = decompressor.stream_reader(cast("IO[bytes]", _ZstdFrame(walk, what, checked)))
        try:
            while out := frame.read(OUTPUT):
                yield out
        except zstandard.ZstdError as e:
            if "too much memory" in str(e):
                raise Unsupported(
                    f"{what}: zstd data that needs more than {MAX_WINDOW >> 20} MiB to unpack",
                    hint="compress it again without --long",
                ) from e
            raise InvalidLayer(f"{what}: damaged zstd data: {e}") from e


class _ZstdFrame:
    """One zstd frame as a file: `read` gives the next of it, however much is asked for."""

    def __init__(self, walk: _Feed, what: str, checked: bool) -> None:
        self._pieces = _zstd_pieces(walk, what, checked)

    def read(self, size: int) -> bytes:
        return next(self._pieces, b"")


def _zstd_pieces(walk: _Feed, what: str, checked: bool) -> Iterator[bytes]:
    """A frame in pieces as they come from the source; checked: one without a checksum (RFC 8878, 3.1.1.1.1)."""
    start = walk.take(5)
    descriptor = start[4]
    single_segment, checksum = bool(descriptor & 0x20), bool(descriptor & 0x04)
    content_size = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    due = (not single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size  # bytes before the next block's header
    yield start[:4] + bytes((descriptor & ~0x04,)) if checked else start
    last = 0
    while not last:
        if due and walk.more(1) and due + 3 > walk.at_hand:
            yield (piece := walk.some(due))
            due -= len(piece)
            continue
        word = int.from_bytes(walk.peek(3, due), "little")
        last, kind, size = word & 1, word >> 1 & 3, word >> 3
        if kind == 3 or size > BLOCK:
            raise InvalidLayer(f"{what}: damaged zstd data: a block header that cannot be")
        due += 3 + (1 if kind == 1 else size)
    if checksum and not checked:
        due += 4
    while due:
        yield (piece := walk.some(due))
        due -= len(piece)
    if checksum and checked:
        walk.take(4)


class _Feed:
    """Bytes of a stream that must be there: `take` raises InvalidLayer where the stream is cut off."""

    def __init__(self, source: Readable, data: bytes, what: str) -> None:
        self._source, self._data, self._at, self._what = source, data, 0, what

    def more(self, n: int) -> bool:
        """Whether anything is left; up to `n` bytes of it are at hand afterwards."""
        while len(self._data) - self._at < n:
            read = self._source.read(INPUT)
            if not read:
                break
            self._data, self._at = self._data[self._at :] + read, 0
        return self._at < len(self._data)

    @property
    def at_hand(self) -> int:
        """Bytes that were read and not yet taken."""
        return len(self._data) - self._at

    def peek(self, n: int, skip: int = 0) -> bytes:
        if not self.more(skip + n) or self.at_hand < skip + n:
            raise self._cut_off()
        return self._data[self._at + skip : self._at + skip + n]

    def some(self, n: int) -> bytes:
        """What comes next, at most `n` bytes and at least one: uncopied if that is all that was read."""
        if not self.more(1):
            raise self._cut_off()
        out = self._data[self._at : self._at + n]
        self._at += len(out)
        return out

    def _cut_off(self) -> InvalidLayer:
        return InvalidLayer(f"{self._what}: the zstd stream is cut off: it ends within a frame")

    def take(self, n: int) -> bytes:
        out = self.peek(n) if n else b""
        self._at += n
        return out

    def skip(self, n: int) -> None:
        while n:
            n -= len(self.take(min(n, INPUT)))

    def rest(self) -> bytes:
        return self._data[self._at :]


# --- writing ----------------------------------------------------------------------------------------------------------


class Compressor(Protocol):
    """What turns plain bytes into compressed ones. The same input in the same pieces gives the same output."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Compression:
    """How to compress: `kind` gzip, zstd or none, and `level`.

    gzip: None and igzip-0 to igzip-3 are isal's (igzip-2 is the default: about zlib's level 1 in size, five times as
    fast); gzip-1 to gzip-9 are zlib's own. zstd: -7 to 22, 3 the default.
    """

    kind: str
    level: int | None = None
    engine: str = ""

    @staticmethod
    def parse(text: str) -> Compression:
        """From "none", "gzip", "igzip-3", "gzip-9", "zstd", "zstd-19". Unsupported for any other."""
        kind, _, level_text = text.partition("-")
        ranges = {"none": (), "gzip": range(1, 10), "igzip": range(4), "zstd": range(1, 23)}
        known = ranges.get(kind)
        if known is not None and not level_text:
            return Compression("gzip" if kind == "igzip" else kind, None, "igzip" if kind in ("gzip", "igzip") else kind)
        if known and level_text.isascii() and level_text.isdigit() and int(level_text) in known:
            return Compression("gzip" if kind == "igzip" else kind, int(level_text), "zlib" if kind == "gzip" else kind)
        raise Unsupported(
            f"compression {text!r}",
            hint="one of none, gzip, igzip-0 to igzip-3, gzip-1 to gzip-9, zstd, zstd-1 to zstd-22",
        )

    def compressor(self, *, threads: int = 0) -> Compressor:
        """A new compressor. Its gzip header holds neither time nor name; `threads` is zstd's."""
        if self.kind == "none":
            return _Copy()
        if self.kind == "zstd":
            import zstandard

            # write_checksum, as zstd(1) does it: damage then shows where it is, and not only in the digest
            return zstandard.ZstdCompressor(
                level=3 if self.level is None else self.level, threads=threads, write_checksum=True
            ).compressobj()
        if self.engine == "zlib":
            import zlib

            return zlib.compressobj(self.level or 6, zlib.DEFLATED, 31)
        from isal import isal_zlib

        return isal_zlib.compressobj(2 if self.level is None else self.level, isal_zlib.DEFLATED, 31)


class _Copy:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""
