"""Measurement against examples worked by hand, and properties that no change of the formulas may lose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilocopy import health, identity, measure, recording, steady, windows
from kilocopy.records import Writer
from kilocopy.spec import SearchStage, Spec
from kilocopy.summary import Check, Reason, Requests, Stage, Window
from tests import synthetic
from tests.synthetic import ANCHOR, Run, ideal
from tests.test_steady import Tokens
from tests.test_streams_columns import columns

seconds = st.floats(0, 100, allow_nan=False)


def stage_of(path: Path, index: int = 0, level: int = 0, *, shares_host: bool = False, **more: Any) -> Stage:
    """One stage of a run directory, measured; `more` goes into its manifest."""
    recorded = recording.load(path)
    manifest = json.loads((path / "manifest.json").read_text()) | {"driver_shares_host": shares_host} | more
    span = next(span for span in windows.spans(recorded.events) if (span.index, span.level) == (index, level))
    return measure.stage(Spec.model_validate(manifest["spec"]), recorded, span, manifest)


def codes(reasons: list[Reason]) -> set[str]:
    return {reason.code for reason in reasons}


def check(stage: Stage, name: str) -> Check:
    return next(check for check in stage.checks if check.name == name)


def one_copy(path: Path, **changes: Any) -> Run:
    return Run(path, synthetic.spec((1,), **changes))


# ------------------------------------------------------------------------------------------------------- a stage by hand


def test_an_ideal_stage(tmp_path: Path) -> None:
    """4 copies, 10 tokens in 1 s each: 40 tokens/s; the window is ramp 1 s + warm-up 1 s to 22 s."""
    stage = stage_of(ideal(tmp_path))
    assert stage.verdict.level == "valid"
    assert stage.window is not None
    assert (stage.window.start_s, stage.window.end_s) == (2.0, 22.0)
    assert stage.throughput is not None
    assert stage.throughput.output_tokens == pytest.approx(800)
    assert stage.throughput.output_tokens_per_s.value == pytest.approx(40)
    assert stage.throughput.output_tokens_per_s_per_copy == pytest.approx(10)
    assert stage.throughput.output_tokens_per_s_per_device == pytest.approx(20)
    assert stage.throughput.output_tokens_per_s_per_replica == pytest.approx(20)
    assert stage.throughput.words_per_token == pytest.approx(0.5)
    assert stage.throughput.words_per_s == pytest.approx(20)
    assert stage.throughput.pages == pytest.approx(0.8)
    assert stage.throughput.pages_per_hour == pytest.approx(144)
    assert stage.throughput.requests_per_s == pytest.approx(4)
    assert stage.copies.n_run_client == pytest.approx(4)
    assert stage.copies.n_human == pytest.approx({"238": 20 * 60 / 238, "150": 8, "600": 2})
    assert (stage.copies.slo_held, stage.copies.slo_attainment) == (True, 1.0)
    assert [check.outcome for check in stage.checks] == ["passed"] * 3
    assert stage.requests.sent == stage.requests.ok == 88


def test_latency_of_an_ideal_stage(tmp_path: Path) -> None:
    latency = stage_of(ideal(tmp_path)).latency
    assert latency is not None
    for found, expected in ((latency.ttft_s, 0.1), (latency.tpot_s, 0.1), (latency.itl_s, 0.1), (latency.e2e_s, 1.0)):
        assert found is not None
        assert (found.p50, found.p99) == pytest.approx((expected, expected))
    assert latency.send_lag_s is not None
    assert latency.send_lag_s.p99 == 0


def test_only_tokens_that_arrived_in_the_window_count(tmp_path: Path) -> None:
    """One stream from 0 s to 30 s, a token each second from 1 s: the window from 2 s to 22 s holds 20 of its 30 tokens."""
    run = one_copy(tmp_path)
    run.stream(0, ttft_s=1, gaps_s=[1.0] * 29)
    run.marks(0, 0, 22, 30)
    stage = stage_of(run.end(32))
    assert stage.throughput is not None
    assert stage.throughput.output_tokens == pytest.approx(20)
    assert stage.requests.in_window_ok == 0
    assert stage.copies.slo_held is None
    assert "slo-not-judged" in codes(stage.verdict.notes)
    assert check(stage, "littles_law").outcome == "not_checked"


def test_a_chunk_of_several_tokens_counts_as_many(tmp_path: Path) -> None:
    """10 chunks stand for 30 tokens: 30 tokens/s, gaps of 0.1 s, 1/30 s per token."""
    run = one_copy(tmp_path)
    run.stage(output_tokens=30)
    stage = stage_of(run.end(25))
    assert stage.throughput is not None
    assert stage.latency is not None
    assert stage.latency.icl_s is not None
    assert stage.latency.itl_s is not None
    assert stage.throughput.output_tokens_per_s.value == pytest.approx(30)
    assert stage.latency.icl_s.p50 == pytest.approx(0.1)
    assert stage.latency.itl_s.p50 == pytest.approx(0.1 / 3)


def test_the_window_waits_for_the_last_copys_first_token(tmp_path: Path) -> None:
    run = Run(tmp_path, synthetic.spec((2,)))
    for copy, ttft_s in ((0, 0.5), (1, 7.0)):
        run.stream(0, ttft_s=ttft_s, gaps_s=[0.1] * 200, copy=copy)
    run.marks(0, 0, 20, 28)
    window = stage_of(run.end(30)).window
    assert window is not None
    assert (window.start_s, window.end_s) == (7.0, 20.0)
    assert "last copy's first token" in window.rule


@pytest.mark.parametrize(("late_s", "found"), [(18.5, True), (19.998, False)])
def test_a_moment_is_no_window(tmp_path: Path, late_s: float, found: bool) -> None:
    """The last copy's first token comes 2 ms before the end: all tokens of that moment over 2 ms would be a speed of nobody."""
    run = Run(tmp_path, synthetic.spec((2,)))
    for copy, ttft_s in ((0, 0.5), (1, late_s)):
        run.stream(0, ttft_s=ttft_s, gaps_s=[0.1] * 200, copy=copy)
    run.marks(0, 0, 20, 40)
    stage = stage_of(run.end(41))
    assert (stage.window is not None, stage.throughput is not None) == (found, found)
    if not found:
        assert "the window would begin at 20.0 s" in stage.verdict.reasons[0].sentence


def test_errors_are_in_flight_but_not_in_the_tokens(tmp_path: Path) -> None:
    """A broken stream keeps its place among the copies; its chunks are no output."""
    run = one_copy(tmp_path)
    run.stage()
    run.stream(5, gaps_s=[0.1] * 49, outcome="truncated", output_tokens=None, copy=0)
    stage = stage_of(run.end(25))
    assert stage.throughput is not None
    assert stage.throughput.output_tokens == pytest.approx(200)
    assert stage.copies.n_run_client == pytest.approx((20 + 5) / 20)
    assert stage.requests.errors == {"truncated": 1}


def test_slo_counts_the_streams_that_held_it(tmp_path: Path) -> None:
    """Every other stream makes 5 tokens/s where 9 are asked for."""
    run = one_copy(tmp_path)
    at_s = 0.0
    for number in range(15):
        at_s = run.stream(at_s, gaps_s=[0.1 if number % 2 else 0.2] * 9)
    run.marks(0, 0, 22, at_s)
    stage = stage_of(run.end(at_s + 2))
    inside = stage.requests.in_window_ok
    assert stage.copies.slo_attainment == pytest.approx((inside // 2 + inside % 2) / inside, abs=1 / inside)
    assert stage.copies.slo_held is False


def test_the_first_token_is_no_step_of_the_speed(tmp_path: Path) -> None:
    """10 tokens in 0.9 s after the first are 9 / 0.9 = 10 tokens/s, which is not 10.5."""
    run = one_copy(tmp_path, slo={"tokens_per_s_per_copy": 10.5})
    run.stage()
    assert stage_of(run.end(25)).copies.slo_attainment == 0.0


def test_slo_needs_the_ttft_too(tmp_path: Path) -> None:
    run = one_copy(tmp_path, slo={"tokens_per_s_per_copy": 1, "ttft_s": 0.05})
    run.stage()
    assert stage_of(run.end(25)).copies.slo_attainment == 0.0


def test_a_stream_of_one_token_has_no_speed_to_miss(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage(gaps_s=[], ttft_s=0.5)
    stage = stage_of(run.end(25))
    assert stage.copies.slo_attainment == 1.0
    assert stage.latency is not None
    assert stage.latency.tpot_s is None
    assert stage.latency.icl_s is None


# ------------------------------------------------------------------------------------------------------------- verdicts


def test_void_when_the_driver_is_too_slow(tmp_path: Path) -> None:
    """A copy that pauses 0.1 s after each stream of 1 s is in flight for 10/11 of the time."""
    run = one_copy(tmp_path)
    for number in range(20):
        run.stream(1.1 * number)
    run.marks(0, 0, 22, 22)
    verdict = stage_of(run.end(24)).verdict
    assert verdict.level == "void"
    assert codes(verdict.reasons) == {"driver-too-slow"}


def test_copies_held_back_by_errors_are_not_the_drivers_fault(tmp_path: Path) -> None:
    run = one_copy(tmp_path, slo={"error_fraction_max": 0.5})
    for number in range(20):
        run.stream(1.1 * number)
        run.failure(1.1 * number + 1.0, 1.1 * number + 1.001, outcome="http_429")
    run.marks(0, 0, 22, 22)
    assert "driver-too-slow" not in codes(stage_of(run.end(24)).verdict.reasons)


def test_void_when_the_rate_falls(tmp_path: Path) -> None:
    """The gaps double halfway through."""
    run = one_copy(tmp_path)
    at_s = 0.0
    while at_s < 22:
        at_s = run.stream(at_s, gaps_s=[0.1 if at_s < 12 else 0.2] * 9)
    run.marks(0, 0, 22, at_s)
    reasons = stage_of(run.end(at_s + 2)).verdict.reasons
    assert codes(reasons) == {"no-steady-state"}
    assert "first half" in reasons[0].sentence


def test_void_with_too_many_errors(tmp_path: Path) -> None:
    """One error beside 20 streams: 4.8 %, where 1 % is allowed."""
    run = one_copy(tmp_path)
    run.stage()
    run.failure(10, 10.5)
    verdict = stage_of(run.end(25)).verdict
    assert codes(verdict.reasons) == {"too-many-errors"}
    assert "4.76 %" in verdict.reasons[0].sentence


def test_copies_that_hang_past_the_window_are_errors(tmp_path: Path) -> None:
    """One of two copies hangs from the middle of the window until its timeout, long after it."""
    run = Run(tmp_path, synthetic.spec((2,)))
    ended_s = [0.0, 0.5]
    for copy, until_s in enumerate((22, 10)):
        while ended_s[copy] < until_s:
            ended_s[copy] = run.stream(ended_s[copy], copy=copy)
    run.failure(ended_s[1], 70, outcome="timeout_stall", copy=1)
    run.marks(0, 0, 22, 70)
    stage = stage_of(run.end(75))
    assert stage.window is not None
    assert "too-many-errors" in codes(stage.verdict.reasons)


def test_cancelled_streams_are_no_errors(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage()
    run.failure(10, 10.5, outcome="cancelled")
    stage = stage_of(run.end(25))
    assert stage.verdict.level == "valid"
    assert (stage.requests.cancelled, stage.requests.errors) == (1, {})


def test_everything_errors(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    for number in range(20):
        run.failure(number, number + 1, outcome="refused")
    run.marks(0, 0, 20, 20)
    stage = stage_of(run.end(22))
    assert stage.window is None
    assert stage.throughput is None
    assert stage.latency is None
    assert codes(stage.verdict.reasons) == {"no-tokens", "too-many-errors"}
    assert stage.requests.errors == {"refused": 20}


def test_a_copy_without_a_token_leaves_no_window(tmp_path: Path) -> None:
    run = Run(tmp_path, synthetic.spec((3,)))
    run.stream(0, copy=0)
    run.stream(0, copy=1)
    run.marks(0, 0, 20, 20)
    stage = stage_of(run.end(22))
    assert stage.window is None
    assert "1 of 3 copies never got a token" in stage.verdict.reasons[0].sentence


def test_a_stage_shorter_than_its_warm_up(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage(asks_s=1.5)
    stage = stage_of(run.end(5))
    assert stage.window is None
    assert codes(stage.verdict.reasons) == {"no-steady-state"}


def test_a_killed_stage_is_interrupted(tmp_path: Path) -> None:
    """No stop, no drain: the window runs to the last record."""
    run = one_copy(tmp_path)
    run.event("stage_start", 0, stage=0)
    for number in range(15):
        run.stream(number)
    stage = stage_of(run.close())
    assert codes(stage.verdict.reasons) == {"interrupted"}
    assert stage.window is not None
    assert stage.window.end_s == pytest.approx(15)
    assert check(stage, "client_tokens_vs_server").outcome == "not_checked"


def test_a_stage_killed_in_its_drain_is_interrupted_too(tmp_path: Path) -> None:
    """Rows are written at the end of streams: those that were open in the window are missing."""
    run = one_copy(tmp_path)
    run.event("stage_start", 0, stage=0)
    for number in range(21):
        run.stream(number)
    run.event("stage_stop_asking", 20.5, stage=0)
    assert "interrupted" in codes(stage_of(run.close()).verdict.reasons)


def test_a_late_driver_withholds_latency_and_nothing_else(tmp_path: Path) -> None:
    """Lag 11 ms; the limit is 10 % of the median ITL of 0.1 s, 10 ms."""
    run = one_copy(tmp_path)
    run.stage()
    for second in range(20):
        run.lag(2 + second, lag_us=11_000)
    stage = stage_of(run.end(25))
    assert stage.verdict.level == "latency_withheld"
    assert codes(stage.verdict.reasons) == {"driver-lag"}
    assert stage.latency is None
    assert (stage.copies.slo_held, stage.copies.slo_attainment) == (None, None)
    assert stage.ttft_values_s == stage.icl_values_s == []
    assert stage.throughput is not None


def test_lag_within_a_tenth_of_the_itl_is_fine(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage()
    for second in range(20):
        run.lag(2 + second, lag_us=9_000)
    assert stage_of(run.end(25)).verdict.level == "valid"


BUNCHED = (0.2, 0.0) * 4 + (0.1,)  # 4 of 9 gaps are nothing


def test_bunched_chunks_of_a_sleepy_driver_withhold_latency(tmp_path: Path) -> None:
    """The mean gap is 0.1 s; a driver that sleeps for 60 ms can have made the bunches."""
    run = one_copy(tmp_path)
    run.stage(gaps_s=BUNCHED)
    for second in range(20):
        run.lag(2 + second, lag_us=60_000)
    assert codes(stage_of(run.end(25)).verdict.reasons) == {"driver-lag", "bunched-reads"}


def test_bunched_chunks_without_a_lag_record_are_held_against_the_driver(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    at_s = 0.0
    while at_s < 22:
        at_s = run.stream(at_s, gaps_s=BUNCHED)
    run.marks(0, 0, 22, at_s)
    verdict = stage_of(run.end(25)).verdict
    assert codes(verdict.reasons) == {"bunched-reads"}
    assert "driver-lag-unknown" in codes(verdict.notes)


def test_bunched_chunks_under_a_wakeful_driver_are_the_servers(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage(gaps_s=BUNCHED)
    verdict = stage_of(run.end(25)).verdict
    assert verdict.level == "valid"
    assert "bunched-by-server" in codes(verdict.notes)


def test_three_chunks_read_together_are_bunched_too(tmp_path: Path) -> None:
    """6 of 9 gaps are nothing, so the median gap is nothing too."""
    run = one_copy(tmp_path)
    run.stage(gaps_s=(0.3, 0.0, 0.0) * 3)
    stage = stage_of(run.end(25))
    assert "bunched-by-server" in codes(stage.verdict.notes)
    assert stage.driver.workers[0].near_zero_gap_fraction == pytest.approx(6 / 9)


def test_answers_that_were_read_whole_are_bunched(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage(gaps_s=(0.0,) * 9, ttft_s=1.0)
    verdict = stage_of(run.end(25)).verdict
    assert "bunched-reads" in codes(verdict.reasons)


def test_notes_name_the_shared_host_and_a_short_window(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage(asks_s=8)
    stage = stage_of(run.end(12), shares_host=True)
    assert {"driver-shares-host", "short-window", "few-streams", "tokens-not-checked"} <= codes(stage.verdict.notes)
    assert stage.throughput is not None
    assert stage.throughput.output_tokens_per_s.low is None


@pytest.mark.parametrize(
    ("quick", "slow", "rate_per_s", "said"),
    [
        (6, 6, None, None),  # half of them
        (5, 6, None, "Of 11 streams that began inside the window and ended well 5 ended in it, and latencies are of these, rather the quick ones; a window of about 84 s would hold 80 %."),
        (0, 6, None, "ended well 0 ended in it, so there are no latencies of them; a window of about 150 s"),
        (5, 6, 2.0, "rather the quick ones. Throughput"),  # in open loop no length is told
        (0, 0, None, None),
    ],
)
def test_latencies_of_the_quick_streams_alone_are_noted(quick: int, slow: int, rate_per_s: float | None, said: str | None) -> None:
    """Of 1 s and of 30 s, in a window of 20 s; 80 % is told from their mean."""
    took_s = np.array([1.0] * quick + [30.0] * slow)
    sent_s = np.linspace(2, 10, quick + slow)
    blank = columns(sent_s + 0.1, [[]] * len(sent_s), np.ones(len(sent_s)))
    streams = replace(blank, sent_s=sent_s, scheduled_s=sent_s, finished_s=sent_s + took_s)
    stages: list[dict[str, Any]] = [{"arrival": "closed", "copies": 4, "duration_s": 20} if rate_per_s is None else {"arrival": "poisson", "rate_per_s": rate_per_s, "duration_s": 20}]
    asked = Spec.model_validate(synthetic.spec() | {"stages": stages}).stages[0]
    found = measure._quick(streams, Window(start_s=2.0, end_s=22.0, duration_s=20.0, rule=""), asked)  # type: ignore[arg-type]
    assert [reason.code for reason in found] == ["quick-streams"] * (said is not None)
    assert said is None or said in found[0].sentence


def test_a_window_in_which_no_stream_ended_says_so(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage(gaps_s=(1.6,) * 9)
    stage = stage_of(run.end(60))
    assert (stage.requests.in_window_ok, stage.copies.slo_judged) == (0, 1)
    assert "quick-streams" in codes(stage.verdict.notes)
    assert "few-streams" not in codes(stage.verdict.notes)


# -------------------------------------------------------------------------------------------------- the servers' counters


def counted(path: Path, samples: list[tuple[float, float]], **labels: str) -> Stage:
    run = one_copy(path)
    run.stage()  # 22 streams of 10 tokens, drained at 22 s, settled at 23 s
    for at_s, value in samples:
        run.scrape(at_s, labels=json.dumps(labels), generation_tokens_total=value)
    return stage_of(run.end(25))


def test_client_and_server_agree(tmp_path: Path) -> None:
    found = check(counted(tmp_path, [(0, 1000), (10, 1100), (23.5, 1220)]), "client_tokens_vs_server")
    assert (found.left, found.right, found.outcome) == (220, 220, "passed")


def test_over_one_percent_apart_is_void(tmp_path: Path) -> None:
    stage = counted(tmp_path, [(0, 0), (23.5, 223)])
    assert codes(stage.verdict.reasons) == {"counters-disagree"}
    assert "223" in stage.verdict.reasons[0].sentence


def test_just_under_one_percent_is_valid(tmp_path: Path) -> None:
    assert counted(tmp_path, [(0, 0), (23.5, 222)]).verdict.level == "valid"


def test_a_counter_reset_loses_nothing_that_was_scraped(tmp_path: Path) -> None:
    """500 -> 600, restart, 0 -> 120: 100 + 120."""
    found = check(counted(tmp_path, [(0, 500), (10, 600), (15, 20), (23.5, 120)]), "client_tokens_vs_server")
    assert found.right == 220


def test_scrapes_before_the_settling_are_not_the_last(tmp_path: Path) -> None:
    found = check(counted(tmp_path, [(0, 0), (22.5, 150), (23.5, 220), (24.5, 999)]), "client_tokens_vs_server")
    assert found.right == 220


def test_label_sets_and_targets_are_summed(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage()
    for target, labels, last in (("a:1", '{"r": 1}', 100), ("a:1", '{"r": 2}', 70), ("b:1", "{}", 50)):
        run.scrape(0, target, labels, generation_tokens_total=5)
        run.scrape(23.5, target, labels, generation_tokens_total=5 + last)
    assert check(stage_of(run.end(25)), "client_tokens_vs_server").right == 220


def test_a_series_born_in_the_stage_began_at_zero(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage()
    run.scrape(0, num_requests_running=0)
    run.scrape(5, generation_tokens_total=40)
    run.scrape(23.5, generation_tokens_total=220)
    assert check(stage_of(run.end(25)), "client_tokens_vs_server").right == 220


@pytest.mark.parametrize("samples", [[], [(5, 10), (23.5, 230)], [(0, 0), (10, 100)]])
def test_without_scrapes_on_both_sides_nothing_is_checked(tmp_path: Path, samples: list[tuple[float, float]]) -> None:
    stage = counted(tmp_path, samples)
    assert check(stage, "client_tokens_vs_server").outcome == "not_checked"
    assert stage.verdict.level == "valid"
    assert "tokens-not-checked" in codes(stage.verdict.notes)


@pytest.mark.parametrize(("hits", "shared", "noted"), [(0, 0.0, False), (60, 0.0, True), (60, 0.5, True), (52, 0.5, False)])
def test_a_prefix_cache_that_knew_the_prompts_is_noted(tmp_path: Path, hits: float, shared: float, noted: bool) -> None:
    prompts = {"kind": "synthetic", "input_tokens": 10, "shared_prefix_fraction": shared}
    run = one_copy(tmp_path, workload={"prompts": prompts, "output_tokens": 10})
    run.scrape(-1, prefix_cache_hits_total=0, prefix_cache_queries_total=0)
    ended_s = run.stage()
    run.scrape(ended_s + 0.5, prefix_cache_hits_total=hits, prefix_cache_queries_total=100)
    verdict = stage_of(run.end(30)).verdict
    assert verdict.level == "valid"
    assert ("prefix-cache-answered" in codes(verdict.notes)) is noted


def test_two_stages_share_the_scrape_between_them(tmp_path: Path) -> None:
    path = ideal(tmp_path, synthetic.spec((1, 4)))
    assert [check(stage_of(path, i), "client_tokens_vs_server").right for i in (0, 1)] == [220, 880]


def test_chunks_of_broken_streams_are_on_the_clients_side(tmp_path: Path) -> None:
    run = one_copy(tmp_path, slo={"error_fraction_max": 0.9})
    run.stage()
    run.stream(5, outcome="truncated", output_tokens=None)
    run.scrape(0, generation_tokens_total=0)
    run.scrape(23.5, generation_tokens_total=230)
    found = check(stage_of(run.end(25)), "client_tokens_vs_server")
    assert (found.left, found.outcome) == (230, "passed")
    assert "10 chunks of broken streams" in found.sentence


def test_a_gauge_is_weighted_by_time_and_absent_means_zero() -> None:
    """Scrapes at 0, 10, 20 s of 2, 4 and nothing (the counter is still there): trapezoids (3 + 2) x 10 / 20."""
    server = recording.Samples(
        time_s=np.array([0.0, 10.0, 20.0]),
        target=np.array(["a"] * 3, dtype=object),
        name=np.array(["running", "running", "generation"], dtype=object),
        labels=np.array(["{}"] * 3, dtype=object),
        value=np.array([2.0, 4.0, 77.0]),
    )
    assert identity.gauge_mean(server, ["running"], 0, 20) == pytest.approx(2.5)
    assert identity.gauge_mean(server, ["running"], 30, 40) is None
    assert identity.gauge_mean(server, ["nothing"], 0, 20) is None


def test_a_missing_copy_on_the_servers_is_a_note(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage()
    for second in range(23):
        run.scrape(second, num_requests_running=0.8)
    stage = stage_of(run.end(25))
    assert check(stage, "copies_client_vs_server").outcome == "failed"
    assert stage.copies.n_run_server == pytest.approx(0.8)
    assert "copies-client-vs-server" in codes(stage.verdict.notes)
    assert stage.verdict.level == "valid"


# ------------------------------------------------------------------------------------------------------------ arithmetic


def test_batch_means_by_hand() -> None:
    """20 batches of 1 s, alternately 1 and 3 tokens: mean 2, s = sqrt(20/19), half width 2.093024 s / sqrt(20)."""
    estimate = measure.batch_means(np.where(np.arange(20) % 2, 3.0, 1.0), 0, 20)
    half = 2.093024 / np.sqrt(19)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((2, 2 - half, 2 + half), rel=1e-6)


def test_percentiles_by_hand() -> None:
    found = measure.percentiles(np.array([1.0, 2.0, 3.0, 4.0, np.nan]))
    assert found is not None
    assert (found.p50, found.p90, found.p99, found.mean, found.n) == pytest.approx((2.5, 3.7, 3.97, 2.5, 4))


def test_a_significant_drift_is_not_steady() -> None:
    """Rates 88..111 over 24 s: the halves differ by 12 %, the trend moves by 24 / 99.5 of the mean."""
    times_s = np.arange(24) + 0.5
    assert "drifted by +24 %" in str(steady.drift(Tokens(times_s, 88.0 + np.arange(24), np.arange(24)), 0, 24))
    noise = np.where(np.arange(24) % 2, 60.0, 140.0)
    assert steady.drift(Tokens(times_s, noise, np.arange(24)), 0, 24) is None


def test_the_sample_is_bounded_and_keeps_the_ends() -> None:
    kept = measure.sample(np.random.default_rng(0).random(50_000))
    assert len(kept) == measure.VALUES_MAX
    assert kept == sorted(kept)


@settings(deadline=None)
@given(st.lists(seconds, min_size=1))
def test_percentiles_lie_between_the_ends(values: list[float]) -> None:
    found = measure.percentiles(np.array(values))
    assert found is not None
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= max(values)


@settings(deadline=None)
@given(st.lists(st.tuples(seconds, seconds)), seconds, seconds)
def test_the_integral_in_flight_is_the_sum_of_overlaps(intervals: list[tuple[float, float]], a: float, b: float) -> None:
    low, high = sorted((a, b))
    spans = [sorted(pair) for pair in intervals]
    starts, ends = np.array([s for s, _ in spans]), np.array([e for _, e in spans])
    before, after = windows.busy_s(starts, ends, np.array([low, high]))
    assert after - before == pytest.approx(sum(max(0.0, min(e, high) - max(s, low)) for s, e in spans), abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 40))
def test_rise_of_a_reset_counter(steps: list[int], cut: int) -> None:
    """However a counter is reset, what it rose by is the sum of its steps."""
    total, values = 0, [0.0]
    for number, step in enumerate(steps):
        total = step if number == cut else total + step
        values.append(float(total))
    fell = cut < len(steps) and values[cut + 1] < values[cut]
    if cut >= len(steps) or fell:
        assert identity.rise(np.array(values)) == sum(steps)


drawn_streams = st.lists(st.tuples(seconds, st.lists(st.integers(0, 5_000_000), max_size=8), st.integers(1, 50)), min_size=1, max_size=12)


@settings(deadline=None)
@given(drawn_streams, seconds, seconds)
def test_tokens_are_conserved(drawn: list[tuple[float, list[int], int]], a: float, b: float) -> None:
    """All arrivals together are the requests' tokens, in order of time within each, and a window holds no more."""
    firsts, tokens = np.array([first for first, _, _ in drawn]), np.array([float(n) for _, _, n in drawn])
    streams = columns(firsts, [gaps for _, gaps, _ in drawn], tokens)
    times_s, weights = streams.arrivals()
    assert weights.sum() == pytest.approx(tokens.sum())
    expected = [first + sum(gaps[:i]) / 1e6 for first, gaps, _ in drawn for i in range(len(gaps) + 1)]
    assert times_s == pytest.approx(np.array(expected), abs=1e-6)
    low, high = sorted((a, b))
    assert weights[(times_s >= low) & (times_s < high)].sum() <= tokens.sum() + 1e-6


# ----------------------------------------------------------------------------------------------------- processes and hosts


def test_the_first_process_to_stop_ends_the_window(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage()
    run.event("stage_start", 0.2, stage=0)
    run.event("stage_stop_asking", 20.0, stage=0)
    run.event("stage_drained", 24.0, stage=0)
    span = windows.spans(recording.load(run.end(26)).events)[0]
    assert (span.start_s, span.stop_s, span.drained_s) == pytest.approx((0, 20, 24))


def test_a_process_that_did_not_drain_cuts_the_stage_off(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage()
    run.event("stage_start", 0.2, stage=0, process="driver-1")
    assert windows.spans(recording.load(run.end(26)).events)[0].cut_off


def test_a_void_stage_does_not_claim_the_slo(tmp_path: Path) -> None:
    copies = counted(tmp_path, [(0, 0), (23.5, 300)]).copies
    assert (copies.slo_held, copies.slo_attainment) == (None, 1.0)


def test_a_foreign_hosts_clock_goes_over_the_wall_clock(tmp_path: Path) -> None:
    """The meter's host booted 1,000 s later; its reading at the run's 5 s says so after the shift."""
    run = one_copy(tmp_path)
    run.stage()
    foreign_ns = synthetic.BASE_NS - 1_000 * 10**9
    anchor = ANCHOR | {"process": "power-there", "host": "there", "perf_ns": str(foreign_ns)}
    meter = Writer(tmp_path, "energy", "power-there", anchor)
    meter.append({"time_ns": foreign_ns + 5 * 10**9, "device": "GPU", "boundary": "gpu", "energy_j": 1.0})
    meter.close()
    # Events carry the wall clock that belongs to the driver's own.
    lines = (tmp_path / "events" / "driver-0.jsonl").read_text().splitlines()
    moved = [json.loads(line) | {"wall_ns": json.loads(line)["time_ns"] + 1_800_000_000 * 10**9} for line in lines]
    (tmp_path / "events" / "driver-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in moved))
    assert recording.load(run.end(25)).energy.time_s == pytest.approx([5.0])


def test_the_timeline_counts_every_token_once(tmp_path: Path) -> None:
    recorded = recording.load(ideal(tmp_path, synthetic.spec((1, 4))))
    bins = measure.timeline(recorded, windows.spans(recorded.events))
    assert sum(b.output_tokens_per_s for b in bins) == pytest.approx(1100)
    assert [b.t_s for b in bins] == list(range(len(bins)))
    assert {b.stage for b in bins} == {-1, 0, 1}
    assert max(b.in_flight or 0 for b in bins) == pytest.approx(4)
    assert bins[10].server_running == pytest.approx(1)


def test_a_blocked_loop_counts_as_all_the_probes_that_it_missed() -> None:
    """100 probes, one of them 100 ms late: nine more would have been 90, 80, ... 10 ms late, so p99 is not 0."""
    lags_s = np.zeros(200)
    lags_s[7] = 0.1
    none = np.full(1, np.nan)
    kept = recording.Health(
        time_s=none, worker=np.zeros(1, np.int64), cpu_s=none, chunks=none, rss_bytes=none, open_sockets=none,
        lag_counts=np.array([200]), lags_s=lags_s,
    )  # fmt: skip
    assert np.percentile(health.lags_of(kept), 99) > 0.05


def test_a_stream_that_outlasts_the_window_is_judged_by_the_slo(tmp_path: Path) -> None:
    """Two copies, one of them so slow that its stream ends after the window: the SLO is not held by leaving it out."""
    run = synthetic.Run(tmp_path, synthetic.spec((2,)))
    streams = recording.load(run.end(run.stage(0))).streams
    slow = replace(streams, last_s=streams.first_s + 1e6, finished_s=streams.finished_s + 1e6)
    window = Window(start_s=float(streams.sent_s.min()), end_s=float(streams.sent_s.max()), duration_s=1, rule="test")
    known = Spec.model_validate(run.spec)
    asked = known.stages[0]
    assert not isinstance(asked, SearchStage)
    for drawn, everyone in ((streams, 1), (slow, 0)):
        counted = measure.judged(drawn, window, asked)
        assert len(counted.stage) > 10
        assert measure.attaining(counted, known.slo, asked).sum() == everyone * len(counted.stage)


# ------------------------------------------------------------------------------------------------------------- open loop


def open_loop(path: Path, *, seed: int = 1, **changes: Any) -> Run:
    """M/M/infinity: 10 requests/s of 20 tokens on average, 0.1 s each: 20 in flight (residence 0.1 + 1.9 s), 200 tokens/s."""
    run = Run(path, synthetic.timed(**changes))
    drained_s = run.arrivals(*synthetic.poisson(10, 42, 20, seed))
    run.marks(0, 0, 42, drained_s)
    for second in range(42):
        run.lag(second + 0.5)
    return run


def test_an_open_loop_of_known_truth(tmp_path: Path) -> None:
    """The requests of 40 s are Poisson: 400 +- 20, so figures are within 3 / sqrt(400) x sqrt(2) of the truth."""
    stage = stage_of(open_loop(tmp_path).end(60))
    assert (stage.kind, stage.title, stage.copies.asked) == ("poisson", "poisson, 10 requests/s", None)
    assert stage.verdict.level == "valid"
    assert stage.throughput is not None
    assert stage.rate is not None
    assert stage.rate.asked_per_s == 10
    assert stage.rate.planned_per_s == stage.rate.sent_per_s == pytest.approx(10, rel=0.15)
    assert stage.copies.n_run_client == pytest.approx(20, rel=0.22)
    assert stage.throughput.output_tokens_per_s.value == pytest.approx(200, rel=0.22)
    assert "MSER-5" in (stage.window.rule if stage.window else "")


def test_ttft_counts_from_the_plan_in_open_loop(tmp_path: Path) -> None:
    """Sent 30 ms late, first token 100 ms after: 130 ms; from the send 100 ms."""
    run = Run(tmp_path, synthetic.timed())
    for n in range(420):
        run.stream(n / 10 + 0.03, copy=n, scheduled_ns=run.ns(n / 10))
    run.marks(0, 0, 42, 43)
    latency = stage_of(run.end(50)).latency
    assert latency is not None
    found = [latency.ttft_s, latency.ttft_from_send_s, latency.send_lag_s, latency.e2e_s]
    assert [round(one.p50, 6) for one in found if one] == [0.13, 0.1, 0.03, 1.03]


def test_ttft_counts_from_the_send_in_closed_loop(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    at_s = 0.0
    while at_s < 22:
        at_s = run.stream(at_s, scheduled_ns=run.ns(at_s - 0.03))
    run.marks(0, 0, 22, at_s)
    latency = stage_of(run.end(30)).latency
    assert latency is not None
    assert latency.ttft_s is not None
    assert latency.ttft_s.p50 == pytest.approx(0.1)


def test_the_slo_counts_from_the_plan_in_open_loop(tmp_path: Path) -> None:
    """First tokens 0.2 s after the send, 0.24 s after the plan; the SLO allows 0.22 s."""
    tree = synthetic.timed() | {"slo": {"tokens_per_s_per_copy": 9, "ttft_s": 0.22}}
    run = Run(tmp_path, tree)
    for n in range(420):
        run.stream(n / 10 + 0.04, ttft_s=0.2, copy=n, scheduled_ns=run.ns(n / 10))
    run.marks(0, 0, 42, 43)
    assert stage_of(run.end(50)).copies.slo_attainment == 0.0


@pytest.mark.parametrize("kind", ["closed", "open"])
def test_late_sends_void_either_kind(tmp_path: Path, kind: str) -> None:
    run = one_copy(tmp_path) if kind == "closed" else Run(tmp_path, synthetic.timed(duration_s=20))
    for n in range(22):
        run.stream(float(n), copy=n if kind == "open" else 0, scheduled_ns=run.ns(n - 0.06))
    run.marks(0, 0, 22, 22)
    stage = stage_of(run.end(30))
    assert "sends-late" in codes(stage.verdict.reasons)
    assert stage.verdict.level == "void"
    assert stage.driver.limited


def test_drops_are_counted_and_are_no_errors(tmp_path: Path) -> None:
    run = open_loop(tmp_path)
    for n in range(20):
        run.drop(5 + n, copy=1000 + n)
    stage = stage_of(run.end(60))
    told = stage.requests
    assert (told.dropped, told.scheduled, told.errors) == (20, told.sent + 20, {})
    assert codes(stage.verdict.reasons) == {"sends-dropped"}
    assert "the driver had no stream ready" in stage.verdict.reasons[0].sentence
    assert stage.driver.limited
    assert stage.copies.error_fraction == pytest.approx(20 / (20 + told.ok), rel=0.1)


def test_drops_because_the_house_is_full_are_the_servers(tmp_path: Path) -> None:
    """50 streams of 100 s are open, as many as allowed, when arrivals find no room."""
    run = Run(tmp_path, synthetic.timed(max_in_flight=50))
    run.arrivals([0.01 * n for n in range(50)], [100] * 50, gap_s=1.0)
    for n in range(20):
        run.drop(10 + n, copy=100 + n)
    run.marks(0, 0, 42, 101)
    stage = stage_of(run.end(110))
    reason = next(reason for reason in stage.verdict.reasons if reason.code == "sends-dropped")
    assert "max_in_flight (50) was reached, since the server did not keep up" in reason.sentence
    assert not stage.driver.limited


def test_a_full_worker_beside_an_idle_one_is_a_full_house(tmp_path: Path) -> None:
    """25 of worker 0's 25 places are taken when its arrivals find no room; worker 1 has hardly any. Half of them still wait to connect."""
    run = Run(tmp_path, synthetic.timed(max_in_flight=50))
    for n in range(25):
        run.stream(0.01 * n + (40 if n % 2 else 0), gaps_s=[1.0] * 99, copy=2 * n, scheduled_ns=run.ns(0.01 * n))
    for n in range(40):
        run.stream(float(n), copy=2 * n + 1, worker=1)
    for n in range(20):
        run.drop(30 + 0.4 * n, copy=100 + 2 * n)
    run.marks(0, 0, 42, 121)
    stage = stage_of(run.end(130))
    reason = next(reason for reason in stage.verdict.reasons if reason.code == "sends-dropped")
    assert "max_in_flight (50) was reached, since the server did not keep up" in reason.sentence


def test_a_growing_backlog_is_no_steady_state(tmp_path: Path) -> None:
    """5 servers of 1 s each take 5 requests/s; 10 come."""
    run, free_s = Run(tmp_path, synthetic.timed()), [0.0] * 5
    for n in range(420):
        at_s, server = n / 10, n % 5
        begun_s = max(at_s, free_s[server])
        free_s[server] = run.stream(at_s, ttft_s=begun_s - at_s + 0.1, copy=n)
    run.marks(0, 0, 42, max(free_s))
    reasons = stage_of(run.end(120)).verdict.reasons
    backlog = next(reason for reason in reasons if reason.code == "backlog-grows")
    assert "above what the server can take" in backlog.sentence
    assert "10 came and 5 ended" in backlog.sentence


def test_a_slow_start_is_cut_off_the_window(tmp_path: Path) -> None:
    """From 2 s to 10 s every request makes a third of its tokens: the window begins when that is over, and not long after."""
    run = Run(tmp_path, synthetic.timed())
    for n in range(420):
        run.stream(n / 10, gaps_s=[0.1] * (3 if n < 100 else 11), copy=n)
    run.marks(0, 0, 42, 44)
    window = stage_of(run.end(50)).window
    assert window is not None
    assert 9.5 < window.start_s < 16


def test_steps_have_a_row_each(tmp_path: Path) -> None:
    """2 then 4 requests/s for 10 s each after 2 s, 10 tokens in 1 s each: 2 and 4 in flight, 20 and 40 tokens/s."""
    run = Run(tmp_path, synthetic.spec(stages=[{"arrival": "steps", "rates_per_s": [2, 4], "step_s": 10, "warmup_s": 2}]))
    times_s = [n / 2 for n in range(24)] + [12 + n / 4 for n in range(40)]
    run.arrivals(times_s, [10] * 64)
    run.drop(15, copy=99)
    run.marks(0, 0, 22, 23)
    stage = stage_of(run.end(30))
    assert stage.verdict.notes[0].code == "not-steady-by-design"
    assert "no-steady-state" not in codes(stage.verdict.reasons)
    assert [(step.rate_asked_per_s, step.start_s, step.end_s, step.arrivals, step.dropped) for step in stage.steps] == [
        (2, 2, 12, 20, 0),
        (4, 12, 22, 41, 1),
    ]
    assert [step.in_flight for step in stage.steps] == pytest.approx([2, 4], rel=0.05)
    assert [step.output_tokens_per_s for step in stage.steps] == pytest.approx([20, 40], rel=0.05)
    assert [step.ttft_s.p50 for step in stage.steps if step.ttft_s] == pytest.approx([0.1, 0.1])


def test_steps_that_were_cut_short_have_fewer_rows(tmp_path: Path) -> None:
    run = Run(tmp_path, synthetic.spec(stages=[{"arrival": "steps", "rates_per_s": [2, 4, 8], "step_s": 10, "warmup_s": 2}]))
    for n in range(30):
        run.stream(n / 2 + 0.02, copy=n, scheduled_ns=run.ns(n / 2))
    run.marks(0, 0, 15, 16)
    steps = stage_of(run.end(20)).steps
    assert [(step.start_s, step.end_s) for step in steps] == [(2, 12), (12, 15)]
    assert [step.ttft_s.p50 for step in steps if step.ttft_s] == pytest.approx([0.12, 0.12])  # from the plan


def test_later_turns_of_a_conversation_are_no_arrivals(tmp_path: Path) -> None:
    """5 conversations/s of two turns: 10 requests/s end, 5/s were planned and sent."""
    run = Run(tmp_path, synthetic.timed(rate_per_s=5))
    for n in range(210):
        at_s = run.stream(n / 5, copy=n)
        run.stream(at_s, copy=n, sequence=1)
    run.marks(0, 0, 42, 44)
    rate = stage_of(run.end(50)).rate
    assert rate is not None
    assert (rate.planned_per_s, rate.sent_per_s) == pytest.approx((5, 5), rel=0.02)
    assert rate.ended_per_s == pytest.approx(10, rel=0.02)


def test_a_ramp_is_not_steady_by_design(tmp_path: Path) -> None:
    stage = {"arrival": "ramp", "from_rate_per_s": 1, "to_rate_per_s": 9, "duration_s": 20, "warmup_s": 1}
    run = Run(tmp_path, synthetic.spec(stages=[stage]))
    run.arrivals([float(np.sqrt(5 * n)) for n in range(80)], [10] * 80)
    run.marks(0, 0, 21, 22)
    found = stage_of(run.end(30))
    assert found.verdict.level == "valid"
    assert found.title == "ramp, 1 to 9 requests/s"
    assert found.rate is not None
    assert found.rate.asked_per_s == 5


# --------------------------------------------------------------------------------------------------------- several workers


def two_workers(path: Path, *, lag_us: int = 100, **health_: Any) -> Run:
    """Two copies of two workers; the second one's loop is as late as stated, in one probe of a hundred seconds."""
    run = Run(path, synthetic.spec((2,)))
    for copy in range(2):
        at_s = copy / 2
        while at_s < 22:
            at_s = run.stream(at_s, copy=copy, worker=copy)
    run.marks(0, 0, 22, 23)
    for second in range(22):
        run.lag(second + 0.5, worker=0, cpu_s=0.2 * second, chunks=10 * second)
        run.lag(second + 0.5, worker=1, lag_us=lag_us, **{name: value * second for name, value in health_.items()})
    return run


def test_workers_are_told_apart(tmp_path: Path) -> None:
    driver = stage_of(two_workers(tmp_path, cpu_s=0.4, chunks=10).end(30)).driver
    assert [one.cpu_fraction for one in driver.workers] == pytest.approx([0.2, 0.4])
    assert [one.events_per_s for one in driver.workers] == pytest.approx([10, 10])
    assert driver.events_per_s == pytest.approx(20)
    assert not driver.limited
    assert driver.cure is None
    assert sum(driver.workers[1].loop_lag_counts) == 200


def test_the_worst_worker_is_judged_not_the_mean(tmp_path: Path) -> None:
    """11 ms in every 100th probe of one of ten workers is p99 = 0.1 ms when pooled; the limit is 10 ms."""
    run = two_workers(tmp_path)
    for worker in range(2, 10):
        for second in range(22):
            run.lag(second + 0.5, worker=worker)
    run.lag(10.5, worker=1, loop_lag_us=[20_000] * 6)
    stage = stage_of(run.end(30))
    assert stage.verdict.level == "latency_withheld"
    assert "of worker 1" in stage.verdict.reasons[0].sentence
    pooled = np.concatenate([[0.0001] * 2000, [0.02] * 6])
    assert np.percentile(pooled, 99) < 0.01


def test_sends_are_judged_worker_by_worker(tmp_path: Path) -> None:
    """1,050 requests, 5 of the 50 of worker 1 are 80 ms late: p99 of all is 0, of worker 1 it is 80 ms."""
    run = Run(tmp_path, synthetic.timed(rate_per_s=25))
    for n in range(1050):
        late_s = 0.08 if n % 210 == 105 else 0.0
        run.stream(n / 25 + late_s, copy=n, worker=int(n % 21 == 0), scheduled_ns=run.ns(n / 25))
    run.marks(0, 0, 42, 44)
    stage = stage_of(run.end(50))
    assert [(one.send_lag_p99_s or 0) > 0.05 for one in stage.driver.workers] == [False, True]
    late = next(reason for reason in stage.verdict.reasons if reason.code == "sends-late")
    assert "of worker 1" in late.sentence
    assert stage.latency is not None
    assert stage.latency.send_lag_s is not None
    assert stage.latency.send_lag_s.p99 == 0


def test_a_worker_without_idle_time_withholds_latency_and_says_what_would_do(tmp_path: Path) -> None:
    run = two_workers(tmp_path, cpu_s=0.99)
    path = run.end(30)
    stage = stage_of(path, driver_roofline={"events_per_s": 100, "cores": 8})
    assert codes(stage.verdict.reasons) == {"driver-cpu"}
    assert stage.verdict.level == "latency_withheld"
    assert "99 % of a core" in stage.verdict.reasons[0].sentence
    assert stage.driver.cure is not None
    assert "another host" not in stage.driver.cure  # 0.2 + 0.99 cores: two workers would do, evenly loaded
    assert "another host" in (stage_of(path, shares_host=True).driver.cure or "")


def test_the_cure_counts_workers(tmp_path: Path) -> None:
    """0.99 cores of one worker: two at 70 %; this host has one core."""
    run = one_copy(tmp_path)
    run.stage()
    for second in range(22):
        run.lag(second + 0.5, cpu_s=0.99 * second, chunks=10 * second)
    path = run.end(30)
    driver = stage_of(path, driver_roofline={"events_per_s": 100, "cores": 8}).driver
    assert driver.cure is not None
    assert driver.cure.startswith("--workers 2 (0.99 cores of work")
    assert driver.roofline_fraction == pytest.approx(0.1)
    assert "10 % of what this machine's driver can read" in driver.sentence
    assert "several" in (stage_of(path, driver_roofline={"cores": 1}).driver.cure or "")


def test_a_lost_worker_voids_its_stage_and_keeps_its_records(tmp_path: Path) -> None:
    run = Run(tmp_path, synthetic.spec((2,)))
    for copy in range(2):
        at_s = copy / 2
        while at_s < (22 if copy == 0 else 9):
            at_s = run.stream(at_s, copy=copy, worker=copy)
    run.event("stage_start", 0.0, stage=0, process="worker0")
    run.event("stage_start", 0.0, stage=0, process="worker1")
    run.event("worker_lost", 10, worker=1, stage=0, level=0, process="master")
    run.event("stage_stop_asking", 22, stage=0, process="worker0")
    run.event("stage_drained", 23, stage=0, process="worker0")
    run.event("stage_settled", 24, stage=0, process="master")
    run.scrape(-1, generation_tokens_total=0)
    run.scrape(24.5, generation_tokens_total=320)
    stage = stage_of(run.end(30))
    assert codes(stage.verdict.reasons) == {"worker-lost"}
    assert "worker 1 was lost" in stage.verdict.reasons[0].sentence
    assert "driver.log" in (stage.driver.cure or "")
    assert {one.worker for one in stage.driver.workers} == {0, 1}
    assert stage.requests.sent > 22
    assert check(stage, "client_tokens_vs_server").outcome == "not_checked"


@pytest.mark.parametrize(("missing", "closed", "void"), [(0, True, False), (1, True, True), (1, False, False)])
def test_rows_that_were_lost_void_the_stage(tmp_path: Path, missing: int, closed: bool, void: bool) -> None:
    """22 requests are recorded, and one was dropped; a worker that was killed has more open than it could keep."""
    run = one_copy(tmp_path)
    run.stage()
    run.drop(30, level=7)
    run.lag(24, sent=22 + missing)
    if closed:
        run.event("run_end", 25, reason="complete", process="worker0")
    reasons = stage_of(run.end(25)).verdict.reasons
    assert codes(reasons) == ({"rows-missing"} if void else set())
    assert not void or "worker 0 sent 23 and kept 22" in reasons[0].sentence


@pytest.mark.parametrize("window", [True, False])
def test_a_host_without_sockets_is_the_drivers_limit(tmp_path: Path, window: bool) -> None:
    run = one_copy(tmp_path)
    if window:
        run.stage()
    else:
        run.marks(0, 0, 22, 22)
    run.failure(10, 10.0, "refused")
    run.event("sockets_exhausted", 23, stage=0, level=0, requests=1)
    stage = stage_of(run.end(25))
    assert "driver-sockets" in codes(stage.verdict.reasons)
    assert stage.driver.limited
    assert "ulimit" in (stage.driver.cure or "")


def test_a_worker_lost_after_it_drained_harms_nothing(tmp_path: Path) -> None:
    run = one_copy(tmp_path)
    run.stage()
    run.event("stage_drained", 22, stage=0, process="worker1")
    run.event("worker_lost", 22.5, worker=1, stage=0, level=0, process="master")
    assert stage_of(run.end(30)).verdict.level == "valid"


# -------------------------------------------------------------------------------------------------------- old records


def test_records_without_the_new_columns_are_read(tmp_path: Path) -> None:
    """What version 1 wrote: no `level`, no `worker` in the driver's rows."""
    path = ideal(tmp_path)
    before = stage_of(path)
    for kind, gone in (("requests", "level"), ("driver", "worker")):
        for file in (path / kind).glob("*.arrow"):
            with pa.ipc.open_stream(file.read_bytes()) as stream:
                batches = [batch.drop_columns([gone]) for batch in stream]
            with pa.ipc.new_stream(file, batches[0].schema) as out:
                for batch in batches:
                    out.write_batch(batch)
    assert stage_of(path) == before


@pytest.mark.parametrize(("sent", "dropped"), [(9, 1), (10, 1)])
def test_requests_that_do_not_add_up_are_refused(sent: int, dropped: int) -> None:
    with pytest.raises(ValueError, match="do not add up"):
        Requests(scheduled=10, sent=sent, ok=8, errors={"refused": 1}, cancelled=1, dropped=dropped, in_window_ok=0)
    assert Requests(scheduled=11, sent=10, ok=8, errors={"refused": 1}, cancelled=1, dropped=1, in_window_ok=0)
