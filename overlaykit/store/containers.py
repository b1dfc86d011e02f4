"""Containers: an image, and a writable layer on top of it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from typing import Any, BinaryIO

from msgspec.structs import replace

from overlaykit.errors import AlreadyExists, InUse, NotFound, OverlaykitError
from overlaykit.oci import Descriptor, RuntimeConfig
from overlaykit.store import apparent, exporting, frozen, mountpoints, picking
from overlaykit.store.committing import commit
from overlaykit.store.containerfiles import ContainerFiles
from overlaykit.store.frozen import NamedSnapshot, OwnLayers
from overlaykit.store.images import StoredImage, config_facts
from overlaykit.store.names import check_container_name
from overlaykit.store.snapshots import Snapshot
from overlaykit.store.unpacking import blobs_and_layers
from overlaykit.tree import Change, Losses, Tree, changes, merge
from overlaykit.tree.recorded import with_owners_of
from overlaykit.tree.table import StrPath

# Of a container in which nothing ever ran, as Docker prints it.
STATE = {"Status": "created", **dict.fromkeys(("Running", "Paused", "Restarting", "OOMKilled", "Dead"), False)}
STATE |= {"Pid": 0, "ExitCode": 0, "Error": "", "StartedAt": "0001-01-01T00:00:00Z", "FinishedAt": "0001-01-01T00:00:00Z"}


class Container(ContainerFiles):
    """One container of a store: what the record says, and what can be done with it. A context manager that closes `fs`."""

    @property
    def config(self) -> RuntimeConfig:
        return self.record.config

    @property
    def created(self) -> datetime:
        return self.record.created

    @property
    def image(self) -> StoredImage:
        """The image it was created from, also if it was removed since: its blobs stay as long as the container."""
        layout, digest = self._store.layout, self.record.image
        listed = next((image for image in self._store.images() if image.digest == digest), None)
        return listed or StoredImage(layout, Descriptor(media_type="", digest=digest, size=layout.size(digest)))

    def __repr__(self) -> str:
        return f"<Container {self.name} of {self.record.image_name}>"

    # --- what it says -------------------------------------------------------------------------------------------------

    def lower(self, held: Sequence[Snapshot] | None = None) -> Tree:
        """What its image shows, as a tree. held: its layers, as `hold` gave them."""
        return merge([tree for _, tree in self._store.snapshots.stack(self.id, held)[0]])

    def upper(self, held: Sequence[Snapshot] | None = None) -> OwnLayers:
        """Its writable layer as it is on disk now, with what was frozen of it. held: as in `lower`."""
        snapshots = self._store.snapshots
        lowers, own, upper = snapshots.stack(self.id, held)
        return OwnLayers(lowers, own, upper, whiteouts=snapshots.whiteouts)

    def changeset(self, lower: Tree, upper: OwnLayers) -> Tree:
        """What its writable layer says on top of `lower`, as a tree with whiteouts."""
        if os.geteuid() == 0:
            return upper.tree
        return with_owners_of(upper.tree, lower, uid=os.geteuid(), gid=os.getegid())

    def diff(self) -> list[Change]:
        """What differs from its image, as `docker diff` lists it."""
        with self._store.leases.hold() as lease:
            held = self.hold(lease)
            lower = self.lower(held)
            return list(changes(lower, self.changeset(lower, self.upper(held))))

    def export(self, out: StrPath | BinaryIO, *, losses: Losses | None = None) -> None:
        """Write what it shows as one tar, as `docker export` does: to a file, or to what has `write`.

        What a tar cannot carry is appended to `losses`, or else logged. InvalidLayer if a file gets longer or shorter
        meanwhile, since somebody writes to it.
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
        pause: bool = True,
    ) -> StoredImage:
        """A new image: the container's own and its writable layer as one more. `name` is then its name.

        InUse while another process has `fs` open. pause: let what runs in it, or in a mount of it, stand still meanwhile;
        else what is written may be in it or not, and InvalidLayer if a file gets longer or shorter just then.
        changes: of the config, in a Dockerfile's words ("CMD [...]", "ENV A=b"). compression: gzip, zstd or none, with a
        level as in "zstd-19".
        """
        return commit(
            self._store, self, name, author=author, message=message, changes=changes, compression=compression, pause=pause
        )

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

    # --- the rest -----------------------------------------------------------------------------------------------------

    def rename(self, name: str) -> Container:
        """The container, called `name` from now on. AlreadyExists, also for the name that it has; InvalidReference."""
        if name == self.name:
            raise AlreadyExists(f"container {name} has that name already")
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
        if force:
            self.close()
            self._leave_mounts(force=True)
        with store.leases.hold() as lease:
            lease.add(f"snapshots/{store.snapshots.stat(self.id).id}")
            image = self._image_things()
            lease.add(*frozen.layer_names(store, self.id), *(each.key for each in self.snapshots()), *image)
            with nullcontext() if force else self.at_rest(), store.records.transaction():
                # Its upper may have been frozen since, and another be in its place: nobody else would know of that one.
                upper = store.snapshots.stat(self.id).id
                lease.note(f"snapshots/{upper}", *frozen.layer_names(store, self.id))
                lease.sync()
                store.records.execute("DELETE FROM containers WHERE id = ?", self.id)
                store.snapshots.forget(upper)
            # Asked only now: whoever removes the image from here on finds that no container needs it.
            is_listed = any(d.digest == self.record.image for d in store.layout.descriptors())
            return store.drop(lease, spare=image if is_listed else set())

    def _image_things(self) -> set[str]:
        """What its image is made of, which nobody else may need if that was removed; nothing if it is damaged."""
        with suppress(OverlaykitError, OSError):
            return blobs_and_layers(self.image)
        return set()

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

    def sizes(self) -> tuple[int, int]:
        """Bytes that its writable layer holds, and that with its image's layers; Docker's SizeRw and SizeRootFs."""
        return apparent.container_sizes(self._store, self)

    def inspect(self, *, size: bool = False) -> dict[str, Any]:
        """What there is to know about it, under the names that Docker gives it. size: with SizeRw and SizeRootFs."""
        sizes = dict(zip(("SizeRw", "SizeRootFs"), self.sizes(), strict=True)) if size else {}
        config = self.config
        command = [*(config.entrypoint or ()), *(config.cmd or ())]
        asked = mountpoints.of(self._store.records, self.id, order="rowid")
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
            **sizes,
            "HostConfig": {
                "Mounts": mountpoints.host_facts(asked),
                "Binds": [point.spec.text for point in asked if point.spec.text and not point.is_tmpfs] or None,
                "Tmpfs": mountpoints.tmpfs_facts(self.mounts),
                "ReadonlyRootfs": self.is_read_only,
                "StorageOpt": self.record.settings.get("StorageOpt"),
                "VolumesFrom": self.record.settings.get("VolumesFrom"),
            },
            "Mounts": [p.facts(self._store.volume_store) for p in self.mounts if not (p.is_tmpfs and p.spec.text)],
            "Config": config_facts(
                config,
                Hostname=self.record.settings.get("Hostname", self.id[:12]),
                Image=self.record.image_name,
                Labels=dict(config.labels or {}),
            ),
        }
