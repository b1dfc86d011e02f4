"""The OCI documents: parsed strictly, kept as they came, rewritten without losing what is not known here."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from overlaykit.errors import InvalidImage, InvalidReference
from overlaykit.oci.digest import Digest
from overlaykit.oci.documents import (
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    MAX_DOCUMENT,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    History,
    ImageConfig,
    Index,
    Manifest,
    RootFS,
    canonical,
    is_index,
    parse,
    parse_index,
    parse_manifest,
    rewrite,
)
from overlaykit.oci.layer import compression_named, layer_type, retyped
from overlaykit.oci.platforms import Platform

A, B = (str(Digest.of(x)) for x in (b"a", b"b"))
BLOB = {"mediaType": "application/octet-stream", "digest": A, "size": 3}
MANIFEST: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": BLOB, "layers": [BLOB]}
# As docker build writes it: fields of Docker's own, and null for what is empty.
DOCKER_CONFIG = {
    "architecture": "amd64",
    "config": {"Hostname": "", "Tty": False, "Env": ["PATH=/bin"], "Cmd": ["sh"], "Image": A, "Volumes": None},
    "container": "0123",
    "container_config": {"Hostname": "0123", "Cmd": ["/bin/sh", "-c", "#(nop) CMD"]},
    "created": "2023-11-14T22:13:20.123456789Z",
    "docker_version": "20.10.24",
    "history": [{"created": "2023-11-14T22:13:20Z", "created_by": "/bin/sh -c #(nop) ADD", "odd": 1}],
    "os": "linux",
    "rootfs": {"type": "layers", "diff_ids": [A], "base_layer": "odd"},
}


def raw(document: object) -> bytes:
    return json.dumps(document, indent=3).encode()


# --- parsing ----------------------------------------------------------------------------------------------------------


def test_a_manifest_of_either_family_parses() -> None:
    manifest = parse_manifest(raw(MANIFEST))
    assert manifest.layers[0] == Descriptor(media_type="application/octet-stream", digest=Digest(A), size=3)
    assert isinstance(manifest.config.digest, Digest)
    assert parse_manifest(raw(MANIFEST | {"mediaType": DOCKER_MANIFEST})).media_type == DOCKER_MANIFEST


def test_a_config_of_docker_parses() -> None:
    config = parse(ImageConfig, raw(DOCKER_CONFIG), what="config")
    assert config.config is not None
    assert config.config.cmd == ("sh",)
    assert config.config.volumes is None
    assert config.diff_ids == (A,)
    assert str(config.platform) == "linux/amd64"


def test_null_where_a_list_belongs_is_an_empty_one() -> None:
    """umoci writes {"manifests": null} into a new layout's index.json, as Go does with a slice nobody filled."""
    assert parse_index(b'{"schemaVersion":2,"manifests":null}').manifests == ()
    assert parse(ImageConfig, b'{"rootfs":{"type":"layers","diff_ids":null},"history":null}', what="x").diff_ids == ()


WRONG = [
    (MANIFEST | {"layers": [BLOB, BLOB | {"digest": "sha256:12"}]}, r"no digest.*\$\.layers\[1\]\.digest"),
    (MANIFEST | {"layers": [BLOB | {"size": -1}]}, r"\$\.layers\[0\]\.size"),
    (MANIFEST | {"layers": [BLOB | {"size": 1 << 63}]}, r"\$\.layers\[0\]\.size"),
    (MANIFEST | {"layers": [BLOB | {"size": "3"}]}, r"Expected `int`.*\$\.layers\[0\]\.size"),
    (MANIFEST | {"config": BLOB | {"digest": 3}}, r"Expected `.*\$\.config\.digest"),
    (MANIFEST | {"annotations": {"a": 1}}, r"\$\.annotations\[\.\.\.\]"),
    ({k: v for k, v in MANIFEST.items() if k != "config"}, "missing required field `config`"),
    (MANIFEST | {"schemaVersion": 3}, "schemaVersion 3"),
    (MANIFEST | {"manifests": []}, "ambiguous"),
    ({"schemaVersion": 2, "manifests": []}, "image index"),
    ({"schemaVersion": 1, "name": "x", "fsLayers": [], "signatures": []}, "schema 1"),
    ([], "Expected `object`"),
]


@pytest.mark.parametrize(("document", "words"), WRONG)
def test_what_is_wrong_is_said_with_its_path(document: object, words: str) -> None:
    with pytest.raises(InvalidImage, match=words) as caught:
        parse_manifest(raw(document))
    assert str(caught.value).startswith("manifest: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b'{"a":"\xff"}', b"[" * 100_000, b'{"x":' * 50_000, b"{}x", b"nul", b'{"a":"\\ud8"}'],
)
def test_hostile_json_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        parse_manifest(data)
    with pytest.raises(InvalidImage):
        parse_index(data)


def test_a_document_has_a_limit() -> None:
    data = raw(MANIFEST | {"annotations": {"a": "x" * MAX_DOCUMENT}})
    with pytest.raises(InvalidImage, match="at most"):
        parse_manifest(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(["schemaVersion", "config", "layers", "digest", "size", "mediaType", "manifests"]), x
            )
        ),
    )
)
def test_no_json_at_all_is_more_than_invalid(document: object) -> None:
    for reader in (parse_manifest, parse_index):
        with suppress(InvalidImage):
            reader(json.dumps(document).encode())


def test_an_index_is_told_from_a_manifest_by_what_it_holds() -> None:
    assert is_index(b'{"manifests":[]}')
    assert not is_index(raw(MANIFEST))
    with pytest.raises(InvalidImage, match="one image"):
        parse_index(raw(MANIFEST))


def test_attestations_are_known() -> None:
    descriptor = Descriptor(media_type=OCI_MANIFEST, digest=Digest(A), size=1)
    assert not descriptor.is_attestation
    assert replace(descriptor, platform=Platform(os="unknown", architecture="unknown")).is_attestation
    assert replace(descriptor, annotations={"vnd.docker.reference.type": "attestation-manifest"}).is_attestation


# --- writing ----------------------------------------------------------------------------------------------------------


def test_canonical_json_has_sorted_keys_and_no_space() -> None:
    manifest = Manifest(
        schema_version=2,
        config=Descriptor(media_type="c", digest=Digest(A), size=1),
        layers=(),
        annotations={"b": "ä", "a": "<"},
    )
    config = f'{{"digest":"{A}","mediaType":"c","size":1}}'
    want = f'{{"annotations":{{"a":"<","b":"ä"}},"config":{config},"layers":[],"schemaVersion":2}}'
    assert canonical(manifest).decode() == want


def test_an_unchanged_document_keeps_its_bytes() -> None:
    data = raw(DOCKER_CONFIG)
    config = parse(ImageConfig, data, what="config")
    assert rewrite(data, config, config) is data


def test_a_changed_config_keeps_what_is_not_known_here() -> None:
    """Docker's own fields were once lost when a config was changed, and with them its image ids' meaning."""
    data = raw(DOCKER_CONFIG)
    old = parse(ImageConfig, data, what="config")
    assert old.config is not None
    assert old.history is not None
    new = replace(
        old,
        config=replace(old.config, cmd=("true",), env=None, user="1"),
        rootfs=RootFS(type="layers", diff_ids=(Digest(A), Digest(B))),
        history=(*old.history, History(created_by="me")),
    )
    want = json.loads(data)
    want["config"] |= {"Cmd": ["true"], "User": "1"}
    del want["config"]["Env"]
    want["rootfs"]["diff_ids"].append(B)
    want["history"].append({"created_by": "me"})
    written = rewrite(data, old, new)
    assert json.loads(written) == want
    assert parse(ImageConfig, written, what="config") == new
    assert written == json.dumps(want, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_elements_keep_their_unknown_fields_when_others_go() -> None:
    entries = [BLOB | {"size": i, "odd": i} for i in range(4)]
    data = raw({"schemaVersion": 2, "manifests": entries, "more": True})
    old = parse_index(data)
    new = replace(old, manifests=(old.manifests[3], old.manifests[1]))
    assert json.loads(rewrite(data, old, new)) == {
        "schemaVersion": 2,
        "manifests": [entries[3], entries[1]],
        "more": True,
    }


digests = st.binary(max_size=4).map(Digest.of)
descriptors = st.builds(
    Descriptor,
    media_type=st.sampled_from([OCI_MANIFEST, OCI_INDEX, OCI_LAYER]),
    digest=digests,
    size=st.integers(0, (1 << 63) - 1),
    annotations=st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), min_size=1),
    platform=st.none()
    | st.builds(Platform, os=st.text(max_size=3), architecture=st.text(max_size=3), variant=st.none() | st.text()),
    urls=st.none() | st.lists(st.text(max_size=3), min_size=1).map(tuple),
)
indexes = st.builds(Index, schema_version=st.just(2), manifests=st.lists(descriptors, max_size=4).map(tuple))


@given(indexes, indexes)
def test_what_is_written_reads_back(old: Index, new: Index) -> None:
    assert parse_index(canonical(new)) == new
    assert parse_index(rewrite(canonical(old), old, new)) == new


# --- media types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_layer_types_say_their_compression(compression: str, docker: bool) -> None:
    assert compression_named(layer_type(compression, docker=docker)) == compression
    descriptor = Descriptor(media_type=layer_type(compression, docker=docker), digest=Digest(A), size=1)
    assert retyped(descriptor, docker=not docker).media_type == layer_type(compression, docker=not docker)


def test_other_layer_types() -> None:
    assert layer_type("gzip", docker=True) == f"{DOCKER_LAYER}.gzip"
    assert compression_named("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip") == "gzip"
    assert compression_named("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd") == "zstd"
    assert compression_named("application/vnd.oci.image.layer.v1.tar+gzip+encrypted") is None
    assert compression_named("application/vnd.in-toto+json") is None


# --- platforms --------------------------------------------------------------------------------------------------------


def test_this_machine_has_a_platform() -> None:
    host = Platform.host()
    assert host.os == "linux"
    assert host.architecture
    assert host == host.normalised()
    assert host.matches(Platform(os="linux", architecture=os.uname().machine))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("linux/amd64", "linux/amd64"),
        ("x86_64", "linux/amd64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("armhf", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("Linux/AMD64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("windows/amd64", "windows/amd64"),
        ("Linux", str(Platform.host())),
        ("riscv64", "linux/riscv64"),
        ("odd/odder", "odd/odder"),
    ],
)
def test_platforms_have_one_name(text: str, want: str) -> None:
    assert str(Platform.parse(text)) == want


@pytest.mark.parametrize("bad", ["", "/", "linux/", "a/b/c/d", "linux/amd64\n", "../x", "linux/ä", "bogus", "v7"])
def test_what_is_no_platform_is_refused(bad: str) -> None:
    with pytest.raises(InvalidReference):
        Platform.parse(bad)


def test_a_machine_runs_lower_variants_and_prefers_its_own() -> None:
    v7 = Platform.parse("linux/arm/v7")
    assert [Platform.parse(f"linux/arm/{v}").rank(v7) for v in ("v7", "v6", "v5", "v8")] == [0, 1, 2, None]
    assert Platform.parse("linux/amd64").rank(Platform.parse("linux/amd64/v3")) == 2
    assert not Platform.parse("linux/amd64/v3").matches(Platform.parse("linux/amd64"))
    assert not Platform.parse("linux/386").matches(Platform.parse("linux/amd64"))
    assert Platform.parse("linux/s390x").rank(Platform.parse("linux/s390x")) == 0
    assert Platform(os="linux", architecture="arm64", variant="odd").rank(Platform.parse("linux/arm64")) is None
