"""Documents, blobs and archives between this package and real peers: what they write opens here with every digest in
place, what is written here they take under the same image id. What trees come of it, test_interop_load.py and
test_interop_handover.py compare."""

from __future__ import annotations

import io
import json
from pathlib import Path

import imagefiles as im
import peers
import pytest

from overlaykit.oci import (
    History,
    Image,
    Layout,
    Platform,
    append,
    layer_from_tar,
    new_image,
    open_images,
    save,
    save_images,
    validate,
    with_config,
)

AMD64 = Platform.parse("linux/amd64")


def build(folder: Path, compression: str, *, name: str = "") -> Image:
    """An image of two layers: files, then a whiteout and more files. name: makes it another image."""
    layout = Layout.create(folder)
    image = with_config(new_image(platform=AMD64), cmd=("/bin/sh",), env=("PATH=/bin",), created="2024-01-01T00:00:00Z")
    for raw in (*im.LAYERS, *([im.layer({name: name.encode()})] if name else [])):
        layer = layer_from_tar(layout, io.BytesIO(raw), compression=compression)
        image = append(image, layer, history=History(created="2024-01-01T00:00:00Z", created_by="test"))
    return with_config(image, history=History(created="2024-01-01T00:00:00Z", created_by="CMD"), user="7")


@pytest.fixture(params=["gzip", "none", "zstd"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    return build(tmp_path / "store", request.param)


def sound(image: Image) -> Image:
    assert validate(image) == []
    return image


# --- Docker -----------------------------------------------------------------------------------------------------------


def test_docker_loads_what_is_saved_here(docker: peers.Docker, image: Image, tmp_path: Path) -> None:
    save(image, tmp_path / "image.tar", names=["localhost/oci:saved", "oci-familiar"])
    printed = docker("load", "--input", tmp_path / "image.tar")
    assert "Loaded image: localhost/oci:saved" in printed
    assert "Loaded image: oci-familiar:latest" in printed
    (known,) = json.loads(docker("image", "inspect", "localhost/oci:saved"))
    assert known["Id"] == image.id
    assert known["RootFS"]["Layers"] == list(image.diff_ids)
    assert (known["Config"]["User"], known["Config"]["Cmd"]) == ("7", ["/bin/sh"])
    assert len(docker("history", "--quiet", "localhost/oci:saved").split()) == 3
    docker("rmi", "localhost/oci:saved", "oci-familiar")


def test_what_docker_saves_opens_here(docker: peers.Docker, tmp_path: Path) -> None:
    """Two images that share layers: Docker to 24 links the second's to the first's."""
    one, two = build(tmp_path / "store", "gzip"), build(tmp_path / "store", "gzip", name="two")
    save_images([(["localhost/oci:one"], one), (["localhost/oci:two", "localhost/oci:dos"], two)], tmp_path / "ours.tar")
    docker("load", "--input", tmp_path / "ours.tar")
    names = ["localhost/oci:one", "localhost/oci:two", "localhost/oci:dos"]
    docker("save", "--output", tmp_path / "theirs.tar", *names)
    docker("save", "--output", tmp_path / "nameless.tar", one.id)
    docker("rmi", *names)
    found = {image.id: set(names) for names, image in open_images(tmp_path / "theirs.tar") if sound(image)}
    assert found == {one.id: set(names[:1]), two.id: set(names[1:])}
    ((nobody, again),) = open_images(tmp_path / "nameless.tar")
    assert (nobody, again.id, again.raw_config()) == ((), one.id, one.raw_config())


# --- podman -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci-dir"])
def test_podman_loads_what_is_saved_here_and_saves_it_again(podman: peers.Podman, tmp_path: Path, form: str) -> None:
    image = build(tmp_path / "store", "gzip")
    save(image, tmp_path / "ours", format=form, names=["localhost/oci:podman"])
    podman("load", "--quiet", "--input", tmp_path / "ours")
    (known,) = json.loads(podman("image", "inspect", image.id.encoded))
    assert known["RootFS"]["Layers"] == list(image.diff_ids)
    if form != "oci-dir":  # there umoci's need counts, which knows tags only: podman takes the tag for the name
        assert known["RepoTags"] == ["localhost/oci:podman"]
    for theirs in ("docker-archive", "oci-archive", "oci-dir"):
        podman("save", "--quiet", "--format", theirs, "--output", tmp_path / theirs, image.id.encoded)
        ((_, again),) = open_images(tmp_path / theirs)
        assert sound(again).id == image.id
    podman("rmi", "--force", image.id.encoded)


# --- skopeo -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "transport"), [("oci-dir", "oci"), ("oci-archive", "oci-archive")])
def test_skopeo_copies_what_is_saved_here_byte_for_byte(image: Image, tmp_path: Path, form: str, transport: str) -> None:
    save(image, tmp_path / "ours", format=form, names=["localhost/oci:tag"])
    for reference in ("", ":tag" if form == "oci-dir" else ":localhost/oci:tag"):
        peers.skopeo_copy(f"{transport}:{tmp_path}/ours{reference}", f"oci:{tmp_path}/theirs:copy", "--preserve-digests")
        copied = sound(Layout(tmp_path / "theirs").image("copy"))
        assert (copied.digest, copied.id) == (image.digest, image.id)


def test_skopeo_reads_the_docker_archive_and_changes_compression(tmp_path: Path) -> None:
    image = build(tmp_path / "store", "gzip")
    save(image, tmp_path / "ours.tar", names=["localhost/oci:tag"])
    for target in ("oci:{}/a:t", "oci-archive:{}/b:t", "docker-archive:{}/c:localhost/x:t"):
        peers.skopeo_copy(f"docker-archive:{tmp_path}/ours.tar", target.format(tmp_path))
    peers.skopeo_copy(f"oci:{tmp_path}/a:t", f"oci:{tmp_path}/d:t", "--dest-compress-format", "zstd")
    for name in "abcd":
        ((_, copied),) = open_images(tmp_path / name)
        assert sound(copied).diff_ids == image.diff_ids


def test_a_store_is_a_layout_that_skopeo_reads_and_writes(tmp_path: Path) -> None:
    """The lock and ingest/ beside it are in nobody's way."""
    image = build(tmp_path / "store", "gzip")
    layout = Layout(tmp_path / "store")
    layout.add(image.raw_config(), image.manifest.config.media_type)
    layout.tag(layout.add(image.raw_manifest(), image.media_type), "docker.io/library/a:1")
    peers.skopeo_copy(f"oci:{layout.root}:docker.io/library/a:1", f"oci:{layout.root}:copy")
    assert layout.names().keys() == {"docker.io/library/a:1", "copy"}
    assert sound(layout.image("copy")).digest == image.digest


# --- umoci ------------------------------------------------------------------------------------------------------------


def test_umoci_reads_and_changes_what_is_saved_here(tmp_path: Path) -> None:
    peers.need_root("umoci keeps owners")
    image = build(tmp_path / "store", "gzip")
    save(image, tmp_path / "ours", format="oci-dir", names=["localhost/oci:tag"])
    rootfs = peers.umoci_unpack(tmp_path / "ours", "tag", tmp_path / "bundle")
    assert (rootfs / "etc" / "motd").read_text() == "welcome\n"
    assert (rootfs / "etc" / "new").exists()
    assert not (rootfs / "etc" / "old").exists()
    (rootfs / "added").write_text("by umoci\n")
    peers.run("umoci", "repack", "--image", f"{tmp_path}/ours:next", tmp_path / "bundle")
    peers.run("umoci", "config", "--image", f"{tmp_path}/ours:next", "--config.user", "99")
    layout = Layout(tmp_path / "ours")
    changed = sound(layout.image("next"))
    assert changed.diff_ids[:2] == image.diff_ids
    assert (changed.runtime.user, len(changed.layers)) == ("99", 3)
    assert layout.image("tag").digest == image.digest


def test_a_layout_that_umoci_made_can_be_written_to(tmp_path: Path) -> None:
    """It begins with "manifests": null."""
    peers.run("umoci", "init", "--layout", tmp_path / "theirs")
    peers.run("umoci", "new", "--image", f"{tmp_path}/theirs:empty")
    layout = Layout(tmp_path / "theirs")
    empty = layout.image("empty")
    assert empty.layers == ()
    image = append(empty, layer_from_tar(layout, io.BytesIO(im.LAYERS[0])))
    layout.add(image.raw_config(), image.manifest.config.media_type)
    layout.tag(layout.add(image.raw_manifest(), image.media_type), "full")
    listed = json.loads(peers.run("umoci", "stat", "--image", f"{tmp_path}/theirs:full", "--json").stdout)
    assert [h["layer"]["digest"] for h in listed["history"] if h["layer"]] == [image.layers[0].digest]
    assert peers.run("umoci", "ls", "--layout", tmp_path / "theirs").stdout.split() == ["empty", "full"]
