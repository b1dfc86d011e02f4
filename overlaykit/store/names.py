"""What things are called: images in index.json, containers by two words if nobody names them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from overlaykit.errors import InvalidReference
from overlaykit.oci.documents import IMAGE_NAME, REF_NAME, Descriptor
from overlaykit.oci.reference import Reference
from overlaykit.store.containerrecords import is_taken

if TYPE_CHECKING:
    from overlaykit.oci.layout import Layout
    from overlaykit.store.records import Records

CONTAINER_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,127}\Z")
SNAPSHOT_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}\Z")

QUALITIES = """
    amber brave brisk calm clear cosy crisp eager early fair fleet fond fresh gentle glad golden happy hardy jolly keen kind
    lively loyal lucid mellow merry mild neat nimble noble patient plain proud quick quiet ready rosy sharp silent sleek
    smart snug solid steady sunny swift tidy vivid warm wise witty
"""
THINGS = """
    acorn anchor aspen badger barley beacon birch brook cedar clover comet copper coral crane dune ember falcon fern finch
    garnet glacier harbor hazel heron island juniper kestrel lagoon lantern larch lichen linden lotus maple marble meadow
    osprey otter pebble pepper pine plover poppy quartz raven reed river robin saffron spruce thistle tundra walnut willow
"""


def random_name() -> str:
    """A name for a container, such as quiet_harbor."""
    return f"{secrets.choice(QUALITIES.split())}_{secrets.choice(THINGS.split())}"


def free_name(records: Records) -> str:
    """Two words that name no container yet."""
    name = random_name()
    while is_taken(records, name):
        name = f"{random_name()}_{secrets.token_hex(2)}"
    return name


def check_container_name(name: str) -> str:
    """`name`, if a container may be called so. InvalidReference."""
    if not CONTAINER_NAME.match(name):
        raise InvalidReference(
            f"{name!r} cannot name a container",
            hint="2 to 128 letters, digits, '_', '.' and '-', the first a letter or digit",
        )
    return name


def check_snapshot_name(name: str) -> str:
    """`name`, if a snapshot of a container may be called so. InvalidReference."""
    if not SNAPSHOT_NAME.match(name):
        raise InvalidReference(f"{name!r} cannot name a snapshot", hint="1 to 128 letters, digits, '_', '.' and '-'")
    return name


# --- images -----------------------------------------------------------------------------------------------------------


def whole_name(text: str) -> str:
    """What `text` names, written out: registry, repository and tag. InvalidReference, also for a name with a digest."""
    reference = Reference.parse(text)
    if reference.digest is not None:
        raise InvalidReference(f"{text!r}: an image is named by a tag; its digest follows from what is in it")
    if reference.name == "docker.io/library/sha256":  # such a name and a tag would read as a digest; Docker refuses it too
        raise InvalidReference(f"{text!r}: an image cannot be called sha256")
    return str(reference.tagged)


def name_of(descriptor: Descriptor) -> str | None:
    """The whole name that an entry of index.json gives its image; None for none, or one that is no image's name."""
    annotations = descriptor.annotations or {}
    for annotation in (IMAGE_NAME, REF_NAME):
        if text := annotations.get(annotation):
            try:
                return whole_name(text)
            except InvalidReference:
                continue
    return None


def familiar(name: str) -> str:
    """A whole name as people write it."""
    return Reference.parse(name).familiar


def give_name(layout: Layout, descriptor: Descriptor, name: str | None, *, known_as: Iterable[str] = ()) -> None:
    """Let the whole name `name` (None: none, just keep the image) mean `descriptor`, and no other image.

    An image that loses its last name so stays, without one. known_as: one of these digests must be listed now, as the
    image that gets another name; else it has been removed, and that is a KeyError.
    """
    give_names(layout, [(descriptor, name)], known_as=known_as)


def give_names(layout: Layout, given: Iterable[tuple[Descriptor, str | None]], *, known_as: Iterable[str] = ()) -> None:
    """The same for several, in one step."""
    pairs, wanted = list(given), set(known_as)

    def change(entries: tuple[Descriptor, ...]) -> tuple[Descriptor, ...]:
        if wanted and not any(d.digest in wanted for d in entries):
            raise KeyError(pairs[0][0].digest)
        for descriptor, name in pairs:
            entries = _with_name(entries, _unnamed(descriptor), name)
        return entries

    layout.edit(change)


def _with_name(entries: tuple[Descriptor, ...], bare: Descriptor, name: str | None) -> tuple[Descriptor, ...]:
    if name is None:
        return entries if any(d.digest == bare.digest for d in entries) else (*entries, bare)
    kept = [d for d in entries if name_of(d) != name and not (d.digest == bare.digest and name_of(d) is None)]
    listed = {d.digest for d in kept} | {bare.digest}
    lost = {d.digest: _unnamed(d) for d in entries if d.digest not in listed}
    return (*kept, *lost.values(), replace(bare, annotations={**(bare.annotations or {}), **_named(name)}))


def _named(name: str) -> dict[str, str]:
    return {REF_NAME: name, IMAGE_NAME: name}


def _unnamed(descriptor: Descriptor) -> Descriptor:
    kept = {k: v for k, v in (descriptor.annotations or {}).items() if k not in (REF_NAME, IMAGE_NAME)}
    return replace(descriptor, annotations=kept or None)
