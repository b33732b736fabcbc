"""The search for the largest load: its steps, its answer and its interval, against servers whose true capacity is known."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scipy import stats

from kilocopy.search import Answer, Level, answer, attains, following, holds, likely, pooled, verdict, wilson
from kilocopy.spec import SearchStage, Slo

SLO = Slo(tokens_per_s_per_copy=10, quantile=0.9, ttft_s=2, error_fraction_max=0.01)


def stage(**more: Any) -> SearchStage:
    return SearchStage.model_validate({"arrival": "search", "start": 1, "limit": 1024} | more)


def run(asked: SearchStage, tried_as: Any) -> list[Level]:
    """Follow the search; `tried_as` makes the level of a load. A search that does not end fails the test."""
    levels: list[Level] = []
    while (load := following(asked, levels, SLO)) is not None:
        levels.append(tried_as(load))
        assert len(levels) < 60, [level.load for level in levels]
    return levels


def cliff(capacity: float, judged: int = 400) -> Any:
    """A server where everyone attains up to its capacity, and half do above."""
    return lambda load: Level(load, judged, judged if load <= capacity else judged // 2)


@pytest.mark.parametrize(("attained", "judged"), [(0, 10), (10, 10), (9, 10), (90, 100), (1, 1), (450, 500)])
def test_wilson_is_the_textbooks(attained: int, judged: int) -> None:
    expected = stats.binomtest(attained, judged).proportion_ci(0.95, "wilson")
    assert wilson(attained, judged) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_nothing_judged_says_nothing() -> None:
    assert wilson(0, 0) == (0, 1)
    assert verdict(Level(4, 0, 0), SLO) == "unclear"
    assert not holds(Level(4, 0, 0), SLO)


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 64, 100, 511, 1000])
def test_a_cliff_is_found_within_the_precision(capacity: int) -> None:
    asked = stage(precision_fraction=0.05)
    levels = run(asked, cliff(capacity))
    found = answer(asked, levels, SLO)
    assert found.load is not None
    assert found.load <= capacity <= found.load + max(1, 0.05 * found.load)
    assert (found.low, found.reason) == (found.load, "precise")
    assert found.high is not None
    assert found.high > capacity
    assert len(levels) <= 20


def test_the_limit_is_an_answer_of_its_own() -> None:
    asked = stage(limit=100)
    levels = run(asked, cliff(5000))
    assert [level.load for level in levels] == [1, 2, 4, 8, 16, 32, 64, 100]
    found = answer(asked, levels, SLO)
    assert (found.load, found.high, found.reason) == (100, None, "limit")


def test_nothing_holds() -> None:
    asked = stage(start=8)
    levels = run(asked, cliff(0))
    assert [level.load for level in levels] == [8, 4, 2, 1]
    assert answer(asked, levels, SLO) == Answer(None, None, 1, "first_missed")


def test_rates_are_sought_as_well() -> None:
    asked = stage(over="rate_per_s", start=0.5, limit=100, precision_fraction=0.02)
    found = answer(asked, run(asked, cliff(7.3)), SLO)
    assert found.load is not None
    assert found.load <= 7.3 <= found.load * 1.021


def test_an_unclear_level_is_tried_again_and_counted_together() -> None:
    asked = stage(start=4, limit=4, repeats=2)
    levels = run(asked, lambda load: Level(load, 40, 36))
    assert [level.load for level in levels] == [4, 4, 4]
    assert pooled(levels) == [Level(4, 120, 108)]
    found = answer(asked, levels, SLO)
    assert (found.load, found.low, found.reason) == (4, None, "limit")  # its share decides, and nothing clearly held


def test_errors_miss_the_slo_however_fast_the_rest_was() -> None:
    assert verdict(Level(8, 500, 500, error_fraction=0.02), SLO) == "missed"
    assert verdict(Level(8, 500, 500, error_fraction=0.01), SLO) == "held"
    assert verdict(Level(8, 500, 500, error_fraction=0.02, sound=False), SLO) == "unsound"  # they may be the driver's own


def test_a_driver_that_cannot_keep_up_ends_the_search_as_such() -> None:
    asked = stage(limit=1024)
    levels = run(asked, lambda load: Level(load, 400, 400, sound=load <= 16))
    assert [level.load for level in levels][:7] == [1, 2, 4, 8, 16, 32, 32]
    found = answer(asked, levels, SLO)
    assert found.reason == "unsound"
    assert found.load is not None
    assert 16 <= found.load < 32


def test_a_hiccup_is_not_a_limit() -> None:
    asked, seen = stage(limit=8), []

    def hiccup(load: float) -> Level:
        seen.append(load)
        return Level(load, 400, 400, sound=seen.count(4) != 1 or load != 4)

    found = answer(asked, run(asked, hiccup), SLO)
    assert (found.load, found.reason) == (8, "limit")
    assert seen == [1, 2, 4, 4, 8]


def test_streams_that_were_slow_together_make_a_level_unclear() -> None:
    """Of 400 streams 93 % attained it: clear where each is an observation, unclear where only a tenth of them are; and so a search tries it again."""
    assert verdict(Level(4, 400, 374), SLO) == "held"
    assert verdict(Level(4, 400, 374, independent=0.1), SLO) == "unclear"
    assert likely(Level(4, 400, 374, independent=0.1)) == pytest.approx(wilson(37.4, 40))
    asked = stage(start=4, limit=4, repeats=2)
    assert len(run(asked, lambda load: Level(load, 400, 374, independent=0.1))) == 3
    assert pooled([Level(4, 400, 374, independent=0.1), Level(4, 400, 374)])[0].independent == pytest.approx(800 / 4400)


def test_a_lucky_load_above_a_miss_does_not_count() -> None:
    levels = [Level(1, 400, 400), Level(2, 400, 100), Level(4, 400, 400)]
    assert answer(stage(), levels, SLO).load == 1


def test_a_search_cut_off_says_so() -> None:
    found = answer(stage(), [Level(1, 400, 400), Level(2, 400, 400)], SLO)
    assert (found.load, found.reason) == (2, "unfinished")
    found = answer(stage(), [Level(8, 400, 400), Level(16, 400, 0)], SLO)
    assert (found.load, found.high, found.reason) == (8, 16, "unfinished")


def test_noise_does_not_shift_the_answer() -> None:
    """100 searches on a server whose attainment falls smoothly through the quantile at load 50."""
    draws, found = random.Random(5), []  # noqa: S311
    for _ in range(100):
        asked = stage(limit=400, precision_fraction=0.1)

        def noisy(load: float) -> Level:
            share = max(0.0, min(1.0, 0.9 - (load - 50) * 0.004))
            return Level(load, 300, sum(draws.random() < share for _ in range(300)))

        result = answer(asked, run(asked, noisy), SLO)
        assert result.load is not None
        found.append(result.load)
    assert 45 <= sorted(found)[50] <= 55
    assert sorted(found)[5] >= 35
    assert sorted(found)[94] <= 65


def row(ttft_s: float, speed: float, tokens: int, lag_s: float = 0.0) -> dict[str, Any]:
    first = int((lag_s + ttft_s) * 1e9)
    return {"scheduled_ns": 0, "sent_ns": int(lag_s * 1e9), "first_token_ns": first, "output_tokens": tokens,
            "last_token_ns": first + int((tokens - 1) / speed * 1e9)}  # fmt: skip


def test_a_stream_attains_by_speed_and_ttft() -> None:
    assert attains(row(1.9, 10.5, 50), SLO, from_scheduled=False)
    assert not attains(row(2.1, 10.5, 50), SLO, from_scheduled=False)
    assert not attains(row(1.9, 9.5, 50), SLO, from_scheduled=False)
    assert attains(row(1.9, 1, 1), SLO, from_scheduled=False)  # one token has no speed
    assert not attains(row(1.9, 10.5, 50) | {"first_token_ns": None, "last_token_ns": None}, SLO, from_scheduled=False)  # no text came
    late = row(1.5, 10.5, 50, lag_s=0.6)
    assert attains(late, SLO, from_scheduled=False)
    assert not attains(late, SLO, from_scheduled=True)  # open loop: the wait before the send is the user's too
