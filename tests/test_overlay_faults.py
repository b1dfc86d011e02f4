"""Faults at every system call of a change: ENOSPC, EIO, EINTR, SIGKILL, injected by strace. Afterwards the merged tree is
the one from before or the one that was wanted, and the next opening finds nothing in work.

A few places are tried, others each time. OVERLAYKIT_FAULTS=all tries every one (some minutes).
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernel_overlay import SCRATCH

from overlaykit.overlay import Overlay, View

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts and trusted.overlay xattrs need root"),
    pytest.mark.skipif(not shutil.which("strace"), reason="needs strace to inject faults"),
]

FAULTS = ("error=ENOSPC", "error=EIO", "error=EINTR", "signal=KILL")
SOME = 12  # places of an operation that are tried unless all are
NOT_OURS = {"mmap", "munmap", "brk", "madvise", "mremap", "futex", "read", "rt_sigaction", "restart_syscall", "sched_yield"}
Change = Callable[[Overlay], object]


def copied(change: Change) -> Change:
    """`change`, on an overlay in which /dir/f has been copied up."""

    def run(overlay: Overlay) -> None:
        change(overlay)

    run.first = lambda overlay: overlay.chmod("/dir/f", 0o600)  # type: ignore[attr-defined]
    return run


CHANGES: dict[str, Change] = {
    "open a lower file for writing": lambda o: os.close(o.open_fd("/dir/sub/large", os.O_WRONLY)),
    "change a lower file's mode": lambda o: o.chmod("/dir/sub/large", 0o600),
    "make a file over a whiteout": lambda o: o.mknod("/gone", 0o100644),
    "rename a lower file over another": lambda o: o.rename("/dir/f", "/dir/g"),
    "rename a copied-up file": copied(lambda o: o.rename("/dir/f", "/new")),
    "exchange two lower files": lambda o: o.rename("/dir/f", "/dir/sub/large", flags=2),
    "unlink a lower file": lambda o: o.unlink("/dir/f"),
    "unlink a copied-up file": copied(lambda o: o.unlink("/dir/f")),
    "remove a lower tree": copied(lambda o: o.rmtree("/dir")),
}


class Place:
    """A lower, and an upper with a whiteout; `again` makes a fresh upper and work."""

    def __init__(self, base: Path, change: Change) -> None:
        self.base, self.change = base, change
        self.lower, self.upper, self.work = base / "lower", base / "upper", base / "work"
        (self.lower / "dir" / "sub").mkdir(parents=True)
        (self.lower / "dir" / "sub").chmod(0o2750)
        (self.lower / "dir" / "f").write_text("f")
        (self.lower / "dir" / "g").write_text("g")
        (self.lower / "gone").write_text("gone")
        large = self.lower / "dir" / "sub" / "large"
        large.write_bytes(bytes(range(256)) * 2000)
        os.chown(large, 1000, 1000)
        large.chmod(0o4755)
        os.setxattr(large, "user.k", b"v")

    def again(self) -> None:
        for path in (self.upper, self.work):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        with self.open() as overlay:
            overlay.unlink("/gone")
            getattr(self.change, "first", lambda overlay: None)(overlay)

    def open(self) -> Overlay:
        return Overlay([self.lower], self.upper, self.work)

    def tree(self) -> dict[str, Any]:
        """What the merged tree shows, but for times of directories and of what was written just now."""
        out: dict[str, Any] = {}
        with View([self.lower, self.upper]) as view:
            todo = ["/"]
            while todo:
                path = todo.pop()
                st = view.lstat(path)
                out[path] = [
                    oct(st.st_mode),
                    st.st_uid,
                    st.st_gid,
                    [(k, view.getxattr(path, k)) for k in view.listxattr(path)],
                ]
                if stat.S_ISDIR(st.st_mode):
                    todo += [path.rstrip("/") + "/" + name for name in view.listdir(path)]
                else:
                    out[path].append(view.read_bytes(path))
        return out

    def run(self, *strace: str) -> tuple[str, str]:
        """How the change ends in a child under strace ("done", an errno's name, "killed"), and what strace wrote."""
        self.again()
        log = self.base / "log"
        ready, go, said = os.pipe(), os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                overlay = self.open()
                os.write(ready[1], b".")
                os.read(go[0], 1)
                os.getppid()  # begins and ends what counts
                try:
                    self.change(overlay)
                    answer = "done"
                except OSError as e:
                    answer = os.strerror(e.errno or 0)
                os.getppid()
                os.write(said[1], answer.encode())
            finally:
                os._exit(0)
        os.close(said[1])
        os.read(ready[0], 1)
        tracer = subprocess.Popen(["strace", "-qq", "-o", log, *strace, "-p", str(pid)], stderr=subprocess.PIPE)
        while f"TracerPid:\t{tracer.pid}" not in Path(f"/proc/{pid}/status").read_text():
            assert tracer.poll() is None, tracer.stderr and tracer.stderr.read()
            time.sleep(0.001)
        os.write(go[1], b".")
        answer = os.read(said[0], 100).decode()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        tracer.wait()
        assert tracer.stderr is not None
        tracer.stderr.close()
        for fd in (*ready, *go, said[0]):
            os.close(fd)
        assert status in (0, -signal.SIGKILL)
        return answer if status == 0 else "killed", log.read_text()


def calls(log: str) -> list[tuple[str, int]]:
    """The system calls between the two marks: name, and how manieth of that name since strace came."""
    out, counts, inside = [], dict[str, int](), False
    for line in log.splitlines():
        if (match := re.match(r"(\w+)\(", line)) is None:
            continue
        name = match[1]
        counts[name] = counts.get(name, 0) + 1
        if name == "getppid":
            inside = not inside
        elif inside and name not in NOT_OURS:
            out.append((name, counts[name]))
    return out


@pytest.mark.parametrize("name", CHANGES)
def test_a_fault_at_any_system_call_leaves_the_tree_before_or_after(name: str) -> None:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        place = Place(Path(folder), CHANGES[name])
        place.again()
        before = place.tree()
        answer, log = place.run()
        assert answer == "done"
        after = place.tree()
        places = [(call, when, fault) for call, when in calls(log) for fault in FAULTS]
        assert len(places) > 4 * len(FAULTS)
        if os.environ.get("OVERLAYKIT_FAULTS") != "all":
            places = random.sample(places, SOME)
        for call, when, fault in places:
            answer, _ = place.run("-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}")
            where = f"{fault} at {call} {when}: {answer}"
            assert (answer == "killed") == (fault == "signal=KILL"), where
            found = place.tree()
            assert found in ((after,) if answer == "done" else (before, after)), where
            with place.open():
                assert os.listdir(place.work / "work") == [], where
            assert place.tree() == found, where
