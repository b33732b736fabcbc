"""The report as one HTML file: it opens without a network, and runs nothing that a name could smuggle in.

Figures become strings here, with the terminal report's notation; the template only places them, and escapes all of
them. Plotly and the page's own script are inlined, and a content security policy names both by their hash, so that a
browser runs these two and nothing else, and loads nothing from anywhere. There is no time of rendering in it: the same
summary gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kilocopy import appendix, dashboards, report, sections
from kilocopy.charts import charts
from kilocopy.figures import Figure, figures
from kilocopy.report import DASH, band, counted, from_spec, interval, latency, load_label, money, number, percent, place, seconds, times
from kilocopy.summary import Cost, Ratio, Stage, Summary, Throughput

HUMANS = {
    "238": "read at 238 words/min",
    "150": "spoken at 150 words/min",
    "600": "thought at 600 words/min (10 words/s)",
}
CONDITIONS = {
    "id": "Run",
    "started_at": "Started",
    "url": "Endpoint",
    "driver_shares_host": "Driver shares the serving host",
    "hardware": "Driver's host",
    "versions": "Driver's versions",
    "stream_reader": "Driver's stream reader",
    "spec_sha256": "Hash of the spec",
    "git_commit": "Commit",
    "seed": "Seed",
}
DRIVER_HEADS = (
    "stage", "worker", "CPU of a core", "events/s", "loop lag\np50 / p99 / max", "send lag\np50 / p99", "near-zero gaps", "sockets", "memory",
)  # fmt: skip
SHOWN_ELSEWHERE = {"driver_roofline", "grafana_url", "spec", "prices", "name", "schema_version", "kilocopy_version"}
SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function inked(layout) {
  const ink = {...layout, font: {...layout.font, color: css("--ink")}};
  for (const key of Object.keys(layout).filter(key => /^[xy]axis/.test(key)))
    ink[key] = {...layout[key], gridcolor: css("--grid"), linecolor: css("--grid"), tickcolor: css("--grid")};
  return ink;
}
function draw() {
  for (const [id, plot] of Object.entries(figures))
    Plotly.react(id, plot.data, inked(plot.layout), {responsive: true, displaylogo: false, displayModeBar: false});
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
matchMedia("print").addEventListener("change", draw);
"""


def render_html(summary: Summary) -> str:
    """The whole report as one self-contained page; byte for byte the same from the same summary."""
    charted = charts(summary)
    drawn = [*charted, *figures(summary)]
    notes = [(stage, f"{note.code}: {note.sentence}") for stage in summary.stages for note in stage.verdict.notes]
    shared_said = [(stages, said) for stages, said in report.once(summary, notes) if stages.startswith("stages ")]
    shared = {said for _, said in shared_said}
    pages = report.pages_unit(summary)
    plotly = get_plotlyjs()
    environment = Environment(
        loader=PackageLoader("kilocopy"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        summary=summary,
        answer=report.answer(summary),
        name=str(summary.run.get("name") or summary.run.get("id") or "run"),
        cards=_cards(summary) if summary.experiment is None or summary.experiment.kind == "frontier" else [],
        stages=[_stage(stage, pages, shared) for stage in summary.stages],
        shared=shared_said,
        latencies=list(report.LATENCIES.values()),
        money_unit="$/page" if pages == 1 else f"$ per {pages:,} pages",
        figures=drawn[len(charted) :],
        experiment=sections.section(summary, pages),
        fleet=sections.fleet(summary),
        charts=charted,
        searches=[(search, report.search_rows(search)) for search in summary.searches],
        search_heads=report.SEARCH_HEADS,
        steps=[(f"{place(stage)}: {stage.title}", report.step_rows(stage)) for stage in summary.stages if stage.steps],
        step_heads=report.STEP_HEADS,
        drivers=[row for stage in summary.stages for row in _driver(stage)],
        driver_heads=DRIVER_HEADS,
        driver_lines=list(report.driver_lines(summary)),
        roofline=_roofline(summary),
        open_loop=report.open_loop(summary),
        shown=place(at) if (at := report.shown_stage(summary)) else "",
        ratios=[_ratio(ratio) for ratio in summary.overhang.ratios] if summary.overhang else [],
        n_cluster=number(summary.overhang.n_cluster) if summary.overhang else DASH,
        corpus=list(report.corpus_lines(summary)) if summary.corpus else [],
        humans=_humans(summary),
        checks=_checks(summary),
        prices=[_price(price) for price in summary.prices],
        appendix=appendix.tables(),
        multiplier=appendix.multiplier(summary)[1],
        conditions=_conditions(summary),
        boards=_boards(summary),
        rules=_rules(summary),
        pages_rest="at an assumed number of words per output token, since the text means nothing" if report.assumed_words(summary) else "of the decoded text, counted, not assumed from tokens",
        spec=json.dumps(summary.run["spec"], indent=2, sort_keys=True) if summary.run.get("spec") else "",
        figures_json=Markup(figures_json(drawn)),  # noqa: S704  # escaped in figures_json
        plotly=Markup(plotly),  # noqa: S704  # our dependency's own file
        script=Markup(SCRIPT),  # noqa: S704  # the constant above
        policy=policy(plotly, SCRIPT),
    )


def policy(*scripts: str) -> str:
    """A content security policy under which only these scripts run and nothing is fetched."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def figures_json(drawn: list[Figure]) -> str:
    """The figures' data as JSON that cannot end the script element it stands in."""
    plots = {figure.id: figure.plot.to_plotly_json() for figure in drawn if figure.plot is not None}
    text = json.dumps(plots, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _cards(summary: Summary) -> list[dict[str, str]]:
    """The five figures of the answer, all from one stage, each with its range and what it rests on."""
    stage = report.shown_stage(summary)
    if stage is None or stage.throughput is None:
        why = "there is no valid stage"
        return [_card(label, DASH, why, "", "not measured") for label in ("copies (N_SLO)", "tokens/s", "pages/hour", "$/page", "Wh/page")]
    through, cost = stage.throughput, stage.cost
    at = f"at {load_label(stage)}, stage {place(stage)}"
    value, spread = report.estimate(through.output_tokens_per_s)
    return [
        _slo_card(summary, stage),
        _card("output tokens/s", value, spread, at, "measured"),
        _card("pages/hour", number(through.pages_per_hour), f"{summary.page_words} words each", at, report.words_source(through)),
        _cost_card(cost, at, report.pages_unit(summary), through),
        _energy_card(cost, at, through),
    ]


def _card(label: str, value: str, detail: str, at: str, source: str) -> dict[str, str]:
    return {"label": label, "value": value, "detail": detail, "at": at, "source": source}


def _slo_card(summary: Summary, stage: Stage) -> dict[str, str]:
    """Copies within the SLO; where only a rate was sought, the rate."""
    head = summary.headline
    if head.n_slo is None and head.rate_slo_per_s is not None:
        return _card("requests/s within the SLO", f"{head.rate_slo_per_s:.4g}", _held(stage), f"stage {place(stage)}", "measured")
    return _card("copies (N_SLO)", f"{head.n_slo:,}" if head.n_slo is not None else DASH, _slo_detail(summary, stage), "", "measured")


def _slo_detail(summary: Summary, stage: Stage) -> str:
    """What the headline number of copies stands for."""
    if summary.headline.n_slo is None:
        return "no stage held the SLO"
    return _held(stage)


def _held(stage: Stage) -> str:
    held = stage.copies.slo_attainment
    return f"{percent(held)} of the streams held the SLO" if held is not None else "held the SLO"


def _cost_card(cost: Cost | None, at: str, pages: int, through: Throughput) -> dict[str, str]:
    """Money for a page, or for so many, at stated prices."""
    unit = "per page" if pages == 1 else f"per {pages:,} pages"
    if cost is None or cost.usd_per_page is None:
        return _card("$/page", DASH, "this stage has no price", at, "not priced")
    usd, each = times(cost.usd_per_page, pages), money(cost.usd_per_page.mid)
    parts = (interval(usd.low, usd.high, money), f"{each} a page" if pages > 1 else "")
    energy = {"measured": "energy measured", "assumed": "energy assumed", "not_measured": "energy not measured"}[cost.energy_source]
    source = "stated rent" if cost.hardware_kind == "rented" else f"stated prices, {energy}"
    return _card(f"{unit}, {cost.hardware_kind}", money(usd.mid), "; ".join(filter(None, parts)), at, _paged(source, through))


def _paged(source: str, through: Throughput) -> str:
    """What a figure per page rests on: its own source, and assumed pages where they are."""
    return source if through.words_source == "counted" else f"{source}; pages assumed"


def _energy_card(cost: Cost | None, at: str, through: Throughput) -> dict[str, str]:
    """Energy for a page, or that nothing measured it."""
    if cost is None or cost.wh_per_page is None:
        return _card("Wh/page", DASH, "no meter was read and no power was stated", at, "not measured")
    wh = cost.wh_per_page
    detail = "; ".join(
        part for part in (interval(wh.low, wh.high), f"boundary: {cost.energy_boundary}" if cost.energy_boundary else "") if part
    )
    return _card("Wh/page", number(wh.mid), detail, at, _paged(report.SOURCES[cost.energy_source], through))


def _stage(stage: Stage, pages: int, shared: set[str]) -> dict[str, Any]:
    """A row of the stage table: each cell is a main line and a small one. Notes that several stages share stand below the table."""
    through, cost, copies = stage.throughput, stage.cost, stage.copies
    total = report.estimate(through.output_tokens_per_s) if through else (DASH, "")
    usd = times(cost.usd_per_page, pages) if cost and cost.usd_per_page else None
    wh = cost.wh_per_page if cost else None
    return {
        "level": stage.verdict.level,
        "badge": report.BADGES[stage.verdict.level],
        "title": f"{place(stage)}: {stage.title}",
        "kinds": _kinds(stage),
        "reasons": stage.verdict.reasons,
        "notes": [note for note in stage.verdict.notes if f"{note.code}: {note.sentence}" not in shared],
        "latency": report.latency_row(stage),
        "cells": [
            (report.asked(stage), _achieved(stage)),
            (number(copies.n_run_client), f"{number(copies.n_run_server)} servers"),
            total,
            (number(through.output_tokens_per_s_per_copy) if through else DASH, ""),
            (number(through.pages_per_hour) if through else DASH, ""),
            (latency(stage, "ttft_s"), ""),
            (latency(stage, "tpot_s"), ""),
            (report.errors(stage), f"{stage.requests.dropped:,} dropped" if stage.requests.dropped else ""),
            (money(usd.mid if usd else None), interval(usd.low, usd.high, money) if usd else ""),
            (report.wh_per_page(stage), (interval(wh.low, wh.high) if wh else "")),
            (report.slo(stage), f"{percent(copies.slo_attainment)} held" if copies.slo_attainment is not None else ""),
        ],
    }


def _achieved(stage: Stage) -> str:
    """What became of the rate that was asked for."""
    return f"{number(stage.rate.sent_per_s)}/s sent" if stage.rate else ""


def _driver(stage: Stage) -> list[list[str]]:
    """A row per worker of a stage, in DRIVER_HEADS' order."""
    return [
        [
            f"{place(stage)}: {load_label(stage)}",
            str(one.worker),
            percent(one.cpu_fraction),
            number(one.events_per_s),
            seconds(one.loop_lag_p50_s, one.loop_lag_p99_s, one.loop_lag_max_s),
            seconds(one.send_lag_p50_s, one.send_lag_p99_s),
            percent(one.near_zero_gap_fraction),
            counted(one.open_sockets_max),
            DASH if one.rss_bytes_max is None else f"{one.rss_bytes_max / 2**20:,.0f} MiB",
        ]
        for one in stage.driver.workers
    ]


def _roofline(summary: Summary) -> str:
    """What this machine's driver was measured to read before the run."""
    told = summary.run.get("driver_roofline") or {}
    if not told.get("events_per_s"):
        return f"What this machine's driver can read was not measured{': ' + str(told['error']) if told.get('error') else ''}."
    cost = f", {number(told['cpu_us_per_event'])} µs of CPU an event" if told.get("cpu_us_per_event") else ""
    streams = f", about {counted(told['streams_at_50_per_s'])} streams of 50 tokens/s" if told.get("streams_at_50_per_s") else ""
    limits = ", ".join(
        f"{counted(told[key])} {name}"
        for key, name in (("cores", "cores"), ("fd_limit", "open files"), ("ephemeral_ports", "local ports"))
        if told.get(key)
    )
    can = f"Measured before the run: one driver process reads {counted(told['events_per_s'])} events/s here{cost}{streams}."
    return f"{can} Limits of this host: {limits}." if limits else can


def _kinds(stage: Stage) -> str:
    """The errors of a stage by kind."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(stage.requests.errors.items()) if count)


def _ratio(ratio: Ratio) -> dict[str, str]:
    """A row of the overhang table."""
    return {
        "name": report.RATIOS[ratio.name],
        "training": _quantity(ratio.training, ratio.training_unit),
        "running": _quantity(ratio.running_per_page, ratio.running_unit),
        "pages": band(ratio.ratio_pages),
        "source": ratio.training_source,
        "sentence": ratio.sentence,
    }


def _quantity(value: float | None, unit: str) -> str:
    """A number with its unit; dollars go in front."""
    if value is None:
        return DASH
    return f"{money(value)} {unit[1:]}".rstrip() if unit.startswith("$") else f"{number(value)} {unit}"


def _humans(summary: Summary) -> list[tuple[str, str]]:
    """Throughput equivalents at the stage shown: how many people at these speeds make as many words."""
    stage = report.shown_stage(summary)
    return (
        [(HUMANS.get(speed, f"{speed} words/min"), number(count)) for speed, count in sorted(stage.copies.n_human.items())] if stage else []
    )


def _checks(summary: Summary) -> list[dict[str, str]]:
    """A row per identity check."""
    return [
        {
            "stage": f"{place(stage)} ({load_label(stage)})",
            "name": report.CHECKS.get(check.name, check.name),
            "left": counted(check.left),
            "right": counted(check.right),
            "apart": percent(check.deviation_fraction),
            "limit": percent(check.limit_fraction),
            "outcome": check.outcome,
            "badge": report.OUTCOMES[check.outcome],
            "sentence": check.sentence,
        }
        for stage, check in report.all_checks(summary)
    ]


def _price(price: dict[str, Any]) -> dict[str, str]:
    """A row of the price table."""
    low, high = price.get("low"), price.get("high")
    return {
        "name": str(price.get("name", DASH)),
        "value": _stated(price.get("value")),
        "band": f"{_stated(low)} – {_stated(high)}" if low is not None and high is not None else DASH,
        "unit": str(price.get("unit", "")),
        "source": str(price.get("source") or "no source stated"),
        "date": str(price.get("date") or DASH),
    }


def _stated(value: Any) -> str:
    """A number that somebody stated, as stated."""
    return f"{value:,.10g}" if isinstance(value, int | float) else str(value if value is not None else DASH)


def _conditions(summary: Summary) -> list[tuple[str, str]]:
    """What the run was done with: the named conditions first, then whatever else the manifest says."""
    run = {key: value for key, value in summary.run.items() if key not in SHOWN_ELSEWHERE}
    spec = [(part.upper() if part == "slo" else part.capitalize(), from_spec(summary, part)) for part in ("model", "slo")]
    known = [(label, run.pop(key, None)) for key, label in CONDITIONS.items()]
    rest = [(key.replace("_", " ").capitalize(), value) for key, value in sorted(run.items()) if value is not None]
    return [(label, _words(value)) for label, value in [*spec, *known, *rest]]


Board = tuple[str, list[tuple[str, str]], bool]  # what was played, (dashboard, address), and whether the addresses can be opened


def _boards(summary: Summary) -> list[Board]:
    """The dashboards at this run's time, half a minute more on both sides; of an experiment, at each part's, which was a run of its own.

    Without a Grafana it is the path of the first one, which links to the others.
    """
    if summary.parts:
        return [_board(summary, ", ".join(part.levels), part.run, part.start_wall_s, part.end_wall_s, part.grafana_url) for part in summary.parts]
    if summary.wall_zero_s is None or not summary.timeline:
        return []
    end_s = summary.wall_zero_s + summary.timeline[-1].t_s
    return [_board(summary, "", summary.run.get("id"), summary.wall_zero_s, end_s, summary.run.get("grafana_url"))]


def _board(summary: Summary, what: str, run: str | None, start_s: float, end_s: float, grafana: str | None) -> Board:
    live = bool(grafana and grafana.startswith(("http://", "https://")))
    spec = summary.run.get("spec") or {}
    variables = {"cluster": spec.get("name"), "model": (spec.get("model") or {}).get("id"), "run": run}
    known = {name: str(value) for name, value in variables.items() if value}
    found = dashboards.links(str(grafana) if live else "/", start_s - 30, end_s + 30, known)
    return what, found if live else found[:1], live


def _words(value: Any) -> str:
    """A value of the manifest as words: `key value` pairs for mappings; nested ones in brackets."""
    if value is None or value == {}:
        return f"{DASH} (not recorded)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_nested(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, list | tuple):
        return ", ".join(_nested(part) for part in value) or DASH
    return str(value)


def _nested(value: Any) -> str:
    """A value inside another one."""
    return f"({_words(value)})" if isinstance(value, dict) else _words(value)


def _rules(summary: Summary) -> list[tuple[str, str]]:
    """How each stage's window was found, with its length."""
    return [
        (
            f"Stage {place(stage)}",
            f"{seconds(stage.window.duration_s)}: {stage.window.rule}." if stage.window else "no window was found.",
        )
        for stage in summary.stages
    ]
