"""Overlay: a View that can be written to. Every change goes to upper; the lowers stay as they are.

Errors are those of a kernel mount of the same directories, number by number. Names that upper alone knows are changed
with one system call, the one that the same change would cost in any directory.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Sequence
from os import unlink as os_unlink
from typing import TypeVar

from overlaykit._ext.opening import open_known
from overlaykit.errors import Unsupported
from overlaykit.overlay import rename as renaming
from overlaykit.overlay.attributes import Attributes
from overlaykit.overlay.copyup import Upper
from overlaykit.overlay.index import Index
from overlaykit.overlay.markers import WHITEOUT_DEV, Markers, is_whiteout_device
from overlaykit.overlay.mount import Mount, mount, mount_fuse, overlay_mount
from overlaykit.overlay.nodes import INDEX, UPPER, Found, Node
from overlaykit.overlay.origin import Origins
from overlaykit.overlay.resolve import AnyPath, Last, Place, Raced, names_path
from overlaykit.overlay.stack import Stack, fail
from overlaykit.overlay.view import WRITES, open_layers
from overlaykit.overlay.workdir import check_apart, open_work, probe_format
from overlaykit.tree.table import StrPath, Tree
from overlaykit.tree.whiteout import WhiteoutFormat

R = TypeVar("R")

CREATE, EXCLUSIVE, CLOSE = os.O_CREAT, os.O_EXCL, os.O_CLOEXEC
LOG = CREATE | os.O_APPEND  # mostly it is there already
NEW_FILE = os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
WRITING = os.O_WRONLY | os.O_RDWR
CHANGING = CREATE | WRITING
NO_FILE = os.O_PATH | os.O_DIRECTORY | os.O_TMPFILE


class Overlay(Attributes):
    """The merged tree of `lowers` (bottom first) and `upper`, which takes every change.

    upper, work   directories on one file system; work is locked: InUse for a second writer
    userxattr     marks in user.overlay.* (True), trusted.overlay.* (False), or as the process may (None)
    redirect_dir  directories that a lower has may be renamed; else that is EXDEV
    metacopy      changing only attributes of a lower file copies no data
    index         names of one lower file go on being names of one file; else each breaks away when it is changed
    volatile      nothing is synced; an upper that was so used is refused afterwards
    trees, data   as in View

    Any number of threads may use one Overlay.
    """

    def __init__(
        self,
        lowers: Sequence[StrPath],
        upper: StrPath,
        work: StrPath,
        *,
        userxattr: bool | None = None,
        redirect_dir: bool = False,
        metacopy: bool = False,
        index: bool = False,
        volatile: bool = False,
        trees: Sequence[Tree | None] | None = None,
        data: Sequence[StrPath] = (),
    ) -> None:
        if not lowers:
            raise ValueError("an overlay needs at least one lower directory")
        if isinstance(lowers, str | bytes):
            raise TypeError(f"lowers are a list of directories, and not one: {lowers!r}")
        check_apart([*lowers, *data], upper, work)
        upper_handle, inner, lock = open_work(upper, work, volatile=volatile)
        if userxattr is None:
            form = probe_format(inner)
        else:
            form = WhiteoutFormat.USERXATTR if userxattr else WhiteoutFormat.OVERLAY
        if form is WhiteoutFormat.USERXATTR and (redirect_dir or metacopy):
            raise Unsupported("redirect_dir and metacopy need trusted xattrs", hint="the kernel refuses them as well")
        markers = Markers(form)
        stack = Stack(
            open_layers(lowers, trees, markers), markers, upper=upper_handle, data=open_layers(data, None, markers)
        )
        self._setup(stack)
        self._lock = threading.Lock()
        self._work_lock = lock
        origins = Origins([layer.root for layer in stack.layers], markers)
        if index:
            stack.index = Index(lock, upper_handle, origins, work)
        self._upper: Upper = Upper(stack, inner, origins, metacopy=metacopy, sync=not volatile)
        self._privileged = os.geteuid() == 0
        self.redirect_dir = redirect_dir or metacopy  # the kernel couples them too: a metacopy that moves needs one
        self._directories = (
            [os.path.abspath(lower) for lower in lowers], os.path.abspath(upper), os.path.abspath(work),
            [os.path.abspath(layer) for layer in data],
        )  # fmt: skip
        self._metacopy, self._index, self._volatile = metacopy, index, volatile

    def close(self) -> None:
        """Let go of all directories and of the lock on work. Closing twice is no error."""
        with self._lock:
            if not self._closed:
                super().close()
                del self._work_lock, self._upper

    def _what(self) -> str:
        return f"{self._directories[1]} {super()._what()}"

    def mount_spec(self, target: StrPath = "") -> Mount:
        """The mount that shows the kernel's view of the same directories."""
        lowers, upper, work, data = self._directories
        return overlay_mount(
            lowers, upper, work, target, data=data, userxattr=self._markers.form is WhiteoutFormat.USERXATTR,
            redirect_dir=self.redirect_dir, metacopy=self._metacopy, index=self._index, volatile=self._volatile,
        )  # fmt: skip

    def mount(self, target: StrPath) -> Mount:
        """Hand the directories to the kernel, which shows the merged tree at `target`; this Overlay is closed first.

        Where the kernel refuses for want of rights, an installed fuse-overlayfs is tried. OSError with the kernel's words.
        """
        what = self.mount_spec(target)
        self.close()
        try:
            return mount(what)
        except PermissionError as refusal:
            try:
                return mount_fuse(what)
            except Unsupported as e:
                raise refusal from e

    # --- numbers --------------------------------------------------------------------------------------------------

    def _shown(self, place: Place) -> os.stat_result:
        found, node, name = place.found, place.node, place.name
        assert found is not None
        if found.layer == UPPER and name != ".":
            return self._numbered(found.st, node, name)
        if found.layer == UPPER and node.parent is not None:
            return self._numbered(found.st, node.parent, node.name)
        if found.layer == INDEX:
            assert self._stack.index is not None
            return self._stack.index.shown(found.st, self._stack.index.handle.fd, found.entry)
        return found.st

    def _numbered(self, st: os.stat_result, node: Node, name: str) -> os.stat_result:
        if node.impure is None:
            with self._lock:
                self._upper.origins.is_impure(node)
        if not node.impure:
            return st
        if self._stack.index is not None and st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            return self._stack.index.shown(st, node.upper_fd, name)
        return self._upper.origins.shown(st, node.upper_fd, name)

    # --- rights ---------------------------------------------------------------------------------------------------
    #
    # What upper has, the file system guards itself. A directory that only a lower has would be copied up before anyone
    # asked, so for it the question comes first.

    def _may_change(self, node: Node) -> None:
        """EACCES unless the caller may make and remove names in `node`."""
        if self._privileged or node.upper_fd >= 0 or not node.lowers:
            return
        handle = self._stack.lower(node, node.lowers[0][0])
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=handle.fd, effective_ids=True):
            raise fail(errno.EACCES)

    def _may_remove(self, place: Place) -> None:
        """EACCES or EPERM unless the caller may take the name at `place` away."""
        if self._privileged or place.found is None:
            return
        self._may_change(place.node)
        st = self._stack.find_self(place.node).st
        if st.st_mode & stat.S_ISVTX and os.geteuid() not in (st.st_uid, place.found.st.st_uid):
            raise fail(errno.EPERM)

    def _accepts_writes(self, found: Found) -> bool:
        return True

    # --- making names ---------------------------------------------------------------------------------------------

    def _make(self, path: AnyPath, create: Callable[[int, str], R], *, directory: bool = False, refused: bool = False) -> R:
        with self._lock:
            place = self._walk(path, parent=True)
            if place.last is not Last.NAME or place.found is not None:
                raise fail(errno.EEXIST)
            if place.slash and not directory:
                raise fail(errno.ENOENT)
            if place.node.dead:
                raise fail(errno.ENOENT)
            self._may_change(place.node)
            if refused:
                raise fail(errno.EPERM)
            return self._upper.make(place.node, place.name, create, directory=directory)

    @names_path
    def mkdir(self, path: AnyPath, mode: int = 0o777) -> None:
        """os.mkdir."""
        self._make(path, lambda fd, name: os.mkdir(name, mode, dir_fd=fd), directory=True)

    @names_path
    def mknod(self, path: AnyPath, mode: int = 0o600, device: int = 0) -> None:
        """os.mknod. A character device 0:0 would be a whiteout: EPERM."""
        refused = stat.S_ISCHR(mode) and device == WHITEOUT_DEV
        self._make(path, lambda fd, name: os.mknod(name, mode, device, dir_fd=fd), refused=refused)

    @names_path
    def mkfifo(self, path: AnyPath, mode: int = 0o666) -> None:
        """os.mkfifo."""
        self._make(path, lambda fd, name: os.mkfifo(name, mode, dir_fd=fd))

    def symlink(self, src: AnyPath, dst: AnyPath, target_is_directory: bool = False) -> None:
        """os.symlink: `dst` points to `src`, whatever that is."""
        target = os.fsdecode(src)
        try:
            if not target:
                raise fail(errno.ENOENT)
            self._make(dst, lambda fd, name: os.symlink(target, name, dir_fd=fd))
        except OSError as e:
            e.filename, e.filename2 = os.fspath(src), os.fspath(dst)
            raise

    def link(self, src: AnyPath, dst: AnyPath, *, follow_symlinks: bool = False) -> None:
        """os.link: `dst` is another name of `src`, which is copied up. A symlink is linked itself, as by link(2)."""
        try:
            with self._lock:
                old = self._reach(src, follow=follow_symlinks)
                new = self._walk(dst, parent=True)
                if new.last is not Last.NAME or new.found is not None:
                    raise fail(errno.EEXIST)
                if new.slash or new.node.dead:
                    raise fail(errno.ENOENT)
                self._may_change(new.node)
                if old.is_dir:
                    raise fail(errno.EPERM)
                handle, base = self._lift(old, attributes=True)
                renaming.set_data_redirect(self, old, samedir=False)
                self._upper.copy_up_dir(new.node)
                self._upper.origins.moves(handle.fd, base, new.node)
                self._upper.make(
                    new.node, new.name,
                    lambda fd, name: os.link(base, name, src_dir_fd=handle.fd, dst_dir_fd=fd, follow_symlinks=False),
                )  # fmt: skip
        except OSError as e:
            e.filename, e.filename2 = os.fspath(src), os.fspath(dst)
            raise

    @names_path
    def link_fd(self, path: AnyPath, fd: int) -> None:
        """linkat(2) of a file that has no name yet: one opened with O_TMPFILE in this overlay, by its descriptor."""
        self._make(path, lambda to, name: os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=to))

    # --- opening --------------------------------------------------------------------------------------------------

    def open_fd(self, path: AnyPath, flags: int, mode: int = 0o777) -> int:
        """os.open: a descriptor of the real file. Opening for writing copies up first; with O_TRUNC, no data.

        One that was opened read-only before a copy-up goes on reading the lower file, as on kernels before 4.19.
        """
        if flags & CHANGING and not flags & NO_FILE and type(path) is str:
            # The short ways: make what no lower has, open what upper has. If anything is odd, take the long way.
            fd, own = -1, self._markers.own
            if flags & LOG == CREATE:
                with self._lock:
                    fd = open_known(self._known, path, flags | NEW_FILE, mode, own)
            if fd < 0 and flags & WRITING and not flags & EXCLUSIVE:
                # No lock: no name changes, and to open a FIFO may take forever.
                fd = open_known(self._known, path, flags | CLOSE, mode, own)
            if fd >= 0:
                return fd
        return self._open(path, flags, mode)

    def _create(self, place: Place, flags: int, mode: int) -> int:
        with self._lock:
            found = self._stack.find(place.node, place.name)
            if found is None:
                if place.node.dead:
                    raise fail(errno.ENOENT)
                self._may_change(place.node)
                return self._upper.make(
                    place.node, place.name, lambda fd, name: os.open(name, flags | NEW_FILE, mode, dir_fd=fd)
                )
        if flags & os.O_EXCL:
            raise fail(errno.EEXIST)
        return self._open_found(place._replace(found=found), flags & ~os.O_CREAT)

    def _create_unnamed(self, place: Place, flags: int, mode: int) -> int:
        node = self._resolver.directory(place) if place.is_dir else place.node
        if not place.is_dir:
            raise fail(errno.ENOTDIR)
        with self._lock:
            self._may_change(node)
            self._upper.copy_up_dir(node)
            return os.open(".", flags, mode, dir_fd=node.upper_fd)

    def _open_found(self, place: Place, flags: int) -> int:
        found = place.found
        assert found is not None
        if not stat.S_ISREG(found.st.st_mode) or not flags & WRITES or flags & os.O_PATH:
            return super()._open_found(place, flags)
        access = {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK}.get(flags & os.O_ACCMODE, os.R_OK | os.W_OK)
        with self._lock:
            found = self._stack.find(place.node, place.name)
            if found is None:
                raise Raced
            place = place._replace(found=found)
            self._allows(place, access | (os.W_OK if flags & os.O_TRUNC else 0))
            data = not flags & os.O_TRUNC
            self._upper.copy_up(place.node, place.name, found, data=data)
            if found.layer < 0:
                self._upper.complete(place.node, place.name, found, data=data)
            found = self._stack.find(place.node, place.name)
            assert place.node.upper is not None
            if found is None:
                raise Raced
        return self._open_real(place._replace(found=found), place.node.upper, place.name, flags)

    # --- removing names -------------------------------------------------------------------------------------------

    def unlink(self, path: AnyPath) -> None:
        """os.unlink. A name that a lower gives leaves a whiteout."""
        if type(path) is str and not self._resolver.known_by_links and self._stack.index is None:
            head, _, name = path.rpartition("/")
            node = self._known.get(head)
            if node is not None and node.foreign is False and (names := node.names) is not None and name not in names:
                # No lock: it is one system call, on a name whose removal leaves nothing to do.
                try:
                    os_unlink(name, dir_fd=node.upper_fd)
                except OSError:
                    pass
                else:
                    if node.impure is not False:
                        self._upper.origins.forget()
                    return None
        return self._unlink(path)

    remove = unlink

    @names_path
    def _unlink(self, path: AnyPath) -> None:
        with self._lock:
            place = self._walk(path, parent=True)
            found, node, name = place.found, place.node, place.name
            if place.last is not Last.NAME:
                raise fail(errno.EISDIR)
            if found is None:
                raise fail(errno.ENOENT)
            if place.slash:
                raise fail(errno.EISDIR if place.is_dir else errno.ENOTDIR)
            self._may_remove(place)
            if place.is_dir:
                raise fail(errno.EISDIR)
            covers = self._stack.find_lower(node, name) >= 0
            self._upper.copy_up_dir(node)
            found, entry = self._upper.counted(node, name, found)
            if covers:
                self._upper.whiteout(node, name, over=found if found.layer == UPPER else None)
            else:
                os.unlink(name, dir_fd=node.upper_fd)
                if node.foreign is None:
                    node.foreign = self._has_foreign(node)
            self._upper.lost_name(entry)
            if stat.S_ISLNK(found.st.st_mode):
                self._resolver.forget_links()

    def _has_foreign(self, node: Node) -> bool:
        """Whether upper has names in `node` that no lower has and that are not what they look like: whiteouts, which are
        not there to be removed, and directories with lower parts from elsewhere, which look empty.

        We leave no such whiteouts, and say so when we move such a directory: one look is enough.
        """
        names = self._stack.lower_names(node)
        with os.scandir(f"/proc/self/fd/{node.upper_fd}") as entries:
            for entry in entries:
                if entry.is_symlink() or entry.name in names:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if self._markers.redirect(node.upper_fd, entry.name):
                        return True
                    continue
                st = entry.stat(follow_symlinks=False) if not entry.is_file(follow_symlinks=False) else None
                if st is not None and is_whiteout_device(st):
                    return True
        return self._markers.has_xattr_whiteouts(node.upper_fd)

    @names_path
    def rmdir(self, path: AnyPath) -> None:
        """os.rmdir: of a directory that shows no names, whatever whiteouts are in it."""
        with self._lock:
            place = self._walk(path, parent=True)
            found, node, name = place.found, place.node, place.name
            if place.last is not Last.NAME:
                raise fail({Last.DOT: errno.EINVAL, Last.DOTDOT: errno.ENOTEMPTY}.get(place.last, errno.EBUSY))
            if found is None:
                raise fail(errno.ENOENT)
            self._may_remove(place)
            if not place.is_dir:
                raise fail(errno.ENOTDIR)
            kid = self._stack.child(node, name)
            if self._listing(kid):
                raise fail(errno.ENOTEMPTY)
            covers = self._stack.find_lower(node, name) >= 0
            self._upper.copy_up_dir(node)
            if covers:
                self._upper.whiteout(node, name, over=found if found.layer == UPPER else None)
            else:
                self._upper.remove_dir(node, name)
            self._upper.lost_name("")
            kid.die()
            node.children.pop(name, None)

    def rmtree(self, path: AnyPath, ignore_errors: bool = False) -> None:
        """shutil.rmtree. For root a tree goes in one step, seen by others whole or not at all, whatever its size: but not
        with an index, which counts name by name."""
        if not self._privileged or self._stack.index is not None:
            super().rmtree(path, ignore_errors)
            return
        try:
            self._rmtree(path)
        except OSError:
            if not ignore_errors:
                raise

    @names_path
    def _rmtree(self, path: AnyPath) -> None:
        with self._lock:
            place = self._walk(path, follow=False)
            if place.found is None:
                raise fail(errno.ENOENT)
            if not place.is_dir:
                raise fail(errno.ENOTDIR)
            if place.last is not Last.NAME:
                raise fail(errno.EBUSY)
            node, name = place.node, place.name
            covers = self._stack.find_lower(node, name) >= 0
            self._upper.copy_up_dir(node)
            if covers:
                self._upper.whiteout(node, name, over=place.found if place.found.layer == UPPER else None)
            else:
                self._upper.discard(node, name)
            self._upper.lost_name("")
            kid = node.children.pop(name, None)
            if kid is not None:
                kid.die()
            self._resolver.forget_links()

    # --- moving names ---------------------------------------------------------------------------------------------

    def rename(self, src: AnyPath, dst: AnyPath, *, flags: int = 0) -> None:
        """os.rename; flags: NOREPLACE (1) or EXCHANGE (2) of renameat2(2)."""
        try:
            with self._lock:
                if flags or not renaming.rename_own(self, src, dst):
                    renaming.rename(self, src, dst, flags)
        except OSError as e:
            e.filename, e.filename2 = os.fspath(src), os.fspath(dst)
            raise

    def replace(self, src: AnyPath, dst: AnyPath) -> None:
        """os.replace."""
        self.rename(src, dst)
