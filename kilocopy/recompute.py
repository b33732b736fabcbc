"""Everything that a run says, again from its directory alone: the same records give the same summary, byte for byte.

No clock is read and nothing is asked over the network, so a report can be made anew years later, on another machine, or from the
records of a run that was killed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from kilocopy import __version__, measure, price, recording, records, windows
from kilocopy.headline import headline, searches
from kilocopy.problem import ProblemError
from kilocopy.references import REFERENCES
from kilocopy.spec import Spec
from kilocopy.summary import SCHEMA_VERSION, Stage, Summary


def summarise(run_dir: Path) -> Summary:
    """Measure and price a run from its directory. Raises ProblemError where there is no run to read."""
    manifest = read_manifest(run_dir)
    spec = _spec(run_dir, manifest)
    recorded = recording.load(run_dir)
    found = [span for span in windows.spans(recorded.events) if 0 <= span.index < len(spec.stages)]
    stages = [_stage(spec, recorded, span, manifest) for span in found]
    damaged = [name for name in records.cut_off(run_dir) if name.startswith("requests/")]
    status, status_sentence = _status(spec, recorded.events, found, damaged)
    searched = searches(spec, stages)
    head = headline(spec, stages, searched, status_sentence if status == "interrupted" else "")
    shown = (head.n_slo_stage, head.n_slo_level) if head.n_slo_stage is not None else (head.best_stage, head.best_level)
    at_stage = next((stage for stage in stages if (stage.index, stage.level) == shown), None)
    return Summary(
        schema_version=SCHEMA_VERSION,
        kilocopy_version=__version__,
        run=manifest,
        status=status,
        status_sentence=status_sentence,
        page_words=spec.page.words,
        stages=stages,
        searches=searched,
        timeline=measure.timeline(recorded, found),
        headline=head,
        overhang=price.overhang(spec, manifest.get("training"), at_stage, head.n_slo),
        prices=price.prices_used(spec),
        references=list(REFERENCES),
    )


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """manifest.json of a run directory. Raises ProblemError when there is none or it cannot be read."""
    path = run_dir / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ProblemError(f"{run_dir}: not a run directory, it has no manifest.json; `kilocopy run` makes one under runs/") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProblemError(f"{path}: cannot be read: {error}") from None
    if not isinstance(manifest, dict):
        raise ProblemError(f"{path}: a manifest is a JSON object, this is a {type(manifest).__name__}")
    return manifest


def _spec(run_dir: Path, manifest: dict[str, Any]) -> Spec:
    if "spec" not in manifest:
        raise ProblemError(f"{run_dir / 'manifest.json'}: the key 'spec' is missing, so nobody knows what was run")
    try:
        return Spec.model_validate(manifest["spec"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        sentence = f"{run_dir / 'manifest.json'}: spec.{where}: {first['msg']}; the run was made by another version of kilocopy"
        raise ProblemError(sentence) from None


def _stage(spec: Spec, recorded: recording.Recording, span: windows.Span, manifest: dict[str, Any]) -> Stage:
    measured = measure.stage(spec, recorded, span, manifest)
    cost = price.cost(spec, measured, recorded.energy)
    if cost is not None and measured.window is not None and cost.energy_source == "measured":
        tokens = measure.block_tokens(recorded, span, measured.window, price.BLOCKS)
        cost = cost.model_copy(update={"wh_per_page_measured": price.energy_interval(cost, measured, recorded.energy, tokens)})
    return measured.model_copy(update={"cost": cost})


def _status(
    spec: Spec, events: Sequence[dict[str, Any]], found: Sequence[windows.Span], damaged: Sequence[str]
) -> tuple[Literal["complete", "interrupted"], str]:
    """Whether the run came to its end, and in words how far it came.

    A worker that the master lost has no end of its own; the others' ends, and the master's, say how the run ended. Without any
    end nobody can tell a run that was killed from one that goes on: the sentence says both.
    """
    asked, begun = len(spec.stages), {span.index for span in found}
    whole = begun - {span.index for span in found if span.cut_off}
    ends = [event.get("reason") for event in events if event["event"] == "run_end"]
    count = f"{len(whole)} of {asked} {'stage' if asked == 1 else 'stages'} ran to the end"
    if ends and all(reason == "complete" for reason in ends) and len(whole) == asked:
        lost = {worker for span in found for worker in span.lost}
        gone = {f"requests/worker{worker}.arrow" for worker in lost}  # its file has no end, and the stage says so
        damaged = [name for name in damaged if name not in gone]
        if damaged:
            return (
                "interrupted",
                f"The run came to its end, but its records are damaged: {', '.join(damaged)} is cut off, and rows are missing.",
            )
        return "complete", f"Complete: {asked} of {asked} {'stage' if asked == 1 else 'stages'} ran to the end."
    if "interrupted" in ends:
        how = "was interrupted"
    elif ends:
        how = "came to its end, but not all of its processes did"
    else:
        how = "has no end in its records: it was killed, or it is still running and this is what there is so far"
    return "interrupted", f"The run {how}; {count}, {len(begun)} began."
