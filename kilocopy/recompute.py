"""Everything that a run says, again from its directory alone: the same records give the same summary, byte for byte.

No clock is read and nothing is asked over the network, so a report can be made anew years later, on another machine, or from the
records of a run that was killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from kilocopy import __version__, experiment, measure, nodes, outages, price, recording, records, replicas, verifier, windows
from kilocopy.corpus import corpus
from kilocopy.findings import find
from kilocopy.headline import headline, searches
from kilocopy.manifest import SCHEMA_VERSION as MANIFEST_VERSION
from kilocopy.played import Beside, Played
from kilocopy.problem import ProblemError
from kilocopy.references import REFERENCES
from kilocopy.spec import FrontierExperiment, Spec
from kilocopy.summary import SCHEMA_VERSION, Bin, Clock, Headline, Part, Stage, Summary

NOT_ASKED = "N_SLO is not asked by this experiment: its levels differ in more than their copies. A frontier, a search or plain stages ask for it."
GAP_S = 5.0  # between two parts of an experiment on its axis of time; what truly lay between them is left out


@dataclass(frozen=True)
class Measured:
    """One run directory: what it was, and its stages as measured."""

    manifest: dict[str, Any]
    spec: Spec
    recorded: recording.Recording
    spans: list[windows.Span]
    stages: list[Stage]


def summarise(run_dir: Path) -> Summary:
    """Measure and price a run, or an experiment, from its directory. Raises ProblemError where there is no run to read."""
    manifest = read_manifest(run_dir)
    if experiment.is_home(manifest):
        return _experiment(run_dir, manifest)
    run = _measured(run_dir, manifest)
    timeline = measure.timeline(run.recorded, run.spans)  # which reads what no stage has read
    status, status_sentence = _status(run.spec, run.recorded.events, run.spans, run.recorded.damaged)
    searched = searches(run.spec, run.stages)
    head = headline(run.spec, run.stages, searched, status_sentence if status == "interrupted" else "")
    return _summary(
        manifest,
        run.spec,
        run.stages,
        head,
        status=status,
        status_sentence=status_sentence,
        searches=searched,
        wall_zero_s=next((event["wall_ns"] / 1e9 - event["t_s"] for event in run.recorded.events if "wall_ns" in event), None),
        timeline=timeline,
        outages=outages.outages(run.recorded, run.spans),
        clocks=[
            Clock(process=one.process, host=one.host, same_clock=one.same, rounds=one.rounds, offset_s=one.offset_s, drift_s=one.drift_s, error_s=one.error_s)
            for one in run.recorded.clocks
        ],
    )


def level(run_dir: Path, index: int, number: int, rows: int, *, scraped: bool) -> Stage | None:
    """A level of a search, while its run goes on, as the report will show it (without its cost); None as long as fewer rows are there.

    `scraped`: also as long as servers are scraped and were not since the level settled. Raises ProblemError as `summarise`.
    """
    manifest = read_manifest(run_dir)
    recorded = _recorded(run_dir)
    span = next((span for span in windows.spans(recorded.events) if (span.index, span.level) == (index, number)), None)
    if span is None or span.settled_s is None or len(recorded.of(index, number).stage) < rows:
        return None
    if scraped and len(recorded.server.time_s) and recorded.server.time_s.max() < span.settled_s:
        return None
    return measure.stage(_spec(run_dir, manifest), recorded, span, manifest)


def _recorded(run_dir: Path) -> recording.Recording:
    loaded = recording.load(run_dir)
    return replace(loaded, server=replicas.living(loaded.server, replicas.lost_s(loaded.events)))


def _measured(run_dir: Path, manifest: dict[str, Any]) -> Measured:
    spec = _spec(run_dir, manifest)
    recorded = _recorded(run_dir)
    found = [span for span in windows.spans(recorded.events) if 0 <= span.index < len(spec.stages)]
    stages = nodes.counted(spec, [_stage(spec, recorded, span, manifest) for span in found], recorded)
    return Measured(manifest, spec, recorded, found, stages)


def _summary(manifest: dict[str, Any], spec: Spec, stages: list[Stage], head: Headline, **more: Any) -> Summary:
    """What runs and experiments have in common."""
    simulated = _simulated(spec)
    if simulated is not None:
        head = head.model_copy(update={"sentence": f"{simulated} {head.sentence}"})
    shown = (head.n_slo_stage, head.n_slo_level) if head.n_slo_stage is not None else (head.best_stage, head.best_level)
    at_stage = next((stage for stage in stages if (stage.index, stage.level) == shown), None)
    return Summary(
        schema_version=SCHEMA_VERSION,
        kilocopy_version=__version__,
        run=manifest,
        page_words=spec.page.words,
        stages=stages,
        headline=head,
        overhang=price.overhang(spec, manifest.get("training"), at_stage, head.n_slo),
        corpus=corpus(spec, manifest.get("training"), at_stage),
        prices=price.prices_used(spec),
        references=list(REFERENCES),
        simulated=simulated,
        **more,
    )


def _simulated(spec: Spec) -> str | None:
    """What every report of a simulated engine begins with."""
    times = spec.cluster.simulated_engine
    if times is None:
        return None
    step = f"{times.step_s:g} s + {times.step_s_per_copy:g} s x running + {times.prefill_s_per_token:g} s x prompt tokens"
    return f"SIMULATED ENGINE: no model ran, and no figure here is a measurement of one. Its stated step: {step}, at most {times.running_max} running."


# ------------------------------------------------------------------------------------------------------------- an experiment


def _experiment(home: Path, manifest: dict[str, Any]) -> Summary:
    """The levels of all parts as the stages of one summary, and what they say together.

    A level that is done counts where it was done; one that was only begun is shown, void, as its last part left it.
    """
    spec = _spec(home, manifest)
    levels = [level for serving in experiment.plan(spec) for block in serving.blocks for level in block.levels]
    finished = experiment.done(home, read_manifest)
    played: dict[str, Played] = {}
    bins: list[Bin] = []
    damaged: list[str] = []
    played_parts: list[Part] = []
    at_s = 0.0
    counted = {part for part, _ in finished.values()}
    for part in experiment.parts(home):
        run = _measured(part, read_manifest(part))
        named = run.manifest.get(experiment.LEVELS_KEY) or []
        played_parts += _part(part, run.manifest, named, run.recorded.events)
        numbers = {}
        for span, stage in zip(run.spans, run.stages, strict=True):
            level = named[span.index] if span.index < len(named) else None
            if level in levels and finished.get(level, (part, span.index)) == (part, span.index):
                numbers[span.index] = levels.index(level)
                moved = _moved(stage, numbers[span.index], at_s)
                if not isinstance(spec.experiment, FrontierExperiment):  # levels that differ in more than their copies say in what
                    moved = moved.model_copy(update={"title": level})
                played[level] = Played(level, run.spec, moved, run.recorded, span)
        bins += [_moved_bin(one, numbers.get(one.stage, -1), at_s) for one in measure.timeline(run.recorded, run.spans)]
        damaged += _damaged(part, run) if part in counted else []
        at_s = (bins[-1].t_s if bins else at_s) + 1 + GAP_S
    ordered = [played[level] for level in levels if level in played]
    void = sum(one.stage.verdict.level == "void" for one in ordered if one.level in finished)
    status, sentence = _experiment_status(home, len(levels), len(finished), void, damaged)
    head, found = headline(spec, [one.stage for one in ordered], [], ""), find(spec, ordered, Beside(manifest.get("training"), verifier.verdicts(home)))
    if not isinstance(spec.experiment, FrontierExperiment):
        head = Headline(n_slo=None, n_slo_stage=None, best_stage=None, sentence=head.sentence, n_slo_sentence=NOT_ASKED)
    if found is not None:
        said = found.sentence if status == "complete" else f"{found.sentence} {sentence}"
        head = head.model_copy(update={"sentence": said})
    return _summary(
        manifest,
        spec,
        [one.stage for one in ordered],
        head,
        status=status,
        status_sentence=sentence,
        searches=[],
        timeline=bins,
        experiment=found,
        parts=played_parts,
    )


def done_levels(home: Path) -> dict[tuple[str, Path, int], str]:
    """The verdict of each level of an experiment that is done, by level, part and stage."""
    found: dict[tuple[str, Path, int], str] = {}
    for level, (part, index) in experiment.done(home, read_manifest).items():
        stages = {stage.index: stage for stage in _measured(part, read_manifest(part)).stages}
        found[level, part, index] = stages[index].verdict.level
    return found


def _part(run_dir: Path, manifest: dict[str, Any], levels: Sequence[str], events: Sequence[dict[str, Any]]) -> list[Part]:
    """When a part was played, to find it on the dashboards; nothing where its driver never wrote an event."""
    walls_s = [event["wall_ns"] / 1e9 for event in events if "wall_ns" in event]
    if not walls_s:
        return []
    ends = {"start_wall_s": min(walls_s), "end_wall_s": max(walls_s)}
    return [Part(run=run_dir.name, levels=list(levels), grafana_url=manifest.get("grafana_url"), **ends)]


def _moved(stage: Stage, index: int, by_s: float) -> Stage:
    """A stage of a part as the n-th level of the experiment, on its axis of time."""
    window = stage.window
    if window is not None:
        window = window.model_copy(update={"start_s": window.start_s + by_s, "end_s": window.end_s + by_s})
    return stage.model_copy(update={"index": index, "start_s": stage.start_s + by_s, "end_s": stage.end_s + by_s, "window": window})


def _moved_bin(one: Bin, stage: int, by_s: float) -> Bin:
    return one.model_copy(update={"stage": stage, "t_s": one.t_s + by_s})


def _damaged(part: Path, run: Measured) -> list[str]:
    """What is wrong with the files of a part: one that ends early says something only where the part came to its end, and its worker was not lost."""
    whole = any(event["event"] == "run_end" and event.get("reason") == "complete" for event in run.recorded.events)
    early = {name for name in run.recorded.damaged if name not in _gone(run.spans)} if whole else set()
    return [f"{part.name}/{name} {said}" for name, said in run.recorded.damaged.items() if said == records.DAMAGED or name in early]


def _gone(found: Sequence[windows.Span]) -> set[str]:
    """Files of workers that were lost: they have no end, and the stage says so."""
    return {f"requests/worker{worker}.arrow" for span in found for worker in span.lost}


def _experiment_status(home: Path, asked: int, finished: int, void: int, damaged: Sequence[str]) -> tuple[Literal["complete", "interrupted"], str]:
    if damaged:
        more = f"`kilocopy run SPEC --resume {home.name} --again void` plays the levels again that are void for it."
        return "interrupted", f"The records are damaged: {', '.join(damaged)}; rows are missing. {more}"
    if finished == asked:
        more = f", {void} of them void; `kilocopy run SPEC --resume {home.name} --again void` plays those again" if void else ""
        return "complete", f"Complete: {asked} of {asked} levels were played to their end{more}."
    rest = f"`kilocopy run SPEC --resume {home.name}` plays the rest" if finished else "`kilocopy run SPEC --resume` begins again"
    return "interrupted", f"{finished} of {asked} levels were played to their end; {rest}."


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
        raise ProblemError(f"{path}: a manifest is a JSON object, and this is none; the run's records beside it are untouched: put its manifest back")
    version = manifest.get("schema_version", MANIFEST_VERSION)
    if version != MANIFEST_VERSION:
        raise ProblemError(f"{path}: schema_version {version!r}, and this kilocopy reads {MANIFEST_VERSION}: report it with the kilocopy that made it")
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
    spec: Spec, events: Sequence[dict[str, Any]], found: Sequence[windows.Span], damaged: Mapping[str, str]
) -> tuple[Literal["complete", "interrupted"], str]:
    """Whether the run came to its end, and in words how far it came.

    A worker that the master lost has no end of its own; the others' ends, and the master's, say how the run ended. Without any
    end nobody can tell a run that was killed from one that goes on: the sentence says both.
    """
    asked, begun = len(spec.stages), {span.index for span in found}
    whole = begun - {span.index for span in found if span.cut_off}
    ends = [event.get("reason") for event in events if event["event"] == "run_end"]
    spoilt = ", ".join(f"{name} {said}" for name, said in damaged.items() if said == records.DAMAGED)
    count = f"{len(whole)} of {asked} {'stage' if asked == 1 else 'stages'} ran to the end"
    if ends and all(reason == "complete" for reason in ends) and len(whole) == asked:
        gone = _gone(found)
        told = ", ".join(f"{name} {said}" for name, said in damaged.items() if name not in gone or said == records.DAMAGED)
        if told:
            return "interrupted", f"The run came to its end, but its records are damaged: {told}; rows are missing."
        return "complete", f"Complete: {asked} of {asked} {'stage' if asked == 1 else 'stages'} ran to the end."
    if "interrupted" in ends:
        how = "was interrupted"
    elif ends:
        how = "came to its end, but not all of its processes did"
    else:
        how = "has no end in its records: it was killed, or it is still running and this is what there is so far"
    also = f" Its records are damaged, too: {spoilt}; rows are missing." if spoilt else ""
    return "interrupted", f"The run {how}; {count}, {len(begun)} began.{also}"
