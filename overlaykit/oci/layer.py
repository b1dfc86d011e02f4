"""Layers: immutable changesets, each a tar that is kept compressed or plain as a blob.

`digest` and `size` are of the blob, `diff_id` of the uncompressed tar. Whatever is read from a layer is verified as
it is read; what was not read to its end is not.
"""

from __future__ import annotations

import io
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from overlaykit.errors import InvalidLayer
from overlaykit.oci.digest import Digest, DigestingReader, Prefixed, Readable, Reader, Tee, VerifyingReader, copy_stream
from overlaykit.oci.documents import DOCKER_LAYER, OCI_LAYER, Descriptor
from overlaykit.oci.pipeline import CompressingWriter, LayerStream
from overlaykit.oci.streams import SNIFF, Compression, compression_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from overlaykit.oci.layout import Layout
    from overlaykit.tree.table import Tree

_SUFFIX = {"none": "", "gzip": "gzip", "zstd": "zstd"}
_DISTRIBUTABLE: Final = {  # not for registries, once (image-spec layer.md, "Non-Distributable Layers")
    "application/vnd.oci.image.layer.nondistributable.v1.tar": OCI_LAYER,
    "application/vnd.docker.image.rootfs.foreign.diff.tar": DOCKER_LAYER,
}


def layer_type(compression: str, *, docker: bool = False) -> str:
    """The media type of a layer that is compressed with none, gzip or zstd."""
    suffix = _SUFFIX[compression]
    if docker:
        return DOCKER_LAYER + (f".{suffix}" if suffix else "")
    return OCI_LAYER + (f"+{suffix}" if suffix else "")


def compression_named(media_type: str) -> str | None:
    """What compression `media_type` says: none, gzip or zstd; None if it is not a layer's tar.

    What a blob really is, its own first bytes say.
    """
    for base, separator in ((OCI_LAYER, "+"), (DOCKER_LAYER, "."), *((t, "+.") for t in _DISTRIBUTABLE)):
        if media_type == base:
            return "none"
        rest = media_type.removeprefix(base)
        if rest != media_type and rest[0] in separator and rest[1:] in ("gzip", "zstd"):
            return rest[1:]
    return None


def retyped(descriptor: Descriptor, *, docker: bool) -> Descriptor:
    """The same layer under the media type of Docker's family or of OCI's. One that is no plain layer stays as it is."""
    compression = compression_named(descriptor.media_type)
    if compression is None or not descriptor.media_type.startswith((OCI_LAYER, DOCKER_LAYER)):
        return descriptor
    return replace(descriptor, media_type=layer_type(compression, docker=docker))


class NamedStream(LayerStream):
    """A LayerStream by which all that is said of its layer within a `with` block says also which layer that is."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, InvalidLayer) and not str(error).startswith(self._what):
            error.args = (f"{self._what}: {error}",)
        super().__exit__(kind, error, trace)


class Layer(ABC):
    """One layer. Subclasses say what it is and open its blob; the rest follows."""

    def __init__(self) -> None:
        self._tree: Tree | None = None
        self._tree_lock = threading.Lock()

    @property
    @abstractmethod
    def descriptor(self) -> Descriptor:
        """What the blob is."""

    @property
    @abstractmethod
    def diff_id(self) -> Digest:
        """The digest of the uncompressed tar."""

    @abstractmethod
    def open_blob(self) -> io.RawIOBase:
        """The blob's bytes as they are kept, not verified."""

    @property
    def digest(self) -> Digest:
        return self.descriptor.digest

    @property
    def size(self) -> int:
        """Bytes of the blob."""
        return self.descriptor.size

    @property
    def media_type(self) -> str:
        return self.descriptor.media_type

    def compressed(self) -> VerifyingReader:
        """The blob's bytes. The read that completes them raises DigestMismatch or SizeMismatch if they are not it."""
        return VerifyingReader(self.open_blob(), self.digest, self.size, what="layer")

    def uncompressed(self, *, max_size: int | None = None) -> NamedStream:
        """The layer's tar, read ahead in a thread. Read to its end (`drain`), both digests and the size are verified.

        max_size: InvalidLayer beyond that many bytes.
        """
        return NamedStream(
            self.open_blob(),
            expected=self.digest,
            expected_size=self.size,
            diff_id=self._promised_diff_id,
            max_size=max_size,
            what=f"layer {self.digest}",
        )

    @property
    def _promised_diff_id(self) -> Digest | None:
        return self.diff_id

    def tree(self) -> Tree:
        """The changeset that the layer says, with `offset` into the uncompressed tar. Read and verified once."""
        with self._tree_lock:
            if self._tree is None:
                with self.uncompressed() as stream:
                    self._tree = index_stream(stream)
            return self._tree

    def keep_tree(self, tree: Tree) -> None:
        """Spare `tree()` the reading: by whoever made it of this layer's verified bytes."""
        with self._tree_lock:
            self._tree = tree

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.digest.short}, {self.size:,} bytes>"


def index_stream(stream: LayerStream | Reader) -> Tree:
    """The tree of the layer that `stream` reads, which is read to its end and so verified."""
    from overlaykit.tree import index_tar

    try:
        tree = index_tar(stream)
    except InvalidLayer:
        # What the tar reader trips over may be damage on the way: then that is the thing to say.
        stream.drain()
        raise
    stream.drain()
    return tree


class BlobLayer(Layer):
    """A layer whose blob someone can open: a layout, an archive.

    open_blob  gives the blob's bytes anew each time
    diff_id    None if nothing says it: then it is computed when asked for, by reading the layer once
    """

    def __init__(
        self, descriptor: Descriptor, open_blob: Callable[[], io.RawIOBase], *, diff_id: Digest | None = None
    ) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._open = open_blob
        self._promised = diff_id

    @property
    def descriptor(self) -> Descriptor:
        return self._descriptor

    @cached_property
    def diff_id(self) -> Digest:
        if self._promised is not None:
            return self._promised
        with self.uncompressed() as stream:
            stream.drain()
            return stream.diff_id

    @property
    def _promised_diff_id(self) -> Digest | None:
        return self._promised

    def open_blob(self) -> io.RawIOBase:
        return self._open()


class MemberLayer(Layer):
    """A layer in a docker-archive, of which only the diff_id is known: what its blob is, reading it once tells."""

    def __init__(self, open_blob: Callable[[], io.RawIOBase], *, diff_id: Digest, size: int) -> None:
        super().__init__()
        self._open = open_blob
        self._diff_id = diff_id
        self._size = size

    @property
    def diff_id(self) -> Digest:
        return self._diff_id

    def open_blob(self) -> io.RawIOBase:
        return self._open()

    @cached_property
    def descriptor(self) -> Descriptor:
        with DigestingReader(self._open()) as blob:
            compression = compression_of(blob.read(SNIFF))
            if compression == "none":
                digest = self._diff_id  # the same bytes; whoever reads them verifies them
            else:
                blob.drain()
                digest = blob.digest
        return Descriptor(media_type=layer_type(compression), digest=digest, size=self._size)


class PlainLayer(Layer):
    """A layer as the plain tar that it is, for those who cannot read how it is compressed."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._layer = layer

    @property
    def diff_id(self) -> Digest:
        return self._layer.diff_id

    @cached_property
    def descriptor(self) -> Descriptor:
        with self._layer.uncompressed() as stream:
            stream.drain()
            return Descriptor(media_type=layer_type("none"), digest=self.diff_id, size=stream.uncompressed_size)

    def open_blob(self) -> io.RawIOBase:
        return self._layer.uncompressed()


# --- new layers -------------------------------------------------------------------------------------------------------


class LayerWriter(io.RawIOBase):
    """Takes the uncompressed tar of a new layer and keeps it in `layout`; `commit` gives the layer.

    Compression, the blob's SHA-256 and the file are the work of a thread of its own. Leaving the `with` block without
    `commit` drops everything.
    """

    def __init__(self, layout: Layout, compression: Compression | str = "gzip", *, threads: int = 0) -> None:
        super().__init__()
        how = Compression.parse(compression) if isinstance(compression, str) else compression
        self._layout = layout
        self._blob = layout.ingest(media_type=layer_type(how.kind))
        self._tar = CompressingWriter(self._blob.write, how, threads=threads)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        """Bytes taken: all of them. Raises what the writing thread ran into."""
        return self._tar.write(data)

    def commit(self) -> BlobLayer:
        """The layer, on disk and durable."""
        self._tar.finish()
        descriptor = self._blob.commit()
        self.close()
        return self._layout.layer(descriptor, self._tar.diff_id)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._tar.close()
            self._blob.abort()


def layer_from_tar(layout: Layout, tar: Readable, *, compression: Compression | str = "gzip", threads: int = 0) -> BlobLayer:
    """A new layer in `layout` of an uncompressed tar. Whether that is a layer is not looked at; see `ingest_layer`."""
    with LayerWriter(layout, compression, threads=threads) as writer:
        copy_stream(tar, writer)
        return writer.commit()


def ingest_layer(
    layout: Layout, blob: Readable, *, compression: Compression | str = "gzip", max_size: int | None = None
) -> BlobLayer:
    """A new layer in `layout` of a tar that may be compressed, its tree made in the same pass: InvalidLayer if it is
    none.

    gzip and zstd are kept as they come, byte for byte. Anything else is compressed as `compression` says.
    """
    start = b""
    while len(start) < SNIFF and (more := blob.read(SNIFF - len(start))):
        start += more
    found = compression_of(start)
    source = Prefixed(start, blob)
    if found in ("gzip", "zstd"):
        with layout.ingest(media_type=layer_type(found)) as writer:
            with LayerStream(Tee(source, writer), max_size=max_size, what="tar") as stream:
                tree = index_stream(stream)
            layer = layout.layer(writer.commit(), stream.diff_id)
    else:
        with LayerStream(source, max_size=max_size, what="tar") as stream, LayerWriter(layout, compression) as out:
            tree = index_stream(Tee(stream, out))
            layer = out.commit()
    layer.keep_tree(tree)
    return layer
