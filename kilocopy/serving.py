"""Starts, watches and stops the serving process (`cluster/serve.py`), across an environment boundary: files and signals only.

The state directory (KILOCOPY_STATE, by default ~/.local/state/kilocopy) holds spec.json, state.json, serve.log and targets/servers.json
(the metrics pages, as Prometheus finds them) of the one serving that this user has here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from kilocopy.application import FILES_PER_CONNECTION, FILES_SPARE, connections, files_for
from kilocopy.manifest import CHECKOUT, search_path
from kilocopy.problem import ProblemError
from kilocopy.receiving import TOKEN
from kilocopy.scrape import write_targets
from kilocopy.spec import CpuReplica, Spec, streams_max

MARK = "KILOCOPY_SERVE_ID"


def state_dir() -> Path:
    """Where the serving process keeps its state."""
    return Path(os.environ.get("KILOCOPY_STATE") or Path.home() / ".local" / "state" / "kilocopy")


def status() -> dict[str, Any] | None:
    """What state.json says, with `alive`; None when nothing was ever started."""
    try:
        state: dict[str, Any] = json.loads((state_dir() / "state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    state["alive"] = _is_ours(int(state["pid"]))
    if not state["alive"] and state["phase"] not in {"stopped", "failed"}:
        state["phase"] = "killed"
    return state


def served() -> Spec:
    """The spec of what is being served."""
    return Spec.model_validate_json((state_dir() / "spec.json").read_text(encoding="utf-8"))


def looking(url: str) -> Callable[[], dict[str, Any] | None]:
    """`status`, for a run against what is served here; for one against any other address, what knows of nothing."""
    state = status()
    return status if state and state["alive"] and state.get("url") == url else lambda: None


def same_cluster(spec: Spec) -> None:
    """What is driven has to be what is served, or every figure per replica and device is wrong. Raises ProblemError."""
    there = served()
    here = spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"address": there.cluster.address})})  # `kilocopy serve --address`
    for part in ("model", "cluster"):
        if getattr(there, part) != getattr(here, part):
            raise ProblemError(
                f"{part}: differs from that of '{there.name}', which is being served; `kilocopy down`, then `kilocopy serve` this spec"
            )


def _is_ours(pid: int) -> bool:
    """A process id is ours only if its command line says so: ids are used again."""
    try:
        return "cluster.serve" in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def check(spec: Spec) -> None:
    """What can be found wrong before anything starts. Raises ProblemError."""
    model_on_disk(spec)
    if not (CHECKOUT / "cluster" / "serve.py").exists():
        raise ProblemError(
            f"{CHECKOUT}: serving runs from the checkout, and cluster/ is not beside the installed package; clone the repository and run `make setup`"
        )
    enough_gpus(spec)
    enough_files(spec)
    if spec.cluster.address == "local":
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", spec.cluster.port))
            except OSError:
                raise ProblemError(
                    f"cluster.port {spec.cluster.port} is in use on this host; stop what listens there or set another port"
                ) from None


def model_on_disk(spec: Spec) -> None:
    """A source that looks like a directory has to be one with a model in it."""
    source = spec.model.source
    path = Path(source).expanduser()
    looks_local = path.exists() or source.startswith((".", "/", "~"))
    if re.match(r"^[a-z0-9]+://", source) or not looks_local:
        return
    if not path.is_dir():
        raise ProblemError(
            f"model.source {source}: no such directory; train the demo model with `kilocopy train --out {source}` or give a Hugging Face id"
        )
    if not (path / "config.json").exists():
        raise ProblemError(
            f"model.source {source}: the directory has no config.json, so it is not a Hugging Face model; point at the directory that holds config.json and the weights"
        )


def enough_gpus(spec: Spec) -> None:
    """A Ray of our own has this host's GPUs and no others. Raises ProblemError."""
    if spec.cluster.address != "local" or isinstance(spec.cluster.hardware, CpuReplica):
        return
    from kilocopy.manifest import gpus  # noqa: PLC0415

    have = len(gpus())
    if spec.cluster.devices > have:
        raise ProblemError(
            f"cluster: {spec.cluster.replicas} replicas need {spec.cluster.devices:g} GPUs, this host has {have}; use fewer replicas, hardware.kind: cpu, or the address of a Ray cluster"
        )


def connections_here(spec: Spec) -> int:
    """HAProxy's limit on this host: fewer than the spec's own where not so many files may be open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return connections(spec) if hard == resource.RLIM_INFINITY else min(connections(spec), int((hard - FILES_SPARE) / FILES_PER_CONNECTION))


def enough_files(spec: Spec) -> None:
    """HAProxy needs a connection for each copy at the least. Raises ProblemError."""
    copies = max(streams_max(stage) for stage in spec.stages)
    if spec.cluster.address == "local" and spec.cluster.routing == "direct" and connections_here(spec) < copies:
        hard, need = resource.getrlimit(resource.RLIMIT_NOFILE)[1], files_for(copies)
        raise ProblemError(f"stages: HAProxy needs {need} open files for {copies} copies, this shell allows {hard}; `ulimit -Hn {need}` as root (LimitNOFILE in systemd), or fewer copies")


def start(spec: Spec, on_change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Start serving and return its state once every replica answers.

    `on_change` gets the state each time it changes. Raises ProblemError with the engine's own error when serving cannot start;
    on any exception, Ctrl-C included, what was started is stopped.
    """
    running = status()
    if running and running["alive"]:
        if running["spec_sha256"] == spec.sha256 and running["phase"] == "ready":
            return running
        raise ProblemError(f"'{running['name']}' is being served already (process {running['pid']}); `kilocopy down` stops it")
    check(spec)
    stop()  # what a killed serving left behind, while its mark is still known
    directory = state_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "state.json").unlink(missing_ok=True)
        (directory / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
        log = (directory / "serve.log").open("wb")
    except OSError as error:
        raise ProblemError(f"{directory}: cannot be written ({error.strerror}); set KILOCOPY_STATE to a directory that can") from None
    mark = uuid.uuid4().hex
    (directory / "mark").write_text(mark)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("GRAFANA_", TOKEN))}  # tokens are not for Ray's processes
    environment = inherited | {MARK: mark, "PYTHONPATH": search_path(), "PYTHONUNBUFFERED": "1"}
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.serve", str(directory)], cwd=Path.cwd(), env=environment, stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        state = _wait(process, directory, on_change, time.monotonic() + spec.cluster.start_timeout_s + 300)
        write_targets(directory, state["metrics"], spec.name, spec.model.id)  # for a Prometheus that watches whatever is served here
        return state
    except BaseException:
        on_change({"phase": "stopping"})
        stop()
        raise


def _wait(process: subprocess.Popen[bytes], directory: Path, on_change: Callable[[dict[str, Any]], None], until_s: float) -> dict[str, Any]:
    seen: dict[str, Any] | None = None
    while True:
        state = status()
        if state and state != seen:
            seen = state
            on_change(state)
            if state["phase"] == "ready":
                return state
        if process.poll() is not None:
            said = (status() or {}).get("error") or f"the serving process ended with exit code {process.returncode}"
            cause = root_cause(directory / "serve.log")
            if cause and cause not in said:
                said = f"{said}\n  the engine said: {cause}"
            raise ProblemError(f"{said}\n  log: {directory / 'serve.log'}")
        if time.monotonic() > until_s:
            raise ProblemError(
                f"serving hangs in phase '{(seen or {}).get('phase')}', past cluster.start_timeout_s; log: {directory / 'serve.log'}"
            )
        time.sleep(0.25)


def stay() -> None:
    """Wait as long as the serving process lives. Raises ProblemError when it ends by itself."""
    while (state := status()) and state["alive"]:
        time.sleep(1)
    raise ProblemError(f"{(state or {}).get('error') or 'the serving process ended'}\n  log: {state_dir() / 'serve.log'}", code=1)


def root_cause(log: Path) -> str | None:
    """The engine's own first error in the log; Serve's message often only says 'see root cause above'."""
    pattern = re.compile(r"\b((?:[\w.]*Error|OutOfMemory\w*|[\w.]*Exception)\b: .+)$")
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        match = pattern.search(line)
        if match and "EngineCore" in line and "See root cause" not in line:
            return re.sub(r"\x1b\[[0-9;]*m", "", match.group(1))[:600]
    return None


def stop(timeout_s: float = 30) -> bool:
    """Stop the serving process and everything it started, and nothing else. False when nothing was there to stop."""
    state = status()
    try:
        mark = (state_dir() / "mark").read_text()
    except FileNotFoundError:
        return False
    asked = False
    if state and state["alive"]:
        asked = True
        with contextlib.suppress(psutil.Error, KeyboardInterrupt):  # a second Ctrl-C: no more patience, but nothing left behind
            serving = psutil.Process(int(state["pid"]))
            serving.send_signal(signal.SIGTERM)
            serving.wait(timeout_s)
    left = [process for process in psutil.process_iter() if _marked(process, mark)]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=10)
    return asked or bool(left)


def _marked(process: psutil.Process, mark: str) -> bool:
    """Whether a process descends from our serving process: its environment carries the mark."""
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False
