"""k examples in the prompt: what a further one costs, with the engine's prefix cache and without.

A level's cost is the serving hardware's seconds for one request, from the tokens that it made in a second at the same copies in flight. Through
the levels goes a line, weighted by their errors; its slope is the marginal cost of an example. Whether a line may be drawn is asked of
the repeats (lack of fit), and where it may not, the slope is called what it is then: a mean over these levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc, fdtrc, stdtrit

from kilocopy import repeats
from kilocopy.best_of_n import mean_band, mean_known, told
from kilocopy.played import Beside, Played, notes_of
from kilocopy.ratios import Reading
from kilocopy.recording import Floats
from kilocopy.repeats import Spread
from kilocopy.spec import KShotExperiment, Spec
from kilocopy.summary import Estimate, KShotFinding, ShotLevel, Slope

LEVELS_MIN = 3  # two lie on a line whatever they are
MISFIT = 0.01  # a line is refused where chance strays as far less often than this
Key = tuple[bool | None, int]


@dataclass(frozen=True)
class Line:
    """y = at_zero + slope x by weighted least squares, with the covariance of the two; `freedom` is of the errors' own variance."""

    at_zero: float
    slope: float
    covariance: Floats
    freedom: float
    misfit_p: float

    @property
    def t(self) -> float:
        """Student's t for 95 %."""
        return float(stdtrit(self.freedom, 0.975))


def line(x: Floats, y: Floats, error2: Floats, freedom: float) -> Line:
    """The line through points with known squared errors, whose scale was estimated with so many degrees of freedom.

    Where the points stray from it beyond their errors (p under MISFIT), these are widened until they do not (R. T. Birge, Physical Review 40, 1932).
    """
    weights, design = 1 / error2, np.stack([np.ones_like(x), x], axis=1)
    covariance = np.asarray(np.linalg.inv(design.T @ (weights[:, None] * design)), dtype=np.float64)
    at_zero, slope = covariance @ (design.T @ (weights * y))
    rest = len(x) - 2
    strays = float((weights * (y - at_zero - slope * x) ** 2).sum())
    p = float(fdtrc(rest, freedom, strays / rest) if math.isfinite(freedom) else chdtrc(rest, strays))
    if p < MISFIT:
        covariance, freedom = np.asarray(covariance * (strays / rest), dtype=np.float64), rest
    return Line(float(at_zero), float(slope), covariance, freedom, p)


def find(spec: Spec, played: Sequence[Played], beside: Beside) -> KShotFinding:
    """The section of the report."""
    del beside
    asked = spec.experiment
    assert isinstance(asked, KShotExperiment)  # noqa: S101
    groups: dict[Key, list[Played]] = {}
    for one in played:
        if one.counts:
            groups.setdefault(_kind(spec, asked, one), []).append(one)
    spread = repeats.pooled([_seconds(group) for group in groups.values()])
    caches = asked.prefix_cache or (None,)
    levels = [_level(k, cached, groups[cached, k], spread) for cached in caches for k in asked.levels if (cached, k) in groups]
    notes = notes_of(played, len(asked.levels) * len(caches) * asked.repeats)
    slopes, lines = [], {}
    for cached in caches:
        mine = {k: groups[cached, k] for k in asked.levels if (cached, k) in groups}
        found = _line({k: _seconds(group) for k, group in mine.items()}, spread)
        if isinstance(found, str):
            notes.append(f"{_where(cached)}: {found}".lstrip(": ").capitalize())
        else:
            lines[cached] = found
            slopes.append(_slope(cached, found, len(mine), _usd_line(mine)))
    saves = _saves(lines[True], lines[False]) if {True, False} <= set(lines) else None
    notes += [
        f"{_where(one.prefix_cache).capitalize() or 'The levels'}: they do not lie on a line (p = {one.misfit_p:.2g}): the slope is a mean over these levels, its interval widened to fit."
        for one in slopes
        if not one.straight
    ]
    order = _order(spec, asked, played)
    if len(order) > 1:
        notes.append(f"Played in this order: prefix cache {', '.join('on' if cached else 'off' for cached in order)}; within each, the examples in random order.")
    if spread.basis == "repeats" and asked.prefix_cache:
        notes.append("All levels of a repeat share one serving: where servings differ, the levels' own intervals are too narrow; slopes are differences inside a serving and hardly have it in them.")
    if spread.basis == "within_run":
        notes.append("Intervals are from inside the runs: what moves from one start of the driver to the next is not in them; more repeats would show it.")
    return KShotFinding(
        sentence=_sentence(slopes, saves, order), notes=notes, copies=asked.copies, basis=spread.basis, levels=levels, slopes=slopes, cache_saves=saves
    )


def _kind(spec: Spec, asked: KShotExperiment, one: Played) -> Key:
    """Whether the prefix cache was on, and k."""
    cached = None if asked.prefix_cache is None else bool(one.spec.cluster.engine["enable_prefix_caching"])
    prompts, question = one.spec.workload.prompts, getattr(spec.workload.prompts, "input_tokens", None)
    if asked.example_tokens is not None and isinstance(question, int):
        return cached, (prompts.input_tokens - question) // asked.example_tokens  # type: ignore[union-attr,operator]
    return cached, one.spec.workload.examples


def _order(spec: Spec, asked: KShotExperiment, played: Sequence[Played]) -> list[bool]:
    """The prefix cache's settings as they followed each other, of levels that count."""
    told = [_kind(spec, asked, one)[0] for one in sorted(played, key=lambda one: one.stage.start_s) if one.counts]
    return [cached for cached, _ in itertools.groupby(told) if cached is not None]


def _seconds(group: Sequence[Played]) -> list[Reading]:
    """Seconds of the hardware for a request, in each repeat."""
    return [one.seconds(one.tokens_per_request) for one in group]


def _level(k: int, cached: bool | None, group: Sequence[Played], spread: Spread) -> ShotLevel:
    costs = [one.stage.cost for one in group]
    tokens = [one.tokens_per_request for one in group]
    source = {cost.energy_source if cost else "not_measured" for cost in costs}
    return ShotLevel(
        examples=k,
        prefix_cache=cached,
        repeats=len(group),
        prompt_tokens=float(np.mean([one.prompt_tokens_per_request for one in group])),
        seconds=repeats.mean(_seconds(group), spread),
        usd_per_request=mean_band([cost.usd_per_m_output_tokens if cost else None for cost in costs], [each / 1e6 for each in tokens]),
        j_per_request=mean_band([cost.j_per_output_token if cost else None for cost in costs], tokens),
        energy_source=source.pop() if len(source) == 1 else "not_measured",
        ttft_p50_s=mean_known([one.stage.latency.ttft_s.p50 if one.stage.latency and one.stage.latency.ttft_s else None for one in group]),
        prefix_hit_fraction=mean_known([one.prefix_hits for one in group]),
    )


def _line(levels: Mapping[int, Sequence[Reading]], spread: Spread) -> Line | str:
    """The line through the levels; a sentence where they do not carry one."""
    if len(levels) < LEVELS_MIN:
        return f"{len(levels)} levels that count are too few for a slope: it takes {LEVELS_MIN}."
    if spread.basis == "none":
        return "no slope, since nothing says how sure each level is: lengthen the levels to 10 s, or repeat them."
    means = {k: repeats.mean(level, spread).value for k, level in levels.items()}
    squared = [(repeats.error2(level, spread) or 0.0) * means[k] ** 2 for k, level in levels.items()]
    if min(squared) <= 0:
        return "no slope: the repeats are equal to the last digit, which no measurement is."
    return line(np.array(list(means), dtype=np.float64), np.array(list(means.values())), np.array(squared), spread.freedom)


def _usd_line(groups: Mapping[int, Sequence[Played]]) -> Line | None:
    """The line through $ per request at the middle price; None where a level has no price.

    It is fitted by itself: a meter's electricity makes an hour of owned hardware dearer at some levels than at others.
    """
    levels: dict[int, list[Reading]] = {}
    for k, group in groups.items():
        for one, took in zip(group, _seconds(group), strict=True):
            cost = one.stage.cost
            if cost is None or cost.usd_per_m_output_tokens is None:
                return None
            each = cost.usd_per_m_output_tokens.mid / 1e6 * one.tokens_per_request / took.value
            low, high = (None if end is None else end * each for end in (took.low, took.high))
            levels.setdefault(k, []).append(Reading(took.value * each, low, high))
    found = _line(levels, repeats.pooled(list(levels.values())))
    return None if isinstance(found, str) else found


def _slope(cached: bool | None, found: Line, levels: int, usd: Line | None) -> Slope:
    """The lines' figures."""
    zero, t = found.at_zero, found.t
    zero_error = math.sqrt(found.covariance[0, 0])
    share = found.slope / zero
    share_error = math.sqrt(max(found.covariance[1, 1] - 2 * share * found.covariance[0, 1] + share**2 * found.covariance[0, 0], 0.0)) / abs(zero)
    return Slope(
        prefix_cache=cached,
        levels=levels,
        seconds=_of(found),
        at_zero=_around(zero, t * zero_error),
        of_a_request=_around(share, t * share_error),
        usd=None if usd is None else _of(usd),
        misfit_p=found.misfit_p,
        straight=found.misfit_p >= MISFIT,
    )


def _of(found: Line) -> Estimate:
    return _around(found.slope, found.t * math.sqrt(found.covariance[1, 1]))


def _around(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def _saves(on: Line, off: Line) -> Estimate | None:
    """1 - slope with the cache / slope without, by Fieller's theorem; None where the slope without may be 0.

    Source: E. C. Fieller, Some problems in interval estimation, Journal of the Royal Statistical Society B 16, 1954.
    """
    t = max(on.t, off.t)
    a, b, var_a, var_b = on.slope, off.slope, float(on.covariance[1, 1]), float(off.covariance[1, 1])
    g = t**2 * var_b / b**2 if b else math.inf
    if g >= 1 or b <= 0:
        return None
    ratio = a / b
    half = t / b * math.sqrt(max(var_a * (1 - g) + ratio**2 * var_b, 0.0))
    low, high = ((ratio - half) / (1 - g), (ratio + half) / (1 - g))
    return Estimate(value=1 - ratio, low=1 - high, high=1 - low)


def _where(cached: bool | None) -> str:
    return "" if cached is None else f"prefix cache {'on' if cached else 'off'}"


def scaled(value: Estimate, factor: float) -> Estimate:
    """An estimate in another unit."""
    return Estimate(value=value.value * factor, low=None if value.low is None else value.low * factor, high=None if value.high is None else value.high * factor)


def _sentence(slopes: Sequence[Slope], saves: Estimate | None, order: Sequence[bool]) -> str:
    """The answer in one sentence."""
    if not slopes:
        return "No answer: the levels carry no slope (see the notes)."
    parts = []
    for one in sorted(slopes, key=lambda slope: bool(slope.prefix_cache)):
        share = f"{told(scaled(one.of_a_request, 100))} % of a request without examples"
        cost = f"${told(scaled(one.usd, 1000))} for 1,000 requests, " if one.usd else f"{told(scaled(one.seconds, 1000))} ms of the hardware, "
        zero = one.seconds.low is not None and one.seconds.high is not None and one.seconds.low <= 0 <= one.seconds.high
        where = f" with the {_where(one.prefix_cache)}" if one.prefix_cache is not None else ""
        parts.append(f"a further example costs {cost}{share}{where}{' (not shown to differ from nothing)' if zero else ''}")
    if saves is not None:
        parts.append(f"the cache takes {told(scaled(saves, 100))} % of it off")
    if len(order) == 2:
        parts.append(f"all levels with the cache {'on' if order[0] else 'off'} were played first, so what changed meanwhile is in the difference too")
    said = "; ".join(parts)
    return said[0].upper() + said[1:] + "."
