"""Directories to trees: against os.walk and lstat on real files of every kind, and what overlays leave on disk."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import stat
import struct
import subprocess
import threading
from pathlib import Path

import pytest
import reference
import rootfs
from descriptors import open_descriptors
from hypothesis import given
from hypothesis import strategies as st
from treetext import KINDS, text
from users import somebody

from overlaykit._ext import treescan
from overlaykit.errors import Unsupported
from overlaykit.tree import Entry, Kind, Tree, WhiteoutFormat, from_entries, scan

ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="needs root to make devices and trusted.* xattrs")
DEVICES = (Kind.CHAR, Kind.BLOCK)


def walked(directory: Path) -> Tree:
    """`scan` in plain Python."""
    found: list[Entry] = []
    names: dict[tuple[int, int], int] = {}
    count: dict[int, int] = {}

    def add(path: str) -> None:
        full = os.path.join(directory, path)
        info = os.lstat(full)
        kind = KINDS[stat.S_IFMT(info.st_mode)]
        number = -1
        if kind != Kind.DIR and info.st_nlink > 1:
            number = names.setdefault((info.st_dev, info.st_ino), len(names))
            count[number] = count.get(number, 0) + 1
        xattrs = {name: os.getxattr(full, name, follow_symlinks=False) for name in os.listxattr(full, follow_symlinks=False)}
        found.append(
            Entry(
                path,
                kind,
                mode=stat.S_IMODE(info.st_mode),
                uid=info.st_uid,
                gid=info.st_gid,
                size=info.st_size if kind == Kind.FILE else 0,
                mtime_ns=info.st_mtime_ns,
                rdev=info.st_rdev if kind in DEVICES else 0,
                link=os.readlink(full) if kind == Kind.SYMLINK else None,
                xattrs=xattrs,
                hardlink=number,
            )
        )
        if kind == Kind.DIR:
            for name in os.listdir(full):
                add(f"{path}/{name}" if path else name)

    add("")
    return from_entries(sorted(found, key=lambda e: reference.tree_key(e.path)))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a name of every kind."""
    place = tmp_path / "place"
    place.mkdir()
    if ROOT:
        tar = tmp_path / "rootfs.tar"
        rootfs.write(tar)
        subprocess.run(["tar", "-xpf", tar, "-C", place, "--numeric-owner", "--xattrs", "--xattrs-include=*"], check=True)
        os.mknod(place / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 1 << 19))
        os.setxattr(place / "lib/link", "trusted.k", b"of the symlink", follow_symlinks=False)
    (place / "file").write_bytes(b"x" * 5000)
    (place / "name").hardlink_to(place / "file")
    (place / "empty").mkdir(mode=0o700)
    (place / "a-b").mkdir()
    (place / "a").mkdir()
    (place / "a" / "b").touch()
    (place / "a.b").symlink_to("a\n")
    os.symlink(b"\xff" * 4095, os.fsencode(place) + b"/long")
    (place / os.fsdecode(b"\xff \n")).touch()
    (place / ("n" * 255)).touch()
    os.mkfifo(place / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(place / "socket"))
    os.link(place / "socket", place / "socket2")
    os.link(place / "long", place / "long2", follow_symlinks=False)
    (place / "outside").touch()
    os.link(place / "outside", tmp_path / "outside")  # its other name is not in the tree
    with contextlib.suppress(OSError):
        os.setxattr(place / "file", "user.k", bytes(range(256)))
        os.setxattr(place / "file", "user.empty", b"")
        os.setxattr(place / "empty", "user.\udcff=", b"v")
    for at, ns in (("file", -1_500_000_000), ("pipe", 123456789), ("empty", 2**33 * 10**9 + 1)):
        os.utime(place / at, ns=(ns, ns))
    return place


def test_a_scan_is_what_walk_and_lstat_say(place: Path) -> None:
    assert scan(place) == walked(place)


def test_a_scan_as_an_ordinary_user_is_the_same(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with somebody(tmp_path, place):
        (place / "d").mkdir()
        (place / "d" / "f").write_text("x")
        os.setxattr(place / "d" / "f", "user.k", b"v")
        (place / "d" / "f").chmod(0o400)
        (place / "closed").mkdir(mode=0o000)
        with pytest.raises(PermissionError) as caught:
            scan(place)
        assert caught.value.filename == os.fspath(place / "closed")
        (place / "closed").chmod(0o700)
        assert scan(place) == walked(place)


def test_a_descriptor_stays_open_and_where_it_was(place: Path) -> None:
    """The descriptor itself used to be read: a second scan of it found an empty directory, and O_PATH could not be read."""
    for flags in (os.O_RDONLY, os.O_PATH):
        fd = os.open(place, flags | os.O_DIRECTORY)
        try:
            assert scan(fd) == scan(fd) == scan(place)
        finally:
            os.close(fd)


def test_xattrs_are_left_out_if_not_asked_for(place: Path) -> None:
    bare = scan(place, xattrs=False)
    assert bare.xattrs.max() == -1
    assert [e.path for e in bare] == [e.path for e in scan(place)]


def test_an_empty_directory_is_a_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    assert [(e.path, e.kind, e.mode) for e in scan(tmp_path)] == [("", Kind.DIR, 0o750)]


@pytest.mark.parametrize("missing", ["none", "file"])
def test_what_cannot_be_read_is_named(tmp_path: Path, missing: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        scan(tmp_path / missing)
    assert caught.value.filename == str(tmp_path / missing)


def test_a_tree_deeper_than_a_process_has_descriptors(tmp_path: Path) -> None:
    """A descriptor a level used to stay open, and a stack frame with it: what a program in a container had nested a few
    thousand deep ended the scan with EMFILE, or the process."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1200):
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(os.open("e", os.O_CREAT, dir_fd=below))
            os.close(fd)
            fd = below
        before = open_descriptors()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 100, limit[1]))
        try:
            deep = scan(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert os.listdir("/proc/self/fd") == before
    finally:
        os.close(fd)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)
    assert len(deep) == 2401
    assert deep.path(1200) == "/".join("d" * 1200)
    assert deep.paths[1201] == deep.paths[1200] + b"/e"


def test_more_xattrs_than_4096_are_all_there(tmp_path: Path) -> None:
    """The names used to be gathered 4,096 at most, and what came after was dropped without a word."""
    file = tmp_path / "f"
    file.touch()
    set_names = []
    for number in range(5000):
        try:
            os.setxattr(file, f"user.{number:04}", b"")
        except OSError:
            break  # ext4 has room for one block of them
        set_names.append(f"user.{number:04}")
    assert sorted(scan(tmp_path).entry(1).xattrs) == sorted(set_names)


def test_times_that_nanoseconds_have_no_room_for_are_no_times(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.touch()
    for seconds in (9_223_372_034, 9_300_000_000, 1 << 40, -(1 << 40), -1):
        os.utime(file, ns=(0, seconds * 10**9))
        kept = os.stat(file).st_mtime_ns  # the file system may clamp it
        assert scan(tmp_path).entry(1).mtime_ns == (kept if -(2**63) < kept < 2**63 - 2 * 10**9 else 0)


def test_entries_that_come_and_go_meanwhile_do_no_harm(tmp_path: Path) -> None:
    stop = threading.Event()

    def stir() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            folder = tmp_path / f"d{number % 7}"
            with contextlib.suppress(OSError):
                folder.mkdir()
                (folder / "f").touch()
                (folder / "l").symlink_to("f")
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)

    for name in ("a", "z"):
        (tmp_path / name).touch()
    thread = threading.Thread(target=stir)
    thread.start()
    try:
        for _ in range(300):
            found = [e.path for e in scan(tmp_path)]
            assert found[0] == ""
            assert {"a", "z"} <= set(found)
    finally:
        stop.set()
        thread.join()


def test_the_door_refuses_what_is_no_directory() -> None:
    with pytest.raises(OSError):
        treescan.scan(-1, True)


def test_xattrs_that_nobody_wants_are_not_read(tmp_path: Path) -> None:
    for name in ("user.a", "user.ab", "user.b"):
        os.setxattr(tmp_path, name, name.encode())
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for skip in ((), (b"user.a",), (b"user.b", b"user.ab"), (b"user.a", b"user.ab", b"user.b"), (b"user.",)):
            values = treescan.scan(fd, True, skip)[3]
            wanted = [name for name in (b"user.a", b"user.ab", b"user.b") if name not in skip]
            assert values == b"".join(name + b"\0" + struct.pack("<I", len(name)) + name for name in wanted)
    finally:
        os.close(fd)


# --- marks ------------------------------------------------------------------------------------------------------------


def overlay_upper(directory: Path, prefix: str) -> None:
    """What overlayfs leaves in an upper, in its own xattrs under `prefix`."""
    for name in ("opaque", "plain", "merged", "nested"):
        (directory / name).mkdir()
    os.mknod(directory / "gone", stat.S_IFCHR, os.makedev(0, 0))
    os.link(directory / "gone", directory / "merged" / "gone")  # the kernel links all its whiteouts together
    os.setxattr(directory / "opaque", prefix + "opaque", b"y")
    os.setxattr(directory / "opaque", prefix + "origin", b"\0\xfb\x1d")
    os.setxattr(directory / "merged", prefix + "impure", b"y")
    os.setxattr(directory / "plain", prefix + "opaque", b"x")
    (directory / "plain" / "gone").touch()
    os.setxattr(directory / "plain" / "gone", prefix + "whiteout", b"y")
    os.setxattr(directory / "nested", prefix + "overlay.opaque", b"y")
    for path in (directory, *directory.rglob("*")):
        os.utime(path, ns=(0, 0), follow_symlinks=False)
        if path.is_dir():
            path.chmod(0o755)


def owned(source: str) -> str:
    return "\n".join(line.strip() for line in source.strip().splitlines())


@pytest.mark.parametrize("form", [WhiteoutFormat.OVERLAY, WhiteoutFormat.USERXATTR])
def test_an_upper_is_read_with_its_marks(tmp_path: Path, form: WhiteoutFormat) -> None:
    if form is WhiteoutFormat.OVERLAY and not ROOT:
        pytest.skip("needs root for trusted.* xattrs")
    overlay_upper(tmp_path, form.xattr_prefix)
    found = text(scan(tmp_path, whiteouts=form)).replace(f" owner={os.geteuid()}:{os.getegid()}", "")
    assert found == owned(f"""
        / dir 755
        /gone whiteout
        /merged dir 755
        /merged/gone whiteout
        /nested dir 755 xattr.{form.xattr_prefix}opaque=y
        /opaque dir 755 opaque
        /plain dir 755
        /plain/gone whiteout
    """)


def test_oci_marks_are_read_if_asked_for(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o755)
    for name in (".wh.gone", "d/.wh..wh..opq", "d/kept"):
        (tmp_path / name).touch()
    plain = [e.path for e in scan(tmp_path)]
    assert plain == ["", ".wh.gone", "d", "d/.wh..wh..opq", "d/kept"]
    read = [(e.path, e.kind, e.flags.name) for e in scan(tmp_path, whiteouts=WhiteoutFormat.OCI)]
    assert read == [
        ("", Kind.DIR, "NONE"),
        ("d", Kind.DIR, "OPAQUE"),
        ("d/kept", Kind.FILE, "NONE"),
        ("gone", Kind.WHITEOUT, "NONE"),
    ]


@pytest.mark.skipif(not ROOT, reason="devices and trusted xattrs need root")
def test_marks_of_fuse_overlayfs_are_read_in_all_their_forms(tmp_path: Path) -> None:
    """It writes an opaque mark three times over, for overlayfs, for itself and as a file; who is not root gets only some.

    Read as overlayfs's they were losses, since a layer has no names that begin with .wh., and its xattrs came along.
    """
    for name in ("root", "user", "merged"):
        (tmp_path / name).mkdir(mode=0o755)
    os.setxattr(tmp_path / "root", "trusted.overlay.opaque", b"y")
    os.setxattr(tmp_path / "user", "user.fuseoverlayfs.opaque", b"y")
    os.mknod(tmp_path / "root/.wh..opq", stat.S_IFCHR | 0o700, os.makedev(0, 0))
    os.mknod(tmp_path / "gone", stat.S_IFCHR, os.makedev(0, 0))
    for name in ("root/.wh..wh..opq", "merged/.wh.gone too", "merged/kept"):
        (tmp_path / name).touch()
    os.setxattr(tmp_path / "merged/kept", "user.fuseoverlayfs.origin", b"merged/kept")
    os.setxattr(tmp_path / "merged/kept", "user.mine", b"1")
    read = [(e.path, e.kind, e.flags.name, [*e.xattrs]) for e in scan(tmp_path, whiteouts=WhiteoutFormat.FUSE)]
    assert read == [
        ("", Kind.DIR, "NONE", []),
        ("gone", Kind.WHITEOUT, "NONE", []),
        ("merged", Kind.DIR, "NONE", []),
        ("merged/gone too", Kind.WHITEOUT, "NONE", []),
        ("merged/kept", Kind.FILE, "NONE", ["user.mine"]),
        ("root", Kind.DIR, "OPAQUE", []),
        ("user", Kind.DIR, "OPAQUE", []),
    ]
    os.setxattr(tmp_path / "merged/kept", "user.containers.override_stat", b"5:6:104750:file")
    tree = scan(tmp_path, whiteouts=WhiteoutFormat.FUSE)
    entry = tree.entry(tree.find("merged/kept"))
    assert (entry.uid, entry.gid, entry.mode, [*entry.xattrs]) == (5, 6, 0o4750, ["user.mine"])
    os.setxattr(tmp_path / "merged/kept", "user.containers.override_stat", b"5:6:20640:char-1-3")
    with pytest.raises(Unsupported, match=r"merged/kept.*char-1-3"):
        scan(tmp_path, whiteouts=WhiteoutFormat.FUSE)


@given(st.lists(st.text("ab-./", min_size=1, max_size=6).map(lambda p: p.strip("/.")), max_size=8))
def test_rows_are_in_tree_order_whatever_the_names(names: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with contextlib.suppress(OSError):
                os.makedirs(os.path.normpath(f"{folder}/{name}"))
        found = [e.path for e in scan(folder)]
    assert found == sorted(found, key=reference.tree_key)
