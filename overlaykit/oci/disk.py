"""Images and layers to and from plain directories, without a store."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from overlaykit.errors import AlreadyExists, InvalidImage, InvalidLayer
from overlaykit.oci.abreast import Turn, abreast
from overlaykit.oci.digest import Digest, Readable, Reader, hasher
from overlaykit.oci.documents import Descriptor, History
from overlaykit.oci.layer import Layer, LayerWriter, NamedStream, compression_named, layer_type
from overlaykit.oci.mutate import replace_layers
from overlaykit.oci.pipeline import CompressingWriter
from overlaykit.oci.streams import Compression
from overlaykit.overlay.apply import apply_layer as apply_to_empty
from overlaykit.overlay.below import changeable
from overlaykit.overlay.contents import Contents
from overlaykit.overlay.fold import discard, fold, fold_layer, scratch_folder
from overlaykit.overlay.upper import UpperLayer
from overlaykit.tree.diff import against, diff
from overlaykit.tree.losses import Loss, Losses
from overlaykit.tree.merge import merge, squash
from overlaykit.tree.recorded import as_recorded
from overlaykit.tree.scan import scan
from overlaykit.tree.table import COLUMNS_FILE, StrPath, Tree
from overlaykit.tree.tarball import USUAL, Limits
from overlaykit.tree.tarwrite import Whole, write_tar
from overlaykit.tree.whiteout import WhiteoutFormat

if TYPE_CHECKING:
    from overlaykit.oci.image import Image
    from overlaykit.oci.layout import Layout

ROOTS_ONLY = ("owners", "device", "xattr trusted.", "xattr security.", "a hard link to a device")  # losses of other users


def unpack(
    image: Image,
    directory: StrPath,
    *,
    max_size: int | None = None,
    limits: Limits = USUAL,
    losses: Losses | None = None,
) -> None:
    """Make `directory` the merged tree of `image`: what a container of it would see at its beginning.

    directory: not there yet, or empty. It appears whole and verified, or not at all. max_size: bytes that one layer may
    unpack to; limits: what else it may cost. What the file system or the user's rights cannot keep is appended to
    `losses`. AlreadyExists if there is something; else what `apply_layer` raises.
    """
    home = Path(directory)
    if home.is_symlink() or (home.exists() and (not home.is_dir() or any(home.iterdir()))):
        raise AlreadyExists(f"{home} is there and not empty", hint="name a new directory, or an empty one")
    with scratch_folder(f".{home.name}-", home.parent) as staging:
        base = staging / "0"
        base.mkdir(mode=0o700)
        told: Losses = [] if losses is None else losses
        unpack_one = partial(_unpack_layer, staging, max_size, limits, told)
        abreast([partial(unpack_one, number, layer) for number, layer in enumerate(image.layers)])
        fd = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with changeable(fd):  # or its owner could not move it
                os.rename(base, home)
        finally:
            os.close(fd)


def _unpack_layer(
    staging: Path, max_size: int | None, limits: Limits, losses: Losses, number: int, layer: Layer, turn: Turn
) -> None:
    """Unpack a layer into a folder of its own; in its turn move that into the one of layer 0, which becomes the whole."""
    place, own = staging / str(number), list[Loss]()
    place.mkdir(mode=0o700, exist_ok=True)
    with layer.uncompressed(max_size=max_size) as stream:
        tree = apply_to_empty(turn.reading(stream), place, whiteouts=WhiteoutFormat.NONE, limits=limits, losses=own)
        stream.drain()
    turn.wait()
    if number:
        base = os.open(staging / "0", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fold(tree, place, base, undo=False)
        finally:
            os.close(base)
        discard(place)
    losses += own


def apply_layer(
    blob: StrPath | BinaryIO,
    directory: StrPath,
    media_type: str | None = None,
    *,
    max_size: int | None = None,
    limits: Limits = USUAL,
    record: StrPath | None = None,
    losses: Losses | None = None,
) -> Tree:
    """The Tree of the layer in `blob`, a tar that may be compressed, once `directory` shows what it does to it.

    blob: a path, or a stream, which is read to its end and stays open. All or nothing: an error leaves `directory` as it
    was. media_type: what the blob claims to be; InvalidLayer if that is no layer's. How it is compressed its own first
    bytes say. max_size: bytes that it may unpack to; limits: what else it may cost. record: a folder, made if need be,
    that keeps for `pack_layer` what only root could put on disk (owners, devices, some xattrs) of all layers applied
    with it. Raises InvalidLayer, UnsafePath or IntegrityError for what is wrong with the layer, OSError for what the
    file system refuses.
    """
    if media_type is not None and compression_named(media_type) is None:
        raise InvalidLayer(f"{media_type} is not the media type of a layer")
    source: Readable
    if isinstance(blob, str | os.PathLike):
        source, what = open(blob, "rb"), os.fspath(blob)
    else:
        source, what = _Lent(blob), "layer"
    losses = [] if losses is None else losses
    before = len(losses)
    with NamedStream(source, max_size=max_size, what=what) as stream:
        tree = fold_layer(stream, directory, verify=stream.drain, limits=limits, losses=losses)
    if record is not None:
        _keep(record, tree)
        losses[before:] = [
            replace(loss, what=f"{loss.what} (kept in {os.fspath(record)})") if loss.what.startswith(ROOTS_ONLY) else loss
            for loss in losses[before:]
        ]
    return tree


def _keep(record: StrPath, tree: Tree) -> None:
    """Let the record say what it said before, and what `tree` does to that."""
    Path(record).mkdir(parents=True, exist_ok=True)
    whole = squash([Tree.load(record), tree]) if Path(record, COLUMNS_FILE).exists() else tree
    with tempfile.TemporaryDirectory(prefix=".new-", dir=record) as aside:
        whole.save(aside)
        os.replace(Path(aside, COLUMNS_FILE), Path(record, COLUMNS_FILE))


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
    lower: Tree | StrPath | Sequence[StrPath] | None = None,
    whiteouts: WhiteoutFormat = WhiteoutFormat.NONE,
    compression: str = "gzip",
    source_date_epoch: int | None = None,
    subsecond: bool = False,
    record: StrPath | None = None,
    losses: Losses | None = None,
) -> PackedLayer:
    """Write to `out` the layer that leads from `lower` to what `directory` holds: the inverse of `apply_layer`.

    directory  the whole tree as it shall be (whiteouts NONE), or an overlay's upper (OVERLAY, USERXATTR)
    lower      what the layer goes on top of: a directory, or a merged Tree; None: nothing. Of an upper also the directories
               of its overlay's lower layers, bottom first, written as it is: redirects and metacopies are then resolved
    compression, source_date_epoch, subsecond  as `Compression.parse` and `write_tar` have them
    record     what `apply_layer` kept there of what is not on disk is packed too

    The same input gives the same bytes. What a layer cannot carry is appended to `losses`. Raises OSError for what cannot
    be read, InvalidLayer for an upper whose redirects or metacopies nobody has resolved, or lead nowhere.
    """
    how = Compression.parse(compression)
    if whiteouts is WhiteoutFormat.NONE and not (lower is None or isinstance(lower, Tree | str | os.PathLike)):
        raise ValueError("a list of lower directories goes with an overlay's upper: say in `whiteouts` of which kind")
    upper = None
    if lower is None or isinstance(lower, Tree | str | os.PathLike):
        found = scan(directory, whiteouts=whiteouts)
        below = lower if lower is None or isinstance(lower, Tree) else scan(lower)
    else:
        lowers = [(layer, scan(layer, whiteouts=whiteouts)) for layer in lower]
        upper = UpperLayer(directory, lowers, whiteouts=whiteouts)
        found, below = upper.tree, merge([tree for _, tree in lowers])
    if record is not None:
        found = as_recorded(found, Tree.load(record), uid=os.geteuid(), gid=os.getegid())
    if below is not None:
        found = against(diff(below, found) if whiteouts is WhiteoutFormat.NONE else found, below)
    digest, size, whole = hasher(), 0, Whole(out)

    def sink(data: bytes) -> None:
        nonlocal size
        digest.update(data)
        size += len(data)
        whole.write(data)

    with CompressingWriter(sink, how) as tar:
        write_tar(
            found,
            Contents(found, directory) if upper is None else upper.contents(found),
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
    scratch: StrPath | None = None,
) -> Image:
    """`image` with its layers start..stop (0 is the bottom, `stop` not included) as one, new in `layout`.

    What is below stays as it is, and so stays shared. The new layer does to any tree what the old ones did one after
    another: whiteouts stay in it. In between they are unpacked to a temporary folder in `scratch`, None: in the layout.
    """
    if not 0 <= start < stop <= len(image.layers):
        raise InvalidImage(f"image {image.id}: layers {start} to {stop} of {len(image.layers)}")
    with scratch_folder("squash-", scratch or layout.root) as folder:
        lowers: list[tuple[StrPath, Tree]] = []
        for number in range(start, stop):
            directory = folder / str(number)
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
