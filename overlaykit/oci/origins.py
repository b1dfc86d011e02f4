"""Where the files of an image come from: which layer gives, changes or hides a path, and which bytes nobody sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from overlaykit.oci.digest import Digest
from overlaykit.oci.documents import History
from overlaykit.oci.image import Image
from overlaykit.tree.blame import Verb, Waste
from overlaykit.tree.blame import blame as blame_trees
from overlaykit.tree.blame import waste as waste_of_trees
from overlaykit.tree.fingerprint import Fingerprints, fingerprint_layers
from overlaykit.tree.merge import merge
from overlaykit.tree.regular import find_target, normal_target
from overlaykit.tree.table import Rows


@dataclass(frozen=True, slots=True)
class Origin:
    """One layer's part in what a path is.

    layer    its number, 0 at the bottom
    verb     what it does to the path
    by       the path of the entry that does it: the path itself, or a directory above it
    diff_id  of the layer
    history  the step that made the layer; None where the image's config does not tell
    """

    layer: int
    verb: Verb
    by: str
    diff_id: Digest
    history: History | None


def blame(image: Image, path: str) -> list[Origin]:
    """What each layer of `image` does to `path`, bottom first; the last one decides. NotFound if no layer has it.

    Directories on the way that are symlinks are followed, inside the root: /bin/sh is /usr/bin/sh where /bin is a link.
    """
    trees = [layer.tree() for layer in image.layers]
    merged = merge(trees)
    wanted = normal_target(path.encode("utf-8", "surrogateescape"))
    row = find_target(merged, wanted)
    found = merged.path(row) if row >= 0 else wanted.decode("utf-8", "surrogateescape")
    return [
        Origin(touch.layer, touch.verb, touch.by, image.diff_ids[touch.layer], image.layer_history[touch.layer])
        for touch in blame_trees(trees, found)
    ]


def waste(image: Image) -> Iterator[Waste]:
    """Every file of the layers of `image` whose content no container of it sees, layer by layer, in tree order.

    A file that an upper layer has again with the same content is known by that content, so layers with such files are read
    once more.
    """
    trees = [layer.tree() for layer in image.layers]

    def fingerprints(number: int, rows: Rows) -> Fingerprints:
        return fingerprint_layers(trees[number], rows, lambda _: image.layers[number].uncompressed())

    return waste_of_trees(trees, fingerprints=fingerprints)
