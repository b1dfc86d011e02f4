"""How it is measured: a warm-up, then rounds in which every target has its turn, each on a new writable layer.

Other work on the machine then slows all targets alike, and what is compared is the ratio to the host directory in the same
round. Medians are given, with their quartiles.
"""

from __future__ import annotations

import errno
import gc
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from overlaykit.bench.files import Files
from overlaykit.bench.targets import HOST, Scene, Target
from overlaykit.bench.workload import Workload
from overlaykit.errors import OverlaykitError
from overlaykit.overlay.probe import has_reflink

FEWEST, MOST = 3, 40  # rounds


@dataclass(frozen=True, slots=True)
class Missing:
    """What did not run, and why. workload or target is "" if it stands for all of them."""

    workload: str
    target: str
    reason: str

    @property
    def name(self) -> str:
        return " on ".join(filter(None, (self.workload, self.target))) or "file system"


@dataclass(slots=True)
class Result:
    """One workload on one target: seconds, CPU seconds and ratio to the host of each round.

    amount: operations or bytes (`unit`) a round. copied: bytes in the writable layer after a copy-up workload.
    """

    workload: str
    target: str
    kind: str
    what: str
    unit: str
    filesystem: str = ""
    amount: int = 0
    copied: int = 0
    reflink: bool = False
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' ratios to the host directory; None if that did not run."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles of the ratios."""
        if len(self.ratios) < 2:
            return (self.ratios * 2)[0], (self.ratios * 2)[-1]
        q1, _, q3 = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return q1, q3


def usable(targets: Sequence[Target], place: Path, *, rootless: bool) -> Iterator[Target | Missing]:
    """Each target that makes a writable layer here, and why each other does not: tried, never guessed."""
    for target in targets:
        base = place / "trial" / target.name
        (base / "lower").mkdir(parents=True)
        (base / "lower" / "file").write_text("x")
        try:
            with target.fresh(Scene(base, base / "lower", rootless)) as files:
                os.close(files.open(files.root + "/file", os.O_RDWR))
        except (OSError, OverlaykitError) as e:
            yield Missing("", target.name, why(e))
        else:
            yield target
        shutil.rmtree(base)


def why(e: Exception) -> str:
    """An exception in one line."""
    if isinstance(e, OSError):
        return "; ".join([e.strerror or str(e), *getattr(e, "__notes__", ())]).replace("\n", " ")
    return str(e)


def obstacle(workload: Workload, place: Path) -> str:
    """Why `workload` cannot run on this machine; "" if it can."""
    for program in workload.programs:
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if workload.cold:
        if not os.access("/proc/sys/vm/drop_caches", os.W_OK):
            return "only root drops caches"
        from overlaykit.bench.machine import filesystem

        if filesystem(place) == "tmpfs":
            return "tmpfs has its files in memory and nowhere else"
    return ""


def measure(
    workload: Workload, targets: Sequence[Target], place: Path, *, seconds: float, rootless: bool, filesystem: str
) -> Iterator[Result | Missing]:
    """`workload` on each of `targets` in turn, until `seconds` are over, but FEWEST rounds."""
    base = place / workload.name
    scene = Scene(base, base / "lower", rootless)
    scene.lower.mkdir(parents=True)
    try:
        workload.lower(scene.lower)
        reflink = has_reflink(base)
        results: dict[str, Result] = {}
        for target in targets:
            if workload.by_path and target.name.startswith("overlaykit"):
                yield Missing(workload.name, target.name, workload.by_path)
                continue
            result = Result(workload.name, target.name, workload.kind, workload.what, workload.unit, filesystem)
            result.reflink = reflink
            try:
                result.amount, result.copied = once(workload, target, scene)[2:]  # the warm-up
            except (OSError, OverlaykitError) as e:
                hint = ": a directory of the image cannot be renamed without redirect_dir"
                reason = why(e) + (hint if isinstance(e, OSError) and e.errno == errno.EXDEV else "")
                yield Missing(workload.name, target.name, reason)
            else:
                results[target.name] = result
        rounds(workload, [t for t in targets if t.name in results], scene, results, seconds)
        yield from results.values()
    finally:
        shutil.rmtree(base)


def rounds(workload: Workload, targets: Sequence[Target], scene: Scene, results: dict[str, Result], seconds: float) -> None:
    began = time.monotonic()
    for number in range(MOST):
        if number >= FEWEST and time.monotonic() - began > seconds:
            break
        for target in targets if number % 2 == 0 else reversed(targets):
            elapsed, cpu, _, _ = once(workload, target, scene)
            results[target.name].seconds.append(elapsed)
            results[target.name].cpu.append(cpu)
        if HOST in results:
            beside = results[HOST].seconds[-1]
            for result in results.values():
                result.ratios.append(result.seconds[-1] / beside)


def once(workload: Workload, target: Target, scene: Scene) -> tuple[float, float, int, int]:
    """Seconds, CPU seconds, operations or bytes, and bytes in the writable layer of one run."""
    with target.fresh(scene) as files:
        workload.before(files)
        if workload.cold:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
        gc.collect()
        gc.disable()
        try:
            cpu = os.times()
            began = time.perf_counter()
            amount = workload.run(files)
            elapsed = time.perf_counter() - began
            after = os.times()
        finally:
            gc.enable()
        used = sum(after[:4]) - sum(cpu[:4])  # ours and our children's, in user and kernel mode
        return elapsed, used, amount, written(files) if workload.kind == "copy-up" else 0


def written(files: Files) -> int:
    """Bytes that the files of the writable layer take."""
    if files.upper is None:
        return 0
    return sum(
        os.lstat(os.path.join(directory, name)).st_blocks * 512
        for directory, _, names in os.walk(files.upper)
        for name in names
    )
