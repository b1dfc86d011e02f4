"""Results as tables of words: times and ratios of each workload, and what its first writes copied."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from overlaykit.bench.method import Missing, Result
from overlaykit.bench.spread import SETTLED
from overlaykit.bench.targets import HOST, TARGETS
from overlaykit.sizes import size

NONE = "-"


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table as GitHub and most others read it; the title above it."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join([f"{self.title}:", "", *(f"| {' | '.join(line)} |" for line in lines)])


def tables(found: Sequence[Result | Missing]) -> Iterator[Table]:
    """Per file system: times of the host and ratios of the others; bytes that one first write copied."""
    results = [one for one in found if isinstance(one, Result)]
    for filesystem in dict.fromkeys(one.filesystem for one in results):
        here = [one for one in results if one.filesystem == filesystem]
        title = f"{filesystem}: time on the host, and how many times that each target takes"
        yield grid(title, {(one.workload, one.target): ratio(one) for one in here})
        first = [one for one in here if one.kind == "copy-up" and one.copied is not None]
        if first:
            title = f"{filesystem}: what one first write copied into the writable layer"
            yield grid(title, {(one.workload, one.target): copied(one) for one in first})


def certainty(found: Sequence[Result | Missing]) -> str:
    """How many ratios are settled, and which three are the least; "" if there are none."""
    ratios = [one for one in found if isinstance(one, Result) and one.target != HOST and one.ratio is not None]
    open_ones = sorted((one for one in ratios if one.doubt > SETTLED), key=lambda one: -one.doubt)
    least = ", ".join(f"{one.workload} on {one.target} {wide(one.doubt)}" for one in open_ones[:3])
    said = f"{len(ratios) - len(open_ones)} of {len(ratios)} ratios are certain to {SETTLED:.0%}"
    return "" if not ratios else f"{said}; the least: {least}" if least else said


def wide(doubt: float) -> str:
    """What is said of a ratio that may be so far from the true one."""
    if math.isinf(doubt):
        return "after one round"
    return f"to {doubt:.0%}" if doubt < 1 else "not at all"


def grid(title: str, cells: dict[tuple[str, str], str]) -> Table:
    """A row per workload, a column per target, in the order of TARGETS."""
    known = [target.name for target in TARGETS]
    targets = dict.fromkeys(target for _, target in cells)
    columns = sorted(targets, key=lambda target: known.index(target) if target in known else len(known))
    workloads = dict.fromkeys(workload for workload, _ in cells)
    rows = tuple((workload, *(cells.get((workload, target), NONE) for target in columns)) for workload in workloads)
    return Table(title, ("WORKLOAD", *columns), rows)


def ratio(one: Result) -> str:
    """The host's time (and rate), or how many times the host's it is, with three digits."""
    if one.target == HOST or one.ratio is None:
        rate = f" {one.amount / one.time / 1e9:.2f} GB/s" if one.unit == "bytes" else ""
        return f"{one.time * 1e3:.3g} ms{rate}"
    return f"{one.ratio:.{2 if one.ratio < 10 else 1 if one.ratio < 100 else 0}f}x"


def copied(one: Result) -> str:
    """Bytes of the layer that one operation wrote or, by reflink, shares with the image."""
    own, shared = (one.copied or 0) / one.amount, one.shared / one.amount
    written = size(own, binary=True)
    return f"{size(shared, binary=True)} by reflink" + (f" + {written}" if own >= 1 else "") if shared else written
