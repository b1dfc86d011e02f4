"""hash_files against reading each file in Python."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from descriptors import open_descriptors

from overlaykit._ext import contenthash
from overlaykit.tree import Strings


def run(
    directory: Path, names: list[str], *, room: int = 1 << 16, sizes: list[int] | None = None, kind: str = "xxh3"
) -> tuple[list[str], list[int], int]:
    """The digests in hex, the errnos, and how many failed."""
    digest, new, width = {
        "xxh3": (xxhash.xxh3_128_digest, xxhash.xxh3_128, 16),
        "sha256": (lambda data: hashlib.sha256(data).digest(), hashlib.sha256, 32),
    }[kind]
    paths = Strings.of([os.fsencode(n) for n in names])
    known = sizes or [os.stat(directory / n).st_size if os.path.isfile(directory / n) else 0 for n in names]
    out = np.full((len(names), width), 255, np.uint8)
    errnos = np.full(len(names), 99, np.int32)
    rows: npt.NDArray[np.int64] = np.arange(len(names), dtype=np.int64)
    fd = os.open(directory, os.O_RDONLY)
    try:
        failed = contenthash.hash_files(
            fd, paths.arena, paths.start, rows, np.array(known, np.int64), digest, new, np.zeros(room, np.uint8), out, errnos
        )
    finally:
        os.close(fd)
    return [row.tobytes().hex() for row in out], errnos.tolist(), failed


@pytest.mark.parametrize("kind", ["xxh3", "sha256"])
@pytest.mark.parametrize("room", [1, 100, 5000, 1 << 20])
def test_digests_are_those_of_the_files(tmp_path: Path, room: int, kind: str) -> None:
    names = []
    for i, size in enumerate([0, 1, 99, 100, 101, 4096, 70_000, 3, 0, 12]):
        name = f"d{i % 3}/e/f{i}" if i % 2 else f"f{i}"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(size))
        names.append(name)
    names.sort()
    want = []
    for name in names:
        data = (tmp_path / name).read_bytes()
        want.append(hashlib.sha256(data).hexdigest() if kind == "sha256" else xxhash.xxh3_128_hexdigest(data))
    assert run(tmp_path, names, room=room, kind=kind) == (want, [0] * len(names), 0)


def test_holes_are_hashed_as_zeroes(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as f:
        f.truncate(5 << 20)
        f.seek(3 << 20)
        f.write(b"data")
    data = (tmp_path / "sparse").read_bytes()
    assert run(tmp_path, ["sparse"])[0] == [xxhash.xxh3_128_hexdigest(data)]


def test_one_bad_file_does_not_lose_the_others(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "z").write_bytes(b"z")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "dir").mkdir()
    (tmp_path / "grown").write_bytes(b"12345")
    (tmp_path / "shrunk").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    names = ["a", "a/x", "dir", "grown", "link", "missing", "pipe", "shrunk", "x" * 256, "z"]
    digests, errnos, failed = run(tmp_path, names, sizes=[1, 1, 1, 4, 1, 1, 1, 6, 1, 1])
    assert errnos == [
        0, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP, errno.ENOENT, errno.EIO, errno.EIO, errno.ENAMETOOLONG, 0
    ]  # fmt: skip
    assert failed == 8
    assert digests[0] == xxhash.xxh3_128_hexdigest(b"a")
    assert digests[-1] == xxhash.xxh3_128_hexdigest(b"z")
    assert digests[1] == "00" * 16


def test_shapes_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="shapes"):
        run(tmp_path, ["a"], sizes=[1, 2])
    with pytest.raises(ValueError, match="no buffer"):
        run(tmp_path, ["a"], room=0)
    paths = Strings.of([b"a"])
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="row 5 of 1"):
        contenthash.hash_files(
            0, paths.arena, paths.start, one + 5, one, bytes, hashlib.md5, np.zeros(1, np.uint8), np.zeros((1, 1), np.uint8),
            np.zeros(1, np.int32),
        )  # fmt: skip


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"d{i}").mkdir()
        (tmp_path / f"d{i}" / "f").write_bytes(b"x" * i)
    before = len(open_descriptors())
    run(tmp_path, [f"d{i}/{n}" for i in range(50) for n in ("f", "g")], sizes=[0, 1] * 50, room=10)
    assert len(os.listdir("/proc/self/fd")) == before
