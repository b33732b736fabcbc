"""Requests as columns: what is counted without laying out every chunk is what laying out every chunk gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilocopy import recording, streams
from kilocopy.streams import Floats, Streams
from tests import synthetic
from tests.synthetic import Run, ideal


def columns(first_s: Floats, gaps_us: Sequence[Sequence[int]], tokens: Floats) -> Streams:
    """Ok requests with these first tokens, gaps and output tokens."""
    count, nan = len(first_s), np.full(len(first_s), np.nan)
    counts = np.array([len(gaps) for gaps in gaps_us], dtype=np.int32)
    small = np.zeros(count, np.int16)
    return Streams(
        stage=small, level=small, worker=small, copy=small.astype(np.int32), sequence=small.astype(np.int32),
        scheduled_s=first_s, sent_s=first_s, first_s=first_s, last_s=nan, finished_s=nan,
        prompt_tokens=nan, output_tokens=tokens, output_words=nan, chunks=nan, outcome_code=small.astype(np.int8),
        gap_counts=counts, gap_starts=np.cumsum(counts, dtype=np.int64) - counts,
        gap_total_us=np.array([sum(gaps) for gaps in gaps_us], dtype=np.int64),
        gaps_us=np.array([gap for gaps in gaps_us for gap in gaps], dtype=np.uint32),
    )  # fmt: skip


gaps = st.lists(st.integers(0, 6_000_000), max_size=8)
drawn_requests = st.lists(st.tuples(st.one_of(st.floats(0, 50), st.just(np.nan)), gaps, st.one_of(st.integers(0, 50), st.just(None))), max_size=12)


@settings(deadline=None, max_examples=150)
@given(drawn_requests, st.floats(0, 40), st.floats(0.5, 40), st.integers(1, 30), st.integers(1, 12))
def test_a_tally_is_the_histogram_of_all_arrivals(
    drawn: list[tuple[float, list[int], int | None]], start_s: float, length_s: float, bins: int, at_once: int
) -> None:
    """Laid out chunk by chunk in the plainest way, in blocks of any size; edges that a token falls on exactly belong to the later bin."""
    of = columns(np.array([f for f, _, _ in drawn]), [g for _, g, _ in drawn], np.array([np.nan if t is None else float(t) for _, _, t in drawn]))
    edges_s = np.linspace(start_s, start_s + length_s, bins + 1)
    expected = np.zeros(bins)
    for first_s, gap_list, tokens in drawn:
        for n in range(0 if np.isnan(first_s) else len(gap_list) + 1):
            place = int(np.searchsorted(edges_s, sum(gap_list[:n]) / 1e6 + first_s, side="right")) - 1
            if 0 <= place < bins:
                expected[place] += 1 if tokens is None else tokens / (len(gap_list) + 1)
    kept, streams.CHUNKS_AT_ONCE = streams.CHUNKS_AT_ONCE, at_once
    try:
        assert of.tally(edges_s) == pytest.approx(expected, abs=1e-9)
    finally:
        streams.CHUNKS_AT_ONCE = kept


@settings(deadline=None, max_examples=100)
@given(st.lists(gaps, min_size=1, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 20))
def test_quantiles_of_counted_gaps_are_numpys(drawn: list[list[int]], chosen: list[bool], at_once: int) -> None:
    """To the last bit, of any selection; the mean to rounding, and the share under a limit exactly."""
    mask = np.array(chosen[: len(drawn)])
    of = columns(np.zeros(len(drawn)), drawn, np.ones(len(drawn))).where(mask)
    kept, streams.CHUNKS_AT_ONCE = streams.CHUNKS_AT_ONCE, at_once
    try:
        counted, plain = of.gaps, np.array([g for part, keep in zip(drawn, mask, strict=True) if keep for g in part]) / 1e6
        assert of.gaps_s.tolist() == plain.tolist()
    finally:
        streams.CHUNKS_AT_ONCE = kept
    assert counted.n == len(plain)
    if len(plain):
        assert counted.quantiles_s([0.5, 0.9, 0.99]) == np.percentile(plain, [50, 90, 99]).tolist()
        assert counted.mean_s == pytest.approx(plain.mean())
        assert counted.share_under(1.0) == (plain < 1.0).mean()
        assert counted.at_s(np.arange(len(plain))).tolist() == np.sort(plain).tolist()


def test_a_stage_is_read_without_the_others(tmp_path: Path) -> None:
    """Stages that share batches (one flush at the end) come apart; all of them are the run."""
    recorded = recording.load(ideal(tmp_path, synthetic.spec((1, 4, 2))))
    parts = [recorded.of(index) for index in range(3)]
    assert [sorted(set(part.copy.tolist())) for part in parts] == [[0], [0, 1, 2, 3], [0, 1]]
    assert [set(part.stage.tolist()) for part in parts] == [{0}, {1}, {2}]
    everything = recorded.streams
    assert len(everything.stage) == sum(len(part.stage) for part in parts)
    assert everything.gaps.n == sum(part.gaps.n for part in parts)
    assert recorded.of(1) is recorded.of(1)
    assert len(recorded.of(7).stage) == 0


def test_batches_lie_where_they_were_found(tmp_path: Path) -> None:
    """Many batches of two stages, in two files, one of them torn: offsets lead to the right rows."""
    run = Run(tmp_path, synthetic.spec((1, 1)))
    for number in range(40):
        run.stream(number, ttft_s=0.25, gaps_s=[0.001 * (number + 1)] * 3, stage=number % 2, copy=number)
        run.requests.flush()
    run.event("stage_start", 0, stage=0)
    path = run.close()
    whole = (path / "requests" / "driver-0.arrow").read_bytes()
    (path / "requests" / "worker1.arrow").write_bytes(whole[: len(whole) // 2])
    recorded = recording.load(path)
    one = recorded.of(1)
    torn = len(one.copy) - 20
    assert 5 < torn < 12
    assert one.copy.tolist() == [*range(1, 40, 2), *range(1, 2 * torn, 2)]
    assert one.gap_total_us.tolist() == [3000 * (number + 1) for number in one.copy]
    assert one.gaps_s.reshape(-1, 3)[:, 0] == pytest.approx((one.copy + 1) / 1000)
    assert one.first_s - one.sent_s == pytest.approx(0.25)
