"""The same script on a kernel mount and in process: same answer at every step, same tree at the end, and each side's
upper read by the other. tests/overlay_fuzz.py makes the scripts and can be run for hours; here are a few seconds of it, the
failures it found, shrunk, and a state machine that hypothesis drives."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kernel_overlay import SCRATCH, mounted, needs_kernel_overlay, why_not
from overlay_fuzz import ACL, Case, KernelOs, Maker, Profile, Runner, Side, differs, make_case, run_case

from overlaykit.overlay import Overlay

pytestmark = needs_kernel_overlay

PROFILES = {
    "plain": Profile(),
    "userxattr": Profile(userxattr=True),
    "redirect_dir": Profile(redirect_dir=True),
    "metacopy": Profile(metacopy=True),
    "index": Profile(index=True),
    "many_lowers": Profile(most_lowers=20, operations=20),
}
LOOK = (0o644, 0, 0, 1234567890.5, None)
DIR = (0o755, 0, 0, 1234567890.5, None)


@pytest.mark.parametrize("name", PROFILES)
def test_random_programs_give_the_same_on_both_sides(name: str) -> None:
    for seed in range(7_000_000, 7_000_040):
        run_case(make_case(seed, PROFILES[name]))


def case(layers: list[list[Any]], *program: Any, profile: Profile | None = None) -> Case:
    return Case(layers, list(program), profile or Profile())


FOUND = {
    # Whiteouts of all layers were noted under one value, so a name that two layers hide was taken out of a listing twice.
    "hidden_by_two_layers": case(
        [[("whiteout", "c/c", None, LOOK)], [("xwhiteout", "c/c", None, LOOK)], [("file", "c/d", ("z", 1), LOOK)]],
        ("listdir", "c"), ("stat", "c/c"),
    ),
    # removexattr of a user xattr asked the lower file first and said ENODATA. The kernel looks at the kind of file before it
    # looks for the xattr: EPERM for a device.
    "user_xattr_of_a_device": case(
        [[("char", "d/c", None, LOOK)]], ("removexattr", "d/c", "user.k"), ("getxattr", "d/c", "user.k")
    ),
    # ftruncate to the size a file has still sets its mtime, truncate(2) does not; and a file that came up without its data
    # had nothing left to lose, so nothing set its mtime at all.
    "truncate_sets_the_time_if_something_went": case(
        [[("file", "empty", ("z", 0), LOOK), ("file", "full", ("z", 9), LOOK), ("file", "same", ("z", 3000), LOOK)]],
        ("truncate", "empty", 0), ("truncate", "full", 0), ("truncate", "same", 3000),
    ),
    # rename looked for the old name before it had walked to the new one's directory: ENAMETOOLONG instead of ENOENT.
    "rename_walks_both_paths_first": case(
        [[("dir", "d", None, DIR)]], ("rename", "x" * 256, "a/c/d", 0), ("rename", "d/b/", "x" * 256, 0)
    ),
    # A symlink to "b/" that is b itself: O_CREAT says EISDIR as soon as it sees the slash, long before ELOOP.
    "create_through_a_link_that_ends_in_a_slash": case(
        [[("link", "b", "b/", LOOK)]], ("open", "b", os.O_CREAT | os.O_NONBLOCK, 0o644, ("x", 1))
    ),
    # The short way from a directory that is known looked for the name before the slash, and said ENAMETOOLONG.
    "create_with_a_slash_behind_too_long_a_name": case(
        [[("fifo", "a/a", None, LOOK)]], ("lstat", "a/a"),
        ("open", f"a/{'x' * 256}/", os.O_CREAT | os.O_RDWR | os.O_NONBLOCK, 0o644, ("x", 1)),
    ),
    # O_TMPFILE wants a mode that writes, and says so before it looks at the path.
    "unnamed_file_for_reading": case(
        [[("dir", "d", None, DIR)]], ("open", "missing", os.O_TMPFILE, 0o644, ("x", 1)),
        ("open", "d", os.O_TMPFILE | os.O_RDWR, 0o644, ("x", 1)),
    ),
    # What is found by O_CREAT in a world-writable sticky directory and belongs to a third party: EACCES, even for root.
    "create_in_a_sticky_directory": case(
        [[("char", "c/c", None, (0o600, 1000, 1000, 1e9, None))]], ("chmod", "c", 0o1777),
        ("open", "c/c", os.O_CREAT | os.O_RDWR | os.O_NONBLOCK, 0o644, ("x", 1)),
    ),
    # A directory that only the top layer has may contain one redirected to layers its parent does not merge. The lookup
    # stopped with the parent's last layer.
    "redirect_below_a_directory_of_one_layer": case(
        [[("dir", "d/a", None, DIR)]], ("mkdir", "/a", 0o700), ("rename", "d", "a/b", 0), ("rotate", "/"),
        ("lstat", "a/b/a"), profile=Profile(redirect_dir=True),
    ),
    # The data of a metacopy were written after its capability was, which took it away.
    "capability_of_a_metacopy": case(
        [[("file", "b", ("y", 5000), (0o755, 1000, 0, 1e9, "security.capability"))]],
        ("chmod", "/b", 0o700), ("rotate", "/"), ("link", "/b", "f", False), ("read", "f"),
        profile=Profile(metacopy=True),
    ),
    # With metacopy on, a file that moves leaves its data where they are and remembers the place.
    "metacopy_that_moves": case(
        [[("file", "a/b", ("x", 138), (0o755, 0, 0, 1e9, None)), ("dir", "c", None, DIR)]],
        ("rename", "/a/b", "c/d", 0), ("rename", "c/d", "/e", 0), ("rotate", "/"), ("rename", "/e", "f", 0), ("read", "/f"),
        profile=Profile(metacopy=True),
    ),
    # What a file cannot have was refused with the kernel's errno, but after the file, or its directory, had come up: as a
    # layer later it had another number than in a mount.
    "default_acl_of_a_file": case(
        [[("file", "c", ("z", 5000), LOOK), ("link", "l", "c", LOOK)]],
        ("setxattr", "c", "system.posix_acl_default", ACL, 1, False),
        ("setxattr", "l", "system.posix_acl_access", ACL, 0, False), ("rotate", "/"), ("lstat", "c"),
    ),
    # A file that had come up under another name got this one too for an xattr, and the kernel changes its inode where it is:
    # to be seen once upper is a layer.
    "xattr_of_a_file_that_came_up_under_another_name": case(
        [[("file", "b", ("x", 48), LOOK), ("hardlink", "a", "b", LOOK)]],
        ("rename", "a", "c", 0), ("setxattr", "b", "user.k", b"v", 0, False), ("getxattr", "b", "user.k"),
        ("setxattr", "b", "user.l", b"v", 0, False), ("removexattr", "b", "user.l"), ("rotate", "b"), ("lstat", "b"),
        profile=Profile(index=True),
    ),
    "user_xattr_of_a_fifo": case(
        [[("fifo", "b/a", None, LOOK)]], ("setxattr", "b/a", "user.k", b"y", 1, True), ("rotate", "/"), ("lstat", "b/a")
    ),
    "device_that_would_be_a_whiteout": case(
        [[("dir", "b", None, DIR)]], ("mknod", "/b/a", stat.S_IFCHR | 0o640, 0), ("rotate", "/"), ("lstat", "b")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_the_fuzzer_found_stays_fixed(name: str) -> None:
    assert differs(FOUND[name]) == ""


PROGRAMS = {
    "delete_and_make_again": [
        ("unlink", "d/f"), ("listdir", "d"), ("open", "d/f", os.O_CREAT | os.O_WRONLY, 0o644, ("n", 3)), ("rmtree", "d"),
        ("mkdir", "d", 0o755), ("listdir", "d"), ("rmdir", "d"), ("lstat", "d"),
    ],
    "errors_of_names": [
        ("rmdir", "d/f"), ("unlink", "d"), ("unlink", "d/f/"), ("mkdir", "d/f/x", 0o755), ("rmdir", "/"), ("rmdir", "d/."),
        ("rmdir", "d/.."), ("mkdir", "", 0o755), ("unlink", "."), ("rename", "d", "d/sub/x", 0), ("rename", "d", "d/sub", 0),
        ("rename", "d/.", "x", 0), ("mknod", "c", stat.S_IFCHR, 0), ("symlink", "x", "new/"), ("link", "d", "e", False),
        ("link", "d/f", "d/f", False), ("lstat", "d/f/"), ("readlink", "d"), ("lstat", "loop/x"), ("stat", "loop"),
    ],
    "directories_of_a_lower_stay": [
        ("rename", "d", "e", 0), ("rename", "d/sub", "s", 2), ("rename", "d/f", "s", 2), ("mkdir", "n", 0o755),
        ("rename", "n", "d/sub", 0), ("rmdir", "d/sub/deep"), ("rename", "n", "d/sub", 0), ("listdir", "d/sub"),
    ],
    "setgid_and_acl_are_inherited_over_a_whiteout": [
        ("chmod", "d", 0o2775), ("chown", "d", 0, 1000, True), ("unlink", "d/f"), ("mkdir", "d/f", 0o755), ("lstat", "d/f"),
        ("rmdir", "d/f"), ("open", "d/f", os.O_CREAT | os.O_WRONLY, 0o644, ("n", 3)), ("lstat", "d/f"),
    ],
    "xattrs_of_a_nested_overlay": [
        ("setxattr", "d/f", "trusted.overlay.opaque", b"y", 0, True), ("listxattr", "d/f"),
        ("getxattr", "d/f", "trusted.overlay.opaque"), ("removexattr", "d/f", "trusted.overlay.opaque"),
        ("setxattr", "d", "trusted.overlay.opaque", b"y", 0, True), ("listdir", "d"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("profile", ["plain", "userxattr", "redirect_dir", "metacopy", "index"])
def test_transcripts_are_the_same(name: str, profile: str) -> None:
    below = [
        ("file", "d/f", ("a", 10), LOOK), ("dir", "d/sub/deep", None, DIR), ("link", "loop", "loop", LOOK),
        ("file", "s", ("a", 5), LOOK),
    ]  # fmt: skip
    above = [("file", "d/g", ("b", 10), LOOK), ("whiteout", "d/gone", None, LOOK)]
    assert differs(Case([below, above], [*PROGRAMS[name]], PROFILES[profile])) == ""


class BothSides(RuleBasedStateMachine):
    """Hypothesis chooses the operations; after each the two must agree."""

    def __init__(self) -> None:
        super().__init__()
        if why_not():
            pytest.skip(why_not())
        self.base = Path(tempfile.mkdtemp(dir=SCRATCH, prefix="machine-"))
        self.open = False

    @initialize(
        seed=st.integers(0, 1000), profile=st.sampled_from(["plain", "userxattr", "redirect_dir", "metacopy", "index"])
    )
    def start(self, seed: int, profile: str) -> None:
        self.mask = os.umask(0o022)
        self.maker = Maker(seed, PROFILES[profile])
        self.runner = Runner(Case(make_case(seed, PROFILES[profile]).layers, [], PROFILES[profile]), self.base)
        self.begin()

    def begin(self) -> None:
        self.context, self.overlay = self.runner.kernel("k", "k"), self.runner.ours("v", "v")
        self.kernel = Side(KernelOs(self.context.__enter__()), self.runner.began, False)
        self.ours = Side(self.overlay, self.runner.began, True)
        self.open = True

    def end(self) -> None:
        self.open = False
        self.kernel.fs.close()
        self.context.__exit__(None, None, None)
        self.overlay.close()

    @rule(data=st.integers(0, 2**32))
    def operate(self, data: int) -> None:
        self.maker.random.seed(data)
        op = self.maker.operation()
        if op[0] in ("remount", "rotate", "rmtree", "rmdir", "rename") and self.runner.xattr_whiteouts:
            return  # see overlay_fuzz.Quirk
        if op[0] in ("remount", "rotate"):
            self.end()
            self.runner.swap()
            self.begin()
            return
        kernel, ours = self.kernel.run(op), self.ours.run(op)
        assert ours == kernel, op

    @invariant()
    def nothing_is_left_in_work(self) -> None:
        if self.open:
            assert os.listdir(self.runner.work["v"] / "work") == []

    def teardown(self) -> None:
        try:
            if self.open:
                self.runner.compare(self.kernel.tree(), self.ours.tree(), "merged tree", None)
                self.end()
                self.runner.swap()
        finally:
            if self.open:
                self.end()
            shutil.rmtree(self.base, ignore_errors=True)
            os.umask(getattr(self, "mask", 0o022))


BothSides.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBothSides = needs_kernel_overlay(BothSides.TestCase)


# --- inode numbers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A lower with every kind of file on the file system of upper and work."""
    for name in ("lower/dir/sub", "lower/other", "upper", "work", "theirs", "scrap", "merged"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("dir/file", "dir/sub/deep", "dir/moved"):
        (tmp_path / "lower" / name).write_text(name)
    (tmp_path / "lower/dir/link").symlink_to("file")
    os.mkfifo(tmp_path / "lower/dir/pipe")
    (tmp_path / "lower/other/a").write_text("hard link")
    os.link(tmp_path / "lower/other/a", tmp_path / "lower/other/b")
    return tmp_path


def numbers(merged: Path) -> dict[str, int]:
    """st_ino by path; what a listing says must be the same."""
    out = {}
    for top, _, _ in os.walk(merged):
        for entry in os.scandir(top):
            out[entry.path] = entry.stat(follow_symlinks=False).st_ino
            assert entry.inode() == out[entry.path], entry.path
    return out


def change(fs: Any, root: str) -> None:
    """Copy up all of `numbered` but what moves."""
    for name in ("dir/file", "dir/sub/deep", "dir/sub", "dir"):
        fs.chmod(f"{root}/{name}", 0o700)
    for name in ("dir/link", "dir/pipe"):
        fs.utime(f"{root}/{name}", ns=(1, 1), follow_symlinks=False)
    fs.chmod(f"{root}/other/a", 0o600)


def test_a_mount_gives_our_copies_the_numbers_of_their_lower_files(numbered: Path) -> None:
    lower, merged = numbered / "lower", numbered / "merged"
    with mounted([lower], numbered / "upper", numbered / "work", merged):
        before = numbers(merged)
    with Overlay([lower], numbered / "upper", numbered / "work") as overlay:
        change(overlay, "")
        overlay.rename("/dir/moved", "/other/moved")
    with mounted([lower], numbered / "upper", numbered / "work", merged):
        after = numbers(merged)
    assert after.pop(f"{merged}/other/moved") == before.pop(f"{merged}/dir/moved")
    broken = f"{merged}/other/a"  # of a hard link, index=off
    assert after.pop(broken) != before.pop(broken)
    assert after == before


@pytest.mark.parametrize("userxattr", [False, True])
def test_we_write_the_same_origin_as_the_kernel(numbered: Path, userxattr: bool) -> None:
    lower, merged, ours, theirs = (numbered / name for name in ("lower", "merged", "upper", "theirs"))

    def link_and_move(fs: Any, root: str) -> None:
        for name in ("linked", "moved"):
            fs.mkdir(f"{root}/{name}")
        fs.link(f"{root}/dir/file", f"{root}/linked/file")
        fs.rename(f"{root}/dir/sub/deep", f"{root}/moved/deep")

    with mounted([lower], theirs, numbered / "scrap", merged, userxattr=userxattr):
        change(os, str(merged))
        link_and_move(os, str(merged))
    with Overlay([lower], ours, numbered / "work", userxattr=userxattr) as overlay:
        change(overlay, "")
        link_and_move(overlay, "")

    def marks(upper: Path) -> dict[str, dict[str, bytes]]:
        return {
            str(path.relative_to(upper)): {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
                if name.endswith((".origin", ".impure"))
            }
            for path in (upper, *upper.rglob("*"))
        }

    assert marks(ours) == marks(theirs)
    assert sum(map(len, marks(ours).values())) >= 8


def test_a_copy_keeps_its_number_in_process_as_in_a_mount(numbered: Path) -> None:
    lower, merged = numbered / "lower", numbered / "merged"
    with Overlay([lower], numbered / "upper", numbered / "work") as overlay:
        before = {
            path: overlay.lstat(path).st_ino for path in ("dir/file", "dir/sub/deep", "dir/sub", "dir/link", "dir/pipe")
        }
        change(overlay, "")
        overlay.link("/dir/file", "/dir/sub/linked")
        assert {path: overlay.lstat(path).st_ino for path in before} == before
        assert {entry.name: entry.inode() for entry in overlay.scandir("/dir/sub")}["linked"] == before["dir/file"]
    with mounted([lower], numbered / "upper", numbered / "work", merged):
        assert {path: (merged / path).lstat().st_ino for path in before} == before
        assert (merged / "dir/sub/linked").stat().st_ino == before["dir/file"]
