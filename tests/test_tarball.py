"""Layer tars in: every form that archivers write, against Python's tarfile and GNU tar, in whatever pieces they come."""

from __future__ import annotations

import base64
import io
import os
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import rootfs
import tars
from hypothesis import given
from hypothesis import strategies as st
from tars import END, Slow, by_python, header, member, pax, record
from treetext import text

from overlaykit._ext import tarindex
from overlaykit.errors import InvalidLayer, UnsafePath
from overlaykit.tree import Entry, Kind, Tree, index_tar
from overlaykit.tree.tarball import TOGETHER, WINDOW, parse_records


def index(data: bytes, **options: bool) -> Tree:
    return index_tar(io.BytesIO(data), **options)


def only(data: bytes) -> Entry:
    """The one entry of a layer, with directories that nobody wrote left out."""
    (entry,) = [e for e in index(data + END) if not (e.flags and e.kind == Kind.DIR)]
    return entry


# --- against other tools ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tree with long names, hard links, a name of every kind, times with fractions."""
    base = tmp_path_factory.mktemp("tarball")
    place = base / "place"
    place.mkdir()
    if os.geteuid() == 0:
        rootfs.write(base / "rootfs.tar")
        subprocess.run(["tar", "-xpf", base / "rootfs.tar", "-C", place, "--xattrs", "--xattrs-include=*"], check=True)
    deep = place / ("d" * 80) / ("e" * 80)
    deep.mkdir(parents=True)
    (deep / ("f" * 90)).write_bytes(b"deep")
    (deep / "short").hardlink_to(deep / ("f" * 90))
    (place / "far").symlink_to("t" * 150)
    (place / "tenth").write_bytes(b"1")
    os.utime(place / "tenth", ns=(0, 1_500_000_000_123_456_789))
    os.mkfifo(place / "pipe")
    (place / "holes").write_bytes(b"x" * 4096)
    os.truncate(place / "holes", 1 << 20)
    return place


def gnu_tar(place: Path, *options: str, form: str) -> bytes:
    command = ["tar", "-c", f"--format={form}", "--sort=name", "--numeric-owner", *options, "-C", os.fspath(place), "."]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "posix"])
@pytest.mark.parametrize("xattrs", [[], ["--xattrs", "--xattrs-include=*"]])
def test_gnu_tars_are_read_as_python_reads_them(place: Path, form: str, xattrs: list[str]) -> None:
    if xattrs and form not in ("pax", "posix"):
        pytest.skip("only pax headers have room for xattrs")
    data = gnu_tar(place, *xattrs, form=form)
    assert text(index(data)) == text(by_python(data))
    assert len(index(data)) > 8


@pytest.mark.parametrize("form", ["ustar", "v7"])
def test_forms_with_less_room_too(tmp_path: Path, form: str) -> None:
    place = tmp_path / "p"
    place.mkdir()
    (place / ("d" * 60)).mkdir()
    (place / ("d" * 60) / ("f" * (30 if form == "v7" else 90))).write_bytes(b"1")
    (place / "l").symlink_to("x" * 100)
    (place / "a").write_bytes(b"22")
    (place / "b").hardlink_to(place / "a")
    (place / ("n" * 98)).touch()
    data = gnu_tar(place, form=form)
    assert text(index(data)) == text(by_python(data))
    assert len(index(data)) == 7


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_pythons_tars_are_read_as_python_reads_them(form: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for number, kind in enumerate(
            [tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
        ):
            info = tarfile.TarInfo(f"é\udcff{number}" + "/x" * 50)
            info.type, info.mode, info.uid, info.gid, info.mtime = kind, 0o6755, 8**7 - 1, 7, 10**9
            info.linkname, info.size = "ü" * 40 if kind == tarfile.SYMTYPE else "", 3 if kind == tarfile.REGTYPE else 0
            info.devmajor, info.devminor = (7, 300) if kind == tarfile.CHRTYPE else (0, 0)
            if form != tarfile.USTAR_FORMAT:
                info.name, info.uid, info.mtime = info.name * 3, 8**7, -1 if kind == tarfile.DIRTYPE else 8**11
            tar.addfile(info, io.BytesIO(b"abc"))
    assert text(index(out.getvalue())) == text(by_python(out.getvalue()))


@pytest.mark.parametrize("version", ["old", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("pieces", [0, 1, 3, 30, 200])
def test_gnu_sparse_files_have_their_real_size(tmp_path: Path, version: str, pieces: int) -> None:
    place = tmp_path / "p"
    place.mkdir()
    with open(place / "s", "wb") as file:
        for number in range(pieces):
            file.seek(number * (64 << 10))
            file.write(b"%d" % number * 3000)
        file.truncate(pieces * (64 << 10) + 12345)
    (place / "t").write_bytes(b"after it")
    options = (
        ["--format=gnu", "--sparse"] if version == "old" else ["--format=pax", "--sparse", f"--sparse-version={version}"]
    )
    data = subprocess.run(["tar", "-c", *options, "-C", place, "s", "t"], check=True, capture_output=True).stdout
    if pieces:
        assert len(data) < (place / "s").stat().st_size + 10240
    tree = index(data)
    assert [(e.path, e.size) for e in tree][1:] == [("s", pieces * (64 << 10) + 12345), ("t", 8)]
    assert data[tree.entry(2).offset :][:8] == b"after it"


def test_a_tar_of_many_rows_is_read_as_python_reads_it() -> None:
    """Rows become columns some at a time: links, xattrs and sparse files find their own in each batch."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3 * TOGETHER):
            info = tarfile.TarInfo(f"d/{number:05}")
            if number % 7 == 0:
                info.pax_headers = {"SCHILY.xattr.user.n": str(number % 5)}
            if number % 11 == 0:
                info.type, info.linkname = tarfile.SYMTYPE, f"to {number}"
            elif number % 13 == 1:
                info.type, info.linkname = tarfile.LNKTYPE, f"d/{number - 1:05}"
            elif number % 17 == 0:
                info.pax_headers |= {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(number)}
                info.pax_headers |= {"GNU.sparse.name": info.name}
                info.size = 512
            tar.addfile(info, io.BytesIO(b"0\n".ljust(512, b"\0")))
    assert text(index(out.getvalue())) == text(by_python(out.getvalue()))


def test_bsdtars_are_read_as_python_reads_them(place: Path) -> None:
    bsdtar = shutil.which("bsdtar")
    if bsdtar is None:
        pytest.skip("bsdtar is not installed")
    data = subprocess.run([bsdtar, "-c", "--format=pax", "-C", place, "."], check=True, capture_output=True).stdout
    ours, theirs = index(data), by_python(data)
    assert [e.path for e in ours] == [e.path for e in theirs]


def test_the_content_is_at_its_offset(place: Path) -> None:
    data = gnu_tar(place, form="pax")
    found = [(e, data[e.offset : e.offset + e.size]) for e in index(data) if e.kind == Kind.FILE and e.size]
    assert all(content == (place / e.path).read_bytes() for e, content in found)


# --- what a header says -----------------------------------------------------------------------------------------------


def base256(value: int, width: int) -> bytes:
    return (value + (1 << (8 * width)) if value < 0 else value | 1 << (8 * width - 1)).to_bytes(width, "big")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mode": 0o106755}, {"mode": 0o6755}),
        ({"mode": b"  755 \0"}, {"mode": 0o755}),
        ({"mode": b""}, {"mode": 0}),
        ({"uid": b"7777777 ", "gid": b"17777777"}, {"uid": 8**7 - 1, "gid": 0o17777777}),
        ({"uid": base256(0xFFFFFFFE, 8)}, {"uid": 0xFFFFFFFE}),
        ({"mtime": base256(-1, 12)}, {"mtime_ns": -(10**9)}),
        ({"mtime": base256(-(2**40), 12)}, {"mtime_ns": 0}),
        ({"mtime": base256(2**33, 12)}, {"mtime_ns": 2**33 * 10**9}),
        ({"mtime": base256(2**60, 12)}, {"mtime_ns": 0}),
        ({"magic": b"ustar  \0", "prefix": b"1234"}, {"path": "f"}),
        ({"magic": b"", "prefix": b"1234"}, {"path": "f"}),
        ({"prefix": b"./a//b/"}, {"path": "a/b/f"}),
    ],
)
def test_fields(fields: dict[str, bytes], expected: dict[str, object]) -> None:
    entry = only(header("f", **fields))  # type: ignore[arg-type]
    assert {name: getattr(entry, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ({"path": "a/é"}, {"path": "a/é"}),
        ({"path": b"a/\xff"}, {"path": "a/\udcff"}),
        ({"path": ""}, {"path": "f"}),
        ({"mtime": "1.5"}, {"mtime_ns": 1_500_000_000}),
        ({"mtime": "1.123456789999"}, {"mtime_ns": 1_123_456_789}),
        ({"mtime": "-1.5"}, {"mtime_ns": -1_500_000_000}),
        ({"mtime": "-0.0000000001"}, {"mtime_ns": -1}),
        ({"mtime": "-0.999999999"}, {"mtime_ns": -999_999_999}),
        ({"mtime": "99999999999"}, {"mtime_ns": 0}),
        ({"mtime": "7."}, {"mtime_ns": 7 * 10**9}),
        ({"mtime": ""}, {"mtime_ns": 3 * 10**9}),
        ({"uid": "4294967294", "gid": "0"}, {"uid": 4294967294, "gid": 0}),
        ({"atime": "x", "comment": "=", "uname": "root"}, {"path": "f"}),
        ({"SCHILY__xattr__user__k": b"\0\xff\n="}, {"xattrs": {"user.k": b"\0\xff\n="}}),
        ({"SCHILY__xattr__user__k": ""}, {"xattrs": {"user.k": b""}}),
        ({"SCHILY__xattr__user__a%3Db%2525": "v"}, {"xattrs": {"user.a=b%25": b"v"}}),
        ({"SCHILY__xattr__user__50%": "v"}, {"xattrs": {"user.50%": b"v"}}),
        ({"LIBARCHIVE__xattr__user__%C3%A9": base64.b64encode(b"\0v").rstrip(b"=")}, {"xattrs": {"user.é": b"\0v"}}),
    ],
)
def test_pax_records(records: dict[str, str | bytes], expected: dict[str, object]) -> None:
    entry = only(pax(**records) + header("f", mtime=3))
    assert {name: getattr(entry, name) for name in expected} == expected


def test_the_last_header_of_a_kind_counts_and_pax_goes_before_gnu() -> None:
    long_name = member("././@LongLink", b"gnu\0", "L")
    assert only(long_name + header("f")).path == "gnu"
    assert only(pax(path="pax") + long_name + header("f")).path == "pax"
    assert only(pax(path="one") + pax(path="two", path2="x") + header("f")).path == "two"
    link = member("././@LongLink", b"t" * 200 + b"\0", "K")
    assert only(link + header("f", "2", link="t")).link == "t" * 200
    assert only(pax(linkpath="p") + link + header("f", "2", link="t")).link == "p"


def test_a_size_in_pax_counts_for_files_and_no_other_kind_has_content() -> None:
    data = pax(size="5") + header("f", size=0) + tars.padded(b"abcde")
    for kind in "12346":
        data += header("o" + kind, kind, size=5, link="f")
    data += header("d", "5", size=1000) + member("g", b"x")
    tree = index(data + END)
    assert [(e.path, e.size) for e in tree] == [
        ("", 0), ("d", 0), ("f", 5), ("g", 1), ("o1", 5), ("o2", 0), ("o3", 0), ("o4", 0), ("o6", 0)
    ]  # fmt: skip


def test_old_forms_of_files_and_directories() -> None:
    data = header("f", "\0") + header("c", "7") + header("d/", "0") + header("e/", "7") + member("dump", b"Yx\0\0", "D")
    kinds = {e.path: e.kind for e in index(data + END) if e.path}
    assert kinds == {"f": Kind.FILE, "c": Kind.FILE, "d": Kind.DIR, "e": Kind.FILE, "dump": Kind.DIR}


def test_a_checksum_may_be_of_signed_bytes() -> None:
    block = bytearray(header("\udcff\udcfe"))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in block)
    assert only(bytes(block)).path == "\udcff\udcfe"


@pytest.mark.parametrize("name", ["./a//b/./c/", "/a/b/c", "a/b/c", ".//./a/b/c/."])
def test_paths_are_relative_without_dots_and_doubled_slashes(name: str) -> None:
    assert [e.path for e in index(header(name, "5") + END)] == ["", "a", "a/b", "a/b/c"]


@pytest.mark.parametrize("name", [".", "./", "/", "", "./."])
def test_the_root_has_several_names(name: str) -> None:
    assert text(index(header(name, "5", mode=0o711) + END)) == "/ dir 711"


def test_global_headers_hold_for_all_entries_after_them() -> None:
    """What they said of xattrs used to be dropped, though it was looked for in every entry."""
    first = pax("g", mtime="5", SCHILY__xattr__user__k="all")
    data = header("a") + first + header("b") + pax(mtime="6", SCHILY__xattr__user__k="own") + header("c")
    data += pax("g", mtime="7", comment="git") + header("d")
    assert [(e.path, e.mtime_ns // 10**9, e.xattrs.get("user.k")) for e in index(data + END)][1:] == [
        ("a", 0, None),
        ("b", 5, b"all"),
        ("c", 6, b"own"),
        ("d", 7, b"all"),
    ]


def test_a_global_header_that_only_comments_costs_nothing() -> None:
    assert only(pax("g", comment="0" * 40) * 300 + header("f")).path == "f"


def test_devices_have_the_numbers_of_linux() -> None:
    for major, minor in ((1, 3), (259, 1 << 19), (4095, (1 << 20) - 1), (0, 256)):
        assert only(header("n", "3", device=(major, minor))).rdev == os.makedev(major, minor)


# --- in pieces --------------------------------------------------------------------------------------------------------


def odd_tar() -> bytes:
    """Every form of header once, with content around the lengths of blocks."""
    data = header("./", "5", mode=0o711)
    for size in (0, 1, 511, 512, 513, 1500):
        data += member(f"f{size}", bytes(size))
    data += pax(path="p" * 300, mtime="1.5", SCHILY__xattr__user__k="v") + member("p", b"x" * 600)
    data += member("././@LongLink", b"n" * 600 + b"\0", "L") + header("n", "2", link="t")
    data += pax("g", mtime="9") + header("f1h", "1", link="f1") + header(".wh.gone")
    sparse = b"%011o\0%011o\0" % (0, 3) + b"%011o\0%011o\0" % (4000, 2) + bytes(48) + b"\1" + b"%011o\0" % 5000
    data += header("s", "S", 5, magic=b"ustar  \0", tail=bytes(41) + sparse) + bytes(BLOCK_OF_MAP) + tars.padded(b"abcde")
    return data + END + b"trailing"


BLOCK_OF_MAP = 512


@pytest.mark.parametrize("sizes", [[1], [2, 3, 5, 7], [511], [512], [513], [1, 1000], [0x7FFFFFFF]])
def test_a_stream_in_pieces_gives_the_same_tree(sizes: list[int]) -> None:
    data = odd_tar()
    expected = index(data)
    assert len(expected) == 12
    stream = Slow(data, sizes)
    found = index_tar(stream)
    assert found == expected
    assert found.offset.tolist() == expected.offset.tolist()
    assert stream.at == len(data)  # what follows the archive is read too: a digest is of all bytes


@pytest.mark.parametrize("before", [WINDOW - 2048 + step for step in range(0, 4096, 512)])
def test_entries_may_lie_across_the_borders_of_windows(before: int) -> None:
    data = member("first", bytes(before - 512)) + odd_tar()
    assert [e for e in index(data) if e.path not in ("first", "")] == [
        e if e.offset < 0 else Entry(**{**{f: getattr(e, f) for f in e.__slots__}, "offset": e.offset + before})
        for e in index(odd_tar())
        if e.path
    ]


@given(st.lists(st.integers(0, 3 * 512), min_size=1, max_size=8), st.lists(st.integers(1, 2000), min_size=1, max_size=5))
def test_any_sizes_in_any_pieces(contents: list[int], sizes: list[int]) -> None:
    data = b"".join(member(f"{i}", bytes([i]) * n) for i, n in enumerate(contents)) + END
    found = [(e.size, data[e.offset : e.offset + e.size]) for e in index_tar(Slow(data, sizes)) if e.path]
    assert found == [(n, bytes([i]) * n) for i, n in enumerate(contents)]


def test_large_headers_have_room() -> None:
    """Longer than a window; the reader's buffer grows with them."""
    value = random.Random(0).randbytes(1_000_000)
    entry = only(pax(SCHILY__xattr__user__big=value) + member("f", b"x"))
    assert entry.xattrs == {"user.big": value}
    both = pax(SCHILY__xattr__user__big=value) + member("././@LongLink", b"n/" * 100 + b"n\0", "L") + member("f", b"x")
    assert index_tar(Slow(both + END, [10_000])).entry(101).path == "n/" * 100 + "n"


@pytest.mark.parametrize("end", [b"", bytes(512), END, bytes(10240), END + b"not a header" * 100])
def test_an_archive_ends_with_empty_blocks_or_between_two_entries(end: bytes) -> None:
    assert only(member("f", b"x") + end).path == "f" if not end else index(member("f", b"x") + end).entry(1).path == "f"


def test_an_empty_archive_is_an_empty_layer() -> None:
    for data in (b"", END, bytes(10240)):
        assert text(index(data)) == "/ dir 755 implied"


def test_strict_refuses_what_stands_twice() -> None:
    data = member("a", b"1") + member("./a", b"2") + END
    assert index(data).entry(1).offset == 1536
    with pytest.raises(InvalidLayer, match="'a' stands in the layer twice"):
        index(data, strict=True)


# --- errors -----------------------------------------------------------------------------------------------------------

BROKEN = {
    "no tar": (b"PK\x03\x04" + bytes(508), InvalidLayer, "not a tar"),
    "a checksum": (member("a", b"x") + header("bad")[:-1] + b"x", InvalidLayer, r"entry 2 at byte 1024, 'bad': .*checksum"),
    "a mode": (header("bad", mode=b"9"), InvalidLayer, r"entry 1 at byte 0, 'bad': a number"),
    "a size of letters": (header("bad", size=b"x"), InvalidLayer, r"'bad': a number"),
    "a size below zero": (header("bad", size=base256(-1, 12)), InvalidLayer, r"'bad': a size that cannot be"),
    "a size beyond all": (header("bad", size=base256(2**62, 12)), InvalidLayer, "'bad'"),
    "a uid of 2**32": (header("bad", uid=base256(2**32, 8)), InvalidLayer, r"'bad': a number"),
    "the uid that means none": (header("bad", uid=base256(2**32 - 1, 8)), InvalidLayer, r"'bad': a number"),
    "a device": (header("bad", "3", device=(4096, 0)), InvalidLayer, "'bad': a device number"),
    "a type": (header("bad", "Q"), InvalidLayer, "'bad': an entry of a type"),
    "a name with '..'": (header("a/../b"), UnsafePath, r"'a/\.\./b': a path with '\.\.'"),
    "'..' in a prefix": (header("b", prefix=b"a/.."), UnsafePath, r"'b': a path with '\.\.'"),
    "'..' in a hard link": (header("bad", "1", link="../x"), UnsafePath, r"'bad': a path with '\.\.'"),
    "no name": (header(""), InvalidLayer, "entry 1 at byte 0: a name that is empty"),
    "a symlink to nothing": (header("bad", "2"), InvalidLayer, "'bad': a name that is empty"),
    "a NUL in a pax path": (pax(path="a\0b") + header("f"), InvalidLayer, r"'a': a name that is empty or has a NUL"),
    "a NUL in a pax link": (pax(linkpath="a\0b") + header("f", "2"), InvalidLayer, "'f': a name that is empty or has a NUL"),
    "a NUL in an xattr's name": (
        pax(SCHILY__xattr__a="").replace(b"r.a=", b"r.\0=") + header("f"),
        InvalidLayer,
        "'f': a pax",
    ),
    "a pax length": (member("x", b"5 a=b\n", "x") + header("f"), InvalidLayer, "'f': a pax record"),
    "a pax record without '='": (member("x", b"7 abcd\n", "x") + header("f"), InvalidLayer, "'f': a pax record"),
    "a pax record without a key": (member("x", b"6 =bc\n", "x") + header("f"), InvalidLayer, "a pax record"),
    "a pax record cut off": (member("x", b"99 a=b\n", "x") + header("f"), InvalidLayer, "a pax record"),
    "a pax time": (pax(mtime="1e5") + header("f"), InvalidLayer, "'f': a number"),
    "a pax size": (pax(size="-1") + header("f"), InvalidLayer, "'f': a number"),
    "a pax size beyond all": (pax(size="9" * 25) + header("f"), InvalidLayer, "'f': a number"),
    "a path beyond sense": (pax(path="a/" * 20_000) + header("f"), InvalidLayer, "longer than Linux"),
    "a symlink's target beyond sense": (
        pax(linkpath="a" * 4096) + header("f", "2"),
        InvalidLayer,
        "'f': .*longer than Linux",
    ),
    "base64 that is none": (
        pax(LIBARCHIVE__xattr__user__k="A") + header("f"),
        InvalidLayer,
        "'f': xattr user.k: not base64",
    ),
    "a NUL in a quoted name": (
        pax(LIBARCHIVE__xattr__a="AA").replace(b"r.a=AA", b"r.%00=") + header("f"),
        InvalidLayer,
        "'f'",
    ),
    "a global path": (pax("g", path="x") + header("f"), InvalidLayer, "the global header after entry 0 sets 'path'"),
    "a global record": (
        member("a") + member("g", b"5 x", "g") + header("f"),
        InvalidLayer,
        "the global header after entry 1",
    ),
    "a global header in between": (pax(uid="1") + pax("g", uid="2") + header("f"), InvalidLayer, "entry 1"),
    "global headers without end": (pax("g", SCHILY__xattr__user__k="x" * 9000) * 9, InvalidLayer, "bytes of global records"),
    "a sparse size": (pax(GNU__sparse__size="x") + header("f"), InvalidLayer, "'f': b'x' where a number should be"),
    "a sparse size beyond all": (
        pax(GNU__sparse__realsize=str(2**63)) + header("f"),
        InvalidLayer,
        "'f': a number that cannot",
    ),
    "headers without end": (member("x", b"", "x") * 5000 + header("f"), InvalidLayer, "more headers"),
    "a header larger than the limit": (header("x", "x", 2 << 20), InvalidLayer, "more headers"),
    "two headers that are too large together": (
        member("x", b"1" * 700_000, "L") + member("x", b"1" * 700_000, "K") + header("f"),
        InvalidLayer,
        "more headers",
    ),
}


@pytest.mark.parametrize(("data", "error", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_said_with_the_entrys_name(data: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        index(data + END)


def test_a_tar_cut_off_is_one_only_between_entries() -> None:
    data = odd_tar()[: -len(END) - 8]
    borders = {e.offset + -(-e.size // 512) * 512 for e in index(data) if e.offset >= 0 and e.path != "s"}
    whole = 0
    for cut in range(0, len(data), 100):
        for at in (cut, cut // 512 * 512):
            try:
                index(data[:at])
                whole += 1
            except InvalidLayer as e:
                assert "ends early" in str(e)  # noqa: PT017
                assert at not in borders
    assert whole


def test_a_sparse_map_is_not_believed() -> None:
    """Numbers that Python takes and int64 does not used to end in OverflowError, and records of a sparse file before a
    fifo in a fifo opened for writing, which waits for ever."""
    for kind in "123456":
        entries = index(pax(GNU__sparse__size="77") + header("f", kind, link="x") + header("x") + END)
        assert 77 not in entries.size.tolist()


def test_parse_records_takes_only_records() -> None:
    assert parse_records(record("a", "1") + record("b", b"\n=") + record("a", "2")) == {"a": b"2", "b": b"\n="}
    for bad in (b"x", b"5", b"0 \n", b"-5 a=b\n", b"4 a\n", b" 6 a=b\n", b"6 a=bx", b"9999999999999999999999 a=b\n"):
        with pytest.raises(InvalidLayer):
            parse_records(bad)


def test_the_doors_shapes() -> None:
    bytes_, state = np.empty(600, np.uint8), np.zeros(8, np.int64)
    rows = np.empty(2 * 120, np.uint8)
    good = (bytearray(512), 512, b"", 1000, rows, bytes_, bytes_, state)
    assert tarindex.parse(*good) == (1, 512)
    for at, wrong in ((0, bytearray(511)), (1, -1), (4, rows[:100]), (5, bytes_[:512]), (6, bytes_[:512]), (7, state[:7])):
        with pytest.raises(ValueError, match="parse"):
            tarindex.parse(*good[:at], wrong, *good[at + 1 :])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state"):
        tarindex.parse(*good[:7], np.full(8, -1, np.int64))


def test_memory_stays_in_proportion_to_the_entries() -> None:
    """About 100 bytes an entry: the windows' own arrays, each with room for a whole window, used to add up."""
    entries = 30_000
    data = b"".join(header(f"directory/number{i}") for i in range(entries)) + END
    tracemalloc.start()
    try:
        tree = index(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(tree) == entries + 2
    assert peak < entries * 500 + 8 * WINDOW
