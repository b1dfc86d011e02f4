"""Volumes made of others: clones, snapshots, tars out and in. What is new is made aside, and seen when it is whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from overlaykit.errors import AlreadyExists, Unsupported
from overlaykit.oci.durable import whole_file
from overlaykit.overlay.copyout import copy_tree
from overlaykit.overlay.folder import Folder
from overlaykit.store import drivers, tarstreams
from overlaykit.store.disk import sync_file_system
from overlaykit.store.drivers import DATA
from overlaykit.store.items import walk
from overlaykit.store.places import Place
from overlaykit.store.putting import Owners, Putter
from overlaykit.tree import Losses
from overlaykit.tree.table import StrPath

if TYPE_CHECKING:
    from overlaykit.store.volume import Volume
    from overlaykit.store.volumes import Volumes

ANONYMOUS = "com.docker.volume.anonymous"  # the label of a volume that nobody named
SNAPSHOT_OF = "overlaykit.snapshot-of"  # the label of one that is not to be written to, and whose state it is


def clone(
    volumes: Volumes, volume: Volume, name: str, *, labels: Mapping[str, str] | None = None, live: bool = False
) -> Volume:
    """What Volume.clone does."""
    stored = volume.stored
    if stored is None:
        hint = f"overlaykit volume export {volume.name}, and import that"
        raise Unsupported(f"volume {volume.name} has its files elsewhere: {volume.record.options}", hint=hint)

    def put(directory: Path) -> None:
        (directory / DATA).mkdir(mode=0o755, exist_ok=True)
        if stored == DATA:
            (directory / DATA).rmdir()
            with suppress(FileNotFoundError):
                (directory / "seed").write_bytes((volume.directory / "seed").read_bytes())
        copy_tree(Folder(volume.directory / stored), "/", directory / stored)
        sync_file_system(directory)

    kept = {key: value for key, value in volume.labels.items() if key != SNAPSHOT_OF}
    with volumes.at_rest(volume, live=live):
        return volumes.make(
            name,
            driver=volume.driver,
            options=volume.record.options,
            labels=_named(kept if labels is None else labels),
            put=put,
        )


def _named(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels of a volume that has a name, whatever the one had that it comes from."""
    return {key: value for key, value in labels.items() if key != ANONYMOUS}


def snapshot(volumes: Volumes, volume: Volume, name: str | None, *, live: bool = False) -> Volume:
    """What Volume.snapshot does."""
    labels = {**volume.labels, SNAPSHOT_OF: volume.name}
    if name is not None:
        return clone(volumes, volume, name, labels=labels, live=live)
    number = 1
    while True:
        chosen = f"{volume.name}-{number}"
        if not volumes.has(chosen):
            with suppress(AlreadyExists):  # another process was faster
                return clone(volumes, volume, chosen, labels=labels, live=live)
        number += 1


# --- tars -------------------------------------------------------------------------------------------------------------


def export(volumes: Volumes, volume: Volume, out: StrPath | BinaryIO, *, live: bool = False) -> Losses:
    """What Volume.export does."""
    losses: Losses = []
    if isinstance(out, str | os.PathLike):
        with whole_file(out) as file:
            return export(volumes, volume, file, live=live)
    with volumes.at_rest(volume, live=live, shown=True) as data, closing(Folder(data)) as folder:
        items = list(walk(Place(folder, "/", f"volume:{volume.name}:", volume.name), "/", (), lambda size: None))
        tarstreams.write(folder, "/", "", items, out, losses, lambda size: None)
    return losses


def import_tar(
    volumes: Volumes,
    name: str,
    source: StrPath | BinaryIO,
    *,
    driver: str = "local",
    options: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> tuple[Volume, Losses]:
    """A new volume with what is in a tar, which may be compressed, and what could not be kept of it."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return import_tar(volumes, name, file, driver=driver, options=options, labels=labels)
    losses: Losses = []
    keeper, given = drivers.find(driver), dict(options or {})

    def put(directory: Path) -> None:
        (directory / DATA).mkdir(mode=0o755)
        keeper.create(directory, given)
        mounts = keeper.mounts(given)
        if mounts:
            keeper.mount(directory, given)
        try:
            with closing(Folder(directory / DATA)) as folder:
                place = Place(folder, "/", f"volume:{name}:", f"volume {name}")
                putter = Putter(place, Owners(None, place), losses, makes_parents=True)
                for item in tarstreams.read(source, (), lambda size: None, root=True):
                    putter.put(item)
                putter.finish()
            sync_file_system(directory / DATA)
        finally:
            if mounts:
                keeper.unmount(directory)

    if volumes.has(name):
        raise AlreadyExists(f"there is a volume {name}", hint="overlaykit cp adds to one")
    return volumes.make(name, driver=driver, options=given, labels=labels, put=put), losses
