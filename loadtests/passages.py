"""English text of an exact number of tokens, from the one corpus that every Python brings along: its language reference.

The corpus is a ring of plain words, tokenised once. Cuts lie at the ends of its tokens. A cut between two words separates
their tokens too, since tokenizers of language models split text there before they merge anything; so the tokens between two
such cuts are known, and only the few around a prompt's beginning and end must be encoded to know all of its tokens exactly.
Whether the model's tokenizer behaves so is tried when it is loaded; where it does not, every text is encoded whole.
"""

from __future__ import annotations

import logging
import math
import re
from bisect import bisect_left, bisect_right
from pathlib import Path
from pydoc_data import topics
from typing import Any

import tokenizers

from kilocopy import schedule
from loadtests.memory import Remembered

GOLDEN = (math.sqrt(5) - 1) / 2
WORDS_PER_TOKEN = 0.75  # assumed where the model's tokenizer cannot be had
WORD = re.compile(r"[A-Za-z][a-z]*[.,;:]?")
BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
TRIES, PLACES = 6, 50  # cuts tried from one place on, places tried
log = logging.getLogger(__name__)


class Passages:
    """Texts of exact lengths. `special`: count the tokens that the tokenizer itself puts around a text, as for completions."""

    def __init__(self, model: str, seed: int, *, special: bool) -> None:
        self._tokenizer, self._special = load_tokenizer(model), special
        self.exact = self._tokenizer is not None
        if not self.exact:
            log.warning("no tokenizer for %s: prompts are cut by words, at %g words a token (assumed)", model, WORDS_PER_TOKEN)
        self._corpus, self._ends, self._cuts = self._ring()
        self._size = len(self._ends) - 1
        self._first = schedule.draw(seed, "prompts")
        self._stride = round((len(self._cuts) - 1) * GOLDEN)
        self._after_x = self._encoded("x", special=False)
        self.after = Remembered(self._after, 2**20)  # a few labels are asked again and again, all else hardly
        self._local = True
        self._local = all(self._is_local(place) for place in range(16))
        self._missed = False

    def place(self, number: int) -> int:
        """A place of the ring between two words: successive numbers lie a golden-ratio stride apart."""
        return self._cuts[(self._first + number * self._stride) % (len(self._cuts) - 1)]

    def text(self, length: int, number: int, head: str = "", tail: str = "", known: int | None = None) -> str:
        """Head, a passage from place `number` on, and tail: `length` tokens together.

        known: the text comes after another one of so many tokens, which count towards `length` but are not in the result.
        """
        wanted = length if self.exact else max(1, round(length * WORDS_PER_TOKEN))
        before = 0 if known is None else known if self.exact else round(known * WORDS_PER_TOKEN)
        best = head + tail
        for attempt in range(PLACES):
            made, missing = self._try(wanted - before, self.place(number) if not attempt else self.place(number + attempt), head, tail, known is not None)
            if missing == 0:
                return made
            best = made
            if missing < 0 and not made.removeprefix(head).removesuffix(tail).strip():
                break  # the head alone is more
        if head.strip() and not tail and self._head_is_too_long(wanted - before, head, known is not None):
            return self.text(length, number, "\n" if head.startswith("\n") and wanted - before > 1 else "", "", known)
        self._say_missed(length)
        return best

    def _head_is_too_long(self, wanted: int, head: str, follows: bool) -> bool:
        return wanted > 0 and (self.after(head) if follows else self._encoded(head)) > wanted

    def _say_missed(self, length: int) -> None:
        if not self._missed:
            log.warning("a prompt of %d tokens cannot be made exactly with this tokenizer: its length is off by a few", length)
        self._missed = True

    def _try(self, wanted: int, begin: int, head: str, tail: str, follows: bool) -> tuple[str, int]:
        """The text from one place on whose length comes nearest, and the tokens that it lacks."""
        first = self._next_cut(begin + 1)
        opening = head + self._between(begin, first)
        if not head and not follows:
            opening = opening[1:]  # no blank in front of everything
        opened = self.after(opening) if follows and not head else self._counted(opening, follows)
        end = first + wanted - opened - (self.after(tail) if tail else 0)
        if end < first:
            return self._try_short(wanted, begin, first, head, tail, follows)
        made, missing = "", 0
        for _ in range(TRIES):
            last = self._last_cut(end)
            closing = self._between(last, end) + tail
            made = opening + self._between(first, last) + closing
            if self._local:
                missing = wanted - opened - (last - first) - (self.after(closing) if closing else 0)
            else:
                missing = wanted - self._counted(made, follows)
            if missing == 0 or end + missing < first:
                break
            end += missing
        return made, missing

    def _try_short(self, wanted: int, begin: int, first: int, head: str, tail: str, follows: bool) -> tuple[str, int]:
        """As `_try`, for a text that ends within its first word."""
        made, missing = head + tail, wanted - self._counted(head + tail, follows)
        for end in range(first, begin - 1, -1):
            passage = self._between(begin, end)
            made = head + (passage if head or follows else passage[1:]) + tail
            missing = wanted - self._counted(made, follows)
            if missing >= 0:
                break
        return made, missing

    def _counted(self, text: str, follows: bool) -> int:
        return self._after(text) if follows else self._encoded(text)

    def _encoded(self, text: str, special: bool | None = None) -> int:
        """Tokens of a text on its own; words where there is no tokenizer."""
        if self._tokenizer is None:
            return len(text.split())
        special = self._special if special is None else special
        return len(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def _after(self, text: str) -> int:
        """Tokens that a text adds to one which ends in a word."""
        if self._tokenizer is None:
            return len(text.split())
        return self._encoded("x" + text, special=False) - self._after_x if text else 0

    def count(self, text: str) -> int:
        """Tokens of a text as the server counts a prompt; words where there is no tokenizer."""
        return self._encoded(text)

    def separable(self, text: str, rest: str) -> bool:
        """Whether a text keeps its tokens when the rest follows it."""
        if self._tokenizer is None:
            return True
        alone = self._tokenizer.encode(text, add_special_tokens=self._special).ids
        both = self._tokenizer.encode(text + rest, add_special_tokens=self._special).ids
        return bool(both[: len(alone)] == alone) and len(both) - len(alone) == self._after(rest)

    def _ring(self) -> tuple[str, list[int], list[int]]:
        """The corpus, the end of each of its tokens (a leading 0 added), and the tokens before which two words part.

        It begins with the blank before a word and ends with a word, so that its end and its beginning fit together.
        """
        words = " ".join(topics.topics[name] for name in sorted(topics.topics)).split()
        corpus = " ".join(word for word in words if WORD.fullmatch(word))
        parts = [match.start() for match in BETWEEN_WORDS.finditer(corpus)]
        corpus = corpus[parts[0] : parts[-1]]
        if self._tokenizer is None:
            ends = [match.end() for match in re.finditer(r"\S+", corpus)]
        else:
            ends = [end - 1 for _, end in self._tokenizer.encode("x" + corpus, add_special_tokens=False).offsets]
            ends = ends[sum(end <= 0 for end in ends) :]  # without the x; a mark put before it has its offsets too
        ends = [0, *ends]
        token_at = {end: index for index, end in enumerate(ends)}
        between = (0, *(match.start() for match in BETWEEN_WORDS.finditer(corpus)), len(corpus))
        cuts = [token_at[at] for at in between if at in token_at]
        ends[-1] = len(corpus)
        return corpus, ends, cuts

    def _is_local(self, number: int) -> bool:
        begin = self.place(number)
        end = self._last_cut(begin + 300)
        return self._after(self._between(begin, end)) == end - begin

    def _between(self, begin: int, end: int) -> str:
        """The ring's text from token `begin` to before token `end`; both may lie some rounds on."""
        round_a, a = divmod(begin, self._size)
        round_b, b = divmod(end, self._size)
        if round_a == round_b:
            return self._corpus[self._ends[a] : self._ends[b]]
        return self._corpus[self._ends[a] :] + self._corpus * (round_b - round_a - 1) + self._corpus[: self._ends[b]]

    def _next_cut(self, token: int) -> int:
        rounds, place = divmod(token, self._size)
        return rounds * self._size + self._cuts[bisect_left(self._cuts, place)]

    def _last_cut(self, token: int) -> int:
        rounds, place = divmod(token, self._size)
        return rounds * self._size + self._cuts[bisect_right(self._cuts, place) - 1]


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
