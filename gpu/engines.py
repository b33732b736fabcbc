"""What a group's units are played against: the whole stack, or vLLM alone. Each makes a run directory, which the same code then measures."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from kilocopy import application, manifest, run
from kilocopy.problem import ProblemError
from kilocopy.spec import ClosedStage, Spec
from loadtests.workload import Workload

TOKENS_PER_S_MAX = 60_000  # more than one GPU makes of the models here: bounds the prompts that a bare stage may use
STREAM_TOKENS_PER_S_MAX = 1_000


class Served:
    """Ray Serve, HAProxy, vLLM, driven by Locust."""

    def __init__(self, state: dict[str, Any], runs: Path) -> None:
        self._state, self._runs = state, runs

    def play(self, spec: Spec, workers: int) -> Path:
        """Drive the spec's stage; returns the run directory, reported."""
        run_dir = run.drive(
            spec, self._runs, self._state["url"], targets=self._state["metrics"], web=False, shares_host=True, workers=workers
        )
        run.report(run_dir, quiet=True)
        return run_dir


@contextlib.contextmanager
def served(spec: Spec, runs: Path) -> Iterator[Served]:
    """Serve a group's spec for the time of a `with` block."""
    with run.serve(spec) as state:
        yield Served(state, runs)


class Bare:
    """vLLM in a process of its own (cluster/bare.py), a job a line."""

    def __init__(self, process: subprocess.Popen[str], log: Path, runs: Path, prompts: Path) -> None:
        self._process, self._log, self._runs, self._prompts = process, log, runs, prompts
        self._said: Queue[dict[str, Any]] = Queue()
        threading.Thread(target=self._listen, name="bare", daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None  # noqa: S101
        for line in self._process.stdout:
            self._said.put(json.loads(line))
        self._said.put({"phase": "ended"})

    def wait(self, phase: str, timeout_s: float) -> dict[str, Any]:
        """The engine's answer. Raises ProblemError with the last words of its log where it failed, ended or hangs."""
        try:
            said = self._said.get(timeout=timeout_s)
        except Empty:
            raise ProblemError(f"bare vLLM: nothing heard of it for {timeout_s:.0f} s; its log: {self._log}") from None
        if said["phase"] != phase:
            raise ProblemError(f"bare vLLM {said.get('error') or 'ended'}: {_last_error(self._log)}; its log: {self._log}")
        return said

    def play(self, spec: Spec, workers: int) -> Path:
        """Play the spec's stage with the power meter beside it; returns the run directory, reported. `workers`: as Served, of no use here."""
        more = {"bare": "vllm.v1.engine.async_llm.AsyncLLM in one process: no HTTP, no Ray, no driver"}
        run_dir = manifest.create(spec, self._runs, url="bare vLLM", driver_shares_host=False, started_by="kilocopy gpu", more=more)
        write_prompts(spec, self._prompts)
        assert self._process.stdin is not None  # noqa: S101
        with run.power_meter(run_dir):
            self._process.stdin.write(json.dumps({"run_dir": str(run_dir.resolve()), "prompts": str(self._prompts.resolve())}) + "\n")
            self._process.stdin.flush()
            self.wait("done", _length_s(spec) + 300)
        run.report(run_dir, quiet=True)
        return run_dir


@contextlib.contextmanager
def bare(spec: Spec, folder: Path) -> Iterator[Bare]:
    """Load a group's engine without a server for the time of a `with` block. It ends when its input does, also when this process is killed."""
    directory = application.local_model(spec)
    environment = application.replica_environment(spec, str(directory) if directory else None)
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": manifest.search_path()}
    spec_path, log = folder / "state" / "bare.json", folder / "logs" / "bare.log"
    spec_path.write_text(spec.model_dump_json(), encoding="utf-8")
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.bare", str(spec_path)], env=os.environ | environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        engine = Bare(process, log, folder / "runs", folder / "state" / "prompts.jsonl")
        engine.wait("ready", spec.cluster.start_timeout_s)
        yield engine
    finally:
        if process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def write_prompts(spec: Spec, path: Path) -> int:
    """The requests that the driver would send, as many as the stage can use at most; returns how many. Each is used once."""
    workload = Workload(spec)
    (stage,) = spec.stages
    assert isinstance(stage, ClosedStage)  # noqa: S101
    tokens = spec.workload.output_tokens
    assert isinstance(tokens, int)  # noqa: S101
    each = int(_length_s(spec) * STREAM_TOKENS_PER_S_MAX / tokens) + 2
    sequences = min(each, int(_length_s(spec) * TOKENS_PER_S_MAX / tokens / stage.copies) + 2)
    with path.open("w", encoding="utf-8") as file:
        for sequence in range(sequences):
            for copy in range(stage.copies):
                body = json.loads(workload.body(0, 0, copy, sequence))
                file.write(json.dumps({"prompt": body["prompt"], "max_tokens": body["max_tokens"]}) + "\n")
    return sequences * stage.copies


def _length_s(spec: Spec) -> float:
    (stage,) = spec.stages
    assert isinstance(stage, ClosedStage)  # noqa: S101
    return stage.ramp_s + stage.warmup_s + (stage.duration_s or 0.0)


def _last_error(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it said nothing"])[-1][-400:]
