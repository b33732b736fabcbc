"""Starts Prometheus and Grafana for one run, and stops them: loopback only, nothing sent anywhere, data in the run directory.

By docker compose where an engine works, else from the PATH.

    RUN/watch/prometheus/, RUN/watch/grafana/     configuration (kilocopy/provision.py)
    RUN/watch/data/                               what they store, and their logs

A run that was watched can be looked at again later: Prometheus still has its data.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from kilocopy import provision
from kilocopy.ongoing import Ongoing
from kilocopy.problem import ProblemError

STOP_S = 20.0
PULL_S = 600.0  # an engine may have to fetch the images first
SECRET = "GF_SECURITY_ADMIN_PASSWORD"  # noqa: S105  a name
PROMETHEUS_MIN = (2, 26)  # last_over_time
GRAFANA_MIN = (11, 1)  # copies against speed: its panel (xychart) had other options before
PORTS = {"prometheus": 9090, "grafana": 3000}
PR_SET_PDEATHSIG = 1


def recorded(run: Ongoing) -> bool:
    """Whether a Prometheus of `kilocopy watch` has data of this run, and one can be started here to show it: from the PATH or in a container."""
    return (_folder(run) / "data" / "prometheus" / "wal").is_dir() and (shutil.which("prometheus") or working_engine()) is not None


def _folder(run: Ongoing) -> Path:
    return run.run_dir.resolve() / "watch"


@dataclass(frozen=True, slots=True)
class Program:
    """What is started: its name for the user, its command, what its environment has beside ours, and the pages that say it is ready."""

    name: str
    command: Sequence[str]
    ready: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_s: float = 60.0
    after: Sequence[str] = ()  # a command that clears up once it has ended


@contextlib.contextmanager
def start(run: Ongoing, prometheus_port: int | None, grafana_port: int | None) -> Iterator[tuple[str, ...]]:
    """Prometheus and Grafana for the time of a `with` block, by docker compose or from the PATH; yields what to tell the user, a line each.

    Nothing, where there is neither an engine nor a Prometheus: a Grafana alone shows nothing. Raises ProblemError, in one sentence,
    where one cannot start.
    """
    engine = working_engine()
    if engine is None and shutil.which("prometheus") is None:
        yield ()
        return
    place = Place(run, _folder(run), port_for("prometheus", prometheus_port), port_for("grafana", grafana_port))
    place.render()
    programs = [composed(engine, place)] if engine else installed(place)
    said = [f"Prometheus  {place.url('prometheus')}/graph    alerts  {place.url('prometheus')}/alerts"]
    if engine or len(programs) > 1:
        said.insert(0, f"Grafana     {place.url('grafana')}/d/kilocopy-copies?var-run={run.id}&from=now-15m&to=now&refresh=5s")
    with contextlib.ExitStack() as stack:
        for program in programs:
            stack.enter_context(_running(program, place.data))
        yield tuple(said)


@dataclass(frozen=True, slots=True)
class Place:
    """Where it all goes: the folder in the run directory, and the ports on loopback."""

    run: Ongoing
    folder: Path
    prometheus: int
    grafana: int

    @property
    def data(self) -> Path:
        """What the two store, and their logs."""
        return self.folder / "data"

    def url(self, name: str) -> str:
        """The address of one of them."""
        return f"http://127.0.0.1:{getattr(self, name)}"

    def render(self) -> None:
        """Write the configuration. Raises ProblemError."""
        provision.render(self.folder, provision.of_run(self.run.run_dir), prometheus_url=self.url("prometheus"))

    @property
    def ready(self) -> dict[str, str]:
        """The page of each that says it is ready."""
        return {"prometheus": f"{self.url('prometheus')}/-/ready", "grafana": f"{self.url('grafana')}/api/health"}


def installed(place: Place) -> list[Program]:
    """The programs from the PATH: Prometheus, and Grafana where it is there. Raises ProblemError for versions that are too old."""
    prometheus, grafana = shutil.which("prometheus"), shutil.which("grafana")
    assert prometheus is not None  # noqa: S101
    _demand("prometheus", prometheus, PROMETHEUS_MIN)
    programs = [Program("prometheus", [prometheus, *prometheus_options(place)], [place.ready["prometheus"]])]
    if grafana is not None:
        _demand("grafana", grafana, GRAFANA_MIN)
        programs.append(Program("grafana", grafana_command(grafana), [place.ready["grafana"]], grafana_settings(place)))
    return programs


# --------------------------------------------------------------------------------------------------------- docker compose


def working_engine() -> str | None:
    """The docker command, where compose and an engine answer it. On Linux only: elsewhere a container does not share the host's loopback."""
    docker = shutil.which("docker")
    if docker is None or sys.platform != "linux":
        return None
    for question in (["compose", "version"], ["info"]):
        try:
            if subprocess.run([docker, *question], capture_output=True, timeout=20, check=False).returncode != 0:
                return None
        except (OSError, subprocess.TimeoutExpired):
            return None
    return docker


def composed(docker: str, place: Place) -> Program:
    """Both in containers, which see the host's loopback and the run directory under its own name: the configuration is the same."""
    for name in ("prometheus", "grafana"):  # made by us and not by the engine, whose they would be
        (place.data / name).mkdir(parents=True, exist_ok=True)
    settings = grafana_settings(place)
    file = place.folder / "compose.yaml"
    provision.write(place.folder, {file.name: provision.yaml_text(compose_document(place, settings))})
    project = "kilocopy-" + re.sub(r"[^a-z0-9_-]", "-", place.run.id.lower())
    command = [docker, "compose", "-p", project, "-f", str(file)]
    secret = {SECRET: settings[SECRET]}
    return Program("docker compose", [*command, "up"], [*place.ready.values()], secret, PULL_S, [*command, "down"])


def compose_document(place: Place, settings: Mapping[str, str]) -> dict[str, Any]:
    """compose.yaml; Grafana's password comes from the environment, not from the file."""
    user, run_dir = f"{os.getuid()}:{os.getgid()}", provision.for_compose(str(place.run.run_dir.resolve()))
    common = {"network_mode": "host", "user": user, "volumes": [{"type": "bind", "source": run_dir, "target": run_dir}]}  # a path may have a `:`
    shown = {name: provision.for_compose(value) for name, value in settings.items() if name != SECRET}
    return {
        "services": {
            "prometheus": {"image": provision.IMAGES["prometheus"], "command": [provision.for_compose(option) for option in prometheus_options(place)], **common},
            "grafana": {"image": provision.IMAGES["grafana"], "environment": {**shown, SECRET: None}, **common},
        }
    }


# ----------------------------------------------------------------------------------------------------------- what they are told


def port_for(name: str, asked: int | None) -> int:
    """The port asked for, or the usual one, or a free one where something else listens there. Raises ProblemError."""
    for port in [asked] if asked is not None else [PORTS[name], 0]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ProblemError(f"--{name}-port {asked}: in use on this host; stop what listens there, name another, or leave it out for a free one")


def _demand(name: str, binary: str, least: tuple[int, int]) -> None:
    """Refuse a version that cannot do what the generated configuration asks for. Raises ProblemError."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProblemError(f"{binary}: cannot be run ({error}); use --terminal, or mend it") from None
    found = re.search(r"version v?(\d+)\.(\d+)", done.stdout + done.stderr)
    if found is None:
        raise ProblemError(f"{binary}: does not say its version, so it is not {name.capitalize()}; use --terminal, or another PATH")
    if (int(found[1]), int(found[2])) < least:
        raise ProblemError(f"{binary}: version {found[1]}.{found[2]} is too old, {least[0]}.{least[1]} is needed; use --terminal, or install a newer one")


def prometheus_options(place: Place) -> list[str]:
    """The command line: loopback, its own data, kept until somebody deletes the run."""
    config, data = place.folder / "prometheus" / "prometheus.yml", place.data / "prometheus"
    return [f"--config.file={config}", f"--storage.tsdb.path={data}", f"--web.listen-address=127.0.0.1:{place.prometheus}",
            "--storage.tsdb.retention.time=10y"]  # fmt: skip


def grafana_command(binary: str) -> list[str]:
    """The command line; Grafana wants to know where its own files are: beside bin/, or where packages put them."""
    here = Path(binary).resolve().parent.parent
    home = here if (here / "conf" / "defaults.ini").exists() else Path("/usr/share/grafana")
    return [binary, "server", f"--homepath={home}"]


def grafana_settings(place: Place) -> dict[str, str]:
    """Grafana's settings, as its environment: everybody on this host may look, nobody may log in, nothing is asked of any other host."""
    data, provisioning = place.data / "grafana", place.folder / "grafana" / "provisioning"
    sections = {
        "server": {"http_addr": "127.0.0.1", "http_port": str(place.grafana)},
        "paths": {"data": str(data), "logs": str(data / "log"), "plugins": str(data / "plugins"), "provisioning": str(provisioning)},
        "auth.anonymous": {"enabled": "true", "org_role": "Viewer"},
        "auth": {"disable_login_form": "true"},
        "auth.basic": {"enabled": "false"},
        "security": {"admin_password": secrets.token_urlsafe(24), "disable_gravatar": "true"},
        "analytics": {
            "enabled": "false",
            "reporting_enabled": "false",
            "check_for_updates": "false",
            "check_for_plugin_updates": "false",
            "feedback_links_enabled": "false",
        },
        "news": {"news_feed_enabled": "false"},
        "plugins": {"preinstall_disabled": "true", "public_key_retrieval_disabled": "true", "plugin_admin_enabled": "false"},
        "snapshots": {"external_enabled": "false"},
        "dashboards": {"default_home_dashboard_path": str(place.folder / "grafana" / "dashboards" / "copies.json")},
    }
    return {
        f"GF_{section.upper().replace('.', '_')}_{key.upper()}": value for section, keys in sections.items() for key, value in keys.items()
    }


@contextlib.contextmanager
def _running(program: Program, data: Path) -> Iterator[None]:
    """The program for the time of a `with` block, once it is ready. Raises ProblemError with its own last error where it ends before."""
    log = data / f"{program.name}.log"
    try:
        data.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            process = subprocess.Popen(program.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd=data,
                                       env=_environment() | dict(program.environment), preexec_fn=_die_with_parent)  # fmt: skip  # noqa: PLW1509
    except OSError as error:
        raise ProblemError(f"{program.name}: cannot be started ({error.filename}: {error.strerror}); use --terminal") from None
    try:
        _until_ready(program, process, log)
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if program.after:
            subprocess.run(program.after, env=_environment() | dict(program.environment), capture_output=True, timeout=60, check=False)


def _environment() -> dict[str, str]:
    """Ours without what is secret, and without settings for another Grafana."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("GF_", "KILOCOPY_", "GRAFANA_"))}


def _die_with_parent() -> None:
    """Linux ends the program when whoever started it is killed; elsewhere it stays."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _until_ready(program: Program, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s, left = time.monotonic() + program.ready_s, list(program.ready)
    while left:
        if process.poll() is not None:
            raise ProblemError(f"{program.name}: could not start: {_cause(log)}; its log: {log}")
        if time.monotonic() > deadline_s:
            raise ProblemError(f"{program.name}: not ready after {program.ready_s:g} s ({left[0]} does not answer); its log: {log}")
        with contextlib.suppress(OSError, HTTPException), urllib.request.urlopen(left[0], timeout=2) as answer:  # noqa: S310
            if answer.status == 200:
                left.pop(0)
                continue
        time.sleep(0.2)


def _cause(log: Path) -> str:
    """The last error of a log of Prometheus' or Grafana's kind (logfmt), else its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if re.search(r"level=error|level=ERROR|Error:|error:|✗", line):
            said = re.findall(r'\b(?:err|error|msg)="((?:[^"\\]|\\.)*)"', line)
            return said[-1].replace('\\"', '"') if said else line.strip()
    return lines[-1].strip() if lines else "it said nothing"
