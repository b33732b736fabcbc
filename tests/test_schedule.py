"""The plan of a stage (even starts, every copy owned once, the same requests however many workers share them) and its prompts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.spec import Spec, load
from loadtests import workload

SMOKE = load(Path(__file__).parent.parent / "loadtests/specs/smoke.yaml")
COPIES, WORKERS, SEEDS = st.integers(1, 300), st.integers(1, 17), st.integers(0, 2**31 - 1)


def with_stages(*stages: dict[str, object]) -> Spec:
    tree = SMOKE.model_dump(mode="json")
    return Spec.model_validate(tree | {"stages": [{"arrival": "closed", "warmup_s": 0, **stage} for stage in stages]})


@given(COPIES, st.floats(0, 600), SEEDS)
def test_starts_fill_equal_slots_of_the_ramp_once_each(copies: int, ramp_s: float, seed: int) -> None:
    starts = sorted(schedule.starts_s(copies, ramp_s, seed))
    slot_s = ramp_s / copies
    for slot, start in enumerate(starts):
        assert slot * slot_s - 1e-9 <= start <= (slot + 1) * slot_s + 1e-9


@given(COPIES, WORKERS)
def test_every_copy_has_one_owner_and_shares_are_even(copies: int, workers: int) -> None:
    parts = [list(schedule.owned(copies, worker, workers)) for worker in range(workers)]
    assert sorted(itertools.chain(*parts)) == list(range(copies))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(0, 10_000), WORKERS)
def test_shares_add_up(total: int, workers: int) -> None:
    parts = [schedule.share(total, worker, workers) for worker in range(workers)]
    assert sum(parts) == total
    assert max(parts) - min(parts) <= 1


@given(COPIES, WORKERS)
def test_the_plan_does_not_depend_on_the_number_of_workers(copies: int, workers: int) -> None:
    spec = with_stages({"copies": copies, "requests": 500, "ramp_s": 3})
    whole = schedule.plan(spec, 0)
    parts = [schedule.plan(spec, 0, worker, workers) for worker in range(workers)]
    assert sorted((start for part in parts for start in part.starts), key=lambda start: start.start_s) == list(whole.starts)
    assert sum(part.requests or 0 for part in parts) == 500


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
def test_no_two_requests_have_the_same_prompt_number(copies: list[int], data: st.DataObject) -> None:
    spec = with_stages(*({"copies": count, "duration_s": 1} for count in copies))
    sequences = data.draw(st.integers(1, 5))
    places = [(s, c, q) for s, count in enumerate(copies) for c in range(count) for q in range(sequences)]
    assert len({schedule.prompt_index(spec, *place) for place in places}) == len(places)


def test_a_timed_stage_stops_after_ramp_warm_up_and_duration() -> None:
    spec = with_stages({"copies": 2, "duration_s": 10, "ramp_s": 3, "warmup_s": 2})
    plan = schedule.plan(spec, 0)
    assert (plan.warm_s, plan.stop_s, plan.requests) == (5, 15, None)


def test_stages_and_seeds_differ_and_repeat() -> None:
    assert schedule.request_seed(1, 0, 0, 0) == schedule.request_seed(1, 0, 0, 0)
    assert len({schedule.request_seed(1, s, c, q) for s in range(4) for c in range(50) for q in range(20)}) == 4000
    assert schedule.draw(1, "starts", 0) != schedule.draw(1, "starts", 1)
    assert 0 <= schedule.draw(-5, "x") < 2**31


# --- prompts ---


def asking(**changes: object) -> Spec:
    tree = SMOKE.model_dump(mode="json")
    tree["model"]["source"] = changes.pop("source", "/no/such/model")
    tree["workload"] |= changes
    return Spec.model_validate(tree)


def test_synthetic_prompts_never_come_twice_and_have_their_length() -> None:
    prompt = workload.prompts(asking(prompts={"kind": "synthetic", "input_tokens": 40}))
    drawn = [prompt(index) for index in range(3000)]
    assert len(set(drawn)) == 3000
    assert {len(text.split()) for text in drawn} == {30}  # 0.75 words a token, where there is no tokenizer
    assert len({text.split()[0] for text in drawn}) == 3000  # no common beginning for a prefix cache


def test_prompts_longer_than_the_corpus_go_round_it() -> None:
    prompt = workload.prompts(asking(prompts={"kind": "synthetic", "input_tokens": 400_000}))
    assert len(prompt(0).split()) == pytest.approx(300_000, rel=0.001)


def test_the_models_tokenizer_cuts_where_there_is_one(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat, and the dog did not"] * 10, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompt = workload.prompts(asking(source=str(tmp_path), prompts={"kind": "synthetic", "input_tokens": 64}))
    lengths = [len(tokenizer.encode(prompt(index)).ids) for index in range(200)]
    assert sum(abs(length - 64) <= 2 for length in lengths) >= 190


def test_file_prompts_come_in_a_seeded_order(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\n\nb\nc\n")
    prompt = workload.prompts(asking(prompts={"kind": "file", "path": str(file)}))
    assert sorted(prompt(index) for index in range(3)) == ["a", "b", "c"]
    assert prompt(0) == prompt(3)
    file.write_text("\n")
    with pytest.raises(ProblemError, match="is empty"):
        workload.prompts(asking(prompts={"kind": "file", "path": str(file)}))
    with pytest.raises(ProblemError, match="cannot be read"):
        workload.prompts(asking(prompts={"kind": "file", "path": str(tmp_path)}))


def test_a_request_says_what_the_spec_says() -> None:
    body = json.loads(workload.Workload(asking(output_tokens=7)).body(0, 0, 0))
    assert {"max_tokens": 7, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}.items() <= body.items()
    made = workload.Workload(asking(ignore_eos=False, endpoint="chat"))
    chat = json.loads(made.body(1, 3, 2))
    assert "ignore_eos" not in chat
    assert chat["messages"][0]["role"] == "user"
    assert made.body(1, 3, 2) != made.body(1, 3, 3)
