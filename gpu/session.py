"""Goes through the units that are missing: starts what a group needs, measures, keeps each result at once. Killed at any moment, the next call goes on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from cluster import power
from gpu import engines, meter
from gpu.plan import TRAIN_S, Group, Unit
from gpu.processes import Processes
from gpu.results import Results
from kilocopy import manifest, records, serving
from kilocopy.problem import ProblemError
from kilocopy.spec import Spec

ERR = Console(stderr=True, highlight=False)
MARK = "KILOCOPY_GPU_ID"
ENDED_S = 10.0


class Session:
    """One call of the harness. `within_s`: time that it may take; a unit that would not fit is left to the next call."""

    def __init__(self, results: Results, *, within_s: float | None, again: bool) -> None:
        self._results, self._again = results, again
        self._until_s = time.monotonic() + within_s if within_s else float("inf")
        self.left_out: list[str] = []
        self.failed: list[str] = []

    def work(self, groups: Sequence[Group]) -> None:
        """Measure what is missing, group after group. A group whose engine cannot start fails alone; the others are tried."""
        for group in groups:
            missing = [unit for unit in group.units if self._again or not self._results.done(unit.name, unit.key)]
            for unit in group.units:
                if unit not in missing:
                    ERR.print(f"[bold]gpu[/]  {unit.name}: measured already")
            missing = [unit for unit in missing if not self._absent(unit)]
            try:
                self._group(group, missing)
            except ProblemError as problem:
                for unit in missing:
                    if not self._results.done(unit.name, unit.key) and unit.name not in self.left_out:
                        self._fail(unit, str(problem))

    def _absent(self, unit: Unit) -> bool:
        """Whether what a unit needs is not here: then that is its result, and it is said."""
        if unit.kind != "meter" or meter.gpu_meter(power.meters()):
            return False
        self._results.write(unit.name, "absent", unit.key, why="NVML shows no GPU with an energy counter here")
        ERR.print(f"[yellow]gpu[/]  {unit.name}: left out, NVML shows no GPU with an energy counter here")
        return True

    def _group(self, group: Group, missing: Sequence[Unit]) -> None:
        fitting = self._fitting(group, missing)
        if not fitting:
            return
        prepare(group.spec)
        engine = engines.bare(group.spec, self._results.folder) if group.kind == "bare" else engines.served(group.spec, self._results.runs)
        ERR.print(f"[bold]gpu[/]  {group.name}: starting, for {', '.join(unit.name for unit in fitting)}")
        with engine as started:
            for unit in fitting:
                if self._until_s - time.monotonic() < unit.length_s:
                    self._leave(unit)
                    continue
                try:
                    self._measure(unit, started)
                except ProblemError as problem:
                    self._fail(unit, str(problem))

    def _fitting(self, group: Group, missing: Sequence[Unit]) -> list[Unit]:
        """The units that fit into the time left, the engine's start and a model's training before them."""
        left_s = self._until_s - time.monotonic() - group.start_s - (TRAIN_S if untrained(group.spec) else 0)
        found = []
        for unit in missing:
            if left_s >= unit.length_s:
                found.append(unit)
                left_s -= unit.length_s
            else:
                self._leave(unit)
        return found

    def _leave(self, unit: Unit) -> None:
        self.left_out.append(unit.name)
        ERR.print(f"[yellow]gpu[/]  {unit.name}: does not fit into the time left (about {unit.length_s:.0f} s); left to the next call")

    def _fail(self, unit: Unit, why: str) -> None:
        self.failed.append(unit.name)
        kept = self._results.read(unit.name)
        if not kept or kept["status"] != "done":  # what was measured before is not lost to a try that failed
            self._results.write(unit.name, "failed", unit.key, why=why)
        ERR.print(f"[red]gpu[/]  {unit.name}: {why}", markup=True)

    def _measure(self, unit: Unit, engine: engines.Served | engines.Bare) -> None:
        ERR.print(f"[bold]gpu[/]  {unit.name}: measuring, about {unit.length_s:.0f} s")
        with Processes() as processes:
            if unit.kind == "meter":
                found = meter.gpu_meter(power.meters())
                assert found is not None  # noqa: S101  # _absent looked
                run_dirs: list[Path] = []
                smi = meter.Smi(found.device, self._results.folder / "logs" / "nvidia-smi.csv")
                said: dict[str, Any] = meter.check(found, smi, lambda: run_dirs.append(engine.play(unit.spec, unit.workers)))
                run_dir = run_dirs[0]
            else:
                said, run_dir = {}, engine.play(unit.spec, unit.workers)
        whole(run_dir)
        relative = str(run_dir.relative_to(self._results.folder))
        cores = processes.cores(*window_s(run_dir))
        self._results.write(unit.name, "done", unit.key, kind=unit.kind, group=unit.group, run_dir=relative, cores=cores, meter=said)


def whole(run_dir: Path) -> None:
    """A run that did not come to its end is no result: Ctrl-C goes on up, a driver that died is a failure. Raises KeyboardInterrupt or ProblemError."""
    from kilocopy.recompute import summarise  # noqa: PLC0415  scipy, only where it is needed

    if any(event.get("reason") == "interrupted" for event in records.read_events(run_dir)):
        raise KeyboardInterrupt
    summary = summarise(run_dir)
    if summary.status != "complete":
        raise ProblemError(f"{run_dir}: {summary.status_sentence}")


def window_s(run_dir: Path) -> tuple[float, float]:
    """The window of a run's one stage on this host's clock (`time.perf_counter`), s; nothing where it has none."""
    from kilocopy.recompute import summarise  # noqa: PLC0415  scipy, only where it is needed

    window = summarise(run_dir).stages[0].window
    first_ns = records.read_events(run_dir)[0]["time_ns"]
    return (0.0, 0.0) if window is None else (first_ns / 1e9 + window.start_s, first_ns / 1e9 + window.end_s)


def untrained(spec: Spec) -> bool:
    """Whether a spec's model is one that kilocopy trains, and it is not there yet."""
    return spec.model.training is not None and not (Path(spec.model.source) / "training.json").exists()


def prepare(spec: Spec) -> None:
    """Make the model that a spec names: the shape in seconds, the demo model by training it. Raises ProblemError."""
    source = Path(spec.model.source)
    if spec.cluster.engine.get("load_format") == "dummy":
        shape = "rehearsal" if "rehearsal" in source.name else "llama-3.1-8b"
        _call("cluster.shape", "--out", str(source), "--shape", shape)
    elif untrained(spec):
        _call("cluster.train", "--out", str(source), "--seconds", "60")


def _call(module: str, *arguments: str) -> None:
    import subprocess  # noqa: PLC0415

    environment = os.environ | {"PYTHONPATH": manifest.search_path()}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise ProblemError(f"python -m {module} failed (exit code {done.returncode}); its words are above")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One harness a folder, with everything that an earlier one left running ended first. Raises ProblemError where another is at work."""
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ProblemError(f"--out {folder}: another harness is at work there; wait for it, or name another folder") from None
        os.environ["KILOCOPY_STATE"] = str((folder / "state").resolve())
        serving.stop()
        _end_marked(folder / "mark")
        os.environ[MARK] = uuid.uuid4().hex
        (folder / "mark").write_text(os.environ[MARK])
        yield


def _end_marked(path: Path) -> None:
    """End what a killed harness left: drivers, meters, a bare engine. They carry its mark in their environment."""
    try:
        mark = path.read_text()
    except FileNotFoundError:
        return
    left = [process for process in psutil.process_iter() if _carries(process, mark)]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=ENDED_S)


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False


def need_gpu(gpus: Callable[[], list[dict[str, Any]]] = manifest.gpus) -> None:
    """Raises ProblemError on a machine without a GPU."""
    if not gpus():
        raise ProblemError("no NVIDIA GPU is seen by NVML here; --rehearse goes through the same parts on the CPU, small (its figures mean nothing)")
