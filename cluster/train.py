"""The demo model: trained from scratch here, in minutes, so that the cost of its training is a measurement too.

A Llama of 3 M parameters and its own byte-level BPE tokenizer learn the documentation that every Python brings along:
the topics of `help()` and the docstrings of the standard library. Nothing is downloaded. It knows little, but it is
trained, it loads wherever a Llama loads, and `training.json` beside the weights says what it cost, on what machine.

    python -m cluster.train --out DIR [--seconds 100] [--seed 0] [--force]

The tokenizer follows from the Python version, and the data's order from the seed. The weights do not: steps are
bounded by time, and a faster machine takes more of them.
"""

from __future__ import annotations

import argparse
import ast
import datetime as dt
import json
import math
import os
import platform
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import power
from kilocopy.problem import ProblemError
from kilocopy.records import write_json

VOCABULARY = 4096
CONTEXT_TOKENS = 1024  # what the model may be served with; rotary positions stretch past the windows it was trained on
WINDOW_TOKENS = 256
BATCH = 4
THREADS = 2
LEARNING_RATE_MAX = 2e-3
WARMUP_FRACTION = 0.05
PROGRESS_S = 5.0
END = "<|endoftext|>"

# Every document is "name, blank line, text": a chat is the same, the user's words take the place of the name.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)
FLOPS_FORMULA = (
    "6 x N x D (Kaplan et al. 2020, section 2.1): N = all parameters, the tied embedding counted once "
    "(they leave it out of N; here it is the output layer too and works on every token); D = tokens processed"
)
CORPUS = "Python's own documentation: the topics of help() and the docstrings of the standard library"
DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "__pycache__"}


def train(out: Path, seconds: float, seed: int, *, force: bool = False) -> dict[str, Any]:
    """Train for `seconds` and write the model to `out` in one step; a complete model there is kept unless `force`.

    Returns training.json. Raises ProblemError on bad input, and when `out` holds something that is not such a model.
    """
    out = out.absolute()
    _check(out, seconds, seed)
    if (cached := _cached(out)) and not force:
        _say(f"train  {out} is trained already (cached, seed {cached.get('seed')}); --force trains it again")
        return cached
    half = _half(out)
    try:
        report = _train(half, seconds, seed)
        _publish(half, out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return report


def _train(half: Path, seconds: float, seed: int) -> dict[str, Any]:
    """The whole training, from the texts to the files; its clock starts before torch is imported."""
    started_at, start_s, start_cpu_s = dt.datetime.now(dt.UTC), time.perf_counter(), time.process_time()
    torch = _quiet_torch(seed)
    meter = EnergySince(_meters(torch))
    _say("train  reading Python's documentation and training the tokenizer")
    texts = corpus()
    tokenizer = train_tokenizer(texts)
    tokens = [token for ids in tokenizer(texts)["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    model = _model(tokenizer.eos_token_id).to(_device(torch))
    course = _fit(torch, model, torch.tensor(tokens), seconds, meter)
    _save(model, tokenizer, half)
    parameters = model.num_parameters()
    report = {
        "schema_version": 1,
        "kind": "measured",
        **asdict(course),
        "parameters": parameters,
        "parameters_non_embedding": parameters - model.get_input_embeddings().weight.numel(),
        "flops": 6 * parameters * course.tokens,
        "flops_formula": FLOPS_FORMULA,
        "seed": seed,
        "device": _device_name(torch),
        "host": {"cpu_model": _cpu_model(), "cores": os.cpu_count()},
        "versions": _versions(),
        "started_at": started_at.isoformat(timespec="seconds"),
        "corpus": {"documents": len(texts), "bytes": sum(len(t.encode()) for t in texts), "description": CORPUS},
        **meter.report(),
        "cpu_s": time.process_time() - start_cpu_s,
        "wall_s": time.perf_counter() - start_s,
    }
    write_json(half / "training.json", report)
    return report


def _check(out: Path, seconds: float, seed: int) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ProblemError(f"--seconds: must be a number over 0, got {seconds:g}")
    if not 0 <= seed < 2**63:
        raise ProblemError(f"--seed: must be 0 or more and fit in 63 bits, got {seed}")
    if out.exists() and not _cached(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ProblemError(f"{out}: holds something that is not a model trained here; give --out another directory")


def _cached(out: Path) -> dict[str, Any] | None:
    """training.json of a complete model, else None."""
    try:
        report = json.loads((out / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and (out / "config.json").is_file() else None


# The corpus


def corpus() -> list[str]:
    """Documents "name, blank line, text", each text once, in an order that only depends on the Python version."""
    from pydoc_data.topics import topics  # noqa: PLC0415  half a megabyte of text

    named = [*sorted(topics.items()), *_docstrings(Path(sysconfig.get_path("stdlib")))]
    once = {text.strip(): name for name, text in reversed(named)}
    return [f"{name}\n\n{text}" for text, name in reversed(once.items())]


def _docstrings(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Dotted name and docstring of all that has one in the library. Parsed, never imported: imports have effects."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            try:
                with warnings.catch_warnings(action="ignore"):
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            yield from _named_docstrings(tree, ".".join(part for part in parts if part != "__init__"))


def _named_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | DEFINITIONS) and (text := ast.get_docstring(node)):
        yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            yield from _named_docstrings(child, f"{name}.{child.name}")


# The tokenizer and the model


def byte_level_bpe(texts: list[str], vocabulary: int) -> Any:
    """A tokenizers.Tokenizer, byte-level BPE: every UTF-8 text survives the way there and back, whatever it was trained on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    return bpe


def train_tokenizer(texts: list[str]) -> Any:
    """The demo model's tokenizer."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, VOCABULARY),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=int(1e9),  # only the model's own limit counts; the tokenizer warns about nothing
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model(end_id: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,  # of 64: the size of head that every attention kernel has
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=end_id,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )
    )


# The training


@dataclass
class Course:
    """What the training came to; losses are means over a few steps, since one batch says little."""

    steps: int
    tokens: int
    loss_first: float
    loss_last: float


def _fit(torch: Any, model: Any, tokens: Any, seconds: float, meter: EnergySince) -> Course:
    """AdamW on random windows of the token stream until the time is up; the learning rate follows the clock."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE_MAX, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    offsets = torch.arange(WINDOW_TOKENS)
    losses: list[float] = []
    start_s = said_s = time.perf_counter()
    model.train()
    while (elapsed_s := time.perf_counter() - start_s) < seconds or len(losses) < 2:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE_MAX * _schedule(elapsed_s / seconds)
        starts = torch.randint(len(tokens) - WINDOW_TOKENS + 1, (BATCH, 1))
        batch = tokens[starts + offsets].to(model.device)
        loss = model(input_ids=batch, labels=batch).loss  # the model shifts the labels itself
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if time.perf_counter() - said_s >= PROGRESS_S:
            said_s = time.perf_counter()
            _progress(said_s - start_s, seconds, losses)
            meter.update()  # often enough for a RAPL register not to wrap unseen
    _progress(time.perf_counter() - start_s, seconds, losses)
    done = len(losses) * BATCH * WINDOW_TOKENS
    few = max(1, min(20, len(losses) // 10))
    return Course(len(losses), done, sum(losses[:few]) / few, sum(losses[-few:]) / few)


def _schedule(fraction: float) -> float:
    """Share of the full learning rate: a short linear warm-up, then half a cosine down to 5 %."""
    if fraction < WARMUP_FRACTION:
        return max(0.01, fraction / WARMUP_FRACTION)
    rest = min(1.0, (fraction - WARMUP_FRACTION) / (1 - WARMUP_FRACTION))
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * rest))


def _progress(elapsed_s: float, seconds: float, losses: list[float]) -> None:
    recent = losses[-20:]
    rate = len(losses) * BATCH * WINDOW_TOKENS / elapsed_s
    loss = sum(recent) / len(recent)
    _say(f"train  {elapsed_s:.0f} s of {seconds:.0f} s  step {len(losses)}  loss {loss:.2f}  tokens/s {rate:.0f}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _half(out: Path) -> Path:
    """DIR.tmp, empty: the model becomes whole there. The half that a killed training left is removed."""
    half = out.with_name(out.name + ".tmp")
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir(parents=True)
    except OSError as error:
        raise ProblemError(f"{half}: cannot be written: {error.strerror}") from None
    return half


def _save(model: Any, tokenizer: Any, half: Path) -> None:
    model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    for path in half.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner only; a container's user is often another


def _publish(half: Path, out: Path) -> None:
    """Rename the finished directory into place; one that stood there steps aside first and is removed last."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    half.rename(out)
    shutil.rmtree(old, ignore_errors=True)


# What it ran on and what it drew


class EnergySince:
    """Joules since it was made, by the meters of what the training runs on; None of them: not measured."""

    def __init__(self, meters: list[power.Meter]) -> None:
        self._meters = meters
        self._first_j = self._last_j = self._read_j()

    def _read_j(self) -> list[float] | None:
        try:
            return [meter.read_j() for meter in self._meters] or None
        except (OSError, ValueError):
            return None

    def update(self) -> None:
        """Read the meters; one that fails makes the whole not measured, since a part of a sum is no sum."""
        if self._last_j is not None:
            self._last_j = self._read_j()

    def report(self) -> dict[str, Any]:
        """energy_j, energy_boundary and energy_source of training.json, up to now."""
        self.update()
        if self._first_j is None or self._last_j is None:
            return {"energy_j": None, "energy_boundary": None, "energy_source": "not_measured"}
        boundary = "+".join(sorted({meter.boundary for meter in self._meters}))
        return {
            "energy_j": sum(self._last_j) - sum(self._first_j),
            "energy_boundary": boundary,
            "energy_source": "measured",
        }


def _meters(torch: Any) -> list[power.Meter]:
    """The host's meters, and of its GPUs the one that trains: the others' idling is not this training's."""
    used = f"GPU-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else None
    return [meter for meter in power.meters() if meter.boundary == "host" or meter.device == used]


def _quiet_torch(seed: int) -> Any:
    """torch, seeded, on two threads, and transformers without its bars and advice."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    return torch


def _device(torch: Any) -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _device_name(torch: Any) -> str:
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    import tokenizers  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    modules = {"torch": torch, "transformers": transformers, "tokenizers": tokenizers}
    return {"python": platform.python_version(), **{name: str(module.__version__) for name, module in modules.items()}}


def main(argv: list[str] | None = None) -> int:
    """Train from the command line; Ctrl-C leaves no half model."""
    parser = argparse.ArgumentParser(prog="python -m cluster.train", description="Train the demo model and its tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--seconds", type=float, default=100, help="time for the gradient steps (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="train again where a model is")
    asked = parser.parse_args(argv)
    try:
        report = train(asked.out, asked.seconds, asked.seed, force=asked.force)
    except ProblemError as problem:
        print(problem, file=sys.stderr)
        return problem.code
    except KeyboardInterrupt:
        print(f"train  interrupted; nothing was written to {asked.out}", file=sys.stderr)
        return 130
    losses = f"loss {report['loss_first']:.2f} to {report['loss_last']:.2f}"
    print(f"{asked.out}: {report['parameters']} parameters, {report['tokens']} tokens, {losses}, {report['wall_s']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
