"""Collecting what nobody needs: mark from images, containers and leases, sweep blobs and snapshots.

Needed is what an entry of index.json leads to, what a container's image leads to, what is below an active snapshot or a
view or has a name in a container, and what a live lease names. All that is decided while no lease can grow
(leases.exclusion), so that whoever wants a blob either has said so before, or looks for it after it is gone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from overlaykit.errors import IntegrityError, InvalidImage, NotFound
from overlaykit.oci import Descriptor, Digest, Layout, chain_ids
from overlaykit.oci.image import BlobImage, ImageIndex
from overlaykit.store import volumeleft
from overlaykit.store.disk import remove_tree
from overlaykit.store.leases import Lease, Leases, exclusion
from overlaykit.store.records import Records
from overlaykit.store.snapshots import COMMITTED, Snapshot, Snapshotter
from overlaykit.store.volumes import Volumes

logger = logging.getLogger(__name__)
NAMED = "SELECT key FROM snapshots WHERE id IN (SELECT snapshot FROM container_snapshots)"


@dataclass
class Freed:
    """What was removed: digests of blobs, names of committed snapshots, and bytes that came free on disk."""

    blobs: list[str] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)
    size: int = 0


class Collector:
    """Removes from one store what nobody needs."""

    def __init__(self, root: Path, layout: Layout, records: Records, snapshots: Snapshotter, volumes: Volumes) -> None:
        self._layout, self._records, self._snapshots, self._volumes = layout, records, snapshots, volumes
        self.leases = volumes.leases = Leases(root / "leases", self._clear_dead)

    def collect(self) -> Freed:
        """Remove every blob and layer that nobody needs, and what dead operations left.

        A directory that neither a snapshot nor a lease explains is fsck's, which moves it to lost+found, unless there is no
        file in it.
        """
        self._layout.clear_stale_ingests()
        things = {*self._layout.digests(), *(snapshot.key for snapshot in self._snapshots.walk(COMMITTED))}
        with self.leases.hold() as lease:
            freed = self._sweep(things, lease)
        self.leases.recover()
        with self.leases.hold() as lease:
            freed.size += sum(map(remove_tree, self._shells(lease)))
        return freed

    def _shells(self, own: Lease) -> list[Path]:
        """Directories without any file that no snapshot has: a container was being created when the power failed."""
        found = list(self._snapshots.folder.iterdir())
        with exclusion(self.leases.folder):
            held = self.leases.held(besides=own)
        known = {snapshot.id for snapshot in self._snapshots.walk()}  # asked last: a lease lasts until there is a row
        loose = [path for path in found if path.name not in known and f"snapshots/{path.name}" not in held]
        return [path for path in loose if not any(names for *_, names in os.walk(path))]

    def clear(self, lease: Lease) -> Freed:
        """Remove what `lease` names and nobody else needs."""
        left = volumeleft.clear(self._volumes, lease)
        things = {thing for thing in lease.things() if not volumeleft.is_of_volumes(thing)}
        freed = self._sweep(things, lease) if things else Freed()
        lease.keep(left)
        return freed

    def _clear_dead(self, lease: Lease) -> None:
        """The same of an operation that failed or was killed, perhaps while it changed the records."""
        self._records.settle()
        self.clear(lease)

    def drop(self, own: Lease, *, spare: Set[str] = frozenset()) -> int:
        """Remove what `own` names and nobody else needs: bytes that came free on disk. spare: what surely is needed.

        Directories without a snapshot go even if an image is damaged, so that it is not known who needs the rest: that is
        then left to the next who opens the store, as is what somebody is just using.
        """
        things = own.things() - spare
        if any(not thing.startswith("snapshots/") for thing in things):
            try:
                return self.clear(own).size
            except IntegrityError as e:
                logger.warning("%s", e)
        with exclusion(self.leases.folder):
            used = things & self.leases.held(besides=own)
        things -= {f"snapshots/{snapshot.id}" for snapshot in self._snapshots.walk()}
        directories = {thing for thing in things - used if thing.startswith("snapshots/")}
        freed = sum(self._snapshots.remove_directory(thing.removeprefix("snapshots/")) for thing in directories)
        own.postpone(things - directories)
        return freed

    def _sweep(self, things: set[str], own: Lease) -> Freed:
        freed = Freed()
        with exclusion(self.leases.folder):
            held = self.leases.held(besides=own)
            blobs, names = self.needed()
            unneeded = {snapshot.key: snapshot for snapshot in self._unneeded(things - names)}
            doomed = [snapshot for name, snapshot in unneeded.items() if name not in self._with_parents(held)]
            loose = {thing for thing in things - blobs if ":" in thing and self._layout.has(thing)}
            if doomed:
                own.note(*(f"snapshots/{snapshot.id}" for snapshot in doomed))
                own.sync()
            with self._records.transaction():
                for snapshot in reversed(doomed):  # children are younger than their parents
                    self._snapshots.forget(snapshot.id)
            freed.snapshots = [snapshot.key for snapshot in doomed]
            for digest in sorted(loose - held):
                freed.size += self._layout.remove(digest)
                freed.blobs.append(digest)
            directories = {f"snapshots/{snapshot.id}" for snapshot in doomed}
            directories |= {thing for thing in things if thing.startswith("snapshots/")}
            for snapshot in self._snapshots.walk():
                directories -= {f"snapshots/{snapshot.id}", f"snapshots/{snapshot.id}/{_part(snapshot)}"}
            used, directories = directories & held, directories - held
        for directory in sorted(directories):
            freed.size += self._snapshots.remove_directory(directory.removeprefix("snapshots/"))
        # What somebody is just using is left to the next who opens the store.
        own.postpone((loose & held) | used | (unneeded.keys() - set(freed.snapshots)))
        return freed

    def _unneeded(self, names: set[str]) -> list[Snapshot]:
        """The committed snapshots among `names`, the oldest first, without those that others build on."""
        snapshots = list(self._snapshots.walk())
        doomed = {s.key for s in snapshots if s.kind == COMMITTED and s.key in names}
        while kept := doomed & {s.parent for s in snapshots if s.key not in doomed and s.parent is not None}:
            doomed -= kept
        return [s for s in snapshots if s.key in doomed]

    # --- marking ------------------------------------------------------------------------------------------------------

    def needed(self) -> tuple[set[str], set[str]]:
        """The digests of blobs and the names of committed snapshots that images and containers need.

        IntegrityError if a document is damaged: what it leads to cannot be known then, and nothing may be removed.
        """
        blobs: set[str] = set()
        names: set[str] = set()
        for descriptor in self._roots():
            self._mark(descriptor, blobs, names)
        keys = {s.key for s in self._snapshots.walk() if s.kind != COMMITTED}
        keys |= {row["key"] for row in self._records.rows(NAMED)}
        return blobs, names | self._with_parents(keys)

    def _with_parents(self, keys: set[str]) -> set[str]:
        """Those of `keys` that snapshots have, and the keys of all that is below them."""
        parents = {snapshot.key: snapshot.parent for snapshot in self._snapshots.walk()}
        found: set[str] = set()
        for key in keys & parents.keys():
            above: str | None = key
            while above is not None and above not in found:
                found.add(above)
                above = parents[above]
        return found

    def _roots(self) -> list[Descriptor]:
        roots = list(self._layout.descriptors())
        listed = {d.digest for d in roots}
        for row in self._records.rows("SELECT DISTINCT image FROM containers"):
            digest = Digest(row["image"])
            if digest not in listed and self._layout.has(digest):
                roots.append(Descriptor(media_type="", digest=digest, size=self._layout.size(digest)))
        return roots

    def _mark(self, descriptor: Descriptor, blobs: set[str], names: set[str]) -> None:
        blobs.add(descriptor.digest)
        try:
            if descriptor.is_index:
                for inner in ImageIndex(self._layout, descriptor).index.manifests:
                    self._mark(inner, blobs, names)
                return
            image = BlobImage(self._layout, descriptor)
            blobs |= {image.manifest.config.digest, *(layer.digest for layer in image.manifest.layers)}
            names |= set(chain_ids(image.config.diff_ids))
        except (NotFound, InvalidImage):
            pass  # not there, or whole but no image: it leads nowhere else
        except IntegrityError as e:
            raise IntegrityError(
                f"nothing was removed, since it cannot be known what else is needed: {e}",
                hint="load or pull the image again, which puts the damaged file right",
            ) from e


def _part(snapshot: Snapshot) -> str:
    """The directory in a snapshot's own that it needs as long as it is what it is; freezing it makes one and takes one."""
    return "tree" if snapshot.kind == COMMITTED else "work"
