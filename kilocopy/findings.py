"""What an experiment found, from its levels as they were measured: one function a kind, each ending in one sentence.

The statistics are elsewhere (frontier.py, usl.py; best_of_n.py and k_shot.py have their findings too); here the levels' stages and records become their input, and their output becomes the
summary's section. A void level enters no statistic, and the notes say so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kilocopy import best_of_n, frontier, k_shot, measure, price, replicas, search, usl
from kilocopy.played import Beside, Played, notes_of
from kilocopy.recording import Floats
from kilocopy.report import interval, number
from kilocopy.spec import BestOfNExperiment, CpuReplica, FrontierExperiment, KShotExperiment, ScalingExperiment, Slo, Spec
from kilocopy.summary import (
    Estimate,
    Finding,
    FrontierFinding,
    FrontierLevel,
    Loss,
    Marginal,
    ScalingFinding,
    ScalingLevel,
    ScalingServing,
    SpeedLimit,
    UslFit,
)


def find(spec: Spec, played: Sequence[Played], beside: Beside) -> Finding | None:
    """The experiment's section; None where no level was played."""
    return FINDERS[type(spec.experiment)](spec, played, beside) if played else None


# ---------------------------------------------------------------------------------------------------------------- the frontier


def _frontier(spec: Spec, played: Sequence[Played], beside: Beside) -> FrontierFinding:
    asked = spec.experiment
    assert isinstance(asked, FrontierExperiment)  # noqa: S101
    ordered = sorted(played, key=lambda one: one.stage.copies.asked or 0)
    counted = [one for one in ordered if one.counts]
    points = [_point(one) for one in counted]
    training = price.training_of(spec, beside.training)
    gpus = training.gpus if training else None
    seen = [_speeds(spec, one, asked.speeds_tokens_per_s) for one in ordered]
    speeds = [_speed_limit(spec, speed, ordered, seen, gpus) for speed in asked.speeds_tokens_per_s]
    knee = frontier.knee(points)
    marginals = [_marginal(below, above) for below, above in itertools.pairwise(counted)]
    notes = notes_of(played, len(asked.levels))
    if (said := frontier.unsteady(points)) is not None:
        notes.append(said)
    if spec.model.training is not None and gpus is None:
        notes.append("N_cluster: not told, since model.training does not state on how many GPUs (gpus) the model was trained at once.")
    best = max(counted, key=lambda one: one.stage.throughput.output_tokens_per_s.value if one.stage.throughput else 0, default=None)
    return FrontierFinding(
        sentence=_frontier_sentence(spec, best, knee.sentence, speeds, marginals),
        notes=notes,
        quantile=spec.slo.quantile,
        levels=[_frontier_level(one, speeds_.held) for one, speeds_ in zip(ordered, seen, strict=True)],
        marginals=marginals,
        knee=knee,
        speeds=speeds,
        n_human=best.stage.copies.n_human if best else {},
    )


def _point(one: Played) -> frontier.Point:
    assert one.stage.throughput is not None  # noqa: S101  # it counts
    return frontier.Point(one.stage.copies.asked or 0, one.stage.throughput.output_tokens_per_s)


def _frontier_level(one: Played, speed: Estimate | None) -> FrontierLevel:
    stage, cost = one.stage, one.stage.cost
    kv = replicas.gauge(one.recorded.server, "kv_cache_usage_perc", *one.window_s) if stage.window else None
    trusted = one.counts
    return FrontierLevel(
        stage=stage.index,
        copies=stage.copies.asked or 0,
        verdict=stage.verdict.level,
        output_tokens_per_s=stage.throughput.output_tokens_per_s if stage.throughput and trusted else None,
        output_tokens_per_s_per_copy=stage.throughput.output_tokens_per_s_per_copy if stage.throughput and trusted else None,
        usd_per_page=cost.usd_per_page if cost and trusted else None,
        wh_per_page=cost.wh_per_page if cost and trusted else None,
        energy_source=cost.energy_source if cost else "not_measured",
        kv_cache_fraction=kv.mean if kv else None,
        kv_cache_fraction_max=kv.most if kv else None,
        speed=speed,
    )


@dataclass(frozen=True)
class _Speeds:
    """A level's streams by their speed: what the SLO's quantile held, the part that counts as independent, and (judged, attained) at each speed asked for."""

    held: Estimate | None = None
    independent: float = 1.0
    attained: Mapping[float, tuple[int, int]] = field(default_factory=dict)


def _speeds(spec: Spec, one: Played, asked: Sequence[float]) -> _Speeds:
    """Of one level, whose records are read once; nothing where its clock is not to be trusted."""
    if one.stage.verdict.level != "valid" or one.stage.window is None:
        return _Speeds()
    found = measure.effective_speeds(one.spec, one.recorded, one.span, spec.slo)
    part = frontier.independent(found, spec.slo.quantile)
    held = frontier.speed_held(found, spec.slo.quantile, part)
    at = {speed: measure.held_speed(one.spec, one.recorded, one.span, _at(spec.slo, speed)) for speed in asked}
    return _Speeds(held if held is not None and held.value < float("inf") else None, part, at)


def _at(slo: Slo, speed: float) -> Slo:
    return slo.model_copy(update={"tokens_per_s_per_copy": speed})


def _speed_limit(spec: Spec, speed: float, ordered: Sequence[Played], seen: Sequence[_Speeds], gpus: float | None) -> SpeedLimit:
    slo = _at(spec.slo, speed)
    answer = frontier.held([_judged(one, speeds, speed) for one, speeds in zip(ordered, seen, strict=True)], slo)
    known = [(one.stage.copies.asked or 0, speeds.held) for one, speeds in zip(ordered, seen, strict=True) if speeds.held is not None]
    crossing = frontier.crossing([copies for copies, _ in known], [held for _, held in known], speed) if known else None
    cluster = gpus / spec.cluster.devices * answer.held if gpus and answer.held and price.on_gpus(spec) else None
    return SpeedLimit(
        tokens_per_s=speed,
        held=answer.held,
        clearly_held=answer.clearly_held,
        clearly_missed=answer.clearly_missed,
        crossing=crossing,
        n_cluster=cluster,
        sentence=_limit_sentence(slo, answer, [one.stage.copies.asked or 0 for one in ordered], crossing),
    )


def _judged(one: Played, speeds: _Speeds, speed: float) -> search.Level:
    """A level as a search would judge it at this speed."""
    stage = one.stage
    valid = stage.verdict.level == "valid" and stage.window is not None
    judged, attained = speeds.attained.get(speed, (0, 0))
    errors = any(reason.code == "too-many-errors" for reason in stage.verdict.reasons) and not stage.driver.limited
    return search.Level(float(stage.copies.asked or 0), judged, attained, stage.copies.error_fraction or 0.0, valid or errors, speeds.independent)


def _limit_sentence(slo: Slo, answer: frontier.Held, tried: Sequence[int], crossing: Estimate | None) -> str:
    speed = f"{slo.tokens_per_s_per_copy:g} tokens/s"
    if answer.held is None:
        why = "the smallest level cannot be judged" if answer.unjudged else f"already {min(tried)} missed it"
        return f"{speed}: no level held it; {why}."
    parts = [f"{answer.held:,} {'copy' if answer.held == 1 else 'copies'} held it"]
    if answer.clearly_held != answer.held:
        parts.append(f"{answer.clearly_held:,} clearly did" if answer.clearly_held is not None else "none clearly did")
    if answer.clearly_missed is not None:
        parts.append(f"{answer.clearly_missed:,} clearly missed")
    elif answer.unjudged:
        parts.append("the next level cannot be judged")
    elif answer.held == max(tried):
        parts.append("the largest that was tried, so the true number may be larger")
    if crossing is not None:
        ends = interval(crossing.low, crossing.high) or "(neither end lies inside the sweep)"
        parts.append(f"between levels the curve falls below it at {number(crossing.value)} {ends}")
    return f"{speed}: {'; '.join(parts)}."


def _marginal(below: Played, above: Played) -> Marginal:
    lower, upper = _point(below), _point(above)
    gain, more = frontier.gain(lower, upper), upper.copies - lower.copies
    average = lower.rate.value / lower.copies
    lost = (average - upper.rate.value / upper.copies) * lower.copies / more
    wh = _wh_per_further_page(below, above)
    return Marginal(
        from_copies=lower.copies,
        to_copies=upper.copies,
        gain_tokens_per_s=gain,
        share_of_a_copy=gain.value / average,
        others_lose_tokens_per_s=lost,
        wh_per_page=wh,
        usd_per_page=_usd_per_further_page(below, above, wh),
    )


def _wh_per_further_page(below: Played, above: Played) -> Estimate | None:
    """Joules that came with the further copies over the pages that did; None where energy is not measured or no page was gained."""
    rates = [_energy_and_pages(one) for one in (below, above)]
    if rates[0] is None or rates[1] is None:
        return None
    found = frontier.per_further(rates[0], rates[1])
    if found is None:
        return None
    fine = all(one.stage.window is not None and one.stage.window.duration_s >= price.ENERGY_WINDOW_S_MIN for one in (below, above))
    return _times(found if fine else Estimate(value=found.value), 1 / 3600)


def _energy_and_pages(one: Played) -> tuple[Floats, Floats] | None:
    """The facility's joules/s and pages/s in equal parts of a level's window, the assumed inputs at their middle; None where energy is not measured."""
    cost, through, window = one.stage.cost, one.stage.throughput, one.stage.window
    if cost is None or through is None or window is None or not through.pages or cost.energy_source != "measured" or cost.facility_j is None:
        return None
    start_s, end_s = one.window_s
    inside = window.model_copy(update={"start_s": start_s, "end_s": end_s})
    joules = price.metered_blocks(one.recorded.energy, inside)
    tokens = measure.block_tokens(one.recorded, one.span, inside, price.BLOCKS)
    if joules is None or not joules.sum() or not tokens.sum():
        return None
    part_s = window.duration_s / price.BLOCKS
    return joules * cost.facility_j.mid / joules.sum() / part_s, tokens * through.pages / tokens.sum() / part_s


def _usd_per_further_page(below: Played, above: Played, wh: Estimate | None) -> Estimate | None:
    """Electricity of the further pages, for owned hardware whose energy is measured. Hardware costs the same with or without them."""
    costs = [one.stage.cost for one in (below, above)]
    if wh is None or any(cost is None or cost.hardware_kind != "owned" for cost in costs):
        return None
    return _times(wh, above.spec.prices.electricity_usd_per_kwh.value / 1000)


def _times(found: Estimate, factor: float) -> Estimate:
    low, high = (None if end is None else factor * end for end in (found.low, found.high))
    return Estimate(value=factor * found.value, low=low, high=high)


def _frontier_sentence(spec: Spec, best: Played | None, knee: str, speeds: Sequence[SpeedLimit], marginals: Sequence[Marginal]) -> str:
    """The answer in one sentence."""
    if best is None or best.stage.throughput is None:
        return "No answer: no level of the frontier is valid."
    rate = best.stage.throughput.output_tokens_per_s
    ends = f" [{rate.low:,.0f} – {rate.high:,.0f}]" if rate.low is not None and rate.high is not None else ""
    copies = best.stage.copies.asked or 0
    parts = [f"{spec.model.id} makes at most {rate.value:,.0f} tokens/s{ends} on this hardware, with {copies:,} {'copy' if copies == 1 else 'copies'}"]
    parts.append(knee[0].lower() + knee.split(":", 1)[0][1:] if knee.startswith("The knee") else knee[0].lower() + knee[1:].rstrip("."))
    held = [limit for limit in speeds if limit.held is not None]
    if held:
        told = ", ".join(f"{limit.held:,} {_enclosed(limit)} at {limit.tokens_per_s:g} tokens/s" for limit in held)
        parts.append(f"held for {told} (in brackets: copies that clearly held – that clearly missed)")
    if marginals:
        last = marginals[-1]
        more = last.gain_tokens_per_s
        ends = f" [{more.low:.3g} – {more.high:.3g}]" if more.low is not None and more.high is not None else ""
        parts.append(
            f"from {last.from_copies:,} to {last.to_copies:,} each further copy adds {more.value:.3g} tokens/s{ends}, {100 * last.share_of_a_copy:.0f} % of a copy's share"
        )
    return "; ".join(parts) + "."


def _enclosed(limit: SpeedLimit) -> str:
    """What encloses N_SLO, in levels that were played."""
    least = limit.clearly_held or 0
    return f"[{least:,} or more]" if limit.clearly_missed is None else f"[{least:,} – {limit.clearly_missed:,}]"


# ------------------------------------------------------------------------------------------------------------------- scaling


def _scaling(spec: Spec, played: Sequence[Played], beside: Beside) -> ScalingFinding:
    del beside
    asked = spec.experiment
    assert isinstance(asked, ScalingExperiment)  # noqa: S101
    counted = [one for one in played if one.counts]
    rates = {count: [_rate(one) for one in counted if one.spec.cluster.replicas == count] for count in asked.levels}
    fitted = usl.fit([usl.Measurement(count, rate) for count, found in rates.items() for rate in found])
    notes = notes_of(played, len(asked.levels) * asked.repeats)
    short = [f"{len(found)} of {asked.repeats} at {_replicas(count)}" for count, found in rates.items() if len(found) < asked.repeats]
    if short:
        notes.append(f"Servings that count: {', '.join(short)}.")
    if isinstance(fitted, str):
        notes.append(fitted)
    alone = [one for one in counted if one.spec.cluster.replicas == 1]
    levels = [
        ScalingLevel(
            replicas=count,
            servings=len(rates[count]),
            output_tokens_per_s=usl.mean_rate(rates[count]),
            efficiency=usl.efficiency(rates[count], count, rates[1]) if rates.get(1) else None,
            loss=_loss([one for one in counted if one.spec.cluster.replicas == count], alone),
        )
        for count in asked.levels
        if rates[count]
    ]
    sharing = _sharing(spec, counted)
    fit = None if isinstance(fitted, str) else fitted
    return ScalingFinding(
        sentence=_scaling_sentence(levels, fit, sharing),
        notes=notes,
        sharing=sharing,
        copies_per_replica=asked.copies_per_replica,
        levels=levels,
        servings=[ScalingServing(stage=one.stage.index, replicas=one.spec.cluster.replicas, output_tokens_per_s=_rate(one)) for one in counted],
        fit=None if fit is None else UslFit(**{name: getattr(fit, name) for name in UslFit.model_fields}),
    )


def _rate(one: Played) -> float:
    return one.stage.throughput.output_tokens_per_s.value if one.stage.throughput else 0.0


def _replicas(count: int) -> str:
    return f"{count} replica{'' if count == 1 else 's'}"


def _sharing(spec: Spec, counted: Sequence[Played]) -> str | None:
    """What the replicas share, where it is less than a device each; None where each has GPUs of its own."""
    hardware = spec.cluster.hardware
    if not isinstance(hardware, CpuReplica):
        if hardware.gpus_per_replica >= 1:
            return None
        return f"Up to {int(1 / hardware.gpus_per_replica)} replicas share one GPU ({hardware.gpus_per_replica:g} each): this is GPU sharing, not cluster scaling."
    largest = max(counted, key=lambda one: one.spec.cluster.replicas, default=None)
    hosts = set() if largest is None else set(largest.recorded.server.target[largest.recorded.server.name == "generation_tokens_total"])
    if len(hosts) > 1:
        return f"The replicas run on the CPUs of {len(hosts)} hosts."
    return "All replicas share the processors of one host: this is sharing, not cluster scaling."


def _loss(mine: Sequence[Played], alone: Sequence[Played]) -> Loss | None:
    """X / N = (in flight / asked) x (at the engines / in flight) x (running / at the engines) x (tokens/s / running): each over that of one replica."""
    many, one = ([found for each in side if (found := _shares(each)) is not None] for side in (mine, alone))
    if not many or not one:
        return None
    driver, proxy, queue, engine = (usl.over([each[part] for each in many], [each[part] for each in one]) for part in range(4))
    busiest, even = (sum(each[part] for each in many) / len(many) for part in (4, 5))
    router = min(1.0, max(even, queue.value * engine.value))  # it can have cost no more than was lost there
    return Loss(driver=driver, proxy=proxy, queue=queue, engine=engine, imbalance=busiest, router=router)


def _shares(one: Played) -> tuple[float, ...] | None:
    """The four parts of tokens/s for each copy asked, the busiest replica's running sequences over the mean, and how even the replicas were; None without gauges."""
    start_s, end_s = one.window_s
    server, asked, in_flight = one.recorded.server, one.stage.copies.asked or 0, one.stage.copies.n_run_client or 0.0
    running = replicas.gauge(server, "num_requests_running", start_s, end_s)
    waiting = replicas.gauge(server, "num_requests_waiting", start_s, end_s)
    if running is None or not running.total or not in_flight or not asked:
        return None
    held = running.total + (waiting.total if waiting else 0.0)
    busiest = max(running.means.values()) / (running.total / one.spec.cluster.replicas)
    even = replicas.evenness(server, ("num_requests_running", "num_requests_waiting"), one.spec.cluster.replicas, start_s, end_s)
    return in_flight / asked, held / in_flight, running.total / held, _rate(one) / running.total, busiest, even


def _scaling_sentence(levels: Sequence[ScalingLevel], fit: usl.Fit | None, sharing: str | None) -> str:
    """The answer in one sentence."""
    if not levels:
        return "No answer: no serving is valid."
    last = levels[-1]
    parts = [f"{_replicas(last.replicas)} make {_told(last.output_tokens_per_s, ',.0f')} tokens/s"]
    if last.efficiency is not None and last.replicas > 1:
        scaled = last.efficiency.model_copy(update={k: None if v is None else 100 * v for k, v in last.efficiency.model_dump().items()})
        parts.append(f"each {_told(scaled, '.3g')} % of what one alone makes")
        if last.loss is not None:
            parts.append(_loss_words(last.loss))
    if fit is not None:
        parts.append(_law_words(fit, last.replicas))
    else:
        parts.append("no law is fitted (see the notes)")
    said = "; ".join(parts) + "."
    return f"{said} {sharing}" if sharing else said


def _told(value: Estimate, form: str) -> str:
    if value.low is None or value.high is None:
        return f"{value.value:{form}} (no interval: one serving)"
    return f"{value.value:{form}} [{value.low:{form}} – {value.high:{form}}]"


def _loss_words(loss: Loss) -> str:
    """Where the most of it goes, as far as the servings tell it from nothing; the router's part is a bound, and said as one."""
    named = {"driver (copies that it did not keep in flight)": loss.driver, "proxy and network (copies in flight outside the engines)": loss.proxy,
             "waiting in the engines' queues": loss.queue, "engines (speed of a running sequence)": loss.engine}  # fmt: skip
    where, part = min(named.items(), key=lambda item: item[1].value)
    if part.value >= 1:
        return "no part of the way lost anything"
    if part.high is not None and part.high >= 1:
        return f"no part of the way lost more than the servings differ by (the most in the {where}: x {_told(part, '.3g')})"
    inside = loss.queue.value * loss.engine.value
    if part in (loss.queue, loss.engine) and loss.router is not None and loss.router <= math.sqrt(part.value) and inside <= math.sqrt(part.value):
        return (
            f"most of the loss may be the router's uneven dealing: it can have cost up to x {loss.router:.3g} of the x {inside:.3g} that was lost "
            f"in the engines and their queues (the busiest replica ran {loss.imbalance:.3g} times the mean)"
        )
    return f"most of the loss is in the {where}: x {_told(part, '.3g')}"


def _law_words(fit: usl.Fit, most: int) -> str:
    """The law in words; `most`: the most replicas that were measured, beyond which its maximum is extrapolated."""
    if fit.law == "linear":
        kappa = f", coherency (kappa) is at most {fit.kappa.high:.2g}" if fit.kappa.high is not None else f"; {fit.levels} levels carry no coherency, which was not looked for"
        return f"scaling is linear as far as the repeats can tell: contention's interval includes 0 (sigma is at most {fit.sigma.high:.2g}){kappa}"
    sigma = f"contention (sigma) {_told(fit.sigma, '.3g')}"
    if fit.law == "amdahl":
        why = f"{fit.levels} levels carry no coherency"
        if fit.kappa.high is not None:
            why = f"coherency's interval includes 0, so there is no maximum to tell (kappa is at most {fit.kappa.high:.2g})"
        return f"Amdahl's law with {sigma}; {why}"
    beyond = f" (extrapolated: {most} were measured)" if fit.peak and (fit.peak.high or fit.peak.value) > most else ""
    peak = f", the most at {_told(fit.peak, ',.0f')} replicas{beyond}" if fit.peak else ""
    return f"the Universal Scalability Law with {sigma} and coherency (kappa) {_told(fit.kappa, '.3g')}{peak}"


FINDERS: dict[type, Callable[[Spec, Sequence[Played], Beside], Finding]] = {
    FrontierExperiment: _frontier,
    ScalingExperiment: _scaling,
    BestOfNExperiment: best_of_n.find,
    KShotExperiment: k_shot.find,
}
