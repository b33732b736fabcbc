"""The user's data sets in every format: what is found in them, their order, and what is said of a bad row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kilocopy.problem import ProblemError
from kilocopy.spec import DatasetPrompts, FilePrompts, Spec
from loadtests import datasets
from loadtests.workload import Workload
from tests.test_workload import SMOKE, said

TALK = [
    {"role": "system", "content": "be short"}, {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"}, {"role": "user", "content": "two?"},
]  # fmt: skip
SHARED = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "1"}, {"from": "human", "value": "two?"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return path


def rows_of(path: Path, *, answers: bool = False, **more: Any) -> list[datasets.Row]:
    found = datasets.load(DatasetPrompts(kind="dataset", path=str(path), **more), 1, print, answers=answers)
    return sorted(found._rows, key=lambda row: row.questions)


def asking(path: Path, *, kind: str = "dataset", columns: dict[str, str] | None = None, **changes: Any) -> Spec:
    tree = SMOKE.model_dump(mode="json", exclude_unset=True)
    tree["workload"] |= {"prompts": {"kind": kind, "path": str(path), **(columns or {})}} | changes
    tree["stages"] = [{"arrival": "closed", "copies": 50, "duration_s": 10}]
    return Spec.model_validate(tree)


@pytest.mark.parametrize("ending", datasets.FORMATS)
@pytest.mark.parametrize("column", ["prompt", "text", "question"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str, column: str) -> None:
    path = write(tmp_path / f"set{ending}", [{column: 'a "b",\nc', "answer": "x", "n": 3}, {column: "d", "answer": "y", "n": 4}])
    named = {"column": column} if column == "question" else {}
    found = rows_of(path, output_tokens_column="n", **named)
    assert [(row.questions, row.answer, row.output_tokens) for row in found] == [(('a "b",\nc',), "x", 3), (("d",), "y", 4)]
    assert found[1].messages == ({"role": "user", "content": "d"},)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_messages_are_asked_up_to_the_users_last(tmp_path: Path, ending: str) -> None:
    (row,) = rows_of(write(tmp_path / f"set{ending}", [{"messages": [*TALK, {"role": "assistant", "content": "2"}]}]))
    assert list(row.messages) == TALK
    assert (row.questions, row.answer) == (("one?", "two?"), "1")


def test_sharegpt_asks_its_first_question(tmp_path: Path) -> None:
    (row,) = rows_of(write(tmp_path / "share.json", [{"id": "x", "conversations": SHARED}]))
    assert row.messages == ({"role": "user", "content": "one?"},)
    assert (row.questions, row.answer) == (("one?", "two?"), "1")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"\n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n\n[1]\n', r"a.jsonl:3: expected an object of columns, got \[1\]"),
        ("a.jsonl", '{"prompt": 7}\n', r"a.jsonl:1: column prompt: expected a text or a list of messages, got 7"),
        ("a.jsonl", '{"prompt": " "}\n', r"a.jsonl:1: column prompt: expected a text"),
        ("a.jsonl", '{"question": "a"}\n', r"a.jsonl:1: none of the columns prompt, text, messages, conversations; say which"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"a.jsonl:1: column messages, message 1: expected {"),
        ("a.jsonl", '{"messages": [{"role": "system", "content": "a"}]}\n', r"a.jsonl:1: column messages: no message of the user's"),
        ("a.jsonl", "\n", r"a.jsonl is empty; expected one prompt per row"),
        ("a.json", '{"prompt": "a"}', r"a.json: expected a list of rows, such as ShareGPT's, got dict"),
        ("a.json", '[{"prompt": "a"},\n', r"a.json:2: not valid JSON"),
        ("a.json", '[{"conversations": [{"from": "alien", "value": "a"}]}]', r"a.json: row 1: column conversations, message 1"),
        ("a.csv", "prompt,n\na,1\nb\n", r"a.csv:3: the header has 2 columns, this row has not"),
        ("a.csv", "prompt,n\na,1,2\n", r"a.csv:2: the header has 2 columns"),
        ("a.csv", 'prompt\n"a\n', r"a.csv:\d: not valid CSV"),
        ("a.parquet", "no", r"a.parquet cannot be read"),
        ("a.txt", "a", r"ends in none of .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_bad_row_is_said_with_its_place(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ProblemError, match=sentence):
        rows_of(path)


def test_rows_that_ask_nothing_are_left_out_and_counted_once(tmp_path: Path) -> None:
    told: list[str] = []
    rows = [{"conversations": []}, {"conversations": SHARED}, {"conversations": SHARED[1:2]}]
    found = datasets.load(DatasetPrompts(kind="dataset", path=str(write(tmp_path / "share.json", rows))), 1, told.append)
    assert [row.questions for row in found._rows] == [("one?", "two?")]
    assert len(told) == 1
    assert "share.json: 2 of 3 rows ask nothing and are left out; the first is" in told[0]
    assert "share.json: row 1: column conversations: no message at all" in told[0]


def test_a_long_field_of_a_csv_is_read(tmp_path: Path) -> None:
    (row,) = rows_of(write(tmp_path / "long.csv", [{"prompt": "word " * 50_000}]))
    assert len(row.questions[0]) == 250_000


def test_a_line_ends_where_the_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\u2028b\u0085c\r\nd\n", encoding="utf-8")
    found = datasets.load(FilePrompts(kind="file", path=str(path)), 1, print)
    assert sorted(row.questions[0] for row in found._rows) == ["a\u2028b\u0085c", "d"]


def test_bad_lengths_and_missing_answers_are_said_with_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "n": 3}, {"prompt": "b", "n": 1.5}])
    with pytest.raises(ProblemError, match=r"a.jsonl:2: column n: expected a whole number of tokens from 1 up, got 1.5"):
        rows_of(path, output_tokens_column="n")
    with pytest.raises(ProblemError, match=r"a.jsonl:1: no column m; here are prompt, n"):
        rows_of(path, output_tokens_column="m")
    with pytest.raises(ProblemError, match=r"a.jsonl:1: no answer, which few-shot examples need"):
        rows_of(path, answers=True)
    with pytest.raises(ProblemError, match=r"gone.csv cannot be read"):
        rows_of(tmp_path / "gone.csv")


def test_the_order_is_seeded_and_going_round_is_said_once() -> None:
    told: list[str] = []
    made = [datasets.Rows([datasets._plain(str(n)) for n in range(20)], 3, "set.jsonl", told.append) for _ in range(2)]
    first = [made[0](index).questions[0] for index in range(20)]
    assert [made[1](index).questions[0] for index in range(20)] == first
    assert sorted(first, key=int) == [str(n) for n in range(20)] != first
    assert told == []
    for index in range(20, 60):
        made[0](index)
    assert told == ["set.jsonl: its 20 prompts begin to come again, and the server's prefix cache may answer: give more rows"]


@pytest.mark.parametrize(("step", "least"), [(2, 20), (10, 20), (20, 20), (3, 17), (7, 17), (1000, 17)])
def test_numbers_with_a_common_step_come_to_nearly_every_row(step: int, least: int) -> None:
    made = datasets.Rows([datasets._plain(str(n)) for n in range(20)], 3, "set.jsonl", print)
    assert len({made(index * step).questions for index in range(20)}) >= least


def test_a_text_file_stays_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\n\nb\nc\n")
    made = Workload(asking(path, kind="file"))
    assert sorted(said(made, copy)["prompt"] for copy in range(3)) == ["a", "b", "c"]
    for text, sentence in (("\n", "is empty; expected one prompt per line"), (None, "cannot be read")):
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
        with pytest.raises(ProblemError, match=sentence):
            datasets.load(FilePrompts(kind="file", path=str(path)), 0, print)


def test_a_rows_own_length_and_messages_are_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": TALK, "n": 33}])
    chat = said(Workload(asking(path, endpoint="chat", columns={"output_tokens_column": "n"})))
    assert (chat["messages"], chat["max_tokens"]) == (TALK, 33)
    assert said(Workload(asking(path)))["prompt"] == "be short\n\none?1\n\ntwo?"


def test_a_conversation_asks_the_rows_questions_and_keeps_its_system_message(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": TALK}])
    made = Workload(asking(path, endpoint="chat", conversation={"turns": 3}))
    messages = said(made, sequence=2, history=["real 1", "real 2"])["messages"]
    assert [message["content"] for message in messages] == ["be short", "one?", "real 1", "two?", "real 2", "one?"]


def test_shared_examples_stand_before_every_question(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "answer": f"answer {n}"} for n in range(12)]
    made = Workload(asking(write(tmp_path / "a.jsonl", rows), examples=3, examples_shared=True))
    fronts: dict[str, int] = {}
    for copy in range(12):
        front, _, own = said(made, copy)["prompt"].rpartition("Question: ")
        assert own.split("\n")[0] not in front
        fronts[front] = fronts.get(front, 0) + 1
        assert made.answer(0, 0, copy, 0) == own.split("\n")[0].replace("question", "answer")
    assert max(fronts.values()) == 9  # all but the three that are examples themselves


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_few_shot_examples_are_other_rows_with_their_answers(tmp_path: Path, endpoint: str) -> None:
    rows = [{"prompt": f"question {n}", "answer": f"answer {n}"} for n in range(8)]
    made = Workload(asking(write(tmp_path / "a.jsonl", rows), endpoint=endpoint, examples=3))
    for copy in range(20):
        request = said(made, copy)
        if endpoint == "chat":
            texts = [message["content"] for message in request["messages"]]
            assert [message["role"] for message in request["messages"]] == ["user", "assistant"] * 3 + ["user"]
        else:
            lines = request["prompt"].replace("\n\n", "\n").split("\n")
            texts = [line.partition(": ")[2] for line in lines[:-1]]
            assert lines[-1] == "Answer:"
        asked = [text.removeprefix("question ") for text in texts[::2]]
        assert [text.removeprefix("answer ") for text in texts[1::2]] == asked[:3]
        assert len(set(asked)) == 4
