"""The Locust file: `kilocopy run` starts it, and it also runs by itself for those who know Locust.

    locust -f loadtests/locustfile.py --headless --host http://127.0.0.1:8000 [--processes 4]

plays the spec in KILOCOPY_SPEC (default loadtests/specs/smoke.yaml) and writes a run directory of its own; `kilocopy report` then
reads it. The CLI names the run directory by KILOCOPY_RUN_DIR instead, whose manifest.json holds the spec. KILOCOPY_API_KEY is sent
as a bearer token; KILOCOPY_SETTLE_S is the idle time after each stage (default 3); KILOCOPY_EXPORT=off leaves the metrics page out.

Locust's own statistics are for watching. It hears of each request once, when its stream ended, with the true times.
"""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))  # Locust loads this file by its path; its siblings are imported as loadtests.x

import gevent  # noqa: E402
from locust import LoadTestShape, User, constant, events, task  # noqa: E402
from locust.exception import StopUser  # noqa: E402

from kilocopy.problem import ProblemError  # noqa: E402
from loadtests.driver import EXIT_BUG, EXIT_INTERRUPTED, Driver  # noqa: E402
from loadtests.streams import Target  # noqa: E402

driver: Driver | None = None


def _refuse(problem: ProblemError) -> NoReturn:
    sys.stderr.write(f"kilocopy: {problem}\n")
    sys.exit(problem.code)


@events.init.add_listener  # type: ignore[untyped-decorator]
def _on_init(environment: Any, **_: Any) -> None:
    global driver  # noqa: PLW0603  # Locust knows modules, users and shapes, and hands nothing on between them
    try:
        driver = Driver(environment)
        if environment.host:  # else it is asked for on Locust's page
            Target.parse(environment.host)
    except ProblemError as problem:
        _refuse(problem)
    # Python's own handler would raise KeyboardInterrupt wherever the loop happens to be, in the middle of a stream's bytes.
    gevent.signal_handler(signal.SIGINT, driver.quit, EXIT_INTERRUPTED)
    gevent.signal_handler(signal.SIGTERM, driver.quit, EXIT_INTERRUPTED)  # Locust's comes only after the last stage


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _on_test_start(**_: Any) -> None:
    assert driver is not None  # noqa: S101
    if driver.is_worker:
        return  # its master tells it
    try:
        driver.start()
    except ProblemError as problem:
        driver.fail(f"kilocopy: {problem}", problem.code)


@events.quitting.add_listener  # type: ignore[untyped-decorator]
@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def _on_test_stop(**_: Any) -> None:
    if driver is not None:
        driver.stop()


class Copy(User):  # type: ignore[misc]
    """One Locust user: it holds one connection, and plays one stream at a time."""

    wait_time = constant(0)

    @task  # type: ignore[untyped-decorator]
    def play(self) -> None:
        assert driver is not None  # noqa: S101
        driver.opened.wait()
        streams = driver.streams
        if streams is None:
            raise StopUser  # the start failed, and said so
        client = streams.client()
        try:
            streams.player.serve(client)
        except Exception:  # a bug of ours: a run without this stream would measure something else
            driver.fail(traceback.format_exc(), EXIT_BUG)
        finally:
            client.close()


class Stages(LoadTestShape):  # type: ignore[misc]
    """As many users as what is being played needs; the player gives them their parts."""

    def tick(self) -> tuple[int, float] | None:
        assert driver is not None  # noqa: S101
        conductor = driver.conductor
        if conductor is None:
            return 1, 1  # the test is about to start
        return None if conductor.complete else (conductor.users, conductor.users)
