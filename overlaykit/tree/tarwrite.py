"""Layer tars out: the same tree and content give the same bytes.

POSIX pax with the fewest extended headers that carry everything: no names of owners, no access times, times cut to whole
seconds unless asked. Rows go in tree order, within a directory its whiteouts first (image-spec layer.md, "Whiteouts").
"""

from __future__ import annotations

import errno
import io
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO, Protocol

import numpy as np

from overlaykit._ext import whiteout
from overlaykit.errors import InvalidLayer
from overlaykit.tree.losses import Loss, Losses
from overlaykit.tree.table import Entry, Flag, Kind, Rows, Tree, first_names
from overlaykit.tree.whiteout import METACOPY, OPAQUE_NAME, PREFIX, REDIRECT, Mark, WhiteoutFormat

BLOCK = 512
CHUNK = 1 << 20
TYPES = {
    Kind.FILE: b"0",
    Kind.SYMLINK: b"2",
    Kind.CHAR: b"3",
    Kind.BLOCK: b"4",
    Kind.DIR: b"5",
    Kind.FIFO: b"6",
    Kind.WHITEOUT: b"0",
}
OPAQUE, IMPLIED, LOWER_LINK = int(Flag.OPAQUE), int(Flag.IMPLIED), int(Flag.LOWER_LINK)
CAPABILITY = "security.capability"
# An xattr that says something about the host it was on, not about the file: a policy's label.
HOST_XATTRS = ("security.selinux", "security.ima", "security.evm")


class Writable(Protocol):
    """What a tar is written to."""

    def write(self, data: bytes | memoryview, /) -> object: ...


class Whole:
    """A sink that takes all that it is given, whatever pieces `out` takes: a raw file's write may stop early, and say so."""

    def __init__(self, out: Writable) -> None:
        self._write = out.write
        self._is_raw = isinstance(out, io.RawIOBase)

    def write(self, data: bytes | memoryview, /) -> None:
        """OSError from `out`; BlockingIOError if it is not blocking, and takes nothing."""
        done = self._write(data)
        while type(done) is int and done < len(data):
            data = memoryview(data)[done:]
            done = self._write(data)
        if done is None and self._is_raw:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


Content = Callable[[int], int | BinaryIO]


def write_tar(
    tree: Tree,
    content: Content,
    out: Writable,
    *,
    source_date_epoch: int | None = None,
    subsecond: bool = False,
    losses: Losses | None = None,
) -> None:
    """Write `tree` to `out` as an uncompressed OCI layer tar: whiteouts as .wh. files, opaque directories by .wh..wh..opq.

    content(row) opens the content of file `row`: a descriptor or a binary file, which is read and closed here.
    source_date_epoch: seconds since 1970; later times become this one. subsecond: times to the nanosecond, in pax headers.
    What a layer cannot carry (sockets, names that begin with .wh., an xattr of the host) is appended to `losses`.
    InvalidLayer if a file has fewer or more bytes than its row says, or for an unresolved overlay redirect or metacopy;
    OSError from reading and writing.
    """
    losses = [] if losses is None else losses
    out = Whole(out)
    latest = None if source_date_epoch is None else source_date_epoch * 10**9
    kept = np.zeros(len(tree), np.uint8)
    whiteout.classify(tree.paths.arena, tree.paths.start, kept)
    reserved = kept != Mark.PLAIN  # read back, they would take something away
    first = first_names(tree.with_columns(hardlink=np.where(reserved, -1, tree.hardlink)))
    order = _order(tree)
    for row, entry in zip(order.tolist(), tree.entries(order), strict=True):
        if reserved[row]:
            losses.append(Loss(entry.path, f"a name with {PREFIX}: layers keep it for whiteouts"))
            continue
        if entry.kind == Kind.SOCKET:
            losses.append(Loss(entry.path, "a socket: layers have none"))
            continue
        mtime_ns = entry.mtime_ns if latest is None else min(entry.mtime_ns, latest)
        if not subsecond:
            mtime_ns = mtime_ns // 10**9 * 10**9
        if entry.kind == Kind.WHITEOUT:
            head, slash, name = entry.path.rpartition("/")
            out.write(_header(Entry(head + slash + PREFIX + name), b"0", {}, 0))
            continue
        flags = int(entry.flags)  # an enum's own operators are slow
        if flags & LOWER_LINK or first[row] != row:
            # With all that the file has: some tools give it what a link's header says, and the owner takes capabilities off.
            link = entry.link if flags & LOWER_LINK else tree.path(int(first[row]))
            out.write(_header(replace(entry, link=link), b"1", _xattr_records(entry, []), mtime_ns))
            continue
        # What nobody wrote stays unwritten, or it would change the directory below. The root, too, is written only if it
        # says something: most tools leave it out, and few expect it.
        if not flags & IMPLIED or (row and not flags & OPAQUE and tree.ends[row] == row + 1):
            out.write(_header(entry, TYPES[entry.kind], _xattr_records(entry, losses), mtime_ns))
        if entry.kind == Kind.FILE and entry.size:
            _copy(content(row), entry, out)
        if flags & OPAQUE:
            path = entry.path + "/" + OPAQUE_NAME if entry.path else OPAQUE_NAME
            out.write(_header(Entry(path), b"0", {}, 0))
    # Two empty blocks end an archive; readers want more of them only where tapes are concerned.
    out.write(bytes(2 * BLOCK))


def _order(tree: Tree) -> Rows:
    """Rows in tree order, but the whiteouts of a directory before its other entries."""
    place = np.arange(len(tree))
    gone = np.flatnonzero(tree.kind == Kind.WHITEOUT)
    # Each goes to its directory's place; sorting is stable, and the directory itself comes first there.
    place[gone] = tree.parents[gone]
    return np.argsort(place, kind="stable")


def _copy(source: int | BinaryIO, entry: Entry, out: Writable) -> None:
    """The content of one file, padded to whole blocks."""
    left = entry.size
    with open(source, "rb", buffering=0) if isinstance(source, int) else source as file:
        while left > 0:
            data = file.read(min(CHUNK, left) + 1)  # one byte more shows a file that has grown
            if not data:
                raise InvalidLayer(f"{entry.path!r}: {entry.size - left} bytes where {entry.size} were announced")
            left -= len(data)
            out.write(data if left else data + bytes(-entry.size % BLOCK))
        # A file of ours has said so by now; another reader may have given less than there is.
        if left < 0 or (not isinstance(source, int) and file.read(1)):
            raise InvalidLayer(f"{entry.path!r}: more than the {entry.size} bytes that were announced")


def _xattr_records(entry: Entry, losses: Losses) -> dict[bytes, bytes]:
    records = {}
    for name, value in sorted(entry.xattrs.items()):
        for form in (WhiteoutFormat.OVERLAY, WhiteoutFormat.USERXATTR):
            if name in (form.xattr_prefix + REDIRECT, form.xattr_prefix + METACOPY):
                raise InvalidLayer(f"{entry.path!r}: {name}: resolve the overlay's marks before packing")
        if name in HOST_XATTRS:
            losses.append(Loss(entry.path, f"xattr {name}: belongs to the host"))
            continue
        if name == CAPABILITY:
            value = _capability_v2(entry, value, losses)
        records[b"SCHILY.xattr." + os.fsencode(_xattr_key(name))] = value
    return records


def _xattr_key(name: str) -> str:
    """`name` as GNU tar has it: a key ends at its first "=", and what looks escaped must be."""
    if "=" in name or "%3D" in name or "%25" in name:
        return name.replace("%", "%25").replace("=", "%3D")
    return name


def _capability_v2(entry: Entry, value: bytes, losses: Losses) -> bytes:
    """A file capability without the user namespace it was set in: version 3 names its root, which no other host has."""
    if len(value) == 24 and value[3] == 3:
        root = int.from_bytes(value[20:24], "little")
        if root:
            losses.append(Loss(entry.path, f"xattr {CAPABILITY}: valid only for user id {root}'s namespace, now for any"))
        return value[:3] + b"\x02" + value[4:20]
    return value


def _header(entry: Entry, kind: bytes, records: dict[bytes, bytes], mtime_ns: int) -> bytes:
    """The header blocks of one entry, a pax header before it where ustar has no room."""
    path = os.fsencode(entry.path or ".") + (b"/" if kind == b"5" else b"")
    link = os.fsencode(entry.link or "")
    prefix, name = _split(path)
    if name is None or _wants_pax(path):
        records = {b"path": path, **records}
        prefix, name = b"", path[:100]
    if len(link) > 100 or _wants_pax(link):
        records = {b"linkpath": link, **records}
        link = link[:100]
    numbers = {b"uid": entry.uid, b"gid": entry.gid, b"size": entry.size if kind == b"0" else 0}
    for key, value in numbers.items():
        if value >= (1 << 33 if key == b"size" else 1 << 21):
            records = {key: b"%d" % value, **records}
            numbers[key] = 0
    seconds, nanos = divmod(mtime_ns, 10**9)
    if nanos or not 0 <= seconds < 1 << 33:
        records = {b"mtime": _decimal(mtime_ns), **records}
        seconds = min(max(seconds, 0), (1 << 33) - 1)
    major, minor = (os.major(entry.rdev), os.minor(entry.rdev)) if kind in b"34" else (0, 0)
    if minor >= 1 << 21 or major >= 1 << 21:
        raise InvalidLayer(f"{entry.path!r}: device {major}:{minor} has no room in a tar")
    block = _block(
        name, entry.mode, numbers[b"uid"], numbers[b"gid"], numbers[b"size"], seconds, kind, link, major, minor, prefix
    )
    if not records:
        return block
    body = b"".join(_record(key, value) for key, value in sorted(records.items()))
    # Its name is for tools that do not know pax; time and mode are fixed, so that they add nothing to the digest.
    head = _block(b"PaxHeaders.0/" + name[-80:].strip(b"/"), 0o644, 0, 0, len(body), 0, b"x", b"", 0, 0, b"")
    return head + body + bytes(-len(body) % BLOCK) + block


def _wants_pax(name: bytes) -> bool:
    """Whether a name is text beyond ASCII: pax says UTF-8, ustar says nothing. Other bytes are safer as they are."""
    if name.isascii():
        return False
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split(path: bytes) -> tuple[bytes, bytes | None]:
    """ustar's prefix and name of `path`; (b"", None) if it does not fit."""
    if len(path) <= 100:
        return b"", path
    cut = path.find(b"/", max(len(path) - 101, 1))
    if cut < 0 or cut > 155 or cut == len(path) - 1:
        return b"", None
    return path[:cut], path[cut + 1 :]


def _block(
    name: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    kind: bytes,
    link: bytes,
    major: int,
    minor: int,
    prefix: bytes,
) -> bytes:
    head = struct.pack(
        "100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x",
        name,
        b"%07o\0" % mode,
        b"%07o\0" % uid,
        b"%07o\0" % gid,
        b"%011o\0" % size,
        b"%011o\0" % mtime,
        b" " * 8,
        kind,
        link,
        b"ustar\x0000",
        b"",
        b"",
        b"%07o\0" % major,
        b"%07o\0" % minor,
        prefix,
    )
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def _record(key: bytes, value: bytes) -> bytes:
    """A pax record, whose length counts its own digits."""
    bare = len(key) + len(value) + 3
    size = bare + len(str(bare))
    if len(str(size)) != len(str(bare)):
        size = bare + len(str(size))
    return b"%d %s=%s\n" % (size, key, value)


def _decimal(mtime_ns: int) -> bytes:
    """A pax time: seconds with as many decimals as needed, truncated nowhere."""
    sign, value = (b"-", -mtime_ns) if mtime_ns < 0 else (b"", mtime_ns)
    seconds, nanos = divmod(value, 10**9)
    text = b"%s%d" % (sign, seconds)
    return text + (b".%09d" % nanos).rstrip(b"0") if nanos else text
