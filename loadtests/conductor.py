"""Goes through the stages of a spec: what is played next, and what comes between.

A plain stage is one level; a search stage is as many as it takes (kilocopy/search.py decides from what each level showed, which
is read from the records as the report will read them). After each level the conductor waits until the servers' counters had time
to be scraped (settle).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import gevent

from kilocopy import schedule, search
from kilocopy.records import Events
from kilocopy.search import Level
from kilocopy.spec import ClosedStage, PlainStage, SearchStage, Spec
from loadtests.team import Alone, Workers, streams_of

RATE_OVER_S = 3.0
RECORDS_S = 10.0  # for rows to come home from other hosts, and for the scrape that closes a level's account
POLL_S = 0.2


class Conductor:
    """The run, in one greenlet: `perform`. Locust's shape reads `users` and `complete`."""

    def __init__(self, spec: Spec, team: Alone | Workers, events: Events, run_dir: Path, *, settle_s: float) -> None:
        self._spec, self._team, self._events, self._run_dir, self._settle_s = spec, team, events, run_dir, settle_s
        self._index, self._level = 0, 0
        self._stage: PlainStage = _first(spec)
        self._begun_s = time.monotonic()
        self._settling = False
        self._seen: list[tuple[float, int]] = []
        self._workers = team.workers
        self.users = self._workers * share_of_users(self._stage, self._workers)
        self.complete = False

    def perform(self) -> None:
        """All stages. Raises OSError when the disk is full, ProblemError when nobody is left to play."""
        self._team.gather()
        self._events.write("run_start", spec_sha256=self._spec.sha256)
        for index, stage in enumerate(self._spec.stages):
            if isinstance(stage, SearchStage):
                self._search(index, stage)
            else:
                self._play(index, 0, stage, None)
        self._team.end("complete")
        self.complete = True

    def _search(self, index: int, stage: SearchStage) -> None:
        tried: list[Level] = []
        while (load := search.following(stage, tried, self._spec.slo)) is not None:
            rows = self._play(index, len(tried), stage.at(load), load)
            tried.append(self._judge(index, len(tried), load, rows))

    def _judge(self, index: int, level: int, load: float, rows: int) -> Level:
        """A level as the report judges it: by its window, whether that was steady, the copies in flight, the driver and the counters.

        Unsound where its rows are not all there: then nobody knows what it showed.
        """
        from kilocopy import headline, recompute  # noqa: PLC0415  half a second, for what only searches need

        deadline_s, late = time.monotonic() + RECORDS_S, False
        while (measured := recompute.level(self._run_dir, index, level, rows, scraped=not late)) is None and not late:
            gevent.sleep(POLL_S)
            late = time.monotonic() > deadline_s
        return Level(load, 0, 0, sound=False) if measured is None else headline.as_level(measured, self._spec.slo)

    def _play(self, index: int, level: int, stage: PlainStage, load: float | None) -> int:
        """Play a level; returns how many rows it has."""
        self._index, self._level, self._stage, self._settling = index, level, stage, False
        workers = self._team.workers
        # Never fewer: an idle user costs nothing. One more for each worker that is gone: Locust deals users out anew only for a new number.
        self.users = max(self.users + self._workers - workers, workers * share_of_users(stage, workers))
        self._workers = workers
        self._begun_s = time.monotonic()
        reports = self._team.play(index, level, load, self.users)
        self._settling = True
        gevent.sleep(self._settle_s)
        self._events.write("stage_settled", stage=index, level=level)
        return sum(report.rows for report in reports)

    def progress(self) -> str:
        """One JSON line about how far the run is; `tokens_per_s` is over the last three seconds and takes an event for a token."""
        now_s, seen = time.monotonic(), self._team.progress()
        self._seen = [*(point for point in self._seen if point[0] > now_s - RATE_OVER_S - 0.5), (now_s, seen["events"])]
        (then_s, before), seconds = self._seen[0], now_s - self._seen[0][0]
        return json.dumps(
            {
                "t": round(time.time(), 3),
                "stage": self._index,
                "stages": len(self._spec.stages),
                "level": self._level,
                "kind": self._spec.stages[self._index].arrival,
                "copies": self._stage.copies if isinstance(self._stage, ClosedStage) else None,
                "rate_per_s": getattr(self._stage, "rate_per_s", None),
                "phase": "settle" if self._settling else seen["phase"],
                "eta_s": self._eta_s(),
                "in_flight": seen["in_flight"],
                "tokens_per_s": round((seen["events"] - before) / seconds, 1) if now_s > then_s else 0.0,
                "requests_ok": seen["ok"],
                "errors": seen["errors"],
            }
        )

    def _eta_s(self) -> float | None:
        """Seconds until the run's end without drains; None where a stage ahead has no fixed length."""
        total_s = 0.0
        for stage in self._spec.stages[self._index :]:
            length_s = schedule.length_s(stage)
            if length_s is None:
                return None
            total_s += length_s + self._settle_s
        return round(max(0.0, total_s - (time.monotonic() - self._begun_s)), 1)


def share_of_users(stage: PlainStage, workers: int) -> int:
    """Users that each worker needs, so that every one has enough whichever way Locust deals them out."""
    return -(-streams_of(stage) // workers)


def _first(spec: Spec) -> PlainStage:
    stage = spec.stages[0]
    return stage.at(stage.start) if isinstance(stage, SearchStage) else stage
