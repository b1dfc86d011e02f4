"""Comparing by name: containers, images, layers, directories and tars, as people write them on a command line."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING

from overlaykit.errors import InvalidReference, NotFound
from overlaykit.oci import Digest, Image, Layer
from overlaykit.oci.sources import image_side, side
from overlaykit.store.containers import Container
from overlaykit.store.exporting import shown_by
from overlaykit.tree import Change
from overlaykit.tree.compare import Side
from overlaykit.tree.compare import compare as compare_sides
from overlaykit.tree.fingerprint import fingerprint_files

if TYPE_CHECKING:
    from overlaykit.store.store import Store

LAYERS = re.compile(r"(.+)#(\d+)(?:\.\.(\d+))?")
WAYS = "give a container, an image, IMAGE#LAYER, a layer's digest, a directory or a tar"


def compare(store: Store, lower: str, upper: str | None = None, *, content: bool = False) -> list[Change]:
    """What Store.compare does."""
    with ExitStack() as stack:
        if upper is None:
            return compare_sides(*_of_range(store, lower), content=content)
        return compare_sides(_side(store, lower, stack), _side(store, upper, stack), content=content)


def _of_range(store: Store, word: str) -> tuple[Side, Side]:
    """What is below some layers of an image, and what is there with them."""
    found = LAYERS.fullmatch(word)
    if found is None:
        raise InvalidReference(f"{word}: compare it with what?", hint="give two names, or IMAGE#LAYER")
    image, first, last = _layers(store, found)
    return image_side(image, 0, first), image_side(image, 0, last + 1)


def _layers(store: Store, found: re.Match[str]) -> tuple[Image, int, int]:
    """The image of "IMAGE#N" or "IMAGE#N..M", and the numbers. InvalidReference for layers that it does not have."""
    image = store.image(found[1])
    first, last = int(found[2]), int(found[3] or found[2])
    if not first <= last < len(image.layers):
        raise InvalidReference(f"{found[0]}: {found[1]} has layers 0 to {len(image.layers) - 1}")
    return image, first, last


def _side(store: Store, word: str, stack: ExitStack) -> Side:
    if word.startswith(("/", "./", "../")) or word in (".", ".."):
        return side(word)
    if found := LAYERS.fullmatch(word):
        if found[3]:
            raise InvalidReference(f"{word}: a range of layers is compared with what is below it: name nothing else")
        image, _, last = _layers(store, found)
        return image_side(image, 0, last + 1)
    found_here = _stored(store, word)
    if isinstance(found_here, Container):
        tree, content = shown_by(store, found_here, stack.enter_context(store.leases.hold()))
        return Side(tree, lambda rows: fingerprint_files(tree, rows, content))
    if found_here is not None:
        return side(found_here)
    if os.path.exists(word):
        return side(word)
    raise NotFound(f"no container, image, layer, file or directory {word}", hint=WAYS)


def _stored(store: Store, word: str) -> Container | Image | Layer | None:
    """What in the store is called `word`; None for nothing."""
    for ask in (store.container, store.image):
        try:
            return ask(word)
        except (NotFound, InvalidReference):
            pass
    return _layer(store, word)


def _layer(store: Store, word: str) -> Layer | None:
    """The layer in the store whose digest or diff_id `word` is."""
    try:
        digest = Digest(word)
    except InvalidReference:
        return None
    layers = (layer for image in store.images() for layer in image.layers)
    return next((layer for layer in layers if digest in (layer.digest, layer.diff_id)), None)
