"""Starts Prometheus and Grafana for one run, and stops them: loopback only, nothing sent anywhere, data in the run directory.

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
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from kilocopy import provision
from kilocopy.ongoing import Ongoing
from kilocopy.problem import ProblemError

READY_S = 60.0
STOP_S = 20.0
PROMETHEUS_MIN = (2, 26)  # last_over_time
GRAFANA_MIN = (10, 0)  # the dashboards' schema
PORTS = {"prometheus": 9090, "grafana": 3000}
PR_SET_PDEATHSIG = 1


def recorded(run: Ongoing) -> bool:
    """Whether a Prometheus of `kilocopy watch` has data of this run."""
    return (_folder(run) / "data" / "prometheus" / "wal").is_dir() and shutil.which("prometheus") is not None


def _folder(run: Ongoing) -> Path:
    return run.run_dir.resolve() / "watch"


@contextlib.contextmanager
def start(run: Ongoing, prometheus_port: int | None, grafana_port: int | None) -> Iterator[tuple[str, ...]]:
    """Prometheus and Grafana, where they are on the PATH, for the time of a `with` block; yields what to tell the user, a line each.

    Nothing, where there is no Prometheus: a Grafana alone shows nothing. Raises ProblemError, in one sentence, where one cannot start.
    """
    prometheus, grafana = shutil.which("prometheus"), shutil.which("grafana")
    if prometheus is None:
        yield ()
        return
    folder = _folder(run)
    ports = {"prometheus": port_for("prometheus", prometheus_port), "grafana": port_for("grafana", grafana_port)}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    paths = provision.render(folder, provision.of_run(run.run_dir), prometheus_url=urls["prometheus"])
    with contextlib.ExitStack() as stack:
        _demand("prometheus", prometheus, PROMETHEUS_MIN)
        command = prometheus_command(prometheus, paths["prometheus"], folder / "data" / "prometheus", ports["prometheus"])
        stack.enter_context(_running(Program("prometheus", command, {}, f"{urls['prometheus']}/-/ready"), folder / "data"))
        said = [f"Prometheus  {urls['prometheus']}/graph    alerts  {urls['prometheus']}/alerts"]
        if grafana is not None:
            _demand("grafana", grafana, GRAFANA_MIN)
            program = Program("grafana", grafana_command(grafana), grafana_settings(folder, paths["grafana"], ports["grafana"]), f"{urls['grafana']}/api/health")
            stack.enter_context(_running(program, folder / "data"))
            said.insert(0, f"Grafana     {urls['grafana']}/d/kilocopy-copies?var-run={run.id}&from=now-15m&to=now&refresh=5s")
        yield tuple(said)


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


def prometheus_command(binary: str, config: Path, data: Path, port: int) -> list[str]:
    """The command line: loopback, its own data, kept until somebody deletes the run."""
    return [binary, f"--config.file={config}", f"--storage.tsdb.path={data}", f"--web.listen-address=127.0.0.1:{port}",
            "--storage.tsdb.retention.time=10y"]  # fmt: skip


def grafana_command(binary: str) -> list[str]:
    """The command line; Grafana wants to know where its own files are: beside bin/, or where packages put them."""
    here = Path(binary).resolve().parent.parent
    home = here if (here / "conf" / "defaults.ini").exists() else Path("/usr/share/grafana")
    return [binary, "server", f"--homepath={home}"]


def grafana_settings(folder: Path, provisioning: Path, port: int) -> dict[str, str]:
    """Grafana's settings, as its environment: everybody on this host may look, nobody may log in, nothing is asked of any other host."""
    data = folder / "data" / "grafana"
    sections = {
        "server": {"http_addr": "127.0.0.1", "http_port": str(port)},
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
        "dashboards": {"default_home_dashboard_path": str(folder / "grafana" / "dashboards" / "copies.json")},
    }
    return {
        f"GF_{section.upper().replace('.', '_')}_{key.upper()}": value for section, keys in sections.items() for key, value in keys.items()
    }


@dataclass(frozen=True, slots=True)
class Program:
    """What is started: its name for the user, its command, what its environment has beside ours, and the page that says it is ready."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: str


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


def _environment() -> dict[str, str]:
    """Ours without what is secret, and without settings for another Grafana."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("GF_", "KILOCOPY_", "GRAFANA_"))}


def _die_with_parent() -> None:
    """Linux ends the program when whoever started it is killed; elsewhere it stays."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _until_ready(program: Program, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise ProblemError(f"{program.name}: could not start: {_cause(log)}; its log: {log}")
        with contextlib.suppress(OSError, HTTPException), urllib.request.urlopen(program.ready, timeout=2) as answer:  # noqa: S310
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise ProblemError(f"{program.name}: not ready after {READY_S:g} s; its log: {log}")


def _cause(log: Path) -> str:
    """The last error of a log of Prometheus' or Grafana's kind (logfmt), else its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if re.search(r"level=error|level=ERROR|Error:|error:|✗", line):
            said = re.findall(r'\b(?:err|error|msg)="((?:[^"\\]|\\.)*)"', line)
            return said[-1].replace('\\"', '"') if said else line.strip()
    return lines[-1].strip() if lines else "it said nothing"
