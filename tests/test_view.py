"""View: several directories as one, read-only."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from descriptors import open_descriptors

from overlaykit.overlay import OverlayPath, View
from overlaykit.tree import WhiteoutFormat, scan

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="trusted.overlay xattrs need root")


@pytest.fixture
def lowers(tmp_path: Path) -> list[Path]:
    """bottom: etc/motd, etc/hosts, old, bin -> usr/bin, usr/bin/sh; top: etc/motd, new, whiteout of old."""
    bottom, top = tmp_path / "bottom", tmp_path / "top"
    (bottom / "etc").mkdir(parents=True)
    (bottom / "usr" / "bin").mkdir(parents=True)
    (bottom / "etc" / "motd").write_text("below")
    (bottom / "etc" / "hosts").write_text("hosts")
    (bottom / "old").touch()
    (bottom / "usr" / "bin" / "sh").write_text("#!")
    (bottom / "bin").symlink_to("usr/bin")
    (top / "etc").mkdir(parents=True)
    (top / "etc" / "motd").write_text("above")
    (top / "new").touch()
    os.mknod(top / "old", stat.S_IFCHR, 0)
    return [bottom, top]


@pytest.fixture(params=["disk", "trees"])
def view(request: pytest.FixtureRequest, lowers: list[Path]) -> Any:
    trees = [scan(lower, whiteouts=WhiteoutFormat.OVERLAY) for lower in lowers] if request.param == "trees" else None
    with View(lowers, trees=trees) as found:
        yield found


def error(call: Callable[[], object]) -> str:
    with pytest.raises(OSError) as caught:
        call()
    return errno.errorcode[caught.value.errno or 0]


def test_the_highest_layer_wins_and_directories_merge(view: View) -> None:
    assert sorted(view.listdir()) == ["bin", "etc", "new", "usr"]
    assert sorted(view.listdir("/etc")) == ["hosts", "motd"]
    assert view.read_bytes("/etc/motd") == b"above"
    assert view.read_bytes("etc/hosts") == b"hosts"


def test_a_whiteout_hides_and_is_never_listed(view: View) -> None:
    assert error(lambda: view.stat("/old")) == "ENOENT"
    assert "old" not in view.listdir("/")
    assert not view.lexists("/old")


def test_lookups_stay_right_when_the_whole_directory_has_been_read(view: View) -> None:
    for _ in range(20):  # the first few lookups ask the layers, later ones a list of all names
        assert view.stat("/etc/hosts").st_size == 5
        assert error(lambda: view.stat("/etc/none")) == "ENOENT"
        assert error(lambda: view.stat("/old")) == "ENOENT"


def test_a_file_in_a_middle_layer_cuts_off_directories_below_it(tmp_path: Path) -> None:
    for i, make in enumerate(("dir", "file", "dir")):
        path = tmp_path / str(i) / "d"
        path.parent.mkdir()
        if make == "dir":
            path.mkdir()
            (path / f"from{i}").touch()
        else:
            path.touch()
    with View([tmp_path / "0", tmp_path / "1", tmp_path / "2"]) as view:
        assert view.listdir("/d") == ["from2"]


@root_only
def test_an_opaque_directory_hides_all_lower_names(tmp_path: Path) -> None:
    for name in ("a/d/lower", "b/d/upper"):
        (tmp_path / name).mkdir(parents=True)
    os.setxattr(tmp_path / "b" / "d", "trusted.overlay.opaque", b"y")
    with View([tmp_path / "a", tmp_path / "b"]) as view:
        assert view.listdir("d") == ["upper"]


def test_symlinks_stay_inside(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    (layer / "etc").mkdir(parents=True)
    (tmp_path / "secret").write_text("host")
    (layer / "etc" / "inside").write_text("layer")
    (layer / "up").symlink_to("../../../secret")
    (layer / "abs").symlink_to(tmp_path / "secret")
    (layer / "etc-link").symlink_to("/etc/../../etc")
    (layer / "loop").symlink_to("loop")
    with View([layer]) as view:
        assert error(lambda: view.open("/up")) == "ENOENT"
        assert error(lambda: view.open("/abs")) == "ENOENT"
        assert error(lambda: view.stat("/loop")) == "ELOOP"
        assert error(lambda: view.open("/../secret")) == "ENOENT"
        assert view.read_bytes("/etc-link/inside") == b"layer"
        assert view.readlink("/up") == "../../../secret"
        assert view.readlink(b"/up") == b"../../../secret"


def test_every_change_is_refused(view: View) -> None:
    assert error(lambda: view.mkdir("/x")) == "EROFS"
    assert error(lambda: view.mkdir("/etc")) == "EEXIST"
    assert error(lambda: view.mkdir("/none/x")) == "ENOENT"
    assert error(lambda: view.unlink("/none")) == "EROFS"
    assert error(lambda: view.rmdir("/etc")) == "EROFS"
    assert error(lambda: view.rename("/etc", "/x")) == "EROFS"
    assert error(lambda: view.chmod("/etc", 0o700)) == "EROFS"
    assert error(lambda: view.chmod("/none", 0o700)) == "ENOENT"
    assert error(lambda: view.open("/etc/motd", "w")) == "EROFS"
    assert error(lambda: view.open("/etc/none", "w")) == "EROFS"
    assert error(lambda: view.open("/etc", "w")) == "EISDIR"
    assert error(lambda: view.symlink("a", "/x")) == "EROFS"
    assert error(lambda: view.link("/etc/motd", "/x")) == "EROFS"
    assert error(lambda: view.setxattr("/etc", "user.x", b"")) == "EROFS"
    assert not view.access("/etc/motd", os.W_OK)
    assert view.access("/etc/motd", os.R_OK)


def test_errors_name_the_path_that_was_asked_for(view: View) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        view.stat("/etc/none")
    assert caught.value.filename == "/etc/none"


def test_bytes_in_bytes_out(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.close(os.open(raw, os.O_CREAT | os.O_WRONLY))
    with View([tmp_path]) as view:
        assert view.listdir(b"/") == [b"\xff\xfe"]
        assert view.listdir("/") == ["\udcff\udcfe"]
        assert view.stat(b"/\xff\xfe").st_size == 0
        assert [e.path for e in view.scandir(b"/")] == [b"/\xff\xfe"]


def test_scandir_tells_what_os_scandir_tells(view: View, lowers: list[Path]) -> None:
    with view.scandir("/") as entries:
        found = {e.name: (e.is_dir(), e.is_file(), e.is_symlink(), e.path) for e in entries}
    assert found == {
        "bin": (True, False, True, "/bin"),
        "etc": (True, False, False, "/etc"),
        "new": (False, True, False, "/new"),
        "usr": (True, False, False, "/usr"),
    }


def test_walk_and_glob_find_everything(view: View) -> None:
    assert sorted((d, sorted(dirs), sorted(files)) for d, dirs, files in view.walk("/")) == [
        ("/", ["bin", "etc", "usr"], ["new"]),
        ("/etc", [], ["hosts", "motd"]),
        ("/usr", ["bin"], []),
        ("/usr/bin", [], ["sh"]),
    ]
    assert view.glob("/etc/h*") == ["/etc/hosts"]
    assert sorted(view.glob("/**/m*", recursive=True)) == ["/etc/motd"]
    assert view.glob("usr/*/sh") == ["usr/bin/sh"]
    assert [d for d, *_ in view.walk("/usr", topdown=False)] == ["/usr/bin", "/usr"]


def test_paths_are_objects_in_pathlibs_shape(view: View) -> None:
    path = view.path("/etc")
    assert sorted(p.name for p in path.iterdir()) == ["hosts", "motd"]
    assert (path / "motd").read_text() == "above"
    assert path / "motd" == OverlayPath(view, "/etc/motd")
    assert (view.path("/bin") / "sh").resolve() == view.path("/usr/bin/sh")
    assert [str(p) for p in view.path("/").rglob("mo*")] == ["/etc/motd"]


def test_trees_answer_lookups_without_a_system_call(lowers: list[Path]) -> None:
    trees = [scan(lower, whiteouts=WhiteoutFormat.OVERLAY) for lower in lowers]
    with View(lowers, trees=trees) as view:
        stack = view._stack
        assert sorted(stack.lower_names(stack.root)) == ["bin", "etc", "new", "usr"]
        assert stack.find_lower(stack.child(stack.root, "etc"), "hosts") == 0
        assert stack.find_lower(stack.child(stack.root, "etc"), "motd") == 1
        assert stack.opened == 0


def test_one_tree_per_lower_or_none() -> None:
    with pytest.raises(ValueError, match="1 lowers, but 2 trees"):
        View(["/"], trees=[None, None])
    with pytest.raises(ValueError, match="at least one lower"):
        View([])


def test_five_hundred_lowers_in_few_descriptors(tmp_path: Path) -> None:
    lowers = []
    for i in range(500):
        (tmp_path / str(i) / "a" / "b" / "c").mkdir(parents=True)
        (tmp_path / str(i) / "a" / "b" / "c" / f"f{i}").touch()
        lowers.append(tmp_path / str(i))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (700, hard))
    try:
        with View(lowers) as view:
            assert len(view.listdir("/a/b/c")) == 500
            assert view.stat("/a/b/c/f0").st_size == 0
            assert error(lambda: view.stat("/a/b/c/none")) == "ENOENT"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_deep_walks_keep_few_directories_open(tmp_path: Path) -> None:
    for i in range(600):
        (tmp_path / f"d{i}").mkdir()
    with View([tmp_path]) as view:
        view._resolver.most_open = 20
        before = len(open_descriptors())
        for i in range(600):
            assert view.listdir(f"/d{i}") == []
            assert view.listdir(f"/d{i}/.") == []
        assert len(os.listdir("/proc/self/fd")) - before < 60


def test_closing_lets_go_of_everything(lowers: list[Path]) -> None:
    before = len(open_descriptors())
    view = View(lowers)
    view.listdir("/usr/bin")
    view.close()
    view.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        view.listdir("/")


def test_entries_end_when_they_are_closed_as_those_of_os_scandir(view: View) -> None:
    entries = view.scandir("/")
    assert next(entries).name in view.listdir("/")
    loop = iter(entries)
    entries.close()
    assert list(loop) == list(entries) == []
