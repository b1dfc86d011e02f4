"""A process for the measuring, in a mount namespace of its own: whatever ends it, its mounts and programs end with it.

Root gets a new mount and process namespace, others a user namespace too, in which they may mount what the kernel lets them.
Loop devices are detached by the kernel when their last mount goes.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from overlaykit.overlay.mount import MS_PRIVATE, MS_REC, libc, mount_old
from overlaykit.overlay.probe import CLONE_NEWNS, CLONE_NEWUSER

PREFIX = "overlaykit-measures-"  # of the folder of a run
CLONE_NEWPID = 0x20000000  # linux/sched.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
WAITING = {signal.SIGCHLD, signal.SIGTERM}  # what the process between us and the measuring one waits for


def die_with_parent() -> None:
    """This process is killed when the thread that started it ends."""
    libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def unshare(flags: int) -> None:
    if libc().unshare(ctypes.c_int(flags)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def map_ids(uid: int, gid: int) -> None:
    """Be root in this new user namespace: the user that one was outside."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def enter() -> str:
    """Namespaces for this process and its children: "root", "user", or why there are none."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        if uid == 0:
            unshare(CLONE_NEWNS | CLONE_NEWPID)
        else:
            unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID)
            map_ids(uid, gid)
        mount_old("none", "/", None, MS_PRIVATE | MS_REC, "")
    except OSError as e:
        return f"no mount namespace for this user: {e.strerror}"
    return "root" if uid == 0 else "user"


def isolated(work: Callable[[str], Iterator[Any]]) -> Iterator[Any]:
    """What `work(namespace)` yields in the other process, as it comes; its exception is raised here.

    Closing the iterator kills the process, and with it all that it started or mounted: that is gone then.
    """
    reader, writer = os.pipe()
    outer = os.fork()
    if outer == 0:
        os.close(reader)
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_BLOCK, WAITING)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # our parent decides, and kills
        namespace = enter()
        inner = os.fork()
        if inner == 0:
            die_with_parent()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            with os.fdopen(writer, "wb") as out:
                _send(out, work, namespace)
            os._exit(0)
        os.close(writer)
        if signal.sigwait(WAITING) == signal.SIGTERM:
            os.kill(inner, signal.SIGKILL)
        # The first process of a namespace has ended when all in it have, and their mounts are gone.
        os.waitpid(inner, 0)
        os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as source:
            while True:
                try:
                    kind, value = pickle.load(source)
                except EOFError:
                    raise RuntimeError("the measuring process was killed") from None
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
    finally:
        with suppress(ProcessLookupError):
            os.kill(outer, signal.SIGTERM)
        os.waitpid(outer, 0)


def _send(out: Any, work: Callable[[str], Iterator[Any]], namespace: str) -> None:
    try:
        for value in work(namespace):
            pickle.dump(("value", value), out)
            out.flush()
        pickle.dump(("end", None), out)
    except BaseException as e:
        try:
            message = pickle.dumps(("error", e))
        except Exception:
            message = pickle.dumps(("error", RuntimeError("".join(traceback.format_exception(e)))))
        out.write(message)
