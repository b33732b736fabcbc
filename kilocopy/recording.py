"""What a run directory recorded, as columns on one clock: requests, the driver's health, the servers' samples, the meters, the events.

All times are seconds since the run's first event (whole nanoseconds are subtracted first, so shifting a run changes nothing).
Records of an older version lack columns; those are 0 throughout. Nothing here loops over tokens: the tokens of a run are one array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kilocopy import records

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Streams:
    """Requests as columns, one entry each; what was never recorded is NaN. `gaps_s` holds the gaps of all of them in a row."""

    stage: Ints
    level: Ints
    worker: Ints
    copy: Ints
    sequence: Ints
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
    def dropped(self) -> Mask:
        """Arrivals of an open loop that were never sent, since no stream was free for them."""
        return np.asarray(self.outcome == "dropped", dtype=np.bool_)

    @property
    def failed(self) -> Mask:
        """Which ended in a typed error; a stream cancelled by the driver is neither ok nor failed, nor is one that was dropped."""
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

    def owners(self) -> Ints:
        """Which of these streams each of `arrivals` belongs to."""
        seen = ~np.isnan(self.first_s)
        return np.repeat(np.flatnonzero(seen), self.gap_counts[seen] + 1)


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
class Health:
    """The driver about itself, an entry per worker and second; NaN where it was not recorded. `lags_s` holds all probes in a row.

    A probe says how late the event loop woke. `cpu_s` and `chunks` are cumulative over a worker's life.
    """

    time_s: Floats
    worker: Ints
    cpu_s: Floats
    chunks: Floats
    rss_bytes: Floats
    open_sockets: Floats
    lag_counts: Ints
    lags_s: Floats

    def where(self, mask: Mask) -> Health:
        """The entries that the mask keeps, with their probes."""
        kept = {name: value[mask] for name, value in vars(self).items() if name != "lags_s"}
        return Health(**kept, lags_s=self.lags_s[np.repeat(mask, self.lag_counts)])


@dataclass(frozen=True)
class Recording:
    """Everything that a run directory recorded, on one clock."""

    events: list[dict[str, Any]]
    streams: Streams
    health: Health
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
    health = _health(tables["driver"], zero_ns)
    ends = [np.array([event["t_s"] for event in timed]), streams.finished_s[~np.isnan(streams.finished_s)], health.time_s]
    return Recording(
        events=timed,
        streams=streams,
        health=health,
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
        level=_whole(columns["level"]),
        worker=_whole(columns["worker"]),
        copy=np.asarray(columns["copy"], dtype=np.int64),
        sequence=_whole(columns["sequence"]),
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


def _whole(values: npt.NDArray[Any]) -> Ints:
    """Whole numbers; null is 0."""
    return np.nan_to_num(np.asarray(values, dtype=np.float64)).astype(np.int64)


def _health(table: pa.Table, zero_ns: int) -> Health:
    lags = table.column("loop_lag_us")
    columns = _columns(table.drop_columns(["loop_lag_us"]), zero_ns)
    return Health(
        time_s=columns["time_s"],
        worker=_whole(columns["worker"]),
        **{name: np.asarray(columns[name], dtype=np.float64) for name in ("cpu_s", "chunks", "rss_bytes", "open_sockets")},
        lag_counts=np.asarray(pc.fill_null(pc.list_value_length(lags), 0).to_numpy(), dtype=np.int64),
        lags_s=np.asarray(pc.list_flatten(lags).to_numpy(), dtype=np.float64) / 1e6,
    )
