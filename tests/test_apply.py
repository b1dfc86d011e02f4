"""One layer onto a directory: as GNU tar unpacks it, as the kernel's overlay then shows it, and as its Tree says."""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import kernel_overlay
import pytest
import rootfs
import tars
import treetext
from descriptors import open_descriptors
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kernel_overlay import SCRATCH, needs_kernel_overlay
from strategies import entries, marks
from tars import END, Slow, header, member, pax
from treetext import differences, listing, text
from users import SOMEBODY, somebody

from overlaykit.errors import InvalidLayer
from overlaykit.overlay.apply import apply_layer
from overlaykit.tree import (
    Entry,
    Flag,
    Kind,
    Losses,
    Tree,
    WhiteoutFormat,
    from_entries,
    index_tar,
    merge,
    regular,
    scan,
    write_tar,
)
from overlaykit.tree.tarball import WINDOW

ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="needs root for owners, devices and trusted.* xattrs")
OVERLAY = WhiteoutFormat.OVERLAY if ROOT else WhiteoutFormat.USERXATTR


@pytest.fixture
def target() -> Iterator[Path]:
    """An empty directory in memory, with room for xattrs of any length."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        target = Path(folder) / "target"
        target.mkdir(mode=0o755)
        yield target


def applied(data: bytes, target: Path, **options: object) -> tuple[Tree, Losses]:
    losses: Losses = []
    options.setdefault("whiteouts", OVERLAY)
    return apply_layer(io.BytesIO(data), target, losses=losses, **options), losses  # type: ignore[arg-type]


def tar_of(tree: Tree) -> bytes:
    out = io.BytesIO()
    write_tar(tree, lambda row: io.BytesIO(b"x" * int(tree.size[row])), out, subsecond=True)
    return out.getvalue()


# --- as GNU tar unpacks it --------------------------------------------------------------------------------------------


def gnu_tar(data: bytes, directory: Path) -> None:
    directory.mkdir(mode=0o755)
    command = ["tar", "-xp", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", os.fspath(directory)]
    subprocess.run(command, input=data, check=True)


@as_root
@pytest.mark.parametrize("form", ["gnu", "pax"])
@pytest.mark.parametrize("sparse", [[], ["--sparse"]])
def test_a_real_tree_is_unpacked_as_by_gnu_tar(tmp_path: Path, target: Path, form: str, sparse: list[str]) -> None:
    """Devices, setuid, capabilities, hard links, long names, names of any bytes, fifos, sticky directories; holes."""
    place = tmp_path / "place"
    place.mkdir()
    rootfs.write(tmp_path / "rootfs.tar")
    gnu_tar((tmp_path / "rootfs.tar").read_bytes(), tmp_path / "made")
    with (tmp_path / "made" / "holes").open("wb") as file:
        for at in (0, 1 << 20, 3 << 20):
            file.seek(at)
            file.write(b"x" * 5000)
        file.truncate(8 << 20)
    options = [f"--format={form}", *sparse, *(["--xattrs", "--xattrs-include=*"] if form == "pax" else [])]
    data = subprocess.run(["tar", "-c", *options, "-C", tmp_path / "made", "."], check=True, capture_output=True).stdout
    gnu_tar(data, tmp_path / "expected")
    tree, losses = applied(data, target)
    assert not losses
    assert differences(listing(tmp_path / "expected"), listing(target)) == ""
    assert tree == index_tar(io.BytesIO(data))
    assert scan(target) == scan(tmp_path / "expected")
    if sparse:
        assert (target / "holes").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("version", ["old", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("pieces", [0, 1, 2, 5, 40, 1000])
def test_sparse_files_of_every_form_stay_sparse(tmp_path: Path, target: Path, version: str, pieces: int) -> None:
    if pieces == 1000 and version == "0.0":
        pytest.skip("its header is larger than any entry's may be")
    place = tmp_path / "p"
    place.mkdir()
    rng = random.Random(pieces)
    with open(place / "s", "wb") as file:
        for number in range(pieces):
            file.seek(number * 16384 + 4096 * rng.randrange(3))
            file.write(rng.randbytes(rng.choice([1, 4096])))
        file.truncate(pieces * 16384 + 100_000)
    (place / "s").chmod(0o400)
    (place / "t").write_bytes(rng.randbytes(100))
    options = (
        ["--format=gnu", "--sparse"] if version == "old" else ["--format=pax", "--sparse", f"--sparse-version={version}"]
    )
    data = subprocess.run(["tar", "-c", *options, "-C", place, "s", "t"], check=True, capture_output=True).stdout
    for stream in (io.BytesIO(data), Slow(data, [1000, 7])):
        tree = apply_layer(stream, target, whiteouts=OVERLAY, losses=[])
        for name in "st":
            assert (target / name).read_bytes() == (place / name).read_bytes()
            assert (target / name).stat().st_mode == (place / name).stat().st_mode
            assert tree.entry(tree.find(name)).size == (place / name).stat().st_size
            (target / name).unlink()


def test_a_file_across_windows_after_a_sparse_one_is_whole(target: Path) -> None:
    """Sparse files used to be made when the others of their window were, and to end the file whose content was still to
    come: a layer with a sparse file and a large one soon after was unpacked with the large one cut short."""
    records = pax(GNU__sparse__size="9000", GNU__sparse__map="0,3,8000,2")
    body = random.Random(0).randbytes(3 * WINDOW)
    before = len(open_descriptors())
    applied(records + member("s", b"abcde") + member("large", body) + records + member("r", b"abcde") + END, target)
    assert (target / "large").read_bytes() == body
    for name in "sr":
        assert (target / name).read_bytes() == b"abc" + bytes(7997) + b"de" + bytes(998)
    assert len(os.listdir("/proc/self/fd")) == before


def test_of_a_sparse_file_and_another_the_later_counts(target: Path) -> None:
    sparse = pax(GNU__sparse__size="9", GNU__sparse__map="0,3") + member("s", b"abc")
    applied(sparse + member("s", b"later") + END, target)
    assert (target / "s").read_bytes() == b"later"


@pytest.mark.parametrize("size", [WINDOW - 1024, WINDOW - 512, WINDOW, WINDOW + 1, 3 * WINDOW - 513, 5])
@pytest.mark.parametrize("sizes", [[1 << 30], [4096, 511]])
def test_content_may_come_in_any_pieces(target: Path, size: int, sizes: list[int]) -> None:
    body = random.Random(size).randbytes(size)
    data = member("a", body, mode=0o4751, mtime=77) + member("b", b"after", mode=0) + END + b"trailing"
    stream = Slow(data, sizes)
    apply_layer(stream, target, whiteouts=OVERLAY, losses=[])
    assert (target / "a").read_bytes() == body
    assert (target / "b").stat().st_size == 5
    assert [(stat.S_IMODE((target / n).stat().st_mode)) for n in "ab"] == [0o4751, 0]
    assert (target / "a").stat().st_mtime == 77
    assert stream.at == len(data)


@as_root
@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_modes_do_not_depend_on_the_umask(target: Path, mask: int) -> None:
    data = b"".join(member(f"f{m:o}", b"x", mode=m) + header(f"d{m:o}", "5", mode=m) for m in (0, 0o644, 0o777, 0o6711))
    previous = os.umask(mask)
    try:
        tree, _ = applied(data + header("p", "6", mode=0o622) + header("d/e/f", "5", mode=0o700) + END, target)
    finally:
        os.umask(previous)
    assert [e for e in scan(target) if e.path] == [
        Entry(**{**{n: getattr(e, n) for n in e.__slots__}, "flags": Flag.NONE, "offset": -1}) for e in tree if e.path
    ]


def test_directories_keep_their_times_whatever_is_made_in_them(target: Path) -> None:
    data = header("./", "5", mtime=1) + header("d", "5", mtime=2) + header("d/e", "5", mtime=3, mode=0o500)
    data += (
        member("d/e/f", b"x", mtime=4) + header("d/l", "1", link="d/e/f") + header("d/.wh.gone") + header("d/x/.wh..wh..opq")
    )
    applied(data + END, target)
    assert [int((target / name).stat().st_mtime) for name in (".", "d", "d/e", "d/e/f", "d/l")] == [1, 2, 3, 4, 4]


# --- as its Tree says -------------------------------------------------------------------------------------------------


def law_layer(table: list[Entry]) -> Tree:
    try:
        return regular(from_entries(table), oci_names=True)
    except InvalidLayer:
        assume(False)
        raise


def on_disk(tree: Tree) -> list[str]:
    """The lines of what unpacking `tree` leaves: no whiteouts below opaque directories, and no directory is implied."""
    hidden: list[str] = []
    lines = []
    for e in tree:
        if e.kind == Kind.WHITEOUT and any(e.path.startswith(up) for up in hidden):
            continue
        if Flag.OPAQUE in e.flags:
            hidden.append(e.path + "/" if e.path else "")
        lines.append(Entry(**{**{n: getattr(e, n) for n in e.__slots__}, "flags": e.flags & ~Flag.IMPLIED}))
    return text(lines).splitlines()


def shuffled(data: bytes, rng: random.Random) -> bytes:
    """The archive with its entries in another order, headers and content of one entry kept together."""
    blocks, at = [], 0
    while any(data[at : at + 512]):
        end = at
        while True:
            kind, size = data[end + 156], int(data[end + 124 : end + 135], 8)
            end += 512 + -(-size // 512) * 512
            if kind not in b"xgLK":
                break
        blocks.append(data[at:end])
        at = end
    rng.shuffle(blocks)
    return b"".join(blocks) + END


formats = [WhiteoutFormat.USERXATTR, WhiteoutFormat.OCI, *([WhiteoutFormat.OVERLAY] if ROOT else [])]
# No xattrs on what is neither file nor directory: user.* cannot be set there. Directories that their owner can look into.
tables = st.lists(st.one_of(entries(), marks), max_size=9).map(
    lambda table: [
        Entry(e.path, e.kind, e.mode | 0o700 * (e.kind == Kind.DIR), size=e.size, mtime_ns=e.mtime_ns, link=e.link)
        for e in table
        if e.kind not in (Kind.CHAR, Kind.SYMLINK)
    ]
)


@pytest.mark.parametrize("form", formats)
@given(table=tables, rng=st.randoms(use_true_random=False))
def test_what_lies_on_disk_is_the_tree_in_whatever_order_the_entries_came(
    form: WhiteoutFormat, table: list[Entry], rng: random.Random
) -> None:
    layer = law_layer(table)
    data = tar_of(layer)
    for tar in (data, shuffled(data, rng)):
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            os.chmod(folder, 0o755)
            tree, _ = applied(tar, Path(folder), whiteouts=form)
            assert tree == layer
            owner = "" if ROOT else f" owner={os.geteuid()}:{os.getegid()}"
            assert text(scan(folder, whiteouts=form)).replace(owner, "").splitlines() == on_disk(layer)


@as_root
@given(st.lists(st.one_of(entries(), entries(), marks), max_size=9))
def test_any_layer_is_on_disk_what_its_tree_says(table: list[Entry]) -> None:
    """Also one with paths that stand twice, symlinked parents, and entries in a bad order."""
    data = b"".join(_member(e) for e in table) + END
    try:
        expected = index_tar(io.BytesIO(data))
    except InvalidLayer:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder, pytest.raises(InvalidLayer):
            applied(data, Path(folder))
        return
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        os.chmod(folder, 0o755)
        tree, _ = applied(data, Path(folder))
        assert tree == expected
        assert text(scan(folder, whiteouts=WhiteoutFormat.OVERLAY)).splitlines() == on_disk(tree)


def _member(e: Entry) -> bytes:
    types = {Kind.FILE: "0", Kind.SYMLINK: "2", Kind.CHAR: "3", Kind.DIR: "5", Kind.FIFO: "6"}
    device = (os.major(e.rdev), os.minor(e.rdev))
    fields = {"link": e.link or "", "mode": e.mode, "uid": e.uid, "mtime": e.mtime_ns // 10**9, "device": device}
    return tars.member(os.fsencode(e.path), b"x" * e.size, types[e.kind], **fields)


# --- whiteouts and opaque marks ---------------------------------------------------------------------------------------

MARKED = (
    header("d", "5", mode=0o700) + member("d/x", b"1") + header("d/.wh..wh..opq") + header("d/.wh.y") + header(".wh.gone")
    + header(".wh.r") + header("r", "5", mode=0o755) + header("n/e/.wh..wh..opq") + END
)  # fmt: skip


@pytest.mark.parametrize("form", [WhiteoutFormat.USERXATTR, pytest.param(WhiteoutFormat.OVERLAY, marks=as_root)])
def test_marks_are_as_overlayfs_has_them(target: Path, form: WhiteoutFormat) -> None:
    applied(MARKED, target, whiteouts=form)
    gone = (target / "gone").lstat()
    assert (stat.S_ISCHR(gone.st_mode), gone.st_rdev) == (True, 0)
    assert sorted(os.listdir(target)) == ["d", "gone", "n", "r"]
    assert os.listdir(target / "d") == ["x"]  # readdir would list a whiteout in an opaque directory
    for path in ("d", "r", "n/e"):
        assert os.getxattr(target / path, form.xattr_prefix + "opaque") == b"y"
    assert os.listxattr(target / "n") == []


def test_marks_as_files_if_asked_for(target: Path) -> None:
    applied(MARKED, target, whiteouts=WhiteoutFormat.OCI)
    files = sorted(os.fspath(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
    assert files == [".wh.gone", "d/.wh..wh..opq", "d/x", "n/e/.wh..wh..opq", "r/.wh..wh..opq"]
    assert text(scan(target, whiteouts=WhiteoutFormat.OCI)).count("opaque") == 3


def test_no_marks_if_asked_for(target: Path) -> None:
    tree, _ = applied(MARKED, target, whiteouts=WhiteoutFormat.NONE)
    assert tree.is_changeset
    assert sorted(os.fspath(p.relative_to(target)) for p in target.rglob("*")) == ["d", "d/x", "n", "n/e", "r"]
    assert os.listxattr(target / "d") == []


def test_a_whiteout_may_be_a_hard_link(target: Path) -> None:
    """It was looked for among the links that had to be made: KeyError."""
    tree, _ = applied(header(".wh.a") + header(".wh.b", "1", link=".wh.a") + header(".wh.c", "1", link="c") + END, target)
    assert [e.path for e in tree if e.kind == Kind.WHITEOUT] == ["a", "b", "c"]
    assert sorted(os.listdir(target)) == ["a", "b", "c"]


@as_root
def test_an_overlays_own_xattrs_in_a_tar_are_escaped(target: Path) -> None:
    """A layer that set them would hide names, or redirect a directory to any other."""
    data = pax(SCHILY__xattr__trusted__overlay__opaque="y", SCHILY__xattr__user__overlay__redirect="/") + header("d", "5")
    tree, _ = applied(data + END, target)
    assert sorted(os.listxattr(target / "d")) == ["trusted.overlay.overlay.opaque", "user.overlay.redirect"]
    assert scan(target, whiteouts=WhiteoutFormat.OVERLAY).entry(1).xattrs == tree.entry(1).xattrs


@as_root
def test_a_device_that_would_be_a_whiteout_is_a_loss(target: Path) -> None:
    data = (
        header("a", "3")
        + header("b", "1", link="a")
        + header("c")
        + header("c", "3", mode=0)
        + header("n", "3", device=(1, 3))
    )
    tree, losses = applied(data + END, target)
    assert [e.path for e in tree] == ["", "n"]
    assert os.listdir(target) == ["n"]
    assert sorted({loss.path for loss in losses}) == ["a", "b", "c"]


# --- the kernel's overlay over layers -----------------------------------------------------------------------------------


@needs_kernel_overlay
@pytest.mark.parametrize("form", [WhiteoutFormat.OVERLAY, WhiteoutFormat.USERXATTR])
@given(layers=st.lists(st.lists(st.one_of(entries(), marks), max_size=8), min_size=1, max_size=3))
# A directory that nobody wrote took the owner of the lower one also where an opaque directory lay in between.
@example(layers=[[Entry("b/a", Kind.DIR, 0o755, 1000)], [Entry("b/.wh..wh..opq"), Entry("b/a/.wh..wh..opq")]])
def test_the_kernel_shows_what_merge_says(form: WhiteoutFormat, layers: list[list[Entry]]) -> None:
    trees = [law_layer([e for e in table if e.kind != Kind.CHAR]) for table in layers]
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        base = Path(folder)
        folders = [base / str(number) for number in range(len(trees))]
        lowers: list[tuple[Path, Tree]] = []
        for directory, tree in zip(folders, trees, strict=True):
            directory.mkdir(mode=0o755)
            again, _ = applied(tar_of(tree), directory, whiteouts=form, lowers=lowers)
            lowers.append((directory, again))
        (base / "empty").mkdir()
        (base / "merged").mkdir()
        options = {"userxattr": True} if form is WhiteoutFormat.USERXATTR else {}
        with kernel_overlay.mounted([base / "empty", *folders], None, None, base / "merged", **options) as merged:
            shown = _names_that_are_there(merged)
        expected = merge(trees)
    # Symlinks and xattrs cannot be compared for what they cannot have; times of directories nobody wrote are lent.
    assert shown == {e.path: (e.kind, e.mode, e.uid, e.size, e.link) for e in expected if e.path}


def _names_that_are_there(merged: Path) -> dict[str, tuple[object, ...]]:
    """What is below a mount. Readdir lists whiteouts in directories that no other layer has: lstat knows them not."""
    found = {}
    for top, dirs, files in os.walk(merged):
        for name in dirs + files:
            path = os.path.join(top, name)
            try:
                info = os.lstat(path)
            except FileNotFoundError:
                continue
            kind = treetext.KINDS[stat.S_IFMT(info.st_mode)]
            link = os.readlink(path) if kind == Kind.SYMLINK else None
            size = info.st_size if kind == Kind.FILE else 0
            found[os.path.relpath(path, merged)] = (kind, stat.S_IMODE(info.st_mode), info.st_uid, size, link)
    return found


# --- hard links -------------------------------------------------------------------------------------------------------


def same_file(*paths: Path) -> bool:
    return len({(p.lstat().st_dev, p.lstat().st_ino) for p in paths}) == 1


def test_hard_links_to_later_names_along_chains_and_to_symlinks(target: Path) -> None:
    data = header("a", "1", link="b") + header("b", "1", link="z/c") + member("z/c", b"abc", mode=0o640)
    data += header("s", "2", link="nowhere") + header("t", "1", link="s")
    applied(data + END, target)
    assert same_file(target / "a", target / "b", target / "z/c")
    assert (target / "a").read_bytes() == b"abc"
    assert same_file(target / "s", target / "t")
    assert (target / "s").lstat().st_nlink == 2


def test_a_hard_link_takes_the_place_of_an_earlier_entry(target: Path) -> None:
    """Links are made last, and what an earlier entry of the path had made was in their way: EEXIST."""
    data = member("a", b"abc")
    for name, earlier in (("f", member("f", b"x")), ("s", header("s", "2", link="a")), ("d", member("d/e/f", b"x"))):
        data += earlier + header(name, "1", link="a")
    tree, _ = applied(data + END, target)
    assert same_file(*(target / name for name in "afsd"))
    assert [e.path for e in tree] == ["", "a", "d", "f", "s"]


LOWER = member("etc/f", b"lower", mode=0o4755, mtime=9) + header("etc/s", "2", link="f") + header("etc/d", "5")
LOWER += header("bin", "2", link="usr/bin") + member("usr/bin/perl", b"#!") + header("etc/p", "6", mode=0o600)


@pytest.mark.parametrize("size", [0, 5, WINDOW + 1, 3 * WINDOW])
def test_a_link_to_a_lower_file_becomes_a_copy_with_all_that_it_has(target: Path, tmp_path: Path, size: int) -> None:
    lower, body = tmp_path / "lower", random.Random(size).randbytes(size)
    lower.mkdir()
    fields = pax(SCHILY__xattr__user__k="v") + member("f", body, mode=0o4755, mtime=9)
    below, _ = applied(fields + END, lower)
    tree, losses = applied(header("a", "1", link="f") + header("b", "1", link="f") + END, target, lowers=[(lower, below)])
    assert (
        text(tree)
        == f"""\
/ dir 755 implied
/a file 4755 {size} mtime=9 xattr.user.k=v
/b file 4755 {size} mtime=9 xattr.user.k=v hardlink=/a"""
    )
    assert (target / "a").read_bytes() == body
    assert same_file(target / "a", target / "b")
    assert not same_file(target / "a", lower / "f")
    assert os.getxattr(target / "a", "user.k") == b"v"
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o4755
    assert (target / "a").stat().st_mtime == 9
    assert [str(loss) for loss in losses if loss.path] == ["/a: a hard link to a lower layer's file became a copy of it"]


def test_a_link_to_any_lower_file_is_copied_through_symlinked_directories_too(target: Path, tmp_path: Path) -> None:
    lower, second = tmp_path / "lower", tmp_path / "second"
    lower.mkdir()
    second.mkdir()
    lowers = [(lower, applied(LOWER + END, lower)[0])]
    lowers.append((second, applied(header("etc/g", "1", link="etc/f") + END, second, lowers=lowers)[0]))
    data = header("s", "1", link="etc/s") + header("p", "1", link="etc/p") + header("perl", "1", link="bin/perl")
    applied(data + header("g", "1", link="etc/g") + END, target, lowers=lowers)
    assert os.readlink(target / "s") == "f"
    assert stat.S_ISFIFO((target / "p").lstat().st_mode)
    assert (target / "perl").read_bytes() == b"#!"
    assert (target / "g").read_bytes() == b"lower"


@pytest.mark.parametrize("link", ["nowhere", "etc/d", "etc/f/x"])
def test_a_link_to_what_no_layer_has_is_named(target: Path, tmp_path: Path, link: str) -> None:
    (tmp_path / "lower").mkdir()
    below, _ = applied(LOWER + END, tmp_path / "lower")
    with pytest.raises(InvalidLayer, match=f"'a': a hard link to '{link}'"):
        applied(header("a", "1", link=link) + END, target, lowers=[(tmp_path / "lower", below)])


def test_a_lower_file_that_is_shorter_than_its_tree_is_an_error_and_no_endless_loop(target: Path, tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    below, _ = applied(LOWER + END, tmp_path / "lower")
    os.truncate(tmp_path / "lower" / "etc/f", 2)
    before = open_descriptors()
    with pytest.raises(OSError, match="shorter than 5 bytes") as caught:
        applied(header("a", "1", link="etc/f") + END, target, lowers=[(tmp_path / "lower", below)])
    assert caught.value.filename == "etc/f"
    assert os.listdir("/proc/self/fd") == before


def test_implied_directories_are_as_the_layers_below_have_them(target: Path, tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    below, _ = applied(
        header("root", "5", mode=0o700, mtime=7) + header("root/sub", "5", mode=0o711) + END, tmp_path / "lower"
    )
    tree, _ = applied(member("root/sub/f", b"x") + member("new/f") + END, target, lowers=[(tmp_path / "lower", below)])
    assert [stat.S_IMODE((target / p).stat().st_mode) for p in ("root", "root/sub", "new")] == [0o700, 0o711, 0o755]
    assert (target / "root").stat().st_mtime == 7
    assert tree.entry(tree.find("root")).flags == Flag.IMPLIED


# --- without root -----------------------------------------------------------------------------------------------------


def test_an_ordinary_user_keeps_the_tree_and_hears_of_what_the_disk_cannot(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.mkdir()
    data = (
        header("d", "5", uid=3, gid=4, mode=0o500)
        + member("d/f", b"x", uid=5, mode=0o4755)
        + header("null", "3", device=(1, 3))
    )
    data += header("n2", "1", link="null") + header("disk", "4", device=(7, 1)) + header("p", "6", mode=0o600)
    data += pax(SCHILY__xattr__trusted__k="v", SCHILY__xattr__user__k="v") + member("d/readonly", b"x", mode=0o444)
    data += pax(SCHILY__xattr__user__k="v") + header("l", "2", link="d") + header("d/.wh.gone") + header("e/.wh..wh..opq")
    data += pax(GNU__sparse__size="9", GNU__sparse__map="0,3") + member("d/sparse", b"abc", mode=0o400, uid=5)
    before = open_descriptors()
    with somebody(tmp_path, target):
        tree, losses = applied(data + END, target, whiteouts=WhiteoutFormat.USERXATTR)
        found = scan(target, whiteouts=WhiteoutFormat.USERXATTR)
    assert os.listdir("/proc/self/fd") == before
    assert tree == index_tar(io.BytesIO(data + END))
    user = os.geteuid() or SOMEBODY
    assert set(found.uid[found.kind != Kind.WHITEOUT].tolist()) == {user}
    assert [e.path for e in tree if found.find(e.path) < 0] == ["disk", "n2", "null"]
    assert found.entry(found.find("d/readonly")).xattrs == {"user.k": b"v"}
    assert [(e.mode, e.size) for e in found if e.path in ("d", "d/f", "d/readonly", "d/sparse")] == [
        (0o500, 0), (0o4755, 1), (0o444, 1), (0o400, 9)
    ]  # fmt: skip
    assert found.entry(found.find("d/gone")).kind == Kind.WHITEOUT
    assert Flag.OPAQUE in found.entry(found.find("e")).flags
    assert {loss.path: loss.what.partition(": ")[0] for loss in losses} == {
        "null": "device 1:3",
        "disk": "device 7:1",
        "n2": "a hard link to a device that was not made",
        "d/readonly": "xattr trusted.k",
        "l": "xattr user.k",
        "": "owners",
    }


def test_an_ordinary_user_cannot_make_roots_marks_and_hears_why(tmp_path: Path) -> None:
    with somebody(tmp_path), pytest.raises(PermissionError, match=r"trusted\.overlay\.opaque"):
        applied(header("d/.wh..wh..opq") + END, tmp_path, whiteouts=WhiteoutFormat.OVERLAY)


# --- errors -----------------------------------------------------------------------------------------------------------


class Failing(io.RawIOBase):
    """A stream that raises after so many bytes."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        self.inner, self.error = io.BytesIO(data), error

    def readinto(self, buffer: object) -> int:
        got = self.inner.readinto(buffer)  # type: ignore[arg-type]
        if not got:
            raise self.error
        return got


@pytest.mark.parametrize("error", [OSError(5, "no more"), KeyboardInterrupt(), ValueError("digest")])
@pytest.mark.parametrize("at", [0, 100, 512, 700, 1100, 1500, WINDOW + 5000])
def test_whatever_the_stream_raises_comes_out_and_nothing_stays_open(target: Path, error: BaseException, at: int) -> None:
    sparse = pax(GNU__sparse__size="9000000", GNU__sparse__map=f"0,{2 * WINDOW}")
    data = member("a", b"x") + sparse + member("s", bytes(2 * WINDOW))
    before = open_descriptors()
    with pytest.raises(type(error)) as caught:
        apply_layer(Failing(data[:at], error), target, whiteouts=OVERLAY, losses=[])
    assert caught.value is error
    assert os.listdir("/proc/self/fd") == before


@contextlib.contextmanager
def tmpfs(tmp_path: Path, options: str) -> Iterator[Path]:
    """A file system in memory that is soon full."""
    target = tmp_path / "full"
    target.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", target], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield target
    finally:
        subprocess.run(["umount", target], check=True)


@as_root
@pytest.mark.parametrize("size", [64 << 10, 300 << 10, 1 << 20, 2 << 20])
def test_a_full_disk_is_an_error_with_the_path_and_nothing_stays_open(tmp_path: Path, size: int) -> None:
    with tmpfs(tmp_path, f"size={size}") as target:
        data = b"".join(member(f"f{number}", b"x" * 300_000) for number in range(9))
        data += pax(GNU__sparse__size="9000000", GNU__sparse__map=f"0,{2 * WINDOW}") + member("s", bytes(2 * WINDOW))
        before = open_descriptors()
        with pytest.raises(OSError, match="No space left") as caught:
            applied(data + END, target)
        assert caught.value.errno == 28
        assert caught.value.filename in {*(f"f{number}" for number in range(9)), "s"}
        assert os.listdir("/proc/self/fd") == before


@as_root
@pytest.mark.parametrize("inodes", range(2, 12))
def test_no_more_inodes_likewise(tmp_path: Path, inodes: int) -> None:
    data = member("d/e/f", b"x") + header("d/l", "1", link="d/e/f") + header("s", "2", link="x") + header("p", "6")
    data += header("n", "3", device=(1, 3)) + header(".wh.w") + header("o/.wh..wh..opq") + header("q/.wh.z")
    with tmpfs(tmp_path, f"size=1m,nr_inodes={inodes}") as target:
        with pytest.raises(OSError, match="No space left") as caught:
            applied(data + END, target)
        assert caught.value.filename in ("d/e/f", "d/l", "s", "p", "n", "w", "o", "q/z")


def test_descriptors_that_run_out_are_an_error_and_none_stays_open(target: Path) -> None:

    data = member("a/b/c/d/f", b"x") + pax(SCHILY__xattr__user__k="v") + member("a/g", b"x") + header("l/.wh.x")
    data += pax(GNU__sparse__size="9", GNU__sparse__map="0,3") + member("s", b"abc") + header("h", "1", link="s")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = sorted(open_descriptors(), key=int)
    outcomes = set()
    for number in range(len(before) + 12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(number, 3), limit[1]))
        try:
            applied(data + END, target)
            outcomes.add(0)
        except OSError as e:
            outcomes.add(e.errno)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert sorted(os.listdir("/proc/self/fd"), key=int) == before
        subprocess.run(["rm", "-rf", target], check=True)
        target.mkdir()
    assert outcomes == {0, 24}


def test_ctrl_c_ends_it_soon(target: Path) -> None:
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))

    class Endless(io.RawIOBase):
        number = 0

        def readinto(self, buffer: object) -> int:
            view = memoryview(buffer)  # type: ignore[call-overload]
            self.number += 1
            if self.number == 1:
                timer.start()
            view[:512] = header(f"f{self.number}")
            return 512

    before = open_descriptors()
    with pytest.raises(KeyboardInterrupt):
        apply_layer(Endless(), target, whiteouts=OVERLAY, losses=[])
    timer.join()
    assert os.listdir("/proc/self/fd") == before


def test_a_lone_entry_keeps_its_owner_in_the_tree(tmp_path: Path) -> None:
    """The ids that the disk gets were written over those that the tree had: they were one array, for a window of one row."""
    target = tmp_path / "t"
    target.mkdir()
    with somebody(tmp_path, target):
        tree, _ = applied(member("f", b"x", uid=5, gid=6) + END, target, whiteouts=WhiteoutFormat.USERXATTR)
    assert (tree.entry(1).uid, tree.entry(1).gid) == (5, 6)
