"""A comparison as a sheet: the ratios, what they rest on, and the frontier of cost against speed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import plotly.graph_objects as go
from rich.console import Console

from kilocopy import sizes
from kilocopy.comparison import ALL_METRICS, BASES, OWN_N_SLO, Comparison, Point, Row, Spread, compare
from kilocopy.figures import BLUE, GREY, ORANGE, RED, Figure, dressed, log_ticks
from kilocopy.problem import ProblemError
from kilocopy.report import DASH, interval, money, number
from kilocopy.sheet import Rows, Section, Sheet, print_sheet, write_sheet
from kilocopy.summaries import sides

LABELS = {metric.name: metric.label for metric in ALL_METRICS}
BETTER = {metric.name: metric.better for metric in ALL_METRICS}
COLOURS = (BLUE, ORANGE, "#3d9a5f", "#8a5bc2", RED, "#26a0b2", "#c9a028", GREY)


def command(runs: Sequence[str], quality: Sequence[str], html: Path, *, as_json: bool) -> None:
    """`kilocopy compare`: print the comparison and write its page. Raises ProblemError."""
    found = compare(sides(runs), _scores(quality))
    page = sheet(found)
    write_sheet(page, html)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        print_sheet(page, Console(highlight=False))
    print(f"page: {html.resolve()}", file=sys.stderr)


def _scores(given: Sequence[str]) -> dict[str, float]:
    """`NAME=SCORE`, each. Raises ProblemError."""
    scores = {}
    for one in given:
        name, _, value = one.rpartition("=")
        try:
            scores[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise ProblemError(f"--quality {one}: say NAME=SCORE, the name of a side or of a model and a number")
    return scores


def sheet(comparison: Comparison) -> Sheet:
    """The whole comparison, for the terminal and the page."""
    places = [(at, list(rows)) for at, rows in groupby(sorted(comparison.rows, key=_order), key=lambda row: row.at)]
    return Sheet(
        title=f"{', '.join([comparison.baseline, *comparison.others])} compared",
        headline=" ".join([*simulated(comparison), _headline(comparison)]),
        notes=_notes(comparison),
        sections=[
            *(_ratios(comparison, at, rows) for at, rows in places if at == OWN_N_SLO),
            Section("Cost of a page against speed of a copy", table=_points(comparison), figures=[frontier(comparison)]),
            *(_ratios(comparison, at, rows) for at, rows in places if at != OWN_N_SLO),
            *_over_size(comparison),
            Section("What is compared", sentences=_compared(comparison)),
        ],
    )


def simulated(comparison: Comparison) -> list[str]:
    """What has to be read before any figure, where no model ran on a side."""
    return [f"{side}: {said}" for side, said in comparison.simulated.items()]


def _ratios(comparison: Comparison, at: str, rows: list[Row]) -> Section:
    return Section(f"Ratios to {comparison.baseline}: {at}", table=_table(rows))


def _order(row: Row) -> tuple[int, int]:
    """Each at its own N_SLO first, then loads from small to large."""
    digits = "".join(c for c in row.at if c.isdigit())
    return (0, 0) if row.at == OWN_N_SLO else (1, int(digits or 0))


def _table(rows: list[Row]) -> Rows:
    cells = []
    for row in rows:
        write = money if row.metric == "usd_per_page" else number
        sides = [_spread(one, write) for one in (row.baseline, row.other)]
        if row.ratio is None:
            cells.append([LABELS[row.metric], row.side, *sides, DASH, "", f"not compared: {row.missing}"])
            continue
        spread = interval(row.ratio.low, row.ratio.high)
        cells.append([LABELS[row.metric], row.side, *sides, number(row.ratio.value), spread, judged(row)])
    used = {row.ratio.basis for row in rows if row.ratio}
    note = " ".join(f"{said[0].upper()}{said[1:]}." for basis, said in BASES.items() if basis in used and basis != "none")
    counts = sorted({(row.ratio.runs_under, row.ratio.runs_over) for row in rows if row.ratio})
    runs = "; ".join(f"{under} against {over} run{'s' if over > 1 else ''}" for under, over in counts)
    return Rows(("figure", "side", "baseline", "side's", "ratio", "95 %", ""), cells, words=2, note=f"Intervals: {note or 'none'} {runs}.")


def _spread(one: Spread | None, write: Callable[[float | None], str]) -> str:
    if one is None:
        return DASH
    return write(one.value) if one.runs == 1 else f"{write(one.value)} {interval(one.low, one.high, write)}"


def judged(row: Row) -> str:
    """Better or worse where the interval says so."""
    if row.ratio is None or row.ratio.low is None or row.ratio.high is None:
        return "no interval"
    if row.ratio.low <= 1 <= row.ratio.high:
        return "not told apart"
    said = "better" if (row.ratio.value < 1) == (BETTER[row.metric] == "lower") else "worse"
    prices = row.prices
    if prices is None or prices.low is None or prices.high is None:
        return said
    open_ = row.ratio.low * prices.low / row.ratio.value <= 1 <= row.ratio.high * prices.high / row.ratio.value
    return f"{said}, {'open over' if open_ else 'over'} prices: {interval(prices.low, prices.high)}"


def _headline(comparison: Comparison) -> str:
    """One sentence a side: the price of a page first, at each one's own N_SLO, else at the largest common load."""
    said = []
    for side in comparison.others:
        rows = [row for row in comparison.rows if row.side == side and row.ratio]
        own = [row for row in rows if row.at == OWN_N_SLO] or [row for row in rows if row.at == rows[-1].at]
        if not own:
            said.append(f"{side}: nothing compares.")
            continue
        parts = [f"{number(row.ratio.value)} {interval(row.ratio.low, row.ratio.high)}".strip() + f" times the {LABELS[row.metric]}{prices_move(row)}"
                 for row in own if row.ratio and row.metric in {"usd_per_page", "copies", "wh_per_page", "tokens_per_s_per_copy"}]  # fmt: skip
        where = own[0].at if own[0].at == OWN_N_SLO else f"both at {own[0].at}"
        said.append(f"{side} against {comparison.baseline}, {where}: {', '.join(parts)}.")
    return " ".join(said)


def prices_move(row: Row) -> str:
    """How far the stated bands move a ratio, where they do."""
    return "" if row.prices is None else f" ({interval(row.prices.low, row.prices.high)} over the stated bands of prices and power)"


def _notes(comparison: Comparison) -> list[str]:
    bases = {row.ratio.basis for row in comparison.rows if row.ratio}
    notes = [f"Left out: {' '.join(comparison.left_out)}"] if comparison.left_out else []
    if "within_run" in bases:
        notes.append("With one run a side, intervals are from inside the runs alone; repeats of each (three or more starts) would say what a restart moves.")
    notes += comparison.tokens
    if comparison.quality:
        scores = ", ".join(f"{name} {score:g}" for name, score in comparison.quality.items())
        notes.append(f"Quality, as given by the user and not measured here: {scores}.")
    return notes


def _compared(comparison: Comparison) -> list[str]:
    runs = [f"{name}: {', '.join(ids)}." for name, ids in comparison.runs.items()]
    alike = "Workload, page and SLO are the same on all sides (the seed may differ)."
    return [*runs, alike, *(comparison.differences or ["Nothing else in the specs, versions and hosts differs."])]


def _over_size(comparison: Comparison) -> list[Section]:
    """$/page against parameters, where the sides have several sizes: each at its own cheapest load; prices are at mid."""
    cheapest: dict[str, Spread] = {}
    for point in comparison.points:
        if point.usd_per_page and (point.side not in cheapest or point.usd_per_page.value < cheapest[point.side].value):
            cheapest[point.side] = point.usd_per_page
    known = [(comparison.parameters[side], usd.value) for side, usd in cheapest.items() if side in comparison.parameters]
    if len({size for size, _ in known}) < 2:
        return []
    title = "Cost of a page over model size"
    law = sizes.mixed(comparison.differences) or sizes.fit(known)
    if isinstance(law, str):
        return [Section(title, sentences=[law])]
    said = f"$/page ~ N^{law.alpha:.3g}, 95 % of the exponent [{law.low:.3g} – {law.high:.3g}], from {len(set(law.sizes))} measured sizes, each at its own cheapest valid load, prices at mid."
    largest = max(law.sizes)
    rows = [[f"{number(size)} parameters", "measured" if size in law.sizes else "EXTRAPOLATED", *(money(value) for value in law.at(size))]
            for size in (*sorted(set(law.sizes)), 10 * largest, 1000 * largest)]  # fmt: skip
    note = "Extrapolated: nothing of that size was measured; larger models need other hardware, parallelism and batches than the line knows of."
    return [Section(title, [said], Rows(("size", "", "$/page on the line", "95 % low", "high"), rows, words=2, note=note))]


def _points(comparison: Comparison) -> Rows:
    """Every point of the figure; the frontier's are marked."""
    rows = [
        [
            point.side,
            point.load,
            "yes" if point.on_frontier else "",
            _spread(point.tokens_per_s_per_copy, number),
            _spread(point.usd_per_page, money),
            *([f"{comparison.quality[point.side]:g}" if point.side in comparison.quality else DASH] if comparison.quality else []),
        ]
        for point in comparison.points
    ]
    heads = ("side", "load", "frontier", "tokens/s per copy", "$/page", *(("quality (given)",) if comparison.quality else ()))
    return Rows(heads, rows, words=3, note="Frontier: no other point is both cheaper a page and faster a copy. [ ]: smallest and largest of the repeats.")


def frontier(comparison: Comparison) -> Figure:
    """$/page against tokens/s per copy, a line a side; the points that nothing beats are ringed."""
    head = "What a faster copy costs"
    priced = [point for point in comparison.points if point.usd_per_page is not None]
    if not priced:
        return Figure("plot-frontier", head, "", missing="No side has a price per page.")
    plot = go.Figure()
    for number_, side in enumerate(comparison.runs):
        mine = sorted((point for point in priced if point.side == side), key=lambda point: point.tokens_per_s_per_copy.value)
        if mine:
            plot.add_trace(_line(mine, side, COLOURS[number_ % len(COLOURS)], comparison.quality.get(side)))
    best = sorted((point for point in priced if point.on_frontier), key=lambda point: point.tokens_per_s_per_copy.value)
    ring = {"symbol": "circle-open", "size": 17, "color": GREY, "line": {"width": 2}}
    plot.add_trace(go.Scatter(x=_speeds(best), y=_prices(best), mode="markers", marker=ring, name="on the frontier", hoverinfo="skip"))
    plot.update_xaxes(title="output tokens/s of one copy (faster to the right)", **log_ticks(_speeds(priced)))
    plot.update_yaxes(title="$ per page (cheaper below)", **log_ticks(_prices(priced), money))
    caption = "Each line is one side from many copies (left) to few (right). Ringed: nothing is both cheaper and faster. Bars: smallest and largest of the repeats."
    return Figure("plot-frontier", head, caption, dressed(plot))


def _speeds(points: list[Point]) -> list[float]:
    return [point.tokens_per_s_per_copy.value for point in points]


def _prices(points: list[Point]) -> list[float]:
    return [point.usd_per_page.value for point in points if point.usd_per_page]


def _line(points: list[Point], side: str, colour: str, quality: float | None) -> go.Scatter:
    def bars(spreads: list[Spread]) -> dict[str, object]:
        return {
            "type": "data", "symmetric": False, "thickness": 1.2, "color": colour,
            "array": [one.high - one.value for one in spreads], "arrayminus": [one.value - one.low for one in spreads],
        }  # fmt: skip

    return go.Scatter(
        x=_speeds(points),
        y=_prices(points),
        error_x=bars([point.tokens_per_s_per_copy for point in points]),
        error_y=bars([point.usd_per_page for point in points if point.usd_per_page]),
        mode="lines+markers+text",
        text=[point.load.replace(" copies", "").replace(" copy", "") for point in points],
        textposition="top center",
        line={"color": colour, "width": 2},
        marker={"color": colour, "size": 8},
        name=side if quality is None else f"{side} (quality {quality:g})",
        hovertemplate="%{text} copies: %{x:.3g} tokens/s a copy, $%{y:.3g} a page<extra>%{fullData.name}</extra>",
    )
