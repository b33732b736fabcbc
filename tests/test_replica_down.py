"""A replica dies: the real Ray Serve, its real metrics pages, the real Prometheus see it go and come back. The engines are simulated, to start in seconds."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from kilocopy import provision
from tests import synthetic
from tests.proof import Prometheus

pytestmark = [
    pytest.mark.alone,
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian's package prometheus)"),
]
ALERT = 'ALERTS{alertname="KilocopyReplicaDown",alertstate="firing"}'
WITH_COUNTERS = "count(count by (ReplicaId) (ray_vllm_generation_tokens_total))"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(done: Callable[[], Any], what: str, limit_s: float = 90.0) -> Any:
    deadline_s = time.monotonic() + limit_s
    while not (found := done()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.5)
    return found


@pytest.fixture
def state(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Two replicas, served; what `kilocopy status` says of them."""
    tree = synthetic.spec((2,)) | {"name": "down", "page": {"words": 500, "words_per_token": synthetic.quoted(0.75)}}
    tree["model"] |= {"source": str(tmp_path)}  # it has to be there, and nothing of it is read
    tree["cluster"] = {"replicas": 2, "port": free_port(), "hardware": {"kind": "cpu", "cpus_per_replica": 0.5}, "simulated_engine": {"step_s": 0.005}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "spec.yaml").write_text(json.dumps(tree))  # JSON is YAML
    environment = os.environ | {"KILOCOPY_STATE": str(tmp_path / "state")}

    def kilocopy(*arguments: str) -> str:
        command = [sys.executable, "-m", "kilocopy", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        kilocopy("serve", "spec.yaml")
        yield json.loads(kilocopy("status")) | {"mark": (tmp_path / "state" / "mark").read_text()}
    finally:
        kilocopy("down")


@pytest.fixture
def prometheus(state: dict[str, Any], tmp_path: Path) -> Iterator[Prometheus]:
    made = provision.render(tmp_path / "watched", provision.Watched(servers=state["metrics"], cluster="down", model="toy"))
    at = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={made['prometheus']}", f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address={at}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Prometheus(f"http://{at}")
    finally:
        process.terminate()
        process.wait(20)


def ask(url: str) -> None:
    """A few requests at once, so that every replica counts tokens; those that meet a dying one fail."""
    body = json.dumps({"model": "toy", "prompt": "a b", "max_tokens": 20}).encode()

    def one(_: int) -> None:
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(32)))


def replicas(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if "ServeReplica:kilocopy:LLMServer" in " ".join(process.cmdline()) and process.environ().get("KILOCOPY_SERVE_ID") == mark:
                found.append(process)
    return found


def test_a_replica_that_is_killed_fires_the_alert_and_its_successor_clears_it(state: dict[str, Any], prometheus: Prometheus) -> None:
    def value(expr: str) -> float:
        with contextlib.suppress(OSError):
            return next((found for _, found in prometheus.vector(expr, time.time())), -1.0)
        return -1.0

    def serving(count: float, known: float) -> bool:
        ask(state["url"])
        return value("kilocopy:replicas") == count and value(WITH_COUNTERS) >= known

    until(lambda: value("kilocopy:replicas") == 2, "two replicas, healthy whether or not their counters are there yet")
    until(lambda: value("kilocopy:server_copies") == 0, "and nothing runs on them")
    until(lambda: serving(2, 2), "two replicas, healthy and with counters")
    assert value(ALERT) == -1
    one, other = replicas(state["mark"])
    one.kill()
    held: list[psutil.Process] = []

    def fires() -> bool:
        """A model takes a minute to load, a simulated engine seconds: its successor is held while it starts, or it would be back before the alert's 15 s."""
        for process in replicas(state["mark"]):
            if process.pid not in {one.pid, other.pid, *(known.pid for known in held)}:
                process.suspend()
                held.append(process)
        return value(ALERT) == 1

    until(fires, "the alert fires")
    assert value("kilocopy:replicas") == 1
    until(lambda: value(WITH_COUNTERS) >= 2, "Ray's page keeps the counters of the dead: they prove nothing")
    for process in held:
        process.resume()
    until(lambda: serving(2, 3) and value(ALERT) == -1, "its successor counts, and the alert is over")
