"""Images and layers to plain directories: whiteouts carried out, all or nothing."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from strategies import oci_tables, plain_tables
from treetext import below_root, text
from treetext import listing as listing_of

from overlaykit.errors import AlreadyExists, InvalidLayer, UnsafePath
from overlaykit.oci import Image, Layout, layer_from_tar, new_image, validate
from overlaykit.oci.digest import Digest
from overlaykit.oci.disk import apply_layer, pack_layer, squash_layers
from overlaykit.tree import Entry, Flag, Kind, Tree, from_entries, index_tar, merge, regular, scan, write_tar


def tar(*members: tuple[str, bytes | str | None]) -> io.BytesIO:
    """A layer: (path, content) a file, (path, None) a directory, (path, "-> x") a symlink, (path, "= x") a hard link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path, content in members:
            info = tarfile.TarInfo(path)
            info.mtime = 1_600_000_000
            data = b""
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, bytes):
                data = content
            else:
                kind, _, info.linkname = content.partition(" ")
                info.type = tarfile.SYMTYPE if kind == "->" else tarfile.LNKTYPE
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    out.seek(0)
    return out


def listing(directory: Path) -> list[str]:
    return sorted(
        str((Path(where) / name).relative_to(directory))
        for where, folders, files in os.walk(directory)
        for name in folders + files
    )


def test_a_layer_takes_away_replaces_and_adds(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    apply_layer(tar(("a", b"1"), ("d", None), ("d/x", b"x"), ("d/y", b"y"), ("o", None), ("o/old", b"")), home)
    apply_layer(
        tar(("d/.wh.x", b""), (".wh.a", b""), ("d/z", b"z"), ("o", None), ("o/new", b"n"), ("o/.wh..wh..opq", b"")), home
    )
    assert listing(home) == ["d", "d/y", "d/z", "o", "o/new"]
    assert listing(tmp_path) == sorted(["home", *(f"home/{p}" for p in listing(home))])  # and nothing beside it


def test_a_directory_replaces_a_symlink_and_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    home = tmp_path / "home"
    home.mkdir()
    (home / "d").symlink_to(tmp_path / "outside")
    apply_layer(tar(("d/f", b"1")), home)
    assert not (home / "d").is_symlink()
    assert listing(home) == ["d", "d/f"]
    assert listing(tmp_path / "outside") == []


def test_a_hard_link_to_a_file_that_was_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    apply_layer(tar(("f", b"1")), tmp_path / "home")
    apply_layer(tar(("d/g", "= f")), tmp_path / "home")
    assert (tmp_path / "home/f").stat().st_ino == (tmp_path / "home/d/g").stat().st_ino


def test_an_implied_directory_keeps_its_attributes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "d").mkdir(parents=True)
    (home / "d").chmod(0o711)
    os.utime(home / "d", ns=(5, 5))
    apply_layer(tar(("d/f", b"1")), home)
    assert ((home / "d").stat().st_mode & 0o7777, (home / "d").stat().st_mtime_ns) == (0o711, 5)


@pytest.mark.parametrize(
    ("layer", "error"),
    [
        (tar(("a", b"new"), ("../evil", b"")), UnsafePath),
        (tar(("a", b"new"), (".wh.", b"")), InvalidLayer),
        (io.BytesIO(tar(("a", b"n" * 100_000)).getvalue()[:60_000]), InvalidLayer),
    ],
    ids=["parent", "bare whiteout", "cut off"],
)
def test_a_layer_that_is_wrong_changes_nothing(tmp_path: Path, layer: io.BytesIO, error: type[Exception]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "a").write_bytes(b"old")
    before = scan(tmp_path)
    with pytest.raises(error):
        apply_layer(layer, home)
    assert (home / "a").read_bytes() == b"old"
    assert text(scan(home)) == text(scan(home))
    assert listing(tmp_path) == ["home", "home/a"]
    assert len(before) == len(scan(tmp_path))


def packed(table: list[Entry]) -> tuple[io.BytesIO, Tree]:
    """A layer's tar of random rows, and its tree; what needs root or is an error goes."""
    rows = [e for e in table if e.kind not in (Kind.SYMLINK, Kind.CHAR)]
    rows = [Entry(e.path, e.kind, e.mode, size=e.size, mtime_ns=e.mtime_ns) for e in rows]
    try:
        tree = regular(from_entries(rows), oci_names=True)
    except InvalidLayer:
        assume(False)
        raise
    out = io.BytesIO()
    write_tar(tree, lambda row: io.BytesIO(b"x" * int(tree.size[row])), out, subsecond=True)
    out.seek(0)
    return out, index_tar(io.BytesIO(out.getvalue()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(plain_tables, oci_tables, oci_tables)
def test_folding_layers_shows_what_merging_them_says(
    tmp_path_factory: pytest.TempPathFactory, x: list[Entry], y: list[Entry], z: list[Entry]
) -> None:
    home = tmp_path_factory.mktemp("fold")
    trees = []
    for table in (x, y, z):
        stream, tree = packed(table)
        apply_layer(stream, home)
        trees.append(tree)
    expected, found = merge(trees), scan(home)
    assert [(e.path, e.kind, e.mode, e.size) for e in found][1:] == [(e.path, e.kind, e.mode, e.size) for e in expected][1:]
    # A directory that no layer wrote has the time at which it was made.
    written = [i for i, e in enumerate(expected) if i and not e.flags & Flag.IMPLIED and e.mtime_ns]
    assert [found.mtime_ns[i] for i in written] == [expected.mtime_ns[i] for i in written]


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_packing_is_the_inverse_of_applying(tmp_path: Path, compression: str) -> None:
    old, new, copy = (tmp_path / n for n in ("old", "new", "copy"))
    for home in (old, new, copy):
        home.mkdir()
        os.utime(home, ns=(7, 7))
    for home in (old, copy):
        apply_layer(tar(("a", b"1"), ("d", None), ("d/x", b"x"), ("l", "-> a"), ("h", "= a")), home)
    apply_layer(tar(("a", b"2"), ("d", b"now a file"), ("n", None), ("n/é", b"y"), ("l", "-> b"), ("k", "= a")), new)
    blob = io.BytesIO()
    layer = pack_layer(new, blob, lower=old, compression=compression, subsecond=True)
    assert layer.descriptor.size == len(blob.getvalue())
    assert layer.descriptor.digest == Digest.of(blob.getvalue())
    blob.seek(0)
    apply_layer(blob, copy, layer.descriptor.media_type)
    assert text(scan(copy)) == text(scan(new))
    again = io.BytesIO()
    assert pack_layer(new, again, lower=old, compression=compression, subsecond=True) == layer
    assert again.getvalue() == blob.getvalue()


def image_of(layout: Layout, *layers: io.BytesIO) -> Image:
    return new_image([layer_from_tar(layout, layer) for layer in layers])


def test_a_squashed_range_shows_the_same_and_keeps_the_base(tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "layout")
    image = image_of(
        layout,
        tar(("a", b"1"), ("d", None), ("d/x", b"x"), ("d/y", b"y"), ("l", "-> a")),
        tar((".wh.a", b""), ("d/.wh.x", b""), ("b", b"2"), ("c", "= b")),
        tar(("d", None), ("d/.wh..wh..opq", b""), ("d/z", b"z"), ("b", b"3"), ("e", "= c")),
        tar(("top", b"t")),
    )
    squashed = squash_layers(image, 1, 3, layout)
    assert validate(squashed) == []
    assert squashed.diff_ids[0] == image.diff_ids[0]
    assert squashed.diff_ids[-1] == image.diff_ids[-1]
    assert len(squashed.layers) == 3
    image.unpack(tmp_path / "whole")
    squashed.unpack(tmp_path / "squashed")
    assert below_root(listing_of(tmp_path / "squashed")) == below_root(listing_of(tmp_path / "whole"))
    assert sorted(p.name for p in (tmp_path / "layout").iterdir()) == ["blobs", "index.json", "ingest", "lock", "oci-layout"]


def test_an_image_is_unpacked_whole_or_not_at_all(tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "layout")
    image = image_of(layout, tar(("a", b"1")), tar((".wh.", b"")))
    with pytest.raises(InvalidLayer):
        image.unpack(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(AlreadyExists):
        image.unpack(tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "layout"]
