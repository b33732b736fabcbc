"""The driver as a process: what it records when all goes well, when the server misbehaves, and when it is stopped or killed."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kilocopy import records, schedule
from kilocopy.spec import Spec, load
from loadtests.player import backoff_s
from tests.faults import Server

CHECKOUT = Path(__file__).parent.parent
SMOKE = load(CHECKOUT / "loadtests/specs/smoke.yaml")
pytestmark = [pytest.mark.alone, pytest.mark.timeout(60)]
WAYS = {  # the server's ways, and what a row says of them
    "http_500": "http_5xx", "close_mid": "truncated", "garbage": "bad_stream",
    "http_401": "http_4xx", "stall_mid": "timeout_stall", "ok": "ok",
}  # fmt: skip


def spec(*stages: dict[str, Any], **workload: Any) -> Spec:
    tree = SMOKE.model_dump(mode="json")
    tree["model"]["source"] = "/no/such/model"  # prompts by words: no tokenizer to load
    tree["workload"] |= {"timeouts": {"connect_s": 1, "first_token_s": 1, "stall_s": 0.5}} | workload
    tree["stages"] = [{"arrival": "closed", "warmup_s": 0, "ramp_s": 0.2, **stage} for stage in stages]
    return Spec.model_validate(tree)


def open_spec(*stages: dict[str, Any], slo: dict[str, Any] | None = None) -> Spec:
    tree = spec({"copies": 1, "requests": 1}).model_dump(mode="json")
    tree["stages"] = list(stages)
    tree["slo"] |= slo or {}
    return Spec.model_validate(tree)


class Drive:
    """A driver process at work on a run directory."""

    def __init__(self, run_dir: Path, url: str, played: Spec, *more: str) -> None:
        self.run_dir = run_dir
        records.write_json(run_dir / "manifest.json", {"spec": played.model_dump(mode="json")})
        environment = os.environ | {"KILOCOPY_RUN_DIR": str(run_dir), "KILOCOPY_SETTLE_S": "0.2", "KILOCOPY_API_KEY": "sk-secret"}
        command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--only-summary", "--loglevel", "WARNING"]
        self.process = subprocess.Popen(
            [*command, "--host", url, *(more or ["--headless"])], cwd=CHECKOUT, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.out = self.err = ""

    def wait(self, timeout_s: float = 40) -> int:
        self.out, self.err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode

    def until_rows(self, count: int) -> None:
        self.until(lambda: len(self.rows) >= count)

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not true():
            assert time.monotonic() < deadline, "the rows did not come"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.1)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return records.read(self.run_dir, "requests").to_pylist()

    @property
    def events(self) -> list[str]:
        return [event["event"] for event in records.read_events(self.run_dir)]


@pytest.fixture
def started() -> Iterator[list[Drive]]:
    drives: list[Drive] = []
    yield drives
    for drive in drives:
        if drive.process.poll() is None:
            drive.process.kill()
            drive.process.communicate()


def test_copies_that_share_a_prompt_and_texts_that_are_kept(tmp_path: Path, started: list[Drive]) -> None:
    played = spec({"copies": 4, "requests": 12}, copies_per_prompt=2, keep_texts=True)
    with Server("ok", tokens=10, ttft_s=0.03, itl_s=0.01) as server:
        started.append(drive := Drive(tmp_path, server.url, played))
        assert drive.wait() == 0, drive.err
    texts = records.read(tmp_path, "texts").to_pylist()
    assert sorted((row["copy"], row["sequence"]) for row in texts) == sorted((row["copy"], row["sequence"]) for row in drive.rows)
    prompts: dict[tuple[int, int], set[str]] = {}
    for row in texts:
        assert [len(text.split()) for text in row["texts"]] == [10]
        assert row["answer"] is None
        prompts.setdefault((row["copy"] // 2, row["sequence"]), set()).add(json.loads(row["request"])["prompt"])
    assert {len(said) for said in prompts.values()} == {1}  # two copies ask the same
    assert len(set.union(*prompts.values())) == len(prompts)
    assert "sk-secret" not in str(texts)


def test_stages_follow_one_another_and_are_recorded_whole(tmp_path: Path, started: list[Drive]) -> None:
    played = spec({"copies": 3, "duration_s": 1.5}, {"copies": 5, "requests": 12}, {"copies": 1, "requests": 2})
    with Server("ok", tokens=10, ttft_s=0.03, itl_s=0.01) as server:
        started.append(drive := Drive(tmp_path, server.url, played))
        assert drive.wait() == 0, drive.err
    stage_events = ["stage_start", "stage_stop_asking", "stage_drained", "stage_settled"]
    assert drive.events == ["run_start", *stage_events * 3, "run_end"]
    ends = {(event["event"], event.get("stage")): event["time_ns"] for event in records.read_events(tmp_path)}
    rows = drive.rows
    assert {row["outcome"] for row in rows} == {"ok"}
    assert len({(row["stage"], row["copy"], row["sequence"]) for row in rows}) == len(rows) == len(server.requests)
    for row in rows:
        assert ends["stage_start", row["stage"]] <= row["scheduled_ns"] <= row["sent_ns"] <= row["first_token_ns"]
        assert row["last_token_ns"] <= row["finished_ns"] <= ends["stage_drained", row["stage"]]
        assert row["sent_ns"] <= ends["stage_stop_asking", row["stage"]] + 50e6
        assert (row["chunks"], len(row["gaps_us"]), row["output_tokens"], row["output_words"]) == (10, 9, 10, 10)
    assert {row["copy"] for row in rows if row["stage"] == 0} == {0, 1, 2}
    assert {row["copy"] for row in rows if row["stage"] == 1} == {0, 1, 2, 3, 4}
    warm_ns = ends["stage_start", 1] + 0.2e9
    assert sum(row["stage"] == 1 and row["scheduled_ns"] >= warm_ns for row in rows) == 12
    assert len({request["prompt"] for request in server.requests}) == len(rows)
    assert '"phase": "window"' in drive.out
    told = re.search(r"Aggregated +(\d+)", drive.out + drive.err)
    assert told is not None
    assert int(told[1]) == len(rows)  # Locust heard of each once, of the last too
    health = records.read(tmp_path, "driver").to_pylist()
    assert max(row["in_flight"] for row in health) <= 5
    assert health[-1]["sent"] == health[-1]["finished"] == len(rows)


def test_the_same_spec_asks_the_same(tmp_path: Path, started: list[Drive]) -> None:
    asked = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with Server("ok", tokens=2, itl_s=0) as server:
            started.append(drive := Drive(tmp_path / name, server.url, spec({"copies": 2, "requests": 3, "ramp_s": 0}, endpoint="chat", sampling={"seeded": True})))
            assert drive.wait() == 0, drive.err
        by_seed = {request["seed"]: request for request in server.requests}
        asked.append([by_seed[schedule.request_seed(1, 0, 0, copy, 0)] for copy in (0, 1)])
    assert asked[0] == asked[1]
    assert "messages" in asked[0][0]


def test_failures_are_rows_and_the_copies_go_on(tmp_path: Path, started: list[Drive]) -> None:
    with Server("http_500") as server:
        started.append(drive := Drive(tmp_path, server.url, spec({"copies": 2, "duration_s": 60})))
        for mode, outcome in WAYS.items():
            server.mode = mode
            drive.until(lambda outcome=outcome: any(row["outcome"] == outcome for row in drive.rows))
        drive.process.send_signal(signal.SIGINT)
        assert drive.wait() == 130, drive.err
    assert {row["outcome"] for row in drive.rows} <= {*WAYS.values(), "cancelled"}
    assert all((row["error"] is None) == (row["outcome"] == "ok") for row in drive.rows)
    assert "sk-secret" not in str(drive.rows) + drive.out + drive.err
    assert records.read(tmp_path, "driver").to_pylist()[-1]["sent"] == len(drive.rows)  # errors and cancelled ones too


def test_an_outage_is_no_busy_loop(tmp_path: Path, started: list[Drive]) -> None:
    with Server("refuse") as server:
        started.append(drive := Drive(tmp_path, server.url, spec({"copies": 4, "duration_s": 3})))
        assert drive.wait() == 0, drive.err
    assert {row["outcome"] for row in drive.rows} == {"refused"}
    assert 8 <= len(drive.rows) <= 4 * 7  # 0.1 + 0.2 + 0.4 + ... s apart


def test_copies_do_not_come_back_in_step() -> None:
    pauses_s = [backoff_s(3, copy, 7) for copy in range(200)]
    assert all(0.5 * 0.4 <= pause_s < 1.5 * 0.4 for pause_s in pauses_s)
    assert max(pauses_s) - min(pauses_s) > 0.8 * 0.4
    assert pauses_s == [backoff_s(3, copy, 7) for copy in range(200)]
    assert backoff_s(60, 0, 0) < 1.5 * 5


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_streams_as_cancelled(tmp_path: Path, started: list[Drive], signum: int) -> None:
    with Server("ok", tokens=40, itl_s=0.02) as server:
        started.append(drive := Drive(tmp_path, server.url, spec({"copies": 4, "duration_s": 60})))
        drive.until_rows(4)
        time.sleep(0.3)
        drive.process.send_signal(signum)
        assert drive.wait(15) == 130, drive.err
    assert records.read_events(tmp_path)[-1]["reason"] == "interrupted"
    cancelled = [row for row in drive.rows if row["outcome"] == "cancelled"]
    assert len(cancelled) == 4
    assert any(row["chunks"] > 0 for row in cancelled)


def test_a_killed_driver_leaves_what_it_recorded(tmp_path: Path, started: list[Drive]) -> None:
    with Server("ok", tokens=5) as server:
        started.append(drive := Drive(tmp_path, server.url, spec({"copies": 2, "duration_s": 60})))
        drive.until_rows(5)
        drive.process.kill()
        drive.wait()
    assert len(drive.rows) >= 5
    assert "run_end" not in drive.events


def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path: Path, started: list[Drive]) -> None:
    with Server("ok", tokens=5) as server:
        started.append(drive := Drive(tmp_path, server.url, spec({"copies": 2, "duration_s": 60})))
        drive.until_rows(5)
        size = (tmp_path / "requests/worker0.arrow").stat().st_size
        psutil.Process(drive.process.pid).rlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))  # the kernel refuses to write on
        assert drive.wait(15) == 3, drive.err
    assert "kilocopy: the run ended: its records cannot be written" in drive.err
    assert len(drive.rows) >= 5


def test_the_watcher_gone_ends_the_run(tmp_path: Path, started: list[Drive]) -> None:
    with Server("ok", tokens=5) as server:
        started.append(drive := Drive(tmp_path, server.url, spec({"copies": 1, "duration_s": 60})))
        drive.until_rows(1)
        assert drive.process.stdout is not None
        drive.process.stdout.close()
        assert drive.process.wait(15) == 130


def outcomes(drive: Drive) -> Counter[str]:
    return Counter(row["outcome"] for row in drive.rows)


def test_arrivals_are_sent_when_they_are_due_and_what_finds_no_room_is_dropped(tmp_path: Path, started: list[Drive]) -> None:
    stage = {"arrival": "poisson", "rate_per_s": 40, "duration_s": 3, "warmup_s": 0.5, "max_in_flight": 6}
    played = open_spec(stage)
    with Server("ok", tokens=5, ttft_s=0.1, itl_s=0.01) as server:  # 6 places of 0.14 s each take about 43 requests a second
        started.append(drive := Drive(tmp_path, server.url, played))
        assert drive.wait() == 0, drive.err
        asked = len(server.requests)
    planned = schedule.plan(played, 0).arrivals
    rows = sorted(drive.rows, key=lambda row: row["copy"])
    assert [row["copy"] for row in rows] == [arrival.index for arrival in planned]
    begun_ns = next(event["time_ns"] for event in records.read_events(tmp_path) if event["event"] == "stage_start")
    for row, arrival in zip(rows, planned, strict=True):
        assert row["scheduled_ns"] == pytest.approx(begun_ns + arrival.at_s * 1e9, abs=5e6)
        assert (row["sent_ns"] is None) == (row["outcome"] == "dropped")
    late_s = sorted((row["sent_ns"] - row["scheduled_ns"]) / 1e9 for row in rows if row["sent_ns"] is not None)
    assert late_s[0] >= 0
    assert late_s[len(late_s) // 2] < 0.03
    counts = outcomes(drive)
    assert counts["ok"] == asked
    assert 0 < counts["dropped"] < counts["ok"]
    assert counts["ok"] + counts["dropped"] == len(planned)


def test_a_search_doubles_until_the_server_misses(tmp_path: Path, started: list[Drive]) -> None:
    """The server answers in time, so the search ends at its limit; each level is recorded as one of its own."""
    stage = {"arrival": "search", "start": 1, "limit": 4, "window_s": 2, "warmup_s": 0.2, "ramp_s": 0.1, "repeats": 0}
    played = open_spec(stage)
    with Server("ok", tokens=3, ttft_s=0.1, itl_s=0.02) as server:  # so long that the driver's own time between two requests is none
        started.append(drive := Drive(tmp_path, server.url, played))
        assert drive.wait() == 0, drive.err
    starts = [event for event in records.read_events(tmp_path) if event["event"] == "stage_start"]
    loads = [event["load"] for event in starts]
    assert [event["level"] for event in starts] == list(range(len(starts)))
    assert sorted(set(loads)) == [1, 2, 4]
    assert loads[-1] == 4
    for event in starts:
        copies = {row["copy"] for row in drive.rows if row["level"] == event["level"]}
        assert copies == set(range(round(event["load"])))


def test_a_level_that_the_report_voids_is_played_again(tmp_path: Path, started: list[Drive]) -> None:
    """Every stream holds the SLO, but in the middle of the window the server becomes five times slower: no steady state, so nothing is held yet."""
    stage = {"arrival": "search", "start": 1, "limit": 1, "window_s": 5, "warmup_s": 0.2, "ramp_s": 0.1, "repeats": 0}
    with Server("ok", tokens=10, ttft_s=0.01, itl_s=0.01) as server:
        started.append(drive := Drive(tmp_path, server.url, open_spec(stage, slo={"tokens_per_s_per_copy": 1})))
        drive.until(lambda: "stage_start" in drive.events)
        time.sleep(2.8)
        server.itl_s = 0.05
        assert drive.wait() == 0, drive.err
    assert [event["load"] for event in records.read_events(tmp_path) if event["event"] == "stage_start"] == [1, 1]


def test_a_search_stops_where_the_slo_is_missed(tmp_path: Path, started: list[Drive]) -> None:
    stage = {"arrival": "search", "start": 2, "limit": 64, "window_s": 2, "warmup_s": 0.2, "ramp_s": 0.1, "repeats": 0}
    with Server("ok", tokens=3, ttft_s=0.3, itl_s=0.002) as server:
        started.append(drive := Drive(tmp_path, server.url, open_spec(stage, slo={"ttft_s": 0.1})))
        assert drive.wait() == 0, drive.err
    assert {event["load"] for event in records.read_events(tmp_path) if event["event"] == "stage_start"} == {2, 1}


def test_a_rate_that_finds_no_room_ends_the_search_below_it(tmp_path: Path, started: list[Drive]) -> None:
    """Two places of 0.3 s take 7 requests a second: the arrivals dropped at 20 are errors of that level, and the search goes down."""
    times = {"window_s": 2, "warmup_s": 0.2, "repeats": 0, "precision_fraction": 0.5}
    stage = {"arrival": "search", "over": "rate_per_s", "start": 20, "limit": 20, "max_in_flight": 2, **times}
    with Server("ok", tokens=3, ttft_s=0.3, itl_s=0.002) as server:
        started.append(drive := Drive(tmp_path, server.url, open_spec(stage)))
        assert drive.wait() == 0, drive.err
    assert outcomes(drive)["dropped"] > 0
    loads = [event["load"] for event in records.read_events(tmp_path) if event["event"] == "stage_start"]
    assert list(dict.fromkeys(loads)) == [20, 10]  # one that a busy host made void is played again


def test_several_workers_share_a_stage(tmp_path: Path, started: list[Drive]) -> None:
    played = spec({"copies": 5, "duration_s": 3}, {"copies": 1, "requests": 3}, {"copies": 4, "requests": 8})
    with Server("ok", tokens=10, ttft_s=0.03, itl_s=0.01) as server:
        started.append(drive := Drive(tmp_path, server.url, played, "--headless", "--processes", "2"))
        assert drive.wait() == 0, drive.err
    rows = drive.rows
    assert {row["outcome"] for row in rows} == {"ok"}
    assert len({(row["stage"], row["copy"], row["sequence"]) for row in rows}) == len(rows) == len(server.requests)
    assert {(row["worker"], row["copy"]) for row in rows if row["stage"] == 0} == {(copy % 2, copy) for copy in range(5)}
    events = records.read_events(tmp_path)
    assert {event["process"] for event in events} == {"master", "worker0", "worker1"}
    assert [event["reason"] for event in events if event["event"] == "run_end"] == ["complete"] * 3
    assert [event["process"] for event in events if event["event"] == "stage_stop_asking" and event["stage"] == 1] == ["worker0"]
    warm_ns = 0.2e9 + next(event["time_ns"] for event in events if event["event"] == "stage_start" and event["stage"] == 1 and event["process"] == "worker0")
    counted = sum(row["stage"] == 1 and row["scheduled_ns"] >= warm_ns for row in rows)
    assert counted == 3  # one copy, two workers: none of its requests is left to who has no copy
    begun = [event["time_ns"] for event in events if event["event"] == "stage_start" and event["stage"] == 0]
    assert abs(begun[0] - begun[1]) < 0.2e9


def test_a_level_that_needs_more_users_begins_for_all_workers_at_the_plans_times(tmp_path: Path, started: list[Drive]) -> None:
    """Users come once a second, at each worker at another moment: still the arrivals of both lie on one plan with one beginning."""
    small = {"arrival": "constant", "rate_per_s": 4, "duration_s": 0.5, "warmup_s": 0, "max_in_flight": 2}
    played = open_spec(small, small | {"rate_per_s": 40, "duration_s": 1, "max_in_flight": 60})
    with Server("ok", tokens=3, ttft_s=0.01, itl_s=0.002) as server:
        started.append(drive := Drive(tmp_path, server.url, played, "--headless", "--processes", "2"))
        assert drive.wait() == 0, drive.err
    planned = {arrival.index: arrival.at_s for arrival in schedule.plan(played, 1).arrivals}
    begun_ns = {row["scheduled_ns"] - round(planned[row["copy"]] * 1e9) for row in drive.rows if row["stage"] == 1}
    assert {row["worker"] for row in drive.rows if row["stage"] == 1} == {0, 1}
    assert max(begun_ns) - min(begun_ns) < 1000  # one moment, but for rounding


def test_a_worker_that_dies_is_noted_and_the_others_go_on(tmp_path: Path, started: list[Drive]) -> None:
    played = spec({"copies": 4, "duration_s": 8}, {"copies": 4, "duration_s": 1})
    with Server("ok", tokens=10, ttft_s=0.03, itl_s=0.01) as server:
        started.append(drive := Drive(tmp_path, server.url, played, "--headless", "--processes", "2"))
        drive.until(lambda: {row["worker"] for row in drive.rows} == {0, 1})  # one worker alone may be eight rows ahead
        victim = max(psutil.Process(drive.process.pid).children(), key=lambda child: child.pid)
        victim.kill()
        assert drive.wait() in {0, 1}, drive.err
    events = records.read_events(tmp_path)
    lost = [event for event in events if event["event"] == "worker_lost"]
    assert [event["stage"] for event in lost] == [0]
    alive = 1 - lost[0]["worker"]
    assert {row["worker"] for row in drive.rows if row["stage"] == 0} == {0, 1}  # what it recorded is kept
    second = [row for row in drive.rows if row["stage"] == 1]
    assert {row["worker"] for row in second} == {alive}
    assert {row["copy"] for row in second} == {0, 1, 2, 3}  # the next stage is shared anew
    assert next(event["reason"] for event in events if event["event"] == "run_end" and event["process"] == "master") == "complete"


def test_an_interrupt_reaches_every_worker(tmp_path: Path, started: list[Drive]) -> None:
    with Server("ok", tokens=40, itl_s=0.02) as server:
        started.append(drive := Drive(tmp_path, server.url, spec({"copies": 4, "duration_s": 60}), "--headless", "--processes", "2"))
        drive.until_rows(4)
        drive.process.send_signal(signal.SIGINT)
        assert drive.wait(20) == 130, drive.err
    assert {event["reason"] for event in records.read_events(tmp_path) if event["event"] == "run_end"} == {"interrupted"}
    assert outcomes(drive)["cancelled"] == 4


def test_locusts_web_page_works_too(tmp_path: Path, started: list[Drive]) -> None:
    web = ["--autostart", "--autoquit", "0", "--web-host", "127.0.0.1", "--web-port", "0"]
    with Server("ok", tokens=5) as server:
        started.append(drive := Drive(tmp_path, server.url, spec({"copies": 2, "requests": 6}), *web))
        assert drive.wait() == 0, drive.err
    assert drive.events[-1] == "run_end"


def test_a_wrong_start_is_one_sentence(tmp_path: Path, started: list[Drive]) -> None:
    played = spec({"copies": 1, "requests": 1})
    started.append(drive := Drive(tmp_path, "nonsense:1", played))
    assert drive.wait() == 2
    assert "is not an address" in drive.err
    assert "Traceback" not in drive.err
