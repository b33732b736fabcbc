"""What a GPU replica is told: fractions, memory, parallelism, the type of GPU; taken by Ray's and vLLM's own models, on a machine without one."""

from __future__ import annotations

from typing import Any

import pytest

from kilocopy.application import environment, llm_config, replica_environment
from kilocopy.spec import Spec
from tests import synthetic


def spec(hardware: dict[str, Any], **cluster: Any) -> Spec:
    tree = synthetic.spec()
    tree["cluster"] = {"replicas": 2, "hardware": {"kind": "gpu"} | hardware} | cluster
    return Spec.model_validate(tree)


def taken(one: Spec) -> Any:
    """The engine configuration that ray.serve.llm makes of it, or its complaint."""
    from ray.serve.llm import LLMConfig

    return LLMConfig(**llm_config(one, None)).get_engine_config()


@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_a_fraction_of_a_gpu_is_asked_of_ray_and_kept_by_the_engine(fraction: float) -> None:
    one = spec({"gpus_per_replica": fraction})
    engine = taken(one)
    assert engine.placement_bundles == [{"CPU": 1, "GPU": fraction}]
    assert float(replica_environment(one, None)["VLLM_RAY_PER_WORKER_GPUS"]) == fraction
    assert engine.get_runtime_env_with_local_env_vars()["env_vars"]["VLLM_RAY_PER_WORKER_GPUS"] == f"{fraction:g}"
    assert engine.engine_kwargs["gpu_memory_utilization"] == pytest.approx(0.9 * fraction)
    assert engine.get_initialization_kwargs()["distributed_executor_backend"] == "ray"


def test_what_the_spec_says_of_memory_counts() -> None:
    assert taken(spec({"gpus_per_replica": 0.5}, engine={"gpu_memory_utilization": 0.3})).engine_kwargs["gpu_memory_utilization"] == 0.3


def test_a_whole_gpu_is_left_to_vllms_own_default() -> None:
    engine = taken(spec({"gpus_per_replica": 1}))
    assert engine.placement_bundles == [{"CPU": 1, "GPU": 1.0}]
    assert "gpu_memory_utilization" not in engine.engine_kwargs
    assert "VLLM_RAY_PER_WORKER_GPUS" not in engine.get_runtime_env_with_local_env_vars()["env_vars"]


def test_parallel_workers_get_a_bundle_each_and_the_type_of_gpu() -> None:
    engine = taken(spec({"gpus_per_replica": 4, "type": "H100"}, tensor_parallel=2, pipeline_parallel=2))
    assert engine.num_devices == 4
    assert engine.placement_bundles == [{"CPU": 1, "GPU": 1.0, "accelerator_type:H100": 0.001}] * 4


def test_a_type_that_ray_does_not_know_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="Ray knows no accelerator type 'H9000'"):
        taken(spec({"gpus_per_replica": 1, "type": "H9000"}))


def test_an_engine_argument_that_vllm_does_not_know_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="Unknown engine argument: max_num_sequences"):
        taken(spec({"gpus_per_replica": 1}, engine={"max_num_sequences": 8}))


def test_the_engines_arguments_of_the_gpu_specs_are_vllms() -> None:
    from pathlib import Path

    from kilocopy.spec import load

    for name in ("gpu-8b", "gpu-demo", "llama-3.1-8b-h100"):
        one = load(Path(__file__).parent.parent / "loadtests" / "specs" / f"{name}.yaml")
        assert taken(one).engine_kwargs.items() >= one.cluster.engine.items()


def test_ray_of_a_gpu_cluster_uses_the_executor_that_schedules_ahead() -> None:
    assert environment(spec({"gpus_per_replica": 1}), "/there")["VLLM_USE_RAY_V2_EXECUTOR_BACKEND"] == "1"
