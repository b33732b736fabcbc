"""Runs over dates: the trend that was put in comes out as often as its interval says, and what is no series is not made one."""

from __future__ import annotations

import datetime as dt
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilocopy import history
from kilocopy.history import Point
from kilocopy.problem import ProblemError
from tests import summaries


def point(days: float, usd: float, **changes: Any) -> Point:
    start = dt.datetime(2025, 1, 1, tzinfo=dt.UTC) + dt.timedelta(days=days)
    known: dict[str, Any] = {"id": f"r{days}", "started_at": start, "versions": {}, "kilocopy_version": "0.1.0", "copies": 64.0}
    known |= {"tokens_per_s": 1 / usd, "usd_per_page": usd, "wh_per_page": usd, "energy_source": "measured", "prices": "{}"}
    return Point(**(known | changes))


def folder(where: Path, runs: list[tuple[str, float, dict[str, Any]]], name: str = "suite") -> Path:
    """Run directories with a summary each: when it started, its $/page, and what else its manifest says."""
    for number, (started_at, usd, more) in enumerate(runs):
        tree = summaries.good().model_dump(mode="json")
        tree["run"] |= {"id": f"r{number}", "name": name, "started_at": started_at} | more
        for stage in tree["stages"]:
            stage["cost"]["usd_per_page"] = {"mid": usd, "low": None, "high": None}
        path = where / f"{number}_{name}"
        path.mkdir(parents=True)
        (path / "summary.json").write_text(json.dumps(tree))
    return where


def test_a_known_trend_lies_in_its_interval_as_often_as_it_says() -> None:
    """A page that gets 20 % cheaper a year under 3 % of noise, twelve monthly runs, 1,000 times."""
    draw, held = np.random.default_rng(1), 0
    for _ in range(1000):
        days = np.arange(12) * 30.4
        usd = 1e-3 * np.exp(math.log(0.8) * days / 365.25 + draw.normal(0, 0.03, 12))
        found = history.trend("usd_per_page", [point(float(d), float(u)) for d, u in zip(days, usd, strict=True)])
        assert found.low is not None
        assert found.high is not None
        held += found.low <= -0.2 <= found.high
    assert 0.93 < held / 1000 < 0.97


def test_a_line_without_noise_is_found_exactly() -> None:
    found = history.trend("usd_per_page", [point(365.25 * n, 0.5**n) for n in range(4)])
    assert found.per_year == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([point(0, 1.0), point(300, 0.9)], "2 runs with this figure, and a trend needs 3"),
        ([point(0, 1.0), point(0.1, 1.1), point(0.2, 0.9)], "all runs are of one day"),
        ([point(day + n / 100, 1.0 + n / 1000) for day in (0, 300) for n in range(10)], "all runs are of 2 days, and a trend needs 3"),
        ([point(0, 1.0), point(100, 1.0), point(300, 1.0 + 1e-15)], "it is the same in all runs"),
        ([point(0, 1.0), point(1, 1.5), point(2, 0.9)], "2 days are too few for a rate a year"),
    ],
)
def test_what_the_data_do_not_carry_is_not_fitted(points: list[Point], said: str) -> None:
    found = history.trend("usd_per_page", points)
    assert found.per_year is None
    assert said in found.missing


def test_joules_of_two_sources_are_no_line() -> None:
    found = history.trend("wh_per_page", [point(100.0 * n, 1.0, energy_source="assumed" if n else "measured") for n in range(4)])
    assert found.missing == "the energy is assumed in some runs and measured in others"


def test_facility_energy_of_another_pue_is_no_line() -> None:
    points = [point(100.0 * n, 1.0 + n / 10, prices=f'{{"pue": {{"value": {1.5 - n / 10}}}}}') for n in range(4)]
    assert history.trend("wh_per_page", points).missing == "PUE is another in some of the runs"
    assert history.trend("tokens_per_s", points).per_year is not None


def test_a_folder_becomes_series(tmp_path: Path) -> None:
    """Three months of one suite over two versions; a run of another page length is a series of its own; another schema is passed over."""
    runs = [(f"2026-0{n}-01T00:00:00+00:00", 0.01 * 0.9**n, {"versions": {"vllm": f"0.2{n}.0"}}) for n in (3, 1, 2, 4)]
    folder(tmp_path / "a", runs)
    spec = summaries.good().run["spec"] | {"page": {"words": 250}}
    folder(tmp_path / "b", [("2026-05-01T00:00:00+00:00", 0.02, {"spec": spec})], name="other")
    old = tmp_path / "c"
    old.mkdir()
    (old / "summary.json").write_text(json.dumps({"schema_version": 1, "run": {}}))
    rows, passed_over = history.read(str(tmp_path))
    assert len(passed_over) == 1
    assert "schema 1" in passed_over[0]
    series = history.group(rows)
    assert [len(one.points) for one in series] == [4, 1]
    first = series[0]
    assert [one.versions["vllm"] for one in first.points] == ["0.21.0", "0.22.0", "0.23.0", "0.24.0"]
    assert first.points[0].usd_per_page == pytest.approx(0.009)
    shown = next(s for s in summaries.good().stages if s.index == summaries.good().headline.n_slo_stage)
    assert first.points[0].copies == shown.copies.asked
    assert first.points[0].tokens_per_s == pytest.approx(shown.throughput.output_tokens_per_s.value if shown.throughput else 0)
    trend = first.trends[0]
    assert trend.per_year == pytest.approx(math.exp(math.log(0.9) * 365.25 / 30) - 1, rel=0.02)
    same, _ = history.read(f"file://{tmp_path}")
    assert same == rows
    sheet = history.sheet(str(tmp_path), series, passed_over)
    assert sheet.headline.startswith("suite · ")
    assert "a year [" in sheet.headline


def test_runs_without_a_model_are_no_points_of_a_model_and_changed_settings_are_said(tmp_path: Path) -> None:
    """A simulated engine's speed on a line with a real one's would be a trend of nothing."""
    spec = summaries.good().run["spec"]
    cluster = spec.get("cluster") or {}
    days = [f"2026-0{n}-01T00:00:00+00:00" for n in (1, 2, 3)]
    folder(tmp_path / "a", [(day, 0.01 + n / 1000, {}) for n, day in enumerate(days)])
    folder(tmp_path / "b", [(days[0], 0.02, {"spec": spec | {"cluster": cluster | {"simulated_engine": {"step_s": 0.05}}}})])
    assert [len(one.points) for one in history.group(history.read(str(tmp_path))[0])] == [3, 1]
    folder(tmp_path / "c", [("2026-04-01T00:00:00+00:00", 0.01, {"spec": spec | {"cluster": cluster | {"engine": {"dtype": "bfloat16"}}}})])
    series = history.group(history.read(str(tmp_path))[0])
    assert [len(one.points) for one in series] == [4, 1]
    assert any("engine's settings in the specs changed" in said for section in history.sheet("x", series, []).sections for said in section.sentences)


def test_nothing_to_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"no summary\.json in it"):
        history.read(str(tmp_path))
    with pytest.raises(ProblemError, match="no such folder"):
        history.read(str(tmp_path / "nowhere"))
    with pytest.raises(ProblemError, match="cannot be listed"):
        history.read("nostore://bucket/runs")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ProblemError, match="none of 1 summaries can be used"):
        history.read(str(tmp_path))
