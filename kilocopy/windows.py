"""Which part of a stage counts. Each kind of stage has its rule, and "no steady state" is an answer.

Closed loop: while every copy runs. Open loop: what MSER-5 leaves of the token rate after the warm-up, if the backlog does not grow.
Ramps, steps and traces are not steady by design: all of it after the warm-up counts, and the stage says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kilocopy import steady
from kilocopy.spec import (
    ClosedStage,
    ConstantStage,
    GammaStage,
    OpenStage,
    PlainStage,
    PoissonStage,
    RampStage,
    SearchStage,
    Spec,
    StepsStage,
    TraceStage,
)
from kilocopy.streams import Floats, Streams
from kilocopy.summary import Reason, Window

GROWTH_BIN_S = 1.0
WINDOW_S_MIN = 1.0  # a rate over less is of the events at its edges: 2,048 tokens of one moment over 1.6 ms are no speed


@dataclass(frozen=True)
class Span:
    """When a level of a stage began, stopped asking, was drained and settled, over all driver processes; and when the next one began.

    `level` counts the loads that a search tried and `load` is what was asked then; elsewhere they are 0 and None. `lost` are the
    workers that were gone before their last stream of this level ended. `socketless`: requests for which a driver's host had no socket left.
    """

    index: int
    level: int
    load: float | None
    start_s: float
    stop_s: float | None
    drained_s: float | None
    settled_s: float | None
    next_s: float
    lost: tuple[int, ...] = ()
    socketless: int = 0

    @property
    def cut_off(self) -> bool:
        """Whether it was killed before its last stream ended: then rows of open streams are missing."""
        return self.stop_s is None or self.drained_s is None

    @property
    def whole(self) -> bool:
        """Whether every stream of it was recorded."""
        return not self.cut_off and not self.lost


def spans(events: Sequence[dict[str, Any]]) -> list[Span]:
    """The levels of the stages that began, in order of time.

    Earliest start and earliest stop, latest drain: a level is steady only while every process keeps asking. A process that
    began a level and did not drain it was killed: the level is cut off, or, where the master says that it lost a worker,
    goes on without it.
    """
    marks: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = {}
    for event in events:
        if event["event"].startswith("stage_") or event["event"] in {"worker_lost", "sockets_exhausted"}:
            place = int(event["stage"]), int(event.get("level") or 0)
            marks.setdefault(place, {}).setdefault(event["event"], []).append(event)
    found = [_span(place, mark) for place, mark in marks.items() if "stage_start" in mark]
    found.sort(key=lambda span: span.start_s)
    following = [*(span.start_s for span in found[1:]), np.inf][: len(found)]
    return [replace(span, next_s=next_s) for span, next_s in zip(found, following, strict=True)]


def _span(place: tuple[int, int], marks: dict[str, list[dict[str, Any]]]) -> Span:
    def times(name: str) -> list[float]:
        return [event["t_s"] for event in marks.get(name, [])]

    begun, drained = ({event.get("process") for event in marks.get(name, [])} for name in ("stage_start", "stage_drained"))
    gone = {int(event["worker"]) for event in marks.get("worker_lost", [])}
    lost = tuple(sorted(worker for worker in gone if f"worker{worker}" not in drained))
    load = marks["stage_start"][0].get("load")
    return Span(
        index=place[0],
        level=place[1],
        load=None if load is None else float(load),
        start_s=min(times("stage_start")),
        stop_s=min(times("stage_stop_asking"), default=None),
        drained_s=max(times("stage_drained"), default=None) if begun - {f"worker{worker}" for worker in lost} <= drained else None,
        settled_s=max(times("stage_settled"), default=None),
        next_s=np.inf,
        lost=lost,
        socketless=sum(int(event["requests"]) for event in marks.get("sockets_exhausted", [])),
    )


def played(spec: Spec, span: Span) -> PlainStage:
    """The plain stage that was played: the spec's, or the one that a search made of its load."""
    asked = spec.stages[span.index]
    if isinstance(asked, SearchStage):
        return asked.at(asked.start if span.load is None else span.load)
    return asked


def title(spec: Spec, span: Span) -> str:
    """A level in words: `closed, 32 copies`; `poisson, 4 requests/s`; `search level 3: 64 copies`. Levels are counted from 1 here."""
    asked = played(spec, span)
    if isinstance(spec.stages[span.index], SearchStage):
        return f"search level {span.level + 1}: {_size(asked)}"
    return f"{asked.arrival}, {_size(asked)}"


def _size(asked: PlainStage) -> str:
    if isinstance(asked, ClosedStage):
        return f"{asked.copies:,} {'copy' if asked.copies == 1 else 'copies'}"
    if isinstance(asked, RampStage):
        return f"{asked.from_rate_per_s:g} to {asked.to_rate_per_s:g} requests/s"
    if isinstance(asked, StepsStage):
        return f"{len(asked.rates_per_s)} rates to {max(asked.rates_per_s):g} requests/s"
    if isinstance(asked, TraceStage):
        return f"{asked.format} at {asked.speed:g} x"
    bursts = f", burstiness {asked.burstiness:g}" if isinstance(asked, GammaStage) else ""
    return f"{asked.rate_per_s:.4g} requests/s{bursts}"


def rate_asked_per_s(asked: PlainStage) -> float | None:
    """The mean rate that an open-loop stage asks for after its warm-up; None in closed loop, and for a trace, which has its own."""
    if isinstance(asked, ConstantStage | PoissonStage | GammaStage):
        return asked.rate_per_s
    if isinstance(asked, RampStage):
        return (asked.from_rate_per_s + asked.to_rate_per_s) / 2
    if isinstance(asked, StepsStage):
        return sum(asked.rates_per_s) / len(asked.rates_per_s)
    return None


def steps(asked: StepsStage, span: Span) -> list[tuple[float, float, float]]:
    """(rate asked, start, end) of each step that had begun when the stage stopped asking; the times in seconds of the run."""
    first_s = span.start_s + asked.warmup_s
    edges_s = [first_s + number * asked.step_s for number in range(len(asked.rates_per_s) + 1)]
    stop_s = edges_s[-1] if span.stop_s is None else min(span.stop_s, edges_s[-1])
    timed = zip(asked.rates_per_s, edges_s[:-1], edges_s[1:], strict=True)
    return [(rate, start_s, min(end_s, stop_s)) for rate, start_s, end_s in timed if start_s < stop_s]


@dataclass(frozen=True)
class Found:
    """The window of a stage, if there is one, why it is not to be believed, and what else to know about it."""

    window: Window | None
    voids: tuple[Reason, ...] = ()
    notes: tuple[Reason, ...] = ()


def find(asked: PlainStage, span: Span, streams: Streams, last_s: float) -> Found:
    """The part of a stage that counts. `last_s`: when the stage was over, for one that never stopped asking."""
    end_s = last_s if span.stop_s is None else span.stop_s
    if isinstance(asked, ClosedStage):
        return _closed(asked, span, streams, end_s)
    start_s = span.start_s + asked.warmup_s
    if end_s - start_s < WINDOW_S_MIN:
        return Found(None, (_too_short(start_s, end_s),))
    end = "it stopped asking" if span.stop_s is not None else "the last record (the stage was cut off)"
    if isinstance(asked, RampStage | StepsStage | TraceStage):
        said = f"A {asked.arrival} stage changes its load all the time: its means are over all of it, and no steady state is claimed."
        note = Reason(code="not-steady-by-design", sentence=said)
        return Found(_window(start_s, end_s, f"from the end of the warm-up until {end}"), (), (note,))
    if not span.whole:  # rows are missing: what they look like is not the server's doing
        return Found(_window(start_s, end_s, f"from the end of the warm-up until {end}"))
    return _timed(asked, streams, start_s, end_s, end)


def _window(start_s: float, end_s: float, rule: str) -> Window:
    return Window(start_s=start_s, end_s=end_s, duration_s=end_s - start_s, rule=rule)


def _too_short(start_s: float, end_s: float) -> Reason:
    late = f"the window would begin at {start_s:.1f} s, but the stage stopped asking at {end_s:.1f} s (a window is {WINDOW_S_MIN:g} s or more)"
    return Reason(code="no-steady-state", sentence=f"The stage was too short: {late}. Give it a longer duration_s.")


def _closed(asked: ClosedStage, span: Span, streams: Streams, end_s: float) -> Found:
    """From the moment when the warm-up is over and every copy has its first token, until the first copy stops asking."""
    reached = streams.where(~np.isnan(streams.first_s))
    served = np.unique(reached.copy)
    if len(served) < asked.copies:
        silent = f"{asked.copies - len(served)} of {asked.copies} copies never got a token"
        return Found(None, (Reason(code="no-tokens", sentence=f"{silent}, so there is no time in which all of them ran."),))
    firsts_s = np.full(int(served.max()) + 1, np.inf)
    np.minimum.at(firsts_s, reached.copy, reached.first_s)
    everybody_s = float(firsts_s[served].max())
    warm_s = span.start_s + asked.ramp_s + asked.warmup_s
    start_s = max(warm_s, everybody_s)
    if end_s - start_s < WINDOW_S_MIN:
        return Found(None, (_too_short(start_s, end_s),))
    begin = "the last copy's first token" if everybody_s > warm_s else "the end of ramp and warm-up"
    end = "the first copy stopped asking" if span.stop_s is not None else "the last record (the stage was cut off)"
    window = _window(start_s, end_s, f"from {begin} until {end}")
    why = None if not span.whole else steady.drift(streams.where(streams.ok), window.start_s, window.end_s)
    return Found(window, (Reason(code="no-steady-state", sentence=f"No steady state: {why}."),) if why else ())


def _timed(asked: OpenStage, streams: Streams, start_s: float, end_s: float, end: str) -> Found:
    """What MSER-5 leaves of the token rate after the warm-up; all of it where there is no steady state, which voids the stage."""
    cut_s = steady.warm_up_s(streams.where(streams.ok), start_s, end_s)
    begin = f"{cut_s:.1f} s after the warm-up (MSER-5 on the token rate)" if cut_s else "the end of the warm-up (MSER-5 cut nothing off)"
    window = _window(start_s + (cut_s or 0.0), end_s, f"from {begin} until {end}")
    voids = []
    if cut_s is None:
        why = "the token rate was still changing in the second half (MSER-5)"
        voids.append(Reason(code="no-steady-state", sentence=f"No steady state: {why}. Give it a longer warmup_s or duration_s."))
        window = _window(start_s, end_s, f"from the end of the warm-up until {end}; MSER-5 found no steady part of it")
    if window.duration_s < WINDOW_S_MIN:
        return Found(None, (_too_short(window.start_s, window.end_s),))
    grown = steady.growth(in_flight(streams, window), 1 / asked.burstiness if isinstance(asked, GammaStage) else 1.0)
    if grown is not None:
        voids.append(_backlog(streams, window, grown))
    return Found(window, tuple(voids))


def _backlog(streams: Streams, window: Window, grown: float) -> Reason:
    came = int(((streams.sent_s >= window.start_s) & (streams.sent_s < window.end_s)).sum()) / window.duration_s
    went = int(((streams.finished_s >= window.start_s) & (streams.finished_s < window.end_s)).sum()) / window.duration_s
    seen = f"requests in flight grew by {grown:.0f} over the window: {came:.3g} came and {went:.3g} ended each second"
    said = "the rate is above what the server can take, or the warm-up is shorter than a request"
    return Reason(code="backlog-grows", sentence=f"No steady state: {seen}. So {said}.")


def in_flight(streams: Streams, window: Window) -> Floats:
    """Time-means of the requests in flight (sent and not finished), about one for each second of a window."""
    edges_s = np.linspace(window.start_s, window.end_s, max(2, round(window.duration_s / GROWTH_BIN_S) + 1))
    return np.asarray(np.diff(busy_s(*_open(streams), edges_s)) / np.diff(edges_s), dtype=np.float64)


def mean_in_flight(streams: Streams, start_s: float, end_s: float) -> float:
    """The exact time-mean of requests in flight (sent and not finished), errors too."""
    before, after = busy_s(*_open(streams), np.array([start_s, end_s]))
    return float(after - before) / (end_s - start_s)


def _open(streams: Streams) -> tuple[Floats, Floats]:
    """When the requests that were sent and ended did."""
    known = ~np.isnan(streams.sent_s) & ~np.isnan(streams.finished_s)
    return streams.sent_s[known], streams.finished_s[known]


def busy_s(starts_s: Floats, ends_s: Floats, at_s: Floats) -> Floats:
    """Seconds of all intervals together that lie before each of the times: the integral of how many are open."""
    return _before(starts_s, at_s) - _before(ends_s, at_s)


def _before(edges_s: Floats, at_s: Floats) -> Floats:
    """Sum of max(0, t - edge) over the edges, for each t."""
    ordered = np.sort(edges_s)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    count = np.searchsorted(ordered, at_s)
    return np.asarray(count * at_s - sums[count], dtype=np.float64)
