"""Other nodes' power meters, read over their pages and written into the run directory of whoever drives.

A reading is dated by the middle of the round trip that brought it, so no clock but the driver's own is in it, and half the trip bounds
the error. A counter that was not read for a while has lost nothing; of a node that dies, all that was read before is here.
"""

from __future__ import annotations

import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from cluster.power import BOUNDARIES, PART, Page, Place
from kilocopy.metrics import ENERGY, METERS
from kilocopy.records import Events, Writer

PAGE_S = 5.0  # a page that takes longer is missed
WAIT_S = 0.3  # how long a round waits for pages; those that come later are kept in the next one
TRIP_S_MAX = 0.5  # a slower one dates its reading too badly
SILENT_S = 10.0  # a counter that was not read for so long goes from the page: standing still would look like no power


@dataclass(frozen=True)
class Read:
    """One page: when it was read, J by place, device and boundary, and how many meters each place has."""

    time_ns: int
    trip_s: float
    joules: dict[tuple[Place, str, str], float]
    counted: dict[tuple[Place, str], int]


def read_page(url: str) -> Read:
    """Read a page of power meters. Raises OSError, ValueError or HTTPException."""
    asked_ns = time.perf_counter_ns()
    with urllib.request.urlopen(url, timeout=PAGE_S) as answer:  # noqa: S310  http addresses that the user or the deployment gave
        text = answer.read().decode("utf-8", "replace")
    heard_ns = time.perf_counter_ns()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    places, counted = {}, {}
    for sample in samples:
        if sample.name == METERS.sample:
            place = Place(*(sample.labels[name] for name in ("node", "ip", "machine")))
            places[place.node, place.ip] = place
            counted[place, sample.labels["boundary"]] = int(sample.value)
    if not places:
        raise ValueError("no page of power meters")
    joules = {}
    for sample in samples:
        where = (sample.labels.get("node", ""), sample.labels.get("ip", ""))
        if sample.name == ENERGY.sample and where in places:
            boundary = sample.labels["boundary"].replace(PART, "host")
            joules[places[where], sample.labels["device"], boundary] = float(sample.value)
    return Read((asked_ns + heard_ns) // 2, (heard_ns - asked_ns) / 1e9, joules, counted)


class Pages:
    """Pages that are read again and again, side by side. What two of them read of one counter is kept once."""

    def __init__(self, urls: list[str], run_dir: Path, writer: Writer, page: Page) -> None:
        self._urls, self._writer, self._page = urls, writer, page
        self._events = Events(run_dir, "power")
        self._asked: dict[str, Future[Read]] = {}
        self._owners: dict[tuple[str, str], Place] = {}
        self._told: dict[str, tuple[int, ...]] = {}
        self._answered: set[str] = set()
        self._read_s: dict[tuple[Place, str, str], float] = {}
        self._pool = ThreadPoolExecutor(max(1, min(64, len(urls))), thread_name_prefix="power")

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def take(self) -> None:
        """One round."""
        for url in self._urls:
            if url not in self._asked:
                self._asked[url] = self._pool.submit(read_page, url)
        wait(self._asked.values(), WAIT_S)
        for url, asked in list(self._asked.items()):
            if asked.done():
                del self._asked[url]
                try:
                    read = asked.result()
                except (OSError, ValueError, KeyError, HTTPException):
                    if url not in self._answered:
                        self._tell(urlsplit(url).hostname or url, (0, 0))
                    continue
                self._answered.add(url)
                self._keep(read)
        fresh = {key for key, at_s in self._read_s.items() if time.monotonic() - at_s < SILENT_S}
        self._page.last_j = {key: energy_j for key, energy_j in self._page.last_j.items() if key in fresh}

    def _keep(self, read: Read) -> None:
        if read.trip_s > TRIP_S_MAX:
            return
        for (place, device, boundary), energy_j in read.joules.items():
            counter = (boundary, device if boundary == "gpu" else f"{place.machine} {device}")
            if self._owners.setdefault(counter, place) == place:
                self._page.last_j[place, device, boundary], self._read_s[place, device, boundary] = energy_j, time.monotonic()
                self._writer.append({"time_ns": read.time_ns, "device": device, "boundary": boundary, "energy_j": energy_j, "node": place.ip})
        self._page.counted |= read.counted
        for place in {place for place, _ in read.counted}:
            self._tell(place.ip, tuple(read.counted.get((place, boundary), 0) for boundary in BOUNDARIES))

    def _tell(self, node: str, counted: tuple[int, ...]) -> None:
        """An event of the run where a node is seen for the first time, or with other meters than before."""
        if self._told.get(node) != counted:
            self._told[node] = counted
            self._events.write("meters", node=node, **dict(zip(BOUNDARIES, counted, strict=True)))
