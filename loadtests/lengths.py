"""How many tokens a request reads or writes: a fixed number, or a draw from a distribution that depends on the request's number alone.

One request takes one quantile u in (0, 1), worked out from the seed and the request's number, through the inverse of the
distribution function (Devroye, Non-Uniform Random Variate Generation, 1986, II.2). So a length is the same in whichever
process and order it is asked for, and a cut-off distribution needs no second try: u is drawn between the cuts' own quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.spec import EmpiricalLength, Length, LognormalLength, NormalLength, UniformLength
from loadtests import datasets

STANDARD = NormalDist()


class Lengths:
    """Lengths by request number, in tokens; `low` is the least that can come. Raises ProblemError for a file that cannot be used."""

    def __init__(self, length: Length, seed: int, key: str) -> None:
        self._seed, self._key = seed, key
        self._of: Callable[[float], int]
        if isinstance(length, UniformLength):
            self.low, self._of = length.low, _uniform(length)
        elif isinstance(length, NormalLength | LognormalLength):
            self.low, self._of = length.min, _cut_off(length)
        elif isinstance(length, EmpiricalLength):
            values = length.values or _from_file(length, key)
            self.low, self._of = min(values), lambda u: values[int(u * len(values))]
        else:
            self.low, self._of = length, lambda u: length
        self._fixed = length if isinstance(length, int) else None

    def __call__(self, index: int) -> int:
        """The length of request number `index`."""
        if self._fixed is not None:
            return self._fixed
        return self._of((schedule.draw(self._seed, self._key, index) + 0.5) / 2**31)


def _uniform(length: UniformLength) -> Callable[[float], int]:
    return lambda u: length.low + int(u * (length.high - length.low + 1))


def _cut_off(length: NormalLength | LognormalLength) -> Callable[[float], int]:
    """Quantiles between those of the cuts, half a token beyond min and max, so that both ends round to their fair share."""
    logarithmic = isinstance(length, LognormalLength)
    centre, spread = (length.mu, length.sigma) if isinstance(length, LognormalLength) else (length.mean, length.stddev)
    edges = (math.log(edge) if logarithmic else edge for edge in (length.min - 0.5, length.max + 0.5))
    low, high = ((edge - centre) / spread for edge in edges)
    # Far up the distribution function is 1 to the last bit: mirror there, where it is small and exact.
    sign = -1.0 if low > 0 else 1.0
    begin, end = sorted((STANDARD.cdf(sign * low), STANDARD.cdf(sign * high)))

    def at(u: float) -> int:
        value = centre + spread * sign * STANDARD.inv_cdf(min(max(begin + u * (end - begin), 1e-300), 1 - 2**-53))
        return min(max(round(math.exp(value) if logarithmic else value), length.min), length.max)

    return at


def _from_file(length: EmpiricalLength, key: str) -> list[int]:
    """The lengths of a file's column."""
    path = Path(str(length.path))
    values, column = [], length.column
    for where, row in datasets.rows(path, f"workload {key}.path"):
        if column is None:
            if len(row) != 1:
                raise ProblemError(f"{where}: the columns are {', '.join(map(str, row))}; say which one with `column`")
            column = next(iter(row))
        values.append(datasets.whole_number(where, row, column))
    if not values:
        raise ProblemError(f"{path} has no rows; expected a length in tokens per row")
    return values
