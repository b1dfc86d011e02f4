"""Prune: what nobody uses goes, and how much came free."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from overlaykit.errors import InUse, NotFound
from overlaykit.store.removing import remove_image

if TYPE_CHECKING:
    from overlaykit.store.store import Store


@dataclass
class Pruned:
    """What was removed: names of containers, names or ids of images; and bytes that came free on disk."""

    containers: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    size: int = 0


def prune(store: Store, *, all: bool, containers: bool) -> Pruned:
    """What Store.prune does. What somebody uses, or has just removed, is passed over."""
    pruned = Pruned()
    for container in store.containers() if containers else []:
        with suppress(InUse, NotFound, FileNotFoundError):
            pruned.size += container.remove()
            pruned.containers.append(container.name)
    used = {container.record.image for container in store.containers()}
    for image in store.images():
        if image.digest not in used and (all or not image.names):
            with suppress(InUse, NotFound):
                pruned.size += remove_image(store, image, None, several=True, used=False).freed.size
                pruned.images.append(str(image))
    pruned.size += store.gc().size
    return pruned
