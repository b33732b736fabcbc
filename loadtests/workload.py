"""What every copy asks for: the JSON of each request, from the spec, the request's numbers and the answers so far."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.spec import Spec, TraceStage
from loadtests.datasets import Message
from loadtests.lengths import Lengths
from loadtests.memory import Remembered
from loadtests.prompts import Prompts

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
log = logging.getLogger(__name__)


class Workload:
    """Makes the body of each request from the spec.

    `turns`: requests of one conversation, 1 without. `warn` is told, once, of what the user should know of while the run goes on.
    Raises ProblemError for a data set that cannot be used.
    """

    def __init__(self, spec: Spec, warn: Callable[[str], None] = log.warning) -> None:
        asked = spec.workload
        self._spec, self._seed = spec, asked.seed
        self.path = PATHS[asked.endpoint]
        self.turns = asked.conversation.turns if asked.conversation else 1
        self.samples = asked.samples
        for index, stage in enumerate(spec.stages):
            if isinstance(stage, TraceStage) and (self.turns > 1 or asked.examples):
                raise ProblemError(f"stages[{index}]: a trace brings its own prompts: take workload.conversation and workload.examples out")
        self._prompts = Prompts(spec, warn)
        self._lengths = Lengths(asked.output_tokens, asked.seed, "output_tokens")
        self._turn = Remembered(self._prompts.turn)  # earlier turns are said again with every later one
        fixed: dict[str, Any] = {
            **asked.extra_body,
            "model": spec.model.id,
            "temperature": asked.sampling.temperature,
            "top_p": asked.sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if asked.ignore_eos:
            fixed["ignore_eos"] = True
        if asked.samples > 1:
            fixed["n"] = asked.samples
        self._fixed = json.dumps(fixed).removesuffix("}")  # every request begins with it; the spec lets no field be in both parts

    def body(
        self, stage: int, level: int, copy: int, sequence: int, *, shape: schedule.Shape | None = None, history: Sequence[str] = ()
    ) -> bytes:
        """The JSON of one request: the same for the same spec, numbers and history, in whichever process.

        shape: the lengths and shared blocks that a trace recorded; history: the answers to the earlier turns of this conversation.
        """
        index = self._number(stage, level, copy, sequence)
        length = None
        if shape is not None:
            messages, length = [_user(self._prompts.shaped(index, shape))], shape.output_tokens
        elif self.turns > 1:
            numbers = [
                schedule.prompt_index(self._spec, stage, level, copy, earlier)
                for earlier in range(sequence - sequence % self.turns, sequence + 1)
            ]
            messages = self._conversation(numbers, history)
        else:
            row = self._prompts.row(index)
            messages, length = list(row.messages), row.output_tokens
        asked = {
            **({"messages": messages} if self._spec.workload.endpoint == "chat" else {"prompt": _as_one_text(messages)}),
            "max_tokens": self._lengths(index) if length is None else length,
        }
        if self._spec.workload.sampling.seeded:
            asked["seed"] = schedule.request_seed(self._seed, stage, level, copy, sequence)
        return f"{self._fixed}, {json.dumps(asked)[1:]}".encode()

    def _number(self, stage: int, level: int, copy: int, sequence: int) -> int:
        """The number of the prompt that a request asks: its own, or that of the copies that ask it together."""
        return schedule.prompt_index(self._spec, stage, level, copy // self._spec.workload.copies_per_prompt, sequence)

    def answer(self, stage: int, level: int, copy: int, sequence: int) -> str | None:
        """The data set's own answer to what a request asked, where it has one."""
        return None if self.turns > 1 else self._prompts.answer(self._number(stage, level, copy, sequence))

    def _conversation(self, numbers: Sequence[int], history: Sequence[str]) -> list[Message]:
        """The turns so far, each with its answer, and the new one; `numbers` are those of its requests."""
        if len(history) < len(numbers) - 1:
            raise ValueError(f"turn {len(numbers)} of a conversation needs {len(numbers) - 1} answers, got {len(history)}")
        messages = self._prompts.opening(numbers[0])
        for turn, index in enumerate(numbers):
            messages.append(_user(self._turn(index, numbers[0], turn)))
            if turn < len(numbers) - 1:
                messages.append({"role": "assistant", "content": history[turn]})
        return messages


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _as_one_text(messages: Sequence[Message]) -> str:
    """Messages for an endpoint without roles: an answer stands right behind what it answered, as the model wrote it."""
    text = ""
    for message in messages:
        parted = text and message["role"] != "assistant"
        text += ("\n\n" if parted else "") + message["content"]
    return text
