"""An overlay whose upper has a limit, in bytes and in entries, where the file system has none to give: ENOSPC.

What is made through the overlay is counted before it is made. What is written through descriptors goes past it: that is
seen when upper is looked through again, at the next opening for writing. So the limit on bytes is a soft one: a file may
grow beyond it, but then nothing is made and no file opened for writing until something has gone.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from overlaykit.overlay.copyup import Upper
from overlaykit.overlay.nodes import Found, Node
from overlaykit.overlay.resolve import AnyPath, Last, names_path
from overlaykit.overlay.stack import fail
from overlaykit.overlay.writable import CHANGING, Overlay
from overlaykit.tree.table import StrPath

R = TypeVar("R")
Usage = Callable[[], tuple[int, int]]  # bytes and entries that upper has now
AT_ONCE = 64  # entries of upper for each of which an opening may go by unseen: looking again costs about 1 us each


class Account:
    """What upper has, as it was last looked through, and what was made since."""

    def __init__(self, usage: Usage, size: int | None, entries: int | None) -> None:
        """size, entries: the limits; None: no limit."""
        self._usage, self._size, self._entries = usage, size, entries
        self._reserved = 0
        self._lock = threading.Lock()
        self._look()

    def _look(self) -> None:
        self._bytes, self._made = self._usage()
        self._openings = 0

    def _is_full(self, size: int, entries: int) -> bool:
        over = self._size is not None and self._bytes + size > self._size
        return over or (self._entries is not None and self._made + self._reserved + entries > self._entries)

    def charge(self, size: int = 0, *, entries: int = 1) -> None:
        """Count what is about to be made. ENOSPC, only after a new look."""
        with self._lock:
            self._check(size, entries)
            self._bytes += size
            self._made += entries

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Room for one entry that is made during the `with` block, after others. ENOSPC."""
        with self._lock:
            self._check(0, 1)
            self._reserved += 1
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= 1
                self._made += 1

    def _check(self, size: int, entries: int) -> None:
        if self._is_full(size, entries):
            self._look()
            if self._is_full(size, entries):
                raise fail(errno.ENOSPC)

    def opening(self) -> None:
        """A file is about to be opened for writing. ENOSPC if there is no byte left."""
        if self._size is None:
            return
        with self._lock:
            self._openings += 1
            if self._openings > self._made // AT_ONCE or self._is_full(1, 0):
                self._look()
            if self._is_full(1, 0):
                raise fail(errno.ENOSPC)


class LimitedUpper(Upper):
    """An Upper that counts what it makes."""

    def __init__(self, upper: Upper, account: Account) -> None:
        super().__init__(upper.stack, upper.work, upper.origins, metacopy=upper.metacopy, sync=bool(upper.sync))
        self.account = account

    def copy_up_dir(self, node: Node) -> None:
        if node.upper_fd < 0 and node.parent is not None:
            self.copy_up_dir(node.parent)  # what is counted is made at once: a look in between would not see it
            self.account.charge()
        super().copy_up_dir(node)

    def _copy(
        self, node: Node, name: str, found: Found, to: int, base: str, record: bytes, data: bool, attributes: bool
    ) -> None:
        self.account.charge(found.st.st_blocks * 512 if data and stat.S_ISREG(found.st.st_mode) else 0)
        super()._copy(node, name, found, to, base, record, data, attributes)

    def make(self, node: Node, name: str, create: Callable[[int, str], R], *, directory: bool = False) -> R:
        self.copy_up_dir(node)
        self.account.charge()
        return super().make(node, name, create, directory=directory)

    def whiteout(self, node: Node, name: str, *, over: Found | None) -> None:
        if over is None:
            self.account.charge()
        super().whiteout(node, name, over=over)


class LimitedOverlay(Overlay):
    """An Overlay with a limit on what its upper holds. The short ways of Overlay, which count nothing, are not taken."""

    def __init__(
        self,
        lowers: Sequence[StrPath],
        upper: StrPath,
        work: StrPath,
        *,
        usage: Usage,
        size: int | None = None,
        entries: int | None = None,
        **options: Any,
    ) -> None:
        """usage: gives what upper has. size: bytes on disk; entries: of any kind, whiteouts too. options: of Overlay."""
        super().__init__(lowers, upper, work, **options)
        self._account = Account(usage, size, entries)
        self._upper = LimitedUpper(self._upper, self._account)

    @names_path
    def open_fd(self, path: AnyPath, flags: int, mode: int = 0o777) -> int:
        """As Overlay.open_fd; ENOSPC if the limit is reached, unless what is there is emptied."""
        if flags & CHANGING and not (flags & os.O_TRUNC and self.exists(path)):
            self._account.opening()
        return self._open(path, flags, mode)

    def rename(self, src: AnyPath, dst: AnyPath, *, flags: int = 0) -> None:
        """As Overlay.rename; a name that a lower gives leaves a whiteout, for which there has to be room."""
        if not self._leaves_whiteout(src):
            super().rename(src, dst, flags=flags)
            return
        try:
            with self._account.reserved():
                super().rename(src, dst, flags=flags)
        except OSError as e:
            e.filename, e.filename2 = os.fspath(src), os.fspath(dst)
            raise

    def _leaves_whiteout(self, path: AnyPath) -> bool:
        try:
            with self._lock:
                place = self._walk(path, parent=True)
                return place.found is not None and place.last is Last.NAME and self._covers(place.node, place.name)
        except OSError:  # rename says it again
            return False

    def _covers(self, node: Node, name: str) -> bool:
        return self._stack.find_lower(node, name) >= 0
