"""How it is measured: rounds, in which every target of a workload has two turns, one there and one on the way back.

Other work on the machine slows all targets of a round alike, and what is compared is the ratio to the host directory in the
same rounds, and how sure that is (spread.py). Where in memory files lie stays for the life of a layer, and what neighbours
do for seconds: so each round has new files, layers and servers, and between two of a workload come those of others. A
workload on whose ratios the rounds agree is settled and has no more; the time that is left goes to those that agree the
least.
"""

from __future__ import annotations

import errno
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from overlaykit.bench.method import Missing, Result, why
from overlaykit.bench.sampler import Sampler
from overlaykit.bench.spread import SETTLED
from overlaykit.bench.targets import HOST, Scene, Target
from overlaykit.bench.workload import Workload
from overlaykit.errors import OverlaykitError

WARMING = 5  # seconds of warm-ups that are always granted: on a very slow disk the last targets have no turn at all
FEWEST, MOST = 5, 100  # rounds
TROUBLE = (OSError, OverlaykitError)  # a full disk, say: that workload's, and not the end of the others


class Course:
    """All rounds of `workload` on `targets`, and what came out: results, one for each target that runs."""

    def __init__(
        self, workload: Workload, targets: Sequence[Target], place: Path, *, rootless: bool, filesystem: str
    ) -> None:
        self.workload, self.targets, self.base = workload, targets, place / workload.name
        self.rootless, self.filesystem = rootless, filesystem
        self.rounds = 0
        self.cost = 0.0  # seconds of the last round
        self.ended = ""  # why there are no more
        self._pairs: list[tuple[Sampler, Result]] = []
        self._order = random.Random(workload.name)  # of turns: another in each round, the same ones in each run

    @property
    def results(self) -> list[Result]:
        return [result for _, result in self._pairs]

    @property
    def settled(self) -> bool:
        if self.ended or self.rounds >= MOST:
            return True
        return all(self.rounds >= FEWEST and one.doubt <= SETTLED for one in self.results if one.target != HOST)

    @property
    def need(self) -> tuple[int, float]:
        """Who has the greatest is the next: whoever has too few rounds, then by the least certain ratio."""
        return -min(self.rounds, FEWEST), max((one.doubt for one in self.results if one.target != HOST), default=0)

    def first(self, seconds: float) -> Iterator[Missing]:
        """The first round: what runs and what does not. There alone, if a fifth of `seconds` is over by then."""
        began = time.monotonic()
        try:
            yield from self._first(seconds, began)
        except TROUBLE as e:
            self._pairs.clear()
            yield Missing(self.workload.name, "", why(e))
        self.cost = time.monotonic() - began

    def _first(self, seconds: float, began: float) -> Iterator[Missing]:
        late, left_out = began + max(seconds, WARMING), list[str]()
        with self._scene() as scene, ExitStack() as layers:
            for target in self.targets:
                if self.workload.by_path and target.name.startswith("overlaykit"):
                    yield Missing(self.workload.name, target.name, self.workload.by_path)
                    continue
                if self._pairs and time.monotonic() > late:
                    left_out.append(target.name)
                    continue
                sampler = layers.enter_context(closing(Sampler(self.workload, target, scene)))
                try:
                    self._pairs.append((sampler, self._result(target, *sampler.warm_up())))
                except TROUBLE as e:
                    hint = ": a directory of the image cannot be renamed without redirect_dir"
                    reason = why(e) + (hint if isinstance(e, OSError) and e.errno == errno.EXDEV else "")
                    yield Missing(self.workload.name, target.name, reason)
            if left_out:
                reason = f"no time left on {self.filesystem}: give more --seconds"
                yield Missing(self.workload.name, ", ".join(left_out), reason)
            fastest = min((sampler.seconds for sampler, _ in self._pairs), default=0.0)
            for sampler, _ in self._pairs:
                sampler.plan(fastest)
            self._turns(until=began + seconds / FEWEST)

    def again(self) -> None:
        """One more round, of those too that have settled: with fewer, more of a target's memory is in the caches."""
        began = time.monotonic()
        try:
            with self._scene() as scene, ExitStack() as layers:
                for sampler, _ in self._mixed():  # whoever comes first is likely to have the memory that it had before
                    sampler.scene = scene
                    layers.enter_context(closing(sampler)).warm_again()
                self._turns()
        except TROUBLE as e:
            self.ended = f"no more than {self.rounds} rounds: {why(e)}"
        self.cost = time.monotonic() - began

    def _mixed(self) -> list[tuple[Sampler, Result]]:
        return self._order.sample(self._pairs, len(self._pairs))

    def _turns(self, until: float = math.inf) -> None:
        there = self._mixed()
        samples = {result.target: sampler.sample() for sampler, result in there}
        for sampler, result in reversed(there if time.monotonic() < until else []):
            samples[result.target] = min(samples[result.target], sampler.sample())
        for result in self.results:
            seconds, cpu = samples[result.target]
            result.seconds.append(seconds)
            result.cpu.append(cpu)
            if HOST in samples:
                result.ratios.append(seconds / samples[HOST][0])
        self.rounds += 1

    def _result(self, target: Target, amount: int, copied: tuple[int | None, int]) -> Result:
        one = self.workload
        return Result(one.name, target.name, one.kind, one.what, one.unit, self.filesystem, amount, *copied)

    @contextmanager
    def _scene(self) -> Iterator[Scene]:
        scene = Scene(self.base, self.base / "lower", self.rootless, read_only=self.workload.kind == "read")
        try:
            scene.lower.mkdir(parents=True)
            self.workload.lower(scene.lower)
            yield scene
        finally:
            if self.base.exists():
                shutil.rmtree(self.base)


def go_on(courses: Sequence[Course], until: float) -> None:
    """More rounds for who needs them, until all have settled or time is over; one twice in a row if no other is left."""
    last = None
    while ready := [one for one in courses if not one.settled and time.monotonic() + one.cost < until]:
        last = max([one for one in ready if one is not last] or ready, key=lambda one: one.need)
        last.again()
