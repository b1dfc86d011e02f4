"""The life of a snapshot: prepare, view, commit, remove; what stacks on what, and who refuses what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from treetext import text, tree

from overlaykit import AlreadyExists, InUse, NotFound, Snapshotter, Store
from overlaykit.overlay.mount import Mount
from overlaykit.store.leases import Lease
from overlaykit.store.snapshots import ACTIVE, COMMITTED, VIEW


@pytest.fixture
def snapshots(store: Store) -> Snapshotter:
    return store.snapshots


@pytest.fixture
def lease(store: Store) -> Iterator[Lease]:
    with store.leases.hold() as lease:
        yield lease


def layer(snapshots: Snapshotter, lease: Lease, name: str, parent: str | None, *paths: str) -> None:
    """A committed snapshot `name` with an empty file at each of `paths`."""
    snapshots.prepare("making", parent, lease)
    for path in paths:
        (snapshots.fs("making") / path).write_text("")
    snapshots.commit(name, "making")


def test_prepare_commit_prepare(snapshots: Snapshotter, lease: Lease) -> None:
    active = snapshots.prepare("a", None, lease)
    assert (active.kind, active.parent) == (ACTIVE, None)
    (snapshots.fs("a") / "file").write_text("1")
    committed = snapshots.commit("base", "a")
    assert (committed.id, committed.key, committed.kind) == (active.id, "base", COMMITTED)
    assert text(snapshots.trees("base")[0]).splitlines()[1].startswith("/file file 644 1")
    assert not (snapshots.directory("base") / "work").exists()
    child = snapshots.prepare("b", "base", lease)
    assert child.parent == "base"
    assert snapshots.lowers("b") == [snapshots.fs("base")]
    assert [snapshot.key for snapshot in snapshots.chain("b")] == ["base", "b"]


def test_layers_are_listed_bottom_first(snapshots: Snapshotter, lease: Lease) -> None:
    layer(snapshots, lease, "one", None, "1")
    layer(snapshots, lease, "two", "one", "2")
    layer(snapshots, lease, "three", "two", "3")
    names = [sorted(path.name for path in directory.iterdir()) for directory in snapshots.lowers("three")]
    assert names == [["1"], ["2"], ["3"]]
    assert [len(each) for each in snapshots.trees("three")] == [2, 2, 2]


def test_a_key_is_taken_once(snapshots: Snapshotter, lease: Lease) -> None:
    layer(snapshots, lease, "base", None)
    snapshots.prepare("a", "base", lease)
    for again in (lambda: snapshots.prepare("a", "base", lease), lambda: snapshots.view("base", "base", lease)):
        with pytest.raises(AlreadyExists):
            again()
    with pytest.raises(AlreadyExists):
        snapshots.commit("base", "a")
    assert snapshots.stat("a").kind == ACTIVE


def test_only_a_committed_snapshot_is_a_parent(snapshots: Snapshotter, lease: Lease) -> None:
    snapshots.prepare("a", None, lease)
    with pytest.raises(InUse, match="active"):
        snapshots.prepare("b", "a", lease)
    with pytest.raises(NotFound):
        snapshots.prepare("b", "nothing", lease)
    layer(snapshots, lease, "base", None)
    with pytest.raises(InUse, match="committed"):
        snapshots.commit("again", "base")


def test_remove_refuses_a_parent(snapshots: Snapshotter, lease: Lease) -> None:
    layer(snapshots, lease, "base", None, "file")
    directory = snapshots.directory("base")
    snapshots.view("v", "base", lease)
    with pytest.raises(InUse, match="v"):
        snapshots.remove("base", lease)
    assert directory.exists()
    snapshots.remove("v", lease)
    snapshots.remove("base", lease)
    assert not directory.exists()
    with pytest.raises(NotFound):
        snapshots.stat("base")


def test_walk_tells_kinds(snapshots: Snapshotter, lease: Lease) -> None:
    layer(snapshots, lease, "base", None)
    snapshots.prepare("a", "base", lease)
    snapshots.view("v", "base", lease)
    assert [(s.key, s.kind) for s in snapshots.walk()] == [("base", COMMITTED), ("a", ACTIVE), ("v", VIEW)]
    assert [s.key for s in snapshots.walk(VIEW)] == ["v"]


def test_mounts_say_what_to_mount(snapshots: Snapshotter, lease: Lease) -> None:
    layer(snapshots, lease, "one", None)
    layer(snapshots, lease, "two", "one")
    snapshots.prepare("a", "two", lease)
    snapshots.view("v1", "one", lease)
    snapshots.view("v2", "two", lease)
    one, two = snapshots.lowers("two")
    upper, work = snapshots.fs("a"), snapshots.directory("a") / "work"
    (active,) = snapshots.mounts("a", "/t")
    assert active.options[:3] == (f"lowerdir={two}:{one}", f"upperdir={upper}", f"workdir={work}")
    assert snapshots.mounts("v1", "/t") == [Mount("bind", str(one), "/t", ("rbind", "ro"))]
    assert snapshots.mounts("v2", "/t")[0].options[0] == f"lowerdir={two}:{one}"


def test_usage_counts_a_file_of_two_names_once(snapshots: Snapshotter, lease: Lease) -> None:
    snapshots.prepare("a", None, lease)
    empty = snapshots.usage("a")
    file = snapshots.fs("a") / "file"
    file.write_bytes(b"x" * 100_000)
    (snapshots.fs("a") / "again").hardlink_to(file)
    used = snapshots.usage("a")
    assert used.inodes == empty.inodes + 1
    assert 100_000 <= used.size - empty.size < 200_000


def test_a_new_upper_looks_as_the_root_below(snapshots: Snapshotter, lease: Lease) -> None:
    snapshots.prepare("making", None, lease)
    root = snapshots.fs("making")
    root.chmod(0o751)
    os.utime(root, ns=(10**9, 10**9))
    snapshots.commit("base", "making")
    snapshots.prepare("a", "base", lease)
    st = snapshots.fs("a").stat()
    assert (st.st_mode & 0o7777, st.st_mtime_ns) == (0o751, 10**9)


def test_apply_fills_a_directory_of_its_own(snapshots: Snapshotter, lease: Lease) -> None:
    def write(directory: Path) -> object:
        assert list(directory.iterdir()) == []
        (directory / "file").write_text("")
        return tree("/ dir\n/file file 644 0")

    snapshots.apply("layer", None, write, lease)  # type: ignore[arg-type]
    assert text(snapshots.trees("layer")[0]) == "/ dir 755\n/file file 644 0"
    with pytest.raises(AlreadyExists):
        snapshots.apply("layer", None, write, lease)  # type: ignore[arg-type]
