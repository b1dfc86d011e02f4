"""A sample: one workload on one target, run a few times in a row, of which the fastest counts, which nobody disturbed.

What a run did is undone beside the clock, in a layer that stays: with a new one for each, the time is that of memory which
somebody else has just given back. Only what copies up needs a new layer for each run.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import time
from contextlib import ExitStack
from pathlib import Path

from overlaykit.bench.files import Files
from overlaykit.bench.targets import Scene, Target
from overlaykit.bench.workload import Workload
from overlaykit.bench.written import written

SAMPLE = 0.005  # seconds of runs in a sample of the fastest: enough that one of them goes through without an interrupt
RUNS = 3, 1000  # in a sample, at least and at most
NEW_LAYERS = 2  # the same where each needs one: to make it takes longer than many a run
LONGEST = 0.05  # seconds of runs in a sample, unless fewer runs than there should be at least take longer
COSTLY = 0.1  # seconds of a run, or to make a layer for it, from which on one has to do


class Sampler:
    """One workload on one target, time after time. To be closed; a closed one can go on, in another scene too."""

    def __init__(self, workload: Workload, target: Target, scene: Scene) -> None:
        self.workload, self.target, self.scene = workload, target, scene
        self._layer = ExitStack()
        self._files: Files | None = None
        self._stays = workload.again is not None and (target.plain or workload.kind != "copy-up")
        self.seconds = math.inf  # of a run, as warm-up had it
        self._costly = False
        self._runs = 1  # in a sample

    def close(self) -> None:
        """Take the layer away."""
        self._files = None
        self._layer.close()

    def ready(self) -> Files:
        """The writable layer as it is before a run: a new one, or the one that stays, in which the last run is undone."""
        if self._files is not None and self._stays and self.workload.again is not None:
            self.workload.again(self._files)
        else:
            self.close()
            self._files = self._layer.enter_context(self.target.fresh(self.scene))
            self.workload.before(self._files)
        return self._files

    def warm_up(self) -> tuple[int, tuple[int | None, int]]:
        """Operations or bytes of a run; bytes copied up and shared by the first."""
        began = time.monotonic()
        files = self.ready()
        costly = time.monotonic() - began > COSTLY
        self.seconds, _, amount = self._once(files)
        copied = written(files.upper) if self.workload.kind == "copy-up" and files.upper else (None, 0)
        if self._stays and self.seconds < SAMPLE:
            self.seconds, _, _ = self._once(self.ready())  # the first time was not like the others
        self._costly = costly or self.seconds > COSTLY
        return amount, copied

    def plan(self, fastest: float) -> None:
        """How many runs a sample has: as many as that of a target whose runs take `fastest` seconds.

        Each run finds more of its memory in the processor's caches than the one before, so those of whoever has more are
        faster.
        """
        least, most = RUNS
        if self._costly:
            self._runs = 1
        elif not self._stays:
            self._runs = NEW_LAYERS
        else:
            self._runs = max(least, min(math.ceil(SAMPLE / fastest), most, int(LONGEST / self.seconds)))

    def warm_again(self) -> None:
        """After it was closed: a layer for the runs to come, in which the first was."""
        if self._stays:
            self._once(self.ready())

    def sample(self) -> tuple[float, float]:
        """Seconds and CPU seconds of a run: of as many as fill a sample the fastest."""
        best = min(self._once(self.ready())[:2] for _ in range(self._runs))
        if not self._stays:
            self.close()  # what was copied up takes memory
        return best

    def _once(self, files: Files) -> tuple[float, float, int]:
        """Seconds, CPU seconds, and operations or bytes of one run."""
        if self.workload.cold:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
        gc.collect(0)
        gc.disable()
        try:
            cpu, began = cpu_seconds(), time.perf_counter()
            amount = self.workload.run(files)
            return time.perf_counter() - began, cpu_seconds() - cpu, amount
        finally:
            gc.enable()


def cpu_seconds() -> float:
    """What this process and the programs it has run so far used."""
    child = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + child.ru_utime + child.ru_stime
