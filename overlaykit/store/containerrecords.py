"""Containers as they are recorded: the rows of `containers` in store.db.

`ps` reads them and loads little else, so what only changes need is imported where it is needed.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from overlaykit.errors import IntegrityError, NotFound
from overlaykit.oci.digest import Digest
from overlaykit.oci.documents import RuntimeConfig
from overlaykit.store.records import Records


class Record(Struct, frozen=True):
    """A container as it is recorded. image: digest of the manifest; image_name: as the image was called then."""

    id: str
    name: str
    image: Digest
    image_name: str
    created_ns: int
    config: RuntimeConfig
    settings: dict[str, Any] = {}  # Hostname, ReadonlyRootfs: what is no image's to say

    @property
    def created(self) -> datetime:
        return datetime.fromtimestamp(self.created_ns / 1e9, UTC)


_CONFIG = msgspec.json.Decoder(RuntimeConfig)
_SETTINGS = msgspec.json.Decoder(dict[str, Any])


def insert(records: Records, record: Record) -> None:
    config = msgspec.json.encode(record.config, enc_hook=str.__str__).decode()
    settings = msgspec.json.encode(record.settings).decode()
    values = (record.id, record.name, record.image, record.image_name, record.created_ns, config, settings)
    records.execute("INSERT INTO containers VALUES (?, ?, ?, ?, ?, ?, ?)", *map(_plain, values))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, str) else value  # a Digest is a str to us, but not to SQLite


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except msgspec.ValidationError as e:
        raise IntegrityError(f"the record of a container cannot be read: {e}", hint="overlaykit fsck --repair") from None


@_readable()
def everything(records: Records) -> list[Record]:
    """All containers, the newest first."""
    return [_record(row) for row in records.rows("SELECT * FROM containers ORDER BY created DESC")]


@_readable()
def find(records: Records, wanted: str) -> Record:
    """The container that `wanted` names: its id, its name, or how its id begins. NotFound also if several ids do."""
    for condition in ("id = ?", "name = ?"):
        row = records.row(f"SELECT * FROM containers WHERE {condition}", wanted)
        if row is not None:
            return _record(row)
    if re.fullmatch(r"[0-9a-f]{1,63}", wanted):
        rows = records.rows("SELECT * FROM containers WHERE substr(id, 1, ?) = ?", len(wanted), wanted)
        if len(rows) == 1:
            return _record(rows[0])
        if rows:
            raise NotFound(f"{wanted} is how the ids of {len(rows)} containers begin", hint="give more digits")
    raise NotFound(f"no container {wanted}", hint="overlaykit ps lists them")


def is_taken(records: Records, name: str) -> bool:
    """Whether there is a container `name`."""
    return records.row("SELECT 1 FROM containers WHERE name = ?", name) is not None


def _record(row: sqlite3.Row) -> Record:
    id, name, image, image_name, created, config, settings = row
    return Record(id, name, Digest(image), image_name, created, _CONFIG.decode(config), _SETTINGS.decode(settings))


def settings(records: Records, id: str) -> dict[str, Any]:
    """Those of container `id`; none if there is no such container."""
    row = records.row("SELECT settings FROM containers WHERE id = ?", id)
    return {} if row is None else _SETTINGS.decode(row["settings"])
