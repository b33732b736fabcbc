"""Workers that join from elsewhere: their records come home whole, the clocks are compared, and every mistake is a sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from kilocopy import joining, receiving, recording, records, schedule
from kilocopy.problem import ProblemError
from kilocopy.recompute import summarise
from tests.faults import Server
from tests.test_driver import open_spec, spec

CHECKOUT = Path(__file__).parent.parent
TOKEN = "0123456789abcdef-shared"
pytestmark = [pytest.mark.alone, pytest.mark.timeout(90)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cast:
    """A leader and its workers, each with a directory of its own and no file in common."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.environment = os.environ | {receiving.TOKEN: TOKEN, "KILOCOPY_SETTLE_S": "0.2", "PYTHONPATH": str(CHECKOUT)}
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, home: str, before: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        cwd = self.folder / home
        cwd.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "kilocopy", *arguments], cwd=cwd, env=self.environment | environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def lead(self, url: str, workers: int, *stages: dict[str, Any], bind: str = "127.0.0.1", more: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        self.spec = open_spec(*({"arrival": "closed", "warmup_s": 0, "ramp_s": 0.2, **stage} if "arrival" not in stage else stage for stage in stages))
        path, tree = self.folder / "spec.yaml", self.spec.model_dump(mode="json")
        tree["model"]["training"] = None  # the model is nowhere, and so is what its training cost
        with path.open("w", encoding="utf-8") as file:
            YAML().dump(tree, file)
        arguments = ["drive", str(path), "--url", url, "--join", str(workers), "--bind", f"{bind}:{self.port}", *more]
        return self.start(*arguments, home="leader")

    def join(self, home: str, host: str = "127.0.0.1", before: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        return self.start("join", f"{host}:{self.port}", "--run", "records", home=home, before=before, **environment)

    @property
    def run_dir(self) -> Path:
        return next((self.folder / "leader" / "runs").iterdir())

    def rows(self, workers: int) -> list[int]:
        """Rows of each worker that are home."""
        came = records.read(self.run_dir, "requests").column("worker").to_pylist()
        return [came.count(worker) for worker in range(workers)]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in records.read_events(self.run_dir) if event["event"] == name]

    def said(self, process: subprocess.Popen[str], timeout_s: float = 60) -> str:
        """What a process said until it ended; where it does not end, what all of them said."""
        try:
            return process.communicate(timeout=timeout_s)[0]
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail("\n".join(str(each.communicate()[0]) for each in self.processes))

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for process in self.left():  # a worker beside `join` has a session of its own, and may be stopped
            os.kill(process, signal.SIGKILL)

    def left(self) -> list[int]:
        """Locust's workers that keep their records below this folder."""
        return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _is_worker_of(path, self.folder)]


@pytest.fixture
def cast(tmp_path: Path) -> Iterator[Cast]:
    made = Cast(tmp_path)
    yield made
    made.kill()


def same_bytes(run_dir: Path, folder: Path) -> int:
    """How many files of a worker's are at the leader's, byte for byte."""
    found = [path for kind in joining.KINDS for path in (folder / kind).glob("worker*")]
    for path in found:
        assert (run_dir / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
    return len(found)


def test_workers_elsewhere_share_the_load_and_their_records_come_home(cast: Cast) -> None:
    with Server("ok", tokens=10, ttft_s=0.03, itl_s=0.01) as server:
        open_loop = {"arrival": "poisson", "rate_per_s": 40, "duration_s": 3, "max_in_flight": 100}
        leader = cast.lead(server.url, 2, {"copies": 5, "duration_s": 3}, open_loop)
        workers = [cast.join("one"), cast.join("two")]
        said = leader.communicate(timeout=60)[0]
        assert leader.returncode == 0, said
        told = [worker.communicate(timeout=20)[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], told
    assert [same_bytes(cast.run_dir, cast.folder / home / "records") for home in ("one", "two")] == [3, 3]
    summary = summarise(cast.run_dir)
    assert summary.status == "complete"
    assert [one.worker for one in summary.stages[0].driver.workers] == [0, 1]
    rows = records.read(cast.run_dir, "requests").to_pylist()
    assert {row["copy"]: row["worker"] for row in rows if row["stage"] == 0} == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0}
    assert len({(row["stage"], row["copy"], row["sequence"]) for row in rows}) == len(rows) == len(server.requests) - 3  # and everyone's probe
    # Arrivals are those that one process alone would have sent: each once, when it is due, half of them by each worker.
    planned = {arrival.index: arrival.at_s for arrival in schedule.plan(cast.spec, 1).arrivals}
    arrived = [row for row in rows if row["stage"] == 1]
    begun_ns = {event["process"]: event["time_ns"] for event in cast.events("stage_start") if event["stage"] == 1}
    assert sorted(row["copy"] for row in arrived) == sorted(planned)
    assert {row["worker"] for row in arrived} == {0, 1}
    for row in arrived:
        assert row["scheduled_ns"] == pytest.approx(begun_ns[f"worker{row['worker']}"] + planned[row["copy"]] * 1e9, abs=5e6)
    clocks = recording.load(cast.run_dir).clocks
    assert [(clock.process, clock.same) for clock in clocks] == [("worker0", True), ("worker1", True)]
    for clock in clocks:  # both read one clock, so the true offset is 0: the bound that was stated must hold
        assert abs(clock.offset_s) <= clock.error_s < 0.05
    for path in cast.folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in said + "".join(told)


def test_workers_that_die_or_freeze_leave_their_records_and_the_stage_says_so(cast: Cast) -> None:
    """Three workers: one is killed with all its words, one freezes and wakes up too late, one stays and takes over the next stage."""
    with Server("ok", tokens=10, ttft_s=0.03, itl_s=0.01) as server:
        leader = cast.lead(server.url, 3, {"copies": 6, "duration_s": 6}, {"copies": 6, "duration_s": 3})
        killed, freezes, stays = cast.join("killed"), cast.join("freezes"), cast.join("stays")
        home = {name: cast.folder / name / "records" for name in ("killed", "freezes", "stays")}
        until(lambda: any(cast.folder.glob("leader/runs/*")) and all(count >= 5 for count in cast.rows(3)), cast)
        os.killpg(killed.pid, signal.SIGKILL)  # the worker beside it sees that it is alone, and ends
        (frozen,) = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _is_worker_of(path, home["freezes"])]
        os.kill(frozen, signal.SIGSTOP)
        lost = {number(home["killed"]), number(home["freezes"])}
        until(lambda: {event["worker"] for event in cast.events("worker_lost")} == lost, cast)
        os.kill(frozen, signal.SIGCONT)
        told = freezes.communicate(timeout=30)[0]
        said = leader.communicate(timeout=60)[0]
        told += stays.communicate(timeout=20)[0]
    assert (leader.returncode, stays.returncode) == (130, 0), said + told  # records that end in the middle: the report says interrupted
    assert freezes.returncode in {0, 130}, told
    assert said.count("fell silent before it had sent everything") == 1
    assert len(cast.events("records_missing")) == 1
    first, second = summarise(cast.run_dir).stages
    assert "worker-lost" in [reason.code for reason in first.verdict.reasons]
    assert [one.worker for one in second.driver.workers] == [number(home["stays"])]
    rows = records.read(cast.run_dir, "requests").to_pylist()
    assert {row["copy"] for row in rows if row["stage"] == 1} == {0, 1, 2, 3, 4, 5}
    assert {row["worker"] for row in rows if row["stage"] == 1} == {number(home["stays"])}  # who woke up did not play on
    # What the killed one had not sent is in its own folder, and goes on where the leader's copy ends.
    name = f"requests/worker{number(home['killed'])}.arrow"
    until(lambda: (home["killed"] / name).read_bytes().endswith(records.END_OF_STREAM), cast)
    came = (cast.run_dir / name).read_bytes()
    assert came
    assert (home["killed"] / name).read_bytes().startswith(came)
    assert same_bytes(cast.run_dir, home["freezes"]) == same_bytes(cast.run_dir, home["stays"]) == 3


def until(condition: Callable[[], Any], cast: Cast, timeout_s: float = 40) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, [process.poll() for process in cast.processes]
        time.sleep(0.1)


def number(folder: Path) -> int:
    """Which worker it became whose records are there."""
    (path,) = (folder / "events").glob("worker*.jsonl")
    return int(path.stem.removeprefix("worker"))


def _is_worker_of(process: Path, folder: Path) -> bool:
    try:
        return f"KILOCOPY_RECORDS_DIR={folder.resolve()}" in (process / "environ").read_text(errors="replace") and "--worker" in (process / "cmdline").read_text()
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------------------ mistakes


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[receiving.Receiver]:
    with receiving.Receiver(tmp_path, ("127.0.0.1", 0), TOKEN, 1, spec({"copies": 1, "requests": 1}), "http://127.0.0.1:1") as receiver:
        yield receiver


def leader_of(receiver: receiving.Receiver, token: str = TOKEN) -> joining.Leader:
    return joining.Leader(("127.0.0.1", receiver.port), token)


def enter(receiver: receiving.Receiver, token: str = TOKEN, look: Callable[[dict[str, Any]], None] = lambda _: None) -> joining.Leader:
    leader = leader_of(receiver, token)
    leader.enter(0, look)
    return leader


def test_mistakes_of_a_worker_are_sentences(listening: receiving.Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProblemError, match="does not know this token: KILOCOPY_JOIN_TOKEN"):
        enter(listening, "another-secret-of-16")
    with pytest.raises(ProblemError, match="cannot be reached"):
        enter(listening, look=joining.fits)  # no server at the address that the leader drives
    with monkeypatch.context() as patch:
        patch.setattr(joining, "__version__", "0.0.9")
        with pytest.raises(ProblemError, match=r"the leader runs kilocopy .*, this worker 0\.0\.9"):
            enter(listening, look=joining.fits)
    listening.commit = "a" * 40
    with pytest.raises(ProblemError, match=r"at aaaaaaaaaaaa, this worker's at .* bring both to the same commit"):
        enter(listening, look=joining.fits)
    with pytest.raises(ProblemError, match="0 of 1 workers joined within"):
        listening.gather(print, 0.2)
    enter(listening)
    with pytest.raises(ProblemError, match="all 1 workers"):
        enter(listening)
    with pytest.raises(ProblemError, match="no leader answers there"):
        joining.Leader(("127.0.0.1", free_port()), TOKEN).enter(0, lambda _: None)
    with pytest.raises(ProblemError, match="the port is in use"):
        receiving.Receiver(tmp_path, ("127.0.0.1", listening.port), TOKEN, 1, spec({"copies": 1, "requests": 1}), "")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ProblemError, match=r"the directory is not empty \(notes.txt"):
        joining.prepare(tmp_path / "full")


def test_a_worker_with_other_data_is_refused(listening: receiving.Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of one data set are only shares where everyone has the same one."""
    monkeypatch.chdir(tmp_path)
    named = open_spec({"arrival": "trace", "path": "arrivals.csv", "format": "azure", "max_in_flight": 8})
    run = listening.run() | {"spec": named.model_dump(mode="json"), "files": {"arrivals.csv": "0" * 64}}
    with pytest.raises(ProblemError, match=r"arrivals\.csv, which the spec names, is not here"):
        joining.fits(run)
    (tmp_path / "arrivals.csv").write_text("1\n")
    with pytest.raises(ProblemError, match=r"arrivals\.csv, which the spec names, differs from the leader's"):
        joining.fits(run)


@pytest.mark.parametrize(("value", "said"), [(None, "is not set"), ("short", "has 5 characters")])
def test_a_token_has_to_be_one(value: str | None, said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        receiving.need_token(value)


def test_a_worker_that_left_before_the_run_makes_room_for_another(listening: receiving.Receiver) -> None:
    gone = enter(listening)
    listening.members[gone.member].heard_s -= receiving.SILENT_S + 1
    said: list[str] = []
    with pytest.raises(ProblemError, match="0 of 1 workers joined"):
        listening.gather(said.append, 0.05)
    assert "is gone again" in said[-1]
    with pytest.raises(ProblemError, match="does not count on this process"):
        gone.begun()
    enter(listening)
    listening.gather(said.append, 5)


def test_only_files_of_records_are_taken_and_only_where_they_end(listening: receiving.Receiver, tmp_path: Path) -> None:
    leader = leader_of(listening)
    for name in ("manifest.json", "requests/../manifest.json", "requests/worker0.sh", "../worker0.arrow", "requests/worker0.arrow%0a"):
        assert leader.ask("PUT", f"/records/{name}?offset=0", b"x" * 300_000)[0] == 400
    assert leader.ask("PUT", "/records/requests/worker0.arrow?offset=0", b"abc") == (200, {"size": 3})
    assert leader.ask("PUT", "/records/requests/worker0.arrow?offset=0", b"abc") == (409, {"size": 3})
    assert leader.ask("PUT", "/records/requests/worker0.arrow?offset=3", b"def") == (200, {"size": 6})
    assert (tmp_path / "requests/worker0.arrow").read_bytes() == b"abcdef"
    assert all(receiving.FILE.fullmatch(f"{kind}/worker0.{'jsonl' if kind == 'events' else 'arrow'}") for kind in joining.KINDS)
    stranger = leader_of(listening, "another-secret-of-16")
    assert stranger.ask("PUT", "/records/requests/worker0.arrow?offset=6", b"x" * 300_000)[0] == 403


def test_shipping_goes_on_where_it_broke_off(listening: receiving.Receiver, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    (folder / "requests").mkdir(parents=True)
    path = folder / "requests" / "worker3.arrow"
    path.write_bytes(os.urandom(3 * 2**20 + 17))
    shipper = joining.Shipper(leader_of(listening), folder)
    assert shipper.ship() == path.stat().st_size
    with path.open("ab") as file:
        file.write(b"more")
    assert shipper.ship() == 4
    assert joining.Shipper(leader_of(listening), folder).ship() == 0  # one that knows nothing asks the leader where it ends
    assert (tmp_path / "requests" / "worker3.arrow").read_bytes() == path.read_bytes()


# -------------------------------------------------------------------------------------------------------------------- clocks


def test_clocks_that_drift_apart_are_aligned_as_well_as_was_measured(tmp_path: Path) -> None:
    """A worker whose clock began elsewhere and gains 100 us/s, and whose wall clock is 5 s off: nothing is further off than the stated bound."""
    ahead_ns, drift = 77_000_000_000_000, 1e-4

    def there(leader_ns: int) -> int:
        return int(ahead_ns + leader_ns * (1 + drift))

    (tmp_path / "events").mkdir()
    leader, worker = [], []
    rng = np.random.default_rng(1)
    for second in range(60):
        now_ns = 10**12 + second * 10**9
        error_ns = int(rng.uniform(1e5, 2e6))
        noise_ns = int(rng.uniform(-1, 1) * error_ns)
        leader.append({"event": "clock", "of": "worker0", "offset_ns": there(now_ns) - now_ns + noise_ns, "error_ns": error_ns,
                       "at_ns": there(now_ns), "same": False, "time_ns": now_ns, "wall_ns": now_ns, "host": "a", "process": "receiver"})  # fmt: skip
        worker.append({"event": "tick", "time_ns": there(now_ns), "wall_ns": now_ns + 5 * 10**9, "host": "b", "process": "worker0"})
    for name, events in (("receiver", leader), ("worker0", worker)):
        (tmp_path / "events" / f"{name}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    loaded = recording.load(tmp_path)
    ticks, truth = (np.array([event["t_s"] for event in loaded.events if event["event"] == name]) for name in ("tick", "clock"))
    off_s = np.abs(ticks - truth)  # each pair was at one moment
    (clock,) = loaded.clocks
    assert (clock.same, clock.rounds) == (False, 60)
    assert clock.drift_s == pytest.approx(drift * 55, abs=2e-3)
    # Between two round trips the line is as near as they are; before the first and after the last it stands still for up to ten seconds.
    between = slice(10, 50)
    assert off_s[between].max() <= clock.error_s < 1e-3
    assert off_s.max() <= clock.error_s + 10 * drift


def test_records_of_a_host_without_round_trips_go_by_the_wall_clock(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    for name, host, shift in (("master", "a", 0), ("worker0", "b", 5 * 10**12)):
        lines = [{"event": "tick", "time_ns": 10**12 + k * 10**9 + shift, "wall_ns": 2 * 10**12 + k * 10**9, "host": host, "process": name} for k in range(3)]
        (tmp_path / "events" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sorted(round(event["t_s"]) for event in recording.load(tmp_path).events) == [0, 0, 1, 1, 2, 2]


NAMESPACE = ("unshare", "--uts", "--time", "--monotonic", "5000", "--fork", "--kill-child", "sh", "-c", 'hostname elsewhere; exec "$@"', "sh")
MAY = bool(shutil.which("unshare")) and subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not MAY, reason="needs the right to make time namespaces")
def test_a_worker_with_another_clock_is_aligned(cast: Cast) -> None:
    """Its monotonic clock is 5,000 s ahead, its host has another name, and its leader another address: the nearest to a second host on one machine."""
    with Server("ok", tokens=10, ttft_s=0.03, itl_s=0.01) as server:
        leader = cast.lead(server.url, 1, {"copies": 4, "duration_s": 3}, bind="127.0.0.2")
        worker = cast.join("there", host="127.0.0.2", before=NAMESPACE)
        said, told = cast.said(leader), cast.said(worker)
    assert (leader.returncode, worker.returncode) == (0, 0), said + told
    assert same_bytes(cast.run_dir, cast.folder / "there" / "records") == 3
    (clock,) = recording.load(cast.run_dir).clocks
    assert (clock.process, clock.host, clock.same) == ("worker0", "elsewhere", False)
    assert abs(clock.offset_s - 5000) <= clock.error_s < 0.05  # the namespace's shift is known to the nanosecond
    summary = summarise(cast.run_dir)
    assert summary.status == "complete"
    assert summary.stages[0].end_s < 30  # on the leader's clock, not 5,000 s away
    assert [(one.host, one.same_clock) for one in summary.clocks] == [("elsewhere", False)]
    assert "The clock of worker0 on elsewhere was +" in " ".join(said.split())
