"""The plots of a run, one function each: what is on the axes, what a line may be drawn through, how to read it.

Void stages are off the lines: they stay visible, as hollow markers. A withheld latency is not plotted and the caption
says so. A figure without data says why instead of showing empty axes. Colours carry the load: cool for few copies, warm
for many, the same in every figure. Ink, grid and background are the page's business, which knows light from dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kilocopy.report import RATIOS, asked, from_spec, load_label, money, number, pages_unit
from kilocopy.summary import Band, Bin, Outage, Search, SearchLevel, Stage, Summary

BLUE, ORANGE, RED, GREY = "#3f7fd0", "#dd7a2f", "#d0473d", "#8b919c"
LOADS = ((63, 120, 205), (38, 157, 178), (72, 162, 98), (201, 160, 38), (222, 118, 46), (204, 70, 66))
_COURSES: tuple[tuple[int, str, str, dict[str, Any]], ...] = (  # panel, field of a Bin, name, line
    (1, "output_tokens_per_s", "output tokens/s", {"color": BLUE}),
    (2, "in_flight", "in flight (driver)", {"color": ORANGE}),
    (2, "server_running", "running (servers)", {"color": GREY, "dash": "dot"}),
    (2, "server_waiting", "waiting (servers)", {"color": RED, "dash": "dot"}),
)


CHANGING = {"ramp", "steps", "trace"}  # their means are of many loads: no point on an axis of load
TICKS_MIN, TICKS_MAX = 3, 9  # that a log axis names among its values, where they lie close together
CURVES_NAMED = 8  # more names than that would take the place of the plot
SAID = {"held": "#3d9a5f", "missed": RED, "unclear": ORANGE, "unsound": GREY}


@dataclass(frozen=True)
class Figure:
    """A plot with its name, what to read from it, and, where there is nothing to plot, why."""

    id: str
    title: str
    caption: str
    plot: go.Figure | None = None
    missing: str = ""


def figures(summary: Summary) -> list[Figure]:
    """All figures of the page, in its order."""
    return [
        *([throughput(summary), page_cost(summary)] if one_hardware(summary) else []),
        *(search_figure(summary, search) for search in summary.searches),
        time_to_first_token(summary),
        inter_chunk_latency(summary),
        timeline(summary),
        overhang(summary),
        *([lifetime(summary)] if summary.corpus is not None else []),
    ]


def one_hardware(summary: Summary) -> bool:
    """Whether all stages differ in their load alone: levels of other experiments than a frontier do not, and no line of copies goes through them."""
    return summary.experiment is None or summary.experiment.kind == "frontier"


def throughput(summary: Summary) -> Figure:
    """Copies against tokens/s: in all (left, log-log, with perfect scaling dotted) and of one copy (right, with the SLO)."""
    head = "Copies against speed"
    stages = [stage for stage in summary.stages if stage.throughput and stage.kind not in CHANGING]
    if not stages:
        return Figure("plot-throughput", head, "", missing="No stage has a steady load and a window, so there is no throughput to plot.")
    plot = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    valid, timed, void = _split(stages)
    for group, style in ((valid, _solid(BLUE)), (timed, _diamonds()), (void, _hollow())):
        if group:
            plot.add_trace(
                go.Scatter(x=_asked(group), y=[_total(s) for s in group], error_y=_interval_bars(group, style["marker"]["color"]), **style),
                1,
                1,
            )
            per_copy = [s.throughput.output_tokens_per_s_per_copy if s.throughput else None for s in group]
            plot.add_trace(go.Scatter(x=_asked(group), y=per_copy, **{**style, "showlegend": False}), 1, 2)
    if valid or timed:
        plot.add_trace(_perfect((valid or timed)[0], max(_asked(stages))), 1, 1)
    speed = from_spec(summary, "slo").get("tokens_per_s_per_copy")
    if speed:
        plot.add_hline(y=speed, line={"color": RED, "dash": "dash", "width": 1.5}, row=1, col=2)
        plot.add_annotation(
            text=f"SLO: {speed:g} tokens/s",
            x=0,
            xref="x2 domain",
            xanchor="left",
            y=speed,
            yref="y2",
            yanchor="bottom",
            showarrow=False,
            font={"color": RED},
        )
    plot.update_xaxes(**_copies_axis(stages))
    every = [_total(stage) for stage in stages]
    plot.update_yaxes(title="output tokens/s, all copies", **log_ticks(every), row=1, col=1)
    plot.update_yaxes(title="output tokens/s, one copy", rangemode="tozero", row=1, col=2)
    caption = "Left: all copies together, with 95 % intervals; dotted: the first valid stage, scaled perfectly. Right: one copy."
    return Figure("plot-throughput", head, caption + _void_note(void), dressed(plot))


def search_figure(summary: Summary, search: Search) -> Figure:
    """The share of the streams that held the SLO at each load that was tried, with Wilson's interval, against the SLO's quantile."""
    name, unit = f"plot-search-{search.stage}", "copies" if search.over == "copies" else "requests/s"
    head = f"The search for the most {unit} within the SLO"
    shown = [one for one in search.levels if one.attainment is not None]
    if not shown:
        return Figure(name, head, "", missing="No level could be judged by the SLO.")
    plot = go.Figure()
    for verdict, colour in SAID.items():
        mine = [one for one in shown if one.verdict == verdict]
        if mine:
            plot.add_trace(_attained(mine, verdict, colour))
    quantile = from_spec(summary, "slo").get("quantile")
    if quantile:
        plot.add_hline(y=100 * quantile, line={"color": RED, "dash": "dash", "width": 1.5})
    if search.answer is not None:
        plot.add_vline(x=search.answer, line={"color": SAID["held"], "dash": "dot", "width": 1.5})
    loads = [one.load for one in shown]
    plot.update_xaxes(title=unit, **load_axis(loads, loads))
    plot.update_yaxes(title="streams that held the SLO (%)", range=[-3, 103])
    caption = "Bars: 95 % by Wilson, of as many streams as count as independent. Dashed: the share that the SLO asks for. Dotted: the answer. A load tried twice counts together."
    return Figure(name, head, caption, dressed(plot))


def _attained(levels: list[SearchLevel], verdict: str, colour: str) -> go.Scatter:
    """The levels of one verdict: attainment with its interval."""
    shares = [100 * (one.attainment or 0) for one in levels]
    bars = {
        "type": "data",
        "symmetric": False,
        "thickness": 1.5,
        "color": colour,
        "array": [100 * (one.wilson_high or 0) - share for one, share in zip(levels, shares, strict=True)],
        "arrayminus": [share - 100 * (one.wilson_low or 0) for one, share in zip(levels, shares, strict=True)],
    }
    return go.Scatter(
        x=[one.load for one in levels],
        y=shares,
        error_y=bars,
        mode="markers",
        marker={"color": colour, "size": 9, "symbol": "circle-open" if verdict == "unsound" else "circle"},
        name=verdict,
        customdata=[[one.level + 1, one.judged] for one in levels],
        hovertemplate="level %{customdata[0]}: %{y:.1f} % of %{customdata[1]} streams at %{x}<extra>%{fullData.name}</extra>",
    )


def page_cost(summary: Summary) -> Figure:
    """Copies against the cost of a page, log-log, with the band over the assumed inputs: batching's amortisation."""
    head = "Copies against the cost of a page"
    stages = [stage for stage in summary.stages if _usd(stage) and stage.kind not in CHANGING]
    if not stages:
        return Figure("plot-cost", head, "", missing="No stage has a price per page.")
    valid, timed, void = _split(stages)
    per = pages_unit(summary)
    unit = "$ per page" if per == 1 else f"$ per {per:,} pages"
    plot = go.Figure()
    if any(_low_high(stage) for stage in valid):
        edges = [(load_of(stage), *(_low_high(stage) or (_mid(stage), _mid(stage)))) for stage in valid]
        plot.add_trace(
            go.Scatter(
                x=[e[0] for e in edges] + [e[0] for e in reversed(edges)],
                y=[e[1] * per for e in edges] + [e[2] * per for e in reversed(edges)],
                fill="toself",
                fillcolor="rgba(63,127,208,0.18)",
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                name="price band",
            )
        )
    for group, style in ((valid, _solid(BLUE)), (timed, _diamonds()), (void, _hollow())):
        if group:
            plot.add_trace(go.Scatter(x=_asked(group), y=[_mid(stage) * per for stage in group], **style))
    plot.update_xaxes(**_copies_axis(stages))
    edge_values = [end * per for stage in stages for end in (_low_high(stage) or (_mid(stage),))]
    plot.update_yaxes(title=unit, **log_ticks(edge_values, money))
    caption = "The same hardware, shared by more copies. The band is over the assumed prices, not measurement error."
    return Figure("plot-cost", head, caption + _void_note(void), dressed(plot))


def time_to_first_token(summary: Summary) -> Figure:
    """How long the first token took, from the median to the tail, a curve per stage."""
    return _distribution(
        summary,
        field="ttft_values_s",
        name="plot-ttft",
        head="Time to first token",
        axis="time to first token (ms)",
        limit_s=from_spec(summary, "slo").get("ttft_s"),
    )


def inter_chunk_latency(summary: Summary) -> Figure:
    """How long the gaps between chunks were, from the median to the tail, a curve per stage."""
    return _distribution(
        summary,
        field="icl_values_s",
        name="plot-icl",
        head="Inter-chunk latency",
        axis="gap between two chunks of a stream (ms)",
    )


def _distribution(summary: Summary, *, field: str, name: str, head: str, axis: str, limit_s: float | None = None) -> Figure:
    """Percentiles of raw values on an axis that stretches towards the tail, times on a log axis."""
    hidden = [asked(stage) for stage in summary.stages if stage.verdict.level == "latency_withheld"]
    note = f" Withheld at {', '.join(hidden)}{'' if any('/s' in one for one in hidden) else ' copies'}: see the verdict." if hidden else ""
    stages = [stage for stage in summary.stages if any(value > 0 for value in getattr(stage, field))]
    if not stages:
        return Figure(name, head, "", missing=f"No latency was kept for a plot.{note}")
    plot = go.Figure()
    for stage in stages:
        plot.add_trace(_percentile_curve(summary, stage, [value * 1e3 for value in getattr(stage, field) if value > 0]))
    if limit_s:
        plot.add_vline(x=limit_s * 1e3, line={"color": RED, "dash": "dash", "width": 1.5})
        plot.add_annotation(
            text=f"SLO {limit_s:g} s",
            x=math.log10(limit_s * 1e3),
            y=1,
            yref="paper",
            xanchor="right",
            yanchor="top",
            showarrow=False,
            font={"color": RED},
        )
    most = max(len(getattr(stage, field)) for stage in stages)
    spread = [value * 1e3 for stage in stages for value in getattr(stage, field) if value > 0]
    plot.update_xaxes(title=axis, **log_ticks(spread))
    plot.update_yaxes(title="percentile (%)", range=[0, math.log10(2 * most) * 1.02], **_percentile_ticks(most))
    caption = "How many of the values are at or under a time; the axis stretches towards the tail, as HdrHistogram's does."
    if len(stages) > CURVES_NAMED:
        plot.update_layout(showlegend=False)
        caption += " Cool colours: few copies; warm: many; a curve says which when pointed at."
    return Figure(name, head, caption + note, dressed(plot))


def _percentile_curve(summary: Summary, stage: Stage, values: list[float]) -> go.Scatter:
    """A stage's values against their percentile, p plotted at -log10(1 - p)."""
    count, void = len(values), _is_void(stage)
    shares = [(i + 0.5) / count for i in range(count)]
    return go.Scatter(
        x=[float(f"{value:.4g}") for value in sorted(values)],
        y=[float(f"{-math.log10(1 - share):.4g}") for share in shares],
        customdata=[float(f"{share * 100:.4g}") for share in shares],
        mode="lines",
        line={"color": load_colour(summary, stage), "width": 2, "dash": "dot" if void else "solid"},
        name=f"{load_label(stage)}{' (void)' if void else ''}",
        hovertemplate="%{customdata} % within %{x:.3g} ms<extra>%{fullData.name}</extra>",
    )


def _percentile_ticks(most: int) -> dict[str, Any]:
    """Ticks of the percentile axis as far as so many values reach."""
    shares = [share for share in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999) if share < 1 - 0.5 / most]
    return {
        "tickvals": [-math.log10(1 - share) for share in shares],
        "ticktext": [f"{share * 100:g}" for share in shares],
    }


def timeline(summary: Summary) -> Figure:
    """The whole run by the second: tokens/s above, copies below, the stages' windows shaded."""
    head = "The run, second by second"
    bins = summary.timeline
    if not bins:
        return Figure("plot-timeline", head, "", missing="No second of this run was recorded.")
    plot = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.55, 0.45])
    for row, name, label, line in _COURSES:
        values = [getattr(one, name) for one in bins]
        if any(value is not None for value in values):
            plot.add_trace(_course([one.t_s for one in bins], values, label, line), row, 1)
    if any(one.broken_tokens_per_s for one in bins):
        arrived: list[float | None] = [one.output_tokens_per_s + one.broken_tokens_per_s for one in bins]
        plot.add_trace(_course([one.t_s for one in bins], arrived, "with streams that broke later", {"color": RED, "width": 1, "dash": "dot"}), 1, 1)
    failed = [one for one in bins if one.errors]
    if failed:
        plot.add_trace(_failures(failed), 2, 1)
    for stage in summary.stages:
        _shade(plot, summary, stage)
    for outage in summary.outages:
        _lost(plot, outage)
    plot.update_xaxes(title="seconds since the run's first event", row=2, col=1)
    plot.update_yaxes(title="output tokens/s", rangemode="tozero", row=1, col=1)
    plot.update_yaxes(title="copies", rangemode="tozero", row=2, col=1)
    return Figure(
        "plot-timeline",
        head,
        "Shaded: the windows that count. Ramps, drains and the time between stages are outside them."
        + (" Dashed: a replica or a node was lost; dotted: the rate was back at 90 %." if summary.outages else ""),
        dressed(plot, top=64),
    )


def _course(times_s: list[float], values: list[float | None], label: str, line: dict[str, Any]) -> go.Scatter:
    """One quantity over the run; a second without a value is a gap."""
    rounded = [None if value is None else float(f"{value:.5g}") for value in values]
    return go.Scatter(x=times_s, y=rounded, mode="lines", line={"width": 1.5, **line}, name=label, connectgaps=False)


def _failures(bins: list[Bin]) -> go.Scatter:
    """The seconds in which requests failed, as crosses on the axis."""
    return go.Scatter(
        x=[one.t_s for one in bins],
        y=[0] * len(bins),
        mode="markers",
        marker={"color": RED, "symbol": "x", "size": 8},
        name="seconds with errors",
        customdata=[one.errors for one in bins],
        hovertemplate="%{customdata} errors<extra></extra>",
        cliponaxis=False,
    )


def _lost(plot: go.Figure, outage: Outage) -> None:
    """Where a replica or a node died, and how long until the rate was back."""
    line = {"color": RED, "width": 1.5, "dash": "dash"}
    plot.add_shape(type="line", x0=outage.at_s, x1=outage.at_s, y0=0, y1=1, xref="x", yref="paper", line=line)
    if outage.recovered_after_s is not None:
        back_s = outage.at_s + outage.recovered_after_s
        plot.add_shape(type="line", x0=back_s, x1=back_s, y0=0, y1=1, xref="x", yref="paper", line=line | {"dash": "dot"})
    plot.add_annotation(text="lost", x=outage.at_s, xref="x", y=0.98, yref="paper", xanchor="left", yanchor="top", showarrow=False, font={"size": 11, "color": RED})


def _shade(plot: go.Figure, summary: Summary, stage: Stage) -> None:
    """One stage's window as a band over both panels, with its copies on top."""
    if stage.window is None:
        return
    void = _is_void(stage)
    label = load_label(stage) if len(summary.stages) <= 4 else asked(stage)
    plot.add_shape(
        type="rect",
        x0=stage.window.start_s,
        x1=stage.window.end_s,
        y0=0,
        y1=1,
        xref="x",
        yref="paper",
        layer="below",
        fillcolor=GREY if void else load_colour(summary, stage),
        opacity=0.16,
        line={"width": 0},
    )
    plot.add_annotation(
        text=f"{label}{' (void)' if void and len(summary.stages) <= 8 else ''}",
        x=(stage.window.start_s + stage.window.end_s) / 2,
        xref="x",
        y=1,
        yref="paper",
        yanchor="bottom",
        showarrow=False,
        font={"size": 11},
    )


def overhang(summary: Summary) -> Figure:
    """Training over running, a bar per ratio from one page upwards, log scale; a ratio without a figure has no bar."""
    head = "Pages whose running takes what the training took"
    told = summary.overhang
    bands = {RATIOS[ratio.name]: ratio.ratio_pages for ratio in told.ratios} if told else {}
    known = {name: one for name, one in bands.items() if one}
    if told is None or not known:
        why = "No ratio: the run states no training cost, or no stage that counts has a price."
        return Figure("plot-overhang", head, "", missing=why)
    plot = go.Figure(_ratio_bars(known))
    for name, one in bands.items():
        plot.add_annotation(
            text=f"<b>{number(one.mid)}</b>" if one else "–, see the table",
            x=math.log10(one.high or one.mid) if one else 0,
            y=name,
            xanchor="left",
            xshift=8,
            showarrow=False,
        )
    top = max(one.high or one.mid for one in known.values())
    powers = range(0, math.ceil(math.log10(max(top, 10)) * 1.15) + 1)
    plot.update_xaxes(
        title=f"{html.escape(told.ratio_unit)}, log scale",
        type="log",
        range=[0, powers[-1]],
        tickvals=[10.0**power for power in powers],
        ticktext=[_power(power) for power in powers],
    )
    plot.update_yaxes(showgrid=False, categoryorder="array", categoryarray=list(bands)[::-1], range=[-0.5, len(bands) - 0.5])
    caption = "Bars start at one page; each gridline is ten times the last. Whiskers are over the assumed inputs."
    return Figure("plot-overhang", head, caption, dressed(plot, top=12))


def lifetime(summary: Summary) -> Figure:
    """What a page costs over the model's life against how many it writes, log-log, with the break-even."""
    name, head = "plot-lifetime", "What a page costs over the life of the model"
    told = summary.corpus
    if told is None or not told.lifetime or told.break_even_pages is None or told.running_usd_per_page is None or told.training_usd is None:
        return Figure(name, head, "", missing="No lifetime cost: the run states no training cost in money, or no stage that counts has a price.")
    pages = [one.pages for one in told.lifetime]
    costs = [one.usd_per_page for one in told.lifetime]
    plot = go.Figure()
    if any(one.low is not None for one in costs):
        ends = [one.low or one.mid for one in costs] + [one.high or one.mid for one in reversed(costs)]
        shade = {"fill": "toself", "fillcolor": "rgba(63,127,208,0.18)", "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip"}
        plot.add_trace(go.Scatter(x=pages + pages[::-1], y=ends, name="price band", **shade))
    plot.add_trace(go.Scatter(x=pages, y=[one.mid for one in costs], mode="lines", line={"color": BLUE, "width": 2}, name="training and running"))
    running = told.running_usd_per_page.mid
    plot.add_trace(go.Scatter(x=[pages[0], pages[-1]], y=[running] * 2, mode="lines", line={"color": GREY, "dash": "dash"}, name="running alone"))
    trained = [told.training_usd.mid / count for count in pages]
    plot.add_trace(go.Scatter(x=pages, y=trained, mode="lines", line={"color": GREY, "dash": "dot"}, name="training alone"))
    even = told.break_even_pages.mid
    plot.add_vline(x=even, line={"color": RED, "dash": "dash", "width": 1.5})
    plot.add_annotation(text=f"break-even: {number(even)} pages", x=math.log10(even), y=1, yref="paper", xanchor="left", xshift=6, yanchor="top", showarrow=False, font={"color": RED})
    plot.update_xaxes(title="pages written over the model's life", **log_ticks(pages))
    plot.update_yaxes(title="$ per page", **log_ticks([costs[0].mid, running / 2], money), range=[math.log10(running / 5), math.log10(costs[0].high or costs[0].mid)])
    return Figure(name, head, "Training $ over the pages, and running $ for each. Dashed red: both have cost the same. The band is over the stated prices.", dressed(plot))


def _ratio_bars(known: dict[str, Band]) -> go.Bar:
    """A bar per ratio, with its band as a whisker."""
    bands = list(known.values())
    whisker = {
        "type": "data",
        "symmetric": False,
        "color": GREY,
        "thickness": 1.5,
        "array": [None if one.high is None else one.high - one.mid for one in bands],
        "arrayminus": [None if one.low is None else one.mid - one.low for one in bands],
    }
    return go.Bar(
        x=[one.mid for one in bands],
        y=list(known),
        orientation="h",
        marker={"color": BLUE},
        width=0.55,
        error_x=whisker,
        hovertemplate="%{y}: %{x:.3g}<extra></extra>",
        showlegend=False,
    )


def load_colour(summary: Summary, stage: Stage) -> str:
    """The stage's colour: from cool to warm with the copies asked for."""
    loads = sorted({load_of(one) for one in summary.stages})
    place = loads.index(load_of(stage)) / max(1, len(loads) - 1) * (len(LOADS) - 1)
    left = min(int(place), len(LOADS) - 2)
    mixed = (round(a + (b - a) * (place - left)) for a, b in zip(LOADS[left], LOADS[left + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def load_of(stage: Stage) -> float:
    """Where a stage stands on the axis of copies: as many as were asked for, or in open loop as many as were in flight."""
    return stage.copies.asked if stage.copies.asked is not None else max(stage.copies.n_run_client or 0.0, 0.01)


def _is_void(stage: Stage) -> bool:
    return stage.verdict.level == "void"


def _split(stages: list[Stage]) -> tuple[list[Stage], list[Stage], list[Stage]]:
    """Stages by copies: those a line may be drawn through, those of an open loop (where arrivals decide the copies), the void ones."""
    ordered = sorted(stages, key=lambda stage: (load_of(stage), stage.index, stage.level))
    valid = [stage for stage in ordered if not _is_void(stage)]
    closed, timed = ([stage for stage in valid if (stage.kind == "closed") is kept] for kept in (True, False))
    return closed, timed, [stage for stage in ordered if _is_void(stage)]


def _asked(stages: list[Stage]) -> list[float]:
    return [load_of(stage) for stage in stages]


def _total(stage: Stage) -> float:
    return stage.throughput.output_tokens_per_s.value if stage.throughput else 0.0


def _usd(stage: Stage) -> Band | None:
    return stage.cost.usd_per_page if stage.cost else None


def _mid(stage: Stage) -> float:
    usd = _usd(stage)
    return usd.mid if usd else 0.0


def _low_high(stage: Stage) -> tuple[float, float] | None:
    usd = _usd(stage)
    return (usd.low, usd.high) if usd and usd.low is not None and usd.high is not None else None


def _void_note(void: list[Stage]) -> str:
    return " Hollow: void, shown but not believed." if void else ""


def _solid(colour: str) -> dict[str, Any]:
    """A line through valid stages."""
    return {
        "mode": "lines+markers",
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 8},
        "name": "measured",
    }


def _diamonds() -> dict[str, Any]:
    """Valid stages of an open loop: at the copies that were in flight."""
    return {"mode": "markers", "marker": {"color": ORANGE, "size": 9, "symbol": "diamond"}, "name": "open loop"}


def _hollow() -> dict[str, Any]:
    """Void stages: markers only, not filled."""
    return {
        "mode": "markers",
        "marker": {"color": GREY, "size": 10, "symbol": "circle-open", "line": {"width": 2}},
        "name": "void",
    }


def _interval_bars(stages: list[Stage], colour: str) -> dict[str, Any]:
    """95 % intervals of the tokens/s as error bars."""
    values = [stage.throughput.output_tokens_per_s for stage in stages if stage.throughput]
    return {
        "type": "data",
        "symmetric": False,
        "thickness": 1.5,
        "color": colour,
        "array": [(one.high or one.value) - one.value for one in values],
        "arrayminus": [one.value - (one.low or one.value) for one in values],
    }


def _perfect(first: Stage, most: float) -> go.Scatter:
    """Perfect scaling from the first valid stage."""
    per_copy = _total(first) / load_of(first)
    ends = [load_of(first), max(most, load_of(first))]
    line = {"color": GREY, "dash": "dot", "width": 1.5}
    return go.Scatter(
        x=ends,
        y=[per_copy * copies for copies in ends],
        mode="lines",
        line=line,
        name="perfect scaling",
        hoverinfo="skip",
    )


def _copies_axis(stages: list[Stage]) -> dict[str, Any]:
    """Copies, log scale; ticks at loads that were asked for, as far as there is room."""
    asked_for = [float(one.copies.asked) for one in stages if one.copies.asked is not None]
    timed = len(asked_for) < len(stages)
    title = "copies (in open loop: in flight, measured)" if timed else "copies asked for"
    return {"title": title, **load_axis(_asked(stages), asked_for)}


def load_axis(loads: list[float], ticks: list[float]) -> dict[str, Any]:
    """A log axis over these loads; ticks a quarter apart at least, at round numbers where fewer than two are left."""
    low, high = math.log10(min(loads)), math.log10(max(loads))
    pad = max(0.08, 0.04 * (high - low))
    kept: list[float] = []
    for tick in sorted(set(ticks)):
        if not kept or tick >= 1.25 * kept[-1]:
            kept.append(tick)
    labelled = {"type": "log", "tickvals": kept, "ticktext": [f"{tick:,.0f}" if tick % 1 == 0 else f"{tick:.3g}" for tick in kept]}
    return {**(labelled if len(kept) > 1 else log_ticks(loads)), "range": [low - pad, high + pad]}


def log_ticks(values: list[float], write: Callable[[float | None], str] = number) -> dict[str, Any]:
    """A log axis labelled at 1, 2 and 5 of each decade that the values touch; at 1 alone where they span many, and closer where fewer than three would lie among them."""
    known = [value for value in values if value > 0] or [1.0]
    first, last = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    steps = (1, 2, 5) if math.log10(max(known) / min(known)) < 3 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    if sum(min(known) <= tick <= max(known) for tick in ticks) < TICKS_MIN and len(steps) > 1 and len(set(known)) > 1:
        each = 10.0 ** math.floor(math.log10((max(known) - min(known)) / 2))
        each = max(each, 1.0) if all(value % 1 == 0 for value in known) else each  # there is no half a replica
        ticks = [place * each for place in range(math.floor(min(known) / each), math.ceil(max(known) / each) + 1) if place]
        ticks = ticks[:: math.ceil(len(ticks) / TICKS_MAX)]
    return {"type": "log", "tickvals": ticks, "ticktext": [_trimmed(write(tick)) for tick in ticks]}


def _power(power: int) -> str:
    """A power of ten in words: 1,000, 10 million, 1e+15."""
    for least, word in ((15, ""), (12, "trillion"), (9, "billion"), (6, "million")):
        if power >= least:
            return f"{10 ** (power - least)} {word}" if word else f"1e+{power}"
    return f"{10**power:,}"


def _trimmed(label: str) -> str:
    """A tick's label without digits that say nothing: 0.100 is 0.1."""
    figure, space, word = label.partition(" ")
    return figure.rstrip("0").rstrip(".") + space + word if "." in figure and "e" not in figure else label


def dressed(plot: go.Figure, top: int = 44) -> go.Figure:
    """What all figures share: no background of their own, a legend above, room for titles."""
    plot.update_layout(
        template=None,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 28, "t": top, "b": 52},
        font={"family": "system-ui, sans-serif", "size": 12},
        hovermode="closest",
        dragmode=False,
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02 if top < 60 else 1.08,
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
        },
    )
    plot.update_xaxes(zeroline=False, ticks="outside", ticklen=4, automargin=True)
    plot.update_yaxes(zeroline=False, automargin=True)
    return plot
