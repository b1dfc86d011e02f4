"""Files of a tar whose content comes in pieces: longer than a window, or with holes."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np

from overlaykit._ext import extract
from overlaykit.errors import InvalidLayer
from overlaykit.tree.sparse import Pieces


class HasTail(Protocol):
    """Who makes the files: the ids that new ones get by themselves, and the one that is not whole yet."""

    me: int
    mine: int
    tail: Tail | None


class Tail:
    """A file whose content comes in pieces."""

    def __init__(self, fd: int, left: int, path: bytes, entry: np.void) -> None:
        self.fd = fd
        self.left = left
        self.path = path
        self.attributes = int(entry["mode"]), int(entry["uid"]), int(entry["gid"]), int(entry["mtime_ns"])

    def feed(self, data: memoryview, application: HasTail) -> Tail | None:
        """Write the next piece; None, and the file closed with all its attributes, when it was the last.

        It must be the application's tail: whatever goes wrong, it is closed there.
        """
        self.left -= len(data)
        try:
            self.write(data)
            if self.left > 0:
                return self
            failed = self.end(application)
            if failed:
                raise OSError(failed, os.strerror(failed))
            application.tail = None
            os.close(self.fd)
        except OSError as e:
            raise OSError(e.errno, e.strerror, os.fsdecode(self.path)) from None
        except InvalidLayer as e:
            raise InvalidLayer(f"{os.fsdecode(self.path)!r}: {e}") from None
        return None

    def write(self, data: memoryview) -> None:
        write_all(self.fd, data)

    def end(self, application: HasTail) -> int:
        failed: int = extract.finish(self.fd, *self.attributes, application.me, application.mine)
        return failed


class SparseTail(Tail):
    """The same with holes: `pieces` says where the content goes; None: it stands in front of the content."""

    def __init__(
        self, fd: int, left: int, path: bytes, entry: np.void, pieces: list[tuple[int, int]] | None, size: int
    ) -> None:
        super().__init__(fd, left, path, entry)
        self.pieces = Pieces(pieces)
        self.size = size

    def write(self, data: memoryview) -> None:
        for offset, part in self.pieces.place(data):
            os.lseek(self.fd, offset, os.SEEK_SET)
            write_all(self.fd, part)

    def complete(self) -> None:
        """Give the file its size, all content being there. InvalidLayer if it is not."""
        self.pieces.complete()
        os.ftruncate(self.fd, self.size)

    def end(self, application: HasTail) -> int:
        self.complete()
        return super().end(application)


def write_all(fd: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(fd, data) :]
