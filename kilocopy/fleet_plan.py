"""kilocopy plan as a sheet: the fleet, one node's death, the bill, the fit, and what the simulation was found to be worth."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import plotly.graph_objects as go
from rich.console import Console

from kilocopy import planning, price, worth
from kilocopy.figures import BLUE, GREY, ORANGE, Figure, dressed, log_ticks
from kilocopy.planning import Asked, Bill, Deviation, Level, Outcome, Redrawn
from kilocopy.problem import ProblemError
from kilocopy.report import band, money, number, percent, seconds
from kilocopy.sheet import Rows, Section, Sheet, print_sheet, write_sheet
from kilocopy.spec import GpuReplica, Spec
from kilocopy.summaries import read
from kilocopy.summary import Frozen
from kilocopy.worth import GOAL

ROUTERS = {
    "round_robin": "deals to the replicas in turn, whatever each has to do",
    "two_choices": "takes the less loaded of two replicas drawn at random, by their streams as of the last step",
    "random": "draws a replica at random",
}
FULL = 0.01  # of the requests: from here on it is said that the fit ends too low


def command(runs: Sequence[Path], asked: Asked, *, against: Sequence[Path], node: int, most: int, html: Path, as_json: bool) -> None:
    """`kilocopy plan`: fit, search, let a node die, price, print. Raises ProblemError."""
    if bool(asked.copies) == bool(asked.rate_per_s):
        raise ProblemError("say what is asked of the fleet: --copies N at once, or --rate R requests a second (one of them)")
    finished = planning.together([read(run) for run in runs])
    found, spec = planning.levels(finished), planning.known_spec(finished)
    replica = planning.fit(found)
    fleet = planning.together([read(run) for run in against]) if against else None
    if fleet is not None:
        planning.same_replica(finished, fleet)
    checked = planning.deviations(replica, spec, fleet) if fleet else []
    if against and not checked:
        raise ProblemError(f"--against {' '.join(map(str, against))}: no stage of it is valid with its latency and of a load that can be replayed")
    tried = planning.smallest(replica, spec, asked, most)
    best = tried[-1]
    after = planning.play(replica, spec, asked, best.replicas, node)[1] if 0 < node < best.replicas else None
    draws = planning.redrawn(replica, spec, asked, tried)
    own = planning.deviations(replica, spec, finished)
    cost = planning.bill(spec, finished, best)
    stood_in = [one.summary.simulated for one in (finished, fleet) if one is not None and one.summary.simulated]
    page = sheet(spec, asked, tried, draws, after, cost, found, own, checked, node)
    page = replace(page, headline=" ".join([*dict.fromkeys(stood_in), page.headline]))
    write_sheet(page, html)
    if as_json:
        parts: dict[str, Sequence[Frozen]] = {"tried": tried, "redrawn": draws, "bill": [cost], "after_failure": [after] if after else [], "refit": own, "against": checked}
        unreliable = unfit(own)
        told = {name: [one.model_dump() for one in part] for name, part in parts.items()}
        print(json.dumps(told | {"unreliable": unreliable, "router": asked.router or planning.router_of(spec), "stored_validation": worth.stored().model_dump(), "simulated": finished.summary.simulated}, indent=2))
    else:
        print_sheet(page, Console(highlight=False))
    print(f"page: {html.resolve()}", file=sys.stderr)


def sheet(
    spec: Spec, asked: Asked, tried: list[Outcome], draws: list[Redrawn], after: Outcome | None, cost: Bill,
    found: list[Level], own: list[Deviation], checked: list[Deviation], node: int,
) -> Sheet:  # fmt: skip
    """The whole plan."""
    best = tried[-1]
    what = f"{asked.copies:,} copies at once" if asked.copies else f"{asked.rate_per_s:,g} requests/s"
    unit = "GPUs" if isinstance(spec.cluster.hardware, GpuReplica) else "hosts"
    validation = worth.stored()
    answer = (
        f"{what} within the SLO: {best.replicas:,} replicas ({cost.devices:,g} {unit}), {band(cost.usd_per_h, money)} an hour"
        + (f", {band(cost.usd_per_page, money)} a page" if cost.usd_per_page else "")
        + f". Simulated from one measured replica: {_worth(own, checked)}"
    )
    return Sheet(
        title="plan",
        headline=" ".join([*unfit(own), answer]),
        notes=[_slo(spec), *what_if(spec, asked), *death(best, after, node), *too_low(tried, after, found), *([] if checked else worth.told(validation))],
        sections=[
            Section("Fleets that were tried", table=_fleets(tried, after), sentences=draws_told(draws), figures=[curve(tried, spec)]),
            Section("The bill", sentences=_bill(spec, cost, best)),
            Section("One replica, as measured", table=_replica(found), sentences=_assumptions(spec, found, asked)),
            Section("What the simulation is worth", sentences=worth.told(validation) if checked else [], table=_deviations(own, checked)),
            Section("Attempts to hold it against real replicas", sentences=worth.settings(validation), table=worth.rows(validation)),
        ],
    )


def unfit(own: list[Deviation]) -> list[str]:
    """Where the fit does not even give its own stages back, nothing that is simulated from it is worth planning with."""
    off = [one for one in own if abs(one.throughput) > GOAL["throughput"] or abs(one.ttft) > GOAL["ttft"]]
    if not off:
        return []
    told = "; ".join(f"{one.load}: throughput {one.throughput:+.0%}, TTFT p50 {one.ttft:+.0%}" for one in off)
    return [
        f"NOT TO BE RELIED ON: played again, {len(off)} of the {len(own)} stages that it was fitted on are off by more than {GOAL['throughput']:.0%} in throughput "
        f"or {GOAL['ttft']:.0%} in TTFT p50 ({told}); measure one replica again, in longer stages, at more levels, on an idle host."
    ]


def _slo(spec: Spec) -> str:
    slo = spec.slo
    return f"SLO: {slo.tokens_per_s_per_copy:g} tokens/s each and TTFT <= {slo.ttft_s:g} s for {100 * slo.quantile:g} % of the streams; output lengths as the run's spec draws them."


def death(best: Outcome, after: Outcome | None, node: int) -> list[str]:
    """What one node's death does to the fleet that is the answer; `after` is None where nothing is left, or none is to die (node 0)."""
    if after is None:
        whole = "One replica" if best.replicas == 1 else f"All {best.replicas} replicas on one node (--node {node})"
        return [f"{whole}: when {'its node' if best.replicas == 1 else 'it'} dies, everything stops."] if node else []
    gone = best.replicas - after.replicas
    left = "the rest still hold the SLO" if after.held else "the rest cannot keep up, and their queue grows until it is back" if after.overloaded else "the rest miss the SLO until it is back"
    share = percent(after.attainment)
    return [f"When one node ({gone} replica{'s' if gone > 1 else ''}) dies: {after.lost:,} streams are cut off, and {left} ({share} of the streams asked after it)."]


def what_if(spec: Spec, asked: Asked) -> list[str]:
    """Where a router is simulated that Serve does not take, or that nothing was held against."""
    own = planning.router_of(spec)
    if asked.router not in {None, own}:
        return [f"A what-if: this router {ROUTERS[asked.router or own]}; Serve's own {ROUTERS[own]}, and every deviation that is told here is of that one."]
    return [] if own == "round_robin" else ["No fleet behind Serve's own proxy has been held against the simulation: the attempts below are of direct streaming."]


def too_low(tried: list[Outcome], after: Outcome | None, found: list[Level]) -> list[str]:
    """Where the fit's end, and not the fleet, makes requests wait: in the answer, in the largest fleet that missed, or after a death."""
    best = tried[-1]
    missed = max((one for one in tried if not one.held and one.replicas < best.replicas), key=lambda one: one.replicas, default=None)
    fleets = ((best, ""), (missed, ""), (after, " after a node died"))
    shares = [
        f"{percent(one.full_fraction)} of the streams with {one.replicas:,} replica{'s' if one.replicas > 1 else ''}{when}"
        for one, when in fleets if one is not None and one.full_fraction >= FULL
    ]  # fmt: skip
    if not shares:
        return []
    return [
        f"The fit ends too low for this plan: {', '.join(shares)} waited since theirs held the {found[-1].copies} copies that were measured, and nothing is assumed beyond them. "
        "Where a replica can run more, measure higher levels; fewer replicas may do."
    ]


def _worth(own: list[Deviation], checked: list[Deviation]) -> str:
    worst = checked or own
    if not worst:
        return "held against nothing: no stage of the run is of a load that can be replayed."
    which = "the run given with --against" if checked else "its own stages, played again (how well the fit fits, and no validation),"
    return f"against {which} throughput is off by {percent(max(abs(one.throughput) for one in worst))} at most, TTFT p50 by {percent(max(abs(one.ttft) for one in worst))}."


def draws_told(draws: list[Redrawn]) -> list[str]:
    """Whether the answer is the load's or one draw's."""
    told = [
        f"{one.replicas:,} replica{'s' if one.replicas > 1 else ''} held the SLO in {one.held} of {one.draws} further draws of this load "
        f"({percent(one.attainment_low)} to {percent(one.attainment_high)} of the streams)"
        for one in draws
    ]
    if not told:
        return []
    decided = draws[0].held == draws[0].draws and all(one.held == 0 for one in draws[1:])
    return ["; ".join(told) + ("." if decided else ": the draw decides, and not the load alone; take a fleet that held in all, or a larger one.")]


def _fleets(tried: list[Outcome], after: Outcome | None) -> Rows:
    def row(one: Outcome, name: str) -> list[str]:
        judged = "overloaded" if one.overloaded else "held" if one.held else "missed"
        return [name, judged, percent(one.attainment), number(one.in_flight), number(one.tokens_per_s), number(one.tokens_per_s_per_copy),
                seconds(one.ttft_p50_s, one.ttft_p99_s), percent(one.full_fraction), f"{one.requests:,}"]  # fmt: skip

    rows = [row(one, f"{one.replicas:,}") for one in sorted(tried, key=lambda one: one.replicas)]
    if after is not None:
        rows.append(row(after, f"{after.replicas:,} (a node died)"))
    heads = ("replicas", "SLO", "attained", "in flight", "tokens/s", "per copy (p50)", "TTFT p50 / p99", "found it full", "requests judged")
    return Rows(heads, rows, words=2, note="Found it full: requests whose replica held as many copies as were measured, so that they waited. An overloaded fleet's queue has no end, and its figures are of the time that was played.")


def curve(tried: list[Outcome], spec: Spec) -> Figure:
    """Attainment against replicas."""
    ordered = sorted(tried, key=lambda one: one.replicas)
    plot = go.Figure(
        go.Scatter(
            x=[one.replicas for one in ordered], y=[100 * one.attainment for one in ordered], mode="lines+markers", line={"color": BLUE, "width": 2},
            marker={"size": 9, "color": [BLUE if one.held else ORANGE for one in ordered]}, name="simulated",
            hovertemplate="%{x} replicas: %{y:.1f} % of the streams<extra></extra>",
        )
    )  # fmt: skip
    plot.add_hline(y=100 * spec.slo.quantile, line={"color": GREY, "dash": "dash", "width": 1.5})
    plot.update_xaxes(title="replicas", **log_ticks([float(one.replicas) for one in ordered]))
    plot.update_yaxes(title="streams within the SLO (%)", range=[-3, 103])
    return Figure("plot-plan", "Replicas against the SLO", "Dashed: the share that the SLO asks for. Orange: missed.", dressed(plot))


def _bill(spec: Spec, cost: Bill, best: Outcome) -> list[str]:
    lines = [f"Hardware: {cost.devices:,g} devices, {band(cost.hardware_usd_per_h, money)} for each hour of the calendar ({spec.prices.hardware.kind}), whether or not it serves."]
    if cost.electricity_usd_per_h is not None:
        lines.append(f"Electricity while it serves this load: {band(cost.electricity_usd_per_h, money)} an hour, from the stages' joules per token ({cost.energy_source}).")
    elif spec.prices.hardware.kind == "owned":
        lines.append("Electricity is not in it: the run has no energy.")
    if cost.pages_per_h:
        lines.append(f"{number(cost.pages_per_h)} pages of {spec.page.words} words an hour at {number(best.tokens_per_s)} tokens/s.")
    ends = "[ ]: over the stated bands of prices, PUE and assumed power. The number of replicas is the simulation's, whose doubt is not in it."
    if cost.usd_per_h.low is None:
        ends = "No price in the spec has a low and a high, so the bill has no band."
    lines.append(f"{band(cost.usd_per_h, money)} an hour, {band(price.scaled(cost.usd_per_h, 730), money)} for a month of 730 hours of this load. {ends}")
    return lines


def _replica(found: list[Level]) -> Rows:
    rows = [[str(one.copies), number(one.in_step), seconds(one.step_s), seconds(one.ttft_p50_s), number(one.tokens_per_s)] for one in found]
    return Rows(("copies", "in a step", "step", "TTFT p50", "tokens/s"), rows, words=0)


def _assumptions(spec: Spec, found: list[Level], asked: Asked) -> list[str]:
    router, own = asked.router or planning.router_of(spec), planning.router_of(spec)
    dealt = ROUTERS[router] + (f", as Serve does with routing: {spec.cluster.routing}" if router == own else f"; Serve's own with routing: {spec.cluster.routing} {ROUTERS[own]}")
    hardware = spec.cluster.hardware
    shares = [f"A replica takes {hardware.gpus_per_replica:g} of a GPU and was measured with a GPU to itself: those that share one will be slower than this plan."] if isinstance(hardware, GpuReplica) and hardware.gpus_per_replica < 1 else []
    return [
        *shares,
        f"At most {found[-1].copies} requests run at once on a replica, as far as it was measured; more wait in its queue.",
        f"The router {dealt}. Replicas share nothing: neither cores, nor memory bandwidth, nor a proxy that saturates.",
        "One router deals to all of them; several, each in its own turn, would deal less evenly.",
        "A dead node is left out at once. A real router notices seconds later, and what it sends there meanwhile fails; how many seconds, `docs/scaling.md` has measured.",
        "Table, curve, bill and the death of a node are of one draw of the load; above 100 replicas their number is found to 1 %.",
        "Lengths are drawn as the spec asks; where answers may end earlier (`ignore_eos: false`), the fleet is told too large.",
        "Prompts are as long as the measured run's; a fleet asked for other prompts needs a run with them.",
    ]


def _deviations(own: list[Deviation], checked: list[Deviation]) -> Rows:
    rows = [
        [f"{one.load}, {one.replicas} replica{'s' if one.replicas > 1 else ''}", number(one.tokens_per_s), number(one.tokens_per_s_predicted), f"{100 * one.throughput:+.1f} %",
         seconds(one.ttft_p50_s), seconds(one.ttft_p50_s_predicted), f"{100 * one.ttft:+.1f} %"]
        for one in [*checked, *own]
    ]  # fmt: skip
    full = [f"{one.load}: {percent(one.full_fraction)} of the simulated requests found their replica full; fit on higher levels." for one in checked if (one.full_fraction or 0) >= FULL]
    note = " ".join(["First the run given with --against, if any; then the fitted run's own stages.", *full])
    return Rows(("measured stage", "tokens/s", "simulated", "off", "TTFT p50", "simulated", "off"), rows, note=note)
