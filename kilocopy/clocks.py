"""One time axis for all hosts: what to add to a process's times, and how sure that is.

Processes of one host read one clock (CLOCK_MONOTONIC). A process that joined from another host had its clock compared with the leader's by
round trips all through the run (`clock` events: offset, and half the round trip, which bounds its error however unequal the two
ways are; Cristian 1989). Where nothing was measured, times go over the wall clock, by the anchor that every file carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SLOT_NS = 10**10  # of each ten seconds the quickest round trip counts
LEADING = ("receiver", "master")  # whose clock is the axis, where there is one


@dataclass(frozen=True)
class Offset:
    """A process's clock minus the leader's, as measured: `error_s` is the largest bound of the round trips that were used."""

    process: str
    host: str
    rounds: int
    same: bool  # both read the very same clock: nothing is shifted, and the offset only shows how well it can be measured
    offset_s: float  # the last
    drift_s: float  # how much it changed from the first to the last
    error_s: float


class Clocks:
    """What to add to times, by the process that took them. The leader's own are never shifted, else the first event's host's."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        home = next((event for event in events if event.get("process") in LEADING), events[0] if events else {})
        self._home: str | None = home.get("host")
        self._wall_ns = _wall_ns(home)
        self._lines: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None] = {}
        self.offsets: list[Offset] = []
        for process in sorted({str(event["of"]) for event in events if event["event"] == "clock"}):
            told = [event for event in events if event["event"] == "clock" and event["of"] == process]
            at_ns, offset_ns, error_ns = _quickest(told)
            same = bool(told[-1].get("same"))
            self._lines[process] = None if same else (at_ns, offset_ns)
            drift_s = float(offset_ns[-1] - offset_ns[0]) / 1e9
            last_s, error_s = float(offset_ns[-1]) / 1e9, float(error_ns.max()) / 1e9
            self.offsets.append(Offset(process, str(told[-1].get("on") or ""), len(told), same, last_s, drift_s, error_s))

    def of_file(self, metadata: dict[bytes, bytes] | None, at_ns: int) -> int:
        """Nanoseconds to add to the times of rows that a file with this metadata has about `at_ns`."""
        meta = {key.decode(): value.decode() for key, value in (metadata or {}).items()}
        anchor = {"wall_ns": meta.get("wall_ns"), "time_ns": meta.get("perf_ns")}
        return self._shift_ns(meta.get("process", ""), meta.get("host"), anchor, at_ns)

    def of_event(self, event: dict[str, Any]) -> int:
        """Nanoseconds to add to the time of an event."""
        return self._shift_ns(str(event.get("process")), event.get("host"), event, int(event["time_ns"]))

    def _shift_ns(self, process: str, host: str | None, anchor: dict[str, Any], at_ns: int) -> int:
        if process in self._lines:
            line = self._lines[process]
            return 0 if line is None else -_between(*line, at_ns)
        wall_ns = _wall_ns(anchor)
        if host is None or host == self._home or self._home is None or wall_ns is None or self._wall_ns is None:
            return 0
        return wall_ns - self._wall_ns


def _wall_ns(anchor: dict[str, Any]) -> int | None:
    """Wall time at 0 of a monotonic clock, by an anchor to both."""
    wall_ns, time_ns = anchor.get("wall_ns"), anchor.get("time_ns")
    return None if wall_ns is None or time_ns is None else int(wall_ns) - int(time_ns)


def _between(at_ns: npt.NDArray[np.int64], offset_ns: npt.NDArray[np.int64], moment_ns: int) -> int:
    """The offset at a moment: straight lines between round trips, the nearest one's outside. Clocks count to 10^18: whole numbers first."""
    since = (at_ns - at_ns[0]).astype(np.float64)
    drift_ns = np.interp(float(moment_ns - int(at_ns[0])), since, (offset_ns - offset_ns[0]).astype(np.float64))
    return int(offset_ns[0]) + round(float(drift_ns))


def _quickest(told: Sequence[dict[str, Any]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(at, offset, error) of the quickest round trip in each slot, ns, in order of time."""
    kept: dict[int, tuple[int, int, int]] = {}
    for event in told:
        one = (int(event["at_ns"]), int(event["offset_ns"]), int(event["error_ns"]))
        slot = one[0] // SLOT_NS
        if slot not in kept or one[2] < kept[slot][2]:
            kept[slot] = one
    at_ns, offset_ns, error_ns = (np.array(values, np.int64) for values in zip(*sorted(kept.values()), strict=True))
    return at_ns, offset_ns, error_ns
