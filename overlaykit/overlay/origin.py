"""Where a copy comes from: its xattr `origin` names the lower inode, by whose number the copy goes on being known.

The number is that of the copy-up's source for as long as the copy lives, in any mount and in any process; a directory in
which there are such names is marked `impure`, so that all others cost no look at xattrs. Follows fs/overlayfs/copy_up.c and
ovl_getattr in inode.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys

from overlaykit._ext import origin
from overlaykit.overlay.markers import Markers
from overlaykit.overlay.nodes import Handle, Node

ORIGIN, IMPURE, NLINK = "origin", "impure", "nlink"
FS_IOC_GETFSUUID = 0x80111500  # linux/fs.h
# Of a record (ext/origin.pyx): where the type, the uuid and the handle are.
TYPE, UUID, HANDLE = 4, slice(5, 21), 21
# Handles that carry the inode number, by type and size: where it is in them (bytes).
NUMBERS = {
    (0x01, 8): slice(0, 4),  # ext4 and most others: 32 bits, generation (exportfs.h, FILEID_INO32_GEN)
    (0x01, 12): slice(4, 12),  # tmpfs: generation, 64 bits
    (0x81, 12): slice(0, 8),  # xfs: 64 bits, generation (FILEID_INO64_GEN)
    (0x4D, 20): slice(0, 8),  # btrfs: 64 bits, root, generation
}

Number = tuple[int, int]  # st_dev, st_ino


class FileSystem:
    """One file system with lowers on it."""

    def __init__(self, fd: int) -> None:
        self.handle = Handle(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd))
        st = os.fstat(self.handle.fd)
        self.dev = st.st_dev
        self.uuid = self._uuid()
        record = origin.record(self.handle.fd, b".", self.uuid) if self.uuid else b""
        self.has_handles = bool(record)
        # Types of handles are given by file systems as they like, so one whose number is known tells whether we read them.
        self.reads = self._read(record) == st.st_ino

    def _uuid(self) -> bytes:
        """What the kernel knows the file system by; b"" if it does not tell."""
        answer = bytearray(17)  # its length, and the uuid
        try:
            fcntl.ioctl(self.handle.fd, FS_IOC_GETFSUUID, answer)
        except OSError as e:
            if e.errno not in (errno.ENOTTY, errno.EINVAL):  # before Linux 6.9
                raise
        return bytes(answer[1:]) if answer[0] == 16 else b""

    @staticmethod
    def _read(record: bytes) -> int | None:
        where = NUMBERS.get((record[TYPE], len(record) - HANDLE)) if record else None
        return None if where is None else int.from_bytes(record[HANDLE:][where], sys.byteorder)

    def number(self, record: bytes) -> Number | None:
        """The number of the inode that `record` names; None if that cannot be known."""
        if self.reads and (ino := self._read(record)) is not None:
            return self.dev, ino
        try:
            fd = origin.open_record(self.handle.fd, record)
        except (OSError, ValueError):  # no right to, or the lower file is gone: the number is upper's then
            return None
        try:
            st = os.fstat(fd)
            return st.st_dev, st.st_ino
        finally:
            os.close(fd)


class Origins:
    """The origins in one overlay's upper."""

    def __init__(self, roots: list[Handle], markers: Markers) -> None:
        self.roots = roots  # of the lowers
        self.markers = markers
        self._systems: dict[int, FileSystem] = {}  # by st_dev
        self._layers: dict[int, FileSystem] = {}
        self._known: dict[int, Number | None] = {}  # by the number of the copy in upper

    def system(self, layer: int) -> FileSystem:
        """The file system of a lower."""
        known = self._layers.get(layer)
        if known is None:
            fd = self.roots[layer].fd
            dev = os.fstat(fd).st_dev
            if dev not in self._systems:
                self._systems[dev] = FileSystem(fd)
            known = self._layers[layer] = self._systems[dev]
        return known

    def record(self, dir_fd: int, name: bytes, layer: int) -> bytes:
        """The origin of a copy of `name` in directory dir_fd of a lower; b"" if nobody could find it again by one."""
        system = self.system(layer)
        return origin.record(dir_fd, name, system.uuid) if system.has_handles else b""

    def of(self, dir_fd: int, name: str) -> bytes:
        """The origin of `name` in directory dir_fd of upper; b"" without one."""
        return self.markers.get(dir_fd, name, ORIGIN) or b""

    # --- numbers --------------------------------------------------------------------------------------------------

    def number(self, record: bytes) -> Number | None:
        """The number of the lower inode that `record` names; None if no lower is on its file system."""
        for layer in range(len(self.roots)):
            system = self.system(layer)
            if system.uuid and system.uuid == record[UUID]:
                return system.number(record)
        return None

    def forget(self) -> None:
        """A name of upper went away: the number of its inode may be another's soon."""
        self._known = {}

    def shown(self, st: os.stat_result, dir_fd: int, name: str) -> os.stat_result:
        """`st` of `name` in impure directory dir_fd of upper, with the number by which a mount knows it."""
        known = self._known  # as it was before anybody looks: whoever forgets meanwhile makes a new one
        ino = st.st_ino
        try:
            number = known[ino]
        except KeyError:
            number = known[ino] = self._number_of_copy(dir_fd, name)
        return st if number is None else origin.renumbered(st, *number, st.st_nlink)

    def _number_of_copy(self, dir_fd: int, name: str) -> Number | None:
        record = self.of(dir_fd, name)
        # One of several names keeps the number only with an index, which sees to it that there is one copy: index.py.
        if len(record) <= HANDLE or self.markers.get(dir_fd, name, NLINK) is not None:
            return None
        return self.number(record)

    # --- impure directories ---------------------------------------------------------------------------------------

    def is_impure(self, node: Node) -> bool:
        """Whether names in directory `node` of upper come from lowers. The caller holds the overlay's lock."""
        if node.impure is None:
            node.impure = self.markers.get(node.upper_fd, ".", IMPURE) == b"y"
        return node.impure

    def mark_impure(self, node: Node) -> None:
        """Say of directory `node` of upper that names in it come from lowers."""
        if self.is_impure(node):
            return
        try:
            self.markers.set(node.upper_fd, ".", IMPURE, b"y")
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.EOPNOTSUPP):  # as the kernel: it is about numbers only
                raise
        node.impure = True

    def moves(self, dir_fd: int, name: str, new: Node) -> None:
        """`name` in directory dir_fd of upper is about to come to, or get a name in, directory `new`."""
        if self.markers.get(dir_fd, name, ORIGIN) is not None:
            self.mark_impure(new)
