"""The benchmark's own parts: the server keeps its schedule and says so, the loop in C runs, and honest is what it says."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as bench_main
from bench import clients, crosscheck, rows
from bench.levels import Level, honest_streams
from bench.truth import Schedule, build, server
from kilocopy.problem import ProblemError

pytestmark = pytest.mark.alone

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


def level(streams: int, **changes: Any) -> Level:
    times = {"ttft_p50_s": 0.05, "ttft_p99_s": 0.06, "itl_p50_s": 0.02, "itl_p99_s": 0.03}
    truth = {f"true_{name}": value for name, value in times.items()} | {"server_late_p99_s": 0.0001}
    return Level(**({"client": "x", "streams": streams, "events_per_s": 980.0, "ideal_events_per_s": 1000.0} | times | truth | changes))


@pytest.mark.parametrize(
    ("changes", "honest"),
    [
        ({}, True),
        ({"events_per_s": 979.0}, False),
        ({"ttft_p50_s": 0.0599}, True),
        ({"ttft_p50_s": 0.0601}, False),
        ({"ttft_p50_s": 0.0399}, False),  # too good is wrong as well
        ({"itl_p50_s": 0.0209}, True),
        ({"itl_p50_s": 0.0211}, False),
        ({"ttft_p99_s": 1.0, "itl_p99_s": None}, True),  # p99 is shown, not judged
    ],
)
def test_honest_is_events_ttft_and_itl(changes: dict[str, Any], honest: bool) -> None:
    assert level(50, **changes).honest is honest


def test_honest_streams_need_all_smaller_ones_too() -> None:
    bad = {"itl_p50_s": 0.03}
    assert honest_streams([level(50), level(200), level(100)]) == 200
    assert honest_streams([level(50), level(100, **bad), level(200)]) == 50
    assert honest_streams([level(50, **bad), level(100)]) is None
    assert honest_streams([]) is None


def test_what_a_late_server_leaves_unshown_ends_it() -> None:
    late = {"server_late_p99_s": 0.003}
    assert honest_streams([level(50), level(100, **late), level(200)]) == 50
    assert honest_streams([level(50), level(100, **late, itl_p50_s=0.03)]) == 50


def test_ideal_events_are_the_schedules() -> None:
    assert Schedule(0.05, 0.02, 100).ideal_events_per_s(203) == pytest.approx(203 * 100 / 2.03)


def read_stream(port: int, requests: int, tokens: int, endpoint: str = "completions") -> tuple[list[list[float]], list[str]]:
    """Arrival times of the events after each request of one kept connection, and the answers."""
    times: list[list[float]] = []
    answers: list[str] = []
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(requests):
            body = json.dumps({"model": "truth", "prompt": "x", "stream": True, "max_tokens": tokens})
            begun = time.perf_counter()
            client.sendall(f"POST /v1/{endpoint} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            text, own = b"", []
            while not text.endswith(b"0\r\n\r\n"):
                data = client.recv(65536)
                own += [time.perf_counter() - begun] * (data.count(b"data: {") - data.count(b'"choices":[]'))
                text += data
            times.append(own)
            answers.append(text.decode())
    return times, answers


@needs_compiler
def test_the_server_keeps_its_schedule_and_knows_it() -> None:
    with server(Schedule(0.05, 0.02, 30)) as running:
        times, answers = read_stream(running.port, requests=3, tokens=20)
        truth = running.truth()
        running.reset()
        again = running.truth()
    gaps = np.concatenate([np.diff(own) for own in times])
    assert [len(own) for own in times] == [20, 20, 20]
    assert np.median([own[0] for own in times]) == pytest.approx(0.05, abs=0.005)
    assert np.median(gaps) == pytest.approx(0.02, abs=0.002)
    assert (truth["events"], truth["streams"]) == (60, 3)
    assert truth["itl_p50_us"] == pytest.approx(20_000, abs=2000)
    assert truth["late_p50_us"] < 2000
    assert again["events"] == 0
    text = answers[-1]
    payloads = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert payloads[-1]["usage"]["completion_tokens"] == 20
    assert payloads[-2]["choices"][0]["finish_reason"] == "length"
    assert "data: [DONE]" in text


@needs_compiler
@pytest.mark.parametrize(("endpoint", "kind"), [("completions", "cmpl"), ("chat/completions", "chatcmpl")])
def test_each_answer_has_an_id_of_its_own_in_its_head_and_in_all_its_events(endpoint: str, kind: str) -> None:
    """As a real server's: what could be remembered from one answer to the next is not in it."""
    with server(Schedule(0.01, 0.001, 5)) as running:
        _, answers = read_stream(running.port, requests=3, tokens=5, endpoint=endpoint)
    ids = [re.findall(r"x-request-id: (\S+)", answer) for answer in answers]
    assert [len(own) for own in ids] == [1, 1, 1]
    assert len({own[0] for own in ids}) == 3
    for answer, [own] in zip(answers, ids, strict=True):
        assert [json.loads(line[6:])["id"] for line in answer.splitlines() if line.startswith("data: {")] == [f"{kind}-{own}"] * 6


@needs_compiler
def test_the_loop_in_c_reads_what_the_server_sends() -> None:
    with server(Schedule(0.05, 0.02, 30)) as running:
        command = [str(build("floor")), str(running.port), "5", "0.2", "0.2", "1.5", "30"]
        seen = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout)
    assert seen["events"] / seen["seconds"] == pytest.approx(Schedule(0.05, 0.02, 30).ideal_events_per_s(5), rel=0.1)
    assert seen["itl_p50_s"] == pytest.approx(0.02, abs=0.002)
    assert 0 < seen["cpu_s"] < seen["seconds"]


@needs_compiler
def test_the_driver_records_the_truth_at_a_hundred_streams() -> None:
    """Recorded TTFT, ITL and tokens beside a server whose times are known."""
    schedule = Schedule(0.2, 0.1, 20)
    with server(schedule) as running:
        seen = clients.kilocopy(running, schedule, 100, 6, None)
    assert seen.events_per_s == pytest.approx(schedule.ideal_events_per_s(100), rel=0.03)
    assert seen.ttft_p50_s == pytest.approx(seen.true_ttft_p50_s, abs=0.01)
    assert seen.itl_p50_s == pytest.approx(seen.true_itl_p50_s, abs=0.002)
    assert seen.cpu_s_per_event is not None
    assert seen.cpu_s_per_event > 0


def test_vllms_detailed_result_is_counted_in_the_same_window() -> None:
    """Two streams, three tokens each 0.1 s apart, one after the other: the window is from the later first token to the last send."""
    starts = [0.0, 0.1, 0.5, 0.6, 1.0, 1.1]
    result = {"start_times": starts, "ttfts": [0.2] * 6, "itls": [[0.1, 0.1]] * 6, "output_throughput": 12.0, "median_ttft_ms": 200.0}
    seen = crosscheck.figures_of(result, copies=2)
    inside = [start + 0.2 + step for start in starts for step in (0, 0.1, 0.2)]
    assert seen["tokens_per_s"] == pytest.approx(sum(0.3 - 1e-9 <= at < 1.1 for at in inside) / 0.8)
    assert seen["ttft_p50_s"] == pytest.approx(0.2)
    assert seen["tpot_p50_s"] == pytest.approx(0.1)
    assert seen["sent_together"] == 0
    assert crosscheck.sent_together(np.array([0.0, 1.0, 1.01, 1.5, 1.51, 1.52, 2.0]), 1.0, 2.0) == 1.0
    assert crosscheck.sent_together(np.array([1.0, 1.01, 1.5, 1.6]), 1.0, 2.0) == 0.5
    given = crosscheck.figures_of(result, copies=2, window=(0.45, 1.05))
    assert given["tokens_per_s"] == pytest.approx(sum(0.45 <= at < 1.05 for at in inside) / 0.6)
    with pytest.raises(ProblemError, match=r"from -0\.1 s to \+0\.7 s of kilocopy's window of 1\.0 s: not the whole of it"):
        crosscheck.figures_of(result, copies=2, window=(0.4, 1.4))


@needs_compiler
def test_a_void_level_is_played_again_and_every_try_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def client(running: Any, schedule: Any, streams: int, window_s: float, core: Any) -> Level:
        asked.append(streams)
        return level(streams, server_late_p99_s=0.0001 if len(asked) % 2 == 0 else 0.003, server_waited_s=0.5)

    monkeypatch.setattr(clients, "settle", lambda: None)
    found = bench_main.play("x", client, [50], Schedule(), 1, tries=3)
    assert asked == [50, 50]
    assert [one.void for one in found] == [False]
    assert "others had its core for 0.50 s" in capsys.readouterr().out.replace("\n", " ")
    assert [one.void for one in bench_main.play("x", client, [50], Schedule(), 1, tries=1)] == [True]


@needs_compiler
def test_the_server_says_what_it_did_with_its_time() -> None:
    with server(Schedule(0.001, 0.001, 5)) as running:
        running.reset()
        time.sleep(0.05)
        truth = running.truth()
    assert 0 <= truth["busy_s"] < truth["seconds"]
    assert truth["waited_s"] >= 0


def test_the_report_that_is_timed_says_what_a_loop_over_the_rows_says(tmp_path: Path) -> None:
    assert rows.plainly(rows.generate(tmp_path / "run", 40_000)) < 1e-6
