"""Running a piece of a test without root's rights, wherever the tests themselves run."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import stat
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import overlaykit
from overlaykit.overlay.mount import MS_BIND, libc, mount_old

SOMEBODY = 1000  # user and group id
PR_SET_DUMPABLE = 4  # prctl(2)
CLONE_NEWNS, MS_PRIVATE_REC = 0x20000, (1 << 18) | (1 << 14)  # linux/sched.h, linux/mount.h
CLONE_NEWUSER = 0x10000000
OTHERS, SOME_IDS = 100_000, 65_536  # the ids that a user has besides his own, as /etc/subuid gives them

# What the library imports from elsewhere only once it needs it.
IMPORTED_LATE = [
    "bz2",
    "difflib",
    "fcntl",
    "hashlib",
    "importlib.metadata",
    "isal.igzip_lib",
    "isal.isal_zlib",
    "json",
    "logging",
    "lzma",
    "msgspec",
    "resource",
    "tarfile",
    "tempfile",
    "zlib",
    "zstandard",
]

NEVER_IMPORTED = {
    "overlaykit.__main__",
    "overlaykit.bench.report",  # with matplotlib, whose C++ exceptions end a process into which ASan was preloaded
}


def import_everything() -> None:
    """As root, what an ordinary user's piece will import: he may not be allowed to read where it is installed."""
    for module in pkgutil.walk_packages(overlaykit.__path__, "overlaykit."):
        if module.name not in NEVER_IMPORTED:
            import_module(module.name)
    for name in IMPORTED_LATE:
        import_module(name)


@contextlib.contextmanager
def somebody(*directories: Path) -> Iterator[None]:
    """Everything within is done as an ordinary user, to whom `directories` belong. Nothing changes if that is so already."""
    if os.geteuid() != 0:
        yield
        return
    import_everything()
    for directory in directories:
        os.chown(directory, SOMEBODY, SOMEBODY)
        for above in directory.resolve().parents:
            if above.stat().st_mode & 0o5 != 0o5 and above.stat().st_uid == 0:
                above.chmod(above.stat().st_mode | 0o011)  # pytest keeps its folders to itself
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(SOMEBODY)
    os.seteuid(SOMEBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def as_somebody(work: Callable[[], int], *, fuse: Path | None = None, fuse_mode: int = 0o666) -> int:
    """What `work()` gives in a child process that is an ordinary user for good.

    fuse: a new file that is /dev/fuse to it, for everybody to open as on most machines; this one's stays as it is.
    """
    import_everything()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            if fuse is not None:
                libc().unshare(CLONE_NEWNS)
                mount_old("none", "/", None, MS_PRIVATE_REC, "")
                os.mknod(fuse, stat.S_IFCHR, os.makedev(10, 229))
                fuse.chmod(fuse_mode)
                mount_old(str(fuse), "/dev/fuse", None, MS_BIND, "")
            os.setgroups([])
            os.setresgid(SOMEBODY, SOMEBODY, SOMEBODY)
            os.setresuid(SOMEBODY, SOMEBODY, SOMEBODY)
            libc().prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self is root's
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def as_somebody_root(work: Callable[[], int], *, fuse: Path) -> int:
    """What `work()` gives in a child process that is root of an ordinary user's namespaces, with 65,536 ids: what
    `podman unshare` makes, without the files in /etc that it wants. fuse: as in `as_somebody`."""
    import_everything()
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            libc().unshare(CLONE_NEWNS)
            mount_old("none", "/", None, MS_PRIVATE_REC, "")
            os.mknod(fuse, stat.S_IFCHR, os.makedev(10, 229))
            fuse.chmod(0o666)
            mount_old(str(fuse), "/dev/fuse", None, MS_BIND, "")
            os.setgroups([])
            os.setresgid(SOMEBODY, SOMEBODY, SOMEBODY)
            os.setresuid(SOMEBODY, SOMEBODY, SOMEBODY)
            libc().prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            if libc().unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
                raise OSError("no user namespace")
            os.write(ready[1], b".")
            os.read(go[0], 1)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(ready[1])
    if os.read(ready[0], 1):
        for kind in ("uid", "gid"):
            Path(f"/proc/{pid}/{kind}_map").write_text(f"0 {SOMEBODY} 1\n1 {OTHERS} {SOME_IDS}\n")
    os.write(go[1], b".")
    for fd in (ready[0], *go):
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
