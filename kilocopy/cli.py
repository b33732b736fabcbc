"""The command line: one command a verb. A user's mistake is one sentence on standard error and exit code 2.

What measures, fits and plots loads numpy, scipy, plotly and duckdb, so a command imports it when it runs: `kilocopy status` has to answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from kilocopy import __version__, deploying, doctor, faults, manifest, placement, provision, receiving, serving, starting
from kilocopy.problem import ProblemError
from kilocopy.spec import Spec, load

if TYPE_CHECKING:
    from kilocopy.run import Lead

app = typer.Typer(
    help=__doc__.split("\n")[0] if __doc__ else None, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

boards = typer.Typer(help="What Grafana and Prometheus show of a run, as files.", no_args_is_help=True)
app.add_typer(boards, name="dashboards")
deploy = typer.Typer(help="Bring a spec to a cluster: as files to review, and with your own kubectl, docker compose or ray up.", no_args_is_help=True)
app.add_typer(deploy, name="deploy")

INTERRUPTED = 130

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="Spec file (YAML); `kilocopy init` writes one.")]
RunsDir = Annotated[Path, typer.Option("--runs", help="Directory of run directories.")]
Web = Annotated[bool, typer.Option("--web", help="Locust's web UI on loopback.")]
DeployTarget = Annotated[
    deploying.Target, typer.Option("--target", help="KubeRay on Kubernetes, docker compose on one GPU host, or Ray's cluster launcher.")
]
DeployOut = Annotated[Path | None, typer.Option("--out", help="Folder of the files; by default NAME-TARGET here.")]
Workers = Annotated[int, typer.Option("--workers", min=1, max=1024, help="Driver processes on this host; one reads about a thousand streams.")]
Resume = Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Go on with an experiment that was cut off.")]
AgainLevels = Literal["none", "void", "withheld"]
Again = Annotated[AgainLevels, typer.Option("--again", help="With --resume: play void levels again too; with `withheld`, also those whose latency is.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print summary.json instead of the report.")]


@app.command("run")
def run_command(
    spec: SpecFile,
    runs: RunsDir = Path("runs"),
    web: Web = False,
    workers: Workers = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the replicas serving afterwards.")] = False,
    watched: Annotated[bool, typer.Option("--watch", help="Prometheus and Grafana for the run, as `kilocopy watch` starts them, until it is reported.")] = False,
    as_json: AsJson = False,
    resume: Resume = None,
    again: Again = "none",
) -> None:
    """All of it in order: serve, drive, measure, price, report. Ctrl-C stops it and reports what is there."""
    from kilocopy import campaign, run
    from kilocopy.watch import beside

    loaded = load(spec)
    with beside(runs) if watched else contextlib.nullcontext():
        if loaded.experiment is not None:
            summary = campaign.perform(loaded, runs, resume=resume, again=again, web=web, keep=keep, quiet=as_json, workers=workers)
        else:
            _no_experiment(resume, again)
            summary = run.run(loaded, runs, web=web, keep=keep, quiet=as_json, workers=workers)
    _finish(summary, as_json)


def _no_experiment(resume: Path | None, again: AgainLevels) -> None:
    if again != "none":
        raise ProblemError(f"--again {again}: goes with --resume and a spec that has an experiment; the stages of an ordinary run are played anew")
    if resume is not None:
        raise ProblemError(f"--resume {resume}: goes with a spec that has an experiment; the stages of an ordinary run are played anew")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("kilocopy.yaml"),
    gpu: Annotated[bool, typer.Option("--gpu", help="For a GPU cluster.")] = False,
) -> None:
    """Write a commented spec to start from."""
    starting.write(path, gpu)
    typer.echo(path)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a spec, for editors."""
    typer.echo(json.dumps(Spec.model_json_schema(), indent=2))


@app.command()
def train(out: Annotated[Path, typer.Option("--out", help="Directory of the model.")] = Path(".cache/models/demo"),
          seconds: Annotated[float, typer.Option("--seconds", help="Training time, s.")] = 100, seed: int = 0,
          force: Annotated[bool, typer.Option("--force", help="Train again although it is there.")] = False) -> None:  # fmt: skip
    """Train the demo model from scratch on Python's own documentation, and write what that cost."""
    arguments = [
        sys.executable,
        "-m",
        "cluster.train",
        "--out",
        str(out),
        "--seconds",
        str(seconds),
        "--seed",
        str(seed),
        *(["--force"] if force else []),
    ]
    raise typer.Exit(subprocess.run(arguments, env=os.environ | {"PYTHONPATH": manifest.search_path()}, check=False).returncode)


@app.command()
def serve(
    spec: SpecFile,
    address: Annotated[str | None, typer.Option("--address", help="Join this Ray instead of cluster.address.")] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Stay until Ctrl-C or SIGTERM, then stop the replicas: for containers.")] = False,
) -> None:
    """Start the replicas, wait until each answers, and leave them serving; `kilocopy down` stops them."""
    from kilocopy import experiment, run

    loaded = load(spec)
    if loaded.experiment is not None:
        loaded = experiment.plan(loaded)[0].spec
    if address:
        loaded = loaded.model_copy(update={"cluster": loaded.cluster.model_copy(update={"address": address})})
    with run.serve(loaded, keep=not stay) as state:
        typer.echo(state["url"])
        if stay:
            serving.stay()


@app.command()
def status(
    seconds: Annotated[float, typer.Option("--seconds", min=0, max=600, help="Where something runs: take tokens/s over this long.")] = 3,
) -> None:
    """Say what is being served: replicas, address, metrics endpoints; node by node copies, tokens/s, pages/hour (JSON; the table is on standard error)."""
    from kilocopy import standing

    state = serving.status()
    if not state:
        typer.echo("nothing is being served")
        raise typer.Exit(1)
    if state["alive"] and state.get("metrics"):
        now = standing.nodes(state, serving.served(), seconds)
        state |= now
        typer.echo("\n".join(standing.table(now)), err=True)
    typer.echo(json.dumps(state, indent=2, sort_keys=True))
    if not state["alive"]:
        typer.echo(f"nothing is being served; the last serving here: {state['phase']} (the JSON is the last that it said)", err=True)
        raise typer.Exit(1)


@app.command()
def down() -> None:
    """Stop what `kilocopy serve` started, and only that."""
    typer.echo("stopped" if serving.stop() else "nothing to stop")


@app.command()
def drive(
    spec: SpecFile,
    url: Annotated[str | None, typer.Option("--url", help="Any OpenAI-compatible server; API key in KILOCOPY_API_KEY.")] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metrics", help="Its metrics page, for the identity checks; may be repeated.")
    ] = None,
    power: Annotated[
        list[str] | None, typer.Option("--power", metavar="URL", help="A page of a serving node's power meters (`python -m cluster.power --page` there); may be repeated.")
    ] = None,
    web: Web = False,
    workers: Workers = 1,
    runs: RunsDir = Path("runs"),
    as_json: AsJson = False,
    resume: Resume = None,
    again: Again = "none",
    join: Annotated[int | None, typer.Option("--join", metavar="N", min=1, max=4096, help="Lead N workers that `kilocopy join` starts elsewhere; secret in KILOCOPY_JOIN_TOKEN.")] = None,
    place: Annotated[Literal["hand", "ray"], typer.Option("--place", help="Who starts them: you, or the Ray of what is served here (else of RAY_ADDRESS), a CPU slot each.")] = "hand",
    bind: Annotated[str | None, typer.Option("--bind", metavar="HOST:PORT", help="Where the leader listens for them; 127.0.0.1:5557, with --place ray this node's address in Ray.")] = None,
    join_s: Annotated[float, typer.Option("--join-s", min=1, help="How long they may take to join, s.")] = 300,
) -> None:
    """Drive the stages against what `kilocopy serve` started, or against any URL, and report."""
    from kilocopy import campaign, run

    loaded = load(spec)
    state = serving.status()
    if url is None:
        if not state or not state["alive"] or state["phase"] != "ready":
            raise ProblemError("nothing is being served here; `kilocopy serve SPEC` first, or give --url")
        serving.same_cluster(loaded)
        url, metrics = state["url"], state["metrics"]
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ProblemError(
            f"--url {parts.scheme}...: not an http:// or https:// address"
            if parts.username
            else f"--url {url}: not an http:// or https:// address"
        )
    if parts.username or parts.query:
        raise ProblemError("--url: leave user, password and query out of the address; an API key goes into KILOCOPY_API_KEY")
    base = url.rstrip("/").removesuffix("/v1")
    shares_host = manifest.is_this_host(url)
    if place == "ray" and join is None:
        raise ProblemError("--place ray: how many workers? Give --join N")
    if join is not None and (workers != 1 or loaded.experiment is not None):
        if workers != 1:
            raise ProblemError("--workers and --join do not go together: --join leads workers that are started elsewhere, and drives nothing here")
        raise ProblemError("experiment: and --join do not go together: workers elsewhere join once, for one run; drive it with --workers N here, or write its levels as stages")
    if loaded.experiment is not None:
        if power:
            raise ProblemError("--power: an experiment takes no pages of power meters; a Ray that `kilocopy serve --address` joined is metered without it")
        summary = campaign.drive(
            loaded, runs, base, targets=metrics or [], web=web, shares_host=shares_host, workers=workers, quiet=as_json, resume=resume, again=again
        )
        return _finish(summary, as_json)
    _no_experiment(resume, again)
    with contextlib.ExitStack() as stack:
        lead = stack.enter_context(_leading(join, place, bind, join_s, state)) if join is not None else None
        run_dir = run.drive(loaded, runs, base, targets=metrics or [], web=web, shares_host=shares_host, workers=join or workers, lead=lead, power=power)
    return _finish(run.report(run_dir, quiet=as_json), as_json)


@contextlib.contextmanager
def _leading(join: int, place: str, bind: str | None, join_s: float, state: dict[str, Any] | None) -> Iterator[Lead]:
    """Where the workers join. Placed by Ray, they end with the `with` block; nobody else needs the token then, and one is made where there is none."""
    from kilocopy.placing import Placer
    from kilocopy.run import Lead

    if place == "hand":
        yield Lead(receiving.parse_address(bind or "127.0.0.1:5557", "--bind"), receiving.need_token(os.environ.get(receiving.TOKEN)), join_s)
        return
    serving_ray = state.get("ray") if state and state["alive"] else None
    address = serving_ray or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ProblemError("--place ray: which Ray? Serve from here (`kilocopy serve --address`), or set RAY_ADDRESS")
    token = receiving.need_token(os.environ.get(receiving.TOKEN) or secrets.token_hex(16))
    with Placer(address, join, token) as placer:
        yield Lead(receiving.parse_address(bind, "--bind") if bind else placer.bind(), token, join_s, placer)


@app.command("join")
def join_command(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the leader listens (`kilocopy drive --join N --bind`).")],
    folder: Annotated[Path, typer.Option("--run", metavar="DIR", help="A new folder for this worker's own records.")],
    wait_s: Annotated[float, typer.Option("--wait-s", min=0, help="How long to wait for the leader, s.")] = 300,
) -> None:
    """Be one driver worker for a leader elsewhere, and send the records home; secret in KILOCOPY_JOIN_TOKEN."""
    from kilocopy import joining

    token = receiving.need_token(os.environ.get(receiving.TOKEN))
    raise typer.Exit(joining.join(receiving.parse_address(address, "HOST:PORT"), folder, token, wait_s))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")], as_json: AsJson = False) -> None:
    """Measure, price and report again from the records of a run, without a server."""
    from kilocopy import run

    _finish(run.report(run_dir, quiet=as_json), as_json, redone=True)


@app.command("compare")
def compare_command(
    runs: Annotated[list[str], typer.Argument(metavar="[NAME=]RUN...", help="Run directories; the first is the baseline. Runs of one spec, or of one NAME, are repeats.")],
    quality: Annotated[list[str] | None, typer.Option("--quality", metavar="NAME=SCORE", help="Your own quality score of a side or a model, shown beside it.")] = None,
    html: Annotated[Path, typer.Option("--html", help="The page to write.")] = Path("comparison.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Put runs side by side: ratios of $/page, Wh/page, copies and speed, with intervals from repeats."""
    from kilocopy import side_by_side

    side_by_side.command(runs, quality or [], html, as_json=as_json)


@app.command("plan")
def plan_command(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run on one replica with three closed stages or more, or repeats of it.")],
    copies: Annotated[int, typer.Option("--copies", min=0, max=100_000_000, help="Copies at once, each asking again as soon as its stream ended.")] = 0,
    rate: Annotated[float, typer.Option("--rate", min=0, max=10_000_000, help="Requests a second.")] = 0,
    burstiness: Annotated[float, typer.Option("--burstiness", min=0.01, help="Of the requests: 1 is Poisson, below 1 comes in bursts.")] = 1,
    node: Annotated[int, typer.Option("--node", min=0, help="Replicas on a node, which die together; 0 lets none die.")] = 1,
    most: Annotated[int, typer.Option("--most", min=1, help="Replicas at which the search gives up.")] = 10_000,
    router: Annotated[Literal["round_robin", "two_choices", "random"] | None, typer.Option("--router", help="How requests are dealt; as Serve does for the spec's routing, where it is not given.")] = None,
    against: Annotated[list[Path] | None, typer.Option("--against", help="A run on several replicas of the same spec: how far the simulation is off. May be repeated, for repeats of it.")] = None,
    seed: int = 0,
    html: Annotated[Path, typer.Option("--html", help="The page to write.")] = Path("plan.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """How many replicas hold a load within the SLO, what one node's death does, and the bill: simulated from one measured replica."""
    from kilocopy import fleet_plan
    from kilocopy.planning import Asked

    asked = Asked(copies=copies, rate_per_s=rate, burstiness=burstiness, router=router, seed=seed)
    fleet_plan.command(run_dirs, asked, against=against or [], node=node, most=most, html=html, as_json=as_json)


@app.command("history")
def history_command(
    where: Annotated[str, typer.Argument(metavar="FOLDER|URI", help="A folder of run directories, or an object store: s3://bucket/runs, gs://bucket/runs.")] = "runs",
    html: Annotated[Path, typer.Option("--html", help="The page to write.")] = Path("history.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the series as JSON.")] = False,
) -> None:
    """The same suite over versions and dates: $/page and Wh/page run after run, and by how much a year."""
    from kilocopy import history

    history.command(where, html=html, as_json=as_json)


@app.command("check")
def check_command(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN...", help="A run, or repeats of it.")],
    against: Annotated[list[str], typer.Option("--against", metavar="BASELINE", help="The run to measure it by, or repeats of it; a summary.json will do.")],
    tolerance: Annotated[list[str] | None, typer.Option("--tolerance", metavar="[FIGURE=]FRACTION", help="How much worse is let pass: 0.05, 5%, usd_per_page=0.02; may be repeated.")] = None,
    clearly: Annotated[bool, typer.Option("--clearly", help="Fail only where the whole 95 % interval is beyond the tolerance.")] = False,
    junit: Annotated[Path | None, typer.Option("--junit", help="JUnit XML to write.")] = None,
) -> None:
    """Hold a run against a baseline, for CI. Exit code 0: within the tolerance; 1: worse; 2: a mistake, or they do not compare."""
    from kilocopy import check

    raise typer.Exit(check.command(run_dirs, against, tolerance or ["0.05"], clearly=clearly, xml=junit))


@app.command("watch")
def watch_command(
    run_dir: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run directory; the newest in --runs, or the next one, where none is named.")] = None,
    runs: RunsDir = Path("runs"),
    terminal: Annotated[bool, typer.Option("--terminal", help="In the terminal only; start nothing.")] = False,
    prometheus_port: Annotated[int | None, typer.Option("--prometheus-port", min=1, max=65535, help="On loopback; 9090, or a free one.")] = None,
    grafana_port: Annotated[int | None, typer.Option("--grafana-port", min=1, max=65535, help="On loopback; 3000, or a free one.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only say where Prometheus and Grafana are.")] = False,
) -> None:  # fmt: skip
    """Watch the run that is going on: Prometheus and Grafana where they are installed, and the terminal. Ctrl-C ends what was started for it."""
    from kilocopy.watch import watch

    watch(run_dir, runs, terminal=terminal, prometheus_port=prometheus_port, grafana_port=grafana_port, quiet=quiet)


@app.command("faults")
def faults_command(
    mode: Annotated[str, typer.Argument(metavar="MODE", help="How to answer: " + ", ".join(faults.modes()) + ".")] = "ok",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on loopback; 0 takes a free one.")] = 0,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a good answer.")] = 100,
    ttft_s: Annotated[float, typer.Option("--ttft-s", min=0, help="Time to the first token, s.")] = 0.05,
    itl_s: Annotated[float, typer.Option("--itl-s", min=0, help="Time between tokens, s.")] = 0.02,
    chat: Annotated[bool, typer.Option("--chat", help="Answer as /v1/chat/completions does.")] = False,
    pem: Annotated[Path | None, typer.Option("--pem", help="TLS, with the key and the certificate in this file.")] = None,
) -> None:
    """Serve answers that misbehave in one named way, to see what a driver makes of them. Ctrl-C ends it."""
    faults.serve(mode, port=port, tokens=tokens, ttft_s=ttft_s, itl_s=itl_s, chat=chat, pem=pem)


@boards.command("render")
def render_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write into.")],
    run_dirs: Annotated[list[Path] | None, typer.Option("--run", metavar="RUN", help="A run directory to watch; may be repeated.")] = None,
    servers: Annotated[list[str] | None, typer.Option("--servers", metavar="URL", help="A metrics page of Ray's agent or of vLLM; may be repeated.")] = None,
    servers_file: Annotated[list[str] | None, typer.Option("--servers-file", metavar="FILE", help="Such pages as Ray lists them: prom_metrics_service_discovery.json.")] = None,
    cluster: Annotated[str, typer.Option("--cluster", help="Whose pages these are: the `name` of the spec.")] = "",
    prometheus: Annotated[str, typer.Option("--prometheus", metavar="URL", help="Where Grafana finds Prometheus.")] = "http://127.0.0.1:9090",
) -> None:  # fmt: skip
    """Write prometheus.yml, the rules, and Grafana's provisioning files with the dashboards."""
    from kilocopy import experiment
    from kilocopy.recompute import read_manifest

    watched_runs = [run for path in run_dirs or [] for run in (experiment.parts(path) if experiment.is_home(read_manifest(path)) else [path])]
    targets = [f"{run.resolve()}/targets/*.json" for run in watched_runs]
    watched = provision.Watched(targets, servers or [], servers_file or [], cluster)
    for path in provision.render(out, watched, prometheus_url=prometheus).values():
        typer.echo(path)


@boards.command("push")
def push_command(
    url: Annotated[str | None, typer.Option("--url", metavar="URL", help="The Grafana; GRAFANA_URL by default.")] = None,
    prometheus: Annotated[str | None, typer.Option("--prometheus", metavar="URL", help="Make the data source too: where Grafana reaches Prometheus.")] = None,
) -> None:  # fmt: skip
    """Put the dashboards into a Grafana, with the token of GRAFANA_TOKEN. What is the same there stays untouched."""
    from kilocopy import grafana

    address = url or os.environ.get(grafana.URL)
    if not address:
        raise ProblemError("which Grafana? Give --url, or set GRAFANA_URL")
    there = grafana.Grafana(address)
    typer.echo(f"Grafana {there.version()} at {there.url}")
    done = []
    for pushed in grafana.push(there, prometheus):
        done.append(pushed.change)
        typer.echo(f"  {pushed.what}: {pushed.change}" + (f"  ({pushed.more})" if pushed.more else ""))
    changed = sum(change in {"created", "updated"} for change in done)
    typer.echo(f"{changed} of {len(done)} changed" if changed else "nothing changed")


@deploy.command("render")
def deploy_render(spec: SpecFile, target: DeployTarget = "kuberay", out: DeployOut = None) -> None:
    """Write the files of a deployment, and nothing else: they are to be read."""
    loaded = load(spec)
    for path in deploying.render(loaded, target, out):
        typer.echo(path)
    for note in placement.notes(loaded):
        typer.echo(f"note: {note}", err=True)


@deploy.command("apply")
def deploy_apply(
    spec: SpecFile,
    target: DeployTarget = "kuberay",
    out: DeployOut = None,
    driven: Annotated[bool, typer.Option("--drive", help="Then drive it, from workers that are there too.")] = False,
) -> None:
    """Write the files, apply them with your own kubectl, docker compose or ray up, and wait until requests are answered."""
    loaded = load(spec)
    for note in placement.notes(loaded):
        _say(f"note: {note}")
    where = deploying.apply(loaded, target, out, _say)
    if driven:
        deploying.drive(loaded, target, where, _say)


@deploy.command("delete")
def deploy_delete(spec: SpecFile, target: DeployTarget = "kuberay", out: DeployOut = None) -> None:
    """Take away what `kilocopy deploy apply` made, and nothing else. Run directories stay."""
    deploying.delete(load(spec), target, out, _say)


def _say(words: str) -> None:
    typer.echo(f"deploy  {words}", err=True)


@app.command("doctor")
def doctor_command() -> None:
    """Say what this machine can do, and what to mend."""
    raise typer.Exit(doctor.examine())


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _finish(summary: Path, as_json: bool, *, redone: bool = False) -> None:
    """The HTML file's name for people, then the last line for programs: summary.json itself, or its path. 130 when it was interrupted just now."""
    typer.echo(f"report: {summary.with_name('report.html').resolve()}", err=True)
    text = summary.read_text(encoding="utf-8")
    typer.echo(text if as_json else summary, nl=not as_json)
    if json.loads(text)["status"] == "interrupted" and not redone:
        raise typer.Exit(INTERRUPTED)


def main() -> None:
    """Entry point: turns ProblemError into a sentence and its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # the same orderly end as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns Ctrl-C into this, without a word
            typer.echo("kilocopy: interrupted", err=True)
        raise
    except ProblemError as problem:
        typer.echo(f"kilocopy: {problem}", err=True)
        sys.exit(problem.code)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        typer.echo("kilocopy: the disk is full; what was recorded is kept: make room, then `kilocopy report RUN`", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("kilocopy: interrupted", err=True)
        sys.exit(INTERRUPTED)
