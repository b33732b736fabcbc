"""What a driver worker's metrics page costs: time of one finished request and of one scrape, and their share of a core.

python -m bench.export [--streams 1000] [--events-per-s 50] [--tokens 100]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from kilocopy.spec import load
from loadtests.exporter import WAITING_MAX, Exporter

SPEC = Path(__file__).parent.parent / "loadtests" / "specs" / "demo.yaml"
SCRAPE_S = 1.0  # twice as often as `kilocopy watch` asks


def seconds(once: Callable[[], object], times: int) -> float:
    """Median time of one call, s."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        once()
        taken.append(time.perf_counter() - start)
    return median(taken)


def main(argv: list[str] | None = None) -> None:
    """Print both times and the share of one core at the asked load."""
    parser = argparse.ArgumentParser(prog="python -m bench.export", description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--events-per-s", type=float, default=50, help="of one stream")
    parser.add_argument("--tokens", type=int, default=100, help="output tokens of a request")
    asked = parser.parse_args(argv)
    spec = load(SPEC)
    exporter = Exporter({"cluster": "c", "model": "m", "run": "r", "worker": "0"}, spec)
    gaps_us = np.random.default_rng(0).integers(500, 100_000, asked.tokens - 1, dtype=np.uint32)
    row = {"stage": 0, "level": 0, "outcome": "ok", "scheduled_ns": 0, "sent_ns": 1000, "first_token_ns": 10**8, "last_token_ns": 10**10,
           "output_tokens": asked.tokens, "prompt_tokens": 32, "output_words": asked.tokens // 2}  # fmt: skip
    for stage in range(len(spec.stages)):
        exporter.finished(row | {"stage": stage}, gaps_us)

    def finish() -> None:  # as many as are counted together: what one of them pays for is part of each
        for _ in range(WAITING_MAX):
            exporter.finished(row, gaps_us)

    finished_s = seconds(finish, 20_000 // WAITING_MAX) / WAITING_MAX
    scrape_s = seconds(exporter.page, 200)
    exporter.close()
    requests_per_s = asked.streams * asked.events_per_s / asked.tokens
    share = requests_per_s * finished_s + scrape_s / SCRAPE_S
    print(f"finished request of {asked.tokens} tokens: {finished_s * 1e6:.1f} us")
    print(f"scrape after {len(spec.stages)} stages: {scrape_s * 1e3:.2f} ms")
    print(f"{asked.streams} streams x {asked.events_per_s:g} events/s, a scrape each {SCRAPE_S:g} s: {100 * share:.2f} % of a core")


if __name__ == "__main__":
    main()
