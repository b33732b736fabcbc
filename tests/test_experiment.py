"""Experiments: what is planned, what is left after a cut, and that the summary comes from the parts alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from kilocopy import campaign, experiment, recording, replicas, sections
from kilocopy.findings import FINDERS, _loss_words
from kilocopy.page import render_html
from kilocopy.problem import ProblemError
from kilocopy.recompute import read_manifest, summarise
from kilocopy.report import DASH
from kilocopy.spec import Experiment, Spec
from kilocopy.summary import Estimate, Loss, Marginal
from tests import synthetic
from tests.synthetic import Run


def asked(kind: str, **more: Any) -> dict[str, Any]:
    return synthetic.spec(stages=[], experiment={"kind": kind, "duration_s": 20, "warmup_s": 1, "ramp_s": 1, **more})


def home_of(path: Path, tree: dict[str, Any]) -> Path:
    """An experiment's directory without parts."""
    (path / "parts").mkdir(parents=True)
    spec = Spec.model_validate(tree)
    content = {"id": "T_home", "name": "known", "spec": spec.model_dump(mode="json"), "spec_sha256": spec.sha256, "training": None}
    (path / "manifest.json").write_text(json.dumps(content))
    return path


def play(home: Path, name: str, levels: dict[str, float], *, cut: str | None = None, broken: str | None = None, metered: bool = False) -> None:
    """One part that played these levels, each with its own gap between tokens; `cut`: one that did not come to its end; `broken`: one whose streams all failed."""
    block = next(
        block for serving in experiment.plan(Spec.model_validate(read_manifest(home)["spec"])) for block in serving.blocks
        if set(levels) <= set(block.levels)
    )  # fmt: skip
    mine = block.without(set(block.levels) - set(levels), 0)
    run = Run(home / "parts" / name, mine.spec.model_dump(mode="json"), **{experiment.LEVELS_KEY: list(mine.levels)})
    at_s, joules = 0.0, 0.0
    for index, level in enumerate(mine.levels):
        copies = mine.spec.stages[index].copies  # type: ignore[union-attr]
        gaps_s = [levels[level]] * 9
        if level == cut:
            run.event("stage_start", at_s, stage=index)
            for copy in range(copies):
                run.stream(at_s, gaps_s=gaps_s, stage=index, copy=copy)
            break
        for second in range(1, round(spec_duration(mine, index)) + 2):
            run.scrape(at_s + second, labels='{"ReplicaId": "a"}', kv_cache_usage_perc=copies / 100)
            run.scrape(at_s + second, labels='{"ReplicaId": "b"}', kv_cache_usage_perc=copies / 50)
        ended: dict[str, Any] = {"outcome": "truncated"} if level == broken else {}
        begun_s, at_s = at_s, run.stage(index, at_s, spec_duration(mine, index) + 2, gaps_s=gaps_s, **ended) + 1
        for second in range(int(begun_s), int(at_s) + 1) if metered else ():
            joules += 0.5 * (100 + 10 * copies)
            for device in ("GPU-a", "GPU-b"):
                run.meter(second, joules, device=device)
    if cut is None:
        run.end(at_s)
    else:
        run.close()


def spec_duration(block: experiment.Block, index: int) -> float:
    """How long a stage of a block asks."""
    return float(block.spec.stages[index].duration_s)  # type: ignore[union-attr]


def gap(copies: int) -> float:
    """Seconds between the tokens of a server whose step is 39.5 ms and 5 ms for each copy: the knee is at about 8."""
    return 0.0395 + 0.005 * copies


COPIES = (1, 2, 4, 8, 16, 32)
FRONTIER = asked("frontier", copies_max=32)


def levels(*copies: int) -> dict[str, float]:
    return {"1 copy" if count == 1 else f"{count} copies": gap(count) for count in copies}


def test_levels_are_geometric_or_listed() -> None:
    def of(**more: Any) -> list[int]:
        spec = Spec.model_validate(asked("frontier", **more))
        return [stage.copies for stage in experiment.plan(spec)[0].spec.stages]  # type: ignore[union-attr]

    assert of(copies_max=100) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert of(copies_max=1) == [1]
    assert of(copies_max=6, factor=1.2) == [1, 2, 3, 4, 5, 6]
    assert of(copies=[30, 3, 10]) == [3, 10, 30]
    shuffled = of(copies_max=100, random_order=True)
    assert sorted(shuffled) == of(copies_max=100) != shuffled == of(copies_max=100, random_order=True)


def test_what_is_planned_is_a_plain_spec() -> None:
    (serving,) = experiment.plan(Spec.model_validate(FRONTIER))
    assert serving.spec.experiment is None
    assert Spec.model_validate_json(serving.spec.model_dump_json()) == serving.spec


def test_a_cut_level_is_left_and_gets_prompts_of_its_own(tmp_path: Path) -> None:
    home = home_of(tmp_path / "home", FRONTIER)
    spec = Spec.model_validate(FRONTIER)
    play(home, "1", levels(1, 2, 4), cut="4 copies")
    done = experiment.done(home, read_manifest)
    assert list(done) == ["1 copy", "2 copies"]
    (block,) = experiment.left(experiment.plan(spec)[0], done.keys(), 1)
    assert block.levels == ("4 copies", "8 copies", "16 copies", "32 copies")
    (again,) = experiment.left(experiment.plan(spec)[0], done.keys(), 2)
    assert block.spec.workload.seed != again.spec.workload.seed != spec.workload.seed
    play(home, "2", levels(4, 8, 16, 32))
    assert experiment.left(experiment.plan(spec)[0], experiment.done(home, read_manifest).keys(), 2) == []


def test_void_levels_are_played_again_where_that_is_asked(tmp_path: Path) -> None:
    home = home_of(tmp_path / "home", FRONTIER)
    play(home, "1", levels(1, 2, 4, 8, 16, 32), broken="4 copies")
    summary = summarise(home)
    assert [stage.verdict.level for stage in summary.stages] == ["valid", "valid", "void", "valid", "valid", "valid"]
    assert "1 of them void; `kilocopy run SPEC --resume home --again void` plays those again" in summary.status_sentence
    (serving,) = experiment.plan(Spec.model_validate(FRONTIER))
    assert campaign._blocks(home, serving, campaign._refused(home, "none")) == []
    refused = campaign._refused(home, "void")
    (block,) = campaign._blocks(home, serving, refused)
    assert block.levels == ("4 copies",)
    play(home, "2", levels(4))
    assert campaign._blocks(home, serving, refused) == []
    again = summarise(home)
    assert {stage.verdict.level for stage in again.stages} == {"valid"}
    assert campaign._refused(home, "void") == frozenset()


def test_another_spec_or_an_ordinary_run_is_not_taken_up(tmp_path: Path) -> None:
    home = home_of(tmp_path / "home", FRONTIER)
    spec = Spec.model_validate(FRONTIER)
    experiment.reopened(home, spec, read_manifest(home))
    with pytest.raises(ProblemError, match="begun with another spec"):
        experiment.reopened(home, spec.model_copy(update={"name": "other"}), read_manifest(home))
    with pytest.raises(ProblemError, match="an ordinary run"):
        experiment.reopened(home, spec, {"spec": synthetic.spec()})


def test_a_frontier_in_two_parts_reads_as_one(tmp_path: Path) -> None:
    home = home_of(tmp_path / "home", FRONTIER)
    play(home, "1", levels(1, 2, 4), cut="4 copies")
    summary = summarise(home)
    assert summary.status == "interrupted"
    assert "2 of 6 levels were played to their end; `kilocopy run SPEC --resume home` plays the rest" in summary.headline.sentence
    assert [stage.verdict.level for stage in summary.stages] == ["valid", "valid", "void"]
    play(home, "2", levels(4, 8, 16, 32))
    summary = summarise(home)
    assert summary.status == "complete"
    assert [(stage.index, stage.copies.asked) for stage in summary.stages] == list(enumerate(COPIES))
    assert {stage.verdict.level for stage in summary.stages} == {"valid"}
    begins = [stage.start_s for stage in summary.stages]
    assert begins == sorted(begins)
    for stage in summary.stages:  # each stage's seconds stand under it on the common axis
        inside = [one for one in summary.timeline if stage.window and stage.window.start_s <= one.t_s + 0.5 < stage.window.end_s]
        assert {one.stage for one in inside} == {stage.index}


def test_the_frontier_of_a_known_server(tmp_path: Path) -> None:
    home = home_of(tmp_path / "home", FRONTIER | {"model": FRONTIER["model"] | {"training": {
        "kind": "published", "source": "a test", "date": "2026-01-01", "gpus": 16384}}})  # fmt: skip
    play(home, "1", levels(*COPIES))
    summary = summarise(home)
    found = summary.experiment
    assert found is not None
    assert found.knee.copies == pytest.approx(9, rel=0.25)  # a prompt's first token shifts it from 8
    assert [one.copies for one in found.levels] == list(COPIES)
    assert [one.kv_cache_fraction for one in found.levels] == pytest.approx([1.5 * copies / 100 for copies in COPIES], rel=0.02)
    assert [one.kv_cache_fraction_max for one in found.levels] == pytest.approx([copies / 50 for copies in COPIES])
    for one in found.levels:
        assert one.speed is not None
        assert one.speed.value == pytest.approx(1 / gap(one.copies), rel=0.01)
    at = {limit.tokens_per_s: limit for limit in found.speeds}
    # 1 / gap: 22, 20, 16.7, 12.5, 8.3, 5 tokens/s at 1, 2, 4, 8, 16, 32 copies
    assert {speed: limit.held for speed, limit in at.items()} == {5: 32, 10: 8, 13.3: 4, 20: 2, 50: None}
    assert at[10].clearly_missed == 16
    crossing = at[10].crossing
    assert crossing is not None
    assert crossing.value == pytest.approx(12, rel=0.05)  # 0.0395 + 0.005 N = 0.1
    assert at[10].n_cluster == 16384 / 2 * 8
    assert found.n_human["238"] > 0
    shown = sections.section(summary, 1)
    assert shown is not None
    assert ["10", "8", "8", "16"] in [row[:4] for row in shown.tables[2].rows]
    assert {row[0]: row[5] for row in shown.tables[2].rows} == {"5": "262,144 [262,144 or more]", "10": "65,536 [65,536 – 131,072]", "13.3": "32,768 [32,768 – 65,536]", "20": "16,384 [16,384 – 32,768]", "50": DASH}
    assert any("[95 %, of its tokens/s]" in sentence and "] at 238 words/min" in sentence for sentence in shown.sentences)
    assert "no level held it; already 1 missed it" in at[50].sentence
    assert (crossing.low or 99) <= 12.1 <= (crossing.high or 0)
    assert "held for 32 [32 or more] at 5 tokens/s, 8 [8 – 16] at 10 tokens/s" in found.sentence


def test_a_further_page_has_an_interval_where_energy_is_measured(tmp_path: Path) -> None:
    """A meter of 100 W and 10 W for each copy, on owned hardware: 10 J/s come with each further copy."""
    prices = FRONTIER["prices"] | {"hardware": {"kind": "owned", "usd_per_device": synthetic.quoted(30000), "life_years": 4, "residual_fraction": 0, "utilisation": 0.5}}
    home = home_of(tmp_path / "home", FRONTIER | {"prices": prices, "experiment": FRONTIER["experiment"] | {"duration_s": 40}})
    play(home, "1", levels(*COPIES), metered=True)
    found = summarise(home).experiment
    assert found is not None
    for one in found.marginals:
        assert one.wh_per_page is not None
        assert one.usd_per_page is not None
        # joules/s over pages/s: 10 W x PUE 1.25; a page is 500 words, of 1,000 tokens
        expected = 10 * 1.25 * (one.to_copies - one.from_copies) / (one.gain_tokens_per_s.value * (one.to_copies - one.from_copies) / 1000) / 3600
        assert one.wh_per_page.value == pytest.approx(expected, rel=0.02)
        assert (one.wh_per_page.low or 0) < expected < (one.wh_per_page.high or 0)
        assert one.usd_per_page.value == pytest.approx(one.wh_per_page.value / 1000 * 0.1)
    assert Marginal.model_validate_json(found.marginals[0].model_dump_json()) == found.marginals[0]
    bare = found.marginals[0].model_dump() | {"wh_per_page": 0.5}
    assert Marginal.model_validate(bare).wh_per_page == Estimate(value=0.5), "as earlier summaries have it"


def test_the_same_parts_give_the_same_bytes(tmp_path: Path) -> None:
    home = home_of(tmp_path / "one" / "home", FRONTIER)
    play(home, "1", levels(*COPIES))
    shutil.copytree(home, tmp_path / "two" / "home")
    one, two = summarise(home), summarise(tmp_path / "two" / "home")
    assert one.model_dump_json() == two.model_dump_json()
    assert render_html(one) == render_html(two)
    assert "plot-frontier" in render_html(one)


def test_an_experiment_without_a_level_says_so(tmp_path: Path) -> None:
    summary = summarise(home_of(tmp_path / "home", FRONTIER))
    assert summary.experiment is None
    assert "No answer" in summary.headline.sentence
    render_html(summary)


def test_every_kind_that_a_spec_may_name_can_be_planned() -> None:
    kinds = set(get_args(get_args(Experiment)[0]))
    assert kinds == set(experiment.PLANS) == set(FINDERS)
    with pytest.raises(ValidationError, match="frontier"):
        Spec.model_validate(asked("no_such_kind"))


# ------------------------------------------------------------------------------------------------------------------- scaling

SCALING = asked("scaling", replicas=[1, 2, 4, 8], copies_per_replica=2)


def serve_once(home: Path, name: str, level: str, gap_s: float, *, waiting: float = 0.0, seen: float = 1.0, first: float = 1.0) -> None:
    """One serving: streams of known speed, and gauges that say how many of the copies were at the engines and running; `first`: the first replica's over the mean."""
    spec = Spec.model_validate(read_manifest(home)["spec"])
    block = next(one.blocks[0] for one in experiment.plan(spec) if one.blocks[0].levels == (level,))
    run = Run(home / "parts" / name, block.spec.model_dump(mode="json"), **{experiment.LEVELS_KEY: [level]})
    replicas, copies = block.spec.cluster.replicas, block.spec.stages[0].copies  # type: ignore[union-attr]
    for second in range(1, 24):
        for replica in range(replicas):
            each = copies * seen / replicas * (first if replica == 0 else (replicas - first) / max(1, replicas - 1))
            labels = json.dumps({"ReplicaId": f"r{replica}"})
            run.scrape(second, labels=labels, generation_tokens_total=0.0, num_requests_running=each * (1 - waiting), num_requests_waiting=each * waiting)
    run.end(run.stage(0, gaps_s=[gap_s] * 9))


def test_each_level_is_served_anew_in_random_order() -> None:
    servings = experiment.plan(Spec.model_validate(SCALING))
    levels = [(one.spec.cluster.replicas, one.spec.stages[0].copies) for one in servings]  # type: ignore[union-attr]
    assert sorted(levels) == [(1, 2)] * 3 + [(2, 4)] * 3 + [(4, 8)] * 3 + [(8, 16)] * 3
    assert levels != sorted(levels)
    assert all(one.fresh for one in servings)
    names = [one.blocks[0].levels[0] for one in servings]
    assert len(set(names)) == 12
    assert names == [one.blocks[0].levels[0] for one in experiment.plan(Spec.model_validate(SCALING))]


def test_scaling_of_a_known_cluster(tmp_path: Path) -> None:
    """Contention of 10 % by Amdahl, all of it in the speed of a running sequence."""
    home = home_of(tmp_path / "home", SCALING)
    for count in (1, 2, 4, 8):
        for repeat, noise in enumerate((0.99, 1.0, 1.01), start=1):
            slower = 1 + 0.1 * (count - 1)
            whole_s = 1.0 * slower * noise  # of a request: ten tokens
            serve_once(home, f"{count}{repeat}", f"{count} replica{'' if count == 1 else 's'}, serving {repeat}", (whole_s - 0.1) / 9)
    summary = summarise(home)
    found = summary.experiment
    assert found is not None
    assert found.kind == "scaling"
    assert summary.status == "complete"
    assert {stage.verdict.level for stage in summary.stages} == {"valid"}
    assert found.sharing is None  # a GPU each
    for level in found.levels:
        expected = 1 / (1 + 0.1 * (level.replicas - 1))
        assert level.efficiency is not None
        assert level.efficiency.value == pytest.approx(expected, rel=0.03)
        assert level.loss is not None
        assert level.loss.engine.value == pytest.approx(expected, rel=0.03)
        assert (level.loss.proxy.value, level.loss.queue.value, level.loss.imbalance) == (pytest.approx(1, rel=0.01), pytest.approx(1), pytest.approx(1))
        assert level.loss.router == 1
        assert (level.loss.engine.low or 0) < expected < (level.loss.engine.high or 0)
    assert found.fit is not None
    assert found.fit.law == "amdahl"
    assert found.fit.peak is None
    assert (found.fit.sigma.low or 0) < 0.1 < (found.fit.sigma.high or 0)
    assert "most of the loss is in the engines (speed of a running sequence): x 0.5" in found.sentence
    assert "there is no maximum to tell (kappa is at most 0.0" in found.sentence
    assert summary.headline.n_slo is None
    assert summary.overhang is None
    page = render_html(summary)
    assert "plot-scaling" in page
    assert 'id="plot-throughput"' not in page  # its line would go through levels of other hardware


def test_scaling_says_where_the_loss_goes_and_what_is_shared(tmp_path: Path) -> None:
    tree = SCALING | {"cluster": {"replicas": 1, "hardware": {"kind": "gpu", "gpus_per_replica": 0.25}}}
    home = home_of(tmp_path / "home", tree)
    serve_once(home, "1", "1 replica, serving 1", 0.1)
    serve_once(home, "2", "2 replicas, serving 1", 0.1, waiting=0.2, seen=0.9)
    found = summarise(home).experiment
    assert found is not None
    assert found.kind == "scaling"
    loss = found.levels[1].loss
    assert loss is not None
    assert (loss.queue.value, loss.proxy.value) == (pytest.approx(0.8, rel=0.01), pytest.approx(0.9, rel=0.01))
    assert "Up to 4 replicas share one GPU" in found.sentence
    assert found.fit is None
    assert any("2 of 12 levels were played" in note for note in found.notes)
    assert any("2 levels of replicas that count (1, 2) are too few" in note for note in found.notes)
    assert any("1 of 3 at 1 replica, 1 of 3 at 2 replicas, 0 of 3 at 4 replicas" in note for note in found.notes)


def test_the_router_can_be_where_most_of_the_loss_goes(tmp_path: Path) -> None:
    """Two replicas, of which one has all copies and runs as fast as one alone: half of the throughput is lost, and all of it may be the router's."""
    home = home_of(tmp_path / "home", SCALING)
    for repeat in (1, 2, 3):
        serve_once(home, f"1{repeat}", f"1 replica, serving {repeat}", 0.1)
        serve_once(home, f"2{repeat}", f"2 replicas, serving {repeat}", 0.21, first=2.0)
    found = summarise(home).experiment
    assert found is not None
    assert found.kind == "scaling"
    loss = found.levels[1].loss
    assert loss is not None
    assert (loss.router, loss.imbalance) == (pytest.approx(0.5, rel=0.03), pytest.approx(2, rel=0.01))
    assert "most of the loss may be the router's uneven dealing: it can have cost up to x 0.5" in found.sentence


@pytest.mark.parametrize(
    ("queue", "engine", "router", "blamed"),
    [(0.95, 1.06, 1.0, False), (0.7, 1.4, 0.98, False), (0.6, 1.0, 0.97, False), (0.6, 1.0, 0.7, True), (1.0, 0.5, 0.6, True)],
)
def test_the_router_is_blamed_only_for_what_it_can_have_cost(queue: float, engine: float, router: float, blamed: bool) -> None:
    def part(value: float) -> Estimate:
        return Estimate(value=value, low=value - 0.01, high=value + 0.01)

    loss = Loss(driver=part(1.02), proxy=part(1.02), queue=part(queue), engine=part(engine), imbalance=1.5, router=router)
    assert ("uneven dealing" in _loss_words(loss)) == blamed


def test_replicas_that_are_even_only_in_the_mean_are_not_even(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for second in range(21):
        for replica in (0, 1):
            run.scrape(second, labels=json.dumps({"ReplicaId": f"r{replica}"}), num_requests_running=3.0 if second % 2 == replica else 1.0)
    run.stage()
    server = recording.load(run.end(23)).server
    use = replicas.gauge(server, "num_requests_running", 1, 20)
    assert use is not None
    assert list(use.means.values()) == pytest.approx([2, 2], rel=0.06)
    # between scrapes a straight line: |h - 2| is 0.5 in the mean, so that 3.5 of 4 lie within the mean
    assert replicas.evenness(server, ("num_requests_running", "num_requests_waiting"), 2, 1, 20) == pytest.approx(3.5 / 4, rel=0.01)
    assert replicas.evenness(server, ("num_requests_running",), 4, 1, 20) == pytest.approx(0.5), "two more that hold nothing"
