"""The summary is a pure function of the run directory, whatever state the run was left in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kilocopy import recompute, search
from kilocopy.headline import as_level
from kilocopy.page import render_html
from kilocopy.problem import ProblemError
from kilocopy.recompute import summarise
from kilocopy.records import CUT_OFF, batches, write_json
from kilocopy.run import report
from kilocopy.spec import Slo, Spec
from kilocopy.summary import Summary
from tests import synthetic
from tests.synthetic import Run, ideal


def test_the_headline_of_a_ladder(tmp_path: Path) -> None:
    summary = summarise(ideal(tmp_path, synthetic.spec((1, 4, 2))))
    assert summary.status == "complete"
    assert (summary.headline.n_slo, summary.headline.n_slo_stage, summary.headline.best_stage) == (4, 1, 1)
    assert summary.headline.n_slo_sentence.startswith("4 copies at once held 9 tokens/s each and TTFT <= 1 s for 90 % of the streams")
    assert "No larger load was shown to miss it" in summary.headline.n_slo_sentence
    assert "40 tokens/s, 144 pages of 500 words an hour" in summary.headline.sentence


def test_no_stage_held_the_slo(tmp_path: Path) -> None:
    summary = summarise(ideal(tmp_path, synthetic.spec(slo={"tokens_per_s_per_copy": 50})))
    assert summary.headline.n_slo is None
    assert summary.headline.best_stage == 0
    assert summary.headline.n_slo_sentence.startswith("No stage held the SLO")
    assert "held it for 0.0 %" in summary.headline.n_slo_sentence


def test_the_bound_is_shown_where_a_larger_load_missed_it(tmp_path: Path) -> None:
    run = Run(tmp_path, synthetic.spec((1, 2)))
    at_s = run.stage(0)
    at_s = run.stage(1, at_s + 1, gaps_s=[0.2] * 9)
    headline = summarise(run.end(at_s)).headline
    assert headline.n_slo == 1
    assert headline.n_slo_sentence.startswith("1 copy held")
    assert "true N may be larger" not in headline.n_slo_sentence


def test_withheld_latency_cannot_carry_the_slo_but_can_be_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.stage()
    for second in range(20):
        run.lag(2 + second, lag_us=50_000)
    headline = summarise(run.end(30)).headline
    assert (headline.n_slo, headline.best_stage) == (None, 0)


def test_a_void_stage_is_never_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path, synthetic.spec((1, 4)))
    at_s = run.stage(0)
    run.failure(at_s + 5, at_s + 6, stage=1)
    at_s = run.stage(1, at_s)
    headline = summarise(run.end(at_s)).headline
    assert (headline.n_slo, headline.best_stage) == (1, 0)


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    path = ideal(tmp_path / "one", synthetic.spec((1, 4)))
    shutil.copytree(path, tmp_path / "two")
    for name in ("one", "two"):
        write_json(tmp_path / f"{name}.json", summarise(tmp_path / name).model_dump(mode="json"))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert Summary.model_validate_json((tmp_path / "one.json").read_bytes()) == summarise(path)


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shift_ns=st.integers(-(10**12), 10**17))
def test_shifting_all_times_changes_nothing(tmp_path: Path, shift_ns: int) -> None:
    for name in ("here", "later"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    here, later = ideal(tmp_path / "here"), ideal(tmp_path / "later", shift_ns=shift_ns)
    moved = summarise(later)  # the wall clock goes with it, and only says when it was
    assert summarise(here) == moved.model_copy(update={"wall_zero_s": summarise(here).wall_zero_s})


# ---------------------------------------------------------------------------------------------------- runs that did not end


def test_a_killed_run_keeps_its_whole_stages(tmp_path: Path) -> None:
    run = Run(tmp_path, synthetic.spec((1, 2, 4)))
    at_s = run.stage(0)
    run.event("stage_start", at_s, stage=1)
    run.stream(at_s, stage=1)
    summary = summarise(run.close())
    assert summary.status == "interrupted"
    assert "1 of 3 stages ran to the end, 2 began" in summary.status_sentence
    assert [stage.verdict.level for stage in summary.stages] == ["valid", "void"]
    assert summary.headline.n_slo == 1
    assert "1 of 3 stages" in summary.headline.sentence


def test_a_cancelled_run_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.event("run_start", 0)
    run.event("stage_start", 0, stage=0)
    summary = summarise(run.end(3, "interrupted"))
    assert "was interrupted" in summary.status_sentence
    assert summary.headline.sentence.startswith("No answer: no stage is valid (interrupted, no-tokens).")


def test_a_torn_file_loses_its_tail_only(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.stream(0)
    run.requests.flush()
    run.stream(1)
    run.event("stage_start", 0, stage=0)
    path = run.close()
    whole = (path / "requests" / "driver-0.arrow").read_bytes()
    (path / "requests" / "driver-0.arrow").write_bytes(whole[: len(whole) - 200])
    with (path / "events" / "driver-0.jsonl").open("a") as file:
        file.write('{"event": "stage_st')
    assert summarise(path).stages[0].requests.sent == 1


@pytest.mark.parametrize("kept", [0, 1, 7, 100])
def test_a_file_torn_in_its_schema_is_empty(tmp_path: Path, kept: int) -> None:
    path = ideal(tmp_path)
    for kind in ("requests", "driver", "server", "energy"):
        for file in (path / kind).glob("*.arrow"):
            file.write_bytes(file.read_bytes()[:kept])
    summary = summarise(path)
    assert summary.stages[0].requests.sent == 0
    assert summary.stages[0].verdict.level == "void"


def test_a_manifest_alone(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"spec": synthetic.spec()}))
    summary = summarise(tmp_path)
    assert (summary.status, summary.stages, summary.timeline, summary.overhang) == ("interrupted", [], [], None)
    assert summary.headline.sentence.startswith("No answer: no stage began.")
    write_json(tmp_path / "summary.json", summary.model_dump(mode="json"))


def test_every_figure_is_finite(tmp_path: Path) -> None:
    """Streams without usage, without chunks, of no duration: nothing becomes NaN or infinite in the JSON."""
    run = Run(tmp_path, synthetic.spec((2,)))
    run.stream(0, ttft_s=0, gaps_s=[], copy=0, output_tokens=None, output_words=None, prompt_tokens=None)
    run.stream(0, ttft_s=0, gaps_s=[0.0], copy=1, output_words=0)
    run.stream(5, ttft_s=0, gaps_s=[0.0], copy=1, output_words=0, output_tokens=0)
    run.failure(6, 6, sent_ns=None)
    run.marks(0, 0, 20, 20)
    write_json(tmp_path / "summary.json", summarise(run.end(21)).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (None, "not a run directory"),
        ("{", "cannot be read"),
        ("[]", "a manifest is a JSON object"),
        ("{}", "the key 'spec' is missing"),
        ('{"spec": {"name": "x"}}', "spec.model: Field required"),
    ],
)
def test_what_is_no_run_is_a_problem(tmp_path: Path, manifest: str | None, said: str) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ProblemError, match=said):
        summarise(tmp_path)


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="not a run directory"):
        summarise(tmp_path / "nowhere")


def test_a_stage_that_the_spec_does_not_have_is_ignored(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.event("stage_start", 0, stage=7)
    assert summarise(run.close()).stages == []


def test_manifests_by_others_may_lack_keys(tmp_path: Path) -> None:
    path = ideal(tmp_path)
    tree: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({"spec": tree["spec"]}))
    assert summarise(path).status == "complete"


def test_a_complete_run_with_a_damaged_requests_file_says_so(tmp_path: Path) -> None:
    ideal(tmp_path)
    path = next((tmp_path / "requests").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-37])
    summary = summarise(tmp_path)
    assert summary.status == "interrupted"
    assert f"requests/{path.name} is cut off" in summary.status_sentence


def in_batches(path: Path) -> list[int]:
    """Write a file of records again in batches of 16 rows, and say at which byte each begins."""
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        table = stream.read_all()
    offsets = []
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as out:
        for batch in table.to_batches(max_chunksize=16):
            offsets.append(file.tell())
            out.write_batch(batch)
    return offsets


@pytest.mark.parametrize("kind", ["requests", "driver", "server", "energy"])
@pytest.mark.parametrize("damage", ["zeros", "noise", "from the body on"])
def test_records_that_were_damaged_in_the_middle_are_told(tmp_path: Path, kind: str, damage: str) -> None:
    """A file with its true end of which the middle was changed; before, what lay behind it was missing without a word."""
    ideal(tmp_path)
    path = next((tmp_path / kind).glob("*.arrow"))
    if kind == "driver":
        run = Run(tmp_path / "other")
        for second in range(40):
            run.lag(second)
        run.close()
        path.write_bytes(next((tmp_path / "other/driver").glob("*.arrow")).read_bytes())
    offsets = in_batches(path)
    assert len(offsets) >= 3
    assert summarise(tmp_path).status == "complete"
    held, (_, second, third, *_) = bytearray(path.read_bytes()), offsets
    begin, end = {"zeros": (second, second + 64), "noise": (second + 4, third), "from the body on": ((second + third) // 2, third)}[damage]
    held[begin:end] = bytes(end - begin) if damage == "zeros" else bytes(37 * at % 251 for at in range(end - begin))
    path.write_bytes(held)
    summary = summarise(tmp_path)
    assert summary.status == "interrupted"
    assert f"{kind}/{path.name} cannot be read to its end; rows are missing" in summary.status_sentence
    if kind in {"requests", "driver"}:  # nobody knows which stage lacks them
        assert [(stage.verdict.level, stage.verdict.reasons[0].code) for stage in summary.stages] == [("void", "rows-missing")]
    (tmp_path / "events" / "driver-0.jsonl").write_text("")  # it was killed, too
    assert f"Its records are damaged, too: {kind}/{path.name} cannot" in summarise(tmp_path).status_sentence


def test_gaps_that_cannot_be_read_void_their_stage(tmp_path: Path) -> None:
    """The index of a batch is whole, its gaps are not: found when the stage is measured."""
    ideal(tmp_path)
    path = next((tmp_path / "requests").glob("*.arrow"))
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        table = stream.read_all()
    gaps = pa.array([list(range(50_000, 50_900))] * len(table), pa.list_(pa.uint32()))  # long, so that most of the batch is theirs
    table = table.set_column(table.schema.get_field_index("gaps_us"), table.schema.field("gaps_us"), gaps)
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as out:
        out.write_table(table)
    held = bytearray(path.read_bytes())
    middle = len(held) // 2
    held[middle : middle + 400] = bytes([255]) * 400
    path.write_bytes(held)
    summary = summarise(tmp_path)
    assert f"requests/{path.name} cannot be read to its end" in summary.status_sentence
    assert [(stage.verdict.level, stage.verdict.reasons[0].code) for stage in summary.stages] == [("void", "rows-missing")]


@pytest.mark.parametrize("line", [b"7", b"{", b"\xff\xfe", b"[]", b'{"event": "x"}'])
def test_a_line_that_is_no_event_is_told(tmp_path: Path, line: bytes) -> None:
    path = next((ideal(tmp_path) / "events").glob("*.jsonl"))
    held = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([held[0], line, *held[1:]]))
    assert f"events/{path.name} cannot be read to its end" in summarise(tmp_path).status_sentence


def test_a_file_that_is_closed_while_it_is_read_is_not_called_damaged(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.stream(0)
    run.requests.flush()
    broken: dict[str, str] = {}
    reading = batches(tmp_path, "requests", broken)
    assert len(next(reading)) == 1
    run.stream(1)
    run.close()
    assert list(reading) == []
    assert broken == {"requests/driver-0.arrow": CUT_OFF}


def test_damage_does_not_cost_the_report_that_was_made_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = report(ideal(tmp_path), quiet=True).read_text()
    page = (tmp_path / "report.html").read_text()
    assert report(tmp_path, quiet=True).read_text() == before
    assert not (tmp_path / "summary.before.json").exists()
    path = next((tmp_path / "requests").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-37])
    for _ in range(2):
        assert json.loads(report(tmp_path, quiet=True).read_text())["status"] == "interrupted"
        assert ((tmp_path / "summary.before.json").read_text(), (tmp_path / "report.before.html").read_text()) == (before, page)
    assert capsys.readouterr().err.count("its last report called it complete") == 1


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    path = ideal(tmp_path) / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"schema_version": 7})
    with pytest.raises(ProblemError, match="schema_version 7, and this kilocopy reads 1"):
        summarise(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- searches


SEARCH = {"arrival": "search", "start": 2, "limit": 16, "window_s": 20, "warmup_s": 1, "ramp_s": 1}


def search_of(path: Path, loads: Sequence[float], holds: int, **changes: Any) -> Run:
    """A search over these copies: up to `holds` of them every stream makes 10 tokens/s, more make 5; the SLO asks for 9."""
    run, at_s = Run(path, synthetic.spec(stages=[SEARCH | changes])), 0.0
    for level, load in enumerate(loads):
        gaps_s = [0.1 if load <= holds else 0.2] * 9
        at_s = run.stage(0, at_s, copies=round(load), place={"level": level, "load": load}, gaps_s=gaps_s) + 1
    run.event("run_end", at_s, reason="complete")
    return run


def test_a_search_answers_from_its_records(tmp_path: Path) -> None:
    """2, 4, 8 hold, 16 does not, 12 does not, 10 does, 11 does: the answer is 11, between 11 and 12."""
    summary = summarise(search_of(tmp_path, [2, 4, 8, 16, 12, 10, 11], 11).close())
    found = summary.searches[0]
    assert (found.answer, found.low, found.high, found.reason) == (11, 11, 12, "precise")
    assert summary.headline.rate_slo_per_s is None
    assert [level.verdict for level in found.levels] == ["held", "held", "held", "missed", "missed", "held", "held"]
    assert [stage.title for stage in summary.stages][:2] == ["search level 1: 2 copies", "search level 2: 4 copies"]
    assert found.levels[0].judged == summary.stages[0].copies.slo_judged > 30
    assert (summary.headline.n_slo, summary.headline.n_slo_stage, summary.headline.n_slo_level) == (11, 0, 6)
    assert summary.headline.n_slo_sentence.startswith("11 copies held 9 tokens/s each and TTFT <= 1 s for 90 % of the streams (100.0 % of")
    assert "12 copies clearly missed; held and missed loads are as close as precision_fraction asks" in found.sentence
    assert (summary.status, summary.status_sentence) == ("complete", "Complete: 1 of 1 stage ran to the end.")


def test_streams_that_were_slow_at_the_same_moments_are_few_observations(tmp_path: Path) -> None:
    """20 copies for 20 s; those asked in four short moments are too slow, one in sixteen: spread evenly that would clearly hold 90 %."""
    verdicts = {}
    for name, slow in (("together", lambda at_s, _: at_s % 5 < 0.3), ("apart", lambda _, number: number % 16 == 7)):
        run, number, ended_s = Run(tmp_path / name, synthetic.spec(stages=[SEARCH])), 0, 0.0
        for copy in range(20):
            at_s = copy / 20
            while at_s < 22:
                ttft_s, gap_s = (0.1, 0.12) if slow(at_s, number) else (0.28, 0.1)  # of one length, so that none shifts those after it
                at_s = run.stream(at_s, ttft_s, [gap_s] * 9, copy=copy, sequence=number)
                number += 1
            ended_s = max(ended_s, at_s)
        run.marks(0, 0.0, 22.0, ended_s, level=0, load=20.0)
        for second in range(22):
            run.lag(second + 0.5)
        summary = summarise(run.close())
        level = summary.searches[0].levels[0]
        verdicts[name] = level.verdict
        assert 0.93 < (level.attainment or 0) < 0.95
        assert (summary.stages[0].copies.slo_independent < 0.5) == (name == "together")
        alone = search.wilson(level.attained or 0, level.judged)[0]
        assert alone > 0.9
        assert (level.wilson_low or 0) < (alone - 0.02 if name == "together" else 1)
        assert level.independent == summary.stages[0].copies.slo_independent
    assert verdicts == {"together": "unclear", "apart": "held"}


def test_a_search_that_the_driver_ended_says_so(tmp_path: Path) -> None:
    """At 8 copies the loop is late: that level says nothing about the server."""
    run = search_of(tmp_path, [2, 4, 8, 8], 16)
    starts = [json.loads(line) for line in (tmp_path / "events" / "driver-0.jsonl").read_text().splitlines()]
    begun = [event["time_ns"] for event in starts if event["event"] == "stage_start"]
    for ns in begun[2:]:
        for second in range(3, 21):
            run.lag((ns - synthetic.BASE_NS) / 1e9 + second, lag_us=60_000)
    found = summarise(run.close()).searches[0]
    assert (found.answer, found.reason) == (4, "unsound")
    assert [level.verdict for level in found.levels] == ["held", "held", "unsound", "unsound"]
    assert "the driver, and not the server, was the limit" in found.sentence


def test_a_search_at_its_limit(tmp_path: Path) -> None:
    found = summarise(search_of(tmp_path, [2, 4, 8, 16], 16).close()).searches[0]
    assert (found.answer, found.high, found.reason) == (16, None, "limit")
    assert "the true one may be larger" in found.sentence


def test_a_search_in_which_nothing_held(tmp_path: Path) -> None:
    summary = summarise(search_of(tmp_path, [2, 1], 0).close())
    assert (summary.searches[0].answer, summary.headline.n_slo) == (None, None)
    assert summary.searches[0].sentence.startswith("No load held the SLO")


def test_a_search_over_rates_leaves_n_slo_to_closed_stages(tmp_path: Path) -> None:
    run, at_s = Run(tmp_path, synthetic.spec(stages=[SEARCH | {"over": "rate_per_s"}])), 0.0
    for level, rate in enumerate((2.0, 4.0)):
        times_s = [at_s + n / rate for n in range(int(21 * rate))]
        ended_s = run.arrivals(times_s, [10] * len(times_s), level=level)
        run.marks(0, at_s, at_s + 21, ended_s, level=level, load=rate)
        at_s = ended_s + 2
    summary = summarise(run.end(at_s, "interrupted"))
    assert (summary.searches[0].answer, summary.searches[0].over, summary.headline.n_slo) == (4.0, "rate_per_s", None)
    assert (summary.headline.rate_slo_per_s, summary.headline.n_slo_stage, summary.headline.n_slo_level) == (4.0, 0, 1)
    assert summary.headline.n_slo_sentence.startswith("4 requests/s held")
    assert "requests/s within the SLO" in render_html(summary)
    assert [stage.title for stage in summary.stages] == ["search level 1: 2 requests/s", "search level 2: 4 requests/s"]


def test_a_void_level_is_no_answer(tmp_path: Path) -> None:
    """The servers counted half as many tokens at 4 copies: that level shows nothing."""
    run = search_of(tmp_path, [2, 4], 16)
    events = [json.loads(line) for line in (tmp_path / "events" / "driver-0.jsonl").read_text().splitlines()]
    begun = [(event["time_ns"] - synthetic.BASE_NS) / 1e9 for event in events if event["event"] == "stage_start"]
    settled = [(event["time_ns"] - synthetic.BASE_NS) / 1e9 for event in events if event["event"] == "stage_settled"]
    run.scrape(begun[1] - 0.5, generation_tokens_total=0)
    run.scrape(settled[1] + 0.1, generation_tokens_total=440)
    summary = summarise(run.close())
    assert {reason.code for reason in summary.stages[1].verdict.reasons} == {"counters-disagree"}
    assert summary.headline.n_slo == 2
    assert (summary.searches[0].answer, summary.searches[0].reason) == (2, "unsound")
    assert "or its level is void" in summary.headline.n_slo_sentence


def test_a_running_search_judges_a_level_as_the_report_does(tmp_path: Path) -> None:
    """At 8 copies the loop is late: that level is not held, however fast its streams were."""
    run, at_s, ends_s = Run(tmp_path, synthetic.spec(stages=[SEARCH])), 0.0, []
    for number, load in enumerate([2, 4, 8]):
        begun_s, at_s = at_s, run.stage(0, at_s, copies=load, place={"level": number, "load": float(load)}, gaps_s=[0.1] * 9) + 1
        ends_s.append((begun_s, at_s))
    for second in range(3, 21):
        run.lag(ends_s[2][0] + second, lag_us=60_000)
    path, slo = run.close(), Spec.model_validate(run.spec).slo
    summary = summarise(path)
    for number, shown in enumerate(summary.stages):
        rows = shown.requests.scheduled
        live = recompute.level(path, 0, number, rows, scraped=True)
        assert live == shown.model_copy(update={"cost": None})
        assert recompute.level(path, 0, number, rows + 1, scraped=True) is None  # not all of it has come home
        assert live is not None
        assert search.verdict(as_level(live, slo), slo) == summary.searches[0].levels[number].verdict
    assert [level.verdict for level in summary.searches[0].levels] == ["held", "held", "unsound"]
    assert recompute.level(path, 0, 3, 0, scraped=True) is None


def test_a_level_waits_for_the_scrape_that_closes_its_account(tmp_path: Path) -> None:
    run = search_of(tmp_path, [2], 16)
    run.scrape(0.5, generation_tokens_total=0)
    path = run.close()
    assert recompute.level(path, 0, 0, 1, scraped=True) is None
    assert recompute.level(path, 0, 0, 1, scraped=False) is not None


def test_a_rate_whose_backlog_grows_and_that_misses_is_above_the_servers_limit(tmp_path: Path) -> None:
    """Of 10 requests a second 5 end: in the long run none would be in time. The level is void, and yet it says so much."""
    search_stage = SEARCH | {"over": "rate_per_s", "start": 10, "limit": 10}
    run = Run(tmp_path, synthetic.spec(stages=[search_stage], slo={"tokens_per_s_per_copy": 1, "ttft_s": 1, "error_fraction_max": 0.1}))
    for number in range(210):
        due_s = number / 10
        run.stream(due_s, 0.1 + due_s, copy=number)
    run.marks(0, 0, 21, 43, level=0, load=10.0)
    for second in range(21):
        run.lag(second + 0.5)
    summary = summarise(run.end(47))
    assert {reason.code for reason in summary.stages[0].verdict.reasons} == {"backlog-grows"}
    assert (summary.searches[0].levels[0].verdict, summary.searches[0].answer, summary.searches[0].high) == ("missed", None, 10)


def test_late_streams_of_a_backlog_are_no_excuse_for_the_driver(tmp_path: Path) -> None:
    """The last fifth of a window's streams is late, all together: few observations, yet the level that its backlog voids says something of the server."""
    stage = summarise(search_of(tmp_path, [16], 11).close()).stages[0]
    reason = {"level": "void", "reasons": [{"code": "backlog-grows", "sentence": "It grows."}], "notes": []}
    copies = stage.copies.model_copy(update={"slo_judged": 400, "slo_attained": 320, "slo_independent": 0.04, "error_fraction": 0.0})
    level = as_level(stage.model_copy(update={"copies": copies, "verdict": stage.verdict.model_validate(reason)}), Slo(tokens_per_s_per_copy=9))
    assert level.sound
    assert not search.holds(level, Slo(tokens_per_s_per_copy=9))
    late = copies.model_copy(update={"slo_attained": 390})
    assert not as_level(stage.model_copy(update={"copies": late, "verdict": stage.verdict.model_validate(reason)}), Slo(tokens_per_s_per_copy=9)).sound


def test_a_rate_that_only_a_void_level_shows_is_not_said_to_hold(tmp_path: Path) -> None:
    """Of 43 arrivals 2 found both places taken: within the SLO's errors, too many for a level that was asked for this rate."""
    search = SEARCH | {"over": "rate_per_s", "limit": 2, "max_in_flight": 2}
    slo = {"tokens_per_s_per_copy": 9, "ttft_s": 1, "error_fraction_max": 0.1}
    run = Run(tmp_path, synthetic.spec(stages=[search], slo=slo))
    ended_s = run.arrivals([n / 2 for n in range(43)], [10] * 43, level=0)
    for n in range(2):
        run.drop(10.25 + n, copy=100 + n)
    run.marks(0, 0, 21, ended_s, level=0, load=2.0)
    for second in range(21):
        run.lag(second + 0.5)
    summary = summarise(run.end(ended_s + 2))
    assert {reason.code for reason in summary.stages[0].verdict.reasons} == {"sends-dropped"}
    assert (summary.searches[0].answer, summary.headline.rate_slo_per_s) == (2, None)
    assert summary.headline.n_slo_sentence == "The search of stage 0 came to 2 requests/s, but no level of that load is valid."


def test_a_run_without_an_end_may_be_going_on(tmp_path: Path) -> None:
    run = Run(tmp_path, synthetic.spec((1, 2)))
    run.event("run_start", 0)
    at_s = run.stage(0)
    run.event("stage_start", at_s, stage=1)
    sentence = summarise(run.close()).status_sentence
    assert "was killed, or it is still running" in sentence
    assert "was interrupted" not in sentence


def test_a_run_that_lost_a_worker_is_complete_and_its_stage_void(tmp_path: Path) -> None:
    run = Run(tmp_path, synthetic.spec((1,)))
    at_s = run.stage(0)
    run.event("stage_start", 0, stage=0, process="worker1")
    run.event("worker_lost", 5, worker=1, stage=0, level=0, process="master")
    path = run.end(at_s)
    torn = (path / "requests" / "driver-0.arrow").read_bytes()[:-8]
    (path / "requests" / "worker1.arrow").write_bytes(torn)
    summary = summarise(path)
    assert summary.status == "complete"
    assert {reason.code for reason in summary.stages[0].verdict.reasons} == {"worker-lost"}
