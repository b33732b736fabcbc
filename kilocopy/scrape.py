"""Reads the servers' counters once a second into server/*.arrow, beside the load, for the identity checks."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from urllib.parse import urlparse

from prometheus_client.parser import text_string_to_metric_families

from kilocopy import metrics
from kilocopy.records import Writer, write_json


def samples(page: bytes) -> list[tuple[str, dict[str, str], float]]:
    """(name, labels that count, value) of every recorded metric on one page, under one name for both exporters."""
    text = metrics.wanted(page).decode("utf-8", "replace").replace("vllm:", "ray_vllm_")
    found = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key in metrics.LABELS}
            found.append((sample.name.removeprefix("ray_vllm_"), labels, float(sample.value)))
    return found


def write_targets(run_dir: Path, pages: Sequence[str], cluster: str) -> None:
    """Write targets/servers.json, by which Prometheus (file_sd) and `kilocopy watch` find the servers' metrics pages.

    `cluster` becomes a label of all their series, as it is one of the driver's own. Raises OSError.
    """
    groups = [
        {
            "targets": [parts.netloc.rpartition("@")[2]],
            "labels": {"job": "servers", "cluster": cluster, "__scheme__": parts.scheme, "__metrics_path__": parts.path or "/metrics"},
        }
        for parts in map(urlparse, pages)
    ]
    (run_dir / "targets").mkdir(exist_ok=True)
    write_json(run_dir / "targets" / "servers.json", groups)


class Scraper:
    """A thread that scrapes all targets every `interval_s` while the `with` block runs.

    A target that does not answer is skipped and counted in `failures`; the run goes on, its checks say `not checked`.
    """

    def __init__(self, run_dir: Path, targets: Sequence[str], interval_s: float = 1.0) -> None:
        self.failures: dict[str, str] = {}
        self._targets, self._interval_s = list(targets), interval_s
        self._writer = Writer(run_dir, "server", "scraper") if targets else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="scraper", daemon=True)

    def __enter__(self) -> Scraper:
        if self._writer:
            self._once()  # the zero point, before the first request
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._writer:
            self._thread.join(timeout=15)
            self._once()
            with contextlib.suppress(OSError):
                self._writer.close()

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._once()

    def _once(self) -> None:
        assert self._writer is not None  # noqa: S101  only called with targets
        for target in self._targets:
            try:
                with urllib.request.urlopen(target, timeout=5) as answer:  # noqa: S310  http addresses of our own servers
                    page = answer.read()
                found = samples(page)
            except (OSError, ValueError, HTTPException) as error:
                self.failures[target] = str(error)
                continue
            now_ns = time.perf_counter_ns()
            for name, labels, value in found:
                row = {
                    "time_ns": now_ns,
                    "target": urlparse(target).netloc,
                    "name": name,
                    "labels": json.dumps(labels, sort_keys=True),
                    "value": value,
                }
                self._writer.append(row)
        try:
            self._writer.flush()
        except OSError as error:  # the load goes on; its checks will say `not checked`
            self.failures["recording"] = str(error)
