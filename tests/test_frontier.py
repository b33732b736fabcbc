"""The frontier's statistics against servers whose law is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kilocopy import frontier, search
from kilocopy.frontier import Point
from kilocopy.spec import Slo
from kilocopy.summary import Estimate

COPIES = (1, 2, 4, 8, 16, 32, 64, 128)


def rate(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def batching(copies: int, fixed_s: float = 0.02, each_s: float = 0.001) -> float:
    """Tokens/s of a server whose step takes fixed + each x copies seconds: one token for every copy."""
    return copies / (fixed_s + each_s * copies)


def sweep(noise: float = 0.0, seed: int = 0, half: float = 0.02) -> list[Point]:
    draw = np.random.default_rng(seed)
    values = [batching(n) * (1 + noise * draw.standard_normal()) for n in COPIES]
    return [Point(n, rate(value, half * value)) for n, value in zip(COPIES, values, strict=True)]


def test_the_knee_of_a_known_server_is_where_its_fixed_and_its_shared_time_are_equal() -> None:
    """X = N / (a + b N): d ln X / d ln N = a / (a + b N) = 1/2 at N = a / b = 20."""
    found = frontier.knee(sweep())
    assert found.copies == pytest.approx(20, rel=0.1)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 20 < found.high
    assert found.high / found.low < 2.5


def test_the_knee_does_not_move_when_the_sweep_goes_further() -> None:
    near, far = frontier.knee(sweep()[:7]), frontier.knee(sweep())
    assert near.copies == pytest.approx(far.copies, rel=0.02)


def test_the_knee_lies_in_its_interval_at_about_the_stated_rate() -> None:
    """Batch-mean noise of 2 %, stated as such (95 %: 3.92 %): the interval holds 20 in 95 % of sweeps; interpolation may shift it a little."""
    inside = 0
    for seed in range(100):
        found = frontier.knee(sweep(0.02, seed, half=0.0392))
        inside += found.low is not None and found.high is not None and found.low <= 20 <= found.high
    assert inside >= 88


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (sweep()[:3], "3 levels that count are too few"),
        (sweep()[:4], "still adds more than half"),
        (sweep()[6:] + [Point(n, rate(batching(n), 1)) for n in (256, 512)], "already at 64 copies"),
    ],
)
def test_a_sweep_that_does_not_enclose_it_has_no_knee(points: list[Point], said: str) -> None:
    found = frontier.knee(points)
    assert found.copies is None
    assert said in found.sentence


def test_throughput_that_falls_and_rises_again_is_refused() -> None:
    points = sweep()
    points[3] = Point(8, rate(60.0, 1.0))
    said = frontier.unsteady(points)
    assert said is not None
    assert "at 8 copies" in said
    assert frontier.knee(points).copies is None
    assert frontier.unsteady(sweep()) is None
    retrograde = [Point(n, rate(batching(n) / (1 + (n / 64) ** 2), 1)) for n in COPIES]
    assert frontier.unsteady(retrograde) is None  # falling at the end alone is a law of its own


def test_what_a_further_copy_adds() -> None:
    found = frontier.gain(Point(2, rate(100, 3)), Point(4, rate(150, 4)))
    assert (found.value, found.low, found.high) == (25, 22.5, 27.5)  # (150 - 100) / 2; half-width hypot(3, 4) / 2
    assert frontier.gain(Point(2, Estimate(value=100)), Point(4, rate(150, 4))).low is None


def test_the_speed_held_and_how_often_its_interval_holds_the_true_one() -> None:
    """Exponential speeds: the 10 % quantile is -ln(0.9)."""
    true, inside = -math.log(0.9), 0
    for seed in range(300):
        found = frontier.speed_held(np.random.default_rng(seed).exponential(size=200), 0.9)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= true <= found.high
    assert 0.93 <= inside / 300 <= 0.995
    assert frontier.speed_held(np.array([]), 0.9) is None
    assert frontier.speed_held(np.array([0.0, 5.0]), 0.9).value == 0  # type: ignore[union-attr]  # half of them missed the TTFT


def test_where_the_curve_falls_through_a_speed() -> None:
    speeds = [rate(1000 / n, 50 / n) for n in COPIES]  # each copy's speed is 1000 / N: log-log a straight line
    found = frontier.crossing(COPIES, speeds, 20)
    assert found is not None
    assert found.value == pytest.approx(50)
    assert (found.low, found.high) == (pytest.approx(47.5), pytest.approx(52.5))
    assert frontier.crossing(COPIES, speeds, 2000) is None
    assert frontier.crossing(COPIES, speeds, 5) is None
    cliff = [*speeds[:3], rate(0, 0)]
    crossed = frontier.crossing(COPIES[:4], cliff, 20)
    assert crossed is not None
    assert 4 <= crossed.value <= 8


def test_the_largest_level_that_held() -> None:
    slo = Slo(tokens_per_s_per_copy=10)
    levels = [
        search.Level(1, 100, 100),
        search.Level(2, 100, 99),
        search.Level(4, 100, 92),  # its interval holds 90 %: held, not clearly
        search.Level(8, 100, 50),
        search.Level(16, 100, 99),  # by luck: a smaller level missed
    ]
    assert frontier.held(levels, slo) == frontier.Held(4, 2, 8, False)
    assert frontier.held([search.Level(1, 100, 10)], slo) == frontier.Held(None, None, 1, False)
    unsound = [search.Level(1, 100, 100), search.Level(2, 0, 0, sound=False), search.Level(4, 100, 100)]
    assert frontier.held(unsound, slo) == frontier.Held(1, 1, None, True)
