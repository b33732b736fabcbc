"""A spec as a file for Ray's cluster launcher (`ray up`): a head that takes no work and serving hosts, on EC2 or Compute Engine.

The file is a pure function of the spec; `up` and `down` go through the user's own `ray`. Ray's token and the Hugging Face token are copied by `ray up` from files of this machine, by their paths.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilocopy import placement
from kilocopy.application import IMAGE_CHECKOUT, connections, environment, files_for
from kilocopy.kuberay import GCS_PORT, METRICS_PORT, OBJECT_STORE_BYTES, instance
from kilocopy.problem import ProblemError
from kilocopy.spec import AwsLauncher, Deploy, GcpLauncher, Spec
from kilocopy.tool import call, show

HOME = "/home/ray"
SPEC = f"{HOME}/kilocopy/spec.yaml"
RAY_TOKEN, HUB_TOKEN = "~/.ray/auth_token", "~/.cache/huggingface/token"


def config(spec: Spec) -> dict[str, Any]:
    """The launcher's file as a document. Raises ProblemError."""
    placement.check(spec)
    deploy = placement.needed(spec)
    if deploy.launcher is None:
        raise ProblemError("deploy.launcher: missing; --target ray needs the machines' types (`kilocopy init --gpu` shows them)")
    if deploy.models is not None:
        raise ProblemError("deploy.models: a claim is Kubernetes'; for --target ray give model.source as a Hugging Face id, s3:// or gs://")
    placed = placement.place(spec)
    machine = _ec2 if isinstance(deploy.launcher, AwsLauncher) else _compute_engine
    mounts = {SPEC: "spec.yaml", f"{HOME}/.ray/auth_token": RAY_TOKEN}
    if deploy.hf_token:
        mounts[f"{HOME}/.cache/huggingface/token"] = HUB_TOKEN
    resources = {"CPU": deploy.node.cpus} | ({"GPU": placed.gpus_per_node} if placed.gpus_per_node else {})
    return {
        "cluster_name": instance(spec),
        "max_workers": placed.nodes,
        "idle_timeout_minutes": 1440,  # min_workers keeps them; this only says it again
        "provider": _provider(deploy.launcher),
        "auth": {"ssh_user": deploy.launcher.ssh_user},
        "docker": {"image": deploy.image, "container_name": "kilocopy", "pull_before_run": True, "run_options": _run_options(spec, deploy)},
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": machine(deploy.launcher, False, 0)},
            "serving": {
                "min_workers": placed.nodes,
                "max_workers": placed.nodes,
                "resources": resources,
                "node_config": machine(deploy.launcher, True, placed.gpus_per_node),
            },
        },
        "head_node_type": "head",
        "file_mounts": mounts,
        "head_start_ray_commands": ["ray stop", _start(spec, f"--head --port={GCS_PORT} --num-cpus=0 --num-gpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml")],
        "worker_start_ray_commands": ["ray stop", _start(spec, f"--address=$RAY_HEAD_IP:{GCS_PORT} --num-cpus={deploy.node.cpus}")],
    }


def _files(spec: Spec) -> int:
    return max(65536, files_for(connections(spec)))


def _start(spec: Spec, how: str) -> str:
    return f"ulimit -n {_files(spec)}; ray start {how} --metrics-export-port={METRICS_PORT} --object-store-memory={OBJECT_STORE_BYTES}"


def _run_options(spec: Spec, deploy: Deploy) -> list[str]:
    """What every container is started with: Serve reads its environment before any configuration."""
    variables = environment(spec, IMAGE_CHECKOUT) | {"RAY_AUTH_MODE": "token"}
    return [f"--env={key}={value}" for key, value in variables.items()] + [f"--shm-size={deploy.node.shm_gib}g", f"--ulimit=nofile={_files(spec)}:{_files(spec)}"]


def _provider(launcher: AwsLauncher | GcpLauncher) -> dict[str, Any]:
    zone = {"availability_zone": launcher.availability_zone} if launcher.availability_zone else {}
    if isinstance(launcher, AwsLauncher):
        # Ray's default keeps stopped machines, and their disks are paid for.
        return {"type": "aws", "region": launcher.region, **zone, "cache_stopped_nodes": False}
    return {"type": "gcp", "region": launcher.region, **zone, "project_id": launcher.project}


def _ec2(launcher: Any, serves: bool, _: int) -> dict[str, Any]:
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": launcher.disk_gib, "VolumeType": "gp3"}}
    kind = launcher.worker_instance if serves else launcher.head_instance
    return {"InstanceType": kind, "ImageId": launcher.image_id, "BlockDeviceMappings": [disk]}


def _compute_engine(launcher: Any, serves: bool, gpus: int) -> dict[str, Any]:
    disk = {"diskSizeGb": launcher.disk_gib, "sourceImage": launcher.source_image}
    machine: dict[str, Any] = {
        "machineType": launcher.worker_machine if serves else launcher.head_machine,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
    }
    if serves and gpus:
        machine["scheduling"] = [{"onHostMaintenance": "TERMINATE"}]  # a machine with GPUs cannot move
        if launcher.accelerator:
            machine["guestAccelerators"] = [{"acceleratorType": launcher.accelerator, "acceleratorCount": gpus}]
    return machine


# ------------------------------------------------------------------------------------------------------------ ray's own part

COUNT = "import ray; ray.init('auto', log_to_driver=False); print('nodes alive:', sum(node['Alive'] for node in ray.nodes()))"
CURES = (
    (("Unable to locate credentials", "NoCredentialsError", "DefaultCredentialsError"), "log in to your cloud first"),
    (("VcpuLimitExceeded", "QUOTA_EXCEEDED", "quotaExceeded"), "raise the quota of that machine type"),
    (("InsufficientInstanceCapacity", "ZONE_RESOURCE_POOL_EXHAUSTED"), "the zone has none left: another zone, or later"),
)


def up(spec: Spec, folder: Path, say: Callable[[str], None], *, poll_s: float = 10.0) -> None:
    """`ray up`, wait for every node, then `kilocopy serve` on the head until it answers. Raises ProblemError."""
    deploy, nodes = placement.needed(spec), placement.place(spec).nodes + 1
    for path, make in ((RAY_TOKEN, "`ray get-auth-token --generate` makes it"), *(((HUB_TOKEN, "`hf auth login` makes it"),) if deploy.hf_token else ())):
        if not Path(path).expanduser().is_file():
            raise ProblemError(f"{path}: not there, and the nodes need it; {make}")
    say(f"ray up: a head and {nodes - 1} serving nodes")
    done = call(["ray", "up", "--yes", "--no-config-cache", "cluster.yaml"], timeout_s=3600, cwd=folder)
    if done.code:
        said = done.out + done.error
        if "ImportError" in said:  # of the cloud's library, which Ray names
            raise ProblemError(f"ray up: {done.said} Nothing was started.")
        cure = next((what for words, what in CURES if any(word in said for word in words)), "its own words say why")
        raise ProblemError(f"ray up: {done.said}; {cure}. Machines may be running: `kilocopy deploy delete` ends them")
    until_s, before = time.monotonic() + spec.cluster.start_timeout_s, -1
    while (alive := _alive(folder)) < nodes:
        if alive != before:
            before = alive
            say(f"nodes {alive}/{nodes}")
        if time.monotonic() > until_s:
            raise ProblemError(f"{alive} of {nodes} nodes after {spec.cluster.start_timeout_s:g} s; `ray monitor {folder / 'cluster.yaml'}` says why, `kilocopy deploy delete` ends them")
        time.sleep(poll_s)
    say(f"nodes {nodes}/{nodes}; serving")
    if show(["ray", "exec", "cluster.yaml", f"kilocopy serve {SPEC} --address auto"], cwd=folder):
        raise ProblemError("the replicas could not start; the lines above say why. The machines still run: `kilocopy deploy delete` ends them")


def _alive(folder: Path) -> int:
    """Nodes that the head counts; 0 while it does not answer."""
    done = call(["ray", "exec", "cluster.yaml", f'python -c "{COUNT}"'], timeout_s=300, cwd=folder)
    counted = re.search(r"nodes alive: (\d+)", done.out)
    return int(counted[1]) if counted else 0


def drive(spec: Spec, folder: Path) -> int:
    """Drive on the head, then bring the run directories home to FOLDER/runs; returns the driver's exit code."""
    command = f"kilocopy drive {SPEC} --runs {HOME}/kilocopy/runs --workers {placement.driver_workers(spec)}"
    code = show(["ray", "exec", "cluster.yaml", command], cwd=folder)
    (folder / "runs").mkdir(exist_ok=True)
    return show(["ray", "rsync-down", "cluster.yaml", f"{HOME}/kilocopy/runs/", "runs/"], cwd=folder) or code


def down(folder: Path, say: Callable[[str], None]) -> None:
    """`ray down`: ends every machine of this cluster. Raises ProblemError."""
    done = call(["ray", "down", "--yes", "cluster.yaml"], timeout_s=1800, cwd=folder)
    if done.code:
        if "ImportError" in done.error:
            raise ProblemError(f"ray down: {done.said} Nothing was asked of the cloud: machines that were started from elsewhere still run.")
        raise ProblemError(f"ray down: {done.said}; look into the cloud's console whether machines still run")
    say("ray down: the cluster's machines are ended")
