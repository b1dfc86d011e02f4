"""What a writable layer may hold, as `create --storage-opt` says it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overlaykit.errors import InvalidReference
from overlaykit.store import containerrecords
from overlaykit.store.quantities import parse_size

if TYPE_CHECKING:
    from overlaykit.store.disk import Usage
    from overlaykit.store.records import Records


@dataclass(frozen=True, slots=True)
class Limits:
    """What a writable layer may hold. size: bytes on disk; entries: inodes, its root not counted. None: no limit."""

    size: int | None = None
    entries: int | None = None

    @staticmethod
    def parse(options: Mapping[str, str]) -> Limits | None:
        """What `--storage-opt` says: size=10G, entries=100000; None for nothing. InvalidReference."""
        for key in options.keys() - {"size", "entries"}:
            raise InvalidReference(f"unknown storage option {key!r}", hint="there are size=10G and entries=100000")
        entries = options.get("entries")
        if entries is not None and not (entries.isdecimal() and 0 < int(entries) < 1 << 62):
            raise InvalidReference(f"--storage-opt entries={entries}: not a number of entries")
        size = parse_size(options["size"], "--storage-opt size") if "size" in options else None
        if size == 0:
            raise InvalidReference("--storage-opt size=0: nothing could be written")
        return Limits(size, None if entries is None else int(entries)) if options else None

    def without(self, used: Iterable[Usage]) -> Limits:
        """What is left when this much is used, below zero if it is too much."""
        taken = list(used)
        size = None if self.size is None else self.size - sum(each.size for each in taken)
        entries = None if self.entries is None else self.entries - sum(each.inodes - 1 for each in taken)
        return Limits(size, entries)


def limits_of(records: Records, id: str) -> Limits | None:
    """What the writable layer of container `id` may hold; None: as much as it likes."""
    return Limits.parse(containerrecords.settings(records, id).get("StorageOpt") or {})
