"""What the running system can do about overlays: tried, never guessed from a version number."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from overlaykit.overlay.mount import SYS_FSOPEN, call, libc, mount_new, mount_old, overlay_mount, unmount

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


@dataclass(frozen=True, slots=True)
class Features:
    """What works here, for this user.

    overlay         the kernel knows overlayfs
    mount           this process may mount one
    rootless_mount  it may in a user and mount namespace of its own
    new_api         through fsopen, and so with any number of long paths
    trusted_xattrs  marks can be trusted.overlay.*
    user_xattrs     marks can be user.overlay.*
    whiteouts       character devices 0:0 can be made
    reflink         copy-up shares data with the lower file
    fuse_overlayfs  path of the program, None without it
    """

    overlay: bool
    mount: bool
    rootless_mount: bool
    new_api: bool
    trusted_xattrs: bool
    user_xattrs: bool
    whiteouts: bool
    reflink: bool
    fuse_overlayfs: str | None


def probe(directory: str | os.PathLike[str] | None = None) -> Features:
    """The features, for layers in `directory` (the default temporary directory if None). Leaves nothing behind."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="overlaykit-probe-") as name:
        base = Path(name)
        for part in ("lower", "upper", "work", "merged"):
            (base / part).mkdir()
        return Features(
            overlay="overlay" in Path("/proc/filesystems").read_text().split(),
            mount=in_child(lambda: try_mount(base, userxattr=False), CLONE_NEWNS),
            rootless_mount=in_child(lambda: try_mount(base, userxattr=True), CLONE_NEWNS | CLONE_NEWUSER),
            new_api=in_child(lambda: try_new_api(base), CLONE_NEWNS | (0 if os.geteuid() == 0 else CLONE_NEWUSER)),
            trusted_xattrs=has_xattr(base, "trusted.overlay.opaque"),
            user_xattrs=has_xattr(base, "user.overlay.opaque"),
            whiteouts=makes_whiteouts(base),
            reflink=has_reflink(base),
            fuse_overlayfs=shutil.which("fuse-overlayfs"),
        )


def in_child(attempt: object, namespaces: int) -> bool:
    """Whether `attempt()` works in a child process with namespaces of its own, which take its mounts with them."""
    uid, gid = os.geteuid(), os.getegid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if libc().unshare(ctypes.c_int(namespaces)) == 0:
                if namespaces & CLONE_NEWUSER:
                    Path("/proc/self/setgroups").write_text("deny")
                    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
                    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
                mount_old("none", "/", None, 1 << 18 | 16384, "")  # private: nothing gets out
                assert callable(attempt)
                attempt()
                status = 0
        except BaseException:
            status = 1
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def try_mount(base: Path, *, userxattr: bool) -> None:
    what = overlay_mount([base / "lower"], base / "upper", base / "work", base / "merged", userxattr=userxattr)
    mount_old(what.source, what.target, "overlay", 0, ",".join(what.options))
    (base / "merged" / "file").write_text("x")
    unmount(what.target)


def try_new_api(base: Path) -> None:
    os.close(call(SYS_FSOPEN, b"overlay", 1))
    mount_new(overlay_mount([base / "lower", base / "upper"], None, None, base / "merged"))


def has_xattr(base: Path, name: str) -> bool:
    try:
        os.setxattr(base / "lower", name, b"n")
        os.removexattr(base / "lower", name)
    except OSError:
        return False
    return True


def makes_whiteouts(base: Path) -> bool:
    try:
        os.mknod(base / "whiteout", 0o020000, os.makedev(0, 0))
    except OSError:
        return False
    return True


def has_reflink(base: Path) -> bool:
    import fcntl

    (base / "a").write_bytes(b"x" * 4096)
    with (base / "a").open("rb") as a, (base / "b").open("wb") as b:
        try:
            fcntl.ioctl(b.fileno(), 0x40049409, a.fileno())  # FICLONE, linux/fs.h
        except OSError:
            return False
    return True
