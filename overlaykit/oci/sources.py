"""What can be compared: images, layers, directories, tars. Each as a tree whose contents can be read where need be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from overlaykit.oci.archive import NoImage, open_image
from overlaykit.oci.image import Image
from overlaykit.oci.layer import Layer, NamedStream
from overlaykit.tree.changes import Change
from overlaykit.tree.compare import Side, as_files
from overlaykit.tree.compare import compare as compare_sides
from overlaykit.tree.fingerprint import Fingerprints, fingerprint, fingerprint_layers
from overlaykit.tree.merge import merge
from overlaykit.tree.scan import scan
from overlaykit.tree.table import Rows, StrPath, Tree
from overlaykit.tree.tarball import index_tar

Source = Image | Layer | Tree | Side | StrPath


def compare(lower: Source, upper: Source, *, content: bool = False) -> list[Change]:
    """What changed from `lower` to `upper`, in tree order, with reasons and sizes.

    Each is an image (what a container of it would see), a layer, a Tree, a directory, or the path of an image or of a
    layer's tar, compressed or not. A layer by itself is its files, whiteouts among them as the .wh. files of its tar.
    Contents are read only where size and time cannot tell, of Trees never; content: wherever the sizes agree. Raises
    InvalidLayer, InvalidImage and IntegrityError for what is wrong with a source, OSError for what cannot be read.
    """
    return compare_sides(side(lower), side(upper), content=content)


def side(source: Source) -> Side:
    """`source` as one side of a comparison. Raises as `compare` does."""
    if isinstance(source, Side):
        return source
    if isinstance(source, Image):
        return image_side(source)
    if isinstance(source, Layer):
        tree = as_files(source.tree())
        return Side(tree, partial(_of_layers, tree, [source]), [source.diff_id])
    if isinstance(source, Tree):
        return Side(as_files(source))
    path = Path(source)
    if path.is_dir() and not (path / "oci-layout").exists():
        tree = scan(path)
        return Side(tree, lambda rows: fingerprint(tree.take(rows), path))
    try:
        return image_side(open_image(path))
    except NoImage:
        return _tar_side(path)


def image_side(image: Image, start: int = 0, stop: int | None = None) -> Side:
    """What layers start..stop of `image` (0 is the bottom, `stop` not included) show on top of one another."""
    layers = image.layers[start:stop]
    tree = merge([layer.tree() for layer in layers])
    return Side(tree, partial(_of_layers, tree, layers), [layer.diff_id for layer in layers])


def _of_layers(tree: Tree, layers: Sequence[Layer], rows: Rows) -> Fingerprints:
    return fingerprint_layers(tree, rows, lambda number: layers[number].uncompressed())


def _tar_side(path: Path) -> Side:
    def opened(_: int = 0) -> NamedStream:
        return NamedStream(open(path, "rb", buffering=0), what=os.fspath(path))

    with opened() as stream:
        tree = as_files(index_tar(stream))
    return Side(tree, lambda rows: fingerprint_layers(tree, rows, opened))
