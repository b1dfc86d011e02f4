"""What a container of a user who is not root wrote, packed in that user's namespace: podman's uppers with user.overlay.*
marks, which the kernel writes, and with user.fuseoverlayfs.*, which fuse-overlayfs writes."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import peers
import pytest
import traps
from treetext import below_root, differences, listing
from users import SOMEBODY, as_somebody_root

from overlaykit.oci import open_image
from overlaykit.oci.disk import apply_layer, pack_layer
from overlaykit.tree import Losses, WhiteoutFormat

TAG = "localhost/traps:1"
FUSE_NAME = 250  # bytes: fuse-overlayfs has no longer names
SOCKET = "srv/new/socket"
LINK = re.compile(r" hardlink=\S+")
THEIRS = ("/.dockerenv", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab", "/proc", "/sys", "/run", "/dev")


@pytest.fixture(scope="module", params=[WhiteoutFormat.USERXATTR, WhiteoutFormat.FUSE], ids=["kernel", "fuse-overlayfs"])
def found(request: pytest.FixtureRequest, small_rootfs: Path) -> Iterator[dict[str, dict[str, str]]]:
    """Listings by name: what podman's mount showed, what the layer made of the image, what is in the upper; and losses."""
    peers.peer("podman")
    fuse = peers.peer("fuse-overlayfs")
    with peers.overlay_place("rootless") as home:
        os.chown(home, SOMEBODY, SOMEBODY)
        archive = traps.image(small_rootfs, home / "image.tar", TAG)
        program = fuse if request.param is WhiteoutFormat.FUSE else None
        status = as_somebody_root(lambda: in_a_container(home, archive, request.param, program), fuse=home / "fuse")
        assert status == 0
        yield json.loads((home / "found.json").read_bytes())


def in_a_container(home: Path, archive: Path, form: WhiteoutFormat, program: str | None) -> int:
    """Change a container's tree, pack its upper, apply that to the image's files, and write down what is where."""
    os.environ |= {"HOME": str(home), "XDG_RUNTIME_DIR": str(home), "TMPDIR": str(home)}
    os.environ |= {"_CONTAINERS_USERNS_CONFIGURED": "done", "_CONTAINERS_ROOTLESS_UID": str(SOMEBODY)}
    podman = peers.Podman(home, *([f"overlay.mount_program={program}"] if program else []))
    podman("load", "--quiet", "--input", archive)
    name = podman("create", "--network", "none", TAG, "sh").strip()
    merged = Path(podman("mount", name).strip())
    traps.change(merged, longest=FUSE_NAME if program else 255, to_directory=not program, devices=False)
    # What a file with several names became fuse-overlayfs shows of all of them until the next mount; and the kernel numbers
    # names that came up by what it remembers, since a user's mount cannot look origins up.
    podman("umount", name)
    merged = Path(podman("mount", name).strip())
    data = json.loads(podman("inspect", "--type", "container", "--format", "{{json .GraphDriver.Data}}", name))
    lowers = [Path(lower) for lower in reversed(data["LowerDir"].split(":"))]
    losses: Losses = []
    packed = io.BytesIO()
    pack_layer(data["UpperDir"], packed, lower=lowers, whiteouts=form, subsecond=True, losses=losses)
    packed.seek(0)
    open_image(archive).unpack(home / "tree")
    apply_layer(packed, home / "tree")
    listings = {"shown": listing(merged), "applied": listing(home / "tree"), "upper": listing(Path(data["UpperDir"]))}
    listings["form"] = {"form": form.name}
    listings["losses"] = {loss.path: loss.what for loss in losses}
    (home / "found.json").write_text(json.dumps(listings))
    podman("umount", name)
    return 0


def kept(lines: dict[str, str]) -> dict[str, str]:
    """Without what podman mounts on, and the socket, which no layer has."""
    return {p: line for p, line in below_root(lines).items() if not p.startswith(THEIRS) and p != f"/{SOCKET}"}


def test_the_layer_makes_of_the_image_what_the_users_mount_shows(found: dict[str, dict[str, str]]) -> None:
    shown, applied = kept(found["shown"]), kept(found["applied"])
    if found["form"] == {"form": "FUSE"}:  # which names are one file it says otherwise from mount to mount
        shown, applied = ({path: LINK.sub("", line) for path, line in lines.items()} for lines in (shown, applied))
    said = differences(shown, applied)
    assert not said, said


def test_a_socket_is_all_that_the_users_layer_loses(found: dict[str, dict[str, str]]) -> None:
    assert list(found["losses"]) == [SOCKET]


def test_no_mark_of_the_overlay_gets_into_the_layer(found: dict[str, dict[str, str]]) -> None:
    marked = [path for path, line in found["upper"].items() if "user.overlay." in line or "user.fuseoverlayfs." in line]
    assert marked
    assert not [path for path, line in found["applied"].items() if "overlay" in line]
