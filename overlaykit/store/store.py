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

import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from overlaykit.errors import AlreadyExists, InUse, NotFound, OverlaykitError, Unsupported
from overlaykit.oci import (
    Archive,
    Compression,
    Descriptor,
    Digest,
    History,
    Image,
    Layout,
    Platform,
    RuntimeConfig,
    new_image,
)
from overlaykit.overlay import Overlay, View
from overlaykit.overlay.mounted import Mounted
from overlaykit.store import containers, images, mountpoints, pruning, sizes
from overlaykit.store.collect import Collector, Freed
from overlaykit.store.containers import Container, Record
from overlaykit.store.copying import Copied, copy
from overlaykit.store.disk import keeps_xattr
from overlaykit.store.fsck import Finding, fsck
from overlaykit.store.images import StoredImage
from overlaykit.store.instructions import apply_changes, overridden
from overlaykit.store.loading import Counter, Progress, about, add_documents, ingest_image, ingest_rootfs
from overlaykit.store.mountspec import MountSpec
from overlaykit.store.names import check_container_name, familiar, give_name, name_of, random_name, whole_name
from overlaykit.store.packing import LeasedLayout, now, report
from overlaykit.store.pruning import Pruned
from overlaykit.store.records import Records
from overlaykit.store.sizes import StoreUsage
from overlaykit.store.snapshots import Snapshotter
from overlaykit.store.unpacking import blobs_and_layers, unpack
from overlaykit.store.volumes import Volume, Volumes
from overlaykit.tree import Losses, WhiteoutFormat
from overlaykit.tree.table import StrPath

# What a root may hold already when a store is made in it: an OCI layout, and what a killed process left of a store.
OURS = {"oci-layout", "index.json", "blobs", "ingest", "lock", "snapshots", "volumes", "leases", "lost+found"}
OURS |= {"reserve", "store.db", "store.db-wal", "store.db-shm", "store.db-journal"}


def default_root() -> Path:
    """$OVERLAYKIT_ROOT, else /var/lib/overlaykit for root and $XDG_DATA_HOME/overlaykit for everyone else."""
    if named := os.environ.get("OVERLAYKIT_ROOT"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/overlaykit")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "overlaykit"


@dataclass
class Removed:
    """What became of an image that was to be removed: names it lost, whether it is gone, and what came free."""

    untagged: list[str]
    image: str | None = None
    freed: Freed = field(default_factory=Freed)


class Store:
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
            self._collector = Collector(self.root, self.layout, self.records, self.snapshots)
            self.leases, self.drop = self._collector.leases, self._collector.drop
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

    @contextmanager
    def operation(self) -> Iterator[LeasedLayout]:
        """The layout for one operation, with its lease: what the operation made goes if it fails."""
        with self.leases.hold() as lease:
            yield LeasedLayout(self.root, lease)

    # --- images -------------------------------------------------------------------------------------------------------

    def images(self) -> list[StoredImage]:
        """Every image, the newest first."""
        return images.listed(self.layout)

    def image(self, name: str) -> StoredImage:
        """The image called NAME[:TAG] or NAME@DIGEST, or that of a digest, an id or the beginning of an id. NotFound."""
        return images.find(self.layout, name)

    def load(
        self, path: StrPath, *, platform: Platform | str | None = None, progress: Progress | None = None
    ) -> list[StoredImage]:
        """The images in a docker-archive, OCI archive or OCI layout directory, which are in the store from now on.

        platform: of an index, the image for that one ("linux/arm64"), not for this machine. All of them, or with an error
        none: InvalidImage, InvalidLayer, IntegrityError.
        """
        wanted = Platform.parse(platform) if isinstance(platform, str) else platform
        with about(path), self.operation() as layout, Archive(path, platform=wanted) as archive:
            found = [([whole_name(name) for name in names], image) for names, image in archive.images]
            known = {pair for image in self.images() for pair in _layer_ids(image)}
            counter = Counter(progress, "load", sum(layer.size for _, image in found for layer in image.layers))
            kept = [(names, ingest_image(layout, image, known, counter)) for names, image in found]
            for names, descriptor in kept:
                if not names:
                    give_name(self.layout, descriptor, None)
                for name in names:
                    give_name(self.layout, descriptor, name)
        return [StoredImage(self.layout, descriptor, names) for names, descriptor in kept]

    def import_rootfs(
        self,
        source: StrPath | BinaryIO,
        name: str | None = None,
        *,
        changes: Iterable[str] = (),
        message: str | None = None,
        platform: Platform | str | None = None,
        compression: str = "gzip",
        progress: Progress | None = None,
    ) -> StoredImage:
        """A new base image of a root filesystem: a directory, or a tar (also an open file) that may be compressed.

        changes: of the empty config, in a Dockerfile's words. compression: of a tar that is not compressed yet, or of a
        directory: gzip, zstd or none, with a level as in "zstd-19".
        """
        whole = None if name is None else whole_name(name)
        config = apply_changes(RuntimeConfig(), changes)
        how = Compression.parse(compression)
        where = Platform.parse(platform) if isinstance(platform, str) else platform
        shown = source if isinstance(source, str | os.PathLike) else "-"
        losses: Losses = []
        with about(shown), self.operation() as layout:
            layer = ingest_rootfs(layout, source, how, losses, progress)
            history = History(created=now(), comment=message or f"Imported from {os.path.basename(str(shown))}")
            image = new_image([layer], platform=where, config=config, history=[history], created=history.created)
            stored = self.keep(layout, image, whole)
        report(f"import {shown}", losses)
        return stored

    def tag(self, image: StoredImage | str, name: str) -> StoredImage:
        """The image, with `name` as one more name, which no other image has then. NotFound."""
        whole = whole_name(name)
        found = self.image(image) if isinstance(image, str) else image
        try:
            give_name(self.layout, found.descriptor, whole, known_as=[found.digest])
        except KeyError:
            raise NotFound(f"no image {found}: it has just been removed") from None
        return self.image(found.digest)

    def remove_image(self, image: StoredImage | str, *, force: bool = False) -> Removed:
        """Take the name `image` away; with its last one, or by id, the image too, and all that nothing else needs.

        InUse if containers need it, or if an id has several names; force: take all names away all the same.
        """
        found = self.image(image) if isinstance(image, str) else image
        names = [n for n in found.names if isinstance(image, str) and _is_name(image) and n == whole_name(image)]
        if not names and len(found.names) > 1 and not force:
            raise InUse(f"image {found.id.short} has {len(found.names)} names: {', '.join(found.tags)}", hint="rmi -f")
        names = names or list(found.names)
        goes = set(names) == set(found.names)
        users = [r["name"] for r in self.records.rows("SELECT name FROM containers WHERE image = ?", str(found.digest))]
        if goes and users and not force:
            hint = f"overlaykit rm {users[0]} first; rmi -f takes only the name"
            raise InUse(f"image {found} is needed by container {', '.join(users[:3])}", hint=hint)

        def without(entries: tuple[Descriptor, ...]) -> list[Descriptor]:
            return [d for d in entries if name_of(d) not in names and not (goes and d.digest == found.digest)]

        removed = Removed([familiar(name) for name in names])
        with self.leases.hold() as lease:
            if goes:
                lease.add(*blobs_and_layers(found))  # who is killed below leaves it to the next to finish
            self.layout.edit(without)
            if goes:
                removed.freed = self._collector.clear(lease)
                removed.image = None if users else found.id
        return removed

    def gc(self) -> Freed:
        """Remove blobs, layers and directories that no image, container or running operation needs."""
        return self._collector.collect()

    def prune(self, *, all: bool = False, containers: bool = False) -> Pruned:
        """Remove images that have no name and that no container needs, and what nothing needs.

        all: images with names too. containers: first every container that is neither mounted nor open.
        """
        return pruning.prune(self, all=all, containers=containers)

    def usage(self) -> StoreUsage:
        """What everything in the store takes on disk; the parts add up."""
        return sizes.usage(self)

    def fsck(self, *, repair: bool = False) -> list[Finding]:
        """What is wrong in the store; [] for a sound one. repair: what has another copy is put right."""
        return fsck(self, repair=repair)

    def unpack(self, image: StoredImage) -> str | None:
        """The chain_id of the image, whose layers are all unpacked now, each once in the store. None if it has none."""
        with self.operation() as layout:
            return unpack(image, layout, self.snapshots, self.leases)

    def keep(self, layout: LeasedLayout, image: Image, name: str | None) -> StoredImage:
        """A new image whose layers are in `layout`: its documents kept too, then its whole name, if it has one."""
        descriptor = add_documents(layout, image)
        give_name(self.layout, descriptor, name)
        return StoredImage(self.layout, descriptor, [] if name is None else [name])

    # --- containers ---------------------------------------------------------------------------------------------------

    def containers(self) -> list[Container]:
        """Every container, the newest first."""
        return [Container(self, record) for record in containers.everything(self.records)]

    def container(self, name: str) -> Container:
        """The container of that name or id, or of an id that begins so. NotFound."""
        return Container(self, containers.find(self.records, name))

    def create(
        self,
        image: StoredImage | str,
        *,
        name: str | None = None,
        mounts: Iterable[MountSpec | str] = (),
        volumes_from: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = (),
        entrypoint: Sequence[str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        hostname: str | None = None,
        read_only: bool = False,
    ) -> Container:
        """A new container of `image`: an empty writable layer on top of its layers, which are unpacked if they are not.

        mounts: as `-v` has them, or MountSpecs; a volume that is not there is made, and an empty one filled with the
        image's files at its place. volumes_from: containers whose mounts this one gets too, "NAME" or "NAME:ro". The rest
        changes the image's config. NotFound; AlreadyExists for a name that is taken; InvalidReference.
        """
        if name is not None and self._has_container(check_container_name(name)):
            raise AlreadyExists(f"there is a container {name}", hint=f"overlaykit rm {name}, or choose another name")
        found = self.image(image) if isinstance(image, str) else image
        called = image if isinstance(image, str) else str(found)
        id = secrets.token_hex(32)
        config = overridden(found.runtime, labels, env, command, entrypoint, workdir, user)
        others = list(volumes_from)
        given = {"Hostname": hostname, "ReadonlyRootfs": read_only, "VolumesFrom": others}
        settings = {key: value for key, value in given.items() if value}
        planned = mountpoints.plan(self, mounts, others, config.volumes or ())
        with self.operation() as layout, ExitStack() as stack:
            parent = unpack(found, layout, self.snapshots, self.leases)
            prepared = self.snapshots.prepare_directory(parent, layout.lease)
            view = stack.enter_context(self._view(parent)) if planned and parent is not None else None
            points = stack.enter_context(mountpoints.prepared(self.volume_store, planned, view))
            with self.records.transaction():
                chosen = name or self.free_name()
                record = Record(id, chosen, found.digest, called, time.time_ns(), config, settings)
                try:
                    containers.insert(self.records, record)
                except sqlite3.IntegrityError:
                    raise AlreadyExists(f"there is a container {chosen}") from None
                self.snapshots.record(prepared, id, parent)
                mountpoints.insert(self.records, id, points)
        return Container(self, record)

    def _view(self, key: str) -> View:
        lowers, trees = self.snapshots.lowers(key), self.snapshots.trees(key)
        return View(lowers, trees=trees, userxattr=self.snapshots.whiteouts is WhiteoutFormat.USERXATTR)

    def _has_container(self, name: str) -> bool:
        return self.records.row("SELECT 1 FROM containers WHERE name = ?", name) is not None

    def free_name(self) -> str:
        """Two words that name no container yet."""
        name = random_name()
        while self._has_container(name):
            name = f"{random_name()}_{secrets.token_hex(2)}"
        return name

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

    def create_volume(self, name: str | None = None, *, labels: Mapping[str, str] | None = None) -> Volume:
        """The volume `name`, made if there is none; without a name a new anonymous one. InvalidReference."""
        return self.volume_store.create(name, labels=labels)[0]

    def volume(self, name: str) -> Volume:
        """The volume of that name. NotFound."""
        return self.volume_store.get(name)

    def volumes(self) -> list[Volume]:
        """Every volume, by name."""
        return self.volume_store.listed()

    def prune_volumes(self, *, all: bool = False, labels: Iterable[str] = ()) -> tuple[list[str], int]:
        """Remove anonymous volumes that no container has, `all`: named ones too. Their names, and bytes that came free."""
        return self.volume_store.prune(all=all, labels=labels)

    # --- facts --------------------------------------------------------------------------------------------------------

    def inspect(self, name: str) -> dict[str, Any]:
        """What there is to know of a container or else an image, under the names that Docker gives it. NotFound."""
        try:
            return self.container(name).inspect()
        except NotFound:
            pass
        try:
            return self.inspect_image(name)
        except OverlaykitError:
            raise NotFound(f"no container and no image {name}") from None

    def inspect_image(self, name: str) -> dict[str, Any]:
        """The same of an image."""
        image = self.image(name)
        top = image.chain_ids[-1] if image.diff_ids else None
        return images.inspect(image, self.snapshots.driver_data(top) if top and self.snapshots.has(top) else None)


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


def _layer_ids(image: Image) -> Iterator[tuple[Digest, Digest]]:
    return ((layer.digest, layer.diff_id) for layer in image.layers)
