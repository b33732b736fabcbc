"""What the driver did to the numbers: each worker's lag, CPU, sends and reads, and whether the driver was the limit.

A worker is judged by itself, and the worst one decides: a late loop stamps its own streams late, and ten punctual workers beside
it would hide that in a pooled percentile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kilocopy.recording import Health
from kilocopy.schedule import share
from kilocopy.search import CPU_FRACTION_MAX, LAG_ITL_FRACTION, LAG_S_MAX, SEND_LAG_S_MAX
from kilocopy.streams import Floats, Gaps, Mask, Streams
from kilocopy.summary import Driver, Reason, Window, Worker
from kilocopy.windows import Span

BUNCHED_GAP_FRACTION = 0.10  # a gap under this share of the mean gap, and under 1 ms, is near zero
BUNCHED_GAP_S = 0.001
CLOCK_S = 1e-6  # gaps are recorded in whole microseconds
BUNCHED_SHARE_MAX = 0.05
DROPPED_FRACTION_MAX = 0.01
FULL_FRACTION = 0.98  # of max_in_flight: drops at this or more are its doing
USEFUL_CPU_FRACTION = 0.7  # of a core, that a worker should be given: above it a burst waits for the one before
PROBE_S = 0.010  # the driver probes its loop this often (loadtests/recorder.py)
LAG_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def lags_of(health: Health) -> Floats:
    """How late the loop was, at every moment that a probe was due, seconds.

    A blocked loop cannot probe itself: one probe that came 100 ms late stands for the ten that would have been 100, 90, ... ms late.
    """
    lags_s = health.lags_s
    missed = np.floor(lags_s / PROBE_S).astype(np.int64)
    steps = np.arange(missed.sum()) - np.repeat(np.cumsum(missed) - missed, missed) + 1
    return np.concatenate([lags_s, np.repeat(lags_s, missed) - steps * PROBE_S])


def bunched_share(gaps: Gaps) -> float | None:
    """Share of gaps between chunks that are near zero: under 10 % of the mean gap and under 1 ms, or nothing. None without a gap.

    Bunching leaves the mean as it was; the median it makes zero, once three chunks come together, and nothing is below that.
    """
    return gaps.share_under(max(min(BUNCHED_GAP_FRACTION * gaps.mean_s, BUNCHED_GAP_S), CLOCK_S)) if gaps.n else None


def workers(health: Health, streams: Streams, inside: Streams, window: Window) -> list[Worker]:
    """Each worker in the window. `streams`: of the stage; `inside`: the ok ones that were sent and finished in the window."""
    seen = health.where((health.time_s >= window.start_s) & (health.time_s <= window.end_s))
    due = streams.where((streams.scheduled_s >= window.start_s) & (streams.scheduled_s <= window.end_s))
    found = sorted(set(seen.worker.tolist()) | set(streams.worker.tolist()))
    return [_worker(w, seen.where(seen.worker == w), due.where(due.worker == w), inside.where(inside.worker == w)) for w in found]


def _worker(number: int, health: Health, due: Streams, inside: Streams) -> Worker:
    lags_s, sends_s = lags_of(health), due.sent_s - due.scheduled_s
    lag, send = _points(lags_s), _points(sends_s)
    return Worker(
        worker=number,
        loop_lag_p50_s=lag[0],
        loop_lag_p99_s=lag[1],
        loop_lag_max_s=lag[2],
        loop_lag_counts=np.histogram(lags_s, bins=[-np.inf, *LAG_BOUNDS_S, np.inf])[0].tolist(),
        send_lag_p50_s=send[0],
        send_lag_p99_s=send[1],
        cpu_fraction=_per_s(health.time_s, health.cpu_s),
        events_per_s=_per_s(health.time_s, health.chunks),
        open_sockets_max=_most(health.open_sockets),
        rss_bytes_max=_most(health.rss_bytes),
        near_zero_gap_fraction=bunched_share(inside.gaps),
    )


def _points(values: Floats) -> tuple[float | None, float | None, float | None]:
    """p50, p99 and the largest; None without values."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None, None, None
    p50, p99 = np.percentile(known, [50, 99])
    return float(p50), float(p99), float(known.max())


def _per_s(times_s: Floats, total: Floats) -> float | None:
    """Rise of a cumulative figure per second, from the first entry to the last."""
    known = ~np.isnan(total)
    if known.sum() < 2:
        return None
    order = np.argsort(times_s[known])
    at_s, values = times_s[known][order], total[known][order]
    return float((values[-1] - values[0]) / (at_s[-1] - at_s[0])) if at_s[-1] > at_s[0] else None


def _most(values: Floats) -> int | None:
    known = values[~np.isnan(values)]
    return int(known.max()) if len(known) else None


@dataclass(frozen=True)
class Judged:
    """What the driver's state does to a stage: reasons that void it, reasons that withhold its latency, notes, and the account."""

    voids: list[Reason]
    withheld: list[Reason]
    notes: list[Reason]
    driver: Driver


def judge(
    health: Health,
    streams: Streams,
    inside: Streams,
    window: Window,
    span: Span,
    *,
    itl_p50_s: float | None,
    max_in_flight: int | None,
    manifest: Mapping[str, Any],
    too_slow: list[Reason],
    samples: int = 1,
) -> Judged:
    """Judge the driver of one stage. `too_slow`: what copies in flight said; `max_in_flight`: None in closed loop.

    `samples` of one request come mixed, each step's together: near-zero gaps between them say nothing of the driver.
    """
    each = workers(health, streams, inside, window)
    lost, late = [*_lost(span), *sockets(span)], _sends_late(each)
    dropped, by_server = _sends_dropped(streams, window, max_in_flight)
    voids = [*lost, *too_slow, *late, *dropped]
    bunched, notes = _bunched(inside, each) if samples == 1 else ([], [])
    withheld = [*_lag(each, itl_p50_s), *_cpu(each), *bunched]
    blamed = [*lost, *too_slow, *late, *([] if by_server else dropped), *withheld]
    if all(one.loop_lag_p99_s is None for one in each):
        unknown = "The driver's loop lag was not recorded in the window, so nothing vouches for its clock."
        notes.append(Reason(code="driver-lag-unknown", sentence=unknown))
    return Judged(voids, withheld, notes, _driver(each, blamed, manifest))


def _lost(span: Span) -> list[Reason]:
    if not span.lost:
        return []
    which = ", ".join(str(worker) for worker in span.lost)
    said = f"Driver worker {which} was lost in this stage: its open streams are missing, and its share of the load with them."
    return [Reason(code="worker-lost", sentence=f"{said} What it recorded before is kept.")]


def sockets(span: Span) -> list[Reason]:
    """Requests for which the driver's host had no socket or port left: their errors are not the server's."""
    if not span.socketless:
        return []
    said = f"The driver's host had no socket or port left for {span.socketless} requests, which failed without reaching the server."
    return [Reason(code="driver-sockets", sentence=said)]


def _sends_late(each: list[Worker]) -> list[Reason]:
    """A request that leaves later than planned is not the load that was asked for: bursts are smoothed, copies stand idle.

    50 ms (search.SEND_LAG_S_MAX) is about the shortest TTFT that an engine has; beyond it the lag would be a large part of what
    is measured, and in open loop TTFT counts it, since it counts from the planned time.
    """
    worst = max((one for one in each if one.send_lag_p99_s is not None), key=lambda one: one.send_lag_p99_s or 0, default=None)
    if worst is None or (worst.send_lag_p99_s or 0) <= SEND_LAG_S_MAX:
        return []
    late = f"Requests left {1000 * (worst.send_lag_p99_s or 0):.0f} ms late (p99{_of(worst, each)}; limit {1000 * SEND_LAG_S_MAX:.0f} ms)"
    return [Reason(code="sends-late", sentence=f"{late}: this is not the load that was asked for.")]


def _of(worker: Worker, each: list[Worker]) -> str:
    """Which worker, where there are several."""
    return f" of worker {worker.worker}" if len(each) > 1 else ""


def _sends_dropped(streams: Streams, window: Window, max_in_flight: int | None) -> tuple[list[Reason], bool]:
    """Arrivals that were never sent, over 1 % of those planned; and whether max_in_flight, and so the server, was the cause."""
    due = (streams.scheduled_s >= window.start_s) & (streams.scheduled_s < window.end_s)
    planned, dropped_s = int(due.sum()), streams.scheduled_s[due & streams.dropped]
    if not planned or len(dropped_s) <= DROPPED_FRACTION_MAX * planned or max_in_flight is None:
        return [], False
    said = f"{len(dropped_s)} of {planned} arrivals ({100 * len(dropped_s) / planned:.1f} %) were never sent"
    held, slots = _held_beside(streams, due & streams.dropped, max_in_flight)
    if float(np.median(held / slots)) >= FULL_FRACTION:
        why = f"max_in_flight ({max_in_flight}) was reached, since the server did not keep up; ask for a lower rate, or raise max_in_flight"
        return [Reason(code="sends-dropped", sentence=f"{said}: {why}.")], True
    why = f"the driver had no stream ready though only {float(np.median(held)):.0f} of a worker's {float(np.median(slots)):.0f} were open"
    return [Reason(code="sends-dropped", sentence=f"{said}: {why}.")], False


def _held_beside(streams: Streams, dropped: Mask, max_in_flight: int) -> tuple[Floats, Floats]:
    """How many streams its own worker had taken up when each arrival was dropped, and how many that worker may: its share.

    A stream counts from when it was due: one that still waits for its connection holds its place as well.
    """
    playing = np.unique(streams.worker)
    held, slots = [], []
    for place, worker in enumerate(playing.tolist()):
        mine = streams.worker == worker
        open_ = streams.where(mine & ~streams.dropped & ~np.isnan(streams.finished_s))
        at_s = streams.scheduled_s[mine & dropped]
        held.append(np.searchsorted(np.sort(open_.scheduled_s), at_s, "right") - np.searchsorted(np.sort(open_.finished_s), at_s, "right"))
        slots.append(np.full(len(at_s), max(1, share(max_in_flight, place, len(playing)))))
    return np.concatenate(held).astype(np.float64), np.concatenate(slots).astype(np.float64)


def _lag(each: list[Worker], itl_p50_s: float | None) -> list[Reason]:
    """Latency is withheld when a worker woke later than the effect that it measures."""
    limit_s = max(LAG_S_MAX, LAG_ITL_FRACTION * (itl_p50_s or 0.0))
    worst = max(each, key=lambda one: one.loop_lag_p99_s or 0, default=None)
    if worst is None or (worst.loop_lag_p99_s or 0) <= limit_s:
        return []
    late = f"The driver's event loop woke {1000 * (worst.loop_lag_p99_s or 0):.1f} ms late (p99{_of(worst, each)}; limit {1000 * limit_s:.1f} ms)"
    return [Reason(code="driver-lag", sentence=f"{late}, so its time stamps are late too.")]


def _cpu(each: list[Worker]) -> list[Reason]:
    """A worker without idle time reads when it gets to it, not when a chunk comes."""
    worst = max(each, key=lambda one: one.cpu_fraction or 0, default=None)
    if worst is None or (worst.cpu_fraction or 0) <= CPU_FRACTION_MAX:
        return []
    used = f"The driver{_of(worst, each)} used {100 * (worst.cpu_fraction or 0):.0f} % of a core (limit {100 * CPU_FRACTION_MAX:.0f} %)"
    return [Reason(code="driver-cpu", sentence=f"{used}, so chunks waited to be read.")]


def _bunched(inside: Streams, each: list[Worker]) -> tuple[list[Reason], list[Reason]]:
    """Near-zero gaps as reasons to withhold, or as notes where the driver cannot have made them.

    To bunch two chunks a worker must leave the first unread until the second is there, so it must sleep for most of a gap. A loop
    that woke within half a mean gap (p99) did not; then the server, or a proxy, sent them together.
    """
    reasons, notes = [], []
    for one in each:
        if (one.near_zero_gap_fraction or 0) <= BUNCHED_SHARE_MAX:
            continue
        said = f"{100 * (one.near_zero_gap_fraction or 0):.1f} % of the gaps between chunks{_of(one, each)} are near zero"
        mean_s = inside.where(inside.worker == one.worker).gaps.mean_s
        if one.loop_lag_p99_s is not None and one.loop_lag_p99_s < 0.5 * mean_s:
            notes.append(Reason(code="bunched-by-server", sentence=f"{said}; the driver was awake: the server or a proxy sent them so."))
        else:
            why = f"{said} (limit {100 * BUNCHED_SHARE_MAX:g} %): the driver read chunks together."
            reasons.append(Reason(code="bunched-reads", sentence=why))
    return reasons[:1], notes[:1]


def account(each: list[Worker], span: Span, manifest: Mapping[str, Any]) -> Driver:
    """The driver of a stage that has nothing to be judged by but its sockets."""
    return _driver(each, sockets(span), manifest)


def _driver(each: list[Worker], blamed: list[Reason], manifest: Mapping[str, Any]) -> Driver:
    known = [one.cpu_fraction for one in each if one.cpu_fraction is not None]
    rates = [one.events_per_s for one in each if one.events_per_s is not None]
    roofline = manifest.get("driver_roofline") or {}
    ceiling = float(roofline.get("events_per_s") or 0) * len(each)
    total = sum(rates) if rates else None
    used = total / ceiling if ceiling and total is not None else None
    parts = [f"{len(each)} driver {'process' if len(each) == 1 else 'processes'}"]
    parts += [f"{100 * max(known):.0f} % of a core at most"] if known else []
    parts += [f"{total:,.0f} events/s"] if total is not None else []
    seen = ", ".join(parts)
    if used is not None:
        seen += f": {100 * used:.2g} % of what this machine's driver can read ({ceiling:,.0f} events/s)"
    limited = f"The driver was the limit ({', '.join(dict.fromkeys(reason.code for reason in blamed))}): {seen}."
    return Driver(
        workers=each,
        limited=bool(blamed),
        sentence=limited if blamed else f"The driver was not the limit: {seen}.",
        cure=_cure([reason.code for reason in blamed], each, sum(known), manifest) if blamed else None,
        events_per_s=total,
        roofline_fraction=used,
    )


def _cure(codes: list[str], each: list[Worker], load: float, manifest: Mapping[str, Any]) -> str:
    """How many workers would do, at 70 % of a core each; or that the driver needs a host of its own."""
    if "worker-lost" in codes:
        return "driver.log in the run directory says why the worker ended; run the stage again."
    if "driver-sockets" in codes:
        return "Raise `ulimit -n` (EMFILE) or widen net.ipv4.ip_local_port_range (EADDRNOTAVAIL; the rows' errors say which), or drive from several hosts."
    needed = max(math.ceil(load / USEFUL_CPU_FRACTION), 1)
    cores = (manifest.get("driver_roofline") or {}).get("cores")
    if needed > len(each):
        said = f"--workers {needed} ({load:.2f} cores of work, at most {100 * USEFUL_CPU_FRACTION:.0f} % of a core each)"
        if cores and needed > cores:
            return f"{said}; this host has {cores} cores, so drive from a larger host or from several."
        return f"{said}{'; better, drive from a host that does not serve.' if manifest.get('driver_shares_host') else '.'}"
    if manifest.get("driver_shares_host"):
        return "Drive from another host: the workers have CPU time enough, but the serving processes take the cores when they need them."
    return "The workers have CPU time enough: look for what else runs on the driver's host, or for its network."
