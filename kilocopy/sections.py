"""An experiment's section of the report, as titled tables and sentences; the terminal and the page show the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kilocopy.k_shot import scaled
from kilocopy.report import BADGES, DASH, band, interval, money, number, percent, place, seconds, times
from kilocopy.summary import (
    Arm,
    BestOfNFinding,
    Estimate,
    FrontierFinding,
    KShotFinding,
    ScalingFinding,
    ShotLevel,
    SpeedLimit,
    Summary,
    Verified,
)

TITLES = {
    "frontier": "Frontier: copies 1..N on this hardware",
    "scaling": "Replica scaling: replicas 1..R at the same load for each",
    "best_of_n": "Best of n: n samples of one prompt, beside separate requests",
    "k_shot": "Few-shot: what a further example in the prompt costs",
}


@dataclass(frozen=True)
class Table:
    """Rows under their heads, with a title and what the heads mean."""

    title: str
    heads: tuple[str, ...]
    rows: list[list[str]]
    legend: str = ""


@dataclass(frozen=True)
class Section:
    """What an experiment found: its sentence, its tables, and what else is to be said."""

    title: str
    sentence: str
    tables: list[Table] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)


def section(summary: Summary, pages: int) -> Section | None:
    """The experiment's section; None for an ordinary run. `pages`: what money is told for."""
    found = summary.experiment
    if found is None:
        return None
    tables, sentences = SECTIONS[type(found)](found, pages)
    return Section(TITLES[found.kind], found.sentence, [table for table in tables if table.rows], [*sentences, *found.notes])


def fleet(summary: Summary) -> Section | None:
    """What each node and GPU did, whether the router dealt evenly, and what was lost on the way; None where one replica served all the time."""
    several = any(sum(node.replicas for node in stage.nodes) > 1 for stage in summary.stages)
    if not several and not summary.outages:
        return None
    table = Table(
        "Nodes",
        ("stage", "node", "replicas", "GPUs", "copies", "tokens/s", "per GPU", "pages/h", "per GPU"),
        [
            [
                place(stage), node.node, f"{node.replicas:,}", DASH if node.gpus is None else f"{node.gpus:g}", number(node.copies),
                number(node.output_tokens_per_s), number(node.output_tokens_per_s_per_gpu), number(node.pages_per_hour), number(node.pages_per_hour_per_gpu),
            ]
            for stage in summary.stages
            for node in stage.nodes
        ],
        "In each stage's window, by the servers' own counters, so the sum may differ a little from the stage's tokens/s. Copies: running, mean over the scrapes. "
        "Replicas: all that were seen there, those that died and those that took their place.",
    )  # fmt: skip
    sentences = [f"stage {place(stage)}: {stage.balance.sentence}" for stage in summary.stages if stage.balance is not None]
    lost = [f"stage {outage.stage}: {outage.sentence}" for outage in summary.outages]
    nodes = {node.node for stage in summary.stages for node in stage.nodes}
    return Section("The fleet", f"{len(nodes)} node{'s' * (len(nodes) != 1)} served.", [table] if table.rows else [], [*lost, *sentences])


def spread(value: Estimate | None, write: Callable[[float | None], str] = number) -> str:
    """`value [low – high]`."""
    if value is None:
        return DASH
    return f"{write(value.value)} {interval(value.low, value.high, write)}".rstrip()


def _frontier(found: FrontierFinding, pages: int) -> tuple[list[Table], list[str]]:
    levels = Table(
        "Levels",
        ("copies", "verdict", "tokens/s [95 %]", "per copy", "$/page" if pages == 1 else f"$ per {pages:,} pages", "Wh/page", "KV cache",
         f"speed of {percent(found.quantile)} [95 %]"),
        [
            [
                f"{one.copies:,}",
                BADGES[one.verdict],
                spread(one.output_tokens_per_s),
                number(one.output_tokens_per_s_per_copy),
                band(times(one.usd_per_page, pages), money) if one.usd_per_page else DASH,
                f"{band(one.wh_per_page)}{' (assumed)' if one.energy_source == 'assumed' else ''}" if one.wh_per_page else "not measured",
                f"{percent(one.kv_cache_fraction)} / {percent(one.kv_cache_fraction_max)}",
                spread(one.speed),
            ]
            for one in found.levels
        ],
        f"Speed: tokens/s that {percent(found.quantile)} of a level's streams held at least, TTFT within the SLO. KV cache: mean over the replicas / the most of any.",
    )  # fmt: skip
    marginals = Table(
        "What a further copy adds",
        ("from – to", "tokens/s each [95 %]", "of a copy's share", "the others lose", "Wh/page [95 %]", "$/page [95 %]"),
        [
            [
                f"{one.from_copies:,} – {one.to_copies:,}",
                spread(one.gain_tokens_per_s),
                percent(one.share_of_a_copy),
                f"{number(one.others_lose_tokens_per_s)} tokens/s",
                spread(one.wh_per_page),
                spread(one.usd_per_page, money),
            ]
            for one in found.marginals
        ],
        "For each further copy between two levels. Wh and $: of the pages that came with it; the hardware's hour costs the same with or without it. "
        "A dash: energy is not measured, no page was gained, or the rent is paid either way. Without [ ]: no interval, since a window is under 30 s or the gain in pages is not clear of 0.",
    )
    speeds = Table(
        "Copies at a speed",
        ("tokens/s each", "N_SLO: held", "clearly held", "clearly missed", "curve crosses at [95 %]", "N_cluster [from – to]"),
        [
            [
                f"{one.tokens_per_s:g}",
                _count(one.held),
                _count(one.clearly_held),
                _count(one.clearly_missed),
                spread(one.crossing),
                _cluster(one),
            ]
            for one in found.speeds
        ],
        f"N_SLO: the largest level at which {percent(found.quantile)} of the streams held the speed and the TTFT. Crossing: interpolated between levels. "
        "N_cluster: the training cluster's copies at N_SLO, from those that clearly held to those that clearly missed.",
    )
    human = "; ".join(f"{spread(count)} at {wpm} words/min" for wpm, count in sorted(_human(found).items()))
    sentences = [found.knee.sentence, *(one.sentence for one in found.speeds)]
    return [levels, marginals, speeds], [*sentences, *([f"N_human, throughput equivalents at the fastest level [95 %, of its tokens/s]: {human}."] if human else [])]


def _cluster(one: SpeedLimit) -> str:
    """N_cluster, and what the levels around it would make of the same GPUs."""
    if one.n_cluster is None or not one.held:
        return DASH
    each = one.n_cluster / one.held
    low, high = (None if end is None else each * end for end in (one.clearly_held, one.clearly_missed))
    return f"{_count(round(one.n_cluster))} {interval(low, high, lambda end: _count(None if end is None else round(end)))}".rstrip()


def _human(found: FrontierFinding) -> dict[str, Estimate]:
    """N_human with the relative interval of the tokens/s that it is made of: words per token are counted, and taken as exact."""
    rates = [one.output_tokens_per_s for one in found.levels if one.output_tokens_per_s is not None]
    rate = max(rates, key=lambda one: one.value, default=Estimate(value=1.0))

    def scaled(count: float) -> Estimate:
        low, high = (None if end is None else count * end / rate.value for end in (rate.low, rate.high))
        return Estimate(value=count, low=low, high=high)

    return {wpm: scaled(count) for wpm, count in found.n_human.items()}


def _count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def _share(part: Estimate) -> str:
    """A part of the loss; its interval where it is wide enough to be seen."""
    return number(part.value) if part.low is not None and number(part.low) == number(part.high) else spread(part)


def _scaling(found: ScalingFinding, pages: int) -> tuple[list[Table], list[str]]:
    del pages
    levels = Table(
        "Levels",
        ("replicas", "servings", "tokens/s [95 %]", "of one replica's each [95 %]", "driver", "proxy", "queue", "engine", "router, at worst", "busiest / mean"),
        [
            [
                f"{one.replicas:,}",
                f"{one.servings}",
                spread(one.output_tokens_per_s),
                spread(one.efficiency, percent),
                *(_share(getattr(one.loss, part)) if one.loss else DASH for part in ("driver", "proxy", "queue", "engine")),
                number(one.loss.router) if one.loss else DASH,
                number(one.loss.imbalance) if one.loss else DASH,
            ]
            for one in found.levels
        ],
        f"{found.copies_per_replica:,} copies for each replica; intervals between servings. Driver x proxy x queue x engine: tokens/s of a copy against one replica alone, "
        "split into copies kept in flight, of them at the engines, of them running, and the speed of a running sequence. Router, at worst: what its uneven dealing can have left "
        "of queue x engine, as far as one scrape a second shows, where 1 is nothing lost. Busiest / mean: running sequences, over the window.",
    )
    sentences = []
    if found.fit is not None:
        law = {"usl": "Universal Scalability Law", "amdahl": "Amdahl's law (kappa = 0)", "linear": "linear"}[found.fit.law]
        fitted = f"Fitted: {law}; one replica {spread(found.fit.rate_of_one)} tokens/s"
        for name, term in (("sigma", found.fit.sigma), ("kappa", found.fit.kappa)):
            fitted += f", {name} {spread(term)}" if term.value else f", {name} dropped, at most {number(term.high)}" if term.high is not None else f", {name} not in it"
        fitted += f"; lack of fit p = {found.fit.lack_of_fit_p:.2g}" if found.fit.lack_of_fit_p is not None else ""
        sentences.append(f"{fitted}. Intervals: 95 %, bootstrap over servings.")
    return [levels], [*sentences, *([found.sharing] if found.sharing else [])]


HOW = {"one_request": "one request", "same_prompt": "n requests, same prompt", "own_prompts": "requests, own prompts"}
BASIS = {
    "repeats": "Intervals: 95 %, between repeats, with one relative spread over all levels.",
    "within_run": "Intervals: 95 %, inside the runs.",
    "none": "No intervals.",
}


def _joules(one: Arm | ShotLevel, found: Any) -> str:
    if found is None:
        return "not measured"
    return f"{band(found)}{' (assumed)' if one.energy_source == 'assumed' else ''}"


def _best_of_n(found: BestOfNFinding, pages: int) -> tuple[list[Table], list[str]]:
    del pages
    arms = Table(
        "Ways to n samples",
        ("n", "how", "requests in flight", "repeats", "samples/s [95 %]", "$ per 1,000 prompts", "J per prompt", "TTFT p50", "E2E p50", "prefix cache"),
        [
            [
                f"{one.samples}",
                HOW[one.how],
                f"{one.requests_in_flight:,}",
                f"{one.repeats}",
                spread(one.samples_per_s),
                band(times(one.usd_per_sample, 1000 * one.samples), money) if one.usd_per_sample else DASH,
                _joules(one, one.j_per_sample and times(one.j_per_sample, one.samples)),
                seconds(one.ttft_p50_s),
                seconds(one.e2e_p50_s),
                percent(one.prefix_hit_fraction),
            ]
            for one in found.arms
        ],
        f"{found.sequences:,} sequences in flight in every row. A prompt has n samples; E2E is a request's, of n samples to the end of the last one. Prefix cache: prompt tokens "
        f"that it held, over those looked up. {BASIS[found.basis]}",
    )
    savings = Table(
        "What n samples of one request cost, over separate requests",
        ("n", "beside", "cost ratio [95 %]"),
        [[f"{one.samples}", HOW[one.beside], spread(one.cost_ratio)] for one in found.savings],
        "Of the hardware's time for a sample, and so of its price; 1 is no difference.",
    )
    return [arms, savings, *_passing(found.verified)], []


def _passing(found: Verified | None) -> list[Table]:
    if found is None:
        return []
    return [
        Table(
            "How often one of k samples passes",
            ("k", "pass@k [95 %]", "$ per 1,000 solved prompts"),
            [[f"{one.k}", spread(one.value, percent), band(times(one.usd_per_solved, 1000), money) if one.usd_per_solved else DASH] for one in found.pass_at],
            f"{found.prompts:,} prompts, {found.samples:,} samples verified: {found.passed:,} passed, {found.not_passed:,} did not; the unbiased estimate of Chen et al. 2021, "
            "its interval over prompts. $: k samples of one request over pass@k, for the k that were played.",
        )
    ]


def _k_shot(found: KShotFinding, pages: int) -> tuple[list[Table], list[str]]:
    del pages
    cache = {None: "as it is", True: "on", False: "off"}
    levels = Table(
        "Levels",
        ("prefix cache", "examples", "repeats", "prompt tokens", "hardware per request [95 %]", "$ per 1,000 requests", "J per request", "TTFT p50", "found in the cache"),
        [
            [
                cache[one.prefix_cache],
                f"{one.examples:,}",
                f"{one.repeats}",
                number(one.prompt_tokens),
                spread(one.seconds, seconds),
                band(times(one.usd_per_request, 1000), money) if one.usd_per_request else DASH,
                _joules(one, one.j_per_request),
                seconds(one.ttft_p50_s),
                percent(one.prefix_hit_fraction),
            ]
            for one in found.levels
        ],
        f"{found.copies:,} copies at once. Hardware per request: time of all of it for one. Found in the cache: prompt tokens, over those looked up. {BASIS[found.basis]}",
    )
    slopes = Table(
        "What a further example costs",
        ("prefix cache", "hardware [95 %]", "of a request without examples", "$ per 1,000 requests", "a line?"),
        [
            [
                cache[one.prefix_cache],
                spread(one.seconds, seconds),
                spread(one.of_a_request, percent),
                spread(scaled(one.usd, 1000), money) if one.usd else DASH,
                f"{'yes' if one.straight else 'no'} (p = {number(one.misfit_p)})",
            ]
            for one in found.slopes
        ],
        "The slope of a line through the levels, weighted by their errors. A line?: how often chance alone strays as far from one.",
    )
    return [levels, slopes], []


SECTIONS: dict[type, Callable[[Any, int], tuple[list[Table], list[str]]]] = {
    FrontierFinding: _frontier,
    ScalingFinding: _scaling,
    BestOfNFinding: _best_of_n,
    KShotFinding: _k_shot,
}
