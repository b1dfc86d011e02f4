"""What a store takes on disk, so that the sums add up: each file counted once, whatever names and clones it has.

Things are gone through in one order: blobs, layers from the bottom, containers, volumes, the rest. A file with several
names belongs to the first thing that has one of them, and so does an extent that several files share (FIEMAP, where the
file system tells of such): what a container still shares with its image by reflink is not counted as the container's own.
"""

from __future__ import annotations

import bisect
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from overlaykit.overlay.mounttable import mounted_below
from overlaykit.store.snapshots import COMMITTED

if TYPE_CHECKING:
    from overlaykit.store.store import Store

FIEMAP = 0xC020660B  # FS_IOC_FIEMAP, linux/fs.h
HEADER = struct.Struct("=QQLLLL")
EXTENT = struct.Struct("=QQQQQLLLL")
AT_ONCE = 256  # extents asked for with one call
LAST, SHARED = 0x1, 0x2000  # linux/fiemap.h


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in the store. kind: blob, layer, container, volume, other. size: bytes on disk that nothing before it has.
    users: how many images and containers need it; 0 for what gc would remove, and 1 for a volume that no container has."""

    kind: str
    name: str
    size: int
    users: int


@dataclass
class StoreUsage:
    """All that a store takes. The sizes of `items` add up to `total`, which is what the files of the root occupy.

    What is mounted in it, such as a volume whose driver mounts it, lies elsewhere, and is not counted."""

    items: list[Item] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(item.size for item in self.items)

    @property
    def shared(self) -> int:
        """Bytes of blobs, layers and volumes that several images or containers need."""
        return sum(item.size for item in self.items if item.users > 1)

    @property
    def exclusive(self) -> int:
        """Bytes of blobs, layers, containers and volumes that one needs, and of the rest."""
        return sum(item.size for item in self.items if item.users == 1)

    @property
    def reclaimable(self) -> int:
        """Bytes that nobody needs."""
        return sum(item.size for item in self.items if item.users == 0 and item.kind != "other")

    def of(self, kind: str) -> int:
        return sum(item.size for item in self.items if item.kind == kind)


def usage(store: Store) -> StoreUsage:
    """What Store.usage gives."""
    from overlaykit.store.fsck import needs

    users = needs(store)
    seen = Seen(mounted_below(store.root))  # a mounted container shows its image once more, and volumes
    found = StoreUsage()
    for digest in store.layout.digests():
        found.items.append(Item("blob", digest, seen.take(store.layout.path(digest)), len(users.get(digest, ()))))
    snapshots = list(store.snapshots.walk())
    names = {container.id: container.name for container in store.containers()}
    above = {snapshot.parent for snapshot in snapshots}
    for snapshot in sorted(snapshots, key=lambda s: s.kind != COMMITTED):
        size = seen.take(store.snapshots.folder / snapshot.id)
        if snapshot.kind == COMMITTED:
            count = len(users.get(snapshot.key, ())) or int(snapshot.key in above)
            found.items.append(Item("layer", snapshot.key, size, count))
        else:
            found.items.append(Item("container", names.get(snapshot.key, snapshot.key), size, 1))
    for volume in store.volumes():
        count = len(store.volume_store.users(volume.name)) or 1
        found.items.append(Item("volume", volume.name, seen.take(volume.directory), count))
    found.items.append(Item("other", str(store.root), seen.take(store.root), 1))
    return found


class Seen:
    """The inodes and shared extents that were counted already."""

    def __init__(self, without: Iterable[Path] = ()) -> None:
        """without: directories that are not looked at."""
        self._without = frozenset(map(str, without))
        self._inodes: set[tuple[int, int]] = set()
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._has_fiemap = True

    def take(self, path: Path) -> int:
        """Bytes on disk of `path` and all below it that were not counted before."""
        return sum(self._bytes(place, st) for place, st in _everything(path, self._without))

    def _bytes(self, path: str, st: os.stat_result) -> int:
        if (st.st_dev, st.st_ino) in self._inodes:
            return 0
        self._inodes.add((st.st_dev, st.st_ino))
        size = st.st_blocks * 512
        if size and self._has_fiemap and stat.S_ISREG(st.st_mode):
            size -= sum(self._again(start, end) for start, end in self._shared(path))
        return max(size, 0)

    def _shared(self, path: str) -> list[tuple[int, int]]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            return []
        try:
            return list(shared_extents(fd))
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                raise
            self._has_fiemap = False  # no extents, so none are shared
            return []
        finally:
            os.close(fd)

    def _again(self, start: int, end: int) -> int:
        """How much of the bytes start..end on the device was counted before; all of it is from now on."""
        first = bisect.bisect_left(self._ends, start)
        last = bisect.bisect_right(self._starts, end)
        overlap = sum(max(0, min(end, self._ends[i]) - max(start, self._starts[i])) for i in range(first, last))
        low = min([start, *self._starts[first:last]])
        high = max([end, *self._ends[first:last]])
        self._starts[first:last], self._ends[first:last] = [low], [high]
        return overlap


def shared_extents(fd: int) -> Iterator[tuple[int, int]]:
    """Where on the device the data of the file are that it shares with others: (start, end) in bytes. OSError."""
    at = 0
    while True:
        buffer = bytearray(HEADER.size + AT_ONCE * EXTENT.size)
        HEADER.pack_into(buffer, 0, at, (1 << 64) - 1 - at, 0, 0, AT_ONCE, 0)
        fcntl.ioctl(fd, FIEMAP, buffer)
        count = HEADER.unpack_from(buffer)[3]
        for i in range(count):
            logical, physical, length, _, _, flags, *_ = EXTENT.unpack_from(buffer, HEADER.size + i * EXTENT.size)
            if flags & SHARED:
                yield physical, physical + length
            at = logical + length
            if flags & LAST:
                return
        if not count:
            return


def _everything(path: str | Path, without: frozenset[str]) -> Iterator[tuple[str, os.stat_result]]:
    if str(path) in without:
        return
    try:
        st = os.lstat(path)
        yield str(path), st
        if stat.S_ISDIR(st.st_mode):
            for name in os.listdir(path):
                yield from _everything(os.path.join(path, name), without)
    except FileNotFoundError:  # somebody has just removed it
        pass
