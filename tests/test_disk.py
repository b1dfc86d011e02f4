"""Images and layers to plain directories: whiteouts carried out, all or nothing."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from pathlib import Path

import kernel_overlay
import peers
import pytest
from hypothesis import HealthCheck, assume, given, settings
from strategies import oci_tables, plain_tables
from treetext import below_root, text
from treetext import listing as listing_of
from users import SOMEBODY, as_somebody_root, somebody

from overlaykit.errors import AlreadyExists, InvalidLayer, UnsafePath
from overlaykit.oci import Image, Layout, layer_from_tar, new_image, validate
from overlaykit.oci.digest import Digest
from overlaykit.oci.disk import apply_layer, pack_layer, squash_layers
from overlaykit.tree import Entry, Flag, Kind, Losses, Tree, from_entries, index_tar, merge, regular, scan, write_tar


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


def test_a_hard_link_goes_by_what_was_there_before_its_layer(tmp_path: Path) -> None:
    """Links to files below the layer were made when all else was in place. A layer that takes such a file away, or names one
    that is nowhere, then failed with the directory half changed."""
    home = tmp_path / "home"
    home.mkdir()
    apply_layer(tar(("d", None), ("d/a", b"1"), ("b", b"2"), ("l", "-> d"), ("new", None)), home)
    os.utime(home / "d", ns=(0, 0))
    apply_layer(tar(("c", "= b"), (".wh.b", b""), ("d/e", "= l/a"), ("new/deep", None), ("new/deep/f", "= /l/a")), home)
    assert listing(home) == ["c", "d", "d/a", "d/e", "l", "new", "new/deep", "new/deep/f"]
    assert (home / "c").read_bytes() == b"2"
    assert (home / "d/a").stat().st_nlink == 3
    assert (home / "new/deep").stat().st_mtime == 1_600_000_000
    before = listing_of(home)
    for target in ("gone", "gone/x", "d", "c/x", "../../c/x"):
        with pytest.raises((InvalidLayer, UnsafePath), match=r"hard link|'\.\.'"):
            apply_layer(tar(("a", b"1"), ("d/.wh.a", b""), ("x", f"= {target}")), home)
        assert listing_of(home) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.parametrize("place", ["a", "d/n", "d/sub/er/m", "o/a", "o/z", "z"])
def test_what_the_file_system_refuses_half_way_is_undone(tmp_path: Path, place: str) -> None:
    """A directory that something is mounted on cannot be moved. A layer that took one away stopped there, and what it had
    done by then stayed; if the mount lay deeper, the files that it showed were removed."""
    home = tmp_path / "home"
    home.mkdir()
    apply_layer(
        tar(
            *(("b", b"b"), ("c", b"c"), ("d", None), ("d/f", b"f"), ("d/g", b"g"), ("d/l", "-> g"), ("d/sub", None)),
            *(("d/sub/er", None), ("d/sub/er/x", b"x"), ("e", None), ("e/f", b"f"), ("o", None), ("o/p", b"p"), ("y", b"y")),
        ),
        home,
    )
    (home / place).mkdir()
    os.setxattr(home / "d", "user.k", b"v")
    (home / "d").chmod(0o700)
    os.utime(home / "d", ns=(0, 12345))
    os.utime(home, ns=(0, 54321))
    before = listing_of(home)
    layer = [("d", None), ("d/.wh.f", b""), ("d/g", b"other"), ("d/l", None), ("d/l/new", b"n"), ("d/h", "= b")]
    layer += [("d/sub", None), ("d/sub/er", b"a file"), ("e", b"a file"), ("new", None), ("new/x", b"x"), ("c", b"C")]
    layer += [("o", None), ("o/.wh..wh..opq", b""), ("o/q", b"q"), (".wh.y", b"")]
    if place in ("a", "z", "d/n"):
        layer += [(place, b"a file")]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").touch()
    with kernel_overlay.bound(tmp_path / "elsewhere", home / place):
        with pytest.raises(OSError, match="mounted there, or below: "):
            apply_layer(tar(*layer), home)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "home"]
    assert (tmp_path / "elsewhere/file").exists()
    assert listing_of(home) == before
    apply_layer(tar(*layer), home)
    assert not (home / "y").exists()


def read_only(layer: io.BytesIO) -> io.BytesIO:
    """`layer` with directories that nobody may write to, and with one, called shut, that nobody may look into."""
    out = io.BytesIO()
    with tarfile.open(fileobj=layer) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            if member.isdir():
                member.mode = 0 if member.name.endswith("shut") else 0o555
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    out.seek(0)
    return out


BASE = [("./", None), ("a", None), ("a/f", b"1"), ("a/deep", None), ("a/deep/er", None), ("a/deep/er/f", b"2")]
BASE += [("a/shut", None), ("a/shut/f", b"3"), ("b", None), ("b/f", b"4")]
TOP = [("a/g", b"5"), ("a/.wh.deep", b""), ("a/shut/g", b"6"), ("a/new", None), ("a/new/link", "= b/f"), ("b", b"a file")]


def test_an_ordinary_user_may_have_directories_that_are_read_only(tmp_path: Path) -> None:
    """Nothing could be put into one, and it could not even be moved: an image with such directories, or with a root of mode
    555, could not be unpacked, and a folder was left behind."""
    layers = [read_only(tar(*members)) for members in (BASE, TOP)]
    with somebody(tmp_path):
        image_of(Layout.create(tmp_path / "layout"), *layers).unpack(tmp_path / "whole")
        home = tmp_path / "home"
        home.mkdir()
        for layer in layers:
            layer.seek(0)
            apply_layer(layer, home)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "layout", "whole"]
    modes = {path: stat.S_IMODE((home / path).stat().st_mode) for path in ("", "a", "a/shut", "a/new")}
    assert modes == {"": 0o555, "a": 0o555, "a/shut": 0, "a/new": 0o555}
    for tree in (home, tmp_path / "whole"):
        if os.geteuid() != 0:
            (tree / "a/shut").chmod(0o700)
        assert listing(tree) == ["a", "a/f", "a/g", "a/new", "a/new/link", "a/shut", "a/shut/f", "a/shut/g", "b"]


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


# --- without root -----------------------------------------------------------------------------------------------------


def test_what_only_root_can_put_on_disk_is_kept_in_a_record_and_packed_again(tmp_path: Path) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    layer = from_entries(
        [
            Entry("", Kind.DIR, 0o755, flags=Flag.IMPLIED),
            Entry("bin", Kind.DIR, 0o755, 0, 0, mtime_ns=10**18),
            Entry("bin/ping", Kind.FILE, 0o755, 0, 0, 3, mtime_ns=10**18, xattrs={"security.capability": capability}),
            Entry("bin/su", Kind.FILE, 0o4755, 0, 5, 3, mtime_ns=10**18, xattrs={"user.k": b"v", "trusted.k": b"t"}),
            Entry("dev", Kind.DIR, 0o755, 0, 0, mtime_ns=10**18),
            Entry("dev/null", Kind.CHAR, 0o666, 0, 0, mtime_ns=10**18, rdev=os.makedev(1, 3)),
            Entry("dev/sda", Kind.BLOCK, 0o660, 0, 6, mtime_ns=10**18, rdev=os.makedev(8, 0)),
            Entry("etc", Kind.DIR, 0o755, flags=Flag.IMPLIED),
            Entry("etc/shadow", Kind.FILE, 0o640, 0, 42, 3, mtime_ns=10**18),
            Entry("etc/shadow-", Kind.SYMLINK, 0o777, 33, 34, mtime_ns=10**18, link="shadow"),
            Entry("run", Kind.FIFO, 0o600, 7, 8, mtime_ns=10**18),
        ]
    )
    out = io.BytesIO()
    write_tar(layer, lambda row: io.BytesIO(b"abc"), out)
    home, record = tmp_path / "home", tmp_path / "record"
    home.mkdir()
    losses: Losses = []
    packed = io.BytesIO()
    with somebody(tmp_path, home):
        apply_layer(io.BytesIO(out.getvalue()), home, record=record, losses=losses)
        again = pack_layer(home, packed, record=record, compression="none", losses=(left := []))
    assert packed.getvalue() == out.getvalue()
    assert again.diff_id == Digest(f"sha256:{hashlib.sha256(out.getvalue()).hexdigest()}")
    assert left == []
    if os.geteuid() == 0:
        assert not (home / "dev/null").exists()
        assert (home / "etc/shadow").stat().st_uid == SOMEBODY
        assert len(losses) >= 4
    assert all(f"(kept in {record})" in loss.what for loss in losses)


def test_a_record_follows_the_layers_and_what_the_user_does(tmp_path: Path) -> None:
    home, record = tmp_path / "home", tmp_path / "record"
    home.mkdir()

    def apply(*entries: Entry) -> None:
        out = io.BytesIO()
        write_tar(regular(from_entries(list(entries))), lambda row: io.BytesIO(b"abc"), out)
        out.seek(0)
        apply_layer(out, home, record=record)

    device = Entry("dev/null", Kind.CHAR, 0o666, rdev=os.makedev(1, 3))
    with somebody(tmp_path, home):
        apply(Entry("a", Kind.FILE, 0o644, 1, 1, 3), Entry("b", Kind.FILE, 0o644, 2, 2, 3), device)
        apply(Entry("a", Kind.FILE, 0o644, 3, 3, 3), Entry("gone", Kind.CHAR, 0o600, rdev=os.makedev(1, 5)))
        apply(Entry("gone", Kind.WHITEOUT))
        (home / "b").unlink()
        (home / "b").mkdir()
        (home / "new").touch()
        out = io.BytesIO()
        pack_layer(home, out, record=record, compression="none")
    out.seek(0)
    packed = {entry.path: (entry.kind, entry.uid, entry.rdev) for entry in index_tar(out)}
    assert packed["a"] == (Kind.FILE, 3, 0)
    assert packed["b"] == (Kind.DIR, 0, 0)
    assert packed["new"] == (Kind.FILE, 0, 0)
    assert packed["dev/null"] == (Kind.CHAR, 0, os.makedev(1, 3))
    assert "gone" not in packed


def test_root_of_a_user_namespace_cannot_make_devices_and_is_told(tmp_path: Path) -> None:
    """An image with a /dev/null could not be unpacked in a rootless container, whose root is root by number only."""
    peers.need_root("a user namespace with several ids")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind in (("dev", tarfile.DIRTYPE), ("dev/null", tarfile.CHRTYPE), ("file", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.uid, member.devmajor, member.devminor = kind, 0o755, 7, 1, 3
            archive.addfile(member)
        link = tarfile.TarInfo("dev/zilch")
        link.type, link.linkname = tarfile.LNKTYPE, "dev/null"
        archive.addfile(link)
    whole = index_tar(io.BytesIO(out.getvalue()))
    home, record = tmp_path / "home", tmp_path / "record"

    def work() -> int:
        losses: Losses = []
        home.mkdir()
        os.utime(home, (0, 0))
        apply_layer(io.BytesIO(out.getvalue()), home, record=record, losses=losses)
        assert [loss.path for loss in losses] == ["dev/null", "dev/zilch"]
        assert os.listdir(home / "dev") == []
        assert (home / "file").stat().st_uid == 7
        packed = io.BytesIO()
        pack_layer(home, packed, record=record, compression="none")
        packed.seek(0)
        assert text(index_tar(packed)).splitlines()[1:] == text(whole).splitlines()[1:]
        return 0

    os.chown(tmp_path, SOMEBODY, SOMEBODY)
    with somebody(tmp_path):
        pass  # the folders above it are open to him
    assert as_somebody_root(work, fuse=tmp_path / "fuse") == 0
