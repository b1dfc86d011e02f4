"""The main job on a real image, and what Docker, podman, umoci and skopeo make of the result, entry by entry.

Debian imported; a second layer that adds and deletes; saved, loaded, changed, committed, saved in every form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ours
import peers
import pytest
from ours import op
from treetext import below_root, differences, listing

import overlaykit

WHEN = 1_600_000_000 * 10**9  # ns: of everything that was changed, so that trees made one after another are equal
CAP_NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")  # security.capability, version 2

SECOND = [
    op("makedirs", "/srv/www/html"),
    op("write", "/srv/www/html/index", "<p>" * 50_000),
    op("write", "/etc/motd", "second layer\n"),
    op("rm", "/usr/share/doc/bash"),
    op("unlink", "/etc/debian_version"),
    op("chmod", "/usr/bin/env", 0o700),
    op("rm", "/etc/skel"),
    op("mkdir", "/etc/skel"),
    op("write", "/etc/skel/only", "this\n"),
]
THIRD = [
    op("append", "/etc/motd", "third layer\n"),
    op("unlink", "/etc/issue"),
    op("unlink", "/srv/www/html/index"),
    op("write", "/srv/www/html/start", "hello\n"),
    op("link", "/srv/www/html/start", "/srv/www/html/also"),
    op("symlink", "/srv/link", "www/html/start"),
    op("chown", "/etc/issue.net", 1000, 1000),
    op("mknod", "/srv/null", 0o020666, 1, 3),
    op("mknod", "/srv/disk", 0o060640, 8, 1),
    op("mkfifo", "/srv/fifo", 0o600),
    op("rename", "/etc/shells", "/etc/shells.old"),
    op("rm", "/usr/share/doc/tar"),
    op("symlink", "/usr/share/doc/tar", "coreutils"),
    op("setxattr", "/srv/www/html/start", "user.colour", b"blue"),
    op("write", "/srv/ping", "#!/bin/sh\n"),
    op("chmod", "/srv/ping", 0o755),
    op("setxattr", "/srv/ping", "security.capability", CAP_NET_RAW),
    op("write", "/srv/setuid", "#!/bin/sh\n"),
    op("chown", "/srv/setuid", 0, 8),
    op("chmod", "/srv/setuid", 0o6755),
    op("mkdir", "/srv/sticky"),
    op("chmod", "/srv/sticky", 0o3777),
    op("write", "/srv/na\u00efve \udcff", "names\n"),
]


def change(fs: Any, operations: list[ours.Op]) -> None:
    """Make the changes, and set the time of all that they touched, directories above included, to one moment."""
    ours.perform(fs, operations)
    touched = {str(arg) for each in operations for arg in each.args[:2] if str(arg).startswith("/")}
    touched |= {parent for path in touched for parent in map(str, Path(path).parents)}
    for path in sorted(touched, reverse=True):
        try:
            fs.utime(path, ns=(WHEN, WHEN), follow_symlinks=False)
        except FileNotFoundError:
            continue  # deleted


class Saved(NamedTuple):
    docker_archive: Path
    oci_archive: Path
    oci_directory: Path
    root: Path  # of the store they were saved from
    expected: dict[str, str]  # the tree, made by GNU tar and the same changes in a plain directory


NAME = "localhost/debian:3"


@pytest.fixture(scope="module")
def saved(bookworm: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The image that went the whole way, in all three forms."""
    top = tmp_path_factory.mktemp("handover")
    with overlaykit.Store(top / "first") as store:
        base = store.import_rootfs(bookworm, "localhost/debian:1")
        with store.create(base, name="second") as container:
            change(container.fs, SECOND)
            container.commit("localhost/debian:2").save(top / "two.tar")
    with overlaykit.Store(top / "store") as store:
        store.load(top / "two.tar")
        with store.create(store.image("localhost/debian:2"), name="third") as container:
            change(container.fs, THIRD)
            container.commit(NAME)
    for form, path in (("docker-archive", "docker.tar"), ("oci-archive", "oci.tar"), ("oci-dir", "oci")):
        ours.command(top / "store", "save", "--format", form, NAME, top / path)
    plain = top / "plain"
    plain.mkdir()
    peers.run("tar", "-x", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-p", "-f", bookworm, "-C", plain)
    for layer in (SECOND, THIRD):
        change(ours.Plain(plain), layer)
    return Saved(top / "docker.tar", top / "oci.tar", top / "oci", top / "store", listing(plain))


@pytest.fixture(scope="module")
def in_docker(saved: Saved, docker: peers.Docker) -> Iterator[str]:
    """The image's name in Docker."""
    docker("load", "--input", saved.docker_archive)
    yield NAME
    docker("rmi", "--force", NAME)


def test_docker_runs_it_with_the_changes(docker: peers.Docker, in_docker: str) -> None:
    def run(*command: str, check: bool = True) -> str:
        return docker("run", "--rm", "--network", "none", in_docker, *command, check=check)

    assert run("cat", "/etc/motd", "/srv/link") == "second layer\nthird layer\nhello\n"
    assert run("sh", "-c", "test ! -e /etc/issue && test ! -e /usr/share/doc/bash && echo gone") == "gone\n"
    assert run("ls", "/etc/skel", "/srv/www/html") == "/etc/skel:\nonly\n\n/srv/www/html:\nalso\nstart\n"
    assert run("dpkg", "--verify", "coreutils") == ""


def test_docker_unpacks_the_same_tree(saved: Saved, docker: peers.Docker, in_docker: str) -> None:
    with docker.tree(in_docker) as tree:
        assert differences(below_root(saved.expected), below_root(listing(tree))) == ""


def test_docker_sees_a_history_entry_for_each_layer(saved: Saved, docker: peers.Docker, in_docker: str) -> None:
    assert len(docker("history", "--quiet", in_docker).splitlines()) == 3
    layers = json.loads(docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", in_docker))
    with overlaykit.Store(saved.root) as store:
        assert layers == [layer.diff_id for layer in store.image(NAME).layers]


def source_of(saved: Saved, transport: str) -> Path:
    """The file or directory that the transport (as skopeo and podman call it) reads."""
    sources = {"docker-archive": saved.docker_archive, "oci-archive": saved.oci_archive, "oci": saved.oci_directory}
    return sources[transport]


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci"])
def test_podman_unpacks_the_same_tree(form: str, saved: Saved, podman: peers.Podman) -> None:
    image = podman("pull", "--quiet", f"{form}:{source_of(saved, form)}").strip()
    with podman.tree(image) as tree:
        found = listing(tree)
    podman("rmi", "--force", image)
    assert differences(below_root(saved.expected), below_root(found)) == ""


def test_umoci_unpacks_the_same_tree(saved: Saved, tmp_path: Path) -> None:
    tree = peers.umoci_unpack(saved.oci_directory, tag_of(saved.oci_directory), tmp_path / "bundle")
    assert differences(saved.expected, listing(tree)) == ""


@pytest.mark.parametrize("form", ["oci-archive", "oci", "docker-archive"])
def test_skopeo_copies_the_same_tree(form: str, saved: Saved, tmp_path: Path) -> None:
    source = {"oci-archive": saved.oci_archive, "oci": saved.oci_directory, "docker-archive": saved.docker_archive}[form]
    peers.skopeo_copy(f"{form}:{source}", f"oci:{tmp_path}/copy:copied")
    tree = peers.umoci_unpack(tmp_path / "copy", "copied", tmp_path / "bundle")
    assert differences(saved.expected, listing(tree)) == ""


def test_skopeo_keeps_every_digest(saved: Saved, tmp_path: Path) -> None:
    peers.skopeo_copy(f"oci:{saved.oci_directory}", f"oci:{tmp_path}/copy:copied")
    blobs = {path.name for path in (saved.oci_directory / "blobs/sha256").iterdir()}
    assert {path.name for path in (tmp_path / "copy/blobs/sha256").iterdir()} == blobs


def test_the_kernel_mounts_the_same_tree(saved: Saved, tmp_path: Path) -> None:
    with ours.mounted(saved.root, "third", tmp_path / "merged") as merged:
        assert differences(saved.expected, listing(merged)) == ""


def test_in_process_it_is_the_same_tree(saved: Saved) -> None:
    with overlaykit.Store(saved.root) as store:
        with store.container("third") as container:
            assert differences(saved.expected, listing("/", fs=container.fs)) == ""
        with store.create(store.image(NAME), name="fresh") as container:
            assert differences(saved.expected, listing("/", fs=container.fs)) == ""


def test_gnu_tar_reads_the_layers(saved: Saved, tmp_path: Path) -> None:
    """The base layer alone, by the oldest of the tools: our tars are tars."""
    manifest = json.loads(peers.run("skopeo", "inspect", "--raw", f"oci:{saved.oci_directory}").stdout)
    for layer in manifest["layers"]:
        blob = saved.oci_directory / "blobs" / layer["digest"].replace(":", "/")
        names = peers.run("tar", "-tzf", blob).stdout.splitlines()
        assert names
        assert not any(name.startswith("/") or ".." in name.split("/") for name in names)


def tag_of(layout: Path) -> str:
    index = json.loads((layout / "index.json").read_text())
    return index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"]
