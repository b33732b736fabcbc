"""Identity checks: every number has a second way to it, and the two must agree.

The servers' own counters (over 1 % apart: the stage is void), Little's law and the servers' gauges (these are flagged).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kilocopy.recording import Samples
from kilocopy.streams import Floats, Streams
from kilocopy.summary import Check, Window
from kilocopy.windows import Span

TOKENS_LIMIT = 0.01
LITTLE_LIMIT = 0.05
COPIES_LIMIT = 0.10


def gauge(server: Samples, name: str) -> dict[str, tuple[Floats, Floats]]:
    """A gauge per target over its scrapes, summed over label sets; a scrape without it (gauges vanish when idle) counts as 0."""
    mine = server.name == name
    if not mine.any():
        return {}
    series = {}
    for target in sorted(set(server.target)):
        here = server.target == target
        times_s = np.unique(server.time_s[here])
        values = np.zeros(len(times_s))
        np.add.at(values, np.searchsorted(times_s, server.time_s[here & mine]), server.value[here & mine])
        series[str(target)] = (times_s, values)
    return series


def gauge_mean(server: Samples, names: Sequence[str], start_s: float, end_s: float) -> float | None:
    """Time-weighted mean of gauges over the window, summed over targets and names; None without a sample in the window."""
    total, seen = 0.0, False
    for name in names:
        for times_s, values in gauge(server, name).values():
            inside = (times_s >= start_s) & (times_s <= end_s)
            if not inside.any():
                continue
            seen = True
            at_s = np.concatenate([[start_s], times_s[inside], [end_s]])
            total += float(np.trapezoid(np.interp(at_s, times_s, values), at_s)) / (end_s - start_s)
    return total if seen else None


def rise(values: Floats) -> float:
    """How much a counter rose over its samples; where it falls it was reset and began again at 0 (as Prometheus' `increase`)."""
    steps = np.diff(values)
    return float(np.where(steps < 0, values[1:], steps).sum())


def counter_increase(server: Samples, name: str, span: Span) -> float | str:
    """How much a counter rose over a stage, summed over targets and label sets; a sentence where that cannot be said.

    From the last scrape before the stage began to the first one after it settled, else to the last one before the next stage.
    """
    if not (server.name == name).any():
        return f"the servers' {name} was not recorded"
    if span.drained_s is None:
        return "the stage was cut off before its streams ended"
    total, based = 0.0, False
    for target in sorted(set(server.target[server.name == name])):
        here = server.target == target
        scrapes_s = np.unique(server.time_s[here])
        end_s = _closing_scrape_s(scrapes_s, span)
        if end_s is None:
            return f"{target} was not scraped between the end of the stage and the next"
        scraped_before = bool(scrapes_s[0] <= span.start_s)
        based = based or scraped_before
        for labels in sorted(set(server.labels[here & (server.name == name)])):
            mine = here & (server.name == name) & (server.labels == labels)
            total += _series_rise(server.time_s[mine], server.value[mine], span.start_s, end_s, scraped_before)
    return total if based else "no server was scraped before the stage began"


def prefix_hits(server: Samples, span: Span) -> float | None:
    """Prompt tokens that the engines' prefix cache held, over those looked up, in the whole stage; None where it was not recorded."""
    hits, queries = (counter_increase(server, f"prefix_cache_{name}_total", span) for name in ("hits", "queries"))
    if isinstance(hits, str) or isinstance(queries, str) or not queries:
        return None
    return hits / queries


def _closing_scrape_s(scrapes_s: Floats, span: Span) -> float | None:
    """The scrape that closes a stage's account."""
    until = scrapes_s < span.next_s
    if span.settled_s is not None and (settled := scrapes_s[until & (scrapes_s >= span.settled_s)]).size:
        return float(settled[0])
    drained = scrapes_s[until & (scrapes_s >= (span.drained_s or np.inf))]
    return float(drained[-1]) if drained.size else None


def _series_rise(times_s: Floats, values: Floats, start_s: float, end_s: float, scraped_before: bool) -> float:
    """Rise of one series. One that was born during the stage began at 0; one of a server first seen later, at its first value."""
    at_s, scrape = np.unique(times_s, return_inverse=True)
    series = np.asarray(np.bincount(scrape, weights=values), dtype=np.float64)  # what the labels do not tell apart is one
    base = int(np.searchsorted(at_s, start_s, side="right")) - 1
    last = int(np.searchsorted(at_s, end_s, side="right"))
    if base >= 0:
        return rise(series[base:last])
    return rise(np.concatenate([[0.0], series[:last]]) if scraped_before else series[:last])


def _check(name: str, left: float, right: float, limit: float, sentence: str) -> Check:
    """Two ways to one number; the deviation is a fraction of the larger, so that it is never over 1."""
    larger = max(abs(left), abs(right))
    deviation = abs(left - right) / larger if larger else 0.0
    return Check(
        name=name,
        left=left,
        right=right,
        deviation_fraction=deviation,
        limit_fraction=limit,
        outcome="passed" if deviation <= limit else "failed",
        sentence=f"{sentence}: {100 * deviation:.2f} % apart (limit {100 * limit:g} %).",
    )


def _unchecked(name: str, left: float | None, limit: float, why: str) -> Check:
    return Check(
        name=name,
        left=left,
        right=None,
        deviation_fraction=None,
        limit_fraction=limit,
        outcome="not_checked",
        sentence=f"Not checked: {why}.",
    )


def check_tokens(streams: Streams, server: Samples, span: Span) -> Check:
    """Tokens of the whole stage, as the client was told and as the servers counted; nothing straddles an edge here."""
    name = "client_tokens_vs_server"
    counted = float(np.nansum(streams.output_tokens[streams.ok]))
    broken = float(np.nansum(streams.chunks[~streams.ok]))
    if not span.whole:
        why = f"the stage {'was cut off' if span.cut_off else 'lost a worker'}, so streams are missing from the client's count"
        return _unchecked(name, counted + broken, TOKENS_LIMIT, why)
    served = counter_increase(server, "generation_tokens_total", span)
    if isinstance(served, str):
        return _unchecked(name, counted + broken, TOKENS_LIMIT, served)
    told = f"{counted:.0f} output tokens" + (f" (and {broken:.0f} chunks of broken streams)" if broken else "")
    sentence = f"Over the whole stage the client was told of {told}, the servers counted {served:.0f}"
    return _check(name, counted + broken, served, TOKENS_LIMIT, sentence)


def check_littles_law(streams: Streams, window: Window, in_flight: float) -> Check:
    """L = lambda x W (Little 1961): what finishes per second times how long it was there, against what is in flight."""
    done = streams.where((streams.finished_s > window.start_s) & (streams.finished_s <= window.end_s) & ~np.isnan(streams.sent_s))
    if not len(done.stage):
        return _unchecked("littles_law", in_flight, LITTLE_LIMIT, "no request finished inside the window")
    per_s = len(done.stage) / window.duration_s
    residence_s = float((done.finished_s - done.sent_s).mean())
    sentence = f"{per_s:.3g} requests/s x {residence_s:.3g} s = {per_s * residence_s:.2f}, in flight {in_flight:.2f}"
    return _check("littles_law", per_s * residence_s, in_flight, LITTLE_LIMIT, sentence)


def check_copies(in_flight: float, server: Samples, window: Window, samples: int = 1) -> Check:
    """Copies in flight at the driver against running + waiting at the servers, where a request for several samples is as many.

    Samples of one request that end before its last one count to its end at the driver only.
    """
    in_flight *= samples
    name = "copies_client_vs_server"
    held = gauge_mean(server, ["num_requests_running", "num_requests_waiting"], window.start_s, window.end_s)
    if held is None:
        return _unchecked(name, in_flight, COPIES_LIMIT, "the servers' running and waiting were not recorded in the window")
    return _check(name, in_flight, held, COPIES_LIMIT, f"The driver had {in_flight:.2f} {'copies' if samples == 1 else 'samples'} in flight, the servers held {held:.2f}")
