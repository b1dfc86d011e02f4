"""The writable layer beside a volume: overlaykit/bench's workloads on its targets, one benchmark each.

pytest benchmarks/bench_writable.py --benchmark-only                       all that runs here; the others say why not
pytest benchmarks/bench_writable.py --benchmark-only -k "create and host"  one of them

`overlaykit bench` gives each target its turn in each round, and so ratios that bear a busy machine; here one stands after
the other, for pytest-benchmark's own histograms and comparisons.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from overlaykit.bench import HOST, TARGETS, WORKLOADS, Missing, Scene, Target, Workload
from overlaykit.bench.method import obstacle, usable
from overlaykit.bench.sampler import Sampler

ROUNDS = 7
SMOKE = (HOST, "overlaykit")  # targets of a run that only sees whether the benchmarks work


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    measures = metafunc.config.getoption("benchmark_enable", default=False)
    workloads = [w for w in WORKLOADS if not w.full and (measures or not w.programs)]
    targets = [t for t in TARGETS if measures or t.name in SMOKE]
    metafunc.parametrize("workload", workloads, ids=[w.name for w in workloads])
    metafunc.parametrize("target", targets, ids=[t.name for t in targets])


@cache
def obstacles(place: Path) -> dict[str, str]:
    """Why a target does not run here."""
    return {one.target: one.reason for one in usable(TARGETS, place, rootless=False) if isinstance(one, Missing)}


@pytest.fixture(scope="session")
def place(scratch: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=scratch, prefix="writable-") as folder:
        yield Path(folder)


@pytest.fixture
def scene(place: Path, workload: Workload) -> Iterator[Scene]:
    """The image's files that the workload asks for."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        found = Scene(Path(folder), Path(folder) / "lower", read_only=workload.kind == "read")
        found.lower.mkdir()
        workload.lower(found.lower)
        yield found


def test_workload(benchmark: Any, place: Path, scene: Scene, workload: Workload, target: Target) -> None:
    inside = target.name.startswith("overlaykit")
    if reason := obstacles(place).get(target.name) or obstacle(workload, place) or (workload.by_path if inside else ""):
        pytest.skip(reason)
    with closing(Sampler(workload, target, scene)) as sampler:
        amount, copied = sampler.warm_up()
        benchmark.group = workload.name
        benchmark.extra_info.update(target=target.name, what=workload.what, unit=workload.unit, amount=amount, copied=copied)
        done = benchmark.pedantic(workload.run, setup=lambda: ((sampler.ready(),), {}), rounds=ROUNDS)
    assert done == amount
