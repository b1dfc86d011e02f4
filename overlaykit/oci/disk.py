"""Images and layers to and from plain directories, without a store."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from overlaykit.errors import AlreadyExists, InvalidImage, InvalidLayer
from overlaykit.oci.digest import Digest, Reader, hasher
from overlaykit.oci.documents import Descriptor, History
from overlaykit.oci.layer import LayerWriter, compression_named, layer_type
from overlaykit.oci.mutate import replace_layers
from overlaykit.oci.pipeline import CompressingWriter, LayerStream
from overlaykit.oci.streams import Compression
from overlaykit.overlay.apply import apply_layer as apply_to_empty
from overlaykit.overlay.contents import Contents
from overlaykit.overlay.fold import fold_layer
from overlaykit.tree.diff import against, diff
from overlaykit.tree.losses import Losses
from overlaykit.tree.merge import squash
from overlaykit.tree.scan import scan
from overlaykit.tree.table import StrPath, Tree
from overlaykit.tree.tarwrite import write_tar
from overlaykit.tree.whiteout import WhiteoutFormat

if TYPE_CHECKING:
    from overlaykit.oci.image import Image
    from overlaykit.oci.layout import Layout


def unpack(image: Image, directory: StrPath, *, max_size: int | None = None, losses: Losses | None = None) -> None:
    """Make `directory` the merged tree of `image`: what a container of it would see at its beginning.

    directory: not there yet, or empty. It appears whole and verified, or not at all. max_size: bytes that one layer may
    unpack to. What the file system or the user's rights cannot keep is appended to `losses`. AlreadyExists if there is
    something; else what `apply_layer` raises.
    """
    home = Path(directory)
    if home.is_symlink() or (home.exists() and (not home.is_dir() or any(home.iterdir()))):
        raise AlreadyExists(f"{home} is there and not empty", hint="name a new directory, or an empty one")
    staging = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
    try:
        for number, layer in enumerate(image.layers):
            with layer.uncompressed(max_size=max_size) as stream:
                if number == 0:
                    apply_to_empty(stream, staging, whiteouts=WhiteoutFormat.NONE, losses=losses)
                    stream.drain()
                else:
                    fold_layer(stream, staging, verify=stream.drain, losses=losses)
        os.rename(staging, home)
    except BaseException:
        shutil.rmtree(staging)
        raise


def apply_layer(
    blob: StrPath | BinaryIO,
    directory: StrPath,
    media_type: str | None = None,
    *,
    max_size: int | None = None,
    losses: Losses | None = None,
) -> Tree:
    """The Tree of the layer in `blob`, a tar that may be compressed, once `directory` shows what it does to it.

    blob: a path, or a stream, which is read to its end and stays open. All or nothing: an error leaves `directory` as it
    was. media_type: what the blob claims to be; InvalidLayer if that is no layer's. How it is compressed its own first
    bytes say. max_size: bytes that it may unpack to. Raises InvalidLayer, UnsafePath or IntegrityError for what is wrong
    with the layer, OSError for what the file system refuses.
    """
    if media_type is not None and compression_named(media_type) is None:
        raise InvalidLayer(f"{media_type} is not the media type of a layer")
    source = open(blob, "rb") if isinstance(blob, str | os.PathLike) else _Lent(blob)
    with LayerStream(source, max_size=max_size) as stream:
        return fold_layer(stream, directory, verify=stream.drain, losses=losses)


class _Lent(Reader):
    """The caller's stream, which stays open."""

    def close(self) -> None:
        io.RawIOBase.close(self)


class PackedLayer(NamedTuple):
    """A layer that was written: its blob's descriptor, and the digest of its uncompressed tar."""

    descriptor: Descriptor
    diff_id: Digest


def pack_layer(
    directory: StrPath,
    out: BinaryIO,
    *,
    lower: Tree | StrPath | None = None,
    whiteouts: WhiteoutFormat = WhiteoutFormat.NONE,
    compression: str = "gzip",
    source_date_epoch: int | None = None,
    subsecond: bool = False,
    losses: Losses | None = None,
) -> PackedLayer:
    """Write to `out` the layer that leads from `lower` to what `directory` holds: the inverse of `apply_layer`.

    directory  the whole tree as it shall be (whiteouts NONE), or an overlay's upper (OVERLAY, USERXATTR)
    lower      what the layer goes on top of: a directory, or a merged Tree; None: nothing
    compression, source_date_epoch, subsecond  as `Compression.parse` and `write_tar` have them

    The same input gives the same bytes. What a layer cannot carry is appended to `losses`. Raises OSError for what cannot
    be read, InvalidLayer for an upper whose redirects or metacopies nobody has resolved.
    """
    how = Compression.parse(compression)
    found = scan(directory, whiteouts=whiteouts)
    below = lower if lower is None or isinstance(lower, Tree) else scan(lower)
    if below is not None:
        found = against(diff(below, found) if whiteouts is WhiteoutFormat.NONE else found, below)
    digest, size = hasher(), 0

    def sink(data: bytes) -> None:
        nonlocal size
        digest.update(data)
        size += len(data)
        out.write(data)

    with CompressingWriter(sink, how) as tar:
        write_tar(
            found,
            Contents(found, directory),
            tar,
            source_date_epoch=source_date_epoch,
            subsecond=subsecond,
            losses=losses,
        )
        tar.finish()
    blob = Digest(f"sha256:{digest.hexdigest()}")
    return PackedLayer(Descriptor(media_type=layer_type(how.kind), digest=blob, size=size), tar.diff_id)


def squash_layers(
    image: Image,
    start: int,
    stop: int,
    layout: Layout,
    *,
    compression: str = "gzip",
    history: History | None = None,
    losses: Losses | None = None,
) -> Image:
    """`image` with its layers start..stop (0 is the bottom, `stop` not included) as one, new in `layout`.

    What is below stays as it is, and so stays shared. The layers are unpacked to a temporary folder in between. The new
    layer does to any tree what the old ones did one after another: whiteouts stay in it.
    """
    if not 0 <= start < stop <= len(image.layers):
        raise InvalidImage(f"image {image.id}: layers {start} to {stop} of {len(image.layers)}")
    with tempfile.TemporaryDirectory(dir=layout.root) as folder:
        lowers: list[tuple[StrPath, Tree]] = []
        for number in range(start, stop):
            directory = Path(folder, str(number))
            directory.mkdir()
            with image.layers[number].uncompressed() as stream:
                tree = apply_to_empty(stream, directory, whiteouts=WhiteoutFormat.NONE, lowers=lowers, losses=losses)
                stream.drain()
            lowers.append((directory, tree))
        squashed = squash([tree for _, tree in lowers])
        contents = [(tree, Contents(tree, directory)) for directory, tree in reversed(lowers)]

        def content(row: int) -> int:
            """The file as the uppermost layer that has its name holds it."""
            path = squashed.paths[row]
            tree, files = next((tree, files) for tree, files in contents if tree.find(path) >= 0)
            return files(tree.find(path))

        with LayerWriter(layout, compression) as out:
            write_tar(squashed, content, out, losses=losses)
            layer = out.commit()
    return replace_layers(image, start, stop, layer, history=history)
