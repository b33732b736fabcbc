"""A model that has a shape and no training: config.json, a tokenizer of its own, no weights (`load_format: dummy` makes them up).

An engine's speed does not depend on the weights' values, so such a directory measures the speed of an 8B where no 8B can be had.
Its words mean nothing: a spec that serves it states `page.words_per_token` as an assumption, and what is priced per page is marked.

    python -m cluster.shape --out DIR [--shape llama-3.1-8b]

The tokenizer is a byte-level BPE over Python's documentation, filled up to the shape's vocabulary with made-up words of four
letters: every token that random weights can draw decodes to text, as a real tokenizer's would, and no stream has silent tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import string
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import train
from kilocopy.problem import ProblemError
from kilocopy.records import write_json

SPACE = "Ġ"  # how a byte-level BPE writes a leading space
MERGED = 32_000  # tokens that merges make, at most; the rest of the vocabulary is filled up


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama that decide what a token costs."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int = 8192

    @property
    def parameters(self) -> int:
        """All weights, embedding and output layer apart: attention (q, k, v, o), the gated MLP, the norms."""
        head = self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * head * self.num_key_value_heads
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_hidden_layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size


SHAPES = {
    # Llama 3 Herd of Models, arXiv:2407.21783, table 3
    "llama-3.1-8b": Shape(4096, 32, 32, 8, 14336, 128256),
    "rehearsal": Shape(256, 3, 4, 2, 512, 8192, 2048),
}


def make(out: Path, name: str) -> dict[str, Any]:
    """Write the shape `name` to `out` in one step and return shape.json; a directory that has it already is kept. Raises ProblemError."""
    if name not in SHAPES:
        raise ProblemError(f"--shape {name}: no such shape; there are {', '.join(SHAPES)}")
    shape = SHAPES[name]
    said = {"shape": name, "parameters": shape.parameters, "weights": "none: load_format dummy", **asdict(shape)}
    try:
        if json.loads((out / "shape.json").read_text(encoding="utf-8")) == said:
            return said
    except (OSError, ValueError):
        pass
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / "shape.json").exists():
        raise ProblemError(f"{out}: holds something that is not such a shape; give --out another directory")
    half = out.with_name(out.name + ".tmp")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    _write(half, shape)
    write_json(half / "shape.json", said)
    shutil.rmtree(out, ignore_errors=True)
    half.rename(out)
    return said


def _write(folder: Path, shape: Shape) -> None:
    """config.json and the tokenizer, as transformers writes them."""
    from tokenizers import Tokenizer  # noqa: PLC0415
    from transformers import LlamaConfig, PreTrainedTokenizerFast  # noqa: PLC0415

    tree = json.loads(train.byte_level_bpe(train.corpus(), min(MERGED, shape.vocab_size)).to_str())
    vocabulary = tree["model"]["vocab"]
    for number, word in zip(range(len(vocabulary), shape.vocab_size), _words(set(vocabulary)), strict=False):
        vocabulary[word] = number
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)),
        bos_token=train.END, eos_token=train.END, pad_token=train.END, clean_up_tokenization_spaces=False, model_max_length=int(1e9),
    )  # fmt: skip
    tokenizer.chat_template = train.CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    config = LlamaConfig(**asdict(shape), tie_word_embeddings=False, bos_token_id=end, eos_token_id=end, pad_token_id=end, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def _words(taken: set[str]) -> Iterator[str]:
    """Made-up words behind a space, none of which is a token already."""
    for letters in itertools.product(string.ascii_lowercase, repeat=4):
        word = SPACE + "".join(letters)
        if word not in taken:
            yield word


def main(argv: list[str] | None = None) -> int:
    """Make a shape from the command line."""
    parser = argparse.ArgumentParser(prog="python -m cluster.shape", description="Write a model's shape and a tokenizer, without weights.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"one of {', '.join(SHAPES)} (default: llama-3.1-8b)")
    asked = parser.parse_args(argv)
    try:
        said = make(asked.out, asked.shape)
    except ProblemError as problem:
        print(problem, file=sys.stderr)
        return problem.code
    print(f"{asked.out}: {said['shape']}, {said['parameters']:,} parameters, no weights: serve it with load_format: dummy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
