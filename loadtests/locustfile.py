"""The Locust file: `kilocopy run` starts it, and it also runs by itself for those who know Locust.

    locust -f loadtests/locustfile.py --headless --host http://127.0.0.1:8000

plays the spec in KILOCOPY_SPEC (default loadtests/specs/smoke.yaml) and writes a run directory of its own; `kilocopy report` then
reads it. The CLI names the run directory by KILOCOPY_RUN_DIR instead, whose manifest.json holds the spec. KILOCOPY_API_KEY is sent
as a bearer token; KILOCOPY_SETTLE_S is the idle time after each stage (default 3).

Locust's own statistics are for watching. It hears of each request once, when its stream ended, with the true times.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))  # Locust loads this file by its path; its siblings are imported as loadtests.x

import gevent  # noqa: E402
from gevent.lock import RLock  # noqa: E402
from locust import LoadTestShape, User, constant, events, task  # noqa: E402
from locust.exception import StopUser  # noqa: E402
from locust.runners import LocalRunner  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from kilocopy import manifest  # noqa: E402
from kilocopy.problem import ProblemError  # noqa: E402
from kilocopy.spec import Spec, load  # noqa: E402
from loadtests.conductor import Conductor  # noqa: E402
from loadtests.recorder import FLUSH_S, SAMPLE_S, Recorder  # noqa: E402
from loadtests.streams import Client, Reader, Stream, Target  # noqa: E402
from loadtests.workload import Workload  # noqa: E402

log = logging.getLogger("kilocopy.driver")
EXIT_BUG, EXIT_DISK_FULL, EXIT_INTERRUPTED = 1, 3, 130


class Driver:
    """What there is once in this process. A test started again in Locust's web page is a run of its own."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.api_key = os.environ.get("KILOCOPY_API_KEY") or None
        self.settle_s = float(os.environ.get("KILOCOPY_SETTLE_S", "3"))
        self.run_dir = Path(os.environ["KILOCOPY_RUN_DIR"]) if "KILOCOPY_RUN_DIR" in os.environ else None
        self.spec = self._spec()
        self.workload = Workload(self.spec)
        self.conductor: Conductor | None = None
        self.reader: Reader | None = None
        self.recorder: Recorder | None = None
        self.target: Target | None = None
        self._greenlets: list[Any] = []
        self._closing = RLock()

    def _spec(self) -> Spec:
        if self.run_dir is None:
            return load(Path(os.environ.get("KILOCOPY_SPEC", CHECKOUT / "loadtests/specs/smoke.yaml")))
        path = self.run_dir / "manifest.json"
        try:
            return Spec.model_validate(json.loads(path.read_text(encoding="utf-8"))["spec"])
        except (OSError, ValueError, KeyError, ValidationError) as error:
            raise ProblemError(f"{path}: no spec can be read from it: {error}") from None

    def start(self) -> None:
        """A run begins. Raises ProblemError where it cannot."""
        url = self.environment.host or ""
        self.target = Target.parse(url)
        run_dir = self.run_dir or manifest.create(
            self.spec, Path("runs"), url=url, driver_shares_host=manifest.is_this_host(url), started_by="locust"
        )
        self.run_dir = None  # a second test of this process gets a directory of its own
        self.reader = Reader()
        try:
            self.recorder = Recorder(run_dir, 0, self.reader, self.api_key)
        except OSError as error:
            raise ProblemError(f"{run_dir}: cannot be recorded to: {error.strerror}") from None
        self.conductor = Conductor(self.spec, self.workload, self.reader, self.recorder, fire=self._fire, settle_s=self.settle_s)
        self.environment.process_exit_code = EXIT_INTERRUPTED  # until it is complete
        self.reader.start(self.spec.workload.timeouts)
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not walk it while streams are timed
        self._greenlets = [gevent.spawn(self._guarded, work) for work in (self._perform, self._keep, self.recorder.probe)]

    def _perform(self) -> None:
        assert self.conductor is not None  # noqa: S101
        self.conductor.perform()
        self.environment.process_exit_code = 0  # also where requests failed: the report says what they were

    def _keep(self) -> None:
        """Write down what came, for ever."""
        assert self.recorder is not None  # noqa: S101
        assert self.conductor is not None  # noqa: S101
        while True:
            for _ in range(round(SAMPLE_S / FLUSH_S)):
                gevent.sleep(FLUSH_S)
                self.recorder.flush()
            self.recorder.sample()
            self._say(self.conductor.progress())

    def _say(self, line: str) -> None:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever started this is gone, and nobody watches: end the run
            self.quit(EXIT_INTERRUPTED)

    def _guarded(self, work: Any) -> None:
        """Nothing that goes wrong here may leave a run that looks alive."""
        try:
            work()
        except OSError as error:
            self.fail(f"kilocopy: the run ended: its records cannot be written: {error.strerror or error}", EXIT_DISK_FULL)
        except Exception:
            self.fail(traceback.format_exc(), EXIT_BUG)

    def fail(self, sentence: str, code: int) -> None:
        """End the run at once; what was recorded stays."""
        sys.stderr.write(sentence + "\n")
        if self.recorder is not None:
            self.recorder.abandon()
        self.quit(code)

    def quit(self, code: int) -> None:
        """Stop asking, cancel what is open, and leave with an exit code."""
        self.environment.process_exit_code = code
        gevent.spawn(self._leave)

    def _leave(self) -> None:
        self.stop()
        self.environment.runner.quit()
        if self.environment.web_ui:
            self.environment.web_ui.stop()

    def stop(self) -> None:
        """Close the run, for whatever reason it ends; each stream that is open becomes a cancelled row first.

        A signal, Locust's quitting and its stopping all come here, some at once: the first does it, the others wait for it.
        """
        with self._closing:
            if self.reader is None or self.recorder is None:
                return
            gevent.killall(self._greenlets)
            self.environment.runner.user_greenlets.kill()
            self.reader.stop()
            try:
                self.recorder.close("interrupted")
            except OSError as error:
                sys.stderr.write(f"kilocopy: the last records cannot be written: {error.strerror or error}\n")
                self.environment.process_exit_code = EXIT_DISK_FULL
            self.reader = self.recorder = self.conductor = None

    def _fire(self, row: dict[str, Any], stream: Stream) -> None:
        copies = self.spec.stages[row["stage"]].copies
        self.environment.events.request.fire(
            request_type="POST",
            name=f"{self.workload.path} (stage {row['stage'] + 1}: {copies} copies)",
            response_time=(row["finished_ns"] - row["scheduled_ns"]) / 1e6,
            response_length=stream.bytes,
            exception=None if row["outcome"] == "ok" else RuntimeError(row["outcome"]),
            context={},
        )


driver: Driver | None = None


def _refuse(problem: ProblemError) -> NoReturn:
    sys.stderr.write(f"kilocopy: {problem}\n")
    sys.exit(problem.code)


@events.init.add_listener  # type: ignore[untyped-decorator]
def _on_init(environment: Any, runner: Any, **_: Any) -> None:
    global driver  # noqa: PLW0603  # Locust knows modules, users and shapes, and hands nothing on between them
    try:
        if not isinstance(runner, LocalRunner):
            raise ProblemError("several driver processes are not supported yet: leave out --processes, --master and --worker")
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
    """One Locust user: it plays one copy of the model in each stage."""

    wait_time = constant(0)

    def on_start(self) -> None:
        if driver is None or driver.reader is None or driver.target is None:
            raise StopUser  # the start failed, and said so
        self.client = Client(driver.reader, driver.target, driver.spec.workload.timeouts, driver.api_key)

    def on_stop(self) -> None:
        if hasattr(self, "client"):
            self.client.close()

    @task  # type: ignore[untyped-decorator]
    def play(self) -> None:
        if driver is not None and driver.conductor is not None:
            try:
                driver.conductor.play(self.client)
            except Exception:  # a bug of ours: a run without this copy would measure something else
                driver.fail(traceback.format_exc(), EXIT_BUG)


class Stages(LoadTestShape):  # type: ignore[misc]
    """As many users as the stage that is being played has copies; the conductor starts and stops their asking."""

    def tick(self) -> tuple[int, float] | None:
        assert driver is not None  # noqa: S101
        if driver.conductor is None:
            return driver.spec.stages[0].copies, driver.spec.stages[0].copies
        return None if driver.conductor.complete else (driver.conductor.copies, driver.conductor.copies)
