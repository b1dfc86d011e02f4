"""What leases say of volumes, and what of it is to be cleared away when their holder is dead.

volumes/NAME                a volume that is used: unmounted, if nobody else uses it
resting-volumes/NAME        one at rest, for who has its lock or waits for it: what was cut short in it is settled
loose-volumes/NAME          a directory that has no row yet, or none any more: it goes
moved-volumes/NAME/NEW      one that gets another name: its directory gets the one that its row has
made-volumes/NAME/CREATED   one that is made for a container, with its row's time, so that nobody else's is meant: it
                            goes if that container does not come to be
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from overlaykit.errors import InUse, NotFound
from overlaykit.overlay.mounttable import is_mounted, mounted_below
from overlaykit.store import drivers
from overlaykit.store.disk import remove_tree
from overlaykit.store.drivers import DATA
from overlaykit.store.filling import locked_volume
from overlaykit.store.leases import Lease

if TYPE_CHECKING:
    from overlaykit.store.volumes import Volumes

USED, RESTING, LOOSE, MOVED, MADE = "volumes/", "resting-volumes/", "loose-volumes/", "moved-volumes/", "made-volumes/"


def is_of_volumes(thing: str) -> bool:
    """Whether what a lease names is for `clear`."""
    return thing.startswith((USED, RESTING, LOOSE, MOVED, MADE))


def clear(volumes: Volumes, lease: Lease) -> set[str]:
    """Clear away what an operation left of volumes; what has to be tried again later."""
    left = set()
    for thing in lease.things():
        done = True
        if thing.startswith((USED, RESTING)):
            name = thing.removeprefix(USED).removeprefix(RESTING)
            done = _settle(volumes, name) and volumes.hide_unused(name, lease)
        elif thing.startswith(LOOSE):
            _clear_loose(volumes, thing.removeprefix(LOOSE), lease)
        elif thing.startswith(MADE):
            _unmake(volumes, *thing.removeprefix(MADE).split("/"), lease=lease)
        elif thing.startswith(MOVED):
            with volumes.locked():
                put_in_place(volumes, *thing.removeprefix(MOVED).split("/"))
        if not done:
            left.add(thing)
    return left


def _settle(volumes: Volumes, name: str) -> bool:
    """Clear away what is left of a filling that was cut short: False if somebody has the volume's lock, to be tried
    again later."""
    with suppress(NotFound, FileNotFoundError):
        volume = volumes.get(name)
        if not volume.mounts and volume.site().needs_settling():
            try:
                with locked_volume(volume.directory, wait=False):
                    volume.site().settle()
            except BlockingIOError:
                return False
    return True


def _unmake(volumes: Volumes, name: str, created_ns: str, *, lease: Lease) -> None:
    with suppress(InUse, NotFound):  # somebody has it by now, or has removed it
        volumes.remove(name, created_ns=int(created_ns), user=lease)


def _clear_loose(volumes: Volumes, name: str, lease: Lease) -> None:
    directory = volumes.folder / name
    if not name.startswith("."):
        with volumes.locked():
            if not directory.exists() or volumes.has(name):
                return
            directory = volumes.folder / f".gone-{secrets.token_hex(8)}"
            lease.note(LOOSE + directory.name)
            os.rename(volumes.folder / name, directory)
    discard(directory)


def discard(directory: Path) -> int:
    """Remove a directory of the store that no volume has: bytes that came free. EBUSY if something is mounted in it."""
    if not directory.exists():
        return 0
    if is_mounted(directory / DATA):
        drivers.unmount(directory / DATA)
    if inner := mounted_below(directory):  # what is mounted is not ours to remove
        raise OSError(errno.EBUSY, "something is mounted there", str(inner[0]))
    return remove_tree(directory)


def put_in_place(volumes: Volumes, name: str, new: str) -> None:
    """Give the directory of a volume, that was `name` and was to be `new`, the name that its row has. Under the lock."""
    folder = volumes.folder
    for old, now in ((name, new), (new, name)):
        # The row says how it is called; the directory may have the other name still, or already.
        if volumes.has(now) and not volumes.has(old) and not (folder / now).exists() and (folder / old).exists():
            os.rename(folder / old, folder / now)
