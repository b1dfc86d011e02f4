"""What overlayfs writes beside the content: whiteouts (char device 0:0, or an empty file with the xattr `whiteout`), and
the xattrs opaque, redirect and metacopy, under trusted.overlay. or user.overlay.

An overlay hides its own xattrs. One that is nested in it gets room by an escape: what it calls trusted.overlay.NAME is
trusted.overlay.overlay.NAME on disk. Follows fs/overlayfs/xattrs.c.
"""

from __future__ import annotations

import errno
import os
import stat

from overlaykit.tree.whiteout import ESCAPE, METACOPY, OPAQUE, REDIRECT, WHITEOUT, WhiteoutFormat

WHITEOUT_MODE = stat.S_IFCHR  # no permissions: nobody opens one
WHITEOUT_DEV = os.makedev(0, 0)
XATTR_NAME_MAX = 255


def is_whiteout_device(st: os.stat_result) -> bool:
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == WHITEOUT_DEV


def place(dir_fd: int, name: str) -> str:
    """`name` in directory fd `dir_fd` as a path, for the calls that know no *at form. A last symlink is the caller's."""
    return f"/proc/self/fd/{dir_fd}/{name}"


class Markers:
    """Reads and writes the marks of one overlay, which all use one prefix."""

    def __init__(self, form: WhiteoutFormat) -> None:
        self.form = form
        self.prefix = form.xattr_prefix
        self.own = os.fsencode(self.prefix)

    def get(self, dir_fd: int, name: str, mark: str) -> bytes | None:
        """The mark of `name` in `dir_fd`, None without one (or on a file system that has no xattrs)."""
        try:
            return os.getxattr(place(dir_fd, name), self.prefix + mark, follow_symlinks=False)
        except OSError as e:
            # EPERM: trusted.* of a file that an unprivileged reader may not ask about, as if it were not there
            if e.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
                return None
            raise

    def set(self, dir_fd: int, name: str, mark: str, value: bytes) -> None:
        os.setxattr(place(dir_fd, name), self.prefix + mark, value, follow_symlinks=False)

    def is_opaque(self, dir_fd: int) -> bool:
        """Whether directory `dir_fd` hides all lower names."""
        return self.get(dir_fd, ".", OPAQUE) == b"y"

    def has_xattr_whiteouts(self, dir_fd: int) -> bool:
        """Whether directory `dir_fd` says that some empty files in it are whiteouts."""
        return self.get(dir_fd, ".", OPAQUE) == b"x"

    def set_opaque(self, dir_fd: int, name: str) -> None:
        self.set(dir_fd, name, OPAQUE, b"y")

    def is_whiteout(self, st: os.stat_result, dir_fd: int, name: str) -> bool:
        """Whether `name`, which looks like `st`, stands for a name that is gone."""
        mode = st.st_mode
        if stat.S_ISREG(mode):
            return st.st_size == 0 and self.get(dir_fd, name, WHITEOUT) is not None
        return stat.S_ISCHR(mode) and st.st_rdev == WHITEOUT_DEV

    def redirect(self, dir_fd: int, name: str) -> str | None:
        """Where `name`'s lower part is: "/a/b" from the root, or the name of a sibling. None: under its own name."""
        value = self.get(dir_fd, name, REDIRECT)
        if not value:
            return None
        text = os.fsdecode(value)
        # The kernel ignores one that is no path at all (ovl_check_redirect): empty names, or a slash in a sibling's.
        if text[0] == "/" and ("//" in text or text.endswith("/")):
            return None
        if text[0] != "/" and "/" in text:
            return None
        return text

    def is_metacopy(self, st: os.stat_result, dir_fd: int, name: str) -> bool:
        """Whether file `name` has its data further down. Asks the file system only if there may be no data."""
        # The only blocks of a metacopy are those of its xattrs.
        if not stat.S_ISREG(st.st_mode) or st.st_size == 0 or st.st_blocks > 8:
            return False
        return self.get(dir_fd, name, METACOPY) is not None

    # --- xattrs as a user of the merged tree names them -----------------------------------------------------------

    def escape(self, name: str) -> str:
        """The name on disk of xattr `name`."""
        if name.startswith(self.prefix):
            name = self.prefix + ESCAPE + name.removeprefix(self.prefix)
            if len(os.fsencode(name)) > XATTR_NAME_MAX:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return name

    def visible(self, names: list[str]) -> list[str]:
        """The names on disk as a user sees them: the overlay's own gone, escaped ones plain."""
        out = []
        for name in names:
            if name.startswith(self.prefix):
                inner = name.removeprefix(self.prefix)
                if not inner.startswith(ESCAPE):
                    continue
                name = self.prefix + inner.removeprefix(ESCAPE)
            out.append(name)
        return out
