"""The text form of trees, both ways, and listings of real directories."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import peers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from treetext import differences, escape, line, listing, parse, text, tree, unescape

from overlaykit.tree import Entry, Flag, Kind

EVERYTHING = """\
/ dir 755
/dev/null char 666 1:3
/dev/sda block 660 8:0 owner=0:6
/etc dir 1777 owner=1:2 mtime=1700000000.5 opaque
/etc/a\\x20name\\x5c\\x0a\\xff file 644 3
/etc/caf\u00e9 file 4755 0 mtime=-1.25
/etc/copy file 600 6 owner=1000:1000 xattr.user.colour=dark\\x20blue xattr.user.none=
/etc/motd file 600 6 owner=1000:1000 xattr.user.colour=dark\\x20blue xattr.user.none= hardlink=/etc/copy
/gone whiteout
/lib symlink 777 -> usr/lib
/link file 0 0 lower_link -> etc/passwd
/run dir 755 implied
/run/fifo fifo 622
/run/socket socket 777"""


def test_text_is_what_parse_reads() -> None:
    assert text(parse(EVERYTHING)) == EVERYTHING


def test_short_forms_take_the_usual_mode() -> None:
    assert (
        text(parse("/etc dir\n/etc/motd file 600 6\n/lib symlink -> usr/lib\n\n# comment\n/x file"))
        == """\
/etc dir 755
/etc/motd file 600 6
/lib symlink 777 -> usr/lib
/x file 644 0"""
    )


def test_tree_adds_the_parents_that_have_no_line() -> None:
    assert (
        text(tree("/etc/motd file 644 6"))
        == """\
/ dir 755 implied
/etc dir 755 implied
/etc/motd file 644 6"""
    )


def test_hard_links_are_one_number_whatever_the_number() -> None:
    entries = parse("/a file 644 1\n/b file 644 1 hardlink=/a\n/c file 644 1\n/d file 644 1 hardlink=/a")
    assert [e.hardlink for e in entries] == [0, 0, -1, 0]
    assert text(Entry(p, hardlink=n) for p, n in (("x", 7), ("y", 7))).endswith("/y file 0 0 hardlink=/x")


@pytest.mark.parametrize("bad", ["/etc", "/etc directory", "/etc dir 755 colour=blue", "/etc dir 755 blue"])
def test_what_is_no_entry_is_refused(bad: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        parse(bad)


@given(st.binary())
def test_escaping_carries_any_bytes(raw: bytes) -> None:
    string = os.fsdecode(raw)
    escaped = escape(string)
    assert unescape(escaped) == string
    assert len(escaped.split()) <= 1


def test_listing_shows_all_that_a_directory_says(tmp_path: Path) -> None:
    peers.need_root("device nodes and other owners")
    top = tmp_path / "top"
    (top / "etc").mkdir(parents=True)
    (top / "etc/motd").write_bytes(b"hello\n")
    os.setxattr(top / "etc/motd", "user.colour", b"blue")
    (top / "etc/copy").hardlink_to(top / "etc/motd")
    os.chown(top / "etc/motd", 1000, 100)
    (top / "lib").symlink_to("usr/lib")
    os.mknod(top / "null", 0o020666, os.makedev(1, 3))
    os.mkfifo(top / "fifo", 0o600)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(top / "sock"))
    modes = {"null": 0o666, "sock": 0o755, "etc/motd": 0o4711, "etc": 0o1777, "": 0o755}
    for path, mode in modes.items():
        os.chmod(top / path, mode)
    for path in ["etc/motd", "lib", "null", "fifo", "sock", "etc", ""]:
        os.utime(top / path, ns=(0, 1_500_000_000), follow_symlinks=False)
    digest = "sha256=5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    motd = f"file 4711 6 owner=1000:100 mtime=1.5 xattr.user.colour=blue{{}} {digest}"
    assert listing(top) == {
        "/": "/ dir 755 mtime=1.5",
        "/etc": "/etc dir 1777 mtime=1.5",
        "/etc/copy": f"/etc/copy {motd.format('')}",
        "/etc/motd": f"/etc/motd {motd.format(' hardlink=/etc/copy')}",
        "/fifo": "/fifo fifo 600 mtime=1.5",
        "/lib": "/lib symlink 777 mtime=1.5 -> usr/lib",
        "/null": "/null char 666 1:3 mtime=1.5",
        "/sock": "/sock socket 755 mtime=1.5",
    }
    short = listing(top, seconds=True, without_xattrs=["user."], skip=["/etc"])
    assert short["/"] == "/ dir 755 mtime=1"
    assert "/etc/motd" not in short


def test_differences_are_lines_of_either_side() -> None:
    a = {f"/{n}": line(Entry(n, Kind.FILE, mode=0o644), n) for n in "abc"}
    b = {**a, "/b": line(Entry("b", Kind.DIR, flags=Flag.OPAQUE), "b"), "/d": "/d file 644 0"}
    del b["/c"]
    assert differences(a, a) == ""
    assert differences(a, b) == "- /b file 644 0\n+ /b dir 0 opaque\n- /c file 644 0\n+ /d file 644 0"
    assert differences(a, b, limit=1) == "- /b file 644 0\n... and 3 lines more"
