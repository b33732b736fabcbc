"""The plots of a run, one function each: what is on the axes, what the line may be drawn through, and what a reader should take from it.

Only valid stages are joined by a line. A void stage stays visible, as a hollow marker off the line; a withheld latency is not
plotted and the caption says so. A figure without data says why instead of showing empty axes. Colours carry the load: cool for few
copies, warm for many, the same in every figure. Ink, grid and background are the page's business, which knows light from dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kilocopy.report import RATIOS, number
from kilocopy.summary import Band, Stage, Summary

BLUE, ORANGE, RED, GREY = "#3f7fd0", "#dd7a2f", "#d0473d", "#8b919c"
LOADS = ((63, 120, 205), (38, 157, 178), (72, 162, 98), (201, 160, 38), (222, 118, 46), (204, 70, 66))
_TICKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


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
        throughput(summary),
        page_cost(summary),
        time_to_first_token(summary),
        inter_chunk_latency(summary),
        timeline(summary),
        overhang(summary),
    ]


def slo_limits(summary: Summary) -> dict[str, Any]:
    """The SLO as the manifest has it: beside the spec or in it. Empty where the manifest says nothing."""
    spec = summary.run.get("spec")
    found = summary.run.get("slo") or (spec.get("slo") if isinstance(spec, dict) else None)
    return found if isinstance(found, dict) else {}


def throughput(summary: Summary) -> Figure:
    """Copies against tokens/s: in all (left, log-log, with perfect scaling dotted) and of one copy (right, with the SLO)."""
    head = "Copies against speed"
    stages = [stage for stage in summary.stages if stage.throughput]
    if not stages:
        return Figure("plot-throughput", head, "", missing="No stage has a window, so there is no throughput to plot.")
    plot = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    valid, void = _split(stages)
    for group, style in ((valid, _solid(BLUE)), (void, _hollow())):
        if group:
            plot.add_trace(go.Scatter(x=_asked(group), y=[_total(s) for s in group], error_y=_interval_bars(group), **style), 1, 1)
            per_copy = [s.throughput.output_tokens_per_s_per_copy if s.throughput else None for s in group]
            plot.add_trace(go.Scatter(x=_asked(group), y=per_copy, **{**style, "showlegend": False}), 1, 2)
    if valid:
        plot.add_trace(_perfect(valid[0], max(_asked(stages))), 1, 1)
    speed = slo_limits(summary).get("tokens_per_s_per_copy")
    if speed:
        plot.add_hline(y=speed, line={"color": RED, "dash": "dash", "width": 1.5}, row=1, col=2)
        plot.add_annotation(
            text=f"SLO: {number(speed)} tokens/s per copy", x=0, xref="x2 domain", xanchor="left", y=speed, yref="y2", yanchor="bottom",
            showarrow=False, font={"color": RED},
        )  # fmt: skip
    plot.update_xaxes(**_copies_axis(stages))
    plot.update_yaxes(title="output tokens/s, all copies", type="log", dtick="D2", row=1, col=1)
    plot.update_yaxes(title="output tokens/s, one copy", rangemode="tozero", row=1, col=2)
    caption = "Left: all copies together, bars are 95 % intervals; the dotted line is the first valid stage times the copies. Right: what one copy gets."
    return Figure("plot-throughput", head, caption + _void_note(void), _dressed(plot))


def page_cost(summary: Summary) -> Figure:
    """Copies against the cost of a page, log-log, with the band over the assumed inputs: batching's amortisation."""
    head = "Copies against the cost of a page"
    stages = [stage for stage in summary.stages if _usd(stage)]
    if not stages:
        return Figure("plot-cost", head, "", missing="No stage has a price per page.")
    valid, void = _split(stages)
    per, unit = (1000, "$ per 1,000 pages") if min(_mid(stage) for stage in stages) < 0.01 else (1, "$ per page")
    plot = go.Figure()
    if any(_low_high(stage) for stage in valid):
        edges = [(stage.copies.asked, *(_low_high(stage) or (_mid(stage), _mid(stage)))) for stage in valid]
        plot.add_trace(
            go.Scatter(
                x=[e[0] for e in edges] + [e[0] for e in reversed(edges)], y=[e[1] * per for e in edges] + [e[2] * per for e in reversed(edges)],
                fill="toself", fillcolor="rgba(63,127,208,0.18)", line={"width": 0}, mode="lines", hoverinfo="skip", name="low to high of the assumed prices",
            )
        )  # fmt: skip
    for group, style in ((valid, _solid(BLUE)), (void, _hollow())):
        if group:
            plot.add_trace(go.Scatter(x=_asked(group), y=[_mid(stage) * per for stage in group], **style))
    plot.update_xaxes(**_copies_axis(stages))
    plot.update_yaxes(title=unit, type="log", dtick="D2", tickprefix="$")
    caption = "What more copies on the same hardware do to the price of a page. The band is over the assumed prices, not over measurement error."
    return Figure("plot-cost", head, caption + _void_note(void), _dressed(plot))


def time_to_first_token(summary: Summary) -> Figure:
    """The share of requests whose first token had come by a time, a curve per stage."""
    return _distribution(
        summary, "ttft_values_s", "plot-ttft", "Time to first token", "time to first token (ms)", limit_s=slo_limits(summary).get("ttft_s")
    )


def inter_chunk_latency(summary: Summary) -> Figure:
    """The share of gaps between chunks that were shorter than a time, a curve per stage."""
    return _distribution(summary, "icl_values_s", "plot-icl", "Inter-chunk latency", "gap between two chunks of a stream (ms)")


def _distribution(summary: Summary, field: str, name: str, head: str, axis: str, limit_s: float | None = None) -> Figure:
    """Cumulative distributions of raw values, times on a log axis, with p50 and p99 as lines to read off."""
    hidden = [stage.copies.asked for stage in summary.stages if stage.verdict.level == "latency_withheld"]
    note = f" Withheld at {_listed(hidden)} copies: see the verdict." if hidden else ""
    stages = [stage for stage in summary.stages if any(value > 0 for value in getattr(stage, field))]
    if not stages:
        return Figure(name, head, "", missing=f"No latency was kept for a plot.{note}")
    plot = go.Figure()
    for stage in stages:
        values = sorted(value for value in getattr(stage, field) if value > 0)
        plot.add_trace(
            go.Scatter(
                x=[float(f"{value * 1e3:.4g}") for value in values], y=[float(f"{(i + 1) / len(values) * 100:.4g}") for i in range(len(values))],
                mode="lines", line={"color": load_colour(summary, stage), "width": 2, "shape": "hv", "dash": "dot" if _is_void(stage) else "solid"},
                name=f"{_copies_label(stage)}{' (void)' if _is_void(stage) else ''}",
                hovertemplate="%{y:.3g} % under %{x:.3g} ms<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
    for share in (50, 99):
        plot.add_hline(y=share, line={"color": GREY, "dash": "dot", "width": 1})
        plot.add_annotation(text=f"p{share}", x=1, xref="paper", xanchor="left", y=share, showarrow=False, font={"color": GREY, "size": 11})
    if limit_s:
        plot.add_vline(x=limit_s * 1e3, line={"color": RED, "dash": "dash", "width": 1.5})
        plot.add_annotation(
            text="SLO", x=math.log10(limit_s * 1e3), xanchor="right", y=0, yanchor="bottom", showarrow=False, font={"color": RED},
        )  # fmt: skip
    plot.update_xaxes(title=axis, type="log", dtick="D2")
    plot.update_yaxes(title="share of values (%)", range=[0, 102])
    return Figure(name, head, f"Share of values at or under a time, log scale; right of the p99 crossing is the tail.{note}", _dressed(plot))


def timeline(summary: Summary) -> Figure:
    """The whole run by the second: tokens/s above, copies below, the stages' windows shaded."""
    head = "The run, second by second"
    bins = summary.timeline
    if not bins:
        return Figure("plot-timeline", head, "", missing="No second of this run was recorded.")
    plot = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.55, 0.45])
    times = [one.t_s for one in bins]

    def add(row: int, values: Sequence[float | None], label: str, colour: str, dash: str = "solid") -> None:
        if any(value is not None for value in values):
            line = {"color": colour, "width": 1.5, "dash": dash}
            plot.add_trace(go.Scatter(x=times, y=[_short(v) for v in values], mode="lines", line=line, name=label, connectgaps=False), row, 1)

    add(1, [one.output_tokens_per_s for one in bins], "output tokens/s", BLUE)
    add(2, [one.in_flight for one in bins], "in flight (driver)", ORANGE)
    add(2, [one.server_running for one in bins], "running (servers)", GREY, "dot")
    add(2, [one.server_waiting for one in bins], "waiting (servers)", RED, "dot")
    failed = [one for one in bins if one.errors]
    if failed:
        plot.add_trace(
            go.Scatter(
                x=[one.t_s for one in failed], y=[0] * len(failed), mode="markers", marker={"color": RED, "symbol": "x", "size": 7}, name="seconds with errors",
                customdata=[one.errors for one in failed], hovertemplate="%{customdata} errors<extra></extra>",
            ), 2, 1,
        )  # fmt: skip
    for stage in summary.stages:
        _shade(plot, summary, stage)
    plot.update_xaxes(title="seconds since the run's first event", row=2, col=1)
    plot.update_yaxes(title="output tokens/s", rangemode="tozero", row=1, col=1)
    plot.update_yaxes(title="copies", rangemode="tozero", row=2, col=1)
    return Figure("plot-timeline", head, "Shaded: the windows that count. Ramps, drains and the time between stages are outside them.", _dressed(plot))


def _shade(plot: go.Figure, summary: Summary, stage: Stage) -> None:
    """One stage's window as a band over both panels, with its copies on top."""
    if stage.window is None:
        return
    void = _is_void(stage)
    plot.add_shape(
        type="rect", x0=stage.window.start_s, x1=stage.window.end_s, y0=0, y1=1, xref="x", yref="paper", layer="below",
        fillcolor=GREY if void else load_colour(summary, stage), opacity=0.16, line={"width": 0},
    )  # fmt: skip
    plot.add_annotation(
        text=f"{_copies_label(stage)}{' (void)' if void else ''}", x=(stage.window.start_s + stage.window.end_s) / 2, xref="x", y=1, yref="paper",
        yanchor="bottom", showarrow=False, font={"size": 11},
    )  # fmt: skip


def overhang(summary: Summary) -> Figure:
    """Training over running, a bar per ratio from one page upwards, log scale."""
    head = "The overhang"
    told = summary.overhang
    ratios = [ratio for ratio in told.ratios if ratio.ratio_pages] if told else []
    if told is None or not ratios:
        return Figure("plot-overhang", head, "", missing="The run states no training cost, so there is nothing to set against the running.")
    plot, bands = go.Figure(), [ratio.ratio_pages or Band(mid=1) for ratio in ratios]
    plot.add_trace(
        go.Bar(
            x=[one.mid for one in bands], y=[RATIOS[ratio.name] for ratio in ratios], orientation="h", marker={"color": BLUE}, width=0.55,
            error_x={
                "type": "data", "symmetric": False, "color": GREY, "thickness": 1.5,
                "array": [(one.high or one.mid) - one.mid for one in bands], "arrayminus": [one.mid - (one.low or one.mid) for one in bands],
            },
            hovertemplate="%{y}: %{x:.3g}<extra></extra>", showlegend=False,
        )
    )  # fmt: skip
    top = max(one.high or one.mid for one in bands)
    for ratio, one in zip(ratios, bands, strict=True):
        plot.add_annotation(
            text=f"<b>{number(one.mid)}</b>", x=math.log10(one.high or one.mid), y=RATIOS[ratio.name], xanchor="left", xshift=8, showarrow=False
        )
    plot.update_xaxes(title=html.escape(told.ratio_unit), type="log", range=[0, math.log10(max(top, 10)) * 1.2], exponentformat="power", dtick=1)
    plot.update_yaxes(autorange="reversed")
    caption = "How many pages it takes to have spent on running what the training took. A bar starts at one page; every gridline is ten times the last."
    return Figure("plot-overhang", head, caption, _dressed(plot))


def load_colour(summary: Summary, stage: Stage) -> str:
    """The stage's colour: from cool to warm with the copies asked for."""
    loads = sorted({one.copies.asked for one in summary.stages})
    place = loads.index(stage.copies.asked) / max(1, len(loads) - 1) * (len(LOADS) - 1)
    left = min(int(place), len(LOADS) - 2)
    mixed = (round(a + (b - a) * (place - left)) for a, b in zip(LOADS[left], LOADS[left + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _is_void(stage: Stage) -> bool:
    return stage.verdict.level == "void"


def _split(stages: list[Stage]) -> tuple[list[Stage], list[Stage]]:
    """Stages by copies: those a line may be drawn through, and the void ones."""
    ordered = sorted(stages, key=lambda stage: (stage.copies.asked, stage.index))
    return [stage for stage in ordered if not _is_void(stage)], [stage for stage in ordered if _is_void(stage)]


def _asked(stages: list[Stage]) -> list[int]:
    return [stage.copies.asked for stage in stages]


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


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _copies_label(stage: Stage) -> str:
    return f"{stage.copies.asked:,} cop{'y' if stage.copies.asked == 1 else 'ies'}"


def _listed(values: list[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _void_note(void: list[Stage]) -> str:
    return " Hollow: void, shown but not believed." if void else ""


def _solid(colour: str) -> dict[str, Any]:
    """A line through valid stages."""
    return {"mode": "lines+markers", "line": {"color": colour, "width": 2}, "marker": {"color": colour, "size": 8}, "name": "measured"}


def _hollow() -> dict[str, Any]:
    """Void stages: markers only, not filled."""
    return {"mode": "markers", "marker": {"color": GREY, "size": 10, "symbol": "circle-open", "line": {"width": 2}}, "name": "void"}


def _interval_bars(stages: list[Stage]) -> dict[str, Any]:
    """95 % intervals of the tokens/s as error bars."""
    values = [stage.throughput.output_tokens_per_s for stage in stages if stage.throughput]
    return {
        "type": "data", "symmetric": False, "thickness": 1.5,
        "array": [(one.high or one.value) - one.value for one in values], "arrayminus": [one.value - (one.low or one.value) for one in values],
    }  # fmt: skip


def _perfect(first: Stage, most: int) -> go.Scatter:
    """Perfect scaling from the first valid stage."""
    per_copy = _total(first) / first.copies.asked
    ends = [first.copies.asked, max(most, first.copies.asked)]
    line = {"color": GREY, "dash": "dot", "width": 1.5}
    return go.Scatter(x=ends, y=[per_copy * copies for copies in ends], mode="lines", line=line, name="perfect scaling", hoverinfo="skip")


def _copies_axis(stages: list[Stage]) -> dict[str, Any]:
    """Copies asked for, log scale, ticks at the loads that were run."""
    loads = sorted(set(_asked(stages)))
    pad = max(0.08, 0.04 * math.log10(loads[-1] / loads[0]))
    return {
        "title": "copies asked for", "type": "log", "tickvals": loads, "ticktext": [f"{load:,}" for load in loads],
        "range": [math.log10(loads[0]) - pad, math.log10(loads[-1]) + pad],
    }  # fmt: skip


def _dressed(plot: go.Figure) -> go.Figure:
    """What all figures share: no background of their own, a legend above, room for titles."""
    plot.update_layout(
        template=None, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", margin={"l": 64, "r": 28, "t": 44, "b": 52},
        font={"family": "system-ui, sans-serif", "size": 12}, hovermode="closest", dragmode=False,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
    )  # fmt: skip
    plot.update_xaxes(zeroline=False, ticks="outside", ticklen=4, automargin=True)
    plot.update_yaxes(zeroline=False, automargin=True)
    return plot
