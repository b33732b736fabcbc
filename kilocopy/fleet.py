"""Many replicas behind a router, simulated engine step by engine step. Pure arithmetic on a measured replica; nothing is served.

A continuously batching engine makes one token for each of its running requests in a step, and a step takes as long as so many
running requests make it (measured). So a request of L tokens that is admitted at a step ends L steps later, whoever else comes and
goes, and its times are those of two steps. That lets a replica's whole batch move at once: all replicas whose step ends in the same
slice of time (shorter than any step) are advanced together, and a million running requests cost no more than a thousand steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from kilocopy.streams import Floats, Ints, Mask

Router = Literal["round_robin", "two_choices", "random"]
QUANTILES = 64
OVERLOADED = 4  # times what all replicas can run at once, and a thousand: a queue of that length does not end
GROWN = 4096


@dataclass(frozen=True)
class Replica:
    """One measured replica: `step_s[n]` with n running; `before_s[n, q]`, quantiles of the time from a request's send to its queue at
    the engine with n in flight; and how many may run at once, which is as far as it was measured."""

    step_s: Floats
    before_s: Floats
    limit: int


@dataclass(frozen=True)
class Load:
    """What is asked: so many copies that ask again at once, or arrivals at these times; output tokens are drawn from `tokens`."""

    tokens: Ints
    copies: int = 0
    arrivals_s: Floats = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Failure:
    """So many replicas, the first ones, are gone from a moment on; what they were answering is lost."""

    at_s: float
    replicas: int


@dataclass(frozen=True)
class Played:
    """Every request that was asked: when, its tokens, its first and last token (NaN: none came before the end), its replica, and
    whether that was full, so that it waited for another to end."""

    asked_s: Floats
    tokens: Ints
    first_s: Floats
    last_s: Floats
    replica: Ints
    full: Mask
    overloaded: bool
    steps: int


class _Requests:
    """Columns of requests that grow."""

    def __init__(self) -> None:
        self.count = 0
        self.columns: dict[str, npt.NDArray[np.float64]] = {name: np.zeros(GROWN) for name in ("asked", "ready", "tokens", "replica", "step", "full")}

    def add(self, **values: Floats) -> Ints:
        """Append as many as each value has; returns their numbers."""
        more = len(next(iter(values.values())))
        while self.count + more > len(self.columns["asked"]):
            self.columns = {name: np.concatenate([column, np.zeros(len(column))]) for name, column in self.columns.items()}
        for name, value in values.items():
            self.columns[name][self.count : self.count + more] = value
        self.columns["step"][self.count : self.count + more] = -1
        self.count += more
        return np.arange(self.count - more, self.count)


class Fleet:
    """The simulation's state; `play` runs it once."""

    def __init__(self, replica: Replica, replicas: int, load: Load, *, router: Router = "round_robin", failure: Failure | None = None, seed: int = 0) -> None:
        self.replica, self.load, self.router, self.failure = replica, load, router, failure
        self.draw = np.random.default_rng(seed)
        self.turn = int(self.draw.integers(replicas))  # of a router that deals in turn
        self.slice_s = 0.99 * float(replica.step_s[1:].min())
        self.alive = np.arange(replicas)
        self.running, self.in_flight = np.zeros(replicas, np.int64), np.zeros(replicas, np.int64)
        self.step = np.zeros(replicas, np.int64)
        self.due_s = np.full(replicas, np.inf)
        self.ring = np.zeros((replicas, int(load.tokens.max()) + 1), np.int32)
        self.log = np.full((replicas, 256), np.nan)
        self.requests = _Requests()
        self.ready: dict[int, list[Ints]] = {}
        self.waiting: Ints = np.zeros(0, np.int64)

    def play(self, until_s: float) -> Played:
        """Run until a time, or until the queue shows that the load is too much."""
        arrivals_s, at = self.load.arrivals_s, 0
        pending = np.linspace(0, min(until_s / 10, 2.0), self.load.copies, endpoint=False)  # copies start spread out, as the driver's do
        overloaded = False
        for number in range(int(np.ceil(until_s / self.slice_s))):
            end_s = (number + 1) * self.slice_s
            if self.failure and self.failure.at_s < end_s and len(self.alive) == len(self.running):
                pending = np.sort(np.concatenate([pending, self._fail(self.failure.replicas)]))
            until = int(np.searchsorted(arrivals_s, end_s)) if len(arrivals_s) else 0
            due = int(np.searchsorted(pending, end_s))
            edges_s, ended_s = self._end(end_s)
            asked_s = np.concatenate([arrivals_s[at:until], pending[:due], ended_s if self.load.copies else ended_s[:0]])
            at, pending = until, pending[due:]
            if len(asked_s):
                self._ask(number, np.sort(asked_s))
            self._begin(number, edges_s)
            if len(self.waiting) > OVERLOADED * self.replica.limit * len(self.running) + 1000:
                overloaded = True
                break
        return self._played(overloaded)

    def _fail(self, replicas: int) -> Floats:
        """Let the first replicas go; copies whose stream is cut off ask again at once, an open loop's users do not. Returns when."""
        cut = int(self.in_flight[:replicas].sum()) if self.load.copies else 0
        self.alive = np.arange(replicas, len(self.running))
        self.due_s[:replicas] = np.inf
        gone = self.requests.columns["replica"][self.waiting] < replicas
        self.waiting = self.waiting[~gone]
        return np.full(cut, self.failure.at_s if self.failure else 0.0)

    def _ask(self, number: int, asked_s: Floats) -> None:
        """Route what was asked in this slice, and work out when it reaches its engine's queue."""
        count = len(asked_s)
        chosen = self._chosen(count)
        np.add.at(self.in_flight, chosen, 1)
        load = np.minimum(self.in_flight[chosen], len(self.replica.before_s) - 1)
        ready_s = asked_s + self.replica.before_s[load, self.draw.integers(self.replica.before_s.shape[1], size=count)]
        tokens = self.load.tokens[self.draw.integers(len(self.load.tokens), size=count)]
        numbers = self.requests.add(asked=asked_s, ready=ready_s, tokens=tokens.astype(np.float64), replica=chosen.astype(np.float64))
        slices = np.maximum((ready_s / self.slice_s).astype(np.int64), number)  # a time on the edge may be rounded into the slice that is over
        for place in np.unique(slices):
            self.ready.setdefault(int(place), []).append(numbers[slices == place])

    def _chosen(self, count: int) -> Ints:
        """The replicas that the router deals so many requests to."""
        among = len(self.alive)
        if self.router == "round_robin":
            self.turn += count
            in_turn: Ints = self.alive[np.arange(self.turn - count, self.turn) % among]
            return in_turn
        places = self.draw.integers(among, size=count)
        chosen: Ints = self.alive[places]
        if self.router == "two_choices" and among > 1:
            other = self.alive[(places + 1 + self.draw.integers(among - 1, size=count)) % among]  # never the same twice
            chosen = np.where(self.in_flight[other] < self.in_flight[chosen], other, chosen)
        return chosen

    def _end(self, end_s: float) -> tuple[Floats, Floats]:
        """Close the steps that are due in this slice: note their times, take out who is done. Returns each replica's edge, NaN where
        it has none, and when requests ended. No step begins and ends in one slice, so nothing that is asked in it has a part in them.
        """
        edges_s = np.where(self.due_s < end_s, self.due_s, np.nan)
        due = np.flatnonzero(self.due_s < end_s)
        if not len(due):
            return edges_s, np.zeros(0)
        steps = self.step[due]
        if int(steps.max()) >= self.log.shape[1]:
            self.log = np.concatenate([self.log, np.full_like(self.log, np.nan)], axis=1)
        self.log[due, steps] = edges_s[due]
        places = steps % self.ring.shape[1]
        ended = self.ring[due, places].astype(np.int64)
        self.ring[due, places] = 0
        self.running[due] -= ended
        self.in_flight[due] -= ended
        self.step[due] += 1
        return edges_s, np.repeat(edges_s[due], ended)

    def _begin(self, number: int, edges_s: Floats) -> None:
        """Admit what waits at the edges of this slice, and begin the next steps."""
        came = [self.waiting, *self.ready.pop(number, [])]
        if len(came) > 1:
            waiting = np.concatenate(came)
            self.waiting = waiting[self.requests.columns["replica"][waiting] >= self.alive[0]]  # to a dead replica nothing comes
        if len(self.waiting):
            edges_s = self._wake(edges_s)
            self._admit(edges_s)
        begun = np.flatnonzero(~np.isnan(edges_s))
        busy = self.running[begun] > 0
        self.due_s[begun] = np.where(busy, edges_s[begun] + self.replica.step_s[self.running[begun]], np.inf)

    def _wake(self, edges_s: Floats) -> Floats:
        """Replicas with nothing to run begin a step as soon as a request is ready, and not before their last step ended."""
        owners = self.requests.columns["replica"][self.waiting].astype(np.int64)
        empty = self.running[owners] == 0
        if empty.any():
            first_s = np.full(len(edges_s), np.inf)
            np.minimum.at(first_s, owners[empty], self.requests.columns["ready"][self.waiting[empty]])
            edges_s = np.where(np.isfinite(first_s), np.fmax(first_s, edges_s), edges_s)
        return edges_s

    def _admit(self, edges_s: Floats) -> None:
        """Admit, in order, who was ready when a replica's step ended, as far as it has room."""
        columns = self.requests.columns
        owners = columns["replica"][self.waiting].astype(np.int64)
        could = columns["ready"][self.waiting] <= edges_s[owners]  # NaN, a step that goes on, is never reached
        if not could.any():
            return
        places = np.flatnonzero(could)
        order = places[np.argsort(owners[places], kind="stable")]
        mine = owners[order]
        rank = np.arange(len(order)) - np.searchsorted(mine, mine)
        fits = rank < self.replica.limit - self.running[mine]
        columns["full"][self.waiting[order[~fits]]] = 1
        order = order[fits]
        taken, mine = self.waiting[order], owners[order]
        columns["step"][taken] = self.step[mine]
        np.add.at(self.running, mine, 1)
        ends = (self.step[mine] + columns["tokens"][taken].astype(np.int64) - 1) % self.ring.shape[1]
        np.add.at(self.ring, (mine, ends), 1)
        keep = np.ones(len(self.waiting), dtype=np.bool_)
        keep[order] = False
        self.waiting = self.waiting[keep]

    def _played(self, overloaded: bool) -> Played:
        """First and last tokens from the steps' times."""
        count = self.requests.count
        asked_s, tokens, replica, step = (self.requests.columns[name][:count] for name in ("asked", "tokens", "replica", "step"))
        rows, first = replica.astype(np.int64), step.astype(np.int64)
        last = first + tokens.astype(np.int64) - 1
        width = self.log.shape[1]

        def at(steps: Ints) -> Floats:
            known = (first >= 0) & (steps < width)
            return np.where(known, self.log[rows, np.clip(steps, 0, width - 1)], np.nan)

        full = self.requests.columns["full"][:count] > 0
        return Played(asked_s, tokens.astype(np.int64), at(first), at(last), rows, full, overloaded, int(self.step.sum()))
