"""Running a program with a merged tree as its root, in a mount namespace of its own: nobody else sees the mount, and it
goes when the program ends. Who is not root gets a user namespace too, and is root in it.

That separates what the program sees, not what it may do: it is no sandbox.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from overlaykit.errors import OverlaykitError, Unsupported
from overlaykit.overlay.identity import ROOT, Identity
from overlaykit.overlay.mount import MNT_DETACH, MS_BIND, MS_PRIVATE, MS_REC, Mount, libc, mount, mount_fuse, mount_old
from overlaykit.tree.table import StrPath

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
SHARED = ("dev", "proc", "sys")  # of the host, where the tree has a directory to show them in
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def default_environment(user: Identity = ROOT) -> dict[str, str]:
    """What a program gets that nobody said anything about."""
    return {"PATH": PATH, "HOME": user.home, "TERM": os.environ.get("TERM", "dumb")}


def run_inside(
    what: Mount,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    directory: StrPath = "/",
    user: Identity = ROOT,
    mounted: Callable[[Path], object] = lambda place: None,
) -> int:
    """The exit status of program `argv`, run with the tree of overlay `what` as its root; 128 + n if signal n ended it.

    env: all of its environment; without: PATH, HOME and TERM. It starts in `directory` of the tree, with the standard
    streams of this process, as `user`. mounted: called with where the tree is mounted, to mount more in it.

    As root the kernel mounts; in a user namespace the kernel or, where it refuses, an installed fuse-overlayfs. Unsupported
    if neither can, or if `user` is another than root and we are not; OSError if the program cannot be started.
    """
    if not argv:
        raise ValueError("no program to run")
    if env is None:
        env = default_environment(user)
    with tempfile.TemporaryDirectory(prefix="overlaykit-inside-") as target:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            _report(
                writing, lambda: os._exit(_outer(what.at(target), argv, env, os.fspath(directory), user, mounted, writing))
            )
        os.close(writing)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the program as well
        try:
            with open(reading, "rb") as pipe:
                trouble = pipe.read()
            status = _exit_status(pid)
        finally:
            signal.signal(signal.SIGINT, before)
    if trouble:
        error = pickle.loads(trouble)  # from our own child, which wrote it before anything of the tree was run
        assert isinstance(error, BaseException)
        raise error
    return status


def _report(writing: int, work: object) -> None:
    """In a child: `work()` must not come back; if it raises, the parent is told why."""
    try:
        assert callable(work)
        work()
    except BaseException as e:
        plain = e if isinstance(e, OSError | OverlaykitError) else RuntimeError(f"{type(e).__name__}: {e}")
        os.write(writing, pickle.dumps(plain))
    finally:
        os._exit(126)


def _exit_status(pid: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def _outer(
    what: Mount,
    argv: Sequence[str],
    env: Mapping[str, str],
    directory: str,
    user: Identity,
    mounted: Callable[[Path], object],
    writing: int,
) -> int:
    """In the first child: make the namespaces and the mount, wait for the program in a second one."""
    uid, gid = os.geteuid(), os.getegid()
    _unshare(CLONE_NEWNS | (CLONE_NEWUSER if uid else 0))
    if uid:
        if (user.uid, user.gid) != (0, 0):
            raise Unsupported(
                f"no user {user.uid}:{user.gid} in a namespace of one user's", hint="run as root, or --user 0:0"
            )
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    mount_old("none", "/", None, MS_PRIVATE | MS_REC, "")  # nothing gets out
    try:
        mount(what)
    except OSError as refusal:
        try:
            mount_fuse(what)
        except Unsupported as e:
            raise refusal from e
    mounted(Path(what.target))
    pid = os.fork()
    if pid == 0:
        _report(writing, lambda: _inner(what.target, argv, env, directory, user))
    os.close(writing)
    status = _exit_status(pid)
    libc().umount2(os.fsencode(what.target), MNT_DETACH)  # lets go of a fuse-overlayfs, which would outlive us
    return status


def _inner(root: str, argv: Sequence[str], env: Mapping[str, str], directory: str, user: Identity) -> None:
    """In the second child: the mounted tree becomes the root, the program takes over."""
    _unshare(CLONE_NEWNS)
    for name in SHARED:
        place = os.path.join(root, name)
        if os.path.isdir(place) and not os.path.islink(place):
            mount_old(f"/{name}", place, None, MS_BIND | MS_REC, "")
    os.chdir(root)
    # The old root lands on top of the new one, and goes from there (pivot_root(2), "pivot_root(".", ".")").
    if libc().pivot_root(b".", b".") != 0 or libc().umount2(b".", MNT_DETACH) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), root)
    os.chdir(directory)
    for number in (signal.SIGPIPE, signal.SIGINT):  # Python's own ways with them are not for others
        signal.signal(number, signal.SIG_DFL)
    if user.uid or user.gid:  # root needs no groups, and in some namespaces may not set them
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)  # and with it all capabilities go
    try:
        os.execvpe(argv[0], list(argv), dict(env))
    except OSError as e:
        e.filename = argv[0]
        raise


def _unshare(namespaces: int) -> None:
    if libc().unshare(ctypes.c_int(namespaces)) != 0:
        code = ctypes.get_errno()
        raise Unsupported(
            f"no namespace of one's own: {os.strerror(code)}",
            hint="run as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces)",
        )
