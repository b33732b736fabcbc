"""What `kilocopy deploy render` writes: read against goldens, and validated by the schemas of those who read it."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer

from kilocopy import cli, deploying, kuberay, metrics, placement, receiving
from kilocopy.application import RAY_VERSION, llm_config
from kilocopy.problem import ProblemError
from kilocopy.spec import ACCELERATORS, Spec, load
from tests.deployments import GOLDEN, ROOT, SAFE, TARGETS, crd, document, spec

KUBERNETES = "1.34"
CASES = [(name, target) for name, targets in TARGETS.items() for target in targets]


def reviewed(name: str, text: str) -> str:
    """Without dashboards and rules, which have goldens of their own (dashboards/)."""
    if name != "monitoring.yaml":
        return text
    head, *parts = re.split(r"(?m)^(?=apiVersion: )", text)
    return (head + "".join(part for part in parts if "kind: PodMonitor" in part)).removesuffix("---\n")


@pytest.mark.parametrize(("name", "target"), CASES)
def test_renders_are_the_goldens(name: str, target: deploying.Target) -> None:
    made = {file: reviewed(file, text) for file, text in deploying.files(spec(name), target).items() if not file.startswith("watch/")}
    folder, differ = GOLDEN / name / target, []
    for file, text in made.items():
        path = folder / file
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            differ.append(path)
    assert differ == [], "written anew: read their diff"
    assert {path.name for path in folder.iterdir()} == set(made)


def manifests(name: str) -> list[dict[str, Any]]:
    texts = deploying.files(spec(name), "kuberay")
    return [thing for text in texts.values() for thing in SAFE.load_all(text)]


@pytest.mark.parametrize("name", TARGETS)
def test_core_objects_hold_kubernetes_schemas(name: str) -> None:
    kinds = set()
    for thing in manifests(name):
        if "." not in thing["apiVersion"].partition("/")[0] or thing["apiVersion"].endswith(".k8s.io/v1"):
            kubernetes_validate.validate(thing, KUBERNETES, strict=True)
            kinds.add(thing["kind"])
    assert kinds >= {"Service", "ConfigMap", "Job", "NetworkPolicy"}


@pytest.mark.parametrize("name", TARGETS)
def test_custom_objects_hold_their_crds(name: str) -> None:
    seen = set()
    for thing in manifests(name):
        if thing["kind"] in {"RayService", "PodMonitor", "PrometheusRule"}:
            validator = crd(thing["kind"])
            if validator is None:
                pytest.skip("the CRDs of KubeRay and of the Prometheus Operator are not beside the checkout (../shared/kuberay)")
            validator.validate(thing)
            seen.add(thing["kind"])
    assert "RayService" in seen


def test_an_unknown_field_is_an_error() -> None:
    validator = crd("RayService")
    if validator is None:
        pytest.skip("the CRDs are not beside the checkout (../shared/kuberay)")
    service = kuberay.ray_service(spec("l4"))
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["nodeSelektor"] = {}
    with pytest.raises(jsonschema.ValidationError, match="nodeSelektor"):
        validator.validate(service)


@pytest.mark.parametrize(("name", "target"), [case for case in CASES if case[1] == "ray"])
def test_launcher_files_hold_rays_schema(name: str, target: deploying.Target) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    text = deploying.files(spec(name), target)["cluster.yaml"]
    jsonschema.validate(SAFE.load(text), schema)



def test_a_unique_name_each_and_every_label() -> None:
    for name in TARGETS:
        things = manifests(name)
        named = [(thing["kind"], thing["metadata"]["name"]) for thing in things]
        assert len(set(named)) == len(named)
        for thing in things:
            assert thing["metadata"]["labels"]["app.kubernetes.io/instance"] == kuberay.instance(spec(name))
            assert thing["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "kilocopy"


def pods(things: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod specs by what they are."""
    found = {}
    for thing in things:
        if thing["kind"] == "RayService":
            cluster = thing["spec"]["rayClusterConfig"]
            found["head"] = cluster["headGroupSpec"]["template"]["spec"]
            found["worker"] = cluster["workerGroupSpecs"][0]["template"]["spec"]
        elif thing["kind"] == "Job":
            found[thing["metadata"]["name"].rpartition("-")[2]] = thing["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_no_pod_is_root_and_every_container_has_limits(name: str) -> None:
    found = pods(manifests(name))
    assert set(found) == {"head", "worker", "driver", "workers"}
    for pod in found.values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", TARGETS)
def test_head_and_workers_have_the_same_environment(name: str) -> None:
    found = pods(manifests(name))
    assert found["head"]["containers"][0]["env"] == found["worker"]["containers"][0]["env"]
    assert {"name": "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", "value": "1"} in found["head"]["containers"][0]["env"]


def test_served_is_what_kilocopy_serve_hands_to_serve() -> None:
    made = spec("cpu")
    service = next(thing for thing in manifests("cpu") if thing["kind"] == "RayService")
    served = SAFE.load(service["spec"]["serveConfigV2"])
    assert served["applications"][0]["args"] == {"llm_configs": [llm_config(made, "/models/demo")]}
    assert served["applications"][0]["args"]["llm_configs"][0]["callback_config"]["callback_class"] == "cluster.replica.ModelOnDisk"


def commands(pod: dict[str, Any], metrics: int) -> Iterator[list[str]]:
    """kilocopy's command lines in a pod, as they are executed; a script runs in bash, with `metrics` addresses behind the Ray pods' name."""
    for container in pod["containers"]:
        command = [str(part) for part in container.get("command", [])]
        if command[:2] == ["bash", "-c"]:
            stand_in = "python() { printf '%s\\0' \"$@\"; exit 0; }; exec() { \"$@\"; }\n"
            stand_in += "getent() { for n in " + " ".join(map(str, range(metrics))) + "; do echo \"10.0.0.$n STREAM\"; done; }\n"
            done = subprocess.run(["bash", "-c", stand_in + command[2]], capture_output=True, text=True, check=True)
            command = ["python", *done.stdout.rstrip("\0").split("\0")]
        if command[:3] == ["python", "-m", "kilocopy"]:
            yield command[3:]


@pytest.mark.parametrize("name", TARGETS)
def test_the_jobs_speak_the_command_line_that_there_is(name: str) -> None:
    """Parsed by the CLI's own parser, with what a shell makes of it: an option that is renamed is found here, not on a cluster."""
    root = typer.main.get_command(cli.app)
    found = pods(manifests(name))
    parsed = {}
    for role in ("driver", "workers"):
        (line,) = commands(found[role], metrics=3)
        verb = root.commands[line[0]]  # type: ignore[attr-defined]
        parsed[role] = line[0], verb.make_context(line[0], line[1:], resilient_parsing=False).params
    lead, join = parsed["driver"], parsed["workers"]
    assert (lead[0], join[0]) == ("drive", "join")
    assert lead[1]["join"] == placement.driver_workers(spec(name))
    assert receiving.parse_address(lead[1]["bind"], "--bind") == ("0.0.0.0", kuberay.JOIN_PORT)
    assert receiving.parse_address(join[1]["address"], "HOST:PORT") == (f"{kuberay.instance(spec(name))}-leader", kuberay.JOIN_PORT)
    assert lead[1]["join_s"] == join[1]["wait_s"] == kuberay.JOIN_S
    assert len(lead[1]["metrics"]) == len(lead[1]["power"]) == 3
    mounted = next(mount["mountPath"] for mount in found["workers"]["containers"][0]["volumeMounts"] if mount["name"] == "runs")
    assert Path(join[1]["folder"]).is_relative_to(mounted)
    for role in ("driver", "workers"):
        assert receiving.TOKEN in [one["name"] for one in found[role]["containers"][0]["env"]]


def test_selectors_find_their_pods() -> None:
    """Monitors, policies, services: every selector is a part of some pod's labels, and the leader's finds only the leader."""
    for name in TARGETS:
        things = manifests(name)
        cluster = next(thing for thing in things if thing["kind"] == "RayService")["spec"]["rayClusterConfig"]
        labelled = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
        labelled += [thing["spec"]["template"] for thing in things if thing["kind"] == "Job"]
        found = [pod["metadata"]["labels"] for pod in labelled]
        for thing in things:
            selector = {
                "Service": lambda t: t["spec"]["selector"],
                "PodMonitor": lambda t: t["spec"]["selector"]["matchLabels"],
                "NetworkPolicy": lambda t: t["spec"]["podSelector"]["matchLabels"],
            }.get(thing["kind"])
            if thing["kind"] == "PodMonitor" and thing["metadata"]["name"].endswith("-dcgm"):
                continue  # pods of the GPU operator's
            if selector:
                matched = [labels for labels in found if selector(thing).items() <= labels.items()]
                assert len(matched) == (1 if thing["metadata"]["name"].endswith(("-leader", "-power")) else 2), thing["metadata"]["name"]
                if thing["metadata"]["name"].endswith("-power"):
                    assert matched == [cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"]]  # the head holds no replicas


def test_dcgm_is_asked_for_this_deployments_gpus_alone() -> None:
    """What is kept of an exporter that knows every GPU of the cluster: metrics that rules ask for, of GPUs that one of our serving pods has."""
    [monitor] = [thing for thing in manifests("h100") if thing["metadata"]["name"].endswith("-dcgm")]
    [page] = monitor["spec"]["podMetricsEndpoints"]
    names, pods_ = page["metricRelabelings"]
    assert page["honorLabels"]  # `pod` is whose GPU it is, not the exporter's own
    assert all(re.fullmatch(names["regex"], name) for name in metrics.DCGM)
    assert not re.fullmatch(names["regex"], "DCGM_FI_DEV_SM_CLOCK")
    name = "llama-3-1-8b-h100"
    for pod, kept in (
        (f"kilocopy;{name}-x7k2p-serving-worker-9bq4z", True),
        (f"kilocopy;{name}-x7k2p-head-9bq4z", False),
        (f"kilocopy;{name}-int4-x7k2p-serving-worker-9bq4z", False),  # another deployment, whose name begins alike
        (f"other;{name}-x7k2p-serving-worker-9bq4z", False),
        ("gpu-operator;nvidia-dcgm-exporter-5tz8w", False),  # a GPU that no pod has
    ):
        assert bool(re.fullmatch(pods_["regex"], pod)) is kept, pod
    long = "a" * kuberay.NAME_MAX
    assert re.fullmatch(kuberay.serving_pods(long), f"{long}-x7k2p-serving"[: kuberay.POD_PREFIX_MAX] + "-worker-9bq4z")
    assert not [thing for thing in manifests("cpu") if thing["metadata"]["name"].endswith("-dcgm")]


def test_the_power_meter_starts_beside_ray_and_does_not_hold_it_up(tmp_path: Path) -> None:
    """The pods' own command, by a shell: it returns at once with 0 whatever becomes of the meter, and what it starts is the meter's page."""
    worker = pods(manifests("cpu"))["worker"]["containers"][0]
    assert {"name": "power", "containerPort": kuberay.POWER_PORT} in worker["ports"]
    shell = worker["lifecycle"]["postStart"]["exec"]["command"]
    started = tmp_path / "started"
    (tmp_path / "python").write_text(f"#!/bin/sh\necho \"$@\" > {started}.half && mv {started}.half {started}\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    subprocess.run(shell, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True, timeout=20)
    until_s = time.monotonic() + 20
    while not started.exists():
        assert time.monotonic() < until_s
        time.sleep(0.05)
    assert started.read_text().split()[:3] == ["-m", "cluster.power", "--page"]


def test_placement() -> None:
    def placed(name: str, **cluster: Any) -> placement.Placement:
        changed = document(name)
        changed["cluster"] |= cluster
        return placement.place(Spec.model_validate(changed))

    assert placed("h100") == placement.Placement(1, 1, 8, 8, 16, 0, 11)
    assert placed("l4") == placement.Placement(1, 1, 4, 1, 8, 0, 1)
    assert placed("405b") == placement.Placement(4, 2, 1, 4, 5, 0, 11)
    assert placed("cpu") == placement.Placement(1, 1, 2, 0, 4, 0, 1)
    # 9 replicas on nodes of 8: two of 5, one GPU idle
    assert placed("h100", replicas=9) == placement.Placement(2, 1, 5, 5, 10, 1, 11)
    # two GPUs each: four on a node, 7 on two nodes of 4 x 2, two GPUs idle
    two = {"replicas": 7, "tensor_parallel": 2, "hardware": {"kind": "gpu", "type": "H100", "gpus_per_replica": 2}}
    assert placed("h100", **two) == placement.Placement(2, 1, 4, 8, 12, 2, 11)
    # three on a GPU at 0.3 each, 7 on 8 GPUs: three GPUs, 0.9 of one idle
    third = placed("h100", replicas=7, hardware={"kind": "gpu", "gpus_per_replica": 0.3})
    assert (third.nodes, third.gpus_per_node, third.cpu_slots_per_node) == (1, 3, 14)
    assert third.gpus_idle == pytest.approx(0.9)


def refused(name: str, part: str, **changes: Any) -> str:
    """The sentence for a spec with changes in one part."""
    changed = document(name)
    (changed[part] if part else changed).update(changes)
    try:
        made = Spec.model_validate(changed)
    except ValueError as error:
        return str(error)
    with pytest.raises(ProblemError) as problem:
        deploying.files(made, "kuberay")
    return str(problem.value)


def test_bad_specs_are_refused_in_a_sentence() -> None:
    larger = refused("h100", "cluster", tensor_parallel=16, hardware={"kind": "gpu", "gpus_per_replica": 16})
    assert "a replica of 16 GPUs" in larger
    assert "larger than a node of 8; set deploy.hosts_per_replica: 2" in larger
    parallel = refused("l4", "cluster", tensor_parallel=2)
    assert "a fraction of a GPU (0.25) cannot hold 2 parallel workers" in parallel
    unknown = refused("h100", "cluster", hardware={"kind": "gpu", "type": "H1000", "gpus_per_replica": 1})
    assert "no accelerator type 'H1000': did you mean H100?" in unknown
    uneven = refused("405b", "cluster", tensor_parallel=7, hardware={"kind": "gpu", "gpus_per_replica": 7})
    assert "7 GPUs do not divide evenly over 2 nodes" in uneven
    assert "looks like a secret" in refused("h100", "cluster", env={"HF_TOKEN": "x"})
    assert "a directory of this machine" in refused("h100", "model", source="./weights")
    assert "not below deploy.models.path" in refused("405b", "model", source="/elsewhere/model")
    assert "image kilocopy: give it a tag" in refused("h100", "deploy", image="kilocopy")
    assert "take 16 of Ray's CPU slots" in refused("h100", "deploy", node={"gpus": 8, "cpus": 15, "memory_gib": 500})
    assert "deploy.node.gpus: missing" in refused("h100", "deploy", node={"cpus": 15, "memory_gib": 500})
    assert "deploy: missing" in refused("h100", "", deploy=None)
    assert "workload.prompts.path data.jsonl: a file of this machine" in refused("h100", "workload", prompts={"kind": "dataset", "path": "data.jsonl"})


def test_what_one_host_cannot_hold_is_no_compose() -> None:
    with pytest.raises(ProblemError, match="need 4 nodes"):
        deploying.files(spec("405b"), "compose")


def test_notes_say_what_is_paid_for_and_what_is_slow() -> None:
    changed = document("h100")
    changed["cluster"]["replicas"] = 9
    assert list(placement.notes(Spec.model_validate(changed))) == [
        "1 of 10 GPUs stay idle and are paid for: 9 replicas do not fill 2 nodes"
    ]
    (spans,) = placement.notes(spec("405b"))
    assert "tensor_parallel 8 spans nodes of 4 GPUs" in spans
    assert "tensor_parallel 4 with pipeline_parallel 2" in spans


def test_no_render_tells_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "KILOCOPY_API_KEY", "KILOCOPY_JOIN_TOKEN"):
        monkeypatch.setenv(name, "swordfish")
    for name, target in CASES:
        assert not any("swordfish" in text for text in deploying.files(spec(name), target).values())


def test_accelerator_names_are_rays() -> None:
    from ray.util.accelerators import accelerators

    names = {value for key, value in vars(accelerators).items() if key.startswith(("NVIDIA_", "AMD_", "INTEL_MAX_"))}
    assert names == set(ACCELERATORS)


def test_the_pinned_ray_is_the_images() -> None:
    assert f"ray[serve]=={RAY_VERSION}" in (ROOT / "requirements" / "gpu.in").read_text()


def test_where_it_is_deployed_is_not_in_the_specs_hash() -> None:
    changed = document("h100")
    changed["deploy"]["namespace"] = "elsewhere"
    plain = load(ROOT / "loadtests" / "specs" / "llama-3.1-8b-h100.yaml")
    assert spec("h100").sha256 == Spec.model_validate(changed).sha256 == plain.sha256


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_the_image_takes_what_is_there_and_is_nobodys_root(name: str) -> None:
    """Every COPY is in the build's context, and the last USER is no root."""
    lines = (ROOT / "deploy" / name).read_text().splitlines()
    context = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [source for line in lines if line.startswith("COPY") for source in line.split()[2:-1]]
    assert {"kilocopy", "cluster", "loadtests"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in context, source
    assert [line for line in lines if line.startswith("USER")][-1] == f"USER {kuberay.UID}:{kuberay.GID}"
    if name == "Dockerfile":
        assert f"ray-llm:{RAY_VERSION}-" in next(line for line in lines if line.startswith("ARG BASE"))
