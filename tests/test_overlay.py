"""Overlay: what can be tested without the kernel's own overlay (test_kernel_parity.py has the comparison)."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlaykit.errors import InUse, Unsupported
from overlaykit.overlay import Overlay, View
from overlaykit.overlay.copyup import EXCHANGE, NOREPLACE

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Stack:
    """A lower, an upper, a work directory; and what opens them."""

    def __init__(self, base: Path) -> None:
        self.lower, self.upper, self.work = base / "lower", base / "upper", base / "work"
        for path in (self.lower, self.upper, self.work):
            path.mkdir()
        (self.lower / "etc").mkdir()
        (self.lower / "etc" / "motd").write_text("hello")
        (self.lower / "etc" / "hosts").write_text("hosts")
        (self.lower / "top").write_text("top")
        (self.lower / "link").symlink_to("etc/motd")

    def open(self, **options: bool) -> Overlay:
        return Overlay([self.lower], self.upper, self.work, **options)

    def in_upper(self) -> list[str]:
        return sorted(str(p.relative_to(self.upper)) for p in self.upper.rglob("*"))


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


@pytest.fixture
def overlay(stack: Stack) -> Iterator[Overlay]:
    with stack.open() as found:
        yield found


def error(call: Callable[[], object]) -> str:
    with pytest.raises(OSError) as caught:
        call()
    return errno.errorcode[caught.value.errno or 0]


def is_whiteout(path: Path) -> bool:
    st = path.lstat()
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def test_reading_copies_nothing_up(overlay: Overlay, stack: Stack) -> None:
    assert overlay.read_bytes("/etc/motd") == b"hello"
    assert overlay.read_bytes("/link") == b"hello"
    overlay.stat("/etc")
    overlay.listdir("/etc")
    os.close(overlay.open_fd("/etc/motd", os.O_RDONLY))
    assert stack.in_upper() == []


def test_writing_copies_up_and_the_lower_stays(overlay: Overlay, stack: Stack) -> None:
    with overlay.open("/etc/motd", "a") as f:
        f.write(", world")
    assert overlay.read_bytes("/etc/motd") == b"hello, world"
    assert (stack.lower / "etc" / "motd").read_text() == "hello"
    assert stack.in_upper() == ["etc", "etc/motd"]


def test_a_write_through_a_symlink_reaches_its_target(overlay: Overlay, stack: Stack) -> None:
    overlay.write_bytes("/link", b"new")
    assert overlay.islink("/link")
    assert stack.in_upper() == ["etc", "etc/motd"]


def test_deleting_leaves_a_whiteout_and_making_again_replaces_it(overlay: Overlay, stack: Stack) -> None:
    overlay.unlink("/etc/motd")
    assert is_whiteout(stack.upper / "etc" / "motd")
    assert overlay.listdir("/etc") == ["hosts"]
    assert error(lambda: overlay.open("/etc/motd")) == "ENOENT"
    assert error(lambda: overlay.unlink("/etc/motd")) == "ENOENT"
    overlay.write_bytes("/etc/motd", b"again")
    assert (stack.upper / "etc" / "motd").read_bytes() == b"again"


def test_a_directory_made_over_a_removed_one_is_empty(overlay: Overlay) -> None:
    overlay.rmtree("/etc")
    overlay.mkdir("/etc")
    assert overlay.listdir("/etc") == []


def test_a_directory_of_whiteouts_alone_can_be_removed(overlay: Overlay, stack: Stack) -> None:
    overlay.unlink("etc/motd")
    assert error(lambda: overlay.rmdir("etc")) == "ENOTEMPTY"
    overlay.unlink("etc/hosts")
    overlay.rmdir("etc")
    assert is_whiteout(stack.upper / "etc")


def test_rename_flags(overlay: Overlay) -> None:
    overlay.write_bytes("/new", b"new")
    assert error(lambda: overlay.rename("/new", "/top", flags=NOREPLACE)) == "EEXIST"
    overlay.rename("/new", "/top", flags=EXCHANGE)
    assert (overlay.read_bytes("/new"), overlay.read_bytes("/top")) == (b"top", b"new")
    overlay.replace("/new", "/top")
    assert overlay.read_bytes("/top") == b"top"
    assert not overlay.exists("/new")


def test_directories_of_a_lower_need_redirect_dir_to_move(stack: Stack) -> None:
    with stack.open() as overlay:
        assert error(lambda: overlay.rename("/etc", "/moved")) == "EXDEV"
    if os.geteuid() != 0:
        return
    with stack.open(redirect_dir=True) as overlay:
        overlay.rename("/etc", "/moved")
        assert sorted(overlay.listdir("/moved")) == ["hosts", "motd"]
        assert not overlay.exists("/etc")
    assert os.getxattr(stack.upper / "moved", "trusted.overlay.redirect") == b"etc"
    with stack.open() as overlay:  # reading one needs no option
        assert overlay.read_bytes("/moved/motd") == b"hello"


@root_only
def test_changing_the_mode_of_a_large_file_copies_no_data_with_metacopy(stack: Stack) -> None:
    (stack.lower / "big").write_bytes(b"x" * 1_000_000)
    with stack.open(metacopy=True) as overlay:
        overlay.chmod("/big", 0o600)
        assert (stack.upper / "big").stat().st_blocks <= 8
        assert overlay.read_bytes("/big") == b"x" * 1_000_000
        with overlay.open("/big", "r+b") as f:
            f.write(b"y")
        assert (stack.upper / "big").stat().st_blocks > 1000
        assert overlay.read_bytes("/big")[:3] == b"yxx"


@root_only
def test_data_only_layers_are_reached_by_redirects_alone(tmp_path: Path) -> None:
    for name in ("data", "lower", "upper", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "blob").write_bytes(b"z" * 9000)
    with (tmp_path / "lower" / "file").open("wb") as f:
        f.truncate(9000)
    os.setxattr(tmp_path / "lower" / "file", "trusted.overlay.metacopy", b"")
    os.setxattr(tmp_path / "lower" / "file", "trusted.overlay.redirect", b"/blob")
    with Overlay([tmp_path / "lower"], tmp_path / "upper", tmp_path / "work", data=[tmp_path / "data"]) as overlay:
        assert overlay.listdir("/") == ["file"]
        assert overlay.read_bytes("/file") == b"z" * 9000
        with overlay.open("/file", "ab") as f:
            f.write(b"end")
        assert (tmp_path / "upper" / "file").read_bytes() == b"z" * 9000 + b"end"


def test_one_writer_at_a_time(stack: Stack) -> None:
    with stack.open():
        with pytest.raises(InUse, match="has a writer"):
            stack.open()
        with View([stack.lower, stack.upper]) as view:  # readers beside it
            assert view.exists("/etc")
    stack.open().close()


def test_directories_that_do_not_fit_together_are_refused_with_a_reason(stack: Stack, tmp_path: Path) -> None:
    inside, full = stack.lower / "etc", tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    for lowers, upper, work, words in (
        ([stack.lower], inside, stack.work, "upper .*/lower/etc and lower .*/lower: one must not be in the other"),
        ([stack.lower], stack.upper, inside, "work .*/lower/etc and lower"),
        ([stack.upper], stack.upper, stack.work, "upper .* and lower .*: one must not be in the other"),
        ([stack.lower], stack.upper, stack.upper, "upper .* and work .*: one must not be in the other"),
        ([stack.lower], stack.upper, full, "work .* is not empty: it has 'mine'"),
    ):
        with pytest.raises(Unsupported, match=words):
            Overlay(lowers, upper, work)
    for lowers, upper, work in (
        ([tmp_path / "no"], stack.upper, stack.work), ([stack.lower], tmp_path / "no", stack.work),
        ([stack.lower], stack.upper, tmp_path / "no"),
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError) as caught:
            Overlay(lowers, upper, work)
        assert str(caught.value.filename) == str(tmp_path / "no")
    assert (full / "mine").exists()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_a_work_directory_on_another_file_system_is_refused(stack: Stack) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(elsewhere).st_dev == os.stat(stack.upper).st_dev:
            pytest.skip("the tests run on /dev/shm")
        with pytest.raises(Unsupported, match="different file systems"):
            Overlay([stack.lower], stack.upper, elsewhere)


def test_what_a_killed_writer_left_is_cleared(stack: Stack) -> None:
    inner = stack.work / "work"
    (inner / "#1" / "deep").mkdir(parents=True)
    (inner / "#2").touch()
    os.mknod(inner / "#3", stat.S_IFCHR, 0)
    inner.chmod(0)  # as the kernel leaves it
    with stack.open():
        assert os.listdir(inner) == []


KILLS = [
    ("renameat2", 1), ("renameat2", 2), ("renameat2", 3), ("renameat2", 5), ("renameat", 1), ("renameat", 2), ("mknodat", 1),
    ("mknodat", 2), ("mknodat", 3), ("unlinkat", 1), ("unlinkat", 3), ("fchmod", 1), ("fchmod", 2), ("utimensat", 1),
    ("utimensat", 3), ("copy_file_range", 1), ("fsync", 1), ("mkdirat", 2), ("mkdirat", 3), ("lsetxattr", 2),
]  # fmt: skip


@root_only
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace to kill at a system call")
@pytest.mark.parametrize(("call", "when"), KILLS)
def test_a_kill_at_any_system_call_leaves_the_tree_before_or_after(stack: Stack, call: str, when: int) -> None:
    """SIGKILL in a copy-up, a removal, a rename: the next opening finds a whole tree, and clears work."""
    program = f"""
from overlaykit.overlay import Overlay
o = Overlay([{str(stack.lower)!r}], {str(stack.upper)!r}, {str(stack.work)!r})
with o.open("/etc/motd", "r+b") as f:
    pass
o.unlink("/etc/hosts")
o.mkdir("/etc/hosts")
o.rename("/top", "/etc/hosts/top")
o.rename("/etc/hosts/top", "/top")
o.rmtree("/etc")
o.mkdir("/etc")
"""
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={when}"]
    command = ["strace", "-f", "-qq", "-o", "/dev/null", *inject, sys.executable, "-S", "-c", program]
    # Nothing but the overlay's own calls may count, so the modules come compiled and by path.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, check=False, capture_output=True, env=env)
    with stack.open() as overlay:
        assert os.listdir(stack.work / "work") == []
        assert overlay.exists("/top") or overlay.exists("/etc/hosts/top")
        if names := set(overlay.listdir("/etc") if overlay.exists("/etc") else []):
            assert names in ({"motd", "hosts"}, {"motd"})
            assert overlay.read_bytes("/etc/motd") == b"hello"


def test_many_threads_in_one_overlay(overlay: Overlay, stack: Stack) -> None:
    for i in range(50):
        (stack.lower / "etc" / f"low{i}").write_text(str(i))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        try:
            for i in range(150):
                mine = f"/etc/t{number}-{i}"
                overlay.write_bytes(mine, b"x" * i)
                assert overlay.stat(mine).st_size == i
                overlay.mkdir(f"/dir{number}-{i}")
                overlay.rename(mine, f"/dir{number}-{i}/moved")
                assert overlay.listdir(f"/dir{number}-{i}") == ["moved"]
                overlay.unlink(f"/dir{number}-{i}/moved")
                overlay.rmdir(f"/dir{number}-{i}")
                shared = f"/etc/low{chance.randrange(50)}"
                if chance.random() < 0.5:
                    with contextlib.suppress(FileNotFoundError):
                        overlay.unlink(shared)
                else:
                    overlay.write_bytes(shared, b"shared")
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(n for n in overlay.listdir("/") if n.startswith("dir")) == []
    before = sorted(overlay.listdir("/etc"))
    assert os.listdir(stack.work / "work") == []
    overlay.close()
    with stack.open() as again:
        assert sorted(again.listdir("/etc")) == before


def test_links_that_another_process_plants_in_upper_lead_nowhere(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("host")
    before = secret.stat()
    overlay.mkdir("/d")
    overlay.write_bytes("/d/f", b"inside")
    overlay.stat("/d/f")
    (stack.upper / "d" / "f").unlink()
    (stack.upper / "d" / "f").symlink_to(secret)  # the overlay has just seen a file there
    for call in (
        lambda: overlay.read_bytes("/d/f"), lambda: overlay.write_bytes("/d/f", b""), lambda: overlay.chmod("/d/f", 0o777),
        lambda: overlay.chown("/d/f", 1, 1), lambda: overlay.truncate("/d/f", 0), lambda: overlay.utime("/d/f", (1, 1)),
        lambda: overlay.setxattr("/d/f", "user.x", b""),
    ):  # fmt: skip
        with pytest.raises(OSError):
            call()
    assert secret.read_text() == "host"
    assert (secret.stat().st_mode, secret.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_unprivileged_use(tmp_path: Path) -> None:
    """Without root the marks are user xattrs, and what is not ours to change is refused before anything is copied."""
    if os.geteuid() != 0:
        pytest.skip("gives up root to test")
    program = """
import os, resource, sys
from overlaykit.overlay import Overlay
os.umask(0o022)
os.setgroups([]); os.setgid(1000); os.setuid(1000)
base = sys.argv[1]
o = Overlay([base + "/lower"], base + "/upper", base + "/work")
assert "userxattr" in o.mount_spec("/m").options
def refused(call, *args):
    try: call(*args)
    except OSError as e: return e.errno
    return 0
assert refused(o.unlink, "/roots/f") == 13, "EACCES"
assert refused(o.write_bytes, "/roots/f", b"x") == 13
assert refused(o.write_bytes, "/roots/new", b"x") == 13
assert refused(o.chmod, "/roots/f", 0o777) == 1, "EPERM"
assert refused(o.read_bytes, "/roots/private") == 13
assert os.listdir(base + "/upper") == [], os.listdir(base + "/upper")
o.write_bytes("/mine/f", b"changed")
o.unlink("/mine/g"); o.mkdir("/mine/g"); assert o.listdir("/mine/g") == []
o.rmtree("/mine/d"); o.mkdir("/mine/d"); assert o.listdir("/mine/d") == []
assert os.getxattr(base + "/upper/mine/d", "user.overlay.opaque") == b"y"
o.close()
"""
    base = Path("/dev/shm") / f"unprivileged-{os.getpid()}"
    try:
        for name in ("upper", "work", "lower/roots", "lower/mine/d/x"):
            (base / name).mkdir(parents=True)
        for name in ("roots/f", "roots/private", "mine/f", "mine/g"):
            (base / "lower" / name).write_text(name)
        (base / "lower" / "roots" / "private").chmod(0o600)
        subprocess.run(["chown", "-R", "1000:1000", base / "upper", base / "work", base / "lower" / "mine"], check=True)
        (base / "lower").chmod(0o755)
        os.chown(base / "lower", 1000, 1000)
        done = subprocess.run([sys.executable, "-c", program, base], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["rm", "-rf", base], check=True)


def test_options_that_do_not_go_together_say_so(stack: Stack) -> None:
    with pytest.raises(Unsupported, match="trusted xattrs"):
        Overlay([stack.lower], stack.upper, stack.work, userxattr=True, metacopy=True)


def test_a_volatile_upper_is_refused_afterwards(stack: Stack) -> None:
    stack.open(volatile=True).close()
    with pytest.raises(Unsupported, match="volatile"):
        stack.open()


def test_conveniences(overlay: Overlay) -> None:
    overlay.makedirs("/a/b/c")
    overlay.makedirs("/a/b/c", exist_ok=True)
    assert error(lambda: overlay.makedirs("/a/b/c")) == "EEXIST"
    (overlay.path("/a/b") / "text").write_text("grüß")
    overlay.symlink("text", "/a/b/link")
    overlay.utime("/a/b/text", ns=(5, 7))
    overlay.chmod("/a/b/text", 0o4750)
    overlay.setxattr("/a/b/text", "user.k", b"v")
    overlay.copytree("/a", "/copy", symlinks=True)
    assert overlay.readlink("/copy/b/link") == "text"
    found = overlay.stat("/copy/b/text")
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o4750, 7)
    assert overlay.getxattr("/copy/b/text", "user.k") == b"v"
    assert overlay.path("/copy/b/text").read_text() == "grüß"
    overlay.rmtree("/copy")
    assert not overlay.exists("/copy")
    assert error(lambda: overlay.rmtree("/link")) == "ENOTDIR"
    overlay.rmtree("/none", ignore_errors=True)


# --- what real programs do -------------------------------------------------------------------------------------------


def test_a_database_with_wal_is_made_used_and_found_again(overlay: Overlay, stack: Stack) -> None:
    """SQLite wants a path. A directory that only upper has is one directory on disk, so its descriptor leads there."""
    overlay.makedirs("/var/db")

    def connect(overlay: Overlay) -> tuple[sqlite3.Connection, int]:
        fd = overlay.open_fd("/var/db", os.O_PATH | os.O_DIRECTORY)
        return sqlite3.connect(f"/proc/self/fd/{fd}/x.sqlite"), fd

    db, fd = connect(overlay)
    assert db.execute("pragma journal_mode=wal").fetchone() == ("wal",)
    with db:
        db.execute("create table t (n)")
        db.executemany("insert into t values (?)", [(i,) for i in range(1000)])
    assert {"x.sqlite", "x.sqlite-wal", "x.sqlite-shm"} == set(overlay.listdir("/var/db"))
    db.close()
    os.close(fd)
    overlay.close()
    with stack.open() as again:
        db, fd = connect(again)
        with db:
            db.execute("delete from t where n % 2")
        assert db.execute("select count(*), sum(n) from t").fetchone() == (500, sum(range(0, 1000, 2)))
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        db.close()
        os.close(fd)
        assert again.read_bytes("/var/db/x.sqlite")[:6] == b"SQLite"


def test_an_editors_save_by_rename(overlay: Overlay, stack: Stack) -> None:
    overlay.chmod("/etc/motd", 0o640)
    fd = overlay.open_fd("/etc/.motd.swp", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, b"edited")
    os.fsync(fd)
    os.close(fd)
    overlay.rename("/etc/motd", "/etc/motd~")
    overlay.rename("/etc/.motd.swp", "/etc/motd")
    fd = overlay.open_fd("/etc", os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)
    assert (overlay.read_bytes("/etc/motd"), overlay.read_bytes("/etc/motd~")) == (b"edited", b"hello")


def test_objects_as_git_writes_them(overlay: Overlay) -> None:
    for i in range(300):
        name = f"{i * 7919 % 65536:04x}"
        overlay.makedirs(f"/.git/objects/{name[:2]}", exist_ok=True)
        temp = f"/.git/objects/tmp_{i}"
        fd = overlay.open_fd(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
        os.write(fd, name.encode())
        os.close(fd)
        overlay.link(temp, f"/.git/objects/{name[:2]}/{name[2:]}")
        overlay.unlink(temp)
    assert sum(len(files) for _, _, files in overlay.walk("/.git")) == 300


def test_rotating_logs(overlay: Overlay) -> None:
    overlay.mkdir("/log")
    for turn in range(5):
        for n in (2, 1, 0):
            if overlay.exists(f"/log/l.{n}"):
                overlay.rename(f"/log/l.{n}", f"/log/l.{n + 1}")
        with overlay.open("/log/l.0", "a") as f:
            f.write(f"turn {turn}\n")
    assert sorted(overlay.listdir("/log")) == ["l.0", "l.1", "l.2", "l.3"]
    assert overlay.read_bytes("/log/l.3") == b"turn 1\n"


def test_unpacking_a_wheel(overlay: Overlay, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        for i in range(100):
            wheel.writestr(f"pkg/sub{i % 7}/mod{i}.py", f"x = {i}\n")
    with zipfile.ZipFile(tmp_path / "w.whl") as wheel:
        for info in wheel.infolist():
            target = overlay.path("/site-packages") / info.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(info))
    assert len(overlay.glob("/site-packages/**/*.py", recursive=True)) == 100


def test_copying_a_tree_of_twenty_thousand_files(stack: Stack) -> None:
    for i in range(200):
        (stack.lower / "many" / f"d{i:03}").mkdir(parents=True)
        for j in range(100):
            (stack.lower / "many" / f"d{i:03}" / f"f{j}").write_text(f"{i} {j}")
    with stack.open() as overlay:
        overlay.copytree("/many", "/copy")
        found = {f"{top}/{name}"[5:] for top, _, names in overlay.walk("/copy") for name in names}
        assert len(found) == 20_000
        assert all(overlay.read_bytes(f"/copy{path}") == overlay.read_bytes(f"/many{path}") for path in sorted(found)[::97])
        assert not (stack.upper / "many").exists()
