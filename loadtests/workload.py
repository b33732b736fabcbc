"""What every copy asks for: prompts that never come twice, and the request around them.

Synthetic prompts are cut from the one English text that every Python brings along, its language reference (pydoc_data.topics).
A prompt starts at a place that its number in the run decides; places of successive numbers lie a golden-ratio stride apart, so
that no two requests share a beginning and no prefix cache answers in place of the model.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import tokenizers

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.spec import FilePrompts, Spec, SyntheticPrompts

WORDS_PER_TOKEN = 0.75  # assumed where the model's tokenizer cannot be had
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
log = logging.getLogger(__name__)


class Workload:
    """Makes the body of each request from the spec."""

    def __init__(self, spec: Spec) -> None:
        self._spec, self._seed = spec, spec.workload.seed
        self.path = PATHS[spec.workload.endpoint]
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

    def body(self, stage: int, copy: int, sequence: int) -> bytes:
        """The JSON of one request: the same for the same spec and numbers, in whichever process."""
        prompt = self._prompt(schedule.prompt_index(self._spec, stage, copy, sequence))
        asked: dict[str, Any] = {"prompt": prompt}
        if self._spec.workload.endpoint == "chat":
            asked = {"messages": [{"role": "user", "content": prompt}]}
        seed = schedule.request_seed(self._seed, stage, copy, sequence)
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
    """Cuts of `input_tokens` tokens from the corpus, by number."""

    def __init__(self, source: SyntheticPrompts, model: str, seed: int) -> None:
        self._corpus = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        self._starts, self._length = token_starts(self._corpus, model), source.input_tokens
        if self._starts is None:
            log.warning("no tokenizer for %s: prompts are cut by words, at %g words a token (assumed)", model, WORDS_PER_TOKEN)
            self._starts = np.array([at for at, _ in _words(self._corpus)])
            self._length = max(1, round(source.input_tokens * WORDS_PER_TOKEN))
        self._places = len(self._starts)
        self._first = schedule.draw(seed, "prompts") % self._places
        self._stride = _coprime_near(self._places * (math.sqrt(5) - 1) / 2, self._places)

    def __call__(self, index: int) -> str:
        lap, within = divmod(index, self._places)
        place = (self._first + within * self._stride) % self._places
        # Every place was used once: from here on a number in front keeps prompts apart.
        return (f"{lap} " if lap else "") + self._cut(place, self._length)

    def _cut(self, place: int, length: int) -> str:
        """`length` tokens from a place on; past the corpus' end it goes on at its beginning."""
        assert self._starts is not None  # noqa: S101
        parts = []
        while length > 0:
            until = place + length
            end = int(self._starts[until]) if until < self._places else len(self._corpus)
            parts.append(self._corpus[int(self._starts[place]) : end])
            length -= min(length, self._places - place)
            place = 0
        return "".join(parts)


def token_starts(corpus: str, model: str) -> np.ndarray[Any, Any] | None:
    """Where each token of the corpus begins, by the model's own tokenizer (a directory's tokenizer.json, or a Hugging Face id);
    None where it cannot be had."""
    file = Path(model) / "tokenizer.json"
    try:
        if Path(model).is_dir():
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        elif "://" in model or model.count("/") > 1 or model.startswith((".", "/", "~")):
            return None  # a bucket, or a directory of another host's
        else:
            tokenizer = tokenizers.Tokenizer.from_pretrained(model)
        offsets = tokenizer.encode(corpus, add_special_tokens=False).offsets
    except Exception as error:  # the tokenizers library raises bare Exception for every reason
        log.warning("tokenizer of %s: %s", model, error)
        return None
    starts = np.unique(np.array([begin for begin, _ in offsets]))
    return starts if len(starts) else None


def _words(text: str) -> list[tuple[int, str]]:
    at, found = 0, []
    for word in text.split():
        at = text.index(word, at)
        found.append((at, word))
        at += len(word)
    return found


def _coprime_near(value: float, modulus: int) -> int:
    stride = max(1, round(value))
    while math.gcd(stride, modulus) != 1:
        stride += 1
    return stride
