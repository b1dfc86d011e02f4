"""What a peer's container wrote, packed here from the peer's own upper directory.

One set of changes with traps in it (traps.py) is made in a container of each peer. The layer that is packed from the upper,
applied to the image's files, must be what the peer's mount shows, entry by entry; the changes must be those that the peer
lists; and the image that the peer commits may differ only by what the tables here say that the peer loses.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import kernel_overlay
import peers
import pytest
import traps
from treetext import below_root, differences, listing

from overlaykit.oci import open_image
from overlaykit.oci.disk import apply_layer, pack_layer
from overlaykit.overlay.apply import apply_layer as apply_to_empty
from overlaykit.overlay.upper import UpperLayer
from overlaykit.tree import Losses, WhiteoutFormat, changes, merge, scan

TAG = "localhost/traps:1"
COMMITTED = "localhost/traps:2"
FUSE_NAME = 250  # bytes: fuse-overlayfs has no longer names, since a whiteout's might have to begin with .wh.
SOCKET = "srv/new/socket"
# Docker and podman put these into every container's tree: places to mount on, on a layer in between or in the upper.
THEIRS = ("/.dockerenv", "/dev/pts", "/dev/shm", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab")
THEIRS += ("/proc", "/sys", "/run")


class Container(NamedTuple):
    """A peer's container with the changes in it."""

    merged: Path
    upper: Path
    lowers: list[Path]  # bottom first
    whiteouts: WhiteoutFormat = WhiteoutFormat.OVERLAY
    diff: Callable[[], str] | None = None
    commit: Callable[[], AbstractContextManager[Path]] | None = None


class Audit(NamedTuple):
    """What was found of one."""

    side: str
    shown: dict[str, str]
    shown_seconds: dict[str, str]
    upper: dict[str, str]
    applied: dict[str, str]
    losses: Losses
    ours: set[str]
    theirs: set[str]
    committed: dict[str, str]


@pytest.fixture(scope="module")
def archive(small_rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traps.image(small_rootfs, tmp_path_factory.mktemp("traps") / "image.tar", TAG)


# --- the peers --------------------------------------------------------------------------------------------------------


@contextmanager
def in_docker(archive: Path, request: pytest.FixtureRequest) -> Iterator[Container]:
    """A container of Docker while it runs."""
    docker: peers.Docker = request.getfixturevalue("docker")
    docker("load", "--input", archive)
    name = docker("run", "--detach", "--network", "none", TAG, "sleep", "1000").strip()

    @contextmanager
    def commit() -> Iterator[Path]:
        docker("commit", name, COMMITTED)
        with docker.tree(COMMITTED) as tree:
            yield tree

    try:
        data = json.loads(docker("inspect", "--format", "{{json .GraphDriver.Data}}", name))
        merged = Path(data["MergedDir"])
        traps.change(merged)
        traps.attributes(merged)
        traps.nested(merged)
        lowers = [Path(lower) for lower in reversed(data["LowerDir"].split(":"))]
        yield Container(merged, Path(data["UpperDir"]), lowers, diff=lambda: docker("diff", name), commit=commit)
    finally:
        docker("rm", "--force", name)
        docker("rmi", "--force", COMMITTED, check=False)


@contextmanager
def in_podman(archive: Path, podman: peers.Podman, *, fuse: bool = False) -> Iterator[Container]:
    """A container of podman while its tree is mounted."""
    podman("load", "--quiet", "--input", archive)
    name = podman("create", "--network", "none", TAG, "sh").strip()

    @contextmanager
    def commit() -> Iterator[Path]:
        podman("commit", "--quiet", name, COMMITTED)
        with podman.tree(COMMITTED) as tree:
            yield tree

    form = WhiteoutFormat.FUSE if fuse else WhiteoutFormat.OVERLAY
    try:
        merged = Path(podman("mount", name).strip())
        traps.change(merged, longest=FUSE_NAME if fuse else 255, to_directory=fuse)
        if fuse:  # what a file with several names became it shows of all of them, until the next mount
            podman("umount", name)
            merged = Path(podman("mount", name).strip())
        else:
            traps.attributes(merged)
            traps.nested(merged)
        data = json.loads(podman("inspect", "--type", "container", "--format", "{{json .GraphDriver.Data}}", name))
        lowers = [Path(lower) for lower in reversed(data["LowerDir"].split(":"))]
        yield Container(merged, Path(data["UpperDir"]), lowers, form, lambda: podman("diff", name), commit)
    finally:
        podman("umount", "--force", name)
        podman("rm", "--force", name)


def podman_overlay(archive: Path, request: pytest.FixtureRequest) -> AbstractContextManager[Container]:
    return in_podman(archive, request.getfixturevalue("podman"))


@contextmanager
def podman_redirects(archive: Path, _: pytest.FixtureRequest) -> Iterator[Container]:
    with peers.podman_store("overlay.mountopt=redirect_dir=on,metacopy=on") as podman, in_podman(archive, podman) as made:
        yield made


@contextmanager
def podman_fuse(archive: Path, _: pytest.FixtureRequest) -> Iterator[Container]:
    program = peers.peer("fuse-overlayfs")
    with (
        peers.podman_store(f"overlay.mount_program={program}") as podman,
        in_podman(archive, podman, fuse=True) as made,
    ):
        yield made


@contextmanager
def layer_directories(archive: Path, form: WhiteoutFormat) -> Iterator[tuple[list[Path], list[Path]]]:
    """The image's layers, bottom first, as an overlay has them; and an empty upper, work and merged."""
    with peers.overlay_place("uppers") as place:
        lowers = []
        for number, layer in enumerate(open_image(archive).layers):
            lowers.append(place / str(number))
            lowers[-1].mkdir()
            with layer.uncompressed() as stream:
                apply_to_empty(stream, lowers[-1], whiteouts=form)
        empty = [place / name for name in ("upper", "work", "merged")]
        for folder in empty:
            folder.mkdir()
        yield lowers, empty


@contextmanager
def by_kernel(archive: Path, _: pytest.FixtureRequest, **options: bool) -> Iterator[Container]:
    form = WhiteoutFormat.USERXATTR if options.get("userxattr") else WhiteoutFormat.OVERLAY
    with (
        layer_directories(archive, form) as (lowers, (upper, work, merged)),
        kernel_overlay.mounted(lowers, upper, work, merged, **options),
    ):
        traps.change(merged)
        traps.attributes(merged)
        traps.nested(merged)
        yield Container(merged, upper, lowers, form)


def kernel_redirects(archive: Path, request: pytest.FixtureRequest) -> AbstractContextManager[Container]:
    return by_kernel(archive, request, redirect_dir=True, metacopy=True)


def kernel_userxattr(archive: Path, request: pytest.FixtureRequest) -> AbstractContextManager[Container]:
    return by_kernel(archive, request, userxattr=True)


@contextmanager
def fuse_overlayfs(archive: Path, _: pytest.FixtureRequest) -> Iterator[Container]:
    with layer_directories(archive, WhiteoutFormat.FUSE) as (lowers, (upper, work, merged)):
        stack = ":".join(map(str, reversed(lowers)))
        for done in (False, True):
            peers.run("fuse-overlayfs", "-o", f"lowerdir={stack},upperdir={upper},workdir={work}", merged)
            try:
                if done:
                    yield Container(merged, upper, lowers, WhiteoutFormat.FUSE)
                else:
                    traps.change(merged, longest=FUSE_NAME)
            finally:
                peers.run("umount", merged)


SIDES = {
    "docker": in_docker,
    "podman": podman_overlay,
    "podman, redirect_dir and metacopy": podman_redirects,
    "podman, fuse-overlayfs": podman_fuse,
    "kernel, redirect_dir and metacopy": kernel_redirects,
    "kernel, userxattr": kernel_userxattr,
    "fuse-overlayfs": fuse_overlayfs,
}


# --- what they get wrong ----------------------------------------------------------------------------------------------

# Lines of the peer's diff that are not ours, and of ours that are not the peer's.
NEVER_CHANGED = ["C /opt/one", "C /opt/five"]  # got another name, and is otherwise as it was
OF_AN_OPAQUE = ["D /opt/again/old", "D /opt/moved/in", "D /lib/deep/er/new"]  # a name that does not come back
PLACES = ["C /dev"]  # podman leaves out what it mounts on, whatever is in it
DIFFS: dict[str, tuple[list[str], list[str]]] = {
    # Of xattrs Docker looks at file capabilities only.
    "docker": ([], ["C /etc/motd", "C /opt/attribute"]),
    # A directory that was made again is a deleted one to it; and it asks each lower layer for a name, not the merged tree.
    "podman": (
        [*NEVER_CHANGED, "C /lib/deep/er/data"]
        + [f"D {path}" for path in ("/opt/again", "/opt/moved", "/home/user", "/lib/deep/er")],
        [*PLACES, *OF_AN_OPAQUE, "A /lib/deep/er/data", "D /home/user/notes", "D /opt/moved/y", "C /var/log"]
        + [f"C {path}" for path in ("/opt/again", "/opt/moved", "/home/user", "/lib/deep/er")],
    ),
    "podman, redirect_dir and metacopy": ([], PLACES),
    "podman, fuse-overlayfs": ([], [*PLACES, *OF_AN_OPAQUE]),
}
# Of the image that a peer commits: xattrs that are not in it, and paths that are there, or not, or otherwise.
BEFORE_1970 = {"/srv/new/early"}  # becomes 1970
EMPTY_XATTR = {"/srv/new/attributes"}  # an xattr without a value goes
LINK_TO_UNCHANGED = {"/opt/one too", "/opt/six", "/srv/five too"}  # names of a file that is otherwise as it was break apart
COMES_BACK = {"/opt/again/old", "/opt/moved/in", "/opt/moved/in/x", "/lib/deep/er/new"}  # opaque marks get lost
COMMITS: dict[str, tuple[str, set[str]]] = {
    "docker": ("user|trusted|system", BEFORE_1970),
    "podman": ("trusted|system", BEFORE_1970 | EMPTY_XATTR),
    "podman, redirect_dir and metacopy": ("trusted|system", BEFORE_1970 | EMPTY_XATTR | LINK_TO_UNCHANGED),
    "podman, fuse-overlayfs": ("trusted|system", BEFORE_1970 | EMPTY_XATTR | COMES_BACK),
}


# --- what must hold ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SIDES)
def audit(request: pytest.FixtureRequest, archive: Path) -> Audit:
    with SIDES[request.param](archive, request) as made:
        shown, shown_seconds = listing(made.merged), listing(made.merged, seconds=True)
        lowers = [(lower, scan(lower, whiteouts=made.whiteouts)) for lower in made.lowers]
        upper = UpperLayer(made.upper, lowers, whiteouts=made.whiteouts)
        found = changes(merge([tree for _, tree in lowers]), upper.tree)
        losses: Losses = []
        packed = io.BytesIO()
        pack_layer(made.upper, packed, lower=made.lowers, whiteouts=made.whiteouts, subsecond=True, losses=losses)
        theirs = made.diff() if made.diff else ""
        committed: dict[str, str] = {}
        if made.commit is not None:
            with made.commit() as tree:
                committed = listing(tree)
        on_disk = listing(made.upper)
    packed.seek(0)
    with peers.overlay_place("applied") as place:
        open_image(archive).unpack(place / "tree")
        apply_layer(packed, place / "tree")
        applied = listing(place / "tree")
    return Audit(
        request.param,
        kept(shown),
        kept(shown_seconds),
        on_disk,
        kept(applied),
        losses,
        {f"{change.kind} {printed(change.path)}" for change in found if not is_theirs(change.path)},
        {printed(line) for line in re.split(r"\n(?=[ACD] /|$)", theirs) if line and not is_theirs(line[2:])},
        kept(committed),
    )


def is_theirs(path: str) -> bool:
    return path in THEIRS or path.startswith(tuple(f"{name}/" for name in THEIRS))


def kept(lines: dict[str, str]) -> dict[str, str]:
    return {path: line for path, line in below_root(lines).items() if not is_theirs(path) and path != f"/{SOCKET}"}


def printed(path: str) -> str:
    """A path as Go prints it."""
    return os.fsencode(path).decode(errors="replace")


def without_false_links(audit: Audit, *listings: dict[str, str]) -> list[dict[str, str]]:
    """`listings` without which names are links of which if fuse-overlayfs said so: from mount to mount it says otherwise."""
    links = " hardlink=\\S+" if "fuse-overlayfs" in audit.side else "$^"
    return [{path: re.sub(links, "", line) for path, line in lines.items()} for lines in listings]


def links(lines: dict[str, str], paths: Collection[str]) -> dict[str, str]:
    """For each of `paths` that has another name, which."""
    found = {path: re.search(r" hardlink=(\S+)", lines[path]) for path in paths}
    return {path: match[1] for path, match in found.items() if match}


def test_the_layer_makes_of_the_image_what_the_mount_shows(audit: Audit) -> None:
    said = differences(*without_false_links(audit, audit.shown, audit.applied))
    assert not said, said


def test_names_of_one_file_in_the_upper_are_names_of_one_file(audit: Audit) -> None:
    names = {path for path, line in audit.upper.items() if path in audit.applied and " file " in line}
    assert links(audit.applied, names) == links(audit.upper, names)
    assert "/srv/new/name 1" in names


def test_a_socket_is_all_that_is_lost(audit: Audit) -> None:
    assert [loss.path for loss in audit.losses] == [SOCKET]


def test_the_changes_are_those_that_the_peer_lists(audit: Audit) -> None:
    if audit.side in DIFFS:
        only_theirs, only_ours = map(set, DIFFS[audit.side])
        assert (audit.theirs - audit.ours, audit.ours - audit.theirs) == (only_theirs, only_ours)


def test_the_image_that_the_peer_commits_is_the_same_but_for_what_it_loses(audit: Audit) -> None:
    if audit.side in COMMITS:
        xattrs, otherwise = COMMITS[audit.side]
        expected = {path: re.sub(rf" xattr\.({xattrs})\.\S*", "", line) for path, line in audit.shown_seconds.items()}
        expected, found = without_false_links(audit, expected, audit.committed)
        unlike = {path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)}
        assert unlike == otherwise, differences(expected, found)


def test_modes_that_fuse_overlayfs_keeps_in_xattrs_are_those_of_its_mount(archive: Path) -> None:
    """With xattr_permissions the files on disk all have mode 755, and what its mount shows stands in an xattr of theirs."""
    with layer_directories(archive, WhiteoutFormat.FUSE) as (lowers, (upper, work, merged)):
        stack = ":".join(map(str, reversed(lowers)))
        options = f"lowerdir={stack},upperdir={upper},workdir={work},xattr_permissions=2"
        peers.run("fuse-overlayfs", "-o", options, merged)
        try:
            (merged / "new").write_text("new")
            (merged / "new").chmod(0o4751)
            (merged / "sticky").mkdir()
            (merged / "sticky").chmod(0o1777)
            (merged / "etc/motd").chmod(0o600)
            shown = {path: (merged / path).lstat().st_mode & 0o7777 for path in ("new", "sticky", "etc/motd")}
        finally:
            peers.run("umount", merged)
        tree = scan(upper, whiteouts=WhiteoutFormat.FUSE)
        assert {path: tree.entry(tree.find(path)).mode for path in shown} == shown
        assert [name for xattrs in tree.xattr_sets for name in xattrs if "overlay" in name] == []
        assert set(shown.values()) == {0o4751, 0o1777, 0o600}
