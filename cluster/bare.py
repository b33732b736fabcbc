"""vLLM without a server: the same closed load on the same engine arguments, in the engine's own process, to see what serving costs.

    python -m cluster.bare SPEC.json        loads the engine, says so, then takes one job a line on standard input

A job is {"run_dir", "prompts"}: a run directory whose manifest holds a spec with closed stages, and a file of JSON lines {"prompt",
"max_tokens"}, each used once (a prefix cache would answer a second time). Copies start, ask and stop by the rules of the driver
(kilocopy/schedule.py), and what came when is written down as the driver does, so that both sides are measured by the same code. What
this leaves out is HTTP, HAProxy, Ray Serve and the driver; tokenising and detokenising stay. End of input ends the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from kilocopy import schedule
from kilocopy.application import local_model
from kilocopy.records import Events, Writer
from kilocopy.spec import ClosedStage, CpuReplica, Spec

FLUSH_S = 0.5


def engine_arguments(spec: Spec) -> dict[str, Any]:
    """vLLM's engine arguments for a spec: those of its replicas, without Ray."""
    arguments: dict[str, Any] = {
        "model": str(local_model(spec) or spec.model.source),
        "tensor_parallel_size": spec.cluster.tensor_parallel,
        "pipeline_parallel_size": spec.cluster.pipeline_parallel,
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    return arguments | spec.cluster.engine


def load(spec: Spec) -> Any:
    """The engine, loaded, with the defaults that vLLM has for a server (they differ from the offline ones by usage context).

    A CPU engine runs the model in its own process, as the served one does (cluster/replica.py says why it is set after the fact).
    """
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415
    from vllm.usage.usage_lib import UsageContext  # noqa: PLC0415
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    usage = UsageContext.OPENAI_API_SERVER
    config = AsyncEngineArgs(**engine_arguments(spec)).create_engine_config(usage)
    if isinstance(spec.cluster.hardware, CpuReplica) and config.parallel_config.world_size == 1:
        config.parallel_config.distributed_executor_backend = "uni"
    return AsyncLLM.from_vllm_config(config, usage_context=usage, disable_log_stats=True)


class Copies:
    """One stage: so many tasks, each asking again as soon as its stream ended."""

    def __init__(self, engine: Any, spec: Spec, index: int, prompts: Iterator[dict[str, Any]], requests: Writer) -> None:
        self._engine, self._spec, self._index, self._prompts, self._requests = engine, spec, index, prompts, requests
        self.ok = 0

    async def play(self, stage: ClosedStage, events: Events) -> None:
        """The whole stage. Raises RuntimeError where the prompts ran out: a second use would be a cache's answer."""
        if stage.duration_s is None:
            raise RuntimeError(f"stages[{self._index}]: the bare engine plays stages with a duration_s")
        place = {"stage": self._index, "level": 0}
        events.write("stage_start", **place, load=None, workers=1)
        begin_s = time.perf_counter()
        stop_s = begin_s + stage.ramp_s + stage.warmup_s + stage.duration_s
        seed = schedule.draw(self._spec.workload.seed, "starts", self._index, 0)
        starts = schedule.starts_s(stage.copies, stage.ramp_s, seed)
        copies = [asyncio.create_task(self._copy(number, begin_s + offset_s, stop_s)) for number, offset_s in enumerate(starts)]
        stopped = asyncio.create_task(self._mark(events, place, stop_s))
        flushing = asyncio.create_task(self._flush())
        try:
            await asyncio.gather(*copies)
            await stopped
        finally:
            for task in (*copies, stopped, flushing):
                task.cancel()
        events.write("stage_drained", **place)
        events.write("stage_settled", **place)

    async def _mark(self, events: Events, place: dict[str, int], stop_s: float) -> None:
        await asyncio.sleep(max(0.0, stop_s - time.perf_counter()))
        events.write("stage_stop_asking", **place)

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            self._requests.flush()

    async def _copy(self, copy: int, start_s: float, stop_s: float) -> None:
        await asyncio.sleep(max(0.0, start_s - time.perf_counter()))
        sequence = 0
        while time.perf_counter() < stop_s:
            asked = next(self._prompts, None)
            if asked is None:
                raise RuntimeError("the prompts ran out before the stage did: give more")
            self._requests.append(await self._stream(copy, sequence, asked))
            self.ok += 1
            sequence += 1

    async def _stream(self, copy: int, sequence: int, asked: dict[str, Any]) -> dict[str, Any]:
        """One request, stamped as its pieces come; a piece without text is no token to a reader, here as at the driver."""
        from vllm import SamplingParams  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        sampling = self._spec.workload.sampling
        how = SamplingParams(
            max_tokens=asked["max_tokens"], temperature=sampling.temperature, top_p=sampling.top_p,
            ignore_eos=self._spec.workload.ignore_eos, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        times_ns: list[int] = []
        texts: list[str] = []
        tokens = prompt_tokens = 0
        finish_reason = None
        sent_ns = time.perf_counter_ns()
        async for part in self._engine.generate(asked["prompt"], how, f"{self._index}-{copy}-{sequence}"):
            now_ns = time.perf_counter_ns()
            said = part.outputs[0]
            tokens += len(said.token_ids)
            prompt_tokens = len(part.prompt_token_ids or ()) or prompt_tokens
            finish_reason = said.finish_reason or finish_reason
            if said.text:
                times_ns.append(now_ns)
                texts.append(said.text)
        return {
            "stage": self._index, "level": 0, "worker": 0, "copy": copy, "sequence": sequence,
            "scheduled_ns": sent_ns, "sent_ns": sent_ns,
            "first_token_ns": times_ns[0] if times_ns else None, "last_token_ns": times_ns[-1] if times_ns else None,
            "finished_ns": time.perf_counter_ns(), "prompt_tokens": prompt_tokens, "output_tokens": tokens,
            "output_words": len("".join(texts).split()), "chunks": len(times_ns),
            "gaps_us": [(after - before) // 1000 for before, after in itertools.pairwise(times_ns)],
            "outcome": "ok" if finish_reason else "truncated", "finish_reason": finish_reason, "replica": "bare",
        }  # fmt: skip


async def play(engine: Any, run_dir: Path, prompts_path: Path) -> int:
    """Every stage of a run directory's spec; returns how many requests ended."""
    spec = Spec.model_validate(json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["spec"])
    with prompts_path.open(encoding="utf-8") as file:
        prompts = (json.loads(line) for line in file)
        events, requests = Events(run_dir, "worker0"), Writer(run_dir, "requests", "worker0")
        events.write("run_start", spec_sha256=spec.sha256)
        done = 0
        try:
            for index, stage in enumerate(spec.stages):
                if not isinstance(stage, ClosedStage):
                    raise RuntimeError(f"stages[{index}]: the bare engine plays closed stages")
                copies = Copies(engine, spec, index, prompts, requests)
                await copies.play(stage, events)
                done += copies.ok
            events.write("run_end", reason="complete")
        finally:
            requests.close()
    return done


async def warm_up(engine: Any) -> None:
    """Two short requests: the first pays for what is built lazily (cluster/serve.py does the same to replicas)."""
    from vllm import SamplingParams  # noqa: PLC0415

    async def ask(number: int) -> None:
        async for _ in engine.generate("The", SamplingParams(max_tokens=8, ignore_eos=True), f"warm-up-{number}"):
            pass

    await asyncio.gather(ask(0), ask(1))


async def serve(spec: Spec, answers: TextIO) -> None:
    """Load the engine, then do a job a line until the input ends. A job that fails is answered with its error; the engine goes on."""
    engine = load(spec)

    def say(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        await warm_up(engine)
        say(phase="ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            job = json.loads(line)
            try:
                say(phase="done", run_dir=job["run_dir"], ok=await play(engine, Path(job["run_dir"]), Path(job["prompts"])))
            except (RuntimeError, OSError, ValueError) as error:
                say(phase="failed", run_dir=job["run_dir"], error=f"{type(error).__name__}: {error}")
    finally:
        engine.shutdown()


def main() -> int:
    """The command line. vLLM logs to standard output, which belongs to the answers here: its words go to standard error."""
    spec = Spec.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asyncio.run(serve(spec, answers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
