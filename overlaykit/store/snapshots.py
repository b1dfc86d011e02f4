"""Snapshots: where layers live, and how they stack. The words are containerd's.

A snapshot is one directory in the store. It is `active` while somebody writes to it, a `view` if it only shows what is
below, `committed` once it never changes again. Its parent is a committed one, or there is none:

    prepare(key, parent) -> active      commit(name, key): the active `key` becomes the committed `name`
    view(key, parent)    -> view        remove(key): whatever has no children

A layer is a committed snapshot called by its chain_id, a frozen state of a writable layer one called frozen-ID. A row in
the records is what makes a snapshot exist: a directory without one is on its way in or out.

    ROOT/snapshots/ID/fs       the upper of an active snapshot, a lower once it is committed
    ROOT/snapshots/ID/work     the overlay's work directory while it is active
    ROOT/snapshots/ID/tree     what a committed one says, as columns
    ROOT/snapshots/ID/merged   where it is mounted if nobody says another place
    ROOT/snapshots/ID/bottom   an empty lower for an active one without a parent, since an overlay needs one
"""

from __future__ import annotations

import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from overlaykit.errors import AlreadyExists, InUse, NotFound, Unsupported
from overlaykit.oci.durable import sync_directory
from overlaykit.overlay.mount import Mount, bind_mount, overlay_mount
from overlaykit.store import quota
from overlaykit.store.disk import Usage, copy_directory_attributes, remove_tree, sync_file_system, usage
from overlaykit.store.leases import Lease
from overlaykit.store.limits import Limits
from overlaykit.store.records import Records
from overlaykit.tree import Tree, WhiteoutFormat, scan
from overlaykit.tree.table import StrPath
from overlaykit.tree.whiteout import METACOPY, REDIRECT

Layers = list[tuple[Path, Tree]]  # the directory and the Tree of each, bottom first
ACTIVE, VIEW, COMMITTED = "active", "view", "committed"
FROZEN = "frozen-"  # begins the names of committed snapshots that no image has
QUERY = "SELECT s.id, s.key, s.kind, s.created, p.key AS parent FROM snapshots s LEFT JOIN snapshots p ON s.parent = p.id "


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot as it is recorded. `id` names its directory, `parent` is a key; `created_ns` since 1970."""

    id: str
    key: str
    kind: str
    parent: str | None
    created_ns: int


class Snapshotter:
    """The snapshots of one store."""

    def __init__(self, folder: Path, records: Records, whiteouts: WhiteoutFormat) -> None:
        """folder: ROOT/snapshots. whiteouts: how its directories say that a lower name is gone."""
        self.folder = folder
        self.whiteouts = whiteouts
        self.limits_of: Callable[[str], Limits | None] = lambda key: None  # of the active snapshot `key`
        self._records = records
        self._trees: dict[str, Tree] = {}
        self._lock = threading.Lock()

    # --- the life of a snapshot ---------------------------------------------------------------------------------------

    def prepare(self, key: str, parent: str | None, lease: Lease) -> Snapshot:
        """A new active snapshot on top of the committed `parent`: an empty upper. AlreadyExists, NotFound."""
        return self.record(self.prepare_directory(parent, lease), key, parent)

    def prepare_directory(self, parent: str | None, lease: Lease) -> str:
        """The id of a directory for an active snapshot on top of `parent`; `record` in some transaction makes it one."""
        return self._prepare(None if parent is None else self.fs(parent), lease)

    def _prepare(self, below: Path | None, lease: Lease) -> str:
        directory = self._new_directory(lease)
        (directory / "fs").mkdir(mode=0o755)
        (directory / "work").mkdir(mode=0o700)
        if below is not None:
            # The root of the merged tree is upper's: it must look as the one below.
            copy_directory_attributes(below, directory / "fs", without=self.whiteouts.xattr_prefix)
        else:
            (directory / "bottom").mkdir(mode=0o755)
        sync_directory(directory)
        sync_directory(self.folder)
        return directory.name

    def view(self, key: str, parent: str | None, lease: Lease) -> Snapshot:
        """A new view of the committed `parent`. AlreadyExists, NotFound."""
        directory = self._new_directory(lease)
        (directory / "fs").mkdir(mode=0o755)
        sync_directory(self.folder)
        return self.record(directory.name, key, parent, kind=VIEW)

    def apply(self, name: str, parent: str | None, write: Callable[[Path], Tree], lease: Lease) -> Snapshot:
        """A new committed snapshot. `write` fills its empty directory and gives the Tree of it.

        Everything is on disk before the snapshot exists.
        """
        return self.record(self.write_directory(write, lease).name, name, parent, kind=COMMITTED)

    def write_directory(self, write: Callable[[Path], Tree], lease: Lease) -> Path:
        """The directory of a committed snapshot, on disk, before there is a row for it."""
        directory = self._new_directory(lease)
        lease.sync()
        for part in ("fs", "tree"):
            (directory / part).mkdir(mode=0o755)
        write(directory / "fs").save(directory / "tree")
        sync_file_system(directory)
        return directory

    @contextmanager
    def scratch(self, lease: Lease) -> Iterator[Path]:
        """An empty directory on the store's file system, gone afterwards. If we are killed it is cleared with the lease."""
        directory = self._new_directory(lease)
        try:
            yield directory
        finally:
            remove_tree(directory)

    def commit(self, name: str, key: str) -> Snapshot:
        """The active snapshot `key`, committed as `name`: its upper is a lower from now on. NotFound, AlreadyExists."""
        snapshot = self._expect(key, ACTIVE)
        directory = self.folder / snapshot.id
        (directory / "tree").mkdir(mode=0o755, exist_ok=True)
        scan(directory / "fs", whiteouts=self.whiteouts).save(directory / "tree")
        sync_file_system(directory)
        with _unique(name):
            self._records.execute("UPDATE snapshots SET key = ?, kind = ? WHERE id = ?", name, COMMITTED, snapshot.id)
        remove_tree(directory / "work")
        return self.stat(name)

    def freeze(
        self,
        key: str,
        lease: Lease,
        also: Callable[[str], object] = lambda name: None,
        *,
        stack: Callable[[Layers, Path], Tree] | None = None,
    ) -> Snapshot:
        """What the active `key` was until now, committed; a new, empty `key` is on top of it. NotFound.

        Nothing is copied. Unsupported for an upper with redirects or metacopies, which make sense as an upper only. The
        caller sees to it that nobody writes to it. also: called with the committed one's name in the same transaction.
        stack: fills the empty directory of one more committed layer between the two; it is given the layers below that.
        """
        active = self._expect(key, ACTIVE)
        directory = self.folder / active.id
        tree = self.scan(directory / "fs")
        if any(has_marks(xattrs, self.whiteouts) for xattrs in tree.xattr_sets):
            raise Unsupported("it has directories or files that a mount renamed with redirect_dir", hint="overlaykit commit")
        lease.add(f"snapshots/{active.id}/tree", f"snapshots/{active.id}/work")  # one or the other is too much afterwards
        (directory / "tree").mkdir(mode=0o755, exist_ok=True)
        tree.save(directory / "tree")
        name = top = FROZEN + active.id
        stacked = directory
        if stack is not None:
            stacked = self.write_directory(partial(stack, [*self.layers(key), (directory / "fs", tree)]), lease)
            top = FROZEN + stacked.name
        lease.add(name, top)
        above = self._prepare(stacked / "fs", lease)
        sync_file_system(directory)
        with self._records.transaction():
            self._records.execute("UPDATE snapshots SET key = ?, kind = ? WHERE id = ?", name, COMMITTED, active.id)
            if stack is not None:
                self.record(stacked.name, top, name, kind=COMMITTED)
            self.record(above, key, top)
            also(name)
        remove_tree(directory / "work")
        return self.stat(name)

    def restart(self, key: str, parent: str | None, lease: Lease) -> str:
        """Replace the active `key` by a new, empty one on top of `parent`: the id of the old one's directory, which no
        snapshot has any more."""
        above = self.prepare_directory(parent, lease)
        with self._records.transaction():
            old = self._expect(key, ACTIVE).id
            lease.note(f"snapshots/{old}")  # from the end of the transaction on nobody else knows of it
            lease.sync()
            self.forget(old)
            self.record(above, key, parent)
        return old

    def remove(self, key: str, lease: Lease) -> int:
        """Remove a snapshot without children: bytes that came free on disk. NotFound, InUse."""
        snapshot = self.stat(key)
        lease.add(f"snapshots/{snapshot.id}")
        lease.sync()
        self.forget(snapshot.id)
        return self.remove_directory(snapshot.id)

    def forget(self, id: str) -> None:
        """Take a snapshot out of the records; its directory is for whoever calls this. InUse if it has children."""
        try:
            self._records.execute("DELETE FROM snapshots WHERE id = ?", id)
        except sqlite3.IntegrityError:
            children = [r["key"] for r in self._records.rows("SELECT key FROM snapshots WHERE parent = ?", id)]
            raise InUse(f"snapshot {id} has children: {', '.join(children[:3])}") from None

    def remove_directory(self, id: str) -> int:
        """Remove what lies in a snapshot's directory: bytes that came free on disk."""
        with self._lock:
            self._trees.pop(id, None)
        quota.release(self.folder / id)
        return remove_tree(self.folder / id)

    # --- asking -------------------------------------------------------------------------------------------------------

    def stat(self, key: str) -> Snapshot:
        """The snapshot `key`. NotFound."""
        row = self._records.row(QUERY + "WHERE s.key = ?", key)
        if row is None:
            raise _missing(key)
        return _snapshot(row)

    def has(self, name: str) -> bool:
        """Whether there is a committed snapshot `name`."""
        return self._records.row("SELECT 1 FROM snapshots WHERE key = ? AND kind = ?", name, COMMITTED) is not None

    def walk(self, kind: str | None = None) -> Iterator[Snapshot]:
        """Every snapshot, or those of one kind, the oldest first."""
        where = "WHERE s.kind = ? " if kind else ""
        return map(_snapshot, self._records.rows(QUERY + where + "ORDER BY s.created", *([kind] if kind else [])))

    def scan(self, directory: Path) -> Tree:
        """What lies in a snapshot's directory now, as a tree with whiteouts."""
        return scan(directory, whiteouts=self.whiteouts)

    def usage(self, key: str) -> Usage:
        """What the snapshot itself takes on disk, without those below."""
        return usage(self.fs(key))

    def chain(self, key: str) -> list[Snapshot]:
        """The snapshot and all below it, bottom first."""
        rows = self._records.rows(
            "WITH RECURSIVE chain (id, up) AS (SELECT id, 0 FROM snapshots WHERE key = ? UNION ALL "
            "SELECT s.parent, c.up + 1 FROM chain c JOIN snapshots s ON s.id = c.id WHERE s.parent IS NOT NULL) "
            "SELECT s.id, s.key, s.kind, s.created, p.key AS parent FROM chain c JOIN snapshots s ON s.id = c.id "
            "LEFT JOIN snapshots p ON s.parent = p.id ORDER BY c.up DESC",
            key,
        )
        if not rows:
            raise _missing(key)
        return [_snapshot(row) for row in rows]

    def directory(self, key: str) -> Path:
        return self.folder / self.stat(key).id

    def fs(self, key: str) -> Path:
        """The directory with the snapshot's own files."""
        return self.directory(key) / "fs"

    def lowers(self, key: str) -> list[Path]:
        """The directories to stack below the snapshot, bottom first; of a committed one itself as well."""
        found = [directory for directory, _ in self.layers(key)]
        snapshot = self.stat(key)
        return found if found or snapshot.kind != ACTIVE else [self.folder / snapshot.id / "bottom"]

    def layers(self, key: str) -> Layers:
        """The committed snapshots below this one, and itself if it is: the directory and the Tree of each, bottom first."""
        chain = [snapshot for snapshot in self.chain(key) if snapshot.kind == COMMITTED]
        return [(self.folder / snapshot.id / "fs", self._tree(snapshot.id)) for snapshot in chain]

    def own_layers(self, key: str) -> Layers:
        """Those of `layers` that no image has: what was frozen of the writable layer."""
        return self.stack(key)[1]

    def image_layers(self, key: str) -> Layers:
        """Those of `layers` below the frozen ones."""
        return self.stack(key)[0]

    def stack(self, key: str, held: Sequence[Snapshot] | None = None) -> tuple[Layers, Layers, Path]:
        """`image_layers`, `own_layers` and `fs` of a snapshot, all of one moment, whatever others do to it meanwhile.

        held: its `chain` at that moment, which a lease keeps; None for now.
        """
        chain = self.chain(key) if held is None else held
        committed = [snapshot for snapshot in chain if snapshot.kind == COMMITTED]
        image, own = (
            [(self.folder / s.id / "fs", self._tree(s.id)) for s in committed if s.key.startswith(FROZEN) == frozen]
            for frozen in (False, True)
        )
        return image, own, self.folder / chain[-1].id / "fs"

    def limits_left(self, key: str, limits: Limits) -> Limits:
        """What the frozen layers of `key` leave of `limits` to its upper."""
        frozen = [snapshot for snapshot in self.chain(key) if snapshot.key.startswith(FROZEN)]
        return limits.without(usage(self.folder / snapshot.id / "fs") for snapshot in frozen)

    def make_work(self, id: str) -> None:
        """Make the work directory of an active snapshot again, which it has lost."""
        (self.folder / id / "work").mkdir(mode=0o700)
        quota.join(self.folder / id)

    def trees(self, key: str) -> list[Tree]:
        """What each of `layers` says."""
        return [tree for _, tree in self.layers(key)]

    def mounts(self, key: str, target: StrPath = "") -> list[Mount]:
        """The mounts that show the snapshot, one after another: an overlay, or a bind mount of a single directory."""
        lowers, snapshot = self.lowers(key), self.stat(key)
        userxattr = self.whiteouts is WhiteoutFormat.USERXATTR
        directory = self.folder / snapshot.id
        if snapshot.kind != ACTIVE:
            if len(lowers) > 1:
                return [overlay_mount(lowers, None, None, target, userxattr=userxattr)]
            return [bind_mount(lowers[0] if lowers else directory / "fs", target, read_only=True)]
        return [overlay_mount(lowers, directory / "fs", directory / "work", target, userxattr=userxattr)]

    def driver_data(self, name: str) -> dict[str, str]:
        """Where a committed snapshot and those below it lie, as `docker image inspect` says it: the highest first."""
        *lowers, top = self.lowers(name)
        data = {"LowerDir": ":".join(map(str, reversed(lowers)))} if lowers else {}
        directory = top.parent
        return data | {"MergedDir": str(directory / "merged"), "UpperDir": str(top), "WorkDir": str(directory / "work")}

    def _tree(self, id: str) -> Tree:
        # Committed snapshots never change, and an id is never used again.
        with self._lock:
            tree = self._trees.get(id)
            if tree is None:
                tree = self._trees[id] = Tree.load(self.folder / id / "tree")
            return tree

    def forget_tree(self, id: str) -> None:
        """Read the Tree of directory `id` again when it is next asked for: it was repaired."""
        with self._lock:
            self._trees.pop(id, None)

    # --- making -------------------------------------------------------------------------------------------------------

    def _new_directory(self, lease: Lease) -> Path:
        while True:
            # Short: the kernel takes one page of mount options, and every layer's path is in it.
            directory = self.folder / secrets.token_hex(6)
            lease.add(f"snapshots/{directory.name}")
            try:
                directory.mkdir(mode=0o700)
            except FileExistsError:
                continue
            return directory

    def record(self, id: str, key: str, parent: str | None, *, kind: str = ACTIVE) -> Snapshot:
        """The snapshot whose directory `id` is: from now on it exists. AlreadyExists, NotFound."""
        created = time.time_ns()
        with self._records.transaction(), _unique(key):
            below = None
            if parent is not None:
                below = self._expect(parent, COMMITTED).id
            self._records.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?, ?)", id, key, kind, below, created)
            if kind == ACTIVE and (limits := self.limits_of(key)) is not None:
                quota.enforce(self.folder / id, self.limits_left(key, limits))
        return Snapshot(id, key, kind, parent, created)

    def _expect(self, key: str, kind: str) -> Snapshot:
        snapshot = self.stat(key)
        if snapshot.kind != kind:
            raise InUse(f"snapshot {key} is {snapshot.kind}, not {kind}")
        return snapshot


def has_marks(xattrs: Mapping[str, bytes], whiteouts: WhiteoutFormat) -> bool:
    """Whether they say that an entry's lower part is elsewhere: a redirect or a metacopy."""
    return any(whiteouts.xattr_prefix + mark in xattrs for mark in (REDIRECT, METACOPY))


@contextmanager
def _unique(key: str) -> Iterator[None]:
    """A broken UNIQUE in the `with` block is a key that is taken."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise AlreadyExists(f"there is a snapshot {key}") from None


def _missing(key: str) -> NotFound:
    """What is said of a key that no snapshot has. Containers' are their ids, and looked for when they have been found."""
    if re.fullmatch("[0-9a-f]{64}", key):
        return NotFound(f"no container {key[:12]}: it has been removed")
    return NotFound(f"no snapshot {key}")


def _snapshot(row: sqlite3.Row) -> Snapshot:
    return Snapshot(row["id"], row["key"], row["kind"], row["parent"], row["created"])
