"""A tar stream at one end of a copy. What comes in is whoever's who sent it, and is put down as it goes by; what goes out is
as `docker cp` writes it, with all xattrs."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

from overlaykit.errors import InvalidLayer
from overlaykit.oci.streams import decompressed
from overlaykit.overlay.osnames import OsNames, join
from overlaykit.overlay.tails import SparseTail, write_all
from overlaykit.store.items import Advance, Item, excluded, open_file
from overlaykit.tree import Entry, Kind, Losses, from_entries, regular, write_tar
from overlaykit.tree.regular import normal_target
from overlaykit.tree.sparse import sparse_map, sparse_rows, sparse_size
from overlaykit.tree.tarball import LINK, TarReader, Window, xattrs_of


def read(stream: BinaryIO, exclude: tuple[str, ...], advance: Advance, *, root: bool = False) -> Iterator[Item]:
    """The entries of a tar, which may be compressed, each to be put down before the next is asked for.

    root: that of the root too, whose attributes are the tar's to set then.

    InvalidLayer (UnsafePath for "..") for what is no tar, also when all that could be read has been given.
    """
    reader = _Windows(_Plain(decompressed(stream, what="the tar")), advance)
    while (window := reader.window) is not None:
        sparse = set(sparse_rows(window))
        for row in range(len(window.rows)):
            path = os.fsdecode(window.paths[row])
            if (path and not excluded(path, exclude)) or (root and not path):
                yield _item(reader, window, row, path, is_sparse=row in sparse)
        if reader.window is window:
            reader.advance()


class _Plain:
    """Pieces of bytes as a stream that a TarReader takes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


class _Windows:
    """The windows of a tar; `window` is the one that may be looked at, None at the end."""

    def __init__(self, stream: _Plain, advance: Advance) -> None:
        self._windows, self._tell = iter(TarReader(stream)), advance
        self.window: Window | None = None
        self.advance()

    def advance(self) -> None:
        self.window = next(self._windows, None)

    def content(self, row: int) -> Iterator[memoryview]:
        """What the window's `row` has for content, piece by piece; that of its last row goes on in the windows behind."""
        assert self.window is not None
        entry = self.window.rows[row]
        begin, here, left = int(entry["data"]), int(entry["here"]), int(entry["size"])
        piece = self.window.buffer[begin : begin + here]
        while True:
            yield piece
            self._tell(len(piece))
            left -= len(piece)
            if left <= 0:
                return
            self.advance()
            if self.window is None:
                raise InvalidLayer("the tar ends inside a file")
            piece = self.window.buffer[: self.window.first]


def _item(windows: _Windows, window: Window, row: int, path: str, *, is_sparse: bool) -> Item:
    entry = window.rows[row]
    size = sparse_size(window, row) if is_sparse else int(entry["size"])
    kind = Kind.FILE if entry["kind"] == LINK else Kind(int(entry["kind"]))
    target = os.fsdecode(window.links[row]) if kind == Kind.SYMLINK else None
    named = Entry(
        path,
        kind,
        mode=int(entry["mode"]),
        uid=int(entry["uid"]),
        gid=int(entry["gid"]),
        size=size if kind == Kind.FILE else 0,
        mtime_ns=int(entry["mtime_ns"]),
        rdev=int(entry["rdev"]),
        link=target,
        xattrs=xattrs_of(window.records(row)),
    )
    if entry["kind"] == LINK:
        return Item(named, link=os.fsdecode(normal_target(window.links[row])))
    if is_sparse:
        pieces = sparse_map(window, row)
        raw = entry.copy()

        def fill_sparse(fd: int) -> None:
            tail = SparseTail(fd, int(raw["size"]), b"", raw, pieces, size)
            for data in windows.content(row):
                tail.left -= len(data)
                tail.write(data)
            tail.complete()

        return Item(named, fill_sparse)

    def fill(fd: int) -> None:
        for data in windows.content(row):
            write_all(fd, data)

    return Item(named, fill)


def write(fs: OsNames, top: str, name: str, items: Sequence[Item], out: BinaryIO, losses: Losses, advance: Advance) -> None:
    """Write the items of `top` to `out` as a tar under `name`, "" for its contents alone."""
    firsts = {link: number for number, link in enumerate(sorted({item.link for item in items if item.link is not None}))}
    tree = regular(
        from_entries(
            replace(
                item.entry,
                path=posixpath.join(name, item.entry.path).rstrip("/"),
                # In a store that is not root's all files on disk are the user's; as root's they would be root's.
                uid=0 if item.entry.uid == os.geteuid() else item.entry.uid,
                gid=0 if item.entry.gid == os.getegid() else item.entry.gid,
                hardlink=firsts.get(item.entry.path if item.link is None else item.link, -1),
            )
            for item in items
        )
    )

    def content(row: int) -> int:
        path = tree.path(row)
        advance(int(tree.size[row]))
        relative = path[len(name) :].lstrip("/") if name else path
        return open_file(fs, join(top, relative) if relative else top)

    write_tar(tree, content, out, losses=losses)
    out.flush()
