"""Is the power meter right? The GPU's energy counter against `nvidia-smi`'s watts over the same interval, and against its own step.

The counter moves in steps. A window's joules are the difference of two readings, so each edge is uncertain by what one step holds: the
step is measured by reading in a tight loop, not looked up. `nvidia-smi` reports power (on recent GPUs a mean over the last second, and
an instantaneous reading); its integral over some tens of seconds is a second way to the same joules.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cluster.power import GpuMeter, Meter
from kilocopy.problem import ProblemError

AGREE_FRACTION = 0.05  # nvidia-smi's own accuracy is given as +-5 W by its manual, and its samples are 0.1 s apart
SMI_EVERY_MS = 100
FIELDS = ("power.draw", "power.draw.average", "power.draw.instant")


@dataclass(frozen=True)
class Steps:
    """How a counter moves: seconds and joules between two changes of it, and what one reading costs."""

    steps: int
    interval_p50_s: float
    interval_p99_s: float
    step_p50_j: float
    step_max_j: float
    read_p50_s: float
    seconds: float


def steps(read_j: Callable[[], float], seconds: float, *, pause_s: float = 0.0002) -> Steps:
    """Read a counter over and over and time its changes. Raises ProblemError where it moved fewer than three times."""
    changes: list[tuple[float, float]] = []
    costs_s = []
    last_j, begin_s = read_j(), time.perf_counter()
    while (now_s := time.perf_counter()) - begin_s < seconds:
        value_j = read_j()
        costs_s.append(time.perf_counter() - now_s)
        if value_j != last_j:
            changes.append((time.perf_counter(), value_j - last_j))
            last_j = value_j
        time.sleep(pause_s)
    if len(changes) < 3:
        raise ProblemError(f"the energy counter moved {len(changes)} times in {seconds:g} s: too seldom to say what its step is")
    intervals_s = np.diff([at_s for at_s, _ in changes])
    joules = np.array([step_j for _, step_j in changes[1:]])  # the first step began before we looked
    return Steps(
        steps=len(joules),
        interval_p50_s=float(np.median(intervals_s)),
        interval_p99_s=float(np.percentile(intervals_s, 99)),
        step_p50_j=float(np.median(joules)),
        step_max_j=float(joules.max()),
        read_p50_s=float(np.median(costs_s)),
        seconds=seconds,
    )


class Smi:
    """`nvidia-smi` in its own loop while the `with` block runs: watts of one GPU, stamped when each line came."""

    def __init__(self, device: str, log: Path, command: Sequence[str] | None = None) -> None:
        found = command or ([path] if (path := shutil.which("nvidia-smi")) else None)
        if not found:
            raise ProblemError("nvidia-smi is not on the PATH: there is nothing to check the meter against")
        self.fields = _supported(found, device)
        self._log = log
        query = ",".join(self.fields)
        self._command = [*found, f"--id={device}", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--loop-ms={SMI_EVERY_MS}"]
        self.times_s: list[float] = []
        self.watts: dict[str, list[float]] = {field: [] for field in self.fields}

    def __enter__(self) -> Smi:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)
        self._thread = threading.Thread(target=self._read, name="nvidia-smi", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._thread.join(10)

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101
        with self._log.open("w", encoding="utf-8") as log:
            for line in self._process.stdout:
                now_s = time.perf_counter()
                log.write(f"{now_s:.6f},{line}")
                values = _numbers(line)
                if len(values) == len(self.fields):
                    self.times_s.append(now_s)
                    for field, value in zip(self.fields, values, strict=True):
                        self.watts[field].append(value)

    def joules(self, field: str, start_s: float, end_s: float) -> float:
        """Watts integrated between two times (trapezoids). Raises ProblemError where the samples do not cover them."""
        times_s, watts = np.array(self.times_s), np.array(self.watts[field])
        if not len(times_s) or times_s[0] > start_s or times_s[-1] < end_s:
            raise ProblemError(f"nvidia-smi's samples of {field} do not cover the interval; its words: {self._log}")
        inside = (times_s > start_s) & (times_s < end_s)
        at_s = np.concatenate([[start_s], times_s[inside], [end_s]])
        return float(np.trapezoid(np.interp(at_s, times_s, watts), at_s))


def _supported(command: Sequence[str], device: str) -> tuple[str, ...]:
    """The power fields that this nvidia-smi and this GPU have."""
    found = []
    for field in FIELDS:
        asked = [*command, f"--id={device}", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode == 0 and len(_numbers(done.stdout)) == 1:
            found.append(field)
    if not found:
        raise ProblemError("nvidia-smi reports no power of this GPU: there is nothing to check the meter against")
    return tuple(found)


def _numbers(line: str) -> list[float]:
    """The values of a line; empty where any is not a number ([N/A], a warning)."""
    try:
        return [float(value) for value in next(csv.reader([line.strip()]), [])]
    except ValueError:
        return []


def check(
    meter: Meter, smi: Smi, load: Callable[[], None], *, delay_s: float = 15.0, steps_s: float = 5.0, edge_s: float = 1.5
) -> dict[str, Any]:
    """Joules of one interval with `load` in it, both ways, and the counter's step from `delay_s` into it on: what parts/meter.json holds."""
    with ThreadPoolExecutor(1) as pool, smi:
        time.sleep(edge_s)  # the mean over the last second that nvidia-smi reports has to lie inside
        start_s, start_j = time.perf_counter(), meter.read_j()
        stepping = pool.submit(_later, delay_s, meter.read_j, steps_s)
        load()
        end_s, end_j = time.perf_counter(), meter.read_j()
        counter = asdict(stepping.result())
        time.sleep(edge_s)
    return compare(end_j - start_j, smi, start_s, end_s) | {"device": meter.device, "counter": counter}


def _later(delay_s: float, read_j: Callable[[], float], seconds: float) -> Steps:
    time.sleep(delay_s)
    return steps(read_j, seconds)


def compare(counter_j: float, smi: Smi, start_s: float, end_s: float) -> dict[str, Any]:
    """The counter's joules beside the integral of each of nvidia-smi's fields."""
    seconds = end_s - start_s
    ways = {}
    for field in smi.fields:
        smi_j = smi.joules(field, start_s, end_s)
        apart = abs(counter_j - smi_j) / max(counter_j, smi_j)
        ways[field] = {"joules": smi_j, "apart_fraction": apart, "agrees": apart <= AGREE_FRACTION}
    return {"seconds": seconds, "counter_j": counter_j, "mean_w": counter_j / seconds, "nvidia_smi": ways, "limit_fraction": AGREE_FRACTION}


def gpu_meter(found: Sequence[Meter]) -> GpuMeter | None:
    """The first GPU's meter of this host; None without one."""
    return next((meter for meter in found if isinstance(meter, GpuMeter)), None)
