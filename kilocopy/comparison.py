"""Runs side by side: ratios of what a page costs, what energy it takes, how many copies run and how fast, to a baseline.

Two runs compare where they asked for the same thing: the same workload, page and SLO, at the same load or each at its own N_SLO.
Everything else that differs (model, engine, cluster, prices) is what is being compared, and is listed. A figure whose two sides mean
different things (energy metered on one side and assumed on the other) is not compared, and says so.

A ratio is at the prices' middle, and its interval is that of what was measured. How far the stated bands of prices, PUE and assumed power move it is told
apart: what both sides state alike moves on both at once (two runs on one price list have no doubt about it between them), the rest apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from kilocopy.price import Corner, corner_of
from kilocopy.problem import ProblemError
from kilocopy.ratios import Basis, RatioEstimate, Reading, ratio
from kilocopy.report import shown_stage
from kilocopy.summaries import ENGINE, Finished, Side
from kilocopy.summary import Band, Estimate, Frozen, Stage

OWN_N_SLO = "each at its own N_SLO"
CORNERS: tuple[Corner, ...] = ("low", "mid", "high")
WORDS_APART = 0.05  # of words per token: two sides' tokens are not the same text beyond that


@dataclass(frozen=True)
class Metric:
    """A figure of a stage: which way is better, and the stage's own relative interval where it has one."""

    name: str
    label: str
    better: Literal["lower", "higher"]
    value: Callable[[Stage], float | None]
    within: Callable[[Stage], Estimate | None]


def _rate(stage: Stage) -> Estimate | None:
    """Pages, dollars and joules of a fixed power all follow the token rate, so its relative interval is theirs."""
    return stage.throughput.output_tokens_per_s if stage.throughput else None


def _wh(stage: Stage) -> Estimate | None:
    if stage.cost is None or stage.cost.energy_source == "assumed":
        return _rate(stage)
    return stage.cost.wh_per_page_measured


METRICS = (
    Metric("usd_per_page", "$/page", "lower", lambda s: s.cost.usd_per_page.mid if s.cost and s.cost.usd_per_page else None, _rate),
    Metric("wh_per_page", "Wh/page", "lower", lambda s: s.cost.wh_per_page.mid if s.cost and s.cost.wh_per_page else None, _wh),
    Metric("tokens_per_s", "tokens/s", "higher", lambda s: s.throughput.output_tokens_per_s.value if s.throughput else None, _rate),
    Metric(
        "tokens_per_s_per_copy", "tokens/s per copy", "higher",
        lambda s: s.throughput.output_tokens_per_s_per_copy if s.throughput else None, _rate,
    ),
    Metric("ttft_p50_s", "TTFT p50, s", "lower", lambda s: s.latency.ttft_s.p50 if s.latency and s.latency.ttft_s else None, lambda _s: None),
)  # fmt: skip
COPIES = Metric("copies", "copies (N_SLO)", "higher", lambda s: float(s.copies.asked) if s.copies.asked else None, lambda _s: None)
ALL_METRICS = (*METRICS, COPIES)


class Spread(Frozen):
    """One side's figure over its runs: geometric mean, smallest, largest."""

    value: float
    low: float
    high: float
    runs: int


class Row(Frozen):
    """One figure of one side against the baseline, at one load; without a ratio, why."""

    at: str
    metric: str
    side: str
    baseline: Spread | None
    other: Spread | None
    ratio: RatioEstimate | None
    missing: str = ""
    prices: Band | None = None  # the ratio over the stated bands of prices, PUE and assumed power; None where they do not move it


class Point(Frozen):
    """One side at one load, as the frontier shows it."""

    side: str
    load: str
    copies: float | None
    tokens_per_s_per_copy: Spread
    usd_per_page: Spread | None
    on_frontier: bool = False


class Comparison(Frozen):
    """Sides against the first of them."""

    baseline: str
    others: list[str]
    runs: dict[str, list[str]]
    quality: dict[str, float]
    parameters: dict[str, float]  # that work on one token
    differences: list[str]
    left_out: list[str]
    rows: list[Row]
    points: list[Point]
    tokens: list[str] = Field(default_factory=list)  # why a token of one side may not be a token of the other
    simulated: dict[str, str] = Field(default_factory=dict)  # sides on which no model ran: what stood in for it


def compare(sides: Sequence[Side], quality: Mapping[str, float] | None = None, *, empty: bool = False) -> Comparison:
    """Every side against the first. Raises ProblemError where they do not compare, or (unless it may be `empty`) nothing of them does."""
    if len(sides) < 2:
        runs = ", ".join(run.id for run in sides[0].runs)
        raise ProblemError(f"nothing to compare: {runs} {'repeat each other' if len(sides[0].runs) > 1 else 'is one run'}; give another run, or name sides: A=RUN B=RUN")
    base = sides[0]
    for side in sides[1:]:
        _refuse(base, side)
    left_out, rows = [], []
    for side in sides[1:]:
        found, missed = _against(base, side)
        rows += found
        left_out += missed
    if not empty and not any(row.ratio for row in rows):
        raise ProblemError(f"nothing to compare: {' '.join(dict.fromkeys(left_out)) or 'the sides have no load in common'}")
    return Comparison(
        baseline=base.name,
        others=[side.name for side in sides[1:]],
        runs={side.name: [run.id for run in side.runs] for side in sides},
        quality=_quality(sides, quality or {}),
        parameters={side.name: float(n) for side in sides if (n := (side.first.spec.get("model") or {}).get("parameters_active"))},
        differences=[said for side in sides[1:] for said in _differences(base, side)],
        left_out=list(dict.fromkeys(left_out)),
        rows=rows,
        points=_frontier([point for side in sides for point in _points(side)]),
        tokens=[said for side in sides[1:] for said in _tokens(base, side)],
        simulated={side.name: said for side in sides for said in dict.fromkeys(run.summary.simulated for run in side.runs) if said},
    )


def _quality(sides: Sequence[Side], given: Mapping[str, float]) -> dict[str, float]:
    """Scores by side; a score is given for a side's name or for its model."""
    models = {side.name: str((side.first.spec.get("model") or {}).get("id")) for side in sides}
    if unknown := sorted(set(given) - set(models) - set(models.values())):
        raise ProblemError(f"--quality {unknown[0]}: no side and no model of that name; there are {', '.join([*models, *sorted(set(models.values()))])}")
    return {name: given.get(name, given.get(model, 0.0)) for name, model in models.items() if name in given or model in given}


# ------------------------------------------------------------------------------------------------------- what does not compare


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    if isinstance(tree, dict):
        return {key: value for name, part in tree.items() for key, value in flat(part, f"{path}.{name}" if path else str(name)).items()}
    return {path: tree}


def _differing(one: Any, other: Any, path: str) -> list[str]:
    left, right = flat(one, path), flat(other, path)
    keys = [*left, *(key for key in right if key not in left)]
    apart = [key for key in keys if (key in left) != (key in right) or left.get(key) != right.get(key)]
    return [f"{key}: {left.get(key, 'absent')} against {right.get(key, 'absent')}" for key in apart]


def _refuse(base: Side, side: Side) -> None:
    """What both must have asked for alike. The seed may differ: it draws other prompts of the same kind."""
    for key in ("workload", "page", "slo"):
        if apart := _differing(_asked(base.first, key), _asked(side.first, key), key):
            raise ProblemError(f"{base.name} and {side.name} do not compare, they were not asked for the same: {'; '.join(apart)}")
    if apart := _differing(base.first.mixed or {}, side.first.mixed or {}, "experiment"):
        raise ProblemError(
            f"{base.name} and {side.name} do not compare: the levels of such an experiment differ in more than their copies, and they are not the same one: {'; '.join(apart)}"
        )


def _asked(run: Finished, key: str) -> Any:
    part = run.spec.get(key)
    return {name: value for name, value in part.items() if (key, name) != ("workload", "seed")} if isinstance(part, dict) else part


def _differences(base: Side, side: Side) -> list[str]:
    """What differs and is therefore compared."""
    found = []
    for key, ignored in (("model", {"training"}), ("cluster", {"port", "start_timeout_s", "address"}), ("prices", set())):
        one, other = ({name: part for name, part in (run.spec.get(key) or {}).items() if name not in ignored} for run in (base.first, side.first))
        found += _differing(one, other, key)
    found += _differing(_system(base.first), _system(side.first), "")
    played = ["the stages or the experiment ask for other loads, durations or warm-ups"] if any(base.first.spec.get(key) != side.first.spec.get(key) for key in ("stages", "experiment")) else []
    return [f"{side.name} against {base.name}: {said}" for said in played] + [f"{side.name} against {base.name} ({said.partition(': ')[0]}): {_swapped(said)}" for said in found]


def _tokens(base: Side, side: Side) -> list[str]:
    """What is to be known of two models' tokens. No run records its tokenizer; how many words a token made is measured."""
    models = [{key: (one.first.spec.get("model") or {}).get(key) for key in ("id", "source")} for one in (base, side)]
    words = [_words_per_token(one) for one in (base, side)]
    apart = words[0] is not None and words[1] is not None and abs(words[1] / words[0] - 1) > WORDS_APART
    if models[0] == models[1] and not apart:
        return []
    told = " and ".join("not counted" if value is None else f"{value:.3g}" for value in words)
    return [
        f"{base.name} and {side.name}: words per output token {told}; the models' tokenizers are not recorded{'' if models[0] == models[1] else ', and may differ'}. Pages count words. "
        "Tokens/s, lengths asked in tokens and an SLO in tokens/s are of each side's own tokens: the same number is the same text only where these two agree."
    ]


def _words_per_token(side: Side) -> float | None:
    found = [stage.throughput.words_per_token for run in side.runs for stage in run.summary.stages if stage.throughput and stage.verdict.level != "void"]
    known = [value for value in found if value]
    return float(np.mean(known)) if known else None


def _swapped(said: str) -> str:
    """`key: base against other` as `other against base`, since the sentence begins with the other side."""
    left, _, right = said.partition(": ")[2].partition(" against ")
    return f"{right} against {left}"


def _system(run: Finished) -> dict[str, Any]:
    told, host = run.summary.run.get("versions") or {}, run.summary.run.get("hardware") or {}
    versions = {f"{name}'s version": told[name] for name in ENGINE if name in told}
    gpus = sorted(str(gpu.get("name") if isinstance(gpu, dict) else gpu) for gpu in host.get("gpus") or [])
    return versions | {f"host's {key}": host[key] for key in ("cpu", "cores") if key in host} | ({"host's GPUs": ", ".join(gpus)} if gpus else {})


def _not_alike(metric: Metric, one: Stage, other: Stage) -> str:
    """Why two sides' figures of one name mean different things; empty where they do not."""
    a, b = one.cost, other.cost
    if a is None or b is None:
        return ""
    if metric.name == "wh_per_page":
        if a.energy_source != b.energy_source:
            return f"energy is {a.energy_source.replace('_', ' ')} on one side and {b.energy_source.replace('_', ' ')} on the other"
        if a.energy_boundary != b.energy_boundary:
            return f"energy encloses {a.energy_boundary} on one side and {b.energy_boundary} on the other"
    owned = a.hardware_kind == b.hardware_kind == "owned"
    if metric.name == "usd_per_page" and owned and (a.electricity_usd_per_page is None) != (b.electricity_usd_per_page is None):
        return "electricity is in the price of one side and not in the other's"
    return ""


# --------------------------------------------------------------------------------------------------------------------- ratios


def _against(base: Side, side: Side) -> tuple[list[Row], list[str]]:
    """A row for each figure at each load that both have, then each at its own N_SLO; and what was left out, with its reason."""
    rows, left_out = [], []
    mine, theirs, alike = base.loads(), side.loads(), _alike_prices(base, side)
    for place in mine:
        if place not in theirs:
            continue
        counted = []
        for name, runs in ((base.name, mine[place]), (side.name, theirs[place])):
            said = _void(name, place[1], runs)
            left_out += said
            counted.append(None if said else [[stage for stage in stages if stage.verdict.level != "void"] for stages in runs])
        if counted[0] and counted[1]:
            rows += [_row(place[1], metric, side.name, counted[0], counted[1], alike) for metric in METRICS]
    lonely = [place[1] for place in [*mine, *theirs] if (place in mine) != (place in theirs)]
    if lonely:
        left_out.append(f"{_listed(lonely)}: asked of one side only.")
    own, said = _own_n_slo(base, side)
    return rows + own, left_out + said


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _void(name: str, load: str, runs: Sequence[Sequence[Stage]]) -> list[str]:
    """Why a side has nothing at a load that can be believed: one of its runs has no valid stage there."""
    for stages in runs:
        if not any(stage.verdict.level != "void" and stage.throughput for stage in stages):
            codes = ", ".join(sorted({reason.code for stage in stages for reason in stage.verdict.reasons})) or "it did not ask for it"
            return [f"{load}: void in a run of {name} ({codes})."]
    return []


def _own_n_slo(base: Side, side: Side) -> tuple[list[Row], list[str]]:
    """Copies, and every figure at each side's own largest load within the SLO."""
    found, left_out = [], []
    for one in (base, side):
        stages = []
        for run in one.runs:
            stage = shown_stage(run.summary) if run.summary.headline.n_slo is not None else None
            if stage is None:
                left_out.append(f"{OWN_N_SLO}: no load held the SLO in {run.id} of {one.name}.")
            else:
                stages.append([stage])
        found.append(stages)
    if left_out:
        return [], left_out
    return [_row(OWN_N_SLO, metric, side.name, found[0], found[1], _alike_prices(base, side)) for metric in (COPIES, *METRICS)], []


def _row(at: str, metric: Metric, side: str, base: list[list[Stage]], other: list[list[Stage]], alike: tuple[bool, bool]) -> Row:
    """One figure; each argument has a list of stages for each run."""
    unlike = next((said for one in base for two in other if (said := _not_alike(metric, one[0], two[0]))), "")
    readings = [[_reading(metric, stages) for stages in runs] for runs in (base, other)]
    known = [[one for one in runs if one is not None] for runs in readings]
    spreads = [spread(runs) if len(runs) == len(all_) else None for runs, all_ in zip(known, readings, strict=True)]
    missing = unlike or ("" if all(spreads) else "no figure on one side, or withheld")
    return Row(
        at=at,
        metric=metric.name,
        side=side,
        baseline=spreads[0],
        other=spreads[1],
        ratio=None if missing else ratio(known[1], known[0]),
        missing=missing,
        prices=None if missing else _over_prices(metric, base, other, alike),
    )


def _alike_prices(base: Side, side: Side) -> tuple[bool, bool]:
    """Whether both sides state the same prices of hardware, and the same price of a kWh, PUE and assumed power."""
    one, two = (run.first.spec.get("prices") or {} for run in (base, side))
    quoted = [{key: value for key, value in (prices.get("hardware") or {}).items() if key == "kind" or isinstance(value, dict)} for prices in (one, two)]
    return quoted[0] == quoted[1], all(one.get(key) == two.get(key) for key in ("electricity_usd_per_kwh", "pue", "assumed_power_w"))


def _over_prices(metric: Metric, base: list[list[Stage]], other: list[list[Stage]], alike: tuple[bool, bool]) -> Band | None:
    """The ratio's smallest and largest over the corners of what is stated, hardware and energy each at its own."""
    corner_usd = {"usd_per_page": _usd_at, "wh_per_page": _wh_at}.get(metric.name)
    if corner_usd is None:
        return None
    stages = [[stage for stages in runs for stage in stages] for runs in (other, base)]

    def at(side: int, hardware: Corner, energy: Corner) -> float | None:
        values = [corner_usd(stage, hardware, energy) for stage in stages[side]]
        return float(np.exp(np.mean(np.log([value for value in values if value])))) if all(values) else None

    corners = list(itertools.product(CORNERS, CORNERS))
    over, under = ({corner: at(side, *corner) for corner in corners} for side in (0, 1))
    found = [
        (a / b if a and b else None)
        for (one, a), (two, b) in itertools.product(over.items(), under.items())
        if not (alike[0] and one[0] != two[0]) and not (alike[1] and one[1] != two[1])
    ]
    known, middle = [value for value in found if value], (over["mid", "mid"], under["mid", "mid"])
    if len(known) < len(found) or not middle[0] or not middle[1] or max(known) / min(known) < 1 + 1e-6:
        return None
    return Band(mid=middle[0] / middle[1], low=min(known), high=max(known))


def _usd_at(stage: Stage, hardware: Corner, energy: Corner) -> float | None:
    cost = stage.cost
    if cost is None or cost.hardware_usd_per_page is None:
        return None
    power = cost.electricity_usd_per_page if cost.hardware_kind == "owned" else None
    return corner_of(cost.hardware_usd_per_page, hardware) + (corner_of(power, energy) if power else 0.0)


def _wh_at(stage: Stage, hardware: Corner, energy: Corner) -> float | None:
    del hardware
    return corner_of(stage.cost.wh_per_page, energy) if stage.cost and stage.cost.wh_per_page else None


def _reading(metric: Metric, stages: Sequence[Stage]) -> Reading | None:
    """A run's figure at a load: the mean where it played the load several times. Its own interval only where it played it once."""
    values = [value for stage in stages if (value := metric.value(stage)) is not None and value > 0]
    if len(values) < len(stages) or not values:
        return None
    value = float(np.exp(np.log(values).mean()))
    within = metric.within(stages[0]) if len(stages) == 1 else None
    if within is None or within.low is None or within.high is None or within.value <= 0:
        return Reading(value)
    return Reading(value, value * within.low / within.value, value * within.high / within.value)


def spread(readings: Sequence[Reading]) -> Spread:
    """The runs of a side together."""
    values = [one.value for one in readings]
    return Spread(value=float(np.exp(np.log(values).mean())), low=min(values), high=max(values), runs=len(values))


# ----------------------------------------------------------------------------------------------------------------- the frontier


def _points(side: Side) -> list[Point]:
    """A side at each steady load that no run of it has void."""
    speed, price = METRICS[3], METRICS[0]
    found = []
    for place, runs in side.loads().items():
        if _void(side.name, place[1], runs):
            continue
        counted = [[stage for stage in stages if stage.verdict.level != "void"] for stages in runs]
        speeds = [_reading(speed, stages) for stages in counted]
        prices = [_reading(price, stages) for stages in counted]
        if all(speeds):
            known = [one for one in prices if one is not None]
            found.append(
                Point(
                    side=side.name,
                    load=place[1],
                    copies=counted[0][0].copies.n_run_client,
                    tokens_per_s_per_copy=spread([one for one in speeds if one is not None]),
                    usd_per_page=spread(known) if len(known) == len(prices) else None,
                )
            )
    return found


def _frontier(points: list[Point]) -> list[Point]:
    """The points with those marked that no other beats in both: cheaper a page and faster a copy (Pareto)."""
    priced = [point for point in points if point.usd_per_page is not None]

    def beaten(point: Point) -> bool:
        cost, speed = point.usd_per_page.value if point.usd_per_page else 0.0, point.tokens_per_s_per_copy.value
        return any(
            other.usd_per_page.value <= cost
            and other.tokens_per_s_per_copy.value >= speed
            and (other.usd_per_page.value < cost or other.tokens_per_s_per_copy.value > speed)
            for other in priced
            if other.usd_per_page is not None
        )

    return [point.model_copy(update={"on_frontier": point.usd_per_page is not None and not beaten(point)}) for point in points]


BASES: dict[Basis, str] = {
    "repeats": "repeats of both sides",
    "pooled": "repeats, fewer than three on a side, so that one relative spread is taken for both",
    "within_run": "inside one run each: what moves from one start to the next is not in it",
    "none": "no interval",
}
