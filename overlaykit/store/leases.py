"""Leases: what a running operation needs from being collected, and what a killed one left to be cleared away.

A lease is a file in ROOT/leases, flocked by its holder, with a line for each thing that the operation is about to make or
to rely on:

    sha256:...          a blob, or a committed snapshot of that name (a chain_id)
    snapshots/ID        a directory; snapshots/ID/work, snapshots/ID/tree: one in it
    created-from/HEX    an image, by its manifest, of which a container is being made
    volumes/NAME        a volume that is being used; volumeleft.py has more words for what becomes of volumes

The line is written before the thing is made. So a file that can be locked belongs to a dead operation, and its lines are
all that it can have left behind. Before a row goes, or files are made, of which after a power cut nobody else would know
what they are, the line is on disk too. Files, and no rows: a lock that the kernel lets go of needs no expiry, and an
operation that fails leaves the database as it was, to the byte.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from overlaykit.errors import OverlaykitError
from overlaykit.oci.durable import sync_directory, write_all
from overlaykit.store.reserve import give_up_if_full

logger = logging.getLogger(__name__)
LOCK = "lock"  # flocked shared while a line is added, exclusively while things are collected


class Lease:
    """What one operation holds. Any number of threads may add to it."""

    def __init__(self, folder: Path, name: str, fd: int) -> None:
        self._folder, self.name, self._fd = folder, name, fd
        self._postponed = False
        self._lock = threading.Lock()
        if os.fstat(fd).st_size:
            os.ftruncate(fd, len(read_lines(fd)))  # what is added must not go on with half a line of a dead holder

    def add(self, *things: str) -> None:
        """Hold `things` from now on. What is there afterwards stays: look for it after this, not before.

        Waits for a collection that is under way, which may just be taking one of them. Not to be called in a transaction.
        """
        with exclusion(self._folder, shared=True):
            self.note(*things)

    def note(self, *things: str) -> None:
        """As add, for the collector, which has the lock; and in a transaction, for what its rows keep until the end."""
        lines = "".join(f"{thing}\n" for thing in things).encode()
        with self._lock:
            before = os.fstat(self._fd).st_size
            try:
                write_all(self._fd, self._folder / self.name, memoryview(lines))
            except BaseException:
                os.ftruncate(self._fd, before)  # or the next would go on with half a line
                raise

    def sync(self) -> None:
        """Let what it names so far survive a power cut. Before a change after which only it knows of something."""
        os.fsync(self._fd)
        sync_directory(self._folder)

    def things(self) -> set[str]:
        return read_things(self._fd)

    def forget(self) -> None:
        os.truncate(self._fd, 0)

    def postpone(self, things: set[str]) -> None:
        """At the end leave `things` to be cleared away by somebody else.

        What it held before it goes on holding then: between taking lines out and writing others a kill would lose them.
        """
        self._postponed = bool(things)
        if things:
            self.note(*(things - self.things()))
        else:
            self.forget()

    def keep(self, things: set[str]) -> None:
        """Leave `things` to be cleared away by somebody else, beside what was postponed."""
        self.note(*things)
        self._postponed = self._postponed or bool(things)

    def end(self) -> None:
        """Let go of everything."""
        if not self._postponed:
            (self._folder / self.name).unlink(missing_ok=True)
        self.abandon()

    def abandon(self) -> None:
        """Leave the file behind as a killed operation would."""
        os.close(self._fd)


class Leases:
    """The leases of one store."""

    def __init__(self, folder: Path, clear: Callable[[Lease], object]) -> None:
        """folder: ROOT/leases. clear: removes what a lease names and nobody else needs."""
        self.folder = folder
        self._clear = clear

    @contextmanager
    def hold(self, name: str = "") -> Iterator[Lease]:
        """A new lease for a `with` block; an error in it clears away what the operation made.

        name: waits until nobody else holds a lease of that name, so it is a lock as well.
        """
        lease = self._take(name or secrets.token_hex(8))
        try:
            if lease.things():  # of a holder of the same name that died
                self._clear(lease)
            yield lease
        except BaseException:
            self._release(lease)
            raise
        lease.end()

    def recover(self) -> None:
        """Clear away what operations left that were killed."""
        for name, fd in self._files():
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue
            if os.fstat(fd).st_nlink:
                self._release(Lease(self.folder, name, fd))
            else:
                os.close(fd)  # its holder has just ended it

    def held(self, besides: Lease, also: Lease | None = None) -> set[str]:
        """Everything that anybody holds now, but for these. To be asked under `exclusion`."""
        own = {lease.name for lease in (besides, also) if lease is not None}
        things: set[str] = set()
        for name, fd in self._files():
            try:
                if name not in own:
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # fails while it is held
            except BlockingIOError:
                things |= read_things(fd)
            finally:
                os.close(fd)
        return things

    def wait(self, thing: str) -> bool:
        """Whether somebody alive held `thing`, and no longer does."""
        waited = False
        for _, fd in self._files():
            try:
                if thing in read_things(fd):
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                fcntl.flock(fd, fcntl.LOCK_SH)
            finally:
                os.close(fd)
        return waited

    def _take(self, name: str) -> Lease:
        give_up_if_full(self.folder.parent)
        while True:
            fd = os.open(f"{self.folder}/{name}", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if os.fstat(fd).st_nlink:
                    return Lease(self.folder, name, fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # it was ended, or cleared away, before we had the lock

    def _release(self, lease: Lease) -> None:
        """Clear away what was made under `lease`, and end it. If that fails it stays, dead, for the next to try."""
        try:
            if lease.things():
                self._clear(lease)
        except (OSError, OverlaykitError) as e:
            logger.warning("could not clear away all that an operation left: %s", e)
            lease.abandon()
        else:
            lease.end()

    def _files(self) -> Iterator[tuple[str, int]]:
        for name in os.listdir(self.folder):
            if name != LOCK:
                try:
                    fd = os.open(f"{self.folder}/{name}", os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                yield name, fd


def read_things(fd: int) -> set[str]:
    return set(read_lines(fd).decode().split("\n")[:-1])


def read_lines(fd: int) -> bytes:
    """The whole lines: one that its writer could not finish names nothing that was made."""
    content = os.pread(fd, os.fstat(fd).st_size, 0)
    return content[: content.rfind(b"\n") + 1]


@contextmanager
def exclusion(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep collections and additions to leases apart."""
    fd = os.open(f"{folder}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
