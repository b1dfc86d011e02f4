"""Store: everything under one root folder. Images, the layers they share, containers; any number of processes at once.

The root is an OCI image layout that other tools can read as it stands; beside what the layout asks for it has

    snapshots/ID/     unpacked layers and writable layers       (snapshots.py)
    store.db          which snapshots and containers there are  (records.py)
    volumes/NAME/     what outlasts containers                  (volumes.py)
    leases/           what running operations hold              (leases.py)

Every change is prepared aside, put on disk, and then made by one rename or one transaction: who is killed in between leaves
the state before, and a few files that the next one to open the store removes.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from overlaykit.errors import AlreadyExists, InvalidReference, NotFound, OverlaykitError, Unsupported
from overlaykit.oci import Layout
from overlaykit.overlay import Overlay, View
from overlaykit.overlay.mounted import Mounted
from overlaykit.store import apparent, comparing, containerrecords, images, mountpoints, pruning, quota, rewriting, sizes
from overlaykit.store.collect import Collector, Freed
from overlaykit.store.containerrecords import Record
from overlaykit.store.containers import Container
from overlaykit.store.copying import Copied, copy
from overlaykit.store.disk import keeps_xattr
from overlaykit.store.fsck import Finding, fsck
from overlaykit.store.images import StoredImage
from overlaykit.store.instructions import overridden
from overlaykit.store.limits import Limits, limits_of
from overlaykit.store.loading import Progress
from overlaykit.store.mountspec import MountSpec
from overlaykit.store.names import check_container_name, free_name, whole_name
from overlaykit.store.pruning import Pruned
from overlaykit.store.records import Records
from overlaykit.store.removing import Removed, being_created_from, is_listed, remove_image
from overlaykit.store.reseeding import Reseeded, reseed
from overlaykit.store.roots import default_root
from overlaykit.store.sizes import StoreUsage
from overlaykit.store.snapshots import Snapshotter
from overlaykit.store.storeimages import StoreImages
from overlaykit.store.storevolumes import StoreVolumes
from overlaykit.store.unpacking import unpack
from overlaykit.store.volume import Volume
from overlaykit.store.volumes import Volumes
from overlaykit.tree import Change, WhiteoutFormat
from overlaykit.tree.table import StrPath

logger = logging.getLogger(__name__)

# What a root may hold already when a store is made in it: an OCI layout, and what a killed process left of a store.
OURS = {"oci-layout", "index.json", "blobs", "ingest", "lock", "snapshots", "volumes", "leases", "lost+found"}
OURS |= {"reserve", "store.db", "store.db-wal", "store.db-shm", "store.db-journal"}


class Store(StoreImages, StoreVolumes):
    """The store in one root folder; a context manager. Any number of threads, objects and processes may use one root."""

    def __init__(self, root: StrPath | None = None) -> None:
        """The store in `root` (see `default_root`), made there if there is none."""
        self.root = Path(os.path.realpath(default_root() if root is None else root))
        _refuse_foreign(self.root)
        self.layout = Layout.create(self.root)
        for part in ("snapshots", "leases", "ingest", "volumes"):
            (self.root / part).mkdir(mode=0o700, exist_ok=True)
        self.records = Records(self.root / "store.db")
        self.volume_store = Volumes(self.root / "volumes", self.records)
        self._overlays: dict[str, Overlay | Mounted] = {}
        self._lock = threading.RLock()
        try:
            self.snapshots = Snapshotter(self.root / "snapshots", self.records, self._whiteouts())
            self.snapshots.limits_of = partial(limits_of, self.records)
            self._collector = Collector(self.root, self.layout, self.records, self.snapshots, self.volume_store)
            self.leases, self.drop, self.clear = self._collector.leases, self._collector.drop, self._collector.clear
            self.leases.recover()
            self.layout.clear_stale_ingests()
        except BaseException:
            self.records.close()
            raise

    def _whiteouts(self) -> WhiteoutFormat:
        """How layers on disk say that a name is gone: decided when the store is made, by what its maker may write."""
        row = self.records.row("SELECT value FROM meta WHERE name = 'whiteouts'")
        if row is None:
            for form in (WhiteoutFormat.OVERLAY, WhiteoutFormat.USERXATTR):
                if keeps_xattr(self.root / "snapshots", f"{form.xattr_prefix}opaque"):
                    break
            else:
                raise Unsupported(f"{self.root} is on a file system without extended attributes", hint="use another root")
            self.records.execute("INSERT OR IGNORE INTO meta VALUES ('whiteouts', ?)", form.value)
            return self._whiteouts()
        return WhiteoutFormat(row["value"])

    def close(self) -> None:
        """Close every container's files and the records. Closing twice is no error."""
        for id in list(self._overlays):
            self.close_overlay(id)
        self.records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Store {self.root}>"

    # --- images -------------------------------------------------------------------------------------------------------

    def remove_image(self, image: StoredImage | str, *, force: bool = False) -> Removed:
        """Take the name `image` away; with its last one, or by id, the image too, and all that nothing else needs.

        InUse if containers need it, or if an id has several names; force: take all names away all the same.
        """
        found = self.image(image) if isinstance(image, str) else image
        name = whole_name(image) if isinstance(image, str) and _is_name(image) else None
        return remove_image(self, found, name if name in found.names else None, several=force, used=force)

    def gc(self) -> Freed:
        """Remove blobs and layers that no image, container or running operation needs, and what dead operations left."""
        return self._collector.collect()

    def prune(self, *, all: bool = False, containers: bool = False) -> Pruned:
        """Remove images that have no name and that no container needs, and what nothing needs.

        all: images with names too. containers: first every container that is neither mounted nor open.
        """
        return pruning.prune(self, all=all, containers=containers)

    def image_size(self, image: StoredImage | str) -> int | None:
        """Bytes that the image's layers hold, uncompressed, as Docker counts them; None if one is damaged. NotFound."""
        return apparent.image_size(self, self.image(image) if isinstance(image, str) else image)

    def usage(self) -> StoreUsage:
        """What everything in the store takes on disk; the parts add up."""
        return sizes.usage(self)

    def fsck(self, *, repair: bool = False, deep: bool = False) -> list[Finding]:
        """What is wrong in the store; [] for a sound one. repair: what has another copy is put right.

        deep: what is unpacked is held against the blobs too, each file's content and all attributes.
        """
        return fsck(self, repair=repair, deep=deep)

    def squash(
        self,
        image: StoredImage | str,
        start: int,
        stop: int,
        name: str | None = None,
        *,
        message: str | None = None,
        compression: str = "gzip",
    ) -> StoredImage:
        """A new image: `image` with its layers start..stop (0 is the bottom, `stop` not included) as one.

        What is below stays as it is, and so stays shared with other images. message: what the history says of the new
        layer. NotFound; InvalidImage for a range that is none.
        """
        found = self.image(image) if isinstance(image, str) else image
        return rewriting.squash(self, found, start, stop, name, message=message, compression=compression)

    def rebase(
        self, image: StoredImage | str, old_base: StoredImage | str, new_base: StoredImage | str, name: str | None = None
    ) -> StoredImage:
        """A new image: the layers that `image` has above `old_base`, and its config, on `new_base`. No layer is copied.

        NotFound; InvalidImage if `image` is not built on `old_base`, or the bases are for different platforms.
        """
        found, old, new = (self.image(i) if isinstance(i, str) else i for i in (image, old_base, new_base))
        return rewriting.put_on(self, found, old, new, name)

    def compare(self, lower: str, upper: str | None = None, *, content: bool = False) -> list[Change]:
        """What changed from `lower` to `upper`, with reasons and sizes, as `overlaykit.compare` says it.

        Each names a container, an image, IMAGE#N (the image up to its layer N, 0 at the bottom), a layer by its digest or
        diff_id, a directory, or the file of an image or a layer. One alone is IMAGE#N or IMAGE#N..M: what these layers
        change of what is below them. content: read all files of one size. NotFound, InvalidReference.
        """
        return comparing.compare(self, lower, upper, content=content)

    # --- containers ---------------------------------------------------------------------------------------------------

    def containers(self) -> list[Container]:
        """Every container, the newest first."""
        return [Container(self, record) for record in containerrecords.everything(self.records)]

    def container(self, name: str) -> Container:
        """The container of that name or id, or of an id that begins so. NotFound."""
        return Container(self, containerrecords.find(self.records, name))

    def create(
        self,
        image: StoredImage | str,
        *,
        name: str | None = None,
        mounts: Iterable[MountSpec | str] = (),
        volumes_from: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        env: Mapping[str, str | None] | None = None,
        command: Sequence[str] = (),
        entrypoint: Sequence[str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        hostname: str | None = None,
        read_only: bool = False,
        storage_opt: Mapping[str, str] | None = None,
    ) -> Container:
        """A new container of `image`: an empty writable layer on top of its layers, which are unpacked if they are not.

        mounts: as `-v` has them, or MountSpecs; a volume that is not there is made, and an empty one filled with the
        image's files at its place. volumes_from: containers whose mounts this one gets too, "NAME" or "NAME:ro".
        storage_opt: limits on its writable layer, "size" and "entries": see store/quota.py. env: variables, None for one of
        the image's that is to be unset. The rest changes the image's config. NotFound; AlreadyExists for a name that is
        taken; InvalidReference.
        """
        if name is not None and containerrecords.is_taken(self.records, check_container_name(name)):
            raise AlreadyExists(f"there is a container {name}", hint=f"overlaykit rm {name}, or choose another name")
        found = self.image(image) if isinstance(image, str) else image
        called = image if isinstance(image, str) else str(found)
        id = secrets.token_hex(32)
        config = overridden(found.runtime, labels, env, command, entrypoint, workdir, user)
        others = list(volumes_from)
        given = {"Hostname": hostname, "ReadonlyRootfs": read_only, "VolumesFrom": others, "StorageOpt": storage_opt}
        limits = Limits.parse(storage_opt or {})
        settings = {key: value for key, value in given.items() if value}
        planned = mountpoints.plan(self, mounts, others, config.volumes or ())
        with self.operation() as layout, ExitStack() as stack:
            layout.lease.add(being_created_from(found))
            if isinstance(image, str) and not is_listed(self, found):
                raise NotFound(f"no image {image}: it has just been removed")
            parent = unpack(found, layout, self.snapshots, self.leases)
            prepared = self.snapshots.prepare_directory(parent, layout.lease)
            view = stack.enter_context(self._view(parent)) if planned and parent is not None else None
            points = stack.enter_context(mountpoints.prepared(self.volume_store, planned, view)) if planned else []
            with self.records.transaction():
                chosen = name or free_name(self.records)
                record = Record(id, chosen, found.digest, called, time.time_ns(), config, settings)
                try:
                    containerrecords.insert(self.records, record)
                except sqlite3.IntegrityError:
                    raise AlreadyExists(f"there is a container {chosen}") from None
                self.snapshots.record(prepared, id, parent)
                mountpoints.insert(self.records, id, points)
        if limits is not None and not quota.is_enforced(self.snapshots.directory(id)):
            logger.warning("container %s: no project quota here: mounts and programs may go past its limits", chosen)
        return Container(self, record)

    def _view(self, key: str) -> View:
        lowers, trees = self.snapshots.lowers(key), self.snapshots.trees(key)
        return View(lowers, trees=trees, userxattr=self.snapshots.whiteouts is WhiteoutFormat.USERXATTR)

    def overlay(self, id: str, open: Callable[[], Overlay | Mounted]) -> Overlay | Mounted:
        """The one Overlay that this store has of container `id`, opened by `open` if it has none."""
        with self._lock:
            overlay = self._overlays.get(id)
            if overlay is None or overlay.closed:
                overlay = self._overlays[id] = open()
            return overlay

    def is_open(self, id: str) -> bool:
        """Whether `overlay` is open for container `id`."""
        with self._lock:
            overlay = self._overlays.get(id)
            return overlay is not None and not overlay.closed

    def close_overlay(self, id: str) -> None:
        with self._lock:
            overlay = self._overlays.pop(id, None)
            if overlay is not None:
                overlay.close()

    # --- copying ------------------------------------------------------------------------------------------------------

    def cp(
        self,
        source: StrPath | BinaryIO,
        target: StrPath | BinaryIO,
        *,
        follow: bool = False,
        owner: str | None = None,
        exclude: Iterable[str] = (),
        progress: Progress | None = None,
    ) -> Copied:
        """Copy files as `docker cp` does: between host, containers, volumes and images, and tar streams.

        source, target: "CONTAINER:PATH", "volume:NAME:/PATH", "image:NAME:/PATH", a path on the host, or an open binary
        file with a tar. A source may be a pattern. follow: of a symlink, copy what it leads to. owner: source, container,
        keep, caller or "UID:GID" (see putting.Owners); None is Docker's: source in a container, caller on the host.
        exclude: patterns of names not to copy. NotFound, InUse, OSError with the place; nothing is half there after one.
        """
        return copy(self, [source], target, follow=follow, owner=owner, exclude=exclude, progress=progress)

    # --- volumes ------------------------------------------------------------------------------------------------------

    def reseed_volume(
        self, volume: Volume | str, image: StoredImage | str, path: str | None = None, *, dry_run: bool = False
    ) -> Reseeded:
        """Give a volume that was filled from an image what `image` has there now, and let what its user changed stay.

        path: in the image, where the volume's files came from if nothing is said. dry_run: only say what would be done.
        NotFound, InUse.
        """
        found = self.volume(volume) if isinstance(volume, str) else volume
        with self.operation() as layout:
            top = unpack(self.image(image) if isinstance(image, str) else image, layout, self.snapshots, self.leases)
            if top is None:
                raise NotFound(f"image {image} has no files")
            with self._view(top) as view:
                return reseed(self.volume_store, found, view, path, dry_run=dry_run)

    # --- facts --------------------------------------------------------------------------------------------------------

    def inspect(self, name: str, *, size: bool = False) -> dict[str, Any]:
        """What there is to know of a container, else an image, else a volume, under the names that Docker gives it.

        size: of a container too. NotFound.
        """
        with suppress(NotFound):
            return self.container(name).inspect(size=size)
        with suppress(NotFound, InvalidReference):
            return self.inspect_image(name)
        with suppress(NotFound):
            return self.volume(name).inspect()
        raise NotFound(f"no container, image or volume {name}")

    def inspect_image(self, name: str) -> dict[str, Any]:
        """The same of an image."""
        image = self.image(name)
        top = image.chain_ids[-1] if image.diff_ids else None
        data = self.snapshots.driver_data(top) if top and self.snapshots.has(top) else None
        return images.inspect(image, data, self.image_size(image))


def _refuse_foreign(root: Path) -> None:
    """Unsupported for a directory that holds anything but a store or an OCI layout."""
    if root.is_dir() and not (root / "store.db").exists() and (foreign := sorted(set(os.listdir(root)) - OURS)):
        raise Unsupported(f"{root} is no store and not empty: it has {foreign[0]}", hint="choose an empty directory")


def _is_name(text: str) -> bool:
    try:
        whole_name(text)
    except OverlaykitError:
        return False
    return True
