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
from overlaykit.bench.spread import chance
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
class Change:
    """A ratio to the host that was `before` and is `after`.

    chance: how many times the one may be the other and still the same, by how much the rounds of each run differ.
    """

    workload: str
    target: str
    filesystem: str
    before: float
    after: float
    chance: float = 1.0

    @property
    def factor(self) -> float:
        return self.after / self.before

    @property
    def sure(self) -> bool:
        """More than chance."""
        return max(self.factor, 1 / self.factor) > self.chance


def compare(
    before: Sequence[Result | Missing],
    after: Sequence[Result | Missing],
    *,
    threshold: float = THRESHOLD,
    both: bool = False,
) -> tuple[list[Change], int]:
    """What got slower (`both`: or faster) by more than `threshold`, the most first, and how many ratios were in both runs.

    Ratios to the host of the same round are compared, so that a machine at work is no regression; which of them are more
    than chance, each change says.
    """
    old = {(r.filesystem, r.workload, r.target): r for r in before if isinstance(r, Result)}
    changes = []
    for new in after:
        was = old.get((new.filesystem, new.workload, new.target)) if isinstance(new, Result) else None
        if isinstance(new, Result) and was is not None and was.ratio is not None and new.ratio is not None:
            likely = chance(was.ratios, new.ratios)
            changes.append(Change(new.workload, new.target, new.filesystem, was.ratio, new.ratio, likely))
    found = [one for one in changes if one.factor > threshold or (both and one.factor * threshold < 1)]
    return sorted(found, key=lambda one: -max(one.factor, 1 / one.factor)), len(changes)
