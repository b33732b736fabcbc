"""One driver process: alone, as the master that leads, or as a worker. What there is once in it, and how it begins and ends.

    alone    streams and conductor in one process
    master   conductor only; it tells the workers what to play (loadtests/team.py)
    worker   streams only; its messages come from the master

However it ends (the last stage, Ctrl-C, Locust's stop button, a full disk, a bug, a lost master), each stream that is open becomes
a cancelled row and the records are closed.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from gevent.lock import RLock
from locust.runners import MasterRunner, WorkerRunner
from pydantic import ValidationError

from kilocopy import manifest, schedule
from kilocopy.problem import ProblemError
from kilocopy.records import Events
from kilocopy.spec import ClosedStage, SearchStage, Spec, load
from loadtests.conductor import Conductor
from loadtests.exporter import Exporter, write_file_sd
from loadtests.player import Player
from loadtests.recorder import FLUSH_S, SAMPLE_S, Recorder
from loadtests.streams import Client, Reader, Stream, Target
from loadtests.team import Alone, Workers
from loadtests.workload import Workload

CHECKOUT = Path(__file__).resolve().parent.parent
EXIT_BUG, EXIT_DISK_FULL, EXIT_INTERRUPTED = 1, 3, 130
PORTS_TRIED = 1024
RECORDS_DIR = "KILOCOPY_RECORDS_DIR"  # set for a worker that joined from elsewhere: where its records go
MASTER_S = 1.0  # how often the master says how far the run is
LOCUST_LOOKS_BACK_S = 60  # Locust's own page and table look back 12 s
CHART_POINTS = 720  # an hour of the chart on Locust's page


class Streams:
    """The part of a process that holds streams: reader, recorder, player."""

    def __init__(self, spec: Spec, workload: Workload, run_dir: Path, url: str, worker: int, api_key: str | None, fire: Any) -> None:
        self.spec, self._api_key = spec, api_key
        self.target = Target.parse(url)
        self.reader = Reader()
        self._exporter = _exporter(spec, run_dir, worker)
        try:
            asked = spec.workload
            self.recorder = Recorder(
                run_dir, worker, self.reader, api_key, exporter=self._exporter, samples=asked.samples, keep_texts=asked.keep_texts
            )
        except OSError as error:
            raise ProblemError(f"{run_dir}: cannot be recorded to: {error.strerror}") from None
        self.player = Player(workload, self.recorder, fire=fire)
        self.recorder.phase = lambda: self.phase
        self.reader.start(spec.workload.timeouts)
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not walk it while streams are timed

    def client(self) -> Client:
        """A line to the server for one user."""
        return Client(self.reader, self.target, self.spec.workload.timeouts, self._api_key)

    def keep(self, say: Callable[[], None]) -> None:
        """Write down what came, for ever; `say` is called once a second."""
        while True:
            for _ in range(round(SAMPLE_S / FLUSH_S)):
                gevent.sleep(FLUSH_S)
                self.recorder.flush()
            self.recorder.sample()
            say()

    @property
    def phase(self) -> str:
        """ramp, warmup, window, drain or settle."""
        level = self.player.level
        if self.player.phase != "ramp" or level is None:
            return self.player.phase
        if level.elapsed_s < level.plan.ramp_s:
            return "ramp"
        return "warmup" if level.elapsed_s < level.plan.warm_s else "window"

    def progress(self) -> dict[str, Any]:
        """What people watch, of this process."""
        outcomes = self.recorder.outcomes
        errors = {outcome: count for outcome, count in sorted(outcomes.items()) if outcome != "ok"}
        counts = {"in_flight": self.recorder.in_flight, "events": self.reader.events, "ok": outcomes["ok"]}
        return counts | {"errors": errors, "phase": self.phase}

    def close(self, reason: str) -> None:
        """End the records; what is open becomes cancelled rows. Raises OSError when the disk is full."""
        self.reader.stop()
        try:
            self.recorder.close(reason)
        finally:
            if self._exporter is not None:
                self._exporter.close()


def _exporter(spec: Spec, run_dir: Path, worker: int) -> Exporter | None:
    """The metrics page of this process, and the file by which Prometheus finds it; none with KILOCOPY_EXPORT=off."""
    if os.environ.get("KILOCOPY_EXPORT", "on") == "off":
        return None
    constant = {"run": os.environ.get("KILOCOPY_RUN_ID", run_dir.name), "model": spec.model.id, "worker": str(worker), "cluster": spec.name}
    host = os.environ.get("KILOCOPY_EXPORT_HOST", "127.0.0.1")
    exporter = _first_free(lambda port: Exporter(constant, spec, host=host, port=port), int(os.environ.get("KILOCOPY_EXPORT_PORT", "0")))
    with contextlib.suppress(OSError):  # a run goes on without being watched
        write_file_sd(run_dir / "targets" / f"worker{worker}.json", [f"{host}:{exporter.port}"], {"job": "kilocopy"})
    return exporter


def _first_free(listen: Callable[[int], Exporter], port: int) -> Exporter:
    """Listen on a port, or on the next one that is free: the workers of one host are given the same to begin at. 0 takes any."""
    for number in range(port, port + PORTS_TRIED) if port else (0,):
        try:
            return listen(number)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise ProblemError(f"KILOCOPY_EXPORT_PORT {port}: this port and the {PORTS_TRIED - 1} after it are in use")


class Driver:
    """This process's part in a run. A test started again in Locust's web page is a run of its own."""

    def __init__(self, environment: Any) -> None:
        self.environment, self.runner = environment, environment.runner
        self.api_key = os.environ.get("KILOCOPY_API_KEY") or None
        self.settle_s = float(os.environ.get("KILOCOPY_SETTLE_S", "3"))
        self.run_dir = Path(os.environ["KILOCOPY_RUN_DIR"]) if "KILOCOPY_RUN_DIR" in os.environ else None
        self.is_worker, self.is_master = isinstance(self.runner, WorkerRunner), isinstance(self.runner, MasterRunner)
        self.opened = Event()  # a worker's users may be there before its run is
        self.streams: Streams | None = None
        self.plan: schedule.Plan | None = None  # a worker's part of the level that comes next
        self.conductor: Conductor | None = None
        self._master_events: Events | None = None
        self._greenlets: list[Any] = []
        self._closing = RLock()
        if self.is_worker:
            for name, hear in {"open": self._open, "gather": self._gather, "play": self._play, "end": self._end}.items():
                self.runner.register_message(f"kilocopy_{name}", hear, concurrent=True)
        else:
            self.spec = self._spec()
            self.workload = Workload(self.spec)  # also the master's: what is wrong with a data set is said before anything starts

    def _spec(self) -> Spec:
        if self.run_dir is None:
            return load(Path(os.environ.get("KILOCOPY_SPEC", CHECKOUT / "loadtests/specs/smoke.yaml")))
        path = self.run_dir / "manifest.json"
        try:
            return Spec.model_validate(json.loads(path.read_text(encoding="utf-8"))["spec"])
        except (OSError, ValueError, KeyError, ValidationError) as error:
            raise ProblemError(f"{path}: no spec can be read from it: {error}") from None

    def start(self) -> None:
        """A run begins, where this process leads it. Raises ProblemError where it cannot."""
        url = self.environment.host or ""
        Target.parse(url)
        run_dir = self.run_dir or manifest.create(
            self.spec, Path("runs"), url=url, driver_shares_host=manifest.is_this_host(url), started_by="locust"
        )
        self.run_dir = None  # a second test of this process gets a directory of its own
        for index in range(len(self.spec.stages)):
            _ = schedule.plan(self.spec, index, load=_first_load(self.spec, index))  # a trace that cannot be read is found now
        self.environment.process_exit_code = EXIT_INTERRUPTED  # until it is complete
        team: Alone | Workers
        if self.is_master:
            events = self._master_events = Events(run_dir, "master")
            team = Workers(self.spec, self.runner, events, run_dir, url, len(self.runner.clients))
        else:
            self.streams = self._make_streams(self.spec, self.workload, run_dir, url, 0)
            events = self.streams.recorder.events
            team = Alone(self.spec, self.streams.player, self.streams.progress, self._close_records)
        conductor = self.conductor = Conductor(self.spec, team, events, run_dir, settle_s=self.settle_s)
        work = [self._perform]
        work += [self._say_for_ever] if self.streams is None else self._upkeep(self.streams, lambda: self._say(conductor.progress()))
        self._greenlets = [gevent.spawn(self._guarded, each) for each in work]
        self.opened.set()

    def _make_streams(self, spec: Spec, workload: Workload, run_dir: Path, url: str, worker: int) -> Streams:
        def fire(row: dict[str, Any], stream: Stream) -> None:
            self.environment.events.request.fire(
                request_type="POST",
                name=f"{workload.path} (stage {row['stage'] + 1}: {_title(spec, row['stage'])})",
                response_time=(row["finished_ns"] - row["scheduled_ns"]) / 1e6,
                response_length=stream.bytes,
                exception=None if row["outcome"] == "ok" else RuntimeError(row["outcome"]),
                context={},
            )

        return Streams(spec, workload, run_dir, url, worker, self.api_key, fire)

    def _upkeep(self, streams: Streams, say: Callable[[], None]) -> list[Callable[[], None]]:
        return [lambda: streams.keep(say), streams.recorder.probe, *([self._end_with_parent] if RECORDS_DIR in os.environ else [])]

    def _end_with_parent(self) -> None:
        """A worker that joined from elsewhere has no leader any more once the process that carries its words is gone."""
        parent = os.getppid()
        while os.getppid() == parent:
            gevent.sleep(MASTER_S)
        self.quit(EXIT_INTERRUPTED)

    def _perform(self) -> None:
        assert self.conductor is not None  # noqa: S101
        self.conductor.perform()
        self.environment.process_exit_code = 0  # also where requests failed: the report says what they were

    def _say_for_ever(self) -> None:
        assert self.conductor is not None  # noqa: S101
        while True:
            gevent.sleep(MASTER_S)
            self._say(self.conductor.progress())

    def _say(self, line: str) -> None:
        forget_seconds(self.environment.stats)
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever started this is gone, and nobody watches: end the run
            self.quit(EXIT_INTERRUPTED)

    # What a worker hears from its master.

    def _open(self, environment: Any, msg: Any) -> None:
        del environment
        self._guarded(lambda: self._join(msg.data))

    def _join(self, run: dict[str, Any]) -> None:
        if self.streams is not None:
            return
        spec = Spec.model_validate(run["spec"])
        records_dir = Path(os.environ.get(RECORDS_DIR, run["run_dir"]))
        streams = self._make_streams(spec, Workload(spec), records_dir, run["url"], self.runner.worker_index)
        streams.recorder.events.write("run_start", spec_sha256=spec.sha256, reader=streams.reader.kind)
        self.streams = streams

        def tell() -> None:
            self.runner.send_message("kilocopy_progress", streams.progress())

        self._greenlets = [gevent.spawn(self._guarded, each) for each in self._upkeep(streams, tell)]
        self.opened.set()
        self.runner.send_message("kilocopy_joined", {"worker": self.runner.worker_index})

    def _gather(self, environment: Any, msg: Any) -> None:
        del environment
        self._guarded(lambda: self._make_ready(msg.data))

    def _make_ready(self, part: dict[str, Any]) -> None:
        if self.streams is None:
            return
        self.plan = schedule.plan(self.streams.spec, part["stage"], part["share"], part["shares"], level=part["level"], load=part["load"])
        self.streams.player.gather(self.plan)
        self.runner.send_message("kilocopy_ready", {"stage": part["stage"], "level": part["level"]})

    def _play(self, environment: Any, msg: Any) -> None:
        del environment
        self._guarded(lambda: self._take_part(msg.data))

    def _take_part(self, part: dict[str, Any]) -> None:
        if self.streams is None or self.plan is None:
            return  # the run was closed meanwhile
        begin_ns = _own_clock(part["begin"], self.streams.recorder.events.host)
        report = self.streams.player.perform(self.plan, begin_ns, load=part["load"], workers=part["shares"])
        self.runner.send_message("kilocopy_drained", report.as_message())

    def _end(self, environment: Any, msg: Any) -> None:
        del environment
        self._guarded(lambda: self._close_records(msg.data["reason"]))

    # The ways to end.

    def _guarded(self, work: Callable[[], None]) -> None:
        """Nothing that goes wrong here may leave a run that looks alive."""
        try:
            work()
        except ProblemError as problem:
            self.fail(f"kilocopy: {problem}", problem.code)
        except OSError as error:
            self.fail(f"kilocopy: the run ended: its records cannot be written: {error.strerror or error}", EXIT_DISK_FULL)
        except Exception:
            self.fail(traceback.format_exc(), EXIT_BUG)

    def fail(self, sentence: str, code: int) -> None:
        """End the run at once; what was recorded stays."""
        sys.stderr.write(sentence + "\n")
        if self.is_worker:
            with contextlib.suppress(Exception):  # the master may be what is gone
                self.runner.send_message("kilocopy_failed", {"sentence": sentence.removeprefix("kilocopy: ")})
        if self.streams is not None:
            self.streams.recorder.abandon()
        self.quit(code)

    def quit(self, code: int) -> None:
        """Stop asking, cancel what is open, and leave with an exit code."""
        self.environment.process_exit_code = code
        gevent.spawn(self._leave)

    def _leave(self) -> None:
        self.stop()
        self.runner.quit()
        if self.environment.web_ui:
            self.environment.web_ui.stop()

    def _close_records(self, reason: str) -> None:
        if self.streams is not None:
            self.streams.recorder.close(reason)
        self.environment.process_exit_code = 0 if reason == "complete" else EXIT_INTERRUPTED

    def stop(self) -> None:
        """Close the run, for whatever reason it ends; each stream that is open becomes a cancelled row first.

        A signal, Locust's quitting and its stopping all come here, some at once: the first does it, the others wait for it.
        """
        with self._closing:
            current = gevent.getcurrent()
            gevent.killall([greenlet for greenlet in self._greenlets if greenlet is not current])
            if self._master_events is not None and self.conductor is not None:
                if not self.conductor.complete:
                    with contextlib.suppress(OSError):
                        self._master_events.write("run_end", reason="interrupted")
                self._master_events = self.conductor = None
            if self.streams is None:
                return
            self.runner.user_greenlets.kill()
            try:
                self.streams.close("interrupted")
            except OSError as error:
                sys.stderr.write(f"kilocopy: the last records cannot be written: {error.strerror or error}\n")
                self.environment.process_exit_code = EXIT_DISK_FULL
            self.streams = self.conductor = None
            self.opened.clear()


def forget_seconds(stats: Any) -> None:
    """Let Locust's statistics forget what they look at no more: else they keep a count for each second, of every stage, as long as a run lasts."""
    begin_s = int(stats.last_request_timestamp or 0) - LOCUST_LOOKS_BACK_S
    for entry in (stats.total, *stats.entries.values()):
        for counts in (entry.num_reqs_per_sec, entry.num_fail_per_sec):
            for second in [second for second in counts if second < begin_s]:
                del counts[second]
    del stats.history[:-CHART_POINTS]


def _own_clock(begin: dict[str, Any], host: str) -> int:
    """A moment the master named, on this process's monotonic clock: by the measured offset, the same clock, or by way of wall time."""
    if RECORDS_DIR in os.environ:
        with contextlib.suppress(OSError, ValueError, KeyError):
            offset = json.loads((Path(os.environ[RECORDS_DIR]) / "clock.json").read_text(encoding="ascii"))
            return int(begin["perf_ns"]) + int(offset["offset_ns"])
    elif begin["host"] == host:
        return int(begin["perf_ns"])
    return int(begin["wall_ns"]) - time.time_ns() + time.perf_counter_ns()


def _first_load(spec: Spec, index: int) -> float | None:
    stage = spec.stages[index]
    return stage.start if isinstance(stage, SearchStage) else None


def _title(spec: Spec, index: int) -> str:
    stage = spec.stages[index]
    return f"{stage.copies} copies" if isinstance(stage, ClosedStage) else stage.arrival
