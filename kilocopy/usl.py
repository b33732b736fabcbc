"""Throughput over replicas: the Universal Scalability Law, fitted only as far as the data carries it.

    X(R) = lambda R / (1 + sigma (R - 1) + kappa R (R - 1))

lambda: tokens/s of one replica; sigma >= 0: contention, what waits for something shared (kappa = 0: Amdahl's law); kappa >= 0: coherency, what each has to
agree on with each other. Source: N. J. Gunther, Guerrilla Capacity Planning, Springer 2007, chapters 4 to 6; the largest X is at sqrt((1 - sigma) / kappa).

Each level is measured several times, each time served anew, and these repeats are the only error that is used: they are pooled over the
levels in log X. The intervals come from a parametric bootstrap whose error is drawn too (chi-square with as many degrees of freedom
as the repeats have), since three repeats know their own spread badly. Its draws may leave sigma and kappa below 0, and the intervals are cut off there
afterwards: with draws that are kept at 0 or above, those of sigma held the true one in 86 % of synthetic data sets, for 95 %, where kappa is 0. A law that the repeats contradict (lack of fit, F test) is
not printed.

A term whose interval includes 0 is dropped, but not proven to be 0: what it might be is printed as its interval's upper end, and the intervals of
what is left stay those of the fullest law. (Those of the simpler law held the true sigma in 40 % of synthetic data sets, for 95 %, where a kappa of
0.0001 was too small to be seen.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.optimize import least_squares
from scipy.special import fdtrc, stdtrit

from kilocopy.recording import Floats
from kilocopy.summary import Estimate

REPEATS_MIN = 3
LEVELS_USL, LEVELS_AMDAHL = 4, 3  # one more than the parameters of each law
DRAWS = 4000
LACK_OF_FIT = 0.01  # a law is refused where its misfit has less than this probability
Law = Literal["usl", "amdahl", "linear"]
PARAMETERS: dict[Law, int] = {"usl": 3, "amdahl": 2, "linear": 1}


@dataclass(frozen=True)
class Measurement:
    """One serving of so many replicas: tokens/s."""

    replicas: int
    rate: float


@dataclass(frozen=True)
class Fit:
    """The simplest law that the data does not contradict; intervals are 95 %, and those of the fullest law that the levels carry.

    A term that was dropped is 0 with an interval from 0; one that was not looked for has none. `peak`: the replicas of most throughput.
    """

    law: Law
    rate_of_one: Estimate
    sigma: Estimate
    kappa: Estimate
    peak: Estimate | None  # null unless kappa's interval excludes 0
    lack_of_fit_p: float | None
    levels: int
    repeats: int


def throughput(replicas: Floats, rate_of_one: float, sigma: float, kappa: float) -> Floats:
    """The law."""
    return np.asarray(rate_of_one * replicas / (1 + sigma * (replicas - 1) + kappa * replicas * (replicas - 1)), dtype=np.float64)


def fit(measured: Sequence[Measurement]) -> Fit | str:
    """Fit the fullest law first, drop each term whose interval includes 0; or a sentence that says why nothing is fitted."""
    if said := refusal(measured):
        return said
    counts = {one.replicas for one in measured}
    laws: list[Law] = ["usl", "amdahl", "linear"] if len(counts) >= LEVELS_USL else ["amdahl", "linear"]
    fullest = _fitted(measured, laws[0])
    for law in laws:
        found = fullest if law == laws[0] else _fitted(measured, law)
        kept = {"usl": found.kappa, "amdahl": found.sigma}.get(law)
        if kept is None or (kept.low or 0) > 0:
            break
    if found.lack_of_fit_p is not None and found.lack_of_fit_p < LACK_OF_FIT:
        return (
            f"Nothing is fitted: the levels lie further from every law of this shape than the repeats of a level from each other "
            f"(lack of fit, p = {found.lack_of_fit_p:.2g}): something else than the number of replicas changed between the levels."
        )
    rate, sigma, kappa = (_covering(getattr(found, name), getattr(fullest, name)) for name in ("rate_of_one", "sigma", "kappa"))
    return replace(found, rate_of_one=rate, sigma=sigma, kappa=kappa if "usl" in laws else Estimate(value=0.0))


def _covering(value: Estimate, fullest: Estimate) -> Estimate:
    """A value of the simplest law with the fullest one's interval, widened where it lies outside."""
    low, high = (end if end is not None else value.value for end in (fullest.low, fullest.high))
    return Estimate(value=value.value, low=min(low, value.value), high=max(high, value.value))


def refusal(measured: Sequence[Measurement]) -> str | None:
    """Why these measurements cannot carry a fit; None where they can."""
    per_level = {count: [one.rate for one in measured if one.replicas == count] for count in sorted({one.replicas for one in measured})}
    if len(per_level) < LEVELS_AMDAHL:
        told = ", ".join(map(str, per_level)) or "none"
        return f"Nothing is fitted: {len(per_level)} levels of replicas that count ({told}) are too few; contention takes {LEVELS_AMDAHL}, coherency {LEVELS_USL}."
    few = {count: len(rates) for count, rates in per_level.items() if len(rates) < REPEATS_MIN}
    if few:
        told = ", ".join(f"{repeats} at {count}" for count, repeats in few.items())
        return f"Nothing is fitted: repeats are missing ({told}; each level needs {REPEATS_MIN} that count, each served anew), so nothing says how far two servings differ."
    if any(one.rate <= 0 for one in measured):
        return "Nothing is fitted: a serving made no token."
    return None


def _fitted(measured: Sequence[Measurement], law: Law) -> Fit:
    replicas = np.array([one.replicas for one in measured], dtype=np.float64)
    logs = np.log([one.rate for one in measured])
    best = _solve(replicas, logs, law)
    sd, freedom = _repeatability(replicas, logs)
    curve = np.log(throughput(replicas, *best))
    unbounded = _solve_draws(replicas, curve, logs[None, :], law)[0]
    around = np.log(np.maximum(throughput(replicas, *unbounded), np.exp(curve) / 2))  # a law below its bounds need not be one at all
    draw = np.random.default_rng(0)
    errors = draw.standard_normal((DRAWS, len(logs))) * (sd * np.sqrt(freedom / draw.chisquare(freedom, DRAWS)))[:, None]
    drawn = _solve_draws(replicas, around, around + errors, law)
    rate, sigma, kappa = (_interval(best[i], drawn[:, i]) for i in range(3))
    return Fit(
        law=law,
        rate_of_one=rate,
        sigma=sigma,
        kappa=kappa,
        peak=_peak(best, drawn) if law == "usl" and (kappa.low or 0) > 0 else None,
        lack_of_fit_p=_lack_of_fit(replicas, logs, curve, sd, freedom, PARAMETERS[law]),
        levels=len(np.unique(replicas)),
        repeats=len(measured),
    )


def _solve(replicas: Floats, logs: Floats, law: Law) -> tuple[float, float, float]:
    """Least squares in log X with sigma, kappa >= 0: (lambda, sigma, kappa).

    For given sigma and kappa the best lambda is the mean of what is left, so only those two are searched for.
    """
    free = PARAMETERS[law] - 1

    def left(shape: Floats) -> Floats:
        sigma, kappa = (*shape, 0.0)[:2] if free else (0.0, 0.0)
        rest = logs - np.log(throughput(replicas, 1.0, sigma, kappa))
        return np.asarray(rest - rest.mean(), dtype=np.float64)

    shape: Sequence[float] = ()
    if free:
        shape = least_squares(left, [0.02, 0.001][:free], bounds=(0, [1.0, 1.0][:free]), x_scale=[0.05, 0.005][:free], xtol=1e-10, ftol=1e-10).x.tolist()
    sigma, kappa = (*shape, 0.0, 0.0)[:2]
    sigma, kappa = (0.0 if one < 1e-9 else float(one) for one in (sigma, kappa))  # the solver stays a hair inside its bounds
    return float(np.exp((logs - np.log(throughput(replicas, 1.0, sigma, kappa))).mean())), sigma, kappa


def _solve_draws(replicas: Floats, curve: Floats, logs: Floats, law: Law) -> Floats:
    """The same for many draws at once, near a curve (log X), sigma and kappa without their bounds: (lambda, sigma, kappa) of each row of `logs`.

    R / X = (1 + sigma (R - 1) + kappa R (R - 1)) / lambda is linear in 1 / lambda, sigma / lambda and kappa / lambda, and its errors relative to
    the curve are those of log X to first order.
    """
    terms = np.column_stack([np.ones(len(replicas)), replicas - 1, replicas * (replicas - 1)])[:, : PARAMETERS[law]]
    weight = np.exp(curve) / replicas
    found = np.zeros((len(logs), 3))
    found[:, : PARAMETERS[law]] = (replicas / np.exp(logs) * weight) @ np.linalg.pinv(terms * weight[:, None]).T
    return np.asarray(np.column_stack([1 / found[:, 0], found[:, 1] / found[:, 0], found[:, 2] / found[:, 0]]), dtype=np.float64)


def _repeatability(replicas: Floats, logs: Floats) -> tuple[float, int]:
    """Standard deviation of log X between servings of the same level, pooled, and its degrees of freedom."""
    squares, freedom = 0.0, 0
    for count in np.unique(replicas):
        same = logs[replicas == count]
        squares += float(((same - same.mean()) ** 2).sum())
        freedom += len(same) - 1
    return max(math.sqrt(squares / freedom), 1e-9), freedom


def _lack_of_fit(replicas: Floats, logs: Floats, curve: Floats, sd: float, freedom: int, parameters: int) -> float | None:
    """Probability of so large a misfit where the law is right: F of the levels' means about the curve over the repeats' variance."""
    levels = np.unique(replicas)
    if len(levels) <= parameters:
        return None
    misfit = sum(float((replicas == count).sum()) * float(logs[replicas == count].mean() - curve[replicas == count][0]) ** 2 for count in levels)
    between = len(levels) - parameters
    return float(fdtrc(between, freedom, misfit / between / sd**2))


def _interval(value: float, drawn: Floats) -> Estimate:
    low, high = np.maximum(np.percentile(drawn, [2.5, 97.5]), 0.0)
    return Estimate(value=value, low=float(min(low, value)), high=float(max(high, value)))


def _peak(best: tuple[float, float, float], drawn: Floats) -> Estimate:
    """sqrt((1 - sigma) / kappa)."""
    sigma, kappa = np.minimum(drawn[:, 1], 1.0), np.maximum(drawn[:, 2], 1e-12)  # a draw may lie beyond the fit's own bound of 1
    return _interval(math.sqrt((1 - best[1]) / best[2]), np.sqrt((1 - sigma) / kappa))


def mean_rate(rates: Sequence[float]) -> Estimate:
    """Geometric mean of a level's servings with its 95 % t interval; none with fewer than two."""
    logs = np.log(rates)
    value = float(np.exp(logs.mean()))
    if len(rates) < 2:
        return Estimate(value=value)
    half = float(stdtrit(len(rates) - 1, 0.975) * logs.std(ddof=1) / math.sqrt(len(rates)))
    return Estimate(value=value, low=value * math.exp(-half), high=value * math.exp(half))


def efficiency(rates: Sequence[float], replicas: int, rates_of_one: Sequence[float]) -> Estimate:
    """Throughput per replica over that of one replica, with a 95 % interval; none with fewer than two of either, or for one replica itself."""
    each = [rate / replicas for rate in rates]
    return over(each, rates_of_one) if replicas > 1 else Estimate(value=over(each, rates_of_one).value)


def over(figures: Sequence[float], beside: Sequence[float]) -> Estimate:
    """Ratio of the geometric means of servings, with a 95 % interval (Welch's t on the logarithms); none with fewer than two on either side."""
    many, one = np.log(figures), np.log(beside)
    value = float(np.exp(many.mean() - one.mean()))
    if len(many) < 2 or len(one) < 2:
        return Estimate(value=value)
    a, b = float(many.var(ddof=1)) / len(many), float(one.var(ddof=1)) / len(one)
    if a + b == 0:
        return Estimate(value=value, low=value, high=value)
    freedom = (a + b) ** 2 / (a**2 / (len(many) - 1) + b**2 / (len(one) - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(a + b)
    return Estimate(value=value, low=value * math.exp(-half), high=value * math.exp(half))
