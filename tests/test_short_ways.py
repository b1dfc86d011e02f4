"""The short ways of an Overlay, one system call for what upper alone has: never where the long way would do more."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from users import SOMEBODY, somebody

from overlaykit._ext.opening import open_known
from overlaykit.overlay import Overlay

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="trusted xattrs and other owners need root")
DATA = random.Random(5).randbytes(10_000)


class Stack:
    """A lower with d/f and d/sub/f; an upper and work."""

    def __init__(self, base: Path) -> None:
        self.lower, self.upper, self.work = base / "lower", base / "upper", base / "work"
        (self.lower / "d/sub").mkdir(parents=True)
        (self.lower / "d/f").write_bytes(DATA)
        (self.lower / "d/sub/f").write_bytes(DATA)
        self.upper.mkdir()
        self.work.mkdir()

    def open(self, **options: bool) -> Overlay:
        return Overlay([self.lower], self.upper, self.work, **options)


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


@pytest.fixture
def fs(stack: Stack) -> Iterator[Overlay]:
    """An overlay that knows /d well enough for the short ways, and has own files there."""
    with stack.open() as found:
        warm(found)
        yield found


def warm(fs: Overlay) -> None:
    """Have `fs` know all about /d: its lower names, and that upper has nothing odd there."""
    fs.listdir("/d")
    for name in ("own", "other", "gone"):
        fs.write_bytes(f"/d/{name}", b"x")
    fs.unlink("/d/gone")


def error(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as e:
        return errno.errorcode[e.errno or 0]
    return "done"


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (os.O_WRONLY, b"new34567"), (os.O_RDWR, b"new34567"), (os.O_WRONLY | os.O_APPEND, b"01234567new"),
        (os.O_WRONLY | os.O_TRUNC, b"new"), (os.O_WRONLY | os.O_CREAT | os.O_APPEND, b"01234567new"),
        (os.O_RDWR | os.O_CREAT | os.O_TRUNC, b"new"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["own", "f"])
def test_a_file_of_upper_opens_as_on_the_host(fs: Overlay, name: str, flags: int, expected: bytes) -> None:
    path = f"/d/{name}"
    fs.write_bytes(path, b"01234567")
    fd = fs.open_fd(path, flags, 0o600)
    assert os.get_inheritable(fd) is False
    os.write(fd, b"new")
    os.close(fd)
    assert fs.read_bytes(path) == expected


def test_exclusive_creation_of_what_is_there_fails_and_of_what_is_not_makes_it(fs: Overlay) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    assert error(lambda: fs.open_fd("/d/own", flags)) == "EEXIST"
    assert error(lambda: fs.open_fd("/d/f", flags)) == "EEXIST"
    assert error(lambda: os.close(fs.open_fd("/d/made", flags))) == "done"
    assert error(lambda: fs.open_fd("/d/missing", os.O_WRONLY)) == "ENOENT"
    assert error(lambda: fs.open_fd("/d/sub", os.O_RDWR)) == "EISDIR"


@root_only
@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_TRUNC])
def test_a_metacopy_gets_its_data_before_it_is_written_to(stack: Stack, flags: int) -> None:
    """A metacopy that was renamed is a name that upper alone has, and its data are below."""
    with stack.open(metacopy=True) as fs:
        fs.chmod("/d/f", 0o600)
        fs.rename("/d/f", "/d/moved")
        warm(fs)
    with stack.open(metacopy=True) as fs:
        warm(fs)
        fd = fs.open_fd("/d/moved", flags)
        os.write(fd, b"new")
        os.close(fd)
        assert fs.read_bytes("/d/moved") == (b"new" if flags & os.O_TRUNC else b"new" + DATA[3:])
    assert not [name for name in os.listxattr(stack.upper / "d/moved") if name.endswith("metacopy")]


@root_only
def test_an_empty_file_that_is_a_whiteout_is_not_there(stack: Stack) -> None:
    (stack.upper / "d").mkdir()
    os.setxattr(stack.upper / "d", "trusted.overlay.opaque", b"x")
    for name in ("one", "two"):
        (stack.upper / "d" / name).touch()
        os.setxattr(stack.upper / "d" / name, "trusted.overlay.whiteout", b"")
    with stack.open() as fs:
        warm(fs)
        assert error(lambda: fs.open_fd("/d/one", os.O_WRONLY)) == "ENOENT"
        assert error(lambda: fs.rename("/d/one", "/d/three")) == "ENOENT"
        fs.rename("/d/own", "/d/two")
        assert fs.read_bytes("/d/two") == b"x"
        os.close(fs.open_fd("/d/one", os.O_WRONLY | os.O_CREAT))
        assert fs.stat("/d/one").st_size == 0


def test_opening_a_fifo_waits_without_stopping_others_and_its_reader_sees_one_writer(fs: Overlay) -> None:
    """To open a FIFO for writing waits for a reader. Under the lock it would stop every other thread, the reader too."""
    fs.mkfifo("/d/fifo")

    def write() -> None:
        fd = fs.open_fd("/d/fifo", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(fd, b"hello")
        os.close(fd)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.05)  # most likely it waits by now; if not, the test is only easier to pass
    fs.write_bytes("/d/meanwhile", b"x")
    fd = fs.open_fd("/d/fifo", os.O_RDONLY)
    assert os.read(fd, 10) == b"hello"
    assert os.read(fd, 10) == b""
    os.close(fd)
    writer.join(60)
    assert not writer.is_alive()


@root_only
def test_a_strangers_file_in_a_sticky_directory_is_left_to_the_long_way(tmp_path: Path) -> None:
    """The kernel refuses O_CREAT there (fs.protected_regular); the short way opens without it, and would let it through."""
    (tmp_path / "file").touch()
    os.chown(tmp_path / "file", SOMEBODY, SOMEBODY)
    tmp_path.chmod(0o1777)
    fd = os.open(tmp_path, os.O_PATH)
    nodes = {"": SimpleNamespace(upper_fd=fd, dead=False)}
    try:
        assert open_known(nodes, "/file", os.O_WRONLY | os.O_CREAT, 0, b"trusted.overlay.") == -1
        opened = open_known(nodes, "/file", os.O_WRONLY, 0, b"trusted.overlay.")
        assert opened >= 0
        os.close(opened)
    finally:
        os.close(fd)


def test_the_short_open_is_the_hosts_open_or_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dir").mkdir()
    fd = os.open(tmp_path, os.O_PATH)
    nodes = {"": SimpleNamespace(upper_fd=fd, dead=False, names={"low"})}
    try:
        for name in ("missing", "link", "dir", "..", ".", "", "x" * 256, "file\0"):
            assert open_known(nodes, f"/{name}", os.O_WRONLY, 0, b"user.overlay.") == -1
        opened = open_known(nodes, "/file", os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC, 0, b"user.overlay.")
        assert (os.fstat(opened).st_size, os.get_inheritable(opened)) == (0, False)
        os.close(opened)
        new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        for name in ("file", "link", "low", "new\0"):
            assert open_known(nodes, name, new, 0o640, b"user.overlay.") == -1
        os.close(open_known(nodes, "new", new, 0o640, b"user.overlay."))
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
        nodes[""].names = None
        assert open_known(nodes, "newer", new, 0o640, b"user.overlay.") == -1
    finally:
        os.close(fd)
    assert sorted(os.listdir(tmp_path)) == ["dir", "file", "link", "new"]


# --- renaming ---------------------------------------------------------------------------------------------------------


def test_own_files_are_renamed_as_on_the_host(fs: Overlay) -> None:
    fs.rename("/d/own", "/d/new")
    assert error(lambda: fs.stat("/d/own")) == "ENOENT"
    fs.write_bytes("/d/new", b"new")
    fs.rename("/d/new", "/d/other")
    assert fs.read_bytes("/d/other") == b"new"
    assert sorted(fs.listdir("/d")) == ["f", "other", "sub"]
    assert error(lambda: fs.rename("/d/own", "/d/x")) == "ENOENT"
    assert error(lambda: fs.rename("/d/other", "/d/sub")) == "EISDIR"
    assert error(lambda: fs.rename("/d/other", "/d/" + "x" * 256)) == "ENAMETOOLONG"
    assert error(lambda: fs.rename("/d/other", "/d/..")) == "EBUSY"
    fs.rename("/d/f", "/d/g")  # what a lower has leaves a whiteout, however well the directory is known
    assert error(lambda: fs.stat("/d/f")) == "ENOENT"
    assert fs.read_bytes("/d/g") == DATA


def test_an_own_directory_takes_what_was_known_of_it_along(fs: Overlay) -> None:
    fs.makedirs("/d/one/deep")
    fs.write_bytes("/d/one/deep/file", b"1")
    fs.write_bytes("/d/one/../one/file", b"2")
    fs.rename("/d/one", "/d/two")
    for path in ("/d/one/deep/file", "/d/one/../one/file", "/d/one/../own", "/d/one/file"):
        assert error(lambda path=path: fs.stat(path)) == "ENOENT"  # type: ignore[misc]
    assert fs.read_bytes("/d/two/deep/file") == b"1"
    fs.mkdir("/d/one")
    assert fs.listdir("/d/one") == []
    fs.write_bytes("/d/one/file", b"3")
    assert fs.read_bytes("/d/two/file") == b"2"
    assert error(lambda: fs.rename("/d/one", "/d/two")) == "ENOTEMPTY"
    assert error(lambda: fs.rename("/d/one", "/d/one/below")) == "EINVAL"


@root_only
@pytest.mark.parametrize("again", [False, True])
def test_a_renamed_lower_directory_is_not_empty_though_upper_has_nothing_in_it(stack: Stack, again: bool) -> None:
    """With redirect_dir its names are those of the lower directory it came from; rename(2) on upper would replace it."""
    fs = stack.open(redirect_dir=True)
    warm(fs)
    fs.rename("/d/sub", "/d/moved")
    fs.mkdir("/d/dir")
    if again:
        fs.close()
        fs = stack.open(redirect_dir=True)
        warm(fs)
    with fs:
        fs.rename("/d/own", "/d/own2")
        assert error(lambda: fs.rename("/d/dir", "/d/moved")) == "ENOTEMPTY"
        assert fs.read_bytes("/d/moved/f") == DATA
        fs.rename("/d/moved", "/d/again")
        fs.rename("/d/again", "/back")
        assert fs.read_bytes("/back/f") == DATA


def test_a_symlink_that_paths_are_known_by_is_renamed_the_long_way(fs: Overlay) -> None:
    fs.mkdir("/d/dir")
    fs.write_bytes("/d/dir/file", b"x")
    fs.symlink("dir", "/d/link")
    assert fs.read_bytes("/d/link/file") == b"x"
    fs.rename("/d/link", "/d/link2")
    assert error(lambda: fs.stat("/d/link/file")) == "ENOENT"
    assert fs.read_bytes("/d/link2/file") == b"x"


def test_a_known_directory_that_became_another_leads_there(fs: Overlay) -> None:
    """Paths go on from directories somebody has been to: their names may be others' by now."""
    fs.makedirs("/d/one/two/three")
    fs.makedirs("/other/two/four")
    for path in ("/d/one", "/d/one/two", "/d/one/two/three", "/d/sub"):
        fs.listdir(path)
    fs.rename("/d/one", "/d/old")
    with pytest.raises(FileNotFoundError):
        fs.listdir("/d/one/two")
    fs.symlink("/other", "/d/one")
    assert fs.listdir("/d/one/two") == ["four"]
    assert fs.listdir("/d/old/two") == ["three"]
    fs.unlink("/d/one")
    fs.rename("/d/old", "/d/one")
    assert fs.listdir("/d/one/two") == ["three"]
    fs.rmtree("/d/sub")
    with pytest.raises(FileNotFoundError):
        fs.listdir("/d/sub")
    fs.write_bytes("/d/sub", b"")
    with pytest.raises(NotADirectoryError):
        fs.listdir("/d/sub/f")


def test_links_are_counted_from_the_beginning_of_a_path_though_its_directory_is_known(tmp_path: Path) -> None:
    """The kernel follows 40 symlinks in a path: 30 to its directory, which is known then, and 20 more are too many."""
    (tmp_path / "lower" / "d").mkdir(parents=True)
    (tmp_path / "lower" / "d" / "f").touch()
    for head, end, count in (("a", "d", 30), ("d/b", "f", 20)):
        for i in range(count):
            (tmp_path / "lower" / f"{head}{i}").symlink_to(f"{head[-1]}{i + 1}" if i + 1 < count else end)
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    with Overlay([tmp_path / "lower"], tmp_path / "upper", tmp_path / "work") as fs:
        fs.stat("/a0/f")
        for path in ("/d/b0", "/a0/b0", "/a20/b0", "/a20/b0"):
            assert error(lambda: fs.stat(path)) == error(lambda: os.stat(f"{tmp_path}/lower{path}")), path  # noqa: B023


def test_a_directory_that_was_closed_is_closed_to_those_who_know_it(tmp_path: Path) -> None:
    (tmp_path / "lower" / "d" / "sub").mkdir(parents=True)
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    with (
        somebody(tmp_path, *tmp_path.rglob("*")),
        Overlay([tmp_path / "lower"], tmp_path / "upper", tmp_path / "work", userxattr=True) as fs,
    ):
        assert fs.listdir("/d/sub") == fs.listdir("/d/sub") == []
        fs.chmod("/d", 0)
        assert error(lambda: fs.listdir("/d/sub")) == "EACCES"
        fs.chmod("/d", 0o755)


NAMES = [
    "file",
    "d\u00e9j\u00e0",
    "\u4f60\u597d",
    "raw\udcff",
    "raw\udcff/deep",
    "/lead/deep",
    "d/file",
    "d/",
    "/",
    "",
    "nul\0",
    "d\0/file",
]


@pytest.mark.parametrize("path", NAMES)
def test_the_short_open_by_path_is_that_of_directory_and_name(path: str, tmp_path: Path) -> None:
    """Names that are no UTF-8, and no ASCII, are split and encoded as Python does it."""
    folders = {}
    for number, head in enumerate(("", "d", "/lead", "raw\udcff", "gone", "lower")):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("file", "d\u00e9j\u00e0", "\u4f60\u597d", "raw\udcff", "deep"):
            (folder / name).write_text(name, errors="surrogateescape")
        folders[head] = SimpleNamespace(upper_fd=os.open(folder, os.O_PATH), dead=head == "gone")
    own = b"user.overlay."
    try:
        head, _, name = path.rpartition("/")
        node, encoded = folders.get(head), os.fsencode(name)
        there = node is not None and not node.dead and b"\0" not in encoded
        expected = os.path.join(f"/proc/self/fd/{node.upper_fd}".encode(), encoded) if there and node is not None else b""
        found = open_known(folders, path, os.O_RDWR, 0, own)
        assert (found >= 0) == os.path.isfile(expected)
        if found >= 0:
            assert os.path.samestat(os.fstat(found), os.stat(expected))
            os.close(found)
        os.close(folders["lower"].upper_fd)
        folders["lower"].upper_fd = -1
        for head in ("gone", "lower", "nowhere"):
            assert open_known(folders, f"{head}/file", os.O_RDWR, 0, own) == -1
    finally:
        for folder in folders.values():
            if folder.upper_fd >= 0:
                os.close(folder.upper_fd)
