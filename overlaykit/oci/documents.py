"""The OCI documents as frozen values: Descriptor, Manifest, Index, ImageConfig and what they hold.

Field names are the spec's in snake_case; the JSON has them as the spec writes them (image-spec descriptor.md,
manifest.md, image-index.md, config.md). Docker's schema 2 documents have the same fields under other media types.

A document that came in is kept as the bytes it was: these values are for reading it. `rewrite` makes the bytes of a
changed one and keeps every field that is not known here, so that Docker's own ones survive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field, structs

from overlaykit.errors import InvalidImage
from overlaykit.oci.digest import Digest
from overlaykit.oci.platforms import Platform

# Media types: image-spec media-types.md, and distribution's image-v2-2.md for Docker's.
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar"
MANIFEST_TYPES: Final = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES: Final = (OCI_INDEX, DOCKER_INDEX)
SCHEMA1_TYPES: Final = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)

# Annotations: image-spec annotations.md; the second is what containerd and `docker save` put the whole name in.
REF_NAME: Final = "org.opencontainers.image.ref.name"
IMAGE_NAME: Final = "io.containerd.image.name"

MAX_DOCUMENT = (
    4 << 20
)  # bytes of a manifest or config; what registries accept at most (distribution-spec "Pushing Manifests")

Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Annotations = dict[str, str]
D = TypeVar("D", bound=Struct)


class Descriptor(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What a blob is: its type, digest and size in bytes."""

    media_type: str
    digest: Digest
    size: Size
    urls: tuple[str, ...] | None = None
    annotations: Annotations | None = None
    platform: Platform | None = None
    data: str | None = None
    artifact_type: str | None = None

    @property
    def is_index(self) -> bool:
        return self.media_type in INDEX_TYPES

    @property
    def is_attestation(self) -> bool:
        """Whether this is what buildkit puts beside an image about it: no image that anybody can run."""
        told = (self.annotations or {}).get("vnd.docker.reference.type") == "attestation-manifest"
        nowhere = self.platform is not None and (self.platform.os, self.platform.architecture) == ("unknown", "unknown")
        return told or nowhere


if TYPE_CHECKING:
    Descriptors = tuple[Descriptor, ...]
    Digests = tuple[Digest, ...]
else:  # Go writes an empty list that nobody filled as null (umoci's index.json): taken for what it means
    Descriptors = tuple[Descriptor, ...] | None
    Digests = tuple[Digest, ...] | None


class Manifest(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """One image: its config, and its layers bottom first."""

    schema_version: int | UnsetType = UNSET
    media_type: str | None = None
    artifact_type: str | None = None
    config: Descriptor
    layers: Descriptors
    subject: Descriptor | None = None
    annotations: Annotations | None = None

    def __post_init__(self) -> None:
        structs.force_setattr(self, "layers", self.layers or ())


class Index(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Several manifests, one a platform; or the table of contents of a layout."""

    schema_version: int | UnsetType = UNSET
    media_type: str | None = None
    artifact_type: str | None = None
    manifests: Descriptors
    subject: Descriptor | None = None
    annotations: Annotations | None = None

    def __post_init__(self) -> None:
        structs.force_setattr(self, "manifests", self.manifests or ())


class RootFS(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The digests of the uncompressed layers, bottom first."""

    type: str | UnsetType = UNSET
    diff_ids: Digests = ()

    def __post_init__(self) -> None:
        structs.force_setattr(self, "diff_ids", self.diff_ids or ())


class History(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a layer came to be; `empty_layer` if no layer came of it."""

    created: str | None = None
    created_by: str | None = None
    author: str | None = None
    comment: str | None = None
    empty_layer: bool = False


class Healthcheck(Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """How to see whether a container is well (Docker's). Times are nanoseconds."""

    test: tuple[str, ...] | None = None
    interval: int | None = None
    timeout: int | None = None
    start_period: int | None = None
    start_interval: int | None = None
    retries: int | None = None


class RuntimeConfig(Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """What a container of the image runs as: the config's `config` object."""

    user: str | None = None
    exposed_ports: dict[str, Any] | None = None
    env: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    volumes: dict[str, Any] | None = None
    working_dir: str | None = None
    labels: dict[str, str] | None = None
    stop_signal: str | None = None
    stop_timeout: int | None = None
    args_escaped: bool | None = None
    healthcheck: Healthcheck | None = None
    on_build: tuple[str, ...] | None = None
    shell: tuple[str, ...] | None = None


class ImageConfig(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an image is made of and meant for. Its digest is the image's id."""

    created: str | None = None
    author: str | None = None
    architecture: str = ""
    variant: str | None = None
    os: str = ""
    os_version: str | None = field(name="os.version", default=None)
    os_features: tuple[str, ...] | None = field(name="os.features", default=None)
    config: RuntimeConfig | None = None
    rootfs: RootFS | UnsetType = UNSET
    history: tuple[History, ...] | None = None

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        return () if self.rootfs is UNSET else self.rootfs.diff_ids

    @property
    def platform(self) -> Platform:
        return Platform(
            os=self.os,
            architecture=self.architecture,
            variant=self.variant,
            os_version=self.os_version,
            os_features=self.os_features,
        )


# --- bytes to values --------------------------------------------------------------------------------------------------


def parse(kind: type[D], raw: bytes, *, what: str) -> D:
    """The document that `raw` is. InvalidImage names `what` and the JSON path of what is wrong."""
    if len(raw) > MAX_DOCUMENT:
        raise InvalidImage(f"{what}: {len(raw):,} bytes; a document has {MAX_DOCUMENT:,} at most")
    try:
        return msgspec.json.decode(raw, type=kind, dec_hook=_from_json)
    except (ValueError, RecursionError) as e:  # msgspec's errors and bad UTF-8 are ValueErrors
        raise InvalidImage(f"{what}: {_reason(e)}") from e


def parse_manifest(raw: bytes, *, what: str = "manifest") -> Manifest:
    """A manifest of either family. InvalidImage for an index, schema 1, or one that is two things at once."""
    fields = _sniff(raw, what)
    _refuse_odd(fields, what)
    if fields.manifests is not UNSET or fields.media_type in INDEX_TYPES:
        raise InvalidImage(f"{what}: an image index, where the manifest of one image is expected")
    return parse(Manifest, raw, what=what)


def parse_index(raw: bytes, *, what: str = "index") -> Index:
    """An index of either family. InvalidImage for a manifest, or one that is two things at once."""
    fields = _sniff(raw, what)
    _refuse_odd(fields, what)
    if fields.media_type in MANIFEST_TYPES:
        raise InvalidImage(f"{what}: the manifest of one image, where an index is expected")
    return parse(Index, raw, what=what)


def is_index(raw: bytes, *, what: str = "manifest") -> bool:
    """Whether `raw` is an index, and no manifest, by what it holds."""
    return _sniff(raw, what).manifests is not UNSET


class _Sniffed(Struct, rename="camel"):
    schema_version: int = 2
    media_type: str | None = None
    manifests: msgspec.Raw | UnsetType = UNSET
    layers: msgspec.Raw | UnsetType = UNSET
    config: msgspec.Raw | UnsetType = UNSET
    fs_layers: msgspec.Raw | UnsetType = UNSET


def _sniff(raw: bytes, what: str) -> _Sniffed:
    return parse(_Sniffed, raw, what=what)


def _refuse_odd(fields: _Sniffed, what: str) -> None:
    if fields.media_type in SCHEMA1_TYPES or fields.fs_layers is not UNSET or fields.schema_version == 1:
        raise InvalidImage(f"{what}: Docker's schema 1, which no tool writes any more", hint="pull the image anew")
    if fields.schema_version != 2:
        raise InvalidImage(f"{what}: schemaVersion {fields.schema_version}, not 2")
    # One digest must not be an image to one reader and an index to the next (CVE-2021-41190).
    if fields.manifests is not UNSET and (fields.layers is not UNSET or fields.config is not UNSET):
        raise InvalidImage(f"{what}: has both `manifests` and `layers` or `config`, so it is ambiguous what it is")


def _from_json(kind: type, value: object) -> object:
    if kind is Digest and isinstance(value, str):
        return Digest(value)
    raise ValueError(f"Expected `{kind.__name__.lower()}`, got `{type(value).__name__}`")


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    text = str(error)
    return text if isinstance(error, msgspec.ValidationError) else f"no JSON: {text}"


# --- values to bytes --------------------------------------------------------------------------------------------------


def canonical(document: Struct | Mapping[str, Any] | list[Any]) -> bytes:
    """The document's canonical JSON: keys sorted, no white space, UTF-8. The same values always give the same bytes."""
    return msgspec.json.encode(document, enc_hook=str.__str__, order="sorted")


def rewrite(raw: bytes, old: D, new: D) -> bytes:
    """The bytes of `new`, where `raw` were those of `old`: unknown fields stay, equal documents keep their bytes."""
    return raw if old == new else canonical(_merged(msgspec.json.decode(raw), old, new))


def _merged(kept: Any, old: Any, new: Any) -> Any:
    """`kept` (the JSON of `old`) changed to say what `new` says."""
    if old == new:
        return kept
    if isinstance(new, Struct) and type(old) is type(new) and isinstance(kept, dict):
        out, written = dict(kept), msgspec.to_builtins(new, enc_hook=str.__str__)
        for info in structs.fields(new):
            name = info.encode_name
            before, after = getattr(old, info.name), getattr(new, info.name)
            if before == after:
                continue
            if name in written:
                out[name] = _merged(kept.get(name), before, after)
            else:
                out.pop(name, None)
        return out
    if isinstance(new, tuple) and isinstance(old, tuple) and isinstance(kept, list):
        # Elements that stayed keep their bytes' unknown fields, wherever they moved to: layers and history shift
        # together.
        waiting = list(zip(old, kept, strict=True))
        return [_take_equal(waiting, value) for value in new]
    return msgspec.to_builtins(new, enc_hook=str.__str__)


def _take_equal(waiting: list[tuple[Any, Any]], value: Any) -> Any:
    for i, (before, kept) in enumerate(waiting):
        if before == value:
            del waiting[i]
            return kept
    return msgspec.to_builtins(value, enc_hook=str.__str__)
