"""Programs run with a merged tree as their root: as root and as an ordinary user, by the kernel and by fuse-overlayfs."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

import peers
import pytest
from users import SOMEBODY, as_somebody

from overlaykit import Store
from overlaykit.errors import InUse, NotFound, OverlaykitError, Unsupported
from overlaykit.overlay import Mount, Overlay, inside, overlay_mount, run_inside
from overlaykit.overlay.identity import Identity, identity

SCRIPT = "echo new > /etc/motd && rm /etc/hosts && mkdir /made && id -u"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """lower has a shell with all it needs, etc/motd and etc/hosts; upper and work are empty."""
    lower = tmp_path / "lower"
    for name in ("lower/etc", "lower/dev", "lower/proc", "lower/tmp", "upper", "work"):
        (tmp_path / name).mkdir(parents=True)
    (lower / "etc/motd").write_text("old\n")
    (lower / "etc/hosts").write_text("hosts\n")
    wanted = set()
    for tool in ("/bin/sh", "/bin/cat", "/bin/rm", "/bin/mkdir", "/usr/bin/id", "/bin/kill"):
        wanted.add(tool)
        listed = subprocess.run(["ldd", tool], capture_output=True, text=True, check=True).stdout.split()
        wanted |= {word for word in listed if word.startswith("/")}
    for path in sorted(wanted):
        place = lower / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(Path(path).read_bytes())
        place.chmod(0o755)
    return tmp_path


def refuse(what: Mount) -> Mount:
    raise PermissionError(errno.EPERM, "no mounts here", what.target)


def lines(base: Path) -> list[str]:
    """The merged tree, as an Overlay sees it afterwards."""
    with Overlay([base / "lower"], base / "upper", base / "work") as overlay:
        return [*sorted(overlay.listdir("/etc")), overlay.path("/etc/motd").read_text(), str(overlay.isdir("/made"))]


def test_root_runs_a_program_and_its_changes_are_in_upper(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    peers.need_root("mounts")
    what = overlay_mount([base / "lower"], base / "upper", base / "work")
    assert run_inside(what, ["sh", "-c", SCRIPT]) == 0
    assert capfd.readouterr().out == "0\n"
    assert lines(base) == ["motd", "new\n", "True"]
    assert str(base) not in Path("/proc/self/mountinfo").read_text()


def test_an_ordinary_user_is_root_inside(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    peers.need_root("becomes an ordinary user")
    for path in (base, *base.rglob("*")):
        os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)
    for above in base.parents:
        if above.stat().st_mode & 0o5 != 0o5:
            above.chmod(above.stat().st_mode | 0o011)
    with Overlay([base / "lower"], base / "upper", base / "work", userxattr=True) as overlay:
        what = overlay.mount_spec()
    assert as_somebody(lambda: run_inside(what, ["sh", "-c", SCRIPT])) == 0
    assert capfd.readouterr().out == "0\n"
    assert (base / "upper/etc/motd").read_text() == "new\n"
    assert (base / "upper/etc/motd").stat().st_uid == SOMEBODY
    assert (base / "upper/made").is_dir()


def test_a_users_own_store_runs_programs_and_sees_what_they_did(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    peers.need_root("becomes an ordinary user")

    def whole_way(root: Path) -> int:
        with Store(root) as store:
            store.import_rootfs(base / "lower", "base:1")
            box = store.create("base:1", name="box", mounts=["data:/srv"])
            box.fs.path("/etc/before").write_text("in process\n")
            status = box.run(["sh", "-c", SCRIPT + " && cat /etc/before && echo kept > /srv/file"])
            print(sorted(f"{change.kind} {change.path}" for change in box.diff()), flush=True)
            box.commit("base:2")
            return status

    assert whole_way(base / "roots") == 0  # what is imported on the way may be out of the user's reach
    as_root = capfd.readouterr().out
    for path in (base, *(base / "lower").rglob("*"), base / "lower"):
        os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)
    for above in base.parents:
        if above.stat().st_mode & 0o5 != 0o5:
            above.chmod(above.stat().st_mode | 0o011)
    assert as_somebody(lambda: whole_way(base / "users")) == 0
    assert capfd.readouterr().out == as_root
    assert as_root.startswith("0\nin process\n['A /etc/before', 'A /made',")
    assert (base / "users/volumes/data/_data/file").stat().st_uid == SOMEBODY


def test_fuse_overlayfs_stands_in_and_does_not_stay(
    base: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers.need_root("/dev/fuse is root's on many machines")
    monkeypatch.setattr(inside, "mount", refuse)
    assert run_inside(overlay_mount([base / "lower"], base / "upper", base / "work"), ["sh", "-c", SCRIPT]) == 0
    assert capfd.readouterr().out == "0\n"
    assert lines(base) == ["motd", "new\n", "True"]
    upper = os.fsencode(base / "upper")
    end = time.monotonic() + 120
    while any(upper in command(pid) for pid in os.listdir("/proc") if pid.isdigit()):
        assert time.monotonic() < end, "fuse-overlayfs is still there"
        time.sleep(0.01)


def command(pid: str) -> bytes:
    """What process `pid` was started with, nothing if it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_the_exit_status_is_the_programs(base: Path) -> None:
    peers.need_root("mounts")
    what = overlay_mount([base / "lower"], base / "upper", base / "work")
    assert run_inside(what, ["sh", "-c", "exit 7"]) == 7
    assert run_inside(what, ["sh", "-c", "kill -9 $$"]) == 137
    assert run_inside(what, ["sh", "-c", "test $A = b && test $PWD = /etc"], env={"A": "b"}, directory="/etc") == 0


def test_a_program_is_who_its_user_is(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every program ran as root. Who somebody is the tree says, and a tree may say anything."""
    peers.need_root("mounts")
    what = overlay_mount([base / "lower"], base / "upper", base / "work")
    assert run_inside(what, ["sh", "-c", "id -u; id -g; id -G; echo $HOME"], user=Identity(7, 8, (9, 10), "/home")) == 0
    assert capfd.readouterr().out.split() == ["7", "8", "8", "9", "10", "/home"]
    assert run_inside(what, ["rm", "/etc/hosts"], user=Identity(7, 8)) == 1
    for make in (os.mkfifo, lambda path: path.mkdir(), lambda path: path.symlink_to(base / "secret"), lambda path: None):
        with Overlay([base / "lower"], base / "upper", base / "work") as overlay:
            make(base / "lower/etc/passwd")
            (base / "secret").write_text("app:x:1:1::/:\n")
            assert identity(overlay, "12:13") == Identity(12, 13, (), "/")
            with pytest.raises(NotFound, match="no user 'app'"):
                identity(overlay, "app")
        if (base / "lower/etc/passwd").is_dir():
            (base / "lower/etc/passwd").rmdir()
        else:
            (base / "lower/etc/passwd").unlink(missing_ok=True)
    with Overlay([base / "lower"], base / "upper", base / "work") as overlay:
        rows = [b"\xff:x:3:x", b"nul:x:1:1::/\0:", b"app:x:0x0:0::/:", b"big:x:" + b"9" * 5000 + b":0::/:"]
        overlay.path("/etc/passwd").write_bytes(b"\n".join(rows))
        with pytest.raises(OverlaykitError, match="99999999999 is no id"):
            identity(overlay, "big")
        for who, said in (
            ("\udcff", "no number 'x'"),
            ("nul", "no user 'nul'"),
            ("app", "no number '0x0'"),
            ("5:-1", "no group '-1'"),
        ):
            with pytest.raises(NotFound, match=said):
                identity(overlay, who)


def test_a_container_that_is_in_use_is_refused_by_its_name(base: Path) -> None:
    """To look at who the program is took the writer's lock, and the refusal spoke of directories of the store."""
    with Store(base / "store") as store, Store(base / "store") as other:
        store.import_rootfs(base / "lower", "base:1")
        box = store.create("base:1", name="box", user="4:5")
        other.container("box").fs.write_bytes("/etc/passwd", b"app:x:7:8::/app:\n")
        assert (box.identity(), box.identity("app")) == (Identity(4, 5, (), "/"), Identity(7, 8, (), "/app"))
        with pytest.raises(InUse, match=r"^container box is open in another process$"):
            box.run(["sh"])


def test_who_is_no_root_has_nobody_else_inside(base: Path) -> None:
    peers.need_root("becomes an ordinary user")
    what = overlay_mount([base / "lower"], base / "upper", base / "work")

    def program() -> int:
        with pytest.raises(Unsupported, match="no user 7:0"):
            run_inside(what, ["sh"], user=Identity(7))
        return 0

    assert as_somebody(program) == 0


def test_nothing_of_the_host_but_devices_shows(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    peers.need_root("mounts")
    (base / "secret").write_text("s")
    what = overlay_mount([base / "lower"], base / "upper", base / "work")
    assert run_inside(what, ["cat", f"{base}/secret"]) == 1
    assert run_inside(what, ["sh", "-c", "cat /../../../etc/motd; echo x > /dev/null"]) == 0
    assert capfd.readouterr().out == "old\n"


def test_a_program_that_is_not_there_is_an_error_with_its_name(base: Path) -> None:
    peers.need_root("mounts")
    what = overlay_mount([base / "lower"], base / "upper", base / "work")
    with pytest.raises(FileNotFoundError) as caught:
        run_inside(what, ["missing"])
    assert caught.value.filename == "missing"
    with pytest.raises(FileNotFoundError):
        run_inside(what, ["sh"], directory="/nowhere")
    with pytest.raises(ValueError, match="no program"):
        run_inside(what, [])


def test_layers_that_are_not_there_are_an_error(base: Path) -> None:
    peers.need_root("mounts")
    with pytest.raises(OSError, match="No such file"):
        run_inside(overlay_mount([base / "no"], base / "upper", base / "work"), ["sh"])


def test_no_namespaces_is_unsupported_and_says_what_to_do(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "CLONE_NEWNS", -1)  # flags that no kernel takes
    with pytest.raises(Unsupported, match="namespace") as caught:
        run_inside(overlay_mount([base / "lower"], base / "upper", base / "work"), ["sh"])
    assert caught.value.hint
