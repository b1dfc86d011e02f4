"""Images: an immutable manifest, config and stack of layers, read when asked for.

A subclass says three things, `raw_manifest()`, `raw_config()` and `layer(i)`; the rest follows from them. Layers are
listed bottom first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, BinaryIO, Protocol

from overlaykit.errors import (
    DigestMismatch,
    IntegrityError,
    InvalidImage,
    InvalidLayer,
    NotFound,
    OverlaykitError,
    SizeMismatch,
)
from overlaykit.oci.digest import Digest, chain_ids
from overlaykit.oci.documents import (
    DOCKER_MANIFEST,
    INDEX_TYPES,
    OCI_MANIFEST,
    Descriptor,
    History,
    ImageConfig,
    Index,
    Manifest,
    RuntimeConfig,
    is_index,
    parse,
    parse_index,
    parse_manifest,
)
from overlaykit.oci.layer import BlobLayer, Layer, compression_named
from overlaykit.oci.platforms import Platform

if TYPE_CHECKING:
    import io
    import os

    from overlaykit.oci.origins import Origin
    from overlaykit.tree.blame import Waste
    from overlaykit.tree.losses import Losses
    from overlaykit.tree.tarball import Limits

    StrPath = str | os.PathLike[str]

MAX_DEPTH = 8  # indexes within indexes; two are usual


class Blobs(Protocol):
    """Where the blobs of an image are: a layout, an archive."""

    def open_blob(self, digest: str) -> io.RawIOBase:
        """The blob's bytes, not verified. NotFound."""

    def read(self, blob: Descriptor | str) -> bytes:
        """All of a small blob, verified. NotFound."""


class Image(ABC):
    """One image, for one platform."""

    @abstractmethod
    def raw_manifest(self) -> bytes:
        """The manifest's bytes, as they are hashed."""

    @abstractmethod
    def raw_config(self) -> bytes:
        """The config's bytes, as they are hashed."""

    @abstractmethod
    def layer(self, i: int) -> Layer:
        """Layer number `i`, 0 at the bottom. For `layers`, which keeps it; ask that."""

    @cached_property
    def manifest(self) -> Manifest:
        return parse_manifest(self.raw_manifest(), what=f"manifest {self.digest}")

    @cached_property
    def config(self) -> ImageConfig:
        return parse(ImageConfig, self.raw_config(), what=f"config {self.id}")

    @cached_property
    def digest(self) -> Digest:
        """Of the manifest."""
        return Digest.of(self.raw_manifest())

    @cached_property
    def id(self) -> Digest:
        """The image id, as Docker has it: the digest of the config. It stays when layers are compressed otherwise."""
        return Digest.of(self.raw_config())

    @cached_property
    def descriptor(self) -> Descriptor:
        """Of the manifest."""
        return Descriptor(media_type=self.media_type, digest=self.digest, size=len(self.raw_manifest()))

    @property
    def media_type(self) -> str:
        """Of the manifest, which need not say it itself."""
        if self.manifest.media_type:
            return self.manifest.media_type
        return DOCKER_MANIFEST if ".docker." in self.manifest.config.media_type else OCI_MANIFEST

    @property
    def is_docker(self) -> bool:
        """Whether the documents are of Docker's schema 2, and not of OCI's."""
        return self.media_type == DOCKER_MANIFEST

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, bottom first. InvalidImage if manifest and config do not agree how many there are."""
        listed, said = len(self.manifest.layers), len(self.config.diff_ids)
        if listed != said:
            raise InvalidImage(f"image {self.id}: the manifest lists {listed} layers, the config {said} diff_ids")
        return tuple(self.layer(i) for i in range(listed))

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        return self.config.diff_ids

    @cached_property
    def chain_ids(self) -> list[Digest]:
        return chain_ids(self.diff_ids)

    @property
    def history(self) -> tuple[History, ...]:
        """Oldest first; entries with `empty_layer` have no layer."""
        return self.config.history or ()

    @cached_property
    def layer_history(self) -> tuple[History | None, ...]:
        """For each layer the history entry that it came of, None where the config does not tell."""
        told: list[History | None] = [h for h in self.history if not h.empty_layer]
        return tuple(told + [None] * (len(self.diff_ids) - len(told)))[: len(self.diff_ids)]

    @property
    def runtime(self) -> RuntimeConfig:
        """What its containers run as."""
        return self.config.config or RuntimeConfig()

    @property
    def platform(self) -> Platform:
        return self.config.platform

    @property
    def annotations(self) -> dict[str, str]:
        return dict(self.manifest.annotations or {})

    @property
    def size(self) -> int:
        """Bytes of all its blobs: manifest, config and layers, as they are kept."""
        return len(self.raw_manifest()) + self.manifest.config.size + sum(d.size for d in self.manifest.layers)

    @property
    def created(self) -> datetime | None:
        """When it was made, None if it does not say (or not in RFC 3339)."""
        try:
            return datetime.fromisoformat(self.config.created or "")
        except ValueError:
            return None

    def save(self, path: StrPath | BinaryIO, *, format: str = "docker-archive", names: Iterable[str] = ()) -> None:
        """Write the image to a docker-archive, an oci-archive or an oci-dir. See `saving.save`."""
        from overlaykit.oci.saving import save

        save(self, path, format=format, names=names)

    def unpack(
        self,
        directory: StrPath,
        *,
        max_size: int | None = None,
        limits: Limits | None = None,
        losses: Losses | None = None,
    ) -> None:
        """Make `directory` what a container of the image would see. See `disk.unpack`."""
        from overlaykit.oci.disk import unpack
        from overlaykit.tree.tarball import USUAL

        unpack(self, directory, max_size=max_size, limits=limits or USUAL, losses=losses)

    def blame(self, path: str) -> list[Origin]:
        """What each layer does to `path`, bottom first, and the history entry behind it. NotFound. See `origins.blame`."""
        from overlaykit.oci.origins import blame

        return blame(self, path)

    def waste(self) -> list[Waste]:
        """The files of all layers whose content nobody sees. See `origins.waste`."""
        from overlaykit.oci.origins import waste

        return list(waste(self))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id.short}>"


class BlobImage(Image):
    """An image whose blobs someone can open."""

    def __init__(self, blobs: Blobs, descriptor: Descriptor) -> None:
        self._blobs = blobs
        self._descriptor = descriptor

    def raw_manifest(self) -> bytes:
        return self._manifest

    def raw_config(self) -> bytes:
        return self._config

    @cached_property
    def _manifest(self) -> bytes:
        return self._blobs.read(self._descriptor)

    @cached_property
    def _config(self) -> bytes:
        media_type = self.manifest.config.media_type
        if not (media_type.endswith("+json") and ("image.config" in media_type or "container.image" in media_type)):
            raise InvalidImage(f"manifest {self.digest}: an artifact of type {media_type}, and no container image")
        return self._blobs.read(self.manifest.config)

    def layer(self, i: int) -> Layer:
        descriptor = self.manifest.layers[i]
        if descriptor.media_type.endswith("+encrypted"):
            raise InvalidImage(f"layer {i}, {descriptor.digest}: encrypted")
        return BlobLayer(descriptor, partial(self._blobs.open_blob, descriptor.digest), diff_id=self.diff_ids[i])


class ImageIndex:
    """Several images of one name, one a platform."""

    def __init__(self, blobs: Blobs, descriptor: Descriptor) -> None:
        self._blobs = blobs
        self._descriptor = descriptor

    @cached_property
    def raw(self) -> bytes:
        return self._blobs.read(self._descriptor)

    @cached_property
    def index(self) -> Index:
        return parse_index(self.raw, what=f"index {self._descriptor.digest}")

    @property
    def digest(self) -> Digest:
        return self._descriptor.digest

    def descriptors(self) -> list[Descriptor]:
        """Of the images in it and in the indexes in it, in order. Attestations are no images."""
        return list(_walk(self._blobs, self, 1))

    def image(self, platform: Platform | None = None) -> Image:
        """The image for `platform`, this machine's if there are several. NotFound says what there is."""
        return find_image(self._blobs, self._descriptor, platform=platform)


def _walk(blobs: Blobs, index: ImageIndex, depth: int) -> Iterator[Descriptor]:
    if depth > MAX_DEPTH:
        raise InvalidImage(f"index {index.digest}: more than {MAX_DEPTH} indexes within each other")
    for descriptor in index.index.manifests:
        if descriptor.media_type in INDEX_TYPES:
            try:
                yield from _walk(blobs, ImageIndex(blobs, descriptor), depth + 1)
            except NotFound:
                continue  # an archive need not hold all that its index lists
        elif not descriptor.is_attestation:
            yield descriptor


def find_image(blobs: Blobs, descriptor: Descriptor, *, platform: Platform | None = None) -> Image:
    """The image that `descriptor` is of; if it is an index, the image in it for `platform`.

    platform: None is this machine's where there is a choice, and what there is where there is none. NotFound if there
    is nothing that runs there.
    """
    if descriptor.media_type not in INDEX_TYPES and not is_index(
        blobs.read(descriptor), what=f"manifest {descriptor.digest}"
    ):
        image = BlobImage(blobs, descriptor)
        if platform is not None and not image.platform.matches(platform):
            raise NotFound(f"the image {descriptor.digest} is for {image.platform}, not for {platform}")
        return image
    found = []  # those of which the manifest is here: Docker saves one platform of an index that lists ten
    missing = []
    for candidate in ImageIndex(blobs, descriptor).descriptors():
        image = BlobImage(blobs, candidate)
        try:
            image.raw_manifest()
            found.append((candidate.platform or image.platform, image))
        except NotFound:
            missing.append(candidate.platform)
    if len(found) == 1 and platform is None:
        return found[0][1]
    wanted = platform or Platform.host()
    ranked = [(rank, i) for i, (has, _) in enumerate(found) if (rank := has.rank(wanted)) is not None]
    if not ranked:
        there = ", ".join(str(has) for has, _ in found) or "none"
        absent = f"; listed but not there: {', '.join(str(p or '?') for p in missing)}" if missing else ""
        raise NotFound(f"index {descriptor.digest}: no image for {wanted}; there is {there}{absent}")
    return found[min(ranked)[1]][1]


def validate(image: Image, *, content: bool = True) -> list[OverlaykitError]:
    """Everything about `image` that does not fit together, each with both values; [] for a sound one.

    content: read every layer, and so hold its bytes to digest, size and diff_id.
    """
    problems: list[OverlaykitError] = []
    try:
        manifest, config = image.manifest, image.config
    except (OverlaykitError, OSError) as e:
        return [e if isinstance(e, OverlaykitError) else InvalidImage(f"image: {e}")]
    raw = image.raw_config()
    if image.id != manifest.config.digest:
        problems.append(_digest_problem("config", manifest.config.digest, Digest.of(raw)))
    if len(raw) != manifest.config.size:
        text = f"config: the manifest says {manifest.config.size:,} bytes, it has {len(raw):,}"
        problems.append(SizeMismatch(text, expected=manifest.config.size, actual=len(raw)))
    made = sum(not h.empty_layer for h in image.history)
    if image.history and made != len(config.diff_ids):
        problems.append(InvalidImage(f"the history tells of {made} layers, the config of {len(config.diff_ids)}"))
    for i, descriptor in enumerate(manifest.layers):
        if compression_named(descriptor.media_type) is None:
            problems.append(InvalidImage(f"layer {i}: media type {descriptor.media_type} is no layer's"))
    try:
        layers = image.layers
    except OverlaykitError as e:
        return [*problems, e]
    for i, layer in enumerate(layers):
        if layer.diff_id != config.diff_ids[i]:
            problems.append(_digest_problem(f"layer {i}: diff_id", config.diff_ids[i], layer.diff_id))
        if (layer.digest, layer.size) != (manifest.layers[i].digest, manifest.layers[i].size):
            problems.append(_digest_problem(f"layer {i}", manifest.layers[i].digest, layer.digest))
        if content:
            try:
                with layer.uncompressed() as stream:
                    stream.drain()
            except (IntegrityError, InvalidLayer, NotFound, OSError) as e:
                problems.append(e if isinstance(e, OverlaykitError) else InvalidImage(f"layer {i}: {e}"))
    return problems


def _digest_problem(what: str, expected: Digest, actual: Digest) -> DigestMismatch:
    return DigestMismatch(f"{what}: expected {expected}, found {actual}", expected=expected, actual=actual)
