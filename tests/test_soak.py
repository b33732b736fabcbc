"""Hours of one load leave nothing behind in the driver: what it keeps of a request is on the disk, or counted, or bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.memory import ENTRY_BYTES, Remembered

pytestmark = pytest.mark.alone

CHECKOUT = Path(__file__).parent.parent
# A process of its own, since Locust patches Python. All is a run's own but two things: the server (answers are there at once) and Locust's clock.
HOURS = """
import gc, json, os, sys, time, tracemalloc
from pathlib import Path
from types import SimpleNamespace
from locust import stats as locust_stats
from locust.env import Environment
os.environ["KILOCOPY_SPEC"] = "loadtests/specs/smoke.yaml"
from kilocopy import schedule
from kilocopy.faults import Server
from loadtests import workload
from loadtests.driver import Driver
from loadtests.memory import Remembered
from loadtests.player import Level
from loadtests.workload import Workload

now_s = 1.8e9
locust_stats.time = SimpleNamespace(time=lambda: now_s)
environment = Environment(host="http://127.0.0.1:9")
environment.create_local_runner()
driver = Driver(environment)
environment.runner.state = "running"
streams = driver.streams = driver._make_streams(driver.spec, driver.workload, Path(sys.argv[1]), environment.host, 0)
streams.reader.stop()
level = streams.player.level = Level(schedule.plan(driver.spec, 0), 0)
streams.recorder.begin(0, 0, 1)
server = Server("ok", tokens=5)
pieces = [f"data: {event}\\n\\n".encode() for event in [*server.events(), "[DONE]"]]

class Client:
    def ask(self, path, body, stream):
        fails, now_ns = asked % 50 == 0, time.perf_counter_ns()
        stream.sent_ns, stream.status, stream.content_type = now_ns, 503 if fails else 200, b"text/event-stream"
        stream.pieces += [b"busy"] if fails else pieces
        stream.stamps_ns.extend(now_ns + 10**6 * number for number in range(1, len(stream.pieces) + 1))
        stream.end(now_ns + 10**8 + asked % 30 * 10**7)

def forget():
    # What is remembered is bounded by itself, in bytes (the test below), and fills up for longer than these hours.
    gc.unfreeze()  # else what the driver froze is not among the objects
    caches = [one for one in gc.get_objects() if type(one) is Remembered]
    assert caches
    for kept in caches:
        kept.__init__(kept._make, kept._most)

client, asked, held = Client(), 0, []
for second in range(int(sys.argv[2]) * 3600):
    now_s += 1
    if second % 3600 == 0:
        forget()
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    if second == 0:
        tracemalloc.start()
    streams.player._request(level, 0, asked, client, [])
    asked += 1
    if second % 10 == 0:
        streams.recorder.flush()
        streams.recorder.sample()
        locust_stats.update_stats_history(environment.runner)
        streams._exporter.page()
    driver._say("")
forget()
gc.collect()
held.append(tracemalloc.get_traced_memory()[0])
print(json.dumps({"held": held[1:], "requests": environment.stats.total.num_requests, "outcomes": streams.recorder.outcomes}))
"""


@pytest.mark.timeout(200)
def test_the_drivers_memory_does_not_grow_with_the_hours(tmp_path: Path) -> None:
    hours = 4
    done = subprocess.run([sys.executable, "-c", HOURS, str(tmp_path), str(hours)], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["requests"] == hours * 3600
    assert said["outcomes"] == {"ok": hours * 3600 - hours * 72, "http_5xx": hours * 72}
    held = said["held"]  # bytes after each hour, caches empty; in the first two Locust's chart fills up
    assert max(held[2:]) - held[1] < 100_000, held


def test_what_is_remembered_is_bounded_in_bytes() -> None:
    made: list[int] = []

    def text(length: int) -> str:
        made.append(length)
        return "x" * length

    kept = Remembered(text, 10_000)
    assert [kept(1000), kept(1000)] == ["x" * 1000] * 2
    assert made == [1000]
    for length in range(2000, 2020):
        kept(length)
    assert kept.bytes <= 10_000
    assert kept.bytes > 3 * (2000 + ENTRY_BYTES)
    made.clear()
    kept(2019), kept(1000), kept(20_000), kept(20_000)
    assert made == [1000, 20_000, 20_000]  # the last is there, the first is not, what is larger than all never is
    assert kept.bytes <= 10_000
