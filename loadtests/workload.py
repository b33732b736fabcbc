"""What every copy asks for: prompts that never come twice, and the request around them.

Synthetic prompts are cut from the one English text that every Python brings along, its language reference (pydoc_data.topics).
A prompt is its number in the run and then a passage, whose place the number decides too (successive ones a golden-ratio stride
apart). The number in front makes every beginning differ, so that no prefix cache answers in place of the model.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import tokenizers

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.spec import FilePrompts, Spec, SyntheticPrompts

GOLDEN = (math.sqrt(5) - 1) / 2
WORDS_PER_TOKEN = 0.75  # assumed where the model's tokenizer cannot be had
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
log = logging.getLogger(__name__)


class Workload:
    """Makes the body of each request from the spec."""

    def __init__(self, spec: Spec) -> None:
        self._spec, self._seed = spec, spec.workload.seed
        self.path = PATHS[spec.workload.endpoint]
        self.turns = 1
        self._prompt = prompts(spec)
        sampling = spec.workload.sampling
        self._fixed: dict[str, Any] = {
            "model": spec.model.id,
            "max_tokens": spec.workload.output_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if spec.workload.ignore_eos:
            self._fixed["ignore_eos"] = True

    def body(
        self, stage: int, level: int, copy: int, sequence: int, *, shape: schedule.Shape | None = None, history: Sequence[str] = ()
    ) -> bytes:
        """The JSON of one request: the same for the same spec and numbers, in whichever process."""
        prompt = self._prompt(schedule.prompt_index(self._spec, stage, level, copy, sequence))
        asked: dict[str, Any] = {"prompt": prompt}
        if self._spec.workload.endpoint == "chat":
            asked = {"messages": [{"role": "user", "content": prompt}]}
        seed = schedule.request_seed(self._seed, stage, level, copy, sequence)
        return json.dumps({**self._fixed, **asked, "seed": seed}).encode()


def prompts(spec: Spec) -> Callable[[int], str]:
    """The function from a request's number to its prompt. Raises ProblemError for a prompt file that cannot be used."""
    source = spec.workload.prompts
    if isinstance(source, FilePrompts):
        return _from_file(source, spec.workload.seed)
    return _Synthetic(source, spec.model.source, spec.workload.seed)


def _from_file(source: FilePrompts, seed: int) -> Callable[[int], str]:
    try:
        lines = [line for line in Path(source.path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(f"workload.prompts.path: {source.path} cannot be read: {error}") from None
    if not lines:
        raise ProblemError(f"workload.prompts.path: {source.path} is empty; write one prompt per line")
    random.Random(schedule.draw(seed, "prompts")).shuffle(lines)  # noqa: S311  # a seeded order, not a secret
    return lambda index: lines[index % len(lines)]


class _Synthetic:
    """Texts of `input_tokens` tokens by number: the number itself, and a cut from the corpus."""

    def __init__(self, source: SyntheticPrompts, model: str, seed: int) -> None:
        self._corpus = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        self._length, self._tokenizer = source.input_tokens, load_tokenizer(model)
        if self._tokenizer is None:
            log.warning("no tokenizer for %s: prompts are cut by words, at %g words a token (assumed)", model, WORDS_PER_TOKEN)
            self._starts = np.array([word.start() for word in re.finditer(r"\S+", self._corpus)])
            self._length = max(1, round(source.input_tokens * WORDS_PER_TOKEN))
        else:
            offsets = self._tokenizer.encode(self._corpus, add_special_tokens=False).offsets
            self._starts = np.unique(np.array([begin for begin, _ in offsets]))
        self._first = schedule.draw(seed, "prompts")
        self._stride = round(len(self._starts) * GOLDEN)

    def __call__(self, index: int) -> str:
        number = f"{index}. "
        taken = 1 if self._tokenizer is None else len(self._tokenizer.encode(number, add_special_tokens=False).ids)
        return number + self._cut((self._first + index * self._stride) % len(self._starts), max(1, self._length - taken))

    def _cut(self, place: int, length: int) -> str:
        """`length` tokens from a place on; past the corpus' end it goes on at its beginning."""
        parts = []
        while length > 0:
            until = place + length
            end = int(self._starts[until]) if until < len(self._starts) else len(self._corpus)
            parts.append(self._corpus[int(self._starts[place]) : end])
            length -= min(length, len(self._starts) - place)
            place = 0
        return "".join(parts)


def load_tokenizer(model: str) -> Any:
    """The model's own tokenizer, from a directory's tokenizer.json or by its Hugging Face id; None where it cannot be had."""
    try:
        if Path(model).is_dir():
            return tokenizers.Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        if "://" in model or model.count("/") > 1 or model.startswith((".", "/", "~")):
            return None  # a bucket, or a directory of another host's
        return tokenizers.Tokenizer.from_pretrained(model)
    except Exception as error:  # the tokenizers library raises bare Exception for every reason
        log.warning("tokenizer of %s: %s", model, error)
        return None
