"""What is no image, or no longer one: one clear line on stderr, exit code 1, and the store as it was, byte for byte."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import imagefiles as im
import ours
import pytest

FORMS = {"docker 20": (im.docker_20, "tar"), "docker 25": (im.docker_25, "tar"), "oci archive": (im.oci, "tar")}
FORMS |= {"oci directory": (im.oci, "dir")}


def whole(form: str, path: Path) -> Path:
    make, container = FORMS[form]
    return im.write(path, make(), form=container)


def cut(part: float) -> Callable[[Path], None]:
    """Cuts an archive after a part of its bytes; 0.999 leaves all but the tar's end mark."""

    def damage(path: Path) -> None:
        os.truncate(path, int(path.stat().st_size * part))

    return damage


def rewrite(path: Path, change: Callable[[im.Files], im.Files], form: str) -> None:
    make, container = FORMS[form]
    im.write(path, change(make()), form=container)


def flipped(files: im.Files) -> im.Files:
    name = im.largest(files)
    return files | {name: im.flip(files[name], len(files[name]) // 2)}


def missing(files: im.Files) -> im.Files:
    return {name: raw for name, raw in files.items() if name != im.largest(files)}


def shortened(files: im.Files) -> im.Files:
    name = im.largest(files)
    return files | {name: files[name][:-100]}


def lengthened(files: im.Files) -> im.Files:
    name = im.largest(files)
    return files | {name: files[name] + bytes(512)}


DAMAGES = {"flipped": flipped, "missing": missing, "shortened": shortened, "lengthened": lengthened}
NOT_TAR = b"this is no tar\n" * 100


def on_disk(form: str, files: im.Files) -> Callable[[Path], object]:
    return lambda path: im.write(path, files, form=form)


OUTSIDE = im.to_json([{"Config": "../../etc/passwd", "RepoTags": [], "Layers": []}])
ODD_FILES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "an empty file": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_bytes(b"hello\n" * 1000),
    "zeros": lambda path: path.write_bytes(bytes(100_000)),
    "a gzip of nothing": lambda path: path.write_bytes(b"\x1f\x8b"),
    "an empty directory": lambda path: path.mkdir(),
    "a tar of something else": on_disk("tar", {"a": b"a", "b/c": b"c"}),
    "an index that is no JSON": on_disk("dir", im.oci() | {"index.json": b"{"}),
    "an index of nothing": on_disk("dir", im.replace_json(im.oci(), "index.json", {"manifests": []})),
    "an index with a number for a list": on_disk("dir", im.replace_json(im.oci(), "index.json", {"manifests": 7})),
    "another layout's version": on_disk("dir", im.oci() | {"oci-layout": b'{"imageLayoutVersion":"9.0.0"}'}),
    "a manifest.json that is no JSON": on_disk("tar", im.docker_20() | {"manifest.json": b"["}),
    "a manifest.json of nothing": on_disk("tar", im.docker_20() | {"manifest.json": b"[]"}),
    "a manifest.json that leaves the archive": on_disk("tar", im.docker_20() | {"manifest.json": OUTSIDE}),
    "a tag that is none": on_disk("tar", im.docker_20(tag="Not A Tag:::")),
    "a layer of another image": on_disk("tar", im.docker_20(config_of=[im.LAYERS[0], im.LAYERS[0]])),
    "fewer diff_ids than layers": on_disk("tar", im.docker_25(config_of=im.LAYERS[:1])),
    "another size than promised": on_disk("dir", im.oci(changed={"size": 7})),
    "another digest than promised": on_disk("dir", im.oci(changed={"digest": im.digest(b"something else")})),
    "a digest that is a path": on_disk("dir", im.oci(changed={"digest": "sha256:../../../../etc/passwd"})),
    "a layer that is no tar": on_disk("tar", im.docker_20([im.LAYERS[0], NOT_TAR])),
    "a layer that ends early": on_disk("tar", im.oci([im.LAYERS[0], im.LAYERS[1][:5000]])),
    "a layer that leaves the root": on_disk("dir", im.oci([im.layer({"../../../../tmp/overlaykit-escaped": b"x"})])),
    "a bare whiteout": on_disk("dir", im.oci([im.layer({"etc/.wh.": b""})])),
}


def state(root: Path) -> dict[str, tuple[str, int, str]]:
    """Kind, mode and digest of everything under a store's root; of the database the rows, but for when it was settled."""
    found = {}
    for folder, _, names in os.walk(root):
        for path in [Path(folder), *(Path(folder, name) for name in names)]:
            info = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
            if path.name == "store.db":
                with closing(sqlite3.connect(path)) as rows:
                    content = "\n".join(line for line in rows.iterdump() if "'settled'" not in line).encode()
            elif path.name.startswith("store.db-"):
                continue
            found[str(path.relative_to(root))] = (
                stat.filemode(info.st_mode),
                len(content),
                hashlib.sha256(content).hexdigest(),
            )
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a store that holds one good image, none of whose layers the tests damage, and a container of it."""
    good = im.write(tmp_path / "good.tar", im.docker_20([im.layer({"kept": b"kept\n"})], tag="good:1"), form="tar")
    ours.command(tmp_path / "store", "load", good)
    ours.command(tmp_path / "store", "create", "good:1", "--name", "kept")
    return tmp_path / "store"


def assert_refused(root: Path, *args: str | Path) -> str:
    """Run the command: it must fail with one line that names what it was given, and change nothing. The line."""
    before = state(root)
    done = ours.command(root, *args, check=False)
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert args[0] != "load" or str(args[1]) in done.stderr
    assert state(root) == before
    return done.stderr


@pytest.mark.parametrize("form", FORMS)
def test_whole_files_are_taken(form: str, root: Path, tmp_path: Path) -> None:
    """The files that the other tests damage are good ones."""
    ours.command(root, "load", whole(form, tmp_path / "image"))


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("form", ["docker 20", "docker 25", "oci archive"])
def test_a_truncated_archive_is_refused(form: str, part: float, root: Path, tmp_path: Path) -> None:
    image = whole(form, tmp_path / "image")
    cut(part)(image)
    assert_refused(root, "load", image)


@pytest.mark.parametrize("part", [0.1, 0.9])
def test_a_truncated_gzip_of_an_archive_is_refused(part: float, root: Path, tmp_path: Path) -> None:
    image = im.write(tmp_path / "image", im.docker_20(), form="tar.gz")
    cut(part)(image)
    assert_refused(root, "load", image)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_layer_is_refused(form: str, damage: str, root: Path, tmp_path: Path) -> None:
    rewrite(tmp_path / "image", DAMAGES[damage], form)
    assert_refused(root, "load", tmp_path / "image")


@pytest.mark.parametrize("odd", ODD_FILES)
def test_what_is_no_image_is_refused(odd: str, root: Path, tmp_path: Path) -> None:
    ODD_FILES[odd](tmp_path / "image")
    assert_refused(root, "load", tmp_path / "image")
    assert not Path("/tmp/overlaykit-escaped").exists()


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.zst"])
def test_what_is_no_root_filesystem_is_refused(suffix: str, root: Path, tmp_path: Path) -> None:
    broken = tmp_path / f"rootfs.{suffix}"
    broken.write_bytes(NOT_TAR)
    assert_refused(root, "import", broken, "base:1")
    assert_refused(root, "import", tmp_path / "nowhere", "base:1")


def test_a_truncated_root_filesystem_is_refused(root: Path, tmp_path: Path) -> None:
    broken = tmp_path / "rootfs.tar"
    broken.write_bytes(im.LAYERS[0][:9000])
    assert_refused(root, "import", broken, "base:1")


def test_names_that_are_not_there_are_one_line(root: Path) -> None:
    assert "nothing:1" in assert_refused(root, "save", "nothing:1", "out.tar")
    assert "nobody" in assert_refused(root, "diff", "nobody")
    assert "nothing:1" in assert_refused(root, "create", "nothing:1")
    assert "kept" in assert_refused(root, "create", "good:1", "--name", "kept")
    assert "Bad Name" in assert_refused(root, "tag", "good:1", "Bad Name")
