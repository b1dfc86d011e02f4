"""What comes into a store: the layers and documents of an image, verified and parsed as they are copied; a root filesystem
as a layer."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from overlaykit.errors import OverlaykitError
from overlaykit.oci import BlobLayer, Compression, Descriptor, Digest, Image, Layer, Layout, ingest_layer
from overlaykit.oci.digest import Readable, Reader, Tee
from overlaykit.overlay.contents import Contents
from overlaykit.store.packing import LeasedLayout, pack
from overlaykit.tree import Losses, Tree, scan
from overlaykit.tree.table import StrPath

Progress = Callable[[str, int, int], None]  # what is being worked on, bytes done, bytes in all (0: not known)


class Counter:
    """Tells a Progress how far a piece of work is."""

    def __init__(self, progress: Progress | None, what: str, total: int) -> None:
        self._progress, self._what, self._total, self._done = progress, what, total, 0

    def add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._what, self._done, self._total)

    def over(self, stream: Readable) -> Reader:
        return _Counted(stream, self)


class _Counted(Reader):
    def __init__(self, stream: Readable, counter: Counter) -> None:
        super().__init__(stream)
        self._counter = counter

    def _read(self, n: int) -> bytes:
        data = super()._read(n)
        self._counter.add(len(data))
        return data


def ingest_image(
    layout: LeasedLayout,
    image: Image,
    known: set[tuple[Digest, Digest]],
    counter: Counter,
    parsed: Callable[[Digest, Tree], object],
) -> Descriptor:
    """`image`, all of it in `layout`: its manifest's descriptor. Every digest is verified, every layer parsed.

    known: (digest, diff_id) of layers that some image in the layout has: those are verified in both places, not parsed.
    parsed: is told the diff_id and the Tree of each other layer.
    """
    for layer in image.layers:
        layout.lease.add(layer.digest)
        if (layer.digest, layer.diff_id) in known and layout.verify(layer.descriptor):
            with counter.over(layer.compressed()) as source:
                source.drain()
        else:
            parsed(layer.diff_id, _ingest(layout, layer, counter))
    return add_documents(layout, image)


def _ingest(layout: LeasedLayout, layer: Layer, counter: Counter) -> Tree:
    with layout.ingest(layer.descriptor) as writer:

        def opened() -> io.RawIOBase:
            return Tee(counter.over(layer.open_blob()), writer)

        # One pass: what is hashed, decompressed and parsed here is written at the same time.
        tree = BlobLayer(layer.descriptor, opened, diff_id=layer.diff_id).tree()
        writer.commit()
        return tree


def add_documents(layout: Layout, image: Image) -> Descriptor:
    """Config and manifest of `image` as blobs, in this order; the manifest's descriptor."""
    for descriptor, raw in ((image.manifest.config, image.raw_config()), (image.descriptor, image.raw_manifest())):
        with layout.ingest(descriptor) as writer:
            writer.write(raw)
            writer.commit()
    return image.descriptor


def ingest_rootfs(
    layout: LeasedLayout, source: StrPath | BinaryIO, compression: Compression, losses: Losses, progress: Progress | None
) -> BlobLayer:
    """A root filesystem as a layer: `source` is a directory, or a tar (a file or an open one) that may be compressed."""
    if not isinstance(source, str | os.PathLike):
        counter = Counter(progress, "import", 0)
        return ingest_layer(layout, counter.over(source), compression=compression)
    if os.path.isdir(source):
        tree = scan(source)
        return pack(layout, tree, Contents(tree, source), compression=compression, losses=losses)
    with open(source, "rb", buffering=0) as file:
        counter = Counter(progress, os.path.basename(source), os.fstat(file.fileno()).st_size)
        return ingest_layer(layout, counter.over(file), compression=compression)


@contextmanager
def about(what: object) -> Iterator[None]:
    """Errors raised inside name `what`, a file that somebody gave, if they do not yet."""
    try:
        yield
    except OverlaykitError as e:
        if str(what) not in str(e):
            e.args = (f"{what}: {e}", *e.args[1:])
        raise
