"""What an experiment found, from its levels as they were measured: one function a kind, each ending in one sentence.

The statistics are elsewhere (frontier.py, usl.py; best_of_n.py and k_shot.py have their findings too); here the levels' stages and records become their input, and their output becomes the
summary's section. A void level enters no statistic, and the notes say so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from kilocopy import best_of_n, frontier, k_shot, measure, price, replicas, search, usl
from kilocopy.played import Beside, Played, notes_of
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
    speeds = [_speed_limit(spec, speed, ordered, gpus) for speed in asked.speeds_tokens_per_s]
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
        levels=[_frontier_level(spec, one) for one in ordered],
        marginals=marginals,
        knee=knee,
        speeds=speeds,
        n_human=best.stage.copies.n_human if best else {},
    )


def _point(one: Played) -> frontier.Point:
    assert one.stage.throughput is not None  # noqa: S101  # it counts
    return frontier.Point(one.stage.copies.asked or 0, one.stage.throughput.output_tokens_per_s)


def _frontier_level(spec: Spec, one: Played) -> FrontierLevel:
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
        speed=_speed(spec, one),
    )


def _speed(spec: Spec, one: Played) -> Any:
    """The speed that the SLO's quantile of a level's streams held; None where its clock is not to be trusted."""
    if one.stage.verdict.level != "valid" or one.stage.window is None:
        return None
    found = measure.effective_speeds(one.spec, one.recorded, one.span, spec.slo)
    speed = frontier.speed_held(found, spec.slo.quantile)
    return speed if speed is not None and speed.value < float("inf") else None


def _speed_limit(spec: Spec, speed: float, ordered: Sequence[Played], gpus: float | None) -> SpeedLimit:
    slo = spec.slo.model_copy(update={"tokens_per_s_per_copy": speed})
    answer = frontier.held([_judged(one, slo) for one in ordered], slo)
    known = [(one.stage.copies.asked or 0, held) for one in ordered if (held := _speed(spec, one)) is not None]
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


def _judged(one: Played, slo: Slo) -> search.Level:
    """A level as a search would judge it at this speed."""
    stage = one.stage
    valid = stage.verdict.level == "valid" and stage.window is not None
    judged, attained = measure.held_speed(one.spec, one.recorded, one.span, slo) if valid else (0, 0)
    errors = any(reason.code == "too-many-errors" for reason in stage.verdict.reasons) and not stage.driver.limited
    return search.Level(float(stage.copies.asked or 0), judged, attained, stage.copies.error_fraction or 0.0, valid or errors)


def _limit_sentence(slo: Slo, answer: frontier.Held, tried: Sequence[int], crossing: Any) -> str:
    speed = f"{slo.tokens_per_s_per_copy:g} tokens/s"
    if answer.held is None:
        why = "the smallest level cannot be judged" if answer.unjudged else f"already {min(tried)} missed it"
        return f"{speed}: no level held it; {why}."
    parts = [f"{answer.held:,} {'copy' if answer.held == 1 else 'copies'} held it"]
    if answer.clearly_missed is not None:
        parts.append(f"{answer.clearly_missed:,} clearly missed")
    elif answer.unjudged:
        parts.append("the next level cannot be judged")
    elif answer.held == max(tried):
        parts.append("the largest that was tried, so the true number may be larger")
    if crossing is not None:
        ends = f" [{crossing.low:,.0f} – {crossing.high:,.0f}]" if crossing.low is not None and crossing.high is not None else ""
        parts.append(f"between levels the curve falls below it at {crossing.value:,.0f}{ends}")
    return f"{speed}: {'; '.join(parts)}."


def _marginal(below: Played, above: Played) -> Marginal:
    lower, upper = _point(below), _point(above)
    gain, more = frontier.gain(lower, upper), upper.copies - lower.copies
    average = lower.rate.value / lower.copies
    lost = (average - upper.rate.value / upper.copies) * lower.copies / more
    return Marginal(
        from_copies=lower.copies,
        to_copies=upper.copies,
        gain_tokens_per_s=gain,
        share_of_a_copy=gain.value / average,
        others_lose_tokens_per_s=lost,
        wh_per_page=_per_further_page(below, above, "facility_j", 3600),
        usd_per_page=_usd_per_further_page(below, above),
    )


def _per_further_page(below: Played, above: Played, field: str, unit: float) -> float | None:
    """(rate above - rate below) / (pages/s above - pages/s below); null where energy is not measured or no page was gained."""
    rates = []
    for one in (below, above):
        cost, through, window = one.stage.cost, one.stage.throughput, one.stage.window
        if cost is None or through is None or window is None or not through.pages or cost.energy_source != "measured":
            return None
        total = getattr(cost, field)
        rates.append((total.mid / window.duration_s / unit, through.pages / window.duration_s))
    pages = rates[1][1] - rates[0][1]
    return (rates[1][0] - rates[0][0]) / pages if pages > 0 else None


def _usd_per_further_page(below: Played, above: Played) -> float | None:
    """Electricity of the further pages, for owned hardware whose energy is measured. Hardware costs the same with or without them."""
    costs = [one.stage.cost for one in (below, above)]
    if any(cost is None or cost.hardware_kind != "owned" for cost in costs):
        return None
    wh = _per_further_page(below, above, "facility_j", 3600)
    return None if wh is None else wh / 1000 * above.spec.prices.electricity_usd_per_kwh.value


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
        parts.append("held for " + ", ".join(f"{limit.held:,} at {limit.tokens_per_s:g} tokens/s" for limit in held))
    if marginals:
        last = marginals[-1]
        more = last.gain_tokens_per_s
        ends = f" [{more.low:.3g} – {more.high:.3g}]" if more.low is not None and more.high is not None else ""
        parts.append(
            f"from {last.from_copies:,} to {last.to_copies:,} each further copy adds {more.value:.3g} tokens/s{ends}, {100 * last.share_of_a_copy:.0f} % of a copy's share"
        )
    return "; ".join(parts) + "."


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
    driver, proxy, queue, engine = (math.exp(_mean_log(many, i) - _mean_log(one, i)) for i in range(4))
    spread = [found[4] for found in many]
    return Loss(driver=driver, proxy=proxy, queue=queue, engine=engine, imbalance=sum(spread) / len(spread))


def _mean_log(shares: Sequence[tuple[float, ...]], part: int) -> float:
    return sum(math.log(one[part]) for one in shares) / len(shares)


def _shares(one: Played) -> tuple[float, ...] | None:
    """The four parts of tokens/s for each copy asked, and the busiest replica's running sequences over the mean; None where gauges are missing."""
    start_s, end_s = one.window_s
    server, asked, in_flight = one.recorded.server, one.stage.copies.asked or 0, one.stage.copies.n_run_client or 0.0
    running = replicas.gauge(server, "num_requests_running", start_s, end_s)
    waiting = replicas.gauge(server, "num_requests_waiting", start_s, end_s)
    if running is None or not running.total or not in_flight or not asked:
        return None
    held = running.total + (waiting.total if waiting else 0.0)
    busiest = max(running.means.values()) / (running.total / one.spec.cluster.replicas)
    return in_flight / asked, held / in_flight, running.total / held, _rate(one) / running.total, busiest


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
    """Where the most of it goes."""
    named = {"driver (copies that it did not keep in flight)": loss.driver, "proxy and network (copies in flight outside the engines)": loss.proxy,
             "waiting in the engines' queues": loss.queue, "engines (speed of a running sequence)": loss.engine}  # fmt: skip
    where, factor = min(named.items(), key=lambda item: item[1])
    return f"most of the loss is in the {where}: x {factor:.3g}" if factor < 1 else "no part of the way lost anything"


def _law_words(fit: usl.Fit, most: int) -> str:
    """The law in words; `most`: the most replicas that were measured, beyond which its maximum is extrapolated."""
    if fit.law == "linear":
        untold = "" if fit.levels >= usl.LEVELS_USL else f"; {fit.levels} levels carry no coherency, which was not looked for"
        return f"scaling is linear as far as the repeats can tell: contention's interval includes 0{untold}"
    sigma = f"contention (sigma) {_told(fit.sigma, '.3g')}"
    if fit.law == "amdahl":
        why = "coherency's interval includes 0, so there is no maximum to tell" if fit.levels >= usl.LEVELS_USL else f"{fit.levels} levels carry no coherency"
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
