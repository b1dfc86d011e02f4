"""The images of a store: which there are, what they are called, and how one is found by what people write."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, BinaryIO

from msgspec import to_builtins

from overlaykit.errors import InvalidReference, NotFound, OverlaykitError
from overlaykit.oci import Descriptor, Layout, Reference, RuntimeConfig
from overlaykit.oci.image import BlobImage
from overlaykit.store.names import familiar, name_of, whole_name
from overlaykit.tree.table import StrPath

HEX = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})\Z")


class StoredImage(BlobImage):
    """An image in a store. `names` are its whole names, `tags` the same as people write them; both may be empty."""

    def __init__(self, layout: Layout, descriptor: Descriptor, names: Iterable[str] = ()) -> None:
        super().__init__(layout, descriptor)
        self.names = tuple(names)

    @property
    def tags(self) -> list[str]:
        return [familiar(name) for name in self.names]

    def save(self, path: StrPath | BinaryIO, *, format: str = "docker-archive", names: Iterable[str] = ()) -> None:
        """Write the image, under all its names or under `names`, to a file or directory.

        format: docker-archive (for `docker load`), oci-archive, oci-dir.
        """
        super().save(path, format=format, names=tuple(names) or self.names)

    def __str__(self) -> str:
        return self.tags[0] if self.names else self.id.short


def listed(layout: Layout, *, called: str | None = None) -> list[StoredImage]:
    """Every image that index.json lists, each once, the newest first; an entry that is no image is passed over.

    called: only the one of that whole name.
    """
    found: dict[str, Descriptor] = {}
    names: dict[str, list[str]] = {}
    for descriptor in layout.descriptors():
        found.setdefault(descriptor.digest, descriptor)
        name = name_of(descriptor)
        if name is not None:
            names.setdefault(descriptor.digest, []).append(name)
    images = []
    for digest, descriptor in found.items():
        if called is not None and called not in names.get(digest, ()):
            continue
        image = layout_image(layout, descriptor, names.get(digest, ()))
        if image is not None:
            images.append(image)
    return sorted(images, key=lambda image: image.config.created or "", reverse=True)


def layout_image(layout: Layout, descriptor: Descriptor, names: Iterable[str] = ()) -> StoredImage | None:
    """The image of an entry; None if it is not one, or is not whole."""
    try:
        plain = layout.image(descriptor) if descriptor.is_index else None
        image = StoredImage(layout, plain.descriptor if plain else descriptor, names)
        _ = image.config
    except (OverlaykitError, OSError):
        return None  # other tools may put other things here, and fsck is who tells of damage
    return image


def find(layout: Layout, wanted: str) -> StoredImage:
    """The image that `wanted` names: NAME[:TAG], NAME@DIGEST, a digest, an id, or the first four or more digits of one.

    NotFound; InvalidReference if the digits fit several.
    """
    digest = None
    try:
        digest = Reference.parse(wanted).digest
        if digest is None and (named := listed(layout, called=whole_name(wanted))):
            return named[0]
    except InvalidReference:
        if not HEX.match(wanted):
            raise
    images = listed(layout)
    for image in images:
        if digest in (image.digest, image.id):
            return image
    if digits := HEX.match(wanted):
        by_id = [image for image in images if image.id.encoded.startswith(digits[1])]
        matches = by_id or [image for image in images if image.digest.encoded.startswith(digits[1])]
        if len({image.id for image in matches}) > 1:
            raise InvalidReference(f"{wanted} is how the ids of {len(matches)} images begin", hint="give more digits")
        if matches:
            return matches[0]
    raise NotFound(f"no image {wanted}", hint=_known(images))


def _known(images: list[StoredImage]) -> str:
    if not images:
        return "there is no image yet: overlaykit load FILE, or overlaykit import ROOTFS NAME"
    tags = [tag for image in images for tag in image.tags]
    more = " and more" if len(tags) > 3 else ""
    return f"there is {', '.join(tags[:3])}{more}" if tags else "overlaykit images lists them"


def inspect(image: StoredImage, driver_data: dict[str, str] | None, size: int | None) -> dict[str, Any]:
    """What there is to know, under the names that Docker gives it. driver_data: where its layers lie, if unpacked. size:
    what they hold."""
    config = image.config
    last = image.history[-1] if image.history else None
    return {
        "Id": image.id,
        "RepoTags": image.tags,
        "RepoDigests": sorted({f"{familiar(name).rpartition(':')[0]}@{image.digest}" for name in image.names}),
        "Comment": (last.comment if last else None) or "",
        "Created": config.created or "",
        "Author": config.author or "",
        "Config": config_facts(image.runtime),
        "Architecture": config.architecture,
        **({"Variant": config.variant} if config.variant else {}),
        "Os": config.os,
        "Size": size,
        "GraphDriver": {"Data": driver_data, "Name": "overlay2"},
        "RootFS": {"Type": "layers", "Layers": list(image.diff_ids)},
        "Descriptor": {"mediaType": image.media_type, "digest": image.digest, "size": len(image.raw_manifest())},
    }


def config_facts(config: RuntimeConfig, **more: object) -> dict[str, Any]:
    """A config with the fields that Docker always prints, in its order, set or not; `more` are facts of a container."""
    unset = {
        "Hostname": "",
        "Domainname": "",
        "User": "",
        **dict.fromkeys(("AttachStdin", "AttachStdout", "AttachStderr"), False),
        **dict.fromkeys(("Tty", "OpenStdin", "StdinOnce"), False),
        "Env": None,
        "Cmd": None,
        "Image": "",
        "Volumes": None,
        "WorkingDir": "",
        "Entrypoint": None,
        "OnBuild": None,
        "Labels": None,
    }
    return {**unset, **to_builtins(config, enc_hook=str), **more}
