"""Archives: every form that Docker, podman, skopeo and buildkit write, hostile ones, and what we write ourselves."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import imagefiles as im
import pytest
import zstandard
from descriptors import open_descriptors
from hypothesis import given, settings
from hypothesis import strategies as st

from overlaykit.errors import (
    DigestMismatch,
    IntegrityError,
    InvalidImage,
    InvalidReference,
    NotFound,
    OverlaykitError,
    Unsupported,
)
from overlaykit.oci import (
    Archive,
    Digest,
    History,
    Image,
    Layout,
    Platform,
    append,
    layer_from_tar,
    new_image,
    open_image,
    open_images,
    save,
    save_images,
    validate,
)
from overlaykit.oci.members import Members

DIFF_IDS = [im.digest(raw) for raw in im.LAYERS]


def tar_of(files: Mapping[str, bytes | str], path: Path) -> Path:
    """A tar of files, where a str is the target of a symlink."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content if isinstance(content, bytes) else b""))
    return path


def check(image: Image) -> None:
    assert list(image.diff_ids) == DIFF_IDS
    assert [layer.uncompressed().read() for layer in image.layers] == list(im.LAYERS)
    assert validate(image) == []


# --- what others wrote ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tar", "tar.gz"])
@pytest.mark.parametrize(
    ("make", "name"), [(im.docker_20, "damaged:1"), (im.docker_25, "docker.io/library/damaged:1"), (im.oci, "1")]
)
def test_every_layout_opens(tmp_path: Path, make: Callable[[], im.Files], name: str, form: str) -> None:
    path = im.write(tmp_path / "image", make(), form=form)
    ((names, image),) = open_images(path)
    assert names == (name,)
    check(image)
    assert open_image(path, name=name).digest == image.digest


def test_an_oci_directory_opens(tmp_path: Path) -> None:
    check(open_image(im.write(tmp_path / "image", im.oci(), form="dir")))


def test_an_archive_compressed_with_zstd_opens(tmp_path: Path) -> None:
    path = im.write(tmp_path / "image", im.docker_20(), form="tar")
    path.write_bytes(zstandard.compress(path.read_bytes()))
    check(open_image(path))


def test_shared_layers_are_symlinks(tmp_path: Path) -> None:
    """Docker to 24 writes a layer that two images have once, and links to it (podman does so for its legacy names)."""
    files: dict[str, bytes | str] = dict(im.docker_20())
    (entry,) = json.loads(im.docker_20()["manifest.json"])
    moved = files.pop(entry["Layers"][0])
    files[entry["Layers"][0]] = "../shared/layer.tar"
    files["shared/layer.tar"] = moved
    check(open_image(tar_of(files, tmp_path / "image.tar")))


def test_layers_in_a_docker_archive_may_be_compressed(tmp_path: Path) -> None:
    files = im.docker_20()
    (entry,) = json.loads(files["manifest.json"])
    files[entry["Layers"][0]] = gzip.compress(im.LAYERS[0], mtime=0)
    files[entry["Layers"][1]] = zstandard.compress(im.LAYERS[1])
    image = open_image(im.write(tmp_path / "image.tar", files, form="tar"))
    check(image)
    assert [d.media_type.rpartition("+")[2] for d in image.manifest.layers] == ["gzip", "zstd"]
    assert image.layers[0].digest == im.digest(files[entry["Layers"][0]])


def without_manifest_layers(files: im.Files) -> im.Files:
    """As Docker 25.0 wrote it: the OCI manifest in index.json lists no layers; manifest.json is whole."""
    index = json.loads(files["index.json"])
    name = "blobs/" + index["manifests"][0]["digest"].replace(":", "/")
    manifest = json.loads(files.pop(name)) | {"layers": []}
    raw = im.to_json(manifest)
    index["manifests"][0] |= {"digest": im.digest(raw), "size": len(raw)}
    return files | {im.blob(raw): raw, "index.json": im.to_json(index)}


def without_names(files: im.Files) -> im.Files:
    """As `docker save IMAGE_ID`: nothing is in index.json."""
    return files | {"index.json": b'{"schemaVersion":2,"manifests":null}'}


@pytest.mark.parametrize("change", [without_manifest_layers, without_names])
def test_where_dockers_index_is_not_whole_its_manifest_json_counts(
    tmp_path: Path, change: Callable[[im.Files], im.Files]
) -> None:
    path = im.write(tmp_path / "image.tar", change(im.docker_25()), form="tar")
    ((names, image),) = open_images(path)
    assert names == ("damaged:1",)
    check(image)


def test_several_images_are_told_apart(tmp_path: Path) -> None:
    one, two = im.docker_20(tag="one:1"), im.docker_20(im.LAYERS[:1], tag="two:1")
    entries = json.loads(one["manifest.json"]) + json.loads(two["manifest.json"])
    path = im.write(tmp_path / "both.tar", two | one | {"manifest.json": im.to_json(entries)}, form="tar")
    assert [names for names, _ in open_images(path)] == [("one:1",), ("two:1",)]
    assert len(open_image(path, name="docker.io/library/two:1").layers) == 1
    with pytest.raises(NotFound, match="has 2 images") as caught:
        open_image(path)
    assert "one:1, two:1" in caught.value.hint
    with pytest.raises(NotFound, match="no image 'three'"):
        open_image(path, name="three")


def test_a_platform_can_be_asked_for(tmp_path: Path) -> None:
    for make in (im.docker_20, im.docker_25, im.oci):
        path = im.write(tmp_path / "image.tar", make(), form="tar")
        check(open_image(path, platform=Platform.parse("linux/amd64")))
        with pytest.raises(NotFound, match="linux/arm64"):
            open_image(path, platform=Platform.parse("linux/arm64"))


def open_files() -> int:
    return len(open_descriptors())


def test_the_file_is_closed_with_the_last_image_or_when_told(tmp_path: Path) -> None:
    path = im.write(tmp_path / "image.tar.gz", im.docker_20(), form="tar.gz")
    before = open_files()
    image = open_image(path)
    path.unlink()
    check(image)
    del image
    assert open_files() == before
    im.write(path, im.oci(), form="tar")
    with Archive(path) as archive:
        image = archive.image()
    assert open_files() == before
    with pytest.raises(ValueError, match="closed"):
        image.layers[0].uncompressed().read()


# --- what is no image, or a bad one -----------------------------------------------------------------------------------

NO_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "an empty file"),
    "text": (lambda p: p.write_text("hello\n" * 500), "no tar archive"),
    "zeros": (lambda p: p.write_bytes(bytes(10_240)), "no tar archive"),
    "script": (lambda p: p.write_text("#!/bin/sh\n"), "a script"),
    "zip": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(1000)), "a zip file"),
    "gzip of text": (lambda p: p.write_bytes(gzip.compress(b"hello" * 500)), "gzip data of no tar archive"),
    "half a gzip": (lambda p: p.write_bytes(gzip.compress(os.urandom(9999))[:5000]), "cut off"),
    "rootfs": (lambda p: im.write(p, {"etc/passwd": b"root", "bin/sh": b""}, form="tar"), "a tar of a root file system"),
    "other tar": (lambda p: im.write(p, {"a": b""}, form="tar"), "a tar of 1 members without manifest.json"),
    "half an OCI": (lambda p: im.write(p, {"index.json": b"{}"}, form="tar"), "lacks oci-layout"),
    "docker 1.9": (lambda p: im.write(p, {"repositories": b"{}"}, form="tar"), "before 1.10"),
    "directory": (lambda p: p.mkdir(), "a directory without a file oci-layout"),
    "fifo": (lambda p: os.mkfifo(p), "neither a regular file nor a directory"),
    "skopeo dir": (lambda p: im.write(p, {"manifest.json": b"{}", "version": b""}, form="dir"), "skopeo calls dir:"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_image_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    make, words = NO_IMAGES[kind]
    make(tmp_path / "it")
    with pytest.raises(InvalidImage, match=words) as caught:
        open_images(tmp_path / "it")
    assert str(caught.value).startswith(str(tmp_path / "it"))
    assert "\n" not in str(caught.value)
    assert kind == "half a gzip" or "accepted are" in str(caught.value)
    assert ("overlaykit import" in caught.value.hint) is (kind in ("rootfs", "directory"))


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "nothing")


@pytest.mark.parametrize("make", [im.docker_20, im.docker_25, im.oci])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_an_archive_that_is_cut_off_says_so(tmp_path: Path, make: Callable[[], im.Files], part: float) -> None:
    path = im.write(tmp_path / "image.tar", make(), form="tar")
    os.truncate(path, int(path.stat().st_size * part) // 512 * 512 + 100)
    with pytest.raises(InvalidImage, match="cut off"):
        open_images(path)


@pytest.mark.parametrize("make", [im.docker_20, im.docker_25, im.oci])
def test_a_flipped_bit_is_a_wrong_digest(tmp_path: Path, make: Callable[[], im.Files]) -> None:
    files = make()
    name = im.largest(files)
    files[name] = im.flip(files[name], len(files[name]) // 2)
    image = open_image(im.write(tmp_path / "image.tar", files, form="tar"))
    with pytest.raises(IntegrityError), contextlib.closing(image.layers[0].uncompressed()) as stream:
        stream.drain()


def test_a_config_that_is_not_the_one_named_is_refused(tmp_path: Path) -> None:
    files = im.docker_20()
    name = json.loads(files["manifest.json"])[0]["Config"]
    files[name] = files[name].replace(b"/bin/sh", b"/bin/no")
    with pytest.raises(DigestMismatch, match="config: expected"):
        open_images(im.write(tmp_path / "image.tar", files, form="tar"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Layers": ["nowhere", "nowhere"]}, "no member 'nowhere', which manifest.json lists"),
        ({"Config": "../../etc/passwd"}, "no member"),
        ({"Config": "/etc/passwd"}, "no member"),
        ({"Layers": []}, "lists 0 layers, the config 2"),
        ({"Config": 3}, r"Expected `str`, got `int` - at `\$\[0\]\.Config`"),
    ],
)
def test_a_manifest_json_that_does_not_fit_is_refused(tmp_path: Path, change: Mapping[str, object], words: str) -> None:
    files = im.docker_20()
    (entry,) = json.loads(files["manifest.json"])
    files["manifest.json"] = im.to_json([entry | change])
    with pytest.raises(InvalidImage, match=words):
        open_images(im.write(tmp_path / "image.tar", files, form="tar"))


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../etc/passwd", "layer.tar", "../gone", "../.."])
def test_links_do_not_leave_the_archive(tmp_path: Path, target: str) -> None:
    files: dict[str, bytes | str] = dict(im.docker_20())
    (entry,) = json.loads(im.docker_20()["manifest.json"])
    files[entry["Layers"][0]] = target
    with pytest.raises(InvalidImage, match="a link"):
        open_images(tar_of(files, tmp_path / "image.tar"))


# --- members ----------------------------------------------------------------------------------------------------------


def members(path: Path) -> Members:
    return Members(os.open(path, os.O_RDONLY), str(path))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_in_every_tar_format(tmp_path: Path, form: int) -> None:
    names = ["a", "./b", "d/" + "c" * 90, "long/" * 30 + "name", "h"]
    with tarfile.open(tmp_path / "t.tar", "w", format=form) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
        tar.addfile(tarfile.TarInfo("dir/"))
        link = tarfile.TarInfo("hard")
        link.type, link.linkname = tarfile.LNKTYPE, "./b"
        tar.addfile(link)
    found = members(tmp_path / "t.tar")
    for name in names:
        assert found.read(name, limit=1000) == name.encode()
        assert found.open(name).readall() == name.encode()
    assert found.read("hard", limit=10) == b"./b"
    with pytest.raises(NotFound):
        found.open("dir")
    with pytest.raises(InvalidImage, match="more than 3"):
        found.read(names[3], limit=3)
    found.close()
    with pytest.raises(ValueError, match="closed"):
        found.read("a", limit=10)


def test_of_two_members_with_one_name_the_later_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for content in (b"old", b"new"):
            info = tarfile.TarInfo("x")
            info.size = 3
            tar.addfile(info, io.BytesIO(content))
    assert members(tmp_path / "t.tar").read("x", limit=3) == b"new"


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    """A tar header with any size field at all."""
    raw = bytearray(512)
    raw[: len(name)], raw[124 : 124 + len(size)], raw[156:157] = name, size, kind
    raw[257:263] = b"ustar\0"
    raw[148:156] = b"        "
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (header(b"a", b"00000001000\0", b"0"), "cut off"),
        (header(b"a", b"\x80" + b"\xff" * 11, b"0"), "cut off"),
        (header(b"a", b"-1\0", b"0"), "no number"),
        (header(b"a", b"9\0", b"0"), "no number"),
        (header(b"a", b"77777777\0", b"L"), "cut off"),
        (header(b"a", b"1000\0", b"x") + b"9999999999999999999999999 path=x\n".ljust(512, b"\0"), "extended tar header"),
        (header(b"a", b"20\0", b"x") + b"5 path=x\n".ljust(512, b"\0"), "extended tar header"),
        (header(b"a", b"13\0", b"x") + b"11 size=-1\n".ljust(512, b"\0") + header(b"a", b"0", b"0"), "no number"),
        (header(b"a", b"0\0", b"S"), "sparse"),
        (header(b"a", b"0\0", b"0") + b"x" * 512, "damaged tar header at byte 512"),
    ],
)
def test_hostile_headers_are_one_clear_error(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "t.tar").write_bytes(raw)
    before = open_files()
    with pytest.raises(InvalidImage, match=words):
        members(tmp_path / "t.tar")
    assert open_files() == before


GOOD = im.layer({"manifest.json": b"[]", "a/" * 60 + "b": b"content"})


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(GOOD)))
def test_no_tar_ends_in_anything_but_members_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], end: int
) -> None:
    raw = bytearray(GOOD)
    for at, value in edits:
        raw[at] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    path.write_bytes(raw[:end])
    with contextlib.suppress(OverlaykitError):
        found = members(path)
        for name in found:
            with contextlib.suppress(OverlaykitError):
                found.read(name, limit=1 << 20)


# --- what we write ----------------------------------------------------------------------------------------------------

FORMATS = ["docker-archive", "oci-archive", "oci-dir"]


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """Two layers: gzip and plain."""
    layout = Layout.create(tmp_path / "store")
    built = new_image(platform=Platform.parse("linux/amd64"))
    for raw, compression in zip(im.LAYERS, ("gzip", "none"), strict=True):
        built = append(
            built, layer_from_tar(layout, io.BytesIO(raw), compression=compression), history=History(created_by="x")
        )
    return built


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_saved_opens_again_with_every_digest(tmp_path: Path, image: Image, form: str) -> None:
    save(image, tmp_path / "out", format=form, names=["debian:bookworm", "localhost/x:2"])
    ((names, again),) = open_images(tmp_path / "out")
    assert names == ("docker.io/library/debian:bookworm", "localhost/x:2")
    assert (again.digest, again.id) == (image.digest, image.id)
    check(again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "store"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_image_gives_the_same_bytes(tmp_path: Path, image: Image, form: str) -> None:
    def content(path: Path) -> dict[str, bytes]:
        return {str(p.relative_to(path)): p.read_bytes() for p in sorted([path, *path.rglob("*")]) if p.is_file()}

    for name in ("one", "two"):
        image.save(tmp_path / name, format=form, names=["a:1"])
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_docker_archive_is_what_docker_25_writes(tmp_path: Path, image: Image) -> None:
    save(image, tmp_path / "out.tar", names=["debian:1"])
    with tarfile.open(tmp_path / "out.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}
    layers = [f"blobs/sha256/{layer.digest.encoded}" for layer in image.layers]
    config = f"blobs/sha256/{image.id.encoded}"
    assert json.loads(files["manifest.json"]) == [{"Config": config, "Layers": layers, "RepoTags": ["debian:1"]}]
    assert files[config] == image.raw_config()
    (entry,) = json.loads(files["index.json"])["manifests"]
    assert entry["annotations"] == {
        "io.containerd.image.name": "docker.io/library/debian:1",
        "org.opencontainers.image.ref.name": "1",
    }
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}


def test_zstd_layers_go_plain_into_a_docker_archive_and_the_id_stays(tmp_path: Path) -> None:
    """Docker 20.10 fails on them with "unexpected EOF"."""
    layout = Layout.create(tmp_path / "store")
    image = new_image([layer_from_tar(layout, io.BytesIO(raw), compression="zstd") for raw in im.LAYERS])
    save(image, tmp_path / "docker.tar")
    save(image, tmp_path / "oci.tar", format="oci-archive")
    again = open_image(tmp_path / "docker.tar")
    check(again)
    assert again.id == image.id
    assert [layer.digest for layer in again.layers] == DIFF_IDS
    assert open_image(tmp_path / "oci.tar").digest == image.digest


def test_several_images_share_their_blobs_and_keep_their_names(tmp_path: Path, image: Image) -> None:
    smaller = new_image(image.layers[:1])
    for form in FORMATS:
        save_images([(["a:latest", "a:1"], image), (["b:latest"], smaller), ([], new_image())], tmp_path / form, format=form)
        found = open_images(tmp_path / form)
        assert [names for names, _ in found] == [
            ("docker.io/library/a:latest", "docker.io/library/a:1"),
            ("docker.io/library/b:latest",),
            (),
        ]
        assert [i.id for _, i in found] == [image.id, smaller.id, new_image().id]


def test_an_oci_directory_that_exists_gets_the_image_added(tmp_path: Path, image: Image) -> None:
    path = im.write(tmp_path / "theirs", im.oci(tag="one"), form="dir")
    save(image, path, format="oci-dir", names=["x:two"])
    save(image, path, format="oci-dir", names=["x:two"])
    assert list(Layout(path).names()) == ["one", "two"]
    assert Layout(path).image("two").digest == image.digest
    check(Layout(path).image("one"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InvalidImage):
        save(image, tmp_path / "full", format="oci-dir")


def test_an_oci_directory_is_for_everyone_to_read(tmp_path: Path, image: Image) -> None:
    """A store's folders are 0700; what is handed out follows the umask, as any file does."""
    old = os.umask(0o022)
    try:
        save(image, tmp_path / "out", format="oci-dir")
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in [tmp_path / "out", *(tmp_path / "out").rglob("*")] if p.is_dir()}
    assert modes == {0o755}
    assert sorted(os.listdir(tmp_path / "out")) == ["blobs", "index.json", "oci-layout"]


def test_an_archive_can_go_to_an_open_file_or_a_pipe(tmp_path: Path, image: Image) -> None:
    out = io.BytesIO()
    save(image, out, names=["a:1"])
    save(image, tmp_path / "out.tar", names=["a:1"])
    assert out.getvalue() == (tmp_path / "out.tar").read_bytes()
    save(image, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(Unsupported):
        save(image, out, format="oci-dir")


@pytest.mark.parametrize("form", FORMATS)
def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, image: Image, form: str) -> None:
    path = tmp_path / "store" / "blobs" / "sha256" / image.layers[1].digest.encoded
    path.chmod(0o600)
    path.write_bytes(im.flip(path.read_bytes(), 9))
    out = tmp_path / "out"
    if form != "oci-dir":
        out.write_bytes(b"before")
    with pytest.raises(DigestMismatch):
        save(image, out, format=form)
    assert out.read_bytes() == b"before" if form != "oci-dir" else not out.exists()
    assert len(list(tmp_path.iterdir())) == (1 if form == "oci-dir" else 2)


def test_bad_names_and_formats_are_refused_before_anything_is_written(tmp_path: Path, image: Image) -> None:
    with pytest.raises(InvalidReference):
        save(image, tmp_path / "out", names=["A B"])
    with pytest.raises(Unsupported, match="format 'tar'"):
        save(image, tmp_path / "out", format="tar")
    assert not (tmp_path / "out").exists()


def test_a_saved_file_follows_a_symlink_and_the_umask(tmp_path: Path, image: Image) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.tar").symlink_to("real/out.tar")
    save(image, tmp_path / "link.tar")
    assert (tmp_path / "link.tar").is_symlink()
    assert stat.S_IMODE((tmp_path / "real" / "out.tar").stat().st_mode) & 0o044 == 0o044 & ~_umask()
    assert Digest.of(b"") != open_image(tmp_path / "link.tar").id


def _umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old
