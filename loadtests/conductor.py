"""Goes through the stages of a spec: what is played next, and what comes between.

A plain stage is one level; a search stage is as many as it takes (kilocopy/search.py decides from what each level showed). After
each level the conductor waits until the servers' counters had time to be scraped (settle).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import gevent

from kilocopy import schedule, search
from kilocopy.records import Events
from kilocopy.search import Level
from kilocopy.spec import ClosedStage, PlainStage, SearchStage, Spec
from loadtests.player import Report
from loadtests.team import Alone, Workers, streams_of

RATE_OVER_S = 3.0


class Conductor:
    """The run, in one greenlet: `perform`. Locust's shape reads `users` and `complete`."""

    def __init__(self, spec: Spec, team: Alone | Workers, events: Events, *, settle_s: float) -> None:
        self._spec, self._team, self._events, self._settle_s = spec, team, events, settle_s
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
            reports = self._play(index, len(tried), stage.at(load), load)
            tried.append(as_level(load, reports, self._workers))

    def _play(self, index: int, level: int, stage: PlainStage, load: float | None) -> list[Report]:
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
        return reports

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


def as_level(load: float, reports: Sequence[Report], workers: int) -> Level:
    """What a search learns from a level: the sum over the workers; unsound where any of them was lost, could not keep up, or had no room."""
    finished = sum(report.finished for report in reports)
    failed = sum(report.failed + report.dropped for report in reports)
    return Level(
        load=load,
        judged=sum(report.judged for report in reports),
        attained=sum(report.attained for report in reports),
        error_fraction=failed / finished if finished else 0.0,
        sound=len(reports) == workers
        and sum(report.unready for report in reports) <= search.UNREADY_FRACTION_MAX * finished
        and all(_kept_up(report) for report in reports),
    )


def _kept_up(report: Report) -> bool:
    if report.loop_lag_p99_s is None or report.cpu_fraction is None:
        return False
    return search.sound(report.loop_lag_p99_s, report.cpu_fraction, report.send_lag_p99_s, report.tpot_mean_s)


def share_of_users(stage: PlainStage, workers: int) -> int:
    """Users that each worker needs, so that every one has enough whichever way Locust deals them out."""
    return -(-streams_of(stage) // workers)


def _first(spec: Spec) -> PlainStage:
    stage = spec.stages[0]
    return stage.at(stage.start) if isinstance(stage, SearchStage) else stage
