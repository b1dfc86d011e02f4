"""Layers side by side: they begin in their order, wait for those below, and all end when one fails."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import imagefiles as im
import peers
import pytest
import tars

from overlaykit import DigestMismatch, Store
from overlaykit.oci.abreast import Turn, abreast


def test_each_turn_comes_after_all_before_it() -> None:
    done: list[int] = []

    def task(number: int) -> Callable[[Turn], None]:
        def run(turn: Turn) -> None:
            turn.wait()
            done.append(number)

        return run

    abreast([task(number) for number in range(20)])
    assert done == list(range(20))


def test_the_first_failure_is_told_and_the_others_stop_reading() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("on one core there is one layer at a time")
    began = threading.Event()

    def fails(turn: Turn) -> None:
        began.wait(10)
        raise LookupError("the one")

    def reads_for_ever(turn: Turn) -> None:
        with open("/dev/zero", "rb", buffering=0) as zeros:
            stream = turn.reading(zeros)
            began.set()
            while stream.readinto(memoryview(bytearray(4096))):
                pass

    def waits(turn: Turn) -> None:
        turn.wait()
        raise AssertionError("never its turn")

    with pytest.raises(LookupError, match="the one"):
        abreast([fails, reads_for_ever, waits])
    # It was once the interruption of a lower layer that was told, and not the full disk that an upper one met.
    began.clear()
    with pytest.raises(LookupError, match="the one"):
        abreast([reads_for_ever, fails])


LAYERS = (  # each needs the one below: an implied directory's mode and owner, a hard link to a lower file
    tars.member("dir/", kind="5", mode=0o750, uid=7) + tars.member("dir/file", b"lower") + tars.END,
    tars.member("dir/new", b"x" * 100_000) + tars.END,
    tars.member("dir/link", kind="1", link="dir/file") + tars.member("dir/.wh.new") + tars.END,
)


def test_layers_that_need_one_another_become_the_image(store: Store, tmp_path: Path) -> None:
    peers.need_root("a layer's owners")
    store.load(im.write(tmp_path / "image.tar", im.oci(LAYERS, tag="three:1"), form="tar"))
    with store.create("three:1", name="box").view() as view:
        assert sorted(view.listdir("/dir")) == ["file", "link"]
        assert view.read_bytes("/dir/link") == b"lower"
        assert (view.stat("/dir").st_mode & 0o7777, view.stat("/dir").st_uid) == (0o750, 7)


def test_a_layer_that_fails_leaves_those_above_it_nowhere(store: Store, tmp_path: Path) -> None:
    loaded = store.load(im.write(tmp_path / "image.tar", im.oci(LAYERS, tag="three:1"), form="tar"))[0]
    damaged = store.root / "blobs/sha256" / loaded.layers[1].digest.encoded
    damaged.chmod(0o600)
    damaged.write_bytes(im.flip(damaged.read_bytes(), 60))
    with pytest.raises(DigestMismatch):
        store.create("three:1", name="box")
    assert [snapshot.key for snapshot in store.snapshots.walk()] in ([], [loaded.chain_ids[0]])
    assert len(list((store.root / "snapshots").iterdir())) <= 1
    assert store.containers() == []
