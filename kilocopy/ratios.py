"""Ratios of two measured figures, with intervals that come from repeats where there are some. Pure arithmetic on logarithms.

What a run says of itself (batch means inside its window) does not know what moves from one start of the servers to the next, so a
ratio says where its interval is from: `repeats` of both sides, `pooled` (a side has fewer than three: one relative spread is taken
for both), `within_run`, or `none`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from kilocopy.summary import Frozen

Basis = Literal["repeats", "pooled", "within_run", "none"]
BATCHES = 20  # of the batch means behind an interval inside a run (measure.BATCHES)
REPEATS_MIN = 3
SAME = 1e-16  # a variance of logarithms that rounding alone makes


@dataclass(frozen=True)
class Reading:
    """One run's figure (over 0) with the 95 % interval that the run itself gives, where it gives one."""

    value: float
    low: float | None = None
    high: float | None = None


class RatioEstimate(Frozen):
    """A ratio of geometric means with its 95 % interval, how many runs are on each side, and where the interval is from."""

    value: float
    low: float | None
    high: float | None
    basis: Basis
    runs_over: int
    runs_under: int


def ratio(over: Sequence[Reading], under: Sequence[Reading]) -> RatioEstimate:
    """One side over another, each a run or several repeats.

    Three repeats or more on both sides: Welch's t interval on the logarithms (Welch 1947, degrees of freedom after Satterthwaite
    1946). Fewer on one of them: Student's t with the pooled variance, since Welch's covers 93 % for 95 % with two. One run on each
    side: the runs' own intervals as standard errors with 19 degrees of freedom (20 batches), combined in Welch's way.
    """
    logs = [np.log([one.value for one in side]) for side in (over, under)]
    middle = float(logs[0].mean() - logs[1].mean())
    basis, parts = _parts(over, under, logs)
    variance = sum(error2 for error2, _ in parts)
    if variance < SAME:  # equal to the last digits: a count of copies on a ladder, not a spread of 0
        return RatioEstimate(value=math.exp(middle), low=None, high=None, basis="none", runs_over=len(over), runs_under=len(under))
    freedom = variance**2 / sum(error2**2 / dof for error2, dof in parts if error2)
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return RatioEstimate(
        value=math.exp(middle),
        low=math.exp(middle - half),
        high=math.exp(middle + half),
        basis=basis,
        runs_over=len(over),
        runs_under=len(under),
    )


def _parts(over: Sequence[Reading], under: Sequence[Reading], logs: list[np.ndarray]) -> tuple[Basis, list[tuple[float, float]]]:
    """Where the interval is from, and each side's squared standard error of the logarithm with its degrees of freedom."""
    if min(map(len, logs)) >= REPEATS_MIN:
        return "repeats", [(float(values.var(ddof=1)) / len(values), len(values) - 1) for values in logs]
    freedom = sum(len(values) - 1 for values in logs)
    if freedom:
        pooled = sum(float(((values - values.mean()) ** 2).sum()) for values in logs) / freedom
        return "pooled", [(pooled * sum(1 / len(values) for values in logs), freedom)]
    errors2 = [own_error2(over[0]), own_error2(under[0])]
    if any(one is None for one in errors2):
        return "none", []
    return "within_run", [(one or 0.0, BATCHES - 1) for one in errors2]


def own_error2(one: Reading) -> float | None:
    """Squared standard error of a figure's logarithm, from the run's own 95 % interval; None without one."""
    if one.low is None or one.high is None or one.low <= 0:
        return None
    half = (math.log(one.high) - math.log(one.low)) / 2
    return (half / float(stdtrit(BATCHES - 1, 0.975))) ** 2
