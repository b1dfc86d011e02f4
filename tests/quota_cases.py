"""Limits on writable layers that the kernel holds: on xfs mounted with prjquota. test_quota.py starts this in a kernel that
has it, with $QUOTA_PLACE a directory there; by hand: QUOTA_PLACE=/mnt/xfs python -m pytest tests/quota_cases.py"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import peers
import pytest
import rootfs

from overlaykit import Container, Store
from overlaykit.overlay import Overlay
from overlaykit.overlay.limited import LimitedOverlay
from overlaykit.store import quota
from overlaykit.store.disk import usage

MIB = 1 << 20


@pytest.fixture
def store() -> Iterator[Store]:
    with tempfile.TemporaryDirectory(dir=os.environ["QUOTA_PLACE"]) as place, Store(Path(place) / "store") as opened:
        rootfs.write(Path(place) / "rootfs.tar", busybox=Path(peers.peer("busybox")))
        opened.import_rootfs(Path(place) / "rootfs.tar", "base:1")
        yield opened


@pytest.fixture
def make(store: Store, caplog: pytest.LogCaptureFixture) -> Callable[..., Container]:
    def create(name: str = "box", **limits: str) -> Container:
        with caplog.at_level(logging.WARNING):
            box = store.create("base:1", name=name, storage_opt=limits)
        assert caplog.text == ""
        return box

    return create


def fill(make_one: Callable[[int], object]) -> int:
    """How often it worked before there was no space."""
    done: list[object] = []
    with pytest.raises(OSError, match="No space"):
        done.extend(make_one(number) for number in range(100))
    return len(done)


def settled(store: Store, box: Container) -> None:
    """Wait for xfs to have really removed what was removed: it does that in the background, and until then it counts."""
    directory = store.snapshots.directory(box.id)
    end = time.monotonic() + 120
    while account(store, box)[3] != usage(directory / "fs").inodes + usage(directory / "work").inodes:
        os.statvfs(directory)  # pushes it
        assert time.monotonic() < end
        time.sleep(0.01)


def account(store: Store, box: Container) -> tuple[int, ...]:
    """Limit of blocks, bytes used, limit of inodes and inodes used, as the kernel has it."""
    with quota._opened(store.snapshots.fs(box.id)) as fd:
        found = quota._account(fd, quota._project(fd))
    return found[0], found[2], found[3], found[5]


def test_in_process_every_entry_counts(make: Callable[..., Container], store: Store) -> None:
    box = make(entries="7")
    assert isinstance(box.fs, Overlay)
    assert not isinstance(box.fs, LimitedOverlay)
    assert fill(lambda number: box.fs.mkdir(f"/{number}")) == 7
    with pytest.raises(OSError, match="No space") as caught:
        box.fs.chmod("/etc/motd", 0o600)
    assert caught.value.filename == "/etc/motd"
    box.fs.rmdir("/0")
    settled(store, box)
    box.fs.mkdir("/again")


def test_a_mount_and_a_program_get_no_further(make: Callable[..., Container], store: Store) -> None:
    box = make(entries="9")
    place = box.mount()
    settled(store, box)
    try:
        assert fill(lambda number: (place / str(number)).mkdir()) == 9
    finally:
        box.unmount()
    box.fs.rmdir("/0")
    settled(store, box)
    # What the mount made and removed in work counts until xfs has really removed it.
    one = "n=0; until mkdir /a 2>/dev/null; do n=$((n+1)); test $n -lt 1000 || exit 1; sleep 0.1; done"
    assert box.run(["sh", "-c", f"{one}; ! mkdir /b 2>/dev/null"]) == 0


def test_bytes_end_where_the_limit_is(make: Callable[..., Container], store: Store) -> None:
    box = make(size="4m")
    with box.fs.open("/big", "wb", buffering=0) as file:
        assert fill(lambda _: (file.write(b"x" * (MIB // 4)), os.fsync(file.fileno()))) > 10
    assert 3 * MIB <= store.snapshots.usage(box.id).size <= 4 * MIB
    assert box.run(["sh", "-c", "dd if=/dev/zero of=/more bs=64k count=64 2>/dev/null"]) != 0
    box.fs.unlink("/big")
    settled(store, box)
    box.fs.path("/small").write_text("x")


def test_copy_up_that_does_not_fit_leaves_nothing(make: Callable[..., Container], store: Store) -> None:
    plain = store.create("base:1", name="plain")
    with plain.fs.open("/large", "wb") as file:
        file.write(os.urandom(3 * MIB))
    plain.commit("base:1")
    box = make(size="2m")
    with pytest.raises(OSError, match="No space"):
        box.fs.open("/large", "ab")
    assert list(store.snapshots.fs(box.id).iterdir()) == []
    assert store.snapshots.usage(box.id).size < MIB


def test_what_was_frozen_stays_counted(make: Callable[..., Container]) -> None:
    box = make(entries="6")
    for number in range(4):
        box.fs.mkdir(f"/{number}")
    box.snapshot("one")
    assert fill(lambda number: box.fs.mkdir(f"/new{number}")) == 2
    twin = box.fork("twin")
    with pytest.raises(OSError, match="No space"):
        twin.fs.mkdir("/x")
    box.rollback("one")
    assert fill(lambda number: box.fs.mkdir(f"/new{number}")) == 2


def test_a_removed_containers_project_is_given_back_and_not_reused(make: Callable[..., Container], store: Store) -> None:
    seen = set()
    for _ in range(5):
        box = make(entries="5")
        box.fs.mkdir("/a")
        with quota._opened(store.snapshots.fs(box.id)) as fd:
            project = quota._project(fd)
        assert account(store, box)[2:] == (5 + quota.OVERHEAD, 1 + quota.OVERHEAD)
        assert project not in seen
        seen.add(project)
        box.remove()
        end = time.monotonic() + 120
        with quota._opened(store.root) as fd:
            assert quota._account(fd, project)[:5] == (0,) * 5
            while any(quota._account(fd, project)):
                os.statvfs(fd)
                assert time.monotonic() < end


def test_a_number_that_files_still_have_is_passed_over(make: Callable[..., Container], store: Store) -> None:
    box = make(entries="5")
    taken = store.snapshots.directory(box.id)
    with quota._opened(taken / "fs") as fd:
        assert quota._free_project(fd, taken.name) == quota._project(fd) + 1


def test_fsck_gives_the_work_directory_its_project_back(make: Callable[..., Container], store: Store) -> None:
    box = make(entries="50")
    box.fs.mkdir("/a")
    box.close()
    quota_of_work = store.snapshots.directory(box.id) / "work"
    (quota_of_work / "work").rmdir()
    quota_of_work.rmdir()
    assert [finding.kind for finding in store.fsck(repair=True)] == ["missing-work"]
    box.fs.chmod("/etc/motd", 0o600)  # copied up: made in work, renamed into upper
    assert store.fsck() == []


def test_images_are_made_of_it_as_of_any_other(make: Callable[..., Container], store: Store) -> None:
    box = make(entries="50", size="10m")
    box.fs.path("/etc/motd").write_text("changed\n")
    box.fs.unlink("/etc/hostname")
    image = box.commit("made:1")
    with store.create(image) as fresh:
        assert fresh.limits is None
        assert fresh.fs.path("/etc/motd").read_text() == "changed\n"
    box.discard("/etc/motd")
    assert box.fs.path("/etc/motd").read_text() == "welcome\n"
