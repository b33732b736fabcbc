"""How long the report of millions of requests takes, and how much memory: a run directory with generated rows, summarised in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kilocopy.manifest import CHECKOUT
from kilocopy.recompute import summarise
from kilocopy.records import REQUESTS, Events
from kilocopy.spec import Spec, load

STAGES, COPIES, TOKENS = 4, 1000, 16
GAP_S, BATCH_ROWS = 0.02, 20_000
STARTS_NS = 10**9
DEMO = CHECKOUT / "loadtests/specs/demo.yaml"


def generate(folder: Path, rows: int) -> Path:
    """A run of closed stages that share so many rows: requests of 8 to 24 tokens, gaps of 18 to 22 ms, one chunk a token."""
    spec = load(DEMO)
    seconds = rows / STAGES / COPIES * (TOKENS + 1) * GAP_S
    stage = {"arrival": "closed", "copies": COPIES, "duration_s": seconds, "warmup_s": 0, "ramp_s": 0}
    known = Spec.model_validate(spec.model_dump(mode="json") | {"stages": [stage] * STAGES})
    folder.mkdir(parents=True)
    (folder / "requests").mkdir()
    (folder / "manifest.json").write_text(json.dumps({"name": "rows", "spec": known.model_dump(mode="json"), "training": None}))
    events, draw = Events(folder, "driver-0"), np.random.default_rng(0)
    anchor = {"wall_ns": str(time.time_ns()), "perf_ns": "0", "host": events.host, "process": "driver-0"}
    schema = REQUESTS.with_metadata(anchor)
    with pa.OSFile(str(folder / "requests/driver-0.arrow"), "wb") as file, pa.ipc.new_stream(
        file, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
    ) as stream:
        at_ns = STARTS_NS
        for index in range(STAGES):
            events.write("stage_start", stage=index, time_ns=at_ns, load=None, level=0)
            last_ns = at_ns
            for batch, ended_ns in _batches(rows // STAGES, index, at_ns, draw):
                stream.write_batch(batch.cast(schema))
                last_ns = ended_ns
            stop_ns = at_ns + int(0.95 * (last_ns - at_ns))
            for name, time_ns in (("stop_asking", stop_ns), ("drained", last_ns), ("settled", last_ns + 10**9)):
                events.write(f"stage_{name}", stage=index, time_ns=time_ns, level=0)
            at_ns = last_ns + 2 * 10**9
    events.write("run_end", time_ns=at_ns, reason="complete")
    return folder


def _batches(rows: int, stage: int, start_ns: int, draw: np.random.Generator) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Copies back to back, in batches by time; each copy's requests follow one another."""
    free_ns = start_ns + np.arange(COPIES, dtype=np.int64) * 10**6
    for first in range(0, rows, BATCH_ROWS):
        rounds = max(1, min(BATCH_ROWS, rows - first) // COPIES)
        parts = []
        for _ in range(rounds):
            tokens = draw.integers(TOKENS // 2, 3 * TOKENS // 2, COPIES, endpoint=True)
            gaps = draw.integers(int(900_000 * GAP_S), int(1_100_000 * GAP_S), int((tokens - 1).sum()), dtype=np.uint32)
            ends = np.cumsum(tokens - 1)
            passed = np.concatenate([[0], np.cumsum(gaps, dtype=np.int64)])
            first_ns = free_ns + draw.integers(10_000_000, 30_000_000, COPIES)
            last_ns = first_ns + 1000 * (passed[ends] - passed[ends - tokens + 1])
            parts.append((free_ns, first_ns, last_ns, tokens, gaps))
            free_ns = last_ns
        yield _batch(stage, parts), int(free_ns.max())


def _batch(stage: int, parts: list[Any]) -> pa.RecordBatch:
    sent, first, last, tokens, gaps = (np.concatenate(column) for column in zip(*parts, strict=True))
    count = len(sent)
    offsets = np.concatenate([[0], np.cumsum(tokens - 1)]).astype(np.int32)
    columns = {
        "stage": np.full(count, stage), "level": np.zeros(count), "worker": np.zeros(count), "copy": np.arange(count) % COPIES,
        "sequence": np.zeros(count), "scheduled_ns": sent, "sent_ns": sent, "first_token_ns": first, "last_token_ns": last, "finished_ns": last,
        "prompt_tokens": np.full(count, 32), "output_tokens": tokens, "output_words": tokens // 2, "chunks": tokens, "status": np.full(count, 200),
    }  # fmt: skip
    texts = {"outcome": "ok", "finish_reason": "length", "replica": None, "error": None}
    arrays = [
        pa.ListArray.from_arrays(offsets, gaps) if field.name == "gaps_us"
        else pa.array([texts[field.name]] * count, field.type) if field.name in texts
        else pa.array(columns[field.name]).cast(field.type)
        for field in REQUESTS
    ]  # fmt: skip
    return pa.RecordBatch.from_arrays(arrays, schema=REQUESTS)


def plainly(folder: Path) -> float:
    """How far the summary is from a loop over the rows in plain Python: the largest relative difference of tokens, TTFT and gaps."""
    with pa.OSFile(str(folder / "requests/driver-0.arrow")) as file, pa.ipc.open_stream(file) as stream:
        rows = stream.read_all().to_pylist()
    apart = 0.0
    for stage in summarise(folder).stages:
        window, through, latency = stage.window, stage.throughput, stage.latency
        if window is None or through is None or latency is None or latency.ttft_s is None or latency.icl_s is None:
            raise SystemExit(f"{stage.title}: {len(rows):,} rows have no window or no latency to check; give --rows 100000 or more")
        tokens, ttfts_s, gaps_s = 0.0, [], []
        for row in rows:
            if row["stage"] != stage.index:
                continue
            sent_s, at_s, finished_s = ((row[name] - STARTS_NS) / 1e9 for name in ("sent_ns", "first_token_ns", "finished_ns"))
            inside = sent_s >= window.start_s and finished_s <= window.end_s
            ttfts_s += [at_s - sent_s] if inside else []
            for gap_us in (None, *row["gaps_us"]):
                at_s += (gap_us or 0) / 1e6
                gaps_s += [gap_us / 1e6] if inside and gap_us is not None else []
                tokens += row["output_tokens"] / row["chunks"] if window.start_s <= at_s < window.end_s else 0
        pairs = [(tokens, through.output_tokens), (len(ttfts_s), stage.requests.in_window_ok)]
        for values, told in ((ttfts_s, latency.ttft_s), (gaps_s, latency.icl_s)):
            pairs += list(zip(np.percentile(values, [50, 90, 99]), (told.p50, told.p90, told.p99), strict=True))
        apart = np.max([apart, *(abs(plain / fast - 1) for plain, fast in pairs)])  # which keeps a NaN
    return float(apart)


MEASURED = """
import json, resource, sys, time
from pathlib import Path
from kilocopy.recompute import summarise
begun_s = time.perf_counter()
found = summarise(Path(sys.argv[1]))
sent = sum(stage.requests.sent for stage in found.stages)
print(json.dumps([time.perf_counter() - begun_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, sent, [s.verdict.level for s in found.stages]]))
"""


def measure(folder: Path) -> tuple[float, int, int, list[str]]:
    """Seconds, peak resident bytes, rows and verdicts of one `summarise`, in a fresh process on at most two cores."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder)],
        capture_output=True, text=True, check=True, cwd=CHECKOUT, preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    seconds, peak, sent, verdicts = json.loads(done.stdout)
    return float(seconds), int(peak), int(sent), list(verdicts)
