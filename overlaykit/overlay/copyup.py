"""Copy-up: what is about to change moves from a lower into upper, its directories first, each in one atomic step.

Everything is made in work and renamed, so that upper never shows half of anything; work is cleared when the overlay is
opened again. A directory that gains a name by copy-up keeps its times, as with the kernel: nobody changed it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import TypeVar

from overlaykit._ext import copyup
from overlaykit.overlay.below import remove
from overlaykit.overlay.markers import WHITEOUT_DEV, WHITEOUT_MODE, place
from overlaykit.overlay.nodes import INDEX, UPPER, Found, Handle, Node
from overlaykit.overlay.origin import Origins
from overlaykit.overlay.stack import Stack, fail
from overlaykit.tree.whiteout import METACOPY

R = TypeVar("R")

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4  # renameat2(2)
DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DEFAULT_ACL = "system.posix_acl_default"


class Upper:
    """The writable side of an overlay: what may be done to upper, each step whole or not at all.

    The caller holds the overlay's lock.
    """

    def __init__(self, stack: Stack, work: Handle, origins: Origins, *, metacopy: bool, sync: bool) -> None:
        self.stack = stack
        self.markers = stack.markers
        self.origins = origins
        self.work = work
        self.metacopy = metacopy
        self.sync = copyup.SYNC if sync else 0
        self._count = 0

    def temp(self) -> str:
        """A name that is free in work."""
        self._count += 1
        return f"#{self._count:x}"

    def sweep(self, name: str) -> None:
        """Remove what is left in work under `name`. Failure is no error: the next opening tries again."""
        with contextlib.suppress(OSError):
            remove(self.work.fd, name)

    # --- copy-up --------------------------------------------------------------------------------------------------

    def copy_up_dir(self, node: Node) -> None:
        """Give directory `node` a place in upper; its parents first."""
        if node.dead:
            raise fail(errno.ENOENT)
        missing: list[Node] = []
        at: Node | None = node
        while at is not None and at.upper_fd < 0:
            missing.append(at)
            at = at.parent
        for each in reversed(missing):
            self._copy_up_dir(each)

    def _copy_up_dir(self, node: Node) -> None:
        """The same of a directory whose parent is there."""
        if node.parent is None:
            raise fail(errno.ENOENT)
        to = node.parent.upper_fd
        try:  # another thread's node may have been here
            fd = os.open(node.name, DIRECTORY, dir_fd=to)
        except FileNotFoundError:
            layer = node.lowers[0][0]
            source = self.stack.lower(node, layer)
            name = os.fsencode(node.name)
            temp = os.fsencode(self.temp())
            if record := self.origins.record(source.fd, b".", layer):
                self.origins.mark_impure(node.parent)
            copyup.copy_up(source.fd, b".", self.work.fd, temp, to, name, self.markers.own, copyup.KEEP_TIMES, record)
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
        layer = found.layer if found.layer != INDEX else self.stack.find_lower(node, name)
        lower, index = self.stack.lower(node, layer), self.stack.index
        record = self.origins.record(lower.fd, os.fsencode(name), layer)
        shared = found.layer == INDEX or found.st.st_nlink > 1
        if not shared or index is None:
            if record:
                self.origins.mark_impure(node)
            # Without an index a copy of one of several names is a file of its own, as with the kernel.
            self._copy(node, name, found, node.upper_fd, name, b"" if shared else record, data, attributes)
            return
        entry, below = record.hex(), found.st.st_nlink
        if found.layer == INDEX:
            below = os.stat(name, dir_fd=lower.fd, follow_symlinks=False).st_nlink
        else:
            self._copy(node, name, found, index.handle.fd, entry, record, data, attributes)
            index.begin(entry, below)
        self.origins.mark_impure(node)
        times = os.stat(".", dir_fd=node.upper_fd)
        index.link(entry, node.upper_fd, name, below)
        os.utime(".", ns=(times.st_atime_ns, times.st_mtime_ns), dir_fd=node.upper_fd)

    def _copy(
        self, node: Node, name: str, found: Found, to: int, base: str, record: bytes, data: bool, attributes: bool
    ) -> None:
        """Copy lower file `name` of `node` to `base` in directory fd `to`, with `record` as its origin."""
        what = copyup.KEEP_TIMES | self.sync
        lower = self.stack.lower(node, found.layer)
        own, source, temp = self.markers.own, os.fsencode(name), os.fsencode(self.temp())
        if stat.S_ISREG(found.st.st_mode):
            if not data:
                what = copyup.KEEP_TIMES | copyup.NO_DATA  # nothing to sync: the name comes with the file system's journal
            elif self.markers.is_metacopy(found.st, lower.fd, name):
                self._copy_in_two(node, name, found, to, base, record)
                return
            elif attributes and self.metacopy and found.st.st_size:
                what |= copyup.METACOPY
        copyup.copy_up(lower.fd, source, self.work.fd, temp, to, os.fsencode(base), own, what, record)

    def _copy_in_two(self, node: Node, name: str, found: Found, to: int, base: str, record: bytes) -> None:
        """Copy up a lower metacopy: attributes from there, data from where they are."""
        lower = self.stack.lower(node, found.layer)
        source, data = self.stack.source(node, name, found)
        work, half, temp = self.work.fd, os.fsencode(self.temp()), self.temp()
        what, made = copyup.NO_DATA, os.fsencode(temp)
        copyup.copy_up(lower.fd, os.fsencode(name), work, half, work, made, self.markers.own, what, record)
        try:
            self._fill(source, data, work, temp, found.st, keep_time=True)
            parent = os.stat(".", dir_fd=to)
            copyup.rename_at(work, made, to, os.fsencode(base), NOREPLACE)
            os.utime(".", ns=(parent.st_atime_ns, parent.st_mtime_ns), dir_fd=to)
        except BaseException:
            self.sweep(temp)
            raise

    def counted(self, node: Node, name: str, found: Found) -> tuple[Found, str]:
        """What `name` is in upper once its going away can be counted, and its entry in the index; "" if it has none.

        The count is with the copy: a lower file with several names comes up before one of them goes.
        """
        index = self.stack.index
        if index is None or stat.S_ISDIR(found.st.st_mode):
            return found, ""
        if found.layer == INDEX or (found.layer != UPPER and found.st.st_nlink > 1):
            self.copy_up(node, name, found, attributes=True)
            found = Found(os.stat(name, dir_fd=node.upper_fd, follow_symlinks=False), UPPER)
        return found, index.entry_of(found.st, node.upper_fd, name) if found.layer == UPPER else ""

    def lost_name(self, entry: str) -> None:
        """A name of upper went away, which had this entry in the index ("": none)."""
        self.origins.forget()
        if self.stack.index is not None:
            self.stack.index.lost_name(entry)

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
