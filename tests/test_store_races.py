"""Two at once, in the order that goes wrong: what one has looked at the other changes, before the first one acts on it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from faults import is_told

from overlaykit import InUse, NotFound, Store
from overlaykit.store.filling import locked_volume


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """A running thread, and what it raised once it has ended."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


# --- volumes ----------------------------------------------------------------------------------------------------------


def test_a_volume_is_cloned_by_two_at_once(store: Store) -> None:
    """Each took the other, who only waited for its turn, for a user of the volume, and one or both were refused."""
    (store.create_volume("data").mountpoint / "a").write_text("a1")

    def clone(name: str) -> Callable[[], object]:
        def work() -> None:
            with Store(store.root) as other:
                other.volume("data").clone(name)

        return work

    with locked_volume(store.volume("data").directory):
        workers = [in_thread(clone(name)) for name in ("one", "two")]
        is_told(store, "volumes/data\n", 2)
    for thread, raised in workers:
        thread.join()
        assert raised == []
    assert [(store.volume(name).mountpoint / "a").read_text() for name in ("one", "two")] == ["a1", "a1"]


def test_a_volume_that_was_made_anew_is_not_removed_renamed_or_read_in_place_of_the_old_one(store: Store) -> None:
    """A prune that had listed a volume removed the one that another process had made under its name since."""
    old = store.create_volume("data")
    old.remove()
    new = store.create_volume("data")
    for verb in (old.remove, old.size, lambda: old.rename("other"), lambda: old.mounted().__enter__()):
        with pytest.raises(NotFound, match="another has its name"):
            verb()
    assert [volume.name for volume in store.volumes()] == ["data"]
    new.remove()


def test_a_directory_that_a_killed_process_leaves_while_a_volume_is_made_is_in_nobodys_way(store: Store) -> None:
    """It was looked for before the volume's files were made: a kill in between, and making it was ENOTEMPTY."""

    def put(directory: Path) -> None:
        (directory / "_data").mkdir()
        (directory.parent / "data/_data").mkdir(parents=True)
        (directory.parent / "data/_data/stray").write_text("precious")

    volume = store.volume_store.make("data", put=put)
    assert os.listdir(volume.mountpoint) == []
    notes = [json.loads(path.read_text()) for path in (store.root / "lost+found").glob("*.json")]
    assert notes == [{"was": "volumes/data", "why": "no volume had it"}]
    assert [path.read_text() for path in (store.root / "lost+found").rglob("stray")] == ["precious"]
    assert store.fsck() == []


def test_what_is_left_of_a_filling_is_not_forgotten_while_somebody_has_the_volumes_lock(store: Store) -> None:
    """Who found a dead filler's lease and could not clear up at once ended the lease all the same; nobody came back."""
    volume = store.create_volume("data")
    (volume.directory / "filling").mkdir()
    (store.root / "leases/dead").write_text("volumes/data\n")
    with locked_volume(volume.directory), Store(store.root):
        assert (store.root / "leases/dead").exists()
    with Store(store.root) as other:
        assert os.listdir(other.volume("data").directory) == ["_data"]
        assert other.fsck() == []
    assert os.listdir(store.root / "leases") == ["lock"]


def test_a_part_of_a_volume_that_goes_before_it_is_filled_leaves_the_volume_usable(store: Store) -> None:
    """The filler was killed with the copy whole, then somebody removed the directory it was for: from then on whoever wanted
    the volume got ENOENT."""
    volume = store.create_volume("data")
    (volume.directory / "filled/files").mkdir(parents=True)
    (volume.directory / "filled/into").symlink_to("part")
    assert os.listdir(volume.mountpoint) == []
    assert os.listdir(volume.directory) == ["_data"]


def test_who_makes_a_volume_that_is_just_being_made_for_a_container_has_it_whatever_becomes_of_that(store: Store) -> None:
    """The container's was taken for one that was there, without the labels that were asked for; then the container could not
    be created, and the volume went with it."""

    def make() -> None:
        with Store(store.root) as other:
            other.create_volume("data", labels={"wanted": "so"})

    volumes = store.volume_store
    with suppress(InUse), volumes.using() as use:
        use.hold("data")
        volumes.create("data", created_ns=use.making("data"))
        maker, raised = in_thread(make)
        maker.join(0.2)
        raise InUse("as if the container's name were taken")
    maker.join()
    assert raised == []
    assert store.volume("data").labels == {"wanted": "so"}
