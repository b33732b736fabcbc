"""When each request starts, who owns it and what it asks for, worked out before the first request and without a clock.

Everything here is a pure function of the spec and of (stage, level, copy, sequence). It never depends on how many driver processes
share the work: one worker or eight send the same prompts with the same seeds, at the same moments.

Random arrivals are made from one stream of numbers per level: numpy's PCG64, seeded by `draw`. A bit generator's output is fixed for
ever by numpy's policy, a distribution's is not, so distances are made from the generator's uniform numbers by inversion here.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import gammaincinv

from kilocopy import traces
from kilocopy.spec import (
    ClosedStage,
    ConstantStage,
    GammaStage,
    OpenStage,
    PlainStage,
    PoissonStage,
    RampStage,
    SearchStage,
    Spec,
    StepsStage,
    TraceStage,
)
from kilocopy.traces import Shape

__all__ = ["Arrival", "ClosedPlan", "CopyStart", "OpenPlan", "Plan", "Shape", "length_s", "plan"]

Floats = npt.NDArray[np.float64]
LEVELS_MAX = 1000
BLOCK = 4096  # distances drawn at a time; the arrivals do not depend on it


@dataclass(frozen=True, slots=True)
class CopyStart:
    """A copy and the moment of its first request, seconds after the level's start."""

    copy: int
    start_s: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """The n-th request of an open-loop level over all workers, when it is due (seconds after the level's start), and its shape in a trace."""

    index: int
    at_s: float
    shape: Shape | None = None


@dataclass(frozen=True, slots=True)
class ClosedPlan:
    """What one worker does in a closed level: its copies in order of their starts, and when they stop asking.

    Exactly one of `stop_s` (seconds after the level's start) and `requests` (this worker's, begun after `warm_s`) is set.
    """

    stage: int
    level: int
    starts: tuple[CopyStart, ...]
    ramp_s: float
    warm_s: float
    stop_s: float | None
    requests: int | None


@dataclass(frozen=True, slots=True)
class OpenPlan:
    """What one worker sends in an open-loop level, in order of time, over at most `slots` streams at once."""

    stage: int
    level: int
    arrivals: tuple[Arrival, ...]
    slots: int
    ramp_s: float
    warm_s: float
    stop_s: float


Plan = ClosedPlan | OpenPlan


def plan(spec: Spec, index: int, worker: int = 0, workers: int = 1, *, level: int = 0, load: float | None = None) -> Plan:
    """The part of stage `index` that worker `worker` of `workers` plays; a search's stage needs the level's `load`.

    Raises ProblemError for a trace that cannot be read.
    """
    stage, seed = plain(spec, index, load), spec.workload.seed
    if not isinstance(stage, ClosedStage):
        return _open_plan(stage, seed, index, level, worker, workers)
    warm_s = stage.ramp_s + stage.warmup_s
    asking = min(workers, stage.copies)  # workers that own a copy; the others have nobody to send a request
    offsets_s = starts_s(stage.copies, stage.ramp_s, draw(seed, "starts", index, level))
    mine = (CopyStart(copy, offsets_s[copy]) for copy in owned(stage.copies, worker, workers))
    return ClosedPlan(
        stage=index,
        level=level,
        starts=tuple(sorted(mine, key=lambda start: start.start_s)),
        ramp_s=stage.ramp_s,
        warm_s=warm_s,
        stop_s=None if stage.duration_s is None else warm_s + stage.duration_s,
        requests=None if stage.requests is None else share(stage.requests, worker, asking) if worker < asking else 0,
    )


def plain(spec: Spec, index: int, load: float | None = None) -> PlainStage:
    """The stage that is played: the spec's own, or a search's level."""
    stage = spec.stages[index]
    if not isinstance(stage, SearchStage):
        return stage
    if load is None:
        raise ValueError(f"stage {index} is a search: its plan needs a load")
    return stage.at(load)


def length_s(stage: PlainStage | SearchStage) -> float | None:
    """Seconds from a stage's start until it stops asking; None where that is not known beforehand."""
    if isinstance(stage, SearchStage) or stage.duration_s is None:
        return None
    if isinstance(stage, TraceStage):
        return stage.duration_s / stage.speed
    return stage.duration_s + stage.warmup_s + (stage.ramp_s if isinstance(stage, ClosedStage) else 0.0)


def starts_s(copies: int, ramp_s: float, seed: int) -> list[float]:
    """The start of each copy, seconds in [0, ramp_s]: one copy in each of `copies` equal slots, at a random place in it.

    Copies that start together stay in step, and their burst would be the driver's doing. Slots keep the starts even; the place
    within the slot breaks the rhythm; a shuffled order keeps neighbours (and so one worker's copies) apart.
    """
    place = random.Random(seed)  # noqa: S311  # a seeded plan, not a secret
    slots = list(range(copies))
    place.shuffle(slots)
    return [(slot + place.random()) / copies * ramp_s for slot in slots]


# ---------------------------------------------------------------------------------------------------------------- open loop


def _open_plan(stage: OpenStage, seed: int, index: int, level: int, worker: int, workers: int) -> OpenPlan:
    if isinstance(stage, TraceStage):
        times_s, shapes = traces.read(stage, index)
        stop_s = stage.duration_s / stage.speed if stage.duration_s is not None else float(times_s[-1])
    else:
        stop_s = stage.warmup_s + stage.duration_s
        times_s, shapes = arrivals_s(stage, draw(seed, "arrivals", index, level)), None
    mine = owned(len(times_s), worker, workers)
    arrivals = tuple(Arrival(number, float(times_s[number]), shapes[number] if shapes is not None else None) for number in mine)
    slots = max(1, share(stage.max_in_flight, worker, workers))
    return OpenPlan(index, level, arrivals, slots, 0.0, stage.warmup_s, stop_s)


def arrivals_s(stage: OpenStage, seed: int) -> Floats:
    """Times of all arrivals of a stage but a trace's, seconds in [0, warmup + duration), rising.

    A stationary process of rate 1 is drawn, and its times are taken through the inverse of the cumulative rate, which gives the
    process of the rate asked, exactly (time change: E. Cinlar, Introduction to Stochastic Processes, 1975, ch. 4.7).
    """
    edges_s, cumulative = _cumulative_rate(stage)
    unit = _unit_process(stage, float(cumulative[-1]), seed)
    return _invert(stage, edges_s, cumulative, unit)


def expected(stage: PlainStage) -> float | None:
    """Mean number of arrivals of an open-loop stage; None where the stage does not say (closed, trace)."""
    return None if isinstance(stage, ClosedStage | TraceStage) else float(_cumulative_rate(stage)[1][-1])


def _cumulative_rate(stage: OpenStage) -> tuple[Floats, Floats]:
    """Edges (s) of the parts in which the rate is constant or linear, and the mean number of arrivals until each."""
    if isinstance(stage, ConstantStage | PoissonStage | GammaStage):
        end_s = stage.warmup_s + stage.duration_s
        return np.array([0.0, end_s]), np.array([0.0, stage.rate_per_s * end_s])
    if isinstance(stage, RampStage):
        warm = stage.from_rate_per_s * stage.warmup_s
        mean = (stage.from_rate_per_s + stage.to_rate_per_s) / 2 * stage.duration_s
        return np.array([0.0, stage.warmup_s, stage.warmup_s + stage.duration_s]), np.array([0.0, warm, warm + mean])
    assert isinstance(stage, StepsStage)  # noqa: S101
    lengths_s = np.array([stage.warmup_s, *[stage.step_s] * len(stage.rates_per_s)])
    rates = np.array([stage.rates_per_s[0], *stage.rates_per_s])
    return np.concatenate([[0.0], np.cumsum(lengths_s)]), np.concatenate([[0.0], np.cumsum(lengths_s * rates)])


def _unit_process(stage: OpenStage, until: float, seed: int) -> Floats:
    """Points of a process of rate 1 in [0, until)."""
    generator = np.random.Generator(np.random.PCG64(seed))
    process = stage.process if isinstance(stage, RampStage | StepsStage) else stage.arrival
    if process == "constant":
        return np.arange(np.ceil(until)) + generator.random()
    shape = stage.burstiness if isinstance(stage, GammaStage) else 1.0
    blocks, last = [], 0.0
    while last < until:
        uniform = generator.random(BLOCK)
        distances = -np.log1p(-uniform) if shape == 1.0 else gammaincinv(shape, uniform) / shape
        blocks.append(last + np.cumsum(distances))
        last = float(blocks[-1][-1])
    points = np.concatenate(blocks) if blocks else np.empty(0)
    return points[points < until]


def _invert(stage: OpenStage, edges_s: Floats, cumulative: Floats, unit: Floats) -> Floats:
    """Times at which the cumulative rate reaches each point of the unit process."""
    unit = unit[unit < cumulative[-1]]
    part = np.clip(np.searchsorted(cumulative, unit, side="right") - 1, 0, len(edges_s) - 2)
    begin_s, length_s = edges_s[part], np.diff(edges_s)[part]
    into = unit - cumulative[part]
    rates = np.diff(cumulative)[part] / length_s
    times_s = begin_s + into / rates
    if isinstance(stage, RampStage):
        rising = part == len(edges_s) - 2  # the last part is the ramp: its rate is linear, a t + b t^2 / 2 = into
        first, slope = stage.from_rate_per_s, (stage.to_rate_per_s - stage.from_rate_per_s) / stage.duration_s
        root = np.sqrt(np.maximum(first * first + 2 * slope * into, 0.0))
        times_s = np.where(rising, begin_s + 2 * into / (first + root), times_s)
    return np.asarray(np.minimum(times_s, np.nextafter(edges_s[-1], 0.0)))


# ------------------------------------------------------------------------------------------------------------ shares and seeds


def owned(count: int, worker: int, workers: int) -> range:
    """The copies (or arrivals) that a worker owns: every one has exactly one owner, and shares differ by one at most."""
    return range(worker, count, workers)


def share(total: int, worker: int, workers: int) -> int:
    """A worker's part of a total; the parts add up to it and differ by one at most."""
    return total // workers + (worker < total % workers)


def draw(seed: int, *key: int | str) -> int:
    """A number in [0, 2^31) that belongs to a key, the same in every process. It fits every engine's seed field."""
    text = "/".join(map(str, (seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 33


def request_seed(seed: int, stage: int, level: int, copy: int, sequence: int) -> int:
    """The sampling seed of one request."""
    return draw(seed, "request", stage, level, copy, sequence)


def prompt_index(spec: Spec, stage: int, level: int, copy: int, sequence: int) -> int:
    """A number for each request of the run that no other request has: prompts are picked by it, so none comes twice."""
    widest, levels = _widest(tuple(spec.stages), spec.workload.seed)
    return ((sequence * widest + copy) * levels + level) * len(spec.stages) + stage


@lru_cache(maxsize=8)
def _widest(stages: Sequence[PlainStage | SearchStage], seed: int) -> tuple[int, int]:
    """More than the highest number that a copy or an arrival can have, and how many levels there can be."""
    levels = LEVELS_MAX if any(isinstance(stage, SearchStage) for stage in stages) else 1
    return max(_width(stage, index, seed) for index, stage in enumerate(stages)), levels


def _width(stage: PlainStage | SearchStage, index: int, seed: int) -> int:
    if isinstance(stage, ClosedStage):
        return stage.copies
    if isinstance(stage, TraceStage):
        return len(traces.read(stage, index)[0])
    if isinstance(stage, SearchStage):
        if stage.over == "copies":
            return round(stage.limit)
        mean = expected(stage.at(stage.limit)) or 0.0
        return round(mean + 10 * math.sqrt(mean)) + 10  # a Poisson count beyond ten standard deviations does not come
    return len(arrivals_s(stage, draw(seed, "arrivals", index, 0)))
