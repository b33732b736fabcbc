"""Asks a real Prometheus as Grafana would, and works out the same quantities from a run's raw records."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kilocopy import dashboards, records

ROOT = Path(__file__).parent.parent

# What a run of a rented host without GPUs cannot show, each with its reason; everything else has to have data.
WITHOUT_DATA = {
    ("kilocopy-copies", "Price of a page", "electricity"): "rented hardware: its electricity is in the rent",
    ("kilocopy-hardware", "Energy in the time shown", "{{node}} gpu, by DCGM"): "no GPU",
    ("kilocopy-hardware", "GPU utilisation", "{{node}} GPU {{device}}"): "no GPU",
    ("kilocopy-hardware", "GPU memory", "{{node}} GPU {{device}}"): "no GPU",
}


@dataclass
class Prometheus:
    """Its HTTP API; times are seconds since the epoch."""

    url: str

    def _get(self, path: str, **parameters: Any) -> Any:
        asked = urllib.parse.urlencode(parameters, doseq=True)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{asked}", timeout=20) as answer:
            return json.load(answer)["data"]

    def vector(self, expr: str, time_s: float) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series at a moment."""
        return [(each["metric"], float(each["value"][1])) for each in self._get("query", query=expr, time=time_s)["result"]]

    def value(self, expr: str, time_s: float) -> float:
        """The one value of an expression."""
        found = self.vector(expr, time_s)
        assert len(found) == 1, (expr, found)
        return found[0][1]

    def lines(self, expr: str, start_s: float, end_s: float) -> list[list[float]]:
        """Values of each series, every 5 s, as a panel draws them."""
        found = self._get("query_range", query=expr, start=start_s, end=end_s, step=5)["result"]
        return [[float(value) for _, value in each["values"]] for each in found]

    def label_values(self, query: str, start_s: float, end_s: float) -> list[str]:
        """A dashboard variable's `label_values(selector, label)`, as Grafana resolves it."""
        asked = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
        assert asked, query
        return list(self._get(f"label/{asked[2]}/values", **{"match[]": asked[1]}, start=start_s, end=end_s))


def variables(prometheus: Prometheus, start_s: float, end_s: float) -> dict[str, list[str]]:
    """Every value that the dashboards' variables offer, one variable after the other: later ones use earlier ones."""
    chosen: dict[str, list[str]] = {}
    for variable in dashboards.variables()[1:]:
        query = dashboards.filled(variable["query"]["query"], as_regex(chosen))
        chosen[variable["name"]] = prometheus.label_values(query, start_s, end_s)
    return chosen


def as_regex(chosen: dict[str, list[str]]) -> dict[str, str]:
    """Several values as Grafana fills them in: escaped, as alternatives."""
    return {name: "(" + "|".join(re.sub(r"[.*+?^${}()|\[\]\\/-]", r"\\\g<0>", value) for value in values) + ")" for name, values in chosen.items()}


def panels_without_data(prometheus: Prometheus, start_s: float, end_s: float) -> set[tuple[str, str, str]]:
    """(dashboard, panel, legend) of each query that has not one finite value from `start_s` to `end_s`."""
    filled_in = as_regex(variables(prometheus, start_s, end_s)) | {"__range": f"{end_s - start_s:.0f}s"}
    empty = set()
    for board in dashboards.DASHBOARDS:
        for panel in board.panels:
            for expr, legend in panel.queries:
                lines = prometheus.lines(dashboards.filled(expr, filled_in), start_s, end_s)
                if not any(np.isfinite(line).any() for line in lines):
                    empty.add((board.uid, panel.title, legend))
    return empty


class Raw:
    """The raw records of a run, in seconds since the epoch."""

    def __init__(self, run_dir: Path) -> None:
        anchor = records.read_events(run_dir)[0]
        offset_ns = anchor["wall_ns"] - anchor["time_ns"]
        table = records.read(run_dir, "requests")
        self.finished_s, self.sent_s = ((table.column(name).to_numpy() + offset_ns) / 1e9 for name in ("finished_ns", "sent_ns"))
        self.tokens, self.words = (table.column(name).to_numpy() for name in ("output_tokens", "output_words"))
        energy = records.read(run_dir, "energy")
        self.energy_s, self.energy_j = (energy.column("time_ns").to_numpy() + offset_ns) / 1e9, energy.column("energy_j").to_numpy()
        self.devices = set(energy.column("device").to_pylist())

    def ended(self, start_s: float, end_s: float, what: Any) -> float:
        """The sum over the requests that ended in an interval, per second."""
        return float(what[(self.finished_s > start_s) & (self.finished_s <= end_s)].sum() / (end_s - start_s))

    def copies(self, start_s: float, end_s: float) -> float:
        """Mean of the requests open in an interval."""
        return float((np.minimum(self.finished_s, end_s) - np.maximum(self.sent_s, start_s)).clip(0).sum() / (end_s - start_s))

    def watts(self, start_s: float, end_s: float) -> float:
        """Mean power of the one meter."""
        assert len(self.devices) == 1
        order = np.argsort(self.energy_s)
        at = np.interp([start_s, end_s], self.energy_s[order], self.energy_j[order])
        return float((at[1] - at[0]) / (end_s - start_s))


class KnownMeter:
    """The real power meter over a counter that this test moves: `watts` of one CPU package, in a directory like the kernel's."""

    def __init__(self, run_dir: Path, powercap: Path, watts: float, environment: dict[str, str]) -> None:
        zone = powercap / "intel-rapl:0"
        zone.mkdir(parents=True)
        (zone / "name").write_text("package-0\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")
        self._counter, self._watts, self._begun_s = zone / "energy_uj", watts, time.monotonic()
        self._stop = threading.Event()
        self._move()
        self._thread = threading.Thread(target=self._moving, daemon=True)
        code = "import sys; from pathlib import Path; from cluster import power; sys.exit(power.main(sys.argv[2:], powercap=Path(sys.argv[1])))"
        self._command = [sys.executable, "-c", code, str(powercap), str(run_dir), "--process", "power-test"]
        self._environment = environment | {"PYTHONPATH": str(ROOT)}

    def _move(self) -> None:
        new = self._counter.with_name("new")
        new.write_text(f"{int((time.monotonic() - self._begun_s) * self._watts * 1e6)}\n")
        new.replace(self._counter)

    def _moving(self) -> None:
        while not self._stop.wait(0.05):
            self._move()

    def __enter__(self) -> KnownMeter:
        self._thread.start()
        self._process = subprocess.Popen(self._command, env=self._environment)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._stop.set()
