"""Two nodes, one of which dies while two Locust workers drive: the real Ray, Serve, HAProxy and Locust; the engine is the simulated one.

The second node has a network namespace of its own (tests/two_nodes.py), so its address, its ports and its proxy are its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from cluster.power import POWERCAP
from kilocopy import price, receiving, recording, records
from kilocopy.application import environment
from kilocopy.spec import load
from kilocopy.summary import Window
from tests.test_e2e import free_port
from tests.test_simulated import simulated
from tests.two_nodes import ROOT, TwoNodes, possible

pytestmark = [
    pytest.mark.alone,
    pytest.mark.e2e, pytest.mark.timeout(400),
    pytest.mark.skipif(not possible(), reason="a second node needs a network namespace: root and `ip` (Debian's package iproute2)"),
]  # fmt: skip


@dataclass
class Fleet:
    """Four replicas on two nodes, and the folder that everything is in."""

    folder: Path
    spec: Path
    nodes: TwoNodes

    def kilocopy(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "kilocopy", *map(str, arguments)]

    @property
    def environment(self) -> dict[str, str]:
        return self.nodes.environment | {"KILOCOPY_STATE": str(self.folder / "state"), "COLUMNS": "160"}

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.kilocopy(*arguments), capture_output=True, text=True, cwd=self.folder, env=self.environment, timeout=200, check=False)

    def state(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "state" / "state.json").read_text()))

    def until(self, true: Callable[[dict[str, Any]], object], timeout_s: float = 120) -> None:
        until_s = time.monotonic() + timeout_s
        while not true(self.state()):
            assert time.monotonic() < until_s, self.state()
            time.sleep(0.3)


def written(folder: Path) -> Path:
    """The spec: copies ask until the test has seen enough."""
    (folder / "prompts.txt").write_text("one two three\nfour five six seven\n")
    tree = simulated(replicas=4, address="auto", port=free_port(), simulated_engine={"step_s": 0.04, "step_s_per_copy": 0.001})
    tree |= {
        "name": "two-nodes",
        "model": {"id": "simulated", "source": "simulated", "parameters_active": 1},
        "workload": {"prompts": {"kind": "file", "path": str(folder / "prompts.txt")}, "output_tokens": 25},
        "stages": [{"arrival": "closed", "copies": 16, "duration_s": 40, "warmup_s": 1, "ramp_s": 1}],
    }
    path = folder / "spec.yaml"
    with path.open("w") as file:
        YAML().dump(json.loads(json.dumps(tree)), file)
    return path


WATTS = (80, 50)  # of the CPU packages of the head and of the other node: files that count as RAPL's do, for a virtual machine has none


class Packages:
    """A CPU package for each node, under one name, whose counter goes on until `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folders = (folder / "head", folder / "other")
        for powercap in self.folders:
            (powercap / "intel-rapl:0").mkdir(parents=True)
            (powercap / "intel-rapl:0" / "name").write_text("package-0\n")
            (powercap / "intel-rapl:0" / "max_energy_range_uj").write_text("262143328850\n")
        self._stopped = threading.Event()
        self._count()
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    def _count(self) -> None:
        for powercap, watts in zip(self.folders, WATTS, strict=True):
            half = powercap / "half"
            half.write_text(f"{round(time.monotonic() * watts * 1e6)}\n")
            half.rename(powercap / "intel-rapl:0" / "energy_uj")

    def _go_on(self) -> None:
        while not self._stopped.wait(0.05):
            self._count()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packages]:
    made = Packages(tmp_path_factory.mktemp("powercap"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, packages: Packages) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("nodes")
    spec = written(folder)
    head, other = ({POWERCAP: str(powercap)} for powercap in packages.folders)
    nodes = TwoNodes(folder, environment(load(spec), str(ROOT)), (8, 4), (head, other))
    here = Fleet(folder, spec, nodes)
    try:
        started = here.run("serve", spec, "--address", nodes.address)
        log = folder / "state" / "serve.log"
        assert started.returncode == 0, started.stderr + (log.read_text()[-4000:] if log.exists() else "")
        yield here
    finally:
        here.run("down")
        nodes.stop()


@dataclass
class Driven:
    """A run in whose middle the second node died."""

    fleet: Fleet
    status: dict[str, Any]  # while both served
    table: str
    run_dir: Path
    summary: dict[str, Any]
    printed: str


@dataclass
class Placed:
    """A short run before that, whose workers Ray placed, and the command lines of this host while it went on."""

    fleet: Fleet
    run_dir: Path
    printed: str
    lines: set[str]


TOKEN = "0123456789abcdef-of-two-nodes"


@pytest.fixture(scope="module")
def placed(fleet: Fleet) -> Placed:
    tree = YAML(typ="safe").load(fleet.spec.read_text())
    tree["stages"] = [{"arrival": "closed", "copies": 8, "duration_s": 3}]
    path = fleet.folder / "short.yaml"
    with path.open("w") as file:
        YAML().dump(tree, file)
    command, lines = fleet.kilocopy("drive", path, "--join", "2", "--place", "ray", "--runs", "placed"), set[str]()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=fleet.folder, env=fleet.environment | {receiving.TOKEN: TOKEN}
    )
    try:
        until_s = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until_s:
            for one in psutil.process_iter(["cmdline"]):
                lines.add(" ".join(one.info["cmdline"] or ()))
            time.sleep(0.5)
        printed = process.communicate(timeout=5)[0]
    finally:
        process.kill()
    assert process.returncode == 0, printed
    (run_dir,) = (fleet.folder / "placed").iterdir()
    return Placed(fleet, run_dir, printed, lines)


@pytest.fixture(scope="module")
def driven(fleet: Fleet, placed: Placed) -> Driven:
    command = fleet.kilocopy("drive", fleet.spec, "--workers", "2")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=fleet.folder, env=fleet.environment)
    try:
        run_dir = _running(fleet, process)
        told = fleet.run("status", "--seconds", "2")
        fleet.nodes.kill(1)
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, err
    path = fleet.folder / out.splitlines()[-1]
    return Driven(fleet, json.loads(told.stdout), told.stderr, run_dir, json.loads(path.read_text()), out)


def _running(fleet: Fleet, process: subprocess.Popen[str]) -> Path:
    """The run, once requests of both workers have ended for some seconds."""
    until_s = time.monotonic() + 90
    while time.monotonic() < until_s:
        assert process.poll() is None, process.communicate()[1]
        for run_dir in (fleet.folder / "runs").glob("*"):
            rows = records.read(run_dir, "requests")
            finished_ns = [value for value in rows.column("finished_ns").to_pylist() if value]
            if set(rows.column("worker").to_pylist()) == {0, 1} and max(finished_ns) - min(finished_ns) > 6e9:
                return run_dir
        time.sleep(0.3)
    raise AssertionError("the run did not begin")


def test_ray_places_workers_on_both_nodes_and_ends_them(placed: Placed) -> None:
    head, other = placed.fleet.nodes.addresses
    assert f"Ray placed 2 workers on {head} (1), {other} (1)" in placed.printed
    rows = records.read(placed.run_dir, "requests").to_pylist()
    assert {row["copy"]: row["worker"] for row in rows} == {copy: copy % 2 for copy in range(8)}
    assert {row["outcome"] for row in rows} <= {"ok", "cancelled"}
    assert {"worker0", "worker1"} <= {path.stem for path in (placed.run_dir / "requests").iterdir()}
    assert len({line for line in placed.lines if "-m kilocopy join" in line}) == 2
    assert not any(TOKEN in line for line in placed.lines)
    assert not any("-m kilocopy join" in " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))


def test_more_workers_than_ray_has_slots_for_are_refused(placed: Placed) -> None:
    refused = placed.fleet.run("drive", placed.fleet.spec, "--join", "99", "--place", "ray", "--runs", "refused")
    assert refused.returncode == 2
    assert "--join 99 --place ray: a worker takes a CPU slot, and the Ray at" in refused.stderr
    assert not (placed.fleet.folder / "refused").exists()


def test_status_counts_both_nodes_while_they_serve(driven: Driven) -> None:
    rows = {row["node"]: row for row in driven.status["nodes"]}
    assert set(rows) == set(driven.fleet.nodes.addresses)
    assert [row["replicas"] for row in rows.values()] == [{"RUNNING": 2}, {"RUNNING": 2}]
    assert 12 <= sum(row["copies"] for row in rows.values()) <= 16
    assert all(row["output_tokens_per_s"] > 0 and row["pages_per_hour"] > 0 for row in rows.values())
    assert driven.status["balance"].startswith("even")
    assert driven.fleet.nodes.addresses[1] in driven.table


def test_the_run_goes_on_to_its_end_and_failures_are_typed(driven: Driven) -> None:
    assert driven.summary["status"] == "complete"
    (stage,) = driven.summary["stages"]
    rows = records.read(driven.run_dir, "requests").to_pylist()
    outcomes = {row["outcome"] for row in rows}
    assert "ok" in outcomes
    assert sum(stage["requests"]["errors"].values()) > 0  # streams of the dead node broke
    assert outcomes <= set(records.OUTCOMES)
    assert {row["worker"] for row in rows if row["outcome"] == "ok"} == {0, 1}


def test_the_report_shows_the_dip_and_the_recovery(driven: Driven) -> None:
    (outage,) = driven.summary["outages"]
    assert outage["what"].removesuffix(" and the router") == f"node {driven.fleet.nodes.addresses[1]} with 2 replicas"  # Serve put the router on either
    assert outage["depth_fraction"] > 0.05  # the streams of half of the replicas broke; the rest took them within the second
    assert outage["recovered_after_s"] is not None
    assert 0 < outage["recovered_after_s"] < outage["watched_s"]
    assert outage["replaced_after_s"] is not None  # Ray started as many replicas again, on the node that is left
    assert "a dip of" in driven.printed
    assert 'id="fleet"' in (driven.run_dir / "report.html").read_text()


def test_every_node_has_its_share_in_the_report(driven: Driven) -> None:
    rows = {row["node"]: row for row in driven.summary["stages"][0]["nodes"]}
    assert set(rows) == set(driven.fleet.nodes.addresses)
    head, gone = (rows[address] for address in driven.fleet.nodes.addresses)
    assert (head["replicas"], gone["replicas"]) == (4, 2)  # two of its own, and two that took the lost ones' place
    assert head["output_tokens_per_s"] > gone["output_tokens_per_s"] > 0


def test_the_power_meters_of_both_nodes_come_home_up_to_the_death_of_one(driven: Driven) -> None:
    recorded = recording.load(driven.run_dir)
    head, other = driven.fleet.nodes.addresses
    meters = recorded.energy
    assert dict(meters.counted) == {head: (0, 1), other: (0, 1)}
    assert set(meters.lost_s) == {other}
    times_s = [meters.time_s[meters.node == node] for node in (head, other)]
    assert times_s[1].max() < min(meters.lost_s[other], times_s[0].max())  # Serve notices a death late; the head's goes on
    both = Window(start_s=times_s[1].min() + 1, end_s=times_s[1].max(), duration_s=1, rule="while both lived")
    took_s = both.end_s - both.start_s
    watts = {node: joules / took_s for (_, node, _), joules in price.metered_j(meters, both).items()}  # type: ignore[union-attr]  # both are covered
    assert watts == {head: pytest.approx(WATTS[0], rel=0.1), other: pytest.approx(WATTS[1], rel=0.1)}
    said = driven.summary["stages"][0]["cost"]["sentence"]
    assert f"Energy not measured: the meter of rapl:intel-rapl:0 on {other} does not cover the whole window" in said


def test_it_is_said_that_no_model_ran(driven: Driven) -> None:
    assert driven.printed.lstrip().startswith("SIMULATED ENGINE")


def test_ray_has_restarted_what_died_and_the_endpoint_is_the_heads(driven: Driven) -> None:
    """One try at the start (RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT=1) is no limit for what ran already."""
    driven.fleet.until(lambda state: state["replicas"] == {"RUNNING": 4})
    state = driven.fleet.state()
    assert {one["node"] for one in state["fleet"]} == {driven.fleet.nodes.addresses[0]}
    assert state["application"] == "RUNNING"
    assert len(state["metrics"]) == 1


def ask(url: str) -> str:
    """One short request: `ok`, or the kind of failure."""
    body = json.dumps({"model": "simulated", "prompt": "a", "max_tokens": 2}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"}), timeout=30) as answer:
            return "ok" if answer.status == 200 else str(answer.status)
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except OSError as error:
        return type(error).__name__


def test_a_router_that_dies_is_started_again_and_requests_are_answered(driven: Driven) -> None:
    """Its process alone is killed; the replicas and the proxy live on."""
    fleet = driven.fleet
    fleet.until(lambda state: state["replicas"] == {"RUNNING": 4} and [one["state"] for one in state["routers"]] == ["RUNNING"])
    before, url = fleet.state()["routers"], fleet.state()["url"]
    (router,) = [one for one in fleet.nodes.of(0) if "ServeReplica:kilocopy:LLMRouter" in " ".join(one.cmdline())]
    killed_s, answers = time.monotonic(), []
    router.kill()

    def again(state: dict[str, Any]) -> bool:
        answers.append((round(time.monotonic() - killed_s, 1), ask(url)))
        return state["routers"] != before and [one["state"] for one in state["routers"]] == ["RUNNING"]

    fleet.until(again)
    print(f"router again after {time.monotonic() - killed_s:.1f} s; answers meanwhile: {answers}")
    fleet.until(lambda _: ask(url) == "ok")
    assert fleet.state()["replicas"] == {"RUNNING": 4}
