"""A driver worker's own metrics page for Prometheus, cheap enough to be on always.

Nothing here runs per token, and little per request: finished ones wait for each other and are counted some at a time, their gaps in one numpy
call, and a page is made from plain numbers when it is asked for. The page is served from the worker's own event loop, so making it must be
short: prometheus_client's own writer, which builds each sample's labels anew, takes more than ten times as long.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gevent.pywsgi import WSGIServer

from kilocopy import metrics, price
from kilocopy.metrics import RUN_LABELS
from kilocopy.search import attains
from kilocopy.spec import ClosedStage, Owned, SearchStage, Spec

Values = tuple[str, ...]
WAITING_MAX = 32  # finished requests that are counted in one go


class _Buckets:
    """Counts of a histogram for each set of label values; `sum` is exact, for these come from raw values."""

    def __init__(self, metric: metrics.Metric) -> None:
        self.metric = metric
        self._edges = np.array(metric.buckets)
        self._names = [*(f"{edge:g}" for edge in metric.buckets), "+Inf"]
        self._counts: dict[Values, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros(len(metric.buckets) + 1, np.int64))
        self._sums: dict[Values, float] = defaultdict(float)

    def add(self, labels: Values, values: npt.NDArray[np.float64]) -> None:
        """Count values, in the metric's unit; a value on an edge is inside (le)."""
        if len(values):
            self._counts[labels] += np.bincount(np.searchsorted(self._edges, values, side="left"), minlength=len(self._edges) + 1)
            self._sums[labels] += float(values.sum())

    def add_one(self, labels: Values, value: float) -> None:
        """As `add`, without making an array for one value."""
        self._counts[labels][bisect_left(self.metric.buckets, value)] += 1
        self._sums[labels] += value

    def lines(self, series: Callable[[metrics.Metric, str, Values, str], str]) -> Iterator[str]:
        """The samples in Prometheus' text format; `series` names one of them, its last argument is the bucket's edge."""
        metric = self.metric
        for labels, counts in self._counts.items():
            for edge, count in zip(self._names, np.cumsum(counts).tolist(), strict=True):
                yield f"{series(metric, '_bucket', labels, edge)} {count}\n"
            yield f"{series(metric, '_count', labels, '')} {int(counts.sum())}\n"
            yield f"{series(metric, '_sum', labels, '')} {self._sums[labels]!r}\n"


class Exporter:
    """Serves this worker's metrics at /metrics. `finished` for every row, `sample` once a second."""

    def __init__(self, constant: Mapping[str, str], spec: Spec, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._constant: Values = tuple(constant[name] for name in RUN_LABELS)
        self._spec = spec
        self._open_loop = [_is_open(stage) for stage in spec.stages]
        self._counters: dict[metrics.Metric, dict[Values, float]] = defaultdict(lambda: defaultdict(float))
        self._gauges: dict[metrics.Metric, dict[Values, float]] = defaultdict(dict)
        self._histograms = {m: _Buckets(m) for m in (metrics.TTFT, metrics.ICL, metrics.E2E, metrics.SEND_LAG, metrics.LOOP_LAG)}
        self._state_prices()
        self._waiting: list[tuple[Mapping[str, Any], npt.NDArray[np.uint32]]] = []  # finished, and not counted yet
        self._names: dict[tuple[str, str, Values, str], str] = {}
        self._server = WSGIServer((host, port), self._answer, log=None)
        self._server.start()
        self.port: int = self._server.server_port

    def _state_prices(self) -> None:
        """What the recording rules need for $/page: the spec's prices, as gauges, so that no rule holds a number."""
        spec, prices = self._spec, self._spec.prices
        self._gauges[metrics.PAGE_WORDS][()] = spec.page.words
        self._gauges[metrics.DEVICES][(spec.cluster.hardware.kind,)] = spec.cluster.devices
        self._gauges[metrics.USD_PER_DEVICE_HOUR][(prices.hardware.kind,)] = price.usd_per_device_hour(spec, "mid")
        self._gauges[metrics.PUE][()] = prices.pue.value
        self._gauges[metrics.SLO_QUANTILE][()] = spec.slo.quantile
        if isinstance(prices.hardware, Owned):
            self._gauges[metrics.USD_PER_KWH][()] = prices.electricity_usd_per_kwh.value

    def finished(self, row: Mapping[str, Any], gaps_us: npt.NDArray[np.uint32]) -> None:
        """A row of records.REQUESTS: counted under its stage and outcome, at the next page at the latest; latencies of ok rows only."""
        self._waiting.append((row, gaps_us))
        if len(self._waiting) >= WAITING_MAX:
            self._count()

    def _count(self) -> None:
        waiting, self._waiting = self._waiting, []
        gaps_us: dict[Values, list[npt.NDArray[np.uint32]]] = defaultdict(list)
        for row, gaps in waiting:
            if self._count_one(row):
                gaps_us[(str(row["stage"]),)].append(gaps)
        for stage, parts in gaps_us.items():
            self._histograms[metrics.ICL].add(stage, np.concatenate(parts) / 1e6)

    def _count_one(self, row: Mapping[str, Any]) -> bool:
        """Count all of a row but its gaps. Returns whether they count."""
        stage = (str(row["stage"]),)
        self._counters[metrics.REQUESTS][(*stage, row["outcome"])] += 1
        open_loop = self._open_loop[row["stage"]]
        if row["outcome"] != "cancelled":
            self._counters[metrics.SLO_JUDGED][stage] += 1
            held = row["outcome"] == "ok" and attains(row, self._spec.slo, from_scheduled=open_loop, samples=self._spec.workload.samples)
            self._counters[metrics.SLO_ATTAINED][stage] += held
        if row["sent_ns"] is not None:
            self._histograms[metrics.SEND_LAG].add_one(stage, (row["sent_ns"] - row["scheduled_ns"]) / 1e9)
        if row["outcome"] != "ok":
            return False
        begun_ns = row["scheduled_ns"] if open_loop else row["sent_ns"]
        self._counters[metrics.OUTPUT_TOKENS][stage] += row["output_tokens"]
        self._counters[metrics.PROMPT_TOKENS][stage] += row["prompt_tokens"] or 0
        self._counters[metrics.OUTPUT_WORDS][stage] += row["output_words"]
        if row["first_token_ns"] is not None:
            self._histograms[metrics.TTFT].add_one(stage, (row["first_token_ns"] - begun_ns) / 1e9)
            self._histograms[metrics.E2E].add_one(stage, (row["last_token_ns"] - begun_ns) / 1e9)
        return row["first_token_ns"] is not None

    def sample(
        self, *, stage: int, level: int, phase: str, copies_asked: float | None, in_flight: int, sent: int, events: int,
        loop_lag_us: Sequence[int], cpu_s: float, rss_bytes: int,
    ) -> None:  # fmt: skip
        """The process as it is now. `stage` is -1 between stages; counters are totals over the run."""
        self._gauges[metrics.STAGE].clear()
        if stage >= 0:
            # A counter that starts above zero would lose its first step to `rate`.
            self._counters[metrics.REQUESTS][str(stage), "ok"] += 0
            for counter in (metrics.OUTPUT_TOKENS, metrics.PROMPT_TOKENS, metrics.OUTPUT_WORDS, metrics.SLO_JUDGED, metrics.SLO_ATTAINED):
                self._counters[counter][(str(stage),)] += 0
            kind = self._spec.stages[stage].arrival
            self._gauges[metrics.STAGE][str(stage), str(level), phase, kind] = 1
        self._gauges[metrics.COPIES_ASKED].clear()
        if stage >= 0 and copies_asked is not None:
            self._gauges[metrics.COPIES_ASKED][()] = copies_asked
        self._gauges[metrics.IN_FLIGHT][()] = in_flight
        self._gauges[metrics.RSS][()] = rss_bytes
        for metric, total in ((metrics.SENT, sent), (metrics.EVENTS, events), (metrics.CPU, cpu_s)):
            self._counters[metric][()] = total
        self._histograms[metrics.LOOP_LAG].add((), np.asarray(loop_lag_us, dtype=np.float64) / 1e6)

    def page(self) -> bytes:
        """Everything as it is at this moment, in Prometheus' text format. Names with labels are made once: they are most of the work."""
        self._count()
        lines: list[str] = []
        for metric, counted in self._counters.items():
            lines.append(_head(metric))
            lines += [f"{self._series(metric, '_total', labels)} {value!r}\n" for labels, value in counted.items()]
        for metric, held in self._gauges.items():
            lines.append(_head(metric))
            lines += [f"{self._series(metric, '', labels)} {value!r}\n" for labels, value in held.items() if not math.isnan(value)]
        for histogram in self._histograms.values():
            lines.append(_head(histogram.metric))
            lines += histogram.lines(self._series)
        return "".join(lines).encode()

    def _series(self, metric: metrics.Metric, suffix: str, labels: Values, edge: str = "") -> str:
        key = (metric.name, suffix, labels, edge)
        name = self._names.get(key)
        if name is None:
            pairs = [*zip(RUN_LABELS, self._constant, strict=True), *zip(metric.labels, labels, strict=True)]
            pairs += [("le", edge)] if edge else []
            named = ",".join(f'{label}="{_escaped(value)}"' for label, value in pairs)
            name = f"{metric.name}{suffix}{{{named}}}"
            self._names[key] = name
        return name

    def _answer(self, environ: Mapping[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """WSGI: the page at /metrics, and nothing else."""
        found = environ["PATH_INFO"] == "/metrics"
        start_response("200 OK" if found else "404 Not Found", [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")])
        return [self.page() if found else b"the metrics page is /metrics\n"]

    def close(self) -> None:
        """Stop listening."""
        self._server.stop(timeout=0)


def _head(metric: metrics.Metric) -> str:
    name = f"{metric.name}_total" if metric.kind == "counter" else metric.name
    return f"# HELP {name} {metric.help}\n# TYPE {name} {metric.kind}\n"


def _escaped(value: str) -> str:
    """A label's value as the text format wants it."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _is_open(stage: Any) -> bool:
    return stage.over == "rate_per_s" if isinstance(stage, SearchStage) else not isinstance(stage, ClosedStage)


def write_file_sd(path: Path, targets: Sequence[str], labels: Mapping[str, str]) -> None:
    """Write one group of targets as Prometheus' file_sd wants it, in one step. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([{"targets": list(targets), "labels": dict(labels)}]) + "\n", encoding="utf-8")
    temporary.replace(path)
