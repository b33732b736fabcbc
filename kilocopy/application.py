"""The Serve application that a spec describes, as plain data, and the environment that Ray must be started with for it.

The same dictionary is deployed by the serving process (cluster/application.py) and can be written into deployment files,
so that what runs on a cluster is what runs here. `environment` has to be set before Ray starts (head and workers): Ray Serve reads
it at import.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kilocopy.spec import CpuReplica, GpuReplica, Spec, streams_max

APPLICATION = "kilocopy"
GPU_MEMORY_UTILIZATION = 0.9  # of a replica's share of a GPU, where the spec does not say: the rest is CUDA's own and its graphs'
DIRECT = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING")
RAY_VERSION = "2.60.0"  # of requirements/*.in, and of the image
FILES_PER_CONNECTION, FILES_SPARE = 2.5, 500  # of HAProxy: both sides, pipes for a quarter of them (Ray's template splices); listeners, checks
IMAGE_CHECKOUT = "/opt/kilocopy"  # where deploy/Dockerfile puts this project's folder


def environment(spec: Spec, checkout: str) -> dict[str, str]:
    """Variables for every Ray process: high-throughput routing, no phoning home. Nothing secret.

    `checkout` is where the nodes have this project's folder: replicas import `cluster.replica` from it.
    """
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # One try a replica: an engine that cannot start says so at once instead of three minutes later.
        "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",
        # Serve says each second which replicas are healthy, not each 10 s: a gauge is on Ray's page only after it was told.
        "RAY_SERVE_STATUS_GAUGE_REPORT_INTERVAL_S": "1",
        "PYTHONPATH": checkout,
        **measured_environment(spec),
    }
    if isinstance(spec.cluster.hardware, GpuReplica):
        variables["VLLM_USE_RAY_V2_EXECUTOR_BACKEND"] = "1"
    return variables


def measured_environment(spec: Spec) -> dict[str, str]:
    """The part of `environment` without which figures would be other ones: the routing that the spec names, and counters that do not lag."""
    # The servers' counters are compared with the client's at the edges of every stage: they must not lag by 10 s.
    variables = {"RAY_metrics_report_interval_ms": "1000"}
    if spec.cluster.routing == "direct":
        variables |= dict.fromkeys(DIRECT, "1") | {"RAY_SERVE_HAPROXY_MAXCONN": str(connections(spec))}
    return variables


def connections(spec: Spec) -> int:
    """HAProxy's limit: above it requests wait unseen, so it is four times the copies of the largest stage."""
    return max(4096, 4 * max(streams_max(stage) for stage in spec.stages))


def files_for(connections: int) -> int:
    """Open files that HAProxy must be allowed for so many connections: with fewer it does not start ("Cannot raise FD limit")."""
    return math.ceil(FILES_PER_CONNECTION * connections) + FILES_SPARE


def replica_environment(spec: Spec, directory: str | None) -> dict[str, str]:
    """Variables of the replicas alone: the engine's own settings, then the spec's."""
    variables: dict[str, str] = {}
    hardware = spec.cluster.hardware
    if isinstance(hardware, CpuReplica):
        threads = str(max(1, int(hardware.cpus_per_replica)))
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": str(hardware.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": threads,
            "RAYLLM_VLLM_ENGINE_CLS": "cluster.replica.CpuEngine",
        }
    elif hardware.gpus_per_replica < 1:
        variables["VLLM_RAY_PER_WORKER_GPUS"] = f"{hardware.gpus_per_replica:g}"
    if directory:
        variables["HF_HUB_OFFLINE"] = "1"
    return variables | spec.cluster.env


def local_model(spec: Spec) -> Path | None:
    """The model's directory where the source is one; None for a hub id or an object store."""
    path = Path(spec.model.source).expanduser()
    return path.resolve() if path.is_dir() else None


def _memory(spec: Spec) -> dict[str, Any]:
    """The engine's share of a GPU that it does not have alone; a whole GPU is left to vLLM's own default."""
    hardware = spec.cluster.hardware
    if isinstance(hardware, CpuReplica) or hardware.gpus_per_replica >= 1:
        return {}
    return {"gpu_memory_utilization": round(GPU_MEMORY_UTILIZATION * hardware.gpus_per_replica, 4)}


def llm_config(spec: Spec, directory: str | None) -> dict[str, Any]:
    """The LLMConfig of `ray.serve.llm`, as a plain dict (the same that a Serve YAML holds).

    `directory` is the model's directory on every node; None where the source is a hub id or an object store's URI.
    """
    hardware = spec.cluster.hardware
    engine = {"tensor_parallel_size": spec.cluster.tensor_parallel, "pipeline_parallel_size": spec.cluster.pipeline_parallel}
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": spec.model.id, "model_source": directory or spec.model.source},
        "engine_kwargs": engine | _memory(spec) | spec.cluster.engine,
        "deployment_config": {"num_replicas": spec.cluster.replicas},
        "runtime_env": {"env_vars": replica_environment(spec, directory)},
        # Ray holds streamed tokens back for 50 ms by default, to batch them.
        "experimental_configs": {"stream_batching_interval_ms": 0},
    }
    if isinstance(hardware, CpuReplica):
        config["accelerator_config"] = {"kind": "cpu"}
        config["placement_group_config"] = {"bundle_per_worker": {"CPU": hardware.cpus_per_replica}}
    else:
        gpus = min(1.0, hardware.gpus_per_replica)
        config["placement_group_config"] = {"bundle_per_worker": {"CPU": 1, "GPU": gpus}}
        if hardware.type:
            config["accelerator_type"] = hardware.type
    if directory:
        config["callback_config"] = {"callback_class": "cluster.replica.ModelOnDisk"}
    return config


def serve_config(spec: Spec, directory: str | None) -> dict[str, Any]:
    """The application as `serve deploy` takes it from a file: what `kilocopy serve` hands to Serve, with the endpoint on all interfaces."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": spec.cluster.port},  # noqa: S104  pods reach it by their addresses
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "ray.serve.llm:build_openai_app",
                "args": {"llm_configs": [llm_config(spec, directory)]},
            }
        ],
    }
