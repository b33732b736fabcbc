"""The power meters of a Ray cluster's nodes: an actor without a CPU slot on each node that holds replicas, and one page of all of them.

The page belongs to the serving process and is on loopback; whoever drives from there reads it, and so can Prometheus.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from cluster.power import BOUNDARIES, Page, Place, here, meters

ANSWER_S = 0.2  # a node that takes longer is left out of this page


class NodeMeter:
    """The actor: reads the meters of the node that it is on."""

    def __init__(self, ip: str) -> None:
        self._place, self._found = here(ip), meters()

    def read(self) -> tuple[Place, dict[str, int], list[tuple[str, str, float]]]:
        """Where it is, how many meters of each kind there are, and (device, boundary, J) of those that answer."""
        readings = []
        for meter in self._found:
            with contextlib.suppress(OSError, ValueError):
                readings.append((meter.device, meter.boundary, meter.read_j()))
        return self._place, {boundary: sum(meter.boundary == boundary for meter in self._found) for boundary in BOUNDARIES}, readings


class Nodes:
    """Keeps an actor on each node that it is told of, and asks all of them whenever a page is made."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self._lived: set[str] = set()
        self.page = Page("", self._refresh)

    def follow(self, addresses: Iterable[str]) -> None:
        """Have an actor on each of these nodes that is alive. Nodes that died lose theirs, and get a new one when they are back."""
        import ray  # noqa: PLC0415
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

        alive = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for address in set(self._actors) - set(alive):
            del self._actors[address]
        for address in (set(addresses) & set(alive)) - set(self._actors):
            there = NodeAffinitySchedulingStrategy(alive[address], soft=False)
            self._actors[address] = ray.remote(NodeMeter).options(num_cpus=0, scheduling_strategy=there).remote(address)

    def _refresh(self, page: Page) -> None:
        """What each node answers now. One whose actor never lived has no meter; one that is slow, or died, is left out."""
        import ray  # noqa: PLC0415

        asked = {actor.read.remote(): address for address, actor in self._actors.copy().items()}
        page.last_j, page.counted = {}, {}
        answered = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)[0] if asked else []
        for answer in answered:
            try:
                place, counted, readings = ray.get(answer)
                self._lived.add(asked[answer])
            except ray.exceptions.RayError:
                if asked[answer] in self._lived:  # the node is gone
                    continue
                # It does not find this project's folder.
                place, counted, readings = Place(asked[answer], asked[answer], ""), dict.fromkeys(BOUNDARIES, 0), []
            page.counted |= {(place, boundary): number for boundary, number in counted.items()}
            page.last_j |= {(place, device, boundary): energy_j for device, boundary, energy_j in readings}
