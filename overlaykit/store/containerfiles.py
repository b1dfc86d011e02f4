"""The files of a container: opened in process, mounted by the kernel, the root of a program. One of these at a time: whoever
has them open, or freezes them, holds the lock on the work directory."""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from overlaykit.errors import InUse, NotFound, Unsupported
from overlaykit.overlay import Overlay, View
from overlaykit.overlay.bound import Bound
from overlaykit.overlay.identity import Identity, identity
from overlaykit.overlay.inside import run_inside
from overlaykit.overlay.limited import LimitedOverlay
from overlaykit.overlay.mount import mount, set_read_only, unmount
from overlaykit.overlay.mounted import Mounted
from overlaykit.overlay.mounttable import mounted_below, mounts_of
from overlaykit.store import mountpoints, quota
from overlaykit.store.containerrecords import Record
from overlaykit.store.disk import usage
from overlaykit.store.leases import Lease
from overlaykit.store.limits import Limits
from overlaykit.store.snapshots import Snapshot
from overlaykit.tree import WhiteoutFormat
from overlaykit.tree.table import StrPath

if TYPE_CHECKING:
    from overlaykit.store.store import Store


class ContainerFiles:
    """The methods of Container that show its files to somebody."""

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
    def is_read_only(self) -> bool:
        """Whether its root refuses changes; volumes, binds and tmpfs in it take them."""
        return bool(self.record.settings.get("ReadonlyRootfs"))

    @property
    def limits(self) -> Limits | None:
        """What its writable layer may hold, None for no limit."""
        return Limits.parse(self.record.settings.get("StorageOpt") or {})

    @property
    def mounts(self) -> list[mountpoints.MountPoint]:
        """Its volumes and bind mounts."""
        return mountpoints.of(self._store.records, self.id)

    @property
    def fs(self) -> Overlay | Mounted:
        """Its files, to read and to write, under the names that the os module has: `fs.open("/etc/motd", "a")`.

        A path at which a volume or a directory of the host is mounted leads into that. The rest of a read-only container
        refuses changes (EROFS). One object, opened when it is first asked for, and closed by `close` or with the store.
        InUse while another process has it, or while it is mounted.
        """
        return self._store.overlay(self.id, self._open)

    def _open(self) -> Overlay | Mounted:
        if self.is_read_only:
            return self._open_sealed()
        overlay = self._open_layers()
        return self._with_mounts(overlay) if self.mounts else overlay

    def _open_sealed(self) -> Mounted:
        """Its files under a root that refuses changes. Missing mount points are made before, as for a mount."""
        with ExitStack() as held:
            with self._mount_points():
                held.callback(os.close, self._locked())
                self._leave_mounts(force=False)  # who mounts it does so under the lock
            return self._with_mounts(self._view(), held=held.pop_all())

    def _with_mounts(self, root: View, *, read_only: bool = False, held: ExitStack | None = None) -> Mounted:
        """`root`, which belongs to it, with the volumes and binds; those are in use until it is closed, as what is held."""
        with held or ExitStack() as stack, ExitStack() as failing:
            failing.callback(root.close)
            points = mountpoints.bounds(self._store.volume_store, self.mounts, read_only=read_only)
            bounds = stack.enter_context(points)
            failing.pop_all()  # Mounted closes it if it fails
            with_it = stack.pop_all()
            mounted = Mounted(root, bounds, with_it=with_it)
            # A program that ends without closing it lets go of the volumes while the records are still open.
            weakref.finalize(mounted, with_it.close)
            return mounted

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
            # Somebody may have frozen this upper before we had its lock: then there is another one by now. Or mounted it.
            if snapshots.directory(self.id) == directory and not self.mounted_at():
                return overlay
            overlay.close()
            self._leave_mounts(force=False)

    def _open_in(self, directory: Path) -> Overlay:
        snapshots = self._store.snapshots
        layers = snapshots.layers(self.id)  # asked once: another process may freeze a layer between two questions
        given = [layer for layer, _ in layers] or [directory / "bottom"], directory / "fs", directory / "work"
        trees, userxattr = [tree for _, tree in layers] or None, snapshots.whiteouts is WhiteoutFormat.USERXATTR
        left = self._limits_left()
        if left is None or quota.is_enforced(directory):
            with quota.room(directory, left):
                return Overlay(*given, trees=trees, userxattr=userxattr)

        def used() -> tuple[int, int]:
            found = usage(directory / "fs")
            return found.size, found.inodes - 1  # the root is there in any case

        return LimitedOverlay(*given, usage=used, size=left.size, entries=left.entries, trees=trees, userxattr=userxattr)

    def _limits_left(self) -> Limits | None:
        """What its frozen layers leave to its upper; None for no limit."""
        return None if self.limits is None else self._store.snapshots.limits_left(self.id, self.limits)

    def hold(self, lease: Lease) -> list[Snapshot]:
        """Its layers, bottom first, whose files stay as long as the lease lasts, whoever removes it meanwhile.

        NotFound if somebody has removed it already.
        """
        snapshots = self._store.snapshots
        while True:
            chain = snapshots.chain(self.id)
            lease.add(f"snapshots/{chain[-1].id}", *(each.key for each in chain[:-1]))
            if snapshots.chain(self.id) == chain:  # else its upper was frozen just then, and there is a new one
                self._store.container(self.id)
                return chain

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

    def view(self, lease: Lease | None = None) -> View | Mounted:
        """Its files as they are now, to read only, by whomever they are being written; a context manager.

        Volumes and bind mounts are in it, but for those below a directory that `fs` or `mount` has yet to make. lease: to
        keep them for as long as it lasts.
        """
        view = self._view(lease)
        return self._with_mounts(view, read_only=True) if self.mounts else view

    def _view(self, lease: Lease | None = None) -> View:
        snapshots = self._store.snapshots
        lowers, own, upper = snapshots.stack(self.id, self.hold(lease) if lease is not None else None)
        layers = [*(directory for directory, _ in (*lowers, *own)), upper]
        return View(layers, userxattr=snapshots.whiteouts is WhiteoutFormat.USERXATTR)

    def close(self) -> None:
        """Close `fs`, if it is open here. Files opened through it stay open."""
        self._store.close_overlay(self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Closed here, and for the `with` block not to be opened or mounted. InUse if it is mounted, or open elsewhere."""
        self.close()
        with self.quiet():  # who mounts it does so under the lock
            self._leave_mounts(force=False)
            yield

    # --- mounting -----------------------------------------------------------------------------------------------------

    def mount(self, target: StrPath | None = None) -> Path:
        """Where the kernel shows its files now: `target`, an existing directory, or one in the store. Root only."""
        self._leave_mounts(force=False)
        self.close()
        snapshots = self._store.snapshots
        try:
            with self._mount_points() as steps, self.at_rest(), self._room():
                place = snapshots.directory(self.id) / "merged" if target is None else Path(os.path.realpath(target))
                if target is None:
                    place.mkdir(mode=0o755, exist_ok=True)
                for step in snapshots.mounts(self.id, place):
                    mount(step)
                try:
                    self._mount_in(place, steps)
                except BaseException:
                    self.unmount(lazy=True)
                    raise
        except PermissionError as e:
            if os.geteuid() == 0:
                raise
            hint = "its files are there without it: overlaykit ls, cat, put, or container.fs"
            raise Unsupported(f"only root can mount container {self.name}: {e.strerror}", hint=hint) from e
        return place

    @contextmanager
    def _mount_points(self) -> Iterator[list[tuple[str, Bound, str]]]:
        """What to mount in the overlay, each at a clean path that is there: opening the files in process makes it.

        During the `with` block nobody removes the volumes.
        """
        points = sorted(self.mounts, key=lambda point: point.spec.target.count("/"))
        if not points:
            yield []
            return
        with mountpoints.bounds(self._store.volume_store, points) as bounds:
            with Mounted(self._open_layers(), bounds) as mounted:
                paths = mounted.points
            yield [(path, bound, p.spec.propagation) for path, bound, p in zip(paths, bounds, points, strict=True)]

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
        self._store.volume_store.hide(point.volume for point in self.mounts if point.volume is not None)
        return targets

    def identity(self, user: str | None = None) -> Identity:
        """Who `user[:group]` is here, by its own /etc/passwd and /etc/group; None: who the image says. NotFound for a name
        that is not in them."""
        text = self.record.config.user if user is None else user
        with self.view() as files:
            return identity(files, text or "")

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        directory: StrPath = "/",
        user: Identity | None = None,
    ) -> int:
        """The exit status of program `argv`, run with its files as the root: see overlay/inside.py. InUse as for `fs`.

        user: by default who the image says; without root's rights that can only be root. NotFound if there is nobody of
        that name.
        """
        if user is None:
            user = self.identity()
        self.close()
        with self._mount_points() as points, self.at_rest(), self._room() as end:
            (what,) = self._store.snapshots.mounts(self.id)

            def mounted(place: Path) -> None:
                self._mount_in(place, points)
                end()

            return run_inside(what, argv, env=env, directory=directory, user=user, mounted=mounted)

    def _room(self) -> AbstractContextManager[Callable[[], None]]:
        """In an upper that may be full, room to mount it. Under the lock of `at_rest`."""
        return quota.room(self._store.snapshots.directory(self.id), self._limits_left())

    def _mount_in(self, place: Path, points: list[tuple[str, Bound, str]]) -> None:
        """In the overlay that is mounted at `place`: what belongs in it. Then nobody changes the rest of a read-only one."""
        mountpoints.mount_points(place, points)
        if self.is_read_only:
            set_read_only(place)

    def mounted_at(self) -> list[Path]:
        """Where this mount namespace shows its files, the oldest first. The kernel's own table says so, and no record."""
        return mounts_of(self._store.snapshots.fs(self.id))

    def _leave_mounts(self, *, force: bool) -> None:
        """InUse if it is mounted; force: unmount it instead."""
        targets = self.mounted_at()
        if targets and not force:
            raise InUse(f"container {self.name} is mounted at {targets[0]}", hint=f"overlaykit umount {self.name}, or rm -f")
        if targets:
            self.unmount(lazy=True)
