"""fsck: each kind of damage is found, named, and put right where there is another copy; the rest is left where it is."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import imagefiles as im
import pytest

from overlaykit import Store, cli
from overlaykit.oci import validate


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
