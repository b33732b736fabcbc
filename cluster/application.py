"""The bound Serve application of a spec; what it says is in kilocopy/application.py."""

from __future__ import annotations

from typing import Any

from kilocopy.application import llm_config, local_model
from kilocopy.spec import Spec


def build(spec: Spec) -> Any:
    """The bound Serve application. Raises ValueError with Ray's or vLLM's own words for an argument they refuse."""
    if spec.cluster.simulated_engine is not None:
        from cluster import simulated  # noqa: PLC0415

        return simulated.build(spec)
    from ray.serve.llm import LLMConfig, build_openai_app  # noqa: PLC0415  reads the environment that Ray was started with

    directory = local_model(spec)
    config = LLMConfig(**llm_config(spec, str(directory) if directory else None))
    config.get_engine_config()  # unknown engine arguments are refused here, not minutes later in a replica
    return build_openai_app({"llm_configs": [config]})
