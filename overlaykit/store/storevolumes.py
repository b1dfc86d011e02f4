"""The volumes of a store, for who asks the store for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import BinaryIO

from overlaykit.store import cloning
from overlaykit.store.packing import report
from overlaykit.store.volume import Volume
from overlaykit.store.volumes import Volumes
from overlaykit.tree.table import StrPath


class StoreVolumes:
    """The methods of Store that are about volumes alone."""

    volume_store: Volumes

    def create_volume(
        self,
        name: str | None = None,
        *,
        driver: str = "",
        options: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """The volume `name`, made if there is none; without a name a new anonymous one.

        driver: local (""), encrypted, remote or another package's; options: as it wants them. InvalidReference;
        AlreadyExists if the volume is there with another driver or other options; Unsupported.
        """
        return self.volume_store.create(name, driver=driver, options=options, labels=labels)[0]

    def import_volume(
        self,
        name: str,
        source: StrPath | BinaryIO,
        *,
        driver: str = "local",
        options: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """A new volume with what is in a tar, which may be compressed; whole or not at all. AlreadyExists, InvalidLayer."""
        volume, losses = cloning.import_tar(self.volume_store, name, source, driver=driver, options=options, labels=labels)
        report(f"volume import {name}", losses)
        return volume

    def volume(self, name: str) -> Volume:
        """The volume of that name. NotFound."""
        return self.volume_store.get(name)

    def volumes(self) -> list[Volume]:
        """Every volume, by name."""
        return self.volume_store.listed()

    def prune_volumes(self, *, all: bool = False, labels: Iterable[str] = ()) -> tuple[list[str], int]:
        """Remove anonymous volumes that no container has, `all`: named ones too. Their names, and bytes that came free."""
        return self.volume_store.prune(all=all, labels=labels)
