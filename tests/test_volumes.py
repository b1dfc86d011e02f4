"""Volumes and bind mounts of containers: made, filled, shared, shown and removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import peers
import pytest
import rootfs

from overlaykit import Container, InUse, InvalidReference, MountSpec, NotFound, Store
from overlaykit.store.filling import Site
from overlaykit.store.mountspec import parse_mount, parse_volume


@pytest.fixture
def image(store: Store, tmp_path: Path) -> str:
    rootfs.write(tmp_path / "rootfs.tar")
    store.import_rootfs(tmp_path / "rootfs.tar", "base:1", changes=["VOLUME /var/anon", "ENV A=1", 'CMD ["sh"]'])
    return "base:1"


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def test_an_empty_volume_is_filled_with_the_images_files(store: Store, image: str) -> None:
    box = store.create(image, mounts=["data:/etc"])
    with store.create(image).view() as view:
        data = store.volume("data").mountpoint
        assert names(data) == sorted(view.listdir("/etc"))
        for name in names(data):
            ours, theirs = (data / name).lstat(), view.lstat(f"/etc/{name}")
            assert (ours.st_mode, ours.st_uid, ours.st_mtime_ns) == (theirs.st_mode, theirs.st_uid, theirs.st_mtime_ns)
        ours, theirs = data.stat(), view.stat("/etc")
        assert (ours.st_mode, ours.st_uid, ours.st_mtime_ns) == (theirs.st_mode, theirs.st_uid, theirs.st_mtime_ns)
    box.fs.write_bytes("/etc/new", b"x")
    assert (data / "new").read_bytes() == b"x"
    assert "/etc/new" not in [change.path for change in box.diff()]


def test_a_volume_that_has_an_entry_is_not_filled(store: Store, image: str) -> None:
    (store.create_volume("data").mountpoint / "lost+found").mkdir()
    store.create(image, mounts=["data:/etc"])
    assert names(store.volume("data").mountpoint) == ["lost+found"]


def test_nocopy_leaves_a_volume_empty(store: Store, image: str) -> None:
    store.create(image, mounts=["data:/etc:nocopy"])
    assert names(store.volume("data").mountpoint) == []


def test_who_is_killed_while_a_volume_is_filled_leaves_it_empty_or_full(store: Store, image: str) -> None:
    """Docker copies in place: a copy that was interrupted left a volume that had entries and was never completed."""
    store.create_volume("data")
    volume = store.volume("data")
    (volume.directory / "filling/files").mkdir(parents=True)
    (volume.directory / "filling/files/half").write_text("half")
    assert names(volume.mountpoint) == []
    store.create(image, mounts=["data:/etc"])
    assert "half" not in names(volume.mountpoint)
    assert "motd" in names(volume.mountpoint)
    whole = names(volume.mountpoint)
    (volume.directory / "filled/files").mkdir(parents=True)  # killed after the copy was whole, with half of it moved in
    (volume.directory / "filled/into").symlink_to(".")
    for name in whole[: len(whole) // 2]:
        os.rename(volume.directory / "_data" / name, volume.directory / "filled/files" / name)
    assert names(store.volume("data").mountpoint) == whole
    assert names(volume.directory) == ["_data", "seed"]


def test_two_containers_fill_one_volume_once(store: Store, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create(image)  # so that it is unpacked
    filled: list[bool] = []
    fill = Site.fill

    def noted(*args: Any, **options: Any) -> bool:
        filled.append(fill(*args, **options))
        return filled[-1]

    monkeypatch.setattr(Site, "fill", noted)
    threads = [threading.Thread(target=store.create, args=(image,), kwargs={"mounts": ["data:/etc"]}) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(filled) == 1
    assert len(store.volume("data").users()) == 6


def test_a_volume_outlives_its_containers_and_is_refused_while_it_is_used(store: Store, image: str) -> None:
    first = store.create(image, name="first", mounts=["data:/srv"])
    with first:
        first.fs.write_bytes("/srv/kept", b"kept")
    with pytest.raises(InUse, match="first"):
        store.volume("data").remove()
    first.remove(volumes=True)
    second = store.create(image, mounts=["data:/elsewhere:ro"])
    assert second.fs.read_bytes("/elsewhere/kept") == b"kept"
    with pytest.raises(OSError, match="Read-only"):
        second.fs.write_bytes("/elsewhere/kept", b"")
    second.remove()
    store.volume("data").remove()
    with pytest.raises(NotFound):
        store.volume("data")


def test_anonymous_volumes_go_with_their_container_if_that_is_asked(store: Store, image: str) -> None:
    kept, gone = store.create(image), store.create(image, mounts=["/more"])
    assert len(store.volumes()) == 3
    gone.remove(volumes=True)
    assert [volume.name for volume in store.volumes()] == [kept.mounts[0].volume]
    kept.remove()
    assert len(store.prune_volumes()[0]) == 1


def test_prune_spares_volumes_that_have_a_name_or_a_user(store: Store, image: str) -> None:
    store.create(image, name="box")
    store.create_volume("named")
    anonymous = store.create_volume()
    assert store.prune_volumes()[0] == [anonymous.name]
    assert store.prune_volumes(all=True)[0] == ["named"]
    assert len(store.volumes()) == 1


def test_volumes_from_gives_the_same_mounts(store: Store, image: str, tmp_path: Path) -> None:
    store.create(image, name="first", mounts=["data:/etc", f"{tmp_path}:/host"])
    second = store.create(image, volumes_from=["first:ro"], mounts=["own:/etc"])
    found = {point.spec.target: (point.volume, point.spec.read_only) for point in second.mounts}
    anonymous = {point.spec.target: point.volume for point in store.container("first").mounts}["/var/anon"]
    assert found == {"/etc": ("own", False), "/host": (None, True), "/var/anon": (anonymous, True)}


def test_a_failed_create_leaves_no_volume(store: Store, image: str) -> None:
    with pytest.raises(InvalidReference, match="two mounts"):
        store.create(image, mounts=["aa:/x", "bb:/x"])
    with pytest.raises(NotFound, match="driver"):
        store.create(image, mounts=["a1:/x", MountSpec(source="b1", target="/y", driver="other")])
    assert store.volumes() == []
    assert store.containers() == []


def test_a_mounted_container_shows_its_volumes(store: Store, image: str, tmp_path: Path) -> None:
    peers.need_root("only root mounts")
    (tmp_path / "file").write_text("host\n")
    with peers.overlay_place("volumes") as place, Store(place / "store") as own:
        rootfs.write(place / "rootfs.tar")
        own.import_rootfs(place / "rootfs.tar", "base:1")
        mounts = ["data:/etc", "inner:/etc/inner", f"{tmp_path / 'file'}:/etc/motd:ro"]
        box = own.create("base:1", mounts=mounts)
        merged = box.mount()
        assert (merged / "etc/motd").read_text() == "host\n"
        with pytest.raises(OSError, match="Read-only"):
            (merged / "etc/motd").write_text("x")
        (merged / "etc/inner/made").write_text("made")
        box.unmount()
        assert box.fs.read_bytes("/etc/inner/made") == b"made"
        assert box.fs.read_bytes("/etc/motd") == b"host\n"
        assert str(place) not in Path("/proc/self/mountinfo").read_text()


def test_a_program_run_in_a_container_sees_its_volumes(tmp_path: Path) -> None:
    peers.need_root("a volume belongs to root here")
    busybox = peers.peer("busybox")
    with peers.overlay_place("volumes") as place, Store(place / "store") as own:
        rootfs.write(place / "rootfs.tar")
        own.import_rootfs(place / "rootfs.tar", "base:1")
        box = own.create("base:1", mounts=["data:/etc", "kept:/srv/kept:ro"])
        box.fs.write_bytes("/busybox", Path(busybox).read_bytes())
        box.fs.chmod("/busybox", 0o755)
        script = "echo ran > /etc/ran && ! touch /srv/kept/no && echo layer > /in-layer"
        assert box.run(["/busybox", "sh", "-c", script]) == 0
        assert (own.volume("data").mountpoint / "ran").read_text() == "ran\n"
        assert os.listdir(own.volume("kept").mountpoint) == []
        assert box.fs.read_bytes("/in-layer") == b"layer\n"
        assert str(place) not in Path("/proc/self/mountinfo").read_text()


def test_inspect_has_dockers_names(store: Store, image: str, tmp_path: Path) -> None:
    settings = {"labels": {"a": "b"}, "env": {"B": "2"}, "command": ["ls"], "workdir": "/srv", "user": "7", "hostname": "h"}
    mounts = ["data:/etc:ro", f"{tmp_path}:/host"]
    box = store.create(image, mounts=mounts, **settings)  # type: ignore[arg-type]
    facts = json.loads(json.dumps(box.inspect(), default=str))
    assert facts["HostConfig"]["Binds"] == mounts
    mount = next(m for m in facts["Mounts"] if m["Destination"] == "/etc")
    source = str(store.volume("data").mountpoint)
    assert mount == {
        "Type": "volume", "Name": "data", "Source": source, "Destination": "/etc", "Driver": "local", "Mode": "ro",
        "RW": False, "Propagation": "",
    }  # fmt: skip
    config = facts["Config"]
    assert (config["Env"], config["Cmd"], config["WorkingDir"], config["User"]) == (["A=1", "B=2"], ["ls"], "/srv", "7")
    assert (config["Hostname"], config["Labels"]) == ("h", {"a": "b"})


def test_a_container_is_renamed(store: Store, image: str) -> None:
    box: Container = store.create(image, name="box").rename("other")
    assert store.container("other").id == box.id
    with pytest.raises(InvalidReference):
        box.rename("/")


@pytest.mark.parametrize(
    "text",
    ["", ":", "aa:", ":/a", "/a:rw", "aa:/b:rw:c", "aa:b", "aa:/", "/:/", "aa:/b:zz", "aa:/b:ro,rw", "aa:/b:rshared",
     "/a:/b:nocopy", "a/b:/c", ".:/c", "aa:/b:", "aa:/../..", "a:/b"],
)  # fmt: skip
def test_v_refuses_what_docker_refuses(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse_volume(text)


@pytest.mark.parametrize(
    "text",
    ["", "src=a", "dst=b", "type=bind,dst=/a", "type=bind,src=a,dst=/b", "dst=/a,foo=bar", "dst=/a,foo", "dst=/a,ro=perhaps",
     "type=volume,dst=/a,bind-propagation=shared", "type=bind,src=/a,dst=/b,volume-nocopy", "dst=/a,volume-subpath=../x"],
)  # fmt: skip
def test_mount_refuses_what_docker_refuses(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse_mount(text)


def test_a_missing_source_is_made_for_v_and_refused_for_mount(store: Store, image: str, tmp_path: Path) -> None:
    box = store.create(image, mounts=[f"{tmp_path / 'new/dir'}:/host"])
    assert not (tmp_path / "new").exists()
    box.fs.write_bytes("/host/x", b"x")
    assert (tmp_path / "new/dir/x").read_bytes() == b"x"
    with pytest.raises(NotFound, match="does not exist"):
        store.create(image, mounts=[parse_mount(f"type=bind,src={tmp_path / 'other'},dst=/host")])


def test_a_subpath_stays_in_its_volume(store: Store, image: str, tmp_path: Path) -> None:
    data = store.create_volume("data").mountpoint
    (data / "sub").mkdir()
    (data / "out").symlink_to(tmp_path)
    box = store.create(image, mounts=[parse_mount("src=data,dst=/srv,volume-subpath=sub")])
    box.fs.write_bytes("/srv/x", b"x")
    assert (data / "sub/x").read_bytes() == b"x"
    escaped = store.create(image, mounts=[parse_mount("src=data,dst=/srv,volume-subpath=out")])
    with pytest.raises(FileNotFoundError):
        escaped.fs.listdir("/srv")


PROGRAM = """
import sys, overlaykit
store = overlaykit.Store(sys.argv[1])
box = store.create("base:1", mounts=["data:/etc", "/srv:/srv:ro"], read_only=sys.argv[2] == "sealed")
box.fs.write_bytes("/etc/new", b"x")
"""


@pytest.mark.parametrize("form", ["sealed", "open"])
def test_a_program_that_closes_nothing_lets_go_of_its_volumes(form: str, store: Store, image: str) -> None:
    """The records were closed first, so that its lease could not be settled: a warning at its very end, and a dead lease."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{PROGRAM}", store.root, form],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert [path for path in (store.root / "leases").iterdir() if path.name != "lock"] == []
    assert (store.volume("data").mountpoint / "new").read_bytes() == b"x"
