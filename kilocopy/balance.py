"""Whether the router deals evenly: one bound, for the report of a run and for `kilocopy status`."""

from __future__ import annotations

LIMIT = 1.25  # the busiest replica's copies over the mean of all
COPIES = 1.0  # and how many more than the mean: of few copies one must lie somewhere
BOUND = f"bound: {LIMIT:g} times the mean, and {COPIES:g} copy more than it"


def uneven(busiest: float, mean: float) -> bool:
    """Whether the busiest replica holds more copies than the bound allows beside so many in the mean."""
    return busiest > LIMIT * mean and busiest - mean >= COPIES
