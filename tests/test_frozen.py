"""A writable layer over time: snapshots, rollbacks, forks, changes picked path by path; and the kernel sees the same."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import peers
import pytest
import rootfs
from kernel_overlay import needs_kernel_overlay
from treetext import differences, listing

from overlaykit import AlreadyExists, Container, InUse, InvalidReference, NotFound, Store
from overlaykit.oci import validate


@pytest.fixture
def box(store: Store, tmp_path: Path) -> Container:
    """A container called box, of a small image base:1."""
    rootfs.write(tmp_path / "rootfs.tar")
    store.import_rootfs(tmp_path / "rootfs.tar", "base:1")
    return store.create("base:1", name="box")


def write(container: Container, path: str, text: str) -> None:
    with container.fs.open(path, "w") as file:
        file.write(text)


def read(container: Container, path: str) -> str:
    with container.view() as view, view.open(path) as file:
        return str(file.read())


def read_bytes(container: Container, path: str) -> bytes:
    with container.fs.open(path, "rb") as file:
        return bytes(file.read())


def told(container: Container) -> list[str]:
    return [f"{change.kind} {change.path}" for change in container.diff()]


def shown(container: Container) -> dict[str, str]:
    return listing("/", fs=container.fs)


def on_disk(store: Store) -> int:
    return len(list(store.snapshots.folder.iterdir()))


# --- snapshot, rollback, fork -----------------------------------------------------------------------------------------


def test_a_snapshot_is_what_rollback_comes_back_to(box: Container) -> None:
    write(box, "/etc/motd", "first\n")
    box.fs.unlink("/etc/hostname")
    box.fs.rmtree("/lib/deep")
    then, changes = shown(box), told(box)
    assert box.snapshot("before").name == "before"
    assert (shown(box), told(box)) == (then, changes)
    write(box, "/etc/motd", "second\n")
    write(box, "/etc/hostname", "back\n")
    box.fs.mkdir("/lib/deep")
    box.fs.rmtree("/home")
    assert shown(box) != then
    box.rollback("before")
    assert (shown(box), told(box)) == (then, changes)


def test_snapshots_are_numbered_and_rollback_takes_the_newest(box: Container) -> None:
    for text in ("one\n", "two\n", "three\n"):
        write(box, "/etc/motd", text)
        box.snapshot()
    assert [snapshot.name for snapshot in box.snapshots()] == ["1", "2", "3"]
    write(box, "/etc/motd", "four\n")
    assert box.rollback().name == "3"
    assert read(box, "/etc/motd") == "three\n"
    box.rollback("1")
    assert read(box, "/etc/motd") == "one\n"
    box.rollback("3")
    assert read(box, "/etc/motd") == "three\n"
    with pytest.raises(AlreadyExists):
        box.snapshot("2")
    with pytest.raises(NotFound):
        box.rollback("4")
    with pytest.raises(InvalidReference):
        box.snapshot("../x")


def test_a_snapshot_copies_no_data_and_one_without_changes_makes_no_layer(store: Store, box: Container) -> None:
    write(box, "/etc/big", "x" * 1_000_000)
    inode = (store.snapshots.fs(box.id) / "etc/big").stat().st_ino
    box.snapshot()
    (_, frozen), *_ = [(tree, directory) for directory, tree in store.snapshots.own_layers(box.id)]
    assert (frozen / "etc/big").stat().st_ino == inode
    assert list(store.snapshots.fs(box.id).iterdir()) == []
    count = on_disk(store)
    box.snapshot("again")
    assert on_disk(store) == count
    assert len({snapshot.key for snapshot in box.snapshots()}) == 1


def test_a_snapshot_of_an_unused_container_is_its_image(store: Store, box: Container) -> None:
    box.snapshot("new")
    write(box, "/etc/motd", "x\n")
    box.rollback("new")
    assert told(box) == []
    assert store.snapshots.own_layers(box.id) == []


def test_a_fork_goes_its_own_way(store: Store, box: Container) -> None:
    write(box, "/etc/motd", "shared\n")
    box.fs.unlink("/etc/hostname")
    twin = box.fork("twin")
    assert told(twin) == told(box)
    assert differences(shown(box), shown(twin)) == ""
    write(twin, "/etc/motd", "twin\n")
    write(box, "/etc/new", "box\n")
    assert read(box, "/etc/motd") == "shared\n"
    assert not twin.fs.exists("/etc/new")
    twin.fork("third").remove()
    box.remove()
    assert read(twin, "/etc/motd") == "twin\n"
    assert not twin.fs.exists("/etc/hostname")
    with pytest.raises(AlreadyExists):
        twin.fork("twin")


def test_what_nobody_stands_on_goes(store: Store, box: Container) -> None:
    unused = on_disk(store)
    write(box, "/etc/big", "x" * 300_000)
    box.snapshot("big")
    twin = box.fork("twin")
    assert box.remove() < 300_000
    assert read(twin, "/etc/big")[:1] == "x"
    assert twin.remove() >= 300_000
    assert on_disk(store) == unused - 1
    assert store.gc().size == 0


def test_a_forgotten_snapshot_frees_what_only_it_held(store: Store, box: Container) -> None:
    box.snapshot("start")
    write(box, "/etc/big", "x" * 300_000)
    box.snapshot("big")
    box.rollback("start")
    store.gc()
    assert [snapshot.name for snapshot in box.snapshots()] == ["start", "big"]
    assert box.remove_snapshot("big") >= 300_000
    with pytest.raises(NotFound):
        box.rollback("big")


def test_gc_keeps_what_a_container_has_a_name_for(store: Store, box: Container) -> None:
    write(box, "/etc/motd", "kept\n")
    box.snapshot("a")
    box.rollback("a")
    store.gc()
    box.rollback("a")
    assert read(box, "/etc/motd") == "kept\n"


def test_a_container_that_is_open_elsewhere_is_left_alone(store: Store, box: Container) -> None:
    write(box, "/etc/motd", "x\n")
    with Store(store.root) as other:
        for operation in (Container.snapshot, Container.rollback, Container.fork):
            theirs = other.container("box")
            if operation is Container.rollback:
                box.close()
                box.snapshot()
                write(box, "/etc/motd", "y\n")
            with pytest.raises(InUse):
                operation(theirs)


def test_commit_makes_one_layer_of_all_that_is_the_containers_own(store: Store, box: Container) -> None:
    write(box, "/etc/motd", "first\n")
    write(box, "/etc/gone", "x\n")
    box.fs.rmtree("/lib/deep")
    box.snapshot()
    box.fs.unlink("/etc/gone")
    box.fs.mkdir("/lib/deep")
    write(box, "/lib/deep/new", "new\n")
    box.snapshot()
    box.fs.rename("/etc/motd", "/etc/moved")
    image = box.commit("mine:1")
    assert validate(image) == []
    assert len(image.layers) == len(store.image("base:1").layers) + 1
    fresh = store.create("mine:1")
    assert differences(listing("/", fs=box.fs, seconds=True), listing("/", fs=fresh.fs, seconds=True)) == ""
    assert fresh.diff() == []


@needs_kernel_overlay
def test_the_kernel_shows_the_same_over_frozen_layers(store: Store, box: Container) -> None:
    write(box, "/etc/motd", "first\n")
    box.fs.rmtree("/lib/deep")
    box.snapshot()
    box.fs.mkdir("/lib/deep")
    write(box, "/lib/deep/new", "new\n")
    box.fs.unlink("/etc/motd")
    box.snapshot("named")
    ours = shown(box)
    merged = box.mount()
    try:
        assert differences(listing(merged), ours) == ""
        (merged / "etc/kernel").write_text("kernel\n")
        (merged / "lib/deep/new").unlink()
        with pytest.raises(InUse):
            box.snapshot()
    finally:
        box.unmount()
    assert told(box)[-1] != ""
    box.snapshot("after the kernel".replace(" ", "-"))
    assert read(box, "/etc/kernel") == "kernel\n"
    assert not box.fs.exists("/lib/deep/new")
    box.rollback("named")
    assert shown(box) == ours


# --- picking ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(box: Container) -> Container:
    """The container with changes of all kinds."""
    write(box, "/etc/motd", "changed\n")
    write(box, "/etc/new", "new\n")
    box.fs.unlink("/etc/hostname")
    box.fs.rmtree("/lib/deep")
    box.fs.mkdir("/lib/deep")
    write(box, "/lib/deep/one", "mine\n")
    box.fs.chmod("/home", 0o700)
    return box


PATHS = ["/etc/motd", "/etc/new", "etc/hostname", "/lib/deep", "/lib/deep/one", "/lib/deep/two", "/etc"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_discarded_path_is_the_images_again(store: Store, changed: Container, path: str, frozen: bool) -> None:
    before = timeless(changed)
    if frozen:
        changed.snapshot("before")
    pristine = timeless(store.create("base:1"))
    inside = path.strip("/")
    changed.discard(path)
    expected = {name: line for name, line in before.items() if not is_in(name, inside)}
    expected |= {name: line for name, line in pristine.items() if is_in(name, inside)}
    assert differences(expected, timeless(changed)) == ""
    if frozen:
        changed.rollback("before")
        assert differences(before, timeless(changed)) == ""


def is_in(name: str, path: str) -> bool:
    return name.strip("/") == path or name.strip("/").startswith(path + "/")


def timeless(container: Container) -> dict[str, str]:
    """What it shows, in whole seconds, without the times of directories, and with hard links as files of their own."""
    found = {}
    for name in listing("/", fs=container.fs):
        st = container.fs.lstat(name)
        time = "" if stat.S_ISDIR(st.st_mode) else f" {st.st_mtime_ns // 10**9}"
        content = read_bytes(container, name) if stat.S_ISREG(st.st_mode) else b""
        found[name] = f"{name} {st.st_mode:o} {st.st_uid} {st.st_gid} {hash(content)}{time}"
    return found


@pytest.mark.parametrize("frozen", [False, True])
def test_only_what_is_kept_stays(changed: Container, frozen: bool) -> None:
    if frozen:
        changed.snapshot()
    changed.keep("/etc/motd", "/lib/deep/one")
    assert told(changed) == ["C /etc", "C /etc/motd", "C /lib", "C /lib/deep", "C /lib/deep/one"]
    assert read(changed, "/lib/deep/one") == "mine\n"


def test_discarding_frees_the_space(store: Store, box: Container) -> None:
    write(box, "/etc/big", "x" * 1_000_000)
    assert store.snapshots.usage(box.id).size > 1_000_000
    box.discard("/etc/big")
    assert store.snapshots.usage(box.id).size < 100_000


def test_nothing_to_discard_is_an_error(box: Container) -> None:
    for path in ("/etc/motd", "/nowhere"):
        with pytest.raises(NotFound):
            box.discard(path)
    for path in ("/", "/etc/../etc"):
        with pytest.raises(InvalidReference):
            box.discard(path)


def test_changes_are_made_in_another_container_too(store: Store, changed: Container) -> None:
    other = store.create("base:1", name="other")
    write(other, "/etc/own", "own\n")
    write(other, "/lib/deep/two", "theirs\n")
    assert changed.apply_to(other) > 0
    assert read(other, "/etc/motd") == "changed\n"
    assert read(other, "/etc/own") == "own\n"
    assert not other.fs.exists("/etc/hostname")
    assert other.fs.listdir("/lib/deep") == ["one"]
    assert set(told(changed)) <= set(told(other))
    third = store.create("base:1", name="third")
    changed.apply_to(third, "/etc/motd")
    assert told(third) == ["C /etc", "C /etc/motd"]


# --- export -----------------------------------------------------------------------------------------------------------


def test_an_export_is_the_merged_tree(changed: Container, tmp_path: Path) -> None:
    peers.need_root("owners and devices")
    changed.snapshot()
    changed.fs.unlink("/etc/new")
    out = tmp_path / "out.tar"
    changed.export(out)
    stream = io.BytesIO()
    changed.export(stream)
    assert stream.getvalue() == out.read_bytes()
    plain = tmp_path / "plain"
    plain.mkdir()
    options = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "--delay-directory-restore"]
    peers.run("tar", "-x", *options, "-p", "-f", out, "-C", plain)
    ours = listing("/", fs=changed.fs, seconds=True)
    assert differences(listing(plain, seconds=True), ours) == ""


def test_an_export_that_fails_leaves_what_was_there(changed: Container, tmp_path: Path) -> None:
    """It unlinked its target: as root, the export of a container that had just gone to /dev/null took that away."""
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    file.write_text("before")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    changed.remove(force=True)
    for target in (pipe, file):
        with pytest.raises(NotFound):
            changed.export(target)
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
