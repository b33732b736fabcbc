"""Two nodes, one of which dies while two Locust workers drive: the real Ray, Serve, HAProxy and Locust; the engine is the simulated one.

The second node has a network namespace of its own (tests/two_nodes.py), so its address, its ports and its proxy are its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from kilocopy import records
from kilocopy.application import environment
from kilocopy.spec import load
from tests.test_e2e import free_port
from tests.test_simulated import simulated
from tests.two_nodes import ROOT, TwoNodes, possible

pytestmark = [
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


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("nodes")
    spec = written(folder)
    nodes = TwoNodes(folder, environment(load(spec), str(ROOT)), (8, 4))
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


@pytest.fixture(scope="module")
def driven(fleet: Fleet) -> Driven:
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
    assert outage["what"] == f"node {driven.fleet.nodes.addresses[1]} with 2 replicas"
    assert outage["depth_fraction"] > 0.2  # half of the replicas were there
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


def test_it_is_said_that_no_model_ran(driven: Driven) -> None:
    assert driven.printed.lstrip().startswith("SIMULATED ENGINE")


def test_ray_has_restarted_what_died_and_the_endpoint_is_the_heads(driven: Driven) -> None:
    """One try at the start (RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT=1) is no limit for what ran already."""
    driven.fleet.until(lambda state: state["replicas"] == {"RUNNING": 4})
    state = driven.fleet.state()
    assert {one["node"] for one in state["fleet"]} == {driven.fleet.nodes.addresses[0]}
    assert state["application"] == "RUNNING"
    assert len(state["metrics"]) == 1
