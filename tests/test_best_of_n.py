"""Best of n: the plan, a made run with a known saving, pass@n, and verifiers that pass, fail, hang and break."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from kilocopy import experiment, records, verifier
from kilocopy.best_of_n import _cheapest, mean_share, pass_at
from kilocopy.page import render_html
from kilocopy.problem import ProblemError
from kilocopy.recompute import read_manifest, summarise
from kilocopy.records import Writer
from kilocopy.repeats import Spread
from kilocopy.spec import Spec, Verifier
from kilocopy.summary import Arm, Band, Estimate, Summary
from tests import synthetic
from tests.synthetic import Run
from tests.test_experiment import asked, home_of

GRADER = "import sys, json, os; text = sys.stdin.read(); task = json.load(open(os.environ['KILOCOPY_TASK'])); "
PYTHON = sys.executable


def spec(**more: Any) -> dict[str, Any]:
    return asked("best_of_n", **{"samples": [1, 2, 4], "sequences": 8, "repeats": 2, **more})


def blocks(tree: dict[str, Any]) -> dict[str, experiment.Block]:
    (serving,) = experiment.plan(Spec.model_validate(tree))
    return {block.levels[0]: block for block in serving.blocks}


def play(home: Path, level: str, gap_s: float, *, texts: list[list[str]] | None = None) -> None:
    """One level: each request makes ten tokens a sample, all samples of a request side by side; `texts`: kept ones, a list for each prompt."""
    block = blocks(read_manifest(home)["spec"])[level]
    run = Run(home / "parts" / level, block.spec.model_dump(mode="json"), **{experiment.LEVELS_KEY: [level]})
    n = block.spec.workload.samples
    for second in range(24):
        run.scrape(second, num_requests_running=8, num_requests_waiting=0, prefix_cache_hits_total=50.0 * second * (n > 1), prefix_cache_queries_total=100.0 * second)
    ended_s = run.stage(0, gaps_s=[gap_s] * 9, output_tokens=10 * n)
    run.scrape(ended_s + 1, prefix_cache_hits_total=50.0 * 24 * (n > 1), prefix_cache_queries_total=100.0 * 24)
    if texts is not None:
        writer = Writer(run.path, "texts", "driver-0")
        for number, samples in enumerate(texts):
            request = json.dumps({"prompt": f"task {number % 7}", "max_tokens": 10})
            writer.append({"stage": 0, "level": 0, "copy": 0, "sequence": number, "request": request, "answer": "yes", "texts": samples})
        writer.close()
    run.end(ended_s + 1)


def test_each_n_has_as_many_sequences_in_flight() -> None:
    planned = blocks(spec())
    assert len(planned) == 2 * 5
    for level, block in planned.items():
        work, stage = block.spec.workload, block.spec.stages[0]
        assert stage.copies * work.samples == 8, level  # type: ignore[union-attr]
        assert level.startswith(str(max(work.samples, work.copies_per_prompt)))
    assert list(planned) == list(blocks(spec()))  # seeded
    assert list(planned) != sorted(planned)
    assert {block.spec.workload.copies_per_prompt for block in planned.values()} == {1, 2, 4}
    assert {block.spec.workload.copies_per_prompt for block in blocks(spec(same_prompt_apart=False)).values()} == {1}
    assert not any(block.spec.workload.keep_texts for block in planned.values())
    kept = blocks(spec(verifier={"command": ["true"]}))
    assert {block.spec.workload.samples for block in kept.values() if block.spec.workload.keep_texts} == {4}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"samples": [1]}, "1 alone is nothing to compare"),
        ({"samples": [2, 4]}, "1 is missing"),
        ({"samples": [1, 3]}, "sequences 8 is not a multiple of samples 3"),
        ({"samples": [1, 2, 2]}, "stands twice"),
        ({"verifier": {"command": "python check.py"}}, "command is a list"),
        ({"verifier": {"command": []}}, "at least 1 item"),
    ],
)
def test_bad_input(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Spec.model_validate(spec(**more))


def test_what_the_experiment_sets_stands_nowhere_else() -> None:
    tree = spec()
    with pytest.raises(ValidationError, match="sets samples and examples itself"):
        Spec.model_validate(tree | {"workload": tree["workload"] | {"samples": 4}})


def made(home: Path, tree: dict[str, Any], texts: list[list[str]] | None = None) -> Summary:
    """A token takes 100 ms apart, 90 ms from the same prompt, 75 ms in one request; 1 % up or down between repeats."""
    home_of(home, tree)
    for level in blocks(tree):
        gap_s = 0.1 if level.startswith("1 ") else 0.09 if "requests of a prompt" in level else 0.075
        play(home, level, gap_s * (0.99 if level.endswith("1") else 1.01), texts=texts if level.startswith("4 samples") else None)
    return summarise(home)


def test_a_known_saving_is_found_with_its_interval(tmp_path: Path) -> None:
    summary = made(tmp_path / "home", spec())
    found = summary.experiment
    assert found is not None
    assert found.kind == "best_of_n"
    assert {stage.verdict.level for stage in summary.stages} == {"valid"}
    assert found.basis == "repeats"
    # A request takes 0.1 s to its first token and nine gaps: 1 s, 0.91 s, 0.775 s.
    expected = {("own_prompts", 2): 0.775, ("own_prompts", 4): 0.775, ("same_prompt", 2): 0.775 / 0.91, ("same_prompt", 4): 0.775 / 0.91}
    assert {(one.beside, one.samples) for one in found.savings} == set(expected)
    for one in found.savings:
        assert one.cost_ratio.value == pytest.approx(expected[one.beside, one.samples], rel=0.01)
        assert one.cost_ratio.low is not None
        assert one.cost_ratio.high is not None
        assert one.cost_ratio.low < expected[one.beside, one.samples] < one.cost_ratio.high < 1
    arm = {(one.samples, one.how): one for one in found.arms}
    assert arm[4, "one_request"].samples_per_s.value == pytest.approx(8 / 0.775, rel=0.02)  # each of eight sequences makes one
    assert arm[1, "own_prompts"].samples_per_s.value == pytest.approx(8, rel=0.02)
    # Two rented GPUs at 2 $/h, half used: 8 $/h for all of it.
    usd = arm[1, "own_prompts"].usd_per_sample
    assert usd is not None
    assert usd.mid == pytest.approx(8 / 3600 / 8, rel=0.02)
    assert arm[4, "one_request"].e2e_p50_s == pytest.approx(0.775, rel=0.02)
    assert arm[4, "one_request"].prefix_hit_fraction == pytest.approx(0.5)
    assert arm[1, "own_prompts"].prefix_hit_fraction == 0
    assert found.sentence.startswith("4 samples of one request cost 0.77")
    assert summary.headline.n_slo is None
    assert {stage.title for stage in summary.stages} == set(blocks(spec()))
    page = render_html(summary)
    assert "plot-best-of-n" in page
    assert 'id="plot-throughput"' not in page


def test_a_request_for_several_samples_is_as_many_sequences(tmp_path: Path) -> None:
    """TPOT, the SLO and the servers' gauges are of samples, and gaps between mixed samples are nobody's ITL."""
    tree = synthetic.spec((2,), workload=synthetic.spec()["workload"] | {"samples": 4})
    run = Run(tmp_path / "run", tree)
    for second in range(1, 24):
        run.scrape(second, num_requests_running=8, num_requests_waiting=0)
    gaps_s = [0.0, 0.0, 0.0, 0.1] * 9 + [0.0, 0.0, 0.0]
    run.end(run.stage(0, gaps_s=gaps_s))
    (stage,) = summarise(tmp_path / "run").stages
    assert stage.verdict.level == "valid"  # near-zero gaps are the samples', not the driver's
    assert stage.latency is not None
    assert stage.latency.tpot_s is not None
    assert stage.latency.tpot_s.p50 == pytest.approx(0.1)
    assert stage.latency.itl_s is None
    assert stage.copies.slo_attainment == 1  # ten tokens/s each where 9 are asked
    assert next(check for check in stage.checks if check.name == "copies_client_vs_server").outcome == "passed"
    slow = tree | {"slo": {"tokens_per_s_per_copy": 11, "ttft_s": 1}}
    content = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(content | {"spec": slow}))
    assert summarise(tmp_path / "run").stages[0].copies.slo_attainment == 0


def test_pass_at_k_is_the_share_of_subsets_with_a_pass() -> None:
    for samples, passed in ((6, 0), (6, 2), (6, 5), (6, 6)):
        outcomes = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at(k, samples, passed) == pytest.approx(sum(any(one) for one in subsets) / len(subsets))
    with pytest.raises(ValueError, match="pass@7"):
        pass_at(7, 6, 1)


def test_pass_at_k_is_unbiased_and_its_interval_holds_the_truth() -> None:
    """Prompts of unlike difficulty, p of Beta(1, 3): the mean of 1 - (1 - p)^3 is 1 - 3 / 6. The naive 1 - (1 - c/n)^k has another mean."""
    draw, inside, middles, naive = np.random.default_rng(0), 0, [], []
    for _ in range(400):
        chance = draw.beta(1, 3, 40)
        passed = [int(draw.binomial(4, p)) for p in chance]
        values = [pass_at(3, 4, one) for one in passed]
        naive.append(np.mean([1 - (1 - one / 4) ** 3 for one in passed]))
        found = mean_share(values)
        middles.append(found.value)
        inside += (found.low or 0) <= 0.5 <= (found.high or 0)
    assert np.mean(middles) == pytest.approx(0.5, abs=0.01)
    assert np.mean(naive) < 0.46
    assert inside / 400 >= 0.94


def test_all_alike_is_no_certainty() -> None:
    none, every = mean_share([0.0] * 20), mean_share([1.0] * 20)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 20))  # Clopper and Pearson's own
    assert (every.value, every.high) == (1, 1)


def test_samples_are_verified_and_priced(tmp_path: Path) -> None:
    """Of each prompt's four samples number % 3 are right; task and answer reach the verifier."""
    texts = [["yes"] * (number % 3) + ["no"] * (4 - number % 3) for number in range(12)]
    grader = GRADER + "sys.exit(0 if text == task['answer'] and task['request']['prompt'].startswith('task') else 1)"
    tree = spec(verifier={"command": [PYTHON, "-S", "-c", grader], "prompts": 24})
    home = tmp_path / "home"
    summary = made(home, tree, texts)
    assert summary.experiment is not None
    assert any("No sample was verified yet" in note for note in summary.experiment.notes)
    told: list[tuple[int, int]] = []
    verifier.finish(home, Spec.model_validate(tree), read_manifest, lambda done, every: told.append((done, every)))
    assert told[-1] == (96, 96)
    found = summarise(home).experiment
    assert found is not None
    assert found.kind == "best_of_n"
    assert found.verified is not None
    assert (found.verified.samples, found.verified.passed, found.verified.failures) == (96, 24, 0)
    assert found.verified.prompts == 7  # the data set began again: equal prompts are one
    groups: dict[int, list[int]] = {}
    for number in range(12):
        groups.setdefault(number % 7, []).extend([number % 3] * 2)
    for one in found.verified.pass_at:
        expected = np.mean([pass_at(one.k, 4 * len(passed), sum(passed)) for passed in groups.values()])
        assert one.value.value == pytest.approx(float(expected))
    assert [one.k for one in found.verified.pass_at if one.usd_per_solved] == [1, 2, 4]
    assert "pass@4 is" in found.sentence
    before = (home / "verdicts").stat().st_mtime_ns
    verifier.finish(home, Spec.model_validate(tree), read_manifest, lambda done, every: told.append((done, every)))
    assert (home / "verdicts").stat().st_mtime_ns == before  # nothing is judged twice
    assert "How often one of k samples passes" in render_html(summarise(home))


@pytest.mark.parametrize(
    ("code", "verdict", "said"),
    [
        ("sys.exit(0)", "passed", None),
        ("sys.exit(1)", "not_passed", None),
        ("print('no such test'); sys.exit(2)", "verifier_failed", "no such test"),
        ("os.kill(os.getpid(), 11)", "verifier_failed", ""),
        ("import time; time.sleep(60)", "timeout", None),
        ("sys.exit(bool({'KILOCOPY_API_KEY', 'KILOCOPY_JOIN_TOKEN'} & set(os.environ)) or open(os.environ['KILOCOPY_TASK']).read().count('secret'))", "passed", None),
    ],
)
def test_what_a_verifier_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, verdict: str, said: str | None) -> None:
    monkeypatch.setenv("KILOCOPY_API_KEY", "secret")
    monkeypatch.setenv("KILOCOPY_JOIN_TOKEN", "another-secret-of-16")
    command = Verifier(command=(PYTHON, "-S", "-c", f"import sys, os; {code}"), timeout_s=1 if "sleep" in code else 30)
    row = verifier.judge(command, verifier.Sample(("part", 0, 0, 0), 0, "text", '{"prompt": "p"}', None), tmp_path)
    assert (row["verdict"], row["said"]) == (verdict, said)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_verifier_is_said_and_tried_again(tmp_path: Path) -> None:
    home, marker = tmp_path / "home", tmp_path / "mended"
    code = f"import sys, os; sys.exit(0 if os.path.exists({str(marker)!r}) else 3)"
    tree = spec(repeats=1, verifier={"command": [PYTHON, "-S", "-c", code], "prompts": 2})
    made(home, tree, [["a"] * 4] * 3)
    verifier.finish(home, Spec.model_validate(tree), read_manifest, lambda done, every: None)
    found = summarise(home).experiment
    assert found is not None
    assert found.kind == "best_of_n"
    assert found.verified is not None
    assert (found.verified.prompts, found.verified.failures, found.verified.not_passed, found.verified.pass_at) == (0, 8, 0, [])
    assert any("The verifier itself failed on 8 of 8 samples (exit code 3)" in note for note in found.notes)
    marker.touch()
    verifier.finish(home, Spec.model_validate(tree), read_manifest, lambda done, every: None)
    mended = summarise(home).experiment
    assert mended is not None
    assert mended.verified.passed == 8  # type: ignore[union-attr]


def test_nothing_is_verified_before_the_levels_are_there(tmp_path: Path) -> None:
    tree = spec(verifier={"command": [PYTHON, "-c", "1 / 0"]})
    home = home_of(tmp_path / "home", tree)
    play(home, "4 samples of a request, repeat 1", 0.1, texts=[["a"] * 4])
    verifier.finish(home, Spec.model_validate(tree), read_manifest, lambda done, every: None)
    assert not (home / "verdicts").exists()
    assert records.read(home, "verdicts").num_rows == 0


def test_a_verifier_that_is_not_there_is_refused_before_anything_is_served() -> None:
    with pytest.raises(ProblemError, match="'no-such-grader' is no program that can be started"):
        verifier.check(Spec.model_validate(spec(verifier={"command": ["no-such-grader", "x"]})))


def test_the_cheapest_n_is_told_with_what_it_is_not_told_apart_from() -> None:
    def arm(n: int, usd: float, error: float) -> Arm:
        rate = Estimate(value=1.0, low=1 - error, high=1 + error)
        return Arm(
            samples=n, how="one_request" if n > 1 else "own_prompts", requests_in_flight=8, repeats=3, samples_per_s=rate, usd_per_sample=Band(low=usd, mid=usd, high=usd),
            j_per_sample=None, energy_source="not_measured", ttft_p50_s=None, e2e_p50_s=None, prefix_hit_fraction=None,
        )  # fmt: skip

    spread = Spread("repeats", 0.0001, 10)
    independent = [(8, passed) for passed in [0, 1, 2, 1, 0, 1, 1, 2] * 40]  # about one in eight passes, whatever the prompt: k samples solve nearly k times as often
    assert _cheapest([arm(1, 1.0, 0.01), arm(8, 0.5, 0.01)], independent, spread) == [8]
    assert _cheapest([arm(1, 1.0, 0.01), arm(8, 0.99, 0.01)], [(8, 8)] * 160 + [(8, 0)] * 160, spread) == [1]  # the others never pass: more samples buy nothing
    assert _cheapest([arm(1, 1.0, 0.01), arm(8, 0.5, 0.01)], independent, Spread("none", 0.0, 0)) == [], "costs without an error"
    close = _cheapest([arm(1, 1.0, 0.1), arm(2, 0.985, 0.1)], [(2, 1)] * 160 + [(2, 0)] * 160, spread)  # 2 x 0.985 for twice as many solved
    assert sorted(close) == [1, 2]
    assert _cheapest([arm(1, 1.0, 0.1), arm(2, 0.5, 0.1)], [(2, 0)] * 9, spread) == []
