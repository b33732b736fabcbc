"""The way end to end, as a user runs it: the real Ray, the real vLLM on the CPU, the real Locust; two replicas, started once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ruamel.yaml import YAML

from kilocopy import dashboards, metrics, records
from tests.proof import WITHOUT_DATA, KnownMeter, Prometheus, Raw, as_regex, panels_without_data, variables

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.alone, pytest.mark.e2e, pytest.mark.timeout(600)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    """A folder with a spec, a trained model and two replicas serving it."""

    folder: Path
    spec: Path
    environment: dict[str, str]

    def kilocopy(self, *arguments: str | Path, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "kilocopy", *map(str, arguments)], capture_output=True, text=True, cwd=self.folder,
                              env=self.environment, timeout=timeout_s, check=False)  # fmt: skip

    def background(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "kilocopy", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                cwd=self.folder, env=self.environment)  # fmt: skip

    def state(self) -> dict[str, Any]:
        return dict(json.loads(self.kilocopy("status").stdout))

    def with_stages(self, name: str, *stages: dict[str, Any]) -> Path:
        yaml = YAML()
        tree = yaml.load(self.spec.read_text())
        tree["stages"] = list(stages)
        path = self.folder / f"{name}.yaml"
        with path.open("w") as file:
            yaml.dump(tree, file)
        return path

    def newest_run(self) -> Path:
        return max((self.folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("e2e")
    yaml = YAML()
    tree = yaml.load((ROOT / "loadtests" / "specs" / "demo.yaml").read_text())
    tree["model"]["source"] = str(folder / "model")
    tree["cluster"]["port"] = free_port()
    tree["workload"]["output_tokens"] = 40
    tree["stages"] = [
        {"arrival": "closed", "copies": 1, "duration_s": 6, "warmup_s": 1, "ramp_s": 0},
        {"arrival": "closed", "copies": 8, "duration_s": 12, "warmup_s": 1, "ramp_s": 1},
    ]
    spec = folder / "spec.yaml"
    with spec.open("w") as file:
        yaml.dump(tree, file)
    here = Served(folder, spec, os.environ | {"KILOCOPY_STATE": str(folder / "state"), "COLUMNS": "160"})
    trained = here.kilocopy("train", "--out", folder / "model", "--seconds", "6")
    assert trained.returncode == 0, trained.stderr
    try:
        started = here.kilocopy("serve", spec)
        assert started.returncode == 0, started.stderr
        yield here
    finally:
        here.kilocopy("down")


@pytest.fixture(scope="module")
def driven(served: Served) -> tuple[Path, dict[str, Any], str]:
    done = served.kilocopy("drive", served.spec)
    assert done.returncode == 0, done.stderr
    path = served.folder / done.stdout.splitlines()[-1]
    return path.parent, json.loads(path.read_text()), done.stdout


def test_status_tells_replicas_address_and_metrics(served: Served) -> None:
    state = served.state()
    assert state["alive"]
    assert state["phase"] == "ready"
    assert state["replicas"] == {"RUNNING": 2}
    with urllib.request.urlopen(state["metrics"][0], timeout=10) as page:
        assert b"ray_vllm_generation_tokens_total" in page.read()


def test_serving_twice_is_refused_for_another_spec_and_a_no_op_for_the_same(served: Served) -> None:
    assert served.kilocopy("serve", served.spec).returncode == 0
    other = served.with_stages("other", {"arrival": "closed", "copies": 2, "requests": 2})
    done = served.kilocopy("serve", other)
    assert done.returncode == 2
    assert "kilocopy down" in done.stderr
    assert served.state()["phase"] == "ready"  # and what was serving still is


def test_client_tokens_equal_the_servers_counters_to_the_token(driven: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, _ = driven
    for stage in summary["stages"]:
        check = next(check for check in stage["checks"] if check["name"] == "client_tokens_vs_server")
        assert check["outcome"] == "passed", check
        assert check["left"] == check["right"] > 0


def test_the_copies_asked_for_were_in_flight_on_driver_and_servers(driven: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, _ = driven
    for stage, asked in zip(summary["stages"], (1, 8), strict=True):
        assert stage["copies"]["asked"] == asked
        assert 0.95 * asked <= stage["copies"]["n_run_client"] <= asked + 1e-9
    assert 6 <= summary["stages"][1]["copies"]["n_run_server"] <= 8.2


def test_open_loop_and_search_from_two_workers(served: Served) -> None:
    """Arrivals, a trace, and a search on the real servers, shared by two driver processes: every token is counted on both sides."""
    (served.folder / "trace.jsonl").write_text(
        "".join(json.dumps({"timestamp": 500 * n, "input_length": 30, "output_length": 10 + n, "hash_ids": [n]}) + "\n" for n in range(12))
    )
    spec = served.with_stages(
        "arrivals",
        {"arrival": "poisson", "rate_per_s": 3, "duration_s": 8, "warmup_s": 1},
        {"arrival": "trace", "path": "trace.jsonl", "format": "mooncake"},
        {"arrival": "search", "start": 1, "limit": 4, "window_s": 4, "warmup_s": 1, "ramp_s": 0.5, "repeats": 0},
    )
    done = served.kilocopy("drive", spec, "--workers", "2")
    assert done.returncode == 0, done.stderr
    run_dir = served.folder / Path(done.stdout.splitlines()[-1]).parent
    summary = json.loads((run_dir / "summary.json").read_text())
    poisson, trace, *levels = summary["stages"]
    for stage in summary["stages"]:
        check = next(check for check in stage["checks"] if check["name"] == "client_tokens_vs_server")
        assert check["outcome"] == "passed", check  # within 1 %: under load the counters are exported late
        assert stage["requests"]["sent"] == stage["requests"]["ok"] > 0
        assert stage["requests"]["dropped"] == 0
    rows = records.read(run_dir, "requests").to_pylist()
    assert {row["worker"] for row in rows} == {0, 1}
    assert poisson["requests"]["sent"] == len([row for row in rows if row["stage"] == 0])
    replayed = sorted((row["copy"], row["output_tokens"], row["prompt_tokens"]) for row in rows if row["stage"] == 1)
    assert replayed == [(n, 10 + n, 30) for n in range(12)]  # the trace's own lengths, by the servers' count
    assert trace["verdict"]["level"] != "void", trace["verdict"]
    assert levels[0]["load"] == 1
    assert len(summary["searches"]) == 1
    roofline = json.loads((run_dir / "manifest.json").read_text())["driver_roofline"]
    assert roofline["events_per_s"] > 1000


def test_samples_of_a_prompt_on_real_servers(served: Served) -> None:
    """Best of n: the real engines' mixed streams, texts kept for a verifier, and both sides' counts of tokens and of sequences."""
    yaml = YAML()
    tree = yaml.load(served.spec.read_text())
    del tree["stages"]
    tree["workload"]["output_tokens"] = 20
    code = "import sys, os, json; text = sys.stdin.read(); sys.exit(not (text and json.load(open(os.environ['KILOCOPY_TASK']))['request']['n'] == 4))"
    tree["experiment"] = {
        "kind": "best_of_n", "samples": [1, 4], "sequences": 8, "repeats": 1, "duration_s": 3, "warmup_s": 1, "ramp_s": 0.5,
        "verifier": {"command": [sys.executable, "-S", "-c", code], "prompts": 5, "timeout_s": 60},
    }  # fmt: skip
    path = served.folder / "samples.yaml"
    with path.open("w") as file:
        yaml.dump(tree, file)
    done = served.kilocopy("drive", path)
    assert done.returncode == 0, done.stderr
    home = served.folder / Path(done.stdout.splitlines()[-1]).parent
    summary = json.loads((home / "summary.json").read_text())
    assert summary["status"] == "complete"
    for stage in summary["stages"]:
        tokens = next(check for check in stage["checks"] if check["name"] == "client_tokens_vs_server")
        assert tokens["outcome"] == "passed", tokens
    found = summary["experiment"]
    assert {(arm["samples"], arm["how"]) for arm in found["arms"]} <= {(1, "own_prompts"), (4, "one_request"), (4, "same_prompt")}
    assert found["verified"]["samples"] == found["verified"]["passed"] == 20, found["verified"]
    texts = [row for part in (home / "parts").iterdir() for row in records.read(part, "texts").to_pylist()]
    assert {len(row["texts"]) for row in texts} == {4}
    assert any(len(set(row["texts"])) > 1 for row in texts)  # samples differ
    requests = [row for part in (home / "parts").iterdir() for row in records.read(part, "requests").to_pylist()]
    assert {row["output_tokens"] for row in requests if row["outcome"] == "ok"} == {20, 80}


def test_the_figures_recompute_from_the_raw_records(driven: tuple[Path, dict[str, Any], str]) -> None:
    """Tokens/s of the busy stage again, by hand: chunk times inside the window, every stream scaled to its usage."""
    run_dir, summary, _ = driven
    table = records.read(run_dir, "requests").to_pylist()
    zero_ns = records.read_events(run_dir)[0]["time_ns"]
    window = summary["stages"][1]["window"]
    tokens, words, all_tokens = 0.0, 0, 0
    for row in table:
        if row["stage"] != 1 or row["outcome"] != "ok":
            continue
        times = (row["first_token_ns"] - zero_ns) / 1e9 + np.cumsum([0, *row["gaps_us"]]) / 1e6
        tokens += ((times >= window["start_s"]) & (times < window["end_s"])).sum() * row["output_tokens"] / row["chunks"]
        words, all_tokens = words + row["output_words"], all_tokens + row["output_tokens"]
    through = summary["stages"][1]["throughput"]
    assert through["output_tokens_per_s"]["value"] == pytest.approx(tokens / window["duration_s"], rel=0.01)
    assert 0 < through["words_per_token"] == pytest.approx(words / all_tokens, rel=0.05)
    assert through["pages_per_hour"] == pytest.approx(through["words_per_s"] / summary["page_words"] * 3600, rel=1e-6)


def test_every_request_got_the_tokens_it_asked_for(driven: tuple[Path, dict[str, Any], str]) -> None:
    run_dir, _, _ = driven
    table = records.read(run_dir, "requests")
    assert set(table.column("outcome").to_pylist()) == {"ok"}
    assert set(table.column("output_tokens").to_pylist()) == {40}
    assert all(20 <= tokens <= 45 for tokens in table.column("prompt_tokens").to_pylist())


def test_the_report_recomputes_byte_for_byte_and_names_its_file_last(driven: tuple[Path, dict[str, Any], str], served: Served) -> None:
    run_dir, _, printed = driven
    before = (run_dir / "summary.json").read_bytes(), (run_dir / "report.html").read_bytes()
    again = served.kilocopy("report", run_dir)
    assert again.returncode == 0, again.stderr
    assert ((run_dir / "summary.json").read_bytes(), (run_dir / "report.html").read_bytes()) == before
    assert again.stdout.splitlines()[-1].endswith("summary.json")
    assert printed.splitlines()[-1].endswith("summary.json")
    assert served.kilocopy("report", run_dir, "--json").stdout.encode() == before[0]


@dataclass
class Watched:
    """A run that `kilocopy watch` showed with a real Prometheus, which goes on scraping the servers."""

    prometheus: Prometheus
    run_dir: Path
    summary: dict[str, Any]
    start_s: float
    end_s: float  # of the minute that is compared: the last of the stage


@pytest.fixture(scope="module")
def watched(served: Served) -> Iterator[Watched]:
    """Eight copies for 70 s, with a meter whose counter the test moves: 25 W."""
    spec = served.with_stages("watched", {"arrival": "closed", "copies": 8, "duration_s": 70, "warmup_s": 1, "ramp_s": 0.5})
    before = set((served.folder / "runs").glob("*"))
    watching = served.background("watch", "--prometheus-port", str(free_port()))
    driving = served.background("drive", spec)
    try:
        run_dir = _new_run(served, before)
        with KnownMeter(run_dir, served.folder / "powercap", 25, served.environment):
            out, err = driving.communicate(timeout=200)
        assert driving.returncode == 0, err
        assert watching.stdout is not None
        said = next(line for line in watching.stdout if "Prometheus" in line)
        stop = next(event for event in records.read_events(run_dir) if event["event"] == "stage_stop_asking")
        end_s = stop["wall_ns"] / 1e9
        summary = json.loads((served.folder / out.splitlines()[-1]).read_text())
        yield Watched(Prometheus(re.search(r"http://127\.0\.0\.1:\d+", said)[0]), run_dir, summary, end_s - 60, end_s)  # type: ignore[index]
    finally:
        watching.send_signal(signal.SIGINT)
        assert "Traceback" not in watching.communicate(timeout=60)[1]


def _new_run(served: Served, before: set[Path]) -> Path:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for run_dir in set((served.folder / "runs").glob("*")) - before:
            if (run_dir / "manifest.json").exists():
                return run_dir
        time.sleep(0.1)
    raise AssertionError("no run began within 60 s")


needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian's package prometheus)")


@needs_prometheus
def test_every_panel_of_every_dashboard_has_data_where_the_run_made_some(watched: Watched) -> None:
    """Every query, with its variables as Grafana fills them in, against a real Prometheus that scraped the real stack."""
    chosen = variables(watched.prometheus, watched.start_s, watched.end_s)
    spec = json.loads((watched.run_dir / "manifest.json").read_text())["spec"]
    assert {name: chosen[name] for name in ("cluster", "model", "run", "stage")} == {
        "cluster": [spec["name"]], "model": [spec["model"]["id"]], "run": [watched.run_dir.name], "stage": ["0"]}  # fmt: skip
    assert len(chosen["node"]) == 1
    assert panels_without_data(watched.prometheus, watched.start_s, watched.end_s) == set(WITHOUT_DATA)
    marked = dashboards.document(dashboards.COPIES)["annotations"]["list"][0]["expr"]
    assert watched.prometheus.lines(dashboards.filled(marked, as_regex(chosen)), watched.start_s, watched.end_s)


@needs_prometheus
def test_what_the_rules_say_is_what_the_raw_records_say(watched: Watched) -> None:
    """Over the minute of the stage's last evaluation. The driver's counters are seen each 2 s and extrapolated: 3 % is more than that makes."""
    raw, prometheus = Raw(watched.run_dir), watched.prometheus
    end_s = prometheus.value("timestamp(kilocopy:copies:mean1m)", watched.end_s)  # rules are evaluated each 5 s
    start_s = end_s - 60
    spec = json.loads((watched.run_dir / "manifest.json").read_text())["spec"]
    tokens, words = raw.ended(start_s, end_s, raw.tokens), raw.ended(start_s, end_s, raw.words)
    pages, copies = words / spec["page"]["words"], raw.copies(start_s, end_s)
    facility_w = raw.watts(start_s, end_s) * spec["prices"]["pue"]["value"]
    usd = spec["prices"]["hardware"]["usd_per_device_hour"]["value"] / 3600 / pages
    expected = {
        "copies:mean1m": copies,
        "output_tokens_per_second:rate1m": tokens,
        "tokens_per_second_per_copy:rate1m": tokens / copies,
        "tokens_per_second_per_device:rate1m": tokens,
        "pages_per_second:rate1m": pages,
        "facility_watts:rate1m": facility_w,
        "joules_per_page:rate1m": facility_w / pages,
        "wh_per_page:rate1m": facility_w / pages / 3600,
        "joules_per_output_token:rate1m": facility_w / tokens,
        "pages_per_kwh:rate1m": 3.6e6 / (facility_w / pages),
        "usd_per_page:rate1m": usd,
        "pages_per_usd:rate1m": 1 / usd,
    }
    found = {name: prometheus.value(f"kilocopy:{name}", end_s) for name in expected}
    print({name: (round(found[name] / value, 4), value) for name, value in expected.items()})
    assert found == pytest.approx(expected, rel=0.03)
    # The servers' reach Ray's page up to a report late, and that page is read each 4 s.
    assert prometheus.value("kilocopy:server_tokens_per_second:rate1m", end_s) == pytest.approx(tokens, rel=0.1)
    assert raw.watts(start_s, end_s) == pytest.approx(25, rel=0.01)
    assert prometheus.value("kilocopy:copies", end_s - 1) == 8
    assert prometheus.value("kilocopy:replicas", end_s) == 2
    assert prometheus.value("kilocopy:slo_attained_fraction:rate1m", end_s) > 0
    assert prometheus.value("kilocopy:error_fraction:rate1m", end_s) == 0


@needs_prometheus
def test_percentiles_from_buckets_are_within_their_bucket_of_the_raw_ones(watched: Watched) -> None:
    """A quantile from buckets is as good as its bucket is narrow, and a rule's minute begins and ends up to a scrape and an evaluation (7 s of 60)
    away from this one: it has to lie in the buckets of the exact 40th to 60th percentiles of the same minute, with nothing on top."""
    raw = Raw(watched.run_dir)
    table = records.read(watched.run_dir, "requests").to_pylist()
    ended = (raw.finished_s > watched.end_s - 60) & (raw.finished_s <= watched.end_s)
    rows = [row for row, within in zip(table, ended, strict=True) if within]
    ttft_s = [(row["first_token_ns"] - row["sent_ns"]) / 1e9 for row in rows]
    gaps_s = np.concatenate([row["gaps_us"] for row in rows]) / 1e6
    for values, name, edges in ((ttft_s, "ttft", metrics.TTFT_BUCKETS_S), (gaps_s, "inter_chunk", metrics.ICL_BUCKETS_S)):
        below, exact, above = (float(value) for value in np.percentile(values, (40, 50, 60)))
        low, high = max(edge for edge in (0, *edges) if edge <= below), min(edge for edge in edges if edge >= above)
        found = watched.prometheus.value(f"kilocopy:{name}_seconds:p50", watched.end_s)
        assert low <= found <= high, (name, below, exact, above, found)


@needs_prometheus
def test_no_alert_fires_in_a_sound_run(watched: Watched) -> None:
    """The driver's alert says what the report's verdict says, by the same bounds."""
    fired = {labels["alertname"] for labels, _ in watched.prometheus.vector('max_over_time(ALERTS{alertstate="firing"}[1m])', watched.end_s)}
    reasons = {reason["code"] for reason in watched.summary["stages"][0]["verdict"]["reasons"]}
    print(fired, reasons)
    assert fired - {"KilocopyDriverLimited"} == set()
    if not reasons:
        assert fired == set()


def test_ctrl_c_in_a_stage_still_reports(served: Served) -> None:
    spec = served.with_stages("long", {"arrival": "closed", "copies": 4, "duration_s": 300, "warmup_s": 1, "ramp_s": 0.5})
    process = served.background("drive", spec)
    wait_for_requests(served, 8)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    summary = json.loads((served.folder / out.splitlines()[-1]).read_text())
    assert summary["status"] == "interrupted"
    assert summary["stages"][0]["requests"]["ok"] >= 8
    assert "interrupted" in {reason["code"] for reason in summary["stages"][0]["verdict"]["reasons"]}


def test_kill_9_of_the_driver_loses_nothing_that_was_recorded(served: Served) -> None:
    spec = served.with_stages("killed", {"arrival": "closed", "copies": 4, "duration_s": 300, "warmup_s": 1, "ramp_s": 0.5})
    process = served.background("drive", spec)
    run_dir = wait_for_requests(served, 8)
    drivers = [child for child in psutil.Process(process.pid).children(recursive=True) if "locust" in " ".join(_cmdline(child))]
    assert drivers
    for driver in drivers:
        driver.kill()
    _, err = process.communicate(timeout=90)
    assert "Traceback" not in err
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["stages"][0]["requests"]["ok"] >= 8


def test_an_engine_that_dies_in_the_middle_gives_typed_errors_and_the_run_goes_on(served: Served) -> None:
    spec = served.with_stages("dies", {"arrival": "closed", "copies": 8, "duration_s": 12, "warmup_s": 1, "ramp_s": 0.5})
    process = served.background("drive", spec)
    run_dir = wait_for_requests(served, 16)
    engines = [p for p in psutil.process_iter() if "EngineCore" in p.name() or "EngineCore" in " ".join(_cmdline(p))]
    ours = [p for p in engines if _mark(p) == (served.folder / "state" / "mark").read_text()]
    assert len(ours) == 2
    ours[0].kill()
    _, err = process.communicate(timeout=300)
    assert "Traceback" not in err
    outcomes = records.read(run_dir, "requests").column("outcome").to_pylist()
    assert set(outcomes) <= set(records.OUTCOMES)
    assert outcomes.count("ok") >= 16
    assert len(set(outcomes) - {"ok"}) >= 1
    summary = json.loads((run_dir / "summary.json").read_text())
    counted = summary["stages"][0]["requests"]
    assert counted["sent"] == counted["ok"] + sum(counted["errors"].values()) + counted["cancelled"] == len(outcomes)


def test_down_stops_everything_and_only_that(served: Served) -> None:
    """Last in this file: nothing is served after it."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    mark = (served.folder / "state" / "mark").read_text()
    assert any(_mark(process) == mark for process in psutil.process_iter())
    assert served.kilocopy("down").stdout == "stopped\n"
    assert [process for process in psutil.process_iter() if _mark(process) == mark] == []
    assert bystander.poll() is None
    bystander.kill()
    assert served.kilocopy("status").returncode == 1


def test_ctrl_c_while_serving_starts_leaves_nothing_behind(served: Served) -> None:
    environment = served.environment | {"KILOCOPY_STATE": str(served.folder / "state-stopped")}
    yaml = YAML()
    tree = yaml.load(served.spec.read_text())
    tree["cluster"]["port"] = free_port()
    path = served.folder / "stopped.yaml"
    with path.open("w") as file:
        yaml.dump(tree, file)
    command = [sys.executable, "-m", "kilocopy", "run", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=served.folder, env=environment)
    mark = served.folder / "state-stopped" / "mark"
    deadline = time.monotonic() + 60
    while not (mark.exists() and sum(_mark(child) == mark.read_text() for child in psutil.process_iter()) > 3):
        assert time.monotonic() < deadline, "Ray did not begin to start"
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert [child for child in psutil.process_iter() if _mark(child) == mark.read_text()] == []


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"no_such_argument": 1}, "Unknown engine argument: no_such_argument"),
        ({"max_model_len": 4096, "dtype": "float32", "enforce_eager": True}, "max_model_len"),
    ],
    ids=["unknown argument", "engine refuses"],
)
def test_an_engine_that_cannot_start_fails_fast_with_its_own_error(served: Served, engine: dict[str, Any], said: str) -> None:
    yaml = YAML()
    tree = yaml.load(served.spec.read_text())
    tree["cluster"] |= {"engine": engine, "replicas": 1, "port": free_port()}
    path = served.folder / "broken.yaml"
    with path.open("w") as file:
        yaml.dump(tree, file)
    state = served.folder / "state-broken"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "kilocopy", "serve", str(path)], capture_output=True, text=True, cwd=served.folder,
                          env=served.environment | {"KILOCOPY_STATE": str(state)}, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "serve.log" in done.stderr
    assert time.monotonic() - began < 200
    assert [process for process in psutil.process_iter() if _mark(process) == (state / "mark").read_text()] == []


def wait_for_requests(served: Served, count: int) -> Path:
    """The run directory of the run that just began, once it has `count` requests on disk."""
    before = set((served.folder / "runs").glob("*"))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for run_dir in set((served.folder / "runs").glob("*")) - before:
            if records.read(run_dir, "requests").num_rows >= count:
                return run_dir
        time.sleep(0.3)
    raise AssertionError("no requests recorded within 60 s")


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("KILOCOPY_SERVE_ID")
    except (psutil.Error, OSError):
        return None
