"""A worker's metrics page: what it says is what the rows said, read back by Prometheus' own parser."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kilocopy import metrics
from kilocopy.spec import Spec, load
from loadtests.exporter import WAITING_MAX, Exporter, write_file_sd
from tests.test_driver import open_spec

CONSTANT = {"cluster": "smoke", "model": "m", "run": "r1", "worker": "0"}
CHECKOUT = Path(__file__).parent.parent
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def spec() -> Spec:
    closed = {"arrival": "closed", "copies": 4, "duration_s": 5}
    return open_spec(closed, {"arrival": "poisson", "rate_per_s": 2, "duration_s": 5}, slo={"ttft_s": 0.5, "tokens_per_s_per_copy": 10})


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    made = Exporter(CONSTANT, spec())
    yield made
    made.close()


def row(**changes: Any) -> dict[str, Any]:
    """4 tokens after 0.1 s, 0.02 s apart; due 0.45 s before it was sent."""
    made = {"stage": 0, "level": 0, "outcome": "ok", "scheduled_ns": 0, "sent_ns": 450_000_000, "first_token_ns": 550_000_000,
            "last_token_ns": 610_000_000, "output_tokens": 4, "prompt_tokens": 7, "output_words": 3}  # fmt: skip
    return made | changes


def page(exporter: Exporter) -> Series:
    """Every sample of the page, without the run's constant labels."""
    found: Series = {}
    for family in text_string_to_metric_families(exporter.page().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert {name: labels.pop(name) for name in CONSTANT} == CONSTANT
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


GAPS = np.array([20_000, 20_000, 20_001], np.uint32)


def test_counters_and_histograms_are_the_rows(exporter: Exporter) -> None:
    exporter.finished(row(), GAPS)
    exporter.finished(row(first_token_ns=1_050_000_000, last_token_ns=1_110_000_000), GAPS)
    exporter.finished(row(first_token_ns=None, last_token_ns=None, output_tokens=0), np.empty(0, np.uint32))  # an end at once: no text
    exporter.finished(row(outcome="http_429", first_token_ns=None), np.empty(0, np.uint32))
    exporter.finished(row(outcome="cancelled"), GAPS)
    exporter.finished(row(outcome="dropped", stage=1, sent_ns=None), np.empty(0, np.uint32))
    seen, stage = page(exporter), ("stage", "0")
    assert seen["kilocopy_requests_total", (("outcome", "ok"), stage)] == 3
    assert seen["kilocopy_requests_total", (("outcome", "dropped"), ("stage", "1"))] == 1
    assert seen["kilocopy_output_tokens_total", (stage,)] == 8
    assert seen["kilocopy_output_words_total", (stage,)] == 9
    assert seen["kilocopy_prompt_tokens_total", (stage,)] == 21
    assert (seen["kilocopy_slo_judged_total", (stage,)], seen["kilocopy_slo_attained_total", (stage,)]) == (4, 1)
    assert seen["kilocopy_slo_judged_total", (("stage", "1"),)] == 1  # what could not be sent missed it
    gaps = {edge: seen["kilocopy_inter_chunk_seconds_bucket", (("le", edge), stage)] for edge in ("0.015", "0.02", "0.03", "+Inf")}
    assert gaps == {"0.015": 0, "0.02": 4, "0.03": 6, "+Inf": 6}  # a value on an edge is inside
    assert seen["kilocopy_inter_chunk_seconds_sum", (stage,)] == pytest.approx(0.120002)
    assert seen["kilocopy_ttft_seconds_bucket", (("le", "0.1"), stage)] == 1
    assert seen["kilocopy_ttft_seconds_count", (stage,)] == 2
    assert seen["kilocopy_send_lag_seconds_count", (stage,)] == 5


def test_a_page_holds_all_that_finished_before_it(exporter: Exporter) -> None:
    stage = ("stage", "0")
    for finished in range(1, 2 * WAITING_MAX + 2):
        exporter.finished(row(), GAPS)
        if finished % 7 == 0 or finished > 2 * WAITING_MAX:
            seen = page(exporter)
            assert seen["kilocopy_requests_total", (("outcome", "ok"), stage)] == finished
            assert seen["kilocopy_inter_chunk_seconds_count", (stage,)] == finished * len(GAPS)


def test_open_loop_counts_from_when_it_was_due(exporter: Exporter) -> None:
    exporter.finished(row(stage=1), GAPS)
    seen, stage = page(exporter), ("stage", "1")
    assert seen["kilocopy_ttft_seconds_sum", (stage,)] == pytest.approx(0.55)
    assert seen["kilocopy_slo_attained_total", (stage,)] == 0  # 0.55 s from when it was due, 0.1 s from the send


def test_a_sample_is_the_process_now(exporter: Exporter) -> None:
    now = {"phase": "window", "in_flight": 3, "sent": 9, "events": 70, "loop_lag_us": [100, 6000], "cpu_s": 1.5, "rss_bytes": 2**20}
    exporter.sample(stage=0, level=0, copies_asked=4, **now)
    seen = page(exporter)
    assert seen["kilocopy_stage_info", (("kind", "closed"), ("level", "0"), ("phase", "window"), ("stage", "0"))] == 1
    assert (seen["kilocopy_copies_asked", ()], seen["kilocopy_in_flight", ()], seen["kilocopy_stream_events_total", ()]) == (4, 3, 70)
    assert seen["kilocopy_loop_lag_seconds_bucket", (("le", "0.005"),)] == 1
    assert seen["kilocopy_output_words_total", (("stage", "0"),)] == 0  # known before the first request ends: `rate` sees its step
    exporter.sample(stage=-1, level=0, copies_asked=None, **(now | {"phase": "settle"}))
    seen = page(exporter)
    assert not [name for name, _ in seen if name in {"kilocopy_stage_info", "kilocopy_copies_asked"}]  # nothing is played: no zero


def test_prices_are_gauges_and_rent_has_no_electricity_on_top(exporter: Exporter) -> None:
    seen = page(exporter)
    assert seen["kilocopy_usd_per_device_hour", (("kind", "rented"),)] == pytest.approx(0.09)
    assert seen["kilocopy_page_words", ()] == 500
    assert not [name for name, _ in seen if name == "kilocopy_electricity_usd_per_kwh"]


def test_what_is_exported_is_what_is_declared(exporter: Exporter) -> None:
    exporter.finished(row(), GAPS)
    exporter.sample(stage=0, level=0, phase="window", copies_asked=4, in_flight=3, sent=9, events=70, loop_lag_us=[1], cpu_s=1.5, rss_bytes=1)
    declared = {metric.name: metric for metric in metrics.DRIVER_METRICS}
    families = list(text_string_to_metric_families(exporter.page().decode()))
    assert {family.name for family in families} <= set(declared)
    for family in families:
        assert family.documentation == declared[family.name].help
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == {*metrics.RUN_LABELS, *declared[family.name].labels}
    missing = set(declared) - {family.name for family in families if family.samples}
    assert missing == {"kilocopy_electricity_usd_per_kwh"}  # rented here
    assert all(list(m.buckets) == sorted(m.buckets) and math.isfinite(m.buckets[-1]) for m in metrics.DRIVER_METRICS if m.buckets)


def test_series_do_not_grow_with_requests_copies_or_levels(exporter: Exporter) -> None:
    """What a page holds is set by stages and outcomes alone."""

    def played(times: int) -> int:
        for n in range(times):
            exporter.finished(row(copy=n, sequence=n, level=n, replica=f"replica-{n}", error=f"error {n}"), GAPS)
            exporter.finished(row(outcome="http_5xx", error=f"error {n}"), GAPS)
            exporter.sample(stage=0, level=n, phase="window", copies_asked=n, in_flight=n, sent=n, events=n, loop_lag_us=[n], cpu_s=n, rss_bytes=n)
        return len(page(exporter))

    assert played(1) == played(300)


def test_any_name_of_a_model_stands_in_a_label() -> None:
    odd = 'a\\b"c\nd'
    exporter = Exporter(CONSTANT | {"model": odd}, spec())
    try:
        families = list(text_string_to_metric_families(exporter.page().decode()))
        with pytest.raises(urllib.error.HTTPError, match="404"):
            gevent.get_hub().threadpool.apply(urllib.request.urlopen, (f"http://127.0.0.1:{exporter.port}/",))
    finally:
        exporter.close()
    assert {sample.labels["model"] for family in families for sample in family.samples} == {odd}


def test_prometheus_finds_the_page(tmp_path: Path) -> None:
    write_file_sd(tmp_path / "targets/worker0.json", ["127.0.0.1:9"], {"job": "kilocopy"})
    assert json.loads((tmp_path / "targets/worker0.json").read_text()) == [{"targets": ["127.0.0.1:9"], "labels": {"job": "kilocopy"}}]
    assert [file.name for file in (tmp_path / "targets").iterdir()] == ["worker0.json"]


@pytest.mark.alone
def test_a_running_driver_serves_it(tmp_path: Path) -> None:
    """The page of a real driver process, while it drives."""
    from tests.faults import Server
    from tests.test_driver import Drive
    from tests.test_driver import spec as closed_spec

    with Server("ok", tokens=5) as server:
        drive = Drive(tmp_path, server.url, closed_spec({"copies": 3, "duration_s": 30}))
        try:
            drive.until_rows(10)
            target = json.loads((tmp_path / "targets/worker0.json").read_text())[0]["targets"][0]
            assert target.startswith("127.0.0.1:")
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        finally:
            drive.process.kill()
            drive.process.communicate()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    ok = sum(sample.value for sample in samples if sample.name == "kilocopy_requests_total" and sample.labels["outcome"] == "ok")
    assert ok >= 10
    assert load(CHECKOUT / "loadtests/specs/smoke.yaml").name in {sample.labels["cluster"] for sample in samples}


def test_speed_is_judged_by_the_mean_sample() -> None:
    """4 tokens of two samples in 60 ms: one step each, 17 tokens/s."""
    tree = spec().model_dump(mode="json")
    tree["slo"] |= {"tokens_per_s_per_copy": 30, "ttft_s": 5}
    attained = {}
    for samples in (1, 2):
        tree["workload"]["samples"] = samples
        exporter = Exporter(CONSTANT, Spec.model_validate(tree))
        exporter.finished(row(), GAPS)
        attained[samples] = page(exporter)["kilocopy_slo_attained_total", (("stage", "0"),)]
        exporter.close()
    assert attained == {1: 1, 2: 0}
