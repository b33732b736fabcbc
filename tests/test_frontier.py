"""The frontier's statistics against servers whose law is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kilocopy import frontier, search
from kilocopy.frontier import Point
from kilocopy.report import interval
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
    assert inside >= 90


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
    few = frontier.speed_held(np.arange(10.0, 59.0), 0.9)  # 49 streams: the 2.5 % rank is the first, and 1 / 49 * 49 is under 1
    assert few is not None
    assert few.low == 10
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


@pytest.mark.parametrize("noise", [0.001, 0.02])
def test_a_crossing_lies_in_its_interval_at_the_stated_rate(noise: float) -> None:
    """A server whose step is 39.5 ms and 5 ms for each copy: between levels a straight line log-log would be 5 % off, and with sure levels its interval held nothing."""
    inside = crossed = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        true = math.exp(draw.uniform(math.log(1.5), math.log(100)))
        speeds = []
        for copies in COPIES:
            value = 1000 / (39.5 + 5 * copies) * math.exp(noise * draw.standard_normal())
            speeds.append(Estimate(value=value, low=value * math.exp(-1.96 * noise), high=value * math.exp(1.96 * noise)))
        found = frontier.crossing(COPIES, speeds, 1000 / (39.5 + 5 * true))
        crossed += found is not None
        inside += found is not None and (found.low or 0) <= true <= (found.high or math.inf)
    assert crossed > 150
    assert inside / crossed >= 0.93


def test_a_crossing_with_one_end_outside_the_sweep_says_so() -> None:
    speeds = [Estimate(value=12, low=9, high=15), Estimate(value=8, low=7, high=9)]
    found = frontier.crossing((1, 2), speeds, 10)
    assert found is not None
    assert (found.low, found.high) == (None, pytest.approx(2, rel=1e-3))
    assert interval(found.low, found.high) == "[up to 2.00]"
    still = frontier.crossing((1, 2), [Estimate(value=12, low=11, high=15), Estimate(value=9.9, low=9, high=11)], 10)
    assert still is not None
    assert still.high is None
    assert interval(still.low, still.high).endswith("or more]")


def alike(seed: int, count: int = 1000) -> tuple[np.ndarray, float]:
    """Speeds of streams in the order of their begin that share slow and fast moments (half a second long, of sixty), and their true 10 % quantile."""
    draw = np.random.default_rng(seed)
    common = np.empty(count)
    common[0], keep = draw.standard_normal(), math.exp(-120 / count)
    for i in range(1, count):
        common[i] = keep * common[i - 1] + math.sqrt(1 - keep**2) * draw.standard_normal()
    return 10 * np.exp(0.05 * draw.standard_normal(count) + 0.1 * common), 10 * math.exp(-1.28155 * math.hypot(0.05, 0.1))


def test_streams_that_share_slow_moments_do_not_count_as_independent() -> None:
    """Counted as if they were, the 95 % interval of the speed held has the true one in under 60 %, and far more levels clearly miss a speed that they hold."""
    inside = {"alike": 0, "as if apart": 0}
    missed = {"alike": 0, "as if apart": 0}
    for seed in range(200):
        speeds, true = alike(seed)
        for name, part in (("alike", frontier.independent(speeds, 0.9)), ("as if apart", 1.0)):
            found = frontier.speed_held(speeds, 0.9, part)
            assert found is not None
            inside[name] += (found.low or 0) <= true <= (found.high or 0)
            level = search.Level(1, len(speeds), int((speeds >= true).sum()), independent=part)
            missed[name] += search.verdict(level, Slo(tokens_per_s_per_copy=10)) == "missed"
    assert inside["alike"] / 200 >= 0.90
    assert inside["as if apart"] / 200 < 0.70
    assert missed["alike"] / 200 <= 0.05 < missed["as if apart"] / 200
    apart = np.random.default_rng(0).exponential(size=1000)
    assert frontier.independent(apart, 0.9) > 0.5
    assert frontier.independent(np.full(1000, 7.0), 0.9) == 1


def test_what_a_further_page_takes_lies_in_its_interval_at_the_stated_rate() -> None:
    """30 joules/s and 0.25 pages/s more, both with errors that go together; and none where the gain in pages is not clear of 0."""
    inside = known = 0
    for seed in range(400):
        draw = np.random.default_rng(seed)
        levels = []
        for joules, pages in ((100, 1.0), (130, 1.25)):
            both = draw.standard_normal(20)
            levels.append((joules * (1 + 0.01 * both), pages * (1 + 0.05 * both + 0.05 * draw.standard_normal(20))))
        found = frontier.per_further(levels[0], levels[1])
        assert found is not None
        known += found.low is not None
        inside += found.low is not None and found.low <= 120 <= (found.high or 0)
    assert known == 400
    assert 0.93 <= inside / known <= 0.995
    flat, joules = np.tile([0.9, 1.1], 10), np.full(20, 100.0)
    vague = frontier.per_further((joules, flat), (joules * 1.1, flat[::-1] + 0.01))
    assert vague is not None
    assert (vague.value, vague.low) == (pytest.approx(1000), None)
    assert frontier.per_further((joules, flat), (joules, flat - 0.1)) is None


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
