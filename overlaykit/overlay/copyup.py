"""Copy-up: what is about to change moves from a lower into upper, its directories first, each in one atomic step.

Everything is made in work and renamed, so that upper never shows half of anything; work is cleared when the overlay is
opened again. A directory that gains a name by copy-up keeps its times, as with the kernel: nobody changed it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from typing import TypeVar

from overlaykit._ext import copyup
from overlaykit.overlay.markers import WHITEOUT_DEV, WHITEOUT_MODE, place
from overlaykit.overlay.nodes import UPPER, Found, Handle, Node
from overlaykit.overlay.stack import Stack, fail
from overlaykit.tree.whiteout import METACOPY

R = TypeVar("R")

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4  # renameat2(2)
DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
ORIGIN, IMPURE = "origin", "impure"
FS_IOC_GETFSUUID = 0x80111500  # linux/fs.h
DEFAULT_ACL = "system.posix_acl_default"


class Upper:
    """The writable side of an overlay: what may be done to upper, each step whole or not at all.

    The caller holds the overlay's lock.
    """

    def __init__(self, stack: Stack, work: Handle, *, metacopy: bool, sync: bool) -> None:
        self.stack = stack
        self.markers = stack.markers
        self.work = work
        self.metacopy = metacopy
        self.sync = copyup.SYNC if sync else 0
        self._count = 0
        self._uuids: dict[int, bytes] = {}

    def temp(self) -> str:
        """A name that is free in work."""
        self._count += 1
        return f"#{self._count:x}"

    def sweep(self, name: str) -> None:
        """Remove what is left in work under `name`. Failure is no error: the next opening tries again."""
        try:
            os.unlink(name, dir_fd=self.work.fd)
        except IsADirectoryError:
            shutil.rmtree(name, ignore_errors=True, dir_fd=self.work.fd)
        except OSError:
            pass

    # --- where a copy comes from ----------------------------------------------------------------------------------
    #
    # A mount gives a copy the inode number of the lower file that its xattr `origin` names, in a listing only where the
    # directory is marked `impure`. Written for mounts to come: in process the number is that of the file in upper.

    def uuid(self, layer: int) -> bytes:
        """What the kernel knows the file system of `layer` by; b"" if it is not upper's, or the kernel does not tell."""
        known = self._uuids.get(layer)
        if known is None:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.stack.layers[layer].root.fd)
            try:
                answer = bytearray(17)  # its length, and the uuid
                if os.fstat(fd).st_dev == os.fstat(self.work.fd).st_dev:
                    fcntl.ioctl(fd, FS_IOC_GETFSUUID, answer)
            except OSError as e:
                if e.errno not in (errno.ENOTTY, errno.EINVAL):  # before Linux 6.9
                    raise
                answer[0] = 0
            finally:
                os.close(fd)
            known = self._uuids[layer] = bytes(answer[1:]) if answer[0] == 16 else b""
        return known

    def mark_impure(self, node: Node) -> None:
        """Say of directory `node` of upper that names in it come from lowers."""
        if node.impure:
            return
        try:
            self.markers.set(node.upper_fd, ".", IMPURE, b"y")
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.EOPNOTSUPP):  # as the kernel: it is about numbers only
                raise
        node.impure = True

    def moves(self, old: Node, name: str, new: Node) -> None:
        """`name` of upper is about to move from directory `old` to `new`."""
        if old is not new and self.markers.get(old.upper_fd, name, ORIGIN) is not None:
            self.mark_impure(new)

    # --- copy-up --------------------------------------------------------------------------------------------------

    def copy_up_dir(self, node: Node) -> None:
        """Give directory `node` a place in upper; its parents first."""
        if node.upper_fd >= 0:
            return
        if node.dead or node.parent is None:
            raise fail(errno.ENOENT)
        self.copy_up_dir(node.parent)
        to = node.parent.upper_fd
        try:  # another thread's node may have been here
            fd = os.open(node.name, DIRECTORY, dir_fd=to)
        except FileNotFoundError:
            layer = node.lowers[0][0]
            source = self.stack.lower(node, layer)
            name = os.fsencode(node.name)
            temp = os.fsencode(self.temp())
            if uuid := self.uuid(layer):
                self.mark_impure(node.parent)
            copyup.copy_up(source.fd, b".", self.work.fd, temp, to, name, self.markers.own, copyup.KEEP_TIMES, uuid)
            fd = os.open(node.name, DIRECTORY, dir_fd=to)
        node.set_upper(Handle(fd))
        self.stack.opened += 1

    def copy_up(self, node: Node, name: str, found: Found, *, data: bool = True, attributes: bool = False) -> None:
        """Copy non-directory `name` up.

        data        False: its content is about to be truncated away
        attributes  only attributes are about to change: enough is a metacopy, where those are on
        """
        if found.layer == UPPER:
            return
        self.copy_up_dir(node)
        what = copyup.KEEP_TIMES | self.sync
        lower = self.stack.lower(node, found.layer)
        own, temp, to = self.markers.own, os.fsencode(self.temp()), os.fsencode(name)
        regular = stat.S_ISREG(found.st.st_mode)
        if uuid := self.uuid(found.layer):
            self.mark_impure(node)
        if regular and not data:
            what |= copyup.NO_DATA
        elif regular and self.markers.is_metacopy(found.st, lower.fd, name):
            self._copy_up_in_two(node, name, found)
            return
        elif regular and attributes and self.metacopy and found.st.st_size:
            what |= copyup.METACOPY
        copyup.copy_up(lower.fd, to, self.work.fd, temp, node.upper_fd, to, own, what, uuid)

    def _copy_up_in_two(self, node: Node, name: str, found: Found) -> None:
        """Copy up a lower metacopy: attributes from there, data from where they are."""
        lower = self.stack.lower(node, found.layer)
        source, base = self.stack.source(node, name, found)
        work, half, temp = self.work.fd, self.temp(), self.temp()
        flags = copyup.NO_DATA
        copyup.copy_up(
            lower.fd,
            os.fsencode(name),
            work,
            os.fsencode(half),
            work,
            os.fsencode(temp),
            self.markers.own,
            flags,
            self.uuid(found.layer),
        )
        try:
            self._fill(source, base, work, temp, found.st, keep_time=True)
            parent = os.stat(".", dir_fd=node.upper_fd)
            copyup.rename_at(work, os.fsencode(temp), node.upper_fd, os.fsencode(name), NOREPLACE)
            os.utime(".", ns=(parent.st_atime_ns, parent.st_mtime_ns), dir_fd=node.upper_fd)
        except BaseException:
            self.sweep(temp)
            raise

    def _fill(self, source: Handle, base: str, dir_fd: int, name: str, st: os.stat_result, *, keep_time: bool) -> None:
        """Write the data of `base` into `name`; what writing takes away, setuid and capabilities, is given back."""
        src = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source.fd)
        try:
            dst = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
            try:
                capability = self._capability(dst)
                copyup.copy_data(src, dst, st.st_size)
                os.fchmod(dst, stat.S_IMODE(st.st_mode))
                if capability is not None:
                    os.setxattr(dst, "security.capability", capability)
                if keep_time:
                    os.utime(dst, ns=(st.st_atime_ns, st.st_mtime_ns))
                if self.sync:
                    os.fsync(dst)
            finally:
                os.close(dst)
        finally:
            os.close(src)

    @staticmethod
    def _capability(fd: int) -> bytes | None:
        try:
            return os.getxattr(fd, "security.capability")
        except OSError:
            return None

    def complete(self, node: Node, name: str, found: Found, *, data: bool = True) -> None:
        """Give `name`, which is in upper, its data if it is a metacopy.

        The modification time becomes now, as with the kernel.
        """
        if not self.markers.is_metacopy(found.st, node.upper_fd, name):
            return
        if data:
            source, base = self.stack.source(node, name, found)
            self._fill(source, base, node.upper_fd, name, found.st, keep_time=False)
        os.removexattr(place(node.upper_fd, name), self.markers.prefix + METACOPY, follow_symlinks=False)

    # --- making ---------------------------------------------------------------------------------------------------

    def make(self, node: Node, name: str, create: Callable[[int, str], R], *, directory: bool = False) -> R:
        """What `create(dir_fd, name)` gives, done for a name that does not show. EEXIST becomes "over the whiteout"."""
        self.copy_up_dir(node)
        try:
            return create(node.upper_fd, name)
        except FileExistsError:
            pass
        work = self.work.fd
        stage, inner = self._stage(node)
        temp = self.temp()
        try:
            made = create(work if inner is None else inner.fd, temp)
            if inner is not None:
                copyup.rename_at(inner.fd, os.fsencode(temp), work, os.fsencode(temp), NOREPLACE)
            if directory:
                self.markers.set_opaque(work, temp)
                copyup.rename_at(work, os.fsencode(temp), node.upper_fd, os.fsencode(name), EXCHANGE)
                self.sweep(temp)
            else:
                copyup.rename_at(work, os.fsencode(temp), node.upper_fd, os.fsencode(name))
        except BaseException:
            self.sweep(temp)
            raise
        finally:
            if stage:
                self.sweep(stage)
        return made

    def _stage(self, node: Node) -> tuple[str, Handle | None]:
        """A directory in work from which a new file inherits what it would from `node`; none if it inherits nothing.

        setgid and default ACLs act when a file is made, and over a whiteout it is made in work.
        """
        st = os.stat(".", dir_fd=node.upper_fd)
        try:
            acl = os.getxattr(place(node.upper_fd, "."), DEFAULT_ACL)
        except OSError as e:
            if e.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
            acl = b""
        if not (acl or st.st_mode & stat.S_ISGID):
            return "", None
        name = self.temp()
        os.mkdir(name, 0o700, dir_fd=self.work.fd)
        try:
            handle = Handle(os.open(name, DIRECTORY, dir_fd=self.work.fd))
            mine = os.stat(".", dir_fd=handle.fd)
            if (mine.st_uid, mine.st_gid) != (st.st_uid, st.st_gid):
                os.chown(".", st.st_uid, st.st_gid, dir_fd=handle.fd)
            os.chmod(place(self.work.fd, name), stat.S_IMODE(st.st_mode))
            if acl:
                os.setxattr(place(handle.fd, "."), DEFAULT_ACL, acl)
        except BaseException:
            self.sweep(name)
            raise
        return name, handle

    # --- removing -------------------------------------------------------------------------------------------------

    def whiteout(self, node: Node, name: str, *, over: Found | None) -> None:
        """Put a whiteout in place of `name`; `over` says what upper has there now."""
        if over is None:
            os.mknod(name, WHITEOUT_MODE, WHITEOUT_DEV, dir_fd=node.upper_fd)
            return
        temp = self.temp()
        flags = EXCHANGE if stat.S_ISDIR(over.st.st_mode) else 0
        try:
            os.mknod(temp, WHITEOUT_MODE, WHITEOUT_DEV, dir_fd=self.work.fd)
            copyup.rename_at(self.work.fd, os.fsencode(temp), node.upper_fd, os.fsencode(name), flags)
        except BaseException:
            self.sweep(temp)
            raise
        if flags:
            self.sweep(temp)

    def remove_dir(self, node: Node, name: str) -> None:
        """Remove a directory of upper that shows no names, though whiteouts may be in it."""
        try:
            os.rmdir(name, dir_fd=node.upper_fd)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self.discard(node, name)

    def discard(self, node: Node, name: str) -> None:
        """Remove directory `name` of upper with all that is in it: out of sight at once, gone in a while."""
        temp = self.temp()
        copyup.rename_at(node.upper_fd, os.fsencode(name), self.work.fd, os.fsencode(temp), NOREPLACE)
        self.sweep(temp)
