"""Images rewritten: a range of layers made one, the layers above a base put on another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overlaykit.oci import Compression, History, rebase
from overlaykit.oci.disk import squash_layers
from overlaykit.store.names import whole_name
from overlaykit.store.packing import now, report
from overlaykit.store.unpacking import hold_image
from overlaykit.tree import Losses

if TYPE_CHECKING:
    from overlaykit.store.images import StoredImage
    from overlaykit.store.store import Store


def squash(
    store: Store, image: StoredImage, start: int, stop: int, name: str | None, *, message: str | None, compression: str
) -> StoredImage:
    """What Store.squash does."""
    whole = None if name is None else whole_name(name)
    Compression.parse(compression)
    losses: Losses = []
    with store.operation() as layout:
        hold_image(image, layout)
        told = History(created=now(), comment=message or f"layers {start} to {stop - 1} squashed")
        with store.snapshots.scratch(layout.lease) as folder:
            squashed = squash_layers(
                image, start, stop, layout, compression=compression, history=told, losses=losses, scratch=folder
            )
        stored = store.keep(layout, squashed, whole)
    report(f"squash {image}", losses)
    return stored


def put_on(store: Store, image: StoredImage, old: StoredImage, new: StoredImage, name: str | None) -> StoredImage:
    """What Store.rebase does."""
    whole = None if name is None else whole_name(name)
    with store.operation() as layout:
        for each in (image, new):
            hold_image(each, layout)
        return store.keep(layout, rebase(image, old, new), whole)
