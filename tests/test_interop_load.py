"""What Docker, podman, skopeo and umoci wrote, loaded here, is the tree that they unpack: entry by entry, with modes,
owners, times, xattrs, hard links and device nodes; through the kernel's mount of it and in process."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import imagefiles
import ours
import peers
import pytest
from ours import op
from treetext import below_root, differences, listing, text

import overlaykit
from overlaykit.oci import open_image
from overlaykit.tree import merge

# The second layer of every image here: whiteouts, an opaque directory, a new link, changed attributes.
SECOND_LAYER = [
    op("write", "/etc/motd", "second\n"),
    op("unlink", "/etc/conf.d/a"),
    op("rm", "/lib/deep/er"),
    op("mkdir", "/lib/deep/er"),
    op("write", "/lib/deep/er/new", "n" * 100_000),
    op("chmod", "/home/user", 0o2750),
    op("chown", "/home/user/notes", 5, 6),
    op("unlink", "/lib/link"),
    op("symlink", "/lib/link", "deep/two"),
    op("write", "/srv", "a file\n"),
    op("link", "/srv", "/srv2"),
    op("rm", "/var/log"),
    op("mkfifo", "/tmp/pipe"),
]
NAME = "localhost/two:layers"


@pytest.fixture(scope="module")
def docker_image(docker: peers.Docker, small_rootfs: Path) -> str:
    """The image of two layers in Docker."""
    docker("import", small_rootfs, "localhost/base:1")
    docker("run", "--name", "second", "--network", "none", "localhost/base:1", "sh", "-c", ours.shell(SECOND_LAYER))
    docker("commit", "second", NAME)
    docker("rm", "second")
    return NAME


@pytest.fixture(scope="module")
def docker_archive(docker: peers.Docker, docker_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `docker save` wrote."""
    archive = tmp_path_factory.mktemp("docker") / "image.tar"
    docker("save", "--output", archive, docker_image)
    return archive


@pytest.fixture(scope="module")
def docker_listing(docker: peers.Docker, docker_image: str) -> dict[str, str]:
    """The tree of the image as Docker unpacked it."""
    with docker.tree(docker_image) as tree:
        return below_root(listing(tree))


@pytest.fixture(scope="module")
def podman_image(podman: peers.Podman, small_rootfs: Path) -> str:
    """The image of two layers in podman, made by its own commit."""
    podman("import", small_rootfs, "localhost/base:1")
    container = podman("create", "--network", "none", "localhost/base:1", "sh").strip()
    ours.perform(ours.Plain(Path(podman("mount", container).strip())), SECOND_LAYER)
    podman("umount", container)
    podman("commit", "--quiet", container, NAME)
    return NAME


@pytest.fixture(scope="module")
def umoci_layout(small_rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with the image of two layers under the tag `two`, made by umoci."""
    folder = tmp_path_factory.mktemp("umoci")
    layout, bundle = folder / "layout", folder / "bundle"
    peers.run("umoci", "init", "--layout", layout)
    peers.run("umoci", "new", "--image", f"{layout}:two")

    def unpack_base(tree: Path) -> None:
        options = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "--delay-directory-restore"]
        options.append("--warning=no-unknown-keyword")  # hdrcharset, which Python's tarfile writes
        peers.run("tar", "--extract", *options, "--file", small_rootfs, "--directory", tree)

    def change(tree: Path) -> None:
        ours.perform(ours.Plain(tree), SECOND_LAYER)

    for make_layer in (unpack_base, change):
        make_layer(peers.umoci_unpack(layout, "two", bundle))
        peers.run("umoci", "repack", "--image", f"{layout}:two", bundle)
        shutil.rmtree(bundle)
    return layout


def assert_loads(tmp_path: Path, image: Path, expected: dict[str, str]) -> None:
    """Load `image` into a new store; its tree must be `expected`, in process and mounted, and unpacked nowhere."""
    assert_says(image, expected)
    pick = dict if "/" in expected else below_root
    root = tmp_path / "store"
    ours.command(root, "load", image)
    with overlaykit.Store(root) as store:
        (loaded,) = store.images()
        with store.create(loaded, name="seen") as container:
            assert differences(expected, pick(listing("/", fs=container.fs))) == ""
    with ours.mounted(root, "seen", tmp_path / "merged") as merged:
        assert differences(expected, pick(listing(merged))) == ""


def assert_says(image: Path, expected: dict[str, str]) -> None:
    """The layers in the file, merged without unpacking them, must say `expected`, contents aside."""
    merged = merge([layer.tree() for layer in open_image(image).layers])
    found = {line.split(" ")[0]: line for line in text(merged).splitlines()}
    without_content = {line.split(" ")[0]: re.sub(r" sha256=\w+", "", line) for line in expected.values()}
    if "/" not in expected:
        del found["/"]
    assert differences(without_content, found) == ""


# --- Docker -----------------------------------------------------------------------------------------------------------


def test_what_docker_saved(docker_archive: Path, docker_listing: dict[str, str], tmp_path: Path) -> None:
    assert "/srv2" in docker_listing
    assert_loads(tmp_path, docker_archive, docker_listing)


def test_what_docker_saved_and_gzip_packed(docker_archive: Path, docker_listing: dict[str, str], tmp_path: Path) -> None:
    packed = tmp_path / "image.tar.gz"
    packed.write_bytes(gzip.compress(docker_archive.read_bytes(), 1))
    assert_loads(tmp_path, packed, docker_listing)


def test_what_docker_25_saves(docker_archive: Path, docker_listing: dict[str, str], tmp_path: Path) -> None:
    """Debian's Docker writes the older layout, so its layers are put into the newer one."""
    with tarfile.open(docker_archive) as tar:
        (manifest,) = json.load(tar.extractfile("manifest.json"))
        layers = [tar.extractfile(name).read() for name in manifest["Layers"]]
    assert_loads(
        tmp_path,
        imagefiles.write(tmp_path / "image.tar", imagefiles.docker_25(layers, tag=NAME), form="tar"),
        docker_listing,
    )


def test_several_images_that_docker_saved(docker: peers.Docker, docker_image: str, tmp_path: Path) -> None:
    archive = tmp_path / "both.tar"
    docker("save", "--output", archive, docker_image, "localhost/base:1")
    ours.command(tmp_path / "store", "load", archive)
    with overlaykit.Store(tmp_path / "store") as store:
        for name in (docker_image, "localhost/base:1"):
            with docker.tree(name) as tree, store.create(store.image(name)) as container:
                assert differences(below_root(listing(tree)), below_root(listing("/", fs=container.fs))) == ""


# --- podman -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci-dir"])
def test_what_podman_saved(form: str, podman: peers.Podman, podman_image: str, tmp_path: Path) -> None:
    podman("save", "--quiet", "--format", form, "--output", tmp_path / "image", podman_image)
    with podman.tree(podman_image) as tree:
        expected = below_root(listing(tree))
    assert "/srv2" in expected
    assert_loads(tmp_path, tmp_path / "image", expected)


# --- skopeo -----------------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "oci": lambda to: (f"oci:{to}:two",),
    "oci, zstd": lambda to: (f"oci:{to}:two", "--dest-compress-format", "zstd"),
    "oci-archive": lambda to: (f"oci-archive:{to}:two",),
    "oci-archive, zstd": lambda to: (f"oci-archive:{to}:two", "--dest-compress-format", "zstd"),
    "docker-archive": lambda to: (f"docker-archive:{to}:{NAME}",),
}


@pytest.mark.parametrize("form", COPIES)
def test_what_skopeo_copied(form: str, docker_archive: Path, docker_listing: dict[str, str], tmp_path: Path) -> None:
    peers.skopeo_copy(f"docker-archive:{docker_archive}", *COPIES[form](tmp_path / "image"))
    assert_loads(tmp_path, tmp_path / "image", docker_listing)


# --- umoci ------------------------------------------------------------------------------------------------------------


def test_what_umoci_packed(umoci_layout: Path, tmp_path: Path) -> None:
    expected = listing(peers.umoci_unpack(umoci_layout, "two", tmp_path / "bundle"))
    assert "/srv2" in expected
    assert_loads(tmp_path, umoci_layout, expected)


def test_what_umoci_packed_with_skopeo_in_between(umoci_layout: Path, tmp_path: Path) -> None:
    expected = listing(peers.umoci_unpack(umoci_layout, "two", tmp_path / "bundle"))
    peers.skopeo_copy(f"oci:{umoci_layout}:two", f"oci-archive:{tmp_path}/image:two")
    assert_loads(tmp_path, tmp_path / "image", expected)


def test_the_tools_agree_on_the_small_root_filesystem(
    docker: peers.Docker, podman: peers.Podman, docker_image: str, podman_image: str, umoci_layout: Path, tmp_path: Path
) -> None:
    """Else the tests above could compare with a tool's mistake. Times differ: each tool made its own layer."""
    with docker.tree(docker_image) as tree:
        theirs = names_and_kinds(listing(tree))
    with podman.tree(podman_image) as tree:
        assert names_and_kinds(listing(tree)) == theirs
    assert names_and_kinds(listing(peers.umoci_unpack(umoci_layout, "two", tmp_path / "bundle"))) == theirs


def names_and_kinds(lines: dict[str, str]) -> list[str]:
    return [" ".join(line.split()[:3]) for line in below_root(lines).values()]
