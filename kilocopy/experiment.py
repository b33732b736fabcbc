"""An experiment: which levels answer a question, what serves them, and a directory in which they are kept until all are there.

    runs/<time>_<name>/
        manifest.json        the spec with its `experiment`, and what else a manifest says
        parts/<time>_<name>/ an ordinary run directory for each time that the driver was started: one or several levels
        verdicts/*.arrow     what a verifier said of each answer, where the experiment has one
        summary.json, report.html

A level is done once its streams have drained and the counters have settled. What was cut off stays on the disk and is played again
in a part of its own, so `--resume` goes on from any kill, and a level's clock is never a mixture of two runs; with `--again void` so are
levels that are done and void, and what was played last counts. Each part draws
prompts of its own: no prefix cache answers with what an earlier part asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilocopy import records, schedule, windows
from kilocopy.problem import ProblemError
from kilocopy.spec import BestOfNExperiment, ClosedStage, FrontierExperiment, KShotExperiment, ScalingExperiment, Spec, SyntheticPrompts

PARTS = "parts"
LEVELS_KEY = "experiment_levels"  # of a part's manifest: the level that each of its stages is


@dataclass(frozen=True)
class Block:
    """Levels that one driver plays one after the other; `spec` is a plain one, whose stages they are."""

    levels: tuple[str, ...]
    spec: Spec

    def without(self, finished: Collection[str], part: int) -> Block:
        """The levels that are still to be played, as part number `part` of the experiment, with prompts of its own."""
        kept = [(level, stage) for level, stage in zip(self.levels, self.spec.stages, strict=True) if level not in finished]
        workload = self.spec.workload.model_copy(update={"seed": schedule.draw(self.spec.workload.seed, "part", part)})
        spec = self.spec.model_copy(update={"stages": [stage for _, stage in kept], "workload": workload})
        return Block(tuple(level for level, _ in kept), spec)


@dataclass(frozen=True)
class Serving:
    """What is served for the time of some blocks. `fresh`: it has to be started for them, whatever ran before."""

    spec: Spec
    blocks: tuple[Block, ...]
    fresh: bool = False


def plan(spec: Spec) -> list[Serving]:
    """Everything that an experiment plays, in order; the same for the same spec."""
    make = PLANS[type(spec.experiment)]
    return make(spec, spec.experiment)


def plain(spec: Spec, stages: list[ClosedStage], **changes: Any) -> Spec:
    """A spec without experiment that plays these stages."""
    return spec.model_copy(update={"experiment": None, "stages": stages, **changes})


def _frontier(spec: Spec, asked: FrontierExperiment) -> list[Serving]:
    copies = list(asked.levels)
    if asked.random_order:
        random.Random(schedule.draw(spec.workload.seed, "order")).shuffle(copies)  # noqa: S311  # a seeded plan, not a secret
    served = plain(spec, [asked.at(count) for count in copies])
    return [Serving(served, (Block(tuple(_copies(count) for count in copies), served),))]


def _scaling(spec: Spec, asked: ScalingExperiment) -> list[Serving]:
    """Each level as often as it repeats, all in one seeded random order: a machine that warms up or tires is no trend then."""
    order = [(count, repeat) for repeat in range(asked.repeats) for count in asked.levels]
    random.Random(schedule.draw(spec.workload.seed, "order")).shuffle(order)  # noqa: S311  # a seeded plan, not a secret
    servings = []
    for count, repeat in order:
        cluster = spec.cluster.model_copy(update={"replicas": count})
        served = plain(spec, [asked.at(asked.copies_per_replica * count)], cluster=cluster)
        name = f"{count} replica{'' if count == 1 else 's'}, serving {repeat + 1}"
        servings.append(Serving(served, (Block((name,), served),), fresh=True))
    return servings


def _best_of_n(spec: Spec, asked: BestOfNExperiment) -> list[Serving]:
    """Each n as one request for n samples, and as n requests of one prompt; a driver start each, all in one seeded random order."""
    blocks = []
    for n in asked.levels:
        keep = asked.verifier is not None and n == max(asked.levels)
        blocks += [(f"{n} sample{'' if n == 1 else 's'} of a request", asked.sequences // n, {"samples": n, "keep_texts": keep or spec.workload.keep_texts})]
        if n > 1 and asked.same_prompt_apart:
            blocks += [(f"{n} requests of a prompt", asked.sequences, {"copies_per_prompt": n})]
    return [Serving(spec.model_copy(update={"experiment": None, "stages": [asked.at(asked.sequences)]}), _shuffled(spec, asked, blocks, range(asked.repeats)))]


def _k_shot(spec: Spec, asked: KShotExperiment) -> list[Serving]:
    """All k in each repeat with the prefix cache and without, each served anew, in an order that turns round; on one serving where the cache is left as it is.

    So a machine that warms up or tires bears on both alike, and a serving's own luck is between repeats, where the intervals come from.
    """
    order: list[bool | None] = list(asked.prefix_cache or (None,))
    rounds = [[repeat] for repeat in range(asked.repeats)] if asked.prefix_cache else [list(range(asked.repeats))]
    servings = []
    for number, repeats in enumerate(rounds):
        for cached in order if number % 2 == 0 else order[::-1]:
            engine = spec.cluster.engine if cached is None else spec.cluster.engine | {"enable_prefix_caching": cached}
            served = spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"engine": engine})})
            front = "" if cached is None else f"cache {'on' if cached else 'off'}, "
            levels = [(f"{front}{k} example{'' if k == 1 else 's'}", asked.copies, _examples(spec, asked, k)) for k in asked.levels]
            plain_spec = served.model_copy(update={"experiment": None, "stages": [asked.at(asked.copies)]})
            servings.append(Serving(plain_spec, _shuffled(served, asked, levels, repeats), fresh=cached is not None))
    return servings


def _examples(spec: Spec, asked: KShotExperiment, k: int) -> dict[str, Any]:
    """The workload with k examples: rows of the data set, or so many times `example_tokens` of text that all requests share."""
    prompts = spec.workload.prompts
    if not isinstance(prompts, SyntheticPrompts):
        return {"examples": k, "examples_shared": k > 0}
    question, shown = prompts.input_tokens, k * (asked.example_tokens or 0)
    assert isinstance(question, int)  # noqa: S101  # the spec refuses any other
    return {"prompts": prompts.model_copy(update={"input_tokens": question + shown, "shared_prefix_fraction": shown / (question + shown), "prefixes": 1})}


def _shuffled(
    spec: Spec, asked: BestOfNExperiment | KShotExperiment, levels: list[tuple[str, int, dict[str, Any]]], repeats: Sequence[int]
) -> tuple[Block, ...]:
    """Blocks of one level each in these repeats: name, copies, what the workload differs in."""
    order = [(level, repeat) for repeat in repeats for level in levels]
    random.Random(schedule.draw(spec.workload.seed, "order", *repeats)).shuffle(order)  # noqa: S311  # a seeded plan, not a secret
    return tuple(
        Block((f"{name}, repeat {repeat + 1}",), plain(spec, [asked.at(copies)], workload=spec.workload.model_copy(update=changes)))
        for (name, copies, changes), repeat in order
    )


def _copies(count: int) -> str:
    return f"{count} cop{'y' if count == 1 else 'ies'}"


PLANS: dict[type, Callable[[Spec, Any], list[Serving]]] = {
    FrontierExperiment: _frontier,
    ScalingExperiment: _scaling,
    BestOfNExperiment: _best_of_n,
    KShotExperiment: _k_shot,
}


# ------------------------------------------------------------------------------------------------------------ its directory


def is_home(run_manifest: dict[str, Any]) -> bool:
    """Whether a manifest is an experiment's."""
    return bool((run_manifest.get("spec") or {}).get("experiment"))


def parts(home: Path) -> list[Path]:
    """The run directories of an experiment, in order of their beginning."""
    return sorted(path.parent for path in (home / PARTS).glob("*/manifest.json"))


def reopened(home: Path, spec: Spec, kept: dict[str, Any]) -> None:
    """Whether an experiment may go on with this spec. `kept`: its manifest. Raises ProblemError where it may not."""
    if not is_home(kept):
        raise ProblemError(f"--resume {home}: an ordinary run, which cannot be taken up again; experiments can")
    if kept.get("spec_sha256") != spec.sha256:
        raise ProblemError(
            f"--resume {home}: was begun with another spec ({str(kept.get('spec_sha256'))[:12]}, this is {spec.sha256[:12]}): "
            "levels of two specs do not make one experiment; give the spec it began with, or leave --resume out"
        )


def done(home: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, tuple[Path, int]]:
    """The levels that are done, each with the part and the stage that hold it; the last one where there are several.

    `read`: a run directory's manifest.
    """
    found = {}
    for part in parts(home):
        levels = read(part).get(LEVELS_KEY) or []
        events = [event | {"t_s": event["time_ns"] / 1e9} for event in records.read_events(part)]
        for span in windows.spans(events):
            if span.whole and span.settled_s is not None and 0 <= span.index < len(levels):
                found[levels[span.index]] = (part, span.index)
    return found


def left(serving: Serving, finished: Collection[str], part: int) -> list[Block]:
    """The blocks of a serving that still have levels to play, with those alone; the first is to be part number `part`."""
    unfinished = [block for block in serving.blocks if not set(block.levels) <= set(finished)]
    return [block.without(finished, part + number) for number, block in enumerate(unfinished)]
