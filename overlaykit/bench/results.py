"""Results as files, in pytest-benchmark's JSON, and two of them compared."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from overlaykit.bench.method import Missing, Result
from overlaykit.errors import OverlaykitError
from overlaykit.tree.table import StrPath

THRESHOLD = 1.2  # between what two runs differ by (15 %) and what matters (30 %)


def save(path: StrPath, found: Iterable[Result | Missing], machine: dict[str, Any]) -> None:
    """Write them to `path`; a reader sees the old file or the new one."""
    found = list(found)
    document = {
        "machine_info": machine,
        "commit_info": {},
        "benchmarks": [as_benchmark(result) for result in found if isinstance(result, Result)],
        "missing": [asdict(missing) for missing in found if isinstance(missing, Missing)],
        "datetime": datetime.now(UTC).isoformat(),
        "version": "5.0.0",
    }
    target = Path(path)
    part = target.with_name(target.name + ".part")
    part.write_text(json.dumps(document, indent=1))
    part.replace(target)


def as_benchmark(result: Result) -> dict[str, Any]:
    data = result.seconds
    q1, median, q3 = statistics.quantiles(data, n=4, method="inclusive") if len(data) > 1 else data * 3
    name = f"{result.workload}[{result.target}]"
    mean = statistics.mean(data)
    return {
        "group": f"{result.workload} on {result.filesystem}",
        "name": name,
        "fullname": f"{result.filesystem}::{name}",
        "params": {"target": result.target},
        "param": result.target,
        "options": {"disable_gc": True, "warmup": True},
        "extra_info": {**asdict(result), "ratio": result.ratio},
        "stats": {
            "min": min(data), "max": max(data), "mean": mean, "stddev": statistics.stdev(data) if len(data) > 1 else 0.0,
            "rounds": len(data), "median": median, "iqr": q3 - q1, "q1": q1, "q3": q3, "iqr_outliers": 0,
            "stddev_outliers": 0, "outliers": "0;0", "ld15iqr": min(data), "hd15iqr": max(data), "ops": 1 / mean,
            "total": sum(data), "data": data, "iterations": 1,
        },
    }  # fmt: skip


def load(path: StrPath) -> tuple[list[Result | Missing], dict[str, Any]]:
    """What `save` wrote. OverlaykitError for another file."""
    try:
        document = json.loads(Path(path).read_bytes())
        rows: list[Result | Missing] = []
        for benchmark in document["benchmarks"]:
            facts = {key: value for key, value in benchmark["extra_info"].items() if key != "ratio"}
            rows.append(Result(**facts))
        rows += [Missing(**missing) for missing in document["missing"]]
        return rows, dict(document["machine_info"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise OverlaykitError(f"{path}: no results of overlaykit bench: {e}", hint="bench --json FILE writes them") from None


@dataclass(frozen=True, slots=True)
class Regression:
    """A ratio to the host that grew from `before` to `after`."""

    workload: str
    target: str
    filesystem: str
    before: float
    after: float


def compare(
    before: Sequence[Result | Missing], after: Sequence[Result | Missing], *, threshold: float = THRESHOLD
) -> tuple[list[Regression], int]:
    """What got slower by more than `threshold`, the worst first, and how many ratios were in both runs.

    Ratios to the host of the same round are compared, so that a machine at work is no regression.
    """
    old = {(r.filesystem, r.workload, r.target): r.ratio for r in before if isinstance(r, Result)}
    worse, common = [], 0
    for result in after:
        if isinstance(result, Missing) or result.ratio is None:
            continue
        was = old.get((result.filesystem, result.workload, result.target))
        if was is not None:
            common += 1
            if result.ratio > was * threshold:
                worse.append(Regression(result.workload, result.target, result.filesystem, was, result.ratio))
    return sorted(worse, key=lambda r: r.before / r.after), common
