"""What requests ask for: exact token lengths by two kinds of tokenizer, beginnings that differ, conversations, few-shot, traces' blocks."""

from __future__ import annotations

import json
import statistics
from functools import lru_cache
from math import log
from pathlib import Path
from pydoc_data import topics
from statistics import NormalDist
from typing import Any

import pytest
import tokenizers
from pydantic import ValidationError

from kilocopy import spec as specs
from kilocopy.problem import ProblemError
from kilocopy.schedule import Shape
from kilocopy.spec import Spec
from loadtests.lengths import Lengths
from loadtests.passages import Passages
from loadtests.workload import Workload

SMOKE = specs.load(Path(__file__).parent.parent / "loadtests" / "specs" / "smoke.yaml")


@pytest.fixture(scope="session", params=["byte-level", "sentencepiece", "whole text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tokenizer as in GPT and Llama 3 (bytes, words split first), as in Llama 2 (a mark before words, BOS in front), and one
    that merges across words, so that nothing is known of a text's parts."""
    corpus = ["0 1 2 3 4 5 6 7 8 9", *list(topics.topics.values())[:25]]
    folder = tmp_path_factory.mktemp("model")
    if request.param == "byte-level":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=800, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=False))
        if request.param == "sentencepiece":
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=800, special_tokens=["<s>", "<unk>"], show_progress=False)
        corpus = [text[:1500] for text in corpus]
    tokenizer.train_from_iterator(corpus, trainer)
    if request.param == "sentencepiece":
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@lru_cache
def tokenizer_of(model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))


def ids(model: Path, text: str, *, special: bool = True) -> list[int]:
    found: list[int] = tokenizer_of(model).encode(text, add_special_tokens=special).ids
    return found


def asking(source: Path | str = "/no/such/model", *, stages: list[dict[str, Any]] | None = None, **changes: Any) -> Spec:
    tree = SMOKE.model_dump(mode="json", exclude_unset=True)
    tree["model"]["source"] = str(source)
    tree["workload"] |= changes
    tree["stages"] = stages or [{"arrival": "closed", "copies": 50, "duration_s": 10}]
    return Spec.model_validate(tree)


def synthetic(**more: Any) -> dict[str, Any]:
    return {"kind": "synthetic", "input_tokens": 64} | more


def said(made: Workload, copy: int = 0, sequence: int = 0, **more: Any) -> dict[str, Any]:
    request: dict[str, Any] = json.loads(made.body(0, 0, copy, sequence, **more))
    return request


# --- lengths ---


@pytest.mark.parametrize("length", [1, 2, 5, 16, 64, 700])
def test_a_prompt_has_exactly_its_tokens(model: Path, length: int) -> None:
    made = Workload(asking(model, prompts=synthetic(input_tokens=length)))
    texts = [said(made, copy, sequence)["prompt"] for copy in range(20) for sequence in range(3)]
    bos = ids(model, "") != []
    if length > bos:
        assert {len(ids(model, text)) for text in texts} == {length}


def test_a_drawn_length_is_exact_too_and_does_not_depend_on_the_order(model: Path) -> None:
    asked = asking(model, prompts=synthetic(input_tokens={"kind": "uniform", "low": 20, "high": 90}), output_tokens={"kind": "uniform", "low": 1, "high": 9})  # fmt: skip
    made, again = Workload(asked), Workload(asked)
    lengths = Lengths(asked.workload.prompts.input_tokens, asked.workload.seed, "input_tokens")  # type: ignore[union-attr]
    bodies = [made.body(0, 0, copy, 0) for copy in range(50)]
    assert [again.body(0, 0, copy, 0) for copy in reversed(range(50))] == bodies[::-1]
    assert [len(ids(model, json.loads(body)["prompt"])) for body in bodies] == [lengths(copy) for copy in range(50)]
    assert {json.loads(body)["max_tokens"] for body in bodies} == set(range(1, 10))


def test_chat_counts_the_tokens_of_the_contents(model: Path) -> None:
    made = Workload(asking(model, endpoint="chat", prompts=synthetic(), examples=0))
    assert {len(ids(model, said(made, copy)["messages"][0]["content"], special=False)) for copy in range(30)} == {64}


def length_of(**tree: Any) -> Any:
    return asking(output_tokens=tree).workload.output_tokens


def drawn(count: int = 20_000, **tree: Any) -> list[int]:
    lengths = Lengths(length_of(**tree), 7, "output_tokens")
    return [lengths(index) for index in range(count)]


def test_uniform_lengths_come_equally_often() -> None:
    values = drawn(kind="uniform", low=3, high=12)
    chi2 = sum((values.count(value) - 2000) ** 2 / 2000 for value in range(3, 13))
    assert set(values) == set(range(3, 13))
    assert chi2 < 27.9  # chi-squared with 9 degrees of freedom: p = 0.001


def kolmogorov(values: list[int], cdf: Any) -> float:
    """Largest distance between the share of values up to n and the distribution function half a token above n."""
    ordered = sorted(values)
    return max(
        abs(sum_ / len(ordered) - cdf(value + 0.5)) for sum_, value in enumerate(ordered, 1) if sum_ == len(ordered) or ordered[sum_] != value
    )


def test_normal_lengths_follow_the_cut_off_distribution() -> None:
    values = drawn(kind="normal", mean=200, stddev=60, min=150, max=400)
    plain = NormalDist(200, 60)
    below, inside = plain.cdf(149.5), plain.cdf(400.5) - plain.cdf(149.5)
    assert kolmogorov(values, lambda x: (plain.cdf(x) - below) / inside) < 1.95 / 20_000**0.5  # p = 0.001
    assert (min(values), max(values) <= 400) == (150, True)


@pytest.mark.parametrize("centre", [{"median": 300}, {"mean": 300 * 2.718281828 ** (0.8**2 / 2)}])
def test_lognormal_lengths_follow_the_cut_off_distribution(centre: dict[str, float]) -> None:
    values = drawn(kind="lognormal", sigma=0.8, min=10, max=2000, **centre)
    plain = NormalDist(0, 0.8)
    below, inside = plain.cdf(log(9.5 / 300)), plain.cdf(log(2000.5 / 300)) - plain.cdf(log(9.5 / 300))
    assert kolmogorov(values, lambda x: (plain.cdf(log(x / 300)) - below) / inside) < 1.95 / 20_000**0.5
    assert max(values) <= 2000


def test_a_cut_far_out_in_the_upper_tail_still_varies() -> None:
    values = drawn(500, kind="normal", mean=10, stddev=10, min=68, max=80)
    assert (min(values), statistics.mode(values)) == (68, 68)
    assert len(set(values)) > 4


def test_empirical_lengths_come_as_often_as_they_stand(tmp_path: Path) -> None:
    values = drawn(kind="empirical", values=[5, 5, 5, 80])
    assert set(values) == {5, 80}
    assert values.count(80) == pytest.approx(5000, abs=4 * (20_000 * 0.25 * 0.75) ** 0.5)
    file = tmp_path / "lengths.csv"
    file.write_text("in,out\n5,1\n80,2\n")
    assert set(drawn(100, kind="empirical", path=str(file), column="in")) == {5, 80}
    with pytest.raises(ProblemError, match="the columns are in, out; say which"):
        drawn(1, kind="empirical", path=str(file))
    file.write_text("n\n5\n0\n")
    with pytest.raises(ProblemError, match=r"lengths.csv:3: column n: expected a whole number of tokens from 1 up, got '0'"):
        drawn(1, kind="empirical", path=str(file))
    file.write_text("n\n")
    with pytest.raises(ProblemError, match="has no rows"):
        drawn(1, kind="empirical", path=str(file))


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"kind": "uniform", "low": 9, "high": 3}, r"low \(9\) is above high \(3\)"),
        ({"kind": "normal", "mean": 5, "stddev": 1, "min": 9, "max": 3}, r"min \(9\) is above max \(3\)"),
        ({"kind": "normal", "mean": 5000, "stddev": 1, "min": 1, "max": 30}, "six standard deviations"),
        ({"kind": "lognormal", "sigma": 1, "max": 30}, "exactly one of median and mean"),
        ({"kind": "empirical"}, "exactly one of values and path"),
        ({"kind": "zipf"}, "a length is a whole number, or a mapping whose kind is"),
        (0, "greater than or equal to 1"),
    ],
)
def test_lengths_that_cannot_be_are_refused(tree: Any, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        asking(output_tokens=tree)


# --- beginnings ---


def test_no_two_prompts_begin_alike_unless_asked(model: Path) -> None:
    made = Workload(asking(model, prompts=synthetic()))
    begun = {tuple(ids(model, said(made, copy, sequence)["prompt"])[:16]) for copy in range(50) for sequence in range(8)}
    assert len(begun) == 400


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_shared_prefix_has_its_share_of_the_tokens_and_not_one_more(model: Path, endpoint: str) -> None:
    made = Workload(asking(model, endpoint=endpoint, prompts=synthetic(input_tokens=80, shared_prefix_fraction=0.5)))
    requests = [said(made, copy) for copy in range(40)]
    texts = [request["prompt"] if endpoint == "completions" else request["messages"][0]["content"] for request in requests]
    tokens = [ids(model, text, special=endpoint == "completions") for text in texts]
    assert {len(each) for each in tokens} == {80}
    assert len({tuple(each[:40]) for each in tokens}) == 1
    assert len({tuple(each[:56]) for each in tokens}) == 40


def test_several_prefixes_are_shared_alike(model: Path) -> None:
    made = Workload(asking(model, prompts=synthetic(input_tokens=60, shared_prefix_fraction=0.5, prefixes=4)))
    fronts = [tuple(ids(model, said(made, copy, sequence)["prompt"])[:30]) for copy in range(50) for sequence in range(2)]
    assert len(set(fronts)) == 4
    assert min(fronts.count(front) for front in set(fronts)) > 10
    whole = Workload(asking(model, prompts=synthetic(shared_prefix_fraction=1)))
    assert len({said(whole, copy)["prompt"] for copy in range(20)}) == 1


def test_without_a_tokenizer_words_are_counted_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = Workload(asking(prompts=synthetic(input_tokens=40)))
    assert "cut by words, at 0.75 words a token (assumed)" in caplog.text
    texts = [said(made, copy, sequence)["prompt"] for copy in range(50) for sequence in range(20)]
    assert len({text.split()[0] for text in texts}) == 1000
    assert {len(text.split()) for text in texts} == {30}


def test_prompts_longer_than_the_corpus_go_round_it() -> None:
    made = Workload(asking(prompts=synthetic(input_tokens=400_000)))
    assert len(said(made)["prompt"].split()) == 300_000


def test_most_of_a_long_prompt_is_not_encoded_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = Passages(str(model), 0, special=True)
    encoded: list[int] = []
    counted = passages._encoded
    monkeypatch.setattr(passages, "_encoded", lambda text, special=None: encoded.append(len(text)) or counted(text, special))
    passages.text(2000, 5, "5.")
    text = passages.text(2000, 6, "6.")
    assert len(ids(model, text)) == 2000
    if passages._local:
        assert max(encoded) < 100 < len(text)


# --- requests ---


def test_a_request_says_what_the_spec_says() -> None:
    made = Workload(asking(output_tokens=7, samples=3, extra_body={"repetition_penalty": 1.1}))
    body = said(made)
    expected = {"max_tokens": 7, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "n": 3, "repetition_penalty": 1.1}
    assert expected.items() <= body.items()
    made = Workload(asking(ignore_eos=False, endpoint="chat"))
    chat = said(made, 3, 2)
    assert not {"ignore_eos", "n"} & set(chat)
    assert chat["messages"][0]["role"] == "user"
    assert made.body(0, 0, 3, 2) == made.body(0, 0, 3, 2) != made.body(0, 0, 3, 3)


def test_fields_that_kilocopy_sets_are_refused() -> None:
    with pytest.raises(ValidationError, match="extra_body: n, stream is set by kilocopy itself"):
        asking(extra_body={"n": 2, "stream": False, "top_k": 3})


def test_a_conversation_carries_its_turns_and_the_real_answers(model: Path) -> None:
    made = Workload(asking(model, endpoint="chat", conversation={"turns": 3}, prompts=synthetic(input_tokens=30)))
    assert made.turns == 3
    history = ["so", "and so"]
    turns = [said(made, 4, 3 + turn, history=history[:turn])["messages"] for turn in range(3)]  # the copy's second conversation
    assert [len(messages) for messages in turns] == [1, 3, 5]
    assert turns[2][:1] == turns[0]
    assert turns[2][:3] == turns[1]
    assert [message["content"] for message in turns[2][1::2]] == history
    assert [message["role"] for message in turns[2]] == ["user", "assistant", "user", "assistant", "user"]
    assert {len(ids(model, message["content"], special=False)) for message in turns[2][::2]} == {30}
    assert said(made, 4, 0)["messages"] != turns[0]
    with pytest.raises(ValueError, match="needs 2 answers, got 1"):
        said(made, 4, 5, history=["so"])


def test_a_conversation_of_completions_goes_on_where_the_model_stopped() -> None:
    made = Workload(asking(conversation={"turns": 2}))
    first = said(made)["prompt"]
    second = said(made, sequence=1, history=[" and so"])["prompt"]
    assert second.startswith(first + " and so\n\n")


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_few_shot_prompts_have_their_examples_and_exactly_their_tokens(model: Path, endpoint: str, share: float) -> None:
    special = endpoint == "completions"
    prompts = synthetic(input_tokens=300, shared_prefix_fraction=share)
    made = Workload(asking(model, endpoint=endpoint, examples=3, prompts=prompts))
    begun = set()
    for copy in range(10):
        request = said(made, copy)
        if special:
            assert request["prompt"].count("Answer:") == request["prompt"].count("Question:") == 4
            assert request["prompt"].endswith("\nAnswer:")
            contents = [request["prompt"]]
        else:
            assert [message["role"] for message in request["messages"]] == ["user", "assistant"] * 3 + ["user"]
            contents = [message["content"] for message in request["messages"]]
        assert sum(len(ids(model, content, special=special)) for content in contents) == 300
        begun.add(tuple(ids(model, contents[0], special=special)[: 166 if share else 16]))
    assert len(begun) == 10


def test_too_little_room_for_the_examples_is_refused() -> None:
    with pytest.raises(ProblemError, match="too few for 5 examples"):
        Workload(asking(examples=5, prompts=synthetic(input_tokens=100)))


def test_a_trace_decides_lengths_and_equal_blocks_are_equal_tokens(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "input_length": 1300, "output_length": 9, "hash_ids": [1, 2, 3]}\n')
    made = Workload(asking(model, stages=[{"arrival": "trace", "format": "mooncake", "path": str(file)}]))

    def tokens(copy: int, length: int, *blocks: int) -> list[int]:
        request = json.loads(made.body(0, 0, 0, copy, shape=Shape(length, 9, blocks)))
        assert request["max_tokens"] == 9
        return ids(model, request["prompt"])

    one, two, other = tokens(0, 1300, 1, 2, 3), tokens(1, 1100, 1, 2, 4), tokens(2, 1100, 1, 5, 6)
    assert [len(one), len(two), len(other)] == [1300, 1100, 1100]
    assert one[:1024] == two[:1024]
    assert one[1024:1040] != two[1024:1040]
    assert one[:512] == other[:512]
    assert one[512:528] != other[512:528]
    assert len(tokens(3, 1024, 1, 2)) == 1024
    assert len(tokens(4, 200)) == 200
    assert tokens(5, 200)[:16] != tokens(6, 200)[:16]


def test_a_trace_with_conversations_is_refused(tmp_path: Path) -> None:
    stages = [{"arrival": "trace", "format": "azure", "path": str(tmp_path)}]
    with pytest.raises(ProblemError, match="a trace brings its own prompts"):
        Workload(asking(stages=stages, conversation={"turns": 2}))
