"""The index: names of one lower file go on being names of one file over copy-up (the kernel's index=on).

work/index has an entry for every lower file with several names that was copied up: another hard link of the copy, its name
the hex of the lower inode's record (origin.py). Whoever finds a lower name finds the copy by it, whether or not upper has
that name too. How many names the merged tree has is in the copy's xattr `nlink`, relative to the links of the copy ("U+1")
or, while a link is being made, of the lower file ("L+0"). Follows fs/overlayfs: ovl_lookup_index and ovl_verify_index
(namei.c), ovl_link_up (copy_up.c), ovl_nlink_start (util.c), ovl_get_indexdir (super.c).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat

from overlaykit._ext import origin
from overlaykit.errors import Unsupported
from overlaykit.overlay.below import remove
from overlaykit.overlay.markers import is_whiteout_device
from overlaykit.overlay.nodes import INDEX, Found, Handle
from overlaykit.overlay.origin import HANDLE, NLINK, ORIGIN, FileSystem, Origins
from overlaykit.overlay.stack import fail
from overlaykit.tree.table import StrPath

UPPER_MARK = "upper"  # the xattr of the index directory that says to which upper it belongs
MAGIC, FLAGS = 0xFB, 7  # of a record: fs/overlayfs/overlayfs.h, OVL_FH_MAGIC and OVL_FH_FLAG_ALL
LINKS = re.compile(rb"([LU])([+-]\d+)")
OFF = "open it with index=False, or remove work's directory index: hard links then break apart"


class Index:
    """The index directory of one overlay. Whoever changes anything holds the overlay's lock."""

    def __init__(self, base: Handle, upper: Handle, origins: Origins, work: StrPath) -> None:
        self.origins, self.markers = origins, origins.markers
        self._where = os.path.join(os.fspath(work), "index")
        system = FileSystem(upper.fd)
        self._may_follow(system, upper)
        self._check_root(upper)
        with contextlib.suppress(FileExistsError):
            os.mkdir("index", 0o700, dir_fd=base.fd)
        self.handle = Handle(os.open("index", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=base.fd))
        self._check(self.handle, UPPER_MARK, origin.record(upper.fd, b".", system.uuid, upper=True), "is another upper's")
        for name in os.listdir(self.handle.fd):
            if name.startswith("#"):  # a kernel mount makes its temporaries here
                remove(self.handle.fd, name)
            elif not self._is_sound(name):
                os.unlink(name, dir_fd=self.handle.fd)

    # --- checks at opening ----------------------------------------------------------------------------------------

    def _may_follow(self, upper: FileSystem, root: Handle) -> None:
        """Unsupported unless file handles work, on all layers. A kernel mount would go on with index=off then."""
        systems = [upper, *(self.origins.system(layer) for layer in range(len(self.origins.roots)))]
        if not all(system.has_handles for system in systems):
            raise Unsupported(
                "index: a layer is on a file system without file handles, or without a uuid that the kernel tells (6.9 on)",
                hint="use a lower and an upper on ext4, xfs, btrfs or tmpfs, or index=False",
            )
        try:
            os.close(origin.open_record(upper.handle.fd, origin.record(root.fd, b".", upper.uuid)))
        except PermissionError:
            raise Unsupported(
                "index: following file handles needs the capability DAC_READ_SEARCH",
                hint="run it as root, or with index=False",
            ) from None

    def _check_root(self, upper: Handle) -> None:
        top = len(self.origins.roots) - 1
        record = self.origins.record(self.origins.roots[top].fd, b".", top)
        self._check(upper, ORIGIN, record, "was last used with another lower on top")

    def _check(self, directory: Handle, mark: str, record: bytes, problem: str) -> None:
        """Have `mark` of a directory be `record` from now on; Unsupported if it is something else."""
        was = self.markers.get(directory.fd, ".", mark)
        if not was:
            self.markers.set(directory.fd, ".", mark, record)
        elif was != record:
            raise Unsupported(f"{self._where}: {'upper' if mark == ORIGIN else 'the index'} {problem}", hint=OFF)

    def _is_sound(self, name: str) -> bool:
        """Whether an entry says what is so; False: nothing is lost by removing it. Unsupported for what is no entry."""
        try:
            record = bytes.fromhex(name)
        except ValueError:
            record = b""
        if len(record) <= HANDLE or record[1] != MAGIC or record[2] > len(record) or record[0] or record[3] & ~FLAGS:
            raise Unsupported(f"{self._where}: {name!r} is no entry of an index that we know", hint=OFF)
        st = os.stat(name, dir_fd=self.handle.fd, follow_symlinks=False)
        if is_whiteout_device(st) or stat.S_ISDIR(st.st_mode):  # nfs_export=on leaves those
            return True
        was = self.origins.of(self.handle.fd, name)
        if not was:
            raise Unsupported(f"{self._where}: {name!r} does not say where it comes from", hint=OFF)
        if was != record:
            return False
        relative = self._relative(name)
        if st.st_nlink > 1 and relative[0] == b"U":
            return True
        below = self._links_below(record)
        if below is None:
            return st.st_nlink > 1
        links = (below if relative[0] == b"L" else st.st_nlink) + relative[1]
        if st.st_nlink == 1 and (links <= 0 or not relative[0]):
            return False
        self._write(name, b"U", links - st.st_nlink)
        return True

    def _links_below(self, record: bytes) -> int | None:
        """The links of the lower file that `record` names; None if it is gone."""
        for layer in range(len(self.origins.roots)):
            system = self.origins.system(layer)
            if system.uuid == record[5:HANDLE]:
                try:
                    fd = origin.open_record(system.handle.fd, record)
                except FileNotFoundError:
                    return None
                except OSError as e:
                    if e.errno != errno.ESTALE:
                        raise
                    return None
                try:
                    return os.fstat(fd).st_nlink
                finally:
                    os.close(fd)
        return None

    # --- looking --------------------------------------------------------------------------------------------------

    def find(self, dir_fd: int, name: str, layer: int, st: os.stat_result) -> Found | None:
        """The copy of lower file `name`, which looks like `st`; None while there is none. EIO for an impossible entry."""
        entry = self.origins.record(dir_fd, os.fsencode(name), layer).hex()
        try:
            copy = os.stat(entry, dir_fd=self.handle.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if stat.S_IFMT(copy.st_mode) != stat.S_IFMT(st.st_mode):
            raise fail(errno.EIO, name)
        return Found(copy, INDEX, entry)

    def entry_of(self, st: os.stat_result, dir_fd: int, name: str) -> str:
        """The entry of `name` in directory dir_fd of upper (or of the index itself); "" if it has none."""
        entry = self.origins.of(dir_fd, name).hex()
        try:
            copy = os.stat(entry, dir_fd=self.handle.fd, follow_symlinks=False) if entry else None
        except FileNotFoundError:
            return ""
        return entry if copy is not None and copy.st_ino == st.st_ino else ""

    def shown(self, st: os.stat_result, dir_fd: int, name: str) -> os.stat_result:
        """`st` of a copy with the number of its lower file, and as many links as the merged tree has names of it."""
        entry = self.entry_of(st, dir_fd, name)
        if not entry:
            return self.origins.shown(st, dir_fd, name)
        number = self.origins.number(bytes.fromhex(entry)) or (st.st_dev, st.st_ino)
        return origin.renumbered(st, *number, self.links(st, entry))

    # --- counting -------------------------------------------------------------------------------------------------

    def _relative(self, entry: str) -> tuple[bytes, int]:
        found = LINKS.fullmatch(self.markers.get(self.handle.fd, entry, NLINK) or b"")
        return (found[1], int(found[2])) if found else (b"", 0)

    def _write(self, entry: str, base: bytes, relative: int) -> None:
        self.markers.set(self.handle.fd, entry, NLINK, base + b"%+d" % relative)

    def links(self, st: os.stat_result, entry: str) -> int:
        """The names that the merged tree has of a copy, which looks like `st`."""
        links = st.st_nlink + self._relative(entry)[1]
        return links if links > 0 else st.st_nlink

    def begin(self, entry: str, links: int) -> None:
        """A file with `links` names was copied up: none of them is in upper yet."""
        self._write(entry, b"U", links - 1)

    def link(self, entry: str, dir_fd: int, name: str, below: int) -> None:
        """Make `name` in directory dir_fd of upper, which lowers show already, a name of the copy.

        below  links of the lower file, which do not change meanwhile: who is killed halfway leaves the count in their terms
        """
        st = os.stat(entry, dir_fd=self.handle.fd, follow_symlinks=False)
        links = self.links(st, entry)
        self._write(entry, b"L", links - below)
        os.link(entry, name, src_dir_fd=self.handle.fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        self._write(entry, b"U", links - st.st_nlink - 1)

    def lost_name(self, entry: str) -> None:
        """A name of the copy went away; with the last one its entry goes. "" is no entry."""
        if not entry:
            return
        st = os.stat(entry, dir_fd=self.handle.fd, follow_symlinks=False)
        if st.st_nlink + self._relative(entry)[1] > 0:
            return
        if st.st_nlink == 1:
            os.unlink(entry, dir_fd=self.handle.fd)
        else:  # somebody gave the lower file another name meanwhile: believe what upper has
            self._write(entry, b"U", -1)
