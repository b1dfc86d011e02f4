"""What images, layers and containers hold by Docker's measure: bytes of content, uncompressed, each layer for itself. What
they take on disk is another question: sizes.py.

Of an image's layer that is a fact which never changes, so it is written down when it is first found out.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from overlaykit.errors import OverlaykitError
from overlaykit.oci import Digest, Image, Layer
from overlaykit.store.records import Records
from overlaykit.tree import Tree
from overlaykit.tree.apparent import apparent_size

if TYPE_CHECKING:
    from overlaykit.store.containers import Container
    from overlaykit.store.store import Store


def note(records: Records, diff_id: Digest, size: int) -> int:
    """How much the layer holds, written down."""
    with suppress(OSError):  # on a full disk it is found out again the next time
        records.execute("INSERT OR IGNORE INTO layer_sizes VALUES (?, ?)", str(diff_id), size)
    return size


def layer_sizes(store: Store, image: Image) -> list[int]:
    """Bytes that each layer of the image holds, bottom first. OverlaykitError, OSError if one cannot be read."""
    marks = ", ".join("?" * len(image.diff_ids))
    rows = store.records.rows(f"SELECT * FROM layer_sizes WHERE diff_id IN ({marks})", *map(str, image.diff_ids))
    known = {row["diff_id"]: row["size"] for row in rows}
    return [
        known[diff_id] if diff_id in known else note(store.records, diff_id, apparent_size(_tree(store, chain_id, layer)))
        for diff_id, chain_id, layer in zip(image.diff_ids, image.chain_ids, image.layers, strict=True)
    ]


def _tree(store: Store, chain_id: Digest, layer: Layer) -> Tree:
    return store.snapshots.trees(chain_id)[-1] if store.snapshots.has(chain_id) else layer.tree()


def image_size(store: Store, image: Image) -> int | None:
    """Bytes that all layers hold; None if one is damaged, which is for fsck to say."""
    with suppress(OverlaykitError, OSError):
        return sum(layer_sizes(store, image))
    return None


def container_sizes(store: Store, container: Container) -> tuple[int, int]:
    """Bytes that the container's own layers hold, and these with its image's: Docker's SizeRw and SizeRootFs."""
    image, own, upper = store.snapshots.stack(container.id)
    mine = apparent_size(store.snapshots.scan(upper)) + sum(apparent_size(tree) for _, tree in own)
    return mine, mine + sum(apparent_size(tree) for _, tree in image)
