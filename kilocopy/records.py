"""The run directory: raw records first, everything else recomputes from them.

    runs/<time>_<name>/
        manifest.json        spec as resolved, its hash, seed, versions, commit, hardware, prices (written before the first request)
        events/*.jsonl       stage and run events of each driver process, one JSON object a line
        requests/*.arrow     a row per request, Arrow IPC stream, one file per driver process
        driver/*.arrow       once a second: the driver's own health
        server/*.arrow       scraped samples of the servers' counters
        texts/*.arrow        requests and answers as text, where workload.keep_texts asks for them
        energy/*.arrow       cumulative joules of each meter
        targets/*.json       where the metrics pages are, while it runs: workers, power meter, servers (Prometheus' file_sd)
        summary.json, report.html; *.before.*: those of the last report that called the run complete, where one does not any more

Every process writes files of its own and flushes at least once a second, so a process killed at any moment loses at most that
second; readers take every whole batch and ignore a torn tail. Times are `time.perf_counter_ns()` (CLOCK_MONOTONIC, one clock per
host); each file's schema metadata carries one anchor to the wall clock.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

UNREADABLE = (pa.ArrowException, EOFError, OSError)  # what Arrow says of bytes that are no records
CUT_OFF, DAMAGED = "is cut off", "cannot be read to its end"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow IPC: continuation marker, length 0

OUTCOMES = (
    "ok", "refused", "timeout_connect", "timeout_first_token", "timeout_stall", "http_429", "http_4xx", "http_5xx",
    "truncated", "bad_stream", "cancelled", "dropped",
)  # fmt: skip

REQUESTS = pa.schema([
    ("stage", pa.int16()),            # index in the spec
    ("level", pa.int16()),            # n-th level that a search stage tried, from 0; 0 in every other stage
    ("worker", pa.int16()),           # driver process
    ("copy", pa.int32()),             # closed loop: stream slot, 0..copies-1 over all workers; open loop: n-th arrival of the stage
    ("sequence", pa.int32()),         # n-th request of that copy in the stage (of that arrival's conversation), from 0
    ("scheduled_ns", pa.int64()),     # closed loop: when the copy wanted to send; open loop: when the plan says it arrives
    ("sent_ns", pa.int64()),          # when it set out: before its connection, where none is kept; null: never
    ("first_token_ns", pa.int64()),   # first chunk with text; null: none came
    ("last_token_ns", pa.int64()),
    ("finished_ns", pa.int64()),      # stream ended, or failed
    ("prompt_tokens", pa.int32()),    # from usage; null without it
    ("output_tokens", pa.int32()),    # from usage; null without it
    ("output_words", pa.int32()),     # words of the decoded text
    ("chunks", pa.int32()),           # chunks that carried text
    ("gaps_us", pa.list_(pa.uint32())),  # gaps between those chunks, microseconds: chunks - 1 of them
    ("outcome", pa.string()),         # one of OUTCOMES
    ("status", pa.int16()),           # HTTP status; null: none came
    ("finish_reason", pa.string()),
    ("replica", pa.string()),         # where the answer came from, if known
    ("error", pa.string()),           # a sentence, without secrets; null for ok
])  # fmt: skip

DRIVER = pa.schema([
    ("time_ns", pa.int64()),
    ("worker", pa.int16()),
    ("stage", pa.int16()),            # -1 between stages
    ("in_flight", pa.int32()),        # copies with a request open
    ("sent", pa.int64()),             # requests, cumulative over the run
    ("finished", pa.int64()),
    ("chunks", pa.int64()),           # cumulative
    ("cpu_s", pa.float64()),          # process CPU, cumulative
    ("rss_bytes", pa.int64()),
    ("open_sockets", pa.int32()),
    ("loop_lag_us", pa.list_(pa.uint32())),  # how late the event loop woke, each probe of this second
])  # fmt: skip

SERVER = pa.schema([
    ("time_ns", pa.int64()),          # when the scrape's answer was complete
    ("target", pa.string()),          # host:port
    ("name", pa.string()),            # one name for both exporters, e.g. generation_tokens_total (kilocopy/metrics.py)
    ("labels", pa.string()),          # JSON object, sorted keys
    ("value", pa.float64()),
])  # fmt: skip

ENERGY = pa.schema([
    ("time_ns", pa.int64()),
    ("device", pa.string()),          # GPU UUID or rapl:<zone>
    ("boundary", pa.string()),        # gpu | host
    ("energy_j", pa.float64()),       # the meter's cumulative counter; only differences mean anything
    ("node", pa.string()),            # address of the node that it is on: every host has a rapl:intel-rapl:0
])  # fmt: skip

TEXTS = pa.schema([
    ("stage", pa.int16()),            # as in REQUESTS, up to `sequence`; requests that ended well alone
    ("level", pa.int16()),
    ("copy", pa.int32()),
    ("sequence", pa.int32()),
    ("request", pa.string()),         # its JSON as it was sent
    ("answer", pa.string()),          # the data set's own answer; null where it has none
    ("texts", pa.list_(pa.string())),  # what the model said, a text for each sample
])  # fmt: skip

VERDICTS = pa.schema([
    ("part", pa.string()),            # of an experiment: the run directory that holds the text
    ("stage", pa.int16()),
    ("copy", pa.int32()),
    ("sequence", pa.int32()),
    ("sample", pa.int16()),           # from 0
    ("task", pa.string()),            # digest of the prompt: equal for equal prompts
    ("verdict", pa.string()),         # passed | not_passed | timeout | verifier_failed
    ("exit_code", pa.int16()),        # negative: the signal that ended it; null: it did not start, or was ended for its time
    ("took_s", pa.float64()),
    ("said", pa.string()),            # the end of what it wrote, where it failed by itself
])  # fmt: skip

SCHEMAS = {"requests": REQUESTS, "driver": DRIVER, "server": SERVER, "energy": ENERGY, "texts": TEXTS, "verdicts": VERDICTS}


class Writer:
    """Appends rows to one Arrow IPC stream file; `flush` makes a batch of what came since and hands it to the kernel."""

    def __init__(self, run_dir: Path, kind: str, process: str, metadata: Mapping[str, str] | None = None) -> None:
        anchor = {"wall_ns": str(time.time_ns()), "perf_ns": str(time.perf_counter_ns()), "host": socket.gethostname(), "process": process}
        self.schema = SCHEMAS[kind].with_metadata(anchor | dict(metadata or {}))
        path = run_dir / kind / f"{process}.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("xb", buffering=0)
        self._stream = pa.ipc.new_stream(self._file, self.schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
        self._rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        """Keep one row for the next flush; keys are the schema's field names, missing ones are null."""
        self._rows.append(row)

    def flush(self) -> None:
        """Write the rows that came since the last flush as one batch. Raises OSError when the disk is full."""
        if self._rows:
            rows, self._rows = self._rows, []
            self._stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=self.schema))

    def close(self) -> None:
        """Flush, end the stream, close the file."""
        self.flush()
        self._stream.close()
        self._file.close()


class Events:
    """Appends one JSON object a line to events/<process>.jsonl, at once.

    Events of the driver, each process its own: `run_start` (a worker's with {reader: compiled | plain}); `stage_start` {stage, level, load, workers}: load is the copies, or
    the rate, of a search's level, else null; `stage_stop_asking` {stage, level}: from here on nothing is sent; `stage_drained`
    {stage, level}: the last stream ended; `stage_settled` {stage, level}: idle long enough for the servers' counters to be
    scraped; `run_end` {reason: complete | interrupted} (a worker's with {resent}: requests that met a connection closed while idle). Where workers share the load, the master writes `worker_lost` {worker,
    stage, level}; and a worker whose host had no socket or port left for some requests of a level `sockets_exhausted` {stage, level, requests}. Where they joined from elsewhere, the receiver writes `joined` {role, on, same_clock, hardware, versions}, `clock` {of, on,
    offset_ns, error_ns, at_ns, same} once a second, and `records_missing` {on, role}. Where meters of several nodes are read, `meters` {node, gpu, host} says how
    many each has. Every line has `event`, `time_ns`, `wall_ns`, `host`, `process`.
    """

    def __init__(self, run_dir: Path, process: str) -> None:
        path = run_dir / "events" / f"{process}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.host = socket.gethostname()
        self._process, self._file = process, path.open("a", buffering=1, encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """Append one event, stamped now."""
        now = {"time_ns": time.perf_counter_ns(), "wall_ns": time.time_ns(), "host": self.host, "process": self._process}
        line = {"event": event, **now, **fields}
        self._file.write(json.dumps(line) + "\n")


def batches(run_dir: Path, kind: str, broken: dict[str, str] | None = None) -> Iterator[pa.RecordBatch]:
    """Every whole batch of every file of a kind, in the order of file names; a torn tail (a killed writer) ends its file.

    `broken` is told what is wrong with a file that is not whole, by its name in the run (see `missing`).
    """
    for path in sorted((run_dir / kind).glob("*.arrow")):
        said = CUT_OFF
        with suppress(*UNREADABLE), pa.memory_map(str(path)) as file:  # of one size, though its writer may go on; none of an empty file
            said = missing(file, None)
            yield from pa.ipc.open_stream(file)
            said = missing(file, file.tell())
        if broken is not None and said:
            broken[f"{kind}/{path.name}"] = said


def missing(file: pa.MemoryMappedFile, end: int | None) -> str:
    """What a file lacks that was read up to here (None: an error ended that): CUT_OFF, DAMAGED, or nothing. Leaves the file where it was.

    A file that ends as a closed stream does was whole once; where reading it ended before, it was changed since. One without that end
    had its writer killed, was cut, or is still written.
    """
    at, size = file.tell(), file.size()
    file.seek(max(0, size - len(END_OF_STREAM)))
    tail = file.read()
    file.seek(at)
    if tail != END_OF_STREAM:
        return CUT_OFF
    return "" if end == size else DAMAGED


def read(run_dir: Path, kind: str) -> pa.Table:
    """All rows of a kind as one table; empty with the right columns when nothing was recorded."""
    schema: pa.Schema = SCHEMAS[kind]
    return pa.Table.from_batches([batch.replace_schema_metadata() for batch in batches(run_dir, kind)], schema)


def read_events(run_dir: Path, broken: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """All events in order of time; a torn last line is ignored, another that is no event is told to `broken` as `batches` does."""
    events = []
    for path in sorted((run_dir / "events").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                event = None
            if isinstance(event, dict) and "event" in event and isinstance(event.get("time_ns"), int):
                events.append(event)
            elif number < len(lines) and broken is not None:
                broken[f"events/{path.name}"] = DAMAGED
    return sorted(events, key=lambda event: event["time_ns"])


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step, so that a reader never sees half of it: sorted keys, two spaces, a newline at the end."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
