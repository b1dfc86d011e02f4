"""Volumes made of others: clones, snapshots, other names, tars out and in, and new files from a newer image."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import peers
import pytest
from faults import is_told, killed_at_steps
from treetext import differences, listing
from users import somebody

from overlaykit import AlreadyExists, InUse, InvalidLayer, InvalidReference, MountSpec, NotFound, Store, Unsupported
from overlaykit.store.reseeding import Reseeded
from overlaykit.store.sizes import shared_extents


def base(store: Store, files: dict[str, str], name: str = "base:1") -> str:
    """An image with these files; a name that ends in / is a directory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, text in files.items():
            entry = tarfile.TarInfo(path.rstrip("/"))
            entry.type, entry.mode = (tarfile.DIRTYPE, 0o755) if path.endswith("/") else (tarfile.REGTYPE, 0o644)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    out.seek(0)
    store.import_rootfs(out, name)
    return name


FILES = {"app/": "", "app/a": "a1", "app/b": "b1", "app/c": "c1", "app/dir/": "", "app/dir/x": "x1", "app/dir/y": "y1"}


@pytest.fixture
def data(store: Store) -> Path:
    """The files of the volume `data`, filled from /app of base:1; container `box` has it."""
    store.create(base(store, FILES), name="box", mounts=["data:/app"])
    return store.volume("data").mountpoint


def texts(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


# --- clones -----------------------------------------------------------------------------------------------------------


def test_a_clone_has_the_same_files_and_goes_its_own_way(store: Store, data: Path) -> None:
    os.link(data / "a", data / "other name")
    os.truncate(data / "b", 1 << 20)
    (data / "fifo").unlink(missing_ok=True)
    os.mkfifo(data / "fifo")
    os.setxattr(data / "dir", "user.kept", b"kept")
    twin = store.volume("data").clone("twin")
    assert differences(listing(data), listing(twin.mountpoint)) == ""
    assert (twin.mountpoint / "a").stat().st_ino == (twin.mountpoint / "other name").stat().st_ino
    (twin.mountpoint / "a").write_text("changed")
    assert (data / "a").read_text() == "a1"
    with pytest.raises(AlreadyExists):
        store.volume("data").clone("twin")


def test_a_snapshot_is_numbered_and_nobody_writes_to_it(store: Store, data: Path) -> None:
    first, second = store.volume("data").snapshot(), store.volume("data").snapshot()
    assert [first.name, second.name] == ["data-1", "data-2"]
    with store.create("base:1", mounts=["data-1:/app"]) as reader:
        assert reader.fs.read_bytes("/app/a") == b"a1"
        with pytest.raises(OSError, match="Read-only"):
            reader.fs.write_bytes("/app/a", b"no")
        assert [mount["RW"] for mount in reader.inspect()["Mounts"]] == [False]
    with pytest.raises(InvalidReference, match="never changes"):
        store.cp(io.BytesIO(b""), "volume:data-1:/")
    assert not first.clone("back").is_snapshot


def test_a_volume_in_use_is_cloned_only_if_that_is_asked(store: Store, data: Path) -> None:
    with store.container("box") as box:
        box.fs.write_bytes("/app/a", b"open")
        with pytest.raises(InUse, match="being used"):
            store.volume("data").clone("twin")
        assert (store.volume("data").clone("twin", live=True).mountpoint / "a").read_text() == "open"
    store.volume("data").clone("again")


def test_who_wants_a_volume_waits_for_its_clone(store: Store, data: Path) -> None:
    """Else a clone could begin at rest, and have files that were written in the midst of it."""
    volume, told = store.volume("data"), []

    def use() -> None:
        with Store(store.root) as other, other.volume("data").mounted():
            told.append("used")

    user = threading.Thread(target=use)
    with store.volume_store.at_rest(volume):
        user.start()
        user.join(0.3)
        told.append("at rest")
    user.join()
    assert told == ["at rest", "used"]


def test_a_renamed_volume_is_the_same_in_its_containers(store: Store, data: Path) -> None:
    store.volume("data").rename("archive")
    with pytest.raises(NotFound):
        store.volume("data")
    with store.container("box") as box:
        assert box.fs.read_bytes("/app/a") == b"a1"
        facts = box.inspect()
    assert (facts["Mounts"][0]["Name"], facts["HostConfig"]["Binds"]) == ("archive", ["archive:/app"])
    store.create_volume("data")
    with pytest.raises(AlreadyExists):
        store.volume("archive").rename("data")
    with pytest.raises(InvalidReference):
        store.volume("archive").rename("a/b")


def test_a_volume_that_somebody_begins_to_read_while_another_waits_to_rename_it_keeps_its_name(store: Store) -> None:
    """It was asked whether anybody used it before the wait: a clone that began meanwhile found its files gone."""
    with Store(store.root) as other:
        volume = store.create_volume("data")
        (volume.mountpoint / "a").write_text("a1")
        refused: list[BaseException] = []

        def rename() -> None:
            try:
                other.volume("data").rename("archive")
            except InUse as e:
                refused.append(e)

        renamer = threading.Thread(target=rename)
        with (store.root / "volumes" / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # as somebody does who makes a volume
            renamer.start()
            is_told(store, "moved-volumes/")
            reader = volume.mounted()
            files = reader.__enter__()
        renamer.join()
        assert (files / "a").read_text() == "a1"
        reader.__exit__(None, None, None)
        assert [type(error) for error in refused] == [InUse]
        assert [volume.name for volume in store.volumes()] == ["data"]


def test_a_volume_that_has_been_made_anew_is_not_taken_for_the_old_one(store: Store) -> None:
    old = store.create_volume("data")
    old.remove()
    store.create_volume("data")
    with pytest.raises(NotFound, match="another has its name"):
        old.clone("copy")


# --- tars -------------------------------------------------------------------------------------------------------------


def test_what_is_exported_is_imported_again(store: Store, data: Path, tmp_path: Path) -> None:
    os.chmod(data, 0o750)
    os.link(data / "a", data / "dir/hard")
    os.symlink("../a", data / "dir/link")
    store.volume("data").export(tmp_path / "data.tar")
    made = store.import_volume("made", tmp_path / "data.tar", labels={"from": "tar"})
    assert differences(listing(data, seconds=True), listing(made.mountpoint, seconds=True)) == ""
    assert made.labels == {"from": "tar"}
    with pytest.raises(AlreadyExists):
        store.import_volume("made", tmp_path / "data.tar")


def test_a_tar_that_breaks_off_leaves_no_volume(store: Store, data: Path, tmp_path: Path) -> None:
    (data / "a").write_bytes(os.urandom(1 << 16))
    store.volume("data").export(tmp_path / "data.tar")
    os.truncate(tmp_path / "data.tar", 1 << 15)
    with pytest.raises(InvalidLayer):
        store.import_volume("made", tmp_path / "data.tar")
    assert [volume.name for volume in store.volumes()] == ["data"]
    assert sorted(p.name for p in store.volume_store.folder.iterdir()) == [".lock", "data"]


def test_a_failed_export_leaves_the_file_that_was_there(store: Store, data: Path, tmp_path: Path) -> None:
    (tmp_path / "data.tar").write_text("before")
    with store.container("box") as box:
        box.fs.listdir("/app")
        with pytest.raises(InUse):
            store.volume("data").export(tmp_path / "data.tar")
    assert (tmp_path / "data.tar").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir() if "data" in p.name] == ["data.tar"]


def test_an_export_to_a_device_leaves_the_device_there(store: Store, data: Path, tmp_path: Path) -> None:
    """A file is written beside its place and renamed; with /dev/null for its place that was the end of /dev/null."""
    peers.need_root("makes a device")
    os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    store.volume("data").export(tmp_path / "null")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


# --- reseeding --------------------------------------------------------------------------------------------------------


def test_reseeding_takes_what_is_new_and_keeps_what_the_user_made(store: Store, data: Path) -> None:
    (data / "b").write_text("mine")  # and the image's stays as it was
    (data / "dir/y").write_text("mine too")  # and the image has another one
    (data / "own").write_text("own")
    new = {"app/": "", "app/a": "a2", "app/b": "b1", "app/dir/": "", "app/dir/x": "x1", "app/dir/y": "y2", "app/new": "n2"}
    base(store, new, "base:2")
    inode = (data / "dir/x").stat().st_ino
    wanted = Reseeded(added=["new"], updated=["a"], removed=["c"], conflicts=["dir/y"])
    assert store.reseed_volume("data", "base:2", dry_run=True) == wanted
    assert texts(data)["a"] == "a1"
    assert store.reseed_volume("data", "base:2") == wanted
    assert texts(data) == {"a": "a2", "b": "mine", "dir/x": "x1", "dir/y": "mine too", "new": "n2", "own": "own"}
    assert (data / "dir/x").stat().st_ino == inode  # what stays is not copied
    assert store.reseed_volume("data", "base:2") == Reseeded()
    with store.container("box") as box:
        assert box.fs.read_bytes("/app/new") == b"n2"


def test_a_directory_that_the_image_gives_up_stays_for_what_the_user_put_there(store: Store, data: Path) -> None:
    (data / "dir/mine").write_text("mine")
    base(store, {"app/": "", "app/a": "a1", "app/b": "b1", "app/c": "c1"}, "base:2")
    assert store.reseed_volume("data", "base:2") == Reseeded(removed=["dir/x", "dir/y"])
    assert texts(data) == {"a": "a1", "b": "b1", "c": "c1", "dir/mine": "mine"}


def test_a_file_where_the_user_has_a_directory_is_a_conflict(store: Store, data: Path) -> None:
    (data / "dir/mine").write_text("mine")
    base(store, {"app/": "", "app/a": "a1", "app/b": "b1", "app/c": "c1", "app/dir": "a file now"}, "base:2")
    assert store.reseed_volume("data", "base:2") == Reseeded(removed=["dir/x", "dir/y"], conflicts=["dir"])
    assert texts(data)["dir/mine"] == "mine"


def test_what_is_new_below_a_directory_that_the_user_removed_is_a_conflict(store: Store, data: Path) -> None:
    for name in ("dir/x", "dir/y"):
        (data / name).unlink()
    (data / "dir").rmdir()
    base(store, {**FILES, "app/dir/z": "z2"}, "base:2")
    assert store.reseed_volume("data", "base:2") == Reseeded(conflicts=["dir/z"])
    assert texts(data) == {"a": "a1", "b": "b1", "c": "c1"}


def test_only_a_volume_that_an_image_filled_is_reseeded_and_only_at_rest(store: Store, data: Path) -> None:
    store.create_volume("other")
    with pytest.raises(NotFound, match="not filled"):
        store.reseed_volume("other", "base:1")
    with pytest.raises(NotFound, match="no directory"):
        store.reseed_volume("data", "base:1", "/nothing")
    store.create_volume("memory", options={"type": "tmpfs", "device": "tmpfs"})
    with pytest.raises(Unsupported):
        store.reseed_volume("memory", "base:1")
    with store.container("box") as box:
        box.fs.listdir("/app")
        with pytest.raises(InUse):
            store.reseed_volume("data", "base:1")


# --- killed at any step -----------------------------------------------------------------------------------------------

PART = MountSpec(source="parted", target="/app", subpath="part")
VERBS: dict[str, Callable[[Store], object]] = {
    "create": lambda store: store.create_volume("new"),
    "clone": lambda store: store.volume("data").clone("new"),
    "rename": lambda store: store.volume("data").rename("new"),
    "remove": lambda store: [store.container("box").remove(), store.volume("data").remove()],
    "import": lambda store: store.import_volume("new", store.root.parent / "data.tar"),
    "reseed": lambda store: store.reseed_volume("data", "base:2"),
    "fill": lambda store: store.create("base:1", name="new", mounts=["filled:/app"]),
    "fill a part": lambda store: store.create("base:1", name="new", mounts=[PART]),
}


def prepare(root: Path) -> None:
    with Store(root) as store:
        store.create(base(store, FILES), name="box", mounts=["data:/app"])
        base(store, {"app/": "", "app/a": "a2", "app/b": "b1", "app/dir/": "", "app/dir/x": "x1"}, "base:2")
        store.unpack(store.image("base:2"))
        store.volume("data").export(root.parent / "data.tar")
        (store.create_volume("parted").mountpoint / "part").mkdir()


def shown(store: Store) -> dict[str, object]:
    """All that a user sees of the volumes."""
    found: dict[str, object] = {volume.name: texts(volume.mountpoint) for volume in store.volumes()}
    found["containers"] = {c.name: [mount.volume for mount in c.mounts] for c in store.containers()}
    return found


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child does not touch what other threads hold
@pytest.mark.parametrize("name", VERBS)
def test_who_is_killed_leaves_the_state_before_or_after(name: str, scratch: Path) -> None:
    prepare(scratch / "store")
    with Store(scratch / "store") as store:
        before = shown(store)
    seen: list[dict[str, object]] = []
    for root in killed_at_steps(scratch, prepare, VERBS[name]):
        with Store(root) as store:
            seen.append(shown(store))
            assert store.fsck() == []
            assert os.listdir(store.root / "leases") == ["lock"]
            names = {volume.name for volume in store.volumes()}
            assert {p.name for p in store.volume_store.folder.iterdir()} == names | {".lock"}
            for volume in store.volumes():
                assert set(os.listdir(volume.directory)) <= {"_data", "seed"}
    done = seen[-1]
    for state in seen:
        # Removing is two changes. A part of a volume may be filled and the container not be there: that is no loss.
        if name not in ("remove", "fill a part"):
            assert state in (before, done)
        for volume, files in state.items():
            assert files in (before.get(volume), done.get(volume)) or volume == "containers"


# --- no room, reflinks, no root ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clone", "import", "fill", "reseed"])
def test_no_room_leaves_no_trace(name: str, scratch: Path) -> None:
    """In steps of 32 KiB, from a file system that has no room for the operation to one that has."""
    peers.need_root("a small file system")
    for step in range(1, 60):
        place = scratch / str(step)
        place.mkdir()
        peers.run("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place)
        try:
            prepare(place / "store")
            (place / "store/reserve").unlink(missing_ok=True)
            with Store(place / "store") as store:
                before = shown(store)
                used = os.statvfs(place)
                room = (used.f_blocks - used.f_bfree) * used.f_frsize + (step * 32 << 10)
                peers.run("mount", "-o", f"remount,size={room}", place)
                try:
                    VERBS[name](store)
                    break
                except OSError as e:
                    if e.errno != errno.ENOSPC:
                        raise
            peers.run("mount", "-o", f"remount,size={64 << 20}", place)
            with Store(place / "store") as store:
                assert shown(store) == before
                assert store.fsck() == []
                VERBS[name](store)  # with room it works
        finally:
            peers.run("umount", "--lazy", place)
    else:
        pytest.fail("there was never room enough")


def test_a_clone_shares_its_data_where_the_file_system_can(tmp_path: Path) -> None:
    peers.need_root("a file system of its own")
    image, place = tmp_path / "xfs.img", tmp_path / "xfs"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    peers.run("mkfs.xfs", "-q", "-m", "reflink=1", image)
    peers.run("mount", "-o", "loop", image, place)
    try:
        with Store(place / "store") as store:
            (store.create_volume("data").mountpoint / "big").write_bytes(os.urandom(8 << 20))
            peers.run("sync", "--file-system", place)
            before = os.statvfs(place).f_bfree
            clone = store.volume("data").clone("twin")
            assert (before - os.statvfs(place).f_bfree) * os.statvfs(place).f_frsize < 2 << 20
            fd = os.open(clone.mountpoint / "big", os.O_RDONLY)
            shared = sum(end - start for start, end in shared_extents(fd))
            os.close(fd)
            assert shared == 8 << 20
    finally:
        peers.run("umount", "--lazy", place)


def test_who_is_not_root_has_volumes_too(tmp_path: Path) -> None:
    with somebody(tmp_path), Store(tmp_path / "store") as store:
        store.create(base(store, FILES), name="box", mounts=["data:/app"])
        store.volume("data").snapshot()
        store.volume("data").clone("twin").rename("other")
        store.volume("other").export(tmp_path / "data.tar")
        assert texts(store.import_volume("copy", tmp_path / "data.tar").mountpoint)["a"] == "a1"
        base(store, {"app/": "", "app/a": "a2"}, "base:2")
        assert store.reseed_volume("data", "base:2").updated == ["a"]
        store.create_volume("memory", options={"type": "tmpfs", "device": "tmpfs"})
        with pytest.raises(Unsupported, match="only root"), store.volume("memory").mounted():
            pass
        assert store.fsck() == []
