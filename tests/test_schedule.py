"""The plan of a stage: even starts, every copy owned once, and the same requests however many workers share them."""

from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kilocopy import schedule
from kilocopy.spec import Spec, load

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
