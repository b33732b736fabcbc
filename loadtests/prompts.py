"""What a request says, by its number: synthetic text of an exact length, a row of the user's data set, or the shape a trace gives.

A synthetic prompt is its number in the run and then a passage (loadtests/passages.py). The number in front makes every
beginning differ, so that no prefix cache answers in place of the model, except behind a prefix that is shared on purpose.
"""

from __future__ import annotations

from collections.abc import Callable

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.spec import Spec, SyntheticPrompts, TraceStage
from loadtests import datasets
from loadtests.datasets import Message, Row
from loadtests.lengths import Lengths
from loadtests.memory import Remembered
from loadtests.passages import Passages

BLOCK_TOKENS = 512  # what one id of a trace's blocks stands for (Mooncake's traces)
QUESTION, ANSWER, BETWEEN = "Question: ", "\nAnswer: ", "\n\n"  # of few-shot prompts
LEAST_TOKENS = 8  # room that a few-shot question or answer needs at least, the number in front included


class Prompts:
    """Messages by request number. Raises ProblemError for what cannot be used, before the run."""

    def __init__(self, spec: Spec, warn: Callable[[str], None]) -> None:
        source, self._seed = spec.workload.prompts, spec.workload.seed
        self._chat, self._examples = spec.workload.endpoint == "chat", spec.workload.examples
        self._alike = spec.workload.examples_shared
        synthetic = isinstance(source, SyntheticPrompts)
        self._passages: Passages | None = None
        if synthetic or any(isinstance(stage, TraceStage) for stage in spec.stages):
            self._passages = Passages(spec.model.source, self._seed, special=not self._chat)
        self._shared = 0.0
        if isinstance(source, SyntheticPrompts):
            self._lengths = Lengths(source.input_tokens, self._seed, "input_tokens")
            self._shared, self._prefixes = source.shared_prefix_fraction, source.prefixes
            self._around = self._labels() if self._examples else 0
            self._check_room()
        else:
            self._rows = datasets.load(source, self._seed, warn, answers=self._examples > 0)
        self._prefix = Remembered(self._make_prefix)
        self._block = Remembered(self._make_block)

    def _check_room(self) -> None:
        needed = LEAST_TOKENS * (2 * self._examples + 1) + self._around
        room = int(self._lengths.low * (1 - self._shared))
        if self._examples and room < needed:
            raise ProblemError(
                f"workload.prompts.input_tokens: {self._lengths.low} tokens, {room} of them not shared, are too few for {self._examples} examples "
                f"and a question: give {needed} unshared or more, or fewer examples"
            )

    def _labels(self) -> int:
        """Tokens around the parts of a few-shot prompt: the words that say what is question and answer; chat has roles instead."""
        if self._chat:
            return 0
        around = self._examples * (QUESTION + "x" + ANSWER + "x" + BETWEEN) + QUESTION + "x" + ANSWER.rstrip()
        return self._made().count("1." + around)

    def row(self, index: int) -> Row:
        """What request number `index` asks: messages, and the length of its answer where the data set has it."""
        if self._passages is None or not hasattr(self, "_lengths"):
            return self._from_rows(index)
        length = self._lengths(index)
        if self._examples:
            return Row(tuple(self._few_shot(index, length)), ())
        text = self._one(index, length)
        return Row(({"role": "user", "content": text},), (text,))

    def answer(self, index: int) -> str | None:
        """The data set's answer to request number `index`."""
        return None if hasattr(self, "_lengths") else self._rows.peek(index).answer

    def turn(self, index: int, first: int, turn: int) -> str:
        """The user's new text in turn `turn` of a conversation; `first` is the number of its first request, `index` of this one."""
        if hasattr(self, "_lengths"):
            if turn == 0:
                return self._one(index, self._lengths(index))
            return self._unshared(index, self._lengths(index))
        questions = self._rows(first).questions
        return questions[turn] if turn < len(questions) else self._rows(index).questions[0]

    def opening(self, first: int) -> list[Message]:
        """What stands before a conversation's first question: the data set's own system message."""
        if hasattr(self, "_lengths"):
            return []
        return [message for message in self._rows(first).messages[:1] if message["role"] == "system"]

    def shaped(self, index: int, shape: schedule.Shape) -> str:
        """A prompt of a trace's length. Equal block ids are equal text of 512 tokens each, the rest behind the whole blocks is its own."""
        passages = self._made()
        whole = min(len(shape.blocks), shape.input_tokens // BLOCK_TOKENS)
        if not whole:
            return self._unshared(index, shape.input_tokens)
        front = "".join(self._block(block, place == 0) for place, block in enumerate(shape.blocks[:whole]))
        if shape.input_tokens == whole * BLOCK_TOKENS:
            return front
        return front + passages.text(shape.input_tokens, index, f"\n{index}.", known=whole * BLOCK_TOKENS)

    def _made(self) -> Passages:
        if self._passages is None:
            raise ValueError("a shape was asked of a spec without a trace")
        return self._passages

    def _make_block(self, block: int, first: bool) -> str:
        head = f"{block}."
        number = schedule.draw(self._seed, "block", block)
        if first:
            return self._made().text(BLOCK_TOKENS, number, head)
        return self._made().text(BLOCK_TOKENS, number, "\n" + head, known=0)

    def _unshared(self, index: int, length: int) -> str:
        return self._made().text(length, index, f"{index}.")

    def _one(self, index: int, length: int) -> str:
        prefix, tokens = self._front(index, length)
        if not tokens:
            return self._unshared(index, length)
        if tokens == length:
            return prefix
        return prefix + self._made().text(length, index, f"\n{index}.", known=tokens)

    def _front(self, index: int, length: int) -> tuple[str, int]:
        """The shared prefix of a request, and its tokens: the same text for the same number of tokens and the same of the prefixes."""
        tokens = round(self._shared * length)
        if not tokens:
            return "", 0
        return self._prefix(tokens, schedule.draw(self._seed, "prefix", index) % self._prefixes), tokens

    def _make_prefix(self, tokens: int, which: int) -> str:
        """A prefix that keeps its tokens whatever follows it."""
        passages = self._made()
        number = schedule.draw(self._seed, "prefix text", which)
        text = ""
        for shift in range(20):
            text = passages.text(tokens, number + shift)
            if passages.separable(text, "\n1."):
                break
        return text

    def _from_rows(self, index: int) -> Row:
        row = self._rows(index)
        if not self._examples:
            return row
        shown = [(one.questions[0], one.answer or "") for one in self._rows.examples(index, self._examples, alike=self._alike)]
        messages = _as_chat(shown, row.questions[0]) if self._chat else _as_text(shown, row.questions[0])
        return Row(tuple(messages), row.questions, row.answer, row.output_tokens)

    def _few_shot(self, index: int, length: int) -> list[Message]:
        """Synthetic examples and a question of about equal lengths, `length` tokens together."""
        passages = self._made()
        prefix, shared = self._front(index, length)
        part = (length - shared - self._around) // (2 * self._examples + 1)
        numbers = (schedule.draw(self._seed, "example", index, place) for place in range(2 * self._examples))
        if not self._chat:
            texts = [passages.text(part, number, known=0).strip() for number in numbers]
            head = (f"\n{index}. " if shared else f"{index}. ") + _shown(list(zip(texts[::2], texts[1::2], strict=True)))
            rest = passages.text(length, index, head + QUESTION.rstrip(), ANSWER.rstrip(), known=shared or None)
            return [{"role": "user", "content": prefix + rest}]
        # Each message is counted on its own, as the template parts them; the first begins with the shared prefix and the number.
        contents = [prefix + passages.text(shared + part, next(numbers), f"\n{index}." if shared else f"{index}.", known=shared or None)]
        contents += [passages.text(part, number) for number in numbers]
        left = length - shared - part * 2 * self._examples
        return _as_chat(list(zip(contents[::2], contents[1::2], strict=True)), passages.text(left, index))


def _as_chat(examples: list[tuple[str, str]], question: str) -> list[Message]:
    messages = [{"role": role, "content": text} for pair in examples for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*messages, {"role": "user", "content": question}]


def _as_text(examples: list[tuple[str, str]], question: str) -> list[Message]:
    return [{"role": "user", "content": f"{_shown(examples)}{QUESTION}{question}{ANSWER.rstrip()}"}]


def _shown(examples: list[tuple[str, str]]) -> str:
    return "".join(f"{QUESTION}{asked}{ANSWER}{answer}{BETWEEN}" for asked, answer in examples)
