"""Changing what is there: modes, owners, times, sizes and xattrs of a writable overlay. All of it copies up first."""

from __future__ import annotations

import errno
import os
import stat
import threading

from overlaykit.overlay.copyup import DEFAULT_ACL, Upper
from overlaykit.overlay.markers import place
from overlaykit.overlay.nodes import INDEX, UPPER, Handle
from overlaykit.overlay.resolve import AnyPath, Place, names_path
from overlaykit.overlay.stack import fail
from overlaykit.overlay.view import View

ACLS = (DEFAULT_ACL, "system.posix_acl_access")
ACL_VERSION = b"\2\0\0\0"  # what every list begins with (linux/posix_acl_xattr.h)


class Attributes(View):
    """The methods of Overlay that change an inode and no name."""

    _upper: Upper
    _lock: threading.Lock
    _privileged: bool

    def _lift(self, at: Place, *, data: bool = True, attributes: bool = False) -> tuple[Handle, str]:
        """Copy up what `at` is; gives its directory in upper and its name there. Under the lock."""
        node, name, found = at.node, at.name, at.found
        assert found is not None
        if name == ".":
            self._upper.copy_up_dir(node)
        elif found.layer != UPPER:
            if stat.S_ISDIR(found.st.st_mode):
                self._upper.copy_up_dir(self._stack.child(node, name))
            else:
                self._upper.copy_up(node, name, found, data=data, attributes=attributes)
                if found.layer == INDEX and not attributes:
                    self._upper.complete(node, name, found, data=data)
        assert node.upper is not None
        return node.upper, name

    def _allows(self, at: Place, mode: int) -> None:
        """EACCES unless the caller may `mode` what a lower layer has: a copy-up must not find that out halfway."""
        if self._privileged or at.found is None or at.found.layer < 0:
            return
        handle, name = self._real(at)
        if not os.access(name, mode, dir_fd=handle.fd, effective_ids=True, follow_symlinks=False):
            raise fail(errno.EACCES)

    def _is_owner(self, at: Place) -> None:
        """EPERM unless the caller owns what is there."""
        assert at.found is not None
        if not self._privileged and at.found.st.st_uid != os.geteuid():
            raise fail(errno.EPERM)

    @names_path
    def chmod(self, path: AnyPath, mode: int, *, follow_symlinks: bool = True) -> None:
        """os.chmod. A symlink has no mode of its own: EOPNOTSUPP."""
        with self._lock:
            at = self._reach(path, follow=follow_symlinks)
            assert at.found is not None
            if stat.S_ISLNK(at.found.st.st_mode):
                raise fail(errno.EOPNOTSUPP)
            self._is_owner(at)
            handle, name = self._lift(at, attributes=True)
            # By descriptor, since chmod knows no way not to follow a symlink that came in between.
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle.fd)
            try:
                os.chmod(f"/proc/self/fd/{fd}", mode)
            finally:
                os.close(fd)
            self._rights_changed()

    def lchmod(self, path: AnyPath, mode: int) -> None:
        """os.lchmod: as chmod, for a symlink EOPNOTSUPP, since Linux gives it no mode."""
        self.chmod(path, mode, follow_symlinks=False)

    @names_path
    def chown(self, path: AnyPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """os.chown; -1 keeps what is there."""
        with self._lock:
            at = self._reach(path, follow=follow_symlinks)
            self._is_owner(at)
            handle, name = self._lift(at, attributes=True)
            os.chown(name, uid, gid, dir_fd=handle.fd, follow_symlinks=False)
            self._rights_changed()

    def lchown(self, path: AnyPath, uid: int, gid: int) -> None:
        """os.lchown: of a symlink itself."""
        self.chown(path, uid, gid, follow_symlinks=False)

    @names_path
    def utime(
        self,
        path: AnyPath,
        times: tuple[float, float] | None = None,
        *,
        ns: tuple[int, int] | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        """os.utime, in seconds or nanoseconds; without either: now."""
        if times is not None and ns is not None:
            raise ValueError("utime: you may specify either 'times' or 'ns' but not both")
        with self._lock:
            at = self._reach(path, follow=follow_symlinks)
            if times is None and ns is None:
                self._allows(at, os.W_OK)
            else:
                self._is_owner(at)
            handle, name = self._lift(at, attributes=True)
            if ns is not None:
                os.utime(name, ns=ns, dir_fd=handle.fd, follow_symlinks=False)
            else:
                os.utime(name, times, dir_fd=handle.fd, follow_symlinks=False)

    @names_path
    def truncate(self, path: AnyPath, length: int) -> None:
        """os.truncate. To nothing, no data is copied up."""
        if length < 0:
            raise fail(errno.EINVAL)
        with self._lock:
            at = self._reach(path)
            assert at.found is not None
            if stat.S_ISDIR(at.found.st.st_mode):
                raise fail(errno.EISDIR)
            if not stat.S_ISREG(at.found.st.st_mode):
                raise fail(errno.EINVAL)
            self._allows(at, os.W_OK)
            handle, name = self._lift(at, data=length > 0)
            if at.found.layer == UPPER:
                self._upper.complete(at.node, name, at.found, data=length > 0)
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle.fd)
            try:
                os.truncate(f"/proc/self/fd/{fd}", length)  # not ftruncate, which sets the time even if nothing changes
                if length == 0 and at.found.st.st_size and at.found.layer >= 0:
                    os.utime(f"/proc/self/fd/{fd}")  # no data came up, so the file system saw nothing go
            finally:
                os.close(fd)

    @names_path
    def setxattr(
        self,
        path: AnyPath,
        attribute: str | bytes,
        value: bytes | bytearray | memoryview,
        flags: int = 0,
        *,
        follow_symlinks: bool = True,
    ) -> None:
        """os.setxattr. A name of the overlay's own is escaped, so that overlays nest."""
        value = bytes(memoryview(value))  # TypeError for what has no bytes, before anything is copied up
        with self._lock:
            at = self._reach(path, follow=follow_symlinks)
            attribute = self._markers.escape(os.fsdecode(attribute))
            self._may_have(at, attribute, value)
            if attribute.startswith("user."):
                self._allows(at, os.W_OK)
            handle, name = self._lift_for_xattrs(at)
            os.setxattr(place(handle.fd, name), attribute, value, flags, follow_symlinks=False)
            self._rights_changed()

    def _lift_for_xattrs(self, at: Place) -> tuple[Handle, str]:
        """As _lift. A file that came up under another name does not get this one: the kernel changes the inode as it is."""
        assert at.found is not None
        return self._real(at) if at.found.layer == INDEX else self._lift(at, attributes=True)

    @staticmethod
    def _may_have(at: Place, attribute: str, value: bytes | None) -> None:
        """Refuse, before anything is copied up, what no file of that kind can have (value: None to take it away)."""
        assert at.found is not None
        mode = at.found.st.st_mode
        if attribute.startswith("user.") and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise fail(errno.EPERM)
        if attribute in ACLS and stat.S_ISLNK(mode):
            raise fail(errno.EOPNOTSUPP)
        # An empty one is nothing to refuse; one that is none is for the file system to say.
        is_list = value is not None and value.startswith(ACL_VERSION) and len(value) > len(ACL_VERSION)
        if attribute == DEFAULT_ACL and is_list and not stat.S_ISDIR(mode):
            raise fail(errno.EACCES)

    @names_path
    def removexattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> None:
        """os.removexattr; ENODATA, and no copy-up, if there is none."""
        with self._lock:
            at = self._reach(path, follow=follow_symlinks)
            assert at.found is not None
            attribute = self._markers.escape(os.fsdecode(attribute))
            if at.found.layer != UPPER:
                self._may_have(at, attribute, None)
                handle, name = self._real(at)
                os.getxattr(place(handle.fd, name), attribute, follow_symlinks=False)
            handle, name = self._lift_for_xattrs(at)
            os.removexattr(place(handle.fd, name), attribute, follow_symlinks=False)
            self._rights_changed()

    def _rights_changed(self) -> None:
        """Who may pass a directory may have changed; root passes all, so only others forget their short cuts."""
        if not self._privileged:
            self._resolver.forget()
