"""Grafana's four dashboards from one description, as plain JSON: what people watch during a run.

Panels show the recording rules (kilocopy/rules.py), kilocopy's own metrics and the servers'; of Ray's histograms only buckets, since
their sums are invented. Plain dictionaries: the part of Grafana's model that is used here is small, and reads as what it is.

    python -m kilocopy.dashboards [--check]     writes dashboards/*.json and the rules, or says what is not as written here
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from kilocopy import metrics as m
from kilocopy import rules
from kilocopy.search import CPU_FRACTION_MAX, LAG_S_MAX, SEND_LAG_S_MAX

DIRECTORY = Path(__file__).resolve().parent.parent / "dashboards"
WIDTH = 24
SOURCE_UID = "kilocopy-prometheus"  # of the data source that kilocopy makes; in each dashboard another can be chosen
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# What a panel's query selects: a run, the servers of a model (their label for it is `model_name`), a node of Ray's.
RUN = 'cluster=~"$cluster",model=~"$model",run=~"$run"'
MODEL = 'cluster=~"$cluster",model=~"$model"'
SERVERS = 'cluster=~"$cluster",model_name=~"$model"'
REPLICA = f'{SERVERS},ReplicaId=~"$replica"'
NODE = 'cluster=~"$cluster",ip=~"$node"'
STAGE = f'{RUN},stage=~"$stage"'

GPT3_WH_PER_PAGE, RULE_PAGES_PER_USD = 4, 500  # kilocopy/references.py: the GPT-3 paper, section 6.3; the rule of thumb of 2020


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: what it says and how large. `queries` are (expression, legend); `right` are legends on the right axis."""

    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 7
    low: float | None = 0
    high: float | None = None
    decimals: int | None = None
    right: tuple[str, str] | None = None  # legend, unit
    words: dict[str, tuple[str, str]] = field(default_factory=dict)  # value (the last: and above) -> what it means, colour
    log: bool = False  # a logarithmic axis, where a reference is a thousand times larger
    limit: float | None = None  # a dashed line: past it something is wrong
    soft_high: float | None = None  # the axis reaches up to here at least
    instant: bool = False  # asked once, at the end of the time shown
    # Of a xychart the first query is x, the others are y, by their legends; a point for each moment.


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard: which file, what it answers, and its panels in the order of reading, left to right."""

    uid: str
    title: str
    description: str
    panels: tuple[Panel, ...]
    each: tuple[str, tuple[Panel, ...]] | None = None  # a variable, and the panels that each of its values has below, in a row that opens


def stat(title: str, query: str, unit: str, description: str, *, decimals: int | None = None, width: int = 4, **more: Any) -> Panel:
    """A number, the last one of the time shown, with its line behind it."""
    return Panel(title, description, ((query, title),), unit, "stat", width, 4, decimals=decimals, **more)


def quantile(q: float, bucket: str, selected: str, by: str = "") -> str:
    """A quantile of a histogram's buckets over the last minute."""
    return f"histogram_quantile({q:g}, sum by ({by}{', ' if by else ''}le) (rate({bucket}{{{selected}}}[1m]))) > -1"  # not NaN


def reported(gauge: str, selected: str) -> str:
    """A gauge of Ray's, which is on its page only once per report."""
    return f"last_over_time({gauge}{{{selected}}}[{rules.REPORTED}])"


def heat(bucket: str, selected: str) -> str:
    """Observations per second in each bucket."""
    return f"sum by (le) (rate({bucket}{{{selected}}}[1m]))"


COPIES = Dashboard(
    "kilocopy-copies",
    "Copies and cost",
    "How many copies run now, how fast, and what a page costs.",
    (
        stat("Copies now", f"kilocopy:copies{{{RUN}}}", "locale", "Streams open at the driver; where the run is over, its last in the time shown.", decimals=0),
        stat("Pages per hour", f"3600 * kilocopy:pages_per_second:rate1m{{{RUN}}}", "locale", "Pages of decoded text, as the spec defines a page.", decimals=0),
        stat("$ per page", f"kilocopy:usd_per_page:rate1m{{{RUN}}}", "currencyUSD", "Rent, or capital, opex and metered electricity. No data where electricity is owed and not metered.", decimals=7),
        stat("Wh per page", f"kilocopy:wh_per_page:rate1m{{{RUN}}}", "watth", "Metered energy times PUE. No data without a meter for every serving device. GPT-3's of 2020: 4 Wh.", decimals=2),
        stat("Pages per dollar", f"kilocopy:pages_per_usd:rate1m{{{RUN}}}", "locale", "1 / ($ per page). The rule of thumb of 2020: 500.", decimals=0),
        stat("Streams that hold the SLO", f"kilocopy:slo_attained_fraction:rate1m{{{RUN}}}", "percentunit", "Share of the requests that ended in the last minute and held speed and TTFT.", high=1, decimals=1),
        Panel("Copies", "In flight at the driver, asked for, and running in the engines: the three agree in a steady stage.", (
            (f"kilocopy:copies{{{RUN}}}", "in flight"),
            (f"sum by (cluster, model, run) ({m.COPIES_ASKED.sample}{{{RUN}}})", "asked"),
            (f"kilocopy:server_copies{{{MODEL}}}", "running in the engines of {{model}}"),
        )),
        Panel("Copies against speed", "A point for each moment shown: copies in flight to the right, tokens/s of one copy up, both over a minute. As copies grow, each gets slower.", (
            (f"kilocopy:copies:mean1m{{{RUN}}}", "copies"),
            (f"kilocopy:tokens_per_second_per_copy:rate1m{{{RUN}}}", "tokens/s per copy"),
        ), kind="xychart"),
        Panel("SLO", "Share of streams that hold the SLO, and the share that must.", (
            (f"kilocopy:slo_attained_fraction:rate1m{{{RUN}}}", "held"),
            (f"max({m.SLO_QUANTILE.sample}{{{RUN}}})", "must"),
            (f"kilocopy:error_fraction:rate1m{{{RUN}}}", "failed"),
        ), "percentunit", high=1),
        Panel("Price of a page", "Its parts; the axis is logarithmic. The line is the rule of thumb of 2020: 500 pages per dollar.", (
            (f"kilocopy:hardware_usd_per_page:rate1m{{{RUN}}}", "{{kind}} hardware"),
            (f"kilocopy:electricity_usd_per_page:rate1m{{{RUN}}}", "electricity"),
            (f"kilocopy:usd_per_page:rate1m{{{RUN}}}", "all"),
            (f"vector({1 / RULE_PAGES_PER_USD:g})", "rule of thumb, 2020"),
        ), "currencyUSD", low=None, log=True),
        Panel("Energy of a page", "Facility energy; the axis is logarithmic. The line is GPT-3's: 0.4 kWh for 100 pages; its boundary and its page are not stated.", (
            (f"kilocopy:wh_per_page:rate1m{{{RUN}}}", "this run"),
            (f"vector({GPT3_WH_PER_PAGE})", "GPT-3, 2020"),
        ), "watth", low=None, log=True),
        Panel("Time to first token, by stage", "From the send; in open loop from when it was due. From buckets: the report has the exact ones.", (
            (quantile(0.5, f"{m.TTFT.name}_bucket", STAGE, "stage"), "p50 stage {{stage}}"),
            (quantile(0.99, f"{m.TTFT.name}_bucket", STAGE, "stage"), "p99 stage {{stage}}"),
        ), "s"),
    ),
)  # fmt: skip

ENGINE_TOKENS = f"sum by (ReplicaId) (rate(ray_vllm_generation_tokens_total{{{SERVERS}}}[1m]))"
HITS = f"sum by (ReplicaId) (rate(ray_vllm_prefix_cache_hits_total{{{SERVERS}}}[1m]))"  # absent until the first hit
THERE = f"0 * max by (ReplicaId) (kilocopy:replica_tokens_per_second:rate1m{{{MODEL}}})"  # a healthy replica, asked or not
LOOKED_UP = f"sum by (ReplicaId) (rate(ray_vllm_prefix_cache_queries_total{{{SERVERS}}}[1m]))"
LATENCIES = (
    Panel("TTFT in the engines", "Requests per second in each bucket, of the replicas that are chosen.", (
        (heat("ray_vllm_time_to_first_token_seconds_bucket", REPLICA), "{{le}}"),), "s", "heatmap", 8, 8),
    Panel("Inter-token latency in the engines", "Tokens per second in each bucket, of the replicas that are chosen.", (
        (heat("ray_vllm_inter_token_latency_seconds_bucket", REPLICA), "{{le}}"),), "s", "heatmap", 8, 8),
)  # fmt: skip
REPLICAS = Dashboard(
    "kilocopy-replicas",
    "Replicas",
    "What each engine does, whether they share the work evenly, and what serving adds to the engine's own time.",
    (
        Panel("Running", "Sequences that each engine runs. A healthy one reports nothing while idle: that is a zero.", (
            (f"sum by (ReplicaId) ({reported('ray_vllm_num_requests_running', SERVERS)}) or {THERE}", "{{ReplicaId}}"),), width=6),
        Panel("Waiting", "Requests in each engine's queue.", (
            (f"sum by (ReplicaId) ({reported('ray_vllm_num_requests_waiting', SERVERS)}) or {THERE}", "{{ReplicaId}}"),), width=6),
        Panel("KV cache", "In use. Near 100 % the engine preempts.", (
            (f"max by (ReplicaId) ({reported('ray_vllm_kv_cache_usage_perc', SERVERS)}) or {THERE}", "{{ReplicaId}}"),), "percentunit", width=6, high=1),
        Panel("Tokens/s", "Output tokens by the engine's own counter, which begins with its first token.", (
            (f"{ENGINE_TOKENS} or {THERE}", "{{ReplicaId}}"),), width=6),
        Panel("Imbalance", "The busiest replica's tokens/s over the mean of all that are there: 1 is even, 2 of 2 means that one does all.", (
            (f"kilocopy:replica_imbalance:rate1m{{{MODEL}}}", "{{model}}: busiest over mean"),), width=6, low=1),
        Panel("Prefix cache hits", "Of the prompt tokens looked up. Synthetic prompts should hit nothing but shared prefixes.", (
            (f"({HITS} or 0 * {LOOKED_UP}) / ({LOOKED_UP} > 0)", "{{ReplicaId}}"),
        ), "percentunit", width=6, high=1),
        Panel("Replicas", "As Serve says: a dead engine after three failed checks, 10 s apart. A dead one keeps its counters on the page.", (
            (f"kilocopy:replicas{{{MODEL}}}", "{{model}}: healthy"),
            (f"count by (model_name) (count by (model_name, ReplicaId) (ray_vllm_generation_tokens_total{{{SERVERS}}}))", "{{model_name}}: with counters"),
        ), width=6),
        Panel("Client and servers", "What the servers counted more than the client over 2 minutes, of their tokens. Near 0 in a steady stage; what is in flight can explain some.", (
            (f"kilocopy:token_gap_fraction:rate2m{{{MODEL}}}", "{{model}}: gap"),
            (f"kilocopy:token_gap_in_flight:rate2m{{{MODEL}}}", "{{model}}: in flight, at most"),
        ), "percentunit", width=6, low=None),
        *LATENCIES,
        Panel("The serving tax", "The client's median TTFT and the engines': the distance is HTTP, routing and queues outside the engine.", (
            (f"kilocopy:ttft_seconds:p50{{{RUN}}}", "client TTFT"),
            (quantile(0.5, "ray_vllm_time_to_first_token_seconds_bucket", SERVERS), "engine TTFT"),
            (f"kilocopy:inter_chunk_seconds:p50{{{RUN}}}", "client gap"),
            (quantile(0.5, "ray_vllm_inter_token_latency_seconds_bucket", SERVERS), "engine gap"),
        ), "s", height=8),
    ),
    each=("replica", tuple(replace(panel, width=WIDTH // 2) for panel in LATENCIES)),
)  # fmt: skip

METERS = 'run=~"$run|",cluster=~"$cluster|",ip=~"$node"'  # a meter knows its run, or its cluster
GPUS = 'cluster=~"$cluster",cluster!=""'  # with All too: a DCGM that does not know the cluster knows everybody's GPUs
JOULES = f'increase({m.ENERGY.sample}{{run=~"$run",ip=~"$node",boundary=~"gpu|host"}}[$__range])'
DCGM_JOULES = rules.named(f"increase({rules.DCGM_J}{{{GPUS}}}[$__range])", device="UUID", node="Hostname")
HARDWARE = Dashboard(
    "kilocopy-hardware",
    "Hardware and energy",
    "Power and energy by the meters, and how busy GPUs and hosts are. What no meter counts is not here.",
    (
        stat("Power of the facility", f"kilocopy:facility_watts:rate1m{{{RUN}}}", "watt", "Metered power times PUE. No data where a serving device has no meter.", width=6),
        stat("J per output token", f"kilocopy:joules_per_output_token:rate1m{{{RUN}}}", "joule", "Facility energy, prefill too.", width=6, decimals=2),
        stat("Pages per kWh", f"kilocopy:pages_per_kwh:rate1m{{{RUN}}}", "locale", "Pages that a kWh of the facility makes. GPT-3's of 2020: 250.", width=6, decimals=0),
        stat("Tokens/s per GPU", f"kilocopy:tokens_per_second_per_device:rate1m{{{RUN}}}", "locale", "Of the host, where there is no GPU.", width=6, decimals=1),
        Panel("Power", "By each meter's own counter: GPUs (NVML; DCGM where kilocopy has no meter), CPU packages (RAPL).", (
            (f"sum by (node, device, boundary) (kilocopy:meter_watts:rate1m{{{METERS}}})", "{{node}} {{boundary}} {{device}}"),), "watt"),
        Panel("Energy in the time shown", "Of the meters that the run reads, by their own counters, and of GPUs that only DCGM knows; without PUE.", (
            (f"sum by (node, boundary) ({JOULES})", "{{node}} {{boundary}}"),
            (f"sum by (node) (max by (node, device) ({DCGM_JOULES}) unless on (device) {JOULES}) / 1000", "{{node}} gpu, by DCGM"),
        ), "joule", "bargauge", instant=True),
        Panel("Joules per token and page", "Facility energy.", (
            (f"kilocopy:joules_per_output_token:rate1m{{{RUN}}}", "per output token"),
            (f"kilocopy:joules_per_page:rate1m{{{RUN}}}", "per page"),
        ), "joule", right=("per page", "joule")),
        Panel("GPU utilisation", "A kernel ran; it may have been a small one. By DCGM, or by Ray's agent where it does not know the cluster. Of every node: the two name nodes differently.", (
            (f"kilocopy:gpu_busy_fraction{{{GPUS}}}", "{{node}} GPU {{device}}"),), "percentunit", width=6, high=1),
        Panel("GPU memory", "In use. By DCGM, or by Ray's agent. Of every node.", ((f"kilocopy:gpu_memory_bytes{{{GPUS}}}", "{{node}} GPU {{device}}"),), "bytes", width=6),
        Panel("Host CPU", "All cores together.", ((f"{reported('ray_node_cpu_utilization', NODE)}", "{{ip}}"),), "percent", width=6, high=100),
        Panel("Host memory", "In use, and there.", (
            (f"{reported('ray_node_mem_used', NODE)}", "{{ip}} used"), (f"{reported('ray_node_mem_total', NODE)}", "{{ip}} there")), "bytes", width=6),
    ),
)  # fmt: skip

LIMITED = "KilocopyDriverLimited"
DRIVER = Dashboard(
    "kilocopy-driver",
    "Driver health",
    "Whether the load generator is the limit: then what it sees is its own doing.",
    (
        stat("Verdict", f'count(ALERTS{{alertname="{LIMITED}",alertstate="firing",{RUN}}}) or 0 * count(kilocopy:copies{{{RUN}}})', "short",
             "From the alert on loop lag, CPU and send lag.", width=12,
             words={"0": ("The driver keeps up", "green"), "1": ("The driver is the limit: use more workers, or a quieter host", "red")}),
        stat("Worst loop lag, p99", f"max(kilocopy:driver_loop_lag_seconds:p99{{{RUN}}})", "s", "Over 5 ms, or a tenth of the gap between tokens, latencies are not to be trusted.", width=6),
        stat("Busiest worker", f"max(kilocopy:driver_cpu_fraction:rate1m{{{RUN}}})", "percentunit", "CPU of one core.", width=6, high=1, decimals=0),
        Panel("Loop lag, p99", "How late each worker's event loop woke. Over the line latencies are not to be trusted, unless a tenth of the gap between tokens is more.", ((f"kilocopy:driver_loop_lag_seconds:p99{{{RUN}}}", "worker {{worker}}"),), "s", limit=LAG_S_MAX),
        Panel("CPU", "Of one core, each worker. Over the line it is the limit.", ((f"kilocopy:driver_cpu_fraction:rate1m{{{RUN}}}", "worker {{worker}}"),), "percentunit", soft_high=1, limit=CPU_FRACTION_MAX),
        Panel("Send lag, p99", "How late requests were sent. Over the line the load is not the one that was asked for.", ((f"kilocopy:driver_send_lag_seconds:p99{{{RUN}}}", "worker {{worker}}"),), "s", limit=SEND_LAG_S_MAX),
        Panel("Events", "Read from streams.", ((f"kilocopy:driver_events_per_second:rate1m{{{RUN}}}", "worker {{worker}}"),), "cps", width=6),
        Panel("Requests by outcome", "That ended. `dropped`: could not be sent at all.", (
            (f"sum by (outcome) (rate({m.REQUESTS.sample}{{{STAGE}}}[1m]))", "{{outcome}}"),), "reqps", width=6),
        Panel("Memory", "Resident, each worker.", ((f"{m.RSS.sample}{{{RUN}}}", "worker {{worker}}"),), "bytes", width=6),
        Panel("Cost of watching", "How long each metrics page took to be read. The driver's are made in its own event loop: they have to be short.", (
            ('scrape_duration_seconds{job=~"kilocopy|servers",cluster=~"$cluster|"}', "{{job}} {{instance}}"),), "s", width=6),
        Panel("Stage", "What each worker plays.", ((f"{m.STAGE.sample}{{{STAGE}}}", "worker {{worker}}: stage {{stage}}.{{level}} {{kind}} {{phase}}"),), "short", "state-timeline", 12, 6, words={"1": ("plays", "blue")}),
        Panel("Gaps between chunks", "As the client saw them.", ((heat(f"{m.ICL.name}_bucket", STAGE), "{{le}}"),), "s", "heatmap", 12, 6),
    ),
)  # fmt: skip

DASHBOARDS = (COPIES, REPLICAS, HARDWARE, DRIVER)


def panel(uid: str, title: str) -> Panel:
    """A panel by its dashboard and its title."""
    return next(panel for board in DASHBOARDS if board.uid == uid for panel in board.panels if panel.title == title)


def filled(expr: str, values: Mapping[str, str]) -> str:
    """A query with its variables filled in, as Grafana does: `values` are regular expressions by the variables' names."""
    return re.sub(r"\$([a-z_]\w*)", lambda found: values[found[1]].replace("\\", "\\\\").replace('"', '\\"'), expr)


def variables(dashboard: Dashboard = REPLICAS) -> list[dict[str, Any]]:
    """Data source, cluster, model, run, stage, node: each from what is there; and that of which each value has a row."""
    asked = (
        ("cluster", f"label_values({m.IN_FLIGHT.sample}, cluster)"),
        ("model", f'label_values({m.IN_FLIGHT.sample}{{cluster=~"$cluster"}}, model)'),
        ("run", f'label_values({m.IN_FLIGHT.sample}{{cluster=~"$cluster",model=~"$model"}}, run)'),
        ("stage", f"label_values({m.STAGE.sample}{{{RUN}}}, stage)"),
        ("node", 'label_values(ray_node_cpu_utilization{cluster=~"$cluster"}, ip)'),
        ("replica", f"label_values(kilocopy:replica_healthy{{{MODEL}}}, ReplicaId)"),
    )
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
              "current": {"text": "kilocopy Prometheus", "value": SOURCE_UID}}  # fmt: skip
    return [source] + [
        {
            "name": name,
            "label": name.capitalize(),
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": query, "refId": name},
            "definition": query,
            "refresh": 2,  # with the time range
            "sort": 2 if name == "run" else 1,  # the newest run first
            "includeAll": name != "run",
            "multi": name != "run",
            "allValue": ".*" if name != "run" else None,
            "current": {} if name == "run" else {"text": ["All"], "value": ["$__all"]},
        }
        for name, query in asked
        if name != "replica" or dashboard.each
    ]


def _targets(panel: Panel) -> list[dict[str, Any]]:
    form = "heatmap" if panel.kind == "heatmap" else "time_series"
    when = {"range": not panel.instant, "instant": panel.instant}
    return [
        {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expr, "legendFormat": legend, "format": form, **when}
        for index, (expr, legend) in enumerate(panel.queries)
    ]


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "none" if panel.words else "area", "colorMode": "value"}
    if panel.kind == "bargauge":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal", "displayMode": "basic", "valueMode": "text"}
    if panel.kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": panel.unit}, "color": {"scheme": "Blues", "mode": "scheme"}, "cellGap": 1}
    if panel.kind == "state-timeline":
        return {"showValue": "never", "mergeValues": True, "legend": {"showLegend": False}}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
    if panel.kind == "xychart":
        x, *ys = ({"matcher": {"id": "byName", "options": legend}} for _, legend in panel.queries)
        return {"mapping": "manual", "series": [{"x": x, "y": y} for y in ys], "legend": legend, "tooltip": {"mode": "single", "sort": "none"}}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def _fields(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "noValue": "no data"}
    limits = {"min": panel.low, "max": panel.high, "decimals": panel.decimals}
    defaults |= {key: value for key, value in limits.items() if value is not None}
    # Where nothing is said, Grafana paints what is above 80 red.
    steps = [{"color": "blue", "value": None}] + ([] if panel.limit is None else [{"color": "red", "value": panel.limit}])
    defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.kind in {"stat", "bargauge"}:
        defaults["color"] = {"mode": "thresholds"}
    if panel.words:
        defaults["mappings"] = _mappings(panel.words)
    if panel.kind == "timeseries":
        defaults["custom"] = _lines(panel)
    if panel.kind == "xychart":
        defaults["custom"] = {"show": "points", "pointSize": {"fixed": 6}, "fillOpacity": 50}
    overrides = []
    if panel.right:
        legend, unit = panel.right
        moved = [{"id": "custom.axisPlacement", "value": "right"}, {"id": "unit", "value": unit}]
        overrides = [{"matcher": {"id": "byName", "options": legend}, "properties": moved}]
    return {"defaults": defaults, "overrides": overrides}


def _mappings(words: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Values in words; the last stands for everything above it too."""
    shown = [{"text": said, "color": colour, "index": index} for index, (said, colour) in enumerate(words.values())]
    found: list[dict[str, Any]] = [{"type": "value", "options": {value: each}} for value, each in zip(words, shown, strict=True)]
    found[-1] = {"type": "range", "options": {"from": float([*words][-1]), "to": None, "result": shown[-1]}}
    return found


def _lines(panel: Panel) -> dict[str, Any]:
    drawn: dict[str, Any] = {"lineWidth": 2, "fillOpacity": 0 if panel.log else 8, "showPoints": "never", "spanNulls": False}  # a gap stays one
    drawn["scaleDistribution"] = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
    drawn["thresholdsStyle"] = {"mode": "off" if panel.limit is None else "dashed"}
    if panel.soft_high is not None:
        drawn["axisSoftMax"] = panel.soft_high
    return drawn


def _placed(panels: tuple[Panel, ...], y: int = 0, first: int = 1) -> Iterator[dict[str, Any]]:
    """Panels from left to right and from `y` down, a new row where one does not fit; ids from `first` in the order of reading."""
    x = row_height = 0
    for number, panel in enumerate(panels, first):
        if x + panel.width > WIDTH:
            x, y, row_height = 0, y + row_height, 0
        made = {
            "id": number,
            "type": panel.kind,
            "title": panel.title,
            "description": panel.description,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
            "targets": _targets(panel),
            "options": _options(panel),
            "fieldConfig": _fields(panel),
        }
        if panel.kind == "xychart":  # one table of all queries, a line a moment: a point needs both
            made["transformations"] = [{"id": "joinByField", "options": {"byField": "Time", "mode": "inner"}}]
        yield made
        x, row_height = x + panel.width, max(row_height, panel.height)


def _panels(dashboard: Dashboard) -> list[dict[str, Any]]:
    """All panels; below them a closed row for each value of the dashboard's variable, which Grafana repeats and asks for only where it is opened."""
    placed = list(_placed(dashboard.panels))
    if dashboard.each is not None:
        variable, panels = dashboard.each
        y = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in placed)
        row = {"id": len(placed) + 1, "type": "row", "title": f"{variable.capitalize()} ${variable}", "repeat": variable, "collapsed": True}
        placed.append({**row, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}, "panels": list(_placed(panels, y + 1, len(placed) + 2))})
    return placed


def document(dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard as Grafana imports it; `id` is left to Grafana, `uid` makes a second push an update."""
    counted = {
        "name": "Windows",  # the part of a stage that counts; from Prometheus, so it needs no token
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "blue",
        "expr": f'max by (stage, level, kind) ({m.STAGE.sample}{{{RUN},phase="window"}})',
        "titleFormat": "Window of stage {{stage}}.{{level}} ({{kind}})",
        "step": "5s",
    }
    stages = {
        "name": "Stages",  # as kilocopy/stage_marks.py tells Grafana, with their exact times
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "iconColor": "purple",
        "target": {"type": "tags", "tags": ["kilocopy", "run:$run"], "matchAny": False, "limit": 1000},
    }
    others = {"type": "dashboards", "title": "kilocopy", "tags": ["kilocopy"], "asDropdown": False, "includeVars": True, "keepTime": True}
    return {
        "uid": dashboard.uid,
        "title": f"kilocopy: {dashboard.title}",
        "description": dashboard.description,
        "tags": ["kilocopy"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one cross-hair for all panels
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "links": [others],
        "templating": {"list": variables(dashboard)},
        "annotations": {"list": [counted, stages]},
        "panels": _panels(dashboard),
    }


def links(base: str, start_s: float, end_s: float, variables: dict[str, str]) -> list[tuple[str, str]]:
    """(title, address) of each dashboard at a time range (Unix times, s) and with these variables; `base` ends with a /."""
    asked = {"from": round(1000 * start_s), "to": round(1000 * end_s), **{f"var-{name}": value for name, value in variables.items()}}
    return [(board.title, f"{base}d/{board.uid}?{urlencode(asked)}") for board in DASHBOARDS]


def files() -> dict[Path, str]:
    """Every file that is made from the descriptions, with its text."""
    made = {DIRECTORY / f"{board.uid.removeprefix('kilocopy-')}.json": json.dumps(document(board), indent=2) + "\n" for board in DASHBOARDS}
    return made | {rules.PATH: rules.text()}


def main(argv: list[str] | None = None) -> int:
    """Write the files, or check that they are as written here (exit code 1 where not)."""
    parser = argparse.ArgumentParser(prog="python -m kilocopy.dashboards", description="Grafana dashboards and Prometheus rules.")
    parser.add_argument("--check", action="store_true")
    stale = [path for path, text in files().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if parser.parse_args(argv).check:
        for path in stale:
            print(f"{path}: is not as described; run `python -m kilocopy.dashboards`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
