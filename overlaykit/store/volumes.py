"""Volumes: directories that outlast containers and are shared by them.

    ROOT/volumes/NAME/_data    a volume's files (filling.py says what else may lie there for a while)
    ROOT/volumes/.lock         held while a volume comes or goes

A row in the records is what makes a volume exist: a directory without one is on its way in or out.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from overlaykit.errors import AlreadyExists, InUse, NotFound, Unsupported
from overlaykit.oci.durable import sync_directory
from overlaykit.store.disk import remove_tree, usage
from overlaykit.store.filling import locked_volume, settle
from overlaykit.store.mountspec import check_volume_name
from overlaykit.store.records import Records

ANONYMOUS = "com.docker.volume.anonymous"  # the label of a volume that nobody named


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
    def directory(self) -> Path:
        return self._volumes.folder / self.name

    @property
    def mountpoint(self) -> Path:
        """The directory with its files, to read and to write."""
        data = self.directory / "_data"
        if (self.directory / "filled").exists():  # somebody was killed
            with locked_volume(self.directory):
                settle(self.directory, data)
        return data

    def users(self) -> list[str]:
        """The names of the containers that have it mounted."""
        return self._volumes.users(self.name)

    def size(self) -> int:
        """Bytes that its files take on disk."""
        return usage(self.mountpoint).size

    def remove(self) -> int:
        """Remove the volume with its files: bytes that came free on disk. InUse while a container has it."""
        return self._volumes.remove(self.name)

    def inspect(self) -> dict[str, Any]:
        """What there is to know about it, under the names that Docker gives it."""
        return {
            "CreatedAt": self.created.isoformat().replace("+00:00", "Z"),
            "Driver": self.driver,
            "Labels": self.labels or None,
            "Mountpoint": str(self.mountpoint),
            "Name": self.name,
            "Options": self.record.options or None,
            "Scope": "local",
        }


class Volumes:
    """The volumes of one store."""

    def __init__(self, folder: Path, records: Records) -> None:
        """folder: ROOT/volumes."""
        self.folder = folder
        self._records = records

    def create(
        self,
        name: str | None = None,
        *,
        driver: str = "local",
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> tuple[Volume, bool]:
        """The volume `name`, and whether it is new; one without a name is anonymous.

        One that is there is given as it is. AlreadyExists if its driver or options are others; InvalidReference.
        """
        if driver != "local" or options:
            raise Unsupported(
                f"volume driver {driver} with options {dict(options or {})}", hint="use driver local without any"
            )
        wanted = {ANONYMOUS: "", **(labels or {})} if name is None else dict(labels or {})
        chosen = secrets.token_hex(32) if name is None else check_volume_name(name)
        with self._locked():
            row = self._records.row("SELECT * FROM volumes WHERE name = ?", chosen)
            if row is not None:
                found = Volume(self, _record(row))
                if found.driver != driver or found.record.options != dict(options or {}):
                    raise AlreadyExists(f"there is a volume {chosen} of driver {found.driver} and other options")
                return found, False
            directory = self.folder / chosen
            remove_tree(directory)  # what a killed process left: no volume, or one that was being removed
            directory.mkdir(mode=0o701)
            (directory / "_data").mkdir(mode=0o755)
            os.chmod(directory / "_data", 0o755)  # whatever the umask
            sync_directory(directory)
            sync_directory(self.folder)
            record = VolumeRecord(chosen, driver, dict(options or {}), wanted, time.time_ns())
            values = (record.name, record.driver, json.dumps(record.options), json.dumps(record.labels), record.created_ns)
            self._records.execute("INSERT INTO volumes VALUES (?, ?, ?, ?, ?)", *values)
            return Volume(self, record), True

    def get(self, name: str) -> Volume:
        """The volume of that name. NotFound."""
        row = self._records.row("SELECT * FROM volumes WHERE name = ?", name)
        if row is None:
            raise NotFound(f"no volume {name}", hint="overlaykit volume ls lists them")
        return Volume(self, _record(row))

    def listed(self) -> list[Volume]:
        """Every volume, by name."""
        return [Volume(self, _record(row)) for row in self._records.rows("SELECT * FROM volumes ORDER BY name")]

    def used(self) -> set[str]:
        """The names of the volumes that containers have."""
        return {row["volume"] for row in self._records.rows("SELECT DISTINCT volume FROM mounts WHERE volume IS NOT NULL")}

    def users(self, name: str) -> list[str]:
        sql = (
            "SELECT DISTINCT c.name FROM mounts m JOIN containers c ON c.id = m.container WHERE m.volume = ? ORDER BY c.name"
        )
        return [row["name"] for row in self._records.rows(sql, name)]

    def remove(self, name: str) -> int:
        """Remove a volume: bytes that came free on disk. NotFound, InUse."""
        with self._locked():
            try:
                gone = self._records.execute("DELETE FROM volumes WHERE name = ?", name)
            except sqlite3.IntegrityError:
                users = self.users(name)
                raise InUse(
                    f"volume {name} is used by container {', '.join(users[:3])}", hint=f"overlaykit rm {users[0]} first"
                ) from None
            if not gone:
                raise NotFound(f"no volume {name}", hint="overlaykit volume ls lists them")
            return remove_tree(self.folder / name)

    def prune(self, *, all: bool = False, labels: Iterable[str] = ()) -> tuple[list[str], int]:
        """Remove the anonymous volumes that no container has: their names, and bytes that came free on disk.

        all: those with names too. labels: only those that have each, "KEY" or "KEY=VALUE".
        """
        names, freed = [], 0
        used, wanted = self.used(), list(labels)
        for volume in self.listed():
            if volume.name in used or not (all or volume.is_anonymous) or not has_labels(volume.labels, wanted):
                continue
            try:
                freed += volume.remove()
            except (InUse, NotFound):  # another process was faster
                continue
            names.append(volume.name)
        with self._locked():
            known = {volume.name for volume in self.listed()}
            freed += sum(remove_tree(path) for path in self.folder.iterdir() if path.is_dir() and path.name not in known)
        return names, freed

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def has_labels(labels: Mapping[str, str], wanted: Iterable[str]) -> bool:
    """Whether `labels` has each of `wanted`, "KEY" or "KEY=VALUE"."""
    pairs = [want.partition("=") for want in wanted]
    return all(key in labels and (not equals or labels[key] == value) for key, equals, value in pairs)


def _record(row: sqlite3.Row) -> VolumeRecord:
    return VolumeRecord(row["name"], row["driver"], json.loads(row["options"]), json.loads(row["labels"]), row["created"])
