"""Starting the driver, following it, and asking an endpoint beforehand whether it can be driven."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kilocopy import driving, records
from kilocopy.problem import ProblemError
from tests.faults import Server
from tests.test_driver import spec

pytestmark = [pytest.mark.alone, pytest.mark.timeout(60)]
PROGRESS = {
    "t": 1.0, "stage": 0, "stages": 2, "copies": 4, "phase": "window", "in_flight": 4, "tokens_per_s": 400.0,
    "requests_ok": 1234, "errors": {"http_429": 3}, "eta_s": 61.2, "level": 0, "kind": "closed", "rate_per_s": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("refuse", "cannot be reached"),
        ("close_early", "does not speak HTTP"),
        ("silence", "no answer within 0.5 s"),
        ("garbage", "does not speak HTTP"),
        ("wrong_type", "not as an OpenAI-like endpoint"),
        ("http_401", "KILOCOPY_API_KEY"),
        ("http_404", "no such model"),
        ("http_429", "limits its requests"),
        ("http_500", "fails by itself"),
    ],
)
def test_the_probe_says_what_is_wrong_in_one_sentence(mode: str, said: str) -> None:
    with Server(mode) as server, pytest.raises(ProblemError, match=said) as caught:
        driving.probe(server.url, "m", "sk-secret", 0.5)
    sentence = str(caught.value)
    assert server.url in sentence
    assert "\n" not in sentence
    assert "sk-secret" not in sentence


@pytest.mark.parametrize("url", ["", "localhost", "ftp://h", "http://", "http://h:port"])
def test_the_probe_wants_an_address(url: str) -> None:
    with pytest.raises(ProblemError):
        driving.probe(url, "m", None, 0.5)


def test_the_probe_is_content_with_a_good_endpoint() -> None:
    with Server("ok") as server:
        driving.probe(server.url, "m", None, 5)
        driving.probe(server.url + "/v1", "m", None, 5, endpoint="chat")
        assert [head.split()[1] for head in server.heads] == ["/v1/completions", "/v1/chat/completions"]


def make_run(run_dir: Path, *stages: dict[str, Any]) -> Any:
    played = spec(*stages)
    records.write_json(run_dir / "manifest.json", {"spec": played.model_dump(mode="json")})
    return played


def test_a_drive_reports_its_progress_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOCOPY_SETTLE_S", "0.2")
    seen: list[dict[str, Any]] = []
    with Server("ok") as server:
        played = make_run(tmp_path, {"copies": 2, "duration_s": 2})
        assert driving.drive(tmp_path, server.url, played, api_key=None, web=False, on_progress=seen.append) == 0
    assert set(PROGRESS) == set(seen[0])
    assert seen[-1]["requests_ok"] > 0
    assert records.read_events(tmp_path)[-1]["reason"] == "complete"


def test_workers_are_started_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOCOPY_SETTLE_S", "0.2")
    seen: list[dict[str, Any]] = []
    with Server("ok") as server:
        played = make_run(tmp_path, {"copies": 4, "duration_s": 3})
        assert driving.drive(tmp_path, server.url, played, api_key=None, web=False, on_progress=seen.append, workers=2) == 0
    assert {row["worker"] for row in records.read(tmp_path, "requests").to_pylist()} == {0, 1}
    assert max(progress["in_flight"] for progress in seen) <= 4
    assert seen[-1]["requests_ok"] > 0


@pytest.mark.parametrize(
    ("progress", "said"),
    [
        ({}, "copies 4/4"),
        ({"kind": "search", "level": 2}, "search 3: copies 4/4"),
        ({"kind": "poisson", "copies": None, "rate_per_s": 2.5}, "poisson 2.5/s, 4 in flight"),
        ({"kind": "search", "level": 0, "copies": None, "rate_per_s": 8.0}, "search 1: poisson 8/s, 4 in flight"),
        ({"kind": "trace", "copies": None}, "trace, 4 in flight"),
    ],
)
def test_the_progress_line_says_the_load(progress: dict[str, Any], said: str) -> None:
    with driving.ProgressPrinter(Console(file=io.StringIO()), spec({"copies": 4, "requests": 1})) as printer:
        assert f"  {said}  " in printer.line(PROGRESS | progress)


def interrupt_once_it_runs(run_dir: Path) -> None:
    deadline = time.monotonic() + 30
    while not any((run_dir / "events").glob("*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_is_passed_on_once(tmp_path: Path) -> None:
    with Server("ok", itl_s=0.02) as server:
        played = make_run(tmp_path, {"copies": 2, "duration_s": 60})
        threading.Thread(target=interrupt_once_it_runs, args=(tmp_path,)).start()
        assert driving.drive(tmp_path, server.url, played, api_key=None, web=False, on_progress=lambda _: None) == 130
    assert records.read_events(tmp_path)[-1]["reason"] == "interrupted"


def test_a_failed_driver_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    played = make_run(tmp_path, {"copies": 2, "duration_s": 60})
    assert driving.drive(tmp_path, "nonsense", played, api_key=None, web=False, on_progress=lambda _: None) == 2
    assert "is not an address" in capfd.readouterr().err


def test_the_progress_line_has_what_a_person_wants() -> None:
    out = io.StringIO()
    with driving.ProgressPrinter(Console(file=out, width=200), spec({"copies": 4, "requests": 1})) as printer:
        for _ in range(10):
            printer(PROGRESS)
    assert out.getvalue() == (
        "drive  stage 1/2 window  copies 4/4  400 tokens/s  100.0 per copy  ~2,160 pages/h  1,234 done  http_429 3  1:01 left\n"
    )
