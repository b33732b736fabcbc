"""What the simulated fleet was found to be worth: each attempt to hold it against replicas that ran, those that failed too.

`plan_validation.json` has what was measured and what was simulated (docs/measurements.md says how); what is off, and whether that is
within the goal, is worked out here, so that no sentence can say otherwise. Where the records are lost, both are as they were rounded.
"""

from __future__ import annotations

from importlib import resources
from typing import Literal

from kilocopy.fleet import Router
from kilocopy.planning import Deviation
from kilocopy.report import number, seconds
from kilocopy.sheet import Rows
from kilocopy.summary import Frozen

GOAL = {"throughput": 0.10, "ttft": 0.20}


class Attempt(Frozen):
    """One sitting: a fit, and the loads of two replicas that it was held against. Of rounds the medians of the valid stages."""

    name: str
    date: str
    engines: Literal["real", "timed"]  # timed: they wait instead of computing (cluster.simulated_engine)
    setting: str
    fitted_on: str
    rounds: int
    valid: int  # stages, of so many that were played
    played: int
    router: Router  # as it was simulated; the real one deals in turn
    note: str = ""  # what else a reader must know of its figures
    throughput_between: tuple[float, float] | None = None  # off at any load, rounds drawn anew, 95 %
    ttft_between: tuple[float, float] | None = None
    loads: tuple[Deviation, ...]


class Validation(Frozen):
    """All attempts in order of time, and what they were made on."""

    hardware: str
    versions: dict[str, str]
    attempts: tuple[Attempt, ...]


def stored() -> Validation:
    """The attempts that come with this version."""
    return Validation.model_validate_json(resources.files("kilocopy").joinpath("plan_validation.json").read_text(encoding="utf-8"))


def within(loads: tuple[Deviation, ...]) -> int:
    """Figures within the goal, of two for each load: throughput and TTFT p50."""
    return sum((abs(one.throughput) <= GOAL["throughput"]) + (abs(one.ttft) <= GOAL["ttft"]) for one in loads)


def told(validation: Validation) -> list[str]:
    """In short: the last attempt with real engines in figures, and what all before it came to."""
    real = [one for one in validation.attempts if one.engines == "real"]
    if not real:
        return ["It has not been held against a real fleet of more replicas; --against RUN does that with a run of yours."]
    last, before = real[-1], real[:-1]
    loads = ", ".join(one.load for one in last.loads)
    throughput, ttft = (", ".join(f"{100 * getattr(one, name):+.0f} %" for one in last.loads) for name in ("throughput", "ttft"))
    goal = f"the goal (throughput within {100 * GOAL['throughput']:.0f} %, TTFT p50 within {100 * GOAL['ttft']:.0f} %)"
    met = f"{goal} was met at every load" if within(last.loads) == 2 * len(last.loads) else f"{within(last.loads)} of {2 * len(last.loads)} figures are within {goal}"
    said = [
        f"Held against two real replicas on {last.date} ({last.setting}; {last.rounds} rounds, {last.valid} of {last.played} stages valid): at {loads} throughput was off by {throughput}, TTFT p50 by {ttft}: {met}, by medians.{_doubt(last)}"
    ]
    if before:
        figures = sum(2 * len(one.loads) for one in before)
        said.append(f"In {len(before)} attempt{'s' if len(before) > 1 else ''} before it {sum(within(one.loads) for one in before)} of {figures} figures were within it; all are in the table of attempts.")
    return [" ".join(said)]


def _doubt(one: Attempt) -> str:
    """How far the rounds leave the figures open."""
    if one.throughput_between is None or one.ttft_between is None:
        return ""
    throughput, ttft = (f"{100 * low:+.0f} to {100 * high:+.0f} %" for low, high in (one.throughput_between, one.ttft_between))
    return f" With the rounds drawn anew (95 %) the loads lie within {throughput} and {ttft}."


def rows(validation: Validation) -> Rows:
    """Every attempt, load by load."""
    heads = ("attempt", "load", "tokens/s", "simulated", "off", "TTFT p50", "simulated", "off")
    found = [
        [f"{one.date}: {one.name}", load.load, number(load.tokens_per_s), number(load.tokens_per_s_predicted), f"{100 * load.throughput:+.1f} %",
         seconds(load.ttft_p50_s), seconds(load.ttft_p50_s_predicted), f"{100 * load.ttft:+.1f} %"]
        for one in validation.attempts for load in one.loads
    ]  # fmt: skip
    return Rows(heads, found, words=2, note=f"Two replicas each time. {validation.hardware}")


def settings(validation: Validation) -> list[str]:
    """How each attempt was made."""
    routers = {"two_choices": "the less loaded of two", "random": "one at random"}

    def line(one: Attempt) -> str:
        dealt = "" if one.router == "round_robin" else f" It was simulated with a router that takes {routers[one.router]}, where the real one dealt in turn."
        return f"{one.date}, {one.name}: {one.setting}; fitted on {one.fitted_on}; {one.rounds} round{'s' if one.rounds > 1 else ''}, {one.valid} of {one.played} stages valid.{dealt}{' ' * bool(one.note)}{one.note}"

    return [line(one) for one in validation.attempts]
