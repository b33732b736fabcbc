"""The simulated fleet against queues whose answers are known, the fit against a replica that was made up, and what a plan refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from kilocopy import fleet_plan, planning, worth
from kilocopy.fleet import Failure, Fleet, Load, Played, Replica, Router
from kilocopy.planning import Asked, Deviation
from kilocopy.problem import ProblemError
from kilocopy.spec import LognormalLength, Spec, load
from kilocopy.summaries import Finished
from kilocopy.summary import Summary
from tests import summaries, synthetic
from tests.test_cli import kilocopy, refused


def made(limit: int = 64, base_s: float = 0.01, slope_s: float = 0.0005, before_s: float = 0.02) -> Replica:
    """A replica whose step takes base + slope x n."""
    n = np.arange(limit + 1)
    return Replica(base_s + slope_s * n, np.full((limit + 1, 64), before_s), limit)


def inside(played: Played, start_s: float, end_s: float) -> Any:
    return (played.asked_s >= start_s) & (played.asked_s < end_s)


# ------------------------------------------------------------------------------------------------------------------- the fleet


@pytest.mark.parametrize(("copies", "replicas"), [(1, 1), (8, 1), (48, 4)])
def test_a_closed_loop_keeps_its_cycle(copies: int, replicas: int) -> None:
    """N copies over a cycle of before + wait + L steps: throughput by hand, to the half step that a copy waits on average."""
    replica, tokens = made(before_s=0.02), 20
    played = Fleet(replica, replicas, Load(np.array([tokens]), copies=copies)).play(60)
    mine = inside(played, 20, 50)
    each = copies / replicas
    step_s = float(np.interp(each, np.arange(65), replica.step_s))
    cycle_s = 0.02 + (tokens + 0.5 * (copies > replicas)) * step_s
    assert mine.sum() / 30 == pytest.approx(copies / cycle_s, rel=0.05)
    assert np.nanmedian((played.first_s - played.asked_s)[mine]) == pytest.approx(0.02 + (1.5 if copies > replicas else 1) * step_s, rel=0.25)


def one_by_one(replica: Replica, played: Played, before_s: float) -> tuple[Any, Any, Any]:
    """First and last tokens of what was dealt to each replica, and who found it full, worked out request by request and step by step, in no slices."""
    first_s, last_s = np.full(len(played.asked_s), np.nan), np.full(len(played.asked_s), np.nan)
    full = np.zeros(len(played.asked_s), np.bool_)
    for owner in np.unique(played.replica):
        waiting = [int(number) for number in np.flatnonzero(played.replica == owner)]
        ready_s = {number: played.asked_s[number] + before_s for number in waiting}
        running: dict[int, int] = {}
        edge_s = 0.0
        while waiting or running:
            if not running:
                edge_s = max(edge_s, ready_s[waiting[0]])
            while waiting and ready_s[waiting[0]] <= edge_s and len(running) < replica.limit:
                number = waiting.pop(0)
                running[number] = int(played.tokens[number])
            for number in waiting:
                if ready_s[number] > edge_s:
                    break
                full[number] = True
            edge_s += float(replica.step_s[len(running)])
            for number in list(running):
                first_s[number] = edge_s if np.isnan(first_s[number]) else first_s[number]
                running[number] -= 1
                if not running[number]:
                    last_s[number] = edge_s
                    del running[number]
    return first_s, last_s, full


@pytest.mark.parametrize("router", get_args(Router))
@pytest.mark.parametrize(("copies", "rate_per_s", "lengths"), [(0, 3.0, [1]), (0, 120.0, [1, 3, 40]), (0, 60.0, [40, 200]), (1, 0.0, [7]), (9, 0.0, [1]), (40, 0.0, [1, 3, 40]), (90, 0.0, [40])])
def test_what_a_replica_does_does_not_hang_on_slices(router: Router, copies: int, rate_per_s: float, lengths: list[int]) -> None:
    """All replicas are moved on together in slices of time; each does just what it does alone, from idle to full."""
    replica = made(limit=16, before_s=0.005)
    times_s = planning.arrivals(rate_per_s, 1.0, 20, seed=8) if rate_per_s else np.zeros(0)
    played = Fleet(replica, 4, Load(np.array(lengths), copies=copies, arrivals_s=times_s), router=router).play(20)
    first_s, last_s, full = one_by_one(replica, played, 0.005)
    for mine, true in ((played.first_s, first_s), (played.last_s, last_s)):
        assert (np.isfinite(mine) | (true > 20 - 0.1)).all()
        assert mine[np.isfinite(mine)] == pytest.approx(true[np.isfinite(mine)], abs=1e-9)
    begun = np.isfinite(played.first_s)
    assert (played.full[begun] == full[begun]).all()
    assert full.any() or copies != 90


def test_steps_of_one_length_make_an_infinite_server() -> None:
    """Arrivals at rate r, each L steps of s: L x s x r in flight on average (Little), and a token a step, whatever the batch."""
    replica = made(limit=400, slope_s=0.0, before_s=0.0)
    times_s = planning.arrivals(100, 1.0, 60, seed=1)
    played = Fleet(replica, 3, Load(np.array([50]), arrivals_s=times_s)).play(62)
    mine = inside(played, 5, 55)
    assert (played.last_s - played.first_s)[mine] == pytest.approx(49 * 0.01)
    wait_s = (played.first_s - played.asked_s)[mine]
    assert 0.01 <= wait_s.min() <= wait_s.max() <= 0.02 + 1e-9
    assert wait_s.mean() == pytest.approx(0.015, rel=0.03)


def test_the_queue_of_a_replica_that_runs_one_at_a_time_is_m_d_1() -> None:
    """A mean wait of rho s / (2 (1 - rho)) (Pollaczek-Khinchine), to the noise of 14,000 arrivals."""
    service_s, rho = 0.1, 0.7
    replica = Replica(np.array([service_s, service_s]), np.zeros((2, 1)), 1)
    times_s = planning.arrivals(rho / service_s, 1.0, 2000, seed=3)
    played = Fleet(replica, 1, Load(np.array([1]), arrivals_s=times_s)).play(2000)
    wait_s = (played.first_s - played.asked_s - service_s)[inside(played, 20, 1980)]
    assert wait_s.mean() == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.1)


ROUTERS: tuple[Router, ...] = get_args(Router)


def waits_s(router: Router, lengths: list[int], rho: float, replicas: int = 20) -> float:
    """Mean wait for one's turn at replicas that run one request at a time, in steps of 0.1 s, at a load of rho."""
    replica, tokens = Replica(np.array([0.1, 0.1]), np.zeros((2, 1)), 1), np.array(lengths)
    times_s = planning.arrivals(rho * replicas / (0.1 * tokens.mean()), 1.0, 300, seed=4)
    played = Fleet(replica, replicas, Load(tokens, arrivals_s=times_s), router=router).play(300)
    return float(np.nanmean((played.first_s - played.asked_s - 0.1)[inside(played, 30, 250)]))


def test_routers_wait_as_queueing_theory_says_of_equal_requests() -> None:
    """Drawn at random each replica is M/D/1 (Pollaczek-Khinchine); in turn its arrivals are Erlang-20, with hardly a wait at all."""
    rho = 0.85
    waits = {router: waits_s(router, [1], rho) for router in ROUTERS}
    assert waits["random"] == pytest.approx(rho * 0.1 / (2 * (1 - rho)), rel=0.1)
    assert waits["round_robin"] < 0.1 * waits["random"]
    assert waits["round_robin"] < waits["two_choices"] < 0.5 * waits["random"]


def test_a_router_that_looks_at_the_load_gains_where_requests_differ() -> None:
    """One answer in ten is long: dealing in turn puts others behind it, taking the less loaded of two seldom does."""
    waits = {router: waits_s(router, [1] * 9 + [31], 0.7) for router in ROUTERS}
    assert waits["two_choices"] < 0.6 * waits["round_robin"] < 0.6 * waits["random"]


def test_in_turn_is_in_turn() -> None:
    """Also over a slice's end, and past the replicas that died."""
    times_s = np.sort(np.random.default_rng(2).uniform(0, 20, 999))
    played = Fleet(made(), 3, Load(np.array([5]), arrivals_s=times_s), failure=Failure(10.0, 1)).play(25)
    before, after = (played.replica[mask] for mask in (played.asked_s < 9.9, played.asked_s > 10.1))
    assert set(np.diff(before) % 3) == {1}
    assert set(after) == {1, 2}
    assert set(np.abs(np.diff(after))) == {1}


def test_the_router_that_is_simulated_is_the_one_that_serve_takes() -> None:
    """Ray's own words, read and not run, since its builder imports all of vLLM: what it takes for direct streaming, and what any deployment has."""
    (home,) = importlib.util.find_spec("ray").submodule_search_locations  # type: ignore[union-attr, misc]
    builder, constants = (Path(home, *name.split("/")).read_text(encoding="utf-8") for name in ("llm/_internal/serve/core/ingress/builder.py", "serve/_private/constants.py"))
    direct = re.search(r"request_router_class=(\w+)", builder)
    proxy = re.search(r"DEFAULT_REQUEST_ROUTER_PATH = \(?\s*\"[\w.]+:(\w+)\"", constants)
    assert direct, "Ray's builder says it in another way now"
    assert proxy, "Serve's constants say it in another way now"
    simulated = {"RoundRobinRouter": "round_robin", "PowerOfTwoChoicesRequestRouter": "two_choices"}
    for routing, taken in (("direct", direct), ("proxy", proxy)):
        tree = synthetic.spec((1,))
        tree["cluster"]["routing"] = routing
        assert planning.router_of(Spec.model_validate(tree)) == simulated[taken[1]]


def test_a_dead_node_answers_nothing_more() -> None:
    times_s = planning.arrivals(120, 1.0, 60, seed=5)
    played = Fleet(made(), 4, Load(np.array([30]), arrivals_s=times_s), failure=Failure(30.0, 1)).play(62)
    dead = played.replica == 0
    assert not (played.asked_s[dead] > 30.1).any()
    assert np.nanmax(played.last_s[dead]) < 30.1
    cut = dead & np.isnan(played.last_s)
    assert 5 < cut.sum() < 40  # 120/s of about half a second, over four
    assert not np.isnan(played.last_s[~dead & (played.asked_s < 58)]).any()


def test_copies_of_a_dead_node_ask_the_others() -> None:
    """40 copies on four replicas: as many are in flight when one is gone, on the three that are left."""
    fleet = Fleet(made(), 4, Load(np.array([30]), copies=40), failure=Failure(20.0, 1))
    fleet.play(40)
    assert 38 <= fleet.in_flight[1:].sum() <= 40, "one whose stream has just ended asks in the next slice"


def test_too_much_is_called_overloaded() -> None:
    times_s = planning.arrivals(1000, 1.0, 60, seed=6)
    assert Fleet(made(limit=4), 2, Load(np.array([30]), arrivals_s=times_s)).play(60).overloaded


def test_arrivals_have_the_rate_and_the_burstiness_asked() -> None:
    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff(planning.arrivals(50, burstiness, 2000, seed=1))
        assert gaps.mean() == pytest.approx(0.02, rel=0.02)
        assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)


# --------------------------------------------------------------------------------------------------------------------- the fit


def measured(replica: Replica, copies: tuple[int, ...], replicas: int = 1, **stage: Any) -> Finished:
    """A run as that replica would have left it: its own simulation, measured."""
    tree = summaries.good().model_dump(mode="json")
    template, found = tree["stages"][0], []
    spec = synthetic.spec(copies, workload={"prompts": {"kind": "synthetic", "input_tokens": 10}, "output_tokens": 40})
    spec["cluster"]["replicas"] = replicas
    spec["slo"] = {"tokens_per_s_per_copy": 20, "ttft_s": 0.5}
    for index, count in enumerate(copies):
        played = Fleet(replica, replicas, Load(np.array([40]), copies=count), seed=index).play(60)
        mine = inside(played, 20, 50)
        ttft_s, tpot_s = (played.first_s - played.asked_s)[mine], ((played.last_s - played.first_s) / 39)[mine]
        one = json.loads(json.dumps(template)) | {"index": index, "title": f"closed, {count} copies", "kind": "closed"} | stage
        one["copies"] |= {"asked": count, "n_run_client": float(count)}
        one["throughput"] |= {"requests_per_s": mine.sum() / 30, "output_tokens_per_s": {"value": 40 * mine.sum() / 30}}
        one["latency"]["ttft_s"] |= {"p50": float(np.median(ttft_s)), "mean": float(ttft_s.mean())}
        one["latency"]["tpot_s"] |= {"p50": float(np.median(tpot_s)), "mean": float(tpot_s.mean())}
        one["ttft_values_s"] = sorted(ttft_s.tolist())
        found.append(one)
    summary = Summary.model_validate(tree | {"stages": found, "run": tree["run"] | {"spec": spec}})
    return Finished(Path("made/summary.json"), summary)


def test_a_replica_that_was_made_up_is_found_again_and_two_of_it_predicted() -> None:
    """Fitted on one, whose step is 10 + 0.5 n ms: steps within 3 %; its own stages and those of two replicas as the issue asks, and better."""
    truth = made()
    run = measured(truth, (1, 4, 16, 48))
    fitted = planning.fit(planning.levels(run))
    assert fitted.step_s[[1, 4, 16, 40]] == pytest.approx(truth.step_s[[1, 4, 16, 40]], rel=0.03)
    spec = planning.known_spec(run)
    for other in (run, measured(truth, (2, 8, 32, 64), replicas=2)):
        for one in planning.deviations(fitted, spec, other):
            assert abs(one.throughput) < 0.05, one
            assert abs(one.ttft) < 0.2, one


def test_of_repeats_the_medians_are_fitted_and_compared() -> None:
    """One of three repeats was on a machine twice as slow: neither the fit nor what it is held against follows it."""
    truth = made()
    slow = Replica(2 * truth.step_s, 2 * truth.before_s, truth.limit)
    one = planning.together([measured(replica, (1, 4, 16, 48)) for replica in (truth, slow, truth)])
    fitted = planning.fit(planning.levels(one))
    assert fitted.step_s[[1, 4, 16, 40]] == pytest.approx(truth.step_s[[1, 4, 16, 40]], rel=0.03)
    two = planning.together([measured(replica, (2, 32), replicas=2) for replica in (slow, truth, truth)])
    off = planning.deviations(fitted, planning.known_spec(one), two)
    assert [deviation.load for deviation in off] == ["closed, 2 copies, 3 times", "closed, 32 copies, 3 times"]
    assert all(abs(deviation.throughput) < 0.05 for deviation in off)
    with pytest.raises(ProblemError, match=r"is no repeat of .*: the spec's cluster, the spec's stages differ; name repeats of one run; a run of more replicas goes with --against"):
        planning.together([one, two])


def test_the_smallest_fleet_is_the_smallest() -> None:
    run = measured(made(), (1, 4, 16, 48))
    spec, fitted = planning.known_spec(run), planning.fit(planning.levels(run))
    tried = planning.smallest(fitted, spec, Asked(rate_per_s=90), 100)
    best = tried[-1]
    assert best.held
    assert not planning.play(fitted, spec, Asked(rate_per_s=90), best.replicas - 1)[0].held
    assert {one.replicas for one in tried if one.held} <= set(range(best.replicas, 100))
    cost = planning.bill(spec, run, best)
    assert cost.hardware_usd_per_h.mid == pytest.approx(2.0 * best.replicas)
    assert cost.usd_per_h.low is None  # no price in the spec has a band
    assert cost.usd_per_page is not None
    assert cost.usd_per_page.mid == pytest.approx(cost.usd_per_h.mid / (cost.pages_per_h or 0))
    with pytest.raises(ProblemError, match="throughput alone needs 3 replicas"):
        planning.smallest(fitted, spec, Asked(rate_per_s=90), 1)
    strict = spec.model_copy(update={"slo": spec.slo.model_copy(update={"ttft_s": 0.001})})
    with pytest.raises(ProblemError, match=r"no fleet of up to 2 replicas .* 0.0 % of the streams"):
        planning.smallest(fitted, strict, Asked(rate_per_s=10), 2)


def test_a_rate_is_never_held_by_less_than_its_throughput() -> None:
    """However long the SLO lets them wait: 3 % more arrive than two replicas make, and in the time that is played the queue is still short."""
    run = measured(made(), (1, 4, 16, 48))
    spec, fitted = planning.known_spec(run), planning.fit(planning.levels(run))
    easy = spec.model_copy(update={"slo": spec.slo.model_copy(update={"ttft_s": 100, "tokens_per_s_per_copy": 0.1})})
    asked = Asked(rate_per_s=74)
    assert 2 < planning.least(fitted, asked, 40) < 2.1
    tried = planning.smallest(fitted, easy, asked, 100)
    assert tried[-1].replicas == 3
    assert [one.overloaded for one in tried if one.replicas == 2] == [True]
    alone = planning.redrawn(fitted, easy, asked, tried)
    assert [one.replicas for one in alone] == [3], "no draw mends a throughput that is too small"
    after = planning.play(fitted, easy, asked, 3, 1)[1]
    assert after is not None
    assert "cannot keep up" in fleet_plan.death(tried[-1], after, 1)[0]


def test_a_fit_that_ends_too_low_is_told_of_each_fleet_that_it_bears_on() -> None:
    run = measured(made(), (1, 4, 16, 48))
    spec, found = planning.known_spec(run), planning.levels(run)
    best = planning.play(planning.fit(found), spec, Asked(copies=100), 3)[0]
    assert fleet_plan.too_low([best], None, found) == []
    less, dead = best.model_copy(update={"replicas": 2, "held": False, "full_fraction": 0.2}), best.model_copy(update={"replicas": 2, "full_fraction": 0.3})
    (said,) = fleet_plan.too_low([less, best], dead, found)
    assert "20 % of the streams with 2 replicas, 30 % of the streams with 2 replicas after a node died waited" in said
    assert "48 copies" in said


def test_a_router_that_serve_does_not_take_is_called_a_what_if() -> None:
    tree = synthetic.spec((1,))
    direct, proxy = (Spec.model_validate(tree | {"cluster": tree["cluster"] | {"routing": routing}}) for routing in ("direct", "proxy"))
    assert fleet_plan.what_if(direct, Asked(copies=1)) == fleet_plan.what_if(direct, Asked(copies=1, router="round_robin")) == []
    assert fleet_plan.what_if(direct, Asked(copies=1, router="two_choices"))[0].startswith("A what-if: this router takes the less loaded of two")
    assert fleet_plan.what_if(proxy, Asked(copies=1))[0].startswith("No fleet behind Serve's own proxy")


def test_fewer_replicas_than_a_place_for_each_copy_may_do() -> None:
    """Where the SLO lets some of the streams wait, the search goes below, also where --most forbids a place for each."""
    run = measured(made(), (1, 4, 16, 48))
    spec, fitted = planning.known_spec(run), planning.fit(planning.levels(run))
    easy = spec.model_copy(update={"slo": spec.slo.model_copy(update={"ttft_s": 5, "quantile": 0.5, "tokens_per_s_per_copy": 1})})
    found = planning.smallest(fitted, easy, Asked(copies=480), 100)
    assert found[-1].held
    assert found[-1].replicas < 480 / 48
    assert found[-1].full_fraction > 0.1
    assert planning.smallest(fitted, easy, Asked(copies=480), 9)[-1].replicas == found[-1].replicas
    with pytest.raises(ProblemError, match="no fleet of up to 1 replicas holds this load"):
        planning.smallest(fitted, spec, Asked(copies=480), 1)


def test_whether_a_draw_decides_is_told() -> None:
    """Far from the limit every draw agrees; where the SLO asks for just what this load's median draw makes, some do and some do not."""
    run = measured(made(), (1, 4, 16, 48))
    known, fitted = planning.known_spec(run), planning.fit(planning.levels(run))
    spec = known.model_copy(update={"slo": known.slo.model_copy(update={"tokens_per_s_per_copy": 40})})  # so that speed decides, and not throughput
    asked = Asked(rate_per_s=90)
    tried = planning.smallest(fitted, spec, asked, 100)
    clear = planning.redrawn(fitted, spec, asked, tried)
    assert (clear[0].replicas, clear[0].held) == (tried[-1].replicas, planning.DRAWS)
    assert clear[1].replicas == max(one.replicas for one in tried if not one.held)
    assert clear[1].held == 0
    assert "the draw decides" not in fleet_plan.draws_told(clear)[0]
    played = [planning.play(fitted, spec, replace(asked, seed=seed), tried[-1].replicas)[0] for seed in range(1, planning.DRAWS + 1)]
    times = sorted(float(one.ttft_p99_s or 0) for one in played)
    even = spec.model_copy(update={"slo": spec.slo.model_copy(update={"ttft_s": times[2], "quantile": 0.99, "tokens_per_s_per_copy": 0.1})})
    found = planning.redrawn(fitted, even, asked, [planning.play(fitted, even, asked, tried[-1].replicas)[0]])
    assert 0 < found[0].held < planning.DRAWS
    assert found[0].attainment_low < 0.99 <= found[0].attainment_high
    assert f"in {found[0].held} of {planning.DRAWS} further draws" in fleet_plan.draws_told(found)[0]
    assert "the draw decides" in fleet_plan.draws_told(found)[0]


def test_the_bill_goes_over_the_prices_bands_and_counts_whole_gpus() -> None:
    run = measured(made(), (1, 4, 16, 48))
    spec, fitted = planning.known_spec(run), planning.fit(planning.levels(run))
    tree = spec.model_dump(mode="json")
    tree["prices"]["hardware"] = {"kind": "rented", "usd_per_device_hour": synthetic.quoted(2.0, 1.0, 4.0), "utilisation": 0.5}
    tree["cluster"]["hardware"] |= {"gpus_per_replica": 0.3}
    outcome = planning.play(fitted, spec, Asked(rate_per_s=90), 7)[0]
    cost = planning.bill(Spec.model_validate(tree), run, outcome)
    assert cost.devices == 3  # three on a GPU, so 7 take 3, not 2.1
    assert (cost.usd_per_h.low, cost.usd_per_h.mid, cost.usd_per_h.high) == (3.0, 6.0, 12.0)
    assert cost.usd_per_page is not None
    assert (cost.usd_per_page.high or 0) / cost.usd_per_page.mid == pytest.approx(2)


@pytest.mark.parametrize(
    ("copies", "changes", "said"),
    [
        ((1, 4), {}, "2 closed stages of different copies are valid"),
        ((1, 4, 16), {"verdict": {"level": "void", "reasons": [], "notes": []}}, "0 closed stages"),
    ],
)
def test_too_few_levels_are_not_fitted(copies: tuple[int, ...], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        planning.levels(measured(made(), copies, **changes))


def test_a_frontier_that_falls_is_not_fitted() -> None:
    with pytest.raises(ProblemError, match="more copies cannot be faster each"):
        planning.levels(measured(made(base_s=0.05, slope_s=-0.0007), (1, 16, 48)))


def test_several_replicas_are_not_one() -> None:
    with pytest.raises(ProblemError, match="2 replicas were measured"):
        planning.levels(measured(made(), (2, 8, 16), replicas=2))


def test_levels_of_an_experiment_on_many_replicas_are_not_one() -> None:
    """Its spec says one replica, for the experiment says how many."""
    run = measured(made(), (1, 4, 16, 48))
    scaling = load(Path(__file__).parent.parent / "loadtests" / "specs" / "scaling.yaml").model_dump(mode="json")
    other = replace(run, summary=run.summary.model_copy(update={"run": run.summary.run | {"spec": scaling}}))
    with pytest.raises(ProblemError, match="levels of a scaling experiment differ in more than their copies"):
        planning.levels(other)


def test_a_fit_is_held_against_its_own_kind_only() -> None:
    one, two = measured(made(), (1, 4, 16, 48)), measured(made(), (2, 8, 32), replicas=2)
    planning.same_replica(one, two)
    spec = two.spec | {"model": two.spec["model"] | {"id": "another"}}
    with pytest.raises(ProblemError, match=r"differs from made/summary.json in model.id: what it measured"):
        planning.same_replica(one, replace(two, summary=two.summary.model_copy(update={"run": two.summary.run | {"spec": spec}})))


def test_long_answers_are_played_to_their_end() -> None:
    """Lognormal lengths of sigma 1 on replicas with room to spare: none misses the SLO because the play was over before it."""
    run = measured(made(), (1, 4, 16, 48))
    spec = planning.known_spec(run)
    lengths = {"output_tokens": LognormalLength(kind="lognormal", median=55, sigma=1, min=1, max=4000)}
    outcome = planning.play(planning.fit(planning.levels(run)), spec.model_copy(update={"workload": spec.workload.model_copy(update=lengths)}), Asked(copies=40), 4)[0]
    assert outcome.attainment == 1


def test_a_fit_that_does_not_give_its_own_stages_back_is_said_before_the_answer() -> None:
    def stage(tokens_per_s: float, ttft_s: float) -> Deviation:
        return Deviation(load="closed, 8 copies", replicas=1, tokens_per_s=100, tokens_per_s_predicted=tokens_per_s, ttft_p50_s=0.1, ttft_p50_s_predicted=ttft_s)

    assert fleet_plan.unfit([]) == fleet_plan.unfit([stage(109, 0.119), stage(91, 0.081)]) == []
    [said] = fleet_plan.unfit([stage(100, 0.1), stage(100, 0.2)])
    assert said.startswith("NOT TO BE RELIED ON: played again, 1 of the 2 stages")
    assert "(closed, 8 copies: throughput +0%, TTFT p50 +100%)" in said
    assert fleet_plan.unfit([stage(80, 0.1)])


def test_the_command_line(tmp_path: Path) -> None:
    for name, replicas in (("one", 1), ("two", 2)):
        run = measured(made(), (1, 4, 16, 48), replicas)
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(run.summary.model_dump_json())
    done = kilocopy("plan", "one", "--rate", "40", "--against", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("40 requests/s within the SLO: ")
    assert "against the run given with --against throughput is off by" in " ".join(done.stdout.split())
    assert "When one node (1 replica) dies" in " ".join(done.stdout.split())
    assert (tmp_path / "plan.html").stat().st_size > 10**6
    assert "one of them" in refused(kilocopy("plan", "one", cwd=tmp_path))
    tree = json.loads((tmp_path / "one" / "summary.json").read_text()) | {"simulated": "SIMULATED ENGINE: no model ran."}
    (tmp_path / "one" / "summary.json").write_text(json.dumps(tree))
    assert kilocopy("plan", "one", "--rate", "40", cwd=tmp_path).stdout.startswith("SIMULATED ENGINE: no model ran. 40 requests/s within the SLO: ")


def attempt(name: str, *loads: Deviation, **more: Any) -> worth.Attempt:
    told = {"date": "2026-11-01", "engines": "real", "setting": "two hosts", "fitted_on": "1 to 8 copies", "rounds": 3, "valid": 9, "played": 12, "router": "round_robin"}
    return worth.Attempt.model_validate(told | {"name": name, "loads": loads} | more)


def held(load: str, throughput: float, ttft: float) -> Deviation:
    return Deviation(load=load, replicas=2, tokens_per_s=100, tokens_per_s_predicted=100 * (1 + throughput), ttft_p50_s=0.1, ttft_p50_s_predicted=0.1 * (1 + ttft))


def test_what_the_simulation_was_worth_is_told_from_the_figures() -> None:
    good, bad = attempt("good", held("4 copies", -0.09, 0.19), held("8 copies", 0.02, -0.19)), attempt("bad", held("4 copies", 0.11, 0.05), router="two_choices")
    timed = attempt("timed", held("4 copies", 0, 0), engines="timed")
    both = worth.Validation(hardware="A host.", versions={}, attempts=(bad, good, timed))
    (said,) = worth.told(both)
    assert "at 4 copies, 8 copies throughput was off by -9 %, +2 %, TTFT p50 by +19 %, -19 %" in said
    assert "9 of 12 stages valid" in said
    assert "was met at every load" in said
    assert "In 1 attempt before it 1 of 2 figures were within it" in said
    (said,) = worth.told(both.model_copy(update={"attempts": (good, bad)}))
    assert "1 of 2 figures are within the goal" in said
    assert "every load" not in said
    assert worth.told(both.model_copy(update={"attempts": (timed,)})) == ["It has not been held against a real fleet of more replicas; --against RUN does that with a run of yours."]
    assert [row[4] for row in worth.rows(both).rows] == ["+11.0 %", "-9.0 %", "+2.0 %", "+0.0 %"]
    assert "the less loaded of two, where the real one dealt in turn" in worth.settings(both)[0]
    assert "dealt" not in worth.settings(both)[1]


def test_every_attempt_that_is_stored_has_its_figures_in_the_measurements() -> None:
    """Whoever reads a plan finds there how each was made."""
    text = (Path(__file__).parent.parent / "docs" / "measurements.md").read_text(encoding="utf-8")
    for one in worth.stored().attempts:
        for seen in one.loads:
            before, after = (f"{1000 * value:.3g}" for value in (seen.ttft_p50_s, seen.ttft_p50_s_predicted))
            row = f"| {seen.load} | {seen.tokens_per_s:,.0f} | {seen.tokens_per_s_predicted:,.0f} | OFF | {before} ms | {after} ms | OFF |"
            said = [found.groups() for found in re.finditer(re.escape(row).replace("OFF", r"([-+][\d.]+) %").replace(r"50\ ms", r"50(?:\.0)?\ ms"), text)]
            told = [(100 * seen.throughput, 100 * seen.ttft)]
            slack = 1.1 if "lost" in one.note else 0.06  # points; worked out before they were rounded
            assert [pair for pair in said if [float(value) for value in pair] == pytest.approx(told[0], abs=slack)], f"{one.date}, {one.name}: {row}: {said} {told}"
