"""requests/*.arrow by stage and level: where each one's batches lie in the files, so that a stage is read when it is measured.

A run of ten million requests does not fit beside its own copies in a small memory; one stage of it does. The first pass reads four
columns of each batch and remembers the batch's offset, the second takes whole batches from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kilocopy.records import CUT_OFF, DAMAGED, OUTCOMES, REQUESTS, UNREADABLE, missing
from kilocopy.streams import Streams

Place = tuple[int, int]  # stage, level
INDEXED = ("stage", "level", "worker", "scheduled_ns", "finished_ns", "outcome")
COUNTED = ("prompt_tokens", "output_tokens", "output_words", "chunks")
WHOLE = {"stage": np.int16, "level": np.int16, "worker": np.int16, "copy": np.int32, "sequence": np.int32}
TIMES = {"scheduled_ns": "scheduled_s", "sent_ns": "sent_s", "first_token_ns": "first_s", "last_token_ns": "last_s", "finished_ns": "finished_s"}


@dataclass(frozen=True)
class _Batch:
    """Where a batch begins in its file, and what to add to its times."""

    path: Path
    schema: pa.Schema
    offset: int
    shift_ns: int


class Rows:
    """The requests of a run, found by their place."""

    def __init__(self, run_dir: Path, shift_of: Callable[[Any, int], int]) -> None:
        """Look through the files. `shift_of`: nanoseconds to add to the times of a file with this metadata, about a time of its own clock."""
        self._found: dict[Place, list[_Batch]] = {}
        self.broken: dict[str, str] = {}  # files that are not whole, and what is wrong with them (records.missing)
        self.sent: Counter[int] = Counter()  # rows by worker, without those of arrivals that were dropped
        self.first_scheduled_ns: int | None = None
        self.last_finished_ns: int | None = None
        for path in sorted((run_dir / "requests").glob("*.arrow")):
            for batch, where in self._indexed(path, shift_of):
                self._note(batch, where)

    def _note(self, batch: pa.RecordBatch, where: _Batch) -> None:
        stages, levels = _whole(batch, "stage").astype(np.int64), _whole(batch, "level").astype(np.int64)
        for place in np.unique(stages * 65536 + levels):
            self._found.setdefault((int(place) // 65536, int(place) % 65536), []).append(where)
        workers = _whole(batch, "worker")
        if "outcome" in batch.schema.names:
            workers = workers[pc.fill_null(pc.not_equal(batch.column("outcome"), "dropped"), True).to_numpy(zero_copy_only=False)]
        for worker, count in zip(*np.unique(workers, return_counts=True), strict=True):
            self.sent[int(worker)] += int(count)
        first, last = pc.min(batch.column("scheduled_ns")).as_py(), pc.max(batch.column("finished_ns")).as_py()
        if first is not None:
            self.first_scheduled_ns = min(first + where.shift_ns, self.first_scheduled_ns or first + where.shift_ns)
        if last is not None:
            self.last_finished_ns = max(last + where.shift_ns, self.last_finished_ns or last + where.shift_ns)

    def _indexed(self, path: Path, shift_of: Callable[[Any, int], int]) -> Iterator[tuple[pa.RecordBatch, _Batch]]:
        """Every whole batch of a file, its INDEXED columns alone; a torn tail ends the file."""
        said = CUT_OFF
        with suppress(*UNREADABLE), pa.memory_map(str(path)) as source:
            said = missing(source, None)
            schema = pa.ipc.open_stream(source).schema
            source.seek(0)
            fields = [schema.get_field_index(name) for name in INDEXED if name in schema.names]
            stream = pa.ipc.open_stream(source, options=pa.ipc.IpcReadOptions(included_fields=fields))
            offset = source.tell()
            for batch in stream:
                last_ns = pc.max(batch.column("finished_ns")).as_py() or 0
                yield batch, _Batch(path, schema, offset, shift_of(schema.metadata, last_ns))
                offset = source.tell()
            said = missing(source, source.tell())
        if said:
            self.broken[_name(path)] = said

    @property
    def places(self) -> list[Place]:
        """Every stage and level that has a request."""
        return sorted(self._found)

    def read(self, places: Sequence[Place], zero_ns: int) -> Streams:
        """The requests of these places, in the files' order, times in seconds since the origin."""
        wanted = list(dict.fromkeys(batch for place in places for batch in self._found.get(place, [])))
        wanted.sort(key=lambda batch: (batch.path, batch.offset))
        columns: dict[str, list[npt.NDArray[Any]]] = {}
        for where in wanted:
            try:
                batch = _read(where)
            except UNREADABLE:  # the columns of the index were whole, others are not
                self.broken[_name(where.path)] = DAMAGED
                continue
            kept = _kept(batch, places)
            for name, values in _columns(batch if kept is None else batch.filter(kept), where.shift_ns - zero_ns).items():
                columns.setdefault(name, []).append(values)
        if not columns:
            columns = {name: [values] for name, values in _columns(pa.RecordBatch.from_pylist([], schema=REQUESTS), 0).items()}
        joined = {}
        for name in list(columns):
            parts = columns.pop(name)
            joined[name] = np.concatenate(parts)
        counts = joined["gap_counts"]
        return Streams(**joined, gap_starts=np.cumsum(counts, dtype=np.int64) - counts)


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _read(where: _Batch) -> pa.RecordBatch:
    with pa.memory_map(str(where.path)) as source:
        source.seek(where.offset)
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), where.schema)
        batch.validate(full=True)
        return batch


def _kept(batch: pa.RecordBatch, places: Sequence[Place]) -> pa.Array | None:
    """Which rows of a batch are wanted; None where all are."""
    stages, levels = _whole(batch, "stage"), _whole(batch, "level")
    mask = np.zeros(len(stages), dtype=np.bool_)
    for stage, level in places:
        mask |= (stages == stage) & (levels == level)
    return None if mask.all() else pa.array(mask)


def _whole(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    """Whole numbers; null is 0, and so is a column that records of an older version do not have."""
    if name not in batch.schema.names:
        return np.zeros(len(batch), WHOLE[name])
    return np.asarray(pc.fill_null(batch.column(name), 0).to_numpy(zero_copy_only=False), dtype=WHOLE[name])


def _columns(batch: pa.RecordBatch, shift_ns: int) -> dict[str, npt.NDArray[Any]]:
    """A batch as the columns of Streams, without gap_starts."""
    gaps = batch.column("gaps_us")
    gap_counts = pc.fill_null(pc.list_value_length(gaps), 0).to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    gaps_us = np.asarray(pc.list_flatten(gaps).to_numpy(zero_copy_only=False), dtype=np.uint32)
    passed_us = np.concatenate([[0], np.cumsum(gaps_us, dtype=np.int64)])
    ends = np.cumsum(gap_counts, dtype=np.int64)
    codes = pc.fill_null(pc.index_in(batch.column("outcome"), value_set=pa.array(OUTCOMES)), len(OUTCOMES))
    return {
        **{name: _whole(batch, name) for name in WHOLE},
        **{name: _seconds(batch.column(ns), shift_ns) for ns, name in TIMES.items()},
        **{name: _numbers(batch, name) for name in COUNTED},
        "outcome_code": codes.to_numpy(zero_copy_only=False).astype(np.int8),
        "gap_counts": gap_counts,
        "gap_total_us": passed_us[ends] - passed_us[ends - gap_counts],
        "gaps_us": gaps_us,
    }


def _seconds(column: pa.Array, shift_ns: int) -> npt.NDArray[np.float64]:
    """Seconds since the origin: integers first, so that nothing is rounded but the result. Null becomes NaN."""
    since = pc.add(column, pa.scalar(shift_ns, pa.int64()))
    return np.asarray(since.to_numpy(zero_copy_only=False), dtype=np.float64) / 1e9


def _numbers(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.float64]:
    if name not in batch.schema.names:
        return np.zeros(len(batch))
    return np.asarray(batch.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)
