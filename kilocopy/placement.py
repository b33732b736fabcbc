"""Where a spec's replicas go: how many nodes, what each takes of its node, and how many processes drive them. Arithmetic, and refusals.

A serving pod (or host) takes a node's GPUs for whole replicas. Replicas are dealt out evenly: 9 of one GPU each on nodes of 8 become two
pods of 5, of which one GPU stays idle, and is said to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kilocopy.problem import ProblemError
from kilocopy.spec import CpuReplica, Deploy, GpuReplica, Spec, files_named, streams_max

SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|KEY_ID|CREDENTIALS?)($|_)")


@dataclass(frozen=True, slots=True)
class Placement:
    """The serving nodes, and the driver's workers."""

    nodes: int
    hosts_per_replica: int
    replicas_per_node: int  # 1 where a replica spans several nodes: its part
    gpus_per_node: int
    cpu_slots_per_node: int  # what Ray's scheduler hands out there: a slot for each worker's bundle and for each replica's actor
    gpus_idle: float  # GPUs that are asked for, and hold nothing
    driver_workers: int

    @property
    def groups(self) -> int:
        """Units that are started together: nodes, or sets of nodes that one replica spans."""
        return self.nodes // self.hosts_per_replica


def needed(spec: Spec) -> Deploy:
    """The deploy section. Raises ProblemError where the spec has none."""
    if spec.deploy is None:
        raise ProblemError("deploy: missing; `kilocopy init --gpu` shows the section (image and node at least)")
    if spec.experiment is not None:
        raise ProblemError("experiment: `kilocopy deploy` drives stages; give stages, or run the experiment with `kilocopy run` on a machine of the cluster")
    return spec.deploy


def place(spec: Spec) -> Placement:
    """Work it out. Raises ProblemError for what no such node can hold."""
    deploy, hardware = needed(spec), spec.cluster.hardware
    if isinstance(hardware, CpuReplica):
        if deploy.hosts_per_replica > 1:
            raise ProblemError("deploy.hosts_per_replica: a replica on CPUs stays on one node; take it out")
        held = int(deploy.node.cpus // (hardware.cpus_per_replica + 1))
        if not held:
            raise ProblemError(
                f"cluster.hardware.cpus_per_replica {hardware.cpus_per_replica:g}: a replica and its actor take {hardware.cpus_per_replica + 1:g} CPU slots, "
                f"deploy.node.cpus is {deploy.node.cpus}: use larger nodes"
            )
        nodes, each = _dealt(spec.cluster.replicas, held)
        slots = math.ceil(each * (hardware.cpus_per_replica + 1))
        return Placement(nodes, 1, each, 0, slots, 0, driver_workers(spec))
    return _on_gpus(spec, deploy, hardware)


def _on_gpus(spec: Spec, deploy: Deploy, hardware: GpuReplica) -> Placement:
    have, want, hosts = deploy.node.gpus, hardware.gpus_per_replica, deploy.hosts_per_replica
    if have is None:
        raise ProblemError("deploy.node.gpus: missing; say how many GPUs one node has")
    if want > have * hosts:
        spread = math.ceil(want / have)
        raise ProblemError(
            f"cluster: a replica of {want:g} GPUs (tensor_parallel x pipeline_parallel) is larger than "
            + (f"a node of {have}" if hosts == 1 else f"{hosts} nodes of {have}")
            + f"; set deploy.hosts_per_replica: {spread} to spread it over {spread} nodes, or make it smaller"
        )
    if hosts > 1 and (want % hosts or want / hosts > have):
        raise ProblemError(f"deploy.hosts_per_replica: {want:g} GPUs do not divide evenly over {hosts} nodes")
    replicas = spec.cluster.replicas
    if hosts > 1:
        nodes, each, gpus, workers = replicas * hosts, 1, int(want / hosts), int(want / hosts)
    else:
        on_one_gpu = int(1 / want + 1e-9) if want < 1 else 0
        nodes, each = _dealt(replicas, have * on_one_gpu if on_one_gpu else int(have // want))
        gpus = math.ceil(each / on_one_gpu) if on_one_gpu else int(each * want)
        workers = each * (1 if on_one_gpu else int(want))
    slots = workers + each
    if slots > deploy.node.cpus:
        raise ProblemError(f"deploy.node.cpus {deploy.node.cpus}: {each} replicas on a node take {slots} of Ray's CPU slots; give it more, or use smaller nodes")
    return Placement(nodes, hosts, each, gpus, slots, nodes * gpus - replicas * want, driver_workers(spec))


def _dealt(replicas: int, held: int) -> tuple[int, int]:
    """Nodes, and replicas on each, for nodes that hold so many."""
    nodes = math.ceil(replicas / held)
    return nodes, math.ceil(replicas / nodes)


def driver_workers(spec: Spec) -> int:
    """Processes that read the streams of the largest stage."""
    driver = needed(spec).driver
    if driver.workers is not None:
        return driver.workers
    return math.ceil(max(streams_max(stage) for stage in spec.stages) / driver.streams_per_worker)


def check(spec: Spec) -> None:
    """What would only fail on the cluster, or tell a secret. Raises ProblemError."""
    deploy = needed(spec)
    place(spec)
    for key in spec.cluster.env:
        if SECRET.search(key.upper()):
            raise ProblemError(f"cluster.env.{key}: looks like a secret, and would stand in the files; name a Kubernetes Secret (deploy.hf_token, deploy.api_key)")
    for key, path in files_named(spec):
        if deploy.models is None or not path.startswith(deploy.models.path.rstrip("/") + "/"):
            raise ProblemError(f"{key} {path}: a file of this machine, which the driver's pods do not have; put it on the claim of deploy.models and give the path below its mount")
    source = spec.model.source
    if source.startswith((".", "~")) or (source.startswith("/") and deploy.models is None):
        raise ProblemError(
            f"model.source {source}: a directory of this machine, which the nodes do not have; give a Hugging Face id, s3:// or gs://, "
            "or put it on a claim (deploy.models) and give the path below its mount"
        )
    if source.startswith("/") and deploy.models and not source.startswith(deploy.models.path.rstrip("/") + "/"):
        raise ProblemError(f"model.source {source}: not below deploy.models.path {deploy.models.path}, where the claim is mounted")


def model_directory(spec: Spec) -> str | None:
    """The model's directory on the nodes; None where the source is a hub id or an object store's URI."""
    return spec.model.source if spec.model.source.startswith("/") else None


def notes(spec: Spec) -> Iterator[str]:
    """What a person should know before it runs, and pays."""
    placement, deploy = place(spec), needed(spec)
    if placement.gpus_idle > 1e-9:
        yield f"{placement.gpus_idle:g} of {placement.nodes * placement.gpus_per_node} GPUs stay idle and are paid for: {spec.cluster.replicas} replicas do not fill {placement.nodes} nodes"
    gpus = placement.gpus_per_node
    if placement.hosts_per_replica > 1 and spec.cluster.tensor_parallel > gpus:
        yield (
            f"tensor_parallel {spec.cluster.tensor_parallel} spans nodes of {gpus} GPUs: every layer of every token waits for their network; "
            f"tensor_parallel {gpus} with pipeline_parallel {spec.cluster.tensor_parallel * spec.cluster.pipeline_parallel // gpus} keeps that inside a node"
        )
    if deploy.driver.workers is not None:
        streams = max(streams_max(stage) for stage in spec.stages)
        if deploy.driver.workers * deploy.driver.streams_per_worker < streams:
            yield f"deploy.driver.workers {deploy.driver.workers} for {streams} streams: more than {deploy.driver.streams_per_worker} each, so their latency may be the driver's own"
