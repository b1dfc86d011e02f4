"""Layer tars out: read back the same by us and by other tools, the same bytes each time, and nothing lost in silence."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import treetext
from descriptors import open_descriptors
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import entries, hardlinked, marks, paths
from tars import by_python
from treetext import text

from overlaykit.errors import InvalidLayer
from overlaykit.tree import Entry, Flag, Kind, Loss, Losses, Tree, from_entries, index_tar, regular, scan, write_tar


def written(tree: Tree, contents: dict[str, bytes] | None = None, **options: object) -> bytes:
    """The tar of `tree`, a file's content being its path over and over unless `contents` says otherwise."""

    def content(row: int) -> io.BytesIO:
        entry = tree.entry(row)
        body = (contents or {}).get(entry.path)
        if body is None:
            body = (os.fsencode(entry.path) * (entry.size // max(len(entry.path), 1) + 1))[: entry.size]
        return io.BytesIO(body)

    out = io.BytesIO()
    write_tar(tree, content, out, **options)  # type: ignore[arg-type]
    return out.getvalue()


def law_layer(table: list[Entry]) -> Tree:
    try:
        return regular(from_entries(table), oci_names=True)
    except InvalidLayer:
        assume(False)
        raise


odd_names = st.text(st.sampled_from("aé€ \n\\:=%\udcff\udc80"), min_size=1, max_size=3).map(lambda n: n * 40)
odd_paths = st.lists(odd_names, min_size=1, max_size=4).map("/".join).filter(lambda p: len(os.fsencode(p)) < 3000)
odd_entries = st.builds(
    lambda e, uid, gid, size, seconds, ns, xattrs: replace(
        e,
        uid=uid,
        gid=gid,
        size=size if e.kind == Kind.FILE else 0,
        mtime_ns=seconds * 10**9 + ns,
        xattrs=xattrs,
        rdev=os.makedev(uid % 4096, gid % (1 << 20)) if e.kind == Kind.CHAR else 0,
    ),
    entries(odd_paths),
    st.sampled_from([0, 8**7 - 1, 8**7, 0xFFFFFFFE]),
    st.integers(0, 0xFFFFFFFE),
    st.sampled_from([0, 1, 511, 512, 513]),
    st.one_of(st.integers(-(2**33), 2**33), st.sampled_from([8**11 - 1, 8**11, -1])),
    st.sampled_from([0, 1, 500_000_000, 999_999_999]),
    st.dictionaries(
        st.sampled_from(["user.k", "user.a=b", "user.50%", "user.%3D", "user.%2525=", "user.é\udcff"]), st.binary()
    ),
)
lower_links = st.builds(lambda path, to: Entry(path, flags=Flag.LOWER_LINK, link=to, mode=0o644), paths, paths)
tables = st.lists(st.one_of(entries(), odd_entries, marks, lower_links), max_size=9).map(hardlinked)


@given(tables)
def test_what_is_written_is_read_back(table: list[Entry]) -> None:
    layer = law_layer(table)
    assert index_tar(io.BytesIO(written(layer, subsecond=True))) == layer


@given(st.lists(st.one_of(entries(), odd_entries), max_size=9).map(hardlinked))
def test_python_reads_it_as_we_do(table: list[Entry]) -> None:
    layer = law_layer([e for e in table if not any("=" in name or "%" in name for name in e.xattrs)])
    data = written(layer, subsecond=True)
    # tarfile wants a number to be positive, and takes times as floats.
    ours, theirs = (
        text([replace(e, mtime_ns=max(e.mtime_ns, 0)) for e in t]) for t in (index_tar(io.BytesIO(data)), by_python(data))
    )
    assert ours == theirs


@given(tables)
def test_the_same_tree_gives_the_same_bytes(table: list[Entry]) -> None:
    layer = law_layer(table)
    again = regular(from_entries([*layer][::-1]))
    assume(again == layer)
    assert written(layer) == written(again)


def test_the_bytes_of_a_small_layer_stay_what_they_are() -> None:
    """A digest that changes from one release to the next uploads every layer again."""
    layer = treetext.tree("""\
        / dir 755
        /d dir 700 owner=1000:1000 mtime=1500000000.75 xattr.user.k=v
        /d/f file 4755 3 mtime=1500000000
        /d/g file 4755 3 mtime=1500000000 hardlink=/d/f
        /gone whiteout
        /l symlink -> d
        /null char 666 1:3
    """)
    assert hashlib.sha256(written(layer)).hexdigest() == "07b42f30c0b5a01bc0d9cc4a92f934cb8d942f299a28f957deb3fab9f9f0755d"


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


def test_rows_go_in_tree_order_whiteouts_before_their_siblings() -> None:
    layer = treetext.tree(
        "/ dir 755\n/a dir 755\n/a/x file 644 0\n/a/z whiteout\n/b dir 755 opaque\n/b/f file 644 0\n/z whiteout"
    )
    assert names(written(layer)) == [".", ".wh.z", "a", "a/.wh.z", "a/x", "b", "b/.wh..wh..opq", "b/f"]


def test_directories_that_nobody_wrote_stay_unwritten() -> None:
    """Written as 0755 of root they would change what the layer below says of them, /root's 0700 say."""
    layer = treetext.tree("/root/.bashrc file 644 0\n/etc/gone whiteout\n/var/lib dir 755 opaque implied")
    assert names(written(layer)) == ["etc/.wh.gone", "root/.bashrc", "var/lib/.wh..wh..opq"]
    # One that is all there is of itself must be written to be there.
    assert names(written(treetext.tree("/empty dir 755 implied"))) == ["empty"]


def test_links_carry_what_their_file_has() -> None:
    """Docker gives the file the mode and owner that a link's header says, and a change of owner takes its capabilities."""
    layer = treetext.tree(
        "/a file 4755 1 owner=5:6 mtime=7 xattr.user.k=v\n/b file 4755 1 owner=5:6 mtime=7 xattr.user.k=v hardlink=/a"
    )
    with tarfile.open(fileobj=io.BytesIO(written(layer))) as tar:
        a, b = tar.getmembers()
    assert (b.type, b.linkname, b.size) == (tarfile.LNKTYPE, "a", 0)
    assert all(getattr(a, name) == getattr(b, name) for name in ("mode", "uid", "gid", "mtime", "pax_headers"))


def test_times_are_cut_to_seconds_and_clamped() -> None:
    layer = treetext.tree("/a file 644 0 mtime=1.9\n/b file 644 0 mtime=100\n/c file 644 0 mtime=-1.5")

    def times(**options: object) -> list[int]:
        return [e.mtime_ns for e in index_tar(io.BytesIO(written(layer, **options))) if e.path]

    assert times() == [10**9, 100 * 10**9, -2 * 10**9]
    assert times(subsecond=True) == [1_900_000_000, 100 * 10**9, -1_500_000_000]
    assert times(source_date_epoch=50) == [10**9, 50 * 10**9, -2 * 10**9]
    assert times(source_date_epoch=1, subsecond=True) == [10**9, 10**9, -1_500_000_000]


# --- what a layer cannot carry ----------------------------------------------------------------------------------------


def losses_of(tree: Tree) -> tuple[Tree, list[str]]:
    losses: Losses = []
    data = written(tree, losses=losses)
    assert all(isinstance(loss, Loss) for loss in losses)
    return index_tar(io.BytesIO(data)), [str(loss) for loss in losses]


def test_sockets_and_the_hosts_xattrs_are_reported() -> None:
    tree = from_entries([Entry("f", xattrs={"security.selinux": b"x", "user.k": b"v"}), Entry("s", Kind.SOCKET)])
    read, losses = losses_of(regular(tree))
    assert [(e.path, [*e.xattrs]) for e in read] == [("", []), ("f", ["user.k"])]
    assert losses == ["/f: xattr security.selinux: belongs to the host", "/s: a socket: layers have none"]


def test_names_that_would_read_back_as_whiteouts_are_reported_and_left_out() -> None:
    """A program in a container that made a file .wh.etc had /etc removed from the image that was committed."""
    tree = from_entries(
        [
            Entry(".wh.etc", size=3, hardlink=0),
            Entry("a", size=3, hardlink=0),
            Entry("d/.wh..wh..opq"),
            Entry("e/.wh.x", Kind.DIR),
            Entry("e/.wh.x/f"),
            Entry("e/.wh.y", Kind.WHITEOUT),
        ]
    )
    read, losses = losses_of(regular(tree))
    assert [(e.path, e.kind, e.size) for e in read if not e.flags] == [("a", Kind.FILE, 3)]
    assert not read.is_changeset
    assert [loss.partition(":")[0] for loss in losses] == [
        "/.wh.etc", "/d/.wh..wh..opq", "/e/.wh.y", "/e/.wh.x", "/e/.wh.x/f",
    ]  # fmt: skip


V2 = bytes.fromhex("0100000200200000000000000000000000000000")
V3 = bytes.fromhex("010000030020000000000000000000000000000000000000")


@pytest.mark.parametrize(
    ("value", "expected", "lost"),
    [(V2, V2, 0), (V3, V2, 0), (V3[:20] + b"\xe8\x03\0\0", V2, 1), (b"", b"", 0), (b"\3" * 24, b"\3\3\3\2" + b"\3" * 16, 1)],
)
def test_capabilities_are_written_in_version_2(value: bytes, expected: bytes, lost: int) -> None:
    read, losses = losses_of(regular(from_entries([Entry("f", xattrs={"security.capability": value})])))
    assert read.entry(1).xattrs == {"security.capability": expected}
    assert len(losses) == lost


@pytest.mark.parametrize("name", ["trusted.overlay.redirect", "trusted.overlay.metacopy", "user.overlay.metacopy"])
def test_an_overlays_marks_must_be_resolved_first(name: str) -> None:
    with pytest.raises(InvalidLayer, match=f"'d/f': {name}"):
        written(regular(from_entries([Entry("d/f", xattrs={name: b"x"})])))


@pytest.mark.parametrize("body", [b"", b"12", b"1234"])
def test_a_file_of_another_length_than_announced_is_named(body: bytes) -> None:
    with pytest.raises(InvalidLayer, match=r"'f': .*3"):
        written(regular(from_entries([Entry("f", size=3)])), {"f": body})


def test_the_content_is_closed_whatever_happens() -> None:
    layer = regular(from_entries([Entry("f", size=3)]))
    before = open_descriptors()
    for source in ("/dev/zero", "/dev/null"):
        out = io.BytesIO()
        with pytest.raises(InvalidLayer):
            write_tar(layer, lambda row, path=source: os.open(path, os.O_RDONLY), out)
    assert os.listdir("/proc/self/fd") == before


# --- other tools ------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, Path]:
    """A directory with names that need every kind of header, and its tar."""
    place = tmp_path / "place"
    place.mkdir()
    for name in ("plain", "é", "n" * 101, "d" * 100 + "/" + "f" * 100, "d" * 60 + "/" + "e" * 60 + "/f", "two words\n"):
        file = place / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(name)
        os.utime(file, ns=(0, 1_500_000_000_500_000_000))
    (place / "l").symlink_to("é" * 60)
    (place / "hard").hardlink_to(place / "plain")
    (place / "plain").chmod(0o4711)
    os.setxattr(place / "plain", "user.a=b%", b"\0v")
    os.mkfifo(place / "pipe")
    if os.geteuid() == 0:
        (place / "owned").mkdir()
        os.chown(place / "owned", 8**7, 0xFFFFFFFE)
        os.setxattr(place / "l", "trusted.k", b"v", follow_symlinks=False)
        os.mknod(place / "null", 0o020666, os.makedev(1, 3))
    tree = scan(place)
    tar = tmp_path / "layer.tar"
    with tar.open("wb") as out:
        write_tar(tree, lambda row: os.open(place / tree.path(row), os.O_RDONLY), out, subsecond=True)
    return place, tar


@pytest.mark.parametrize("tool", [["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner"], ["bsdtar"]])
def test_other_tools_unpack_what_was_there(packed: tuple[Path, Path], tmp_path: Path, tool: list[str]) -> None:
    if shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed")
    place, tar = packed
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run([*tool, "-xpf", tar, "-C", out], check=True)
    found, expected = scan(out), scan(place)
    if tool[0] != "tar":  # bsdtar leaves the root's time, and has xattrs named with "=" in another form
        found, expected = (t.with_columns(xattrs=t.xattrs * 0 - 1) for t in (found, expected))
    assert text(list(found)[1:]) == text(list(expected)[1:])


def test_gnu_tar_lists_it_without_a_word(packed: tuple[Path, Path]) -> None:
    done = subprocess.run(["tar", "-tvf", packed[1]], check=True, capture_output=True)
    assert done.stderr == b""
