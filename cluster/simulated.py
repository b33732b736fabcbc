"""A simulated engine: answers as a vLLM replica does, at a stated speed, without a model. It is for trying the control plane.

It is used only where a spec asks for it by name (`cluster.simulated_engine`). Routing, direct streaming, HAProxy, start, death and restart
are the real ones; the speed is the spec's, and no figure of it is a measurement of a model. It does not import vLLM, so that many fit a host.

The model is continuous batching: all running sequences advance by a token a step, and a step lasts

    step_s + step_s_per_copy x running + prefill_s_per_token x (prompt tokens that were admitted in it)

with at most `running_max` sequences running and the rest waiting in order. A prompt's tokens are its words: there is no tokenizer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from kilocopy.spec import CpuReplica, SimulatedEngine, Spec

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

TEXT = " simulated"
TTFT_BUCKETS_S = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
ANY_NUMBER = 1_000_000_000  # of requests at once: the engine queues them itself, as vLLM does


@dataclass(eq=False)
class Sequence:
    """One answer that is being made."""

    prompt_tokens: int
    left: int
    arrived_s: float
    steps: asyncio.Queue[bool] = field(default_factory=asyncio.Queue)  # True: the last token
    begun: bool = False


class Engine:
    """Advances all running sequences step by step; `count` is told what vLLM would count."""

    def __init__(self, times: SimulatedEngine, count: Counts) -> None:
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._times, self._count, self._work = times, count, asyncio.Event()

    def submit(self, prompt_tokens: int, output_tokens: int) -> Sequence:
        """Queue a request; its `steps` gets an item a token."""
        sequence = Sequence(prompt_tokens, output_tokens, time.perf_counter())
        self.waiting.append(sequence)
        self._work.set()
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """Forget a request whose client has gone."""
        for held in (self.running, self.waiting):
            with contextlib.suppress(ValueError):
                held.remove(sequence)

    def admit(self) -> list[Sequence]:
        """Sequences that begin with this step."""
        begun = []
        while self.waiting and len(self.running) < self._times.running_max:
            begun.append(self.waiting.popleft())
            self.running.append(begun[-1])
        return begun

    def step_s(self, begun: list[Sequence]) -> float:
        """How long the step lasts."""
        times = self._times
        prefill_s = times.prefill_s_per_token * sum(sequence.prompt_tokens for sequence in begun)
        return times.step_s + times.step_s_per_copy * len(self.running) + prefill_s

    def advance(self) -> None:
        """The step is over: a token for everybody."""
        made = self.running
        self.running = [sequence for sequence in made if sequence.left > 1]
        now_s = time.perf_counter()
        for sequence in made:
            sequence.left -= 1
            if not sequence.begun:
                sequence.begun = True
                self._count.first_token(sequence.prompt_tokens, now_s - sequence.arrived_s)
            if not sequence.left:
                self._count.ended()
            sequence.steps.put_nowait(sequence.left == 0)
        self._count.step(len(made))

    async def run(self) -> None:
        """Step after step, at times that do not drift; without work it waits."""
        due_s = time.perf_counter()
        while True:
            self._count.holds(len(self.running), len(self.waiting), len(self.running) / self._times.running_max)
            if not self.running and not self.waiting:
                self._work.clear()
                await self._work.wait()
                due_s = time.perf_counter()
            due_s = max(due_s + self.step_s(self.admit()), time.perf_counter())
            await asyncio.sleep(due_s - time.perf_counter())
            self.advance()


class Counts:
    """What vLLM exports through Ray's agents, under the same names and labels, as far as kilocopy reads and shows it."""

    def __init__(self, model: str, replica: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram  # noqa: PLC0415

        tags = {"model_name": model, "engine": "0", "ReplicaId": replica}
        keys = tuple(tags)

        def tagged(metric: Any, **more: str) -> Any:
            metric.set_default_tags(tags | more)
            return metric

        self._generated = tagged(Counter("vllm_generation_tokens", "Simulated engine: tokens made.", keys))
        self._prompts = tagged(Counter("vllm_prompt_tokens", "Simulated engine: prompt tokens taken.", keys))
        self._ended = tagged(Counter("vllm_request_success", "Simulated engine: answers ended.", (*keys, "finished_reason")), finished_reason="length")
        self._ttft = tagged(Histogram("vllm_time_to_first_token_seconds", "Simulated engine.", TTFT_BUCKETS_S, keys))
        self._gauges = [
            tagged(Gauge(f"vllm_{name}", "Simulated engine.", keys)) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        ]
        self._held: tuple[float, ...] = ()

    def first_token(self, prompt_tokens: int, ttft_s: float) -> None:
        """A prompt was taken in."""
        if prompt_tokens:
            self._prompts.inc(prompt_tokens)
        self._ttft.observe(ttft_s)

    def step(self, tokens: int) -> None:
        """Tokens of one step."""
        if tokens:
            self._generated.inc(tokens)

    def ended(self) -> None:
        """An answer came to its length."""
        self._ended.inc()

    def holds(self, *values: float) -> None:
        """Running, waiting, share of the places that are taken."""
        if values != self._held:
            for gauge, value in zip(self._gauges, values, strict=True):
                gauge.set(value)
            self._held = values


class Endpoint:
    """OpenAI's completions and chat completions over an engine, as an ASGI application."""

    def __init__(self, model: str, engine: Engine) -> None:
        self._model, self._engine = model, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        path, body = scope["path"], await _body(receive)
        if path in {"/v1/completions", "/v1/chat/completions"}:
            try:
                asked = json.loads(body)
                tokens = int(asked.get("max_completion_tokens") or asked.get("max_tokens") or 16)
                prompt = asked["messages"] if path.endswith("chat/completions") else asked["prompt"]
            except (ValueError, KeyError, AttributeError, TypeError):
                await _answer(send, 400, {"error": {"message": "the simulated engine did not understand the request"}})
                return
            gone = asyncio.ensure_future(receive())
            sequence = self._engine.submit(_words(prompt), max(1, tokens))
            try:
                await (self._stream if asked.get("stream") else self._whole)(sequence, tokens, "chat" in path, gone, send)
            finally:
                self._engine.abort(sequence)
                gone.cancel()
        elif path == "/v1/models":
            await _answer(send, 200, {"object": "list", "data": [{"id": self._model, "object": "model", "owned_by": "simulated"}]})
        elif path == "/health":
            await _answer(send, 200, {})
        else:
            await _answer(send, 404, {"error": {"message": f"the simulated engine has no {path}"}})

    async def _stream(self, sequence: Sequence, tokens: int, chat: bool, gone: asyncio.Future[Message], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})
        name, last = f"cmpl-{uuid.uuid4().hex}", False
        token, end = (self._event(name, chat, finish) for finish in (None, "length"))
        while not last and not gone.done():
            last = await sequence.steps.get()
            await send({"type": "http.response.body", "body": end if last else token, "more_body": True})
        usage = _event({"id": name, "object": "text_completion", "model": self._model, "choices": [], "usage": _usage(sequence, tokens)})
        await send({"type": "http.response.body", "body": usage + b"data: [DONE]\n\n"})

    def _event(self, name: str, chat: bool, finish: str | None) -> bytes:
        part = {"delta": {"content": TEXT}} if chat else {"text": TEXT}
        kind = "chat.completion.chunk" if chat else "text_completion"
        return _event({"id": name, "object": kind, "model": self._model, "choices": [{"index": 0, **part, "finish_reason": finish}], "usage": None})

    async def _whole(self, sequence: Sequence, tokens: int, chat: bool, gone: asyncio.Future[Message], send: Send) -> None:
        while not gone.done() and not await sequence.steps.get():
            pass
        text = TEXT * tokens
        part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices = [{"index": 0, **part, "finish_reason": "length"}]
        await _answer(send, 200, {"object": "text_completion", "model": self._model, "choices": choices, "usage": _usage(sequence, tokens)})


def _usage(sequence: Sequence, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": sequence.prompt_tokens, "completion_tokens": tokens, "total_tokens": sequence.prompt_tokens + tokens}


def _words(prompt: Any) -> int:
    """A prompt's tokens are its words; token ids are counted as they are."""
    if isinstance(prompt, str):
        return len(prompt.split())
    return sum(_words(part.get("content") or "") if isinstance(part, dict) else 1 for part in prompt)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), bool(message.get("more_body"))
    return body


async def _answer(send: Send, status: int, value: dict[str, Any]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


class SimulatedServer:
    """What one Serve replica holds."""

    def __init__(self, model: str, times: dict[str, Any]) -> None:
        from ray import serve  # noqa: PLC0415

        counts = Counts(model, serve.get_replica_context().replica_id.unique_id)
        self._engine, self._model = Engine(SimulatedEngine.model_validate(times), counts), model
        self._running = asyncio.get_event_loop().create_task(self._engine.run())

    async def check_health(self) -> None:
        """Called by Serve: an engine whose loop has ended is dead."""
        if self._running.done():
            raise RuntimeError("the simulated engine's loop has ended")

    async def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve after the constructor."""
        return Endpoint(self._model, self._engine)


def build(spec: Spec) -> Any:
    """The bound application of a spec that asks for it: its replicas behind the router and the proxy that vLLM's replicas have."""
    from ray import serve  # noqa: PLC0415  reads the environment that Ray was started with
    from ray.llm._internal.serve.constants import DEFAULT_HEALTH_CHECK_PERIOD_S, DEFAULT_HEALTH_CHECK_TIMEOUT_S  # noqa: PLC0415
    from ray.llm._internal.serve.core.ingress.router import LLMRouter  # noqa: PLC0415
    from ray.serve.config import RequestRouterConfig  # noqa: PLC0415
    from ray.serve.experimental.round_robin_router import RoundRobinRouter  # noqa: PLC0415

    times, hardware = spec.cluster.simulated_engine, spec.cluster.hardware
    assert times is not None  # noqa: S101  the caller looked
    assert isinstance(hardware, CpuReplica)  # noqa: S101  the spec's own check
    replicas = serve.deployment(
        serve.ingress()(SimulatedServer),
        name=f"LLMServer:simulated:{spec.model.id.replace('/', '--').replace('.', '_')}",
        num_replicas=spec.cluster.replicas,
        max_ongoing_requests=ANY_NUMBER,
        health_check_period_s=DEFAULT_HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=DEFAULT_HEALTH_CHECK_TIMEOUT_S,
        ray_actor_options={"num_cpus": hardware.cpus_per_replica},
        request_router_config=RequestRouterConfig(request_router_class=RoundRobinRouter),
    ).bind(spec.model.id, times.model_dump())
    router = serve.deployment(LLMRouter, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    return replicas._with_ingress_request_router(router.bind(server=replicas, llm_config=None, base_model_id=None))
