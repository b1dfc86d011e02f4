"""The commands about layers on real images: diff of any two things, blame, waste, squash, rebase."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import ours
import peers
import pytest
import rootfs
from ours import op
from test_cli import output, run  # noqa: F401  (a fixture)
from treetext import below_root, listing

import overlaykit
from overlaykit import Store

Run = Callable[..., tuple[int, str, str]]
WHEN = 1_600_000_000 * 10**9
STEPS = {
    "grow": [op("write", "/etc/motd", "hello\n"), op("mkdir", "/srv"), op("write", "/srv/big", "x" * 50_000)],
    "own": [op("chown", "/srv/big", 1000, 1000), op("chmod", "/etc/passwd", 0o600), op("unlink", "/etc/hostname")],
    "clean": [op("unlink", "/srv/big"), op("rm", "/lib/deep"), op("write", "/etc/motd", "bye\n")],
}


@pytest.fixture
def app(run: Run, tmp_path: Path) -> Run:  # noqa: F811
    """The same, where there are base:1 and, with three layers more, app:1."""
    rootfs.write(tmp_path / "rootfs.tar")
    with Store(tmp_path / "store") as store:
        image = store.import_rootfs(tmp_path / "rootfs.tar", "base:1")
        for name, operations in STEPS.items():
            with store.create(image, name=name, command=["step", name]) as container:
                for each in operations:
                    ours.perform(container.fs, [each])
                image = container.commit(f"app:{name}")
        store.tag(image, "app:1")
    return run


def changed(result: tuple[int, str, str]) -> dict[str, tuple[str, list[str], int, int]]:
    found = json.loads(output(result))
    return {
        c["path"]: (c["kind"], c["reasons"], c["size_before"], c["size_after"]) for c in found if c["reasons"] != ["below"]
    }


def test_diff_of_two_images_says_what_and_how_much(app: Run) -> None:
    found = changed(app("diff", "--json", "base:1", "app:1"))
    assert found["/etc/motd"] == ("C", ["content", "time"], 8, 4)
    assert found["/etc/passwd"][:2] == ("C", ["mode"])
    assert found["/etc/hostname"] == ("D", [], 6, 0)
    assert found["/lib/deep"][0] == "D"
    assert found["/srv"] == ("A", [], 0, 0)
    table = output(app("diff", "base:1", "app:1")).splitlines()
    assert table[0].split() == ["BEFORE", "AFTER", "WHAT", "PATH"]
    assert ["C", "8B", "4B", "content,time", "/etc/motd"] in [line.split() for line in table]
    assert table[-1].startswith("1 added, ")


def test_diff_of_layers_is_what_they_change_together(app: Run, tmp_path: Path) -> None:
    one = changed(app("diff", "--json", "app:1#2"))
    assert one["/srv/big"] == ("C", ["owner"], 50_000, 50_000)
    assert set(one) == {"/srv/big", "/etc/passwd", "/etc/hostname"}
    several = changed(app("diff", "--json", "app:1#1..3"))
    assert several == changed(app("diff", "--json", "base:1", "app:1"))
    assert "/srv/big" not in several  # it came and went
    assert changed(app("diff", "--json", "app:1#1", "app:1#2")) == one
    with Store(tmp_path / "store") as store:
        layers = store.image("app:1").layers
    by_digest = changed(app("diff", "--json", layers[1].digest, layers[2].diff_id))
    assert by_digest["/srv/big"] == ("C", ["owner"], 50_000, 50_000)
    assert by_digest["/etc/.wh.hostname"][0] == "A"


def test_diff_takes_containers_directories_and_tars(app: Run, tmp_path: Path) -> None:
    output(app("save", "app:1", tmp_path / "app.tar"))
    assert output(app("diff", "app:1", tmp_path / "app.tar")) == ""
    assert output(app("diff", "base:1", tmp_path / "rootfs.tar")) == ""
    output(app("create", "app:1", "--name", "box"))
    assert output(app("diff", "app:1", "box")) == ""
    output(app("write", "box", "/etc/motd", stdin=b"box\n"))
    (found,) = changed(app("diff", "--json", "app:1", "box")).items()
    path, (kind, why, before, after) = found
    assert (path, kind, before, after) == ("/etc/motd", "C", 4, 4)
    assert why in (["content"], ["content", "time"])  # both may have been written within one second
    peers.need_root("the directory has the image's owners")
    overlaykit.open_image(tmp_path / "app.tar").unpack(tmp_path / "out")
    assert output(app("diff", "app:1", tmp_path / "out")) == ""
    (tmp_path / "out/etc/motd").write_text("out\n")
    os.utime(tmp_path / "out/etc/motd", ns=(WHEN, WHEN))
    code, out, err = app("diff", "--exit-code", "--json", "app:1", tmp_path / "out")
    assert (code, err) == (1, "")
    assert [c["path"] for c in json.loads(out)] == ["/etc", "/etc/motd"]
    assert app("diff", "--exit-code", "app:1", "app:1")[0] == 0


def test_blame_names_the_step_behind_each_layer(app: Run) -> None:
    found = json.loads(output(app("blame", "--json", "app:1", "/srv/big")))
    told = [(o["layer"], o["verb"], o["by"], o["created_by"]) for o in found]
    assert told == [
        (1, "adds", "/srv/big", "step grow"),
        (2, "changes", "/srv/big", "step own"),
        (3, "removes", "/srv/big", "step clean"),
    ]
    lines = [line.split() for line in output(app("blame", "app:1", "lib/deep/one")).splitlines()]
    assert lines[0] == ["LAYER", "DOES", "BY", "DIFF", "ID", "CREATED", "BY"]
    assert lines[2][:3] == ["3", "removes", "/lib/deep"]
    assert lines[2][4:] == ["step", "clean"]


def test_blame_follows_symlinks_on_the_way(app: Run, tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store, store.create("base:1", name="links") as container:
        ours.perform(container.fs, [op("symlink", "/e", "/etc"), op("write", "/etc/motd", "linked\n")])
        container.commit("links:1")
    found = json.loads(output(app("blame", "--json", "links:1", "/e/motd")))
    assert [(o["layer"], o["by"]) for o in found] == [(0, "/etc/motd"), (1, "/etc/motd")]
    assert [o["layer"] for o in json.loads(output(app("blame", "--json", "links:1", "/e")))] == [1]


def test_waste_counts_bytes_by_layer_and_by_path(app: Run) -> None:
    found = json.loads(output(app("waste", "--json", "app:1")))
    passwd = sum(len(content) for path, (content, _) in rootfs.FILES.items() if path == "etc/passwd")
    files = {(f["layer"], f["path"]): (f["reason"], f["hidden_by"], f["size"], f["changed"]) for f in found["files"]}
    assert files[1, "/srv/big"] == ("attributes", 2, 50_000, ["owner"])
    assert files[2, "/srv/big"] == ("removed", 3, 50_000, [])
    assert files[0, "/etc/passwd"] == ("attributes", 2, passwd, ["mode"])
    assert files[0, "/etc/motd"] == ("changed", 1, 8, [])
    assert (0, "/lib/deep/one") not in files  # it is still there as /etc/primo
    assert files[0, "/lib/deep/two"][:2] == ("removed", 3)
    assert found["wasted"] == sum(f["size"] for f in found["files"]) == sum(layer["wasted"] for layer in found["layers"])
    assert found["layers"][1]["attributes"] == 50_000
    assert found["layers"][3]["wasted"] == 0
    assert found["size"] == sum(layer["size"] for layer in found["layers"])
    text = output(app("waste", "app:1", "--top", "1")).splitlines()
    assert text[0].split() == ["LAYER", "SIZE", "WASTED", "REMOVED", "CHANGED", "ATTRIBUTES", "CREATED", "BY"]
    assert text[-1].split() == ["100kB", "2", "owner", "in", "2,", "removed", "in", "3", "/srv/big"]


def test_squash_keeps_the_base_and_what_one_sees(app: Run, tmp_path: Path) -> None:
    id = output(app("squash", "app:1", "1..2", "app:less", "-m", "two in one")).strip()
    top = output(app("squash", "app:1", "1..", "app:least")).strip()
    with Store(tmp_path / "store") as store:
        whole, less, least = (store.image(name) for name in ("app:1", "app:less", "app:least"))
        assert (less.id, least.id) == (id, top)
        assert [len(image.layers) for image in (whole, less, least)] == [4, 3, 2]
        assert less.diff_ids[0] == least.diff_ids[0] == whole.diff_ids[0]
        assert less.diff_ids[2] == whole.diff_ids[3]
        assert [h.comment for h in less.history if not h.empty_layer][1] == "two in one"
        if os.geteuid() == 0:
            for name, image in (("whole", whole), ("less", less), ("least", least)):
                image.unpack(tmp_path / name)
            expected = below_root(listing(tmp_path / "whole"))
            assert below_root(listing(tmp_path / "less")) == below_root(listing(tmp_path / "least")) == expected
    assert output(app("diff", "app:1", "app:least")) == ""
    assert json.loads(output(app("waste", "--json", "app:least")))["wasted"] < 50_000
    assert output(app("fsck")) == ""


def test_rebase_puts_the_layers_on_another_base(app: Run, tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store, store.create("base:1", name="newer") as container:
        ours.perform(container.fs, [op("write", "/etc/release", "2\n")])
        container.commit("base:2")
    id = output(app("rebase", "app:1", "base:1", "base:2", "app:2")).strip()
    with Store(tmp_path / "store") as store:
        rebased, old, base = (store.image(name) for name in ("app:2", "app:1", "base:2"))
        assert rebased.id == id
        assert rebased.diff_ids == (*base.diff_ids, *old.diff_ids[1:])
        assert [layer.digest for layer in rebased.layers[2:]] == [layer.digest for layer in old.layers[1:]]
    assert changed(app("diff", "--json", "app:1", "app:2")) == {"/etc/release": ("A", [], 0, 2)}
    output(app("save", "app:2", tmp_path / "app.tar"))
    with tarfile.open(tmp_path / "app.tar") as archive:
        assert "manifest.json" in archive.getnames()


MISTAKES: dict[str, tuple[str, ...]] = {
    "no container, image, layer, file or directory nothing": ("diff", "nothing", "app:1"),
    "no container app:1": ("diff", "app:1"),
    "has layers 0 to 3": ("diff", "app:1#4"),
    "name nothing else": ("diff", "app:1#1..2", "app:1"),
    "no layer has /nowhere": ("blame", "app:1", "/nowhere"),
    "no image nothing": ("waste", "nothing"),
    "layers 2 to 8 of 4": ("squash", "app:1", "2..7"),
    "is not built on": ("rebase", "base:1", "app:1", "base:1"),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_1(said: str, app: Run) -> None:
    code, out, err = app(*MISTAKES[said])
    assert (code, out) == (1, "")
    assert err.startswith("overlaykit: ")
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_range_that_is_none_is_exit_code_2(app: Run) -> None:
    assert app("squash", "app:1", "1-2")[0] == 2
