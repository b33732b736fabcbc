"""`kilocopy run`: the main path, one verb a line: spec, serve, drive, measure, price, report."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from kilocopy import driving, limits, manifest, receiving, records, serving, stage_marks
from kilocopy.page import render_html
from kilocopy.placing import Placer
from kilocopy.problem import ProblemError
from kilocopy.recompute import summarise
from kilocopy.report import print_report
from kilocopy.scrape import Scraper, write_targets
from kilocopy.spec import Spec, files_named, streams_max
from kilocopy.summary import Summary

ERR = Console(stderr=True, highlight=False)
ELSEWHERE = {"error": "the workers run on other hosts"}  # in place of a roofline: this host's would be another machine's


def run(spec: Spec, runs: Path, *, web: bool = False, keep: bool = False, quiet: bool = False, workers: int = 1) -> Path:
    """All of it in order; returns the path of summary.json. Ctrl-C at any time stops what was started and reports what is there."""
    check(spec, runs, workers)
    with serve(spec, keep=keep) as state:
        shares_host = spec.cluster.address == "local"
        run_dir = drive(spec, runs, state["url"], targets=state["metrics"], web=web, shares_host=shares_host, workers=workers)
    return report(run_dir, quiet=quiet)


def check(spec: Spec, runs: Path, workers: int = 1, *, elsewhere: bool = False) -> None:
    """What would only fail after minutes of starting is refused first. `elsewhere`: the workers' hosts see to themselves. Raises ProblemError."""
    for key, path in files_named(spec):
        if not Path(path).is_file():
            raise ProblemError(f"{key} {path}: no such file; a path is relative to the current directory")
    if not elsewhere:
        limits.refuse(max(streams_max(stage) for stage in spec.stages), workers)
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProblemError(f"--runs {runs}: run directories cannot be made there ({error.strerror}); name another directory") from None


@contextlib.contextmanager
def serve(spec: Spec, *, keep: bool = False) -> Iterator[dict[str, Any]]:
    """Serve for the time of a `with` block; with `keep`, or where it was serving before, leave it running."""
    before = serving.status()
    already = bool(before and before["alive"])
    try:
        with ERR.status("[bold]serve[/]  starting") as line:
            state = serving.start(spec, lambda seen: _show_start(seen, line))
        yield state
    finally:
        if not already and not keep and serving.stop():
            ERR.print("[bold]serve[/]  stopped")


def _show_start(state: dict[str, Any], line: Any) -> None:
    """One line a change of phase or replica; the live line carries the newest."""
    replicas = ", ".join(f"{count} {name.lower()}" for name, count in sorted(state.get("replicas", {}).items()) if count)
    text = f"[bold]serve[/]  {state['phase']}" + (f"  replicas: {replicas}" if replicas else "")
    line.update(text)
    if not ERR.is_terminal or state["phase"] == "ready":
        ERR.print(text)


def drive(
    spec: Spec,
    runs: Path,
    url: str,
    *,
    targets: list[str],
    web: bool,
    shares_host: bool,
    workers: int = 1,
    roofline: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
    lead: Lead | None = None,
    power: list[str] | None = None,
) -> Path:
    """Drive every stage and return the run directory, also when it was interrupted: what was recorded is there.

    `roofline`: what this host's driver can read, where it was measured already; `more`: what else the manifest is to say; `lead`:
    where workers join that are started elsewhere; `power`: pages of the serving nodes' power meters, where not known from the state.
    """
    check(spec, runs, workers, elsewhere=lead is not None)
    key = os.environ.get("KILOCOPY_API_KEY")
    driving.probe(url, spec.model.id, key, 30, endpoint=spec.workload.endpoint)
    roofline = ELSEWHERE if lead else roofline or limits.roofline()
    for sentence in [] if lead else limits.warnings(spec, roofline, workers):
        ERR.print(f"[yellow]drive[/]  {sentence}")
    more = {"driver_roofline": roofline, "driver_workers": workers, "grafana_url": stage_marks.address(), **(more or {})}
    run_dir = manifest.create(spec, runs, url=url, driver_shares_host=shares_host, started_by="kilocopy", more=more)
    ERR.print(f"[bold]drive[/]  {len(spec.stages)} stages against {url.rpartition('@')[2]}, records in {run_dir}")
    with contextlib.suppress(OSError):  # a run goes on without being watched
        write_targets(run_dir, targets, spec.name, spec.model.id)
    progress = driving.ProgressPrinter(ERR, spec)
    looking = serving.looking(url)
    pages = power or (looking() or {}).get("power") or []
    meter = power_meter(run_dir, pages) if shares_host or pages else contextlib.nullcontext()  # this host's joules are not a remote server's
    marked = stage_marks.annotating(run_dir, spec, lambda said: ERR.print(f"[yellow]drive[/]  {said}"))
    with _leading(lead, run_dir, workers, spec, url) as receiver, meter, Scraper(run_dir, targets, look=looking) as scraper, progress, marked:
        code = driving.drive(run_dir, url, spec, api_key=key, web=web, on_progress=progress, workers=workers, receiver=receiver)
    for target, error in scraper.failures.items():
        ERR.print(f"[yellow]drive[/]  {target} did not answer every scrape: {error}")
    if code not in {0, 130} and not any(event["event"] == "stage_start" for event in records.read_events(run_dir)):
        raise ProblemError(f"the driver could not start (exit code {code}); its log: {run_dir / 'driver.log'}")
    if code not in {0, 130}:
        ERR.print(f"[red]drive[/]  the driver ended with exit code {code}; reporting what was recorded ({run_dir / 'driver.log'})")
    return run_dir


@dataclass(frozen=True)
class Lead:
    """Where workers join, with which secret, and how long they may take."""

    bind: tuple[str, int]
    token: str = field(repr=False)
    join_s: float = 300
    placer: Placer | None = None  # who starts them, where it is Ray


@contextlib.contextmanager
def _leading(lead: Lead | None, run_dir: Path, workers: int, spec: Spec, url: str) -> Iterator[receiving.Receiver | None]:
    """Have the workers join, and afterwards wait for the last of their records; nothing where none are elsewhere."""
    if lead is None:
        yield None
        return

    def say(said: str) -> None:
        ERR.print(f"[bold]drive[/]  {said}", soft_wrap=True)

    placer = lead.placer
    with receiving.Receiver(run_dir, lead.bind, lead.token, workers, spec, placer.reached(url) if placer else url) as receiver:
        if placer:
            placer.start(receiver.bound, say)
            receiver.gather(say, lead.join_s, placer.check)
        else:
            say(f"waits for {workers} workers at {receiver.bound}: kilocopy join HOST:{receiver.port} --run DIR")
            receiver.gather(say, lead.join_s)
        yield receiver
        for said in receiver.finish():
            ERR.print(f"[red]drive[/]  {said}")


@contextlib.contextmanager
def power_meter(run_dir: Path, pages: Sequence[str] = ()) -> Iterator[None]:
    """The power meter, in a process of its own, for the time of a `with` block: of the nodes with these pages, else of this host, which serves too."""
    environment = os.environ | {"PYTHONPATH": manifest.search_path()}
    where = ["--host", os.environ.get("KILOCOPY_EXPORT_HOST", "127.0.0.1"), "--port", os.environ.get("KILOCOPY_POWER_PORT", "0")]
    with (run_dir / "power.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.power", str(run_dir), *where, *(["--from", *pages] if pages else [])],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def report(run_dir: Path, *, quiet: bool = False) -> Path:
    """Measure and price from the records, write summary.json and report.html, print the report; returns summary.json's path."""
    summary = summarise(run_dir)
    if summary.status == "interrupted":
        _keep_complete(run_dir)
    path = write(summary, run_dir)
    if not quiet:
        print_report(summary, Console(highlight=False, soft_wrap=not sys.stdout.isatty()))
    return path


def _keep_complete(run_dir: Path) -> None:
    """Keep a copy of the last report where it called the run complete and this one does not: its records were changed since. Raises ProblemError."""
    try:
        before = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        complete = before["status"] == "complete"
    except (OSError, ValueError, KeyError, TypeError):  # there was none, or none that says anything
        return
    if not complete:
        return
    try:
        for made in (run_dir / "report.html", run_dir / "summary.json"):
            if made.exists():
                shutil.copyfile(made, made.with_stem(f"{made.stem}.before"))
    except OSError as error:
        raise ProblemError(f"{run_dir}: its last report called it complete, and cannot be kept beside a new one ({error.strerror}); nothing was changed") from None
    ERR.print(f"[red]report[/]  {run_dir}: its last report called it complete, and its records do not any more; that report is kept as summary.before.json and report.before.html", soft_wrap=True)


def write(summary: Summary, run_dir: Path) -> Path:
    """Write summary.json and report.html beside the records; the same records give the same bytes."""
    path = run_dir / "summary.json"
    try:
        records.write_json(path, summary.model_dump(mode="json"))
        (run_dir / "report.html").write_text(render_html(summary), encoding="utf-8")
    except OSError as error:
        raise ProblemError(
            f"{run_dir}: the report cannot be written ({error.strerror}); the records are kept, run `kilocopy report {run_dir}` again when there is space"
        ) from None
    return path
