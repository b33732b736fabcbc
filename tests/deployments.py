"""The specs whose renders are kept in tests/golden, and the CRDs that they are validated by."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from kilocopy.spec import Spec

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "loadtests" / "specs" / "llama-3.1-8b-h100.yaml"
GOLDEN = ROOT / "tests" / "golden"
SAFE = YAML(typ="safe")

TARGETS = {"h100": ("kuberay", "compose", "ray"), "l4": ("kuberay", "compose", "ray"), "405b": ("kuberay",), "cpu": ("kuberay",)}


def uncommented() -> dict[str, Any]:
    """The shipped GPU spec with its commented deploy section in force."""
    spec, deploy = SHIPPED.read_text().split("# deploy:\n")
    document: dict[str, Any] = SAFE.load(spec + "deploy:\n" + re.sub(r"(?m)^# ?", "", deploy))
    return document


def document(name: str) -> dict[str, Any]:
    """One L4 shared by four replicas; eight H100s with a GPU each; 405B over two nodes; the demo on CPUs."""
    made = uncommented()
    cluster, deploy = made["cluster"], made["deploy"]
    if name == "l4":
        made["name"] = "llama-3.2-1b-l4"
        made["model"] |= {"id": "llama-3.2-1b", "source": "meta-llama/Llama-3.2-1B-Instruct", "parameters_active": 1.24e9}
        cluster |= {"replicas": 4, "hardware": {"kind": "gpu", "type": "L4", "gpus_per_replica": 0.25}}
        cluster["engine"] = {"max_model_len": 2048, "gpu_memory_utilization": 0.22}
        deploy |= {"node": {"gpus": 1, "cpus": 12, "memory_gib": 48}, "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-l4"}}
        deploy |= {"results": {"kind": "uri", "uri": "gs://bucket/runs", "service_account": "driver"}}
        deploy["launcher"] = {
            "kind": "gcp", "project": "a-project", "region": "us-central1", "availability_zone": "us-central1-a", "worker_machine": "g2-standard-12",
            "source_image": "projects/a-project/global/images/gpu-docker",
        }  # fmt: skip
        made["stages"] = [{"arrival": "closed", "copies": 256, "duration_s": 60}]
    elif name == "405b":
        made["name"] = "llama-3.1-405b"
        made["model"] |= {"id": "llama-3.1-405b", "source": "/models/Llama-3.1-405B-Instruct-FP8", "parameters_active": 405e9}
        cluster |= {"replicas": 2, "tensor_parallel": 8, "hardware": {"kind": "gpu", "type": "H100", "gpus_per_replica": 8}}
        deploy |= {"node": {"gpus": 4, "cpus": 48, "memory_gib": 450, "shm_gib": 64}, "hosts_per_replica": 2}
        deploy |= {"models": {"claim": "models"}, "gcs_fault_tolerance": {"kind": "redis", "address": "redis:6379", "password": {"name": "redis", "key": "password"}}}
        del deploy["hf_token"]
    elif name == "cpu":
        made["name"] = "demo"
        made["model"] |= {"id": "kilocopy-demo", "source": "/models/demo", "parameters_active": 3016448}
        cluster |= {"replicas": 2, "hardware": {"kind": "cpu", "cpus_per_replica": 1, "kv_cache_gib": 1}}
        cluster["engine"] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 256}
        deploy |= {"node": {"cpus": 4, "memory_gib": 12, "shm_gib": 2}, "models": {"claim": "models"}, "monitoring": None, "node_selector": {}, "tolerations": []}
        deploy |= {"head": {"cpus": 1, "memory_gib": 6}, "gcs_fault_tolerance": {"kind": "rocksdb"}}
        del deploy["hf_token"]
        made["stages"] = [{"arrival": "closed", "copies": 64, "duration_s": 40}]
    return made


def spec(name: str) -> Spec:
    """One of them, checked."""
    return Spec.model_validate(document(name))


@functools.cache
def crd(kind: str) -> Draft202012Validator | None:
    """What validates a custom resource: its OpenAPI schema, closed. None where the folder of schemas is not there."""
    names = {"RayService": "ray.io_rayservices", "PodMonitor": "monitoring.coreos.com_podmonitors", "PrometheusRule": "monitoring.coreos.com_prometheusrules"}
    path = ROOT.parent / "shared" / "kuberay" / f"{names[kind]}.yaml"
    if not path.exists():
        return None
    versions = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    wanted = next(version for version in versions if version["name"] == "v1")
    made: dict[str, Any] = closed(wanted["schema"]["openAPIV3Schema"])
    made["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    return Draft202012Validator(made)


def closed(schema: Any) -> Any:
    """An OpenAPI schema as JSON Schema: objects take no fields but their own; whole numbers or strings where Kubernetes takes both."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items() if key not in {"format", "description"} and not key.startswith("x-kubernetes")}
    if str(schema.get("pattern", "")).startswith("^(?i)"):
        made["pattern"] = "(?i)^" + schema["pattern"].removeprefix("^(?i)")  # Go takes flags anywhere
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["properties"] = {key: closed(value) for key, value in schema["properties"].items()}
        made["additionalProperties"] = False
    return made
