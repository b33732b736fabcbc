"""Few-shot: the plan, the line through levels of known cost, and a made run in which the prefix cache takes a known part off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from kilocopy import experiment
from kilocopy.k_shot import Line, _saves, line
from kilocopy.page import render_html
from kilocopy.recompute import read_manifest, summarise
from kilocopy.spec import Spec
from kilocopy.summary import KShotFinding
from tests import synthetic
from tests.synthetic import Run
from tests.test_experiment import asked, home_of


def spec(**more: Any) -> dict[str, Any]:
    return asked("k_shot", **{"examples": [0, 2, 4, 8], "example_tokens": 50, "copies": 4, "repeats": 2, **more})


def planned(tree: dict[str, Any]) -> list[experiment.Serving]:
    return experiment.plan(Spec.model_validate(tree))


def test_each_cache_is_served_with_all_levels() -> None:
    servings = planned(spec(repeats=4))
    order = [bool(one.spec.cluster.engine["enable_prefix_caching"]) for one in servings]
    assert order == [True, False, False, True] * 2  # neither is always first, so a drift bears on both alike
    on, off = sorted(servings[:2], key=lambda one: not one.spec.cluster.engine["enable_prefix_caching"])
    assert (on.spec.cluster.engine, off.spec.cluster.engine) == ({"enable_prefix_caching": True}, {"enable_prefix_caching": False})
    assert on.fresh
    assert off.fresh
    for one in servings:
        assert len(one.blocks) == 4
        for block in one.blocks:
            prompts: Any = block.spec.workload.prompts
            k = int(block.levels[0].split(", ")[1].split()[0])
            assert prompts.input_tokens == 10 + 50 * k
            assert round(prompts.shared_prefix_fraction * prompts.input_tokens) == 50 * k  # the examples, and nothing of the question
            assert block.spec.cluster == one.spec.cluster
    assert len({block.levels[0] for one in servings for block in one.blocks}) == 32
    (as_it_is,) = planned(spec(prefix_cache=None))
    assert not as_it_is.fresh  # one serving, which may run already or be somebody's at a URL: the levels of all repeats go to it
    assert len(as_it_is.blocks) == 8
    assert as_it_is.spec.cluster.engine == {}


def test_a_data_sets_examples_are_the_same_for_all_requests() -> None:
    tree = spec(example_tokens=None)
    rows = {"kind": "dataset", "path": "rows.jsonl"}
    on, *_ = planned(tree | {"workload": tree["workload"] | {"prompts": rows}})
    assert {(block.spec.workload.examples, block.spec.workload.examples_shared) for block in on.blocks} == {(0, False), (2, True), (4, True), (8, True)}


@pytest.mark.parametrize(
    ("more", "work", "said"),
    [
        ({"examples": [0, 1]}, {}, "2 levels carry no slope"),
        ({"examples": [0, 1, 1]}, {}, "stands twice"),
        ({"example_tokens": None}, {}, "needs experiment.example_tokens"),
        ({}, {"prompts": {"kind": "synthetic", "input_tokens": {"kind": "uniform", "low": 1, "high": 5}}}, "a whole number of workload.prompts.input_tokens"),
        ({}, {"prompts": {"kind": "synthetic", "input_tokens": 50, "shared_prefix_fraction": 0.5}}, "no shared_prefix_fraction"),
        ({}, {"prompts": {"kind": "file", "path": "x.txt"}}, "a text file of prompts has none"),
        ({}, {"prompts": {"kind": "dataset", "path": "x.csv"}}, "example_tokens is for synthetic prompts"),
        ({}, {"examples": 2}, "sets samples and examples itself"),
    ],
)
def test_bad_input(more: dict[str, Any], work: dict[str, Any], said: str) -> None:
    tree = spec(**more)
    with pytest.raises(ValidationError, match=said):
        Spec.model_validate(tree | {"workload": tree["workload"] | work})


def test_the_engines_own_setting_is_not_overwritten_in_silence() -> None:
    tree = spec()
    cluster = tree["cluster"] | {"engine": {"enable_prefix_caching": True}}
    with pytest.raises(ValidationError, match="take one of them out"):
        Spec.model_validate(tree | {"cluster": cluster})
    Spec.model_validate(spec(prefix_cache=None) | {"cluster": cluster})


# ---------------------------------------------------------------------------------------------------------------------- the line

K = np.array([0.0, 1.0, 2.0, 4.0, 8.0])


def test_a_known_line_is_found_at_the_stated_rate() -> None:
    draw, inside, refused = np.random.default_rng(0), np.zeros(2), 0
    for _ in range(500):
        truth = 1 + 0.1 * K
        error = 0.02 * truth
        scale2 = draw.chisquare(10) / 10  # the repeats' own estimate of the spread
        found = line(K, truth + error * draw.standard_normal(5), error**2 * scale2, 10)
        errors = np.sqrt(np.diag(found.covariance)) * found.t
        inside += [abs(found.at_zero - 1) <= errors[0], abs(found.slope - 0.1) <= errors[1]]
        refused += found.misfit_p < 0.01
    assert (inside / 500 >= 0.93).all()
    assert (inside / 500 <= 0.98).all()
    assert refused <= 15  # 1 % of 500, sd 2.2


def test_what_is_no_line_is_said_and_its_interval_is_wide() -> None:
    curved = 1 + 0.02 * K**2
    found = line(K, curved, np.full(5, 0.01**2), 20)
    assert found.misfit_p < 0.01
    straight = line(K, 1 + 0.16 * K, np.full(5, 0.01**2), 20)
    assert found.t * found.covariance[1, 1] ** 0.5 > 5 * straight.t * straight.covariance[1, 1] ** 0.5


def test_a_ratio_of_slopes_has_an_interval_at_the_stated_rate_or_none() -> None:
    def of(slope: float, error: float) -> Line:
        return Line(1.0, slope, np.diag([0.01, error**2]), 200, 0.5)

    draw, inside = np.random.default_rng(1), 0
    for _ in range(500):
        found = _saves(of(0.2 + 0.05 * draw.standard_normal(), 0.05), of(1.0 + 0.1 * draw.standard_normal(), 0.1))
        assert found is not None
        inside += (found.low or 0) <= 0.8 <= (found.high or 0)
    assert 0.92 <= inside / 500 <= 0.98
    assert _saves(of(0.1, 0.05), of(0.1, 0.06)) is None  # what may be nothing divides nothing
    assert _saves(of(0.1, 0.05), of(-0.1, 0.01)) is None


# ------------------------------------------------------------------------------------------------------------------ a made run


def made(home: Path, tree: dict[str, Any], *, leave_out: int | None = None) -> KShotFinding:
    """A request takes 1 s and for each example 50 ms, with the cache 5 ms; 1 % up or down between repeats."""
    home_of(home, tree)
    for number, serving in enumerate(planned(read_manifest(home)["spec"])):
        for block in serving.blocks:
            (level,) = block.levels
            k = int(level.split("example", maxsplit=1)[0].split()[-1])
            if k == leave_out:
                continue
            on = serving.spec.cluster.engine.get("enable_prefix_caching")
            took_s = (1 + k * (0.005 if on else 0.05)) * (0.99 if level.endswith("1") else 1.01)
            run = Run(home / "parts" / f"{number}_{level}".replace(", ", "_"), block.spec.model_dump(mode="json"), **{experiment.LEVELS_KEY: [level]})
            for second in range(25):
                run.scrape(second, prefix_cache_hits_total=90.0 * second * bool(on), prefix_cache_queries_total=100.0 * second)
            run.end(run.stage(0, ttft_s=took_s / 10, gaps_s=[took_s / 10] * 9, prompt_tokens=10 + 50 * k))
    found = summarise(home).experiment
    assert isinstance(found, KShotFinding)
    return found


def test_the_marginal_cost_of_an_example(tmp_path: Path) -> None:
    found = made(tmp_path / "home", spec())
    assert [(one.prefix_cache, one.examples, one.prompt_tokens) for one in found.levels] == [(on, k, 10 + 50 * k) for on in (True, False) for k in (0, 2, 4, 8)]
    # Four copies: a request takes a quarter of its time of the hardware, which costs 8 $/h.
    expected = {True: 0.005 / 4, False: 0.05 / 4}
    assert found.basis == "repeats"
    for one in found.slopes:
        truth = expected[bool(one.prefix_cache)]
        assert one.straight
        assert one.seconds.value == pytest.approx(truth, rel=0.25 if one.prefix_cache else 0.05)
        assert (one.seconds.low or 0) < truth < (one.seconds.high or 0)
        assert one.at_zero.value == pytest.approx(0.25, rel=0.02)
        assert one.usd is not None
        assert one.usd.value == pytest.approx(one.seconds.value * 8 / 3600, rel=1e-6)
        assert one.of_a_request.value == pytest.approx(one.seconds.value / one.at_zero.value)
    assert found.cache_saves is not None
    assert (found.cache_saves.low or 0) < 0.9 < (found.cache_saves.high or 0)
    assert {one.prefix_hit_fraction for one in found.levels if not one.prefix_cache} == {0}
    assert {one.prefix_hit_fraction for one in found.levels if one.prefix_cache} == {0.9}
    assert "A further example costs $" in found.sentence
    assert "the cache takes" in found.sentence
    assert "played first" not in found.sentence
    (order,) = [note for note in found.notes if "in this order" in note]
    assert "on, off, on" in order or "off, on, off" in order
    summary = summarise(tmp_path / "home")
    page = render_html(summary)
    assert "plot-k-shot" in page
    assert summary.headline.n_slo is None


def test_too_few_levels_are_said_and_not_fitted(tmp_path: Path) -> None:
    found = made(tmp_path / "home", spec(examples=[0, 2, 4], repeats=1, prefix_cache=[False]), leave_out=4)
    assert found.slopes == []
    assert found.sentence.startswith("No answer")
    assert any("2 levels that count are too few for a slope" in note for note in found.notes)


def test_without_repeats_intervals_are_from_inside_and_said_so(tmp_path: Path) -> None:
    found = made(tmp_path / "home", spec(examples=[0, 4, 8], repeats=1, prefix_cache=None))
    assert found.basis == "within_run"
    assert any("Intervals are from inside the runs" in note for note in found.notes)
    assert synthetic.spec()["stages"][0]["duration_s"] >= 10


def test_one_serving_each_is_confounded_with_time_and_said_so(tmp_path: Path) -> None:
    found = made(tmp_path / "home", spec(repeats=1))
    assert "were played first, so what changed meanwhile is in the difference too" in found.sentence
