"""Turns finished streams into rows, and once a second writes them down together with the driver's own health.

A driver that cannot keep up measures itself. So it watches itself too: how late its event loop wakes (a probe every 10 ms), its
CPU, how many streams are open. What it recorded reaches the kernel at least once a second: killed at any moment, it loses no more.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gevent
import psutil

from kilocopy.records import Events, Writer
from loadtests.answers import Answer, decode, judge
from loadtests.streams import Reader, Stream

PROBE_S = 0.01
FLUSH_S = 0.5
SAMPLE_S = 1.0
ERROR_CHARS_MAX = 300


class Recorder:
    """Owns this process' files in the run directory, and the counters that people watch meanwhile."""

    def __init__(self, run_dir: Path, worker: int, reader: Reader, secret: str | None) -> None:
        process = f"worker{worker}"
        self.worker, self._reader, self._secret = worker, reader, secret
        self.events = Events(run_dir, process)
        self._requests, self._driver = Writer(run_dir, "requests", process), Writer(run_dir, "driver", process)
        self._process = psutil.Process()
        self._lags_us: list[int] = []
        self._due_ns = 0
        self.stage = -1
        self.in_flight = 0
        self.sent = 0
        self.outcomes: Counter[str] = Counter()
        self.closed = False

    def finished(self, place: dict[str, int], scheduled_ns: int, stream: Stream) -> dict[str, Any]:
        """Understand an ended stream and keep its row. Returns the row. `place` holds stage, copy and sequence."""
        answer = decode(stream.pieces, stream.stamps_ns)
        outcome, error = _outcome(stream, answer)
        if error and self._secret:
            error = error.replace(self._secret, "***")
        times = answer.times_ns
        row = {
            **place,
            "worker": self.worker,
            "scheduled_ns": scheduled_ns,
            "sent_ns": stream.sent_ns,
            "first_token_ns": int(times[0]) if len(times) else None,
            "last_token_ns": int(times[-1]) if len(times) else None,
            "finished_ns": stream.finished_ns,
            "prompt_tokens": answer.prompt_tokens,
            "output_tokens": answer.output_tokens,
            "output_words": answer.words,
            "chunks": len(times),
            "gaps_us": answer.gaps_us,
            "outcome": outcome,
            "status": stream.status,
            "finish_reason": answer.finish_reason,
            "replica": stream.replica,
            "error": error[:ERROR_CHARS_MAX] if error else None,
        }
        self.outcomes[outcome] += 1
        if not self.closed:
            self._requests.append(row)
        return row

    def probe(self) -> None:
        """Measure for ever how late the event loop wakes. A greenlet of its own."""
        while True:
            self._due_ns = time.perf_counter_ns() + int(PROBE_S * 1e9)
            gevent.sleep(PROBE_S)
            self._lags_us.append(max(0, time.perf_counter_ns() - self._due_ns) // 1000)

    def sample(self) -> None:
        """Keep one row of the driver's health."""
        lags_us, self._lags_us = self._lags_us, []
        cpu = self._process.cpu_times()
        self._driver.append(
            {
                "time_ns": time.perf_counter_ns(),
                "stage": self.stage,
                "in_flight": self.in_flight,
                "sent": self.sent,
                "finished": sum(self.outcomes.values()),
                "chunks": self._reader.events,
                "cpu_s": cpu.user + cpu.system,
                "rss_bytes": self._process.memory_info().rss,
                "loop_lag_us": lags_us,
            }
        )

    def flush(self) -> None:
        """Hand what came to the kernel. Raises OSError when the disk is full."""
        if not self.closed:
            self._requests.flush()
            self._driver.flush()

    def close(self, reason: str) -> None:
        """Write the last rows and the end of the run. Raises OSError when the disk is full; a second call does nothing."""
        if not self.closed:
            self.sample()
            self.flush()
            self.closed = True
            self.events.write("run_end", reason=reason)
            self._requests.close()
            self._driver.close()

    def abandon(self) -> None:
        """Stop recording where recording itself failed; what was written stays."""
        self.closed = True
        with contextlib.suppress(OSError):  # the disk is still full; a reader sees a run without an end, which means the same
            self.events.write("run_end", reason="interrupted")


def _outcome(stream: Stream, answer: Answer) -> tuple[str, str | None]:
    """What the reader saw of the connection, then the status, then what the stream itself said."""
    by_content = judge(stream.status, stream.content_type, stream.pieces, answer)
    if stream.outcome is None:
        return by_content
    if stream.outcome == "truncated" and by_content[0] not in {"ok", "truncated"}:
        return by_content  # an error status or an error event says more than the hang-up after it
    return stream.outcome, stream.error


class Progress:
    """What a person watches: one JSON line a second on standard output."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []

    def line(self, recorder: Recorder, events: int, **fields: Any) -> str:
        """The line; `tokens_per_s` is over the last three seconds and takes an event for a token."""
        now_ns = time.perf_counter_ns()
        self._seen = [*self._seen[-3:], (now_ns, events)]
        (then_ns, before), seconds = self._seen[0], (now_ns - self._seen[0][0]) / 1e9
        errors = {outcome: n for outcome, n in sorted(recorder.outcomes.items()) if outcome != "ok"}
        return json.dumps(
            {
                "t": round(time.time(), 3),
                **fields,
                "in_flight": recorder.in_flight,
                "tokens_per_s": round((events - before) / seconds, 1) if now_ns > then_ns else 0.0,
                "requests_ok": recorder.outcomes["ok"],
                "errors": errors,
            }
        )
