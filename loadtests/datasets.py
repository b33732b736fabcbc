"""The user's own prompts: rows of JSONL, JSON (also ShareGPT's), CSV or Parquet as messages, answers and lengths.

A data set is read whole before the run, so that a bad row is a sentence with its place and not a failure after minutes. Rows without
a question (no messages, or none of the user's), which collected conversations have, are left out and counted.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.spec import DatasetPrompts, FilePrompts

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
PROMPT_COLUMNS = ("prompt", "text", "messages", "conversations")  # looked for in this order
ANSWER_COLUMNS = ("answer", "response", "completion")
CSV_FIELD_CHARS_MAX = 2**31 - 1  # the csv module's own limit, 128 Ki, is less than a long prompt
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"}  # fmt: skip
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt: the messages of one request, the user's texts turn by turn, the first answer where known, max_tokens where given."""

    messages: tuple[Message, ...]
    questions: tuple[str, ...]
    answer: str | None = None
    output_tokens: int | None = None


class Rows:
    """Rows by request number, in a seeded order that begins anew when all have been asked; `warn` is told once when a row comes again.

    Numbers below the count of rows come to a row each. A number's place is the sum of its digits to the base of that count, so that
    also numbers with a common step (those of one stage among several) come to all rows, or nearly, before one comes again.
    """

    def __init__(self, found: list[Row], seed: int, path: str, warn: Callable[[str], None]) -> None:
        self._rows, self._path, self._warn = found, path, warn
        self._asked = bytearray(len(found))
        self._seed = seed
        random.Random(schedule.draw(seed, "prompts")).shuffle(self._rows)  # noqa: S311  # a seeded order, not a secret

    def __call__(self, index: int) -> Row:
        """The row of request number `index`."""
        place = self._place(index)
        if self._asked and self._asked[place]:
            self._warn(
                f"{self._path}: its {len(self._rows)} prompts begin to come again, and the server's prefix cache may answer: give more rows"
            )
            self._asked = bytearray()
        elif self._asked:
            self._asked[place] = 1
        return self._rows[place]

    def peek(self, index: int) -> Row:
        """The same, without counting it as asked."""
        return self._rows[self._place(index)]

    def _place(self, index: int) -> int:
        place, count = 0, len(self._rows)
        while index and count > 1:
            index, digit = divmod(index, count)
            place += digit
        return place % count

    def examples(self, index: int, count: int, *, alike: bool = False) -> list[Row]:
        """Rows with answers, other than the request's own where there are others, for its few-shot examples.

        `alike`: the first rows, the same for every request but those that ask one of them.
        """
        first = self._place(index)
        if alike:
            others = [place for place in range(min(count + 1, len(self._rows))) if place != first] or [first]
            return [self._rows[others[step % len(others)]] for step in range(count)]
        steps = (1 + step % max(1, len(self._rows) - 1) for step in range(schedule.draw(self._seed, "examples", index), 2**40))
        return [self._rows[(first + step) % len(self._rows)] for step, _ in zip(steps, range(count), strict=False)]


def load(source: FilePrompts | DatasetPrompts, seed: int, warn: Callable[[str], None], *, answers: bool = False) -> Rows:
    """Read the data set. `answers`: every row must have one. Raises ProblemError with the row's place and what is expected."""
    path = Path(source.path)
    skipped: list[str] = []
    found = [_plain(line) for line in _lines(path)] if isinstance(source, FilePrompts) else list(_understood(path, source, answers, skipped))
    if skipped and not found:
        raise ProblemError(skipped[0])
    if skipped:
        warn(f"{path}: {len(skipped)} of {len(found) + len(skipped)} rows ask nothing and are left out; the first is {skipped[0]}")
    if not found:
        raise ProblemError(f"workload.prompts.path: {path} is empty; expected one prompt per {'line' if isinstance(source, FilePrompts) else 'row'}")
    return Rows(found, seed, str(path), warn)


def _plain(text: str, **more: Any) -> Row:
    return Row(({"role": "user", "content": text},), (text,), **more)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]  # splitlines cuts at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(f"workload.prompts.path: {path} cannot be read: {error}") from None


def rows(path: Path, key: str = "workload.prompts.path") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a file as a mapping of its columns, with its place (`file:line` or `file: row n`). Raises ProblemError."""
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ProblemError(f"{key}: {path} ends in none of {', '.join(FORMATS)}, which says the format")
    try:
        yield from readers[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise ProblemError(f"{key}: {path} cannot be read: {error}") from None


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _object(f"{path}:{number}", line)


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProblemError(f"{where}: not valid JSON: {error}; expected one object per line") from None
    return _mapping(where, value)


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProblemError(f"{where}: expected an object of columns, got {json.dumps(value)[:60]}")
    return value


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ProblemError(f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON: {error}") from None
    if not isinstance(tree, list):
        raise ProblemError(f"{path}: expected a list of rows, such as ShareGPT's, got {type(tree).__name__}")
    for number, value in enumerate(tree, 1):
        where = f"{path}: row {number}"
        yield where, _mapping(where, value)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(CSV_FIELD_CHARS_MAX)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ProblemError(f"{where}: the header has {len(reader.fieldnames or ())} columns, this row has not")
                yield where, row
        except csv.Error as error:
            raise ProblemError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}: row {number}", row


def whole_number(where: str, row: dict[str, Any], column: str) -> int:
    """A length in tokens from a row."""
    value = _cell(where, row, column)
    try:
        number = int(value) if not isinstance(value, bool) else 0
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or (isinstance(value, float) and value != number):
        raise ProblemError(f"{where}: column {column}: expected a whole number of tokens from 1 up, got {value!r}")
    return number


def _cell(where: str, row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise ProblemError(f"{where}: no column {column}; here are {', '.join(map(str, row)) or 'none'}")
    return row[column]


def _understood(path: Path, source: DatasetPrompts, answers: bool, skipped: list[str]) -> Iterator[Row]:
    """Every row that asks something; of the others `skipped` is given the place and the reason."""
    for where, row in rows(path):
        column = source.column or next((name for name in PROMPT_COLUMNS if name in row), None)
        if column is None:
            raise ProblemError(f"{where}: none of the columns {', '.join(PROMPT_COLUMNS)}; say which one with workload.prompts.column")
        value = _cell(where, row, column)
        if isinstance(value, str) and path.suffix.lower() == ".csv" and column in {"messages", "conversations"}:
            value = _list(where, column, value)
        if isinstance(value, list) and (why := _asks_nothing(where, column, value)):
            skipped.append(why)
            continue
        answer = _answer(where, row, source.answer_column)
        length = None if source.output_tokens_column is None else whole_number(where, row, source.output_tokens_column)
        if isinstance(value, str) and value.strip():
            one = _plain(value, answer=answer, output_tokens=length)
        elif isinstance(value, list):
            one = _talk(where, column, value, answer, length)
        else:
            raise ProblemError(f"{where}: column {column}: expected a text or a list of messages, got {json.dumps(value, default=str)[:60]}")
        if answers and one.answer is None:
            raise ProblemError(f"{where}: no answer, which few-shot examples need; name its column with workload.prompts.answer_column")
        yield one


def _asks_nothing(where: str, column: str, value: list[Any]) -> str | None:
    """Why a row of messages has no question, as a sentence; None where it has one."""
    if not value:
        return f"{where}: column {column}: no message at all"
    roles = [_message(f"{where}: column {column}, message {number}", item)["role"] for number, item in enumerate(value, 1)]
    return None if "user" in roles else f"{where}: column {column}: no message of the user's; expected one at least"


def _list(where: str, column: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ProblemError(f"{where}: column {column}: expected a JSON list of messages: {error}") from None


def _answer(where: str, row: dict[str, Any], column: str | None) -> str | None:
    if column is not None:
        value = _cell(where, row, column)
        if not isinstance(value, str) or not value.strip():
            raise ProblemError(f"{where}: column {column}: expected the answer's text, got {value!r}")
        return value
    found = (row[name] for name in ANSWER_COLUMNS if isinstance(row.get(name), str) and row[name].strip())
    return next(found, None)


def _talk(where: str, column: str, value: list[Any], answer: str | None, length: int | None) -> Row:
    """A row of messages. ShareGPT's ({from, value}) asks its first question; OpenAI's ({role, content}) all up to the last one."""
    messages = [_message(f"{where}: column {column}, message {number}", item) for number, item in enumerate(value, 1)]
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    shared = isinstance(value[0], dict) and "from" in value[0]
    last = asked[0] if shared else asked[-1]
    after = messages[asked[0] + 1 : asked[0] + 2]
    if answer is None and after and after[0]["role"] == "assistant":
        answer = after[0]["content"]
    return Row(tuple(messages[: last + 1]), tuple(messages[place]["content"] for place in asked), answer, length)


def _message(where: str, item: Any) -> Message:
    if isinstance(item, dict):
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if isinstance(role, str) and role in ROLES and isinstance(content, str):
            return {"role": ROLES[role], "content": content}
    expected = '{"role": user, assistant or system, "content": text} or {"from": human, gpt or system, "value": text}'
    raise ProblemError(f"{where}: expected {expected}, got {json.dumps(item, default=str)[:80]}")
