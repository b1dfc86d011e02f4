"""Limits on writable layers: counted in process where the file system has none to give.

Held by the kernel: quota_cases.py."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import ours
import peers
import pytest
import rootfs

from overlaykit import Container, InvalidReference, Store
from overlaykit.store.quantities import parse_size
from overlaykit.store.quota import is_enforced

MIB = 1 << 20


@pytest.fixture
def make(store: Store, tmp_path: Path) -> Iterator[Callable[..., Container]]:
    """Makes a container called box whose writable layer is limited."""
    rootfs.write(tmp_path / "rootfs.tar")
    store.import_rootfs(tmp_path / "rootfs.tar", "base:1")
    yield lambda **limits: store.create("base:1", name="box", storage_opt=limits)
    store.close()


def refused(change: Callable[[], object]) -> str:
    """The path that ENOSPC is about."""
    with pytest.raises(OSError, match="No space left") as caught:
        change()
    assert caught.value.errno == errno.ENOSPC
    return str(caught.value.filename)


def entries(box: Container) -> int:
    return box._store.snapshots.usage(box.id).inodes - 1


def test_so_many_entries_and_no_more(make: Callable[..., Container]) -> None:
    box = make(entries="6")
    fs = box.fs
    fs.mkdir("/a")
    fs.symlink("x", "/a/link")
    fs.path("/a/file").write_text("x")
    fs.chmod("/etc/motd", 0o600)  # itself and its directory are copied up
    fs.unlink("/etc/hostname")  # leaves a whiteout
    assert entries(box) == 6
    assert refused(lambda: fs.mkdir("/b")) == "/b"
    assert refused(lambda: fs.open("/b", "w")) == "/b"
    assert refused(lambda: fs.symlink("x", "/b")) == "x"
    assert refused(lambda: fs.mkfifo("/b")) == "/b"
    assert refused(lambda: fs.chmod("/etc/passwd", 0o600)) == "/etc/passwd"
    assert refused(lambda: fs.unlink("/etc/passwd")) == "/etc/passwd"
    assert refused(lambda: fs.rename("/etc/passwd", "/etc/other")) == "/etc/passwd"
    assert fs.path("/etc/passwd").read_text()
    fs.path("/a/file").write_text("longer")  # takes no entry
    fs.rename("/a/file", "/a/same")
    fs.unlink("/a/same")
    fs.mkdir("/b")
    assert entries(box) == 6


def test_a_rename_needs_room_for_what_it_leaves(make: Callable[..., Container]) -> None:
    box = make(entries="2")
    assert refused(lambda: box.fs.rename("/etc/motd", "/etc/other")) == "/etc/motd"
    assert box.fs.exists("/etc/motd")
    assert box.fs.listdir("/etc").count("other") == 0
    assert entries(box) <= 2


def test_bytes_are_seen_when_a_file_is_next_opened(make: Callable[..., Container]) -> None:
    box = make(size="2m")
    fs = box.fs
    with fs.open("/big", "wb") as file:
        file.write(b"x" * 3 * MIB)  # nobody sees a descriptor being written to
    assert refused(lambda: fs.open("/more", "wb")) == "/more"
    assert refused(lambda: fs.open("/big", "ab")) == "/big"
    assert refused(lambda: fs.mkdir("/dir")) == "/dir"
    with fs.open("/big", "rb") as file:
        assert len(file.read()) == 3 * MIB
    with fs.open("/big", "wb") as file:  # empties it
        file.write(b"y" * MIB)
    fs.mkdir("/dir")
    with fs.open("/more", "wb") as file:
        file.write(b"z")


def test_a_copy_up_that_does_not_fit_is_not_begun(make: Callable[..., Container], store: Store, tmp_path: Path) -> None:
    plain = store.create("base:1", name="plain")
    with plain.fs.open("/large", "wb") as file:
        file.write(b"x" * 3 * MIB)
    plain.commit("base:1")
    box = make(size="2m")
    assert refused(lambda: box.fs.open("/large", "ab")) == "/large"
    assert refused(lambda: box.fs.chmod("/large", 0o600)) == "/large"
    with box.fs.open("/large", "wb") as file:  # copies no data
        file.write(b"y")
    assert box.fs.stat("/large").st_size == 1
    assert store.snapshots.usage(box.id).size < MIB


def test_what_was_frozen_stays_counted(make: Callable[..., Container], store: Store) -> None:
    box = make(entries="5", size="1g")
    box.fs.makedirs("/a/b/c")
    box.snapshot("one")
    box.fs.mkdir("/d")
    assert refused(lambda: box.fs.makedirs("/e/f")) == "/e/f"
    twin = box.fork("twin")
    assert twin.record.settings == box.record.settings
    assert refused(lambda: twin.fs.mkdir("/g")) == "/g"
    box.rollback("one")
    box.fs.mkdir("/d")
    box.fs.mkdir("/e")
    assert refused(lambda: box.fs.mkdir("/f")) == "/f"


def test_volumes_do_not_count(store: Store, tmp_path: Path) -> None:
    rootfs.write(tmp_path / "rootfs.tar")
    store.import_rootfs(tmp_path / "rootfs.tar", "base:1")
    with store.create("base:1", mounts=["data:/etc"], storage_opt={"entries": "1"}) as box:
        for number in range(10):
            box.fs.mkdir(f"/etc/{number}")
        box.fs.mkdir("/one")
        assert refused(lambda: box.fs.mkdir("/two")) == "/two"


def test_who_makes_many_files_is_not_looked_through_for_each(make: Callable[..., Container]) -> None:
    box = make(size="1g", entries="100000")
    looks = []
    account = box.fs._account  # type: ignore[union-attr]
    account._usage = lambda usage=account._usage: looks.append(1) or usage()
    for number in range(2000):
        box.fs.path(f"/{number}").write_text("x")
    assert entries(box) == 2000
    assert len(looks) < 500


def test_it_is_said_that_the_limit_is_a_soft_one(make: Callable[..., Container], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        box = make(size="10G", entries="100")
    if is_enforced(box._store.snapshots.directory(box.id)):
        pytest.skip("temporary files are on a file system with project quota")
    assert "no project quota here" in caplog.text
    assert box.inspect()["HostConfig"]["StorageOpt"] == {"size": "10G", "entries": "100"}
    assert box.limits is not None
    assert (box.limits.size, box.limits.entries) == (10 << 30, 100)


@pytest.mark.parametrize("given", [{"colour": "red"}, {"size": ""}, {"size": "-1"}, {"size": "0"}, {"size": "9999999P"},
                                   {"entries": "0"}, {"entries": "many"}, {"entries": "-3"}, {"size": "1Q"}])  # fmt: skip
def test_what_is_no_limit_is_refused(make: Callable[..., Container], given: dict[str, str], store: Store) -> None:
    with pytest.raises(InvalidReference):
        make(**given)
    assert store.containers() == []


def test_sizes_are_read_as_docker_reads_them() -> None:
    said = {
        "0": 0,
        "7": 7,
        "64k": 64 << 10,
        "64KB": 64 << 10,
        "1.5m": 3 << 19,
        "10G": 10 << 30,
        "2 GiB": 2 << 30,
        "1t": 1 << 40,
    }
    assert {text: parse_size(text, "size") for text in said} == said


def test_the_command_line_says_it(small_rootfs: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    ours.command(root, "import", small_rootfs, "base:1")
    done = ours.command(root, "create", "--name", "box", "--storage-opt", "entries=1", "--storage-opt", "size=5m", "base:1")
    assert "no project quota" in done.stderr
    assert ours.command(root, "inspect", "--format", "{{json .HostConfig.StorageOpt}}", "box").stdout == (
        '{"entries":"1","size":"5m"}\n'
    )
    put = ours.command(root, "put", "box", tmp_path / "store/index.json", "/etc/file", check=False)
    assert (put.returncode, put.stderr) == (1, "overlaykit: /etc/file: No space left on device\n")
    for wrong in ("entries=none", "colour=red"):
        done = ours.command(root, "create", "--storage-opt", wrong, "base:1", check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("overlaykit: ")


def test_the_kernels_quota(tmp_path: Path) -> None:
    """The cases of quota_cases.py, on xfs with project quota: in a kernel that has that, started as a program."""
    peers.need_root("file systems")
    peers.with_quota(Path(__file__).with_name("quota_cases.py"), tmp_path)
