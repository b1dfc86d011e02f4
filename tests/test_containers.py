"""Containers: their files, what they changed, what becomes of it; mounted by the kernel, shared between processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import peers
import pytest
import rootfs
from treetext import differences, listing

import overlaykit
from overlaykit import Container, IntegrityError, InUse, InvalidImage, NotFound, Store, cli
from overlaykit.oci import RuntimeConfig, validate
from overlaykit.store.instructions import apply_changes


@pytest.fixture
def box(store: Store, tmp_path: Path) -> Container:
    """A container called box, of a small image base:1."""
    rootfs.write(tmp_path / "rootfs.tar")
    store.import_rootfs(tmp_path / "rootfs.tar", "base:1", changes=["ENV A=1 B=2", 'CMD ["sh"]'])
    return store.create("base:1", name="box")


def write(container: Container, path: str, text: str) -> None:
    with container.fs.open(path, "w") as file:
        file.write(text)


def read(container: Container, path: str) -> str:
    with container.view() as view, view.open(path) as file:
        return str(file.read())


# --- files ------------------------------------------------------------------------------------------------------------


def test_containers_share_layers_and_nothing_else(store: Store, box: Container) -> None:
    other = store.create("base:1", name="other")
    assert store.snapshots.lowers(box.id) == store.snapshots.lowers(other.id)
    write(box, "/etc/motd", "changed\n")
    box.fs.unlink("/etc/hostname")
    assert read(other, "/etc/motd") == "welcome\n"
    assert other.fs.exists("/etc/hostname")
    assert other.diff() == []


def test_a_container_is_found_by_name_id_and_the_beginning_of_its_id(store: Store, box: Container) -> None:
    for wanted in ("box", box.id, box.id[:12], box.id[:6]):
        assert store.container(wanted).id == box.id
    for missing in ("bo", "zz", box.id + "0", "%", ""):
        with pytest.raises(NotFound):
            store.container(missing)


def test_fs_is_one_overlay_until_it_is_closed(store: Store, box: Container) -> None:
    first = box.fs
    assert store.container("box").fs is first
    with box:
        pass
    assert first.closed
    assert box.fs is not first


def test_two_processes_do_not_write_at_once_but_both_may_read(store: Store, box: Container) -> None:
    write(box, "/etc/motd", "mine\n")
    with Store(store.root) as other:
        theirs = other.container("box")
        with pytest.raises(InUse):
            _ = theirs.fs
        assert read(theirs, "/etc/motd") == "mine\n"
        assert [change.path for change in theirs.diff()] == ["/etc", "/etc/motd"]
        with pytest.raises(InUse):
            theirs.remove()
        # It once packed a file that was just being written: "0 bytes where 20000 were announced".
        with pytest.raises(InUse):
            theirs.commit("half:1")
        assert "half:1" not in [tag for image in store.images() for tag in image.tags]
        assert len(box.commit("whole:1").layers) == 2
        box.close()
        write(theirs, "/etc/motd", "theirs\n")


def test_removing_a_container_removes_its_writable_layer_only(store: Store, box: Container) -> None:
    write(box, "/etc/big", "x" * 100_000)
    directory = store.snapshots.directory(box.id)
    assert box.remove() >= 100_000
    assert not directory.exists()
    assert store.containers() == []
    assert len(list(store.snapshots.walk("committed"))) == 1
    with pytest.raises(NotFound):
        store.container("box")


def test_files_that_are_being_committed_outlast_their_container(store: Store, box: Container) -> None:
    """A commit failed half way with "No such file or directory" when another process removed the container: its files
    went while they were being packed. Now they stay until the commit is done, and go then."""
    write(box, "/etc/motd", "changed\n")
    directory = store.snapshots.directory(box.id)
    with store.operation() as layout:
        box.hold(layout.lease)
        upper = box.upper()
        with Store(store.root) as other:
            box.close()
            assert other.container("box").remove() == 0
        with pytest.raises(NotFound):
            box.hold(layout.lease)
        with os.fdopen(upper.contents(upper.tree)(upper.tree.find("etc/motd"))) as file:
            assert file.read() == "changed\n"
    assert directory.exists()
    with Store(store.root):
        assert not directory.exists()


# --- commit -----------------------------------------------------------------------------------------------------------


def test_commit_makes_an_image_of_what_the_container_shows(store: Store, box: Container) -> None:
    write(box, "/etc/motd", "changed\n")
    write(box, "/etc/new", "new\n")
    box.fs.unlink("/etc/hostname")
    box.fs.rmtree("/lib/deep")
    image = box.commit("mine:1", author="A <a@example.org>", message="changes")
    assert validate(image) == []
    assert image.tags == ["mine:1"]
    assert image.diff_ids[:1] == store.image("base:1").diff_ids
    assert (image.config.author, image.history[-1].comment) == ("A <a@example.org>", "changes")
    assert image.runtime == store.image("base:1").runtime
    fresh = store.create("mine:1")
    seconds = {"seconds": True}
    assert differences(listing("/", fs=box.fs, **seconds), listing("/", fs=fresh.fs, **seconds)) == ""
    assert fresh.diff() == []


def test_a_commit_without_changes_adds_no_layer(store: Store, box: Container) -> None:
    image = box.commit("same:1", message="nothing")
    assert image.diff_ids == store.image("base:1").diff_ids
    assert image.history[-1].empty_layer
    assert image.id != store.image("base:1").id


def test_a_commit_without_a_name_is_found_by_its_id(store: Store, box: Container) -> None:
    image = box.commit()
    assert image.tags == []
    assert store.image(image.id.short).id == image.id


def test_commit_changes_the_config(box: Container) -> None:
    image = box.commit("mine:1", changes=['ENTRYPOINT ["/bin/app"]', "ENV B=3 C=$A", "USER 7", "LABEL a=b"])
    assert image.runtime.entrypoint == ("/bin/app",)
    assert image.runtime.env == ("A=1", "B=3", "C=1")
    assert (image.runtime.cmd, image.runtime.user, image.runtime.labels) == (("sh",), "7", {"a": "b"})


def test_a_commit_that_fails_leaves_nothing(store: Store, box: Container) -> None:
    write(box, "/etc/new", "x")
    before = sorted(os.listdir(store.root / "blobs/sha256"))
    for arguments in ({"changes": ["JUMP"]}, {"compression": "rar"}, {"name": "Not A Name"}):
        with pytest.raises(overlaykit.OverlaykitError):
            box.commit(**{"name": "mine:1", **arguments})  # type: ignore[arg-type]
    assert sorted(os.listdir(store.root / "blobs/sha256")) == before
    assert os.listdir(store.root / "leases") == ["lock"]


CHANGES = {
    "CMD echo hi": {"cmd": ("/bin/sh", "-c", "echo hi")},
    'CMD ["echo", "hi"]': {"cmd": ("echo", "hi")},
    "cmd []": {"cmd": ()},
    "ENTRYPOINT top -b": {"entrypoint": ("/bin/sh", "-c", "top -b")},
    "ENV A=1 B='two words' C=\"x y\"": {"env": ("PATH=/bin", "A=1", "B=two words", "C=x y")},
    "ENV KEY some value": {"env": ("PATH=/bin", "KEY=some value")},
    "ENV PATH=$PATH:/opt": {"env": ("PATH=/bin:/opt",)},
    "ENV X=${PATH}s Y='$PATH' Z=\\$PATH": {"env": ("PATH=/bin", "X=/bins", "Y=$PATH", "Z=$PATH")},
    "EXPOSE 80 53/udp 8000-8001": {"exposed_ports": {"80/tcp": {}, "53/udp": {}, "8000/tcp": {}, "8001/tcp": {}}},
    "LABEL a.b=c d=": {"labels": {"a.b": "c", "d": ""}},
    "ONBUILD RUN make": {"on_build": ("RUN make",)},
    "STOPSIGNAL SIGINT": {"stop_signal": "SIGINT"},
    "USER 1000:1000": {"user": "1000:1000"},
    "VOLUME /data /logs": {"volumes": {"/data": {}, "/logs": {}}},
    'VOLUME ["/with space"]': {"volumes": {"/with space": {}}},
    "WORKDIR /srv": {"working_dir": "/srv"},
    "WORKDIR app/../lib": {"working_dir": "/home/lib"},
}


@pytest.mark.parametrize("line", CHANGES)
def test_a_change_is_what_a_dockerfile_means(line: str) -> None:
    config = apply_changes(RuntimeConfig(env=("PATH=/bin",), working_dir="/home"), [line])
    assert {name: getattr(config, name) for name in CHANGES[line]} == CHANGES[line]


@pytest.mark.parametrize("line", ["RUN make", "", "CMD", "ENV A", "ENV =1", "ENV 'A=1", "EXPOSE http", "LABEL a=b c"])
def test_what_is_no_change_is_refused(line: str) -> None:
    with pytest.raises(InvalidImage):
        apply_changes(RuntimeConfig(), [line])


# --- what docker shows ------------------------------------------------------------------------------------------------


def test_inspect_has_dockers_names(store: Store, box: Container) -> None:
    store.create(box.commit("base:2", changes=["LABEL x=y"]))
    write(box, "/etc/new", "x")
    second = store.create(box.commit("two:1"), name="second")
    found = json.loads(json.dumps(second.inspect()))
    assert (found["Name"], found["Config"]["Image"], found["Config"]["Cmd"]) == ("/second", "two:1", ["sh"])
    assert (found["Path"], found["Args"]) == ("sh", [])
    data = found["GraphDriver"]["Data"]
    assert sorted(data) == ["LowerDir", "MergedDir", "UpperDir", "WorkDir"]
    lowers = data["LowerDir"].split(":")
    assert lowers == [str(path) for path in reversed(store.snapshots.lowers(second.id))]  # the highest first
    assert (Path(lowers[0]) / "etc/new").exists()
    assert Path(data["UpperDir"]).parent == Path(data["WorkDir"]).parent == Path(data["MergedDir"]).parent
    image = json.loads(json.dumps(store.inspect("two:1")))
    assert image["RootFS"]["Layers"] == list(store.image("two:1").diff_ids)
    assert (image["RepoTags"], image["Config"]["Cmd"]) == (["two:1"], ["sh"])
    assert image["GraphDriver"]["Data"]["UpperDir"] == lowers[0]
    with pytest.raises(NotFound, match="nobody"):
        store.inspect("nobody")


# --- mounted ----------------------------------------------------------------------------------------------------------


def test_the_kernel_shows_the_same_tree(store: Store, box: Container, tmp_path: Path) -> None:
    peers.need_root("mounts")
    write(box, "/etc/motd", "before\n")
    box.fs.rmtree("/lib/deep")
    expected = listing("/", fs=box.fs)
    place = box.mount()
    try:
        assert str(place) == box.inspect()["GraphDriver"]["Data"]["MergedDir"]
        assert differences(expected, listing(place)) == ""
        for refused in (lambda: box.fs, box.mount, box.remove):
            with pytest.raises(InUse, match="mounted"):
                refused()
        (place / "etc/motd").write_text("after\n")
        assert read(box, "/etc/motd") == "after\n"
    finally:
        assert box.unmount() == [place]
    assert not place.exists()
    assert box.fs.exists("/etc/motd")
    with pytest.raises(NotFound):
        box.unmount()
    target = tmp_path / "with, odd: name"
    target.mkdir()
    assert store.container("box").mount(target) == target
    assert box.mounted_at() == [target]
    box.remove(force=True)
    assert not os.path.ismount(target)


def test_what_another_process_has_open_is_not_mounted(store: Store, box: Container) -> None:
    peers.need_root("mounts")
    _ = box.fs
    with Store(store.root) as other, pytest.raises(InUse, match="open"):
        other.container("box").mount()


# --- without root -----------------------------------------------------------------------------------------------------

WITHOUT_ROOT = """
import os, sys
import overlaykit
from overlaykit.oci import validate

def flow(root, rootfs):
    with overlaykit.Store(root) as store:
        image = store.import_rootfs(rootfs, "base:1")
        with store.create(image, name="box") as box:
            box.fs.rmtree("/lib/deep")
            with box.fs.open("/etc/passwd", "a") as file:
                file.write("more\\n")
            with box.fs.open("/etc/new", "w") as file:
                file.write("x")
        changes = " ".join(f"{change.kind}{change.path}" for change in box.diff())
        made = box.commit("mine:1")
        assert validate(made) == []
        owners = sorted({(entry.uid, entry.gid) for entry in made.layers[1].tree()})
        with store.create("mine:1") as fresh:
            assert not fresh.fs.exists("/lib/deep")
        refused = ""
        try:
            box.mount()
            box.unmount()
        except overlaykit.Unsupported as e:
            refused = e.hint.split(":")[0]
        fresh.remove()
        box.remove()
        store.remove_image("mine:1")
        store.remove_image("base:1")
        assert os.listdir(os.path.join(root, "snapshots")) == []
        return store.snapshots.whiteouts.value, changes, owners, refused

flow(sys.argv[1] + "/root", sys.argv[2])  # imports all that nobody may not be able to read
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(*flow(sys.argv[1] + "/nobody", sys.argv[2]), sep="\\n")
"""


def test_everything_but_mounts_works_without_root(tmp_path: Path) -> None:
    peers.need_root("to become another user")
    place = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        rootfs.write(place / "rootfs.tar")
        place.chmod(0o777)
        argv = [sys.executable, "-c", WITHOUT_ROOT, place, place / "rootfs.tar"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/", timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            "userxattr",
            "C/etc A/etc/new C/etc/passwd C/lib D/lib/deep",
            "[(0, 0)]",
            "its files are there without it",
        ]
    finally:
        shutil.rmtree(place)


def test_what_a_container_is_to_run_is_text(store: Store, box: Container) -> None:
    """A label that was a number was written down, and could not be read again: from then on no container was listed."""
    wrong: list[dict[str, object]] = [
        {"labels": {"number": 1}},
        {"user": 1000},
        {"command": ["sleep", 5]},
        {"command": "sleep 5"},
        {"entrypoint": "sleep"},
    ]
    for given in wrong:
        with pytest.raises(TypeError):
            store.create("base:1", **given)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        store.create_volume("data", labels={"number": 1})  # type: ignore[dict-item]
    assert ([each.name for each in store.containers()], store.volumes()) == (["box"], [])


@pytest.mark.usefixtures("box")
def test_a_record_that_cannot_be_read_is_said_in_a_line(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.records.execute("UPDATE containers SET config = ?", '{"Labels":{"number":1}}')
    for ask in (store.containers, lambda: store.container("box")):
        with pytest.raises(IntegrityError, match="cannot be read"):
            ask()
    assert cli.main(["--root", str(store.root), "ps"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    store.fsck(repair=True)
    assert store.container("box").name == "box"


def test_a_removed_container_is_not_called_a_snapshot(store: Store, box: Container) -> None:
    store.container("box").remove()
    for ask in (box.diff, box.commit, box.sizes, box.remove, box.mount, lambda: box.fs):
        with pytest.raises(NotFound, match=f"no container ({box.id[:12]}|box): it has"):
            ask()
