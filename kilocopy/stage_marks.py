"""Marks the stages of a run in Grafana while it goes on: a region from a stage's start to the end of its last stream.

What happened is read from the run's own events, so the times are exact however late Grafana hears of them. This runs beside the
load in a thread of its own: where Grafana fails, one warning is said, it is tried again now and then, and the run knows nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kilocopy import grafana, records, windows
from kilocopy.grafana import Grafana
from kilocopy.problem import ProblemError
from kilocopy.spec import Spec

EVERY_S, AGAIN_S, LAST_S = 1.0, 30.0, 8.0  # look for news; after a failure; how long the end of a run may wait for Grafana
TIMEOUT_S = 3.0


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment names a Grafana and gives what it takes to write there."""
    keyed = environment.get(grafana.TOKEN) or (environment.get(grafana.USER) and environment.get(grafana.PASSWORD))
    return bool(environment.get(grafana.URL) and keyed)


def address(environment: Mapping[str, str] = os.environ) -> str | None:
    """The Grafana that watches, for the manifest: never with a password in it; None where it is not set or no address."""
    try:
        return grafana.base_url(environment[grafana.URL])
    except (KeyError, ProblemError):
        return None


@contextlib.contextmanager
def annotating(run_dir: Path, spec: Spec, warn: Callable[[str], None]) -> Iterator[None]:
    """Mark stages for the time of a `with` block, where the environment asks for it; `warn` is told once if that fails."""
    if not wanted():
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(run_dir, spec, warn, stop), name="annotations", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LAST_S)


def _follow(run_dir: Path, spec: Spec, warn: Callable[[str], None], stop: threading.Event) -> None:
    marks: Marks | None = None
    warned, next_s = False, 0.0
    while True:
        last = stop.wait(EVERY_S)
        if not last and time.monotonic() < next_s:
            continue
        try:
            marks = marks or Marks(Grafana(os.environ[grafana.URL], timeout_s=TIMEOUT_S), spec, run_dir.name)
            marks.update(records.read_events(run_dir), ended=last)
        except (ProblemError, OSError) as problem:
            next_s = time.monotonic() + AGAIN_S
            if not warned:
                warn(f"stages are not marked in Grafana, the run goes on: {problem}")
            warned = True
        if last:
            return


class Marks:
    """What Grafana has been told of a run's stages."""

    def __init__(self, there: Grafana, spec: Spec, run: str) -> None:
        self._grafana, self._spec, self._run = there, spec, run
        self._told: dict[tuple[int, int], tuple[int, int | None]] = {}  # place -> Grafana's number for it, the end that it knows (ms)

    def update(self, events: Sequence[dict[str, Any]], *, ended: bool = False) -> None:
        """Tell Grafana what is new in the run's events; with `ended`, stages that have no end get the last event's time. Raises ProblemError."""
        stamped = [{**event, "t_s": event["wall_ns"] / 1e9} for event in events if "wall_ns" in event]
        for span in windows.spans(stamped):
            place = (span.index, span.level)
            end_s = span.drained_s if span.drained_s is not None or not ended else max(event["t_s"] for event in stamped)
            end_ms = None if end_s is None else round(1000 * end_s)
            number, known = self._told.get(place, (None, None))
            if number is None:
                number = self._add(span, end_ms)
            elif end_ms != known:
                self._end(number, span, end_ms)
            self._told[place] = (number, end_ms)

    def _add(self, span: windows.Span, end_ms: int | None) -> int:
        said = self._words(span)
        added = self._grafana.ask("marking a stage", lambda: self._grafana.api.annotations.add_annotation(time_to=end_ms, **said))
        return int(added["id"])

    def _end(self, number: int, span: windows.Span, end_ms: int | None) -> None:
        said = self._words(span)
        call = self._grafana.api.annotations.partial_update_annotation
        self._grafana.ask("marking a stage's end", lambda: call(number, time_to=end_ms, **said))

    def _words(self, span: windows.Span) -> dict[str, Any]:
        """Time, text and tags of a stage. Dashboards look for the tags `kilocopy` and `run:`."""
        tags = ["kilocopy", f"run:{self._run}", f"model:{self._spec.model.id}", f"stage:{span.index}"]
        place = f"{span.index}.{span.level + 1}" if self._spec.stages[span.index].arrival == "search" else f"{span.index}"
        return {"time_from": round(1000 * span.start_s), "tags": tags, "text": f"Stage {place}: {windows.title(self._spec, span)}"}
