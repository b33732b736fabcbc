"""When each copy starts, who owns it and what it asks for, worked out before the first request and without a clock.

Everything here is a pure function of the spec and of (stage, copy, sequence). It never depends on how many driver processes
share the work: one worker or eight send the same prompts with the same seeds, and start the same copies at the same moments.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from kilocopy.spec import ClosedStage, Spec


@dataclass(frozen=True, slots=True)
class CopyStart:
    """A copy and the moment of its first request, seconds after the stage's start."""

    copy: int
    start_s: float


@dataclass(frozen=True, slots=True)
class ClosedPlan:
    """What one worker does in a closed stage: its copies in order of their starts, and when they stop asking.

    Exactly one of `stop_s` (seconds after the stage's start) and `requests` (this worker's, begun after `warm_s`) is set.
    """

    stage: int
    starts: tuple[CopyStart, ...]
    ramp_s: float
    warm_s: float
    stop_s: float | None
    requests: int | None


def plan(spec: Spec, index: int, worker: int = 0, workers: int = 1) -> ClosedPlan:
    """The part of stage `index` that worker `worker` of `workers` plays."""
    stage = spec.stages[index]
    warm_s = stage.ramp_s + stage.warmup_s
    return ClosedPlan(
        stage=index,
        starts=_own_starts(stage, spec.workload.seed, index, worker, workers),
        ramp_s=stage.ramp_s,
        warm_s=warm_s,
        stop_s=None if stage.duration_s is None else warm_s + stage.duration_s,
        requests=None if stage.requests is None else share(stage.requests, worker, workers),
    )


def _own_starts(stage: ClosedStage, seed: int, index: int, worker: int, workers: int) -> tuple[CopyStart, ...]:
    offsets_s = starts_s(stage.copies, stage.ramp_s, draw(seed, "starts", index))
    mine = [CopyStart(copy, offsets_s[copy]) for copy in owned(stage.copies, worker, workers)]
    return tuple(sorted(mine, key=lambda start: start.start_s))


def starts_s(copies: int, ramp_s: float, seed: int) -> list[float]:
    """The start of each copy, seconds in [0, ramp_s]: one copy in each of `copies` equal slots, at a random place in it.

    Copies that start together stay in step, and their burst would be the driver's doing. Slots keep the starts even; the place
    within the slot breaks the rhythm; a shuffled order keeps neighbours (and so one worker's copies) apart.
    """
    place = random.Random(seed)  # noqa: S311  # a seeded plan, not a secret
    slots = list(range(copies))
    place.shuffle(slots)
    return [(slot + place.random()) / copies * ramp_s for slot in slots]


def owned(copies: int, worker: int, workers: int) -> range:
    """The copies that a worker owns: every copy has exactly one owner, and shares differ by one at most."""
    return range(worker, copies, workers)


def share(total: int, worker: int, workers: int) -> int:
    """A worker's part of a total; the parts add up to it and differ by one at most."""
    return total // workers + (worker < total % workers)


def draw(seed: int, *key: int | str) -> int:
    """A number in [0, 2^31) that belongs to a key, the same in every process. It fits every engine's seed field."""
    text = "/".join(map(str, (seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 33


def request_seed(seed: int, stage: int, copy: int, sequence: int) -> int:
    """The sampling seed of one request."""
    return draw(seed, "request", stage, copy, sequence)


def prompt_index(spec: Spec, stage: int, copy: int, sequence: int) -> int:
    """A number for each request of the run that no other request has: prompts are picked by it, so none comes twice."""
    widest = max(stage.copies for stage in spec.stages)
    return (sequence * widest + copy) * len(spec.stages) + stage
