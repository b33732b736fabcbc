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
import numpy as np
from gevent.event import AsyncResult, Event

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.schedule import Arrival, ClosedPlan, CopyStart, Plan
from kilocopy.search import attains
from kilocopy.spec import Slo
from loadtests.recorder import Recorder
from loadtests.streams import Client, Stream
from loadtests.workload import Workload

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 5.0
USERS_WAIT_S = 120.0
Fire = Callable[[dict[str, Any], Stream], None]


@dataclass(slots=True)
class Report:
    """What one process saw of a level, for a search's next step; the run's report counts again from the records."""

    worker: int
    stage: int
    level: int
    judged: int = 0  # ok streams that were sent in the level's nominal window
    attained: int = 0
    failed: int = 0
    unready: int = 0  # requests that this host, and not the server, had no room for
    finished: int = 0
    dropped: int = 0
    send_lag_p99_s: float = 0.0
    loop_lag_p99_s: float | None = None  # None: nothing was seen of it, so nothing vouches for the level
    cpu_fraction: float | None = None
    tpot_mean_s: float = 0.0

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
    searching: bool = False
    unready: int = 0  # arrivals for which no stream was free, though max_in_flight allowed one more
    window: list[dict[str, Any]] = field(default_factory=list)  # a search's requests that were due inside the nominal window

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

    def __init__(self, workload: Workload, recorder: Recorder, slo: Slo, *, fire: Fire) -> None:
        self._workload, self._recorder, self._slo, self._fire = workload, recorder, slo, fire
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
        level = self.level = Level(plan, begun_ns, searching=load is not None)
        exhausted = recorder.exhausted
        recorder.begin(plan.stage, plan.level, len(plan.starts) if isinstance(plan, ClosedPlan) else None)
        recorder.events.write("stage_start", **place, load=load, workers=workers)
        mark = gevent.spawn_later(plan.warm_s, recorder.mark) if level.searching else None
        if isinstance(plan, ClosedPlan):
            self._play_copies(level, plan)
        else:
            self._play_arrivals(level)
        level.stopped.set()
        health = recorder.since_mark()
        if not isinstance(plan, ClosedPlan) or plan.starts or plan.stop_s is not None:  # who has no copy has not stopped asking
            recorder.events.write("stage_stop_asking", **place)
        self.phase = "drain"
        level.drained()
        if mark is not None:
            mark.kill()
        exhausted = recorder.exhausted - exhausted
        if exhausted:
            recorder.events.write("sockets_exhausted", **place, requests=exhausted)
        level.unready += exhausted
        recorder.events.write("stage_drained", **place)
        recorder.begin(-1, 0, None)
        self.phase = "settle"
        return self._report(level, health)

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
                level.unready += level.playing < plan.slots
                self._drop(level, arrival)
        level.stopped.wait(max(0.0, plan.stop_s - level.elapsed_s))

    def _drop(self, level: Level, arrival: Arrival) -> None:
        due_ns = level.begun_ns + round(arrival.at_s * 1e9)
        row = self._recorder.dropped(self._place(level, arrival.index, 0), due_ns)
        self._note(level, row)

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
            self._note(level, row)
            self._fire(row, stream)
        if self._workload.turns > 1:
            history.append(text)
        return row, stream

    @staticmethod
    def _place(level: Level, copy: int, sequence: int) -> dict[str, int]:
        return {"stage": level.plan.stage, "level": level.plan.level, "copy": copy, "sequence": sequence}

    def _note(self, level: Level, row: dict[str, Any]) -> None:
        """Keep what a search asks of a request, of its levels only: hours of a plain stage must not grow."""
        if not level.searching:
            return
        due_s = (row["scheduled_ns"] - level.begun_ns) / 1e9
        if due_s >= level.plan.warm_s:
            open_loop = not isinstance(level.plan, ClosedPlan)
            level.window.append(
                {
                    "outcome": row["outcome"],
                    "attained": row["outcome"] == "ok" and attains(row, self._slo, from_scheduled=open_loop, samples=self._workload.samples),
                    "send_lag_s": None if row["sent_ns"] is None else (row["sent_ns"] - row["scheduled_ns"]) / 1e9,
                    "tpot_s": _tpot_s(row, self._workload.samples),
                }
            )

    def _report(self, level: Level, health: dict[str, float]) -> Report:
        rows = level.window
        lags_s = [row["send_lag_s"] for row in rows if row["send_lag_s"] is not None]
        tpots_s = [row["tpot_s"] for row in rows if row["tpot_s"] is not None]
        return Report(
            worker=self._recorder.worker,
            stage=level.plan.stage,
            level=level.plan.level,
            judged=sum(row["outcome"] == "ok" for row in rows),
            attained=sum(row["attained"] for row in rows),
            failed=sum(row["outcome"] not in {"ok", "cancelled", "dropped"} for row in rows),
            unready=level.unready,
            finished=len(rows),
            dropped=sum(row["outcome"] == "dropped" for row in rows),
            send_lag_p99_s=float(np.percentile(lags_s, 99)) if lags_s else 0.0,
            tpot_mean_s=float(np.mean(tpots_s)) if tpots_s else 0.0,
            **health,
        )


def backoff_s(failures: int, copy: int, sequence: int) -> float:
    """How long a copy waits after so many failures in a row, s: twice as long each time, times 0.5 to 1.5.

    The factor is the copy's own, and the same in every run: copies that an outage failed together do not come back in step.
    """
    whole_s = min(BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 10), BACKOFF_MAX_S)
    return whole_s * (0.5 + schedule.draw(sequence, "backoff", copy) / 2**31)


def _tpot_s(row: dict[str, Any], samples: int) -> float | None:
    """Time per token of a request, or of the mean sample of one with several; None where there is none: no text, or never sent."""
    if row["outcome"] != "ok" or row["first_token_ns"] is None:
        return None
    tokens = (row["output_tokens"] or 0) / samples
    if tokens < 2:
        return None
    return float((row["last_token_ns"] - row["first_token_ns"]) / 1e9 / (tokens - 1))
