"""What a replica does differently from Ray's own: it starts sooner.

Importing vLLM takes 13 s of CPU. A CPU replica of `ray.serve.llm` does it four times: in the replica, in a task that downloads
a model (also when it lies on the disk already), in the engine's process and in the worker's. Two of them go away here.
"""

from __future__ import annotations

from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine


class ModelOnDisk(CallbackBase):  # type: ignore[misc]
    """Skips the download task, for a model that is a directory on every node."""

    async def on_before_node_init(self) -> None:
        """Called by Ray before it starts the task that downloads the model."""
        self.ctx.run_init_node = False


class CpuEngine(VLLMEngine):  # type: ignore[misc]
    """Runs the model in the engine's own process: one CPU worker needs no process of its own.

    Ray sets the multi-process executor for every CPU engine, whatever the engine arguments say, so it is set back after that.
    Ray finds this class through RAYLLM_VLLM_ENGINE_CLS.
    """

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        if config.parallel_config.world_size == 1:
            arguments.distributed_executor_backend = "uni"
            config.parallel_config.distributed_executor_backend = "uni"
        return arguments, frontend, config
