"""Images and layers to and from plain directories, without a store."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from overlaykit.errors import AlreadyExists, InvalidLayer
from overlaykit.oci.layer import compression_named
from overlaykit.oci.pipeline import LayerStream
from overlaykit.overlay.apply import apply_layer as apply_to_empty
from overlaykit.overlay.fold import fold_layer
from overlaykit.tree.losses import Losses
from overlaykit.tree.whiteout import WhiteoutFormat

if TYPE_CHECKING:
    from overlaykit.oci.image import Image
    from overlaykit.tree.table import StrPath, Tree


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
    blob: StrPath | io.RawIOBase | io.BufferedIOBase,
    directory: StrPath,
    media_type: str | None = None,
    *,
    max_size: int | None = None,
    losses: Losses | None = None,
) -> Tree:
    """The Tree of the layer in `blob`, a tar that may be compressed, once `directory` shows what it does to it.

    All or nothing: an error leaves `directory` as it was. media_type: what the blob claims to be; InvalidLayer if that is
    no layer's. How it is compressed its own first bytes say. max_size: bytes that it may unpack to. Raises InvalidLayer,
    UnsafePath or IntegrityError for what is wrong with the layer, OSError for what the file system refuses.
    """
    if media_type is not None and compression_named(media_type) is None:
        raise InvalidLayer(f"{media_type} is not the media type of a layer")
    source = open(blob, "rb") if isinstance(blob, str | os.PathLike) else blob
    with LayerStream(source, max_size=max_size) as stream:
        return fold_layer(stream, directory, verify=stream.drain, losses=losses)
