"""What a View says to every change: EROFS. What the kernel finds out before it asks whether it may write comes first."""

from __future__ import annotations

import errno
from typing import Protocol

from overlaykit.overlay.osnames import OsNames
from overlaykit.overlay.resolve import AnyPath, Last, Place, names_path
from overlaykit.overlay.stack import fail


class ReadOnly(OsNames, Protocol):
    """The changing methods of os, all refused."""

    def _walk(self, path: AnyPath, *, follow: bool = True, parent: bool = False, look: bool = True) -> Place: ...
    def _reach(self, path: AnyPath, *, follow: bool = True) -> Place: ...

    @names_path
    def _refuse_name(self, path: AnyPath) -> None:
        """A name that is there is EEXIST, any other EROFS."""
        place = self._walk(path, parent=True)
        raise fail(errno.EEXIST if place.last is not Last.NAME or place.found is not None else errno.EROFS)

    @names_path
    def _refuse_removal(self, path: AnyPath) -> None:
        self._walk(path, parent=True, look=False)
        raise fail(errno.EROFS)

    @names_path
    def _refuse_change(self, path: AnyPath, follow_symlinks: bool) -> None:
        self._reach(path, follow=follow_symlinks)
        raise fail(errno.EROFS)

    def mkdir(self, path: AnyPath, mode: int = 0o777) -> None:
        self._refuse_name(path)

    def mknod(self, path: AnyPath, mode: int = 0o600, device: int = 0) -> None:
        self._refuse_name(path)

    def mkfifo(self, path: AnyPath, mode: int = 0o666) -> None:
        self._refuse_name(path)

    def symlink(self, src: AnyPath, dst: AnyPath, target_is_directory: bool = False) -> None:
        self._refuse_name(dst)

    def link(self, src: AnyPath, dst: AnyPath, *, follow_symlinks: bool = False) -> None:
        self._reach(src, follow=follow_symlinks)
        self._refuse_name(dst)

    def unlink(self, path: AnyPath) -> None:
        self._refuse_removal(path)

    def remove(self, path: AnyPath) -> None:
        self.unlink(path)

    def rmdir(self, path: AnyPath) -> None:
        self._refuse_removal(path)

    def rename(self, src: AnyPath, dst: AnyPath, *, flags: int = 0) -> None:
        self._walk(src, parent=True, look=False)
        self._refuse_removal(dst)

    def replace(self, src: AnyPath, dst: AnyPath) -> None:
        self.rename(src, dst)

    def chmod(self, path: AnyPath, mode: int, *, follow_symlinks: bool = True) -> None:
        self._refuse_change(path, follow_symlinks)

    def lchmod(self, path: AnyPath, mode: int) -> None:
        self.chmod(path, mode, follow_symlinks=False)

    def chown(self, path: AnyPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        self._refuse_change(path, follow_symlinks)

    def lchown(self, path: AnyPath, uid: int, gid: int) -> None:
        self.chown(path, uid, gid, follow_symlinks=False)

    def utime(
        self,
        path: AnyPath,
        times: tuple[float, float] | None = None,
        *,
        ns: tuple[int, int] | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        self._refuse_change(path, follow_symlinks)

    def truncate(self, path: AnyPath, length: int) -> None:
        self._refuse_change(path, True)

    def setxattr(
        self, path: AnyPath, attribute: str | bytes, value: bytes, flags: int = 0, *, follow_symlinks: bool = True
    ) -> None:
        self._refuse_change(path, follow_symlinks)

    def removexattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> None:
        self._refuse_change(path, follow_symlinks)
