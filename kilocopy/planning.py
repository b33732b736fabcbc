"""kilocopy plan: from one measured replica to a fleet. How many replicas hold a load within the SLO, what one node's death does, the bill.

The replica is fitted from the closed stages of a run on one replica: how long an engine step takes with n requests in it, and how long
a request takes to reach the engine's queue with n in flight. Nothing beyond the measured copies is assumed of a replica: more requests
than that wait. The fleet is then simulated (`fleet.py`), and what the simulation was found to be worth against the real stack is
printed with every plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from pydantic import ValidationError
from scipy.special import gammaincinv

from kilocopy import price
from kilocopy.fleet import QUANTILES, Failure, Fleet, Load, Played, Replica, Router
from kilocopy.price import Corner
from kilocopy.problem import ProblemError
from kilocopy.spec import EmpiricalLength, GpuReplica, LognormalLength, NormalLength, Owned, Spec, UniformLength
from kilocopy.streams import Floats, Ints
from kilocopy.summaries import ENGINE, Finished
from kilocopy.summary import Band, Frozen, Stage

LEVELS_MIN = 3
FALL_MAX = 0.10  # a step that gets shorter with more copies by more than this is no noise
LENGTHS = 20_000
RESIDUAL_STEPS = 1.5  # median of what is left of the running step, U(0, 1), and the first step of one's own
WARM_RESIDENCES, COUNTED_RESIDENCES = 3.0, 6.0
ARRIVALS_MIN = 2000
LONGEST = 0.999  # of the lengths
DRAWS = 5  # further ones of a fleet that decides


@dataclass(frozen=True)
class Level:
    """A closed stage as the fit needs it: copies, requests in the engine's step, step time, quantiles of TTFT, and what it made."""

    copies: int
    in_step: float
    step_s: float
    ttft_s: Floats
    tokens_per_s: float
    ttft_p50_s: float


def together(runs: Sequence[Finished]) -> Finished:
    """Repeats of a run as one: the first, with the stages of all. Raises ProblemError for runs that are no repeats of each other."""
    first = runs[0]
    for other in runs[1:]:
        if apart := first.apart(other):
            raise ProblemError(
                f"{other.path}: is no repeat of {first.path}: the {', the '.join(apart)} differ{'s' * (len(apart) == 1)}; "
                "name repeats of one run; a run of more replicas goes with --against, which is said once for each repeat of it"
            )
    return replace(first, summary=first.summary.model_copy(update={"stages": [stage for run in runs for stage in run.summary.stages]}))


def same_replica(fitted: Finished, other: Finished) -> None:
    """Raises ProblemError where a run that the fit is held against served something else, or was asked for something else."""

    def asked(run: Finished) -> dict[str, Any]:
        spec, versions = run.spec, run.summary.run.get("versions") or {}
        model, cluster = spec.get("model") or {}, spec.get("cluster") or {}
        workload = {name: value for name, value in (spec.get("workload") or {}).items() if name != "seed"}
        parts = {"model.id": model.get("id"), "workload": workload, "cluster.hardware": cluster.get("hardware"), "cluster.engine": cluster.get("engine")}
        return parts | {f"the version of {name}": versions.get(name) for name in ENGINE}

    one, two = asked(fitted), asked(other)
    if apart := [name for name in one if one[name] != two[name]]:
        raise ProblemError(f"--against {other.path}: it differs from {fitted.path} in {', '.join(apart)}: what it measured says nothing of this fit")


def levels(run: Finished) -> list[Level]:
    """The closed stages that can be fitted, by copies; of stages that repeat a level the medians.

    Raises ProblemError where they are too few, or make no sense together.
    """
    spec = known_spec(run)
    if spec.cluster.replicas != 1:
        raise ProblemError(f"{run.path}: {spec.cluster.replicas} replicas were measured; a plan is fitted on one: run the spec with cluster.replicas: 1")
    if spec.experiment is not None and spec.experiment.kind != "frontier":
        raise ProblemError(
            f"{run.path}: the levels of a {spec.experiment.kind} experiment differ in more than their copies; a plan is fitted on a frontier, or on plain stages, of one replica"
        )
    if spec.workload.samples > 1:
        raise ProblemError(f"{run.path}: its requests ask for {spec.workload.samples} samples each; a plan is fitted on a run with workload.samples: 1")
    found = [level for stage in run.summary.stages if (level := _level(stage)) is not None]
    found = [_median([level for level in found if level.copies == copies]) for copies in sorted({level.copies for level in found})]
    if len(found) < LEVELS_MIN:
        raise ProblemError(
            f"{run.path}: {len(found)} closed stages of different copies are valid with their latency; a frontier needs {LEVELS_MIN} or more (for example 1, 8, 32, 128)"
        )
    for less, more in pairwise(found):
        if more.step_s < (1 - FALL_MAX) * less.step_s:
            raise ProblemError(
                f"{run.path}: a token took {1000 * less.step_s:.3g} ms with {less.copies} copies and {1000 * more.step_s:.3g} ms with {more.copies}: "
                "more copies cannot be faster each; measure again on an idle machine, with longer stages"
            )
    return found


def known_spec(run: Finished) -> Spec:
    """The run's spec as a model. Raises ProblemError."""
    try:
        return Spec.model_validate(run.spec)
    except ValidationError as error:
        raise ProblemError(f"{run.path}: its spec is another version's: {error.errors()[0]['msg']}; `kilocopy report` it with that version") from None


def _level(stage: Stage) -> Level | None:
    latency, through = stage.latency, stage.throughput
    if stage.verdict.level != "valid" or stage.kind != "closed" or not stage.copies.asked or latency is None or through is None:
        return None
    if latency.tpot_s is None or latency.ttft_s is None or not stage.ttft_values_s or not stage.copies.n_run_client or not through.requests_per_s:
        return None
    tokens = through.output_tokens_per_s.value / through.requests_per_s
    residence_s = latency.ttft_s.mean + (tokens - 1) * latency.tpot_s.mean
    return Level(
        copies=stage.copies.asked,
        in_step=stage.copies.n_run_client * tokens * latency.tpot_s.mean / residence_s,
        step_s=latency.tpot_s.mean,
        ttft_s=np.asarray(np.quantile(stage.ttft_values_s, (np.arange(QUANTILES) + 0.5) / QUANTILES), dtype=np.float64),
        tokens_per_s=through.output_tokens_per_s.value,
        ttft_p50_s=latency.ttft_s.p50,
    )


def _median(repeats: list[Level]) -> Level:
    return Level(
        copies=repeats[0].copies,
        in_step=median(one.in_step for one in repeats),
        step_s=median(one.step_s for one in repeats),
        ttft_s=np.asarray(np.median([one.ttft_s for one in repeats], axis=0), dtype=np.float64),
        tokens_per_s=median(one.tokens_per_s for one in repeats),
        ttft_p50_s=median(one.ttft_p50_s for one in repeats),
    )


def fit(found: list[Level]) -> Replica:
    """Step times between the levels on straight lines, rising; before the first level and after the last as they are there.

    The time to the engine's queue is what TTFT has beyond 1.5 steps (the rest of the running step, U(0, 1), and one's own first).
    """
    limit = found[-1].copies
    n = np.arange(limit + 1, dtype=np.float64)
    step_s = np.interp(n, [one.in_step for one in found], np.maximum.accumulate([one.step_s for one in found]))
    before = np.array([np.maximum(one.ttft_s - RESIDUAL_STEPS * one.step_s, 0.0) for one in found])
    before_s = np.stack([np.interp(n, [one.copies for one in found], before[:, q]) for q in range(QUANTILES)], axis=1)
    return Replica(step_s, before_s, limit)


# -------------------------------------------------------------------------------------------------------------------- the load


def lengths(spec: Spec, seed: int = 0) -> Ints:
    """Output tokens as the spec draws them: a sample to draw from again. Raises ProblemError for lengths that lie in a file."""
    asked, draw = spec.workload.output_tokens, np.random.default_rng(seed)
    if isinstance(asked, int):
        return np.array([asked])
    if isinstance(asked, UniformLength):
        return draw.integers(asked.low, asked.high + 1, LENGTHS)
    if isinstance(asked, EmpiricalLength):
        if asked.values is None:
            raise ProblemError(f"workload.output_tokens.path {asked.path}: a plan draws from values in the spec, not from a file; give values")
        return np.array(asked.values)
    assert isinstance(asked, NormalLength | LognormalLength)  # noqa: S101
    drawn: list[int] = []
    while len(drawn) < LENGTHS:
        raw = draw.normal(asked.mean, asked.stddev, LENGTHS) if isinstance(asked, NormalLength) else draw.lognormal(asked.mu, asked.sigma, LENGTHS)
        whole = np.round(raw).astype(np.int64)
        drawn += whole[(whole >= asked.min) & (whole <= asked.max)].tolist()
    return np.array(drawn[:LENGTHS])


def arrivals(rate_per_s: float, burstiness: float, until_s: float, seed: int) -> Floats:
    """Times of a renewal process with gamma distances; burstiness 1 is Poisson."""
    draw, count = np.random.default_rng(seed), int(rate_per_s * until_s * 1.2 + 10 * math.sqrt(rate_per_s * until_s / burstiness) + 100)
    distances = gammaincinv(burstiness, draw.random(count)) / burstiness / rate_per_s
    times_s = np.cumsum(distances)
    return np.asarray(times_s[times_s < until_s], dtype=np.float64)


@dataclass(frozen=True)
class Asked:
    """What a plan is for: copies at once, or requests a second; and how."""

    copies: int = 0
    rate_per_s: float = 0.0
    burstiness: float = 1.0
    router: Router | None = None  # None: the one that Serve takes for the spec's routing
    seed: int = 0


def router_of(spec: Spec) -> Router:
    """How Ray Serve deals where nobody configures it: with direct streaming in turn (`RoundRobinRouter`, which `ray.llm`'s builder
    takes), behind its own proxy to the less loaded of two replicas drawn at random (`PowerOfTwoChoicesRequestRouter`)."""
    return "round_robin" if spec.cluster.routing == "direct" else "two_choices"


class Outcome(Frozen):
    """What a simulated fleet of so many replicas made of the load, over its counted part."""

    replicas: int
    tokens_per_s: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tokens_per_s_per_copy: float | None
    in_flight: float
    attainment: float
    held: bool
    overloaded: bool
    full_fraction: float  # of the requests: found their replica with as many as were measured, and waited
    requests: int
    lost: int = 0


def play(replica: Replica, spec: Spec, asked: Asked, replicas: int, failure: int = 0) -> tuple[Outcome, Outcome | None]:
    """One fleet through the load: what it makes of it, and, where a node of so many replicas fails half way, after that."""
    tokens = lengths(spec, asked.seed)
    before_s, step_s = float(replica.before_s.max(axis=1).max()), float(replica.step_s[-1])
    residence_s = before_s + float(tokens.mean()) * step_s
    longest_s = before_s + float(np.quantile(tokens, LONGEST)) * step_s  # played on for it: a long answer that is cut off would count as missed
    warm_s = WARM_RESIDENCES * residence_s
    counted_s = COUNTED_RESIDENCES * residence_s
    if asked.rate_per_s:
        counted_s = max(counted_s, ARRIVALS_MIN / asked.rate_per_s)
    until_s = warm_s + counted_s * (2 if failure else 1)
    times_s = arrivals(asked.rate_per_s, asked.burstiness, until_s, asked.seed) if asked.rate_per_s else np.zeros(0)
    fails = Failure(warm_s + counted_s, failure) if failure else None
    fleet = Fleet(replica, replicas, Load(tokens, asked.copies, times_s), router=asked.router or router_of(spec), failure=fails, seed=asked.seed)
    played = fleet.play(until_s + longest_s)
    needs = least(replica, asked, float(tokens.mean())) if asked.rate_per_s else 0.0  # below it a queue only grows, though not far enough in this time to be seen
    first = _outcome(spec, played, replicas, warm_s, warm_s + counted_s, lost=False, beyond=replicas < needs)
    if not failure:
        return first, None
    return first, _outcome(spec, played, replicas - failure, warm_s + counted_s, until_s, lost=True, beyond=replicas - failure < needs)


def _outcome(spec: Spec, played: Played, replicas: int, start_s: float, end_s: float, *, lost: bool, beyond: bool) -> Outcome:
    """The requests that were asked in a stretch, judged by the SLO; one without a last token missed it."""
    slo, mine = spec.slo, (played.asked_s >= start_s) & (played.asked_s < end_s)
    ttft_s = played.first_s - played.asked_s
    speed = np.maximum(played.tokens - 1, 0) / np.maximum(played.last_s - played.first_s, 1e-12)
    good = (ttft_s <= slo.ttft_s) & ((speed >= slo.tokens_per_s_per_copy) | (played.tokens == 1))
    ended = mine & ~np.isnan(played.last_s)
    held = float(good[mine].mean()) if mine.any() else 0.0
    over = np.clip(np.minimum(np.where(np.isnan(played.last_s), end_s, played.last_s), end_s) - np.maximum(played.asked_s, start_s), 0, None)
    inside = (played.last_s > start_s) & (played.first_s < end_s)
    share = np.clip((np.minimum(played.last_s, end_s) - np.maximum(played.first_s, start_s)) / np.maximum(played.last_s - played.first_s, 1e-12), 0, 1)
    made = float((played.tokens * np.where(inside, share, 0.0))[~np.isnan(played.last_s)].sum())
    cut = int((np.isnan(played.last_s) & (played.asked_s < start_s)).sum()) if lost else 0
    return Outcome(
        replicas=replicas,
        tokens_per_s=made / (end_s - start_s),
        ttft_p50_s=float(np.median(ttft_s[ended])) if ended.any() else None,
        ttft_p99_s=float(np.percentile(ttft_s[ended], 99)) if ended.any() else None,
        tokens_per_s_per_copy=float(np.median(speed[ended & (played.tokens > 1)])) if (ended & (played.tokens > 1)).any() else None,
        in_flight=float(over.sum()) / (end_s - start_s),
        attainment=held,
        held=held >= slo.quantile and not (played.overloaded or beyond),
        overloaded=played.overloaded or beyond,
        full_fraction=float(played.full[mine].mean()) if mine.any() else 0.0,
        requests=int(mine.sum()),
        lost=cut,
    )


# ------------------------------------------------------------------------------------------------------------ how many replicas


def least(replica: Replica, asked: Asked, tokens: float) -> float:
    """Replicas that throughput alone needs for arrivals of so many tokens in the mean; of copies, those that have a place for each."""
    if not asked.rate_per_s:
        return asked.copies / replica.limit
    return asked.rate_per_s * tokens / float((np.arange(1, replica.limit + 1) / replica.step_s[1:]).max())


def smallest(replica: Replica, spec: Spec, asked: Asked, most: int) -> list[Outcome]:
    """Fleets that were tried, the answer last: the fewest replicas that hold the load within the SLO. Raises ProblemError.

    It is looked for from what throughput alone needs (of copies: a place for each): upwards by half as many more, downwards in growing
    strides, and then between what held and what missed, to one replica (1 % for more than 100).
    """
    low, tried = 0, []
    high = max(1, math.ceil(least(replica, asked, float(lengths(spec, asked.seed).mean()))))
    if asked.copies:
        high = min(high, most)  # copies wait for each other: where the SLO lets some miss it, fewer may do
    if high > most:
        raise ProblemError(f"throughput alone needs {high} replicas for this load, above --most {most}; raise it, or lower the load")
    while not (outcome := play(replica, spec, asked, high)[0]).held:
        tried.append(outcome)
        low, high = high, min(max(high + 1, math.ceil(high * 1.5)), max(most, high + 1))
        if high > most:
            raise ProblemError(
                f"no fleet of up to {low} replicas holds this load within the SLO (the last one: {100 * outcome.attainment:.1f} % of the streams); "
                "raise --most, lower the load, or see whether one copy alone is within the SLO"
            )
    tried.append(outcome)
    down = max(1, high // 16)
    while low == 0 and high > down:  # in growing strides: a fleet far too small costs the most to play, and says the least
        outcome = play(replica, spec, asked, high - down)[0]
        tried.append(outcome)
        low, high, down = (low, high - down, 2 * down) if outcome.held else (high - down, high, down)
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        outcome = play(replica, spec, asked, middle)[0]
        tried.append(outcome)
        low, high = (low, middle) if outcome.held else (middle, high)
    best = next(outcome for outcome in tried if outcome.replicas == high)
    return [*(one for one in tried if one is not best), best]


class Redrawn(Frozen):
    """A fleet through so many further draws of the same load: in how many the SLO was held, and between which shares of the streams."""

    replicas: int
    draws: int
    held: int
    attainment_low: float
    attainment_high: float


def redrawn(replica: Replica, spec: Spec, asked: Asked, tried: Sequence[Outcome]) -> list[Redrawn]:
    """The answer, last of those tried, and the largest below it that missed, each with further seeds: whether a draw decided between them.

    The draw that chose them is left out: it held one and missed the other by choice.
    """
    best = tried[-1]
    below = max((one for one in tried if one.replicas < best.replicas), key=lambda one: one.replicas, default=None)
    found = []
    for first in (best, below):
        if first is None or first.overloaded:
            continue
        drawn = [play(replica, spec, replace(asked, seed=asked.seed + more), first.replicas)[0] for more in range(1, DRAWS + 1)]
        shares = [one.attainment for one in drawn]
        found.append(Redrawn(replicas=first.replicas, draws=DRAWS, held=sum(one.held for one in drawn), attainment_low=min(shares), attainment_high=max(shares)))
    return found


class Bill(Frozen):
    """What a fleet costs by the hour of the calendar, at the spec's prices. A device is a GPU, or the whole host where there is none."""

    devices: float
    hardware_usd_per_h: Band
    electricity_usd_per_h: Band | None
    energy_source: str | None  # of the joules behind it: measured or assumed
    usd_per_h: Band  # over the stated bands of prices, PUE and assumed power; the number of replicas is not in it
    pages_per_h: float | None
    usd_per_page: Band | None


def bill(spec: Spec, run: Finished, outcome: Outcome) -> Bill:
    """Hours are paid whether or not they serve: an hour's price is the price at use times the utilisation."""
    owned = isinstance(spec.prices.hardware, Owned)
    each = spec.cluster.hardware.gpus_per_replica if isinstance(spec.cluster.hardware, GpuReplica) else 1.0
    devices = outcome.replicas * each if each >= 1 else math.ceil(outcome.replicas / int(1 / each + 1e-9))  # nobody sells a part of a GPU
    joules = _joules_per_token(run, outcome.in_flight / outcome.replicas) if owned else None
    words = [s.throughput.words_per_token for s in run.summary.stages if s.throughput and s.throughput.words_per_token]
    pages = outcome.tokens_per_s * 3600 * float(np.mean(words)) / spec.page.words if words else None

    def hardware_usd(corner: Corner) -> float:
        return devices * price.usd_per_device_hour(spec, corner) * spec.prices.hardware.utilisation

    def power_usd(corner: Corner) -> float:
        return price.electricity_usd(spec, lambda at: outcome.tokens_per_s * 3600 * price.corner_of(joules, at), corner) if joules else 0.0

    def all_usd(corner: Corner) -> float:
        return hardware_usd(corner) + power_usd(corner)

    return Bill(
        devices=devices,
        hardware_usd_per_h=price.banded(hardware_usd),
        electricity_usd_per_h=price.banded(power_usd) if joules else None,
        energy_source=_energy_source(run) if joules else None,
        usd_per_h=price.banded(all_usd),
        pages_per_h=pages,
        usd_per_page=price.banded(lambda corner: all_usd(corner) * price.words_share(spec, corner) / pages) if pages else None,
    )


def _energy_source(run: Finished) -> str:
    """Assumed where any stage's joules are."""
    sources = {stage.cost.energy_source for stage in run.summary.stages if stage.cost and stage.cost.j_per_output_token}
    return "measured" if sources == {"measured"} else "assumed"


def _joules_per_token(run: Finished, copies: float) -> Band | None:
    """Facility joules for a token at so many copies, between the measured stages."""
    known = sorted(
        (
            (s.copies.n_run_client, s.cost.j_per_output_token)
            for s in run.summary.stages
            if s.kind == "closed" and s.cost and s.cost.j_per_output_token and s.copies.n_run_client and s.verdict.level != "void"
        ),
        key=lambda one: one[0],
    )
    if not known:
        return None
    return price.banded(lambda corner: float(np.interp(copies, [n for n, _ in known], [price.corner_of(j, corner) for _, j in known])))


# ------------------------------------------------------------------------------------------------------ what it was found worth


class Deviation(Frozen):
    """A measured stage beside what the simulation says of it; deviations as fractions of the measured."""

    load: str
    replicas: int
    tokens_per_s: float
    tokens_per_s_predicted: float
    ttft_p50_s: float
    ttft_p50_s_predicted: float
    full_fraction: float | None = None  # as simulated, see Outcome; None: not kept

    @property
    def throughput(self) -> float:
        """Predicted over measured, less 1."""
        return self.tokens_per_s_predicted / self.tokens_per_s - 1

    @property
    def ttft(self) -> float:
        """Predicted over measured, less 1."""
        return self.ttft_p50_s_predicted / self.ttft_p50_s - 1


def deviations(replica: Replica, spec: Spec, run: Finished) -> list[Deviation]:
    """The stages of a run (of any number of replicas of the same spec) against the simulation of the fitted replica; of repeats the medians."""
    replicas, router = known_spec(run).cluster.replicas, router_of(known_spec(run))
    loads: dict[Asked, list[tuple[str, float, float]]] = {}
    for stage in run.summary.stages:
        asked = _asked(stage)
        if asked is None or stage.verdict.level != "valid" or stage.throughput is None or stage.latency is None or stage.latency.ttft_s is None:
            continue
        if asked.copies <= replicas * replica.limit:
            loads.setdefault(asked, []).append((stage.title, stage.throughput.output_tokens_per_s.value, stage.latency.ttft_s.p50))
    found = []
    for asked, seen in loads.items():
        outcome = play(replica, spec, replace(asked, router=router), replicas)[0]
        if outcome.ttft_p50_s is not None:
            found.append(
                Deviation(
                    load=seen[0][0] if len(seen) == 1 else f"{seen[0][0]}, {len(seen)} times",
                    replicas=replicas,
                    tokens_per_s=median(tokens_per_s for _, tokens_per_s, _ in seen),
                    tokens_per_s_predicted=outcome.tokens_per_s,
                    ttft_p50_s=median(ttft_s for _, _, ttft_s in seen),
                    ttft_p50_s_predicted=outcome.ttft_p50_s,
                    full_fraction=outcome.full_fraction,
                )
            )
    return found


def _asked(stage: Stage) -> Asked | None:
    if stage.kind == "closed" and stage.copies.asked:
        return Asked(copies=stage.copies.asked)
    if stage.kind == "poisson" and stage.rate and stage.rate.asked_per_s:
        return Asked(rate_per_s=stage.rate.asked_per_s)
    return None
