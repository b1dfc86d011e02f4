"""Volumes beside everything else: what fsck says, what prune and rm leave alone, tmpfs, parts, filled binds, sizes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import peers
import pytest
import rootfs

from overlaykit import InUse, InvalidReference, Store, Unsupported
from overlaykit.store.mountspec import parse_mount, parse_tmpfs


@pytest.fixture
def image(store: Store, tmp_path: Path) -> str:
    rootfs.write(tmp_path / "rootfs.tar")
    store.import_rootfs(tmp_path / "rootfs.tar", "base:1")
    return "base:1"


@pytest.fixture
def own() -> Iterator[Store]:
    """A store in memory with an image that programs run in."""
    with peers.overlay_place("upkeep") as place:
        rootfs.write(place / "rootfs.tar", busybox=Path(peers.peer("busybox")))
        with Store(place / "store") as store:
            store.import_rootfs(place / "rootfs.tar", "base:1")
            yield store


# --- fsck -------------------------------------------------------------------------------------------------------------


def kinds(store: Store, *, repair: bool = False) -> list[str]:
    return sorted(finding.kind for finding in store.fsck(repair=repair))


def test_a_row_without_a_directory_is_told_and_can_be_used_again(store: Store, image: str) -> None:
    store.create(image, name="box", mounts=["data:/etc"])
    shutil.rmtree(store.volume("data").directory)
    assert kinds(store) == ["missing-volume"]
    assert kinds(store, repair=True) == ["missing-volume"]
    assert kinds(store) == []
    assert store.container("box").fs.listdir("/etc") == []


def test_a_directory_that_no_volume_has_is_never_deleted(store: Store, image: str) -> None:
    """A store.db from a backup knows less than the folder: gc, prune and create must not take the rest for rubbish."""
    for name in ("lost", "again"):
        (store.volume_store.folder / name / "_data").mkdir(parents=True)
        (store.volume_store.folder / name / "_data/precious").write_text("precious")
    store.gc()
    store.prune(all=True)
    store.prune_volumes(all=True)
    assert kinds(store) == ["stray-volume", "stray-volume"]
    assert os.listdir(store.create_volume("again").mountpoint) == []
    kinds(store, repair=True)
    assert kinds(store) == []
    assert len(list((store.root / "lost+found").rglob("precious"))) == 2


def test_a_half_filled_volume_is_told_and_put_right(store: Store, image: str) -> None:
    directory = store.create_volume("data").directory
    (directory / "filled/files").mkdir(parents=True)
    (directory / "filled/into").symlink_to(".")
    (directory / "filled/files/whole").write_text("whole")
    assert kinds(store) == ["half-filled-volume"]
    kinds(store, repair=True)
    assert kinds(store) == []
    assert os.listdir(store.volume("data").mountpoint) == ["whole"]


# --- many at once -----------------------------------------------------------------------------------------------------


def test_rm_and_prune_leave_alone_what_a_running_program_uses(own: Store) -> None:
    """rm -f does not ask who runs in a container; its volumes must not go under the feet of that all the same."""
    own.create("base:1", name="box", mounts=["data:/srv"])
    code = (
        "import sys; from overlaykit import Store; Store(sys.argv[1]).container('box').run(['/bin/sh', '-c', sys.argv[2]])"
    )
    script = "echo begun > /srv/begun; echo; read word; echo done > /srv/done"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    program = subprocess.Popen([sys.executable, "-c", code, own.root, script], **pipes)  # type: ignore[call-overload]
    assert program.stdout.readline() == b"\n"
    own.container("box").remove(force=True)
    with pytest.raises(InUse, match="being used"):
        own.volume("data").remove()
    assert own.prune_volumes(all=True)[0] == []
    program.communicate(b"go on\n")
    assert sorted(os.listdir(own.volume("data").mountpoint)) == ["begun", "done"]
    assert own.prune_volumes(all=True)[0] == ["data"]


def test_creating_and_pruning_at_once_never_lose_a_volume(store: Store, image: str) -> None:
    """Between making a volume and recording the container that has it a prune could take it away: that was an error."""
    store.create(image)
    stop = threading.Event()
    errors: list[BaseException] = []

    def prune() -> None:
        with Store(store.root) as other:
            while not stop.is_set():
                other.prune_volumes(all=True)

    def create(number: int) -> None:
        try:
            with Store(store.root) as other:
                for i in range(8):
                    box = other.create(image, name=f"box-{number}-{i}", mounts=["shared:/etc", "/lib"])
                    assert "motd" in os.listdir(other.volume("shared").mountpoint)
                    box.remove(volumes=True)
        except BaseException as e:
            errors.append(e)

    pruner = threading.Thread(target=prune)
    makers = [threading.Thread(target=create, args=(number,)) for number in range(3)]
    for thread in (pruner, *makers):
        thread.start()
    for thread in makers:
        thread.join()
    stop.set()
    pruner.join()
    assert errors == []
    assert store.fsck() == []


# --- tmpfs ------------------------------------------------------------------------------------------------------------


def test_a_tmpfs_is_empty_and_goes_when_the_files_are_closed(own: Store) -> None:
    box = own.create("base:1", mounts=[parse_tmpfs("/etc:size=1m,mode=1770"), parse_mount("type=tmpfs,dst=/new,ro")])
    with box:
        assert box.fs.listdir("/etc") == []
        assert oct(box.fs.stat("/etc").st_mode) == "0o41770"
        box.fs.write_bytes("/etc/x", b"x")
        with pytest.raises(OSError, match="No space left"):
            box.fs.write_bytes("/etc/big", bytes(2 << 20))
        with pytest.raises(OSError, match="Read-only"):
            box.fs.write_bytes("/new/x", b"x")
        assert box.diff() != []  # the mount point /new, and nothing of what is in it
        assert "/etc/x" not in [change.path for change in box.diff()]
    with box:
        assert box.fs.listdir("/etc") == []
    merged = box.mount()
    (merged / "etc/x").write_text("x")
    assert not os.access(merged / "new/x", os.F_OK)
    box.unmount()
    assert box.run(["/bin/sh", "-c", "! test -e /etc/x && echo x > /etc/x && ! echo x > /new/x"]) == 0
    assert str(own.root) not in Path("/proc/self/mountinfo").read_text()


def test_without_root_a_directory_in_memory_stands_for_a_tmpfs(
    store: Store, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(mount: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("overlaykit.overlay.bound.mount_detached", refused)
    monkeypatch.setattr("overlaykit.overlay.bound.MEMORY", str(tmp_path))
    with store.create(image, mounts=[parse_tmpfs("/etc:mode=700")]) as box:
        box.fs.write_bytes("/etc/x", b"x")
        assert oct(box.fs.stat("/etc").st_mode) == "0o40700"
        (place,) = tmp_path.glob("overlaykit-tmpfs-*")
    assert not place.exists()


@pytest.mark.parametrize(
    "text", ["run", "/", "", "/run:colour=blue", "/run:size=", "/run:size=xx", "/run:mode=9", "/run:size", "/run:ro=1"]
)
def test_tmpfs_refuses_what_is_not_understood(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse_tmpfs(text)


# --- parts, and binds that are filled ---------------------------------------------------------------------------------


def test_an_empty_part_of_a_volume_is_filled(store: Store, image: str) -> None:
    data = store.create_volume("data").mountpoint
    (data / "part").mkdir()
    (data / "full").mkdir()
    (data / "full/own").write_text("own")
    for part in ("part", "full", "missing"):
        store.create(image, mounts=[parse_mount(f"src=data,dst=/etc,volume-subpath={part}")])
    assert "motd" in os.listdir(data / "part")
    assert os.listdir(data / "full") == ["own"]
    assert sorted(os.listdir(data)) == ["full", "part"]


def test_an_empty_bind_is_filled_if_that_is_asked(store: Store, image: str, tmp_path: Path) -> None:
    for name in ("asked", "full", "plain"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/own").write_text("own")
    (tmp_path / "asked/.overlaykit-filling").mkdir()  # somebody was killed
    for name, copy in (("asked", ",bind-copy"), ("full", ",bind-copy"), ("plain", "")):
        store.create(image, mounts=[parse_mount(f"type=bind,src={tmp_path / name},dst=/etc{copy}")])
    with store.create(image).view() as view:
        assert sorted(os.listdir(tmp_path / "asked")) == sorted(view.listdir("/etc"))
    assert os.listdir(tmp_path / "full") == ["own"]
    assert os.listdir(tmp_path / "plain") == []


def test_a_volume_is_never_in_a_containers_size(own: Store) -> None:
    box = own.create("base:1", name="box", mounts=["data:/srv"])
    before = own.usage().of("container")
    (own.volume("data").mountpoint / "big").write_bytes(os.urandom(1 << 20))
    box.mount()
    try:
        during = own.usage()
    finally:
        box.unmount()
    assert during.of("container") < before + (1 << 16)
    assert own.usage().of("volume") >= 1 << 20
    assert own.volume("data").size() >= 1 << 20


# --- cp ---------------------------------------------------------------------------------------------------------------


def test_a_copy_into_itself_is_refused_across_containers_that_share_a_volume(
    store: Store, image: str, tmp_path: Path
) -> None:
    """The walk found what it had just written, and went on until a path was too long."""
    first = store.create(image, name="first", mounts=["data:/data", f"{tmp_path}:/host"])
    second = store.create(image, name="second", mounts=["data:/srv/data"])
    for box, path in ((first, "/data/in"), (first, "/host/in"), (second, "/srv/data/out")):
        with box:
            box.fs.mkdir(path)
    inner = str(store.volume("data").mountpoint / "in")
    for source, target in (
        ("first:/data", "second:/srv/data/in"),
        ("first:/data/in", "second:/srv/data/in"),
        ("volume:data:/", "first:/data/in"),
        ("first:/data/.", "volume:data:/out"),
        ("first:/", "volume:data:/in"),
        ("first:/data", inner),
        (str(tmp_path), "first:/host/in"),
    ):
        with pytest.raises(Unsupported, match="into itself"):
            store.cp(source, target)
    store.cp("first:/data/in", "second:/srv/data/out")  # beside it is no loop
    store.cp("first:/etc", "second:/etc")  # nor is what both have from their image
    store.cp("volume:data:/.", "first:/copy of data")
    with store.container("second").view() as view:
        assert view.isdir("/srv/data/out/in")
        assert view.isdir("/etc/etc")


def test_what_a_killed_copy_left_is_known_by_its_name_and_in_nobodys_way(store: Store, tmp_path: Path) -> None:
    data = store.create_volume("data").mountpoint
    left = data / ".overlaykit-cp-0123456789abcdef"
    left.write_text("half")
    (data / "file").write_text("new")
    store.cp("volume:data:/file", "volume:data:/copy")
    assert (data / "copy").read_text() == "new"
    assert left.exists()  # nobody can tell whose it is: it may be another machine's that is still at it
    store.cp("volume:data:/.", str(tmp_path / "out"), exclude=[".overlaykit-cp-*"])
    assert sorted(os.listdir(tmp_path / "out")) == ["copy", "file"]
