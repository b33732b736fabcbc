"""The simulated engine keeps the step times it was told, says what it is, and cannot be had by mistake."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.simulated import Endpoint, Engine
from kilocopy.recompute import summarise
from kilocopy.spec import SimulatedEngine, Spec
from tests import synthetic


class Tally:
    """What an engine counted."""

    def __init__(self) -> None:
        self.prompts = self.tokens = self.answers = 0
        self.held: tuple[float, ...] = ()

    def first_token(self, prompt_tokens: int, ttft_s: float) -> None:
        assert ttft_s >= 0
        self.prompts += prompt_tokens

    def step(self, tokens: int) -> None:
        self.tokens += tokens

    def ended(self) -> None:
        self.answers += 1

    def holds(self, *values: float) -> None:
        self.held = values


def engine(**times: Any) -> tuple[Engine, Tally]:
    tally = Tally()
    return Engine(SimulatedEngine(**{"step_s": 0.001} | times), tally), tally  # type: ignore[arg-type]


def test_a_step_lasts_what_the_spec_says_and_gives_everybody_a_token() -> None:
    made, tally = engine(step_s=0.1, step_s_per_copy=0.01, prefill_s_per_token=0.002, running_max=2)
    for tokens in (1, 2, 3):
        made.submit(5, tokens)
    begun = made.admit()
    assert (len(begun), len(made.waiting)) == (2, 1)
    assert made.step_s(begun) == pytest.approx(0.1 + 2 * 0.01 + 10 * 0.002)
    made.advance()
    assert (tally.tokens, tally.prompts, tally.answers, len(made.running)) == (2, 10, 1, 1)
    assert made.step_s(made.admit()) == pytest.approx(0.1 + 2 * 0.01 + 5 * 0.002)


async def ask(endpoint: Endpoint, body: dict[str, Any], path: str = "/v1/completions") -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> dict[str, Any]:
        return incoming.pop() if incoming else await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Any) -> None:
        sent.append(message)

    await endpoint({"type": "http", "path": path}, receive, send)
    return sent


@pytest.mark.parametrize(("path", "prompt"), [("/v1/completions", {"prompt": "a b c"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a b c"}]})])
def test_streams_end_with_a_reason_usage_and_done_and_the_counters_agree(path: str, prompt: dict[str, Any]) -> None:
    async def all_of_them() -> tuple[list[list[dict[str, Any]]], Tally]:
        made, tally = engine(running_max=3)
        running = asyncio.create_task(made.run())
        sent = await asyncio.gather(*(ask(Endpoint("m", made), prompt | {"max_tokens": n, "stream": True}, path) for n in (1, 4, 9, 5)))
        running.cancel()
        return sent, tally

    answers, tally = asyncio.run(all_of_them())
    for tokens, sent in zip((1, 4, 9, 5), answers, strict=True):
        events = b"".join(message.get("body", b"") for message in sent).decode().removesuffix("\n\n").split("\n\n")
        parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        assert events[-1] == "data: [DONE]"
        assert [event["choices"][0]["finish_reason"] for event in parsed[:-1]] == [None] * (tokens - 1) + ["length"]
        assert parsed[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
    assert (tally.tokens, tally.prompts, tally.answers, tally.held) == (19, 12, 4, (0, 0, 0.0))


def test_what_it_does_not_know_is_refused() -> None:
    async def both() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        endpoint = Endpoint("m", engine()[0])
        return await ask(endpoint, {"nothing": 1}), await ask(endpoint, {}, "/v1/embeddings")

    bad, unknown = asyncio.run(both())
    assert (bad[0]["status"], unknown[0]["status"]) == (400, 404)


def simulated(**changes: Any) -> dict[str, Any]:
    """A spec that asks for it."""
    tree = synthetic.spec()
    tree["cluster"] = {"replicas": 2, "hardware": {"kind": "cpu"}, "simulated_engine": {"step_s": 0.05}} | changes
    tree["page"] = {"words": 500, "words_per_token": synthetic.quoted(0.75)}
    return tree


def test_it_has_to_be_asked_for_by_name_and_alone() -> None:
    assert Spec.model_validate(synthetic.spec()).cluster.simulated_engine is None
    assert Spec.model_validate(simulated()).cluster.simulated_engine is not None
    for changes, said in (
        ({"hardware": {"kind": "gpu"}}, "takes no GPU"),
        ({"engine": {"max_model_len": 5}}, "leave engine out"),
        ({"routing": "proxy"}, "routing at direct"),
    ):
        with pytest.raises(ValidationError, match=said):
            Spec.model_validate(simulated(**changes))
    with pytest.raises(ValidationError, match="words_per_token"):
        Spec.model_validate(simulated() | {"page": {"words": 500}})


def test_a_spec_without_it_keeps_its_hash() -> None:
    plain, asked = Spec.model_validate(synthetic.spec()), Spec.model_validate(simulated())
    assert "simulated_engine" not in json.dumps(plain.model_dump(mode="json", exclude={"cluster": {"simulated_engine"}}))
    assert plain.sha256 != asked.sha256


def test_every_summary_of_it_says_so_first(tmp_path: Path) -> None:
    summary = summarise(synthetic.ideal(tmp_path, simulated()))
    assert summary.headline.sentence.startswith("SIMULATED ENGINE: no model ran")
    assert summary.simulated is not None
    assert "0.05 s" in summary.simulated
