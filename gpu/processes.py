"""Who used the processors: CPU seconds of the driver, the proxy, the replica, the engine, over time, to say what a limit was made of."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import numpy as np
import psutil

INTERVAL_S = 2.0
# In this order: the first that fits names the process. What vLLM and Ray set as titles, or what the command line says.
PARTS = (
    ("driver", ("-m locust",)),
    ("haproxy", ("haproxy",)),
    ("engine core", ("VLLM::EngineCore", "EngineCore")),
    ("engine worker", ("RayWorkerProc", "VLLM::Worker", "VllmWorker", "ray::RayWorkerWrapper")),
    ("router", ("LLMRouter",)),
    ("replica", ("LLMServer",)),
    ("bare frontend", ("cluster.bare",)),
    ("serve", ("ServeController", "ProxyActor", "HAProxyManager")),
    ("meters", ("cluster.power", "nvidia-smi")),
    ("ray", ("raylet", "gcs_server", "ray/dashboard", "ray::", "ray/_private")),
)


def part_of(command: str) -> str | None:
    """Which part of the stack a process is, by its title or command line; None: not of it."""
    for part, marks in PARTS:
        if any(mark in command for mark in marks):
            return part
    return None


class Processes:
    """Samples the CPU time of every process of the stack while the `with` block runs."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s, self._stop = interval_s, threading.Event()
        self._seen: dict[tuple[int, float], tuple[str, float]] = {}  # by process id and birth: part, CPU seconds
        self._first: dict[tuple[int, float], float] = {}
        self._times_s: list[float] = []
        self._totals: list[dict[str, float]] = []
        self._thread = threading.Thread(target=self._loop, name="processes", daemon=True)

    def __enter__(self) -> Processes:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._sample()

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        for process in psutil.process_iter():
            try:
                key = process.pid, process.create_time()
                known = self._seen.get(key)
                part = known[0] if known else part_of(" ".join(process.cmdline()) or process.name())
                if part is not None:
                    cpu = process.cpu_times()
                    # What it had used before it was first seen is not of this interval.
                    self._first.setdefault(key, 0.0 if self._times_s else cpu.user + cpu.system)
                    self._seen[key] = part, cpu.user + cpu.system - self._first[key]
            except (psutil.Error, OSError):
                continue
        totals: dict[str, float] = {}
        for part, cpu_s in self._seen.values():
            totals[part] = totals.get(part, 0.0) + cpu_s
        self._times_s.append(time.perf_counter())
        self._totals.append(totals)

    def cores(self, start_s: float, end_s: float) -> dict[str, float]:
        """Cores that each part used between two times of `time.perf_counter`; a process that ended counts with what it was last seen to have."""
        if len(self._times_s) < 2 or end_s <= start_s:
            return {}
        found = {}
        for part in sorted({part for totals in self._totals for part in totals}):
            used_s = [totals.get(part, 0.0) for totals in self._totals]
            first, last = np.interp([start_s, end_s], self._times_s, used_s)
            found[part] = round(float(last - first) / (end_s - start_s), 3)
        return found
