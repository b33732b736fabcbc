"""From raw records to the numbers of each stage: which part counts, what arrived in it, how fast, and what the numbers are worth.

Three ideas carry this module. *Tokens count where they arrive*: a stream that straddles an edge of the window gives the window only
the tokens that came inside it, so throughput neither gains nor loses at the edges. *Every number has a second way to it*: the
servers' own counters (where these disagree, the stage is void), Little's law, the gauges of running sequences (these are flagged). *Latency is as good
as the clock of the driver*: a driver that woke up late stamped late, so its percentiles are withheld while the throughput stands.

All times are seconds since the run's first event (whole nanoseconds are subtracted first, so shifting a run changes nothing).
Nothing here loops over tokens: the tokens of a stage are one numpy array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import stdtr, stdtrit

from kilocopy import records, summary
from kilocopy.spec import ClosedStage, PlainStage, SearchStage, Slo, Spec
from kilocopy.summary import Check, Estimate, Percentiles, Reason

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

BATCHES = 20  # batch means: enough for the t quantile, few enough that a batch outlasts the correlation of tokens
BATCHED_WINDOW_S_MIN = 10.0
COPIES_FRACTION_MIN = 0.98
TOKENS_LIMIT = 0.01
LITTLE_LIMIT = 0.05
COPIES_LIMIT = 0.10
DRIFT_LIMIT = 0.20
DRIFT_P_VALUE = 0.05
STEADY_BINS_MIN = 4
LAG_S_MAX = 0.005
LAG_ITL_FRACTION = 0.10
BUNCHED_GAP_FRACTION = 0.10  # a gap under this share of the median gap, and under 1 ms, is near zero
BUNCHED_GAP_S = 0.001
BUNCHED_SHARE_MAX = 0.05
FEW_STREAMS = 100
PROBE_S = 0.010  # the driver probes its loop this often (loadtests/recorder.py)
VALUES_MAX = 2000
HUMAN_WPM = (238, 150, 600)  # reading (Brysbaert 2019), speech, thought at 10 words/s


# ---------------------------------------------------------------------------------------------------------------- the records


@dataclass(frozen=True)
class Streams:
    """Requests as columns, one entry each; what was never recorded is NaN. `gaps_s` holds the gaps of all of them in a row."""

    stage: Ints
    level: Ints
    copy: Ints
    scheduled_s: Floats
    sent_s: Floats
    first_s: Floats
    last_s: Floats
    finished_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    output_words: Floats
    chunks: Floats
    outcome: npt.NDArray[np.str_]
    gap_counts: Ints
    gaps_s: Floats

    def where(self, mask: Mask) -> Streams:
        """The streams that the mask keeps, with their gaps."""
        kept = {name: value[mask] for name, value in vars(self).items() if name != "gaps_s"}
        return Streams(**kept, gaps_s=self.gaps_s[np.repeat(mask, self.gap_counts)])

    @property
    def ok(self) -> Mask:
        """Which ended well."""
        return np.asarray(self.outcome == "ok", dtype=np.bool_)

    @property
    def failed(self) -> Mask:
        """Which ended in a typed error; a stream cancelled by the driver is neither ok nor failed."""
        return ~np.isin(self.outcome, ["ok", "cancelled", "dropped"])

    def within(self, start_s: float, end_s: float) -> Mask:
        """Which were sent and finished inside a window."""
        return np.asarray((self.sent_s >= start_s) & (self.finished_s <= end_s), dtype=np.bool_)

    def arrivals(self) -> tuple[Floats, Floats]:
        """When each chunk came, and how many tokens it stands for: the request's output tokens spread over its chunks."""
        seen = self.where(~np.isnan(self.first_s))
        counts = seen.gap_counts + 1
        starts = np.cumsum(counts) - counts
        steps = np.zeros(int(counts.sum()))
        later = np.ones(len(steps), dtype=bool)
        later[starts] = False
        steps[later] = seen.gaps_s
        elapsed = np.cumsum(steps)
        times_s = elapsed - np.repeat(elapsed[starts], counts) + np.repeat(seen.first_s, counts)
        tokens = np.where(np.isnan(seen.output_tokens), counts, seen.output_tokens)
        return times_s, np.repeat(tokens / counts, counts)


@dataclass(frozen=True)
class Samples:
    """Scraped samples of the servers: one entry per value."""

    time_s: Floats
    target: npt.NDArray[np.object_]
    name: npt.NDArray[np.object_]
    labels: npt.NDArray[np.object_]
    value: Floats


@dataclass(frozen=True)
class Meters:
    """Cumulative joules of the energy meters: one entry per reading."""

    time_s: Floats
    device: npt.NDArray[np.object_]
    boundary: npt.NDArray[np.object_]
    energy_j: Floats


@dataclass(frozen=True)
class Lags:
    """How late the driver's event loop woke, per probe, at the time of the row that carries it."""

    time_s: Floats
    lag_s: Floats


@dataclass(frozen=True)
class Recording:
    """Everything that a run directory recorded, on one clock."""

    events: list[dict[str, Any]]
    streams: Streams
    lags: Lags
    server: Samples
    energy: Meters
    end_s: float


class _Clock:
    """One time axis for all hosts: monotonic clocks differ from host to host, so a foreign host's times go over the wall clock.

    On the host of the first event nothing is shifted; its monotonic clock is exact and the wall clock may be stepped.
    """

    def __init__(self, run_dir: Path, events: Sequence[dict[str, Any]]) -> None:
        self._hosts: dict[str, str] = {}
        for kind in records.SCHEMAS:
            for batch in records.batches(run_dir, kind):
                meta = _text(batch.schema.metadata)
                self._hosts.setdefault(meta.get("process", ""), meta.get("host", ""))
        first = events[0] if events else {}
        self._home = self._hosts.get(str(first.get("process")))
        self._offset_ns = int(first["wall_ns"]) - int(first["time_ns"]) if "wall_ns" in first else 0

    def of_file(self, metadata: dict[bytes, bytes] | None) -> int:
        """Nanoseconds to add to the times of a file with this metadata."""
        meta = _text(metadata)
        if self._home is None or meta.get("host", self._home) == self._home or "wall_ns" not in meta:
            return 0
        return int(meta["wall_ns"]) - int(meta["perf_ns"]) - self._offset_ns

    def of_event(self, event: dict[str, Any]) -> int:
        """Nanoseconds to add to the time of an event."""
        host = self._hosts.get(str(event.get("process")), self._home)
        if self._home is None or host == self._home or "wall_ns" not in event:
            return 0
        return int(event["wall_ns"]) - int(event["time_ns"]) - self._offset_ns


def _text(metadata: dict[bytes, bytes] | None) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (metadata or {}).items()}


def load(run_dir: Path) -> Recording:
    """Read every whole record of a run directory. Missing kinds are empty, torn tails are ignored."""
    events = records.read_events(run_dir)
    clock = _Clock(run_dir, events)
    tables = {kind: _table(run_dir, kind, clock) for kind in records.SCHEMAS}
    shifted = [event | {"time_ns": int(event["time_ns"]) + clock.of_event(event)} for event in events]
    zero_ns = _zero_ns(shifted, tables["requests"])
    timed = sorted((event | {"t_s": (event["time_ns"] - zero_ns) / 1e9} for event in shifted), key=lambda event: event["t_s"])
    streams = _streams(tables["requests"], zero_ns)
    lags = _lags(tables["driver"], zero_ns)
    ends = [np.array([event["t_s"] for event in timed]), streams.finished_s[~np.isnan(streams.finished_s)], lags.time_s]
    return Recording(
        events=timed,
        streams=streams,
        lags=lags,
        server=Samples(**_columns(tables["server"], zero_ns)),
        energy=Meters(**_columns(tables["energy"], zero_ns)),
        end_s=max((float(values.max()) for values in ends if len(values)), default=0.0),
    )


def _table(run_dir: Path, kind: str, clock: _Clock) -> pa.Table:
    """All rows of a kind, on the clock of the first event's host."""
    schema = records.SCHEMAS[kind]
    parts = []
    for batch in records.batches(run_dir, kind):
        shift_ns = clock.of_file(batch.schema.metadata)
        columns = {field.name: _column(batch, field) for field in schema}
        if shift_ns:
            columns |= {name: pc.add(column, pa.scalar(shift_ns, pa.int64())) for name, column in columns.items() if name.endswith("_ns")}
        parts.append(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))
    return pa.Table.from_batches(parts, schema)


def _column(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
    """A column of a batch; one that records of an older version do not have is 0 throughout."""
    if field.name in batch.schema.names:
        return batch.column(field.name)
    return pa.array(np.zeros(len(batch)), pa.float64()).cast(field.type)


def _zero_ns(events: Sequence[dict[str, Any]], requests: pa.Table) -> int:
    """The origin of time: the first event, else the first request."""
    if events:
        return min(int(event["time_ns"]) for event in events)
    first = pc.min(requests.column("scheduled_ns")).as_py()
    return int(first) if first is not None else 0


def _seconds(column: pa.ChunkedArray, zero_ns: int) -> Floats:
    """Seconds since the origin: integers first, so that nothing is rounded but the result. Null becomes NaN."""
    since = pc.subtract(column, pa.scalar(zero_ns, pa.int64()))
    return np.asarray(since.to_numpy(zero_copy_only=False), dtype=np.float64) / 1e9


def _columns(table: pa.Table, zero_ns: int) -> dict[str, Any]:
    """Columns by name; a time in ns becomes seconds."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        if name.endswith("_ns"):
            columns[name.removesuffix("_ns") + "_s"] = _seconds(table.column(name), zero_ns)
        else:
            columns[name] = table.column(name).to_numpy(zero_copy_only=False)
    return columns


def _streams(table: pa.Table, zero_ns: int) -> Streams:
    gaps = table.column("gaps_us")
    columns = _columns(table.drop_columns(["gaps_us", "outcome"]), zero_ns)
    return Streams(
        stage=np.asarray(columns["stage"], dtype=np.int64),
        level=np.nan_to_num(np.asarray(columns["level"], dtype=np.float64)).astype(np.int64),
        copy=np.asarray(columns["copy"], dtype=np.int64),
        scheduled_s=columns["scheduled_s"],
        sent_s=columns["sent_s"],
        first_s=columns["first_token_s"],
        last_s=columns["last_token_s"],
        finished_s=columns["finished_s"],
        **{name: np.asarray(columns[name], dtype=np.float64) for name in ("prompt_tokens", "output_tokens", "output_words", "chunks")},
        outcome=np.asarray(table.column("outcome").to_pylist(), dtype=np.str_),
        gap_counts=np.asarray(pc.fill_null(pc.list_value_length(gaps), 0).to_numpy(), dtype=np.int64),
        gaps_s=np.asarray(pc.list_flatten(gaps).to_numpy(), dtype=np.float64) / 1e6,
    )


def _lags(table: pa.Table, zero_ns: int) -> Lags:
    lags = table.column("loop_lag_us")
    counts = pc.fill_null(pc.list_value_length(lags), 0).to_numpy()
    times_s = np.repeat(_seconds(table.column("time_ns"), zero_ns), counts)
    return Lags(times_s, np.asarray(pc.list_flatten(lags).to_numpy(), dtype=np.float64) / 1e6)


# ------------------------------------------------------------------------------------------------------- stages and windows


@dataclass(frozen=True)
class Span:
    """When a level of a stage began, stopped asking, was drained and settled, over all driver processes; and when the next one began.

    `level` counts the loads that a search tried and `load` is what was asked then; elsewhere they are 0 and None.
    """

    index: int
    level: int
    load: float | None
    start_s: float
    stop_s: float | None
    drained_s: float | None
    settled_s: float | None
    next_s: float

    @property
    def cut_off(self) -> bool:
        """Whether it was killed before its last stream ended: then rows of open streams are missing."""
        return self.stop_s is None or self.drained_s is None


def spans(events: Sequence[dict[str, Any]]) -> list[Span]:
    """The levels of the stages that began, in order of time.

    Earliest start and earliest stop, latest drain: a level is steady only while every process keeps asking. A process that
    began a level and did not drain it was killed, and its level with it.
    """
    marks: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = {}
    for event in events:
        if event["event"].startswith("stage_"):
            place = int(event["stage"]), int(event.get("level") or 0)
            marks.setdefault(place, {}).setdefault(event["event"], []).append(event)
    found = [_span(place, mark) for place, mark in marks.items() if "stage_start" in mark]
    found.sort(key=lambda span: span.start_s)
    following = [*(span.start_s for span in found[1:]), np.inf][: len(found)]
    return [replace(span, next_s=next_s) for span, next_s in zip(found, following, strict=True)]


def _span(place: tuple[int, int], marks: dict[str, list[dict[str, Any]]]) -> Span:
    def times(name: str) -> list[float]:
        return [event["t_s"] for event in marks.get(name, [])]

    begun, drained = ({event.get("process") for event in marks.get(name, [])} for name in ("stage_start", "stage_drained"))
    load = marks["stage_start"][0].get("load")
    return Span(
        index=place[0],
        level=place[1],
        load=None if load is None else float(load),
        start_s=min(times("stage_start")),
        stop_s=min(times("stage_stop_asking"), default=None),
        drained_s=max(times("stage_drained"), default=None) if begun <= drained else None,
        settled_s=max(times("stage_settled"), default=None),
        next_s=np.inf,
    )


def played(spec: Spec, span: Span) -> PlainStage:
    """The plain stage that was played: the spec's, or the one that a search made of its load."""
    asked = spec.stages[span.index]
    if isinstance(asked, SearchStage):
        return asked.at(asked.start if span.load is None else span.load)
    return asked


def find_window(asked: PlainStage, span: Span, streams: Streams, last_s: float) -> summary.Window | Reason:
    """The part of a stage that counts, or the reason why there is none."""
    return _closed_window(asked, span, streams, last_s) if isinstance(asked, ClosedStage) else _timed_window(asked, span, last_s)


def _timed_window(asked: PlainStage, span: Span, last_s: float) -> summary.Window | Reason:
    """An open-loop stage counts from the end of its warm-up until it stops asking."""
    start_s, end_s = span.start_s + asked.warmup_s, last_s if span.stop_s is None else span.stop_s
    if end_s <= start_s:
        late = f"the window would begin at {start_s:.1f} s, but the stage stopped asking at {end_s:.1f} s"
        return Reason(code="no-steady-state", sentence=f"The stage was too short: {late}. Give it a longer duration_s.")
    end = "the stage stopped asking" if span.stop_s is not None else "the last record (the stage was cut off)"
    return summary.Window(start_s=start_s, end_s=end_s, duration_s=end_s - start_s, rule=f"from the end of the warm-up until {end}")


def _closed_window(asked: ClosedStage, span: Span, streams: Streams, last_s: float) -> summary.Window | Reason:
    """The part of a closed-loop stage that counts, or the reason why there is none.

    It begins when the warm-up is over and every copy has its first token; it ends when the first copy stops asking.
    """
    reached = streams.where(~np.isnan(streams.first_s))
    served = np.unique(reached.copy)
    if len(served) < asked.copies:
        silent = f"{asked.copies - len(served)} of {asked.copies} copies never got a token"
        return Reason(code="no-tokens", sentence=f"{silent}, so there is no time in which all of them ran.")
    firsts_s = np.full(int(served.max()) + 1, np.inf)
    np.minimum.at(firsts_s, reached.copy, reached.first_s)
    everybody_s = float(firsts_s[served].max())
    warm_s = span.start_s + asked.ramp_s + asked.warmup_s
    start_s = max(warm_s, everybody_s)
    end_s = last_s if span.stop_s is None else span.stop_s
    if end_s <= start_s:
        late = f"the window would begin at {start_s:.1f} s, but the stage stopped asking at {end_s:.1f} s"
        return Reason(code="no-steady-state", sentence=f"The stage was too short: {late}. Give it a longer duration_s.")
    begin = "the last copy's first token" if everybody_s > warm_s else "the end of ramp and warm-up"
    end = "the first copy stopped asking" if span.stop_s is not None else "the last record (the stage was cut off)"
    return summary.Window(start_s=start_s, end_s=end_s, duration_s=end_s - start_s, rule=f"from {begin} until {end}")


# -------------------------------------------------------------------------------------------------------------- arithmetic


def percentiles(values: Floats) -> Percentiles | None:
    """Percentiles of raw values, numpy's linear interpolation; None without values."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    p50, p90, p99 = np.percentile(known, [50, 90, 99])
    return Percentiles(p50=float(p50), p90=float(p90), p99=float(p99), mean=float(known.mean()), n=len(known))


def sample(values: Floats) -> list[float]:
    """At most VALUES_MAX values, evenly spaced in sorted order, for plots."""
    ordered = np.sort(values[~np.isnan(values)])
    if len(ordered) > VALUES_MAX:
        ordered = ordered[np.linspace(0, len(ordered) - 1, VALUES_MAX).round().astype(np.int64)]
    return [float(value) for value in ordered]


def batch_means(times_s: Floats, weights: Floats, start_s: float, end_s: float) -> Estimate:
    """A rate with its 95 % interval: the window in 20 batches, mean +- t(0.975, 19) s / sqrt(20).

    Source: Law, Simulation Modeling and Analysis, section 9.5.3 (batch means). Under 10 s there is no interval.
    """
    rate = float(weights.sum()) / (end_s - start_s)
    if end_s - start_s < BATCHED_WINDOW_S_MIN:
        return Estimate(value=rate)
    totals, _ = np.histogram(times_s, bins=BATCHES, range=(start_s, end_s), weights=weights)
    rates = totals / ((end_s - start_s) / BATCHES)
    half = float(stdtrit(BATCHES - 1, 0.975) * rates.std(ddof=1) / np.sqrt(BATCHES))
    return Estimate(value=rate, low=max(0.0, rate - half), high=rate + half)


def busy_s(starts_s: Floats, ends_s: Floats, at_s: Floats) -> Floats:
    """Seconds of all intervals together that lie before each of the times: the integral of how many are open."""
    return _before(starts_s, at_s) - _before(ends_s, at_s)


def _before(edges_s: Floats, at_s: Floats) -> Floats:
    """Sum of max(0, t - edge) over the edges, for each t."""
    ordered = np.sort(edges_s)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    count = np.searchsorted(ordered, at_s)
    return np.asarray(count * at_s - sums[count], dtype=np.float64)


def mean_in_flight(streams: Streams, start_s: float, end_s: float) -> float:
    """The exact time-mean of requests in flight (sent and not finished), errors too."""
    open_ = streams.where(~np.isnan(streams.sent_s) & ~np.isnan(streams.finished_s))
    before, after = busy_s(open_.sent_s, open_.finished_s, np.array([start_s, end_s]))
    return float(after - before) / (end_s - start_s)


# ---------------------------------------------------------------------------------------------------------- the servers' side


def gauge(server: Samples, name: str) -> dict[str, tuple[Floats, Floats]]:
    """A gauge per target over its scrapes, summed over label sets; a scrape without it (gauges vanish when idle) counts as 0."""
    mine = server.name == name
    if not mine.any():
        return {}
    series = {}
    for target in sorted(set(server.target)):
        here = server.target == target
        times_s = np.unique(server.time_s[here])
        values = np.zeros(len(times_s))
        np.add.at(values, np.searchsorted(times_s, server.time_s[here & mine]), server.value[here & mine])
        series[str(target)] = (times_s, values)
    return series


def gauge_mean(server: Samples, names: Sequence[str], start_s: float, end_s: float) -> float | None:
    """Time-weighted mean of gauges over the window, summed over targets and names; None without a sample in the window."""
    total, seen = 0.0, False
    for name in names:
        for times_s, values in gauge(server, name).values():
            inside = (times_s >= start_s) & (times_s <= end_s)
            if not inside.any():
                continue
            seen = True
            at_s = np.concatenate([[start_s], times_s[inside], [end_s]])
            total += float(np.trapezoid(np.interp(at_s, times_s, values), at_s)) / (end_s - start_s)
    return total if seen else None


def rise(values: Floats) -> float:
    """How much a counter rose over its samples; where it falls it was reset and began again at 0 (as Prometheus' `increase`)."""
    steps = np.diff(values)
    return float(np.where(steps < 0, values[1:], steps).sum())


def counter_increase(server: Samples, name: str, span: Span) -> float | str:
    """How much a counter rose over a stage, summed over targets and label sets; a sentence where that cannot be said.

    From the last scrape before the stage began to the first one after it settled, else to the last one before the next stage.
    """
    if not (server.name == name).any():
        return f"the servers' {name} was not recorded"
    if span.drained_s is None:
        return "the stage was cut off before its streams ended"
    total, based = 0.0, False
    for target in sorted(set(server.target[server.name == name])):
        here = server.target == target
        scrapes_s = np.unique(server.time_s[here])
        end_s = _closing_scrape_s(scrapes_s, span)
        if end_s is None:
            return f"{target} was not scraped between the end of the stage and the next"
        scraped_before = bool(scrapes_s[0] <= span.start_s)
        based = based or scraped_before
        for labels in sorted(set(server.labels[here & (server.name == name)])):
            mine = here & (server.name == name) & (server.labels == labels)
            total += _series_rise(server.time_s[mine], server.value[mine], span.start_s, end_s, scraped_before)
    return total if based else "no server was scraped before the stage began"


def _closing_scrape_s(scrapes_s: Floats, span: Span) -> float | None:
    """The scrape that closes a stage's account."""
    until = scrapes_s < span.next_s
    if span.settled_s is not None and (settled := scrapes_s[until & (scrapes_s >= span.settled_s)]).size:
        return float(settled[0])
    drained = scrapes_s[until & (scrapes_s >= (span.drained_s or np.inf))]
    return float(drained[-1]) if drained.size else None


def _series_rise(times_s: Floats, values: Floats, start_s: float, end_s: float, scraped_before: bool) -> float:
    """Rise of one series. One that was born during the stage began at 0; one of a server first seen later, at its first value."""
    at_s, scrape = np.unique(times_s, return_inverse=True)
    series = np.asarray(np.bincount(scrape, weights=values), dtype=np.float64)  # what the labels do not tell apart is one
    base = int(np.searchsorted(at_s, start_s, side="right")) - 1
    last = int(np.searchsorted(at_s, end_s, side="right"))
    if base >= 0:
        return rise(series[base:last])
    return rise(np.concatenate([[0.0], series[:last]]) if scraped_before else series[:last])


# ----------------------------------------------------------------------------------------------------------- identity checks


def _check(name: str, left: float, right: float, limit: float, sentence: str) -> Check:
    """Two ways to one number; the deviation is a fraction of the larger, so that it is never over 1."""
    larger = max(abs(left), abs(right))
    deviation = abs(left - right) / larger if larger else 0.0
    return Check(
        name=name,
        left=left,
        right=right,
        deviation_fraction=deviation,
        limit_fraction=limit,
        outcome="passed" if deviation <= limit else "failed",
        sentence=f"{sentence}: {100 * deviation:.2f} % apart (limit {100 * limit:g} %).",
    )


def _unchecked(name: str, left: float | None, limit: float, why: str) -> Check:
    return Check(
        name=name,
        left=left,
        right=None,
        deviation_fraction=None,
        limit_fraction=limit,
        outcome="not_checked",
        sentence=f"Not checked: {why}.",
    )


def check_tokens(streams: Streams, server: Samples, span: Span) -> Check:
    """Tokens of the whole stage, as the client was told and as the servers counted; nothing straddles an edge here."""
    name = "client_tokens_vs_server"
    counted = float(np.nansum(streams.output_tokens[streams.ok]))
    broken = float(np.nansum(streams.chunks[~streams.ok]))
    if span.cut_off:
        why = "the stage was cut off, so streams are missing from the client's count"
        return _unchecked(name, counted + broken, TOKENS_LIMIT, why)
    served = counter_increase(server, "generation_tokens_total", span)
    if isinstance(served, str):
        return _unchecked(name, counted + broken, TOKENS_LIMIT, served)
    told = f"{counted:.0f} output tokens" + (f" (and {broken:.0f} chunks of broken streams)" if broken else "")
    sentence = f"Over the whole stage the client was told of {told}, the servers counted {served:.0f}"
    return _check(name, counted + broken, served, TOKENS_LIMIT, sentence)


def check_littles_law(streams: Streams, window: summary.Window, in_flight: float) -> Check:
    """L = lambda x W (Little 1961): what finishes per second times how long it was there, against what is in flight."""
    done = streams.where((streams.finished_s > window.start_s) & (streams.finished_s <= window.end_s) & ~np.isnan(streams.sent_s))
    if not len(done.stage):
        return _unchecked("littles_law", in_flight, LITTLE_LIMIT, "no request finished inside the window")
    per_s = len(done.stage) / window.duration_s
    residence_s = float((done.finished_s - done.sent_s).mean())
    sentence = f"{per_s:.3g} requests/s x {residence_s:.3g} s = {per_s * residence_s:.2f}, in flight {in_flight:.2f}"
    return _check("littles_law", per_s * residence_s, in_flight, LITTLE_LIMIT, sentence)


def check_copies(in_flight: float, server: Samples, window: summary.Window) -> Check:
    """Copies in flight at the driver against running + waiting at the servers."""
    name = "copies_client_vs_server"
    held = gauge_mean(server, ["num_requests_running", "num_requests_waiting"], window.start_s, window.end_s)
    if held is None:
        return _unchecked(name, in_flight, COPIES_LIMIT, "the servers' running and waiting were not recorded in the window")
    return _check(name, in_flight, held, COPIES_LIMIT, f"The driver had {in_flight:.2f} copies in flight, the servers held {held:.2f}")


# ---------------------------------------------------------------------------------------------------------------- the verdict


def unsteady(times_s: Floats, weights: Floats, window: summary.Window) -> str | None:
    """Why the token rate is not steady, in words; None if it is, or if the window has too few seconds to say.

    Two tests on the rate per second: the halves of the window differ by over 20 % of the mean, or a linear trend that is
    significant (p < 0.05, two-sided t on the correlation) moves by over 20 % of the mean across the window.
    """
    bins = int(window.duration_s)
    if bins < STEADY_BINS_MIN or not weights.sum():
        return None
    totals, edges = np.histogram(times_s, bins=bins, range=(window.start_s, window.end_s), weights=weights)
    rates = np.asarray(totals / (edges[1] - edges[0]), dtype=np.float64)
    mean = float(weights.sum()) / window.duration_s
    middle_s = (window.start_s + window.end_s) / 2
    first = float(weights[times_s < middle_s].sum()) / (window.duration_s / 2)
    second = float(weights[times_s >= middle_s].sum()) / (window.duration_s / 2)
    if abs(second - first) > DRIFT_LIMIT * mean:
        return f"the first half of the window made {first:.4g} tokens/s, the second {second:.4g}: over {100 * DRIFT_LIMIT:g} % apart"
    x = np.arange(bins, dtype=np.float64) - (bins - 1) / 2
    slope = float((x * rates).sum() / (x * x).sum())
    drift = slope * bins
    if abs(drift) > DRIFT_LIMIT * mean and _trend_p_value(x, rates, slope) < DRIFT_P_VALUE:
        return f"the token rate drifted by {100 * drift / mean:+.0f} % of its mean over the window"
    return None


def _trend_p_value(x: Floats, y: Floats, slope: float) -> float:
    """Two-sided p value of a least-squares slope."""
    residual = y - y.mean() - slope * x
    error = np.sqrt(float((residual**2).sum()) / (len(x) - 2) / float((x * x).sum()))
    return float(2 * stdtr(len(x) - 2, -abs(slope) / error)) if error else 0.0


def error_fraction(streams: Streams, start_s: float, end_s: float) -> float:
    """Errors over requests that ended inside the window; those that the driver cancelled count on neither side."""
    ended = (streams.finished_s > start_s) & (streams.finished_s <= end_s)
    failed, ok = int((ended & streams.failed).sum()), int((ended & streams.ok).sum())
    return failed / (failed + ok) if failed + ok else 0.0


def _error_reasons(streams: Streams, start_s: float, end_s: float, slo: Slo) -> list[Reason]:
    fraction = error_fraction(streams, start_s, end_s)
    if fraction <= slo.error_fraction_max:
        return []
    limit = f"slo.error_fraction_max is {100 * slo.error_fraction_max:g} %"
    return [Reason(code="too-many-errors", sentence=f"{100 * fraction:.2f} % of the requests that ended failed ({limit}).")]


def _copies_reasons(streams: Streams, window: summary.Window, asked: int) -> list[Reason]:
    """Too few copies in flight: the driver's fault, unless errors kept them waiting to ask again."""
    in_flight = mean_in_flight(streams, window.start_s, window.end_s)
    if in_flight >= COPIES_FRACTION_MIN * asked:
        return []
    short = f"{in_flight:.2f} of {asked} copies were in flight (at least {100 * COPIES_FRACTION_MIN:g} % are needed)"
    if error_fraction(streams, window.start_s, window.end_s) > 0:
        return [Reason(code="too-many-errors", sentence=f"Errors kept copies from running: {short}.")]
    return [Reason(code="driver-too-slow", sentence=f"The driver did not keep up: {short} and nothing failed.")]


def _lag_reasons(lags: Lags, latency: summary.Latency, window: summary.Window) -> list[Reason]:
    """Latency is withheld when the driver woke later than the effect that it measures."""
    lag_s = lag_p99_s(lags, window)
    if lag_s is None:
        return []
    itl_s = latency.itl_s.p50 if latency.itl_s else 0.0
    limit_s = max(LAG_S_MAX, LAG_ITL_FRACTION * itl_s)
    if lag_s <= limit_s:
        return []
    late = f"The driver's event loop woke {1000 * lag_s:.1f} ms late (p99; limit {1000 * limit_s:.1f} ms)"
    return [Reason(code="driver-lag", sentence=f"{late}, so its time stamps are late too.")]


def lag_p99_s(lags: Lags, window: summary.Window) -> float | None:
    """The driver's loop lag in the window; None where it was not recorded."""
    inside = (lags.time_s >= window.start_s) & (lags.time_s <= window.end_s)
    if not inside.any():
        return None
    # A blocked loop cannot probe itself: one probe that came 100 ms late stands for the ten that would have been 100, 90, ... ms late.
    lag_s = lags.lag_s[inside]
    missed = np.floor(lag_s / PROBE_S).astype(np.int64)
    steps = np.arange(missed.sum()) - np.repeat(np.cumsum(missed) - missed, missed) + 1
    return float(np.percentile(np.concatenate([lag_s, np.repeat(lag_s, missed) - steps * PROBE_S]), 99))


def bunched_share(gaps_s: Floats) -> float:
    """Share of gaps between chunks that are near zero: under 10 % of the median gap and under 1 ms."""
    if not len(gaps_s):
        return 0.0
    return float((gaps_s < min(BUNCHED_GAP_FRACTION * float(np.median(gaps_s)), BUNCHED_GAP_S)).mean())


def _bunched(gaps_s: Floats, lags: Lags, window: summary.Window) -> tuple[list[Reason], list[Reason]]:
    """Near-zero gaps as reasons to withhold, or as a note where the driver cannot have made them.

    To bunch two chunks the driver must leave the first unread until the second is there, so it must sleep for most of a gap. A loop
    that woke within half a median gap (p99) did not; then the server, or a proxy, sent them together.
    """
    share = bunched_share(gaps_s)
    if share <= BUNCHED_SHARE_MAX:
        return [], []
    lag_s = lag_p99_s(lags, window)
    said = f"{100 * share:.1f} % of the gaps between chunks are near zero"
    if lag_s is not None and lag_s < 0.5 * float(np.median(gaps_s)):
        return [], [Reason(code="bunched-by-server", sentence=f"{said}; the driver was awake: the server or a proxy sent them so.")]
    return [Reason(code="bunched-reads", sentence=f"{said} (limit {100 * BUNCHED_SHARE_MAX:g} %): the driver read chunks together.")], []


def _notes(checks: Sequence[Check], window: summary.Window, inside: Streams, lag_s: float | None, shares_host: bool) -> list[Reason]:
    """What a reader should know that does not change the verdict."""
    notes = {check.name.replace("_", "-"): check.sentence for check in checks[1:] if check.outcome == "failed"}
    if checks[0].outcome == "not_checked":
        notes["tokens-not-checked"] = checks[0].sentence
    if window.duration_s < BATCHED_WINDOW_S_MIN:
        notes["short-window"] = f"The window is {window.duration_s:.1f} s: under {BATCHED_WINDOW_S_MIN:g} s there is no interval."
    streams = len(inside.stage)
    if not streams:
        notes["slo-not-judged"] = "No stream was sent and finished inside the window, so the SLO is not judged: lengthen the stage."
    elif streams < FEW_STREAMS:
        notes["few-streams"] = f"Only {streams} streams lie inside the window: their p99 is close to their maximum."
    if lag_s is None:
        notes["driver-lag-unknown"] = "The driver's loop lag was not recorded in the window, so nothing vouches for its clock."
    if shares_host:
        notes["driver-shares-host"] = "The driver ran on the serving host and took some of its time."
    return [Reason(code=code, sentence=sentence) for code, sentence in notes.items()]


def _verdict(voids: list[Reason], withheld: list[Reason], notes: list[Reason]) -> summary.Verdict:
    level = "void" if voids else "latency_withheld" if withheld else "valid"
    return summary.Verdict(level=level, reasons=voids + withheld, notes=notes)  # type: ignore[arg-type]  # the literals above


# ------------------------------------------------------------------------------------------------------------------ a stage


def slo_attainment(inside: Streams, slo: Slo) -> float | None:
    """Share of ok streams that held the speed, (tokens - 1) / (last - first), and the TTFT. One token alone has no speed to miss."""
    if not len(inside.stage):
        return None
    steps = np.maximum(inside.output_tokens - 1, 0)
    fast = steps >= slo.tokens_per_s_per_copy * (inside.last_s - inside.first_s)
    soon = inside.first_s - inside.sent_s <= slo.ttft_s
    return float((fast & soon).mean())


def _words_per_token(streams: Streams, window: summary.Window) -> float | None:
    """Measured on the decoded text of the ok requests that overlap the window."""
    counted = streams.ok & ~np.isnan(streams.output_words) & ~np.isnan(streams.output_tokens)
    counted &= (streams.sent_s < window.end_s) & (streams.finished_s > window.start_s)
    tokens = float(streams.output_tokens[counted].sum())
    return float(streams.output_words[counted].sum()) / tokens if tokens else None


def _throughput(spec: Spec, streams: Streams, window: summary.Window, rate: Estimate, in_flight: float) -> summary.Throughput:
    """What arrived in the window, from the rate at which tokens did."""
    tokens = rate.value * window.duration_s
    words_per_token = _words_per_token(streams, window)
    words = None if words_per_token is None else tokens * words_per_token
    pages = None if words is None else words / spec.page.words
    began = streams.ok & (streams.first_s >= window.start_s) & (streams.first_s < window.end_s)
    ended = streams.ok & (streams.finished_s > window.start_s) & (streams.finished_s <= window.end_s)
    return summary.Throughput(
        output_tokens=tokens,
        prompt_tokens=float(np.nansum(streams.prompt_tokens[began])),
        output_tokens_per_s=rate,
        output_tokens_per_s_per_copy=rate.value / in_flight if in_flight > 0 else None,
        output_tokens_per_s_per_device=rate.value / spec.cluster.devices,
        output_tokens_per_s_per_replica=rate.value / spec.cluster.replicas,
        words_per_token=words_per_token,
        words_per_s=None if words is None else words / window.duration_s,
        pages=pages,
        pages_per_hour=None if pages is None else pages * 3600 / window.duration_s,
        requests_per_s=int(ended.sum()) / window.duration_s,
    )


def _latency(inside: Streams) -> summary.Latency:
    """Percentiles over the ok requests that were sent and finished inside the window."""
    several = inside.output_tokens > 1
    tpot_s = (inside.last_s - inside.first_s)[several] / (inside.output_tokens[several] - 1)
    tokens_per_chunk = np.where(inside.output_tokens > 0, inside.output_tokens, np.nan) / (inside.gap_counts + 1)
    return summary.Latency(
        ttft_s=percentiles(inside.first_s - inside.sent_s),
        tpot_s=percentiles(tpot_s),
        itl_s=percentiles(inside.gaps_s / np.repeat(tokens_per_chunk, inside.gap_counts)),
        icl_s=percentiles(inside.gaps_s),
        e2e_s=percentiles(inside.last_s - inside.sent_s),
        send_lag_s=percentiles(inside.sent_s - inside.scheduled_s),
    )


def _requests(streams: Streams, in_window_ok: int) -> summary.Requests:
    names, counts = np.unique(streams.outcome[streams.failed], return_counts=True)
    return summary.Requests(
        sent=len(streams.stage),
        ok=int(streams.ok.sum()),
        errors={str(name): int(count) for name, count in zip(names, counts, strict=True)},
        cancelled=int((streams.outcome == "cancelled").sum()),
        in_window_ok=in_window_ok,
    )


def _judged(streams: Streams, window: summary.Window, slo: Slo) -> tuple[float | None, bool | None]:
    """The SLO's attainment, and whether it was held: by enough streams, with few enough errors.

    Every ok stream that was sent in the window is judged, also one that outlasted it: the slow ones are the likeliest to.
    """
    sent = (streams.sent_s >= window.start_s) & (streams.sent_s <= window.end_s)
    attainment = slo_attainment(streams.where(streams.ok & sent), slo)
    errors = error_fraction(streams, window.start_s, window.end_s)
    return attainment, None if attainment is None else attainment >= slo.quantile and errors <= slo.error_fraction_max


INTERRUPTED = Reason(code="interrupted", sentence="The stage was cut off: streams in flight then are missing from the records.")


def _end_s(span: Span, recording: Recording) -> float:
    """When the stage was over: drained, else the last record before the next stage."""
    return span.drained_s if span.drained_s is not None else max(span.start_s, min(span.next_s, recording.end_s))


def stage(spec: Spec, recording: Recording, span: Span, shares_host: bool = False) -> summary.Stage:
    """One stage as measured, without its cost."""
    asked = played(spec, span)
    streams = recording.streams.where((recording.streams.stage == span.index) & (recording.streams.level == span.level))
    window = find_window(asked, span, streams, _end_s(span, recording))
    if isinstance(window, summary.Window):
        return _measured(spec, recording, span, streams, window, shares_host=shares_host)
    voids = [INTERRUPTED] if span.cut_off else []
    voids += [window, *_error_reasons(streams, -np.inf, np.inf, spec.slo)]
    return summary.Stage(
        **_identity(span, asked, recording),
        verdict=_verdict(voids, [], []),
        window=None,
        copies=_copies(_copies_asked(asked)),
        throughput=None,
        latency=None,
        ttft_values_s=[],
        icl_values_s=[],
        requests=_requests(streams, 0),
        checks=[check_tokens(streams, recording.server, span)],
        cost=None,
    )


def _identity(span: Span, asked: PlainStage, recording: Recording) -> dict[str, Any]:
    return {"index": span.index, "title": _title(asked), "start_s": span.start_s, "end_s": _end_s(span, recording)}


def _title(asked: PlainStage) -> str:
    if isinstance(asked, ClosedStage):
        return f"closed, {asked.copies} {'copy' if asked.copies == 1 else 'copies'}"
    return asked.arrival


def _copies_asked(asked: PlainStage) -> int | None:
    return asked.copies if isinstance(asked, ClosedStage) else None


def _copies(asked: int | None, **known: Any) -> summary.Copies:
    unknown: dict[str, Any] = {"n_run_client": None, "n_run_server": None, "slo_held": None, "slo_attainment": None, "n_human": {}}
    return summary.Copies(asked=asked, **(unknown | known))


def _measured(
    spec: Spec, recording: Recording, span: Span, streams: Streams, window: summary.Window, *, shares_host: bool
) -> summary.Stage:
    """A stage that has a window."""
    asked, server, lags = played(spec, span), recording.server, recording.lags
    inside = streams.where(streams.ok & streams.within(window.start_s, window.end_s))
    in_flight = mean_in_flight(streams, window.start_s, window.end_s)
    times_s, weights = _tokens_in(streams, window)
    rate = batch_means(times_s, weights, window.start_s, window.end_s)
    throughput = _throughput(spec, streams, window, rate, in_flight)
    checks = [
        check_tokens(streams, server, span),
        check_littles_law(streams, window, in_flight),
        check_copies(in_flight, server, window),
    ]
    latency = _latency(inside)
    bunched, bunched_notes = _bunched(inside.gaps_s, lags, window)
    withheld = _lag_reasons(lags, latency, window) + bunched
    voids = _void_reasons(spec, span, streams, window, checks[0])
    voids += [] if span.cut_off else _steady_reasons(times_s, weights, window)
    notes = _notes(checks, window, inside, lag_p99_s(lags, window), shares_host) + bunched_notes
    attainment, held = (None, None) if withheld else _judged(streams, window, spec.slo)
    return summary.Stage(
        **_identity(span, asked, recording),
        verdict=_verdict(voids, withheld, notes),
        window=window,
        copies=_copies(
            _copies_asked(asked),
            n_run_client=in_flight,
            n_run_server=gauge_mean(server, ["num_requests_running"], window.start_s, window.end_s),
            slo_held=None if voids and held else held,
            slo_attainment=attainment,
            n_human=n_human(throughput.words_per_s),
        ),
        throughput=throughput,
        latency=None if withheld else latency,
        ttft_values_s=[] if withheld else sample(inside.first_s - inside.sent_s),
        icl_values_s=[] if withheld else sample(inside.gaps_s),
        requests=_requests(streams, len(inside.stage)),
        checks=checks,
        cost=None,
    )


def n_human(words_per_s: float | None) -> dict[str, float]:
    """Throughput equivalents: how many humans would read, speak or think as many words, by their words per minute."""
    return {} if words_per_s is None else {str(wpm): words_per_s / (wpm / 60) for wpm in HUMAN_WPM}


def _tokens_in(streams: Streams, window: summary.Window) -> tuple[Floats, Floats]:
    """Arrival times and token weights of the ok streams, inside the window."""
    times_s, weights = streams.where(streams.ok).arrivals()
    counted = (times_s >= window.start_s) & (times_s < window.end_s)
    return times_s[counted], weights[counted]


def _void_reasons(spec: Spec, span: Span, streams: Streams, window: summary.Window, tokens: Check) -> list[Reason]:
    """What leaves a measured stage without a headline, but for its steadiness. A stage cut off has too few rows to blame more."""
    asked = _copies_asked(played(spec, span))
    reasons = [INTERRUPTED] if span.cut_off else [] if asked is None else _copies_reasons(streams, window, asked)
    reasons += _error_reasons(streams, window.start_s, window.end_s, spec.slo)
    if tokens.outcome == "failed":
        reasons.append(Reason(code="counters-disagree", sentence=tokens.sentence))
    return reasons


def _steady_reasons(times_s: Floats, weights: Floats, window: summary.Window) -> list[Reason]:
    if not len(weights):
        return [Reason(code="no-tokens", sentence="No token of a finished stream arrived in the window.")]
    why = unsteady(times_s, weights, window)
    return [Reason(code="no-steady-state", sentence=f"No steady state: {why}.")] if why else []


# --------------------------------------------------------------------------------------------------------------- the timeline


def timeline(recording: Recording, found: Sequence[Span]) -> list[summary.Bin]:
    """The run second by second, from the first event to the last record; tokens of finished streams only."""
    bins = int(np.ceil(recording.end_s))
    if not bins:
        return []
    edges_s = np.arange(bins + 1, dtype=np.float64)
    streams = recording.streams
    times_s, weights = streams.where(streams.ok).arrivals()
    tokens, _ = np.histogram(times_s, bins=edges_s, weights=weights)
    errors, _ = np.histogram(streams.finished_s[streams.failed & ~np.isnan(streams.finished_s)], bins=edges_s)
    open_ = streams.where(~np.isnan(streams.sent_s) & ~np.isnan(streams.finished_s))
    in_flight = np.diff(busy_s(open_.sent_s, open_.finished_s, edges_s))
    middles_s = edges_s[:-1] + 0.5
    stage_of = np.full(bins, -1)
    for span in found:
        stage_of[(middles_s >= span.start_s) & (middles_s < _end_s(span, recording))] = span.index
    running = _held(recording.server, "num_requests_running", middles_s)
    waiting = _held(recording.server, "num_requests_waiting", middles_s)
    return [
        summary.Bin(
            t_s=float(edges_s[i]),
            stage=int(stage_of[i]),
            output_tokens_per_s=float(tokens[i]),
            in_flight=max(0.0, float(in_flight[i])),
            server_running=None if np.isnan(running[i]) else float(running[i]),
            server_waiting=None if np.isnan(waiting[i]) else float(waiting[i]),
            errors=int(errors[i]),
        )
        for i in range(bins)
    ]


def _held(server: Samples, name: str, at_s: Floats) -> Floats:
    """A gauge summed over targets, interpolated between scrapes; NaN where no target was being scraped."""
    total, seen = np.zeros(len(at_s)), np.zeros(len(at_s), dtype=bool)
    for times_s, values in gauge(server, name).values():
        covered = (at_s >= times_s[0] - 0.5) & (at_s <= times_s[-1] + 0.5)
        total += np.where(covered, np.interp(at_s, times_s, values), 0.0)
        seen |= covered
    return np.where(seen, total, np.nan)
