"""What each node did in a window, by the servers' own counters, and whether the router dealt evenly.

A node is a host that a replica's samples name (Ray's `NodeAddress`), else the host of the page they were read from. Tokens are the rise
of the replicas' counters between the window's edges, straight between scrapes; copies the mean of what was running over the scrapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from kilocopy import replicas
from kilocopy.balance import BOUND, LIMIT, uneven
from kilocopy.recording import Floats, Recording, Samples
from kilocopy.spec import GpuReplica, Spec
from kilocopy.summary import Balance, NodeShare, Reason, Stage

EDGE_S = 3.0  # a replica first seen this late in a window, or last seen this early, was not there all the time
RUNNING, WAITING, TOKENS = "num_requests_running", "num_requests_waiting", "generation_tokens_total"


@dataclass(frozen=True)
class Seen:
    """One replica's samples in order of time: its node, when it was scraped, and what it showed then."""

    node: str
    page: str
    series: Mapping[str, tuple[Floats, Floats]]

    @property
    def first_s(self) -> float:
        """The first scrape that showed it."""
        return min(float(times_s[0]) for times_s, _ in self.series.values())

    @property
    def last_s(self) -> float:
        """The last one."""
        return max(float(times_s[-1]) for times_s, _ in self.series.values())


@dataclass(frozen=True)
class Fleet:
    """Every replica that was scraped, and when each page was."""

    replicas: Mapping[str, Seen]
    pages: Mapping[str, Floats]


def node_of(target: str, labels: Mapping[str, str]) -> str:
    """The host that a sample comes from."""
    return labels.get("NodeAddress") or target.rpartition(":")[0] or target


def fleet(server: Samples, lost_s: Mapping[str, float] = MappingProxyType({})) -> Fleet:
    """The samples sorted by replica, in one pass. `lost_s`: when replicas died; Ray's pages go on showing their last values, which are left out."""
    known = np.isin(server.name, [RUNNING, WAITING, TOKENS])
    who = replicas.names(server)
    for replica, at_s in lost_s.items():
        known &= (who != replica) | (server.time_s <= at_s)
    pages = {str(target): np.unique(server.time_s[server.target == target]) for target in set(server.target.tolist())}
    found: dict[str, Seen] = {}
    for replica, rows in _groups(who, np.flatnonzero(known)):
        series = {str(name): _summed(server.time_s[mine], server.value[mine]) for name, mine in _groups(server.name, rows)}
        last, page = rows[-1], str(server.target[rows[-1]])
        found[replica] = Seen(node_of(page, json.loads(server.labels[last])), page, series)
    return Fleet(found, pages)


def _groups(keys: npt.NDArray[np.object_], rows: npt.NDArray[np.intp]) -> Iterator[tuple[str, npt.NDArray[np.intp]]]:
    """Rows by their key, each in the order given."""
    if not len(rows):
        return
    values, code = np.unique(keys[rows].astype(str), return_inverse=True)
    order = np.argsort(code, kind="stable")
    cuts = np.searchsorted(code[order], np.arange(1, len(values)))
    yield from zip((str(value) for value in values), np.split(rows[order], cuts), strict=True)


def _summed(times_s: Floats, values: Floats) -> tuple[Floats, Floats]:
    """One value a scrape: what other labels tell apart is added."""
    at_s, scrape = np.unique(times_s, return_inverse=True)
    return at_s, np.bincount(scrape, weights=values).astype(np.float64)


def copies(seen: Seen, name: str, scrapes_s: Floats, start_s: float, end_s: float) -> float:
    """Mean of a gauge over the scrapes of a window; one that did not show it (gauges vanish when idle) counts as 0."""
    times_s, values = seen.series.get(name, (np.zeros(0), np.zeros(0)))
    inside = (times_s >= start_s) & (times_s <= end_s)
    scrapes = int(((scrapes_s >= start_s) & (scrapes_s <= end_s)).sum())
    return float(values[inside].sum()) / scrapes if scrapes else 0.0


def tokens(seen: Seen, start_s: float, end_s: float) -> float:
    """How much a replica's counter rose in a window. One that was born in it began at 0; one that ends before its edge stood still after."""
    times_s, values = seen.series.get(TOKENS, (np.zeros(0), np.zeros(0)))
    if not len(times_s):
        return 0.0
    risen = np.concatenate([[0.0], np.cumsum(np.where(np.diff(values) < 0, values[1:], np.diff(values)))])
    before = values[0] if times_s[0] > start_s else 0.0  # before the first scrape that showed it, it made these
    edges = np.interp([start_s, end_s], times_s, risen)
    return float(edges[1] - edges[0] + before)


def shares(spec: Spec, stage: Stage, seen: Fleet) -> list[NodeShare]:
    """A row per node that served in a stage's window, the busiest first; empty without a window or without samples."""
    window = stage.window
    if window is None:
        return []
    hardware = spec.cluster.hardware
    gpus_each = hardware.gpus_per_replica if isinstance(hardware, GpuReplica) else None
    pages_per_token = None
    if stage.throughput and stage.throughput.words_per_token is not None:
        pages_per_token = stage.throughput.words_per_token / spec.page.words
    scrapes_s = max(seen.pages.values(), key=lambda times_s: int(((times_s >= window.start_s) & (times_s <= window.end_s)).sum()), default=np.zeros(0))
    found: dict[str, list[tuple[float, float]]] = {}
    for one in seen.replicas.values():
        if one.last_s >= window.start_s and one.first_s <= window.end_s:
            busy = copies(one, RUNNING, scrapes_s, window.start_s, window.end_s)
            found.setdefault(one.node, []).append((busy, tokens(one, window.start_s, window.end_s) / window.duration_s))
    rows = []
    for node, each in found.items():
        rate, gpus = sum(rate for _, rate in each), None if gpus_each is None else gpus_each * len(each)
        pages = None if pages_per_token is None else rate * pages_per_token * 3600
        rows.append(
            NodeShare(
                node=node,
                replicas=len(each),
                gpus=gpus,
                copies=sum(busy for busy, _ in each),
                output_tokens_per_s=rate,
                output_tokens_per_s_per_gpu=None if not gpus else rate / gpus,
                pages_per_hour=pages,
                pages_per_hour_per_gpu=None if not gpus or pages is None else pages / gpus,
            )
        )
    return sorted(rows, key=lambda row: (-row.output_tokens_per_s, row.node))


def balance(spec: Spec, stage: Stage, seen: Fleet) -> Balance | None:
    """How evenly copies (running and waiting) lay on the replicas that were there for the whole window; None where fewer than two were."""
    window = stage.window
    if window is None:
        return None
    held = {
        name: sum(copies(one, gauge, seen.pages[one.page], window.start_s, window.end_s) for gauge in (RUNNING, WAITING))
        for name, one in seen.replicas.items()
        if one.first_s <= window.start_s + EDGE_S and one.last_s >= window.end_s - EDGE_S
    }
    if len(held) < 2:
        return None
    mean, busiest = sum(held.values()) / len(held), max(sorted(held), key=lambda name: held[name])
    ratio = held[busiest] / mean if mean else 1.0
    off = uneven(held[busiest], mean)
    sentence = (
        f"{'The router dealt unevenly' if off else 'The router dealt evenly'}: the busiest of {len(held)} replicas ({busiest} on {seen.replicas[busiest].node}) "
        f"held {held[busiest]:.2f} copies, {ratio:.2f} times the mean of {mean:.2f} ({BOUND})."
    )
    return Balance(
        replicas=len(held), replicas_asked=spec.cluster.replicas, busiest=busiest, busiest_copies=held[busiest],
        least_copies=min(held.values()), mean_copies=mean, ratio=ratio, limit=LIMIT, off=off, sentence=sentence,
    )  # fmt: skip


def counted(spec: Spec, stages: Sequence[Stage], recording: Recording) -> list[Stage]:
    """The stages with their nodes and the router's balance; where it was off, a note of the verdict says so."""
    seen, found = fleet(recording.server, replicas.lost_s(recording.events)), []
    for stage in stages:
        even = balance(spec, stage, seen)
        notes = [Reason(code="router-unbalanced", sentence=even.sentence)] if even is not None and even.off else []
        verdict = stage.verdict.model_copy(update={"notes": [*stage.verdict.notes, *notes]})
        found.append(stage.model_copy(update={"nodes": shares(spec, stage, seen), "balance": even, "verdict": verdict}))
    return found
