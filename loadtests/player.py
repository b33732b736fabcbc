"""Plays one level of load with this process's share of the streams: closed copies that ask again, or arrivals at their times.

Locust brings the greenlets (its users): each has a connection of its own, waits here for a part, plays it and waits again. A copy
that fails waits a little longer each time (or as long as the server's Retry-After says), so that an outage is not a busy loop. An
arrival that finds no user free, or no room under max_in_flight, is recorded as dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import gevent
from gevent.event import AsyncResult, Event

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.schedule import Arrival, ClosedPlan, CopyStart, Plan
from loadtests.recorder import Recorder
from loadtests.streams import Client, Stream
from loadtests.workload import Workload

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 5.0
USERS_WAIT_S = 120.0
Fire = Callable[[dict[str, Any], Stream], None]


@dataclass(slots=True)
class Report:
    """A process has played its part of a level, and this many rows of it are in its records: a search waits for them."""

    worker: int
    stage: int
    level: int
    rows: int

    def as_message(self) -> dict[str, Any]:
        """For the way from a worker to the master."""
        return asdict(self)


@dataclass(slots=True)
class Level:
    """A level while it is played."""

    plan: Plan
    begun_ns: int
    left: int | None = None  # requests that may still begin after the warm-up
    playing: int = 0
    stopped: Event = field(default_factory=Event)
    emptied: Event = field(default_factory=Event)
    rows: int = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the level began; negative before."""
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
        """A stream's part in this level is over."""
        self.playing -= 1
        if self.playing == 0:
            self.emptied.set()

    def drained(self) -> None:
        """Wait until nobody plays."""
        while self.playing:
            self.emptied.clear()
            self.emptied.wait()


class Player:
    """This process's streams. `perform` plays one level; each Locust user calls `serve` and stays there."""

    def __init__(self, workload: Workload, recorder: Recorder, *, fire: Fire) -> None:
        self._workload, self._recorder, self._fire = workload, recorder, fire
        self._idle: list[AsyncResult] = []
        self._joined = Event()
        self.level: Level | None = None
        self.phase = "ramp"

    def gather(self, plan: Plan) -> None:
        """Wait until there are users for all of a plan. Raises ProblemError where Locust brings too few."""
        self._wait_for_users(len(plan.starts) if isinstance(plan, ClosedPlan) else min(plan.slots, len(plan.arrivals)))

    def perform(self, plan: Plan, begin_ns: int | None, *, load: float | None, workers: int) -> Report:
        """Play one level and return when its last stream ended. None begins once the users are there; a time that has passed is begun at
        all the same, and what is late shows as send lag. Raises ProblemError where Locust brings too few users.
        """
        recorder, place = self._recorder, {"stage": plan.stage, "level": plan.level}
        self.phase = "ramp"
        self.gather(plan)
        begun_ns = time.perf_counter_ns() if begin_ns is None else begin_ns
        gevent.sleep(max(0.0, (begun_ns - time.perf_counter_ns()) / 1e9))
        level = self.level = Level(plan, begun_ns)
        exhausted = recorder.exhausted
        recorder.begin(plan.stage, plan.level, len(plan.starts) if isinstance(plan, ClosedPlan) else None)
        recorder.events.write("stage_start", **place, load=load, workers=workers)
        if isinstance(plan, ClosedPlan):
            self._play_copies(level, plan)
        else:
            self._play_arrivals(level)
        level.stopped.set()
        if not isinstance(plan, ClosedPlan) or plan.starts or plan.stop_s is not None:  # who has no copy has not stopped asking
            recorder.events.write("stage_stop_asking", **place)
        self.phase = "drain"
        level.drained()
        exhausted = recorder.exhausted - exhausted
        if exhausted:
            recorder.events.write("sockets_exhausted", **place, requests=exhausted)
        recorder.events.write("stage_drained", **place)
        recorder.begin(-1, 0, None)
        self.phase = "settle"
        recorder.flush()
        return Report(recorder.worker, plan.stage, plan.level, level.rows)

    def stop(self) -> None:
        """Send nothing more; what is open goes on to its end."""
        if self.level is not None:
            self.level.stopped.set()

    def _play_copies(self, level: Level, plan: ClosedPlan) -> None:
        level.left = plan.requests
        level.playing = len(plan.starts)
        for start in plan.starts:
            self._idle.pop().set((level, start))
        if plan.starts:
            level.stopped.wait(plan.stop_s)
        elif plan.stop_s is not None:  # more workers than copies: this one has none
            gevent.sleep(plan.stop_s)

    def _play_arrivals(self, level: Level) -> None:
        plan = level.plan
        assert not isinstance(plan, ClosedPlan)  # noqa: S101
        for arrival in plan.arrivals:
            wait_s = arrival.at_s - level.elapsed_s
            if (wait_s > 0 and level.stopped.wait(wait_s)) or level.stopped.is_set():
                return
            if self._idle and level.playing < plan.slots:
                level.playing += 1
                self._idle.pop().set((level, arrival))
            else:
                self._drop(level, arrival)
        level.stopped.wait(max(0.0, plan.stop_s - level.elapsed_s))

    def _drop(self, level: Level, arrival: Arrival) -> None:
        due_ns = level.begun_ns + round(arrival.at_s * 1e9)
        self._recorder.dropped(self._place(level, arrival.index, 0), due_ns)
        level.rows += 1

    def _wait_for_users(self, count: int) -> None:
        """Until Locust has made as many users as streams are needed, and each waits for a part."""
        deadline = time.monotonic() + USERS_WAIT_S
        while len(self._idle) < count:
            if time.monotonic() > deadline:
                raise ProblemError(
                    f"Locust made {len(self._idle)} of {count} users within {USERS_WAIT_S:g} s; this host may be out of memory"
                )
            self._joined.clear()
            self._joined.wait(1)

    def serve(self, client: Client) -> None:
        """A user's life: wait for a part, play it, for ever. Ends when its greenlet is killed."""
        while True:
            part: AsyncResult = AsyncResult()
            self._idle.append(part)
            self._joined.set()
            try:
                level, what = part.get()
            except BaseException:
                if part in self._idle:
                    self._idle.remove(part)
                raise
            try:
                if isinstance(what, CopyStart):
                    self._ask_on(level, what, client)
                else:
                    self._converse(level, what, client)
            finally:
                level.leave()

    def _ask_on(self, level: Level, start: CopyStart, client: Client) -> None:
        """One closed copy: ask, and ask again."""
        if level.stopped.wait(max(0.0, start.start_s - level.elapsed_s)):
            return
        sequence = failures = 0
        history: list[str] = []
        while level.admits():
            row, stream = self._request(level, start.copy, sequence, client, history)
            sequence += 1
            if row["outcome"] != "ok" or sequence % self._workload.turns == 0:
                sequence += -sequence % self._workload.turns  # a conversation that broke off is not taken up again
                history.clear()
            failures = 0 if row["outcome"] == "ok" else failures + 1
            if failures:
                level.stopped.wait(backoff_s(failures, start.copy, sequence) + (stream.retry_after_s or 0.0))

    def _converse(self, level: Level, arrival: Arrival, client: Client) -> None:
        """One arrival: a request at its time, and where the workload has conversations its later turns right after."""
        history: list[str] = []
        due_ns: int | None = level.begun_ns + round(arrival.at_s * 1e9)
        for turn in range(self._workload.turns):
            row, _ = self._request(level, arrival.index, turn, client, history, due_ns=due_ns, shape=arrival.shape)
            if row["outcome"] != "ok" or level.stopped.is_set():
                return
            due_ns = None

    def _request(
        self, level: Level, copy: int, sequence: int, client: Client, history: list[str], *, due_ns: int | None = None, shape: Any = None
    ) -> tuple[dict[str, Any], Stream]:
        recorder, place = self._recorder, self._place(level, copy, sequence)
        scheduled_ns = time.perf_counter_ns() if due_ns is None else due_ns
        body = self._workload.body(**place, shape=shape, history=history)
        stream = Stream()
        recorder.in_flight += 1
        recorder.sent += 1
        try:
            client.ask(self._workload.path, body, stream)
        finally:  # also when this greenlet is being killed: a cancelled stream is a row like every other
            recorder.in_flight -= 1
            row, text = recorder.finished(place, scheduled_ns, stream, lambda: {"request": body.decode(), "answer": self._workload.answer(**place)})
            level.rows += 1
            self._fire(row, stream)
        if self._workload.turns > 1:
            history.append(text)
        return row, stream

    @staticmethod
    def _place(level: Level, copy: int, sequence: int) -> dict[str, int]:
        return {"stage": level.plan.stage, "level": level.plan.level, "copy": copy, "sequence": sequence}


def backoff_s(failures: int, copy: int, sequence: int) -> float:
    """How long a copy waits after so many failures in a row, s: twice as long each time, times 0.5 to 1.5.

    The factor is the copy's own, and the same in every run: copies that an outage failed together do not come back in step.
    """
    whole_s = min(BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 10), BACKOFF_MAX_S)
    return whole_s * (0.5 + schedule.draw(sequence, "backoff", copy) / 2**31)
