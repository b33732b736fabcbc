"""What a dead replica or node did to a run: when, how deep the dip was, and how long until the rate was back.

That one died is said by the serving process (events `replica_lost`, `node_lost`), or by its metrics page, which stopped answering while
others went on. Serve notices late, so an outage begins with the first request that failed in the minute before it was noticed. The rate is
that of all chunks as they arrived, those of streams that broke later too: they are not counted as throughput, but they did arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kilocopy.nodes import node_of
from kilocopy.recording import Floats, Recording, Samples
from kilocopy.streams import NAMES, Streams
from kilocopy.summary import Outage
from kilocopy.windows import Span

TOGETHER_S = 20.0  # losses this close are one outage: a node takes its replicas along, and Serve notices one after the other
NOTICED_S = 60.0
SILENT_S = 5.0  # a page that was last read so long before the others' last was lost
BEFORE_S = 30.0  # the rate before is the median of the seconds of this long: what a busy host swallows now and then is not in it
BEFORE_S_MIN = 3
BACK_FRACTION = 0.9  # of the rate before, for BACK_S in the mean, is recovered
BACK_S = 3


@dataclass
class Loss:
    """What was noticed as lost at once: nodes, replicas and routers with their node. `told` by the serving process, else only a page that fell silent."""

    noticed_s: float
    told: bool
    nodes: list[str] = field(default_factory=list)
    replicas: dict[str, str] = field(default_factory=dict)
    routers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        named = [f"node {node}{'' if self.told else ' (its metrics page stopped answering)'}" for node in self.nodes]
        named += [f"replica {name} on {node}" for name, node in self.replicas.items() if node not in self.nodes]
        named += [f"the router on {node}" for node in self.routers.values() if node not in self.nodes]
        along = sum(node in self.nodes for node in self.replicas.values())
        went = [f"{along} replica{'s' * (along > 1)}"] if along else []
        went += ["the router"] if any(node in self.nodes for node in self.routers.values()) else []
        return ", ".join(named) + (f" with {' and '.join(went)}" if went else "")


def losses(events: Sequence[dict[str, Any]], server: Samples) -> list[Loss]:
    """What died, in order of when it was noticed."""
    told = [event for event in events if event["event"] in {"node_lost", "replica_lost", "router_lost"}]
    marks = [(float(event["t_s"]), str(event.get("replica", "")), str(event.get("router", "")), str(event["node"])) for event in told]
    found: list[Loss] = []
    for at_s, replica, router, node in sorted(marks or _silent(server)):
        if not found or at_s - found[-1].noticed_s > TOGETHER_S:
            found.append(Loss(at_s, bool(told)))
        if replica:
            found[-1].replicas[replica] = node
        elif router:
            found[-1].routers[router] = node
        elif node not in found[-1].nodes:
            found[-1].nodes.append(node)
    return found


def _silent(server: Samples) -> list[tuple[float, str, str, str]]:
    """Pages that ended while others went on, where no serving process told."""
    last_s = {str(target): float(server.time_s[server.target == target].max()) for target in set(server.target.tolist())}
    end_s = max(last_s.values(), default=0.0)
    return [(at_s, "", "", node_of(target, {})) for target, at_s in last_s.items() if at_s < end_s - SILENT_S]


def outages(recording: Recording, spans: Sequence[Span]) -> list[Outage]:
    """Every loss while a stage was asking, with its dip."""
    found = []
    back, routing = ([float(event["t_s"]) for event in recording.events if event["event"] == f"{kind}_running"] for kind in ("replica", "router"))
    for loss in losses(recording.events, recording.server):
        for span in spans:
            stop_s = min(span.stop_s if span.stop_s is not None else np.inf, recording.end_s)
            streams = recording.of(span.index, span.level)
            at_s = _began_s(streams, loss)
            if span.start_s <= at_s < stop_s:
                alone = loss.routers and not loss.replicas and not loss.nodes
                found.append(_outage(streams, span, stop_s, loss, at_s, [when_s for when_s in (routing if alone else back) if when_s >= at_s]))
                break
    return found


def _began_s(streams: Streams, loss: Loss) -> float:
    """The first failure in the time before it was noticed, else when it was."""
    failed_s = streams.finished_s[streams.failed]
    near = failed_s[(failed_s >= loss.noticed_s - NOTICED_S) & (failed_s <= loss.noticed_s + TOGETHER_S)]
    return float(near.min()) if near.size else loss.noticed_s


def rate(streams: Streams, start_s: float, stop_s: float) -> tuple[Floats, Floats]:
    """Seconds of a stage from its start, and tokens that arrived in each, whatever became of their stream."""
    edges_s = start_s + np.arange(int(stop_s - start_s) + 1, dtype=np.float64)
    return edges_s[:-1], streams.tally(edges_s) if len(edges_s) > 1 else np.zeros(0)


def _outage(streams: Streams, span: Span, stop_s: float, loss: Loss, at_s: float, returns_s: list[float]) -> Outage:
    from_s, arrived = rate(streams, span.start_s, stop_s)
    # The second in which it began holds some of both.
    before = arrived[(from_s + 1 <= at_s) & (from_s >= at_s - BEFORE_S - 1)]
    after_s, after = from_s[from_s + 1 > at_s], arrived[from_s + 1 > at_s]
    usual = float(np.median(before)) if len(before) >= BEFORE_S_MIN else None
    lowest = float(after.min()) if len(after) else None
    depth = None if usual is None or lowest is None or not usual else max(0.0, 1 - lowest / usual)
    recovered_s = None
    if usual is not None and len(after) >= BACK_S:
        means = np.convolve(after, np.ones(BACK_S) / BACK_S, mode="valid")
        back = np.flatnonzero((means >= BACK_FRACTION * usual) & (np.arange(len(means)) >= int(after.argmin())))
        recovered_s = max(0.0, float(after_s[back[0]]) - at_s) if back.size else None
    lost = max(len(loss.replicas), 1)
    replaced_s = returns_s[lost - 1] - at_s if len(returns_s) >= lost else None
    codes, counts = np.unique(streams.outcome_code[streams.failed & (streams.finished_s >= at_s)], return_counts=True)
    errors = dict(sorted((NAMES[code], int(count)) for code, count in zip(codes, counts, strict=True)))
    told: dict[str, Any] = {
        "stage": span.index, "level": span.level, "what": str(loss), "at_s": at_s, "noticed_s": loss.noticed_s, "replicas_lost": len(loss.replicas),
        "before_tokens_per_s": usual, "lowest_tokens_per_s": lowest, "depth_fraction": depth, "recovered_after_s": recovered_s,
        "routers_lost": len(loss.routers), "replaced_after_s": replaced_s, "watched_s": stop_s - at_s, "errors": errors,
    }  # fmt: skip
    return Outage(**told, sentence=_sentence(told))


def _sentence(told: dict[str, Any]) -> str:
    """An outage in words."""
    said = [f"{told['what']} was lost at {told['at_s']:.1f} s of the run (noticed after {max(0.0, told['noticed_s'] - told['at_s']):.1f} s)"]
    if told["depth_fraction"] is None:
        said.append("the stage had not run long enough before it to tell the dip")
    else:
        said.append(
            f"{told['before_tokens_per_s']:,.0f} tokens/s before, {told['lowest_tokens_per_s']:,.0f} in the worst second: a dip of {100 * told['depth_fraction']:.0f} %"
        )
        if told["recovered_after_s"] is None:
            said.append(f"not back at {100 * BACK_FRACTION:.0f} % of it within the {told['watched_s']:.0f} s that were left of the stage")
        else:
            said.append(f"back at {100 * BACK_FRACTION:.0f} % of it after {told['recovered_after_s']:.1f} s")
    what = "as many replicas" if told["replicas_lost"] or not told["routers_lost"] else "a router"
    if told["replaced_after_s"] is not None:
        said.append(f"Ray had {what} running again after {told['replaced_after_s']:.1f} s")
    elif told["replicas_lost"] or told["routers_lost"]:
        said.append(f"Ray did not bring {what} back while the run went on")
    failed = ", ".join(f"{count:,} {kind}" for kind, count in told["errors"].items())
    return "; ".join(said) + (f". Failed from then on: {failed}." if failed else ". No request failed.")
