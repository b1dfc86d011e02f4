"""Digests: what names a blob, and readers that hold bytes to it.

A digest is `algorithm:encoded` (image-spec descriptor.md, "Digests"): sha256 with 64 lower-case hex digits, or sha512
with 128. A diff_id is the digest of a layer's uncompressed tar, a chain_id that of a whole stack of them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from overlaykit.errors import DigestMismatch, InvalidReference, SizeMismatch

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

CHUNK = 1 << 20  # bytes a read: large enough that hashing lets go of the GIL for most of the time
FORM = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z")


class Hasher(Protocol):
    """What hashlib gives."""

    def update(self, data: ReadableBuffer, /) -> None: ...
    def hexdigest(self) -> str: ...


class Writable(Protocol):
    """All that a sink of bytes must do: take all of it."""

    def write(self, data: bytes | memoryview, /) -> object: ...


class Readable(Protocol):
    """All that a source of bytes must do."""

    def read(self, n: int = ..., /) -> bytes: ...


class Digest(str):
    """A checked `algorithm:encoded`. InvalidReference (a ValueError) for anything else."""

    __slots__ = ()

    def __new__(cls, value: str) -> Digest:
        if isinstance(value, cls):
            return value
        if not isinstance(value, str) or not FORM.match(value):
            raise InvalidReference(f"{shown(value)} is no digest: sha256: and 64 lower-case hex digits expected")
        return super().__new__(cls, value)

    @property
    def algorithm(self) -> str:
        return self.partition(":")[0]

    @property
    def encoded(self) -> str:
        return self.partition(":")[2]

    @property
    def short(self) -> str:
        """The first 12 hex digits, as Docker prints ids."""
        return self.encoded[:12]

    @staticmethod
    def of(data: ReadableBuffer, algorithm: str = "sha256") -> Digest:
        """The digest of `data`."""
        h = hasher(algorithm)
        h.update(data)
        return Digest(f"{algorithm}:{h.hexdigest()}")


def hasher(algorithm: str = "sha256") -> Hasher:
    """A new hash object of an algorithm that digests may use."""
    import hashlib  # and with it OpenSSL, which takes longer to load than a list of containers

    if algorithm == "sha512":
        return hashlib.sha512(usedforsecurity=False)
    assert algorithm == "sha256", algorithm
    return hashlib.sha256(usedforsecurity=False)


def blob_path(digest: Digest) -> str:
    """Where a blob is in an OCI layout (image-spec image-layout.md, "Blobs")."""
    return f"blobs/{digest.algorithm}/{digest.encoded}"


def shown(value: object, limit: int = 100) -> str:
    """`value` as an error message may show it: quoted, escaped and not too long, whoever sent it."""
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 4] + "...'"


def chain_ids(diff_ids: Iterable[str]) -> list[Digest]:
    """One chain_id for each of `diff_ids` (bottom first): of the stack from the bottom up to that layer.

    image-spec config.md, "Layer ChainID": the first is its diff_id, later ones the digest of "CHAIN_ID DIFF_ID".
    """
    out: list[Digest] = []
    for diff_id in diff_ids:
        out.append(Digest.of(f"{out[-1]} {diff_id}".encode()) if out else Digest(diff_id))
    return out


class Reader(io.RawIOBase):
    """A stream over another, which it owns and closes. Subclasses say what `read(n)` of at least one byte gives."""

    def __init__(self, stream: Readable) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def read(self, n: int | None = -1, /) -> bytes:
        """Up to `n` bytes, b"" at the end; all that is left for -1."""
        if n is None or n < 0:
            return self.readall()
        return self._read(n) if n else b""

    def _read(self, n: int) -> bytes:
        return self._stream.read(n)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(CHUNK), b""))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def drain(self) -> None:
        """Read what is left."""
        while self.read(CHUNK):
            pass

    def close(self) -> None:
        if not self.closed:
            super().close()
            close = getattr(self._stream, "close", None)
            if close is not None:
                close()


class DigestingReader(Reader):
    """A stream that hashes and counts what is read through it: `.digest` and `.size` (bytes) of all so far."""

    def __init__(self, stream: Readable, algorithm: str = "sha256") -> None:
        super().__init__(stream)
        self.size = 0
        self.algorithm = algorithm
        self._hash = hasher(algorithm)

    @property
    def digest(self) -> Digest:
        return Digest(f"{self.algorithm}:{self._hash.hexdigest()}")

    def _read(self, n: int) -> bytes:
        data = self._stream.read(n)
        self._hash.update(data)
        self.size += len(data)
        return data


class VerifyingReader(DigestingReader):
    """A stream that must be exactly what `expected` and `expected_size` (bytes; None: not known) promise.

    The read that completes the promised size checks everything before it hands out its bytes, so no one who reads as
    much as the descriptor says can miss a mismatch; where the size is not known, the read that meets the end does. A
    stream that goes on past the size raises SizeMismatch at once. `what` names the blob in messages.

    drain_on_close: leaving a `with` block without an error reads what is left and so checks it, as umoci's
    VerifiedReadCloser does; without it, closing early checks nothing.
    """

    def __init__(
        self,
        stream: Readable,
        expected: Digest,
        expected_size: int | None = None,
        *,
        what: str = "blob",
        drain_on_close: bool = False,
    ) -> None:
        super().__init__(stream, expected.algorithm)
        self.expected = expected
        self.expected_size = expected_size
        self.verified = False
        self._what = what
        self._drain_on_close = drain_on_close

    def _read(self, n: int) -> bytes:
        if self.verified:
            return b""
        if self.expected_size is not None:
            n = min(n, self.expected_size - self.size)
        data = super()._read(n) if n else b""
        if self.size == self.expected_size:
            extra = len(self._stream.read(1))
            if extra:
                raise self._size_mismatch(f"more than {self.size:,}", self.size + extra)
            self._verify()
        elif not data:
            if self.expected_size is not None:
                raise self._size_mismatch(f"{self.size:,}", self.size)
            self._verify()
        return data

    def close(self) -> None:
        """Close, checking first what is left if that was asked for. The stream is closed either way."""
        if self.closed:
            return
        try:
            if self._drain_on_close and not self.verified:
                self.drain()
        finally:
            super().close()

    def __exit__(self, *exc: Any) -> None:
        if exc[0] is not None:
            self._drain_on_close = False  # the first error is the one to report
        super().__exit__(*exc)

    def __del__(self) -> None:
        self._drain_on_close = False  # a forgotten stream closes; it never reads on from the garbage collector
        super().__del__()

    def _verify(self) -> None:
        actual = self.digest
        if actual != self.expected:
            raise DigestMismatch(
                f"{self._what}: expected {self.expected}, read {actual}", expected=self.expected, actual=actual
            )
        self.verified = True

    def _size_mismatch(self, shown_size: str, actual: int) -> SizeMismatch:
        return SizeMismatch(
            f"{self._what} {self.expected}: expected {self.expected_size:,} bytes, read {shown_size}",
            expected=self.expected_size,
            actual=actual,
        )


class Tee(Reader):
    """A stream that writes all that is read through it to `sink` as well. The sink is not closed."""

    def __init__(self, stream: Readable, sink: Writable) -> None:
        super().__init__(stream)
        self._sink = sink

    def _read(self, n: int) -> bytes:
        data = self._stream.read(n)
        if data:
            self._sink.write(data)
        return data


class Prefixed(Reader):
    """A stream with `start`, which was read from it already, put before it again."""

    def __init__(self, start: bytes, stream: Readable) -> None:
        super().__init__(stream)
        self._start = start

    def _read(self, n: int) -> bytes:
        if not self._start:
            return self._stream.read(n)
        out, self._start = self._start[:n], self._start[n:]
        return out


def copy_stream(source: Readable, out: Writable) -> int:
    """Bytes copied from `source` to the end into `out`."""
    done = 0
    while data := source.read(CHUNK):
        out.write(data)
        done += len(data)
    return done
