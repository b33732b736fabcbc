"""Runs side by side: ratios with the interval they claim, what is refused, and the gate for CI."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilocopy import check, side_by_side
from kilocopy.comparison import OWN_N_SLO, Comparison, Row, compare
from kilocopy.problem import ProblemError
from kilocopy.ratios import Reading, ratio
from kilocopy.recompute import summarise
from kilocopy.records import write_json
from kilocopy.sheet import render_sheet
from kilocopy.summaries import sides
from tests import synthetic
from tests.test_cli import kilocopy, refused

Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Runs of 1 and 4 copies, 10 tokens a stream at so many seconds a token, reported; returns the directory."""
    made = iter(range(100))

    def one(name: str = "a", gap_s: float = 0.1, *, void: bool = False, watts: float | None = 500, **changes: Any) -> str:
        number = next(made)
        path = tmp_path / f"run{number}"
        tree = synthetic.spec((1, 4), name=name, **changes)
        of = synthetic.Run(path, tree, id=f"T{number}_{name}", name=name, versions={"vllm": "0.29.0"}, hardware={"cpu": "x", "cores": 2})
        at_s = 0.0
        for index in range(2):
            if void and index == 1:
                of.failure(at_s + 5, at_s + 6, stage=1)
            at_s = of.stage(index, at_s + 1, gaps_s=[gap_s] * 9, ttft_s=gap_s)
        for second in range(int(at_s) + 3 if watts else 0):
            of.meter(second, (watts or 0) / 2 * second)
            of.meter(second, (watts or 0) / 2 * second, device="GPU-b")
        of.end(at_s)
        write_json(path / "summary.json", summarise(path).model_dump(mode="json"))
        return str(path)

    return one


def row(comparison: Comparison, metric: str, at: str = OWN_N_SLO) -> Row:
    return next(one for one in comparison.rows if (one.metric, one.at) == (metric, at))


# ------------------------------------------------------------------------------------------------------------------ the ratios


@pytest.mark.parametrize(("over", "under"), [(3, 3), (5, 2), (3, 1), (1, 4)])
def test_intervals_from_repeats_hold_the_true_ratio_as_often_as_they_say(over: int, under: int) -> None:
    """Repeats that scatter by 5 % around a ratio of 2, in 2,000 comparisons: 95 % hold it, within three standard errors."""
    draw, held, count = np.random.default_rng(1), 0, 2000
    for _ in range(count):
        a, b = ([Reading(float(v)) for v in m * np.exp(draw.normal(0, 0.05, n))] for m, n in ((2, over), (1, under)))
        found = ratio(a, b)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2 <= found.high
    assert 0.935 < held / count < 0.97


def test_intervals_inside_runs_hold_the_true_ratio_where_nothing_moves_between_runs() -> None:
    """Rates of 20 batches each, as a run's own interval is made."""
    draw, held, count = np.random.default_rng(2), 0, 1500
    for _ in range(count):
        sides_ = []
        for mean in (3.0, 1.0):
            batches = draw.normal(mean, 0.1 * mean, 20)
            half = 2.093 * batches.std(ddof=1) / np.sqrt(20)
            sides_.append(Reading(float(batches.mean()), float(batches.mean() - half), float(batches.mean() + half)))
        found = ratio([sides_[0]], [sides_[1]])
        assert found.basis == "within_run"
        held += (found.low or 0) <= 3 <= (found.high or 0)
    assert 0.935 < held / count < 0.97


def test_equal_counts_make_no_interval_of_width_zero() -> None:
    found = ratio([Reading(16.0)] * 3, [Reading(16.0)] * 3)
    assert (found.value, found.low, found.high, found.basis) == (1.0, None, None, "none")


# ------------------------------------------------------------------------------------------------------------ the comparison


def test_a_student_of_half_the_time_costs_half(make: Make) -> None:
    teacher = [make("teacher", 0.1 * (1 + 0.01 * n)) for n in range(3)]
    student = [make("student", 0.05 * (1 + 0.01 * n)) for n in range(3)]
    found = compare(sides([*teacher, *student]), {"student": 0.7})
    for metric, expected in (("usd_per_page", 0.5), ("wh_per_page", 0.5), ("tokens_per_s_per_copy", 2.0), ("ttft_p50_s", 0.5), ("copies", 1.0)):
        estimate = row(found, metric).ratio
        assert estimate is not None
        assert estimate.value == pytest.approx(expected, rel=0.002), metric
    price = row(found, "usd_per_page", "4 copies").ratio
    assert price is not None
    assert (price.basis, price.runs_over, price.runs_under) == ("repeats", 3, 3)
    assert (price.low or 0) < 0.5 < (price.high or 0)
    assert found.quality == {"student": 0.7}
    assert {point.side for point in found.points if point.on_frontier} == {"student"}
    page = render_sheet(side_by_side.sheet(found))
    assert page == render_sheet(side_by_side.sheet(found))
    assert not re.search(r"(src|href)=", page.replace("data-src=", "").split("<script>")[0])
    assert "0.500" in page
    assert "student (quality 0.7)" in page


def test_that_no_model_ran_is_repeated_first(make: Make) -> None:
    """A simulated engine's figures are nobody's speed, also beside a real one's."""
    cluster = {"replicas": 2, "hardware": {"kind": "cpu"}, "simulated_engine": {"step_s": 0.05}}
    page = {"words": 500, "words_per_token": synthetic.quoted(0.75)}
    real, made_up = make("real", page=page), make("made-up", 0.05, page=page, cluster=cluster)
    found = compare(sides([real, made_up]))
    assert list(found.simulated) == ["made-up"]
    assert side_by_side.sheet(found).headline.startswith("made-up: SIMULATED ENGINE: no model ran")


def test_one_run_each_says_where_its_interval_is_from(make: Make) -> None:
    found = compare(sides([make("a", 0.1037), make("b", 0.0513)]))  # batches that begin amid tokens: a rate that is not the same in all
    price = row(found, "usd_per_page", "4 copies").ratio
    assert price is not None
    assert price.basis == "within_run"
    assert any("inside the runs alone" in note for note in side_by_side.sheet(found).notes)


def test_names_make_sides_of_runs_of_one_spec(make: Make) -> None:
    before, after = make(), make()
    assert [side.name for side in sides([f"before={before}", f"after={after}"])] == ["before", "after"]
    assert len(sides([before, after])) == 1
    with pytest.raises(ProblemError, match="repeat each other"):
        compare(sides([before, after]))
    with pytest.raises(ProblemError, match="given twice"):
        sides([before, before])
    with pytest.raises(ProblemError, match="x: T0_a and T2_b are no repeats"):
        sides([f"x={before}", f"x={make('b')}"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"page": {"words": 250}}, "page.words: 500 against 250"),
        ({"slo": {"tokens_per_s_per_copy": 9, "ttft_s": 2}}, r"slo.ttft_s: 1(.0)? against 2"),
        ({"workload": {"prompts": {"kind": "synthetic", "input_tokens": 99}, "output_tokens": 10}}, "workload.prompts.input_tokens: 10 against 99"),
    ],
)
def test_other_questions_are_refused(make: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        compare(sides([make("a"), make("b", **changes)]))


def test_another_seed_is_no_other_workload(make: Make) -> None:
    workload = {"prompts": {"kind": "synthetic", "input_tokens": 10}, "output_tokens": 10, "seed": 7}
    assert compare(sides([make("a"), make("b", workload=workload)])).rows


def test_a_void_load_is_left_out_and_named(make: Make) -> None:
    found = compare(sides([make("a"), make("b", void=True)]))
    assert not [one for one in found.rows if one.at == "4 copies"]
    assert any(said.startswith("4 copies: void in a run of b (too-many-errors)") for said in found.left_out)
    assert [one for one in found.rows if one.at == "1 copy"]


def test_metered_energy_is_not_held_against_assumed(make: Make) -> None:
    prices = synthetic.spec()["prices"] | {"assumed_power_w": synthetic.quoted(500)}
    found = row(compare(sides([make("a"), make("b", watts=None, prices=prices)])), "wh_per_page")
    assert found.ratio is None
    assert found.missing == "energy is measured on one side and assumed on the other"


def test_what_differs_is_listed(make: Make) -> None:
    hardware = {"kind": "rented", "usd_per_device_hour": synthetic.quoted(4.0), "utilisation": 0.5}
    found = compare(sides([make("a"), make("b", prices=synthetic.spec()["prices"] | {"hardware": hardware})]))
    assert any("prices.hardware.usd_per_device_hour.value): 4" in said for said in found.differences)


def test_bands_of_prices_that_both_sides_state_alike_move_both_at_once(make: Make) -> None:
    """Rented on one price list the band cancels; on two it does not. Owned, a share of electricity that differs moves the ratio, and less than apart."""
    def rented(usd: float) -> dict[str, Any]:
        return synthetic.spec()["prices"] | {"hardware": {"kind": "rented", "usd_per_device_hour": synthetic.quoted(usd, usd / 2, usd * 2), "utilisation": 0.5}}

    same = row(compare(sides([make("a", prices=rented(2.0)), make("b", 0.05, prices=rented(2.0))])), "usd_per_page")
    assert same.prices is None
    assert side_by_side.judged(row(compare(sides([make("a", prices=rented(2.0)), make("b", 0.0513, prices=rented(2.0))])), "usd_per_page")) == "better"
    other = row(compare(sides([make("a", prices=rented(2.0)), make("b", 0.0513, prices=rented(3.0))])), "usd_per_page")
    assert other.prices is not None
    assert other.ratio is not None
    assert (other.prices.low, other.prices.high) == (pytest.approx(other.ratio.value / 4), pytest.approx(other.ratio.value * 4))
    assert "better, open over prices: [" in side_by_side.judged(other)

    owned = {"kind": "owned", "usd_per_device": synthetic.quoted(2000.0, 1000.0, 4000.0), "life_years": 5, "residual_fraction": 0, "utilisation": 0.5}
    prices = synthetic.spec()["prices"] | {"hardware": owned}
    mixed = row(compare(sides([make("a", prices=prices), make("b", 0.0513, watts=5000, prices=prices)])), "usd_per_page")
    assert mixed.prices is not None
    assert mixed.ratio is not None
    assert mixed.ratio.value == pytest.approx(mixed.prices.mid)
    assert (mixed.prices.low or 0) < mixed.prices.mid < (mixed.prices.high or 0)
    assert (mixed.prices.high or 0) / (mixed.prices.low or 1) < 4  # 16 where the same device's price stood high on one side and low on the other


def test_that_tokens_may_differ_is_said_of_other_models(make: Make) -> None:
    model = {"id": "other", "source": "/nowhere", "parameters_active": 1e6}
    (said,) = compare(sides([make("a"), make("b", model=model)])).tokens
    assert said.startswith("a and b: words per output token 0.5 and 0.5; the models' tokenizers are not recorded, and may differ")
    assert not compare(sides([make("a"), make("b", cluster={"replicas": 2, "hardware": {"kind": "gpu", "gpus_per_replica": 1}, "engine": {"dtype": "bfloat16"}})])).tokens


def test_three_sizes_make_a_line_that_is_called_an_extrapolation_beyond_them(make: Make) -> None:
    """A page takes as long as the square root of the parameters: alpha 0.5; two sizes make no line."""
    def model(n: float) -> dict[str, Any]:
        return {"id": f"m{n:g}", "source": "/x", "parameters_active": n}

    runs = [make(f"m{n:.0f}", 0.02 * (n / 1e6) ** 0.5, model=model(n)) for n in (1e6, 4e6, 16e6)]
    section = next(s for s in side_by_side.sheet(compare(sides(runs))).sections if s.title == "Cost of a page over model size")
    assert section.sentences[0].startswith("$/page ~ N^0.5")
    assert section.table is not None
    assert [row[1] for row in section.table.rows] == ["measured"] * 3 + ["EXTRAPOLATED"] * 2
    section = next(s for s in side_by_side.sheet(compare(sides(runs[:2]))).sections if s.title == "Cost of a page over model size")
    assert section.sentences == ["A fit over model size needs 3 sizes; there are 2."]
    dear = synthetic.spec()["prices"] | {"pue": synthetic.quoted(1.5)}
    elsewhere = make("m64000000", 0.16, model=model(64e6), prices=dear)
    section = next(s for s in side_by_side.sheet(compare(sides([*runs, elsewhere]))).sections if s.title == "Cost of a page over model size")
    assert section.table is None
    assert section.sentences[0].startswith("No fit over model size: the sides differ in more than their model (prices.pue.value)")


def test_what_cannot_be_read_is_a_sentence(make: Make, tmp_path: Path) -> None:
    old, good = Path(make()), make("b")
    tree = json.loads((old / "summary.json").read_text())
    (old / "summary.json").write_text(json.dumps(tree | {"schema_version": 1}))
    with pytest.raises(ProblemError, match=r"schema 1 of summary.json, and this kilocopy reads schema \d; `kilocopy report"):
        sides([good, str(old)])
    (old / "summary.json").unlink()
    with pytest.raises(ProblemError, match=r"has no summary\.json; `kilocopy report"):
        sides([str(old)])
    with pytest.raises(ProblemError, match="no run directory"):
        sides([str(tmp_path / "nowhere")])
    with pytest.raises(ProblemError, match="no side and no model"):
        compare(sides([good, make("c")]), {"nobody": 1.0})


# ------------------------------------------------------------------------------------------------------------------- the gate


def gate(new: str, old: str, *tolerance: str, clearly: bool = False) -> list[check.Verdict]:
    return check.check(sides([new])[0], sides([old])[0], check.tolerances(tolerance or ("0.05",)), clearly=clearly)[0]


def test_ten_percent_slower_fails_five_percent_and_passes_twenty(make: Make) -> None:
    old, new = make(gap_s=0.1), make(gap_s=0.11)
    assert {one.metric for one in gate(new, old) if one.outcome == "worse"} >= {"usd_per_page", "tokens_per_s", "ttft_p50_s"}
    assert not [one for one in gate(new, old, "20%") if one.outcome == "worse"]
    assert not [one for one in gate(old, new) if one.outcome == "worse"], "better is never worse"
    assert {one.metric for one in gate(new, old, "usd_per_page=0.2")} == {"usd_per_page"}
    close = gate(new, old, "usd_per_page=9.99%")
    assert [one.outcome for one in gate(new, old, "usd_per_page=9.9%", clearly=True)].count("worse") <= [one.outcome for one in close].count("worse")


def test_a_load_that_became_void_fails(make: Make) -> None:
    found = [one for one in gate(make(void=True), make()) if one.metric == "verdict"]
    assert [(one.at, one.outcome) for one in found] == [("4 copies", "worse")]


def test_a_run_with_nothing_left_fails_and_is_no_mistake(make: Make) -> None:
    """A server that stopped answering: exit code 1 and a JUnit file, not 2 and none."""
    new = Path(make())
    tree = json.loads((new / "summary.json").read_text())
    for stage in tree["stages"]:
        stage["verdict"]["level"], stage["throughput"] = "void", None
    tree["headline"]["n_slo"] = None
    (new / "summary.json").write_text(json.dumps(tree))
    found = gate(str(new), make())
    assert {one.at for one in found if one.metric == "verdict" and one.outcome == "worse"} == {"1 copy", "4 copies"}


def test_the_gate_says_what_else_differs_and_that_noise_is_wider_than_the_tolerance(make: Make) -> None:
    hardware = {"kind": "rented", "usd_per_device_hour": synthetic.quoted(4.0), "utilisation": 0.5}
    new, old = make("b", 0.1037, prices=synthetic.spec()["prices"] | {"hardware": hardware}), make("a", 0.1011)
    _, notes = check.check(sides([new])[0], sides([old])[0], check.tolerances(["0.001"]))
    assert any("usd_per_device_hour.value" in note for note in notes)
    assert any("inside one run each" in note for note in notes)
    assert any("wider than the tolerance" in note for note in notes)


def test_a_load_that_is_gone_fails(make: Make) -> None:
    new = Path(make())
    tree = json.loads((new / "summary.json").read_text())
    tree["stages"].pop()
    (new / "summary.json").write_text(json.dumps(tree))
    found = [one for one in gate(str(new), make()) if one.metric == "verdict"]
    assert [(one.at, one.outcome, one.sentence) for one in found] == [("4 copies", "worse", "valid in the baseline, gone now (not played)")]


def test_levels_that_differ_in_more_than_copies_are_no_repeats_of_a_load(make: Make) -> None:
    """A k_shot's levels all have the same copies: each is a load of its own, and is held against no other experiment's."""
    block = {"kind": "k_shot", "examples": [0, 3], "copies": 4}
    runs = []
    for copies in (4, 4, None):
        path = Path(make()) / "summary.json"
        tree = json.loads(path.read_text())
        if copies:
            tree["run"]["spec"]["experiment"] = block
            for k, stage in zip((0, 3), tree["stages"], strict=True):
                stage["copies"]["asked"], stage["title"] = copies, f"{k} examples"
        path.write_text(json.dumps(tree))
        runs.append(str(path))
    assert set(sides([runs[0]])[0].loads()) == {("closed", "0 examples"), ("closed", "3 examples")}
    assert {one.at for one in compare(sides([f"a={runs[0]}", f"b={runs[1]}"])).rows} >= {"0 examples", "3 examples"}
    with pytest.raises(ProblemError, match=r"differ in more than their copies.*experiment.kind: k_shot against absent"):
        compare(sides([f"a={runs[0]}", f"b={runs[2]}"]))


def test_an_slo_that_nothing_holds_any_more_fails(make: Make) -> None:
    found = [one for one in gate(make(gap_s=0.3), make(), "usd_per_page=0.99") if one.at == OWN_N_SLO]
    assert [(one.metric, one.outcome) for one in found] == [("copies", "worse")]


@pytest.mark.parametrize("given", ["x=0.1", "much", "usd_per_page=1.5", "-0.1"])
def test_a_tolerance_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ProblemError, match="--tolerance"):
        check.tolerances([given])


def test_the_command_line(make: Make, tmp_path: Path) -> None:
    old, new = make(gap_s=0.08), make(gap_s=0.1)
    done = kilocopy("check", new, "--against", f"{old}/summary.json", "--tolerance", "5%", "--junit", "gate.xml", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    suite = ET.parse(tmp_path / "gate.xml").getroot()[0]  # noqa: S314  # our own file
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure")) > 0
    assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
    assert kilocopy("check", old, "--against", new, cwd=tmp_path).returncode == 0
    assert "no repeats of each other" in refused(kilocopy("check", old, make("b"), "--against", new, cwd=tmp_path))
    done = kilocopy("compare", f"old={old}", f"new={new}", "--quality", "new=0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("new against old, each at its own N_SLO: 1.00 times the copies")
    assert (tmp_path / "comparison.html").stat().st_size > 10**6
    assert "NAME=SCORE" in refused(kilocopy("compare", f"old={old}", f"new={new}", "--quality", "new=good", cwd=tmp_path))
