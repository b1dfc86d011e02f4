"""New images from existing ones: append, with_config, annotate, rebase. Image -> Image, and nothing of the old one
changes.

Layers are shared, never copied. What a document holds and overlaykit does not know stays in it. The new documents are
canonical JSON, so the same change of the same image gives the same digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import structs

from overlaykit.errors import InvalidImage
from overlaykit.oci.digest import Digest
from overlaykit.oci.documents import (
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    History,
    ImageConfig,
    Manifest,
    RootFS,
    RuntimeConfig,
    canonical,
    rewrite,
)
from overlaykit.oci.image import Image
from overlaykit.oci.layer import Layer, retyped
from overlaykit.oci.platforms import Platform


class BuiltImage(Image):
    """An image of documents and layers at hand."""

    def __init__(self, manifest: bytes, config: bytes, layers: Sequence[Layer]) -> None:
        self._manifest, self._config, self._layers = manifest, config, tuple(layers)

    def raw_manifest(self) -> bytes:
        return self._manifest

    def raw_config(self) -> bytes:
        return self._config

    def layer(self, i: int) -> Layer:
        return self._layers[i]


def new_image(
    layers: Sequence[Layer] = (),
    *,
    platform: Platform | None = None,
    config: RuntimeConfig | None = None,
    history: Sequence[History] | None = None,
    created: str | None = None,
) -> Image:
    """An image from scratch, of `layers` (bottom first), for `platform` (this machine's).

    history: an entry for each layer, besides those with `empty_layer`.
    """
    where = platform or Platform.host()
    document = ImageConfig(
        created=created,
        architecture=where.architecture,
        os=where.os,
        variant=where.variant,
        os_version=where.os_version,
        os_features=where.os_features,
        config=config,
        rootfs=RootFS(type="layers", diff_ids=tuple(layer.diff_id for layer in layers)),
        history=tuple(history) if history is not None else None,
    )
    return image_of(canonical(document), layers)


def image_of(config: bytes, layers: Sequence[Layer]) -> Image:
    """The OCI image of a config that exists and its layers."""
    manifest = Manifest(
        schema_version=2,
        media_type=OCI_MANIFEST,
        config=Descriptor(media_type=OCI_CONFIG, digest=Digest.of(config), size=len(config)),
        layers=tuple(layer.descriptor for layer in layers),
    )
    return BuiltImage(canonical(manifest), config, layers)


def append(image: Image, *layers: Layer, history: History | Sequence[History] | None = None) -> Image:
    """`image` with `layers` on top, bottom first.

    history: one entry, or several of which as many as there are layers have no `empty_layer`. The config's `created`
    becomes that of the last entry that says one.
    """
    entries = (history,) if isinstance(history, History) else tuple(history or ())
    made = sum(not h.empty_layer for h in entries)
    if not entries:
        entries = (History(),) * len(layers)
    elif made != len(layers):
        raise InvalidImage(f"{len(layers)} layers to append, and a history that tells of {made}")
    old = image.config
    rootfs = RootFS(type="layers", diff_ids=(*image.diff_ids, *(layer.diff_id for layer in layers)))
    created = next((h.created for h in reversed(entries) if h.created), old.created)
    config = structs.replace(old, created=created, rootfs=rootfs, history=(*_whole_history(image), *entries))
    return _changed(image, config, (*image.layers, *layers))


def with_config(image: Image, *, history: History | None = None, **changes: Any) -> Image:
    """`image` with fields of its config changed: those of ImageConfig and RuntimeConfig, by name. None takes one away.

        with_config(image, cmd=("/bin/sh",), env=(*(image.runtime.env or ()), "LANG=C"), author="me")

    history: an entry about it, which will have `empty_layer`. TypeError for an unknown name, InvalidImage for a
    change of what follows from the layers.
    """
    if refused := {"rootfs", "history", "config"} & changes.keys():
        raise InvalidImage(f"{', '.join(sorted(refused))}: not to be set as such: append layers, or name the field within")
    inner = {k: changes.pop(k) for k in tuple(changes) if k in RuntimeConfig.__struct_fields__}
    config = structs.replace(image.config, **changes)
    if inner:
        config = structs.replace(config, config=structs.replace(image.runtime, **inner))
    if history is not None:
        entries = (*_whole_history(image), structs.replace(history, empty_layer=True))
        config = structs.replace(config, history=entries, created=history.created or config.created)
    return _changed(image, config, image.layers)


def annotate(image: Image, annotations: Mapping[str, str | None]) -> Image:
    """`image` with annotations of its manifest set, or taken away where the value is None."""
    kept = {k: v for k, v in (image.annotations | dict(annotations)).items() if v is not None}
    manifest = structs.replace(image.manifest, annotations=kept or None)
    return BuiltImage(rewrite(image.raw_manifest(), image.manifest, manifest), image.raw_config(), image.layers)


def rebase(image: Image, old_base: Image, new_base: Image) -> Image:
    """`image` with `new_base` under it in place of `old_base`: the layers above that, and its config, on new ones.

    Layers are taken as they are: whether what they change is in the new base as they knew it, is for the caller to
    know. InvalidImage if `image` does not begin with `old_base`, or the bases are for different platforms.
    """
    below = len(old_base.diff_ids)
    if image.diff_ids[:below] != old_base.diff_ids:
        same = [a == b for a, b in zip(image.diff_ids, old_base.diff_ids, strict=False)]
        match = (*same, False).index(False)
        raise InvalidImage(
            f"image {image.id.short} is not built on {old_base.id.short}: "
            f"of that one's {below} layers the lowest {match} are the same"
        )
    if old_base.platform.normalised() != new_base.platform.normalised():
        raise InvalidImage(f"the old base is for {old_base.platform}, the new one for {new_base.platform}")
    rootfs = RootFS(type="layers", diff_ids=(*new_base.diff_ids, *image.diff_ids[below:]))
    history = (*_whole_history(new_base), *_history_above(image, old_base))
    config = structs.replace(image.config, rootfs=rootfs, history=history, os_version=new_base.config.os_version)
    return _changed(image, config, (*new_base.layers, *image.layers[below:]))


def replace_layers(image: Image, start: int, stop: int, layer: Layer, *, history: History | None = None) -> Image:
    """`image` with `layer` in the place of its layers start..stop (0 is the bottom, `stop` not included).

    history: the entry of the new layer; those of the layers that it replaces stay, as steps without a layer of their own.
    """
    if not 0 <= start < stop <= len(image.layers):
        raise InvalidImage(f"image {image.id}: layers {start} to {stop} of {len(image.layers)}")
    entries: list[History] = []
    number = 0
    for entry in _whole_history(image):
        if entry.empty_layer:
            entries.append(entry)
            continue
        inside = start <= number < stop
        entries.append(structs.replace(entry, empty_layer=True) if inside else entry)
        number += 1
        if number == stop:
            entries.append(history or History())
    diff_ids = (*image.diff_ids[:start], layer.diff_id, *image.diff_ids[stop:])
    config = structs.replace(image.config, rootfs=RootFS(type="layers", diff_ids=diff_ids), history=tuple(entries))
    return _changed(image, config, (*image.layers[:start], layer, *image.layers[stop:]))


def with_layers(image: Image, layers: Sequence[Layer]) -> Image:
    """`image` with its layers kept otherwise: the same diff_ids, so the same image id, and another manifest."""
    told = tuple(layer.diff_id for layer in layers)
    if told != image.diff_ids:
        raise InvalidImage(f"image {image.id}: its layers have the diff_ids {image.diff_ids}, not {told}")
    return _changed(image, image.config, layers)


def _history_above(image: Image, base: Image) -> tuple[History, ...]:
    """The history entries of `image` that are not its base's: those after that of the base's last layer, and after what
    else the base says at the same place (its CMD, say)."""
    entries = _whole_history(image)
    layers = i = 0
    while i < len(entries):
        of_base = i < len(base.history) and base.history[i] == entries[i] and entries[i].empty_layer
        if layers == len(base.diff_ids) and not of_base:
            break
        layers += not entries[i].empty_layer
        i += 1
    return entries[i:]


def _whole_history(image: Image) -> tuple[History, ...]:
    """The image's history, with entries added for layers it does not tell of: later ones then stand for their own."""
    missing = len(image.diff_ids) - sum(not h.empty_layer for h in image.history)
    if missing < 0:
        raise InvalidImage(f"image {image.id}: the history tells of {-missing} layers more than there are")
    return (*image.history, *(History(),) * missing)


def _changed(image: Image, config: ImageConfig, layers: Sequence[Layer]) -> Image:
    """`image` with another config and other layers, its documents' unknown fields kept."""
    raw_config = rewrite(image.raw_config(), image.config, config)
    described = structs.replace(
        image.manifest.config, digest=Digest.of(raw_config), size=len(raw_config), data=None
    )  # `data` would be the old config itself
    listed = tuple(
        image.manifest.layers[i]
        if i < len(image.layers) and layer is image.layers[i]
        else retyped(layer.descriptor, docker=image.is_docker)
        for i, layer in enumerate(layers)
    )
    manifest = structs.replace(image.manifest, config=described, layers=listed)
    return BuiltImage(rewrite(image.raw_manifest(), image.manifest, manifest), raw_config, layers)
