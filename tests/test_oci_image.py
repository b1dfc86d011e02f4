"""Images: what is derived from manifest and config, the choice of a platform, and new images from old ones."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import imagefiles as im
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from overlaykit.errors import DigestMismatch, InvalidImage, NotFound, SizeMismatch
from overlaykit.oci import (
    Descriptor,
    Digest,
    History,
    Image,
    ImageIndex,
    Layer,
    Layout,
    Platform,
    RuntimeConfig,
    annotate,
    append,
    chain_ids,
    layer_from_tar,
    new_image,
    rebase,
    validate,
    with_config,
)
from overlaykit.oci.documents import DOCKER_CONFIG, DOCKER_INDEX, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, canonical
from overlaykit.oci.layer import compression_named
from overlaykit.oci.mutate import BuiltImage, with_layers

DOCKER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
AMD64, ARM64 = Platform.parse("linux/amd64"), Platform.parse("linux/arm64")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "layout")


def tar(name: str) -> bytes:
    return im.layer({name: name.encode()})


def made(layout: Layout, *names: str, platform: Platform = AMD64) -> Image:
    """An image of a layer for each name, with a history entry for each and a CMD after the first."""
    image = new_image(platform=platform)
    for name in names:
        image = append(image, layer_from_tar(layout, io.BytesIO(tar(name))), history=History(created_by=name))
        if name == names[0]:
            image = with_config(image, cmd=("sh",), history=History(created_by=f"CMD of {name}"))
    return image


def keep(layout: Layout, image: Image) -> Descriptor:
    layout.add(image.raw_config(), image.manifest.config.media_type)
    return layout.add(image.raw_manifest(), image.media_type)


def keep_index(layout: Layout, *descriptors: Descriptor, media_type: str = OCI_INDEX) -> Descriptor:
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": media_type, "manifests": descriptors}
    return layout.add(canonical(document), media_type)


def told(image: Image) -> list[str | None]:
    return [h.created_by for h in image.history]


# --- what follows from the documents ----------------------------------------------------------------------------------


def test_an_image_is_derived_from_its_bytes(tmp_path: Path) -> None:
    im.write(tmp_path / "image", im.oci(tag="one"), form="dir")
    image = Layout(tmp_path / "image").image("one")
    assert image.digest == im.digest(image.raw_manifest())
    assert image.id == im.digest(image.raw_config()) == image.manifest.config.digest
    assert list(image.diff_ids) == [im.digest(raw) for raw in im.LAYERS]
    assert image.chain_ids == chain_ids(image.diff_ids)
    assert [layer.diff_id for layer in image.layers] == list(image.diff_ids)
    assert image.layers is image.layers
    assert image.size == sum(p.stat().st_size for p in (tmp_path / "image" / "blobs" / "sha256").iterdir())
    assert image.created == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert (str(image.platform), image.runtime.cmd) == ("linux/amd64", ("/bin/sh",))
    assert [h.created_by for h in image.layer_history if h] == ["layer 0", "layer 1"]
    assert validate(image) == []


def test_a_time_that_is_none_is_none(layout: Layout) -> None:
    for text, want in (
        (None, None),
        ("long ago", None),
        ("2024-01-02T03:04:05.123456789Z", 2024),
        ("0001-01-01T00:00:00Z", 1),
    ):
        when = with_config(made(layout, "a"), created=text).created
        assert (when and when.year) == want


def test_manifest_and_config_must_agree_on_the_layers(layout: Layout) -> None:
    image = made(layout, "a", "b")
    short = BuiltImage(image.raw_manifest(), made(layout, "a").raw_config(), image.layers)
    with pytest.raises(InvalidImage, match="lists 2 layers, the config 1"):
        _ = short.layers
    assert any("lists 2 layers" in str(problem) for problem in validate(short))


def test_an_artifact_is_no_image(layout: Layout) -> None:
    empty = layout.add(b"{}", "application/vnd.oci.empty.v1+json")
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": empty, "layers": [empty]}
    with pytest.raises(InvalidImage, match="an artifact of type"):
        _ = layout.image(layout.add(canonical(manifest), OCI_MANIFEST)).config


def test_validate_names_every_mismatch_with_both_values(layout: Layout) -> None:
    image, other = made(layout, "a", "b"), made(layout, "c", "d")
    problems = validate(BuiltImage(image.raw_manifest(), other.raw_config() + b"\n", image.layers))
    assert sum(isinstance(p, DigestMismatch) for p in problems) == 3  # the config, and a diff_id for each layer
    assert any(isinstance(p, SizeMismatch) for p in problems)
    assert all(str(p).count("sha256:") == 2 for p in problems if isinstance(p, DigestMismatch))


def test_validate_reads_the_layers(layout: Layout) -> None:
    image = layout.image(keep(layout, made(layout, "a", "b", "c")))
    path = layout.path(image.layers[1].digest)
    path.chmod(0o600)
    path.write_bytes(im.flip(path.read_bytes(), 50))
    layout.remove(image.layers[2].digest)
    assert validate(image, content=False) == []
    flipped, missing = validate(image)
    assert isinstance(flipped, DigestMismatch)
    assert isinstance(missing, NotFound)


# --- indexes ----------------------------------------------------------------------------------------------------------


def test_an_index_is_searched_for_a_platform(layout: Layout) -> None:
    images = {
        text: made(layout, text.replace("/", "-"), platform=Platform.parse(text))
        for text in ("linux/arm64", "linux/arm/v6", "linux/amd64")
    }
    entries = [replace(keep(layout, image), platform=image.platform) for image in images.values()]
    junk = Descriptor(
        media_type=OCI_MANIFEST, digest=Digest.of(b"?"), size=1, platform=Platform(os="unknown", architecture="unknown")
    )
    inner = keep_index(layout, *entries[:2])
    outer = keep_index(layout, junk, inner, entries[2], media_type=DOCKER_INDEX)
    assert len(ImageIndex(layout, outer).descriptors()) == 3
    for text, image in images.items():
        assert layout.image(outer, platform=Platform.parse(text)).digest == image.digest
    assert layout.image(outer, platform=Platform.parse("linux/arm/v7")).digest == images["linux/arm/v6"].digest
    assert ImageIndex(layout, outer).image(ARM64).platform == ARM64
    with pytest.raises(NotFound, match="no image for linux/s390x; there is linux/arm64, linux/arm/v6, linux/amd64"):
        layout.image(outer, platform=Platform.parse("linux/s390x"))


def test_without_a_choice_there_is_none_to_make(layout: Layout) -> None:
    """`docker save` of a multi-platform image has one of ten that its index lists."""
    absent = Descriptor(media_type=OCI_MANIFEST, digest=Digest.of(b"absent"), size=1, platform=AMD64)
    other = Platform.parse("linux/mips64le")
    entry = keep_index(layout, absent, keep(layout, made(layout, "a", platform=other)))
    assert layout.image(entry).platform == other
    with pytest.raises(NotFound, match="listed but not there: linux/amd64"):
        layout.image(entry, platform=AMD64)


def test_indexes_within_indexes_have_an_end(layout: Layout) -> None:
    entry = keep(layout, made(layout, "a"))
    for _ in range(20):
        entry = keep_index(layout, entry)
    with pytest.raises(InvalidImage, match="indexes within each other"):
        layout.image(entry)


def test_an_index_under_a_manifests_media_type_is_still_one(layout: Layout) -> None:
    entry = replace(keep_index(layout, keep(layout, made(layout, "a"))), media_type="application/json")
    assert told(layout.image(entry)) == ["a", "CMD of a"]


# --- new images -------------------------------------------------------------------------------------------------------


def test_append_puts_a_layer_on_top_and_shares_the_rest(layout: Layout) -> None:
    base = made(layout, "a", "b")
    top = layer_from_tar(layout, io.BytesIO(tar("top")), compression="zstd")
    image = append(base, top, history=History(created="2024-01-01T00:00:00Z", created_by="top", comment="c"))
    assert [layer.digest for layer in image.layers] == [*(layer.digest for layer in base.layers), top.digest]
    assert all(a is b for a, b in zip(image.layers, base.layers, strict=False))
    assert (image.config.created, told(image)[-1]) == ("2024-01-01T00:00:00Z", "top")
    assert image.runtime == base.runtime
    assert len(base.layers) == 2
    assert validate(image) == []


def test_the_same_change_gives_the_same_digest(layout: Layout) -> None:
    assert made(layout, "a", "b").digest == made(layout, "a", "b").digest


def test_append_needs_an_entry_for_each_layer(layout: Layout) -> None:
    layers = [layer_from_tar(layout, io.BytesIO(tar(x))) for x in "ab"]
    entries = [History(created_by="a"), History(created_by="ENV", empty_layer=True), History(created_by="b")]
    assert told(append(new_image(), *layers, history=entries)) == ["a", "ENV", "b"]
    assert len(append(new_image(), *layers).history) == 2
    with pytest.raises(InvalidImage, match="2 layers to append, and a history that tells of 1"):
        append(new_image(), *layers, history=entries[:2])


def test_a_base_without_history_gets_one_so_that_entries_stand_for_their_own_layers(layout: Layout) -> None:
    base = new_image([layer_from_tar(layout, io.BytesIO(tar(x))) for x in "ab"])
    assert base.history == ()
    assert told(append(base, layer_from_tar(layout, io.BytesIO(tar("c"))), history=History(created_by="c"))) == [
        None,
        None,
        "c",
    ]


def docker_image(layout: Layout, *names: str) -> Image:
    """As `docker push` leaves it: schema 2 media types, and fields that OCI does not have."""
    layers = [layer_from_tar(layout, io.BytesIO(tar(name))) for name in names]
    config = im.config([tar(name) for name in names]) | {"docker_version": "20.10", "container_config": {"Cmd": ["x"]}}
    config["config"] |= {"Hostname": "h", "AttachStdin": False}
    raw = im.to_json(config)
    listed = [{"mediaType": DOCKER_GZIP, "size": x.size, "digest": x.digest} for x in layers]
    manifest = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": {"mediaType": DOCKER_CONFIG, "size": len(raw), "digest": im.digest(raw)},
        "layers": listed,
    }
    return BuiltImage(im.to_json(manifest), raw, layers)


def test_dockers_own_fields_survive_a_change(layout: Layout) -> None:
    image = with_config(docker_image(layout, "a"), user="1000", labels={"a": "b"}, cmd=None)
    document = json.loads(image.raw_config())
    assert document["docker_version"] == "20.10"
    assert document["container_config"] == {"Cmd": ["x"]}
    assert document["config"] == {
        "Hostname": "h",
        "AttachStdin": False,
        "Env": ["PATH=/bin"],
        "User": "1000",
        "Labels": {"a": "b"},
    }


def test_a_layer_takes_the_manifests_family(layout: Layout) -> None:
    """OCI layers in a Docker manifest are refused by registries and by podman."""
    image = append(docker_image(layout, "a"), layer_from_tar(layout, io.BytesIO(tar("b"))))
    assert image.is_docker
    assert {d.media_type for d in image.manifest.layers} == {DOCKER_GZIP}
    assert all(
        compression_named(d.media_type) == "gzip"
        for d in rebase(image, docker_image(layout, "a"), made(layout, "c")).manifest.layers
    )


def test_with_config_changes_what_is_named(layout: Layout) -> None:
    base = made(layout, "a")
    image = with_config(base, env=("A=1",), working_dir="/w", author="me", history=History(created_by="ENV A=1"))
    assert image.runtime == RuntimeConfig(cmd=("sh",), env=("A=1",), working_dir="/w")
    assert (image.config.author, image.history[-1]) == ("me", History(created_by="ENV A=1", empty_layer=True))
    assert image.layers == base.layers
    assert with_config(image, env=None, working_dir=None, author=None).runtime == base.runtime
    with pytest.raises(TypeError):
        with_config(base, nonsense=1)
    with pytest.raises(InvalidImage, match="rootfs"):
        with_config(base, rootfs=None)
    assert with_config(base).digest == base.digest


def test_annotations_come_and_go(layout: Layout) -> None:
    base = made(layout, "a")
    image = annotate(base, {"x": "1", "y": "2"})
    assert image.annotations == {"x": "1", "y": "2"}
    assert (image.id, image.digest == base.digest) == (base.id, False)
    assert annotate(image, {"x": None, "y": None}).digest == base.digest


def test_layers_kept_otherwise_are_the_same_image(layout: Layout) -> None:
    image = made(layout, "a", "b")
    packed = [layer_from_tar(layout, layer.uncompressed(), compression="zstd") for layer in image.layers]
    again = with_layers(image, packed)
    assert (again.id, again.digest == image.digest) == (image.id, False)
    assert validate(again) == []
    with pytest.raises(InvalidImage, match="diff_ids"):
        with_layers(image, packed[::-1])


def test_rebase_replaces_what_is_below(layout: Layout) -> None:
    old, new = made(layout, "a", "b"), made(layout, "x", "y", "z")
    image = with_config(old, env=("E=1",), history=History(created_by="ENV"))
    image = append(image, layer_from_tar(layout, io.BytesIO(tar("mine"))), history=History(created_by="mine"))
    moved = rebase(image, old, new)
    assert moved.diff_ids == (*new.diff_ids, image.diff_ids[-1])
    assert told(moved) == [*told(new), "ENV", "mine"]
    assert moved.runtime == image.runtime
    assert validate(moved) == []
    assert rebase(moved, new, old).diff_ids == image.diff_ids
    assert told(rebase(moved, new, old)) == told(image)


def test_rebase_refuses_what_is_not_below(layout: Layout) -> None:
    image = made(layout, "a", "b", "c")
    with pytest.raises(InvalidImage, match=r"not built on .* 2 layers the lowest 1 are the same"):
        rebase(image, made(layout, "a", "x"), made(layout, "y"))
    with pytest.raises(InvalidImage, match="not built on"):
        rebase(made(layout, "a"), image, image)
    with pytest.raises(InvalidImage, match="is for linux/amd64, the new one for linux/arm64"):
        rebase(image, made(layout, "a"), made(layout, "y", platform=ARM64))


class Named(Layer):
    """A layer of which only the name counts."""

    def __init__(self, name: int) -> None:
        super().__init__()
        self.name = Digest.of(b"%d" % name)

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(media_type="application/vnd.oci.image.layer.v1.tar", digest=self.name, size=1)

    @property
    def diff_id(self) -> Digest:
        return self.name

    def open_blob(self) -> io.RawIOBase:
        raise NotImplementedError


stacks = st.lists(st.integers(0, 99), max_size=4)


@given(stacks, stacks, stacks)
def test_rebase_is_the_new_base_with_the_same_on_top(old: Sequence[int], new: Sequence[int], top: Sequence[int]) -> None:
    def build(base: Image, names: Sequence[int], by: str) -> Image:
        return append(base, *map(Named, names), history=[History(created_by=f"{by}{n}") for n in names]) if names else base

    base, other = build(new_image(), old, "a"), build(new_image(), new, "b")
    want, got = build(other, top, "t"), rebase(build(base, top, "t"), base, other)
    assert got.diff_ids == want.diff_ids
    assert told(got) == told(want)
    assert rebase(want, other, other).diff_ids == want.diff_ids
