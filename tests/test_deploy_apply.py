"""`kilocopy deploy apply` and `delete` against tools that answer as the real ones do (tests/fake_tools.py): no cluster is here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kilocopy import compose, deploying, kubectl, kuberay, raylauncher
from kilocopy.problem import ProblemError
from kilocopy.spec import Spec
from tests.deployments import ROOT, document, spec

NAME = "llama-3-1-8b-h100"
CRDS = ("rayservices.ray.io", "podmonitors.monitoring.coreos.com", "prometheusrules.monitoring.coreos.com")


class Here:
    """A folder with the fake tools on the PATH, and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, list[str]()

    def say(self, words: str) -> None:
        self.said.append(words)

    def world(self, objects: dict[str, Any] | None = None, **script: Any) -> None:
        (self.folder / "objects.json").write_text(json.dumps(objects if objects is not None else ready_cluster()))
        (self.folder / "script.json").write_text(json.dumps(script))

    @property
    def objects(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "objects.json").read_text()))

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("kubectl", "docker", "ray"):
        path = tools / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {ROOT / "tests" / "fake_tools.py"} {name} "$@"\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("FAKE_TOOLS", str(tmp_path))
    monkeypatch.setenv("FAKE_SITE", str(Path(yaml.__file__).parent.parent))
    monkeypatch.setenv("HOME", str(tmp_path))
    return Here(tmp_path)


def ready_cluster() -> dict[str, Any]:
    """Everything that has to be there before: namespace, CRDs, the token's Secret."""
    made: dict[str, Any] = {"namespaces/kilocopy": {"metadata": {"name": "kilocopy"}}}
    made |= {f"customresourcedefinitions/{name}": {"metadata": {"name": name}} for name in CRDS}
    return made | {"secrets/hf-token": {"metadata": {"name": "hf-token"}, "data": {"token": "aHVzaA=="}}}


def pod(name: str, *, ready: bool = False, waiting: dict[str, str] | None = None, unplaced: str = "", last: dict[str, Any] | None = None) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    if unplaced:
        conditions.append({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": unplaced})
    container = {"name": "ray-worker", "image": "registry.example.com/kilocopy:0.1.0", "state": {"waiting": waiting} if waiting else {"running": {}}, "lastState": last or {}}
    return {"metadata": {"name": name}, "status": {"conditions": conditions, "containerStatuses": [container]}}


def status(application: str = "", *, ready: bool = False, message: str = "", told: str = "", **cluster: Any) -> dict[str, Any]:
    condition = {"type": "Ready", "status": "True" if ready else "False", "reason": "NonZeroServeEndpoints" if ready else "Initializing", "message": ""}
    part: dict[str, Any] = {"rayClusterName": f"{NAME}-x7k2p", "rayClusterStatus": cluster}
    if application:
        deployments = {"LLMServer:llama": {"status": "UNHEALTHY" if told else "UPDATING", "message": told}}
        part["applicationStatuses"] = {"kilocopy": {"status": application, "message": message, "serveDeploymentStatuses": deployments}}
    return {"observedGeneration": 1, "conditions": [condition], "activeServiceStatus" if ready else "pendingServiceStatus": part, "numServeEndpoints": int(ready)}


def applied(here: Here, made: Spec | None = None) -> None:
    made = made or spec("h100")
    paths = deploying.render(made, "kuberay", here.folder / "out")
    kubectl.apply(made, [path for path in paths if path.name != "driver.yaml"], here.say, poll_s=0.01)


def refused(here: Here, made: Spec | None = None) -> str:
    with pytest.raises(ProblemError) as problem:
        applied(here, made)
    assert problem.value.code == 2
    return str(problem.value)


def test_apply_applies_in_order_and_waits_until_it_serves(here: Here) -> None:
    waits = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available: 3 No preemption victims found."
    here.world(
        rayservice=[status(), status(), status("DEPLOYING"), status("RUNNING"), status("RUNNING", ready=True)],
        pods=[[], [pod("head"), pod("worker", unplaced=waits)], [pod("head", ready=True), pod("worker")], [pod("head", ready=True), pod("worker", ready=True)]],
    )
    applied(here)
    assert here.said == [
        "applied network.yaml", "applied serving.yaml", "applied monitoring.yaml", "pods 0/0 ready", "pods 0/2 ready",
        "pod worker waits for a node: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "pods 1/2 ready, application deploying",
        "pods 2/2 ready, application running",
    ]  # fmt: skip
    assert "jobs/llama-3-1-8b-h100-driver" not in here.objects  # driving is asked for apart


def test_the_join_token_is_random_labelled_and_on_no_command_line(here: Here) -> None:
    here.world(rayservice=[status("RUNNING", ready=True)], pods=[[]])
    applied(here)
    made = here.objects[f"secrets/{NAME}-join"]
    assert len(made["data"]["token"]) == 64
    assert made["metadata"]["labels"]["app.kubernetes.io/instance"] == NAME
    assert all(made["data"]["token"] not in word for call in here.calls for word in call["arguments"])
    applied(here)
    assert here.objects[f"secrets/{NAME}-join"]["data"] == made["data"]  # made once


def test_a_missing_tool_is_a_sentence(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    here.world()
    monkeypatch.setenv("PATH", str(here.folder))
    assert refused(here).startswith("kubectl: not on the PATH; install it")
    with pytest.raises(ProblemError, match="docker: not on the PATH"):
        compose.up(spec("h100"), here.folder, here.say)
    with pytest.raises(ProblemError, match=r"auth_token: not there.*ray get-auth-token --generate"):
        raylauncher.up(spec("h100"), here.folder, here.say)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on the PATH")
def test_the_real_kubectl_without_a_cluster_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ProblemError, match=r"^kubectl reaches no cluster: .*`kubectl config get-contexts`"):
        kubectl.check(kubectl.Cluster("kilocopy"), spec("h100"))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("Unable to connect to the server: dial tcp: lookup api.example.com: no such host", "kubectl reaches no cluster"),
        ("error: You must be logged in to the server (Unauthorized)", "the cluster does not know you"),
        ('Error from server (Forbidden): namespaces "kilocopy" is forbidden: User "me" cannot get resource "namespaces"', "the cluster does not let you"),
    ],
)
def test_who_is_not_let_in_reads_why(here: Here, error: str, sentence: str) -> None:
    here.world(kubectl_fails=error)
    assert refused(here).startswith(sentence)


def test_what_is_missing_is_said_before_anything_is_applied(here: Here) -> None:
    def without(*keys: str) -> dict[str, Any]:
        return {key: thing for key, thing in ready_cluster().items() if key not in keys}

    here.world(without("namespaces/kilocopy"))
    assert "`kubectl create namespace kilocopy`" in refused(here)
    here.world(without("customresourcedefinitions/rayservices.ray.io"))
    assert "KubeRay is not installed here" in refused(here)
    here.world(without("customresourcedefinitions/podmonitors.monitoring.coreos.com"))
    assert "deploy.monitoring: null" in refused(here)
    here.world(without("secrets/hf-token"))
    assert "create secret generic hf-token --from-file=token=FILE" in refused(here)
    here.world(ready_cluster() | {"secrets/hf-token": {"metadata": {"name": "hf-token"}, "data": {"hf_token": "x"}}})
    assert "has no key token (it has: hf_token)" in refused(here)
    here.world(without("secrets/hf-token") | {"secrets/redis": {"metadata": {}, "data": {"password": ""}}})
    assert "persistentvolumeclaim models: not in namespace kilocopy" in refused(here, spec("405b"))
    assert not any(call["arguments"][2] in {"apply", "create"} for call in here.calls)


def test_another_deployment_of_that_name_is_not_overwritten(here: Here) -> None:
    here.world(rayservice=[status("RUNNING", ready=True)], pods=[[]])
    applied(here)
    changed = document("h100")
    changed["deploy"]["image"] = "registry.example.com/kilocopy:0.2.0"
    assert "is there already, and differs from this spec" in refused(here, Spec.model_validate(changed))


@pytest.mark.parametrize(
    ("seen", "pods", "sentence"),
    [
        (status(), [pod("worker", waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling image"})], "cannot be pulled (ImagePullBackOff"),
        (status(), [pod("worker", waiting={"reason": "CreateContainerConfigError", "message": 'secret "hf-token" not found'})], 'secret "hf-token" not found'),
        (
            status(),
            [pod("worker", waiting={"reason": "CrashLoopBackOff"}, last={"terminated": {"reason": "OOMKilled", "exitCode": 137}})],
            "keeps ending (OOMKilled, exit code 137)",
        ),
        (
            status(conditions=[{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateWorkerPod", "message": 'pods "w" is forbidden: exceeded quota: gpus'}]),
            [],
            "exceeded quota: gpus; raise the namespace's ResourceQuota",
        ),
        (status("DEPLOY_FAILED", told="ValueError: The model's max seq len (131072) is larger"), [], "could not start: ValueError: The model's max seq len"),
    ],
)
def test_what_will_not_come_right_ends_the_wait(here: Here, seen: dict[str, Any], pods: list[Any], sentence: str) -> None:
    here.world(rayservice=[seen], pods=[pods])
    assert sentence in refused(here)
    assert f"rayservices.ray.io/{NAME}" in here.objects  # left to be looked at


def test_ready_before_the_application_runs_is_not_ready() -> None:
    """`Ready` means one endpoint; all replicas have to run, and the status has to be of this generation."""
    service = {"metadata": {"name": NAME, "generation": 2}, "status": status("DEPLOYING", ready=True) | {"observedGeneration": 2}}
    assert not kubectl.look(service, []).ready
    assert not kubectl.look(service | {"status": status("RUNNING", ready=True)}, []).ready
    assert kubectl.look(service | {"status": status("RUNNING", ready=True) | {"observedGeneration": 2}}, []).ready


def test_delete_takes_what_apply_made_and_nothing_else(here: Here) -> None:
    here.world(rayservice=[status("RUNNING", ready=True)], pods=[[]], job=[{"conditions": [{"type": "Complete", "status": "True"}]}], logs=["done"])
    before = here.objects
    applied(here)
    kubectl.drive(spec("h100"), here.folder / "out" / "driver.yaml", here.say, poll_s=0.01)
    made = here.objects
    others = {
        "configmaps/mine": {"metadata": {"name": "mine", "labels": {}}},
        "jobs/other-driver": {"metadata": {"name": "other-driver", "labels": kuberay.labels("other", "driver")}},
        "services/owned": {"metadata": {"name": "owned", "labels": kuberay.labels(NAME, "serving"), "ownerReferences": [{"kind": "RayService"}]}},
    }
    here.world(made | others, pods=[[pod("head")], []])
    here.said.clear()
    kubectl.delete(spec("h100"), here.say, poll_s=0.01)
    claim = f"persistentvolumeclaims/{NAME}-results"
    assert set(here.objects) == set(before) | set(others) | {claim}
    assert "1 pods are ending" in here.said
    assert here.said[-1].startswith(f"kept persistentvolumeclaim/{NAME}-results, with the run directories")
    kubectl.delete(spec("h100"), here.say, poll_s=0.01)
    assert here.said[-1] == "nothing to delete"


def test_a_run_is_followed_and_its_failure_is_told(here: Here) -> None:
    complete = {"conditions": [{"type": "Complete", "status": "True"}]}
    here.world(job=[{}, {}, complete], logs=["stage 1/4\n", "stage 2/4\n", "the report\n"])
    paths = deploying.render(spec("h100"), "kuberay", here.folder / "out")
    driver = next(path for path in paths if path.name == "driver.yaml")
    kubectl.drive(spec("h100"), driver, here.say, poll_s=0.01)
    assert here.said == ["stage 1/4", "stage 2/4", "the report"]
    here.world(here.objects, job=[{"active": 1}])
    with pytest.raises(ProblemError, match="a run is being driven already"):
        kubectl.drive(spec("h100"), driver, here.say, poll_s=0.01)
    here.world(here.objects, job=[complete, {"conditions": [{"type": "Failed", "status": "True"}]}], logs=["kilocopy: the endpoint wants a valid key\n"])
    with pytest.raises(ProblemError, match="failed; its last words:\nkilocopy: the endpoint wants a valid key"):
        kubectl.drive(spec("h100"), driver, here.say, poll_s=0.01)
    assert ["delete", "job"] in [call["arguments"][2:4] for call in here.calls]  # a finished Job is not run twice


# ------------------------------------------------------------------------------------------------------------------ compose


def service(state: str, health: str = "", code: int = 0) -> list[dict[str, Any]]:
    return [{"Name": f"{NAME}-server-1", "Service": "server", "State": state, "Health": health, "ExitCode": code}]


def test_compose_waits_until_the_server_is_healthy(here: Here) -> None:
    here.world(ps=[service("running", "starting"), service("running", "starting"), service("running", "healthy")], logs=["serve  starting Ray\n", "serve  starting replicas\n"])
    where = deploying.folder(spec("h100"), "compose", here.folder / "out")
    deploying.render(spec("h100"), "compose", where)
    compose.up(spec("h100"), where, here.say, poll_s=0.01)
    assert here.said[:2] == ["server starting: serve  starting Ray", "server starting: serve  starting replicas"]
    assert here.said[-1] == "endpoint http://127.0.0.1:8000, Grafana http://127.0.0.1:3000"
    assert here.calls[-1]["cwd"] == str(where)
    assert (where / "runs").is_dir()
    compose.down(spec("h100"), where, here.say)
    assert here.calls[-1]["arguments"] == ["compose", "--project-name", NAME, "--profile", "drive", "down", "--volumes"]


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ({"no_compose": True}, "docker: has no compose plugin"),
        ({"no_daemon": True}, "docker: its daemon does not answer: Cannot connect"),
        ({"up_fails": 'could not select device driver "nvidia" with capabilities: [[gpu]]'}, "install the NVIDIA container toolkit"),
        ({"up_fails": "pull access denied for registry.example.com/kilocopy, repository does not exist"}, "is deploy.image built and pushed"),
        ({"ps": [service("exited", code=2)], "logs": ["kilocopy: cluster: 8 replicas need 8 GPUs, this host has 0\n"]}, "the server ended (exit code 2):\nkilocopy: cluster: 8 replicas"),
    ],
)
def test_compose_troubles_are_sentences(here: Here, script: dict[str, Any], sentence: str) -> None:
    here.world(**script)
    with pytest.raises(ProblemError) as problem:
        compose.up(spec("h100"), here.folder, here.say, poll_s=0.01)
    assert sentence in str(problem.value)


# ---------------------------------------------------------------------------------------------------------------------- ray


def test_ray_up_waits_for_its_nodes_then_serves_and_down_ends_them(here: Here) -> None:
    for token in (".ray/auth_token", ".cache/huggingface/token"):
        (here.folder / token).parent.mkdir(parents=True)
        (here.folder / token).write_text("x")
    here.world(alive=[0, 1, 2])
    raylauncher.up(spec("h100"), here.folder, here.say, poll_s=0.01)
    assert here.said == ["ray up: a head and 1 serving nodes", "nodes 0/2", "nodes 1/2", "nodes 2/2; serving"]
    assert here.calls[-1]["arguments"] == ["exec", "cluster.yaml", "kilocopy serve /home/ray/kilocopy/spec.yaml --address auto"]
    raylauncher.down(here.folder, here.say)
    assert here.calls[-1]["arguments"] == ["down", "--yes", "cluster.yaml"]
    here.world(up_fails="botocore.exceptions.NoCredentialsError: Unable to locate credentials")
    with pytest.raises(ProblemError, match="log in to your cloud first"):
        raylauncher.up(spec("h100"), here.folder, here.say)
    here.world(up_fails="ImportError: The Ray AWS VM launcher requires the AWS SDK for Python (Boto3) to be installed. You can install it with `pip install boto3`.")
    with pytest.raises(ProblemError, match=r"`pip install boto3`\. Nothing was started\.$"):
        raylauncher.up(spec("h100"), here.folder, here.say)
