"""Layers that mean harm. Each is refused by name, or does no more than a tree inside its directory: nothing around it
changes. The first names are those of containerd's pkg/archive/tar_test.go."""

from __future__ import annotations

import gzip
import io
import os
import resource
import stat
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from descriptors import open_descriptors
from kernel_overlay import SCRATCH
from tars import END, header, member, padded, pax, record
from treetext import listing
from users import somebody

import overlaykit
from overlaykit import Limits
from overlaykit.errors import InvalidLayer, UnsafePath
from overlaykit.overlay.apply import apply_layer
from overlaykit.tree import Kind, Losses, Tree, WhiteoutFormat, index_tar, scan

ROOT = os.geteuid() == 0
OVERLAY = WhiteoutFormat.OVERLAY if ROOT else WhiteoutFormat.USERXATTR


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory with `target`, empty, and a sentinel tree around it that must be as it was afterwards."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        base = Path(folder)
        (base / "target").mkdir(mode=0o755)
        (base / "etc").mkdir()
        (base / "etc" / "passwd").write_text("as it was\n")
        (base / "etc" / "link").symlink_to("passwd")
        (base / "a").mkdir(mode=0o700)
        for path in (base / "etc" / "passwd", base / "etc", base / "a"):
            os.utime(path, ns=(0, 0))
        before, fds = sentinel(base), set(open_descriptors())
        yield base
        assert sentinel(base) == before
        assert set(os.listdir("/proc/self/fd")) <= fds  # an earlier test's may be collected meanwhile
        subprocess.run(["rm", "-rf", base / "target"], check=True)  # it may be too deep for Python


def sentinel(base: Path) -> dict[str, str]:
    """All that is around the target, but the target's own line."""
    around = listing(base, skip=["/target"])
    around.pop("/")  # its time is the target's coming and going
    return around


def apply(data: bytes, base: Path, form: WhiteoutFormat = OVERLAY) -> Tree:
    losses: Losses = []
    return apply_layer(io.BytesIO(data), base / "target", whiteouts=form, losses=losses)


def index(data: bytes) -> Tree:
    return index_tar(io.BytesIO(data))


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "WhiteoutRoot": (header(".wh."), InvalidLayer, r"'\.wh\.'"),
    "WhiteoutRootDot": (header("./.wh.."), InvalidLayer, r"'\.wh\.\.'"),
    "WhiteoutDotDot": (header(".wh..."), InvalidLayer, r"'\.wh\.\.\.'"),
    "WhiteoutCurrentDir": (header("d/.wh.."), InvalidLayer, r"'d/\.wh\.\.'"),
    "WhiteoutParentDir": (header("d/.wh..."), InvalidLayer, r"'d/\.wh\.\.\.'"),
    "bare whiteout below": (header("a/b/.wh."), InvalidLayer, r"'a/b/\.wh\.'"),
    "whiteout used as a directory": (member(".wh.x/y", b"1"), InvalidLayer, r"'\.wh\.x/y'"),
    "HardlinkOutOfRoot": (header("l", "1", link="../etc/passwd"), UnsafePath, r"'l'.*'\.\.'"),
    "HardlinkParent": (header("l", "1", link=".."), UnsafePath, r"'l'.*'\.\.'"),
    "HardlinkAbsoluteDotDot": (header("l", "1", link="/../etc/passwd"), UnsafePath, r"'l'.*'\.\.'"),
    "HardlinkDownAndUp": (header("l", "1", link="d/../../etc/passwd"), UnsafePath, "'l'"),
    "HardlinkToAbsoluteFileOfTheHost": (header("l", "1", link="/etc/passwd"), InvalidLayer, "'l'.*'/?etc/passwd'"),
    "BreakoutDotDot": (member("../etc/passwd", b"x"), UnsafePath, r"'\.\./etc/passwd'"),
    "BreakoutDotDotDir": (header("../a", "5", mode=0o777), UnsafePath, r"'\.\./a'"),
    "BreakoutDownAndUp": (member("d/../../etc/passwd", b"x"), UnsafePath, "'d/"),
    "BreakoutAbsoluteDotDot": (member("/../etc/passwd", b"x"), UnsafePath, "passwd'"),
    "BreakoutDotDotInPax": (pax(path="../etc/passwd") + member("x", b"x"), UnsafePath, r"'\.\./etc/passwd'"),
    "BreakoutDotDotInLongName": (
        member("././@LongLink", b"../" * 40 + b"x\0", "L") + member("x", b"x"),
        UnsafePath,
        r"'\.\./\.\./",
    ),
    "WhiteoutOutOfRoot": (header("../.wh.a"), UnsafePath, r"'\.\./\.wh\.a'"),
    "OpaqueDotDot": (header("../a/.wh..wh..opq"), UnsafePath, "opq'"),
    "HardlinkToItselfThroughAnother": (header("a", "1", link="b") + header("b", "1", link="a"), InvalidLayer, "'a'"),
    "HardlinkToDirectory": (header("d", "5") + header("l", "1", link="d"), InvalidLayer, "'l'.*directory"),
    "SymlinkLoopAsParent": (
        header("a", "2", link="b") + header("b", "2", link="a") + member("a/x", b"1"),
        InvalidLayer,
        "'a/x'.*symlinks",
    ),
    "FileAsParent": (member("f", b"1") + member("f/x", b"1"), InvalidLayer, "'f/x'.*not a directory"),
    "FifoAsParent": (header("p", "6") + member("p/x", b"1"), InvalidLayer, "'p/x'"),
    "NUL in a name": (pax(path="a\0b") + member("x", b"1"), InvalidLayer, "'a'.*NUL"),
    "NUL in a symlink": (pax(linkpath="a\0b") + header("x", "2"), InvalidLayer, "'x'.*NUL"),
    "NUL in a hard link": (pax(linkpath="a\0b") + header("x", "1"), InvalidLayer, "'x'.*NUL"),
    "NUL in an xattr": (pax(SCHILY__xattr__user__k="").replace(b".k", b"\0k") + header("x"), InvalidLayer, "'x'"),
    "size that is negative": (header("x", size=b"\xff" * 12), InvalidLayer, "'x': a size"),
    "size of an exbibyte": (header("x", size=b"\x80" + (1 << 60).to_bytes(11, "big")), InvalidLayer, "ends early"),
    "size of 2**62": (header("x", size=b"\x80" + (1 << 62).to_bytes(11, "big")), InvalidLayer, "'x': a size"),
    "size beyond int64": (header("x", size=b"\x80" + b"\xff" * 11), InvalidLayer, "'x': a number"),
    "size in pax that lies": (pax(size="9999") + member("x", b"1"), InvalidLayer, "ends early"),
    "header bomb": (header("PaxHeaders/x", "x", size=1 << 32), InvalidLayer, "more headers"),
    "header bomb by many": (member("x", b"a" * 400_000, "L") * 9 + header("x"), InvalidLayer, "more headers"),
    "long name bomb": (header("././@LongLink", "L", size=1 << 32), InvalidLayer, "more headers"),
    "sparse map bomb": (
        header("x", "S", magic=b"ustar  \0", tail=bytes(137) + b"\1") + (bytes(504) + b"\1" + bytes(7)) * 4000,
        InvalidLayer,
        "'x': more headers",
    ),
    "path bomb": (pax(path="a/" * 400_000) + header("x"), InvalidLayer, "longer than Linux"),
    "device beyond Linux": (header("x", "3", device=(b"77777777", b"77777777")), InvalidLayer, "'x': a device"),
    "unknown type": (header("x", "Z"), InvalidLayer, "'x': an entry of a type"),
    "no tar at all": (b"#!/bin/sh\n" * 100, InvalidLayer, "not a tar"),
    "a gzip": (gzip.compress(member("x", b"1")) + bytes(512), InvalidLayer, "not a tar"),
}


@pytest.mark.parametrize(("data", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(base: Path, data: bytes, error: type[Exception], message: str) -> None:
    data = member("first", b"1") + data + END if "a tar" not in message else data
    with pytest.raises(error, match=message):
        apply(data, base)
    try:
        tree = index(data)
    except InvalidLayer as e:
        assert isinstance(e, error)  # noqa: PT017
    else:  # only the layers below can tell that nobody has the file
        assert tree.is_changeset


# --- contained --------------------------------------------------------------------------------------------------------

CONTAINED = {
    "AbsoluteNames": (member("/etc/passwd", b"mine") + header("/a", "5"), {"/etc/passwd", "/a"}),
    "AbsoluteHardlink": (member("etc/passwd", b"mine") + header("l", "1", link="/etc/passwd"), {"/l", "/etc/passwd"}),
    "AbsoluteSymlink": (header("l", "2", link="/etc/passwd"), {"/l"}),
    "BreakoutSymlink": (header("l", "2", link="../etc/passwd"), {"/l"}),
    "SymlinkThenWriteThrough": (header("l", "2", link="/etc") + member("l/passwd", b"mine"), {"/l", "/etc/passwd"}),
    "SymlinkUpThenWriteThrough": (header("l", "2", link="../../etc") + member("l/passwd", b"mine"), {"/l", "/etc/passwd"}),
    "SymlinkToRootThenWriteThrough": (header("l", "2", link="/") + member("l/x", b"mine"), {"/l", "/x"}),
    "SymlinkChainThenWriteThrough": (
        header("l", "2", link="m/..") + header("m", "2", link="../..") + member("l/x", b"mine"),
        {"/l", "/m", "/x"},
    ),
    "SymlinkThenFileOfTheSameName": (header("passwd", "2", link="/etc/passwd") + member("passwd", b"mine"), {"/passwd"}),
    "SymlinkThenDirectoryOfTheSameName": (
        header("a", "2", link="../a") + header("a", "5", mode=0o777, uid=7, mtime=99) + member("a/x", b"1"),
        {"/a", "/a/x"},
    ),
    "SymlinkThenSparseOfTheSameName": (
        header("passwd", "2", link="../etc/passwd")
        + pax(GNU__sparse__size="9", GNU__sparse__map="0,3")
        + member("passwd", b"abc"),
        {"/passwd"},
    ),
    "SymlinkThenHardlinkToIt": (header("l", "2", link="/etc/passwd") + header("h", "1", link="l"), {"/l", "/h"}),
    "HardlinkThenWriteToIt": (
        header("l", "2", link="../etc/passwd") + header("h", "1", link="l") + member("h", b"mine"),
        {"/l", "/h"},
    ),
    "WhiteoutOfSymlink": (header("l", "2", link="../a") + header(".wh.l"), {"/l"}),
    "WhiteoutUnderSymlinkedParent": (header("l", "2", link="../a") + header("l/.wh.x"), {"/l"}),
    "OpaqueUnderSymlinkedParent": (header("l", "2", link="../a") + header("l/.wh..wh..opq"), {"/l"}),
    "OpaqueBelowSymlinkedParent": (header("l", "2", link="../a") + header("l/d/.wh..wh..opq"), None),
    "DirectoryNamedWhiteout": (header(".wh.x", "5"), {"/x"}),
    "SymlinkNamedWhiteout": (header(".wh.x", "2", link="/etc"), {"/x"}),
    "WhiteoutWithContent": (member(".wh.x", b"1" * 5000) + member("y", b"2"), {"/x", "/y"}),
    "AufsMetadata": (header(".wh..wh.plnk", "5") + member(".wh..wh.plnk/1.2", b"x") + header(".wh..wh.aufs"), set()),
    "NamesOf255Bytes": (pax(path="n" * 255) + member("x", b"1"), {"/" + "n" * 255}),
    "NamesThatAreNoText": (member(b"a\n\xff\\ :", b"1"), None),
    "XattrsOfManyNamespaces": (
        pax(SCHILY__xattr__user__overlay__whiteout="y", SCHILY__xattr__user__overlay__opaque="y") + header("x"),
        {"/x"},
    ),
    "FifoWithSparseRecords": (pax(GNU__sparse__size="9", GNU__sparse__map="0,3") + header("p", "6"), {"/p"}),
    "LinkWithSparseRecords": (member("a", b"1") + pax(GNU__sparse__size="9") + header("l", "1", link="a"), {"/a", "/l"}),
    "DirectoryWithContent": (header("d", "5", size=512) + member("x", b"1"), {"/d", "/x"}),
    "HardlinkWithSize": (member("a", b"1") + header("l", "1", size=512, link="a") + member("x", b"2"), {"/a", "/l", "/x"}),
    "TrailingData": (member("x", b"1") + END + b"\xff" * 100_000, {"/x"}),
    "OneEmptyBlockInBetween": (member("x", b"1") + bytes(512) + member("y", b"1"), {"/x"}),
}


@pytest.mark.parametrize(("data", "names"), CONTAINED.values(), ids=CONTAINED)
@pytest.mark.parametrize("form", [OVERLAY, WhiteoutFormat.NONE])
def test_contained(base: Path, data: bytes, names: set[str] | None, form: WhiteoutFormat) -> None:
    data = data if data.endswith((END, b"\xff")) else data + END
    tree = apply(data, base, form)
    assert tree == index(data)
    found = {"/" + e.path for e in scan(base / "target", whiteouts=form) if e.path}
    if names is not None:
        marks = {"/" + e.path for e in tree if e.kind == Kind.WHITEOUT}
        assert found <= {"/" + e.path for e in tree}
        assert names <= found | marks


def test_a_layer_of_symlinks_and_all_ways_through_them_stays_inside(base: Path) -> None:
    """Every target that leads out, every kind of entry below it."""
    data = b""
    targets = ["..", "../..", "/", "/..", "../etc", "../../../../../../../etc", "/proc/self/root", "/proc/self/cwd", "."]
    for number, target in enumerate(targets):
        link = f"l{number}"
        data += header(link, "2", link=target)
        data += member(f"{link}/passwd{number}", b"x") + header(f"{link}/a{number}", "5", mode=0o777, mtime=9)
        data += header(f"{link}/h{number}", "1", link=f"{link}/passwd{number}") + header(f"{link}/.wh.gone{number}")
        data += pax(GNU__sparse__size="9", GNU__sparse__map="0,3") + member(f"{link}/s{number}", b"abc")
        data += header(f"{link}/f{number}", "6") + header(f"{link}/y{number}", "2", link="../etc/passwd")
        data += header(f"{link}/o{number}/.wh..wh..opq")
    tree = apply(data + END, base)
    assert tree == index(data + END)


@pytest.mark.skipif(not ROOT, reason="needs root to make devices")
def test_a_device_0_0_makes_no_whiteout(base: Path) -> None:
    """On an overlay it would hide a file of the layers below, and nothing in the layer would say so."""
    tree = apply(header("etc", "5") + header("etc/passwd", "3", device=(0, 0)) + END, base)
    assert [e.path for e in tree] == ["", "etc"]
    assert os.listdir(base / "target" / "etc") == []


@pytest.mark.skipif(not ROOT, reason="needs root for trusted.* xattrs")
@pytest.mark.parametrize("name", ["opaque", "redirect", "metacopy", "origin", "overlay.opaque"])
@pytest.mark.parametrize("prefix", ["trusted.overlay.", "user.overlay."])
def test_no_xattr_of_a_layer_reaches_the_overlay_as_its_own(base: Path, prefix: str, name: str) -> None:
    data = member("x", record(f"SCHILY.xattr.{prefix}{name}", "/etc"), "x") + header("d", "5") + END
    for form in (WhiteoutFormat.OVERLAY, WhiteoutFormat.USERXATTR):
        tree = apply(data, base, form)
        on_disk = os.listxattr(base / "target" / "d")
        assert not [key for key in on_disk if key.startswith(form.xattr_prefix) and "overlay.overlay." not in key]
        assert scan(base / "target", whiteouts=form).entry(1).xattrs == tree.entry(1).xattrs == {prefix + name: b"/etc"}
        (base / "target" / "d").rmdir()


def test_names_longer_than_a_file_system_has_are_an_error_with_the_path(base: Path) -> None:
    for kind, name in (("0", "n" * 256), ("5", "n" * 300), ("2", "d/" + "n" * 256), ("0", "n" * 256 + "/x")):
        data = pax(path=name) + header("x", kind, link="y") + END
        with pytest.raises(OSError, match="too long") as caught:
            apply(data, base)
        assert caught.value.filename == name
        assert index(data).path(len(index(data)) - 1) == name


def test_paths_5000_directories_deep(base: Path) -> None:
    """Deeper than PATH_MAX, than a process has descriptors, than Python recurses; and taken away again by a file."""
    deep = "d/" * 5000
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limit[1]))
    try:
        tree = apply(pax(path=deep + "x") + member("x", b"1") + pax(path=deep + ".wh.y") + header("x") + END, base)
        assert len(tree) == 5003
        found = scan(base / "target", whiteouts=OVERLAY)
        assert [e.path for e in found] == [e.path for e in tree]
        (base / "target" / "d").rename(base / "target" / "e")
        apply(pax(path=deep + "x") + member("x", b"1") + member("d", b"a file") + END, base)
        assert (base / "target" / "d").read_bytes() == b"a file"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def whole_tar() -> bytes:
    """A layer with headers and content of every length around a block's."""
    data = (
        header("./", "5")
        + member("a", b"x" * 511)
        + member("b", b"x" * 513)
        + pax(path="p" * 200, mtime="1.5")
        + member("p")
    )
    data += pax(GNU__sparse__size="900", GNU__sparse__map="0,3") + member("s", b"abc") + header("l", "1", link="a")
    return data + header("d/.wh.x") + member("z", b"1" * 600)


@pytest.mark.parametrize("step", [512, 100, 511])
def test_truncated_anywhere(base: Path, step: int) -> None:
    """Between two entries it is a shorter layer (who verifies the digest knows better); everywhere else it is refused."""
    data = whole_tar()
    shorter = 0
    for at in range(step, len(data), step):
        try:
            tree = apply(data[:at], base)
        except InvalidLayer as e:
            assert "early" in str(e) or "hard link" in str(e)  # noqa: PT017
        else:
            assert tree == index(data[:at])
            assert at % 512 == 0 or not any(data[at : at + -at % 512])
            shorter += 1
        subprocess.run(["rm", "-rf", base / "target"], check=True)
        (base / "target").mkdir()
    assert shorter


def test_a_whiteout_of_a_hundred_megabytes_takes_no_memory(base: Path) -> None:
    class Zeros(io.RawIOBase):
        left = header(".wh.x", size=100 << 20)
        zeros = 100 << 20

        def readinto(self, buffer: object) -> int:
            view = memoryview(buffer)  # type: ignore[call-overload]
            part = self.left[: len(view)] or bytes(min(len(view), self.zeros))
            self.zeros -= 0 if self.left else len(part)
            self.left = self.left[len(part) :]
            view[: len(part)] = part
            return len(part)

    tracemalloc.start()
    try:
        apply_layer(Zeros(), base / "target", whiteouts=OVERLAY, losses=[])
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


BOMBS = {
    # A path of 32 KiB makes up 16,000 directories, 256 MiB of names.
    "implied directories": b"".join(pax(path=f"{n}/" + "a/" * 15_000 + "x") + header("x") for n in range(20)),
    # Each symlink was read anew, with a loop over all that came before, for every entry below one.
    "many entries below a symlink": header("l", "2", link="d") + b"".join(header(f"l/{n}") for n in range(4000)),
    "symlinks that lead through symlinks": b"".join(header(f"s{n}", "2", link=f"s{n + 1}/" * 24) for n in range(60))
    + header("s0/x"),
    "symlinks with long targets": header("l", "2", link="a/" * 49)
    + b"".join(header(f"l/{'l/' * 20}{n}") for n in range(500)),
    "hard links in a chain": b"".join(header(f"{n:06}", "1", link=f"{n + 1:06}") for n in range(4000)) + member("004000"),
    "global headers": pax("g", SCHILY__xattr__user__k="x" * 60_000) + b"".join(header(f"f{n}") for n in range(300)),
    "a sparse map of nothing": pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="9")
    + member("s", b"1000000\n" + b"1" * 3_000_000),
    "a sparse map that begins with no number": pax(GNU__sparse__major="1", GNU__sparse__minor="0")
    + member("s", b"1" * 3_000_000),
    "a sparse map with many pieces": pax(
        GNU__sparse__size="9999999", GNU__sparse__map=",".join(f"{n * 2},1" for n in range(70_000))
    )
    + member("s", b"x" * 70_000),
    "the same path over and over": b"".join(member("f", b"x") + header("f", "5") for _ in range(4000)),
    "a directory that comes and goes": b"".join(header("d/" * 40, "5") + header("d") for _ in range(300)),
    "xattrs": b"".join(pax(SCHILY__xattr__user__k=str(n)) + header(f"f{n}") for n in range(3000)),
    "opaque marks": b"".join(header(f"{'d/' * (n % 30)}.wh..wh..opq") for n in range(3000)),
    "a device in an xattr's place": b"".join(
        pax(**{f"SCHILY__xattr__user__{n}": "" for n in range(500)}) + header("f") for _ in range(9)
    ),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_bomb_costs_no_more_than_its_bytes(base: Path, data: bytes) -> None:
    tracemalloc.start()
    try:
        for act in (lambda: index(data + END), lambda: apply(data + END, base)):
            try:
                act()
            except (InvalidLayer, OSError) as e:
                assert str(e)  # noqa: PT017
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_an_ordinary_user_is_as_safe(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for data, _ in CONTAINED.values():
        with somebody(tmp_path, target):
            apply_layer(io.BytesIO(data + END), target, whiteouts=WhiteoutFormat.USERXATTR, losses=[])
        assert os.listdir(tmp_path) == ["target"]
        subprocess.run(["rm", "-rf", target], check=True)
        target.mkdir()


def test_setuid_and_devices_are_made_only_inside(base: Path) -> None:
    data = member("suid", b"x", mode=0o6755) + header("l", "2", link="../a") + padded(b"")
    apply(data + END, base)
    assert stat.S_IMODE((base / "target" / "suid").stat().st_mode) == 0o6755


# --- limits that a caller sets ----------------------------------------------------------------------------------------


def many(entries: int, pad: int = 0) -> bytes:
    """A layer of so many entries, each with `pad` bytes of pax header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(entries):
            info = tarfile.TarInfo(f"f{number}")
            if pad:
                info.pax_headers = {"comment": "x" * pad}
            archive.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    ("layer", "limits", "said"),
    [
        (many(1000), Limits(entries=999), "more than the 999 entries allowed"),
        (many(3, 10_000), Limits(header=8192), "more headers for one entry than the limit"),
    ],
)
def test_a_layer_may_cost_what_the_caller_allows(tmp_path: Path, layer: bytes, limits: Limits, said: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(InvalidLayer, match=said):
        overlaykit.apply_layer(io.BytesIO(layer), home, limits=limits)
    with pytest.raises(InvalidLayer, match=said):
        index_tar(io.BytesIO(layer), limits=limits)
    assert os.listdir(home) == []
    assert os.listdir(tmp_path) == ["home"]
    overlaykit.apply_layer(io.BytesIO(layer), home)
    assert len(os.listdir(home)) in (3, 1000)
