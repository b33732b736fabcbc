"""Levels that were played several times: means and ratios with intervals, from one relative spread that all levels share.

Two or three repeats of one level know their own spread badly; those of all levels together know it well, where they differ by a factor
that does not depend on the level. So the variance of logarithms is pooled over the levels, and Student's t has all their
degrees of freedom. Without repeats the intervals inside the runs (batch means) take its place: what moves from one start of the
driver to the next is not in them, and `basis` says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from kilocopy.ratios import BATCHES, Reading, own_error2
from kilocopy.summary import Estimate

FREEDOM_MIN = 2  # one degree of freedom has t = 12.7: no interval that says anything
Basis = Literal["repeats", "within_run", "none"]


@dataclass(frozen=True)
class Spread:
    """Where intervals come from: the variance of one repeat's logarithm with its degrees of freedom, or each run's own."""

    basis: Basis
    variance: float = 0.0
    freedom: float = 0.0

    @property
    def t(self) -> float:
        """Student's t for 95 %."""
        return float(stdtrit(self.freedom, 0.975)) if self.basis != "none" else math.inf


def pooled(levels: Sequence[Sequence[Reading]]) -> Spread:
    """The spread of these levels: from their repeats where there are enough, else from inside the runs, else none."""
    logs = [np.log([one.value for one in level]) for level in levels if level]
    freedom = sum(len(values) - 1 for values in logs)
    if freedom >= FREEDOM_MIN:
        return Spread("repeats", sum(float(((values - values.mean()) ** 2).sum()) for values in logs) / freedom, freedom)
    if logs and all(own_error2(one) is not None for level in levels for one in level):
        return Spread("within_run", freedom=BATCHES - 1)
    return Spread("none")


def error2(level: Sequence[Reading], spread: Spread) -> float | None:
    """Squared standard error of the logarithm of a level's mean; None without a spread."""
    if spread.basis == "none":
        return None
    if spread.basis == "repeats":
        return spread.variance / len(level)
    return sum(own_error2(one) or 0.0 for one in level) / len(level) ** 2


def mean(level: Sequence[Reading], spread: Spread) -> Estimate:
    """A level's geometric mean with its 95 % interval."""
    return _within(float(np.log([one.value for one in level]).mean()), error2(level, spread), spread)


def ratio(over: Sequence[Reading], under: Sequence[Reading], spread: Spread) -> Estimate:
    """One level's mean over another's, with its 95 % interval."""
    middle = float(np.log([one.value for one in over]).mean() - np.log([one.value for one in under]).mean())
    a, b = error2(over, spread), error2(under, spread)
    return _within(middle, None if a is None or b is None else a + b, spread)


def _within(middle: float, squared: float | None, spread: Spread) -> Estimate:
    if squared is None:
        return Estimate(value=math.exp(middle))
    half = spread.t * math.sqrt(squared)
    return Estimate(value=math.exp(middle), low=math.exp(middle - half), high=math.exp(middle + half))
