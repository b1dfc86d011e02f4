"""Any two images, layers, directories or tars compared, against plain Python on the files themselves."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
from pathlib import Path

import pytest
from test_disk import image_of, tar

import overlaykit
from overlaykit import compare
from overlaykit.errors import InvalidLayer
from overlaykit.oci import Image, Layout
from overlaykit.tree import Change, Tree, index_tar, scan
from overlaykit.tree.compare import as_files

WHEN = 1_600_000_000 * 10**9


def by_python(before: Path, after: Path) -> dict[str, tuple[str, set[str]]]:
    """path -> (A, C or D, reasons) of two directories, every file read; a removed directory is one D, parents left out."""
    found: dict[str, tuple[str, set[str]]] = {}
    old = {str(p.relative_to(before)) for p in before.rglob("*")}
    new = {str(p.relative_to(after)) for p in after.rglob("*")}
    for path in sorted(old | new):
        a, b = before / path, after / path
        if path not in new:
            if str(Path(path).parent) in new | {"."}:
                found["/" + path] = ("D", set())
        elif path not in old:
            found["/" + path] = ("A", set())
        else:
            reasons = differences(a, b)
            if reasons:
                found["/" + path] = ("C", reasons)
    return found


def differences(a: Path, b: Path) -> set[str]:
    x, y = a.lstat(), b.lstat()
    if a.is_symlink() != b.is_symlink() or a.is_dir() != b.is_dir():
        return {"kind"}
    facts = {"mode": x.st_mode != y.st_mode, "owner": (x.st_uid, x.st_gid) != (y.st_uid, y.st_gid)}
    if a.is_symlink():
        facts["link"] = a.readlink() != b.readlink()
    elif a.is_file():
        facts["content"] = a.read_bytes() != b.read_bytes()
    facts["time"] = not a.is_dir() and x.st_mtime_ns != y.st_mtime_ns
    names = [set(os.listxattr(p, follow_symlinks=False)) for p in (a, b)]
    facts["xattrs"] = names[0] != names[1]
    return {name for name, differs in facts.items() if differs}


def said(found: list[Change]) -> dict[str, tuple[str, set[str]]]:
    return {c.path: (c.kind, set(c.reasons)) for c in found if c.reasons != ("below",)}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A directory, and a copy of it in which much was changed, some of it without a trace in size and time."""
    rnd = random.Random(4)
    before, after = tmp_path / "before", tmp_path / "after"
    for number in range(60):
        path = before / rnd.choice("abc") / rnd.choice("xyz") / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rnd.randbytes(rnd.choice([0, 10, 3000])))
    (before / "a/link").symlink_to("x")
    (before / "a/holes").write_bytes(b"")
    os.truncate(before / "a/holes", 3 << 20)
    for path in before.rglob("*"):
        os.utime(path, ns=(WHEN, WHEN), follow_symlinks=False)
    shutil.copytree(before, after, symlinks=True)
    files = sorted(p for p in after.rglob("f*") if p.is_file())
    for path, how in zip(rnd.sample(files, 12), ["edit", "quiet", "touch", "chmod", "remove", "xattr"] * 2, strict=True):
        match how:
            case "edit":
                path.write_bytes(b"longer than it was" * 300)
            case "quiet":  # same size, same time
                path.write_bytes(bytes(b ^ 1 for b in path.read_bytes()))
                os.utime(path, ns=(WHEN, WHEN))
            case "touch":
                os.utime(path, ns=(WHEN, WHEN + 5 * 10**9))
            case "chmod":
                path.chmod(0o600)
            case "remove":
                path.unlink()
            case "xattr":
                os.setxattr(path, "user.k", b"v")
    with (after / "a/holes").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"!")
    os.utime(after / "a/holes", ns=(WHEN, WHEN))
    (after / "a/new").mkdir()
    (after / "a/new/file").write_text("new")
    shutil.rmtree(after / "b/x")
    (after / "a/link").unlink()
    (after / "a/link").symlink_to("y")
    os.utime(after / "a/link", ns=(WHEN, WHEN), follow_symlinks=False)
    for path in after.rglob("*"):
        if path.lstat().st_mtime_ns > WHEN + 10**10:
            os.utime(path, ns=(WHEN, WHEN + 9 * 10**9), follow_symlinks=False)
    return before, after


def packed(directory: Path, *options: str) -> Path:
    """A tar of the directory, by GNU tar."""
    import peers

    out = directory.with_name(f"{directory.name}{''.join(options)}.tar")
    peers.run("tar", "-c", "--xattrs", *options, "-f", out, "-C", directory, ".")
    return out


def test_every_kind_of_source_says_the_same(two: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = two
    expected = by_python(before, after)
    assert len(expected) > 10
    assert any(reasons == {"content"} for _, reasons in expected.values())  # seen only by who reads
    tars = [packed(each) for each in two]
    sparse = packed(after, "--sparse", "--format=posix")
    layout = Layout.create(tmp_path / "layout")
    images = [image_of(layout, io.BytesIO(each.read_bytes())) for each in tars]
    images[1].save(tmp_path / "after.image.tar")
    images[0].save(tmp_path / "before.image", format="oci-dir")
    for lower in (before, tars[0], images[0], images[0].layers[0], tmp_path / "before.image"):
        for upper in (after, tars[1], sparse, images[1], images[1].layers[0], tmp_path / "after.image.tar"):
            assert said(compare(lower, upper)) == expected, (lower, upper)
        assert compare(lower, before) == []
    # Of trees nobody can read more than they say.
    blind = {p: (k, r - {"content"}) for p, (k, r) in expected.items() if r != {"content"}}
    sizes = {c.path for c in compare(before, after) if c.size_before != c.size_after}
    with tars[1].open("rb", buffering=0) as stream:
        seen = said(compare(scan(before), index_tar(stream)))
    assert {p: (k, r - {"content"}) for p, (k, r) in seen.items()} == blind
    assert {p for p, (_, r) in seen.items() if "content" in r} == {p for p in sizes if expected[p][0] == "C"}


def test_sizes_before_and_after_are_told(two: tuple[Path, Path]) -> None:
    before, after = two
    for change in compare(before, after):
        path = change.path.lstrip("/")
        if (before / path).is_file() and (after / path).is_file():
            assert change.size_before == (before / path).stat().st_size
            assert change.size_after == (after / path).stat().st_size


def test_an_edit_with_times_to_the_nanosecond_is_read_only_if_asked(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_bytes(content)
        os.utime(tmp_path / name / "f", ns=(WHEN, WHEN + 5))
    assert compare(tmp_path / "a", tmp_path / "b") == []
    assert said(compare(tmp_path / "a", tmp_path / "b", content=True)) == {"/f": ("C", {"content"})}


def test_a_time_that_a_layer_cut_to_seconds_is_no_change(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_bytes(b"content")
    os.utime(tmp_path / "d/f", ns=(WHEN, WHEN + 123))
    with (tmp_path / "layer.tar").open("wb") as out:
        overlaykit.pack_layer(tmp_path / "d", out, compression="none")
    assert compare(tmp_path / "layer.tar", tmp_path / "d") == []
    (tmp_path / "d/f").write_bytes(b"another")
    os.utime(tmp_path / "d/f", ns=(WHEN, WHEN + 456))
    assert said(compare(tmp_path / "layer.tar", tmp_path / "d")) == {"/f": ("C", {"content"})}


def test_layers_that_two_images_share_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.create(tmp_path / "layout")
    base = tar(("a", b"1"), ("b", b"2"))
    one, two = image_of(layout, base, tar(("c", b"3"))), image_of(layout, io.BytesIO(base.getvalue()), tar(("d", b"4")))
    for image in (one, two):
        for layer in image.layers:
            layer.tree()

    def refused(self: object, **_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("overlaykit.oci.layer.Layer.uncompressed", refused)
    assert said(compare(one, two)) == {"/c": ("D", set()), "/d": ("A", set())}


def test_a_layers_whiteouts_are_files_of_its_tar(tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "layout")
    members = [("d", None), ("d/.wh.x", b""), ("o", None), ("o/.wh..wh..opq", b""), ("o/new", b"n"), ("h", "= elsewhere")]
    layer = image_of(layout, tar(*members)).layers[0]
    tree = as_files(layer.tree())
    assert isinstance(tree, Tree)
    assert not tree.is_changeset
    assert [e.path for e in tree] == ["", "d", "d/.wh.x", "h", "o", "o/.wh..wh..opq", "o/new"]
    plain = image_of(layout, tar(("d", None), ("o", None), ("o/new", b"n"))).layers[0]
    assert said(compare(plain, layer)) == {p: ("A", set()) for p in ("/d/.wh.x", "/h", "/o/.wh..wh..opq")}
    assert compare(layer, layer) == []


def test_what_is_no_source_says_so(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tar at all\n" * 100)
    with pytest.raises(InvalidLayer, match="not a tar"):
        compare(tmp_path / "text", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        compare(tmp_path / "nowhere", tmp_path)


def test_an_image_against_its_unpacked_tree_is_unchanged(tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "layout")
    image: Image = image_of(layout, tar(("a", b"1"), ("d", None), ("d/x", b"x")), tar((".wh.a", b""), ("d/y", b"y")))
    image.unpack(tmp_path / "out")
    assert [c for c in compare(image, tmp_path / "out") if os.geteuid() == 0] == []


def test_gnu_tar_is_what_tarfile_reads(two: tuple[Path, Path]) -> None:
    """The peer's tars are whole, or the comparisons above would say nothing."""
    with tarfile.open(packed(two[0])) as archive:
        assert len(archive.getnames()) == 1 + len(list(two[0].rglob("*")))
