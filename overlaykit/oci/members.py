"""Members of a tar archive on disk, found without unpacking it: the outer tar of docker-archives and OCI archives.

Its writer may be hostile, so nothing is believed: headers must have the right checksum, members must lie within the
file, links stay within the archive, and only regular members have content.
"""

from __future__ import annotations

import io
import os
import posixpath
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overlaykit.errors import InvalidImage, NotFound
from overlaykit.oci.digest import shown
from overlaykit.oci.streams import is_tar_header

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK = 512
MAX_HEADER = 1 << 20  # bytes of one extended header or long name; a path has 4096 at most
MAX_MEMBERS = 1 << 20  # an image's archive has a few dozen, a root file system's that someone took for one 100,000
MAX_LINKS = 40  # symlinks followed for one name, as the kernel does


@dataclass(frozen=True, slots=True)
class Member:
    """A member's content at `offset`, `size` bytes of it; or what it links to, from the archive's root."""

    offset: int
    size: int
    link: str | None = None


class Members:
    """The members of the tar that is open as `fd`, which is owned: closed by `close`, or when nobody holds this any
    more.

    Reading is positional, so any number of threads may read any members at once.
    """

    def __init__(self, fd: int, what: str) -> None:
        self.what = what
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        self._end = os.fstat(fd).st_size
        try:
            self._members = dict(self._scan())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._close()

    def __contains__(self, name: str) -> bool:
        return _normal(name) in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def find(self, name: str) -> Member:
        """The regular member that `name` is or leads to. NotFound; InvalidImage for a link that leads nowhere."""
        at = _normal(name)
        for _ in range(MAX_LINKS):
            member = self._members.get(at) if at is not None else None
            if member is None:
                break
            if member.link is None:
                return member
            at = _normal(member.link)
        else:
            raise InvalidImage(f"{self.what}: {shown(name)} is a link that leads in a circle")
        if at == _normal(name):
            raise NotFound(f"{self.what} has no member {shown(name)}")
        raise InvalidImage(f"{self.what}: {shown(name)} is a link to something that is not in the archive")

    def open(self, name: str) -> MemberReader:
        """The content of the member that `name` leads to. NotFound."""
        member = self.find(name)
        return MemberReader(self, member.offset, member.size)

    def read(self, name: str, *, limit: int) -> bytes:
        """All of a small member. NotFound; InvalidImage beyond `limit` bytes."""
        member = self.find(name)
        if member.size > limit:
            raise InvalidImage(f"{self.what}: {shown(name)} has {member.size:,} bytes, more than {limit:,}")
        return self.pread(member.size, member.offset)

    def pread(self, n: int, offset: int) -> bytes:
        """`n` bytes at `offset`. InvalidImage if the file ends before."""
        if not self._close.alive:
            raise ValueError(f"{self.what} was closed")
        parts = []
        while n:
            part = os.pread(self._fd, n, offset)
            if not part:
                raise InvalidImage(f"{self.what}: cut off at byte {offset:,}")
            parts.append(part)
            n -= len(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _scan(self) -> Iterator[tuple[str, Member]]:
        """Name and member, in the archive's order: of two with one name the later counts, as in tar."""
        at = count = 0
        long: dict[str, str] = {}  # what a GNU long name or PAX header says of the next member
        while at < self._end:
            if self._end - at < BLOCK:
                raise InvalidImage(f"{self.what}: cut off at byte {self._end:,}, within a tar header")
            header = self.pread(BLOCK, at)
            if not header.strip(b"\0"):
                return
            if not is_tar_header(header):
                raise InvalidImage(
                    f"{self.what}: " + ("no tar archive" if at == 0 else f"damaged tar header at byte {at:,}")
                )
            kind = header[156:157]
            # A directory, link or device has no content, whatever its size says (as Go's archive/tar has it).
            size = 0 if kind in b"123456" else self._size(header, long)
            name = long.get("path", "")
            begin, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
            if begin + size > self._end:
                raise InvalidImage(
                    f"{self.what}: cut off: a member ends at byte {begin + size:,}, the file at {self._end:,}"
                )
            if kind in b"LKxg":
                if size > MAX_HEADER:
                    raise InvalidImage(f"{self.what}: a tar header of {size:,} bytes at byte {begin - BLOCK:,}")
                content = self.pread(size, begin)
                if kind in b"LK":
                    long["path" if kind == b"L" else "linkpath"] = _text(content.split(b"\0")[0])
                elif kind == b"x":
                    long |= self._pax(content)
                continue
            name = name or _text(_header_name(header))
            link = long.get("linkpath") or _text(header[157:257].split(b"\0")[0])
            long = {}
            normal = _normal(name)
            count += 1
            if count > MAX_MEMBERS:
                raise InvalidImage(f"{self.what}: more than {MAX_MEMBERS:,} members")
            if not normal:
                continue
            if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
                yield normal, Member(begin, size)
            elif kind == b"1":
                yield normal, Member(begin, 0, link)
            elif kind == b"2":
                yield (
                    normal,
                    Member(begin, 0, link if link.startswith("/") else posixpath.join(posixpath.dirname(normal), link)),
                )
            elif kind == b"S":
                raise InvalidImage(f"{self.what}: {shown(name)} is stored as a sparse file, which no image archive has")

    def _size(self, header: bytes, long: dict[str, str]) -> int:
        if "size" in long:
            text = long["size"].encode()
            return self._number(text if text.isdigit() else b"x", 10)
        raw = header[124:136]
        if raw[0] == 0x80:  # GNU's base 256
            return int.from_bytes(raw[1:], "big")
        return self._number(raw.strip(b" \0") or b"0", 8)

    def _number(self, text: bytes, base: int) -> int:
        try:
            value = int(text, base) if len(text) < 24 and text.isdigit() else -1
        except ValueError:
            value = -1
        if value < 0:
            raise InvalidImage(f"{self.what}: a tar header with a size that is no number")
        return value

    def _pax(self, content: bytes) -> dict[str, str]:
        """What an extended header says of path, linkpath and size (POSIX pax, "pax Extended Header")."""
        out, at = {}, 0
        while at < len(content):
            length, space, _ = content[at : at + 24].partition(b" ")
            n = self._number(length, 10) if space else 0
            key, equals, value = content[at + len(length) + 1 : at + n - 1].partition(b"=")
            if n < len(length) + 3 or at + n > len(content) or not equals:
                raise InvalidImage(f"{self.what}: a damaged extended tar header")
            if key in (b"path", b"linkpath", b"size"):
                out[key.decode()] = _text(value)
            elif key.startswith(b"GNU.sparse."):
                raise InvalidImage(f"{self.what}: a member is stored as a sparse file, which no image archive has")
            at += n
        return out


class MemberReader(io.RawIOBase):
    """The content of one member. Keeps the archive open as long as it is."""

    def __init__(self, members: Members, offset: int, size: int) -> None:
        super().__init__()
        self.size = size
        self._members, self._at, self._end = members, offset, offset + size

    def readable(self) -> bool:
        return True

    def read(self, n: int | None = -1, /) -> bytes:
        left = self._end - self._at
        n = left if n is None or n < 0 else min(n, left)
        data = self._members.pread(n, self._at) if n else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _normal(name: str) -> str | None:
    """The name as members are kept: relative, no "." or ".."; None if it leaves the archive."""
    path = posixpath.normpath("/" + name).lstrip("/")
    # normpath stops ".." at the root, so a name that would climb out has to be looked for
    depth = 0
    for part in name.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return None
    return path
