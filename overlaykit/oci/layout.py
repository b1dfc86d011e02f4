"""Layout: an OCI image layout on disk (image-spec image-layout.md), ours to write and anyone's to read.

    ROOT/oci-layout                {"imageLayoutVersion": "1.0.0"}
    ROOT/index.json                the images, each named by an annotation
    ROOT/blobs/sha256/<encoded>    manifests, configs, layers
    ROOT/ingest/<random>           what is being written, each file flocked by its writer
    ROOT/lock                      flocked by whoever changes index.json

The last two are ours; the spec allows more files.

A blob is visible under its digest only when all of it is there and on disk: written and fsynced in ingest/, verified,
renamed, its directory fsynced. index.json changes the same way, under the lock. Readers take no lock.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from overlaykit.errors import (
    DigestMismatch,
    IntegrityError,
    InvalidImage,
    InvalidReference,
    NotFound,
    SizeMismatch,
)
from overlaykit.oci.digest import Digest, VerifyingReader, blob_path, hasher, shown
from overlaykit.oci.documents import (
    IMAGE_NAME,
    MAX_DOCUMENT,
    OCI_INDEX,
    REF_NAME,
    Descriptor,
    Index,
    canonical,
    parse_index,
    rewrite,
)
from overlaykit.oci.durable import locked, new_ingest, publish, sync_directory, sync_file, write_all, write_file
from overlaykit.oci.image import Image, find_image
from overlaykit.oci.layer import BlobLayer
from overlaykit.oci.platforms import Platform
from overlaykit.oci.reference import Reference

StrPath = str | os.PathLike[str]

LAYOUT_VERSION = "1.0.0"
# image-spec image-layout.md, "index.json file": what a ref.name may hold
_REF_NAME = re.compile(r"[A-Za-z0-9]+(?:[-._:@+]|--|/|[A-Za-z0-9])*\Z")
PIECE = 64 << 10  # bytes of a document a read
MAX_INDEX = 64 << 20  # bytes of index.json: a store's has an entry for every image


class Layout:
    """A layout directory. Holds no file open: any number of objects, threads and processes may use one directory."""

    def __init__(self, root: StrPath) -> None:
        """The layout that is in `root`. InvalidImage if there is none."""
        self.root = Path(root)
        self._check()

    @classmethod
    def create(cls, root: StrPath, *, mode: int = 0o700) -> Layout:
        """The layout in `root`, made there if there is none: the directories with `mode`, beside what else there is."""
        path = Path(root)
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        if not (path / "oci-layout").exists():
            # parents=True would give all but the last the usual mode
            for folder in (path / "blobs", path / "blobs" / "sha256"):
                folder.mkdir(mode=mode, exist_ok=True)
            with locked(path):
                if not (path / "index.json").exists():
                    write_file(path / "index.json", canonical(Index(schema_version=2, media_type=OCI_INDEX, manifests=())))
                # Last: what has it is whole.
                write_file(path / "oci-layout", canonical({"imageLayoutVersion": LAYOUT_VERSION}))
            sync_directory(path / "blobs")
            sync_directory(path)
        return cls(path)

    def _check(self) -> None:
        try:
            raw = _read_limited(self.root / "oci-layout", 1 << 16)
        except (FileNotFoundError, NotADirectoryError):
            raise InvalidImage(f"{self.root}: no OCI image layout: it has no file oci-layout") from None
        import msgspec

        try:
            version = msgspec.json.decode(raw, type=dict[str, Any]).get("imageLayoutVersion")
        except (ValueError, RecursionError) as e:
            raise InvalidImage(f"{self.root / 'oci-layout'}: {e}") from e
        if version != LAYOUT_VERSION:
            raise InvalidImage(f"{self.root}: image layout version {shown(version)}, not {LAYOUT_VERSION}")

    def __repr__(self) -> str:
        return f"<Layout {self.root}>"

    # --- blobs ------------------------------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be."""
        return self.root / blob_path(Digest(digest))

    def has(self, digest: str) -> bool:
        """Whether there is a blob of that name. What is in it, only reading it tells."""
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Bytes of the blob. NotFound."""
        with self.open_blob(digest) as blob:
            return os.fstat(blob.fileno()).st_size

    def open_blob(self, digest: str) -> io.FileIO:
        """The blob's bytes as they are, not verified. NotFound."""
        path = self.path(digest)
        try:
            return _open_file(path)
        except FileNotFoundError:
            raise NotFound(f"{self.root} has no blob {digest}") from None

    def open(self, blob: Descriptor | str) -> VerifyingReader:
        """The blob's bytes; the read that completes them raises DigestMismatch or SizeMismatch if they are not it."""
        digest, size = (blob.digest, blob.size) if isinstance(blob, Descriptor) else (Digest(blob), None)
        return VerifyingReader(self.open_blob(digest), digest, size, what=f"{self.root}: blob")

    def read(self, blob: Descriptor | str, *, limit: int = MAX_DOCUMENT) -> bytes:
        """All of a small blob, verified. InvalidImage beyond `limit` bytes."""
        with self.open(blob) as reader:
            data = _read_all(reader, limit)
        if len(data) > limit:
            raise InvalidImage(f"{self.root}: blob {reader.expected}: more than {limit:,} bytes, too many for a document")
        return data

    def verify(self, blob: Descriptor | str) -> bool:
        """Whether the blob is there and is what its digest (and the descriptor's size) says: reads all of it."""
        try:
            with self.open(blob) as reader:
                reader.drain()
        except (NotFound, IntegrityError):
            return False
        return True

    def digests(self) -> Iterator[Digest]:
        """The digests of all blobs, in order. Files under blobs/ with other names are passed over."""
        for algorithm in ("sha256", "sha512"):
            try:
                names = sorted(os.listdir(self.root / "blobs" / algorithm))
            except FileNotFoundError:
                continue
            for name in names:
                with suppress(InvalidReference):
                    yield Digest(f"{algorithm}:{name}")

    def ingest(self, expected: Descriptor | Digest | None = None, *, media_type: str = "") -> BlobWriter:
        """A writer of a new blob. `commit` holds it to `expected`, a descriptor or a digest, if that is given."""
        return BlobWriter(self, expected, media_type=media_type)

    def add(self, data: bytes, media_type: str) -> Descriptor:
        """Keep `data` as a blob, and give its descriptor."""
        with self.ingest(media_type=media_type) as writer:
            writer.write(data)
            return writer.commit()

    def layer(self, descriptor: Descriptor, diff_id: Digest | None = None) -> BlobLayer:
        """The layer whose blob is here."""
        return BlobLayer(descriptor, partial(self.open_blob, descriptor.digest), diff_id=diff_id)

    def image(self, name: str | Descriptor, *, platform: Platform | None = None) -> Image:
        """The image that `name` names, or a descriptor is of; of an index the one for `platform` (this machine's)."""
        return find_image(self, name if isinstance(name, Descriptor) else self.resolve(name), platform=platform)

    def remove(self, digest: str) -> int:
        """Remove a blob, whoever needs it: bytes that were freed, 0 if it was not there."""
        path = self.path(digest)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        sync_directory(path.parent)
        return size

    def clear_stale_ingests(self) -> list[Path]:
        """Remove what writers left that died, and name it. A blob still being written is flocked, and stays."""
        cleared = []
        try:
            names = os.listdir(self.root / "ingest")
        except FileNotFoundError:
            return []
        for name in names:
            path = self.root / "ingest" / name
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                cleared.append(path)
            except BlockingIOError:
                pass
            finally:
                os.close(fd)
        return cleared

    # --- names ------------------------------------------------------------------------------------------------------

    def index(self) -> Index:
        """index.json as it is now."""
        return parse_index(self.raw_index(), what=str(self.root / "index.json"))

    def raw_index(self) -> bytes:
        """The bytes of index.json as it is now."""
        try:
            return _read_limited(self.root / "index.json", MAX_INDEX)
        except FileNotFoundError:
            raise InvalidImage(f"{self.root}: no OCI image layout: it has no index.json") from None

    def descriptors(self) -> tuple[Descriptor, ...]:
        """What index.json lists, names in the annotations."""
        return self.index().manifests

    def names(self) -> dict[str, Descriptor]:
        """Every name, and what it names. Of two entries with one name the later counts."""
        return {name: d for d in self.descriptors() if (name := name_of(d)) is not None}

    def resolve(self, name: str) -> Descriptor:
        """What `name` names: a ref.name as it stands in index.json, or a whole image name. NotFound.

        Docker writes the bare tag into ref.name and the whole name beside it, so both are looked at, the first first.
        """
        found = self.descriptors()
        for annotation in (REF_NAME, IMAGE_NAME):
            named = [d for d in found if (d.annotations or {}).get(annotation) == name]
            if len({d.digest for d in named}) > 1:
                raise InvalidImage(f"{self.root}: {len(named)} images are called {name!r}")
            if named:
                return named[-1]
        raise NotFound(f"{self.root} has no image {name!r}")

    def tag(self, descriptor: Descriptor, name: str) -> Descriptor:
        """Let `name` name that image from now on, and no other: the descriptor as index.json has it."""
        if not _REF_NAME.match(name) or len(name) > 1024:
            raise InvalidReference(f"{shown(name)} cannot name an image in an OCI layout")
        annotations = dict(descriptor.annotations or {}) | {REF_NAME: name}
        annotations.pop(IMAGE_NAME, None)
        with suppress(InvalidReference):
            reference = Reference.parse(name)
            if str(reference) == name:
                annotations[IMAGE_NAME] = name  # containerd and Docker look here
        named = replace(descriptor, annotations=annotations)
        self.edit(lambda entries: [*(d for d in entries if name_of(d) != name), named])
        return named

    def untag(self, name: str) -> Descriptor:
        """What `name` named and no longer does. The blobs stay. NotFound."""
        removed: list[Descriptor] = []

        def without(entries: tuple[Descriptor, ...]) -> list[Descriptor]:
            removed.extend(d for d in entries if name_of(d) == name)
            if not removed:
                raise NotFound(f"{self.root} has no image {name!r}")
            return [d for d in entries if name_of(d) != name]

        self.edit(without)
        return removed[-1]

    def edit(self, change: Callable[[tuple[Descriptor, ...]], Iterable[Descriptor]]) -> tuple[Descriptor, ...]:
        """Change index.json: `change` gets its entries and gives the new ones, which are what comes back.

        One change at a time, among all processes; an exception in `change` changes nothing. It must not edit again.
        """
        with locked(self.root):
            raw = self.raw_index()
            old = parse_index(raw, what=str(self.root / "index.json"))
            new = replace(old, manifests=tuple(change(old.manifests)))
            if new != old:
                write_file(self.root / "index.json", rewrite(raw, old, new))
        return new.manifests


def name_of(descriptor: Descriptor) -> str | None:
    """The name that an entry of index.json gives its image, None for none: the ref.name."""
    return (descriptor.annotations or {}).get(REF_NAME)


class BlobWriter:
    """A blob on its way into a layout. Leaving the `with` block without `commit` removes all trace of it."""

    def __init__(self, layout: Layout, expected: Descriptor | Digest | None, *, media_type: str = "") -> None:
        self._fd = -1
        self.size = 0
        self._layout = layout
        self._digest = expected.digest if isinstance(expected, Descriptor) else expected
        self._size = expected.size if isinstance(expected, Descriptor) else None
        self._descriptor = expected if isinstance(expected, Descriptor) else None
        self._media_type = media_type
        self._algorithm = self._digest.algorithm if self._digest is not None else "sha256"
        self._hash = hasher(self._algorithm)
        self._fd, self._path = new_ingest(layout.root / "ingest")

    @property
    def digest(self) -> Digest:
        """Of what was written so far."""
        return Digest(f"{self._algorithm}:{self._hash.hexdigest()}")

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Bytes taken: all of them. SizeMismatch as soon as they are more than expected."""
        if self._fd < 0:
            raise ValueError("the blob was committed or dropped already")
        view = memoryview(data).cast("B")
        self.size += len(view)
        if self._size is not None and self.size > self._size:
            raise self._size_mismatch("more than ")
        self._hash.update(view)
        write_all(self._fd, self._path, view)
        return len(view)

    def commit(self) -> Descriptor:
        """The blob's descriptor, once it is under its name and will still be there after a power cut.

        DigestMismatch or SizeMismatch, and nothing kept, if it is not what was expected. A blob that is there already
        is read: a good one stays as it is, a damaged one gives way.
        """
        if self._fd < 0:
            raise ValueError("the blob was committed or dropped already")
        try:
            digest = self._verified()
            target = self._layout.path(digest)
            if self._is_good(Descriptor(media_type="", digest=digest, size=self.size)):
                sync_file(target)  # another tool may have written it, and not seen to this
                sync_directory(target.parent)
            else:
                if not target.parent.exists():
                    target.parent.mkdir(mode=0o700, exist_ok=True)
                    sync_directory(target.parent.parent)
                publish(self._fd, self._path, target, mode=0o444)
        finally:
            self.abort()
        return self._descriptor or Descriptor(media_type=self._media_type, digest=digest, size=self.size)

    def _is_good(self, blob: Descriptor) -> bool:
        try:
            return self._layout.verify(blob)
        except (InvalidImage, OSError):
            return False  # no file, or a bad spot on the disk: to be replaced as any damage

    def _verified(self) -> Digest:
        digest = self.digest
        if self._size is not None and self.size != self._size:
            raise self._size_mismatch("")
        if self._digest is not None and digest != self._digest:
            raise DigestMismatch(f"blob: expected {self._digest}, read {digest}", expected=self._digest, actual=digest)
        return digest

    def _size_mismatch(self, more: str) -> SizeMismatch:
        return SizeMismatch(
            f"blob {self._digest}: expected {self._size:,} bytes, read {more}{self.size:,}",
            expected=self._size,
            actual=self.size,
        )

    def abort(self) -> None:
        """Drop what was written. Does nothing after `commit`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                self._path.unlink(missing_ok=True)  # a published one has left this name
            finally:
                with suppress(OSError):  # what close could complain of, fsync has said before
                    os.close(fd)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()

    def __del__(self) -> None:
        self.abort()


def _open_file(path: Path) -> io.FileIO:
    """A regular file, to read. InvalidImage if it is none."""
    # A foreign layout may have anything under a name: opening a fifo must not wait for its writer.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidImage(f"{path} is no regular file")
    return io.FileIO(fd, "rb")


def _read_limited(path: Path, limit: int) -> bytes:
    """All of a small file. InvalidImage beyond `limit` bytes."""
    with _open_file(path) as file:
        data = _read_all(file, limit)
    if len(data) > limit:
        raise InvalidImage(f"{path}: more than {limit:,} bytes")
    return data


def _read_all(file: io.RawIOBase, limit: int) -> bytes:
    """All of a small file; of one that is larger than `limit` one byte more."""
    data = b""
    # Most have a few hundred bytes, and memory is taken for as much as is asked for.
    while more := file.read(min(PIECE, limit + 1 - len(data))):
        data += more
    return data
