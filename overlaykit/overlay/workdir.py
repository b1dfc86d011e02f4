"""The work directory: one writer per upper, and nothing left over from the one before.

Its layout is the kernel's: temporaries in work/work, so that an overlay mount clears ours and we clear its.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from overlaykit.errors import InUse, Unsupported
from overlaykit.overlay.below import remove
from overlaykit.overlay.markers import place
from overlaykit.overlay.nodes import Handle
from overlaykit.tree.table import StrPath
from overlaykit.tree.whiteout import WhiteoutFormat

VOLATILE = "incompat/volatile"  # overlayfs.rst, "Volatile mount": an upper that may have lost writes


def check_apart(lowers: Sequence[StrPath], upper: StrPath, work: StrPath) -> None:
    """Unsupported if upper or work lies in a lower, or a lower in one of them: the kernel refuses that too (ELOOP).

    What is written to upper would change a lower, and lowers must not change.
    """
    ours = [("upper", upper, os.path.realpath(upper) + "/"), ("work", work, os.path.realpath(work) + "/")]
    for lower in lowers:
        below = os.path.realpath(lower) + "/"
        for what, directory, above in ours:
            if below.startswith(above) or above.startswith(below):
                raise Unsupported(f"{what} {directory} and lower {lower}: one must not be in the other")


def check_together(upper: StrPath, work: StrPath) -> None:
    """Unsupported if one is in the other, or they are on different file systems: the kernel refuses that too (EINVAL)."""
    a, b = Path(upper).resolve(), Path(work).resolve()
    if a == b or a in b.parents or b in a.parents:
        raise Unsupported(f"upper {upper} and work {work}: one must not be in the other")
    if os.stat(upper).st_dev != os.stat(work).st_dev:
        raise Unsupported(
            f"upper {upper} and work {work} are on different file systems",
            hint="choose a work directory beside upper: what is made there is renamed into it",
        )


def open_work(upper: StrPath, work: StrPath, *, volatile: bool) -> tuple[Handle, Handle, Handle]:
    """Directory handles of upper, of work/work, and the lock that goes with the last reference to it.

    InUse if somebody else writes to this upper; Unsupported if the two directories do not fit together.
    """
    flags = os.O_DIRECTORY | os.O_CLOEXEC
    upper_handle = Handle(os.open(upper, flags | os.O_PATH))
    lock = Handle(os.open(work, flags | os.O_RDONLY))
    check_together(upper, work)
    if strangers := sorted(set(os.listdir(lock.fd)) - {"work", "index"}):
        raise Unsupported(
            f"work {work} is not empty: it has {strangers[0]!r}",
            hint="choose an empty directory, or the one that this upper was used with before",
        )
    try:
        fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InUse(f"upper {upper} has a writer: {work} is locked", hint="close the other overlay first") from e
    try:
        os.mkdir("work", 0o700, dir_fd=lock.fd)
    except FileExistsError:
        if stat.S_IMODE(os.stat("work", dir_fd=lock.fd, follow_symlinks=False).st_mode) & 0o700 != 0o700:
            # the kernel makes it without any rights, which only root gets past
            os.chmod(place(lock.fd, "work"), 0o700)
    inner = Handle(os.open("work", flags | os.O_NOFOLLOW | os.O_RDONLY, dir_fd=lock.fd))
    if os.path.lexists(place(inner.fd, VOLATILE)):
        raise Unsupported(
            f"{work}: upper was last used as a volatile overlay and may have lost writes",
            hint=f"if you trust {upper}, remove {work}/work/{VOLATILE}",
        )
    clear(inner)
    if volatile:
        os.makedirs(place(inner.fd, VOLATILE), 0o700)
    return upper_handle, inner, lock


def clear(inner: Handle) -> None:
    """Remove what an overlay that was killed left behind."""
    for name in os.listdir(inner.fd):
        remove(inner.fd, name)


def probe_format(inner: Handle) -> WhiteoutFormat:
    """OVERLAY if the process may write trusted xattrs here, else USERXATTR."""
    name = "#probe"
    os.mkdir(name, 0o700, dir_fd=inner.fd)
    try:
        os.setxattr(place(inner.fd, name), "trusted.overlay.opaque", b"n")
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        return WhiteoutFormat.USERXATTR
    else:
        return WhiteoutFormat.OVERLAY
    finally:
        os.rmdir(name, dir_fd=inner.fd)
