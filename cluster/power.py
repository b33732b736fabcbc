"""The power meter: one process per node that writes down what its meters' joule counters say.

A GPU counts its own energy since the driver was loaded (NVML), a CPU package counts in RAPL until its register wraps.
Both are counters, so nothing is integrated here and a missed sample loses nothing: the energy of a window is the last
reading minus the first. What no meter counts is reported as *not measured*, never guessed from a data sheet.

The last readings are also a metrics page for Prometheus, on loopback, found by targets/<process>.json in the run directory. A node that
is driven from elsewhere has the page alone; whoever drives reads it (cluster/power_pages.py).

    python -m cluster.power RUN_DIR [--interval-s 0.5] [--process power-<host>] [--host 127.0.0.1] [--port 0]
    python -m cluster.power RUN_DIR --from URL ...        meters of other nodes, by their pages
    python -m cluster.power --page --host HOST --port PORT         a page of this node's meters, read when it is asked for
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from kilocopy.metrics import ENERGY, METERS
from kilocopy.problem import ProblemError
from kilocopy.records import Writer, write_json

POWERCAP = "KILOCOPY_POWERCAP"  # where RAPL is, for a container that has the host's mounted elsewhere
BOUNDARIES = ("gpu", "host")
PART = "some hosts"  # the boundary of hosts' meters on a page while some node has none: a part of a sum is no sum
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


def meters(powercap: Path | None = None, nvml: Any = None) -> list[Meter]:
    """Every meter of this host that can be read: GPUs by NVML, CPU packages by RAPL. `nvml` stands in for pynvml."""
    return [*_gpus(nvml), *_packages(powercap or _powercap())]


def _powercap() -> Path:
    return Path(os.environ.get(POWERCAP) or "/sys/class/powercap")


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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a meter is: host's name, address as Ray has it, and what two nodes have in common that read the very same counters."""

    node: str
    ip: str
    machine: str


def here(ip: str | None = None, powercap: Path | None = None) -> Place:
    """This node. Two pods of one host have its boot in common, and see its packages both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = socket.gethostname()
    machine = hashlib.sha256(f"{boot} {(powercap or _powercap()).resolve()}".encode()).hexdigest()[:12]
    return Place(socket.gethostname(), ip or node_ip(), machine)


class Page:
    """The metrics page: the last reading of each meter. One that cannot be read any more goes from the page, and is no zero.

    `refresh` is called before each page is made, where readings do not come by themselves.
    """

    def __init__(self, run: str, refresh: Callable[[Page], None] = lambda _: None) -> None:
        self._run, self._refresh, self._lock = run, refresh, threading.Lock()
        self.last_j: dict[tuple[Place, str, str], float] = {}  # by place, device and boundary
        self.counted: dict[tuple[Place, str], int] = {}  # meters, by place and boundary

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """For prometheus_client, which asks from several threads."""
        with self._lock:
            self._refresh(self)
            read, counted = self.last_j.copy(), self.counted.copy()
        hosts = [number for (_, boundary), number in counted.items() if boundary == "host"]
        named = {"host": PART} if any(hosts) and not all(hosts) else {}
        family = CounterMetricFamily(ENERGY.name, ENERGY.help, labels=ENERGY.labels)
        for (place, device, boundary), energy_j in read.items():
            family.add_metric((self._run, device, named.get(boundary, boundary), place.node, place.ip), energy_j)
        yield family
        found = GaugeMetricFamily(METERS.name, METERS.help, labels=METERS.labels)
        for (place, boundary), number in counted.items():
            found.add_metric((self._run, boundary, place.node, place.ip, place.machine), number)
        yield found

    def listen(self, host: str, port: int) -> str:
        """Serve the page from a thread of its own; returns HOST:PORT. Raises OSError when the port is taken."""
        registry = CollectorRegistry()
        registry.register(self)
        server, _ = start_http_server(port, host, registry)
        return f"{host}:{server.server_port}"

    def serve(self, run_dir: Path, process: str, host: str, port: int) -> None:
        """Listen, and say where in targets/. Raises OSError when the port is taken."""
        target = {"targets": [self.listen(host, port)], "labels": {"job": "kilocopy"}}
        (run_dir / "targets").mkdir(exist_ok=True)
        write_json(run_dir / "targets" / f"{process}.json", [target])


def on_page(page: Page, place: Place, found: list[Meter]) -> None:
    """How many meters of each kind a place has, also none."""
    page.counted |= {(place, boundary): sum(meter.boundary == boundary for meter in found) for boundary in BOUNDARIES}


def sample(found: list[Meter], writer: Writer | None, page: Page | None = None, place: Place | None = None) -> None:
    """Append one row per meter, each stamped when its own reading came back."""
    place = place or here()
    for meter in found:
        try:
            energy_j = meter.read_j()
        except (OSError, ValueError):
            if page:
                page.last_j.pop((place, meter.device, meter.boundary), None)
            continue
        if page:
            page.last_j[place, meter.device, meter.boundary] = energy_j
        if writer:
            row = {"time_ns": time.perf_counter_ns(), "device": meter.device, "boundary": meter.boundary, "node": place.ip}
            writer.append({**row, "energy_j": energy_j})


def record(take: Callable[[], None], writer: Writer, interval_s: float, stop: threading.Event) -> None:
    """`take` samples on a fixed grid until `stop`, then once more, so that the record reaches to the end of the run."""
    start_s = flushed_s = time.monotonic()
    ticks = 0
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:  # an orphan would write for ever
        take()
        if time.monotonic() - flushed_s >= FLUSH_S - interval_s / 2:
            writer.flush()
            flushed_s = time.monotonic()
        ticks = max(ticks + 1, int((time.monotonic() - start_s) / interval_s))
        stop.wait(max(0.0, min(start_s + ticks * interval_s - time.monotonic(), FLUSH_S)))
    take()
    writer.close()


def main(argv: list[str] | None = None, powercap: Path | None = None, nvml: Any = None) -> int:
    """Run the meter until SIGTERM or SIGINT; without one, say so and leave no file."""
    parser = argparse.ArgumentParser(prog="python -m cluster.power", description="Record this host's energy counters.")
    parser.add_argument("run_dir", type=Path, nargs="?")
    parser.add_argument("--page", action="store_true", help="serve a page of this node's meters, and record nothing")
    parser.add_argument("--from", dest="pages", nargs="+", metavar="URL", help="record other nodes' meters, by their pages")
    parser.add_argument("--interval-s", type=float, default=0.5)
    parser.add_argument("--process", default=f"power-{socket.gethostname()}", help="name of the file under energy/")
    parser.add_argument("--host", default="127.0.0.1", help="where the metrics page listens")
    parser.add_argument("--port", type=int, default=0, help="its port; 0 takes a free one")
    asked = parser.parse_args(argv)
    try:
        if asked.page and not asked.pages and asked.run_dir is None:
            return _only_page(asked, powercap, nvml)
        if asked.page or asked.run_dir is None:
            raise ProblemError("give a run directory, or --page without one")
        return _run(asked, powercap, nvml)
    except ProblemError as problem:
        print(problem, file=sys.stderr)
        return problem.code


def _stopped_by_signal() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _only_page(asked: argparse.Namespace, powercap: Path | None, nvml: Any) -> int:
    """A page whose readings are of the moment in which it is asked for. It belongs to no run."""
    found, place, stop = meters(powercap, nvml), here(powercap=powercap), _stopped_by_signal()
    page = Page("", lambda page: sample(found, None, page, place))
    on_page(page, place, found)
    try:
        where = page.listen(asked.host, asked.port)
    except OSError as error:
        raise ProblemError(f"--host {asked.host} --port {asked.port}: cannot listen there ({error.strerror}); give a free port") from None
    print(f"power meters at http://{where}/metrics: {len(found)}" if found else NO_METER, file=sys.stderr, flush=True)
    stop.wait()
    return 0


def _run(asked: argparse.Namespace, powercap: Path | None, nvml: Any) -> int:
    run_dir, interval_s, process = asked.run_dir, asked.interval_s, asked.process
    if not 0.02 <= interval_s <= 60:
        raise ProblemError(f"--interval-s: must be from 0.02 to 60 seconds, got {interval_s:g}")
    if not run_dir.is_dir():
        raise ProblemError(f"{run_dir}: no such run directory")
    found = [] if asked.pages else meters(powercap, nvml)
    if not found and not asked.pages:
        print(NO_METER, file=sys.stderr)
        return 0
    stop = _stopped_by_signal()
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
    if asked.pages:
        from cluster.power_pages import Pages  # noqa: PLC0415  which builds on this module

        with Pages(asked.pages, run_dir, writer, page) as pages:
            record(pages.take, writer, interval_s, stop)
    else:
        place = here(powercap=powercap)
        on_page(page, place, found)
        record(lambda: sample(found, writer, page, place), writer, interval_s, stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
