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

from kilocopy import __version__, measure, price, records
from kilocopy.problem import ProblemError
from kilocopy.references import REFERENCES
from kilocopy.spec import Slo, Spec
from kilocopy.summary import SCHEMA_VERSION, Headline, Stage, Summary


def summarise(run_dir: Path) -> Summary:
    """Measure and price a run from its directory. Raises ProblemError where there is no run to read."""
    manifest = read_manifest(run_dir)
    spec = _spec(run_dir, manifest)
    recording = measure.load(run_dir)
    found = [span for span in measure.spans(recording.events) if 0 <= span.index < len(spec.stages)]
    stages = [_stage(spec, recording, span, bool(manifest.get("driver_shares_host"))) for span in found]
    damaged = [name for name in records.cut_off(run_dir) if name.startswith("requests/")]
    status, status_sentence = _status(spec, recording.events, found, damaged)
    headline = _headline(spec, stages, status_sentence if status == "interrupted" else "")
    shown = headline.n_slo_stage if headline.n_slo_stage is not None else headline.best_stage
    at_stage = next((stage for stage in stages if stage.index == shown), None)
    return Summary(
        schema_version=SCHEMA_VERSION,
        kilocopy_version=__version__,
        run=manifest,
        status=status,
        status_sentence=status_sentence,
        page_words=spec.page.words,
        stages=stages,
        timeline=measure.timeline(recording, found),
        headline=headline,
        overhang=price.overhang(spec, manifest.get("training"), at_stage, headline.n_slo),
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


def _stage(spec: Spec, recording: measure.Recording, span: measure.Span, shares_host: bool) -> Stage:
    measured = measure.stage(spec, recording, span, shares_host)
    return measured.model_copy(update={"cost": price.cost(spec, measured, recording.energy)})


def _status(
    spec: Spec, events: Sequence[dict[str, Any]], found: Sequence[measure.Span], damaged: Sequence[str]
) -> tuple[Literal["complete", "interrupted"], str]:
    """Whether the run came to its end, and in words how far it came."""
    asked, whole = len(spec.stages), sum(not span.cut_off for span in found)
    ends = [event.get("reason") for event in events if event["event"] == "run_end"]
    if ends and all(reason == "complete" for reason in ends) and whole == asked:
        if damaged:
            return (
                "interrupted",
                f"The run came to its end, but its records are damaged: {', '.join(damaged)} is cut off, and rows are missing.",
            )
        return "complete", f"Complete: {asked} of {asked} {'stage' if asked == 1 else 'stages'} ran to the end."
    how = "was interrupted" if "interrupted" in ends else "has no end in its records (its driver was killed, or it is still running)"
    return "interrupted", f"The run {how}: {whole} of {asked} {'stage' if asked == 1 else 'stages'} ran to the end, {len(found)} began."


def _headline(spec: Spec, stages: Sequence[Stage], interrupted: str) -> Headline:
    """The answer: the largest N that held the SLO, and the stage that made the most tokens."""
    holding = [stage for stage in stages if stage.verdict.level == "valid" and stage.copies.slo_held and stage.copies.asked]
    counted = [stage for stage in stages if stage.verdict.level != "void" and stage.throughput is not None]
    n_slo = max(holding, key=_asked, default=None)
    best = max(counted, key=_tokens_per_s, default=None)
    shown = n_slo or best
    sentence = _answer(shown, spec) if shown else _no_answer(stages)
    return Headline(
        n_slo=n_slo.copies.asked if n_slo else None,
        n_slo_stage=n_slo.index if n_slo else None,
        n_slo_sentence=_n_slo_sentence(spec.slo, n_slo, stages),
        best_stage=best.index if best else None,
        sentence=f"{sentence} {interrupted}".strip(),
    )


def _asked(stage: Stage) -> int:
    return stage.copies.asked or 0


def _tokens_per_s(stage: Stage) -> float:
    return stage.throughput.output_tokens_per_s.value if stage.throughput else 0.0


def _slo(slo: Slo) -> str:
    return f"{slo.tokens_per_s_per_copy:g} tokens/s each and TTFT <= {slo.ttft_s:g} s for {100 * slo.quantile:g} % of the streams"


def _n_slo_sentence(slo: Slo, held: Stage | None, stages: Sequence[Stage]) -> str:
    """What N_SLO is, or why there is none; where a smaller load missed the SLO, it says so."""
    if held is None:
        return f"No stage held the SLO: {_slo(slo)}. {_closest(stages)}".strip()
    missed = [s for s in stages if s.verdict.level == "valid" and s.copies.slo_held is False and _asked(s) < _asked(held)]
    aside = f" A smaller load, {min(_asked(s) for s in missed)}, missed it." if missed else ""
    larger = [s for s in stages if _asked(s) > _asked(held) and s.verdict.level == "valid" and s.copies.slo_held is False]
    bound = "" if larger else " No larger load was shown to miss it, so the true N may be larger."
    copies = "copy" if held.copies.asked == 1 else "copies at once"
    attained = f"{100 * (held.copies.slo_attainment or 0):.1f} % did"
    return f"{held.copies.asked} {copies} held {_slo(slo)} ({attained}).{aside}{bound}"


def _closest(stages: Sequence[Stage]) -> str:
    """How far from it the run was."""
    judged = [stage for stage in stages if stage.verdict.level == "valid" and stage.copies.slo_attainment is not None]
    if not judged:
        levels = [stage.verdict.level for stage in stages]
        counts = f"{levels.count('void')} void, {levels.count('latency_withheld')} with latency withheld"
        return f"None of {len(stages)} could be judged: {counts}, {levels.count('valid')} valid but without a stream inside the window."
    best = max(judged, key=lambda stage: stage.copies.slo_attainment or 0.0)
    return f"The closest, {best.copies.asked} at once, held it for {100 * (best.copies.slo_attainment or 0):.1f} %."


def _answer(stage: Stage, spec: Spec) -> str:
    """One sentence a person can repeat."""
    throughput, priced = stage.throughput, stage.cost
    assert throughput is not None  # noqa: S101  # only stages with a window are shown
    count = round(stage.copies.n_run_client or 0) if stage.copies.asked is None else stage.copies.asked
    copies = "1 copy" if count == 1 else f"{count:,} copies"
    parts = [f"{copies} of {spec.model.id} ran at once on this hardware: {throughput.output_tokens_per_s.value:,.0f} tokens/s"]
    if throughput.pages_per_hour is not None:
        parts.append(f"{throughput.pages_per_hour:,.0f} pages of {spec.page.words} words an hour")
    if priced and priced.usd_per_page:
        parts.append(f"${priced.usd_per_page.mid:.2g} a page")
    if priced and priced.wh_per_page:
        parts.append(f"{priced.wh_per_page.mid:.2g} Wh a page{' (assumed)' if priced.energy_source == 'assumed' else ''}")
    return ", ".join(parts) + "."


def _no_answer(stages: Sequence[Stage]) -> str:
    if not stages:
        return "No answer: no stage began."
    reasons = sorted({reason.code for stage in stages for reason in stage.verdict.reasons})
    return f"No answer: no stage is valid ({', '.join(reasons)})."
