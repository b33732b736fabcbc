"""Requests as columns, and what can be asked of their chunks without laying them all out.

A run has a hundred chunks for each request, so what is asked of a request is a column and what is asked of a chunk is a pass. Rows
are selected without touching the gaps; they stay one array of whole microseconds that all selections share. Tokens between edges are
counted request by request: one that lies between two edges gives all its tokens there, and only those that straddle an edge are laid
out chunk by chunk, a million at a time. Percentiles of gaps come from how often each whole microsecond occurs. All of it is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kilocopy.records import OUTCOMES

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

CHUNKS_AT_ONCE = 1 << 20
TABLE_US = 1 << 22  # gaps below 4 s are counted in a table, longer ones sorted
NAMES = (*OUTCOMES, "unknown")
_OK, _CANCELLED, _DROPPED = (OUTCOMES.index(name) for name in ("ok", "cancelled", "dropped"))


@dataclass(frozen=True)
class Gaps:
    """Gaps between chunks: the distinct ones, rising, whole microseconds, and how often each occurs."""

    values_us: Ints
    counts: Ints

    @property
    def n(self) -> int:
        """How many gaps."""
        return int(self.counts.sum())

    @property
    def mean_s(self) -> float:
        """Their mean, from a whole sum."""
        return int((self.values_us * self.counts).sum()) / self.n / 1e6

    def at_s(self, places: Ints) -> Floats:
        """The gaps at these places of the sorted order, from 0."""
        return np.asarray(self.values_us[np.searchsorted(self._ends, places, side="right")] / 1e6, dtype=np.float64)

    def quantiles_s(self, shares: list[float]) -> list[float]:
        """Quantiles with linear interpolation, as numpy's: to the last bit what `np.percentile` gives."""
        found = []
        for share in shares:
            place = share * (self.n - 1)
            below, above = self.at_s(np.array([np.floor(place), np.ceil(place)], dtype=np.int64))
            part = place - np.floor(place)
            found.append(float(above - (above - below) * (1 - part) if part >= 0.5 else below + (above - below) * part))
        return found

    def share_under(self, limit_s: float) -> float:
        """The share of the gaps that are under a limit."""
        return int(self.counts[self.values_us / 1e6 < limit_s].sum()) / self.n

    @cached_property
    def _ends(self) -> Ints:
        return np.cumsum(self.counts)


@dataclass(frozen=True)
class Streams:
    """Requests as columns, one entry each; what was never recorded is NaN.

    `gaps_us` holds gaps of many requests in a row, more than these where they were selected from others: those of request i are
    gap_counts[i] from gap_starts[i] on, and gap_total_us[i] together. `outcome_code` is the place in NAMES.
    """

    stage: npt.NDArray[np.int16]
    level: npt.NDArray[np.int16]
    worker: npt.NDArray[np.int16]
    copy: npt.NDArray[np.int32]
    sequence: npt.NDArray[np.int32]
    scheduled_s: Floats
    sent_s: Floats
    first_s: Floats
    last_s: Floats
    finished_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    output_words: Floats
    chunks: Floats
    outcome_code: npt.NDArray[np.int8]
    gap_starts: Ints
    gap_counts: npt.NDArray[np.int32]
    gap_total_us: Ints
    gaps_us: npt.NDArray[np.uint32]

    def where(self, mask: Mask) -> Streams:
        """The streams that the mask keeps; these themselves where it keeps all."""
        if mask.all():
            return self
        return Streams(**{f.name: getattr(self, f.name) if f.name == "gaps_us" else getattr(self, f.name)[mask] for f in fields(self)})

    @property
    def ok(self) -> Mask:
        """Which ended well."""
        return np.asarray(self.outcome_code == _OK, dtype=np.bool_)

    @property
    def cancelled(self) -> Mask:
        """Which the driver cancelled."""
        return np.asarray(self.outcome_code == _CANCELLED, dtype=np.bool_)

    @property
    def dropped(self) -> Mask:
        """Arrivals of an open loop that were never sent, since no stream was free for them."""
        return np.asarray(self.outcome_code == _DROPPED, dtype=np.bool_)

    @property
    def failed(self) -> Mask:
        """Which ended in a typed error; a stream cancelled by the driver is neither ok nor failed, nor is one that was dropped."""
        return ~np.isin(self.outcome_code, [_OK, _CANCELLED, _DROPPED])

    def errors(self) -> dict[str, int]:
        """How many failed, by outcome."""
        codes, counts = np.unique(self.outcome_code[self.failed], return_counts=True)
        return dict(sorted((NAMES[code], int(count)) for code, count in zip(codes, counts, strict=True)))

    def within(self, start_s: float, end_s: float) -> Mask:
        """Which were sent and finished inside a window."""
        return np.asarray((self.sent_s >= start_s) & (self.finished_s <= end_s), dtype=np.bool_)

    def tally(self, edges_s: Floats) -> Floats:
        """Output tokens that arrived in [edge, next edge), for evenly spaced edges. A request's tokens are spread over its chunks."""
        seen = self.where(~np.isnan(self.first_s)) if np.isnan(self.first_s).any() else self
        bins = len(edges_s) - 1
        counts = seen.gap_counts + 1
        tokens = np.where(np.isnan(seen.output_tokens), counts, seen.output_tokens)
        begin, end = _bin(seen.first_s, edges_s), _bin(seen.first_s + seen.gap_total_us / 1e6, edges_s)
        whole = begin == end
        found = np.bincount(begin[whole], weights=tokens[whole], minlength=bins + 2).astype(np.float64)
        straddling = seen.where(~whole)
        for rows in straddling.blocks():
            times_s, weights = straddling.arrivals(rows)
            found += np.bincount(_bin(times_s, edges_s), weights=weights, minlength=bins + 2)
        return np.asarray(found[1:-1], dtype=np.float64)

    def blocks(self) -> Iterator[slice]:
        """Rows in pieces of about a million chunks."""
        ends = np.cumsum(self.gap_counts + 1, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.searchsorted(ends, np.arange(CHUNKS_AT_ONCE, total, CHUNKS_AT_ONCE), side="left") + 1
        edges = np.unique(np.concatenate([[0], cuts, [len(ends)]]))
        for begin, end in pairwise(edges):
            yield slice(int(begin), int(end))

    def gaps_of(self, rows: slice) -> npt.NDArray[np.uint32]:
        """The gaps of some rows in a row."""
        starts, counts = self.gap_starts[rows], self.gap_counts[rows]
        total = int(counts.sum())
        if not total:
            return self.gaps_us[:0]
        if (starts[1:] == starts[:-1] + counts[:-1]).all():
            return self.gaps_us[starts[0] : starts[0] + total]
        shift = np.repeat(starts - (np.cumsum(counts) - counts), counts)
        return np.asarray(self.gaps_us[shift + np.arange(total)])

    def arrivals(self, rows: slice = slice(None)) -> tuple[Floats, Floats]:
        """When each chunk of some rows came, and how many tokens it stands for; rows without a first token have none."""
        seen = ~np.isnan(self.first_s[rows])
        if not seen.all():
            return self._selected(rows).where(seen).arrivals()
        first_s, counts, gaps = self.first_s[rows], self.gap_counts[rows] + 1, self.gaps_of(rows)
        starts = np.cumsum(counts) - counts
        steps = np.zeros(int(counts.sum()), dtype=np.int64)
        later = np.ones(len(steps), dtype=bool)
        later[starts] = False
        steps[later] = gaps
        elapsed_us = np.cumsum(steps)
        times_s = (elapsed_us - np.repeat(elapsed_us[starts], counts)) / 1e6 + np.repeat(first_s, counts)
        tokens = np.where(np.isnan(self.output_tokens[rows]), counts, self.output_tokens[rows])
        return times_s, np.repeat(tokens / counts, counts)

    def _selected(self, rows: slice) -> Streams:
        mask = np.zeros(len(self.first_s), dtype=np.bool_)
        mask[rows] = True
        return self.where(mask)

    def owners(self) -> Ints:
        """Which of these streams each of `arrivals` belongs to."""
        seen = ~np.isnan(self.first_s)
        return np.repeat(np.flatnonzero(seen), self.gap_counts[seen] + 1)

    @cached_property
    def gaps(self) -> Gaps:
        """The gaps of these streams, counted."""
        table, long = np.zeros(1, dtype=np.int64), []
        for rows in self.blocks():
            part = self.gaps_of(rows)
            short = part if part.size and part.max() < TABLE_US else part[part < TABLE_US]
            long.append(part[part >= TABLE_US] if len(short) < len(part) else part[:0])
            counted = np.bincount(short, minlength=len(table))
            counted[: len(table)] += table
            table = counted
        values, counts = np.unique(np.concatenate(long) if long else np.zeros(0, np.uint32), return_counts=True)
        held = np.flatnonzero(table)
        return Gaps(np.concatenate([held, values.astype(np.int64)]), np.concatenate([table[held], counts]))

    @property
    def gaps_s(self) -> Floats:
        """All gaps of these streams in a row, seconds."""
        return np.concatenate([np.zeros(0), *(self.gaps_of(rows) / 1e6 for rows in self.blocks())])


def _bin(times_s: Floats, edges_s: Floats) -> Ints:
    """Which of evenly spaced edges' bins a time is in: 1 to n, 0 before the first edge, n + 1 from the last one on."""
    bins = len(edges_s) - 1
    step_s = (edges_s[-1] - edges_s[0]) / bins
    guess = np.clip((times_s - edges_s[0]) / step_s, 0, bins - 1).astype(np.int64)
    guess -= times_s < edges_s[guess]  # a quotient is rounded, a comparison is not
    return np.asarray(guess + 1 + (times_s >= edges_s[guess + 1]), dtype=np.int64)
