"""What a run directory recorded, as columns on one clock: requests, the driver's health, the servers' samples, the meters, the events.

All times are seconds since the run's first event (whole nanoseconds are subtracted first, so shifting a run changes nothing).
Records of an older version lack columns; those are 0 throughout. Requests are read when they are asked for, a level of a stage at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kilocopy import records
from kilocopy.clocks import Clocks, Offset
from kilocopy.rows import Place, Rows
from kilocopy.streams import Floats, Ints, Mask, Streams


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
    """Cumulative joules of the energy meters: one entry per reading.

    `counted`: how many (GPUs', hosts') each node has, where several were asked; `lost_s`: when nodes died.
    """

    time_s: Floats
    device: npt.NDArray[np.object_]
    boundary: npt.NDArray[np.object_]
    energy_j: Floats
    node: npt.NDArray[np.object_]
    counted: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    lost_s: Mapping[str, float] = field(default_factory=dict)


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
class Course:
    """What the timeline needs of a level: tokens of its ok and of its broken streams in each second, and when requests were sent, ended and failed."""

    tokens: Floats
    broken: Floats
    sent_s: Floats
    finished_s: Floats
    failed_s: Floats

    @classmethod
    def of(cls, streams: Streams, edges_s: Floats) -> Course:
        """The course of some requests over these seconds."""
        tokens, broken = (streams.where(mask).tally(edges_s) if len(edges_s) > 1 else np.zeros(0) for mask in (streams.ok, streams.failed))
        ended = ~np.isnan(streams.finished_s)
        known = ended & ~np.isnan(streams.sent_s)
        return cls(tokens, broken, streams.sent_s[known], streams.finished_s[known], streams.finished_s[ended & streams.failed])


@dataclass(frozen=True)
class Recording:
    """Everything that a run directory recorded, on one clock. Requests stay in their files until `of` reads them."""

    events: list[dict[str, Any]]
    rows: Rows
    zero_ns: int
    health: Health
    server: Samples
    energy: Meters
    end_s: float
    sent: dict[int, int] = field(default_factory=dict)  # requests of the run by worker, as each last counted them itself
    clocks: list[Offset] = field(default_factory=list)  # of processes that joined from elsewhere
    broken: dict[str, str] = field(default_factory=dict)  # files of events, driver, servers and meters that are not whole
    _last: dict[Place, Streams] = field(default_factory=dict, repr=False, compare=False)
    _courses: dict[Place, Course] = field(default_factory=dict, repr=False, compare=False)

    def of(self, stage: int, level: int = 0) -> Streams:
        """The requests of one level of a stage. The last one that was read is kept, so that asking again costs nothing."""
        if (stage, level) not in self._last:
            self._last.clear()  # one level at a time fits where all of them do not
            streams = self._last[stage, level] = self.rows.read([(stage, level)], self.zero_ns)
            self._courses.setdefault((stage, level), Course.of(streams, self.seconds_s))
        return self._last[stage, level]

    def courses(self) -> list[Course]:
        """Every level second by second; a level that was read before is not read again."""
        for place in self.rows.places:
            if place not in self._courses:
                self.of(*place)
        return [self._courses[place] for place in self.rows.places]

    @property
    def seconds_s(self) -> Floats:
        """The edges of the run's seconds."""
        return np.arange(int(np.ceil(self.end_s)) + 1, dtype=np.float64)

    @property
    def damaged(self) -> dict[str, str]:
        """Files that are not whole, and in words why, as far as the run was read: of requests all, of others those that were once."""
        return dict(sorted((self.rows.broken | {name: said for name, said in self.broken.items() if said == records.DAMAGED}).items()))

    @property
    def streams(self) -> Streams:
        """All requests of the run at once."""
        return self.rows.read(self.rows.places, self.zero_ns)


def load(run_dir: Path) -> Recording:
    """Read every whole record of a run directory. Missing kinds are empty, torn tails are ignored."""
    broken: dict[str, str] = {}
    events = records.read_events(run_dir, broken)
    clock = Clocks(events)
    rows = Rows(run_dir, clock.of_file)
    tables = {kind: _table(run_dir, kind, clock, broken) for kind in ("driver", "server", "energy")}  # texts and verdicts have no times
    shifted = [event | {"time_ns": int(event["time_ns"]) + clock.of_event(event)} for event in events]
    zero_ns = _zero_ns(shifted, rows)
    timed = sorted((event | {"t_s": (event["time_ns"] - zero_ns) / 1e9} for event in shifted), key=lambda event: event["t_s"])
    health = _health(tables["driver"], zero_ns)
    finished_s = [] if rows.last_finished_ns is None else [(rows.last_finished_ns - zero_ns) / 1e9]
    ends = [np.array([event["t_s"] for event in timed]), np.array(finished_s), health.time_s]
    return Recording(
        events=timed,
        rows=rows,
        zero_ns=zero_ns,
        health=health,
        server=Samples(**_columns(tables["server"], zero_ns)),
        energy=Meters(**_columns(tables["energy"], zero_ns), counted=_meters_of(timed), lost_s=_lost_s(timed)),
        end_s=max((float(values.max()) for values in ends if len(values)), default=0.0),
        sent=_sent(tables["driver"]),
        clocks=clock.offsets,
        broken=broken,
    )


def _table(run_dir: Path, kind: str, clock: Clocks, broken: dict[str, str]) -> pa.Table:
    """All rows of a kind, on the common clock; the rows of a batch are shifted alike, so that no duration changes."""
    schema = records.SCHEMAS[kind]
    parts = []
    for batch in records.batches(run_dir, kind, broken):
        shift_ns = clock.of_file(batch.schema.metadata, pc.max(batch.column("time_ns")).as_py() or 0)
        columns = {field.name: _column(batch, field) for field in schema}
        if shift_ns:
            columns |= {name: pc.add(column, pa.scalar(shift_ns, pa.int64())) for name, column in columns.items() if name.endswith("_ns")}
        parts.append(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))
    return pa.Table.from_batches(parts, schema)


def _column(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
    """A column of a batch; one that records of an older version do not have is 0 throughout, the node of a meter the host that wrote it."""
    if field.name in batch.schema.names:
        return batch.column(field.name)
    if field.name == "node":
        return pa.array([(batch.schema.metadata or {}).get(b"host", b"").decode()] * len(batch), pa.string())
    return pa.array(np.zeros(len(batch)), pa.float64()).cast(field.type)


def _meters_of(events: Sequence[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """How many meters of GPUs and of hosts each node was last seen to have."""
    return {str(event["node"]): (int(event["gpu"]), int(event["host"])) for event in events if event["event"] == "meters"}


def _lost_s(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """When each node died that did not come back."""
    last = {str(event["node"]): event for event in events if event["event"] in {"node_lost", "node_joined"}}
    return {node: float(event["t_s"]) for node, event in last.items() if event["event"] == "node_lost"}


def _zero_ns(events: Sequence[dict[str, Any]], rows: Rows) -> int:
    """The origin of time: the first event, else the first request."""
    if events:
        return min(int(event["time_ns"]) for event in events)
    return rows.first_scheduled_ns or 0


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


def _sent(table: pa.Table) -> dict[int, int]:
    """The last count of requests sent by each worker that kept one."""
    counted = table.group_by("worker").aggregate([("sent", "max")]).to_pylist()
    return {row["worker"] or 0: row["sent_max"] for row in counted if row["sent_max"] is not None}


__all__ = ["Floats", "Health", "Ints", "Mask", "Meters", "Recording", "Samples", "Streams", "load"]
