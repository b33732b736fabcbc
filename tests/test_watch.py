"""`kilocopy watch`: what the terminal says is what pages and rules say, and what is started to watch is stopped again."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console
from ruamel.yaml import YAML

from kilocopy import manifest, ongoing, records, viewers
from kilocopy.live import Live
from kilocopy.ongoing import Ongoing
from kilocopy.problem import ProblemError
from kilocopy.scrape import write_targets
from kilocopy.screen import Screen, bars
from kilocopy.spec import Spec
from kilocopy.watch import beside
from loadtests.exporter import Exporter, write_file_sd
from tests.test_driver import open_spec

pytestmark = pytest.mark.alone

ENGINE = 'ray_vllm_{}{{ReplicaId="{}",WorkerId="w",engine="0",model_name="m"}} {}\n'
HEALTHY = 'ray_serve_deployment_replica_healthy{{deployment="LLMServer:m",replica="{}"}} {}\n'


class Pages:
    """Metrics pages over HTTP; a page that is None answers 503."""

    def __init__(self) -> None:
        pages: dict[str, bytes | None] = {}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = pages.get(self.path)
                self.send_response(200 if page is not None else 503)
                self.end_headers()
                self.wfile.write(page or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.pages = pages
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.at = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture
def pages() -> Iterator[Pages]:
    served = Pages()
    yield served
    served.close()


def begun(tmp_path: Path) -> Path:
    """A run directory as it is while a driver writes: 4 copies for 60 s, then Poisson arrivals."""
    closed = {"arrival": "closed", "copies": 4, "duration_s": 60, "warmup_s": 2, "ramp_s": 1}
    made = open_spec(closed, {"arrival": "poisson", "rate_per_s": 2, "duration_s": 30, "warmup_s": 0})
    made = made.model_copy(update={"model": made.model.model_copy(update={"training": None})})
    run_dir = manifest.create(made, tmp_path / "runs", url="http://127.0.0.1:1", driver_shares_host=True, started_by="test")
    (run_dir / "driver").mkdir()
    (run_dir / "driver" / "worker0.arrow").touch()
    soon = time.time() + 100  # a test on a busy machine is slower than a driver
    os.utime(run_dir / "driver" / "worker0.arrow", (soon, soon))
    records.Events(run_dir, "worker0").write("stage_start", stage=0, level=0, load=None, workers=1)
    return run_dir


class Driven:
    """A driver worker's real exporter, told of requests: each step 20 of 40 tokens and 30 words, in 2 s."""

    def __init__(self, run: Ongoing, pages: Pages) -> None:
        constant = {"cluster": run.spec.name, "model": run.spec.model.id, "run": run.id, "worker": "0"}
        self.exporter, self._pages, self._steps = Exporter(constant, run.spec), pages, 0
        write_file_sd(run.run_dir / "targets" / "worker0.json", [pages.at], {"job": "kilocopy"})

    def step(self, outcome: str = "ok", lag_us: int = 100) -> None:
        row: dict[str, Any] = {"stage": 0, "level": 0, "outcome": outcome, "scheduled_ns": 0, "sent_ns": 0, "first_token_ns": 40_000_000,
                               "last_token_ns": 1_210_000_000, "output_tokens": 40, "prompt_tokens": 7, "output_words": 30}  # fmt: skip
        self._steps += 1
        self.exporter.sample(stage=0, level=0, phase="window", copies_asked=4, in_flight=4, sent=20 * self._steps, events=800 * self._steps,
                             loop_lag_us=[lag_us] * 100, cpu_s=0.5 * self._steps, rss_bytes=2**27)  # fmt: skip
        for _ in range(20):
            self.exporter.finished(row, np.full(39, 30_000, np.uint32))
        self._pages.pages["/metrics"] = self.exporter.page()


def shown(screen: Screen, width: int = 80, height: int = 24, ended: str | None = None) -> list[str]:
    console = Console(width=width, height=height, record=True, force_terminal=True, file=io.StringIO())
    console.print(screen.draw(width, height, ended))
    return console.export_text().splitlines()


def test_the_terminal_says_what_pages_and_rules_say(tmp_path: Path, pages: Pages) -> None:
    """400 tokens/s and 300 words/s from 4 copies; the rented device's price; engines with and without gauges; no meter."""
    run = Ongoing(begun(tmp_path))
    driven, live = Driven(run, pages), Live(run.run_dir)
    write_targets(run.run_dir, [f"http://{pages.at}/engines"], run.spec.name, run.spec.model.id)
    screen = Screen(live, run)
    for step in range(40):
        driven.step()
        engines = "".join(ENGINE.format("generation_tokens_total", replica, 400 * step).replace('"m"', f'"{run.spec.model.id}"') for replica in "ab")
        engines += ENGINE.format("num_requests_running", "a", 3.0).replace('"m"', f'"{run.spec.model.id}"')
        engines += ENGINE.format("generation_tokens_total", "dead", 4000).replace('"m"', f'"{run.spec.model.id}"')
        engines += "".join(HEALTHY.format(replica, int(replica != "dead")) for replica in ("a", "b", "dead"))
        pages.pages["/engines"] = engines.encode()
        live.step(1000.0 + 2 * step)
    lines = shown(screen)
    text = "\n".join(lines)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    price = run.spec.prices.hardware.usd_per_device_hour.value
    pages_per_h = 3600 * 20 * 30 / 2 / run.spec.page.words
    assert re.search(r"Copies +4 in flight, 4 asked, 3 on the servers", text), text
    assert re.search(r"Speed +400 tokens/s, 100 a copy", text), text
    assert f"{pages_per_h:,.0f} an hour" in text
    assert f"{pages_per_h / price / run.spec.cluster.devices:,.0f} pages a dollar".replace(",", "")[:2] in text.replace(",", "")
    assert "not measured (no power meter)" in text
    assert "The driver keeps up." in text
    assert re.search(r"SLO +100 % held it", text)
    assert "none of 800 requests" in text
    assert re.search(r"^a +3 +0 +0 % +200", text, re.MULTILINE), text
    assert re.search(r"^b +0 +0 +0 % +200", text, re.MULTILINE), text
    assert re.search(r"^dead +down", text, re.MULTILINE), text
    assert re.search(r"\b0 +4 +25 % +495 µs +400 *$", text, re.MULTILINE), text
    assert "…" not in text  # every heading has its room
    assert max(map(len, shown(screen, 160, 50))) > 100  # the lines grow with the screen
    driven.exporter.close()


def test_a_driver_that_is_the_limit_is_told_whole_on_80_columns(tmp_path: Path, pages: Pages) -> None:
    run = Ongoing(begun(tmp_path))
    driven, live = Driven(run, pages), Live(run.run_dir)
    for step in range(25):
        driven.step(lag_us=20_000)
        live.step(1 + 2.0 * step)
    lines = [line.rstrip() for line in shown(Screen(live, run))]
    assert "Worker 0 is the limit, not the servers: use more workers, or a quieter host." in lines
    assert "Of the last minute only 48 s were seen: rates still rise, and prices fall." in lines
    driven.exporter.close()


def test_no_data_is_no_data_and_a_page_that_is_gone_leaves_no_figure(tmp_path: Path, pages: Pages) -> None:
    run = Ongoing(begun(tmp_path))
    live = Live(run.run_dir)
    screen = Screen(live, run)
    live.step(1.0)
    text = "\n".join(shown(screen))
    assert text.count("no data") >= 7
    assert "driver: no data" in text
    assert not re.search(r"\b0 (tokens|an hour|a page)|\$0", text)
    driven = Driven(run, pages)
    for step in range(40):
        driven.step("ok" if step < 39 else "http_429")
        live.step(3.0 + 2 * step)
    assert "20 http_429 of 800 requests" in "\n".join(shown(screen))
    pages.pages["/metrics"] = None
    live.step(90.0)
    assert "driver: no data" in "\n".join(shown(screen))
    live.back()  # what it was before the page was gone
    assert "4 in flight" in "\n".join(shown(screen, ended="complete"))
    driven.exporter.close()


def test_a_line_has_no_hole_where_a_picture_came_late(tmp_path: Path) -> None:
    run = Ongoing(begun(tmp_path))
    live = Live(run.run_dir)
    live.begun_s, labels = 1000.0, frozenset({"cluster": run.spec.name, "model": run.spec.model.id, "run": run.id}.items())
    for at_s in (0, 2, 4, 9, 11, 13, 30, 32, 34, 36):  # once 5 s late; then nothing for 17 s
        live.samples.add("kilocopy:copies", labels, 1000.0 + at_s, 4.0, 660.0)
    live.time_s = 1036.0
    line = Screen(live, run).line("kilocopy:copies", 16)
    assert len(line) == 16
    assert line.strip() == "█" * 8 + " " * 4 + "█" * 3, line
    live.close()


def test_a_line_keeps_gaps_and_ends_at_its_largest() -> None:
    assert bars([0, 1, float("nan"), 4, 8]) == "▁▂ ▅█"
    assert bars([0, 0]) == "▁▁"
    assert bars([float("nan")] * 2) == "  "


def test_a_run_is_going_on_until_its_driver_says_so_or_falls_silent(tmp_path: Path) -> None:
    run_dir = begun(tmp_path)
    run = ongoing.newest(tmp_path / "runs")
    assert run is not None
    assert run.id == run_dir.name
    left_s = run.stage_left_s(0, 0)
    assert left_s is not None
    assert 55 < left_s <= 63
    assert run.left_s(0, 0) == pytest.approx(left_s + 30, abs=1)
    past = time.time() - 30
    os.utime(run_dir / "driver" / "worker0.arrow", (past, past))
    os.utime(run_dir / "manifest.json", (past, past))
    assert run.ended() == "silent"
    os.utime(run_dir / "driver" / "worker0.arrow")
    assert run.ended() is None
    records.Events(run_dir, "worker0").write("run_end", reason="complete")
    assert run.ended() == "complete"
    assert ongoing.newest(tmp_path / "runs") is None


def test_of_an_experiment_the_part_that_is_played_is_going_on(tmp_path: Path) -> None:
    """The experiment's own directory has no driver: it says nothing, however young it is."""
    part = begun(tmp_path)
    home = tmp_path / "runs" / "experiment"
    tree = {name: value for name, value in Ongoing(part).manifest["spec"].items() if name != "stages"}
    asked = Spec.model_validate(tree | {"experiment": {"kind": "frontier", "copies": [1, 2, 4, 8]}})
    home.mkdir()
    records.write_json(home / "manifest.json", {"spec": asked.model_dump(mode="json")})
    (home / "parts").mkdir()
    part.rename(home / "parts" / part.name)
    found = ongoing.newest(tmp_path / "runs")
    assert found is not None
    assert found.run_dir == home / "parts" / part.name
    records.Events(found.run_dir, "worker0").write("run_end", reason="complete")
    assert ongoing.newest(tmp_path / "runs") is None


def test_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"no run directory \(it has no manifest.json\)"):
        Ongoing(tmp_path)


# -------------------------------------------------------------------------------------------------- what is started to watch


def script(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('echo "prometheus, version 2.10.0 (branch)"', "version 2.10 is too old, 2.26 is needed"),
        ("echo hello", "does not say its version"),
        ('[ "$1" = --version ] && echo "prometheus, version 3.1.0" || { echo \'ts=1 level=error msg="x" err="listen tcp: address already in use"\'; exit 1; }',
         "prometheus: could not start: listen tcp: address already in use; its log: "),
    ],
)  # fmt: skip
def test_a_prometheus_that_cannot_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str) -> None:
    script(tmp_path, "prometheus", body)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(viewers, "working_engine", lambda: None)
    with pytest.raises(ProblemError, match=re.escape(said)), viewers.start(Ongoing(begun(tmp_path)), None, None):
        pass


def test_an_ended_run_comes_back_by_docker_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there to show it counts, not what recorded it."""
    run = Ongoing(begun(tmp_path))
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin", "docker", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "prometheus" else str(tmp_path / "bin" / name))
    assert not viewers.recorded(run)  # nothing was
    (run.run_dir / "watch/data/prometheus/wal").mkdir(parents=True)
    assert viewers.recorded(run)
    script(tmp_path / "bin", "docker", "exit 1")
    assert not viewers.recorded(run)


def test_a_port_in_use_is_one_sentence_and_the_usual_one_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ProblemError, match=f"--grafana-port {port}: in use"):
            viewers.port_for("grafana", port)
        monkeypatch.setitem(viewers.PORTS, "grafana", port)
        assert viewers.port_for("grafana", None) not in {0, port}


def place(tmp_path: Path) -> viewers.Place:
    run = Ongoing(begun(tmp_path))
    made = viewers.Place(run, run.run_dir.resolve() / "watch", 9090, 3000)
    made.render()
    return made


def test_grafana_listens_on_loopback_lets_everybody_look_and_asks_nobody(tmp_path: Path) -> None:
    settings = viewers.grafana_settings(place(tmp_path))
    assert settings["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert (settings["GF_AUTH_ANONYMOUS_ENABLED"], settings["GF_AUTH_ANONYMOUS_ORG_ROLE"]) == ("true", "Viewer")
    quiet = ("ANALYTICS_REPORTING_ENABLED", "ANALYTICS_CHECK_FOR_UPDATES", "ANALYTICS_CHECK_FOR_PLUGIN_UPDATES", "NEWS_NEWS_FEED_ENABLED")
    assert {settings[f"GF_{name}"] for name in quiet} == {"false"}
    assert settings["GF_SECURITY_DISABLE_GRAVATAR"] == settings["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"
    assert len(settings[viewers.SECRET]) > 20
    assert json.loads(Path(settings["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).read_text())["uid"] == "kilocopy-copies"


def test_containers_get_the_same_configuration_on_loopback_and_no_file_has_the_password(tmp_path: Path) -> None:
    here = place(tmp_path)
    program = viewers.composed("/usr/bin/docker", here)
    text = (here.folder / "compose.yaml").read_text()
    services = YAML(typ="safe").load(text)["services"]
    assert services["prometheus"]["command"] == viewers.prometheus_options(here)
    assert {service["network_mode"] for service in services.values()} == {"host"}  # where the listening addresses are loopback's
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert all(re.search(r":v?\d+\.\d+\.\d+$", service["image"]) for service in services.values())
    assert program.environment[viewers.SECRET] not in text
    assert not any(program.environment[viewers.SECRET] in part for part in program.command)
    mounted = services["grafana"]["volumes"][0]["source"]
    assert services["grafana"]["environment"]["GF_PATHS_PROVISIONING"].startswith(mounted)


def test_a_path_with_signs_that_mean_something_to_compose_stays_itself(tmp_path: Path) -> None:
    folder = tmp_path / "a $HOME:b"
    folder.mkdir()
    here = place(folder)
    viewers.composed("/usr/bin/docker", here)
    text = (here.folder / "compose.yaml").read_text()
    assert "$" not in text.replace("$$", "")
    services = YAML(typ="safe").load(text.replace("$$", "$"))["services"]  # as compose reads it
    run_dir = str(here.run.run_dir.resolve())
    assert services["prometheus"]["volumes"] == [{"type": "bind", "source": run_dir, "target": run_dir}]
    assert services["prometheus"]["command"] == viewers.prometheus_options(here)


@pytest.mark.parametrize("body", ["exit 1", '[ "$1" = compose ] || exit 1'], ids=["no compose", "no engine"])
def test_a_docker_without_compose_or_engine_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    script(tmp_path, "docker", body)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert viewers.working_engine() is None
    script(tmp_path, "docker", "exit 0")
    assert viewers.working_engine() == str(tmp_path / "docker")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian's package prometheus)")
def test_prometheus_is_started_for_a_run_and_stopped_by_ctrl_c(tmp_path: Path, pages: Pages) -> None:
    """The real Prometheus finds the run's page and works out the rules; Ctrl-C ends it, and nothing else."""
    run = Ongoing(begun(tmp_path))
    driven = Driven(run, pages)
    driven.step()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "prometheus").symlink_to(str(shutil.which("prometheus")))
    command = [sys.executable, "-m", "kilocopy", "watch", str(run.run_dir)]
    alone = os.environ | {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(manifest.CHECKOUT)}  # no docker, no Grafana
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=alone)
    try:
        assert watching.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", watching.stdout.readline())
        assert address
        query = f"{address[0]}/api/v1/query?query=kilocopy:copies"
        deadline_s = time.monotonic() + 60
        found: list[Any] = []
        while not found and time.monotonic() < deadline_s:
            with urllib.request.urlopen(query) as answer:
                found = json.load(answer)["data"]["result"]
            time.sleep(0.5)
        assert [(each["metric"]["run"], each["value"][1]) for each in found] == [(run.id, "4")]
        started = psutil.Process(watching.pid).children(recursive=True)
        assert [process.name() for process in started] == ["prometheus"]
        listening = {c.laddr.ip for process in started for c in process.net_connections() if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
    finally:
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=30)
        driven.exporter.close()
    assert watching.returncode == 0, err
    assert "Traceback" not in err
    assert "4 in flight" in out
    assert not any(process.is_running() for process in started)
    assert viewers.recorded(run)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian's package prometheus)")
def test_a_run_that_wants_to_be_watched_has_its_prometheus_for_as_long_as_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "prometheus").symlink_to(str(shutil.which("prometheus")))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def started() -> list[psutil.Process]:
        return [child for child in psutil.Process().children(recursive=True) if child.name() == "prometheus"]

    def until(done: Callable[[], bool]) -> list[psutil.Process]:
        deadline_s = time.monotonic() + 90
        while not (started() and done()):
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        return started()

    with beside(tmp_path / "runs"):
        first = begun(tmp_path)
        found = until(lambda: True)
        # As an experiment does: a part ends, and the next one has its own.
        records.Events(first, "worker0").write("run_end", reason="complete")
        second = begun(tmp_path)
        found += until((second / "watch" / "data" / "prometheus" / "wal").exists)
    assert len({process.pid for process in found}) == 2
    assert not any(process.is_running() for process in found)
