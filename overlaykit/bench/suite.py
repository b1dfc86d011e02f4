"""A run: a folder of its own, the process that measures, and that nothing of it is left, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from overlaykit.bench import docker
from overlaykit.bench.isolate import PREFIX, isolated
from overlaykit.bench.machine import filesystem
from overlaykit.bench.method import Missing, Result, obstacle, usable, why
from overlaykit.bench.pinned import pin
from overlaykit.bench.rounds import Course, go_on
from overlaykit.bench.targets import TARGETS, Target
from overlaykit.bench.workload import Workload
from overlaykit.bench.workloads import WORKLOADS
from overlaykit.store.disk import remove_tree
from overlaykit.tree.table import StrPath

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
IMAGE = 3 << 30  # bytes of a loop-mounted file system; sparse
MAKE = {"ext4": ("mkfs.ext4", "-qF"), "xfs": ("mkfs.xfs", "-qf", "-m", "reflink=1"), "btrfs": ("mkfs.btrfs", "-qf")}


class Bench:
    """A place to measure in, below `directory`; a context manager that takes away all that it made.

    Entering it removes what killed runs left in `directory` too. SIGTERM and SIGHUP end it as Ctrl-C does.
    """

    def __init__(self, directory: StrPath | None = None) -> None:
        self.directory = Path(os.path.realpath(directory or tempfile.gettempdir()))

    def __enter__(self) -> Self:
        sweep(self.directory)
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, _stop) for number in STOPS}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            self.place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self.directory))
            self._lock = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        finally:
            self._mask = mask
            # Only within run, where all is cleared away, may a signal stop us.
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            docker.clear(self.place)
            remove_tree(self.place)
            os.close(self._lock)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            for number, handler in self._old.items():
                signal.signal(number, handler)

    def run(
        self,
        *,
        workloads: Sequence[Workload] = WORKLOADS,
        targets: Sequence[Target] = TARGETS,
        seconds: float = 100,
        full: bool = False,
        filesystems: Sequence[str] = (),
    ) -> Iterator[Result | Missing]:
        """Every workload on every target; what cannot run comes as Missing, and first, what went wrong later at the end.

        seconds: for all of them together, with what is made and removed for them; less if all have settled before.
        filesystems: of ext4, xfs, btrfs, each on a loop device too; root only.
        """
        chosen = [workload for workload in workloads if full or not workload.full]
        # Each process in the chain starts with the signals blocked; the child is killed, not asked.
        source = isolated(lambda namespace: self._measure(namespace, chosen, targets, seconds, filesystems))
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        told: set[Missing] = set()
        try:
            for one in source:
                if isinstance(one, Result):
                    yield one
                elif one not in told:  # on another file system for the same reason
                    told.add(one)
                    yield one
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            source.close()  # type: ignore[attr-defined]

    def _measure(
        self, namespace: str, workloads: Sequence[Workload], targets: Sequence[Target], seconds: float,
        filesystems: Sequence[str],
    ) -> Iterator[Result | Missing]:  # fmt: skip
        places = {filesystem(self.place): self.place}
        for kind in filesystems:
            try:
                places[f"{kind} (loop)"] = self._loop(kind)
            except (OSError, subprocess.CalledProcessError) as e:
                reason = why(e) if isinstance(e, OSError) else os.fsdecode(e.stderr).strip().replace("\n", " ")
                yield Missing("", "", f"{kind}: {reason}")
        until, courses = time.monotonic() + seconds, list[Course]()
        rootless = namespace != "root"
        for label, place in places.items():
            here = []
            for target in usable(targets, place, rootless=rootless):
                if isinstance(target, Missing):
                    yield target
                else:
                    here.append(target)
            for workload in workloads:
                if reason := obstacle(workload, place):
                    yield Missing(workload.name, "", reason)
                else:
                    courses.append(Course(workload, here, place, rootless=rootless, filesystem=label))
        pin()
        for number, course in enumerate(courses):
            # Of what is left: whoever takes longer takes it from those behind.
            yield from course.first(max(0.0, until - time.monotonic()) / (len(courses) - number))
        go_on(courses, until)
        for course in courses:
            yield from course.results
            if course.ended:
                yield Missing(course.workload.name, "", course.ended)

    def _loop(self, kind: str) -> Path:
        """A new file system of that kind, mounted for as long as this process lives."""
        if os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK):
            raise OSError(1, "only root mounts a loop device")
        file, target = self.place / f"{kind}.img", self.place / kind
        with file.open("wb") as image:
            image.truncate(IMAGE)
        target.mkdir()
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        program = shutil.which(MAKE[kind][0], path=path)
        if program is None:
            raise OSError(2, f"{MAKE[kind][0]} is not installed")
        subprocess.run([program, *MAKE[kind][1:], file], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", file, target], check=True, capture_output=True)
        return target


def _stop(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt


def sweep(directory: Path) -> None:
    """Remove the folders of runs that were killed: those that nobody has locked."""
    for place in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                docker.clear(place)
                remove_tree(place)
            finally:
                os.close(fd)
