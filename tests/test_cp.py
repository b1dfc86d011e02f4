"""cp beyond Docker's rules: owners, patterns, excludes, what is kept, what is lost, and what hostile trees and tars try."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import ours
import peers
import pytest
import rootfs
from faults import run_killed
from treetext import differences, listing
from users import somebody

import overlaykit
from overlaykit.errors import InvalidReference, NotFound, OverlaykitError, Unsupported
from overlaykit.overlay import probe
from overlaykit.overlay.folder import Folder
from overlaykit.store.copying import copy
from overlaykit.store.places import clean, split
from overlaykit.store.putting import TEMPORARY

Store = overlaykit.Store


@pytest.fixture
def box(store: Store, tmp_path: Path) -> overlaykit.Container:
    rootfs.write(tmp_path / "rootfs.tar")
    return store.create(store.import_rootfs(tmp_path / "rootfs.tar", "base:1", changes=["USER user"]), name="box")


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A tree on the host."""
    top = tmp_path / "src"
    (top / "sub").mkdir(parents=True)
    for name in ("a.conf", "b.conf", "c.log", "sub/d.log", "sub/e.conf"):
        (top / name).write_text(f"{name}\n")
    return top


def names(fs: Any, path: str) -> list[str]:
    return sorted(fs.listdir(path))


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("box:/etc", ("container", "box", "/etc")),
        ("box:etc:x", ("container", "box", "etc:x")),
        ("volume:data:/a:/b", ("volume", "data", "/a:/b")),
        ("image:host:5000/a/b:1:/etc", ("image", "host:5000/a/b:1", "/etc")),
        ("volume:/etc", ("container", "volume", "/etc")),
        ("image:", ("container", "image", "")),
        ("/a:b", ("host", "", "/a:b")),
        ("./a:b", ("host", "", "./a:b")),
        ("dir/a:b", ("host", "", "dir/a:b")),
        ("plain", ("host", "", "plain")),
    ],
)
def test_an_address_says_which_place(address: str, expected: tuple[str, str, str]) -> None:
    assert split(address) == expected


@pytest.mark.parametrize("address", [":/etc", "volume:data", "image:debian:12"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidReference):
        split(address)


def test_a_clean_path_keeps_what_its_end_asks_for() -> None:
    assert [clean(p) for p in ("a", "/a/../b/", "a/.", "/", "../..", "a//b/./c/.")] == [
        "/a", "/b/", "/a/.", "/", "/", "/a/b/c/.",
    ]  # fmt: skip
    assert [clean(p, "/x") for p in (".", "..", "./", "y")] == ["/x/.", "/", "/x/", "/x/y"]


def test_two_paths_on_the_host_are_nothing_for_us(store: Store, src: Path) -> None:
    with pytest.raises(InvalidReference, match="neither SRC nor DST"):
        store.cp(src, src / "new")


@pytest.mark.usefixtures("box")
def test_images_are_read_only(store: Store, src: Path, tmp_path: Path) -> None:
    store.cp("image:base:1:/etc/motd", tmp_path / "motd")
    assert (tmp_path / "motd").read_text() == "welcome\n"
    with pytest.raises(InvalidReference, match="images never change"):
        store.cp(src, "image:base:1:/etc")
    with pytest.raises(NotFound):
        store.cp("nobody:/etc", tmp_path / "etc")


def test_a_volume_is_a_place_of_its_own(store: Store, box: overlaykit.Container, src: Path, tmp_path: Path) -> None:
    volume = store.create_volume("data").mountpoint
    (volume / "out").symlink_to(src)  # leads nowhere: the volume is its root
    store.cp("box:/lib/deep", "volume:data:/")
    store.cp(f"{src}/.", "volume:data:/deep", owner="5:6")
    assert names(os, volume / "deep") == ["a.conf", "b.conf", "c.log", "er", "one", "sub", "two", "uno"]  # type: ignore[arg-type]
    assert (volume / "deep/a.conf").stat().st_uid in (5, os.getuid() or 5)
    store.cp("volume:data:/deep/a.conf", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "a.conf\n"
    with pytest.raises(FileNotFoundError, match=r"volume:data:/out/a\.conf"):
        store.cp("volume:data:/out/a.conf", tmp_path / "back")
    with pytest.raises(FileNotFoundError):
        store.cp(src / "a.conf", "volume:data:/out/new")
    for name in ("none", "..", "a b"):
        with pytest.raises(NotFound):
            store.cp(f"volume:{name}:/x", tmp_path / "back")


# --- what is copied ---------------------------------------------------------------------------------------------------


def test_patterns_and_several_sources(store: Store, box: overlaykit.Container, src: Path, tmp_path: Path) -> None:
    copy(store, [src / "a.conf", f"{src}/sub/*", f"{src}/c.*"], "box:/tmp")
    assert {"a.conf", "c.log", "d.log", "e.conf"} <= set(names(box.fs, "/tmp"))
    with pytest.raises(InvalidReference, match="2 sources want a directory"):
        store.cp(f"{src}/*.conf", "box:/new")
    with pytest.raises(FileNotFoundError, match=r"\*\.none"):
        store.cp(f"{src}/*.none", "box:/tmp")
    (tmp_path / "out").mkdir()
    store.cp("box:/tmp/*.log", tmp_path / "out")
    assert names(os, tmp_path / "out") == ["c.log", "d.log"]  # type: ignore[arg-type]


def test_a_name_that_is_there_is_no_pattern(store: Store, box: overlaykit.Container, src: Path) -> None:
    (src / "*.conf").write_text("a star\n")
    store.cp(f"{src}/*.conf", "box:/one")
    assert box.fs.read_bytes("/one") == b"a star\n"


def test_excludes_fit_names_and_paths(store: Store, box: overlaykit.Container, src: Path) -> None:
    store.cp(src, "box:/x", exclude=["*.log", "sub/e*"])
    assert (names(box.fs, "/x"), names(box.fs, "/x/sub")) == (["a.conf", "b.conf", "sub"], [])
    store.cp(src, "box:/y", exclude=["sub"])
    assert names(box.fs, "/y") == ["a.conf", "b.conf", "c.log"]


def test_holes_hard_links_times_and_xattrs_are_kept(
    store: Store, box: overlaykit.Container, src: Path, tmp_path: Path
) -> None:
    with (src / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"island")
    os.link(src / "a.conf", src / "link")
    os.setxattr(src / "b.conf", "user.colour", b"\0blue\xff")
    os.utime(src / "b.conf", ns=(1, 1_600_000_000_123_456_789))
    store.cp(src, "box:/x")
    store.cp("box:/x", tmp_path / "back")
    assert differences(listing(src), listing(tmp_path / "back")) == ""
    assert (tmp_path / "back/sparse").stat().st_blocks * 512 < 4 << 20
    assert box.fs.stat("/x/link").st_nlink == 2


def test_a_socket_is_a_loss_and_no_error(
    store: Store, box: overlaykit.Container, src: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(src)
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("sock")
    copied = store.cp(src, "box:/x")
    assert [str(loss) for loss in copied.losses] == ["/x/sock: a socket: no copy could be connected to"]
    assert "sock" not in names(box.fs, "/x")


def test_progress_says_how_many_bytes(store: Store, box: overlaykit.Container, src: Path) -> None:
    said: list[tuple[str, int, int]] = []
    copied = store.cp(src, "box:/x", progress=lambda *args: said.append(args))
    assert said[-1] == ("copy", copied.size, 0)
    assert (copied.entries, copied.size) == (7, sum(p.stat().st_size for p in src.rglob("*") if p.is_file()))


def test_a_container_is_copied_to_another_and_to_itself(store: Store, box: overlaykit.Container, src: Path) -> None:
    other = store.create("base:1", name="other")
    store.cp("box:/lib", "other:/copied")
    expected, found = (listing(p, fs=c.fs) for c, p in ((box, "/lib"), (other, "/copied")))
    assert differences(expected, found) == ""
    store.cp("box:/lib/deep", "box:/lib/deeper")
    assert names(box.fs, "/lib/deeper") == ["er", "one", "two", "uno"]
    for inside in ("/lib/deep", "/lib/deep/er/new", "/lib"):
        with pytest.raises(Unsupported, match="into itself"):
            store.cp("box:/lib", f"box:{inside}")


def test_files_that_are_open_elsewhere_stay_open(store: Store, box: overlaykit.Container, src: Path) -> None:
    fs = box.fs
    store.cp(src, "box:/x")
    assert not fs.closed
    store.close_overlay(box.id)
    store.cp(src, "box:/y")
    assert not store.is_open(box.id)


def test_a_mounted_container_is_copied_to_and_from_through_its_mount(
    store: Store, box: Any, src: Path, tmp_path: Path
) -> None:
    peers.need_root("mounts")
    place = box.mount()
    try:
        store.cp(src / "a.conf", "box:/var/run/a")
        assert (place / "tmp/a").read_text() == "a.conf\n"
        (place / "live").write_text("written meanwhile\n")
        store.cp("box:/live", tmp_path / "live")
        assert (tmp_path / "live").read_text() == "written meanwhile\n"
    finally:
        box.unmount()
    assert "A /tmp/a" in [f"{c.kind} {c.path}" for c in box.diff()]


# --- owners -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "new", "old"),
    [
        (None, (7, 8), (7, 8)),
        ("source", (7, 8), (7, 8)),
        ("container", (1000, 1000), (1000, 1000)),
        ("keep", (0, 4), (3, 4)),
        ("caller", (0, 4), (0, 4)),  # the directory is setgid
        ("5:6", (5, 6), (5, 6)),
    ],
)
def test_owners(owner: str | None, new: tuple[int, int], old: tuple[int, int], store: Store, box: Any, src: Path) -> None:
    peers.need_root("other owners")
    for name in ("new", "messages"):
        (src / name).write_text("x")
        os.chown(src / name, 7, 8)
        store.cp(src / name, "box:/var/log", owner=owner)  # a directory 0:4 with messages, which is 3:4
    assert [(st.st_uid, st.st_gid) for st in map(box.fs.stat, ("/var/log/new", "/var/log/messages"))] == [new, old]


def test_owners_on_the_host(store: Store, box: overlaykit.Container, tmp_path: Path) -> None:
    peers.need_root("other owners")
    store.cp("box:/home/user/notes", tmp_path / "a")
    store.cp("box:/home/user/notes", tmp_path / "b", owner="source")
    assert [(tmp_path / name).stat().st_uid for name in "ab"] == [0, 1000]
    with pytest.raises(Unsupported, match="does not go to a container"):
        store.cp("box:/etc/motd", tmp_path / "c", owner="container")


@pytest.mark.parametrize("owner", ["nobody", "1", "1:", ":1", "-1:0", "1:2:3", f"{2**32 - 1}:0"])
def test_an_owner_that_is_none_is_refused(owner: str, store: Store, box: overlaykit.Container, src: Path) -> None:
    with pytest.raises(InvalidReference, match="is none"):
        store.cp(src, "box:/x", owner=owner)


def test_without_root_owners_are_a_loss_only_if_asked_for(tmp_path: Path, src: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    rootfs.write(tmp_path / "rootfs.tar")
    out = io.BytesIO()
    overlaykit.View([src]).close()  # what Python imports for the first one need not be somebody's to read
    with somebody(home), Store(home / "store") as store:
        store.create(store.import_rootfs(tmp_path / "rootfs.tar", "base:1"), name="box")
        assert store.cp(src, "box:/x").losses == []
        assert "owner 5:6: only root" in str(store.cp(src / "a.conf", "box:/y", owner="5:6").losses[0])
        store.cp("box:/x", home / "back")
        store.cp("box:/x", out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        assert {(member.uid, member.gid) for member in tar} == {(0, 0)}
    assert names(os, home / "back") == names(os, src)  # type: ignore[arg-type]


# --- nothing half done ------------------------------------------------------------------------------------------------


def test_a_copy_that_fails_leaves_whole_files_only(store: Store, box: overlaykit.Container, src: Path) -> None:
    """A tar that ends inside its second file: the first is there, whole, and the second as it was before."""
    box.fs.write_bytes("/tmp/b.conf", b"as it was\n")
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(src / "a.conf", "a.conf")
        tar.add(src / "b.conf", "b.conf")
    cut = whole.getvalue()[: 3 * 512 + 4]
    with pytest.raises(OverlaykitError, match="ends early"):
        store.cp(io.BytesIO(cut), "box:/tmp")
    assert (box.fs.read_bytes("/tmp/a.conf"), box.fs.read_bytes("/tmp/b.conf")) == (b"a.conf\n", b"as it was\n")
    assert [name for name in names(box.fs, "/tmp") if name.startswith(TEMPORARY)] == []


def test_a_full_disk_leaves_whole_files_only(store: Store, box: overlaykit.Container, tmp_path: Path) -> None:
    peers.need_root("mounts")
    (tmp_path / "small").mkdir()
    box.fs.write_bytes("/x", b"1" * (1 << 20))
    box.fs.write_bytes("/y", b"2" * (3 << 20))
    peers.run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path / "small")
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            copy(store, ["box:/x", "box:/y"], tmp_path / "small")
        assert caught.value.filename == f"{tmp_path}/small/y"
        assert names(os, tmp_path / "small") == ["x"]  # type: ignore[arg-type]
    finally:
        peers.run("umount", "--lazy", tmp_path / "small")  # the traceback holds it


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child does not touch what other threads hold
def test_a_copy_that_is_killed_leaves_whole_files_only(store: Store, box: overlaykit.Container, src: Path) -> None:
    box.fs.makedirs("/x/sub")
    box.fs.write_bytes("/x/sub/d.log", b"as it was\n")
    wanted = {f"/x/{path.relative_to(src)}": path.read_bytes() for path in src.rglob("*") if path.is_file()}
    store.close()
    step, done = 0, False
    while not done:
        done = not run_killed(store.root, lambda killed: killed.cp(f"{src}/.", "box:/x"), step)
        step += 1 + step // 10
        with Store(store.root) as after, after.container("box").view() as view:
            for directory, _, files in view.walk("/x"):
                for name in files:
                    content, path = view.read_bytes(f"{directory}/{name}"), f"{directory}/{name}"
                    was_before = path == "/x/sub/d.log" and content == b"as it was\n"
                    assert was_before or content in ([wanted[path]] if path in wanted else wanted.values())
    assert step > 20
    with Store(store.root) as after, after.container("box") as container:
        assert {path: container.fs.read_bytes(path) for path in wanted} == wanted


def test_a_file_system_without_unnamed_files_will_do(store: Store, box: overlaykit.Container, tmp_path: Path) -> None:
    """Many FUSE file systems have none: there a copy has its other name from the beginning."""
    peers.need_root("mounts")
    for part in ("lower", "upper", "work", "merged"):
        (tmp_path / part).mkdir()
    options = ",".join(f"{part}dir={tmp_path / part}" for part in ("lower", "upper", "work"))
    peers.run("fuse-overlayfs", "-o", options, tmp_path / "merged")
    try:
        with pytest.raises(OSError, match="not supported"):
            os.open(tmp_path / "merged", os.O_TMPFILE | os.O_WRONLY)
        store.cp("box:/home/user", tmp_path / "merged")
        assert (tmp_path / "merged/user/notes").read_bytes() == box.fs.read_bytes("/home/user/notes")
        assert os.listdir(tmp_path / "merged/user") == ["notes"]
    finally:
        peers.run("umount", tmp_path / "merged")


def test_progress_goes_on_inside_a_big_file(store: Store, box: overlaykit.Container, src: Path) -> None:
    (src / "big").write_bytes(b"x" * (130 << 20))
    said: list[int] = []
    store.cp(src / "big", "box:/big", progress=lambda what, done, total: said.append(done))
    assert said[-1] == 130 << 20
    assert len(said) > 1 or probe(src).reflink  # that is one step, whatever the size


def test_a_file_is_replaced_in_one_step(store: Store, box: overlaykit.Container, src: Path) -> None:
    """Whoever has the old one open goes on reading the old one."""
    with box.fs.open("/etc/motd") as old:
        store.cp(src / "a.conf", "box:/etc/motd")
        assert old.read() == "welcome\n"
    assert box.fs.read_bytes("/etc/motd") == b"a.conf\n"
    assert [str(c.path) for c in box.diff()] == ["/etc", "/etc/motd"]


# --- hostile trees and tars -------------------------------------------------------------------------------------------


def sent(*members: tuple[str, bytes, str | bytes]) -> io.BytesIO:
    """A tar of (name, type, target or content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content
                tar.addfile(info)
    return io.BytesIO(out.getvalue())


ESCAPES = {
    "dots": sent(("../outside", tarfile.REGTYPE, b"x")),
    "dots inside": sent(("a/../../outside", tarfile.REGTYPE, b"x")),
    "through an absolute link": sent(("l", tarfile.SYMTYPE, "HOST"), ("l/outside", tarfile.REGTYPE, b"x")),
    "through a relative link": sent(("l", tarfile.SYMTYPE, "../../../../../HOST"), ("l/outside", tarfile.REGTYPE, b"x")),
    "over a link": sent(("l", tarfile.SYMTYPE, "HOST/outside"), ("l", tarfile.REGTYPE, b"x")),
    "hard link to the host": sent(("l", tarfile.LNKTYPE, "HOST/secret"), ("l", tarfile.REGTYPE, b"x")),
    "hard link with dots": sent(("l", tarfile.LNKTYPE, "../../../../../../HOST/secret")),
    "absolute name": sent(("HOST/outside", tarfile.REGTYPE, b"x")),
}


@pytest.mark.parametrize("case", ESCAPES)
def test_a_tar_stays_in_the_container(case: str, store: Store, box: overlaykit.Container, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    before = listing(tmp_path, skip={"/store"})
    # The host's path has as many bytes as it has, so that a header's numbers stay right only if they are made anew.
    raw = tarfile.open(fileobj=ESCAPES[case])
    again = io.BytesIO()
    with tarfile.open(fileobj=again, mode="w") as tar:
        for member in raw:
            data = raw.extractfile(member) if member.isreg() else None
            member.name = member.name.replace("HOST", str(tmp_path))
            member.linkname = member.linkname.replace("HOST", str(tmp_path))
            tar.addfile(member, data)
    with contextlib.suppress(OverlaykitError, OSError):
        store.cp(io.BytesIO(again.getvalue()), "box:/tmp")
    after = listing(tmp_path, skip={"/store"})
    assert differences(before, after) == ""
    assert b"secret" not in b"".join(
        box.fs.read_bytes(f"/tmp/{name}") for name in box.fs.listdir("/tmp") if box.fs.isfile(f"/tmp/{name}")
    )


def test_a_link_in_a_container_never_leads_to_the_host(
    store: Store, box: overlaykit.Container, src: Path, tmp_path: Path
) -> None:
    box.fs.symlink(str(src), "/to-host")
    box.fs.symlink("../../../../../../../../" + str(src), "/up-to-host")
    for link in ("/to-host", "/up-to-host"):
        for path in (f"{link}/a.conf", f"{link}/", f"{link}/."):
            with pytest.raises(FileNotFoundError):
                store.cp(f"box:{path}", tmp_path / "out")
        with pytest.raises(FileNotFoundError):
            store.cp("box:/etc/motd", f"box:{link}/new")
    assert names(os, src) == ["a.conf", "b.conf", "c.log", "sub"]  # type: ignore[arg-type]


def test_a_name_that_is_there_as_a_link_on_the_host_is_not_followed(
    store: Store, box: Any, src: Path, tmp_path: Path
) -> None:
    """The container has x/ and x/evil; on the host x leads elsewhere. Nothing is written there."""
    box.fs.makedirs("/t/x")
    box.fs.write_bytes("/t/x/evil", b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").symlink_to(src)
    with pytest.raises(NotADirectoryError):
        store.cp("box:/t/.", tmp_path / "out")
    assert not (src / "evil").exists()


def test_a_device_0_0_is_no_whiteout_by_the_back_door(store: Store, box: overlaykit.Container, tmp_path: Path) -> None:
    peers.need_root("devices")
    os.mknod(tmp_path / "motd", stat.S_IFCHR, 0)
    copied = store.cp(tmp_path / "motd", "box:/etc/motd")
    assert "would be a whiteout" in str(copied.losses[0])
    assert box.fs.read_bytes("/etc/motd") == b"welcome\n"
    assert [name for name in names(box.fs, "/etc") if name.startswith(TEMPORARY)] == []


def test_overlay_marks_of_the_host_are_plain_xattrs_inside(store: Store, box: overlaykit.Container, src: Path) -> None:
    peers.need_root("trusted xattrs")
    os.setxattr(src / "sub", "trusted.overlay.opaque", b"y")
    store.cp(src, "box:/etc")
    store.cp(src / "sub", "box:/lib/deep")
    assert box.fs.getxattr("/lib/deep/sub", "trusted.overlay.opaque") == b"y"
    with box.view() as view:
        assert view.exists("/lib/deep/one")


def test_sparse_and_compressed_tars_are_read(store: Store, box: overlaykit.Container, src: Path, tmp_path: Path) -> None:
    with (src / "sparse").open("wb") as file:
        for at in (1 << 20, 5 << 20):
            file.seek(at)
            file.write(b"island")
        file.truncate(8 << 20)
    for number, options in enumerate(
        (["--format=gnu", "-S"], ["--format=posix", "-S", "--sparse-version=0.1"], ["--format=posix", "-S", "-z"], [])
    ):
        peers.run("tar", "-c", *options, "-C", src, "-f", tmp_path / "tar", ".")
        box.fs.mkdir(f"/{number}")
        with (tmp_path / "tar").open("rb") as tar:
            store.cp(tar, f"box:/{number}")
        found = {path: line for path, line in listing(f"/{number}", fs=box.fs, seconds=True).items() if path != "/"}
        assert differences({p: li for p, li in listing(src, seconds=True).items() if p != "/"}, found) == ""


def test_a_big_file_goes_through_a_tar_in_pieces(store: Store, box: overlaykit.Container, src: Path) -> None:
    data = os.urandom(5 << 20) + b"end"
    (src / "big").write_bytes(data)
    out = io.BytesIO()
    store.cp(src, "box:/x")
    store.cp("box:/x/.", out)
    box.fs.mkdir("/y")
    store.cp(io.BytesIO(out.getvalue()), "box:/y", exclude=["a.conf"])
    assert box.fs.read_bytes("/y/big") == data
    assert names(box.fs, "/y") == ["b.conf", "big", "c.log", "sub"]


def test_a_deep_tree_is_copied(store: Store, box: overlaykit.Container) -> None:
    path = "/d" * 500
    box.fs.makedirs(path)
    box.fs.write_bytes(f"{path}/leaf", b"x")
    store.cp("box:/d", "box:/e")
    assert box.fs.read_bytes("/e" + "/d" * 499 + "/leaf") == b"x"


# --- a folder of the host ---------------------------------------------------------------------------------------------


def test_a_folder_has_no_way_out(tmp_path: Path, src: Path) -> None:
    (tmp_path / "root/sub").mkdir(parents=True)
    (tmp_path / "root/abs").symlink_to(src)
    (tmp_path / "root/up").symlink_to("../../../../../../../../../" + str(src))
    folder = Folder(tmp_path / "root")
    for link in ("abs", "up"):
        for operation in (folder.stat, folder.listdir, lambda p: folder.mkdir(f"{p}/x"), lambda p: folder.chmod(p, 0)):
            with pytest.raises(FileNotFoundError) as caught:
                operation(link)
            assert str(caught.value.filename).startswith(link)
    assert folder.stat("..").st_ino == folder.stat("/").st_ino == (tmp_path / "root").stat().st_ino
    assert sorted(folder.listdir()) == ["abs", "sub", "up"]
    folder.symlink("sub", "inner")
    folder.write_bytes("inner/file", b"x")
    folder.rename("sub/file", "inner/moved")
    folder.link("sub/moved", "again")
    folder.utime("again", ns=(1, 2))
    folder.unlink("inner/moved")
    folder.unlink("inner")
    folder.rmdir("sub")
    assert folder.read_bytes("again") == b"x"
    assert folder.stat("again").st_mtime_ns == 2


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(store: Store, box: overlaykit.Container, src: Path, tmp_path: Path) -> None:
    store.close()
    (src / "ignore").write_text("# what stays at home\n*.log\n\nignore\n")
    done = ours.command(store.root, "cp", "--json", src, "box:/x", "--exclude-from", src / "ignore", "--exclude", "b*")
    assert json.loads(done.stdout) == {"entries": 4, "size": 18, "losses": []}
    tar = subprocess.run(
        [sys.executable, "-c", ours.MAIN, "--root", store.root, "cp", "box:/x", "-"], capture_output=True, check=True
    ).stdout
    assert tarfile.open(fileobj=io.BytesIO(tar)).getnames() == ["x", "x/a.conf", "x/sub", "x/sub/e.conf"]
    for args, code, said in (
        (["box:/nothing", tmp_path], 1, "box:/nothing: No such file or directory"),
        ([src, "box:/no/such"], 1, "box:/no: No such file or directory"),
        ([src, "box:/etc/motd"], 1, "box:/etc/motd: Not a directory"),
        ([src, tmp_path], 1, "neither SRC nor DST"),
        (["-", "-"], 1, "neither SRC nor DST"),
        (["-a", "--owner", "1:1", src, "box:/"], 2, "say one of them"),
        (["nobody:/etc", tmp_path], 1, "no container nobody"),
    ):
        done = ours.command(store.root, "cp", *args, check=False)
        assert (done.returncode, done.stdout) == (code, "")
        assert said in done.stderr
        assert code == 2 or len(done.stderr.splitlines()) == 1
