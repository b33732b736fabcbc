"""Steady state on series whose truth is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from kilocopy import steady
from kilocopy.streams import Floats, Ints


@dataclass(frozen=True)
class Tokens:
    """Tokens whose every arrival is known, asked as streams are."""

    times_s: Floats
    weights: Floats
    of: Ints

    def tally(self, edges_s: Floats) -> Floats:
        return np.histogram(self.times_s[self.times_s < edges_s[-1]], edges_s, weights=self.weights[self.times_s < edges_s[-1]])[0]

    def arrivals(self) -> tuple[Floats, Floats]:
        return self.times_s, self.weights

    def owners(self) -> Ints:
        return self.of


def noise(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(100, 10, count)


def tokens(rate_per_s: float, until_s: float, seed: int, length: int = 40, per_s: float = 10) -> tuple[Floats, Floats, Ints]:
    """Poisson requests in [-10, until_s) of `length` tokens each, 1 / per_s apart: times, weights, owners."""
    draw = np.random.default_rng(seed)
    begun_s = draw.uniform(-10, until_s, draw.poisson(rate_per_s * (until_s + 10)))
    times_s = (begun_s[:, None] + np.arange(length) / per_s).ravel()
    return times_s, np.ones(len(times_s)), np.repeat(np.arange(len(begun_s)), length)


def test_a_known_warm_up_is_cut_off() -> None:
    """The first 60 of 300 values are half of what follows: the cut is there, to a batch of 5."""
    values = noise(300)
    values[:60] /= 2
    cut, late = steady.mser5(values)
    assert (cut, late) == (60, False)


def test_an_exponential_warm_up_is_cut_where_it_drowns_in_noise() -> None:
    """Bias 100 exp(-i / 30) under a noise of 10 / sqrt(5): gone at about 30 ln(100 / 4.5) = 93."""
    cut, late = steady.mser5(noise(500) + 100 * np.exp(-np.arange(500) / 30))
    assert not late
    assert 50 <= cut <= 130


def test_by_hand() -> None:
    """12 batches of means 9, 1, 3, 1, 3 ...: without the first the squared standard error is least."""
    means = np.array([9.0] + [1.0, 3.0] * 6)
    errors = [((means[d:] - means[d:].mean()) ** 2).sum() / (13 - d) ** 2 for d in range(7)]
    assert steady.mser5(np.repeat(means, 5)) == (5 * int(np.argmin(errors)), False)


def test_a_series_that_becomes_constant_is_cut_there() -> None:
    """What follows has no variance at all, so rounding alone would tell its cuts apart."""
    assert steady.mser5(np.concatenate([np.zeros(60), np.full(240, 0.1)])) == (60, False)
    assert steady.mser5(np.concatenate([np.full(30, 7.3), np.full(470, 1 / 3)])) == (30, False)


def test_white_noise_loses_little() -> None:
    cuts = [steady.mser5(noise(300, seed))[0] for seed in range(50)]
    assert np.median(cuts) <= 15


def test_a_trend_has_no_steady_state() -> None:
    assert steady.mser5(np.arange(300.0))[1]
    times_s, weights, owners = tokens(20, 60, 1)
    kept = np.isin(owners, np.flatnonzero(np.random.default_rng(2).uniform(0, 60, owners.max() + 1) < times_s[::40]))
    assert steady.warm_up_s(Tokens(times_s[kept], weights[kept], owners[kept]), 0, 60) is None


def test_too_few_values_are_left_alone() -> None:
    assert steady.mser5(np.arange(50.0)) == (0, False)


@pytest.mark.parametrize(("rate_per_s", "until_s"), [(4, 30), (20, 60)])
def test_steady_requests_are_rarely_called_unsteady(rate_per_s: float, until_s: float) -> None:
    """The rate of a stationary open loop is correlated, yet at most 3 of 60 are refused and half lose under a fifth."""
    cuts_s = [steady.warm_up_s(Tokens(*tokens(rate_per_s, until_s, seed)), 0, until_s) for seed in range(60)]
    assert sum(cut_s is None for cut_s in cuts_s) <= 3
    assert np.median([cut_s for cut_s in cuts_s if cut_s is not None]) < 0.2 * until_s


def test_what_came_before_and_after_the_window_is_no_drift() -> None:
    """An even rate from 0 s to 60 s, of which 20 s to 28 s are the window."""
    times_s = np.arange(600) / 10
    assert steady.drift(Tokens(times_s, np.ones(600), np.arange(600)), 20, 28) is None
    assert steady.halves_z(times_s, np.ones(600), np.arange(600), 20, 28) < 1
    assert steady.warm_up_s(Tokens(times_s, np.ones(600), np.arange(600)), 20, 28) == 0


def test_halves_apart_by_hand() -> None:
    """Three requests: 2 tokens in each half, 2 in the first alone, 4 in the second alone: |0 - 2 + 4| / sqrt(0 + 4 + 16)."""
    times_s = np.array([1, 2, 6, 7, 3, 4, 6, 7, 8, 9], dtype=np.float64)
    owners = np.array([0] * 4 + [1] * 2 + [2] * 4)
    assert steady.halves_z(times_s, np.ones(10), owners, 0, 10) == pytest.approx(2 / np.sqrt(20))


def test_a_backlog_that_grows_is_seen_and_chance_is_not() -> None:
    """A queue that takes 1 request/s too few over 40 s, and 40 s of a Poisson number in flight."""
    draw = np.random.default_rng(3)
    assert steady.growth(10 + np.arange(40.0)) == pytest.approx(40)
    assert steady.growth(50 - np.arange(40.0)) is None
    grown = [steady.growth(draw.poisson(20, 40).astype(np.float64)) for _ in range(100)]
    assert sum(one is not None for one in grown) <= 1


def test_bursts_make_a_backlog_less_surprising() -> None:
    rising = 20 + np.arange(30.0) / 1.5
    assert steady.growth(rising) is not None
    assert steady.growth(rising, dispersion=10) is None
