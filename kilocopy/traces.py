"""Production traces as a stage replays them: when each request came, how long it was, which prefix it shared.

Two public formats: Azure's LLM inference traces (CSV: TIMESTAMP,ContextTokens,GeneratedTokens; 2023 and 2024) and Mooncake's (JSONL:
timestamp in ms, input_length, output_length, hash_ids of 512-token prefix blocks). Equal hash ids mean equal text.
"""

from __future__ import annotations

import csv
import datetime as dt
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kilocopy.problem import ProblemError
from kilocopy.spec import TraceStage

BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a trace says about one request, in place of the workload's lengths and prompts; `blocks` are ids of its prefix blocks."""

    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


Row = tuple[float, Shape]  # seconds of the trace's own time


@lru_cache(maxsize=4)
def read(stage: TraceStage, index: int = 0) -> tuple[npt.NDArray[np.float64], tuple[Shape, ...]]:
    """Times (s after the stage's start, `speed` applied) and shapes of the requests between from_s and from_s + duration_s.

    A request that generated nothing is replayed as one token: no server answers with none. Raises ProblemError with file and line.
    """
    path, parse = Path(stage.path), {"azure": _azure, "mooncake": _mooncake}[stage.format]
    times_s: list[float] = []
    shapes: list[Shape] = []
    first_s: float | None = None
    before_s = -np.inf
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, (time_s, shape) in parse(path, file):
                first_s = time_s if first_s is None else first_s
                if time_s < before_s:
                    raise ProblemError(f"{path}:{line}: comes {before_s - time_s:g} s before the row above; sort the trace by time")
                before_s, since_s = time_s, time_s - first_s - stage.from_s
                if stage.duration_s is not None and since_s >= stage.duration_s:
                    break
                if since_s >= 0:
                    times_s.append(since_s / stage.speed)
                    shapes.append(shape)
    except FileNotFoundError:
        raise ProblemError(f"stages[{index}].path: {path}: no such file; a path is relative to the current directory") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(f"stages[{index}].path: {path}: cannot be read: {error}") from None
    if not times_s:
        span = "" if stage.duration_s is None else f" and {stage.from_s + stage.duration_s:g} s"
        raise ProblemError(f"stages[{index}].path: {path}: no request after {stage.from_s:g} s{span}; change from_s or duration_s")
    length_s = times_s[-1] if stage.duration_s is None else stage.duration_s / stage.speed
    if stage.warmup_s and stage.warmup_s >= length_s:
        raise ProblemError(f"stages[{index}].warmup_s: {stage.warmup_s:g} s, and the replay takes {length_s:.4g} s: nothing of it would be counted; give it less")
    return np.array(times_s), tuple(shapes)


def _azure(path: Path, file: Any) -> Iterator[tuple[int, Row]]:
    rows = csv.DictReader(file)
    missing = [name for name in AZURE_COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise ProblemError(f"{path}:1: column {', '.join(missing)} is missing; an azure trace has {','.join(AZURE_COLUMNS)}")
    for row in rows:
        line = rows.line_num
        try:
            time_s = _seconds(row["TIMESTAMP"])
        except (ValueError, TypeError, AttributeError):
            raise ProblemError(f"{path}:{line}: TIMESTAMP {row['TIMESTAMP']!r} is not a time such as 2023-11-16 18:15:46.6805900") from None
        yield line, (time_s, Shape(_count(path, line, row, "ContextTokens", 1), _count(path, line, row, "GeneratedTokens", 1)))


def _seconds(text: str) -> float:
    """Seconds since 1970 of `2023-11-16 18:15:46.6805900`, with or without fraction and offset; no offset is taken for UTC."""
    text = text.strip()
    whole, dot, rest = text.partition(".")
    digits = rest
    offset = ""
    for sign in "+-Z":
        if sign in digits:
            digits, _, tail = digits.partition(sign)
            offset = sign + tail
    moment = dt.datetime.fromisoformat(whole + offset.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return moment.timestamp() + (float(f"0.{int(digits):0{len(digits)}d}") if dot else 0.0)


def _mooncake(path: Path, file: Any) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            time_s = float(row["timestamp"]) / 1e3
            blocks = tuple(int(block) for block in row.get("hash_ids") or ())
        except (ValueError, TypeError, KeyError, AttributeError):
            said = "a mooncake row is a JSON object with timestamp (ms), input_length, output_length, hash_ids"
            raise ProblemError(f"{path}:{line}: {said}; got {text.strip()[:80]!r}") from None
        yield line, (time_s, Shape(_count(path, line, row, "input_length", 1), _count(path, line, row, "output_length", 1), blocks))


def _count(path: Path, line: int, row: dict[str, Any], name: str, least: int) -> int:
    """A number of tokens: a whole number, zero raised to `least`."""
    try:
        value = row[name]
        count = int(value)
        if isinstance(value, bool | float) or count < 0:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise ProblemError(f"{path}:{line}: {name} {row.get(name)!r} is not a number of tokens") from None
    return max(least, count)
