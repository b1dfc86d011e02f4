"""Read-only containers: the root refuses changes, in process, mounted and for programs; what is mounted in it takes them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import ours
import peers
import pytest

from overlaykit import Container, InUse, Store


@pytest.fixture
def box(store: Store, small_rootfs: Path, tmp_path: Path) -> Iterator[Container]:
    """A read-only container called box with a volume at /data, a directory of the host at /srv/host, a tmpfs at /scratch."""
    (tmp_path / "host").mkdir()
    store.import_rootfs(small_rootfs, "base:1")
    mounts = ["data:/data", f"{tmp_path}/host:/srv/host"]
    with store.create("base:1", name="box", mounts=mounts, read_only=True) as container:
        yield container
    store.close()


def test_the_root_refuses_changes_and_mounts_take_them(box: Container, tmp_path: Path) -> None:
    for change in (
        lambda: box.fs.open("/etc/motd", "w"),
        lambda: box.fs.open("/new", "w"),
        lambda: box.fs.mkdir("/data2"),
        lambda: box.fs.unlink("/etc/motd"),
        lambda: box.fs.rmtree("/etc"),
        lambda: box.fs.rename("/etc/motd", "/etc/other"),
        lambda: box.fs.chmod("/etc", 0o700),
    ):
        with pytest.raises(OSError, match="Read-only file system") as caught:
            change()
        assert caught.value.errno == errno.EROFS
    box.fs.path("/data/file").write_text("kept\n")
    box.fs.path("/srv/host/file").write_text("host\n")
    assert (tmp_path / "host/file").read_text() == "host\n"
    assert box.fs.path("/etc/motd").read_text() == "welcome\n"
    # what the mounts needed, as with Docker
    assert [f"{change.kind} {change.path}" for change in box.diff()] == ["A /data", "A /srv", "A /srv/host"]


def test_one_at_a_time_has_its_files(store: Store, box: Container) -> None:
    _ = box.fs
    with Store(store.root) as other:
        with pytest.raises(InUse):
            _ = other.container("box").fs
        box.close()
        assert other.container("box").fs.exists("/data")
        with pytest.raises(InUse):
            box.snapshot()


def test_a_mount_is_read_only_but_for_what_is_mounted_in_it(box: Container, tmp_path: Path) -> None:
    peers.need_root("mounts")
    place = box.mount()
    try:
        with pytest.raises(OSError, match="Read-only"):
            (place / "etc/motd").write_text("changed\n")
        with pytest.raises(OSError, match="Read-only"):
            (place / "new").mkdir()
        (place / "data/file").write_text("kept\n")
        (place / "srv/host/file").write_text("host\n")
    finally:
        box.unmount()
    assert (tmp_path / "host/file").read_text() == "host\n"
    assert not box.fs.exists("/new")


def test_programs_see_it_read_only(box: Container, tmp_path: Path) -> None:
    peers.need_root("mounts")
    assert box.run(["sh", "-c", "echo x > /etc/motd"]) != 0
    assert box.run(["sh", "-c", "mkdir /new || rm /etc/motd || chmod 700 /etc"]) != 0
    assert box.run(["sh", "-c", "echo x > /data/file && echo y > /srv/host/file"]) == 0
    assert box.fs.path("/data/file").read_text() == "x\n"
    assert (tmp_path / "host/file").read_text() == "y\n"


def test_its_owner_may_still_do_with_its_layer_what_layers_can(store: Store, box: Container) -> None:
    _ = box.fs  # makes the mount points
    box.snapshot("one")
    fork = box.fork("two")
    assert fork.is_read_only
    box.discard("/srv")
    assert box.rollback().name == "one"
    assert box.commit("made:1").diff_ids[:1] == store.image("base:1").diff_ids
    assert box.inspect()["HostConfig"]["ReadonlyRootfs"] is True


def test_cp_goes_where_docker_lets_it(docker: peers.Docker, small_rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x\n")
    (tmp_path / "host").mkdir()
    docker("import", small_rootfs, "ro-base:1")
    ours.command(tmp_path / "store", "import", small_rootfs, "ro-base:1")
    both = (
        lambda *args: docker.run(*args, check=False),
        lambda *args: ours.command(tmp_path / "store", *args, check=False),
    )
    create = ("create", "--name", "ro-box", "--read-only", "-v", "ro-data:/data", "-v", f"{tmp_path}/host:/srv/host")
    create = (*create, "-v", "ro-kept:/kept:ro", "ro-base:1", "sh")
    try:
        for run in both:
            assert run(*create).returncode == 0
        for target in ("/etc", "/etc/motd", "/new", "/data", "/data/file", "/srv/host", "/srv", "/kept", "/etc/none/"):
            theirs, mine = (run("cp", tmp_path / "file", f"ro-box:{target}") for run in both)
            assert mine.returncode == theirs.returncode, (target, theirs.stderr, mine.stderr)
            if "read-only" in theirs.stderr:
                assert "read-only" in mine.stderr.lower(), target
        theirs, mine = (run("cp", "ro-box:/data/file", tmp_path / "back") for run in both)
        assert (theirs.returncode, mine.returncode) == (0, 0)
        form = "{{.HostConfig.ReadonlyRootfs}}"
        assert [run("inspect", "--format", form, "ro-box").stdout for run in both] == ["true\n", "true\n"]
    finally:
        docker("rm", "ro-box", check=False)
        docker("volume", "rm", "ro-data", "ro-kept", check=False)
