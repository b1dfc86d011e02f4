"""A writable layer over time: frozen states of it below a new, empty upper. Nothing is copied.

    snapshot   the upper becomes a committed snapshot, called frozen-ID and not by a chain_id, with a new upper on top
    rollback   what came after a frozen state goes: a new upper on top of that state
    fork       another container on top of the same frozen state

A container's own layers are then the frozen ones and its upper; all that is told of it, diff and commit too, is about them
together. A frozen layer stays as long as a container stands on it or has a name for it.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from overlaykit.errors import AlreadyExists, NotFound
from overlaykit.overlay.contents import Contents
from overlaykit.overlay.upper import UpperLayer
from overlaykit.store import containerrecords
from overlaykit.store.names import check_container_name, check_snapshot_name, free_name
from overlaykit.store.snapshots import COMMITTED, FROZEN
from overlaykit.tree import Tree, WhiteoutFormat, squash

if TYPE_CHECKING:
    from overlaykit.store.containers import Container
    from overlaykit.store.leases import Lease
    from overlaykit.store.records import Records
    from overlaykit.store.store import Store


class OwnLayers:
    """What a container says on top of its image: `tree`, one changeset, and the content of its files. As UpperLayer."""

    def __init__(
        self,
        lowers: Sequence[tuple[Path, Tree]],
        frozen: Sequence[tuple[Path, Tree]],
        upper: Path,
        *,
        whiteouts: WhiteoutFormat,
    ) -> None:
        """lowers: (directory, Tree) of the image's layers; frozen: of the frozen ones; both bottom first."""
        self._top = UpperLayer(upper, [*lowers, *frozen], whiteouts=whiteouts)
        self._frozen = [(tree, Contents(tree, directory)) for directory, tree in frozen]
        self.tree = squash([*(tree for _, tree in frozen), self._top.tree]) if frozen else self._top.tree

    def contents(self, tree: Tree) -> Callable[[int], int]:
        """Opens the files of `tree`, whose paths are some of `self.tree`'s: a `content` for write_tar."""
        if not self._frozen:
            return self._top.contents(tree)
        return lambda row: self._open(tree, row)

    def _open(self, tree: Tree, row: int) -> int:
        path = tree.paths[row]
        layer = int(self.tree.layer[self.tree.find(path)])
        if layer == len(self._frozen):
            return self._top.contents(tree)(row)
        frozen, contents = self._frozen[layer]
        return contents(frozen.find(path))


@dataclass(frozen=True, slots=True)
class NamedSnapshot:
    """A frozen state that a container has a name for. key: of the committed snapshot, which may be its image's topmost."""

    name: str
    key: str
    created_ns: int

    @property
    def created(self) -> datetime:
        return datetime.fromtimestamp(self.created_ns / 1e9, UTC)


def named(records: Records, id: str) -> list[NamedSnapshot]:
    """The snapshots of container `id`, the oldest first."""
    rows = records.rows(
        "SELECT n.name, s.key, n.created FROM container_snapshots n JOIN snapshots s ON s.id = n.snapshot "
        "WHERE n.container = ? ORDER BY n.created",
        id,
    )
    return [NamedSnapshot(row["name"], row["key"], row["created"]) for row in rows]


def find(container: Container, records: Records, name: str | None) -> NamedSnapshot:
    """The snapshot `name`, or the newest for None. NotFound."""
    found = [snapshot for snapshot in named(records, container.id) if name in (None, snapshot.name)]
    if not found:
        raise NotFound(
            f"container {container.name} has no snapshot" + (f" {name}" if name else ""),
            hint=f"overlaykit snapshots {container.name} lists them",
        )
    return found[-1]


def snapshot(store: Store, container: Container, name: str | None) -> NamedSnapshot:
    """What Container.snapshot does."""
    if name is not None:
        check_snapshot_name(name)
    with container.at_rest(), store.leases.hold() as lease:
        known = {each.name for each in named(store.records, container.id)}
        chosen = name or next(str(n) for n in range(1, len(known) + 2) if str(n) not in known)
        if chosen in known:
            raise AlreadyExists(f"container {container.name} has a snapshot {chosen}")
        created = time.time_ns()

        def record(key: str) -> None:
            values = (container.id, chosen, store.snapshots.stat(key).id, created)
            try:
                store.records.execute("INSERT INTO container_snapshots VALUES (?, ?, ?, ?)", *values)
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"container {container.name} has a snapshot {chosen}, or has been removed") from None

        key = _freeze(store, container, lease, record)
    return NamedSnapshot(chosen, key, created)


def _freeze(store: Store, container: Container, lease: Lease, record: Callable[[str], object]) -> str:
    """The committed snapshot that shows what the container shows now, made if there is none; `record(key)` is done in the
    transaction that makes it."""
    key = frozen_key(store, container)
    if key is None:
        return store.snapshots.freeze(container.id, lease, record).key
    lease.add(key)
    with store.records.transaction():
        record(key)
    return key


def frozen_key(store: Store, container: Container) -> str | None:
    """The committed snapshot that shows what the container shows now, if there is one: the parent of an unused upper."""
    snapshots = store.snapshots
    parent = snapshots.stat(container.id).parent
    upper = snapshots.fs(container.id)
    if parent is None or any(upper.iterdir()):
        return None
    ours, below = upper.stat(), snapshots.fs(parent).stat()
    same = all(getattr(ours, name) == getattr(below, name) for name in ("st_mode", "st_uid", "st_gid", "st_mtime_ns"))
    return parent if same else None


def forget_name(store: Store, container: Container, name: str) -> int:
    """Take a snapshot's name away: bytes that came free, since nobody else needs its layers. NotFound."""
    found = find(container, store.records, name)
    with store.leases.hold() as lease:
        lease.add(*layer_names(store, found.key))
        store.records.execute("DELETE FROM container_snapshots WHERE container = ? AND name = ?", container.id, name)
        return store.drop(lease)


def rollback(store: Store, container: Container, name: str | None) -> NamedSnapshot:
    """What Container.rollback does."""
    with container.at_rest(), store.leases.hold() as lease:
        target = find(container, store.records, name)
        # Another may be forgetting the state at this moment: it is there after this line, or NotFound.
        lease.add(*layer_names(store, container.id), *layer_names(store, target.key))
        store.snapshots.restart(container.id, target.key, lease)
        store.drop(lease)
    return target


def fork(store: Store, container: Container, name: str | None) -> str:
    """The id of the new container. What Container.fork does."""
    from overlaykit.store import mountpoints

    if name is not None:
        check_container_name(name)
    id = secrets.token_hex(32)
    with container.at_rest(), store.leases.hold() as lease:
        prepared = store.snapshots.prepare_directory(container.id, lease)

        def record(key: str) -> None:
            chosen = name or free_name(store.records)
            fork = replace(container.record, id=id, name=chosen, created_ns=time.time_ns())
            try:
                containerrecords.insert(store.records, fork)
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"there is a container {chosen}") from None
            store.snapshots.record(prepared, id, key)
            mountpoints.insert(store.records, id, container.mounts)

        _freeze(store, container, lease, record)
    return id


def layer_names(store: Store, key: str) -> list[str]:
    """The names of the frozen layers of `key`, as leases have them."""
    return [s.key for s in store.snapshots.chain(key) if s.kind == COMMITTED and s.key.startswith(FROZEN)]
