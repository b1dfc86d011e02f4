"""Containers: an image, and a writable layer on top of it."""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import msgspec

from overlaykit.errors import AlreadyExists, InUse, NotFound, OverlaykitError, Unsupported
from overlaykit.oci import Descriptor, Digest, RuntimeConfig
from overlaykit.overlay import Overlay, View
from overlaykit.overlay.inside import run_inside
from overlaykit.overlay.mount import mount, unmount
from overlaykit.overlay.mounted import Bound, Mounted
from overlaykit.store import exporting, frozen, mountpoints, picking
from overlaykit.store.committing import commit
from overlaykit.store.frozen import NamedSnapshot, OwnLayers
from overlaykit.store.images import StoredImage, config_facts
from overlaykit.store.leases import Lease
from overlaykit.store.names import check_container_name
from overlaykit.store.packing import with_virtual_owners
from overlaykit.store.records import Records
from overlaykit.store.unpacking import blobs_and_layers
from overlaykit.tree import Change, Losses, Tree, WhiteoutFormat, changes, merge
from overlaykit.tree.table import StrPath

if TYPE_CHECKING:
    from overlaykit.store.store import Store


# Of a container in which nothing ever ran, as Docker prints it.
STATE = {"Status": "created", **dict.fromkeys(("Running", "Paused", "Restarting", "OOMKilled", "Dead"), False)}
STATE |= {"Pid": 0, "ExitCode": 0, "Error": "", "StartedAt": "0001-01-01T00:00:00Z", "FinishedAt": "0001-01-01T00:00:00Z"}


@dataclass(frozen=True, slots=True)
class Record:
    """A container as it is recorded. image: digest of the manifest; image_name: as the image was called then."""

    id: str
    name: str
    image: Digest
    image_name: str
    created_ns: int
    config: RuntimeConfig
    settings: dict[str, Any] = field(default_factory=dict)  # Hostname, ReadonlyRootfs: what is no image's to say


def insert(records: Records, record: Record) -> None:
    config = msgspec.json.encode(record.config, enc_hook=str.__str__).decode()
    settings = msgspec.json.encode(record.settings).decode()
    values = (record.id, record.name, record.image, record.image_name, record.created_ns, config, settings)
    records.execute("INSERT INTO containers VALUES (?, ?, ?, ?, ?, ?, ?)", *map(_plain, values))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, str) else value  # a Digest is a str to us, but not to SQLite


def everything(records: Records) -> list[Record]:
    """All containers, the newest first."""
    return [_record(row) for row in records.rows("SELECT * FROM containers ORDER BY created DESC")]


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


def _record(row: sqlite3.Row) -> Record:
    config = msgspec.json.decode(row["config"], type=RuntimeConfig)
    settings = msgspec.json.decode(row["settings"], type=dict[str, Any])
    return Record(row["id"], row["name"], Digest(row["image"]), row["image_name"], row["created"], config, settings)


class Container:
    """One container of a store: what the record says, and what can be done with it. A context manager that closes `fs`."""

    def __init__(self, store: Store, record: Record) -> None:
        self._store = store
        self.record = record

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def config(self) -> RuntimeConfig:
        return self.record.config

    @property
    def created(self) -> datetime:
        return datetime.fromtimestamp(self.record.created_ns / 1e9, UTC)

    @property
    def image(self) -> StoredImage:
        """The image it was created from, also if it was removed since: its blobs stay as long as the container."""
        layout, digest = self._store.layout, self.record.image
        listed = next((image for image in self._store.images() if image.digest == digest), None)
        return listed or StoredImage(layout, Descriptor(media_type="", digest=digest, size=layout.size(digest)))

    def __repr__(self) -> str:
        return f"<Container {self.name} of {self.record.image_name}>"

    # --- its files ----------------------------------------------------------------------------------------------------

    @property
    def mounts(self) -> list[mountpoints.MountPoint]:
        """Its volumes and bind mounts."""
        return mountpoints.of(self._store.records, self.id)

    @property
    def fs(self) -> Overlay | Mounted:
        """Its files, to read and to write, under the names that the os module has: `fs.open("/etc/motd", "a")`.

        A path at which a volume or a directory of the host is mounted leads into that. One object, opened when it is first
        asked for, and closed by `close` or with the store. InUse while another process has it, or while it is mounted.
        """
        return self._store.overlay(self.id, self._open)

    def _open(self) -> Overlay | Mounted:
        overlay = self._open_layers()
        try:
            bounds = [point.bound(self._store.volume_store) for point in self.mounts]
            return Mounted(overlay, bounds) if bounds else overlay
        except BaseException:
            overlay.close()
            raise

    def _open_layers(self) -> Overlay:
        if targets := self.mounted_at():
            raise InUse(f"container {self.name} is mounted at {targets[0]}", hint=f"overlaykit umount {self.name}")
        snapshots = self._store.snapshots
        while True:
            directory = snapshots.directory(self.id)
            try:
                overlay = self._open_in(directory)
            except FileNotFoundError:
                if snapshots.directory(self.id) == directory:
                    raise
                continue
            # Somebody may have frozen this upper before we had its lock: then there is another one by now.
            if snapshots.directory(self.id) == directory:
                return overlay
            overlay.close()

    def _open_in(self, directory: Path) -> Overlay:
        snapshots = self._store.snapshots
        return Overlay(
            snapshots.lowers(self.id),
            directory / "fs",
            directory / "work",
            trees=snapshots.trees(self.id) or None,
            userxattr=snapshots.whiteouts is WhiteoutFormat.USERXATTR,
        )

    def hold(self, lease: Lease) -> None:
        """Keep its files as long as the lease lasts, whoever removes it meanwhile. NotFound if somebody already has."""
        snapshots = self._store.snapshots
        held = ""
        while held != (now := snapshots.stat(self.id).id):  # else its upper was frozen just then, and there is a new one
            lease.add(f"snapshots/{now}", *frozen.layer_names(self._store, self.id))
            held = now
        self._store.container(self.id)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """InUse if `fs` is open in another process; during the `with` block none can open it."""
        if self._store.is_open(self.id):  # then the lock is ours already
            yield
            return
        fd = self._locked()
        try:
            yield
        finally:
            os.close(fd)

    def _locked(self) -> int:
        """A descriptor of its work directory with the lock of whoever writes to its upper."""
        snapshots = self._store.snapshots
        while True:
            directory = snapshots.directory(self.id)
            try:
                fd = os.open(directory / "work", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                if snapshots.directory(self.id) == directory:
                    raise
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if snapshots.directory(self.id) == directory:
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise InUse(f"container {self.name} is open in another process") from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # it was frozen before we had the lock, and is no upper any more

    def view(self) -> View | Mounted:
        """Its files as they are now, to read only, by whomever they are being written; a context manager.

        Volumes and bind mounts are in it, but for those below a directory that `fs` or `mount` has yet to make.
        """
        snapshots = self._store.snapshots
        lowers, own, upper = snapshots.stack(self.id)
        layers = [*(directory for directory, _ in (*lowers, *own)), upper]
        bounds = [point.bound(self._store.volume_store, read_only=True) for point in self.mounts]
        view = View(layers, userxattr=snapshots.whiteouts is WhiteoutFormat.USERXATTR)
        return Mounted(view, bounds) if bounds else view

    def close(self) -> None:
        """Close `fs`, if it is open here. Files opened through it stay open."""
        self._store.close_overlay(self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def lower(self) -> Tree:
        """What its image shows, as a tree."""
        return merge([tree for _, tree in self._store.snapshots.image_layers(self.id)])

    def upper(self) -> OwnLayers:
        """Its writable layer as it is on disk now, with what was frozen of it."""
        snapshots = self._store.snapshots
        lowers, own, upper = snapshots.stack(self.id)
        return OwnLayers(lowers, own, upper, whiteouts=snapshots.whiteouts)

    def changeset(self, lower: Tree, upper: OwnLayers) -> Tree:
        """What its writable layer says on top of `lower`, as a tree with whiteouts."""
        return upper.tree if os.geteuid() == 0 else with_virtual_owners(upper.tree, lower)

    def diff(self) -> list[Change]:
        """What differs from its image, as `docker diff` lists it."""
        with self._store.leases.hold() as lease:
            self.hold(lease)
            lower = self.lower()
            return list(changes(lower, self.changeset(lower, self.upper())))

    def export(self, out: StrPath | BinaryIO, *, losses: Losses | None = None) -> None:
        """Write what it shows as one tar, as `docker export` does: to a file, or to what has `write`.

        What a tar cannot carry is appended to `losses`, or else logged.
        """
        exporting.export(self._store, self, out, losses=losses)

    def commit(
        self,
        name: str | None = None,
        *,
        author: str | None = None,
        message: str | None = None,
        changes: Iterable[str] = (),
        compression: str = "gzip",
    ) -> StoredImage:
        """A new image: the container's own and its writable layer as one more. `name` is then its name.

        InUse while another process has `fs` open. What is written through a mount meanwhile may be in it or not.
        changes: of the config, in a Dockerfile's words ("CMD [...]", "ENV A=b"). compression: gzip, zstd or none, with a
        level as in "zstd-19".
        """
        return commit(self._store, self, name, author=author, message=message, changes=changes, compression=compression)

    # --- its states -----------------------------------------------------------------------------------------------------

    def snapshot(self, name: str | None = None) -> NamedSnapshot:
        """A name for what it shows now, to come back to (`rollback`); the next number if nothing is said. No data is copied.

        InUse while it is mounted or open elsewhere; AlreadyExists.
        """
        return frozen.snapshot(self._store, self, name)

    def snapshots(self) -> list[NamedSnapshot]:
        """Its snapshots, the oldest first."""
        return frozen.named(self._store.records, self.id)

    def remove_snapshot(self, name: str) -> int:
        """Forget a snapshot: bytes that came free, if nothing stands on it. What the container shows stays. NotFound."""
        return frozen.forget_name(self._store, self, name)

    def rollback(self, name: str | None = None) -> NamedSnapshot:
        """The snapshot `name` (None: the newest), which it shows again; what was changed since is gone. NotFound, InUse."""
        return frozen.rollback(self._store, self, name)

    def fork(self, name: str | None = None) -> Container:
        """Another container that shows what this one shows now; from now on each goes its own way. No data is copied.

        Both have the same volumes and bind mounts; snapshots stay with this one. InUse while it is mounted or open
        elsewhere; AlreadyExists.
        """
        return self._store.container(frozen.fork(self._store, self, name))

    def discard(self, *paths: str) -> list[str]:
        """Undo what was changed at `paths` and under them: there its files are the image's again. NotFound, InUse."""
        return picking.discard(self._store, self, paths)

    def keep(self, *paths: str) -> list[str]:
        """Undo all changes but those at `paths` and under them: the paths that were undone. NotFound, InUse."""
        return picking.keep(self._store, self, paths)

    def apply_to(self, other: Container, *paths: str) -> int:
        """Make its changes (those at `paths` and under them) in `other` too: how many entries that were.

        They go on top of what `other` changed itself, in one step. NotFound, InUse.
        """
        return picking.apply_to(self._store, self, other, paths)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Closed here, and for the `with` block not to be opened or mounted. InUse if it is mounted, or open elsewhere."""
        self.close()
        self._leave_mounts(force=False)
        with self.quiet():
            yield

    # --- mounting -----------------------------------------------------------------------------------------------------

    def mount(self, target: StrPath | None = None) -> Path:
        """Where the kernel shows its files now: `target`, an existing directory, or one in the store. Root only."""
        if targets := self.mounted_at():
            raise InUse(f"container {self.name} is mounted at {targets[0]} already")
        self.close()
        snapshots = self._store.snapshots
        directory = snapshots.directory(self.id)
        with self.quiet():
            pass
        if target is None:
            place = directory / "merged"
            place.mkdir(mode=0o755, exist_ok=True)
        else:
            place = Path(os.path.realpath(target))
        try:
            steps = self._mount_points()
            for step in snapshots.mounts(self.id, place):
                mount(step)
            try:
                mountpoints.mount_points(place, steps)
            except BaseException:
                self.unmount(lazy=True)
                raise
        except PermissionError as e:
            if os.geteuid() == 0:
                raise
            hint = "its files are there without it: overlaykit ls, cat, put, or container.fs"
            raise Unsupported(f"only root can mount container {self.name}: {e.strerror}", hint=hint) from e
        return place

    def _mount_points(self) -> list[tuple[str, Bound, str]]:
        """What to mount in the overlay, each at a clean path that is there: opening the files in process makes it."""
        points = sorted(self.mounts, key=lambda point: point.spec.target.count("/"))
        if not points:
            return []
        bounds = [point.bound(self._store.volume_store) for point in points]
        with Mounted(self._open_layers(), bounds) as mounted:
            paths = mounted.points
        return [(path, bound, p.spec.propagation) for path, bound, p in zip(paths, bounds, points, strict=True)]

    def unmount(self, *, lazy: bool = False) -> list[Path]:
        """The places where it was mounted, and is no longer. NotFound if there was none."""
        targets = self.mounted_at()
        if not targets:
            raise NotFound(f"container {self.name} is not mounted")
        for target in reversed(targets):
            for inner in reversed(mounted_below(target)):
                unmount(inner, lazy=lazy)
            unmount(target, lazy=lazy)
        merged = self._store.snapshots.directory(self.id) / "merged"
        if merged in targets:
            merged.rmdir()
        return targets

    def run(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, directory: StrPath = "/") -> int:
        """The exit status of program `argv`, run with its files as the root: see overlay/inside.py. InUse as for `fs`."""
        self.close()
        points = self._mount_points()
        with self._open_layers() as layers:
            what = layers.mount_spec()
        with self.quiet():
            return run_inside(
                what, argv, env=env, directory=directory, mounted=lambda place: mountpoints.mount_points(place, points)
            )

    def mounted_at(self) -> list[Path]:
        """Where this mount namespace shows its files, the oldest first. The kernel's own table says so, and no record."""
        return mounts_of(self._store.snapshots.fs(self.id))

    # --- the rest -----------------------------------------------------------------------------------------------------

    def rename(self, name: str) -> Container:
        """The container, called `name` from now on. AlreadyExists, InvalidReference."""
        sql = "UPDATE containers SET name = ? WHERE id = ?"
        try:
            changed = self._store.records.execute(sql, check_container_name(name), self.id)
        except sqlite3.IntegrityError:
            raise AlreadyExists(f"there is a container {name}", hint="choose another name") from None
        if not changed:
            raise NotFound(f"no container {self.name}: it has just been removed")
        return Container(self._store, replace(self.record, name=name))

    def remove(self, *, force: bool = False, volumes: bool = False) -> int:
        """Remove the container with its writable layer: bytes that came free. InUse while it is mounted or open elsewhere.

        force: unmount it first, and do not ask who has it open. volumes: remove its anonymous volumes too, but for those
        that another container has.
        """
        anonymous = [point.volume for point in self.mounts if point.is_anonymous] if volumes else []
        freed = self._remove(force=force)
        for name in anonymous:
            with suppress(InUse, NotFound):
                freed += self._store.volume_store.remove(str(name))
        return freed

    def _remove(self, *, force: bool) -> int:
        store = self._store
        self.close()
        self._leave_mounts(force=force)
        with store.leases.hold() as lease:
            self.hold(lease)
            image = self._image_things()
            lease.add(*frozen.layer_names(store, self.id), *(each.key for each in self.snapshots()), *image)
            with nullcontext() if force else self.quiet(), store.records.transaction():
                store.records.execute("DELETE FROM containers WHERE id = ?", self.id)
                store.snapshots.forget(store.snapshots.stat(self.id).id)
            # Asked only now: whoever removes the image from here on finds that no container needs it.
            is_listed = any(d.digest == self.record.image for d in store.layout.descriptors())
            return store.drop(lease, spare=image if is_listed else set())

    def _image_things(self) -> set[str]:
        """What its image is made of, which nobody else may need if that was removed; nothing if it is damaged."""
        with suppress(OverlaykitError, OSError):
            return blobs_and_layers(self.image)
        return set()

    def _leave_mounts(self, *, force: bool) -> None:
        """InUse if it is mounted; force: unmount it instead."""
        targets = self.mounted_at()
        if targets and not force:
            raise InUse(f"container {self.name} is mounted at {targets[0]}", hint=f"overlaykit umount {self.name}, or rm -f")
        if targets:
            self.unmount(lazy=True)

    def driver_data(self) -> dict[str, str]:
        """Where its layers are, as Docker says it: LowerDir is the highest first, joined by colons."""
        snapshots = self._store.snapshots
        directory = snapshots.directory(self.id)
        return {
            "LowerDir": ":".join(map(str, reversed(snapshots.lowers(self.id)))),
            "MergedDir": str(next(iter(self.mounted_at()), directory / "merged")),
            "UpperDir": str(directory / "fs"),
            "WorkDir": str(directory / "work"),
        }

    def inspect(self) -> dict[str, Any]:
        """What there is to know about it, under the names that Docker gives it."""
        config = self.config
        command = [*(config.entrypoint or ()), *(config.cmd or ())]
        return {
            "Id": self.id,
            "Created": self.created.isoformat().replace("+00:00", "Z"),
            "Path": command[0] if command else "",
            "Args": command[1:],
            "State": STATE,
            "Image": self.image.id,
            "Name": f"/{self.name}",
            "Driver": "overlay2",
            "GraphDriver": {"Data": self.driver_data(), "Name": "overlay2"},
            "HostConfig": {
                "Binds": [point.spec.text for point in self.mounts if point.spec.text] or None,
                "ReadonlyRootfs": bool(self.record.settings.get("ReadonlyRootfs")),
                "VolumesFrom": self.record.settings.get("VolumesFrom"),
            },
            "Mounts": [point.facts(self._store.volume_store) for point in self.mounts],
            "Config": config_facts(
                config,
                Hostname=self.record.settings.get("Hostname", self.id[:12]),
                Image=self.record.image_name,
                Labels=dict(config.labels or {}),
            ),
        }


def mounts_of(upper: Path) -> list[Path]:
    """Where overlays with this upper are mounted. proc(5), /proc/pid/mountinfo; blanks and commas stand there in octal."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        front, _, back = line.partition(b" - ")
        kind, _, options = back.split(b" ", 2)
        if kind == b"overlay" and os.fsencode(upper) in [
            _unescaped(option[9:]) for option in options.split(b",") if option.startswith(b"upperdir=")
        ]:
            found.append(Path(os.fsdecode(_unescaped(front.split(b" ")[4]))))
    return found


def mounted_below(place: Path) -> list[Path]:
    """What is mounted in the directories below `place`, the oldest first."""
    prefix = os.fsencode(place) + b"/"
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    found = [_unescaped(line.split(b" ")[4]) for line in lines]
    return [Path(os.fsdecode(path)) for path in found if path.startswith(prefix)]


def _unescaped(text: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), text)
