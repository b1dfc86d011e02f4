"""One image with traps in it, unpacked by Docker, podman, umoci and GNU tar and here: the same tree, entry by entry.

Its base and its second layer are Python's tars. The third leads to a tree full of changes (traps.py), and is packed here.
Where a peer makes something else of a layer, a table says so.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import imagefiles
import peers
import pytest
import traps
from treetext import below_root, differences, listing

from overlaykit.oci import open_image
from overlaykit.oci.disk import apply_layer, pack_layer, unpack

TAG = "localhost/traps:3"
TAR_OPTIONS = ("--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-permissions", "--delay-directory-restore")
TAR_OPTIONS += ("--exclude=.wh.*", "--warning=no-unknown-keyword")  # hdrcharset, which Python's tarfile writes
# What peers make otherwise: Go's archive/tar has no xattrs without a value, Docker and podman no times before 1970.
EMPTY_XATTR = {"/srv/new/attributes"}
BEFORE_1970 = {"/srv/new/early"}


class Made(NamedTuple):
    place: Path  # in memory
    layers: list[bytes]  # uncompressed, bottom first
    expected: dict[str, str]
    docker_archive: Path
    oci: Path  # a layout, with the tag 3


@pytest.fixture(scope="module")
def made(small_rootfs: Path) -> Iterator[Made]:
    with peers.overlay_place("apply") as place:
        base = open_image(traps.image(small_rootfs, place / "base.tar", "localhost/traps:1"))
        for name in ("before", "after"):
            unpack(base, place / name)
        change(place / "after")
        layer = io.BytesIO()
        pack_layer(place / "after", layer, lower=place / "before", compression="none", subsecond=True)
        layers = [*traps.layers(small_rootfs), layer.getvalue()]
        archive = imagefiles.write(place / "image.tar", imagefiles.docker_20(layers, tag=TAG), form="tar")
        layout = imagefiles.write(place / "oci", imagefiles.oci(layers, tag="3"), form="dir")
        yield Made(place, layers, listing(place / "after"), archive, layout)


def change(root: Path) -> None:
    traps.change(root)
    traps.attributes(root)
    (root / "srv/new/socket").unlink()


def assert_same(expected: dict[str, str], found: dict[str, str], *, other: Collection[str] = ()) -> None:
    """`found` must be `expected`, but for the paths in `other`, which must be otherwise."""
    wanted = expected if "/" in found else below_root(expected)
    unlike = {path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)}
    assert unlike == set(other), differences(wanted, found)


def test_an_image_unpacked_here_is_the_tree(made: Made, tmp_path: Path) -> None:
    for source in (made.oci, made.docker_archive):
        shutil.rmtree(made.place / "ours", ignore_errors=True)
        unpack(open_image(source), made.place / "ours")
        assert_same(made.expected, listing(made.place / "ours"))


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_layers_applied_here_one_after_another_are_the_tree(compression: str, made: Made) -> None:
    command = {"none": ["cat"], "gzip": ["gzip", "-1"], "zstd": ["zstd", "-q"]}[compression]
    home = made.place / f"one by one, {compression}"
    home.mkdir(mode=0o755)
    for layer in made.layers:
        (made.place / "layer").write_bytes(layer)
        with open(made.place / "layer", "rb") as plain, open(made.place / "blob", "wb") as blob:
            subprocess.run(command, stdin=plain, stdout=blob, check=True)
        apply_layer(made.place / "blob", home)
    assert_same(made.expected, listing(home))


def test_gnu_tar_and_whiteouts_carried_out_by_hand_make_the_tree(made: Made) -> None:
    home = made.place / "gnu"
    home.mkdir(mode=0o755)
    for layer in made.layers:
        carry_out(layer, home)
        (made.place / "layer.tar").write_bytes(layer)
        peers.run("tar", "--extract", *TAR_OPTIONS, "--file", made.place / "layer.tar", "--directory", home)
    assert_same(made.expected, listing(home))


def carry_out(layer: bytes, home: Path) -> None:
    """Take away below `home` what the whiteouts of `layer` name, and what is of another kind than its entries are."""
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            if name == ".wh..wh..opq":
                for path in (home / folder).iterdir() if (home / folder).is_dir() else ():
                    remove(path)
            elif name.startswith(".wh."):
                remove(home / folder / name.removeprefix(".wh."))
            elif not (member.isdir() and (home / member.name).is_dir()) or (home / member.name).is_symlink():
                remove(home / member.name)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def test_umoci_makes_the_tree(made: Made) -> None:
    assert_same(made.expected, listing(peers.umoci_unpack(made.oci, "3", made.place / "umoci")), other=EMPTY_XATTR)


def test_docker_makes_the_tree(made: Made, docker: peers.Docker) -> None:
    docker("load", "--input", made.docker_archive)
    with docker.tree(TAG) as tree:
        assert_same(made.expected, below_root(listing(tree)), other=EMPTY_XATTR | BEFORE_1970)
    docker("rmi", "--force", TAG)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_podman_makes_the_tree(compression: str, made: Made, podman: peers.Podman) -> None:
    copy = made.place / f"copy.{compression}"
    peers.skopeo_copy(f"docker-archive:{made.docker_archive}", f"oci:{copy}:3", "--dest-compress-format", compression)
    image = podman("pull", "--quiet", f"oci:{copy}:3").strip()
    with podman.tree(image) as tree:
        assert_same(made.expected, below_root(listing(tree)), other=EMPTY_XATTR | BEFORE_1970)
    podman("rmi", "--force", image)


def test_what_umoci_packs_is_unpacked_here_as_by_umoci(made: Made) -> None:
    layout, bundle = made.place / "umoci layout", made.place / "bundle"
    peers.skopeo_copy(f"docker-archive:{made.place / 'base.tar'}", f"oci:{layout}:1")
    change(peers.umoci_unpack(layout, "1", bundle))
    peers.run("umoci", "repack", "--image", f"{layout}:2", bundle)
    theirs = listing(peers.umoci_unpack(layout, "2", made.place / "again"))
    unpack(open_image(layout, name="2"), made.place / "umoci's here")
    assert_same(theirs, listing(made.place / "umoci's here"))
