"""Copies 1..N on fixed hardware: where the knee is, what a further copy adds, and how many copies hold a speed.

Everything here is arithmetic over levels that were measured; nothing reads a record. What the data cannot carry is not fitted: each
function says in a sentence why it has no answer.

The knee is where *power* is largest: throughput over response time (L. Kleinrock, Power and deterministic rules of thumb for
probabilistic problems in computer communications, ICC 1979). With N copies in a closed loop a token takes N / X(N) seconds, so power is
X(N)^2 / N, and it is largest where one per cent more copies add half a per cent of throughput. Unlike a knee found by the
distance from a chord it does not move when the sweep goes further.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.special import bdtr, stdtrit

from kilocopy import search
from kilocopy.ratios import BATCHES
from kilocopy.recording import Floats
from kilocopy.spec import Slo
from kilocopy.streams import Mask
from kilocopy.summary import Estimate, Knee

Z_95 = 1.959963984540054
LEVELS_MIN = 4  # for a knee: two on each side of it, or its place is the levels' and not the data's
REDRAWS = 1000
GRID = 400
SAME = 1e-4  # speeds no further apart, relative, are one: times are whole microseconds, and how they are rounded is no slow moment


@dataclass(frozen=True)
class Point:
    """One level: copies, tokens/s with its 95 % interval."""

    copies: int
    rate: Estimate

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the rate, from its interval; None where it has none."""
        if self.rate.low is None or self.rate.high is None:
            return None
        return (self.rate.high - self.rate.low) / 2 / Z_95


def unsteady(points: Sequence[Point]) -> str | None:
    """A sentence where throughput clearly falls and clearly rises again: then something else than the copies changed."""
    ordered = sorted(points, key=lambda point: point.copies)
    for i, fell in enumerate(ordered):
        before = max(ordered[:i], key=lambda point: point.rate.low or 0, default=None)
        after = max(ordered[i + 1 :], key=lambda point: point.rate.low or 0, default=None)
        if before and after and _clearly_below(fell, before) and _clearly_below(fell, after):
            return (
                f"Throughput is not monotone: {fell.rate.value:,.0f} tokens/s at {fell.copies} copies lie clearly below both "
                f"{before.copies} ({before.rate.value:,.0f}) and {after.copies} ({after.rate.value:,.0f}) copies, which no law of copies explains: "
                "something else changed between the levels. Run it again, with random_order."
            )
    return None


def _clearly_below(one: Point, other: Point) -> bool:
    high, low = one.rate.high, other.rate.low
    return high is not None and low is not None and high < low


def knee(points: Sequence[Point]) -> Knee:
    """The copies at which power is largest, with a 95 % interval from throughput's own (redrawn normally, seeded).

    Between levels log throughput runs as a monotone cubic in log copies (PCHIP: Fritsch and Butland 1984).
    """
    ordered = sorted(points, key=lambda point: point.copies)
    if len(ordered) < LEVELS_MIN:
        return _no_knee(f"{len(ordered)} levels that count are too few for a knee: it takes {LEVELS_MIN}")
    if said := unsteady(ordered):
        return _no_knee(said.rstrip("."))
    copies = np.array([point.copies for point in ordered], dtype=np.float64)
    rates = np.array([point.rate.value for point in ordered])
    at = float(_power_peaks(copies, rates[None, :])[0])
    if at > 0.999 * copies[-1]:
        return _no_knee(f"the knee is not inside the sweep: at {copies[-1]:.0f} copies a further copy still adds more than half of its share")
    if at < 1.001 * copies[0]:
        return _no_knee(f"the knee is not inside the sweep: already at {copies[0]:.0f} copies a further one adds less than half of its share")
    known = [point.deviation for point in ordered]
    spread = np.array([one or 0.0 for one in known])
    low = high = None
    if all(one is not None for one in known):
        normal = np.random.default_rng(0).standard_normal((REDRAWS, len(ordered)))
        peaks = _power_peaks(copies, np.maximum(rates + spread * normal, rates * 1e-3))
        low, high = (float(end) for end in np.percentile(peaks, [2.5, 97.5]))
    told = " (no interval: a level is too short for one)"
    if low is not None and high is not None:
        # A redrawn peak on the first or the last level says only that the knee may lie outside.
        fewer, further = " or fewer" if low < 1.001 * copies[0] else "", " or more" if high > 0.999 * copies[-1] else ""
        told = f" [{low:.0f}{fewer} – {high:.0f}{further}]"
    why = "there (tokens/s)² / copies is largest, and beyond it a further copy adds less than half of its share"
    return Knee(copies=at, low=low, high=high, sentence=f"The knee is at {at:.0f} copies{told}: {why}.")


def _no_knee(why: str) -> Knee:
    return Knee(copies=None, low=None, high=None, sentence=f"No knee: {why}.")


def _power_peaks(copies: Floats, rates: Floats) -> Floats:
    """Where 2 log X - log N is largest, on a fine grid in log N, for each row of rates."""
    x = np.log(copies)
    grid = np.linspace(x[0], x[-1], GRID)
    power = 2 * PchipInterpolator(x, np.log(rates), axis=1)(grid) - grid
    return np.asarray(np.exp(grid[np.argmax(power, axis=1)]), dtype=np.float64)


def gain(lower: Point, upper: Point) -> Estimate:
    """Tokens/s that each further copy adds between two levels; the interval from both levels', taken as independent."""
    more = upper.copies - lower.copies
    value = (upper.rate.value - lower.rate.value) / more
    a, b = lower.deviation, upper.deviation
    if a is None or b is None:
        return Estimate(value=value)
    half = Z_95 * math.hypot(a, b) / more
    return Estimate(value=value, low=value - half, high=value + half)


def per_further(below: tuple[Floats, Floats], above: tuple[Floats, Floats]) -> Estimate | None:
    """What comes with the further copies over the further pages, (joules/s above - below) / (pages/s above - below); each level as both of equal parts of its window.

    Fieller's interval of a ratio (Biometrika 41, 1954), 95 %; none where the gain in pages is not clear of 0, and no figure where there is no gain.
    """
    over, under = (float(above[i].mean() - below[i].mean()) for i in (0, 1))
    if under <= 0:
        return None
    errors = np.cov(below) / len(below[0]) + np.cov(above) / len(above[0])
    square = float(stdtrit(min(len(below[0]), len(above[0])) - 1, 0.975)) ** 2
    a, b, c = under**2 - square * errors[1, 1], over * under - square * errors[0, 1], over**2 - square * errors[0, 0]
    if a <= 0:
        return Estimate(value=over / under)
    half = math.sqrt(max(b * b - a * c, 0.0))
    return Estimate(value=over / under, low=(b - half) / a, high=(b + half) / a)


def independent(speeds: Floats, quantile: float) -> float:
    """The part of a level's streams that counts as independent in what misses the quantile; speeds in the order of the streams' begin."""
    return independent_part(speeds <= (1 + SAME) * np.quantile(speeds, 1 - quantile, method="inverted_cdf")) if len(speeds) else 1.0


def independent_part(which: Mask) -> float:
    """The part of streams that counts as independent in a share of them, from how far twentieths of them, in the order of their begin, differ in it.

    Streams that share a batch are alike: two hundred that were slow together are few observations of how often it is slow. This is
    one over the design effect of a cluster sample (Kish, Survey Sampling, 1965): a fraction over 0, at most 1, and 1 where there are too few streams to tell.
    """
    if len(which) < 2 * BATCHES:
        return 1.0
    alone = float(which.mean() * (1 - which.mean())) / len(which)
    if alone == 0:
        return 1.0
    clustered = float(np.var([part.mean() for part in np.array_split(which, BATCHES)], ddof=1)) / BATCHES
    return 1 / max(1.0, clustered / alone * (float(stdtrit(BATCHES - 1, 0.975)) / Z_95) ** 2)


def speed_held(speeds: Floats, quantile: float, part: float = 1.0) -> Estimate | None:
    """The speed that `quantile` of the streams hold at least, with a distribution-free 95 % interval by order statistics.

    speeds: tokens/s of each stream, 0 for one that missed the TTFT; `part`: of them that counts as independent. The low end is 0 where the streams
    are too few for one. Source: David and Nagaraja, Order Statistics, 2003, section 7.1.
    """
    if not len(speeds):
        return None
    ordered, share, count = np.sort(speeds), 1 - quantile, max(1, int(len(speeds) * part))
    value = float(np.quantile(ordered, share, method="inverted_cdf"))
    low, high = np.searchsorted(bdtr(np.arange(count + 1), count, share), [0.025, 0.975])
    first, last = int(low) * len(ordered) // count, -(-(int(high) + 1) * len(ordered) // count)  # whole numbers: 1 / 49 * 49 is under 1
    ends = (float(ordered[first - 1]) if first else 0.0), float(ordered[min(last, len(ordered)) - 1])
    return Estimate(value=value, low=min(ends[0], value), high=max(ends[1], value))


def crossing(copies: Sequence[int], speeds: Sequence[Estimate], asked: float) -> Estimate | None:
    """The copies at which the curve of `speed_held` falls through a speed: between levels a monotone cubic, log-log (PCHIP).

    None where the curve is below from the first level on, or above to the last. The interval has the curve's error at the levels and that of not knowing it
    between them: copies slow each other down ever faster, so that log-log the curve lies above its chords and below its neighbouring chords' extensions. It is
    from where the chords of the levels' low ends cross to where the extensions of their high ends do; an end outside the sweep is None.
    """
    x = np.log(np.array(copies, dtype=np.float64))
    curves = [np.log(np.clip([_end(speed, end) for speed in speeds], asked / 1e3, asked * 1e3)) - math.log(asked) for end in ("low", "value", "high")]
    grid = np.linspace(x[0], x[-1], GRID * len(x))
    value = _falls(grid, PchipInterpolator(x, curves[1])(grid)) if len(x) > 1 else None
    if value is None:
        return None
    low = _falls(grid, np.interp(grid, x, curves[0]))
    high = _falls(grid, _above(x, curves[2], grid))
    return Estimate(
        value=math.exp(value),
        low=None if low is None else math.exp(min(low, value)),
        high=None if high is None else math.exp(max(high, value)),
    )


def _end(speed: Estimate, end: str) -> float:
    known = getattr(speed, end)
    return speed.value if known is None else float(known)


def _above(x: Floats, y: Floats, at: Floats) -> Floats:
    """The most that a falling, concave curve through these points can be: the least of the neighbouring chords' extensions and the level before."""
    y = np.maximum.accumulate(y[::-1])[::-1]  # a level that lies below a later one is taken to lie as high
    found, slopes = np.interp(at, x, y), np.diff(y) / np.diff(x)
    for i in range(len(x) - 1):
        mine = (at > x[i]) & (at < x[i + 1])
        bounds = [np.full(int(mine.sum()), y[i])]
        bounds += [y[i] + slopes[i - 1] * (at[mine] - x[i])] if i else []
        bounds += [y[i + 1] + slopes[i + 1] * (at[mine] - x[i + 1])] if i + 1 < len(slopes) else []
        found[mine] = np.maximum(np.min(bounds, axis=0), np.interp(at[mine], x, y))
    return np.asarray(found, dtype=np.float64)


def _falls(at: Floats, above: Floats) -> float | None:
    """Where a curve first falls below 0; None where it is there from the beginning, or never is."""
    below = np.flatnonzero(above < 0)
    if not len(below) or not below[0]:
        return None
    i = int(below[0])
    return float(at[i - 1] + (at[i] - at[i - 1]) * above[i - 1] / (above[i - 1] - above[i]))


@dataclass(frozen=True)
class Held:
    """Which level of a sweep held a speed."""

    held: int | None
    clearly_held: int | None
    clearly_missed: int | None
    unjudged: bool  # a level that the driver decided stands before the first that missed


def held(levels: Sequence[search.Level], slo: Slo) -> Held:
    """The largest level that held, no smaller one having missed, between the largest that clearly held and the smallest that clearly missed."""
    kept: list[search.Level] = []
    unjudged = False
    for level in sorted(levels, key=lambda level: level.load):
        if search.verdict(level, slo) == "unsound" or not level.judged:
            unjudged = True
            break
        if not search.holds(level, slo):
            break
        kept.append(level)
    most = int(kept[-1].load) if kept else None
    clearly = [int(level.load) for level in kept if search.verdict(level, slo) == "held"]
    missed = [int(level.load) for level in levels if search.verdict(level, slo) == "missed" and level.load > (most or 0)]
    return Held(most, max(clearly, default=None), min(missed, default=None), unjudged)
