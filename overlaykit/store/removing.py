"""Images removed: their names first, then all that nobody else needs.

What is decided about names is decided while index.json can change for nobody else, and no lease can grow: a name that
another image got meanwhile is that one's; an image that got another name meanwhile stays, and so does one of which somebody
is just making a container. Whoever else uses it, to copy from it or to save it, can go on: what that needs goes later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from overlaykit.errors import InUse, NotFound
from overlaykit.oci import Descriptor
from overlaykit.store.collect import Freed
from overlaykit.store.images import StoredImage, layout_image
from overlaykit.store.leases import exclusion
from overlaykit.store.names import familiar, name_of
from overlaykit.store.unpacking import blobs_and_layers

if TYPE_CHECKING:
    from overlaykit.store.store import Store


@dataclass
class Removed:
    """What became of an image that was to be removed: names it lost, whether it is gone, and what came free."""

    untagged: list[str]
    image: str | None = None
    freed: Freed = field(default_factory=Freed)


def remove_image(store: Store, image: StoredImage, name: str | None, *, several: bool, used: bool) -> Removed:
    """Take the whole name `name` away (None: each that `image` has), and with its last one the image.

    several, used: also if no name is said and it has several, also if containers need it; else InUse. NotFound if somebody
    has just removed it.
    """
    taken: list[str] = []
    users: list[str] = []

    def without(entries: tuple[Descriptor, ...]) -> list[Descriptor]:
        named = [(d, name_of(d)) for d in entries if _is_of(store, image, d)]
        has = {each for _, each in named}
        doomed = {name} if name is not None else {*image.names, None}
        if not has or (name is not None and name not in has):
            raise NotFound(f"no image {familiar(name) if name else image}: it has just been removed")
        if not has & doomed:
            raise InUse(f"image {image.id.short} has just got another name", hint="try again")
        if name is None and len(image.names) > 1 and not several:
            raise InUse(f"image {image.id.short} has {len(image.names)} names: {', '.join(image.tags)}", hint="rmi -f")
        taken[:] = [familiar(each) for each in image.names if each in has & doomed]
        if goes := has <= {*doomed, None}:
            rows = store.records.rows("SELECT name FROM containers WHERE image = ?", str(image.digest))
            users[:] = [row["name"] for row in rows]
            if users and not used:
                hint = f"overlaykit rm {users[0]} first; rmi -f takes only the name"
                raise InUse(f"image {image} is needed by container {', '.join(users[:3])}", hint=hint)
            if being_created_from(image) in held and not used:
                raise InUse(f"image {image} is needed by a container that is just being created")
            lease.note(*blobs_and_layers(image))  # who is killed below leaves it to the next to finish
        gone = [d for d, each in named if goes or each in doomed]
        return [d for d in entries if d not in gone]

    with store.leases.hold() as lease:
        with exclusion(store.leases.folder):
            held = store.leases.held(besides=lease)
            left = store.layout.edit(without)
        removed = Removed(taken)
        if not any(_is_of(store, image, d) for d in left):
            removed.freed = store.clear(lease)
            removed.image = None if users else image.id
    return removed


def being_created_from(image: StoredImage) -> str:
    """What a lease says of an image of which a container is being made."""
    return f"created-from/{image.digest.encoded}"


def is_listed(store: Store, image: StoredImage) -> bool:
    """Whether index.json has it, with a name or without."""
    return any(_is_of(store, image, entry) for entry in store.layout.descriptors())


def _is_of(store: Store, image: StoredImage, entry: Descriptor) -> bool:
    """Whether an entry of index.json means `image`: itself, or as the one of several platforms that is here."""
    if not entry.is_index:
        return entry.digest == image.digest
    found = layout_image(store.layout, entry)
    return found is not None and found.digest == image.digest
