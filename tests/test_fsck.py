"""fsck: each kind of damage is found, named, and put right where there is another copy; the rest is left where it is."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import imagefiles as im
import peers
import pytest
import rootfs
from faults import killed_at_steps
from kernel_overlay import SCRATCH
from users import somebody

from overlaykit import Store, Tree, cli, scan
from overlaykit.oci import validate
from overlaykit.store.layercheck import deep_differences


@pytest.fixture
def sound(tmp_path: Path) -> Store:
    """A store with an image one:1 of two layers, unpacked, and a container box with a snapshot and changes."""
    store = Store(tmp_path / "store")
    store.load(im.write(tmp_path / "one.tar", im.docker_20(tag="one:1"), form="tar"))
    with store.create("one:1", name="box") as box:
        with box.fs.open("/etc/mine", "w") as file:
            file.write("first\n")
        box.snapshot("first")
        box.fs.unlink("/etc/motd")
    return store


def blob(store: Store, which: str) -> Path:
    image = store.image("one:1")
    digest = {"layer": image.layers[0].digest, "config": image.id, "manifest": image.digest}[which]
    return store.layout.path(digest)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(change(data))


def layer(store: Store, number: int = 0) -> Path:
    """The directory of the image's unpacked layer."""
    return store.snapshots.directory(store.image("one:1").chain_ids[number])


def own(store: Store) -> Path:
    return store.snapshots.directory(store.container("box").id)


def sql(store: Store, statement: str, *values: object) -> None:
    with sqlite3.connect(store.root / "store.db") as db:
        db.execute(statement, values)


def remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


Damage = Callable[[Store], object]
MENDED: dict[str, tuple[str, Damage]] = {
    "missing layer directory": ("missing-layer", lambda s: remove(layer(s))),
    "missing files of a layer": ("missing-layer", lambda s: remove(layer(s) / "fs")),
    "missing file in a lower": ("missing-file", lambda s: remove(layer(s) / "fs/etc/motd")),
    "changed file in a lower": ("changed-file", lambda s: (layer(s) / "fs/etc/motd").write_text("other\n")),
    "foreign file in a lower": ("foreign-file", lambda s: (layer(s) / "fs/etc/foreign").write_text("x")),
    "changed mode in a lower": ("changed-mode", lambda s: (layer(s) / "fs/etc/motd").chmod(0o4755)),
    "missing whiteout in a lower": ("missing-file", lambda s: remove(layer(s, 1) / "fs/etc/old")),
    "missing Tree": ("damaged-tree", lambda s: remove(layer(s) / "tree")),
    "damaged Tree": ("damaged-tree", lambda s: rewrite(next((layer(s) / "tree").iterdir()), lambda b: b"x" + b[1:])),
    "truncated Tree": ("damaged-tree", lambda s: rewrite(next((layer(s) / "tree").iterdir()), lambda b: b[:100])),
    "damaged Tree of a frozen layer": (
        "damaged-tree",
        lambda s: remove(s.snapshots.own_layers(s.container("box").id)[0][0].parent / "tree"),
    ),
    "directory without a row": ("stray-directory", lambda s: (s.snapshots.folder / "0123456789ab/fs").mkdir(parents=True)),
    "missing work": ("missing-work", lambda s: remove(own(s) / "work")),
    "damaged index.json": ("damaged-index", lambda s: (s.root / "index.json").write_text("{")),
    "missing index.json": ("damaged-index", lambda s: remove(s.root / "index.json")),
    "foreign file among the blobs": ("foreign-file", lambda s: (s.root / "blobs/sha256/notes.txt").write_text("x")),
    "damaged blob that nobody needs": (
        "damaged-blob",
        lambda s: (s.root / "blobs/sha256" / ("0" * 64)).write_text("x"),
    ),
    "stale ingest": ("stale-ingest", lambda s: (s.root / "ingest/dead").write_text("half")),
    "stale lease": ("stale-lease", lambda s: (s.root / "leases/dead").write_text("snapshots/ffffffffffff\n")),
    "others may enter the root": ("permissions", lambda s: s.root.chmod(0o755)),
    "unreadable configuration": ("half-written-row", lambda s: sql(s, "UPDATE containers SET config = '{'")),
    "writable layer without a container": (
        "half-written-row",
        lambda s: sql(s, "DELETE FROM containers"),
    ),
}
LEFT: dict[str, tuple[str, Damage]] = {
    "flipped bit in a layer": ("damaged-blob", lambda s: rewrite(blob(s, "layer"), lambda b: im.flip(b, len(b) // 2))),
    "truncated layer": ("damaged-blob", lambda s: rewrite(blob(s, "layer"), lambda b: b[:-9])),
    "flipped bit in a config": ("damaged-blob", lambda s: rewrite(blob(s, "config"), lambda b: im.flip(b, 20))),
    "missing layer": ("missing-blob", lambda s: remove(blob(s, "layer"))),
    "missing config": ("missing-blob", lambda s: remove(blob(s, "config"))),
    "missing upper": ("missing-upper", lambda s: remove(own(s) / "fs")),
}


def test_a_sound_store_has_no_findings(sound: Store) -> None:
    assert sound.fsck() == []
    assert sound.fsck(repair=True) == []
    assert not (sound.root / "lost+found").exists()


@pytest.mark.parametrize("name", MENDED)
def test_damage_with_another_copy_is_found_and_put_right(sound: Store, name: str) -> None:
    kind, damage = MENDED[name]
    damage(sound)
    found = sound.fsck()
    assert kind in {finding.kind for finding in found}, found
    assert all(finding.repairable for finding in found if finding.kind == kind)
    assert {f.kind for f in sound.fsck()} == {f.kind for f in found}  # looking changes nothing
    repaired = sound.fsck(repair=True)
    assert all(finding.repaired for finding in repaired), repaired
    assert sound.fsck() == sound.fsck(repair=True) == []
    with Store(sound.root) as again:
        assert again.fsck() == []
        assert validate(again.image("one:1")) == []
        for container in again.containers():
            assert [change.path for change in container.diff()] == ["/etc", "/etc/mine", "/etc/motd"]
            assert sorted(container.fs.listdir("/etc")) == ["mine", "new", "noise"]


@pytest.mark.parametrize("name", LEFT)
def test_damage_without_another_copy_is_found_and_left(sound: Store, name: str) -> None:
    kind, damage = LEFT[name]
    damage(sound)
    for findings in (sound.fsck(), sound.fsck(repair=True), sound.fsck()):
        mine = [finding for finding in findings if finding.kind == kind]
        assert mine, findings
        assert not any(finding.repairable or finding.repaired for finding in mine)


def test_a_damaged_blob_says_who_needs_it_and_loading_heals_it(sound: Store, tmp_path: Path) -> None:
    rewrite(blob(sound, "layer"), lambda b: im.flip(b, 5000))
    (finding,) = sound.fsck()
    assert finding.needed_by == ("container box", "image docker.io/library/one:1")
    sound.load(tmp_path / "one.tar")
    assert sound.fsck() == []


def test_a_name_of_nothing_goes_with_a_note(sound: Store) -> None:
    sound.container("box").remove()
    remove(blob(sound, "manifest"))
    assert "missing-manifest" in {finding.kind for finding in sound.fsck()}
    sound.fsck(repair=True)
    assert "missing-manifest" not in {finding.kind for finding in sound.fsck()}
    assert any("one:1" in path.read_text() for path in (sound.root / "lost+found").glob("*.json"))


def test_what_nobody_can_explain_is_kept(sound: Store) -> None:
    (layer(sound) / "fs/etc/foreign").write_text("precious\n")
    sql(sound, "DELETE FROM containers")
    sound.fsck(repair=True)
    kept = [p for p in (sound.root / "lost+found").rglob("*") if p.name == "foreign"]
    assert [path.read_text() for path in kept] == ["precious\n"]
    notes = [json.loads(path.read_text()) for path in (sound.root / "lost+found").glob("*.json")]
    assert notes


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_is_found_and_repair_is_idempotent(sound: Store, seed: int) -> None:
    chance = random.Random(seed)
    for name in chance.sample(sorted(MENDED), 3):
        if "row" not in MENDED[name][0] and "index" not in MENDED[name][0]:
            try:
                MENDED[name][1](sound)
            except FileNotFoundError:
                continue  # went with other damage
    assert sound.fsck() != []
    sound.fsck(repair=True)
    assert sound.fsck() == []
    assert validate(sound.image("one:1")) == []


# --- deep -------------------------------------------------------------------------------------------------------------


def motd(store: Store) -> Path:
    return layer(store) / "fs/etc/motd"


def other_content(path: Path) -> None:
    """As many bytes as before, at the same time."""
    st = path.stat()
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def agreed(store: Store) -> None:
    """A setuid program, and a Tree that says so too."""
    motd(store).chmod(0o4755)
    scan(layer(store) / "fs", whiteouts=store.snapshots.whiteouts).save(layer(store) / "tree")


opaque = f"{'trusted' if os.geteuid() == 0 else 'user'}.overlay.opaque"
DEEP: dict[str, tuple[str, str, Damage]] = {
    "other content of the same size and time": ("changed-content", "etc/motd", lambda s: other_content(motd(s))),
    "one bit of a large file": ("changed-content", "etc/noise", lambda s: other_content(layer(s) / "fs/etc/noise")),
    "a foreign xattr": ("changed-xattrs", "etc/motd", lambda s: os.setxattr(motd(s), "user.foreign", b"x")),
    "an opaque mark that no layer has": ("changed-xattrs", "etc", lambda s: os.setxattr(motd(s).parent, opaque, b"y")),
    "another time of a directory": ("changed-file", "etc", lambda s: os.utime(motd(s).parent, (1, 1))),
    "directory and Tree at one against the blob": ("damaged-tree", "etc/motd", agreed),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_finds_what_daily_work_does_not_look_at_and_unpacks_it_again(sound: Store, name: str) -> None:
    kind, path, damage = DEEP[name]
    damage(sound)
    assert sound.fsck() == []
    (finding,) = sound.fsck(deep=True)
    chain_id = sound.image("one:1").chain_ids[0]
    assert (finding.kind, finding.what, finding.repairable) == (kind, f"{chain_id}:/{path}", True)
    assert finding.needed_by == ("container box", "image docker.io/library/one:1")
    assert all(finding.repaired for finding in sound.fsck(deep=True, repair=True))
    assert sound.fsck(deep=True) == []
    with Store(sound.root) as again, again.container("box") as box:
        assert sorted(box.fs.listdir("/etc")) == ["mine", "new", "noise"]
    assert any(path.is_dir() for path in (sound.root / "lost+found").iterdir())  # what was there


@pytest.mark.parametrize("name", MENDED)
def test_deep_finds_what_is_found_without(sound: Store, name: str) -> None:
    kind, damage = MENDED[name]
    damage(sound)
    assert kind in {finding.kind for finding in sound.fsck(deep=True)}
    assert all(finding.repaired for finding in sound.fsck(deep=True, repair=True))
    assert sound.fsck(deep=True) == []


def test_deep_names_every_path_that_differs(sound: Store) -> None:
    paths = ["etc/motd", "etc/noise", "etc/old"]
    for path in paths:
        other_content(layer(sound) / "fs" / path)
    assert [finding.what.partition(":/")[2] for finding in sound.fsck(deep=True)] == paths


def test_deep_says_which_file_cannot_be_read(sound: Store) -> None:
    """Of all files of a layer at once only the first failure was known."""
    image = sound.image("one:1")
    directory = layer(sound)
    tree, on_disk = Tree.load(directory / "tree"), scan(directory / "fs", whiteouts=sound.snapshots.whiteouts)
    motd(sound).unlink()  # after it was looked at, as a bad sector would be found only when it is read
    other_content(directory / "fs/etc/old")
    found = list(deep_differences(image.layers[0], tree, on_disk, directory / "fs"))
    assert [(kind, path) for kind, path, _ in found] == [("unreadable-file", "etc/motd"), ("changed-content", "etc/old")]


def test_a_layer_is_not_unpacked_again_under_a_container_that_is_open_elsewhere(sound: Store) -> None:
    other_content(motd(sound))
    with Store(sound.root) as other, other.container("box") as box:
        box.fs.listdir("/etc")
        (finding,) = sound.fsck(deep=True, repair=True)
        assert (finding.kind, finding.repaired) == ("changed-content", False)
        assert finding.text.endswith("left as it is: container box is open in another process")
    assert [finding.repaired for finding in sound.fsck(deep=True, repair=True)] == [True]


def test_a_layer_is_not_unpacked_again_under_a_container_that_is_mounted(sound: Store, tmp_path: Path) -> None:
    peers.need_root("mounts")
    with peers.overlay_place("fsck") as place, Store(place / "store") as store:
        store.load(tmp_path / "one.tar")
        with store.create("one:1", name="box") as box:
            box.mount()
            other_content(motd(store))
            (finding,) = store.fsck(deep=True, repair=True)
            assert "left as it is: container box is mounted at" in finding.text
            box.unmount()
        assert [finding.repaired for finding in store.fsck(deep=True, repair=True)] == [True]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child does not touch what other threads hold
def test_a_repair_that_is_killed_can_be_done_again_and_loses_nothing(tmp_path: Path) -> None:
    """The old directory was moved away before the new one took its place: in between there was no layer."""
    im.write(tmp_path / "one.tar", im.docker_20(tag="one:1"), form="tar")

    def prepare(root: Path) -> None:
        with Store(root) as store:
            store.load(tmp_path / "one.tar")
            store.create("one:1", name="box")
            (layer(store) / "fs/etc/foreign").write_text("precious\n")

    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="overlaykit-test-") as top:
        for root in killed_at_steps(Path(top), prepare, lambda store: store.fsck(repair=True)):
            with Store(root) as store:
                with store.container("box").view() as view:
                    assert view.read_bytes("/etc/motd") == b"welcome\n"
                store.fsck(deep=True, repair=True)
                assert store.fsck(deep=True) == []
                assert [path.read_text() for path in (root / "lost+found").rglob("foreign")] == ["precious\n"]


def test_a_sound_store_is_sound_to_the_bottom(tmp_path: Path) -> None:
    """Also one of somebody who is not root, who could not give all owners and xattrs that a layer asks for."""
    rootfs.write(tmp_path / "rootfs.tar")
    for name, whose in (("root", nullcontext()), ("somebody", somebody(tmp_path))):
        with whose, Store(tmp_path / name) as store:
            store.import_rootfs(tmp_path / "rootfs.tar", "base:1")
            with store.create("base:1", name="box") as box:
                box.fs.unlink("/etc/hostname")
                box.fs.link("/etc/passwd", "/etc/twin")
                store.unpack(box.commit("child:1"))
            assert store.fsck(deep=True) == []


def test_fsck_on_the_command_line(sound: Store, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(sound.root)]
    assert cli.main([*root, "fsck"]) == 0
    os.unlink(layer(sound) / "fs/etc/motd")
    assert cli.main([*root, "fsck"]) == 1
    assert "missing-file" in capsys.readouterr().out
    assert cli.main([*root, "fsck", "--repair"]) == 0
    assert "repaired" in capsys.readouterr().out
    assert cli.main([*root, "fsck", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    other_content(motd(sound))
    assert cli.main([*root, "fsck"]) == 0
    assert cli.main([*root, "fsck", "--deep"]) == 1
    assert "changed-content" in capsys.readouterr().out
    assert cli.main([*root, "fsck", "--deep", "--repair"]) == 0
