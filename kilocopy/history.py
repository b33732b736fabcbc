"""kilocopy history: the same suite over versions and dates. What a page costs and takes, run after run, and by how much a year.

Run directories (or summary.json files) are found in a folder or an object store; DuckDB reads what of the summaries is wanted, in one
query. Runs are one series where they asked for the same: workload, stages, page, SLO, model and hardware. What changed between them
(engine versions, kilocopy's) is in the table. The trend is a straight line through the logarithm of the figure against time, so its
slope is a rate: per cent a year, with Student's t interval of the slope. Prices are those of each run's spec: where they changed, the trend
of $/page is theirs too, and the page says so.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import plotly.graph_objects as go
import pyarrow.fs as pafs
from rich.console import Console
from scipy.special import stdtrit

from kilocopy.figures import BLUE, ORANGE, Figure, dressed
from kilocopy.problem import ProblemError
from kilocopy.report import DASH, interval, money, number
from kilocopy.sheet import Rows, Section, Sheet, print_sheet, write_sheet
from kilocopy.streams import Floats
from kilocopy.summaries import ENGINE
from kilocopy.summary import SCHEMA_VERSION, Frozen

POINTS_MIN = 3
DAYS_PER_YEAR = 365.25
SAME_TO = 1e-9  # of its logarithm: rounding is no trend
SAME = ("workload", "stages", "experiment", "page", "slo")


class Point(Frozen):
    """One run of a series, at the stage that its headline shows."""

    id: str
    started_at: dt.datetime
    versions: dict[str, str]
    kilocopy_version: str
    copies: float | None
    tokens_per_s: float | None
    usd_per_page: float | None
    wh_per_page: float | None
    energy_source: str | None
    prices: str
    served: str = ""  # the model's source and the engine's settings, as the spec had them
    simulated: str | None = None  # what stood in for a model, where none ran


class Trend(Frozen):
    """A figure's change a year as a fraction (0.1: 10 % more), with its 95 % interval; None and why where the data do not carry it."""

    figure: str
    per_year: float | None
    low: float | None
    high: float | None
    runs: int
    days: float
    missing: str = ""


@dataclass(frozen=True)
class Series:
    """Runs that asked for the same, in order of time."""

    name: str
    points: list[Point]
    trends: list[Trend]


def command(where: str, *, html: Path, as_json: bool) -> None:
    """`kilocopy history`: read, fit, print, write the page. Raises ProblemError."""
    found, passed_over = read(where)
    series = group(found)
    page = sheet(where, series, passed_over)
    write_sheet(page, html)
    if as_json:
        told = [{"name": one.name, "points": [p.model_dump(mode="json") for p in one.points], "trends": [t.model_dump() for t in one.trends]} for one in series]
        print(json.dumps(told, indent=2))
    else:
        print_sheet(page, Console(highlight=False))
    print(f"page: {html.resolve()}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------------- reading


def read(where: str) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for every summary.json under a folder or a URI (s3://, gs://, hdfs://, file://), and what was passed over. Raises ProblemError."""
    texts, passed_over = _texts(where)
    if not texts:
        raise ProblemError(f"{where}: no summary.json in it; give a folder of run directories, or `kilocopy report` them first")
    rows = []
    for path, row in zip(texts, _query(list(texts.values())), strict=True):
        if row["schema_version"] != SCHEMA_VERSION:
            passed_over.append(f"{path}: schema {row['schema_version']}, this kilocopy reads {SCHEMA_VERSION}; `kilocopy report` that run again")
        elif row["started_at"] is None:
            passed_over.append(f"{path}: its run does not say when it started")
        else:
            rows.append(row)
    if not rows:
        raise ProblemError(f"{where}: none of {len(texts)} summaries can be used; the first: {passed_over[0]}")
    return rows, passed_over


def _texts(where: str) -> tuple[dict[str, str], list[str]]:
    """Every summary.json's text by its path. Credentials of an object store come from its own environment variables."""
    if "://" not in where and not Path(where).is_dir():
        raise ProblemError(f"{where}: no such folder; give one that holds run directories, or an object store (s3://bucket/runs)")
    try:
        store, root = pafs.FileSystem.from_uri(where) if "://" in where else (pafs.LocalFileSystem(), str(Path(where).resolve()))
        infos = store.get_file_info(pafs.FileSelector(root, recursive=True))
    except (OSError, ValueError) as error:
        raise ProblemError(f"{where}: cannot be listed: {str(error).splitlines()[0]}") from None
    texts, passed_over = {}, []
    for info in sorted(infos, key=lambda one: str(one.path)):
        if info.base_name == "summary.json":
            with store.open_input_stream(info.path) as file:
                text = file.read().decode("utf-8", errors="replace")
            try:
                json.loads(text)
                texts[str(info.path)] = text
            except json.JSONDecodeError:
                passed_over.append(f"{info.path}: not JSON")
    return texts, passed_over


QUERY = """
with summaries as (select number, json(text) as tree from texts),
     stages as (
       select number, unnest(cast(tree -> '$.stages' as json[])) as stage from summaries
     ),
     shown as (
       select s.number, any_value(stage) as stage
       from stages s join summaries using (number)
       where cast(stage ->> '$.index' as int) = coalesce(cast(tree ->> '$.headline.n_slo_stage' as int), cast(tree ->> '$.headline.best_stage' as int))
         and cast(stage ->> '$.level' as int) = case when tree ->> '$.headline.n_slo_stage' is null
             then cast(tree ->> '$.headline.best_level' as int) else cast(tree ->> '$.headline.n_slo_level' as int) end
       group by s.number
     )
select s.number,
       cast(tree ->> '$.schema_version' as int) as schema_version,
       tree ->> '$.kilocopy_version' as kilocopy_version,
       tree ->> '$.simulated' as simulated,
       tree ->> '$.run.id' as id, tree ->> '$.run.name' as name, tree ->> '$.run.started_at' as started_at,
       tree ->> '$.run.versions' as versions, tree ->> '$.run.hardware' as hardware, tree ->> '$.run.spec' as spec,
       cast(stage ->> '$.copies.asked' as double) as copies,
       cast(stage ->> '$.throughput.output_tokens_per_s.value' as double) as tokens_per_s,
       cast(stage ->> '$.cost.usd_per_page.mid' as double) as usd_per_page,
       cast(stage ->> '$.cost.wh_per_page.mid' as double) as wh_per_page,
       stage ->> '$.cost.energy_source' as energy_source
from summaries s left join shown using (number)
order by s.number
"""


def _query(texts: list[str]) -> list[dict[str, Any]]:
    """What is wanted of each summary, at the stage of its headline."""
    with duckdb.connect() as base:
        base.execute("create table texts (number integer, text varchar)")
        base.executemany("insert into texts values (?, ?)", list(enumerate(texts)))
        answer = base.execute(QUERY)
        names = [column[0] for column in answer.description or []]
        return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]


# ------------------------------------------------------------------------------------------------------------------- the trend


def group(rows: list[dict[str, Any]]) -> list[Series]:
    """Runs that asked for the same on the same hardware, each in order of time."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        spec, host = json.loads(row["spec"] or "{}"), json.loads(row["hardware"] or "{}")
        cluster = {key: (spec.get("cluster") or {}).get(key) for key in ("replicas", "hardware", "simulated_engine")}
        # The kind of card, not the very card: a rented one is another each time.
        gpus = sorted(gpu.get("name", "") if isinstance(gpu, dict) else str(gpu) for gpu in host.get("gpus") or [])
        alike = [{key: spec.get(key) for key in SAME}, (spec.get("model") or {}).get("id"), cluster, host.get("cpu"), gpus]
        found.setdefault(json.dumps(alike, sort_keys=True, default=str), []).append(row)
    return [_series(mine) for mine in sorted(found.values(), key=len, reverse=True)]


def _series(rows: list[dict[str, Any]]) -> Series:
    points = sorted((_point(row) for row in rows), key=lambda point: point.started_at)
    model = (json.loads(rows[0]["spec"] or "{}").get("model") or {}).get("id")
    trends = [trend(name, points) for name in ("usd_per_page", "wh_per_page", "tokens_per_s")]
    return Series(f"{rows[0]['name'] or rows[0]['id']}" + (f" · {model}" if model else ""), points, trends)


def _point(row: dict[str, Any]) -> Point:
    versions = json.loads(row["versions"] or "{}")
    spec = json.loads(row["spec"] or "{}")
    started = dt.datetime.fromisoformat(row["started_at"])
    return Point(
        id=str(row["id"]),
        started_at=started if started.tzinfo else started.replace(tzinfo=dt.UTC),
        versions={name: versions[name] for name in ENGINE if name in versions},
        kilocopy_version=str(row["kilocopy_version"]),
        **{name: row[name] for name in ("copies", "tokens_per_s", "usd_per_page", "wh_per_page", "energy_source")},
        prices=json.dumps(spec.get("prices"), sort_keys=True),
        served=json.dumps([(spec.get("model") or {}).get("source"), (spec.get("cluster") or {}).get("engine")], sort_keys=True),
        simulated=row["simulated"],
    )


def trend(figure: str, points: list[Point]) -> Trend:
    """The change a year of one figure, on the means of days: runs of one day share what that day's machine was, and are no separate witnesses.

    Joules of another source are another figure, and are not put on one line.
    """
    known = [(point, value) for point in points if (value := getattr(point, figure)) is not None and value > 0]
    sources = {point.energy_source for point, _ in known}
    if figure == "wh_per_page" and len(sources) > 1:
        return _no_trend(figure, known, f"the energy is {' in some runs and '.join(sorted(str(s) for s in sources))} in others")
    if figure == "wh_per_page" and len({_pue(point) for point, _ in known}) > 1:
        return _no_trend(figure, known, "PUE is another in some of the runs")
    days, logs = np.array([point.started_at.timestamp() / 86400 for point, _ in known]), np.log([value for _, value in known])
    dates = np.floor(days)
    each = np.unique(dates)
    if said := _too_few(len(known), len(each)):
        return _no_trend(figure, known, said)
    if np.ptp(logs) < SAME_TO:
        return _no_trend(figure, known, "it is the same in all runs")
    slope, error, freedom = line(
        np.array([days[dates == date].mean() for date in each]) / DAYS_PER_YEAR, np.array([logs[dates == date].mean() for date in each])
    )
    half = float(stdtrit(freedom, 0.975)) * error
    low, high = slope - half, slope + half
    if max(abs(low), abs(high)) > math.log(100):
        return _no_trend(figure, known, f"{np.ptp(days):.0f} days are too few for a rate a year: its interval spans a factor of over 100")
    ends = [math.exp(value) - 1 for value in (slope, low, high)]
    return Trend(figure=figure, per_year=ends[0], low=ends[1], high=ends[2], runs=len(known), days=float(np.ptp(days)))


def _pue(point: Point) -> Any:
    """The PUE that the point's facility energy was worked out with, as its spec had it."""
    prices = json.loads(point.prices) or {}
    return json.dumps(prices.get("pue"), sort_keys=True) if isinstance(prices, dict) else None


def _too_few(runs: int, days: int) -> str | None:
    """Why so many runs of so many days carry no trend; None where they do."""
    if runs < POINTS_MIN:
        return f"{runs} run{'s' if runs != 1 else ''} with this figure, and a trend needs {POINTS_MIN}"
    if days < POINTS_MIN:
        return f"all runs are of {'one day' if days == 1 else f'{days} days'}, and a trend needs {POINTS_MIN}"
    return None


def _no_trend(figure: str, known: list[Any], why: str) -> Trend:
    return Trend(figure=figure, per_year=None, low=None, high=None, runs=len(known), days=0.0, missing=why)


def line(x: Floats, y: Floats) -> tuple[float, float, int]:
    """Least-squares slope of y against x, its standard error and its degrees of freedom."""
    centred = x - x.mean()
    squares = float((centred**2).sum())
    slope = float((centred * y).sum()) / squares
    residual = y - y.mean() - slope * centred
    freedom = len(x) - 2
    return slope, math.sqrt(float((residual**2).sum()) / freedom / squares), freedom


# -------------------------------------------------------------------------------------------------------------------- the sheet

LABELS = {"usd_per_page": "$/page", "wh_per_page": "Wh/page", "tokens_per_s": "tokens/s"}


def sheet(where: str, series: list[Series], passed_over: list[str]) -> Sheet:
    """Every series with its runs and its trends."""
    first = series[0]
    said = " ".join([*dict.fromkeys(point.simulated for point in first.points if point.simulated), *(_said(one) for one in first.trends)])
    count = sum(len(one.points) for one in series)
    head = f"{first.name}, {len(first.points)} runs: {said}"
    notes = [f"{count} runs in {len(series)} series; one series is what asked for the same (workload, stages, page, SLO, model, replicas, hardware)."]
    notes += [f"Passed over: {one}." for one in passed_over]
    sections = [
        Section(f"{one.name}: {len(one.points)} run{'s' if len(one.points) > 1 else ''}", sentences=_about(one), table=_runs(one), figures=_figures(one, number_))
        for number_, one in enumerate(series)
    ]
    return Sheet(f"history of {where}", head, notes, sections)


def _said(one: Trend) -> str:
    if one.per_year is None:
        return f"{LABELS[one.figure]}: no trend ({one.missing})."
    sure = "" if (one.low or 0) * (one.high or 0) > 0 else ", which may be no change"
    return f"{LABELS[one.figure]} {_percent(one.per_year)} a year [{_percent(one.low)}, {_percent(one.high)}]{sure}."


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:+.3g} %"


def _about(series: Series) -> list[str]:
    said = [*dict.fromkeys(point.simulated for point in series.points if point.simulated), *(_said(one) for one in series.trends)]
    if len({point.served for point in series.points}) > 1:
        said.append("The model's source or the engine's settings in the specs changed between these runs, so every trend is theirs too.")
    if len({point.prices for point in series.points}) > 1:
        said.append("The prices in the specs changed between these runs, so the trend of $/page is theirs too.")
    if len({point.copies for point in series.points}) > 1:
        said.append("The runs are told at different copies (each at its own headline's), so a trend is that of the answer and not of one load.")
    if any(point.energy_source == "assumed" for point in series.points):
        said.append("Energy is assumed, not measured, in some or all runs: Wh/page then moves with the speed alone.")
    return said


def _runs(series: Series) -> Rows:
    rows = []
    for point in series.points:
        versions = ", ".join(f"{name} {version}" for name, version in point.versions.items())
        rows.append([f"{point.started_at:%Y-%m-%d}", point.id, versions or DASH, point.kilocopy_version, number(point.copies), number(point.tokens_per_s),
                     money(point.usd_per_page), number(point.wh_per_page)])  # fmt: skip
    return Rows(("date", "run", "versions", "kilocopy", "copies", "tokens/s", "$/page", "Wh/page"), rows, words=3,
                note="Each run at the stage of its headline: the most copies within the SLO, else the most tokens/s.")  # fmt: skip


def _figures(series: Series, number_: int) -> list[Figure]:
    """$/page and Wh/page over time, as multiples of the first run."""
    if len(series.points) < 2:
        return []
    plot = go.Figure()
    for figure, colour in (("usd_per_page", BLUE), ("wh_per_page", ORANGE)):
        known = [(point, value) for point in series.points if (value := getattr(point, figure))]
        if known:
            plot.add_trace(
                go.Scatter(
                    x=[point.started_at.isoformat() for point, _ in known], y=[value / known[0][1] for _, value in known], mode="lines+markers",
                    line={"color": colour, "width": 2}, marker={"size": 8}, name=LABELS[figure], text=[f"{point.id}: {number(value)}" for point, value in known],
                    hovertemplate="%{text}, %{y:.3g} of the first<extra>%{fullData.name}</extra>",
                )
            )  # fmt: skip
    plot.update_xaxes(title="started", type="date")
    plot.update_yaxes(title="of the first run", rangemode="tozero")
    return [Figure(f"plot-history-{number_}", "Run after run", "Each figure over that of the first run that has it.", dressed(plot))]


__all__ = ["Point", "Series", "Trend", "command", "group", "interval", "line", "read", "sheet", "trend"]
