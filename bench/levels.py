"""What a client measured at one concurrency beside what was true, and how many streams it holds honestly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

EVENTS_FRACTION_MIN = 0.98
TTFT_ERROR_S_MAX = 0.010
ITL_ERROR_S_MAX = 0.001
SERVER_LATE_S_MAX = 0.002  # p99: above it the server, or the machine, is the limit


@dataclass(frozen=True)
class Level:
    """One client at one concurrency. Times in s; None where a client does not say. `server_late_p99_s` voids what is above its limit."""

    client: str
    streams: int
    events_per_s: float
    ideal_events_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float | None
    true_ttft_p50_s: float
    true_ttft_p99_s: float
    true_itl_p50_s: float
    true_itl_p99_s: float
    server_late_p99_s: float
    cpu_s_per_event: float | None = None
    rss_bytes: int | None = None
    note: str = ""
    server_waited_s: float | None = None  # for its core, while others had it
    server_busy_s: float | None = None  # with its own work; the rest of its time it looked for what is due

    @property
    def void(self) -> bool:
        """Whether the server was too late for this level to say anything about the client."""
        return self.server_late_p99_s > SERVER_LATE_S_MAX

    @property
    def honest(self) -> bool:
        """At least 98 % of the ideal events, TTFT p50 within 10 ms and ITL p50 within 1 ms of the truth."""
        return (
            self.events_per_s >= EVENTS_FRACTION_MIN * self.ideal_events_per_s
            and abs(self.ttft_p50_s - self.true_ttft_p50_s) <= TTFT_ERROR_S_MAX
            and abs(self.itl_p50_s - self.true_itl_p50_s) <= ITL_ERROR_S_MAX
        )

    def as_json(self) -> dict[str, Any]:
        """With the two verdicts."""
        return asdict(self) | {"honest": self.honest, "void": self.void}


def honest_streams(levels: Sequence[Level]) -> int | None:
    """The largest concurrency that is honest, all smaller ones too: a void level, which shows nothing, ends it. None where none is."""
    found = None
    for level in sorted(levels, key=lambda level: level.streams):
        if level.void or not level.honest:
            break
        found = level.streams
    return found
