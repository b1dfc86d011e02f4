"""The power fails: what had not reached the disk is gone. Afterwards a store shows the state before or after what was going
on, and the one after what had come to its end.

The disk is a file with ext4 in it, mounted by a loop device; a copy of the file while the system is mounted has what was
sent to the disk, not what waited in memory. Without an fsync nothing is sent for minutes (commit=300).
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imagefiles as im
import peers
import pytest
from faults import ALL, Change, dice, stopped
from kernel_overlay import SCRATCH

from overlaykit import Store

SOME = 2  # steps of a change at which the power fails, unless it does at each; and once when it is done
SIZE = 48 << 20

SEVERAL = "volume create and fill"  # and a container: three changes, of which each is there or not, the volume perhaps empty
CHANGES: dict[str, Change] = {
    "load": lambda store: store.load(store.root.parent / "two.tar"),
    "import": lambda store: store.import_rootfs(store.root.parent / "rootfs.tar", "imported:1"),
    "unpack": lambda store: store.unpack(store.image("three:1")),
    "create": lambda store: store.create("one:1", name="second"),
    "commit": lambda store: store.container("box").commit("made:1"),
    "snapshot": lambda store: store.container("box").snapshot("named"),
    "discard": lambda store: store.container("shot").discard("/etc/new"),
    "rm": lambda store: store.container("box").remove(),
    "rmi": lambda store: store.remove_image("three:1"),
    SEVERAL: lambda store: store.create("one:1", name="second", mounts=["data:/etc"]),
    "clone": lambda store: store.volume("spare").clone("data"),
    "rename": lambda store: store.volume("spare").rename("data"),
    "volume rm": lambda store: store.volume("spare").remove(),
    "gc": lambda store: store.gc(),
}


@contextmanager
def plugged_in(disk: Path) -> Iterator[Path]:
    """Where the file system in `disk` is mounted for a `with` block."""
    with tempfile.TemporaryDirectory(dir=disk.parent) as place:
        peers.run("mount", "-o", "loop,commit=300", disk, place)
        try:
            yield Path(place)
        finally:
            gc.collect()  # what was mapped of it
            peers.run("umount", place)


@contextmanager
def copied(disk: Path) -> Iterator[Path]:
    """A copy of a disk, as it is now. A new file: the kernel keeps for a while what it had read of another's blocks."""
    with tempfile.TemporaryDirectory(dir=disk.parent) as folder:
        yield Path(shutil.copy(disk, folder))


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A disk with a store: one:1 with containers `box` and `shot`, three:1, which is not unpacked, a volume `spare`."""
    peers.need_root("mounts a disk")
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(dir=SCRATCH, prefix="overlaykit-test-") as folder,
    ):
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        disk = Path(folder) / "disk"
        with disk.open("wb") as file:
            file.truncate(SIZE)
        peers.run("mkfs.ext4", "-q", "-F", disk)
        with plugged_in(disk) as place:
            prepare(place)
        yield disk


def prepare(place: Path) -> None:
    im.write(place / "one.tar", im.docker_20(tag="one:1"), form="tar")
    im.write(place / "two.tar", im.oci([im.LAYERS[1], im.LAYERS[0]], tag="two:1"), form="tar")
    im.write(place / "three.tar", im.oci([im.LAYERS[0]], tag="three:1"), form="tar")
    (place / "rootfs.tar").write_bytes(im.LAYERS[0])
    with Store(place / "store") as store:
        store.load(place / "one.tar")
        store.load(place / "three.tar")
        with store.create("one:1", name="box") as box:
            box.fs.unlink("/etc/motd")
        with store.create("one:1", name="shot") as shot:
            shot.fs.write_bytes("/etc/new", b"new")
            shot.snapshot("first")
        (store.create_volume("spare").mountpoint / "file").write_bytes(im.NOISE)


def state(store: Store) -> dict[str, Any]:
    """What a user sees."""
    found: dict[str, Any] = {f"image {name}": image.digest for image in store.images() for name in image.tags}
    for container in store.containers():
        changes = [str(change) for change in container.diff()]
        found[f"container {container.name}"] = (changes, [s.name for s in container.snapshots()])
    for volume in store.volumes():
        found[f"volume {volume.name}"] = {path.name: path.read_bytes() for path in volume.mountpoint.iterdir()}
    return found


def after_a_cut(disk: Path, change: Change, step: int) -> tuple[bool, dict[str, Any]]:
    """Whether the change came to its end before step number `step`, and what a user sees if the power fails then.

    Nothing is wrong in the store, in what is unpacked neither.
    """
    with (
        copied(disk) as mine,
        plugged_in(mine) as place,
        stopped(place / "store", change, step) as is_under_way,
        copied(mine) as cut,
        plugged_in(cut) as there,
    ):
        return not is_under_way, seen(there / "store")


def seen(root: Path) -> dict[str, Any]:
    with Store(root) as store:
        store.gc()
        assert store.fsck(deep=True) == []
        return state(store)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child does not touch what other threads hold
@pytest.mark.parametrize("name", CHANGES)
def test_after_a_power_cut_a_change_is_done_or_never_was(name: str, disk: Path) -> None:
    _, before = after_a_cut(disk, CHANGES[name], 0)
    is_done, after = after_a_cut(disk, CHANGES[name], 100_000)
    assert is_done
    assert (after == before) == (name in ("unpack", "gc"))
    for step in range(300) if ALL else dice(name).sample(range(60), SOME):
        is_done, found = after_a_cut(disk, CHANGES[name], step)
        if name == SEVERAL and not is_done:
            assert all(found.get(key) in (before.get(key), after.get(key), {}) for key in {*before, *after}), (
                f"at step {step}"
            )
        else:
            assert found in ([after] if is_done else [before, after]), f"at step {step}"
        if is_done and ALL:
            break
