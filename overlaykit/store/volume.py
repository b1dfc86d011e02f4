"""Volume: one volume of a store, and what can be done with it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from overlaykit.store import cloning, drivers
from overlaykit.store.cloning import ANONYMOUS, SNAPSHOT_OF
from overlaykit.store.disk import usage
from overlaykit.store.drivers import DATA
from overlaykit.store.filling import Site, locked_volume
from overlaykit.tree import Losses
from overlaykit.tree.table import StrPath

if TYPE_CHECKING:
    from overlaykit.store.volumes import Volumes


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """A volume as it is recorded; created_ns since 1970."""

    name: str
    driver: str
    options: dict[str, str]
    labels: dict[str, str]
    created_ns: int


class Volume:
    """One volume of a store."""

    def __init__(self, volumes: Volumes, record: VolumeRecord) -> None:
        self._volumes = volumes
        self.record = record

    def __repr__(self) -> str:
        return f"<Volume {self.name}>"

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def driver(self) -> str:
        return self.record.driver

    @property
    def labels(self) -> dict[str, str]:
        return self.record.labels

    @property
    def created(self) -> datetime:
        return datetime.fromtimestamp(self.record.created_ns / 1e9, UTC)

    @property
    def is_anonymous(self) -> bool:
        return ANONYMOUS in self.labels

    @property
    def is_snapshot(self) -> bool:
        """Whether it is the state that another volume once had, and not to be written to."""
        return SNAPSHOT_OF in self.labels

    @property
    def directory(self) -> Path:
        return self._volumes.folder / self.name

    @property
    def mounts(self) -> bool:
        """Whether its files are to be seen only while somebody uses it (`mounted`)."""
        return drivers.find(self.driver).mounts(self.record.options)

    @property
    def stored(self) -> str | None:
        """The name in `directory` of what the store keeps of its files; None if they are elsewhere."""
        return drivers.find(self.driver).stored(self.record.options)

    @property
    def mountpoint(self) -> Path:
        """The directory with its files, to read and to write; with some drivers only while it is `mounted`."""
        site = self.site()
        if site.needs_settling():  # somebody was killed
            with suppress(FileNotFoundError), locked_volume(self.directory):  # or it has just been removed
                site.settle()
        return site.data

    def site(self) -> Site:
        return Site.of_volume(self.directory, mounted=self.mounts)

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """Its directory for a `with` block, in which its driver shows the files and nobody removes it. NotFound, OSError."""
        with self._volumes.using() as use:
            use.hold(self.name)
            self._volumes.still(self)
            use.take(self.name)
            yield self.mountpoint

    def users(self) -> list[str]:
        """The names of the containers that have it mounted."""
        return self._volumes.users(self.name)

    def size(self) -> int:
        """Bytes that its files take on disk."""
        with self.mounted() as data:
            return usage(data).size

    def clone(self, name: str, *, labels: Mapping[str, str] | None = None, live: bool = False) -> Volume:
        """A new volume with the same files, driver and options: by reflink where the file system can.

        live: also while somebody is using it, and may be in the midst of writing. InUse, AlreadyExists; Unsupported if the
        store does not keep its files.
        """
        return cloning.clone(self._volumes, self, name, labels=labels, live=live)

    def snapshot(self, name: str | None = None, *, live: bool = False) -> Volume:
        """A clone that nobody writes to: containers have it read-only. name: None for its own and the next number."""
        return cloning.snapshot(self._volumes, self, name, live=live)

    def rename(self, name: str) -> Volume:
        """The volume, called `name` from now on, also in the containers that have it. InUse, AlreadyExists."""
        return self._volumes.rename(self, name)

    def export(self, out: StrPath | BinaryIO, *, live: bool = False) -> Losses:
        """Write its files as a tar, the root's attributes too: to a file, whole or not at all, or to what has `write`.

        What a tar cannot carry comes back. InUse; live: never mind that, as for clone.
        """
        return cloning.export(self._volumes, self, out, live=live)

    def remove(self) -> int:
        """Remove the volume with its files: bytes that came free on disk. InUse while a container or an operation has it."""
        return self._volumes.remove(self.name, created_ns=self.record.created_ns)

    def inspect(self) -> dict[str, Any]:
        """What there is to know about it, under the names that Docker gives it."""
        return {
            "CreatedAt": self.created.isoformat().replace("+00:00", "Z"),
            "Driver": self.driver,
            "Labels": self.labels or None,
            "Mountpoint": str(self.directory / DATA),
            "Name": self.name,
            "Options": self.record.options or None,
            "Scope": "local",
        }


def record_of(row: sqlite3.Row) -> VolumeRecord:
    return VolumeRecord(row["name"], row["driver"], json.loads(row["options"]), json.loads(row["labels"]), row["created"])
