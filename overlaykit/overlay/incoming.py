"""The entries of a layer's tar, made on disk as their bytes go by; what has to wait for the others is left out."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from overlaykit._ext import extract, whiteout
from overlaykit.errors import InvalidLayer
from overlaykit.overlay.below import enter, open_directory, remove_tree, symlink_target, umask_at
from overlaykit.overlay.tails import SparseTail, Tail
from overlaykit.tree.losses import Loss, Losses
from overlaykit.tree.regular import LONGEST_PATH, MAX_LINKS
from overlaykit.tree.sparse import sparse_map, sparse_rows, sparse_size
from overlaykit.tree.table import Kind, Strings, Tree
from overlaykit.tree.tarball import LINK, TableBuilder, Window

CHAR, BLOCK = int(Kind.CHAR), int(Kind.BLOCK)  # Python 3.11 takes long to look them up


class Incoming:
    """Makes entries below the directory root_fd: all but hard links, whiteouts, and devices that this user may not make.

    Modes, owners and times are those of the tar, but for directories', which go on changing. losses: gets what was left out.
    """

    def __init__(self, root_fd: int, losses: Losses) -> None:
        self.root_fd = root_fd
        self.losses = losses
        self.me, self.mine = os.geteuid(), os.getegid()
        self.umask = umask_at(root_fd)
        self.builder = TableBuilder()
        self.tail: Tail | None = None  # the file whose content goes on in the next window

    @cached_property
    def makes_devices(self) -> bool:
        """Whether devices can be made here: tried, since root of a user namespace may not, nor anybody everywhere."""
        if self.me != 0:
            return False
        probe = f".{uuid.uuid4().hex}"
        try:
            os.mknod(probe, stat.S_IFCHR, os.makedev(1, 3), dir_fd=self.root_fd)
        except PermissionError:
            return False
        os.unlink(probe, dir_fd=self.root_fd)
        return True

    def make(self, windows: Iterable[Window]) -> Tree:
        """The table of all entries, in the order of the tar, once those that could be are on disk."""
        for window in windows:
            self._add(window)
        assert self.tail is None, "the reader ended inside a file"
        return self.builder.table()

    def close(self) -> None:
        """Close the file that was not whole yet when something went wrong."""
        if self.tail is not None:
            os.close(self.tail.fd)

    def _add(self, window: Window) -> None:
        if window.first and self.tail is not None:
            self.tail = self.tail.feed(window.buffer[: window.first], self)
        sparse = {row: sparse_size(window, row) for row in sparse_rows(window)}
        rows = window.rows
        marks = np.zeros(len(rows), np.uint8)
        whiteout.classify(window.paths.arena, window.paths.start, marks)
        skip = ((marks != 0) | (rows["kind"] == LINK)).astype(np.uint8)
        skip[list(sparse)] = 1
        self._refuse_devices(window, skip)
        self.builder.add(window, sparse)
        if self.me != 0:  # the tree keeps the owners; the disk cannot
            rows["uid"], rows["gid"] = self.me, self.mine
        # Sparse files in their turn, not after the others: of two entries for one path the later counts.
        at = 0
        for row in [row for row in sparse if marks[row] == 0]:
            before = skip.copy()
            before[row:] = 1
            self.create(window, before, at)
            self._create_sparse(window, row, sparse[row])
            at = row + 1
        self.create(window, skip, at)

    def _refuse_devices(self, window: Window, skip: npt.NDArray[np.uint8]) -> None:
        rows = window.rows
        is_char, is_block = rows["kind"] == CHAR, rows["kind"] == BLOCK
        if not (is_char.any() or is_block.any()):
            return
        refused = is_char & (rows["rdev"] == 0) if self.makes_devices else is_char | is_block
        for row in (refused & (skip == 0)).nonzero()[0].tolist():
            skip[row] = 1
            rdev = int(rows["rdev"][row])
            why = "only root can make devices" if rdev else "on disk it would be a whiteout"
            name = f"device {os.major(rdev)}:{os.minor(rdev)}"
            self.losses.append(Loss(os.fsdecode(window.paths[row]), f"{name}: not made: {why}"))

    def create(self, window: Window, skip: npt.NDArray[np.uint8], at: int = 0) -> None:
        """Make the entries from row `at` on, but those to skip."""
        rows = window.rows
        raw = rows.view(np.uint8).reshape(-1)
        while True:
            at, failed, fd = extract.create(
                self.root_fd,
                window.buffer,
                raw,
                window.paths.arena,
                window.links.arena,
                skip,
                at,
                self.me,
                self.mine,
                self.umask,
            )
            if fd >= 0:
                self._follow(fd, window, len(rows) - 1)
            if not failed:
                return
            if failed == errno.EEXIST:
                if not self.make_room(window.paths[at], is_dir=rows["kind"][at] == Kind.DIR):
                    at += 1  # a directory that is there already
            elif failed == errno.ENOTDIR:
                self._create_where_it_leads(window, at)
                at += 1
            else:
                raise OSError(failed, os.strerror(failed), os.fsdecode(window.paths[at]))

    def _follow(self, fd: int, window: Window, row: int) -> None:
        """Keep `fd`, the last file of the window, for the content that is still to come."""
        entry = window.rows[row]
        self.tail = Tail(fd, int(entry["size"]) - int(entry["here"]), window.paths[row], entry)

    def make_room(self, path: bytes, *, is_dir: bool) -> bool:
        """Take away what an earlier entry made at `path`. False if it is a directory and shall be one."""
        parent, _, name = path.rpartition(b"/")
        fd = open_directory(self.root_fd, parent)
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=fd)
            elif is_dir:
                return False
            else:
                remove_tree(fd, name)
            return True
        finally:
            os.close(fd)

    def _create_where_it_leads(self, window: Window, row: int) -> None:
        """Make an entry whose parents are symlinks of this layer at the place to which they lead, inside the root."""
        path, link = window.paths[row], window.links[row]
        moved = self._where_it_leads(path)
        one = window.rows[row : row + 1].copy()
        one["path_end"], one["link_end"] = len(moved), len(link)
        alone = Window(one, Strings.of([moved]), Strings.of([link]), window.buffer, 0)
        self.create(alone, np.zeros(1, np.uint8))

    def _where_it_leads(self, path: bytes) -> bytes:
        """`path` with the symlinks followed that stand in its way on disk by now: the root is the top, '..' stops there.

        Directories that are not there are as good as any. InvalidLayer for a path that leads through a file.
        """
        parent, _, name = path.rpartition(b"/")
        done: list[bytes] = []
        unmade = hops = 0  # unmade: how many of `done`, at its end, are not there
        todo = parent.split(b"/")[::-1]
        here = open_directory(self.root_fd, b"")
        try:
            while todo:
                part = todo.pop()
                if part in (b"", b".") or (part == b".." and not done):
                    continue
                if unmade:
                    unmade += -1 if part == b".." else 1
                elif (there := enter(here, part)) is not None:
                    os.close(here)
                    here = there
                elif (target := symlink_target(here, part)) is None:
                    unmade = 1
                else:
                    hops += 1
                    if hops > MAX_LINKS or sum(map(len, done)) > LONGEST_PATH:
                        raise InvalidLayer(f"{os.fsdecode(path)!r}: too many symlinks on the way")
                    if target.startswith(b"/"):
                        os.close(here)
                        here = -1
                        here = open_directory(self.root_fd, b"")
                        done = []
                    todo += target.split(b"/")[::-1]
                    continue
                if part == b"..":
                    done.pop()
                else:
                    done.append(part)
        except NotADirectoryError:
            raise InvalidLayer(f"{os.fsdecode(path)!r} lies under an entry that is not a directory") from None
        finally:
            if here >= 0:
                os.close(here)
        return b"/".join([*done, name])

    def _create_sparse(self, window: Window, row: int, size: int) -> None:
        entry = window.rows[row]
        path = self._where_it_leads(window.paths[row])
        one = window.rows[row : row + 1].copy()
        # An empty file first, by the same way as any other, and ours to open; then its pieces, each in its place.
        one["size"], one["here"], one["path_end"], one["link_end"], one["mode"] = 0, 0, len(path), 0, 0o600
        one["uid"], one["gid"] = self.me, self.mine
        self.create(Window(one, Strings.of([path]), Strings.of([b""]), window.buffer, 0), np.zeros(1, np.uint8))
        pieces = sparse_map(window, row)
        parent, _, name = path.rpartition(b"/")
        folder = open_directory(self.root_fd, parent)
        try:
            fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
        self.tail = SparseTail(fd, int(entry["size"]), path, entry, pieces, size)
        begin, here = int(entry["data"]), int(entry["here"])
        self.tail = self.tail.feed(window.buffer[begin : begin + here], self)
