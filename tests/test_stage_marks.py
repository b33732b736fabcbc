"""Stages marked in Grafana during a run, with the records' own times; and a Grafana that fails, which the run never feels."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from kilocopy import dashboards, stage_marks
from kilocopy.grafana import Grafana
from kilocopy.page import render_html
from kilocopy.recompute import summarise
from kilocopy.records import read_events
from kilocopy.spec import Spec
from kilocopy.stage_marks import Marks, annotating
from tests.grafana import TOKEN, FakeGrafana
from tests.synthetic import BASE_NS, Run, spec
from tests.test_experiment import asked, home_of, play
from tests.test_report import without_plotly

ZERO_MS = (1_800_000_000 * 10**9 + BASE_NS) // 10**6


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> FakeGrafana:
    server = FakeGrafana()
    monkeypatch.setenv("GRAFANA_URL", server.url)
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)
    return server


def until(done: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_each_stage_is_a_region_from_its_start_to_its_last_stream(tmp_path: Path, watched: FakeGrafana) -> None:
    run = Run(tmp_path / "r1", spec((4, 8)))
    with watched:
        marks = Marks(Grafana(watched.url), Spec.model_validate(run.spec), "r1")
        run.event("stage_start", 1, stage=0)
        marks.update(read_events(run.path))
        assert (watched.annotations[1]["time"], watched.annotations[1]["timeEnd"]) == (ZERO_MS + 1000, None)
        run.event("stage_stop_asking", 20, stage=0)
        run.event("stage_drained", 22.5, stage=0)
        marks.update(read_events(run.path))
        run.marks(1, 30, 50, 51)
        marks.update(read_events(run.path))
        before = len(watched.writes)
        marks.update(read_events(run.path))
    assert len(watched.writes) == before == 3  # nothing twice
    first, second = watched.annotations[1], watched.annotations[2]
    assert (first["time"], first["timeEnd"]) == (ZERO_MS + 1000, ZERO_MS + 22_500)
    assert (second["time"], second["timeEnd"]) == (ZERO_MS + 30_000, ZERO_MS + 51_000)
    assert first["text"] == "Stage 0: closed, 4 copies"
    assert first["tags"] == ["kilocopy", "run:r1", "model:toy", "stage:0"]
    assert "dashboardUID" not in first  # of the organisation: every dashboard shows it


def test_dashboards_look_for_what_is_written() -> None:
    for board in dashboards.DASHBOARDS:
        [query] = [each["target"] for each in dashboards.document(board)["annotations"]["list"] if each["datasource"]["type"] == "grafana"]
        assert query["tags"] == ["kilocopy", "run:$run"]
        assert not query["matchAny"]  # both


def test_a_search_and_an_interrupted_run(tmp_path: Path, watched: FakeGrafana) -> None:
    search = {"arrival": "search", "start": 4, "limit": 64, "window_s": 15, "warmup_s": 1, "ramp_s": 1}
    run = Run(tmp_path / "r1", spec() | {"stages": [search]})
    run.marks(0, 0, 20, 21, level=0, load=4)
    run.event("stage_start", 25, stage=0, level=1, load=8)
    run.event("run_end", 33, reason="interrupted")
    with watched:
        Marks(Grafana(watched.url), Spec.model_validate(run.spec), "r1").update(read_events(run.path), ended=True)
    assert [mark["text"] for mark in watched.annotations.values()] == ["Stage 0.1: search level 1: 4 copies", "Stage 0.2: search level 2: 8 copies"]
    assert watched.annotations[2]["timeEnd"] == ZERO_MS + 33_000


def test_a_run_is_followed_to_its_end(tmp_path: Path, watched: FakeGrafana, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_marks, "EVERY_S", 0.05)
    run = Run(tmp_path / "r1")
    said: list[str] = []
    with watched:
        with annotating(run.path, Spec.model_validate(run.spec), said.append):
            run.event("stage_start", 0, stage=0)
            until(lambda: bool(watched.annotations))
            run.event("stage_drained", 9, stage=0)  # the last second, which only the last look sees
        assert watched.annotations[1]["timeEnd"] == ZERO_MS + 9000
    assert said == []


@pytest.mark.alone
@pytest.mark.parametrize("how", ["refused", "gone", "hangs", "no address"])
def test_a_grafana_that_fails_costs_the_run_one_warning(tmp_path: Path, watched: FakeGrafana, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(stage_marks, "EVERY_S", 0.01)
    monkeypatch.setattr(stage_marks, "AGAIN_S", 0.02)
    monkeypatch.setattr(stage_marks, "LAST_S", 0.5)
    if how == "refused":
        watched.answers["POST", "/api/annotations"] = (403, {"message": "Access denied"})
    elif how == "hangs":
        watched.before_write = lambda: time.sleep(4)
    elif how == "no address":
        monkeypatch.setenv("GRAFANA_URL", "grafana")
    run = Run(tmp_path / "r1")
    run.event("stage_start", 0, stage=0)
    said: list[str] = []
    begun_s = time.monotonic()
    if how in {"refused", "hangs"}:
        watched.__enter__()
    else:
        watched.server.server_close()
    try:
        with annotating(run.path, Spec.model_validate(run.spec), said.append):
            until(lambda: bool(said) or how == "hangs")
            time.sleep(0.2)
    finally:
        if how in {"refused", "hangs"}:
            watched.__exit__(None, None, None)
    assert time.monotonic() - begun_s < 6
    assert len(said) == (0 if how == "hangs" else 1)  # the run is over before it is known that nobody answers
    assert not any(TOKEN in each for each in said)


def test_nothing_is_asked_of_an_environment_that_names_no_grafana(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRAFANA_URL", "GRAFANA_TOKEN", "GRAFANA_USER", "GRAFANA_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    assert not stage_marks.wanted()
    assert stage_marks.address() is None
    assert not stage_marks.wanted({"GRAFANA_URL": "http://h"})
    assert stage_marks.address({"GRAFANA_URL": "http://admin:secret@h"}) is None
    assert stage_marks.address({"GRAFANA_URL": "http://h:3000/grafana"}) == "http://h:3000/grafana/"
    with annotating(tmp_path, Spec.model_validate(spec()), pytest.fail):
        pass


def linked(run_dir: Path, url: str | None) -> str:
    run = Run(run_dir, grafana_url=url)
    settled_s = run.stage(start_s=2)
    run.event("run_end", settled_s + 1, reason="complete")
    run.close()
    summary = summarise(run_dir)
    assert render_html(summary) == render_html(summarise(run_dir))
    return without_plotly(render_html(summary))


def test_the_report_links_to_the_dashboards_at_the_runs_time(tmp_path: Path) -> None:
    found = re.findall(r'<a href="([^"]+)" rel="noreferrer">([^<]+)</a>', linked(tmp_path / "run", "https://g.example/grafana/"))
    assert [title for _, title in found] == [board.title for board in dashboards.DASHBOARDS]
    for (link, _), board in zip(found, dashboards.DASHBOARDS, strict=True):
        parts = urlsplit(link.replace("&amp;", "&"))
        assert (parts.netloc, parts.path) == ("g.example", f"/grafana/d/{board.uid}")
        asked: dict[str, Any] = parse_qs(parts.query)
        assert (asked["var-cluster"], asked["var-model"], asked["var-run"]) == (["known"], ["toy"], ["T_known"])
        assert int(asked["from"][0]) == ZERO_MS + 2000 - 30_000  # the first event, half a minute earlier
        assert int(asked["to"][0]) - int(asked["from"][0]) < 90_000


def test_an_experiments_report_links_to_each_of_its_parts(tmp_path: Path) -> None:
    """A part is a run of its own: another label, another time; the second one was played without a Grafana."""
    home = home_of(tmp_path / "home", asked("frontier", copies=[4, 8, 16]))
    play(home, "t1", {"4 copies": 0.02, "8 copies": 0.02})
    play(home, "t2", {"16 copies": 0.02})
    path = home / "parts" / "t1" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"grafana_url": "https://g.example/"}))
    page = without_plotly(render_html(summarise(home)))
    found = re.findall(r'<a href="([^"]+)" rel="noreferrer">([^<]+)</a>', page)
    assert [title for _, title in found] == [board.title for board in dashboards.DASHBOARDS]
    asked_of: dict[str, Any] = parse_qs(urlsplit(found[0][0].replace("&amp;", "&")).query)
    assert asked_of["var-run"] == ["t1"]
    first, last = (int(asked_of[end][0]) for end in ("from", "to"))
    events = [event["wall_ns"] / 1e6 for event in read_events(home / "parts" / "t1") if "wall_ns" in event]
    assert (first, last) == (pytest.approx(events[0] - 30_000, abs=1), pytest.approx(events[-1] + 30_000, abs=1))
    assert "<p>4 copies, 8 copies: <a href" in page
    assert re.search(r"16 copies: <code>/d/kilocopy-copies\?[^<]*var-run=t2", page)
    assert page.count("<code>/d/") == 1


def test_without_a_grafana_the_report_gives_the_paths(tmp_path: Path) -> None:
    page = linked(tmp_path / "run", None)
    assert "<code>/d/kilocopy-copies?from=" in page
    assert "<a href" not in page
    assert "<a href" not in linked(tmp_path / "evil", "javascript:alert(1)//")
