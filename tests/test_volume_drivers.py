"""Volume drivers, with real mounts: what is mounted is mounted once, for as long as somebody uses it, and by the last one
unmounted, also if that was killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import peers
import pytest
import rootfs
from kernel_overlay import SCRATCH
from users import SOMEBODY, as_somebody

from overlaykit import InUse, InvalidReference, NotFound, Store, Unsupported, cli
from overlaykit.overlay.mounttable import is_mounted
from overlaykit.store import drivers
from overlaykit.store.drivers import Mounting, Options
from overlaykit.store.drivers.remote import remote, ssh_remote

TMPFS = {"type": "tmpfs", "device": "tmpfs", "o": "size=1m,mode=750,uid=7"}


@pytest.fixture
def own() -> Iterator[Store]:
    """A store in memory with an image, whose mounts are gone afterwards."""
    with peers.overlay_place("drivers") as place:
        rootfs.write(place / "rootfs.tar", busybox=Path(peers.peer("busybox")))
        with Store(place / "store") as store:
            store.import_rootfs(place / "rootfs.tar", "base:1")
            yield store


def shown(store: Store, name: str) -> bool:
    return is_mounted(store.volume(name).directory / "_data")


# --- local ------------------------------------------------------------------------------------------------------------


def test_a_tmpfs_volume_is_mounted_while_somebody_uses_it(own: Store) -> None:
    volume = own.create_volume("memory", options=TMPFS)
    assert not shown(own, "memory")
    first, second = (own.create("base:1", name=name, mounts=["memory:/srv:nocopy"]) for name in ("first", "second"))
    first.fs.write_bytes("/srv/x", b"x")
    st = first.fs.stat("/srv")
    assert (oct(st.st_mode), st.st_uid) == ("0o40750", 7)
    with pytest.raises(OSError, match="No space left"):
        first.fs.write_bytes("/srv/big", bytes(2 << 20))
    assert second.fs.read_bytes("/srv/x") == b"x"  # one mount for both
    first.close()
    assert shown(own, "memory")
    second.close()
    assert not shown(own, "memory")
    with volume.mounted() as data:
        assert os.listdir(data) == []  # it went with its last user


def test_a_mounted_container_keeps_its_volumes_mounted(own: Store) -> None:
    own.create_volume("memory", options=TMPFS)
    box = own.create("base:1", mounts=["memory:/srv:nocopy"])
    (box.mount() / "srv/x").write_text("x")
    with own.volume("memory").mounted() as data:
        assert os.listdir(data) == ["x"]
    assert shown(own, "memory")
    with pytest.raises(InUse):
        own.volume("memory").rename("other")
    box.unmount()
    assert not shown(own, "memory")


def test_a_bind_volume_is_the_hosts_directory_and_never_removed(own: Store, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    options = {"type": "none", "o": "bind", "device": str(tmp_path)}
    own.create_volume("bound", options=options)
    box = own.create("base:1", mounts=["bound:/srv"])
    assert box.run(["/bin/sh", "-c", "echo new > /srv/new"]) == 0
    assert (tmp_path / "new").read_text() == "new\n"
    box.fs.listdir("/srv")
    with pytest.raises(InUse):
        own.volume("bound").remove()
    box.remove()
    own.volume("bound").remove()
    assert sorted(os.listdir(tmp_path)) == ["kept", "new"]


def test_an_empty_bind_volume_is_filled_whole_or_not_at_all(own: Store, tmp_path: Path) -> None:
    options = {"type": "none", "o": "bind", "device": str(tmp_path)}
    own.create_volume("bound", options=options)
    (tmp_path / ".overlaykit-filling").mkdir()  # somebody was killed
    own.create("base:1", mounts=["bound:/etc"])
    assert "motd" in os.listdir(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".overlaykit")]


def test_what_a_killed_process_had_mounted_is_unmounted_by_the_next(own: Store) -> None:
    own.create_volume("memory", options=TMPFS)
    code = (
        "import os, sys, signal; from overlaykit import Store; s = Store(sys.argv[1])\n"
        "with s.volume('memory').mounted(): print('mounted', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, own.root], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("mounted\n", -signal.SIGKILL)
    assert shown(own, "memory")
    assert "stale-mount" in [finding.kind for finding in own.fsck()]
    with Store(own.root):
        pass
    assert not shown(own, "memory")
    assert own.fsck() == []


def test_an_open_file_puts_the_unmounting_off(own: Store) -> None:
    own.create_volume("memory", options=TMPFS)
    with own.volume("memory").mounted() as data:
        file = (data / "x").open("w")
    assert shown(own, "memory")
    with pytest.raises(InUse, match="open"):
        own.volume("memory").remove()
    file.close()
    with Store(own.root):
        pass
    assert not shown(own, "memory")
    own.volume("memory").remove()


@pytest.mark.parametrize(
    "options",
    [{"colour": "blue"}, {"type": "tmpfs"}, {"device": "x"}, {"o": "bind"}, {"type": "tmpfs", "o": "size=1m"}],
)
def test_options_that_docker_refuses_are_refused(store: Store, options: dict[str, str]) -> None:
    with pytest.raises(InvalidReference):
        store.create_volume("data", options=options)
    assert store.volumes() == []
    assert os.listdir(store.volume_store.folder) in ([], [".lock"])


def test_a_file_system_that_the_kernel_lacks_is_named(own: Store) -> None:
    if "\tnfs\n" in Path("/proc/filesystems").read_text():
        peers.unavailable("this kernel has nfs, and nobody serves any")
    own.create_volume("far", options={"type": "nfs", "device": ":/x", "o": "addr=127.0.0.1"})
    with pytest.raises(Unsupported, match="nfs"), own.volume("far").mounted():
        pass
    with pytest.raises(Unsupported, match="nfs"):
        own.create("base:1", mounts=["far:/srv"])
    assert own.containers() == []


# --- encrypted --------------------------------------------------------------------------------------------------------


@pytest.fixture
def passfile(tmp_path: Path) -> Path:
    (tmp_path / "passphrase").write_text("correct horse\n")
    return tmp_path / "passphrase"


def everything_below(directory: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def test_an_encrypted_volume_keeps_no_plain_text_and_no_passphrase(own: Store, passfile: Path) -> None:
    peers.peer("gocryptfs")
    own.create_volume("secret", driver="encrypted", options={"passfile": str(passfile)})
    box = own.create("base:1", mounts=["secret:/etc"])
    script = "echo 'in plain text' > /etc/letter && chown 5:6 /etc/letter && ln /etc/letter /etc/hard"
    assert box.run(["/bin/sh", "-c", script]) == 0
    assert not shown(own, "secret")
    stored = everything_below(own.root)
    assert b"correct horse" not in stored
    assert b"in plain text" not in stored
    assert not list(own.root.rglob("letter"))
    with box.view() as view:
        st = view.stat("/etc/letter")
        assert (view.read_bytes("/etc/letter"), st.st_uid, st.st_gid, st.st_nlink) == (b"in plain text\n", 5, 6, 2)
        assert view.exists("/etc/motd")
    assert (own.volume("secret").clone("twin").directory / "cipher/gocryptfs.conf").exists()
    own.volume("secret").export(passfile.with_name("plain.tar"))
    assert own.import_volume("plain", passfile.with_name("plain.tar")).mountpoint.joinpath("letter").exists()
    own.import_volume("other", passfile.with_name("plain.tar"), driver="encrypted", options={"passfile": str(passfile)})
    own.cp("volume:other:/letter", passfile.with_name("letter"))
    assert not shown(own, "other")
    passfile.write_text("wrong horse\n")
    with pytest.raises(OSError, match="passphrase"), own.volume("secret").mounted():
        pass
    assert own.fsck() == []


def test_the_passphrase_comes_from_a_command_or_a_descriptor(own: Store) -> None:
    peers.peer("gocryptfs")
    own.create_volume("one", driver="encrypted", options={"passcommand": "echo horse"})
    with own.volume("one").mounted() as data:
        (data / "x").write_text("x")
    number = 200  # of a descriptor that nothing else has
    own_passphrase(number)
    own.create_volume("two", driver="encrypted", options={"passfd": str(number)})
    own_passphrase(number)
    with own.volume("two").mounted() as data:
        (data / "x").write_text("x")
    os.close(number)
    with pytest.raises(OSError, match="Bad file descriptor"), own.volume("two").mounted():
        pass


def own_passphrase(number: int) -> None:
    """Let descriptor `number` give a passphrase."""
    reading, writing = os.pipe()
    os.write(writing, b"horse\n")
    os.dup2(reading, number)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    "options",
    [{}, {"password": "horse"}, {"passfile": "relative"}, {"passfd": "x"}, {"passfile": "/a", "passfd": "3"}],
)
def test_an_encrypted_volume_wants_to_know_where_its_passphrase_is(store: Store, options: dict[str, str]) -> None:
    with pytest.raises(InvalidReference):
        store.create_volume("secret", driver="encrypted", options=options)
    assert store.volumes() == []


def write_in_secret(top: Path) -> int:
    """0 once a container has written to an encrypted volume of its user's own store, and all of it is there, and goes."""
    with Store(top / "store") as store:
        store.import_rootfs(top / "rootfs.tar", "base:1")
        store.create_volume("secret", driver="encrypted", options={"passfile": str(top / "passphrase")})
        with store.create("base:1", name="box", mounts=["secret:/etc"]) as box:
            box.fs.write_bytes("/etc/letter", b"in plain text")
            assert box.fs.read_bytes("/etc/motd")  # it was filled
            assert shown(store, "secret")
        assert not shown(store, "secret")
        assert box.run(["/bin/sh", "-c", "cat /etc/letter > /etc/copy"]) == 0
        with store.volume("secret").clone("twin").mounted() as data:
            assert [(data / name).read_text() for name in ("letter", "copy")] == ["in plain text"] * 2
        assert b"in plain text" not in everything_below(store.root)
        assert store.fsck(deep=True) == []
        box.remove()
        store.prune_volumes(all=True)
        assert os.listdir(store.root / "volumes") == [".lock"]
    return 0


@pytest.fixture
def users(passfile: Path) -> Iterator[Path]:
    """A folder of an ordinary user with a passphrase and the tar of a root filesystem."""
    peers.need_root("becomes somebody else")
    peers.peer("gocryptfs")
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="overlaykit-test-") as name:
        top = Path(name)
        rootfs.write(top / "rootfs.tar", busybox=Path(peers.peer("busybox")))
        shutil.copy(passfile, top)
        for path in (top, *top.iterdir()):
            os.chown(path, SOMEBODY, SOMEBODY)
        yield top


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child does not touch what other threads hold
def test_who_is_not_root_has_encrypted_volumes_in_a_store_of_his_own(users: Path) -> None:
    assert as_somebody(lambda: write_in_secret(users), fuse=users / "fuse") == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_who_may_not_mount_by_fuse_is_told_so_and_has_lost_nothing(users: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It was "fs.Mount failed: fusermount exited with code 256"."""

    def refused() -> int:
        with Store(users / "store") as store:
            store.create_volume("secret", driver="encrypted", options={"passfile": str(users / "passphrase")})
            with pytest.raises(Unsupported, match=r"FUSE.*Permission denied"), store.volume("secret").mounted():
                pass
            assert store.fsck() == []
            store.volume("secret").remove()
        return cli.main(["--root", str(users / "store"), "volume", "ls", "--quiet"])

    assert as_somebody(refused, fuse=users / "fuse", fuse_mode=0o600) == 0
    assert capfd.readouterr().out == ""


# --- remote -----------------------------------------------------------------------------------------------------------


def test_a_remote_volume_is_what_rclone_mounts(own: Store, tmp_path: Path) -> None:
    peers.peer("rclone")
    (tmp_path / "there").write_text("there\n")
    own.create_volume("far", driver="remote", options={"url": f"file://{tmp_path}"})
    with own.create("base:1", mounts=["far:/srv"]) as box:
        assert box.fs.read_bytes("/srv/there") == b"there\n"
        box.fs.write_bytes("/srv/here", b"here\n")
    assert not shown(own, "far")
    end = time.monotonic() + 120  # it writes behind
    while not (tmp_path / "here").exists() or (tmp_path / "here").read_bytes() != b"here\n":
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("tool", ["rclone", "sshfs"])
def test_a_remote_volume_is_mounted_over_sftp(tool: str, own: Store, tmp_path: Path) -> None:
    rclone = peers.peer("rclone")
    peers.peer(tool)
    served = tmp_path / "served"
    served.mkdir()
    (served / "there").write_text("there\n")
    peers.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
    argv = [rclone, "serve", "sftp", served, "--addr", "127.0.0.1:0", "--no-auth", "--cache-dir", tmp_path / "cache"]
    trust = {"StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null"}
    more = {"key_file": str(tmp_path / "key")} if tool == "rclone" else trust
    server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        url = f"sftp://user@127.0.0.1:{port_of(server)}/"
        own.create_volume("far", driver="remote", options={"url": url, "tool": tool, **more})
        with own.volume("far").mounted() as data:
            assert (data / "there").read_text() == "there\n"
        assert not shown(own, "far")
    finally:
        server.terminate()
        server.communicate()


def port_of(server: subprocess.Popen[str]) -> int:
    """Where it listens, once it does: on a port that the kernel chose, and nobody else has."""
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"listening on .*:(\d+)$", line):
            return int(found[1])
    raise AssertionError("it does not serve")


def test_addresses_are_fsspecs(store: Store) -> None:
    for url, wanted in (
        ("sftp://me@host:2222/a b", ":sftp,host='host',user='me',port='2222':/a b"),
        ("s3://bucket/prefix", ":s3,env_auth='true':bucket/prefix"),
        ("gs://bucket", ":gcs,env_auth='true':bucket"),
        ("https://host/dir/", ":http,url='https://host/dir/':"),
        ("file:///srv", ":local:/srv"),
        ("rclone://mine/dir", "mine:dir"),
    ):
        assert remote({"url": url}) == wanted
    assert remote({"url": "s3://b", "endpoint": "http://it's"}) == ":s3,endpoint='http://it''s',env_auth='true':b"
    assert ssh_remote({"url": "ssh://me@host:22/srv"}) == ("me@host:/srv", 22)


@pytest.mark.parametrize(
    "options",
    [{}, {"url": "nothing"}, {"url": "gopher://h/"}, {"url": "sftp://me:word@h/"}, {"url": "sftp:///x"},
     {"url": "sftp://h:port/"}, {"url": "s3://b", "secret_access_key": "x"}, {"url": "s3://b", "a,b": "c"},
     {"url": "sftp://h/", "tool": "rm"}],
)  # fmt: skip
def test_addresses_that_cannot_be_mounted_are_refused(store: Store, options: dict[str, str]) -> None:
    with pytest.raises(InvalidReference):
        store.create_volume("far", driver="remote", options=options)
    assert store.volumes() == []


def test_a_program_that_is_missing_is_named(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **options: None)
    with pytest.raises(Unsupported, match="rclone is not installed"):
        store.create_volume("far", driver="remote", options={"url": "file:///srv"})
    with pytest.raises(Unsupported, match="gocryptfs is not installed"):
        store.create_volume("secret", driver="encrypted", options={"passcommand": "echo horse"})
    assert store.volumes() == []


# --- others' ----------------------------------------------------------------------------------------------------------


class Elsewhere(Mounting):
    """A driver as another package might bring it: a directory that is bound."""

    def create(self, directory: Path, options: Options) -> None:
        Path(options["at"]).mkdir()

    def mount(self, directory: Path, options: Options) -> None:
        peers.run("mount", "--bind", options["at"], directory / "_data")

    def remove(self, directory: Path, options: Options) -> None:
        Path(options["at"]).rmdir()


def test_another_packages_driver_is_an_entry_point(own: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint(name="elsewhere", value=f"{__name__}:Elsewhere", group=drivers.GROUP)]
    points.append(EntryPoint(name="broken", value="no_such_module:Driver", group=drivers.GROUP))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    own.create_volume("data", driver="elsewhere", options={"at": str(tmp_path / "place")})
    with own.volume("data").mounted() as data:
        (data / "x").write_text("x")
        assert (tmp_path / "place/x").read_text() == "x"
        (data / "x").unlink()
    own.volume("data").remove()
    assert not (tmp_path / "place").exists()
    with pytest.raises(Unsupported, match="cannot be loaded"):
        own.create_volume("other", driver="broken")
    with pytest.raises(NotFound, match="no volume driver"):
        own.create_volume("other", driver="missing")
