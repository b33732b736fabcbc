"""Plays the stages of a spec one after the other: who asks when, until when, and what comes between stages.

A closed stage is N copies, each asking again as soon as its stream ended. Locust brings the greenlets (its users); the conductor
gives each a part, says when to stop asking, waits until the last stream ended (drain) and then until the servers' counters had
time to be scraped (settle). A copy that fails waits a little longer each time, so that an outage is not a busy loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gevent
from gevent.event import AsyncResult, Event

from kilocopy import schedule
from kilocopy.schedule import ClosedPlan, CopyStart
from kilocopy.spec import Spec
from loadtests.recorder import Progress, Recorder
from loadtests.streams import Client, Reader, Stream
from loadtests.workload import Workload

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 5.0
Fire = Callable[[dict[str, Any], Stream], None]


@dataclass(slots=True)
class Stage:
    """A stage while it is played."""

    plan: ClosedPlan
    begun_ns: int
    left: int | None  # requests that may still begin after the warm-up
    playing: int = 0
    stopped: Event = field(default_factory=Event)
    empty: Event = field(default_factory=Event)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stage began."""
        return (time.perf_counter_ns() - self.begun_ns) / 1e9

    def admits(self) -> bool:
        """Whether a copy may ask once more. The first copy that may not ends the asking of all."""
        if not self.stopped.is_set() and self.left is not None and self.elapsed_s >= self.plan.warm_s:
            if self.left == 0:
                self.stopped.set()
            else:
                self.left -= 1
        return not self.stopped.is_set()

    def leave(self) -> None:
        """A copy is done with this stage."""
        self.playing -= 1
        if self.playing == 0:
            self.empty.set()


class Conductor:
    """The run of this process. `perform` is its greenlet; each Locust user calls `play` over and over."""

    def __init__(self, spec: Spec, workload: Workload, reader: Reader, recorder: Recorder, *, fire: Fire, settle_s: float) -> None:
        self._spec, self._workload, self._reader, self._recorder = spec, workload, reader, recorder
        self._fire, self._settle_s = fire, settle_s
        self._idle: list[AsyncResult] = []
        self._changed = Event()
        self._progress = Progress()
        self._stage: Stage | None = None
        self._phase = "ramp"
        self.copies = spec.stages[0].copies  # how many users there should be now
        self.complete = False

    def perform(self) -> None:
        """All stages. Raises OSError when the disk is full."""
        self._recorder.events.write("run_start", spec_sha256=self._spec.sha256)
        for index in range(len(self._spec.stages)):
            self._perform_stage(schedule.plan(self._spec, index))
        self._recorder.close("complete")
        self.complete = True

    def _perform_stage(self, plan: ClosedPlan) -> None:
        events = self._recorder.events
        self.copies, self._phase = len(plan.starts), "ramp"
        self._wait_for_users(self.copies)
        stage = self._stage = Stage(plan, time.perf_counter_ns(), plan.requests, playing=self.copies)
        self._recorder.stage = plan.stage
        events.write("stage_start", stage=plan.stage)
        for start in plan.starts:
            self._idle.pop().set((stage, start))
        stage.stopped.wait(plan.stop_s)
        stage.stopped.set()
        events.write("stage_stop_asking", stage=plan.stage)
        self._phase = "drain"
        stage.empty.wait()
        events.write("stage_drained", stage=plan.stage)
        self._phase = "settle"
        gevent.sleep(self._settle_s)
        events.write("stage_settled", stage=plan.stage)
        self._recorder.stage = -1

    def _wait_for_users(self, count: int) -> None:
        """Until Locust has made (or stopped) users so that as many as copies are waiting for a part."""
        while len(self._idle) != count:
            self._changed.clear()
            self._changed.wait(1)

    def play(self, client: Client) -> None:
        """Wait for a part in the next stage and play it."""
        part: AsyncResult = AsyncResult()
        self._idle.append(part)
        self._changed.set()
        try:
            stage, start = part.get()
        finally:
            if part in self._idle:
                self._idle.remove(part)
                self._changed.set()
        try:
            self._ask_on(stage, start, client)
        finally:
            stage.leave()

    def _ask_on(self, stage: Stage, start: CopyStart, client: Client) -> None:
        """One copy in one stage: ask, and ask again."""
        if stage.stopped.wait(max(0.0, start.start_s - stage.elapsed_s)):
            return
        sequence = failures = 0
        while stage.admits():
            row = self._request({"stage": stage.plan.stage, "copy": start.copy, "sequence": sequence}, client)
            sequence += 1
            failures = 0 if row["outcome"] == "ok" else failures + 1
            if failures:
                stage.stopped.wait(min(BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 10), BACKOFF_MAX_S))

    def _request(self, place: dict[str, int], client: Client) -> dict[str, Any]:
        recorder, scheduled_ns = self._recorder, time.perf_counter_ns()
        body = self._workload.body(place["stage"], place["copy"], place["sequence"])
        stream = Stream()
        recorder.in_flight += 1
        recorder.sent += 1
        try:
            client.ask(self._workload.path, body, stream)
        finally:  # also when this greenlet is being killed: a cancelled stream is a row like every other
            recorder.in_flight -= 1
            row = recorder.finished(place, scheduled_ns, stream)
            self._fire(row, stream)
        return row

    def progress(self) -> str:
        """One line about how far the run is."""
        stage, copies = self._stage, self.copies
        index = stage.plan.stage if stage else 0
        fields = {"stage": index, "stages": len(self._spec.stages), "copies": copies, "phase": self.phase, "eta_s": self._eta_s()}
        return self._progress.line(self._recorder, self._reader.events, **fields)

    @property
    def phase(self) -> str:
        """ramp, warmup, window, drain or settle."""
        stage = self._stage
        if self._phase != "ramp" or stage is None:
            return self._phase
        if stage.elapsed_s < stage.plan.ramp_s:
            return "ramp"
        return "warmup" if stage.elapsed_s < stage.plan.warm_s else "window"

    def _eta_s(self) -> float | None:
        """Seconds until the run's end without drains; None while a stage ahead counts requests."""
        index = self._stage.plan.stage if self._stage else 0
        total_s = 0.0
        for later in self._spec.stages[index:]:
            if later.duration_s is None:
                return None
            total_s += later.ramp_s + later.warmup_s + later.duration_s + self._settle_s
        return round(max(0.0, total_s - (self._stage.elapsed_s if self._stage else 0.0)), 1)
