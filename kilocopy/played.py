"""A level of an experiment as it was played, and the figures that several kinds of experiments take from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kilocopy import identity
from kilocopy.ratios import Reading
from kilocopy.recording import Recording
from kilocopy.spec import Spec
from kilocopy.summary import Stage
from kilocopy.windows import Span


@dataclass(frozen=True)
class Played:
    """One level as it was played: its stage as measured, and the records that it was measured from."""

    level: str
    spec: Spec  # the plain spec of the part that played it
    stage: Stage
    recorded: Recording
    span: Span

    @property
    def counts(self) -> bool:
        """Whether its throughput may enter a statistic."""
        return self.stage.verdict.level != "void" and self.stage.throughput is not None

    @property
    def window_s(self) -> tuple[float, float]:
        """The window on the clock of the part's records; the stage's own times are the experiment's."""
        window = self.stage.window
        if window is None:
            return 0.0, 0.0
        begun_s = window.start_s - self.stage.start_s + self.span.start_s
        return begun_s, begun_s + window.duration_s

    @property
    def tokens_per_request(self) -> float:
        """Output tokens of the mean request that ended well; NaN without one."""
        return self._mean("output_tokens")

    @property
    def prompt_tokens_per_request(self) -> float:
        """Prompt tokens of the mean request that ended well, as the server's usage has them; NaN without one."""
        return self._mean("prompt_tokens")

    def _mean(self, column: str) -> float:
        streams = self.recorded.of(self.span.index, self.span.level)
        values = getattr(streams, column)[streams.ok]
        return float(np.nanmean(values)) if len(values) and not np.isnan(values).all() else float("nan")

    @property
    def prefix_hits(self) -> float | None:
        """Prompt tokens that the engines' prefix cache held, over those looked up, in the whole stage; None where it was not recorded."""
        return identity.prefix_hits(self.recorded.server, self.span)

    def seconds(self, tokens: float) -> Reading:
        """Seconds of the serving hardware for so many output tokens, from the level's tokens/s, with that rate's interval."""
        rate = self.stage.throughput.output_tokens_per_s if self.stage.throughput else None
        assert rate is not None  # noqa: S101  # asked of levels that count
        ends = (tokens / end if end else None for end in (rate.high, rate.low))
        return Reading(tokens / rate.value, *ends)


@dataclass(frozen=True)
class Beside:
    """What an experiment's directory knows beside its levels: the model's training (training.json), and a verifier's verdicts (records.VERDICTS)."""

    training: Mapping[str, Any] | None = None
    verdicts: Sequence[Mapping[str, Any]] = ()


def notes_of(played: Sequence[Played], asked: int) -> list[str]:
    """What is missing from the levels, before anything is said about them."""
    notes = [] if len(played) == asked else [f"{len(played)} of {asked} levels were played; what follows is about those."]
    void = [one for one in played if not one.counts]
    if void:
        named = ", ".join(f"{one.level} ({', '.join(reason.code for reason in one.stage.verdict.reasons)})" for one in void)
        notes.append(f"Void and left out: {named}.")
    return notes
