"""What goes wrong in a child process while it changes a store: an error at a system call, or SIGKILL before it, injected by
strace; SIGKILL at any step that the interpreter reports; another process that comes between two steps."""

from __future__ import annotations

import gc
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from overlaykit import Store

ALL = os.environ.get("OVERLAYKIT_FAULTS") == "all"  # every place and not some of them
SEED = os.environ.get("OVERLAYKIT_STRESS_SEED", "")  # says which are tried where not all are
NOT_OURS = {"mmap", "munmap", "brk", "madvise", "mremap", "futex", "read", "rt_sigaction", "restart_syscall", "sched_yield"}
LINE = re.compile(r"(?:(\d+) +)?(\w+)\((.*)")

# What the interpreter reports of system calls that change something (audit events), and opening, which may create.
STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.truncate"}
STEPS |= {"open", "fcntl.flock", "sqlite3.connect", "shutil.rmtree", "os.scandir", "os.listdir", "os.link", "os.symlink"}
Change = Callable[[Store], object]

needs_strace = [
    pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts and trusted.overlay xattrs need root"),
    pytest.mark.skipif(not shutil.which("strace"), reason="needs strace to inject faults"),
]


def dice(what: str) -> random.Random:
    """Chances for `what`, the same ones each time, so that a failure is of the change at hand; another seed gives others."""
    return random.Random(f"{SEED} {what}")


def traced(prepare: Callable[[], Callable[[], object]], log: Path, *strace: str) -> tuple[str, str]:
    """How a change ends in a child under strace ("done", an errno's text, "killed"), and what strace wrote.

    prepare: makes ready, in the child, and gives the change. Only the change is traced.
    """
    ready, go = os.pipe(), os.pipe()
    said, hers = socket.socketpair()  # sending is no call that any fault is injected into
    pid = os.fork()
    if pid == 0:
        try:
            gc.disable()  # what earlier tests left open would be closed at a moment of its own, and counted
            change = prepare()
            os.write(ready[1], b".")
            os.read(go[0], 1)
            os.getppid()  # begins and ends what counts
            try:
                change()
                answer = "done"
            except OSError as e:
                answer = os.strerror(e.errno or 0)
            except BaseException as e:
                answer = f"{type(e).__name__}: {e}"
            os.getppid()
            hers.send(answer.encode()[:1000])
        finally:
            os._exit(0)
    for fd in (hers.detach(), ready[1], go[0]):  # so that its end is seen, if it ends early
        os.close(fd)
    assert os.read(ready[0], 1), "it could not be made ready"
    tracer = subprocess.Popen(["strace", "-qq", "-o", log, *strace, "-p", str(pid)], stderr=subprocess.PIPE)
    while f"TracerPid:\t{tracer.pid}" not in Path(f"/proc/{pid}/status").read_text():
        assert tracer.poll() is None, tracer.stderr and tracer.stderr.read()
        time.sleep(0.001)
    os.write(go[1], b".")
    answer = said.recv(1000).decode()
    said.close()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    tracer.wait()
    assert tracer.stderr is not None
    tracer.stderr.close()
    for fd in (ready[0], go[1]):
        os.close(fd)
    assert status in (0, -signal.SIGKILL)
    return answer if status == 0 else "killed", log.read_text()


def calls(log: str, wanted: Callable[[str, str], bool] = lambda name, args: True) -> list[tuple[str, int]]:
    """The system calls between the two marks that are `wanted` by name and arguments: name, and how manieth of that name
    its thread made since strace came, which is how strace counts too."""
    out: dict[tuple[str, int], None] = {}
    counts: dict[tuple[str, str], int] = {}
    inside = False
    for line in log.splitlines():
        if (match := LINE.match(line)) is None:
            continue
        thread, name, args = match.groups()
        nth = counts[thread, name] = counts.get((thread, name), 0) + 1
        if name == "getppid":
            inside = not inside
        elif inside and name not in NOT_OURS and wanted(name, args):
            out[name, nth] = None
    return list(out)


# --- others, on their way ---------------------------------------------------------------------------------------------


def is_told(store: Store, text: str, count: int = 1) -> None:
    """Wait until so many leases say `text`: then that many others are on their way."""

    def say(lease: Path) -> bool:
        with suppress(FileNotFoundError):  # it ended between the listing and the reading
            return text in lease.read_text()
        return False

    end = time.monotonic() + 300
    while sum(map(say, (store.root / "leases").iterdir())) < count:
        assert time.monotonic() < end, f"no lease says {text}"
        time.sleep(0.001)


# --- steps ------------------------------------------------------------------------------------------------------------


def killed_at_steps(top: Path, prepare: Callable[[Path], object], change: Change) -> Iterator[Path]:
    """A store that `prepare` makes below `top`, whose `change` was killed at its first step, at its second, ...: each of the
    first ones, later every second, third, unless all are wanted. Of the last one it was not killed, and is done."""
    step, was_killed = 0, True
    while was_killed:
        root = top / str(step) / "store"
        root.parent.mkdir(parents=True)
        prepare(root)
        was_killed = run_killed(root, change, step)
        yield root
        shutil.rmtree(root.parent)
        step += 1 if ALL else 1 + step // 12


def run_killed(root: Path, change: Change, step: int) -> bool:
    """Do the change in a child that is killed with SIGKILL as it takes step number `step`; whether it came that far."""
    pid = _child(root, change, step, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@contextmanager
def stopped(root: Path, change: Change, step: int) -> Iterator[bool]:
    """For a `with` block, a child that is about to take step number `step` of a change; it is killed at the end.

    False if it does not take so many: then it has done it.
    """
    pid = _child(root, change, step, signal.SIGSTOP)
    _, status = os.waitpid(pid, os.WUNTRACED)
    try:
        yield os.WIFSTOPPED(status)
        assert os.WIFSTOPPED(status) or os.WEXITSTATUS(status) == 0
    finally:
        if os.WIFSTOPPED(status):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def run_beside(root: Path, change: Change, other: Change, step: int) -> tuple[str, str] | None:
    """What comes of a change and of another one in a process of its own, which comes between two steps of the first.

    The first stops as it takes step number `step`, until the other has ended or waits for it. "done" or the error, of each;
    None if the first does not take so many steps.
    """
    hears, says = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    first = _child(root, change, step, signal.SIGSTOP, says[0])
    _, status = os.waitpid(first, os.WUNTRACED)
    try:
        if not os.WIFSTOPPED(status):
            return None
        second = _child(root, other, -1, signal.SIGSTOP, says[1])
        while not _has_ended_or_waits(second):
            time.sleep(0.002)
        os.kill(first, signal.SIGCONT)
        for pid in (first, second):
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return hears[0].recv(1000).decode(), hears[1].recv(1000).decode()
    finally:
        for end in (*hears, *says):
            end.close()


def _has_ended_or_waits(pid: int) -> bool:
    """Whether a child has ended, or all its threads sleep, and go on sleeping."""
    for _ in range(20):
        states = set()
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended between the listing and the reading
                states.add((thread / "stat").read_text().rpartition(")")[2].split()[0])
        if states <= {"Z"}:
            return True
        if not states <= {"S", "Z"}:
            return False
        time.sleep(0.002)
    return True


def _child(root: Path, change: Change, step: int, sign: signal.Signals, said: socket.socket | None = None) -> int:
    """The process id of a child that changes the store, and sends itself `sign` as it takes step number `step`.

    said: gets what came of it, "done" or the error; without one an error is the child's end.
    """
    pid = os.fork()
    if pid:
        return pid
    left = step

    def count(event: str, _: object) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if left == -1:
                os.kill(os.getpid(), sign)

    code = 1
    try:
        store = Store(root)
        sys.addaudithook(count)
        try:
            change(store)
            answer = "done"
        except Exception as e:
            if said is None:
                raise
            answer = "".join(traceback.format_exception_only(e)).strip()
        store.close()
        if said is not None:
            said.send(answer.encode()[:1000])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
