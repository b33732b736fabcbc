"""The demo model learns, loads, reports figures that add up, and is either whole or not there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import train as demo
from cluster.train import EnergySince, corpus, main, train, train_tokenizer
from kilocopy.problem import ProblemError

pytestmark = pytest.mark.alone

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("models") / "demo"
    return out, train(out, seconds=7, seed=3)


def test_it_learns_and_its_figures_add_up(trained: tuple[Path, dict[str, Any]]) -> None:
    out, report = trained
    assert json.loads((out / "training.json").read_text()) == report
    assert report["loss_last"] < report["loss_first"] - 0.5
    assert report["flops"] == 6 * report["parameters"] * report["tokens"]
    assert report["tokens"] == report["steps"] * demo.BATCH * demo.WINDOW_TOKENS
    assert report["wall_s"] > 7
    assert report["cpu_s"] > 0
    assert (report["energy_j"] is None) == (report["energy_source"] == "not_measured")
    assert not list(out.parent.glob("demo.*"))


def test_it_loads_generates_and_counts_tied_weights_once(trained: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, report = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert 1e6 < sum(weight.numel() for weight in model.parameters()) == report["parameters"] < 5e6
    assert report["parameters"] - report["parameters_non_embedding"] == demo.VOCABULARY * model.config.hidden_size
    asked = tokenizer("The list object", return_tensors="pt")
    answer = model.generate(**asked, min_new_tokens=8, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] == asked["input_ids"].shape[1] + 8


def test_the_tokenizer_keeps_every_text_and_renders_chats(trained: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    for text in ("naïve  café\n\tdef f(x): # ∑ 日本語 🦜", " it 's , spaced .", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "S\n\nU\n\n"
    chat.append({"role": "assistant", "content": "A"})
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "S\n\nU\n\nA<|endoftext|>"


def test_the_same_python_gives_the_same_corpus_and_tokenizer(trained: tuple[Path, dict[str, Any]]) -> None:
    texts = corpus()
    assert len(set(texts)) == len(texts) > 1000
    assert train_tokenizer(texts).get_vocab() == _saved_vocabulary(trained[0])


def _saved_vocabulary(out: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    return vocabulary


def test_a_complete_model_is_kept(trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    out, report = trained
    assert train(out, seconds=1000, seed=99) == report
    assert "cached" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_training_leaves_no_half_model(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "cluster.train", "--out", str(out), "--seconds", "60"]
    training = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert training.stderr is not None
    assert "reading" in training.stderr.readline()
    time.sleep(0.5)
    training.send_signal(number)
    said = training.communicate(timeout=30)[1]
    assert not out.exists()
    if number == signal.SIGINT:
        assert training.returncode == 130
        assert said.splitlines()[-1].startswith("train  interrupted")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--seconds", "-3"], ["--seconds", "nan"], ["--seed", "-1"]])
def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["--out", str(tmp_path / "demo"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{arguments[0]}: must be")
    assert said.count("\n") == 1


def test_what_is_not_a_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ProblemError, match="not a model"):
        train(tmp_path, seconds=1, seed=0, force=True)
    assert (tmp_path / "thesis.txt").exists()


class FakeMeter:
    """Gives its readings in turn; None is one that fails."""

    device, boundary = "rapl:fake", "host"

    def __init__(self, *readings_j: float | None) -> None:
        self._readings_j = list(readings_j)

    def read_j(self) -> float:
        reading_j = self._readings_j.pop(0)
        if reading_j is None:
            raise OSError
        return reading_j


def test_energy_is_a_difference_or_not_measured() -> None:
    measured = {"energy_j": 9.0, "energy_boundary": "host", "energy_source": "measured"}
    absent = {"energy_j": None, "energy_boundary": None, "energy_source": "not_measured"}
    assert EnergySince([FakeMeter(100, 105), FakeMeter(7, 11)]).report() == measured
    assert EnergySince([FakeMeter(100, 105), FakeMeter(7, None)]).report() == absent
    assert EnergySince([]).report() == absent


def test_importing_does_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'pynvml'}"
    program = f"import sys, cluster.train, cluster.power; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
