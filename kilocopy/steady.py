"""Whether what was counted was steady: where a warm-up ends, whether a rate drifts, whether a backlog grows. Pure arithmetic."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from scipy.special import ndtri, stdtr

from kilocopy.streams import Floats, Ints

BATCH = 5  # MSER-5
BIN_S_MAX = 0.2
BATCHES_MIN = 30
LAST_BATCHES = 5  # the statistic of a few batches at the very end is small by chance: Hoad, Robinson and Davies, JORS 61, 2010
HALVES_Z_MAX = 2.5
DRIFT_LIMIT = 0.20
DRIFT_P_VALUE = 0.05
STEADY_BINS_MIN = 4
GROWTH_LIMIT = 0.20
GROWTH_P_VALUE = 0.01


class Arrived(Protocol):
    """What is asked of streams here: their tokens between edges, and one by one (kilocopy.streams.Streams)."""

    def tally(self, edges_s: Floats) -> Floats: ...

    def arrivals(self) -> tuple[Floats, Floats]: ...

    def owners(self) -> Ints: ...


def mser5(values: Floats) -> tuple[int, bool]:
    """How many values at the start are warm-up, by MSER-5, and whether the best cut of all lies in the second half: no steady state.

    Means Z of batches of 5 values; the cut d minimises sum over i > d of (Z_i - mean)^2 / (n - d)^2, the squared standard error of
    what is kept, and lies in the first half. Source: K. P. White, An effective truncation heuristic for bias reduction in
    simulation output, Simulation 69, 1997.
    """
    batches = len(values) // BATCH
    if batches <= 2 * LAST_BATCHES:
        return 0, False
    means = values[: batches * BATCH].reshape(batches, BATCH).mean(axis=1)
    means -= means.mean()  # so that the difference of squares below loses no digits
    kept = batches - np.arange(batches)
    sums, squares = np.cumsum(means[::-1])[::-1], np.cumsum(means[::-1] ** 2)[::-1]
    errors = (squares - sums**2 / kept) / kept**2
    half = batches // 2
    return _first_least(errors[: half + 1]) * BATCH, _first_least(errors[: batches - LAST_BATCHES]) > half


def _first_least(errors: Floats) -> int:
    """The first place of the least value, where what differs by rounding alone is the same (a constant series has errors of 0)."""
    return int(np.argmax(errors <= errors.min() + 1e-12 * errors.max()))


def warm_up_s(streams: Arrived, start_s: float, end_s: float) -> float | None:
    """Seconds after the start that MSER-5 cuts off the token rate, in bins of 0.2 s or less; None: no steady state.

    The best cut of a rate that is as correlated as tokens are (a request's come one after the other) lies in the second half by
    chance in a third of the steady runs of half a minute. So a late cut counts only where the halves of what the best cut in the
    first half leaves differ beyond chance too; else that cut is taken.
    """
    edges_s = np.linspace(start_s, end_s, max(BATCHES_MIN * BATCH, int(np.ceil((end_s - start_s) / BIN_S_MAX))) + 1)
    cut, late = mser5(streams.tally(edges_s))
    if late and halves_z(*streams.arrivals(), streams.owners(), float(edges_s[cut]), end_s) > HALVES_Z_MAX:
        return None
    return float(edges_s[cut]) - start_s


def halves_z(times_s: Floats, weights: Floats, owners: Ints, start_s: float, end_s: float) -> float:
    """How many standard errors the halves of a window are apart in tokens, requests taken as independent of one another.

    With x the tokens of a request in the second half less those in the first: |sum of x| / sqrt(sum of x^2). `owners` numbers
    the request of each arrival. 0 without tokens.
    """
    inside = (times_s >= start_s) & (times_s < end_s)
    if not inside.any():
        return 0.0
    sign = np.where(times_s[inside] < (start_s + end_s) / 2, -1.0, 1.0)
    each = np.bincount(owners[inside], weights=sign * weights[inside])
    spread = float(np.sqrt((each**2).sum()))
    return abs(float(each.sum())) / spread if spread else 0.0


def drift(streams: Arrived, start_s: float, end_s: float) -> str | None:
    """Why the token rate is not steady, in words; None if it is, or if the time has too few seconds to say.

    Two tests on the rate per second: the halves of the window differ by over 20 % of the mean, or a linear trend that is
    significant (p < 0.05, two-sided t on the correlation) moves by over 20 % of the mean across the window.
    """
    duration_s = end_s - start_s
    bins = int(duration_s)
    edges_s = np.linspace(start_s, end_s, bins + 1)
    totals = streams.tally(edges_s) if bins >= STEADY_BINS_MIN else np.zeros(0)
    if not totals.sum():
        return None
    rates = totals / (edges_s[1] - edges_s[0])
    mean = float(totals.sum()) / duration_s
    first, second = (float(half) / (duration_s / 2) for half in streams.tally(np.linspace(start_s, end_s, 3)))
    if abs(second - first) > DRIFT_LIMIT * mean:
        return f"the first half of the window made {first:.4g} tokens/s, the second {second:.4g}: over {100 * DRIFT_LIMIT:g} % apart"
    x, slope = _slope(rates)
    drifted = slope * bins
    if abs(drifted) > DRIFT_LIMIT * mean and _trend_p_value(x, rates, slope) < DRIFT_P_VALUE:
        return f"the token rate drifted by {100 * drifted / mean:+.0f} % of its mean over the window"
    return None


def growth(in_flight: Floats, dispersion: float = 1.0) -> float | None:
    """By how many requests a backlog grew over evenly spaced means of requests in flight; None where it did not, beyond chance.

    A stationary open loop holds a Poisson number of requests, in bursts more (`dispersion`: variance over mean, 1/burstiness of
    gamma arrivals), so two moments differ with variance 2 x mean x dispersion. It grew where the fitted line rises by more than
    20 % of the mean and by more than chance does once in 100.
    """
    mean = float(in_flight.mean()) if len(in_flight) else 0.0
    if len(in_flight) < STEADY_BINS_MIN or mean <= 0:
        return None
    rise = _slope(in_flight)[1] * len(in_flight)
    chance = float(ndtri(1 - GROWTH_P_VALUE)) * np.sqrt(2 * mean * max(1.0, dispersion))
    return rise if rise > max(GROWTH_LIMIT * mean, chance) else None


def _slope(y: Floats) -> tuple[Floats, float]:
    """Centred places, and the least-squares slope of values against them."""
    x = np.arange(len(y), dtype=np.float64) - (len(y) - 1) / 2
    return x, float((x * y).sum() / (x * x).sum())


def _trend_p_value(x: Floats, y: Floats, slope: float) -> float:
    """Two-sided p value of a least-squares slope."""
    residual = y - y.mean() - slope * x
    error = np.sqrt(float((residual**2).sum()) / (len(x) - 2) / float((x * x).sum()))
    return float(2 * stdtr(len(x) - 2, -abs(slope) / error)) if error else 0.0
