"""Who plays: this process alone, or workers that Locust's master leads. The conductor sees no difference.

Workers take their part of each level from the plan itself (kilocopy/schedule.py): the master only says which level, which share,
and when to begin. The records never pass through it: each worker writes its own files in the run directory.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import gevent

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.records import Events
from kilocopy.spec import ClosedStage, PlainStage, Spec
from loadtests.player import Player, Report

BEGIN_IN_S = 0.5  # time for the message to reach every worker before they begin together
JOIN_S = 60.0
LOST_POLL_S = 0.2
Say = Callable[[dict[str, Any]], None]


class Team(Protocol):
    """What the conductor asks of those who play."""

    def gather(self) -> None:
        """Wait until everyone is there. Raises ProblemError."""

    def play(self, stage: int, level: int, load: float | None, users: int) -> list[Report]:
        """Have one level played; returns when the last stream ended. Raises ProblemError when nobody is left."""

    def progress(self) -> dict[str, Any]:
        """in_flight, events, ok, errors by type and phase, now."""

    def end(self, reason: str) -> None:
        """Close all records."""


def streams_of(stage: PlainStage) -> int:
    """Streams that a plain stage needs open at most."""
    return stage.copies if isinstance(stage, ClosedStage) else stage.max_in_flight


class Alone:
    """This process plays."""

    workers = 1

    def __init__(self, spec: Spec, player: Player, progress: Callable[[], dict[str, Any]], close: Callable[[str], None]) -> None:
        self._spec, self._player, self._progress, self._close = spec, player, progress, close

    def gather(self) -> None:
        """Nobody to wait for."""

    def play(self, stage: int, level: int, load: float | None, users: int) -> list[Report]:
        """Play it here and now."""
        del users  # Locust's shape asks for them
        plan = schedule.plan(self._spec, stage, level=level, load=load)
        return [self._player.perform(plan, None, load=load, workers=1)]

    def progress(self) -> dict[str, Any]:
        """This process's own."""
        return self._progress()

    def end(self, reason: str) -> None:
        """Close the records."""
        self._close(reason)


class Workers:
    """Locust's workers play. Lives in the master, which drives nothing itself.

    Messages to a worker: `kilocopy_open` {spec, run_dir, url}, `kilocopy_gather` {stage, level, load, share, shares}, `kilocopy_play`
    (the same and {begin}), and `kilocopy_end` {reason}; from it: `kilocopy_joined`, `kilocopy_ready` {stage, level}, `kilocopy_drained`
    (a Report), `kilocopy_progress`, `kilocopy_failed`.
    """

    def __init__(self, spec: Spec, runner: Any, events: Events, run_dir: Path, url: str, expected: int) -> None:
        self._spec, self._runner, self._events = spec, runner, events
        self._run_dir, self._url, self._expected = run_dir, url, expected
        self._numbers: dict[str, int] = {}  # of the workers that joined, by Locust's name for them
        self._lost: set[str] = set()
        self._ready: set[str] = set()  # who has the users that the level needs
        self._reports: dict[str, Report] = {}
        self._progress: dict[str, dict[str, Any]] = {}
        self._place = {"stage": -1, "level": 0}
        self._failure = ""
        for name, hear in {"joined": self._joined, "ready": self._heard_ready, "drained": self._drained, "progress": self._progressed, "failed": self._failed}.items():
            runner.register_message(f"kilocopy_{name}", hear)

    @property
    def workers(self) -> int:
        """How many still play."""
        return max(1, len(self._live()))

    def gather(self) -> None:
        """Tell the workers about the run until as many as are expected have opened their records."""
        deadline = time.monotonic() + JOIN_S
        told: set[str] = set()
        while len(self._live()) < self._expected:
            if self._failure:
                raise ProblemError(self._failure)
            if time.monotonic() > deadline:
                raise ProblemError(f"{len(self._live())} of {self._expected} driver workers joined within {JOIN_S:g} s; see driver.log")
            for client in set(self._runner.clients) - told:
                told.add(client)
                run = {"spec": self._spec.model_dump(mode="json"), "run_dir": str(self._run_dir.resolve()), "url": self._url}
                self._runner.send_message("kilocopy_open", run, client)
            gevent.sleep(LOST_POLL_S)

    def play(self, stage: int, level: int, load: float | None, users: int) -> list[Report]:
        """Share the level between the workers that live, and wait for their reports; one that is lost is noted and not waited for."""
        del users
        self._place, self._ready, self._reports = {"stage": stage, "level": level}, set(), {}
        shares = sorted(self._live(), key=self._numbers.__getitem__)
        parts = {client: {**self._place, "load": load, "share": share, "shares": len(shares)} for share, client in enumerate(shares)}
        for client, part in parts.items():
            self._runner.send_message("kilocopy_gather", part, client)
        while any(client not in self._ready for client in self._note_lost(shares)):  # users come once a second: a moment named before would pass
            gevent.sleep(LOST_POLL_S)
        begin = {"perf_ns": time.perf_counter_ns() + int(BEGIN_IN_S * 1e9), "wall_ns": time.time_ns() + int(BEGIN_IN_S * 1e9)}
        for client in self._note_lost(shares):
            self._runner.send_message("kilocopy_play", parts[client] | {"begin": begin | {"host": socket.gethostname()}}, client)
        while any(client not in self._reports for client in self._note_lost(shares)):
            gevent.sleep(LOST_POLL_S)
        if not self._live():
            raise ProblemError(self._failure or "every driver worker is gone; what they recorded is kept")
        return [self._reports[client] for client in shares if client in self._reports]

    def _live(self) -> list[str]:
        return [client for client in self._numbers if client not in self._lost]

    def _note_lost(self, shares: Sequence[str]) -> list[str]:
        """Those of a level that still play; who went missing since is written down, once."""
        for client in shares:
            node = self._runner.clients.get(client)
            if client not in self._lost and (node is None or node.state == "missing"):
                self._lose(client)
        return [client for client in shares if client not in self._lost]

    def _lose(self, client: str) -> None:
        if client in self._numbers and client not in self._lost:
            self._lost.add(client)
            self._progress.pop(client, None)
            self._events.write("worker_lost", worker=self._numbers[client], **self._place)
            with contextlib.suppress(Exception):  # should it come back, it shall not play a share that others have taken over
                self._runner.send_message("quit", client_id=client)

    def progress(self) -> dict[str, Any]:
        """The sum over the workers that live."""
        seen = list(self._progress.values())
        errors: dict[str, int] = {}
        for part in seen:
            for outcome, count in part["errors"].items():
                errors[outcome] = errors.get(outcome, 0) + count
        sums = {key: sum(part[key] for part in seen) for key in ("in_flight", "events", "ok")}
        return sums | {"errors": dict(sorted(errors.items())), "phase": seen[0]["phase"] if seen else "ramp"}

    def end(self, reason: str) -> None:
        """Tell all to close their records, and give them a moment to."""
        for client in self._live():
            self._runner.send_message("kilocopy_end", {"reason": reason}, client)
        gevent.sleep(BEGIN_IN_S)
        self._events.write("run_end", reason=reason)

    def _joined(self, environment: Any, msg: Any) -> None:
        del environment
        self._numbers[msg.node_id] = int(msg.data["worker"])

    def _heard_ready(self, environment: Any, msg: Any) -> None:
        del environment
        if msg.data == self._place:
            self._ready.add(msg.node_id)

    def _drained(self, environment: Any, msg: Any) -> None:
        del environment
        report = Report(**msg.data)
        if (report.stage, report.level) == (self._place["stage"], self._place["level"]):
            self._reports[msg.node_id] = report

    def _progressed(self, environment: Any, msg: Any) -> None:
        del environment
        if msg.node_id in self._numbers and msg.node_id not in self._lost:
            self._progress[msg.node_id] = msg.data

    def _failed(self, environment: Any, msg: Any) -> None:
        """A worker says why it ends; the others go on."""
        del environment
        self._failure = str(msg.data["sentence"])
        self._lose(msg.node_id)
