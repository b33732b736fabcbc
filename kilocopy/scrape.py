"""Reads the servers' counters once a second into server/*.arrow, beside the load, for the identity checks."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlparse

from prometheus_client.parser import text_string_to_metric_families

from kilocopy import metrics
from kilocopy.records import Events, Writer, write_json

PAGE_S = 5.0  # a page that takes longer is missed
PAGES_AT_ONCE = 16

Found = list[tuple[str, dict[str, str], float]]


def samples(page: bytes) -> Found:
    """(name, labels that count, value) of every recorded metric on one page, under one name for both exporters."""
    text = metrics.wanted(page).decode("utf-8", "replace").replace("vllm:", "ray_vllm_")
    found = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key in metrics.LABELS}
            found.append((sample.name.removeprefix("ray_vllm_"), labels, float(sample.value)))
    return found


def write_targets(run_dir: Path, pages: Sequence[str], cluster: str, model: str) -> None:
    """Write targets/servers.json, by which Prometheus (file_sd) and `kilocopy watch` find the servers' metrics pages.

    `cluster` and `model` become labels of all their series, as they are of the driver's own. Raises OSError.
    """
    groups = [
        {
            "targets": [parts.netloc.rpartition("@")[2]],
            "labels": {"job": "servers", "cluster": cluster, "model": model, "__scheme__": parts.scheme, "__metrics_path__": parts.path or "/metrics"},
        }
        for parts in map(urlparse, pages)
    ]
    (run_dir / "targets").mkdir(exist_ok=True)
    write_json(run_dir / "targets" / "servers.json", groups)


class Scraper:
    """A thread that scrapes all targets every `interval_s`, side by side, while the `with` block runs.

    A target that does not answer is skipped and counted in `failures`; the run goes on, its checks say `not checked`, and the others
    are not kept waiting. `look` gives the state of the serving process where there is one: its pages are followed when nodes come and
    go, and what happens to its replicas becomes events of the run (`replica_running`, `replica_lost`, `router_running`, `router_lost`, `node_lost`, `node_joined`).
    """

    def __init__(
        self, run_dir: Path, targets: Sequence[str], interval_s: float = 1.0, look: Callable[[], Mapping[str, Any] | None] = lambda: None
    ) -> None:
        self.failures: dict[str, str] = {}
        self._run_dir, self._targets, self._interval_s, self._look = run_dir, list(targets), interval_s, look
        self._writer = Writer(run_dir, "server", "scraper") if targets else None
        self._pool = ThreadPoolExecutor(PAGES_AT_ONCE, thread_name_prefix="scrape")
        self._asked: dict[str, Future[tuple[int, Found]]] = {}
        self._fleet: Fleet | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="scraper", daemon=True)

    def __enter__(self) -> Scraper:
        if self._writer:
            self._once(PAGE_S)  # the zero point, before the first request
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._writer:
            self._thread.join(timeout=15)
            self._collect(PAGE_S)  # what was asked before the end is no end
            self._once(PAGE_S)
            with contextlib.suppress(OSError):
                self._writer.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _loop(self) -> None:
        due_s = time.monotonic() + self._interval_s
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            due_s = max(due_s + self._interval_s, time.monotonic())
            self._once(self._interval_s)

    def _once(self, wait_s: float) -> None:
        """Ask every page that is not being asked already, and keep what has come after `wait_s` at most."""
        try:
            self._follow()
        except OSError as error:
            self.failures["recording"] = str(error)
        for target in self._targets:
            if target not in self._asked:
                self._asked[target] = self._pool.submit(read_page, target)
        self._collect(wait_s)

    def _collect(self, wait_s: float) -> None:
        assert self._writer is not None  # noqa: S101  only called with targets
        for future in wait(list(self._asked.values()), wait_s).done:
            target = next(target for target, asked in self._asked.items() if asked is future)
            del self._asked[target]
            try:
                self._keep(target, *future.result())
            except (OSError, ValueError, HTTPException) as error:
                self.failures[target] = str(error)
        try:
            self._writer.flush()
        except OSError as error:  # the load goes on; its checks will say `not checked`
            self.failures["recording"] = str(error)

    def _keep(self, target: str, now_ns: int, found: Found) -> None:
        assert self._writer is not None  # noqa: S101  only called with targets
        for name, labels, value in found:
            self._writer.append(
                {"time_ns": now_ns, "target": urlparse(target).netloc, "name": name, "labels": json.dumps(labels, sort_keys=True), "value": value}
            )

    def _follow(self) -> None:
        """What changed in the fleet since the last look: its pages, and events of the run."""
        state = self._look()
        if not state or not state.get("alive") or not state.get("metrics"):
            return
        if state["metrics"] != self._targets:
            self._targets = list(state["metrics"])
            write_targets(self._run_dir, self._targets, str(state["name"]), str(state["model"]))
        fleet = Fleet.of(state)
        for event, fields in fleet.since(self._fleet):
            Events(self._run_dir, "scraper").write(event, **fields)
        self._fleet = fleet


def read_page(target: str) -> tuple[int, Found]:
    """When a page was read (perf_counter_ns), and what is on it. Raises OSError, ValueError or HTTPException."""
    with urllib.request.urlopen(target, timeout=PAGE_S) as answer:  # noqa: S310  http addresses of our own servers
        page = answer.read()
    return time.perf_counter_ns(), samples(page)


@dataclass(frozen=True)
class Fleet:
    """Which replicas and routers run, each with its node, and which nodes are there."""

    replicas: Mapping[str, str]
    routers: Mapping[str, str]
    nodes: frozenset[str]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Fleet:
        """As the serving process's state says."""
        running, routing = (
            {str(one["replica"]): str(one["node"]) for one in state.get(part, ()) if one["state"] == "RUNNING"} for part in ("fleet", "routers")
        )
        return cls(running, routing, frozenset(urlparse(page).hostname or page for page in state["metrics"]))

    def since(self, before: Fleet | None) -> Iterator[tuple[str, dict[str, str]]]:
        """The events that lie between."""
        if before is None:
            return
        yield from (("node_lost", {"node": node}) for node in sorted(before.nodes - self.nodes))
        yield from (("node_joined", {"node": node}) for node in sorted(self.nodes - before.nodes))
        for kind, then, now in (("replica", before.replicas, self.replicas), ("router", before.routers, self.routers)):
            yield from ((f"{kind}_lost", {kind: name, "node": then[name]}) for name in sorted(set(then) - set(now)))
            yield from ((f"{kind}_running", {kind: name, "node": now[name]}) for name in sorted(set(now) - set(then)))
