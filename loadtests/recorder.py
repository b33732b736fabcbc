"""Turns finished streams into rows, and once a second writes them down together with the driver's own health.

A driver that cannot keep up measures itself. So it watches itself too: how late its event loop wakes (a probe every 10 ms), its
CPU, how many streams are open. What it recorded reaches the kernel at least once a second: killed at any moment, it loses no more.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gevent
import numpy as np
import numpy.typing as npt
import psutil

from kilocopy.records import Events, Writer
from loadtests.answers import Answer, decode, judge
from loadtests.streams import Reader, Stream

if TYPE_CHECKING:
    from loadtests.exporter import Exporter

PROBE_S = 0.01
FLUSH_S = 0.5
SAMPLE_S = 1.0
ERROR_CHARS_MAX = 300
_NO_GAPS = np.empty(0, np.uint32)


class Recorder:
    """Owns this process' files in the run directory, and the counters that people watch meanwhile."""

    def __init__(
        self, run_dir: Path, worker: int, reader: Reader, secret: str | None, *, exporter: Exporter | None = None, samples: int = 1, keep_texts: bool = False
    ) -> None:
        process = f"worker{worker}"
        self.worker, self._reader, self._secret, self._exporter, self._samples = worker, reader, secret, exporter, samples
        self.events = Events(run_dir, process)
        self._requests, self._driver = Writer(run_dir, "requests", process), Writer(run_dir, "driver", process)
        self._texts = Writer(run_dir, "texts", process) if keep_texts else None
        self._process = psutil.Process()
        self._lags_us: list[int] = []
        self._stage, self._level = -1, 0
        self._copies: int | None = None
        self.phase: Callable[[], str] = lambda: "ramp"
        self.in_flight = 0
        self.sent = 0
        self.outcomes: Counter[str] = Counter()
        self.closed = False

    @property
    def exhausted(self) -> int:
        """Requests of the run so far for which this host had no socket or port left."""
        return self._reader.exhausted

    def begin(self, stage: int, level: int, copies: int | None) -> None:
        """A level begins, with this many copies of this process' in closed loop; -1: none is being played."""
        self._stage, self._level, self._copies = stage, level, copies

    def _cpu_s(self) -> float:
        cpu = self._process.cpu_times()
        return float(cpu.user + cpu.system)

    def dropped(self, place: dict[str, int], scheduled_ns: int) -> None:
        """Keep the row of an arrival that was never sent, since no stream was free for it."""
        row: dict[str, Any] = {
            **place,
            "worker": self.worker,
            "scheduled_ns": scheduled_ns,
            "sent_ns": None,
            "finished_ns": time.perf_counter_ns(),
            "outcome": "dropped",
            "error": "no stream was free when it was due (max_in_flight)",
        }
        self._keep(row, _NO_GAPS)

    def _keep(self, row: dict[str, Any], gaps_us: npt.NDArray[np.uint32]) -> None:
        self.outcomes[row["outcome"]] += 1
        if not self.closed:
            self._requests.append(row)
        if self._exporter is not None:
            self._exporter.finished(row, gaps_us)

    def finished(self, place: dict[str, int], scheduled_ns: int, stream: Stream, asked: Callable[[], dict[str, Any]] | None = None) -> tuple[dict[str, Any], str]:
        """Understand an ended stream and keep its row; returns the row and the text. `place`: stage, level, copy, sequence.

        `asked`: the request and the data set's answer to it, called where texts are kept.
        """
        answer = decode(stream.pieces, stream.stamps_ns, samples=self._samples)
        outcome, error = _outcome(stream, answer)
        if error and self._secret:
            error = error.replace(self._secret, "***")
        times, gaps_us = answer.times_ns, answer.gaps_us
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
            "gaps_us": gaps_us,
            "outcome": outcome,
            "status": stream.status,
            "finish_reason": answer.finish_reason,
            "replica": stream.replica,
            "error": error[:ERROR_CHARS_MAX] if error else None,
        }
        self._keep(row, gaps_us)
        if self._texts is not None and asked is not None and outcome == "ok" and not self.closed:
            self._texts.append({**place, **asked(), "texts": [_storable(text) for text in answer.texts or (answer.text,)]})
        return row, answer.text

    def probe(self) -> None:
        """Measure for ever how late the event loop wakes. A greenlet of its own."""
        while True:
            due_ns = time.perf_counter_ns() + int(PROBE_S * 1e9)
            gevent.sleep(PROBE_S)
            self._lags_us.append(max(0, time.perf_counter_ns() - due_ns) // 1000)

    def sample(self) -> None:
        """Keep one row of the driver's health."""
        lags_us, self._lags_us = self._lags_us, []
        cpu_s, rss_bytes = self._cpu_s(), self._process.memory_info().rss
        self._driver.append(
            {
                "time_ns": time.perf_counter_ns(),
                "worker": self.worker,
                "stage": self._stage,
                "in_flight": self.in_flight,
                "sent": self.sent,
                "finished": sum(self.outcomes.values()),
                "chunks": self._reader.events,
                "cpu_s": cpu_s,
                "rss_bytes": rss_bytes,
                "open_sockets": self._reader.connections,
                "loop_lag_us": lags_us,
            }
        )
        if self._exporter is not None:
            self._exporter.sample(
                stage=self._stage, level=self._level, phase=self.phase(), copies_asked=self._copies, in_flight=self.in_flight,
                sent=self.sent, events=self._reader.events, loop_lag_us=lags_us, cpu_s=cpu_s, rss_bytes=rss_bytes,
            )  # fmt: skip

    def flush(self) -> None:
        """Hand what came to the kernel. Raises OSError when the disk is full."""
        if not self.closed:
            self._requests.flush()
            self._driver.flush()
            if self._texts is not None:
                self._texts.flush()

    def close(self, reason: str) -> None:
        """Write the last rows and the end of the run. Raises OSError when the disk is full; a second call does nothing."""
        if not self.closed:
            self.sample()
            self.flush()
            self.closed = True
            self._requests.close()
            self._driver.close()
            if self._texts is not None:
                self._texts.close()
            self.events.write("run_end", reason=reason, resent=self._reader.resent)  # last: whoever reads it finds whole files

    def abandon(self) -> None:
        """Stop recording where recording itself failed; what was written stays."""
        self.closed = True
        with contextlib.suppress(OSError):  # the disk is still full; a reader sees a run without an end, which means the same
            self.events.write("run_end", reason="interrupted")


def _storable(text: str) -> str:
    """Without the half characters that JSON can escape and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _outcome(stream: Stream, answer: Answer) -> tuple[str, str | None]:
    """What the reader saw of the connection, then the status, then what the stream itself said."""
    by_content = judge(stream.status, stream.content_type, stream.pieces, answer)
    if stream.outcome is None:
        return by_content
    if stream.outcome == "truncated" and by_content[0] not in {"ok", "truncated"}:
        return by_content  # an error status or an error event says more than the hang-up after it
    return stream.outcome, stream.error
