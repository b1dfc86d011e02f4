"""Both cores at work on one layer: a blob is read, hashed and decompressed in a thread of its own while the caller
works on what came out of it; and the other way round, a tar is compressed, hashed and written in one while the caller
makes it.

hashlib, isal, zstandard and file reads all let go of the GIL. A short bounded queue between the two keeps memory flat:
DEPTH pieces of about 1 MiB.
"""

from __future__ import annotations

import io
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from overlaykit.errors import DigestMismatch, IntegrityError, InvalidLayer, OverlaykitError
from overlaykit.oci.digest import CHUNK, Digest, DigestingReader, Readable, VerifyingReader, hasher
from overlaykit.oci.streams import Compression, Compressor, decompressed

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

DEPTH = 4  # pieces in the queue: enough to ride out a slow file creation, little enough to stay in cache

T = TypeVar("T")


class _Queue(Generic[T]):
    """A bounded queue of two threads that either end can close, the sender also with an error."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition(threading.Lock())

    def put(self, item: T) -> bool:
        """Whether the receiver still wants more."""
        with self._changed:
            while len(self._items) >= DEPTH and not self._stopped:
                self._changed.wait()
            if not self._stopped:
                self._items.append(item)
                self._changed.notify()
            return not self._stopped

    def get(self) -> T | None:
        """The next item, None after the last. Raises the sender's error in its place."""
        with self._changed:
            while not self._items and not self._ended and not self._stopped:
                self._changed.wait()
            if self._items:
                item = self._items.popleft()
                self._changed.notify()
                return item
            if self._error is not None:
                raise self._error
            return None

    def end(self, error: BaseException | None = None) -> None:
        """By the sender: nothing more comes."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def stop(self) -> None:
        """By the receiver: nothing more is wanted."""
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()


class LayerStream(io.RawIOBase):
    """The uncompressed bytes of a layer's blob, read ahead by a thread.

    blob       where the compressed bytes come from; owned, and closed
    expected   the blob's digest, and its size in bytes; None: whatever it has
    diff_id    the digest of the uncompressed bytes; None: whatever they have
    max_size   uncompressed bytes at most, else InvalidLayer: the guard against decompression bombs

    Whoever reads to the end (`drain`) has it all verified: DigestMismatch and SizeMismatch come in place of the end.
    Afterwards `digest`, `size`, `diff_id`, `uncompressed_size` and `compression` say what was read. Closing early
    stops the thread. A stream belongs to one reader at a time, and does not outlive a fork.
    """

    def __init__(
        self,
        blob: Readable,
        *,
        expected: Digest | None = None,
        expected_size: int | None = None,
        diff_id: Digest | None = None,
        max_size: int | None = None,
        what: str = "layer",
    ) -> None:
        super().__init__()
        self.uncompressed_size = 0
        self.compression = ""
        self._expected_diff_id = diff_id
        self._max_size = max_size
        self._what = what
        self._rest = memoryview(b"")
        self._at_end = self._collected = False
        self._error: Exception | None = None
        self._hash = hasher(diff_id.algorithm if diff_id is not None else "sha256")
        self._algorithm = diff_id.algorithm if diff_id is not None else "sha256"
        self._source: DigestingReader
        if expected is not None:
            self._source = VerifyingReader(blob, expected, expected_size, what=what)
        else:
            self._source = DigestingReader(blob)
        self._queue: _Queue[bytes] = _Queue()
        state = _State(self._source, self._queue, what, checked=diff_id is not None)
        self._state = state
        # Daemonic, since the thread may be waiting for a pipe when the interpreter ends; it holds no reference to
        # this object, so that a forgotten stream is collected and closed.
        self._thread = threading.Thread(target=_read_ahead, args=(state,), name="overlaykit-decompress", daemon=True)
        self._thread.start()

    @property
    def digest(self) -> Digest:
        """Of the blob, once the end was read."""
        return self._source.digest

    @property
    def size(self) -> int:
        """Bytes of the blob, once the end was read."""
        return self._source.size

    @property
    def diff_id(self) -> Digest:
        """Of the uncompressed bytes, once the end was read."""
        if self._is_plain:
            return self._source.digest
        return Digest(f"{self._algorithm}:{self._hash.hexdigest()}")

    @property
    def _is_plain(self) -> bool:
        """Whether the blob's digest is the diff_id too, so that nothing need be hashed twice."""
        return self.compression == "none" and self._source.algorithm == self._algorithm

    def readable(self) -> bool:
        return True

    def read1(self, n: int = -1, /) -> bytes:
        """The next piece as it comes, without a copy: up to about 1 MiB, `n` bytes at most; b"" at the end."""
        if not self._rest:
            piece = self._next()
            if n < 0 or len(piece) <= n:
                return piece
            self._rest = memoryview(piece)
        out = self._rest if n < 0 else self._rest[:n]
        self._rest = self._rest[len(out) :]
        return bytes(out)

    def read(self, n: int | None = -1, /) -> bytes:
        """`n` bytes, fewer only at the end; all that is left for -1."""
        if n is None or n < 0:
            return self.readall()
        out = self.read1(n)
        if len(out) == n or not out:
            return out
        parts, have = [out], len(out)
        while have < n and (out := self.read1(n - have)):
            parts.append(out)
            have += len(out)
        return b"".join(parts)

    def readall(self) -> bytes:
        return b"".join(iter(self.read1, b""))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Bytes put into `buffer`: as many as fit, fewer only at the end."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view):
            if not self._rest:
                self._rest = memoryview(self._next())
                if not self._rest:
                    break
            piece = self._rest[: len(view) - done]
            view[done : done + len(piece)] = piece
            self._rest = self._rest[len(piece) :]
            done += len(piece)
        return done

    def drain(self) -> None:
        """Read what is left, and so verify all of it."""
        self._rest = memoryview(b"")
        while self._next():
            pass

    def close(self) -> None:
        """Stop the thread and close the blob, whatever was read."""
        if self.closed:
            return
        super().close()
        if sys.is_finalizing():
            return  # the interpreter has stopped the thread for good, maybe with the queue's lock in its hands
        self._queue.stop()
        self._rest = memoryview(b"")
        if not self._collected:
            self._thread.join()

    def __del__(self) -> None:
        self._collected = True  # the thread ends by itself: the garbage collector need not wait for what it reads
        super().__del__()

    def _next(self) -> bytes:
        """The next piece, hashed; b"" at the end, once everything was verified."""
        if self.closed:
            raise ValueError("read of a closed layer stream")
        if self._error is not None:
            raise self._error
        if self._at_end:
            return b""
        try:
            return self._take()
        except Exception as e:  # not KeyboardInterrupt, after which reading may go on
            self._error = e
            raise

    def _take(self) -> bytes:
        piece = self._queue.get()
        self.compression = self._state.compression
        if piece is None:
            self._verify()
            self._at_end = True
            return b""
        self.uncompressed_size += len(piece)
        if self._max_size is not None and self.uncompressed_size > self._max_size:
            raise InvalidLayer(
                f"{self._what}: unpacks to more than the {self._max_size:,} bytes allowed",
                hint="raise the limit if you trust it",
            )
        if not self._is_plain:
            self._hash.update(piece)
        return piece

    def _verify(self) -> None:
        want = self._expected_diff_id
        if want is not None and self.diff_id != want:
            raise DigestMismatch(
                f"{self._what}: unpacks to {self.diff_id}, the image's config says diff_id {want}",
                expected=want,
                actual=self.diff_id,
            )


class _State:
    """What the reading thread has."""

    def __init__(self, source: DigestingReader, queue: _Queue[bytes], what: str, *, checked: bool) -> None:
        self.source, self.queue, self.what, self.checked = source, queue, what, checked
        self.compression = ""

    def found(self, compression: str) -> None:
        self.compression = compression


def _read_ahead(state: _State) -> None:
    error: BaseException | None = None
    try:
        pieces = decompressed(state.source, what=state.what, found=state.found, checked=state.checked)
        for piece in pieces:
            if not state.queue.put(piece):
                return
        while state.source.read(CHUNK):  # nothing is left; a VerifyingReader says so
            pass
    except InvalidLayer as e:
        error = _root_cause(state.source, e)
    except BaseException as e:
        error = e
    finally:
        try:
            state.source.close()
        except BaseException as e:
            error = error or e
        state.queue.end(error)


def _root_cause(source: DigestingReader, error: InvalidLayer) -> BaseException:
    """The error to report for a blob that does not decompress: that it is not the blob it should be, if so."""
    try:
        while source.read(CHUNK):
            pass
    except (IntegrityError, OSError) as e:
        e.__cause__ = error
        return e
    return error


class CompressingWriter(io.RawIOBase):
    """Takes an uncompressed tar and writes it compressed to `sink`, in a thread of its own.

    `diff_id` and `uncompressed_size` are of what was written to it. `finish` flushes and waits; without it, `close`
    gives up. The sink is the caller's to commit or drop, once `finish` or `close` returned.
    """

    def __init__(self, sink: Callable[[bytes], object], compression: Compression, *, threads: int = 0) -> None:
        super().__init__()
        self.uncompressed_size = 0
        self._hash = hasher()
        self._pending = bytearray()
        self._queue: _Queue[bytes] = _Queue()
        self._failed: list[BaseException] = []
        args = (self._queue, compression.compressor(threads=threads), sink, self._failed)
        self._thread = threading.Thread(target=_write_behind, args=args, name="overlaykit-compress", daemon=True)
        self._thread.start()

    @property
    def diff_id(self) -> Digest:
        return Digest(f"sha256:{self._hash.hexdigest()}")

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        """Bytes taken: all of them. Raises what the thread ran into."""
        if self.closed:
            raise ValueError("write to a closed layer")
        view = memoryview(data).cast("B")
        self._pending += view
        while len(self._pending) >= CHUNK:  # pieces of one size, since a compressor's output may depend on where they end
            self._send(CHUNK)
        return len(view)

    def finish(self) -> None:
        """Compress and write all that is left. Raises what the thread ran into."""
        if self.closed:
            raise ValueError("finish of a closed layer")
        if self._pending:
            self._send(len(self._pending))
        self._queue.end()
        self._thread.join()
        super().close()
        self._raise()

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if sys.is_finalizing():
            return
        self._queue.end(_Abandoned("abandoned"))
        self._queue.stop()
        self._thread.join()

    def _send(self, n: int) -> None:
        with memoryview(self._pending) as view:
            piece = bytes(view[:n])
        del self._pending[:n]
        self._hash.update(piece)
        self.uncompressed_size += n
        if not self._queue.put(piece):
            self._raise()

    def _raise(self) -> None:
        if self._failed:
            raise self._failed[0]


def _write_behind(
    queue: _Queue[bytes], compressor: Compressor, sink: Callable[[bytes], object], failed: list[BaseException]
) -> None:
    try:
        while (piece := queue.get()) is not None:
            if out := compressor.compress(piece):
                sink(out)
        if out := compressor.flush():
            sink(out)
    except _Abandoned:
        pass
    except BaseException as e:
        failed.append(e)
        queue.stop()


class _Abandoned(OverlaykitError):
    """The writer gave up: nobody sees this."""
