"""What a store takes on disk: the parts add up to what du counts, hard links and clones once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import imagefiles as im
import peers
import pytest

from overlaykit import Store, cli


def filled(root: Path) -> Store:
    store = Store(root)
    store.load(im.write(root.parent / "one.tar", im.docker_20(tag="one:1"), form="tar"))
    box = store.create("one:1", name="box")
    with box.fs.open("/etc/big", "wb") as file:
        file.write(im.NOISE)
    box.fs.link("/etc/big", "/etc/same")
    store.create("one:1", name="other")
    return store


def du(root: Path) -> int:
    """Bytes that GNU du counts."""
    return int(peers.run("du", "--summarize", "--block-size=1", root).stdout.split()[0])


def test_the_parts_add_up_to_what_is_on_disk(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    used = store.usage()
    assert used.total == du(store.root)
    assert used.total == used.shared + used.exclusive + used.reclaimable
    assert used.reclaimable == 0
    (box,) = [item for item in used.items if item.name == "box"]
    assert 100_000 < box.size < 150_000  # the second name of a file costs nothing
    store.layout.add(b"x" * 50_000, "text/plain")
    assert store.usage().reclaimable >= 50_000
    assert store.gc().size >= 50_000
    assert store.usage().reclaimable == 0


def test_volumes_have_sizes_of_their_own(tmp_path: Path) -> None:
    """They were a part of "other", where nobody could see which of them filled the disk."""
    store = filled(tmp_path / "store")
    for name in ("first", "second"):
        store.create("one:1", name=name, mounts=["shared:/etc"])
    store.create_volume("nobodys").mountpoint.joinpath("big").write_bytes(im.NOISE)
    used = store.usage()
    assert used.total == du(store.root) == used.shared + used.exclusive + used.reclaimable
    volumes = {item.name: item for item in used.items if item.kind == "volume"}
    assert {name: item.users for name, item in volumes.items()} == {"shared": 2, "nobodys": 1}
    assert 100_000 < volumes["nobodys"].size < 150_000
    assert used.reclaimable == 0  # gc takes none


def test_df_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "store").close()
    assert cli.main(["--root", str(tmp_path / "store"), "df", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"] == sum(item["size"] for item in told["items"])
    assert cli.main(["--root", str(tmp_path / "store"), "df"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "RECLAIMABLE"


@pytest.fixture
def with_reflinks(tmp_path: Path) -> Iterator[Path]:
    """A small xfs, whose files can share extents."""
    peers.need_root("a file system of our own")
    image, place = tmp_path / "xfs.img", tmp_path / "xfs"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)
    peers.run("mkfs.xfs", "-q", "-m", "reflink=1", image)
    peers.run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_what_a_copy_up_shares_with_its_image_is_counted_once(with_reflinks: Path) -> None:
    store = Store(with_reflinks / "store")
    store.load(im.write(with_reflinks / "one.tar", im.docker_20(tag="one:1"), form="tar"))
    box = store.create("one:1", name="box")
    before = store.usage()
    box.fs.chmod("/etc/noise", 0o600)  # copied up, and all its data shared
    box.close()
    peers.run("sync", "--file-system", with_reflinks)
    after = store.usage()
    assert after.of("container") - before.of("container") < 50_000 < len(im.NOISE)
    assert after.of("layer") == before.of("layer")
    store.close()
