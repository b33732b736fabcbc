"""How what is served stands now, node by node and GPU by GPU: replicas, copies, tokens/s, pages/hour, and the router's balance.

Copies are what the replicas say they run; tokens/s is the rise of their counters between two readings of the metrics pages, which Ray
renews once a second, so over a few seconds it is a glance and not a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.parse import urlparse

from kilocopy.balance import BOUND, uneven
from kilocopy.scrape import Found, read_page
from kilocopy.spec import GpuReplica, Spec

WORDS_PER_TOKEN = 0.75  # assumed where the spec does not state it: a run counts words, a glance does not
HEADS = ("node", "replicas", "GPUs", "copies", "tokens/s", "per GPU", "pages/h", "per GPU")

Reading = tuple[float, list[tuple[str, str, str, float]]]  # when, and each sample's node, replica, name, value


def nodes(state: Mapping[str, Any], spec: Spec, seconds: float) -> dict[str, Any]:
    """`nodes`: a row per node that serves; `balance`: a sentence; `unread`: pages that did not answer. Waits `seconds` where something runs."""
    alive = {str(one["replica"]) for one in state.get("fleet", ()) if one["state"] == "RUNNING"}  # Ray's pages go on showing the dead
    first, unread = _read(state["metrics"], alive)
    running = sum(value for _, _, name, value in first[1] if name == "num_requests_running")
    second = first
    if running and seconds > 0:
        time.sleep(seconds)
        second, unread = _read(state["metrics"], alive)
    rows = [_row(node, state, spec, first, second) for node in sorted(_names(state, second))]
    assumed = spec.page.words_per_token.value if spec.page.words_per_token else WORDS_PER_TOKEN
    return {
        "nodes": rows, "rate_over_s": second[0] - first[0], "words_per_token_assumed": assumed, "balance": balance(second[1]), "unread": unread,
    }  # fmt: skip


def _read(pages: Sequence[str], alive: set[str]) -> tuple[Reading, list[str]]:
    found: list[tuple[str, str, str, float]] = []
    unread = []
    with ThreadPoolExecutor(16) as pool:
        asked = {page: pool.submit(read_page, page) for page in pages}
    for page, future in asked.items():
        try:
            found += [sample for sample in _told(page, future.result()[1]) if sample[1] in alive]
        except (OSError, ValueError, HTTPException):
            unread.append(page)
    return (time.monotonic(), found), unread


def _told(page: str, samples: Found) -> list[tuple[str, str, str, float]]:
    host = urlparse(page).hostname or page
    return [(labels.get("NodeAddress") or host, labels.get("ReplicaId") or page, name, value) for name, labels, value in samples]


def _names(state: Mapping[str, Any], reading: Reading) -> set[str]:
    return {str(one["node"]) for one in state.get("fleet", ()) if one["node"]} | {node for node, *_ in reading[1]}


def _row(node: str, state: Mapping[str, Any], spec: Spec, first: Reading, second: Reading) -> dict[str, Any]:
    here = [str(one["state"]) for one in state.get("fleet", ()) if one["node"] == node]
    hardware = spec.cluster.hardware
    gpus = hardware.gpus_per_replica * here.count("RUNNING") if isinstance(hardware, GpuReplica) else None
    elapsed_s = second[0] - first[0]
    rate = _risen(node, first[1], second[1]) / elapsed_s if elapsed_s else 0.0
    words = spec.page.words_per_token.value if spec.page.words_per_token else WORDS_PER_TOKEN
    pages = rate * words / spec.page.words * 3600
    return {
        "node": node,
        "replicas": {name: here.count(name) for name in sorted(set(here))},
        "gpus": gpus,
        "copies": sum(value for at, _, name, value in second[1] if at == node and name == "num_requests_running"),
        "output_tokens_per_s": rate,
        "output_tokens_per_s_per_gpu": rate / gpus if gpus else None,
        "pages_per_hour": pages,
        "pages_per_hour_per_gpu": pages / gpus if gpus else None,
    }


def _risen(node: str, first: list[tuple[str, str, str, float]], second: list[tuple[str, str, str, float]]) -> float:
    """Tokens of a node's replicas between two readings; one that is new began at 0."""

    def totals(reading: list[tuple[str, str, str, float]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for at, replica, name, value in reading:
            if at == node and name == "generation_tokens_total":
                found[replica] = found.get(replica, 0.0) + value
        return found

    before = totals(first)
    return sum(max(0.0, value - before.get(replica, 0.0)) for replica, value in totals(second).items())


def balance(reading: list[tuple[str, str, str, float]]) -> str | None:
    """Whether copies (running and waiting) lie evenly on the replicas now; None with fewer than two of them, or with nothing to deal."""
    held: dict[str, float] = {}
    for _, replica, name, value in reading:
        if name in {"num_requests_running", "num_requests_waiting"}:
            held[replica] = held.get(replica, 0.0) + value
    mean = sum(held.values()) / len(held) if held else 0.0
    if len(held) < 2 or not mean:
        return None
    busiest = max(sorted(held), key=lambda replica: held[replica])
    off = uneven(held[busiest], mean)
    return (
        f"{'uneven' if off else 'even'}: the busiest of {len(held)} replicas ({busiest}) holds {held[busiest]:g} copies, "
        f"{held[busiest] / mean:.2f} times the mean ({BOUND})"
    )


def table(standing: Mapping[str, Any]) -> list[str]:
    """The nodes as lines of text."""
    rows = [list(HEADS)]
    for one in standing["nodes"]:
        replicas = ", ".join(f"{count} {state.lower()}" for state, count in one["replicas"].items()) or "0"
        values = [one[name] for name in ("gpus", "copies", "output_tokens_per_s", "output_tokens_per_s_per_gpu", "pages_per_hour", "pages_per_hour_per_gpu")]
        rows.append([one["node"], replicas, *("–" if value is None else f"{value:,.4g}" for value in values)])
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEADS))]
    lines = ["  ".join(cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
    lines.append(f"tokens/s over {standing['rate_over_s']:.1f} s; pages at {standing['words_per_token_assumed']:g} words a token, assumed")
    lines += [f"router: {standing['balance']}"] if standing["balance"] else []
    return [*lines, *(f"{page} did not answer" for page in standing["unread"])]
