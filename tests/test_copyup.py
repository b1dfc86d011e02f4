"""The copy-up kernel: everything an inode has arrives, in one step, or nothing does."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overlaykit._ext import copyup
from overlaykit.tree import Strings

OWN = b"trusted.overlay."
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="owners and trusted xattrs need root")
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
ACL = bytes.fromhex("0200000001000600ffffffff02000400e803000004000400ffffffff10000600ffffffff20000400ffffffff")


class Places:
    """src, work and dst directories with their descriptors."""

    def __init__(self, base: Path) -> None:
        self.src, self.work, self.dst = base / "src", base / "work", base / "dst"
        for path in (self.src, self.work, self.dst):
            path.mkdir()
        self.fds = [os.open(path, os.O_PATH) for path in (self.src, self.work, self.dst)]

    def copy(self, name: str = "f", what: int = 0, own: bytes = OWN) -> None:
        src, work, dst = self.fds
        copyup.copy_up(src, name.encode(), work, b"#1", dst, name.encode(), own, what)

    def left_over(self) -> list[str]:
        return os.listdir(self.work)


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    found = Places(tmp_path)
    yield found
    for fd in found.fds:
        os.close(fd)


def look(path: Path) -> tuple[Any, ...]:
    st = path.lstat()
    xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}
    return st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns, st.st_rdev, xattrs


@root_only
@pytest.mark.parametrize("kind", ["file", "dir", "link", "fifo", "device", "socket"])
def test_every_kind_keeps_owner_mode_times_and_xattrs(places: Places, kind: str) -> None:
    path = places.src / "f"
    if kind == "file":
        path.write_bytes(b"content")
    elif kind == "dir":
        path.mkdir()
        (path / "not copied").touch()
    elif kind == "link":
        path.symlink_to("where/ever")
    else:
        node = {"fifo": stat.S_IFIFO, "device": stat.S_IFCHR, "socket": stat.S_IFSOCK}[kind]
        os.mknod(path, node | 0o640, os.makedev(1, 3) if kind == "device" else 0)
    os.chown(path, 1000, 1001, follow_symlinks=False)
    if kind != "link":
        path.chmod(0o6751)
    os.setxattr(path, "trusted.mine", b"v", follow_symlinks=False)
    os.setxattr(path, "trusted.overlay.opaque", b"y", follow_symlinks=False)
    os.setxattr(path, "trusted.overlay.overlay.opaque", b"y", follow_symlinks=False)
    if kind == "file":
        os.setxattr(path, "security.capability", CAPABILITY)
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "system.posix_acl_access", ACL)
    os.utime(path, ns=(1_000_000_000, -5_000_000_001), follow_symlinks=False)
    want = look(path)
    del want[5]["trusted.overlay.opaque"]
    places.copy()
    assert look(places.dst / "f") == want
    assert places.left_over() == []
    if kind == "file":
        assert (places.dst / "f").read_bytes() == b"content"
    if kind == "link":
        assert os.readlink(places.dst / "f") == "where/ever"


def test_holes_stay_holes(places: Places) -> None:
    with (places.src / "f").open("wb") as f:
        f.truncate(50 << 20)
        for at in (3 << 20, 20 << 20, (30 << 20) + 5):
            f.seek(at)
            f.write(b"data" * 5000)
    places.copy()
    assert (places.dst / "f").read_bytes() == (places.src / "f").read_bytes()
    assert (places.dst / "f").stat().st_blocks <= (places.src / "f").stat().st_blocks + 64


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 1 << 20, (1 << 20) + 1, 200 << 20])
def test_data_of_any_size(places: Places, size: int) -> None:
    block = os.urandom(1 << 20)
    with (places.src / "f").open("wb") as f:
        for at in range(0, size, len(block)):
            f.write(block[: size - at])
    places.copy(what=copyup.SYNC)
    with (places.src / "f").open("rb") as a, (places.dst / "f").open("rb") as b:
        while chunk := a.read(1 << 22):
            assert b.read(1 << 22) == chunk
        assert b.read() == b""


def test_between_file_systems_it_reads_and_writes(places: Places, tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"copyup-{os.getpid()}"
    if not other.parent.is_dir() or other.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no second file system here")
    data = os.urandom(3_000_000)
    other.write_bytes(data)
    fd = os.open("/dev/shm", os.O_PATH)
    try:
        copyup.copy_up(fd, other.name.encode(), places.fds[1], b"#1", places.fds[2], b"f", OWN)
    finally:
        os.close(fd)
        other.unlink()
    assert (places.dst / "f").read_bytes() == data


def test_no_data_and_metacopy(places: Places) -> None:
    (places.src / "f").write_bytes(b"x" * 100_000)
    places.copy(what=copyup.NO_DATA)
    assert (places.dst / "f").stat().st_size == 0
    (places.dst / "f").unlink()
    places.copy(what=copyup.METACOPY, own=b"user.overlay.")
    assert (places.dst / "f").stat().st_size == 100_000
    assert (places.dst / "f").stat().st_blocks <= 8
    assert os.getxattr(places.dst / "f", "user.overlay.metacopy") == b""


def test_the_directory_keeps_its_times_if_asked(places: Places) -> None:
    (places.src / "f").touch()
    os.utime(places.dst, (1, 1))
    places.copy(what=copyup.KEEP_TIMES)
    assert places.dst.stat().st_mtime == 1


def test_nothing_is_replaced_and_nothing_left(places: Places) -> None:
    (places.src / "f").write_bytes(b"new")
    (places.dst / "f").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        places.copy()
    assert (places.dst / "f").read_bytes() == b"old"
    assert places.left_over() == []
    with pytest.raises(FileNotFoundError):
        places.copy("missing")
    assert places.left_over() == []


def test_a_strangers_temporary_is_not_removed(places: Places) -> None:
    (places.src / "f").touch()
    (places.work / "#1").write_bytes(b"not ours")
    with pytest.raises(FileExistsError):
        places.copy()
    assert (places.work / "#1").read_bytes() == b"not ours"


def test_many_files_in_one_call_and_each_its_own_errno(places: Places) -> None:
    names = [f"f{i}" for i in range(5000)]
    for i, name in enumerate(names):
        if i % 1000 != 7:
            (places.src / name).write_bytes(str(i).encode())
    rows = Strings.of([n.encode() for n in names])
    n = len(names)
    errnos = np.full(n, 99, np.int32)
    src, work, dst = places.fds
    failed = copyup.copy_up_many(
        np.full(n, src, np.int32), np.full(n, dst, np.int32), rows.arena, rows.start, work, OWN, 0, errnos
    )
    assert failed == 5
    assert np.flatnonzero(errnos).tolist() == [7, 1007, 2007, 3007, 4007]
    assert set(errnos[errnos != 0].tolist()) == {errno.ENOENT}
    assert len(os.listdir(places.dst)) == 4995
    assert (places.dst / "f4999").read_bytes() == b"4999"


def test_shapes_are_checked(places: Places) -> None:
    rows = Strings.of([b"a", b"b"])
    one, two = np.zeros(1, np.int32), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="shapes"):
        copyup.copy_up_many(one, two, rows.arena, rows.start, 0, OWN, 0, two)


@root_only
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted")
    try:
        (tmp_path / "big").write_bytes(b"x" * (4 << 20))
        (disk / "work").mkdir()
        fds = [os.open(p, os.O_PATH) for p in (tmp_path, disk / "work", disk)]
        with pytest.raises(OSError) as caught:
            copyup.copy_up(fds[0], b"big", fds[1], b"#1", fds[2], b"big", OWN)
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(disk / "work") == []
        assert os.listdir(disk) == ["work"]
        for fd in fds:
            os.close(fd)
    finally:
        subprocess.run(["umount", disk], check=True)


@root_only
def test_an_owner_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    """Others report success here and the file belongs to whoever copied it."""
    program = """
import os, sys
from overlaykit._ext import copyup
os.setgroups([]); os.setgid(1000); os.setuid(1000)
fds = [os.open(p, os.O_PATH) for p in sys.argv[1:]]
try:
    copyup.copy_up(fds[0], b"f", fds[1], b"#1", fds[2], b"f", b"user.overlay.")
except PermissionError:
    sys.exit(7)
"""
    base = Path("/dev/shm") / f"owner-{os.getpid()}"
    base.mkdir()
    try:
        for name in ("src", "work", "dst"):
            (base / name).mkdir(mode=0o777)
            (base / name).chmod(0o777)
        (base / "src" / "f").write_bytes(b"root's")
        done = subprocess.run([sys.executable, "-c", program, *(base / n for n in ("src", "work", "dst"))], check=False)
        if done.returncode == 1:
            pytest.skip("uid 1000 cannot read this Python")
        assert done.returncode == 7
        assert os.listdir(base / "work") == os.listdir(base / "dst") == []
    finally:
        subprocess.run(["rm", "-rf", base], check=True)
