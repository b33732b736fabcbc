"""Replaying production traces: both formats, their times and lengths, and what a bad row is answered with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kilocopy import schedule, traces
from kilocopy.problem import ProblemError
from kilocopy.schedule import OpenPlan, Shape
from kilocopy.spec import Spec, TraceStage, load

SMOKE = load(Path(__file__).parent.parent / "loadtests/specs/smoke.yaml")
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:50.9951690,20,0
2023-11-16 18:16:06.6805900,879,55
"""


def stage(path: Path, text: str, **more: Any) -> TraceStage:
    path.write_text(text, encoding="utf-8")
    kind = "azure" if path.suffix == ".csv" else "mooncake"
    return TraceStage.model_validate({"arrival": "trace", "path": str(path), "format": kind} | more)


def mooncake(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(timestamp: float, *blocks: int, output_length: int = 10) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": 512 * len(blocks) - 5, "output_length": output_length, "hash_ids": list(blocks)}


def test_azures_times_and_lengths(tmp_path: Path) -> None:
    times_s, shapes = traces.read(stage(tmp_path / "t.csv", AZURE))
    assert times_s == pytest.approx([0, 4.314579, 4.314579, 20], abs=1e-6)
    assert shapes == (Shape(374, 44), Shape(396, 109), Shape(20, 1), Shape(879, 55))  # none generated: one is asked for


def test_azures_newer_times(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n"
    assert traces.read(stage(tmp_path / "t.csv", text))[0] == pytest.approx([0, 0.99007], abs=1e-6)


def test_mooncakes_times_lengths_and_blocks(tmp_path: Path) -> None:
    text = mooncake(row(27000, 1, 2), row(27500, 1, 3), row(30000, 4))
    times_s, shapes = traces.read(stage(tmp_path / "t.jsonl", text))
    assert list(times_s) == [0, 0.5, 3]
    assert shapes[1] == Shape(1019, 10, (1, 3))


def test_a_part_of_a_trace_at_another_speed(tmp_path: Path) -> None:
    text = mooncake(*(row(1000 * second, 1) for second in range(10)))
    played = stage(tmp_path / "t.jsonl", text, from_s=2, duration_s=4, speed=2)
    assert list(traces.read(played)[0]) == [0, 0.5, 1, 1.5]
    spec = Spec.model_validate(SMOKE.model_dump(mode="json") | {"stages": [played.model_dump(mode="json")]})
    plans = [schedule.plan(spec, 0, worker, 3) for worker in range(3)]
    assert all(isinstance(plan, OpenPlan) and plan.stop_s == 2 for plan in plans)
    arrivals = sorted((arrival for plan in plans if isinstance(plan, OpenPlan) for arrival in plan.arrivals), key=lambda at: at.index)
    assert [(arrival.index, arrival.at_s) for arrival in arrivals] == [(0, 0), (1, 0.5), (2, 1), (3, 1.5)]
    assert arrivals[0].shape == Shape(507, 10, (1,))
    assert schedule.prompt_index(spec, 0, 0, 3, 1) == 7


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n", "a.csv:1: column GeneratedTokens is missing"),
        ("a.csv", AZURE + "yesterday,1,1\n", "a.csv:6: TIMESTAMP 'yesterday' is not a time"),
        ("a.csv", AZURE + "2023-11-16 18:16:07,many,1\n", "a.csv:6: ContextTokens 'many' is not a number of tokens"),
        ("a.csv", AZURE + "2023-11-16 18:16:07,-1,1\n", "a.csv:6: ContextTokens '-1' is not a number of tokens"),
        ("a.csv", AZURE + "2023-11-16 18:16:07,1\n", "a.csv:6: GeneratedTokens None is not a number of tokens"),
        ("a.csv", AZURE + "2023-11-16 18:16:06,1,1\n", "a.csv:6: comes 0.68059 s before the row above; sort the trace"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request after 0 s"),
        ("a.jsonl", "{}\n", "a.jsonl:1: a mooncake row is a JSON object with timestamp"),
        ("a.jsonl", mooncake(row(1, 1)) + "\n[1]\n", "a.jsonl:3: a mooncake row is"),
        ("a.jsonl", '{"timestamp": 1, "input_length": 1.5, "output_length": 1}\n', "a.jsonl:1: input_length 1.5 is not"),
        ("a.jsonl", "", "no request after 0 s"),
    ],
)
def test_a_bad_trace_is_one_sentence_with_its_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(ProblemError) as caught:
        traces.read(stage(tmp_path / name, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_trace_names_its_key(tmp_path: Path) -> None:
    asked = stage(tmp_path / "t.csv", AZURE)
    (tmp_path / "t.csv").rename(tmp_path / "elsewhere.csv")
    with pytest.raises(ProblemError, match=r"stages\[3\]\.path: .*no such file"):
        traces.read(asked, 3)


def test_an_empty_part_says_how_to_mend_it(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="no request after 100 s and 160 s; change from_s or duration_s"):
        traces.read(stage(tmp_path / "t.csv", AZURE, from_s=100, duration_s=60))


@pytest.mark.parametrize("more", [{"warmup_s": 3600}, {"warmup_s": 5, "duration_s": 10, "speed": 2}])
def test_a_warm_up_that_leaves_nothing_to_count_is_refused(tmp_path: Path, more: dict[str, float]) -> None:
    with pytest.raises(ProblemError, match=r"stages\[0\]\.warmup_s: \d+ s, and the replay takes .* nothing of it would be counted"):
        traces.read(stage(tmp_path / "t.csv", AZURE, **more))
