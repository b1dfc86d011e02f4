"""The mounts of containers: planned and filled when a container is created, recorded with it, shown by `inspect`."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from overlaykit.errors import InvalidReference, NotFound
from overlaykit.overlay import View
from overlaykit.overlay.mount import MS_BIND, MS_RDONLY, MS_REMOUNT, PROPAGATION, bind_mount, mount, mount_old
from overlaykit.overlay.mounted import Bound, inside
from overlaykit.store.filling import fill
from overlaykit.store.mountspec import BIND, VOLUME, MountSpec, parse_volume
from overlaykit.store.records import Records
from overlaykit.store.volumes import Volume, Volumes

if TYPE_CHECKING:
    from overlaykit.store.store import Store


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One mount of a container. volume: the name of the one that is mounted, None for a bind mount."""

    spec: MountSpec
    volume: str | None

    @property
    def is_anonymous(self) -> bool:
        return self.volume is not None and not self.spec.source

    def source(self, volumes: Volumes) -> Path:
        """The directory or file of the host, made if the mount asks for that. NotFound, OSError."""
        if self.volume is None:
            source = Path(self.spec.source)
            if self.spec.create and not source.exists():
                source.mkdir(mode=0o755, parents=True, exist_ok=True)
            return source
        data = volumes.get(self.volume).mountpoint
        if not self.spec.subpath:
            return data
        with inside(data, self.spec.subpath) as there:
            return Path(os.readlink(there))

    def bound(self, volumes: Volumes, *, read_only: bool = False) -> Bound:
        return Bound(self.spec.target, self.source(volumes), read_only=read_only or self.spec.read_only)

    def facts(self, volumes: Volumes) -> dict[str, Any]:
        """As `docker inspect` lists it under Mounts."""
        spec = self.spec
        facts: dict[str, Any] = {"Type": spec.type}
        if self.volume is not None:
            volume = volumes.get(self.volume)
            facts |= {
                "Name": volume.name,
                "Source": str(volume.mountpoint),
                "Destination": spec.target,
                "Driver": volume.driver,
            }
        else:
            facts |= {"Source": spec.source, "Destination": spec.target}
        propagation = spec.propagation or ("rprivate" if spec.type == BIND else "")
        mode = spec.mode or ("z" if self.volume is not None and spec.source else "")  # Docker's, with SELinux or without
        return facts | {"Mode": mode, "RW": not spec.read_only, "Propagation": propagation}


# --- planning ---------------------------------------------------------------------------------------------------------


def plan(
    store: Store, mounts: Iterable[MountSpec | str], volumes_from: Iterable[str], image_volumes: Iterable[str]
) -> list[MountPoint | MountSpec]:
    """What a new container is to have: points of other containers as they are, and specs, one for each target.

    What is asked for comes before what other containers have, and that before what the image declares.
    """
    planned: dict[str, MountPoint | MountSpec] = {}
    for text in volumes_from:
        for point in _points_of(store, text):
            planned[point.spec.target] = point
    asked: set[str] = set()
    for given in mounts:
        spec = parse_volume(given) if isinstance(given, str) else given.checked(given.target)
        if spec.target in asked:
            raise InvalidReference(f"two mounts at {spec.target}")
        asked.add(spec.target)
        if spec.type == BIND and not spec.create and not os.path.exists(spec.source):
            raise NotFound(f"the source of a bind does not exist: {spec.source}", hint="mkdir it, or use -v, which does")
        planned[spec.target] = spec
    for path in image_volumes:
        spec = MountSpec(target=path).checked(f"VOLUME {path}")
        planned.setdefault(spec.target, spec)
    return list(planned.values())


def _points_of(store: Store, text: str) -> list[MountPoint]:
    name, colon, mode = text.partition(":")
    if colon and mode not in ("ro", "rw"):
        raise InvalidReference(f"--volumes-from {text}: {mode!r} is not ro or rw")
    points = store.container(name).mounts
    return [replace(p, spec=replace(p.spec, read_only=True)) if mode == "ro" else p for p in points]


@contextmanager
def prepared(volumes: Volumes, planned: Iterable[MountPoint | MountSpec], view: View | None) -> Iterator[list[MountPoint]]:
    """The points, whose volumes are there and filled from `view`. An error removes those that were made for them."""
    made: list[Volume] = []
    points: list[MountPoint] = []
    try:
        for item in planned:
            if isinstance(item, MountPoint):
                points.append(item)
            elif item.type == VOLUME:
                volume, new = volumes.create(
                    item.source or None, driver=item.driver, labels=item.labels, options=item.options
                )
                made += [volume] * new
                if view is not None and item.copy and not item.subpath:
                    fill(volume.directory, volume.mountpoint, view, item.target)
                points.append(MountPoint(item, volume.name))
            else:
                points.append(MountPoint(item, None))
        yield points
    except BaseException:
        for volume in made:
            volume.remove()
        raise


# --- records ----------------------------------------------------------------------------------------------------------


def insert(records: Records, container: str, points: Iterable[MountPoint]) -> None:
    """Record the mounts of a container. NotFound if a volume was removed meanwhile."""
    for point in points:
        spec = msgspec.json.encode(point.spec).decode()
        try:
            records.execute("INSERT INTO mounts VALUES (?, ?, ?, ?)", container, point.spec.target, point.volume, spec)
        except sqlite3.IntegrityError:
            raise NotFound(f"volume {point.volume} has just been removed", hint="try again") from None


def of(records: Records, container: str) -> list[MountPoint]:
    """The mounts of a container, by where they are."""
    rows = records.rows("SELECT * FROM mounts WHERE container = ? ORDER BY destination", container)
    return [MountPoint(msgspec.json.decode(row["spec"], type=MountSpec), row["volume"]) for row in rows]


# --- mounting ---------------------------------------------------------------------------------------------------------


def mount_points(place: Path, bounds: Iterable[tuple[str, Bound, str]]) -> None:
    """Mount each of (clean path, what, propagation) in the tree that is mounted at `place`."""
    for path, bound, propagation in bounds:
        with inside(place, path) as target:
            mount(bind_mount(bound.source, target))
        with inside(place, path) as target:  # the first descriptor is of what is hidden now
            mount_old("none", target, None, PROPAGATION[propagation or "rprivate"], "")
            if bound.read_only:
                mount_old("none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY, "")
