"""What each replica did in a window, from the servers' own samples: gauges by their time-mean, counters by their rise.

A replica is told apart by the label that its exporter gives it (Ray's `ReplicaId`, else the target and the labels).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kilocopy.identity import rise
from kilocopy.metrics import GAUGES
from kilocopy.recording import Floats, Samples

MOMENTS = 400  # of a window at which replicas are held against each other


@dataclass(frozen=True)
class Use:
    """A gauge over a window: its time-mean for each replica, and the most that any showed."""

    means: dict[str, float]
    most: float

    @property
    def mean(self) -> float:
        """Mean over the replicas."""
        return self.total / len(self.means)

    @property
    def total(self) -> float:
        """Sum over the replicas."""
        return sum(self.means.values())


def names(server: Samples) -> npt.NDArray[np.object_]:
    """The replica of each sample."""
    known = {
        (target, labels): _name(target, labels)
        for target, labels in set(zip(server.target.tolist(), server.labels.tolist(), strict=True))
    }
    return np.array([known[key] for key in zip(server.target.tolist(), server.labels.tolist(), strict=True)], dtype=object)


def _name(target: str, labels: str) -> str:
    told = json.loads(labels)
    return str(told.get("ReplicaId") or told.get("replica") or f"{target} {labels}")


def lost_s(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """When each replica died, by the serving process's word."""
    return {str(event["replica"]): float(event["t_s"]) for event in events if event["event"] == "replica_lost"}


def living(server: Samples, died_s: Mapping[str, float]) -> Samples:
    """Without the gauges of replicas after their death: Ray's pages go on showing the last ones, as if it still held its copies.

    Counters stay, for what a dead replica counted was counted.
    """
    if not died_s:
        return server
    who, kept = names(server), ~np.isin(server.name, GAUGES)
    for replica, at_s in died_s.items():
        kept |= (who == replica) & (server.time_s <= at_s)
    kept |= ~np.isin(who, list(died_s))
    return Samples(**{name: column[kept] for name, column in vars(server).items()})


def gauge(server: Samples, name: str, start_s: float, end_s: float) -> Use | None:
    """A gauge of each replica in a window; a scrape of its target without it (gauges vanish when idle) counts as 0. None without samples."""
    mine = server.name == name
    inside = (server.time_s >= start_s) & (server.time_s <= end_s)
    if not (mine & inside).any():
        return None
    who, means, most = names(server), {}, 0.0
    for replica in sorted(set(who[mine & inside])):
        scrapes_s, values = _course(server, mine & (who == replica))
        means[str(replica)] = _mean(scrapes_s, values, start_s, end_s)
        most = max(most, float(values[(scrapes_s >= start_s) & (scrapes_s <= end_s)].max(initial=0.0)))
    return Use(means, most)


def _course(server: Samples, own: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """One replica's gauge at each scrape of its target."""
    scrapes_s = np.unique(server.time_s[np.isin(server.target, list(set(server.target[own])))])
    values = np.zeros(len(scrapes_s))
    np.add.at(values, np.searchsorted(scrapes_s, server.time_s[own]), server.value[own])
    return scrapes_s, values


def evenness(server: Samples, names_: Sequence[str], replicas: int, start_s: float, end_s: float) -> float:
    """Of what a replica holds (the sum of these gauges), the part that is not above the mean of all at that moment; 1 where it is even.

    Throughput that grows ever slower with what a replica holds loses no more than this by uneven dealing: up to the mean a replica makes at least
    in proportion, above it at least as much as at the mean. Moment by moment, since a router that deals badly now here and now there is even in the mean.
    """
    who, at_s = names(server), np.linspace(start_s, end_s, MOMENTS)
    held: dict[str, Floats] = {}
    for name in names_:
        mine = server.name == name
        for replica in sorted(set(who[mine & (server.time_s >= start_s) & (server.time_s <= end_s)])):
            held[replica] = held.get(replica, np.zeros(MOMENTS)) + np.interp(at_s, *_course(server, mine & (who == replica)))
    total = np.asarray(sum(held.values(), np.zeros(MOMENTS)))
    level = np.asarray(sum((np.minimum(one, total / replicas) for one in held.values()), np.zeros(MOMENTS)))
    return float(level.sum() / total.sum()) if total.sum() > 0 else 1.0


def _mean(times_s: Floats, values: Floats, start_s: float, end_s: float) -> float:
    """Time-weighted mean of what was sampled, straight between the samples."""
    inside = (times_s > start_s) & (times_s < end_s)
    at_s = np.concatenate([[start_s], times_s[inside], [end_s]])
    return float(np.trapezoid(np.interp(at_s, times_s, values), at_s)) / (end_s - start_s)


def counter(server: Samples, name: str, start_s: float, end_s: float) -> dict[str, float]:
    """How much a counter of each replica rose, from the last scrape before a time to the first after another; empty without samples."""
    mine = server.name == name
    if not mine.any():
        return {}
    who, found = names(server), {}
    for replica in sorted(set(who[mine])):
        own = mine & (who == replica)
        at_s, scrape = np.unique(server.time_s[own], return_inverse=True)
        series = np.bincount(scrape, weights=server.value[own])
        first = max(0, int(np.searchsorted(at_s, start_s, side="right")) - 1)
        last = int(np.searchsorted(at_s, end_s, side="left")) + 1
        found[str(replica)] = rise(np.asarray(series[first:last], dtype=np.float64))
    return found
