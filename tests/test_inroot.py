"""open_in_root and open_beneath: by openat2, and by the walk that stands in for it."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlaykit._ext import inroot


@pytest.fixture(params=["openat2", "walk"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """A directory with dir/file, links of all kinds, and a secret outside."""
    base = tmp_path / "root"
    (base / "dir" / "sub").mkdir(parents=True)
    (base / "dir" / "file").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    for name, target in {
        "rel": "dir/file", "abs": "/dir/file", "up": "../../secret", "loop": "loop", "out": str(tmp_path / "secret"),
        "dirlink": "dir", "dirslash": "dir/", "dangling": "dir/new", "dots": "dir/sub/../../../dir/./file",
    }.items():  # fmt: skip
        (base / name).symlink_to(target)
    before = inroot.use_openat2(request.param == "openat2")
    fd = os.open(base, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)
    inroot.use_openat2(before)


def attempt(call: object, *args: object) -> str:
    try:
        fd = call(*args)  # type: ignore[operator]
    except OSError as e:
        return errno.errorcode[e.errno or 0]
    try:
        return os.read(fd, 100).decode()
    except OSError as e:
        return f"open, {errno.errorcode[e.errno or 0]}"
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("dir/file", "inside"), ("/dir/file", "inside"), ("rel", "inside"), ("abs", "inside"), ("dirlink/file", "inside"),
        ("dirslash/file", "inside"), ("../../dir/file", "inside"), ("dots", "inside"), ("dir//./file", "inside"),
        ("up", "ENOENT"), ("out", "ENOENT"), ("loop", "ELOOP"), ("dangling", "ENOENT"), ("dir/file/", "ENOTDIR"),
        ("dir/file/x", "ENOTDIR"), ("", "ENOENT"), ("dir", "open, EISDIR"), ("/", "open, EISDIR"), (".", "open, EISDIR"),
        ("x" * 256, "ENAMETOOLONG"), ("dir/" * 1100, "ENAMETOOLONG"), ("dirslash/", "open, EISDIR"),
    ],
)  # fmt: skip
def test_open_in_root_never_leaves_it(root: int, path: str, want: str) -> None:
    assert attempt(inroot.open_in_root, root, path.encode(), os.O_RDONLY) == want


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("dir/file", "inside"), ("dir/sub/../file", "inside"), ("rel", "ELOOP"), ("dirlink/file", "ELOOP"),
        ("/dir/file", "EXDEV"), ("../secret", "EXDEV"), ("dir/../../secret", "EXDEV"), ("none", "ENOENT"),
    ],
)  # fmt: skip
def test_open_beneath_meets_no_symlink(root: int, path: str, want: str) -> None:
    assert attempt(inroot.open_beneath, root, path.encode(), os.O_RDONLY) == want


def test_creating_in_root(root: int, tmp_path: Path) -> None:
    os.close(inroot.open_in_root(root, b"dirlink/made", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.close(inroot.open_in_root(root, b"dangling", os.O_WRONLY | os.O_CREAT, 0o600))
    inroot.mkdir_in_root(root, b"/dirlink/directory", 0o700)
    assert sorted(p.name for p in (tmp_path / "root" / "dir").iterdir()) == ["directory", "file", "made", "new", "sub"]
    with pytest.raises(FileExistsError):
        inroot.open_in_root(root, b"rel", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with pytest.raises(OSError, match="symbolic"):
        inroot.open_in_root(root, b"rel", os.O_RDONLY | os.O_NOFOLLOW)
    with pytest.raises(ValueError, match="null"):
        inroot.open_in_root(root, b"dir\0/../x", os.O_RDONLY)


def test_both_ways_give_the_same_on_random_paths(tmp_path: Path) -> None:
    chance = random.Random(5)
    names = ["a", "b", "c", "..", ".", "l", "m"]
    for name in ("a/b/c", "b/a", "c"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    for name, target in {
        "a/l": "../b",
        "l": "/a/b",
        "m": "l/../a",
        "a/b/m": "/m/./l",
        "b/l": "l",
        "c/m": "../../../a/",
    }.items():
        (tmp_path / name).symlink_to(target)
    fd = os.open(tmp_path, os.O_PATH)
    for _ in range(3000):
        path = "/".join(chance.choice(names) for _ in range(chance.randrange(1, 6)))
        path = chance.choice(["", "", "/"]) + path + chance.choice(["", "", "/"])
        flags = os.O_PATH | chance.choice([0, os.O_NOFOLLOW, os.O_DIRECTORY])
        for call in (inroot.open_in_root, inroot.open_beneath):
            answers = []
            for modern in (True, False):
                before = inroot.use_openat2(modern)
                try:
                    found = call(fd, path.encode(), flags)
                    answers.append(os.fstat(found).st_ino)
                    os.close(found)
                except OSError as e:
                    answers.append(e.errno or 0)
                inroot.use_openat2(before)
            assert answers[0] == answers[1], (call, path, flags)
    os.close(fd)


@pytest.mark.parametrize("modern", [True, False])
def test_whoever_swaps_directories_for_links_leads_nowhere(tmp_path: Path, modern: bool) -> None:
    """The walk once gave EINVAL: what was a symlink when it looked was a directory when it read where that leads."""
    base = tmp_path / "root"
    (base / "dir").mkdir(parents=True)
    (base / "dir" / "file").write_text("inside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("outside")
    (base / "link").symlink_to("../outside")
    fd = os.open(base, os.O_PATH)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.rename(base / "dir", base / "t")
            os.rename(base / "link", base / "dir")
            os.rename(base / "dir", base / "link")
            os.rename(base / "t", base / "dir")

    thread = threading.Thread(target=swap)
    before = inroot.use_openat2(modern)
    thread.start()
    try:
        seen = {attempt(inroot.open_beneath, fd, b"dir/file", os.O_RDONLY) for _ in range(5000)}
        seen |= {attempt(inroot.open_in_root, fd, b"dir/file", os.O_RDONLY) for _ in range(5000)}
    finally:
        stop.set()
        thread.join()
        inroot.use_openat2(before)
        os.close(fd)
    assert "outside" not in seen
    assert seen <= {"inside", "ENOENT", "ELOOP", "ENOTDIR", "EXDEV"}
