"""Layers side by side. Each is unpacked by itself, but it exists only on top of the one below: so each has its turn."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Protocol

MOST = 4  # layers at a time: each has two threads, and some 20 MiB of buffers


class Stream(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None: ...
    def read1(self, n: int, /) -> bytes: ...


class Turn:
    """One task's place behind the others."""

    def __init__(self, before: Future[None] | None = None, given_up: threading.Event | None = None) -> None:
        self._before = before
        self._given_up = given_up or threading.Event()

    def wait(self) -> None:
        """Come back when the task before this one is done, and so all before it. If it failed, so does this one."""
        if self._before is not None:
            self._before.result()

    def reading(self, stream: Stream) -> Stream:
        """`stream`, which fails once all is given up: so Ctrl-C, or another layer's error, does not wait for its end."""
        return _Watched(stream, self._given_up)


class _Watched:
    def __init__(self, stream: Stream, given_up: threading.Event) -> None:
        self._stream = stream
        self._given_up = given_up

    def readinto(self, buffer: memoryview, /) -> int | None:
        self._go_on()
        return self._stream.readinto(buffer)

    def read1(self, n: int, /) -> bytes:
        self._go_on()
        return self._stream.read1(n)

    def _go_on(self) -> None:
        if self._given_up.is_set():
            raise InterruptedError(errno.EINTR, "given up, since another layer failed")


def abreast(tasks: Sequence[Callable[[Turn], None]]) -> None:
    """Run `tasks`, as many at a time as there are cores, begun in their order.

    Raises what the first that failed raised, once none runs any more; those not begun by then never are.
    """
    given_up = threading.Event()
    jobs: list[Future[None]] = []
    failures: list[BaseException] = []

    def run(task: Callable[[Turn], None], turn: Turn) -> None:
        try:
            task(turn)
        except BaseException as e:
            failures.append(e)  # the first one is the cause of those that follow
            given_up.set()
            raise

    with ThreadPoolExecutor(min(MOST, len(os.sched_getaffinity(0))), thread_name_prefix="overlaykit-layer") as pool:
        try:
            for task in tasks:
                # A task waits only for one that was begun before it, so the lowest that runs never waits.
                jobs.append(pool.submit(run, task, Turn(jobs[-1] if jobs else None, given_up)))
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:  # Ctrl-C, too
            if failures or not all(job.done() for job in jobs):
                given_up.set()
                for job in jobs:
                    job.cancel()
    if failures:
        raise failures[0]


__all__ = ["Turn", "abreast"]
