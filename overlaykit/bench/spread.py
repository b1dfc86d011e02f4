"""What rounds say together, and how sure that is.

What somebody else's work does to a target or to the host in a round makes that round an outlier: the mean is that of the
middle half. How sure it is follows from how much all rounds differ, by Student's t of their logarithms, at 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

T = math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23  # by degrees of freedom
SETTLED = 0.05  # of a ratio: how far from it the true one may be
MANY = 2.2  # for more than those, a little too much


def middle(rounds: Sequence[float]) -> float:
    """The geometric mean of the middle half; of fewer than four, of all."""
    spare = len(rounds) // 4
    return statistics.geometric_mean(sorted(rounds)[spare : len(rounds) - spare])


def student(freedom: int) -> float:
    return T[freedom] if freedom < len(T) else MANY


def doubt(rounds: Sequence[float]) -> float:
    """How far above what `rounds` have in common it may be, as part of it; infinite for fewer than two."""
    if len(rounds) < 2:
        return math.inf
    return math.expm1(student(len(rounds) - 1) * math.sqrt(variance(rounds)))


def chance(before: Sequence[float], after: Sequence[float]) -> float:
    """How many times the one two runs that measure the same may be the other, by their rounds; 1 for fewer than two each."""
    if min(len(before), len(after)) < 2:
        return 1.0
    freedom = len(before) + len(after) - 2
    return math.exp(student(freedom) * math.sqrt(variance(before) + variance(after)))


def variance(rounds: Sequence[float]) -> float:
    """Of the mean of their logarithms."""
    return statistics.variance([math.log(one) for one in rounds]) / len(rounds)
