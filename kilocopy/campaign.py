"""`kilocopy run` of a spec with an experiment: serve and drive, level after level, unattended, until every level is there.

It goes on where an earlier one was cut off, and whatever ends it, what was recorded is reported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from kilocopy import experiment, limits, manifest, records, run, serving, verifier
from kilocopy.problem import ProblemError
from kilocopy.recompute import done_levels, read_manifest
from kilocopy.run import ERR
from kilocopy.spec import Spec

Again = Literal["none", "void", "withheld"]
Refused = frozenset[tuple[str, Path, int]]  # level, part and stage of it that were done and do not count as it
ServeFor = Callable[[experiment.Serving], AbstractContextManager[dict[str, Any]]]


def perform(
    spec: Spec,
    runs: Path,
    *,
    resume: Path | None = None,
    again: Again = "none",
    web: bool = False,
    keep: bool = False,
    quiet: bool = False,
    workers: int = 1,
) -> Path:
    """Everything that the experiment asks for, with replicas of our own; returns the path of summary.json.

    `resume`: an experiment to go on with; `again`: which of its levels are played again although they are done.
    """

    def served(one: experiment.Serving) -> AbstractContextManager[dict[str, Any]]:
        if one.fresh and (serving.status() or {}).get("alive"):
            raise ProblemError("something is being served already, and this experiment starts its replicas anew for each level; `kilocopy down` first")
        return run.serve(one.spec, keep=keep and not one.fresh)

    for one in experiment.plan(spec):
        serving.model_on_disk(one.spec)
        serving.enough_gpus(one.spec)
    shares_host = spec.cluster.address == "local"
    url = f"http://127.0.0.1:{spec.cluster.port}"
    return _perform(spec, runs, served, url=url, shares_host=shares_host, resume=resume, again=again, web=web, quiet=quiet, workers=workers)


def drive(
    spec: Spec,
    runs: Path,
    url: str,
    *,
    targets: list[str],
    web: bool,
    shares_host: bool,
    workers: int = 1,
    quiet: bool = False,
    resume: Path | None = None,
    again: Again = "none",
) -> Path:
    """The same against what is served already. Raises ProblemError for an experiment that has to start replicas itself."""
    if len(experiment.plan(spec)) > 1 or any(one.fresh for one in experiment.plan(spec)):
        kind = spec.experiment.kind if spec.experiment else ""
        raise ProblemError(f"experiment.kind {kind}: it starts its replicas itself, several times; use `kilocopy run`")

    def served(_: experiment.Serving) -> AbstractContextManager[dict[str, Any]]:
        return contextlib.nullcontext({"url": url, "metrics": targets})

    return _perform(spec, runs, served, url=url, shares_host=shares_host, resume=resume, again=again, web=web, quiet=quiet, workers=workers)


def _perform(
    spec: Spec,
    runs: Path,
    served: ServeFor,
    *,
    url: str,
    shares_host: bool,
    resume: Path | None,
    again: Again,
    web: bool,
    quiet: bool,
    workers: int,
) -> Path:
    servings = experiment.plan(spec)
    if again != "none" and resume is None:
        raise ProblemError(f"--again {again}: goes with --resume RUN, the experiment whose levels are to be played again")
    verifier.check(spec)
    for one in servings:
        for block in one.blocks:
            run.check(block.spec, runs, workers)
    home = _opened(spec, runs, resume, url=url, shares_host=shares_host, workers=workers)
    refused = _refused(home, again)
    roofline = read_manifest(home).get("driver_roofline") or limits.roofline()
    try:
        for one in servings:
            if _blocks(home, one, refused):
                with served(one) as state:
                    _play(home, one, state, roofline, refused, web=web, shares_host=shares_host, workers=workers)
        _verify(home, spec)
    except _StoppedError:
        pass
    except KeyboardInterrupt:
        ERR.print("[red]experiment[/]  interrupted; reporting what was recorded")
    except ProblemError as problem:
        if not experiment.parts(home):
            raise
        run.report(home, quiet=quiet)
        raise ProblemError(f"{problem}\n  what was recorded is kept; once that is mended, `--resume {home}` goes on") from None
    return run.report(home, quiet=quiet)


def _verify(home: Path, spec: Spec) -> None:
    """The user's verifier over the samples, where the experiment has one. Ctrl-C keeps what it said, and `--resume` goes on."""
    if verifier.of(spec) is not None:
        with ERR.status("[bold]verify[/]  starting") as line:
            verifier.finish(home, spec, read_manifest, lambda done, every: line.update(f"[bold]verify[/]  {done:,} of {every:,} samples"))


class _StoppedError(Exception):
    """The user stopped the driver."""


def _opened(spec: Spec, runs: Path, resume: Path | None, *, url: str, shares_host: bool, workers: int) -> Path:
    """The experiment's directory, new or taken up again."""
    if resume is not None:
        home = resume if resume.exists() else runs / resume
        experiment.reopened(home, spec, read_manifest(home))
        ERR.print(f"[bold]experiment[/]  goes on: {len(experiment.done(home, read_manifest))} levels are done in {home}")
        return home
    more = {"driver_roofline": limits.roofline(), "driver_workers": workers}
    home = manifest.create(spec, runs, url=url, driver_shares_host=shares_host, started_by="kilocopy", more=more)
    ERR.print(f"[bold]experiment[/]  records in {home}; after a cut, `--resume {home}` goes on")
    return home


def _refused(home: Path, again: Again) -> Refused:
    """The levels that are done and are to be played again: void ones, and where asked those whose latency is withheld."""
    wanted = {"none": (), "void": ("void",), "withheld": ("void", "latency_withheld")}[again]
    found = frozenset(place for place, verdict in done_levels(home).items() if verdict in wanted) if wanted else frozenset()
    if wanted:
        ERR.print(f"[bold]experiment[/]  played again: {', '.join(sorted(level for level, _, _ in found)) or 'no level, all are worth what was asked'}")
    return found


def _blocks(home: Path, one: experiment.Serving, refused: Refused) -> list[experiment.Block]:
    finished = experiment.done(home, read_manifest)
    kept = {level for level, place in finished.items() if (level, *place) not in refused}
    return experiment.left(one, kept, len(experiment.parts(home)))


def _play(
    home: Path,
    one: experiment.Serving,
    state: dict[str, Any],
    roofline: dict[str, Any],
    refused: Refused,
    *,
    web: bool,
    shares_host: bool,
    workers: int,
) -> None:
    """Every block of one serving that has levels left. Raises _StoppedError when the user ended the driver."""
    for block in _blocks(home, one, refused):
        ERR.print(f"[bold]experiment[/]  {', '.join(block.levels)}")
        part = run.drive(
            block.spec, home / experiment.PARTS, state["url"], targets=state["metrics"], web=web, shares_host=shares_host, workers=workers,
            roofline=roofline, more={experiment.LEVELS_KEY: list(block.levels)},
        )  # fmt: skip
        if any(event["event"] == "run_end" and event.get("reason") == "interrupted" for event in records.read_events(part)):
            raise _StoppedError
