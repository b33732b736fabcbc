"""The plots of an experiment: what was measured as points with their intervals, what was fitted or interpolated as lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kilocopy.figures import BLUE, GREY, ORANGE, RED, Figure, dressed, load_axis, log_ticks
from kilocopy.k_shot import scaled
from kilocopy.summary import BestOfNFinding, Estimate, FrontierFinding, KShotFinding, ScalingFinding, Summary
from kilocopy.usl import throughput


def charts(summary: Summary) -> list[Figure]:
    """The experiment's figures; none for an ordinary run."""
    found = summary.experiment
    return [] if found is None else CHARTS[type(found)](found)


def points(x: list[float], y: list[Estimate], colour: str, name: str, *, line: bool = True, **more: Any) -> go.Scatter:
    """Values with their 95 % intervals as error bars."""
    bars = {
        "type": "data",
        "symmetric": False,
        "thickness": 1.5,
        "color": colour,
        "array": [(one.high if one.high is not None else one.value) - one.value for one in y],
        "arrayminus": [one.value - (one.low if one.low is not None else one.value) for one in y],
    }
    mode = "lines+markers" if line else "markers"
    return go.Scatter(
        x=x, y=[one.value for one in y], error_y=bars, mode=mode, line={"color": colour, "width": 2},
        marker={"color": colour, "size": 8}, name=name, **more,
    )  # fmt: skip


def _frontier(found: FrontierFinding) -> list[Figure]:
    head = "The frontier: throughput and its knee, what a further copy adds, the speed that copies hold"
    levels = [one for one in found.levels if one.output_tokens_per_s is not None]
    if not levels:
        return [Figure("plot-frontier", head, "", missing="No level of the frontier is valid.")]
    plot = make_subplots(rows=1, cols=3, horizontal_spacing=0.07)
    copies = [float(one.copies) for one in levels]
    totals = [one.output_tokens_per_s for one in levels if one.output_tokens_per_s is not None]
    plot.add_trace(points(copies, totals, BLUE, "tokens/s, all copies"), 1, 1)
    if found.knee.copies is not None:
        _knee(plot, found)
    if found.marginals:
        middles = [(one.from_copies * one.to_copies) ** 0.5 for one in found.marginals]
        plot.add_trace(points(middles, [one.gain_tokens_per_s for one in found.marginals], ORANGE, "tokens/s that a further copy adds"), 1, 2)
    _speeds(plot, found)
    for column in (1, 2, 3):
        plot.update_xaxes(title="copies", **load_axis(copies, copies), row=1, col=column)
    plot.update_yaxes(title="output tokens/s, all copies", rangemode="tozero", row=1, col=1)
    plot.update_yaxes(title="tokens/s for each further copy", rangemode="tozero", row=1, col=2)
    caption = (
        "Left: 95 % by batch means; shaded: the knee with its interval. Middle: between neighbouring levels. "
        f"Right: what {100 * found.quantile:g} % of the streams held at least; dashed: the speeds asked for."
    )
    return [Figure("plot-frontier", head, caption, dressed(plot))]


def _knee(plot: go.Figure, found: FrontierFinding) -> None:
    knee = found.knee
    if knee.low is not None and knee.high is not None:
        plot.add_vrect(x0=knee.low, x1=knee.high, fillcolor=GREY, opacity=0.2, line_width=0, row=1, col=1)
    plot.add_vline(x=knee.copies, line={"color": GREY, "dash": "dot", "width": 1.5}, row=1, col=1)


def _speeds(plot: go.Figure, found: FrontierFinding) -> None:
    """The curve of the speed held, and a dashed line for each speed that was asked for."""
    known = [(float(one.copies), one.speed) for one in found.levels if one.speed is not None and one.speed.value > 0]
    if not known:
        return
    plot.add_trace(points([x for x, _ in known], [y for _, y in known], RED, "speed held"), 1, 3)
    values = [speed.value for _, speed in known]
    near = [one.tokens_per_s for one in found.speeds if min(values) / 3 <= one.tokens_per_s <= max(values) * 3]
    for speed in near:
        plot.add_hline(y=speed, line={"color": GREY, "dash": "dash", "width": 1}, row=1, col=3)
    plot.update_yaxes(title="tokens/s of a copy", **log_ticks([*values, *near]), row=1, col=3)


def _scaling(found: ScalingFinding) -> list[Figure]:
    head = "Replica scaling: throughput, and each replica's part of what one alone makes"
    if not found.levels:
        return [Figure("plot-scaling", head, "", missing="No serving is valid.")]
    plot = make_subplots(rows=1, cols=2, horizontal_spacing=0.09)
    replicas = [float(one.replicas) for one in found.levels]
    each = {"mode": "markers", "marker": {"color": GREY, "size": 6, "symbol": "circle-open"}, "name": "a serving"}
    plot.add_trace(go.Scatter(x=[one.replicas for one in found.servings], y=[one.output_tokens_per_s for one in found.servings], **each), 1, 1)
    plot.add_trace(points(replicas, [one.output_tokens_per_s for one in found.levels], BLUE, "mean of the servings", line=False), 1, 1)
    one = next((level.output_tokens_per_s.value for level in found.levels if level.replicas == 1), None)
    if one is not None:
        dotted = {"color": GREY, "dash": "dot", "width": 1.5}
        plot.add_trace(go.Scatter(x=[1, max(replicas)], y=[one, one * max(replicas)], mode="lines", line=dotted, name="perfect scaling"), 1, 1)
    if found.fit is not None:
        x = np.linspace(1, max(replicas), 100)
        y = throughput(x, found.fit.rate_of_one.value, found.fit.sigma.value, found.fit.kappa.value)
        name = {"usl": "Universal Scalability Law", "amdahl": "Amdahl's law", "linear": "linear"}[found.fit.law]
        plot.add_trace(go.Scatter(x=x.tolist(), y=[float(f"{v:.5g}") for v in y], mode="lines", line={"color": ORANGE, "width": 2}, name=f"fit: {name}"), 1, 1)
    known = [(float(level.replicas), level.efficiency) for level in found.levels if level.efficiency is not None]
    if known:
        plot.add_trace(points([x for x, _ in known], [y for _, y in known], RED, "efficiency"), 1, 2)
    for column in (1, 2):
        plot.update_xaxes(title="replicas", tickvals=replicas, rangemode="tozero", row=1, col=column)
    plot.update_yaxes(title="output tokens/s", rangemode="tozero", row=1, col=1)
    plot.update_yaxes(title="of one replica's throughput, each", rangemode="tozero", row=1, col=2)
    caption = "Bars: 95 % between servings."
    return [Figure("plot-scaling", head, f"{caption} {found.sharing}" if found.sharing else caption, dressed(plot))]


WAYS = {"one_request": (BLUE, "n samples of one request"), "same_prompt": (ORANGE, "n requests of the same prompt")}


def _best_of_n(found: BestOfNFinding) -> list[Figure]:
    head = "Best of n: the cost of a sample, the time to the last one, and how often one passes"
    alone = next((arm for arm in found.arms if arm.how == "own_prompts"), None)
    if alone is None or not found.savings:
        return [Figure("plot-best-of-n", head, "", missing="No level of several samples stands beside one of separate requests.")]
    columns = 3 if found.verified is not None and found.verified.pass_at else 2
    plot = make_subplots(rows=1, cols=columns, horizontal_spacing=0.08)
    n = [float(arm.samples) for arm in found.arms]
    dotted = {"color": GREY, "dash": "dot", "width": 1.5}
    plot.add_trace(go.Scatter(x=[1, max(n)], y=[1, 1], mode="lines", line=dotted, name="requests with prompts of their own"), 1, 1)
    own = {one.samples: one.cost_ratio for one in found.savings if one.beside == "own_prompts"}
    plot.add_trace(points([float(key) for key in own], list(own.values()), BLUE, WAYS["one_request"][1]), 1, 1)
    apart = [arm for arm in found.arms if arm.how == "same_prompt"]
    if apart:
        costs = [Estimate(value=alone.samples_per_s.value / arm.samples_per_s.value) for arm in apart]
        plot.add_trace(points([float(arm.samples) for arm in apart], costs, ORANGE, WAYS["same_prompt"][1]), 1, 1)
    for how, (colour, name) in WAYS.items():
        mine = [(float(arm.samples), arm.e2e_p50_s) for arm in found.arms if arm.how in {how, "own_prompts"} and arm.e2e_p50_s is not None]
        if len(mine) > 1:
            at, ends_s = zip(*mine, strict=True)
            plot.add_trace(points(list(at), [Estimate(value=end_s) for end_s in ends_s], colour, name, showlegend=False), 1, 2)
    if found.verified is not None and columns == 3:
        plot.add_trace(points([float(one.k) for one in found.verified.pass_at], [one.value for one in found.verified.pass_at], RED, "pass@k"), 1, 3)
        plot.update_yaxes(title="pass@k", range=[0, 1.02], row=1, col=3)
    for column in range(1, columns + 1):
        plot.update_xaxes(title="samples of a prompt", **load_axis(n, n), row=1, col=column)
    plot.update_yaxes(title="cost of a sample, over separate requests", rangemode="tozero", row=1, col=1)
    plot.update_yaxes(title="end of the last sample, s (p50)", rangemode="tozero", row=1, col=2)
    caption = f"{found.sequences:,} sequences in flight everywhere. Left: 1 is a request with a prompt of its own; bars: 95 %. Middle: from the send of a request."
    return [Figure("plot-best-of-n", head, caption, dressed(plot))]


def _k_shot(found: KShotFinding) -> list[Figure]:
    head = "Few-shot: the cost of a request, and the time to its first token, against the examples in the prompt"
    if not found.levels:
        return [Figure("plot-k-shot", head, "", missing="No level is valid.")]
    plot = make_subplots(rows=1, cols=2, horizontal_spacing=0.09)
    slopes = {one.prefix_cache: one for one in found.slopes}
    for cached, colour, name in ((False, RED, "prefix cache off"), (True, BLUE, "prefix cache on"), (None, BLUE, "the engine as it is")):
        mine = [one for one in found.levels if one.prefix_cache is cached]
        if not mine:
            continue
        k = [float(one.examples) for one in mine]
        milliseconds = [scaled(one.seconds, 1000) for one in mine]
        plot.add_trace(points(k, milliseconds, colour, name, line=False), 1, 1)
        if cached in slopes:
            zero, slope = 1000 * slopes[cached].at_zero.value, 1000 * slopes[cached].seconds.value
            fitted = {"mode": "lines", "line": {"color": colour, "width": 1.5, "dash": "dash"}, "showlegend": False}
            plot.add_trace(go.Scatter(x=[0, max(k)], y=[float(f"{zero:.6g}"), float(f"{zero + slope * max(k):.6g}")], **fitted), 1, 1)
        known = [(float(one.examples), Estimate(value=1000 * one.ttft_p50_s)) for one in mine if one.ttft_p50_s is not None]
        if known:
            plot.add_trace(points([x for x, _ in known], [y for _, y in known], colour, name, showlegend=False), 1, 2)
    for column in (1, 2):
        plot.update_xaxes(title="examples in the prompt", rangemode="tozero", row=1, col=column)
    plot.update_yaxes(title="ms of the hardware for a request", rangemode="tozero", row=1, col=1)
    plot.update_yaxes(title="TTFT p50, ms", rangemode="tozero", row=1, col=2)
    return [Figure("plot-k-shot", head, f"{found.copies:,} copies at once. Bars: 95 %. Dashed: the line whose slope is what a further example costs.", dressed(plot))]


CHARTS: dict[type, Callable[[Any], list[Figure]]] = {
    FrontierFinding: _frontier,
    ScalingFinding: _scaling,
    BestOfNFinding: _best_of_n,
    KShotFinding: _k_shot,
}
