"""Fingerprints of contents against xxhash on whole files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import peers
import pytest
import xxhash
from tars import Slow

from overlaykit.errors import InvalidLayer
from overlaykit.tree import Kind, fingerprint, index_tar, scan
from overlaykit.tree.fingerprint import fingerprint_tar


def test_each_file_has_the_hash_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name, size in (("a", 1), ("d/b", 70_000), ("d/c", 3 << 20), ("empty", 0)):
        (tmp_path / name).write_bytes(os.urandom(size))
    with (tmp_path / "d" / "holes").open("wb") as f:
        f.seek(5 << 20)
        f.write(b"end")
    (tmp_path / "link").symlink_to("a")
    os.link(tmp_path / "d/b", tmp_path / "d/b2")
    tree = scan(tmp_path)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        found = fingerprint(tree, fd)
    finally:
        os.close(fd)
    assert found.dtype == np.uint64
    for row, entry in enumerate(tree):
        content = (tmp_path / entry.path).read_bytes() if entry.kind == Kind.FILE else b""
        expected = xxhash.xxh3_128_intdigest(content) if content else 0
        assert int(found[row, 0]) << 64 | int(found[row, 1]) == expected, entry.path


def test_a_file_that_is_gone_or_has_another_size_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    tree = scan(tmp_path)
    (tmp_path / "b").write_text("longer")
    with pytest.raises(OSError) as caught:
        fingerprint(tree, tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / "b"))
    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError) as missing:
        fingerprint(tree, tmp_path)
    assert missing.value.filename == str(tmp_path / "a")


@pytest.mark.parametrize("form", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"])
def test_a_content_in_a_tar_has_the_fingerprint_that_it_has_on_disk(tmp_path: Path, form: str) -> None:
    home = tmp_path / "home"
    (home / "d").mkdir(parents=True)
    for name, size in (("a", 1), ("d/b", 70_000), ("d/c", 3 << 20), ("empty", 0), ("last", 5)):
        (home / name).write_bytes(os.urandom(size))
    for name, pieces in (("holes", 3), ("many", 40), ("nothing", 0)):
        with (home / name).open("wb") as f:
            for piece in range(pieces):
                f.seek(piece * 300_000)
                f.write(b"piece" * 900)
        os.truncate(home / name, 13_000_000)
    os.link(home / "d/b", home / "d/b2")
    peers.run(
        "tar", "-c", "--sparse", f"--format={form.split()[0]}", *form.split()[1:], "-f", tmp_path / "t", "-C", home, "."
    )
    data = (tmp_path / "t").read_bytes()
    tree = index_tar(Slow(data, [len(data)]))
    disk = scan(home)
    rows = np.flatnonzero((tree.kind == Kind.FILE) & (tree.size > 0))
    expected = fingerprint(disk, home)[[disk.find(tree.paths[row]) for row in rows.tolist()]]
    offsets, index = np.unique(tree.offset[rows], return_inverse=True)
    for sizes in ([len(data)], [1000], [512, 7]):
        assert np.array_equal(fingerprint_tar(Slow(data, sizes), offsets)[index], expected)
        assert np.array_equal(fingerprint_tar(Slow(data, sizes), offsets[:1]), expected[index == 0][:1])


def test_an_offset_without_content_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("content")
    peers.run("tar", "-c", "-f", tmp_path / "t", "-C", tmp_path, "f")
    with (tmp_path / "t").open("rb", buffering=0) as stream, pytest.raises(InvalidLayer, match="at byte 7"):
        fingerprint_tar(stream, np.array([7]))
