"""Run directories with known numbers, written as a driver, a scraper and a meter would write them.

`Run` keeps an ideal batching server: every stream has the same TTFT and the same gap, so every figure can be worked by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kilocopy.records import Events, Writer

BASE_NS = 5_000_000_000_000
ANCHOR = {"wall_ns": str(1_800_000_000 * 10**9 + BASE_NS), "perf_ns": str(BASE_NS), "host": "here", "process": "driver-0"}
DAY = "2026-01-02"


def quoted(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """A stated number."""
    return {"value": value, "source": "assumed: a test", "date": DAY, "low": low, "high": high}


def spec(copies: Sequence[int] = (4,), **changes: Any) -> dict[str, Any]:
    """A spec with one closed stage per entry; the first second of each is ramp, the second warm-up."""
    tree: dict[str, Any] = {
        "name": "known",
        "model": {"id": "toy", "source": "/nowhere", "parameters_active": 1e6},
        "cluster": {"replicas": 2, "hardware": {"kind": "gpu", "gpus_per_replica": 1}},
        "workload": {"prompts": {"kind": "synthetic", "input_tokens": 10}, "output_tokens": 10},
        "stages": [{"arrival": "closed", "copies": n, "duration_s": 20, "warmup_s": 1, "ramp_s": 1} for n in copies],
        "slo": {"tokens_per_s_per_copy": 9, "ttft_s": 1},
        "page": {"words": 500},
        "prices": {
            "hardware": {"kind": "rented", "usd_per_device_hour": quoted(2.0), "utilisation": 0.5},
            "electricity_usd_per_kwh": quoted(0.1),
            "pue": quoted(1.25),
        },
    }
    return tree | changes


class Run:
    """A run directory in the making. Times are seconds after the run's start, streams are laid down copy by copy."""

    def __init__(self, path: Path, tree: dict[str, Any] | None = None, *, shift_ns: int = 0, **manifest: Any) -> None:
        self.path, self.shift_ns, self.spec = path, shift_ns, tree or spec()
        path.mkdir(parents=True, exist_ok=True)
        content = {"schema_version": 1, "id": "T_known", "name": "known", "spec": self.spec, "training": None} | manifest
        (path / "manifest.json").write_text(json.dumps(content))
        self.events = Events(path, "driver-0")
        self.requests = Writer(path, "requests", "driver-0", ANCHOR)
        self.driver = Writer(path, "driver", "driver-0", ANCHOR)
        self.server = Writer(path, "server", "scraper", ANCHOR | {"process": "scraper"})
        self.energy = Writer(path, "energy", "power", ANCHOR | {"process": "power"})

    def ns(self, at_s: float) -> int:
        """A time on the driver's clock."""
        return BASE_NS + self.shift_ns + round(at_s * 1e9)

    def event(self, name: str, at_s: float, **fields: Any) -> None:
        """One event, stamped at a time of the run."""
        self.events.write(name, time_ns=self.ns(at_s), wall_ns=1_800_000_000 * 10**9 + self.ns(at_s), **fields)

    def stream(self, sent_s: float, ttft_s: float = 0.1, gaps_s: Sequence[float] = (0.1,) * 9, **fields: Any) -> float:
        """One ok request of one token a chunk and a word every two tokens; returns when it finished."""
        first_s = sent_s + ttft_s
        last_s = first_s + sum(gaps_s)
        row = {
            "stage": 0, "level": 0, "worker": 0, "copy": 0, "sequence": 0,
            "scheduled_ns": self.ns(sent_s), "sent_ns": self.ns(sent_s), "first_token_ns": self.ns(first_s),
            "last_token_ns": self.ns(last_s), "finished_ns": self.ns(last_s),
            "prompt_tokens": 10, "output_tokens": len(gaps_s) + 1, "output_words": (len(gaps_s) + 1) // 2,
            "chunks": len(gaps_s) + 1, "gaps_us": [round(gap * 1e6) for gap in gaps_s], "outcome": "ok", "status": 200,
        }  # fmt: skip
        self.requests.append(row | fields)
        return last_s

    def failure(self, sent_s: float, finished_s: float, outcome: str = "http_5xx", **fields: Any) -> float:
        """One request that never got a token."""
        row = {
            "stage": 0, "level": 0, "worker": 0, "copy": 0, "sequence": 0,
            "scheduled_ns": self.ns(sent_s), "sent_ns": self.ns(sent_s),
            "finished_ns": self.ns(finished_s), "chunks": 0, "gaps_us": [], "outcome": outcome,
        }  # fmt: skip
        self.requests.append(row | fields)
        return finished_s

    def drop(self, scheduled_s: float, **fields: Any) -> None:
        """One arrival that found no stream free."""
        self.failure(scheduled_s, scheduled_s, "dropped", sent_ns=None, **fields)

    def stage(
        self, index: int = 0, start_s: float = 0.0, asks_s: float = 22.0, *, copies: int | None = None, place: Mapping[str, Any] | None = None,
        **stream: Any,
    ) -> float:  # fmt: skip
        """A whole stage of full streams back to back, its events, and a driver that is never late; returns when it settled.

        `place`: level and load, for a search's level of so many copies.
        """
        place = dict(place or {})
        level = {"level": place["level"]} if "level" in place else {}
        copies = copies or self.spec["stages"][index]["copies"]
        ended_s = start_s
        for copy in range(copies):
            at_s, sequence = start_s + copy / copies, 0
            while at_s < start_s + asks_s:
                at_s = self.stream(at_s, stage=index, copy=copy, sequence=sequence, **level, **stream)
                sequence += 1
            ended_s = max(ended_s, at_s)
        self.marks(index, start_s, start_s + asks_s, ended_s, **place)
        for second in range(int(asks_s)):
            self.lag(start_s + second + 0.5, index)
        return ended_s + 1

    def arrivals(self, times_s: Sequence[float], lengths: Sequence[int], *, ttft_s: float = 0.1, gap_s: float = 0.1, **fields: Any) -> float:
        """Open-loop requests at these times, of so many tokens each; returns when the last one ended."""
        pairs = enumerate(zip(times_s, lengths, strict=True))
        return max(self.stream(at_s, ttft_s, [gap_s] * (tokens - 1), copy=n, **fields) for n, (at_s, tokens) in pairs)

    def marks(self, index: int, start_s: float, stop_s: float, drained_s: float, **place: Any) -> None:
        """The events of a stage that came to its end."""
        level = {key: value for key, value in place.items() if key != "load"}
        self.event("stage_start", start_s, stage=index, **place)
        self.event("stage_stop_asking", stop_s, stage=index, **level)
        self.event("stage_drained", drained_s, stage=index, **level)
        self.event("stage_settled", drained_s + 1, stage=index, **level)

    def lag(self, at_s: float, stage: int = 0, lag_us: int = 100, **fields: Any) -> None:
        """A second of the driver's health."""
        self.driver.append({"time_ns": self.ns(at_s), "stage": stage, "worker": 0, "loop_lag_us": [lag_us] * 10} | fields)

    def scrape(self, at_s: float, target: str = "a:1", labels: str = "{}", **values: float) -> None:
        """One scrape of one target."""
        for name, value in values.items():
            row = {"time_ns": self.ns(at_s), "target": target, "name": name, "labels": labels, "value": value}
            self.server.append(row)

    def meter(self, at_s: float, energy_j: float, device: str = "GPU-a", boundary: str = "gpu") -> None:
        """One reading of one meter."""
        self.energy.append({"time_ns": self.ns(at_s), "device": device, "boundary": boundary, "energy_j": energy_j})

    def end(self, at_s: float, reason: str = "complete") -> Path:
        """The run's end; returns its directory."""
        self.event("run_end", at_s, reason=reason)
        return self.close()

    def close(self) -> Path:
        """Close the files, as after a run or for a driver that was killed after its last flush."""
        for writer in (self.requests, self.driver, self.server, self.energy):
            writer.close()
        return self.path


def ideal(path: Path, tree: dict[str, Any] | None = None, *, shift_ns: int = 0, **manifest: Any) -> Path:
    """A complete run: stages one after the other, each stream 10 tokens in 1 s (TTFT 0.1 s, gaps 0.1 s), servers that agree."""
    run = Run(path, tree, shift_ns=shift_ns, **manifest)
    run.event("run_start", 0)
    at_s, counted = 0.0, 0
    for index, stage in enumerate(run.spec["stages"]):
        copies = stage["copies"]
        run.scrape(at_s, generation_tokens_total=counted, num_requests_running=0, num_requests_waiting=0)
        for second in range(2, 22):
            run.scrape(at_s + second, num_requests_running=copies, num_requests_waiting=0)
        ended_s = run.stage(index, at_s)
        counted += copies * 22 * 10
        run.scrape(ended_s + 0.5, generation_tokens_total=counted, num_requests_running=0, num_requests_waiting=0)
        at_s = ended_s + 1
    for second in range(int(at_s) + 2):
        run.meter(second, 1e6 + 200 * second)
        run.meter(second, 300 * second, device="GPU-b")
    return run.end(at_s)


def timed(**changes: Any) -> dict[str, Any]:
    """A spec of one Poisson stage: 2 s of warm-up, 40 s that count."""
    stage = {"arrival": "poisson", "rate_per_s": 10, "duration_s": 40, "warmup_s": 2}
    return spec(stages=[stage | changes])


def poisson(rate_per_s: float, until_s: float, mean_tokens: float, seed: int) -> tuple[list[float], list[int]]:
    """Poisson arrivals in [0, until_s) and geometric lengths: with a fixed time per token, M/M/infinity (nearly: whole tokens)."""
    draw = np.random.default_rng(seed)
    times_s = np.sort(draw.uniform(0, until_s, draw.poisson(rate_per_s * until_s)))
    return times_s.tolist(), draw.geometric(1 / mean_tokens, len(times_s)).tolist()
