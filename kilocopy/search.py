"""Finds the largest load that holds the SLO: double until one misses, then halve the distance between held and missed.

A level is judged by the share of its streams that attained the SLO, with Wilson's interval of as many streams as count as independent: held where the whole interval is at or
above the quantile, missed where it is below, unclear where the quantile lies inside. An unclear level is tried again and counted
together; where that does not help either, its share decides and the answer's interval is as wide as that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kilocopy.spec import SearchStage, Slo

Z_95 = 1.959963984540054
# What the driver may do to a stage before it says nothing about the server.
LAG_S_MAX, LAG_ITL_FRACTION = 0.005, 0.10
SEND_LAG_S_MAX = 0.05
CPU_FRACTION_MAX = 0.95


@dataclass(frozen=True, slots=True)
class Level:
    """One load as it was tried: how many ok streams were judged, how many attained the SLO, and what share of requests failed.

    `sound` is False where the driver, and not the server, decided what was seen, or the level is void: it says nothing about the server.
    `independent`: the part of the streams that counts for an interval, where it is known how alike streams of one moment are.
    """

    load: float
    judged: int
    attained: int
    error_fraction: float = 0.0
    sound: bool = True
    independent: float = 1.0


def wilson(attained: float, judged: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, JASA 22, 1927), 95 % by default; (0, 1) where nothing was judged."""
    if judged == 0:
        return 0.0, 1.0
    share, zz = attained / judged, z * z
    middle = (share + zz / (2 * judged)) / (1 + zz / judged)
    half = z / (1 + zz / judged) * math.sqrt(share * (1 - share) / judged + zz / (4 * judged * judged))
    return max(0.0, middle - half), min(1.0, middle + half)


def likely(level: Level) -> tuple[float, float]:
    """Wilson's interval of the share that attained, of as many streams as count as independent (Korn and Graubard, Survey Methodology 24, 1998)."""
    return wilson(level.attained * level.independent, level.judged * level.independent)


def attains(row: Mapping[str, Any], slo: Slo, *, from_scheduled: bool, samples: int = 1) -> bool:
    """Whether an ok row (records.REQUESTS) held the SLO: TTFT from its scheduled time in open loop, else from its send; and the
    speed (tokens - 1) / (last - first), tokens of the mean sample where a request asks for several. One token alone has no speed to miss.
    Tokens that made no text (an end at once, a call of a tool alone) never showed a first one: their user got nothing to read.
    """
    if row["first_token_ns"] is None:
        return False
    begun_ns = row["scheduled_ns"] if from_scheduled else row["sent_ns"]
    soon = row["first_token_ns"] - begun_ns <= slo.ttft_s * 1e9
    steps = max(row["output_tokens"] / samples - 1, 0)
    return bool(soon and steps * 1e9 >= slo.tokens_per_s_per_copy * (row["last_token_ns"] - row["first_token_ns"]))


def pooled(levels: Sequence[Level]) -> list[Level]:
    """One level per load, in order of load: what was tried twice counts together; errors weigh by what was judged."""
    found = []
    for load in sorted({level.load for level in levels}):
        same = [level for level in levels if level.load == load]
        sound = [level for level in same if level.sound] or same
        judged = sum(level.judged for level in sound)
        errors = sum(level.error_fraction * max(level.judged, 1) for level in sound) / sum(max(level.judged, 1) for level in sound)
        counting = sum(level.judged / level.independent for level in sound)  # each try's own variance, weighed by what it judged
        part = judged / counting if counting else 1.0
        found.append(Level(load, judged, sum(level.attained for level in sound), errors, any(level.sound for level in same), part))
    return found


def verdict(level: Level, slo: Slo) -> Literal["held", "missed", "unclear", "unsound"]:
    """What a level says about the SLO. Too many errors miss it, however fast the others were, unless they may be the driver's own."""
    if not level.sound:
        return "unsound"
    if level.error_fraction > slo.error_fraction_max:
        return "missed"
    low, high = likely(level)
    if level.judged and low >= slo.quantile:
        return "held"
    return "missed" if level.judged and high < slo.quantile else "unclear"


def holds(level: Level, slo: Slo) -> bool:
    """Whether a level counts as held: clearly, or by its share where it stays unclear."""
    said = verdict(level, slo)
    return said == "held" or (said == "unclear" and level.judged > 0 and level.attained >= slo.quantile * level.judged)


@dataclass(frozen=True, slots=True)
class Answer:
    """The largest load that held, between what clearly held and what clearly missed; None where there is none."""

    load: float | None
    low: float | None
    high: float | None
    reason: Literal["precise", "limit", "first_missed", "unsound", "unfinished"]


def answer(stage: SearchStage, levels: Sequence[Level], slo: Slo) -> Answer:
    """What the levels that were tried say: `load` in [low, high], where `high` is the smallest load that clearly missed.

    A load counts only if no smaller one missed: a server that misses at 8 and holds at 16 by luck has not held 16.
    """
    by_load = pooled(levels)
    held: list[Level] = []
    missed: Level | None = None
    for level in by_load:
        if not holds(level, slo):
            missed = level
            break
        held.append(level)
    load = held[-1].load if held else None
    low = max((level.load for level in held if verdict(level, slo) == "held"), default=None)
    high = min((level.load for level in by_load if verdict(level, slo) == "missed" and level.load > (load or 0)), default=None)
    if missed is None:
        reason: Literal["precise", "limit", "first_missed", "unsound", "unfinished"]
        reason = "limit" if load is not None and load >= stage.limit else "unfinished"
    elif verdict(missed, slo) == "unsound":
        reason = "unsound"
    elif load is None:
        reason = "first_missed" if _step(stage, 0.0, missed.load) is None else "unfinished"
    else:
        reason = "precise" if _step(stage, load, missed.load) is None else "unfinished"
    return Answer(load, low, high, reason)


def following(stage: SearchStage, levels: Sequence[Level], slo: Slo) -> float | None:
    """The next load to try, or None where the search is over.

    A load that is unsound twice is neither held nor missed. No larger one is tried, since that would only measure the driver; smaller
    ones are judged by themselves, and the answer says why it ended there.
    """
    if not levels:
        return stage.start
    last = levels[-1]
    tried = [level for level in levels if level.load == last.load]
    merged = next(level for level in pooled(levels) if level.load == last.load)
    said = verdict(merged, slo)
    if said == "unsound" and len(tried) == 1:
        return last.load  # once more: a hiccup of the host is no limit
    if said == "unclear" and len(tried) <= stage.repeats:
        return last.load
    by_load = pooled(levels)
    held = 0.0
    for level in by_load:
        if not holds(level, slo):
            return _step(stage, held, level.load)
        held = level.load
    return None if held >= stage.limit else min(held * 2, stage.limit)


def _step(stage: SearchStage, held: float, missed: float) -> float | None:
    """A load between what held (0: nothing yet) and what missed; None where they are close enough."""
    if stage.over == "copies":
        if missed - held <= max(1.0, stage.precision_fraction * held):
            return None
        return float(math.floor((held + missed) / 2))
    smallest = stage.precision_fraction * stage.start
    if missed - held <= max(stage.precision_fraction * held, smallest):
        return None
    return (held + missed) / 2
