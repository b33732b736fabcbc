"""Nodes, GPUs, the router's balance and outages, on records whose figures can be worked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from kilocopy.page import render_html
from kilocopy.recompute import summarise
from kilocopy.report import print_report
from kilocopy.summary import Summary
from tests.synthetic import Run, spec

NODES = {"r1": "10.0.0.1", "r2": "10.0.0.1", "r3": "10.0.0.2"}


def scrape(run: Run, at_s: float, replica: str, made: float, running: float, waiting: float = 0) -> None:
    """One page of a replica's node with that replica's samples."""
    labels = json.dumps({"NodeAddress": NODES[replica], "ReplicaId": replica}, sort_keys=True)
    run.scrape(at_s, f"{NODES[replica]}:9", labels, generation_tokens_total=made, num_requests_running=running, num_requests_waiting=waiting)


def fleet(path: Path, running: dict[str, float]) -> Summary:
    """A whole stage of 4 copies, while each replica made ten tokens a second for each sequence it ran."""
    run = Run(path, spec())
    run.event("run_start", 0)
    settled_s = run.stage()
    for second in range(int(settled_s) + 2):
        for replica, copies in running.items():
            scrape(run, second, replica, 10 * copies * second, copies)
    return summarise(run.end(settled_s + 1))


def test_each_node_and_gpu_has_its_share(tmp_path: Path) -> None:
    summary = fleet(tmp_path, {"r1": 1, "r2": 1, "r3": 2})
    first, second = sorted(summary.stages[0].nodes, key=lambda row: row.node)
    assert [(row.node, row.replicas, row.gpus) for row in (first, second)] == [("10.0.0.1", 2, 2), ("10.0.0.2", 1, 1)]
    assert (first.copies, second.copies) == pytest.approx((2, 2))
    assert (first.output_tokens_per_s, second.output_tokens_per_s) == pytest.approx((20, 20))
    assert (first.output_tokens_per_s_per_gpu, second.output_tokens_per_s_per_gpu) == pytest.approx((10, 20))
    assert first.pages_per_hour == pytest.approx(20 * 0.5 / 500 * 3600)  # a word every two tokens, 500 words a page


def test_the_balance_is_held_against_its_stated_bound(tmp_path: Path) -> None:
    even = fleet(tmp_path / "even", {"r1": 10, "r2": 10, "r3": 12}).stages[0]
    assert even.balance is not None
    assert not even.balance.off
    assert even.balance.ratio == pytest.approx(12 / (32 / 3))
    few = fleet(tmp_path / "few", {"r1": 1, "r2": 1, "r3": 1.9}).stages[0].balance
    assert few is not None
    assert few.ratio > few.limit
    assert not few.off  # less than a copy more than the mean
    off = fleet(tmp_path / "off", {"r1": 10, "r2": 10, "r3": 20}).stages[0]
    assert off.balance is not None
    assert off.balance.off
    assert "bound: 1.25 times the mean" in off.balance.sentence
    assert "router-unbalanced" in [note.code for note in off.verdict.notes]


def test_what_ray_s_page_goes_on_saying_of_a_dead_replica_is_left_out(tmp_path: Path) -> None:
    """r2 died at 6 s; its node's page keeps its last values to the end."""
    run = Run(tmp_path, spec())
    run.event("run_start", 0)
    settled_s = run.stage()
    for second in range(int(settled_s) + 2):
        scrape(run, second, "r1", 10 * second, 1)
        scrape(run, second, "r2", 10 * min(second, 6), 1)
    run.event("replica_lost", 6.5, replica="r2", node=NODES["r2"])
    summary = summarise(run.end(settled_s + 1))
    (stage,) = summary.stages
    (node,) = stage.nodes
    assert stage.window is not None
    # Nor do its copies count as held where those of the driver are held against the servers', nor on the time line.
    held = next(check for check in stage.checks if check.name == "copies_client_vs_server")
    start_s, end_s = stage.window.start_s, stage.window.end_s
    assert held.right == pytest.approx(1 + (6.5 - start_s) / (end_s - start_s), abs=0.05)
    assert stage.copies.n_run_server == held.right
    assert {round(one.t_s): one.server_running for one in summary.timeline}[15] == pytest.approx(1)
    share = sum(stage.window.start_s <= second <= 6 for second in range(40)) / sum(stage.window.start_s <= second <= stage.window.end_s for second in range(40))
    assert node.copies == pytest.approx(1 + share)
    assert stage.balance is None  # only one was there all the time


def dying(path: Path, *, recovers: bool, told: bool = True) -> Summary:
    """Four copies on two nodes for 40 s. At 15.5 s node 2 dies with r3: its two copies' streams break, and nothing answers them for 6 s, or ever."""
    run = Run(path, spec(stages=[{"arrival": "closed", "copies": 4, "duration_s": 38, "warmup_s": 1, "ramp_s": 1}]))
    run.event("run_start", 0)
    for copy in range(4):
        at_s, sequence = copy / 10, 0
        while at_s < 40:
            if copy >= 2 and at_s < 15.5 <= at_s + 1:
                run.failure(at_s, 15.5, "truncated", copy=copy, sequence=sequence, first_token_ns=run.ns(at_s + 0.1), chunks=5, gaps_us=[100_000] * 4)
                at_s = 21.5
                if not recovers:
                    break
            at_s, sequence = run.stream(at_s, copy=copy, sequence=sequence), sequence + 1
    run.marks(0, 0, 40, 41)
    for second in range(43):
        for replica in ("r1", "r3"):
            if replica == "r1" or second <= 15:
                scrape(run, second, replica, 20 * second, 2)
        run.lag(second + 0.5)
    if told:
        run.event("node_lost", 20, node="10.0.0.2")
        run.event("replica_lost", 22, replica="r3", node="10.0.0.2")
        if recovers:
            run.event("replica_running", 31, replica="r4", node="10.0.0.1")
    return summarise(run.end(43))


def test_a_dead_node_s_dip_and_recovery(tmp_path: Path) -> None:
    (outage,) = dying(tmp_path, recovers=True).outages
    assert outage.what == "node 10.0.0.2 with 1 replica"
    assert outage.at_s == pytest.approx(15.5)  # the first failure, not when Serve noticed
    assert outage.noticed_s == 20
    assert outage.before_tokens_per_s == pytest.approx(40, rel=0.03)
    assert outage.lowest_tokens_per_s == pytest.approx(20, rel=0.05)
    assert outage.depth_fraction == pytest.approx(0.5, abs=0.04)
    assert outage.recovered_after_s == pytest.approx(6, abs=1.1)
    assert outage.replaced_after_s == pytest.approx(15.5)
    assert outage.errors == {"truncated": 2}


def test_a_router_that_died_alone_is_an_outage_of_its_own(tmp_path: Path) -> None:
    """No replica went: what is waited for is a router."""
    run = Run(tmp_path, spec(stages=[{"arrival": "closed", "copies": 1, "duration_s": 38, "warmup_s": 1, "ramp_s": 1}]))
    run.event("run_start", 0)
    at_s = 0.0
    for sequence in range(40):
        if sequence == 15:
            at_s = run.failure(at_s, at_s + 1, "http_5xx", sequence=sequence)
        at_s = run.stream(at_s, sequence=40 + sequence)
    run.marks(0, 0, 40, 42)
    run.event("router_lost", 17, router="x", node="10.0.0.1")
    run.event("router_running", 18, router="y", node="10.0.0.2")
    (outage,) = summarise(run.end(43)).outages
    assert (outage.what, outage.replicas_lost, outage.routers_lost) == ("the router on 10.0.0.1", 0, 1)
    assert outage.at_s == pytest.approx(16)
    assert "Ray had a router running again after 2.0 s" in outage.sentence
    assert outage.errors == {"http_5xx": 1}


def test_what_does_not_come_back_is_said(tmp_path: Path) -> None:
    (outage,) = dying(tmp_path, recovers=False).outages
    assert outage.recovered_after_s is None
    assert "not back at 90 % of it within the 24 s that were left" in outage.sentence
    assert "Ray did not bring as many replicas back" in outage.sentence


def test_without_a_serving_process_the_silent_page_tells(tmp_path: Path) -> None:
    (outage,) = dying(tmp_path, recovers=True, told=False).outages
    assert outage.what == "node 10.0.0.2 (its metrics page stopped answering)"
    assert outage.at_s == pytest.approx(15.5)


def test_the_report_shows_nodes_dip_and_recovery(tmp_path: Path) -> None:
    summary = dying(tmp_path, recovers=True)
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(summary, console)
    said = console.export_text()
    page = render_html(summary)
    for text in ("The fleet", "10.0.0.2", "a dip of", "back at 90 %"):
        assert text in said
        assert text in page
    assert '"text":"lost"' in page
    bins = {round(one.t_s): one for one in summary.timeline}
    assert bins[15].broken_tokens_per_s > 0


def test_a_run_of_one_replica_says_nothing_of_a_fleet(tmp_path: Path) -> None:
    summary = fleet(tmp_path, {"r3": 4})
    assert summary.outages == []
    assert 'id="fleet"' not in render_html(summary)
