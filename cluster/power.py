"""The power meter: one process per node that writes down what its meters' joule counters say.

A GPU counts its own energy since the driver was loaded (NVML), a CPU package counts in RAPL until its register wraps.
Both are counters, so nothing is integrated here and a missed sample loses nothing: the energy of a window is the last
reading minus the first. What no meter counts is reported as *not measured*, never guessed from a data sheet.

The last readings are also a metrics page for Prometheus, on loopback, found by targets/<process>.json in the run directory.

    python -m cluster.power RUN_DIR [--interval-s 0.5] [--process power-<host>] [--host 127.0.0.1] [--port 0]
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily

from kilocopy.metrics import ENERGY
from kilocopy.problem import ProblemError
from kilocopy.records import Writer, write_json

POWERCAP = Path("/sys/class/powercap")
FLUSH_S = 1.0
NO_METER = "no power meter on this host: no NVML, RAPL not readable; energy will be reported as not measured"


class Meter(Protocol):
    """A growing counter of joules; only differences mean anything. A reading that fails is a missing sample."""

    device: str
    boundary: str  # gpu | host

    def read_j(self) -> float:
        """The counter now, J. Raises OSError when it cannot be read."""


class GpuMeter:
    """One GPU's counter since the driver was loaded; NVML gives millijoules and moves it about every 100 ms."""

    boundary = "gpu"

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        uuid = nvml.nvmlDeviceGetUUID(handle)
        self.device = uuid.decode() if isinstance(uuid, bytes) else str(uuid)
        self.read_j()  # GPUs before Volta have no such counter: find out now

    def read_j(self) -> float:
        """Joules since the driver was loaded. Raises OSError when the driver does not answer."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error


class RaplMeter:
    """One CPU package's counter: microjoules in a register that wraps after some minutes under load, unwrapped here.

    It has to be read at least once per wrap (262 kJ at 200 W: every 20 minutes), or a whole turn goes unseen.
    """

    boundary = "host"

    def __init__(self, zone: Path) -> None:
        self.device = f"rapl:{zone.name}"
        self._path = zone / "energy_uj"
        self._range_uj = int((zone / "max_energy_range_uj").read_text())
        self._last_uj = int(self._path.read_text())
        self._turns = 0

    def read_j(self) -> float:
        """Joules, growing across wraps. Raises OSError when the file cannot be read."""
        now_uj = int(self._path.read_text())
        if now_uj < self._last_uj:
            self._turns += 1
        self._last_uj = now_uj
        # A turn is range + 1 uJ to the letter; the 1 is far below what the counter resolves.
        return (self._turns * self._range_uj + now_uj) / 1e6


def meters(powercap: Path = POWERCAP, nvml: Any = None) -> list[Meter]:
    """Every meter of this host that can be read: GPUs by NVML, CPU packages by RAPL. `nvml` stands in for pynvml."""
    return [*_gpus(nvml), *_packages(powercap)]


def _gpus(nvml: Any) -> Iterator[GpuMeter]:
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        return
    except nvml.NVMLError:  # no driver, no GPU
        return
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            yield GpuMeter(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
        except (nvml.NVMLError, OSError):
            continue


def _packages(powercap: Path) -> Iterator[RaplMeter]:
    """Packages are intel-rapl:N (AMD's too). N:M is a part of one, psys and the MMIO view count it again."""
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                yield RaplMeter(zone)
        except (OSError, ValueError):  # since 2020 kernels let only root read energy_uj (CVE-2020-8694)
            continue


def node_ip() -> str:
    """The address that Ray finds for this node, by which its metrics name it: that of the way out; of the host's name where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 53))  # as Ray does: over UDP this sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            pass
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


class Page:
    """The metrics page: the last reading of each meter. One that cannot be read any more goes from the page, and is no zero."""

    def __init__(self, run: str) -> None:
        self._run, self._node, self._ip = run, socket.gethostname(), node_ip()
        self.last_j: dict[tuple[str, str], float] = {}  # by device and boundary

    def collect(self) -> Iterator[CounterMetricFamily]:
        """For prometheus_client."""
        family = CounterMetricFamily(ENERGY.name, ENERGY.help, labels=ENERGY.labels)
        for (device, boundary), energy_j in self.last_j.copy().items():
            family.add_metric((self._run, device, boundary, self._node, self._ip), energy_j)
        yield family

    def serve(self, run_dir: Path, process: str, host: str, port: int) -> None:
        """Listen, from a thread of its own, and say where in targets/. Raises OSError when the port is taken."""
        registry = CollectorRegistry()
        registry.register(self)
        server, _ = start_http_server(port, host, registry)
        (run_dir / "targets").mkdir(exist_ok=True)
        target = {"targets": [f"{host}:{server.server_port}"], "labels": {"job": "kilocopy"}}
        write_json(run_dir / "targets" / f"{process}.json", [target])


def sample(found: list[Meter], writer: Writer, page: Page | None = None) -> None:
    """Append one row per meter, each stamped when its own reading came back."""
    for meter in found:
        try:
            energy_j = meter.read_j()
        except (OSError, ValueError):
            if page:
                page.last_j.pop((meter.device, meter.boundary), None)
            continue
        if page:
            page.last_j[meter.device, meter.boundary] = energy_j
        row = {"time_ns": time.perf_counter_ns(), "device": meter.device, "boundary": meter.boundary}
        writer.append({**row, "energy_j": energy_j})


def record(found: list[Meter], writer: Writer, interval_s: float, stop: threading.Event, page: Page | None = None) -> None:
    """Sample on a fixed grid until `stop`, then once more, so that the record reaches to the end of the run."""
    start_s = flushed_s = time.monotonic()
    ticks = 0
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:  # an orphan would write for ever
        sample(found, writer, page)
        if time.monotonic() - flushed_s >= FLUSH_S - interval_s / 2:
            writer.flush()
            flushed_s = time.monotonic()
        ticks = max(ticks + 1, int((time.monotonic() - start_s) / interval_s))
        stop.wait(max(0.0, min(start_s + ticks * interval_s - time.monotonic(), FLUSH_S)))
    sample(found, writer)
    writer.close()


def main(argv: list[str] | None = None, powercap: Path = POWERCAP, nvml: Any = None) -> int:
    """Run the meter until SIGTERM or SIGINT; without one, say so and leave no file."""
    parser = argparse.ArgumentParser(prog="python -m cluster.power", description="Record this host's energy counters.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--interval-s", type=float, default=0.5)
    parser.add_argument("--process", default=f"power-{socket.gethostname()}", help="name of the file under energy/")
    parser.add_argument("--host", default="127.0.0.1", help="where the metrics page listens")
    parser.add_argument("--port", type=int, default=0, help="its port; 0 takes a free one")
    asked = parser.parse_args(argv)
    try:
        return _run(asked, meters(powercap, nvml))
    except ProblemError as problem:
        print(problem, file=sys.stderr)
        return problem.code


def _run(asked: argparse.Namespace, found: list[Meter]) -> int:
    run_dir, interval_s, process = asked.run_dir, asked.interval_s, asked.process
    if not 0.02 <= interval_s <= 60:
        raise ProblemError(f"--interval-s: must be from 0.02 to 60 seconds, got {interval_s:g}")
    if not run_dir.is_dir():
        raise ProblemError(f"{run_dir}: no such run directory")
    if not found:
        print(NO_METER, file=sys.stderr)
        return 0
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        writer = Writer(run_dir, "energy", process)
    except FileExistsError:
        path = run_dir / "energy" / f"{process}.arrow"
        raise ProblemError(f"{path}: exists, another meter wrote it; give --process another name") from None
    page = Page(run_dir.resolve().name)
    try:
        page.serve(run_dir, process, asked.host, asked.port)
    except OSError as error:  # the record counts; watching it is extra
        print(f"metrics page at {asked.host}:{asked.port}: {error.strerror or error}; energy is recorded, not shown live", file=sys.stderr)
    record(found, writer, interval_s, stop, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
