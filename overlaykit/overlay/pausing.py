"""Stopping what runs in a merged tree while its upper is read, and letting it go on afterwards.

What has its root, its working directory or an open file in an overlay with that upper runs in it: a program of run_inside,
a shell in a mount. /proc tells of both, for each mount namespace. SIGSTOP stops them all, and SIGCONT goes to those that it
stopped, not to one that stood still before.

A child does it, the keeper. It lets them go on when it is told to, and also when whoever started it is no more.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from overlaykit.errors import InUse
from overlaykit.overlay.mounttable import overlays_of

WAIT = 10.0  # seconds for a process to stop: one that waits for a disk does so only afterwards
LOOK = 0.5  # seconds between two looks of the keeper whether its parent is still there
# It has ended, or is just about to (EINVAL, of its mounts), or is another user's.
GONE = (errno.ENOENT, errno.ESRCH, errno.EINVAL, errno.EACCES, errno.EPERM)


@contextmanager
def _unless_gone() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno not in GONE:
            raise


def running_in(upper: Path) -> list[int]:
    """The processes that run in an overlay with this upper, as far as this one may see them. Not itself, nor its parents."""
    mounts: dict[str, set[int]] = {}
    found = []
    for pid in {int(name) for name in os.listdir("/proc") if name.isdigit()} - _ancestors():
        with _unless_gone():
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in mounts:
                mounts[namespace] = {number for number, _ in overlays_of(upper, Path(f"/proc/{pid}/mountinfo"))}
            if mounts[namespace] and not mounts[namespace].isdisjoint(_mounts_used(pid)):
                found.append(pid)
    return found


def _ancestors() -> set[int]:
    """This process and those above it, which wait for it."""
    found, pid = {0}, os.getpid()
    while pid not in found:
        found.add(pid)
        with _unless_gone():
            pid = int(_fields(f"/proc/{pid}/stat")[1])
    return found


def _fields(stat: str) -> list[str]:
    """What /proc/PID/stat says after the name: the state, the parent, and so on."""
    return Path(stat).read_text(errors="replace").rpartition(")")[2].split()


def _mounts_used(pid: int) -> Iterator[int]:
    """The ids of the mounts that a process has its root, its working directory and open files in."""
    for link in ("root", "cwd"):
        fd = os.open(f"/proc/{pid}/{link}", os.O_PATH | os.O_CLOEXEC)
        try:
            yield _mount_id(f"/proc/self/fdinfo/{fd}")
        finally:
            os.close(fd)
    for name in os.listdir(f"/proc/{pid}/fdinfo"):
        with suppress(FileNotFoundError):  # closed just now
            yield _mount_id(f"/proc/{pid}/fdinfo/{name}")


def _mount_id(fdinfo: str) -> int:
    return next(int(line[7:]) for line in Path(fdinfo).read_text().splitlines() if line.startswith("mnt_id:"))


def _is_stopped(pid: int) -> bool:
    """Whether all threads of a process stand still, or it is gone."""
    tasks = []
    with _unless_gone():
        tasks = os.listdir(f"/proc/{pid}/task")
    return all(_state(f"/proc/{pid}/task/{task}/stat") in "TtZX" for task in tasks)


def _state(stat: str) -> str:
    try:
        return _fields(stat)[0]
    except OSError as e:
        if e.errno not in GONE:
            raise
        return "X"


# --- the keeper -------------------------------------------------------------------------------------------------------


@contextmanager
def paused(upper: Path) -> Iterator[None]:
    """A `with` block during which nothing runs in overlays with this upper. InUse if something cannot be stopped."""
    if not running_in(upper):
        yield
        return
    spared = _ancestors()
    told, telling = os.pipe2(os.O_CLOEXEC)
    heard, saying = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(telling)
            os.close(heard)
            _keep(upper, spared, told, saying, lambda: os.getppid() == parent)
        finally:
            os._exit(0)
    os.close(told)
    os.close(saying)
    stopped: list[int] = []
    try:
        with open(heard, "rb") as pipe:  # one line, and no end: another thread's child may have the pipe too
            answer = json.loads(pipe.readline() or b'{"trouble": "its keeper was killed"}')
        stopped = answer.get("stopped", [])
        if trouble := answer.get("trouble"):
            raise InUse(f"what runs on {upper} cannot be paused: {trouble}", hint="try again, or do not pause")
        yield
    finally:
        with suppress(BrokenPipeError):
            os.write(telling, b".")
        os.close(telling)
        if os.waitpid(pid, 0)[1] != 0:  # somebody killed it
            for each in stopped:
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGCONT)


def _keep(upper: Path, spared: set[int], told: int, saying: int, has_parent: Callable[[], bool]) -> None:
    """In the child: stop them, say so, wait, and let them go on."""
    os.setsid()  # a signal to our parent's group is none to us
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    stopped: dict[int, int] = {}  # a descriptor for each process: its number may become another's
    try:
        answer = {"trouble": _stop(upper, spared | {os.getpid()}, stopped, has_parent), "stopped": list(stopped)}
        os.write(saying, json.dumps(answer).encode() + b"\n")
        os.close(saying)
        while has_parent() and not select.select([told], [], [], LOOK)[0]:
            pass
    finally:
        for fd in stopped.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGCONT)


def _stop(upper: Path, spared: set[int], stopped: dict[int, int], has_parent: Callable[[], bool]) -> str:
    """Stop all that runs there, until no look finds more: one may have forked before it stood still. Why not, or ""."""
    end = time.monotonic() + WAIT
    still: set[int] = set()  # others stopped them
    while fresh := set(running_in(upper)) - spared - still - stopped.keys():
        for pid in fresh:
            try:
                if _is_stopped(pid):
                    still.add(pid)
                    continue
                stopped[pid] = os.pidfd_open(pid)
                signal.pidfd_send_signal(stopped[pid], signal.SIGSTOP)
            except ProcessLookupError:
                still.add(pid)
            except PermissionError:
                return f"process {pid} is another user's"
        while slow := [pid for pid in fresh if not _is_stopped(pid)]:
            if time.monotonic() > end or not has_parent():
                return f"process {slow[0]} does not stop"
            time.sleep(0.001)
    return ""
