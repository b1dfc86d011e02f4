"""Measuring, and noting what was measured: rates, sizes, what it was compared with, ratios of interleaved rounds."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

bars: list[str] = []  # what the session found about each bar


def group(name: str, size: int) -> str:
    """The group in which kernel, reference and tools stand side by side."""
    return f"{name}, {size:,} entries"


def rounds(size: int, *, slow: bool = False) -> int:
    """How often to measure: medians of several, but what takes long only once."""
    if size >= 1_000_000:
        return 1 if slow else 5
    return 3 if slow else 9


def measure(
    benchmark: Any,
    work: Callable[..., object],
    *,
    name: str,
    entries: int,
    size: int = 0,
    compared_with: str,
    slow: bool = False,
    parts: int = 1,
    setup: Callable[[], Any] | None = None,
) -> object:
    """What `work` gives. Notes entries/s, bytes/s (if `size` counts bytes) and what else is in the group `name`.

    parts: `work` does that part of the entries, and is run so often; the times are those of one part.
    """
    benchmark.group = group(name, entries)
    result: object = benchmark.pedantic(work, setup=setup, rounds=parts if parts > 1 else rounds(entries, slow=slow))
    benchmark.extra_info.update(entries=entries, compared_with=compared_with)
    if size:
        benchmark.extra_info["bytes"] = size
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median * parts
        benchmark.extra_info["entries_per_s"] = round(entries / seconds)
        if size:
            benchmark.extra_info["bytes_per_s"] = round(size / seconds)
    return result


def compare(
    benchmark: Any,
    what: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    entries: int,
    tool: str,
    most: float | None = None,
    before: Callable[[], object] = lambda: None,
) -> float:
    """How long `ours` takes for one second of `theirs`, by medians of rounds in turn: other work then slows both alike.

    most: the bar. It is reported, not asserted: a machine at work is no reason for a red suite.
    """
    times: tuple[list[float], list[float]] = ([], [])

    def both() -> None:
        for seconds, work in zip(times, (ours, theirs), strict=True):
            before()
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)

    benchmark.group = group("bars", entries)
    benchmark.pedantic(both, rounds=rounds(entries) + 2 if benchmark.enabled else 1)
    mine, other = statistics.median(times[0]), statistics.median(times[1])
    ratio = mine / other
    benchmark.extra_info.update(entries=entries, compared_with=tool, ratio=round(ratio, 4), at_most=most)
    if benchmark.enabled:
        verdict = "" if most is None else f", bar {most}: {'holds' if ratio <= most else 'DOES NOT HOLD'}"
        bars.append(f"{what}, {entries:,} entries: {mine * 1e3:.2f} ms, {tool} {other * 1e3:.2f} ms, {ratio:.3f}x{verdict}")
    return ratio


def run(*command: str | Path, stdin: bytes | None = None, directory: Path | None = None) -> None:
    """Run a tool, what it prints thrown away."""
    subprocess.run(
        command, input=stdin, cwd=directory, stdout=subprocess.DEVNULL, check=True, env={**os.environ, "LC_ALL": "C"}
    )


def need(tool: str) -> str:
    """The path of a tool, or a skipped benchmark."""
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} is not installed")
    return found


def sort_merge(lists: Sequence[Path], out: Path) -> None:
    """GNU sort's merge of sorted path lists."""
    run("sort", "-m", "-o", out, *lists)
