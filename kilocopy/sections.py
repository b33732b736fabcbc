"""An experiment's section of the report, as titled tables and sentences; the terminal and the page show the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kilocopy.report import BADGES, DASH, band, interval, money, number, percent, times
from kilocopy.summary import Estimate, FrontierFinding, ScalingFinding, Summary

TITLES = {
    "frontier": "Frontier: copies 1..N on this hardware",
    "scaling": "Replica scaling: replicas 1..R at the same load for each",
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
        ("from – to", "tokens/s each [95 %]", "of a copy's share", "the others lose", "Wh/page", "$/page"),
        [
            [
                f"{one.from_copies:,} – {one.to_copies:,}",
                spread(one.gain_tokens_per_s),
                percent(one.share_of_a_copy),
                f"{number(one.others_lose_tokens_per_s)} tokens/s",
                number(one.wh_per_page) if one.wh_per_page is not None else DASH,
                money(one.usd_per_page) if one.usd_per_page is not None else DASH,
            ]
            for one in found.marginals
        ],
        "For each further copy between two levels. Wh and $: of the pages that came with it; the hardware's hour costs the same with or without it. "
        "A dash: energy is not measured, or the rent is paid either way.",
    )
    speeds = Table(
        "Copies at a speed",
        ("tokens/s each", "N_SLO: held", "clearly held", "clearly missed", "curve crosses at [95 %]", "N_cluster"),
        [
            [
                f"{one.tokens_per_s:g}",
                _count(one.held),
                _count(one.clearly_held),
                _count(one.clearly_missed),
                spread(one.crossing, lambda value: DASH if value is None else f"{value:,.0f}"),
                number(one.n_cluster),
            ]
            for one in found.speeds
        ],
        f"N_SLO: the largest level at which {percent(found.quantile)} of the streams held the speed and the TTFT. Crossing: interpolated between levels.",
    )
    human = "; ".join(f"{number(count)} at {wpm} words/min" for wpm, count in sorted(found.n_human.items()))
    sentences = [found.knee.sentence, *(one.sentence for one in found.speeds)]
    return [levels, marginals, speeds], [*sentences, *([f"N_human, throughput equivalents at the fastest level: {human}."] if human else [])]


def _count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def _scaling(found: ScalingFinding, pages: int) -> tuple[list[Table], list[str]]:
    del pages
    levels = Table(
        "Levels",
        ("replicas", "servings", "tokens/s [95 %]", "of one replica's each [95 %]", "driver", "proxy", "queue", "engine", "busiest / mean"),
        [
            [
                f"{one.replicas:,}",
                f"{one.servings}",
                spread(one.output_tokens_per_s),
                spread(one.efficiency, percent),
                *(number(getattr(one.loss, part)) if one.loss else DASH for part in ("driver", "proxy", "queue", "engine", "imbalance")),
            ]
            for one in found.levels
        ],
        f"{found.copies_per_replica:,} copies for each replica; intervals between servings. Driver x proxy x queue x engine: tokens/s of a copy against one replica alone, "
        "split into copies kept in flight, of them at the engines, of them running, and the speed of a running sequence. Busiest / mean: running sequences, what the router did.",
    )
    sentences = []
    if found.fit is not None:
        law = {"usl": "Universal Scalability Law", "amdahl": "Amdahl's law (kappa = 0)", "linear": "linear"}[found.fit.law]
        fitted = f"Fitted: {law}; one replica {spread(found.fit.rate_of_one)} tokens/s"
        fitted += f", sigma {spread(found.fit.sigma)}" if found.fit.law != "linear" else ""
        fitted += f", kappa {spread(found.fit.kappa)}" if found.fit.law == "usl" else ""
        fitted += f"; lack of fit p = {found.fit.lack_of_fit_p:.2g}" if found.fit.lack_of_fit_p is not None else ""
        sentences.append(f"{fitted}. Intervals: 95 %, bootstrap over servings.")
    return [levels], [*sentences, *([found.sharing] if found.sharing else [])]


SECTIONS: dict[type, Callable[[Any, int], tuple[list[Table], list[str]]]] = {FrontierFinding: _frontier, ScalingFinding: _scaling}
