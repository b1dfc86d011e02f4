"""Volumes: directories that outlast containers and are shared by them.

    ROOT/volumes/NAME/_data    a volume's files, or where its driver mounts them
    ROOT/volumes/NAME/...      what its driver keeps, and what lies there for a while (filling.py)
    ROOT/volumes/.lock         held while a volume comes, goes or gets another name
    ROOT/volumes/.new-...      a volume that is being made
    ROOT/volumes/.gone-...     one that is being removed

A row in the records is what makes a volume exist. Who uses one holds a lease on it: so it is not removed meanwhile, and what
its driver mounts stays mounted until the last user has ended or died. No counter says so, only leases and the mount table.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from overlaykit.errors import AlreadyExists, InUse, NotFound, OverlaykitError
from overlaykit.oci.durable import sync_directory
from overlaykit.overlay.mounttable import is_mounted, mounts_of
from overlaykit.store import drivers, volumeleft
from overlaykit.store.cloning import ANONYMOUS
from overlaykit.store.drivers import DATA, Driver
from overlaykit.store.filling import locked_volume
from overlaykit.store.labels import check_labels, has_labels
from overlaykit.store.leases import Lease, Leases, exclusion
from overlaykit.store.lostfound import put_aside
from overlaykit.store.mountspec import check_volume_name
from overlaykit.store.records import Records
from overlaykit.store.volume import Volume, VolumeRecord, record_of
from overlaykit.store.volumeleft import LOOSE, MADE, MOVED, RESTING, USED

STRAY = "no volume had it"  # why a directory is in lost+found


class Use:
    """Volumes that somebody is using."""

    def __init__(self, volumes: Volumes, lease: Lease) -> None:
        self._volumes, self._lease = volumes, lease
        self.names: list[str] = []

    def hold(self, name: str) -> None:
        """Nobody removes `name` from now on, whether it is there yet or not."""
        self._lease.add(f"{USED}{name}")

    def making(self, name: str) -> int:
        """The time at which volume `name` is made, if it is: unless the `with` block ends well it is removed again."""
        now = time.time_ns()
        self._lease.note(f"{MADE}{name}/{now}")
        return now

    def take(self, name: str) -> Volume:
        """The volume, whose files are to be seen from now on. NotFound; what its driver raises."""
        self.hold(name)
        volume = self._volumes.there(name)
        self.names.append(name)
        self._volumes.show(volume)
        return volume


class Volumes:
    """The volumes of one store."""

    leases: Leases  # of the same store, which has them from its collector

    def __init__(self, folder: Path, records: Records) -> None:
        """folder: ROOT/volumes."""
        self.folder = folder
        self._records = records

    # --- what there is ------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Volume:
        """The volume of that name. NotFound."""
        row = self._records.row("SELECT * FROM volumes WHERE name = ?", name)
        if row is None:
            raise NotFound(f"no volume {name}", hint="overlaykit volume ls lists them")
        return Volume(self, record_of(row))

    def there(self, name: str) -> Volume:
        """The volume, which the caller holds, with its directory: also if somebody was killed who gave it another name."""
        volume = self.get(name)
        if not volume.directory.exists():
            self.leases.recover()
            volume = self.get(name)
        return volume

    def still(self, volume: Volume) -> Volume:
        """The volume, which the caller holds, as `there` gives it. NotFound also if another one has its name by now."""
        found = self.there(volume.name)
        _check_same(found, volume.record.created_ns)
        return found

    def has(self, name: str) -> bool:
        return self._records.row("SELECT 1 FROM volumes WHERE name = ?", name) is not None

    def listed(self) -> list[Volume]:
        """Every volume, by name."""
        return [Volume(self, record_of(row)) for row in self._records.rows("SELECT * FROM volumes ORDER BY name")]

    def used(self) -> set[str]:
        """The names of the volumes that containers have."""
        return {row["volume"] for row in self._records.rows("SELECT DISTINCT volume FROM mounts WHERE volume IS NOT NULL")}

    def users(self, name: str) -> list[str]:
        sql = (
            "SELECT DISTINCT c.name FROM mounts m JOIN containers c ON c.id = m.container WHERE m.volume = ? ORDER BY c.name"
        )
        return [row["name"] for row in self._records.rows(sql, name)]

    # --- making -------------------------------------------------------------------------------------------------------

    def create(
        self,
        name: str | None = None,
        *,
        driver: str = "",
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
        created_ns: int | None = None,
    ) -> tuple[Volume, bool]:
        """The volume `name`, and whether it is new; one without a name is anonymous. driver: "" for local.

        created_ns: of one that is made for a container (Use.making). One that is there is given as it is. AlreadyExists if
        its driver or options are others than what is asked for; InvalidReference; NotFound for a driver that there is not;
        what that raises.
        """
        chosen = anonymous_name() if name is None else check_volume_name(name)
        wanted = {ANONYMOUS: "", **(labels or {})} if name is None else dict(labels or {})
        found = None
        while found is None:
            try:
                found = self.get(chosen)
            except NotFound:
                with suppress(AlreadyExists):  # another process was faster
                    how = driver or "local"
                    return self.make(chosen, driver=how, labels=wanted, options=options, created_ns=created_ns), True
            else:
                # If it is just being made for a container that does not come to be, it goes again.
                if created_ns is None and self.leases.wait(f"{MADE}{chosen}/{found.record.created_ns}"):
                    found = None
        if (driver and found.driver != driver) or (options and found.record.options != dict(options)):
            raise AlreadyExists(f"there is a volume {chosen} of driver {found.driver} and other options")
        if driver:
            drivers.find(driver)
        return found, False

    def make(
        self,
        name: str,
        *,
        driver: str = "local",
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
        put: Callable[[Path], object] | None = None,
        created_ns: int | None = None,
    ) -> Volume:
        """A new volume. AlreadyExists, InvalidReference, NotFound for a driver that there is not; what that raises.

        put: is given the volume's directory, in place of the driver, to make all that is to be in it, _data too; it must be
        on disk when it comes back. Nobody sees the volume before.
        """
        check_labels(labels or {})
        now = created_ns or time.time_ns()
        record = VolumeRecord(check_volume_name(name), driver, dict(options or {}), dict(labels or {}), now)
        keeper = drivers.find(driver)
        if self.has(name):
            raise _taken(name)
        aside = f".new-{secrets.token_hex(8)}"
        with self.leases.hold() as lease:
            lease.add(LOOSE + aside)
            lease.sync()
            directory = self.folder / aside
            directory.mkdir(mode=0o701)
            if put is None:
                (directory / DATA).mkdir(mode=0o755)
                os.chmod(directory / DATA, 0o755)  # whatever the umask
                keeper.create(directory, record.options)
            else:
                put(directory)
            sync_directory(directory)
            with self._free(name):
                lease.add(LOOSE + name)
                lease.sync()
                os.rename(directory, self.folder / name)
                sync_directory(self.folder)
                values = (name, driver, json.dumps(record.options), json.dumps(record.labels), record.created_ns)
                self._records.execute("INSERT INTO volumes VALUES (?, ?, ?, ?, ?)", *values)
        return Volume(self, record)

    @contextmanager
    def _free(self, name: str) -> Iterator[None]:
        """Under the lock, for a `with` block in which there is neither a volume `name` nor its directory. AlreadyExists."""
        while True:
            with self.locked():
                if self.has(name):
                    raise _taken(name)
                if not (self.folder / name).exists():
                    yield
                    return
            self._clear_way(name)

    def _clear_way(self, name: str) -> None:
        """Let there be no directory `name` that no volume has. What nobody can explain moves to lost+found."""
        self.leases.recover()  # most likely a killed process left it
        directory = self.folder / name
        with self.leases.hold() as lease, self.locked():
            if directory.exists() and not self.has(name) and LOOSE + name not in self._held(lease):
                put_aside(self.folder.parent, directory, STRAY)

    # --- using --------------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, *names: str) -> Iterator[Use]:
        """Volumes for a `with` block, in which nobody removes them and their files are to be seen; `take` adds more.

        NotFound; what their drivers raise.
        """
        with self.leases.hold() as lease:
            use = Use(self, lease)
            for name in names:
                use.take(name)
            try:
                yield use
            finally:
                lease.keep({f"{USED}{name}" for name in set(use.names) if not self.hide_unused(name, lease)})

    def show(self, volume: Volume) -> None:
        """Let a volume that is held be mounted, if its driver mounts. Waits for who has it `at_rest`. NotFound, OSError."""
        with locked_volume(volume.directory):
            self.get(volume.name)  # it may have another name by now
            if volume.mounts and not is_mounted(volume.directory / DATA):
                drivers.find(volume.driver).mount(volume.directory, volume.record.options)

    def hide(self, names: Iterable[str]) -> None:
        """Unmount what is mounted of volumes that nobody uses any more."""
        for name in names:
            if is_mounted(self.folder / name / DATA):
                with suppress(NotFound), self.using(name):  # somebody may have removed it, unmounted
                    pass

    def hide_unused(self, name: str, own: Lease) -> bool:
        """Unmount the volume unless somebody but `own` uses it: False if it has to be tried again later."""
        directory = self.folder / name
        if not is_mounted(directory / DATA):
            return True
        try:
            with locked_volume(directory):
                if self._is_used(name, own) or not is_mounted(directory / DATA):
                    return True
                self._unmount(directory, self._driver_of(name))
        except FileNotFoundError:
            return True  # it has just been removed, or has another name
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            return False  # a file in it is open
        return True

    def _driver_of(self, name: str) -> Driver | None:
        with suppress(OverlaykitError):  # a row that is gone, or a driver
            return drivers.find(self.get(name).driver)
        return None

    @staticmethod
    def _unmount(directory: Path, driver: Driver | None) -> None:
        if is_mounted(directory / DATA):
            driver.unmount(directory) if driver else drivers.unmount(directory / DATA)

    def _held(self, own: Lease, also: Lease | None = None) -> set[str]:
        """What anybody but these holds."""
        with exclusion(self.leases.folder):
            return self.leases.held(own, also)

    def _is_used(self, name: str, own: Lease) -> bool:
        """Whether somebody but `own` is using it now, or the kernel shows it in a container."""
        return f"{USED}{name}" in self._held(own) or self.is_shown(name)

    def is_shown(self, name: str) -> bool:
        """Whether a container that has it is mounted."""
        sql = "SELECT s.id FROM mounts m JOIN snapshots s ON s.key = m.container WHERE m.volume = ?"
        snapshots = self.folder.parent / "snapshots"
        return any(mounts_of(snapshots / row["id"] / "fs") for row in self._records.rows(sql, name))

    @contextmanager
    def at_rest(self, volume: Volume, *, live: bool = False, shown: bool = False) -> Iterator[Path]:
        """The volume's files for a `with` block in which nobody begins to use them. InUse if somebody does already.

        Who wants the same waits. live: never mind users. shown: its driver mounts them, which is undone at the end.
        """
        with self.leases.hold() as lease:
            lease.add(f"{RESTING}{volume.name}")
            self.still(volume)
            with locked_volume(volume.directory):
                if not live and self._is_used(volume.name, lease):
                    hint = "close or unmount the containers that have it"
                    raise InUse(f"volume {volume.name} is being used", hint=hint)
                if not volume.mounts:
                    volume.site().settle()
                elif shown and not is_mounted(volume.directory / DATA):
                    drivers.find(volume.driver).mount(volume.directory, volume.record.options)
                yield volume.directory / DATA
            if not self.hide_unused(volume.name, lease):
                lease.keep({f"{USED}{volume.name}"})

    # --- removing and renaming ----------------------------------------------------------------------------------------

    def remove(self, name: str, *, created_ns: int | None = None, user: Lease | None = None) -> int:
        """Remove a volume: bytes that came free on disk. NotFound; InUse for all but `user`.

        created_ns: of the one that is meant, if another may have its name by now.
        """
        gone = f".gone-{secrets.token_hex(8)}"
        with self.leases.hold() as lease:
            lease.add(LOOSE + name, LOOSE + gone)
            with self.locked():
                volume = self.get(name)
                _check_same(volume, created_ns)
                driver = drivers.find(volume.driver)
                if users := self.users(name):
                    hint = f"overlaykit rm {users[0]} first"
                    raise InUse(f"volume {name} is used by container {', '.join(users[:3])}", hint=hint)
                with self._nobody_using(name, lease, user):
                    self._unmount_or_refuse(name, driver)
                    lease.sync()
                    driver.remove(volume.directory, volume.record.options)
                    try:
                        self._records.execute("DELETE FROM volumes WHERE name = ?", name)
                    except sqlite3.IntegrityError:
                        raise InUse(f"volume {name} is used by container {', '.join(self.users(name)[:3])}") from None
                with suppress(FileNotFoundError):
                    os.rename(volume.directory, self.folder / gone)
            return volumeleft.discard(self.folder / gone)

    @contextmanager
    def _nobody_using(self, name: str, own: Lease, also: Lease | None = None) -> Iterator[None]:
        """Nobody but these uses the volume, or else InUse, nor begins to before the `with` block ends: they find it gone."""
        with exclusion(self.leases.folder):
            if {f"{USED}{name}", f"{RESTING}{name}"} & self.leases.held(own, also):
                raise InUse(f"volume {name} is being used", hint="by another operation: try again when that has ended")
            if self.is_shown(name):
                raise InUse(f"volume {name} is being used", hint="close or unmount the containers that have it")
            yield

    def _unmount_or_refuse(self, name: str, driver: Driver) -> None:
        try:
            self._unmount(self.folder / name, driver)
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            raise InUse(f"volume {name}: a file in it is open") from None

    def rename(self, volume: Volume, new: str) -> Volume:
        """The volume, called `new` from now on, in the containers that have it too. NotFound, AlreadyExists, InUse."""
        check_volume_name(new)
        name = volume.name
        with self.at_rest(volume):
            pass  # nothing in it is under way
        with self.leases.hold() as lease:
            lease.add(f"{USED}{name}", f"{MOVED}{name}/{new}")
            lease.sync()
            driver = drivers.find(self.still(volume).driver)
            with self._free(new), self._nobody_using(name, lease):
                self._unmount_or_refuse(name, driver)
                try:
                    self._move(name, new)
                except BaseException:
                    volumeleft.put_in_place(self, name, new)  # before others look for the files
                    raise
        return self.get(new)

    def _move(self, name: str, new: str) -> None:
        with self._records.transaction():
            self._records.execute("UPDATE volumes SET name = ? WHERE name = ?", new, name)
            for row in self._records.rows("SELECT container, destination, spec FROM mounts WHERE volume = ?", new):
                sql = "UPDATE mounts SET spec = ? WHERE container = ? AND destination = ?"
                self._records.execute(sql, _renamed(row["spec"], name, new), row["container"], row["destination"])
            os.rename(self.folder / name, self.folder / new)
            sync_directory(self.folder)

    def prune(self, *, all: bool = False, labels: Iterable[str] = ()) -> tuple[list[str], int]:
        """Remove the anonymous volumes that nobody has: their names, and bytes that came free on disk.

        all: those with names too. labels: only those that have each, "KEY" or "KEY=VALUE".
        """
        names, freed = [], 0
        used, wanted = self.used(), list(labels)
        for volume in self.listed():
            if volume.name in used or not (all or volume.is_anonymous) or not has_labels(volume.labels, wanted):
                continue
            try:
                freed += volume.remove()
            except (InUse, NotFound):  # somebody is using it, or was faster
                continue
            names.append(volume.name)
        return names, freed

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For a `with` block in which no volume comes, goes or gets another name but by who is in it."""
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def anonymous_name() -> str:
    """What a volume is called that nobody named."""
    return secrets.token_hex(32)


def _taken(name: str) -> AlreadyExists:
    return AlreadyExists(f"there is a volume {name}", hint=f"overlaykit volume rm {name}, or choose another name")


def _check_same(found: Volume, created_ns: int | None) -> None:
    if created_ns not in (None, found.record.created_ns):
        raise NotFound(f"volume {found.name} has been removed, and another has its name", hint="look it up again")


def _renamed(spec: str, name: str, new: str) -> str:
    """A MountSpec, as JSON, that names `new` where it named `name`; an anonymous mount stays one."""
    found = json.loads(spec)
    if found.get("source") == name:
        found["source"] = new
        found["text"] = new + found["text"].removeprefix(name) if found.get("text") else ""
    return json.dumps(found)
