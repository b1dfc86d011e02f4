"""The mounts of containers: planned and filled when a container is created, recorded with it, shown by `inspect`, and
found again on the host when its files are opened or mounted."""

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
from overlaykit.overlay.bound import Bound
from overlaykit.overlay.folder import inside
from overlaykit.overlay.mount import PROPAGATION, Mount, bind_mount, mount, mount_old, set_read_only
from overlaykit.store.cloning import ANONYMOUS
from overlaykit.store.drivers import DATA
from overlaykit.store.filling import Site
from overlaykit.store.mountspec import BIND, TMPFS, VOLUME, MountSpec, parse_volume
from overlaykit.store.quantities import parse_size
from overlaykit.store.records import Records
from overlaykit.store.reseeding import seeding
from overlaykit.store.volumes import Volumes, anonymous_name

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

    @property
    def is_tmpfs(self) -> bool:
        return self.spec.type == TMPFS

    def source(self, volumes: Volumes) -> Path | Mount:
        """The directory or file of the host, made if the mount asks for that, or a new tmpfs. NotFound, OSError."""
        if self.spec.type == TMPFS:
            return tmpfs(self.spec)
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
        return Bound(self.spec.target, self.source(volumes), read_only=read_only or self.is_read_only(volumes))

    def is_read_only(self, volumes: Volumes) -> bool:
        return self.spec.read_only or (self.volume is not None and volumes.get(self.volume).is_snapshot)

    def facts(self, volumes: Volumes) -> dict[str, Any]:
        """As `docker inspect` lists it under Mounts."""
        spec = self.spec
        facts: dict[str, Any] = {"Type": spec.type}
        if self.volume is not None:
            volume = volumes.get(self.volume)
            facts |= {
                "Name": volume.name,
                "Source": str(volume.directory / DATA),
                "Destination": spec.target,
                "Driver": volume.driver,
            }
        else:
            facts |= {"Source": spec.source, "Destination": spec.target}
        propagation = spec.propagation or ("rprivate" if spec.type == BIND else "")
        return facts | {"Mode": spec.mode, "RW": not self.is_read_only(volumes), "Propagation": propagation}


def tmpfs(spec: MountSpec) -> Mount:
    """What mounts the tmpfs; like Docker's, without programs, setuid and devices unless options say so."""
    flags = {"nosuid", "nodev", "noexec", *(["ro"] if spec.read_only else [])}
    for name, value in spec.options.items():
        if not value and name != "rw":
            flags = (flags - {f"no{name}"}) | ({name} if name.startswith("no") or name == "ro" else set())
    values = [f"{name}={_bare(value)}" for name, value in spec.options.items() if value]
    if "mode" not in spec.options:
        values.append("mode=1777")
    return Mount("tmpfs", "tmpfs", "", (*sorted(flags), *values))


def host_facts(points: Iterable[MountPoint]) -> list[dict[str, Any]] | None:
    """As `docker inspect` lists what --mount asked for under HostConfig.Mounts: only what was said."""
    return [_asked(point.spec) for point in points if point.spec.listed] or None


def _asked(spec: MountSpec) -> dict[str, Any]:
    driver = _said({"Name": spec.driver, "Options": spec.options})
    size, mode = spec.options.get("size"), spec.options.get("mode")
    details: dict[str, dict[str, Any]] = {
        BIND: {"Propagation": spec.propagation},
        VOLUME: {"NoCopy": spec.copy is False, "Labels": spec.labels, "Subpath": spec.subpath, "DriverConfig": driver},
        TMPFS: {"SizeBytes": size and parse_size(size, spec.target), "Mode": mode and int(mode, 8)},
    }
    facts = {"Type": spec.type, "Source": spec.source, "Target": spec.target, "ReadOnly": spec.read_only}
    return _said(facts | {f"{spec.type.capitalize()}Options": _said(details[spec.type])})


def _said(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value}


def tmpfs_facts(points: Iterable[MountPoint]) -> dict[str, str] | None:
    """As `docker inspect` lists what --tmpfs asked for under HostConfig.Tmpfs."""
    texts = [point.spec.text.partition(":") for point in points if point.is_tmpfs and point.spec.text]
    return {target: options for target, _, options in texts} or None


def _bare(value: str) -> str:
    """A size as the kernel takes it: 64m, and not 64MiB."""
    return value.lower().removesuffix("b").removesuffix("i")


@contextmanager
def bounds(volumes: Volumes, points: Iterable[MountPoint], *, read_only: bool = False) -> Iterator[list[Bound]]:
    """What to mount of `points`, for a `with` block in which nobody removes their volumes. NotFound, OSError."""
    found = list(points)
    with volumes.using(*(point.volume for point in found if point.volume is not None)):
        yield [point.bound(volumes, read_only=read_only) for point in found]


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
    found = []
    for point in store.container(name).mounts:
        read_only = point.spec.read_only or mode == "ro"
        found.append(replace(point, spec=replace(point.spec, read_only=read_only, mode="", text="", listed=False)))
    return found


@contextmanager
def prepared(volumes: Volumes, planned: Iterable[MountPoint | MountSpec], view: View | None) -> Iterator[list[MountPoint]]:
    """The points, whose volumes are there and filled from `view`. An error removes those that were made for them.

    Nobody removes one during the `with` block, at whose end a container is to have them.
    """
    points: list[MountPoint] = []
    with volumes.using() as use:
        for item in planned:
            if isinstance(item, MountPoint):
                if item.volume is not None:
                    use.take(item.volume)
                points.append(item)
            elif item.type == VOLUME:
                name = item.source or anonymous_name()
                use.hold(name)
                anonymous = {} if item.source else {ANONYMOUS: ""}
                volume, _ = volumes.create(
                    name,
                    driver=item.driver,
                    labels=anonymous | item.labels,
                    options=item.options,
                    created_ns=use.making(name),
                )
                fills = view is not None and item.fills and not volume.is_snapshot
                if fills or item.subpath:
                    use.take(name)
                if view is not None and fills:
                    seed = seeding(item.target) if volume.stored == DATA else None
                    volume.site().fill(view, item.target, into=item.subpath, seeding=seed)
                points.append(MountPoint(item, name))
            else:
                if item.type == BIND and item.fills and view is not None:
                    _fill_bind(item, view)
                points.append(MountPoint(item, None))
        yield points


def _fill_bind(spec: MountSpec, view: View) -> None:
    source = Path(spec.source)
    if spec.create:
        source.mkdir(mode=0o755, parents=True, exist_ok=True)
    if source.is_dir():
        Site.of_bind(source).fill(view, spec.target)


# --- records ----------------------------------------------------------------------------------------------------------


def insert(records: Records, container: str, points: Iterable[MountPoint]) -> None:
    """Record the mounts of a container. NotFound if a volume was removed meanwhile."""
    for point in points:
        spec = msgspec.json.encode(point.spec).decode()
        try:
            records.execute("INSERT INTO mounts VALUES (?, ?, ?, ?)", container, point.spec.target, point.volume, spec)
        except sqlite3.IntegrityError:
            raise NotFound(f"volume {point.volume} has just been removed", hint="try again") from None


def of(records: Records, container: str, *, order: str = "destination") -> list[MountPoint]:
    """The mounts of a container, by where they are; order "rowid": as they were asked for."""
    rows = records.rows(f"SELECT * FROM mounts WHERE container = ? ORDER BY {order}", container)
    return [MountPoint(msgspec.json.decode(row["spec"], type=MountSpec), row["volume"]) for row in rows]


# --- mounting ---------------------------------------------------------------------------------------------------------


def mount_points(place: Path, bounds: Iterable[tuple[str, Bound, str]]) -> None:
    """Mount each of (clean path, what, propagation) in the tree that is mounted at `place`."""
    for path, bound, propagation in bounds:
        with inside(place, path) as target:
            source = bound.source
            mount(source.at(target) if isinstance(source, Mount) else bind_mount(source, target))
        with inside(place, path) as target:  # the first descriptor is of what is hidden now
            mount_old("none", target, None, PROPAGATION[propagation or "rprivate"], "")
            if bound.read_only and not isinstance(bound.source, Mount):
                set_read_only(target)
