"""Fingerprints of contents against xxhash on whole files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from overlaykit.tree import Kind, fingerprint, scan


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
