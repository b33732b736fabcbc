"""The scraper keeps what counts from both exporters' pages, and a dead server costs no run."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kilocopy import records
from kilocopy.scrape import Scraper, samples, write_targets

RAY = b"""# HELP ray_vllm_generation_tokens_total Number of generation tokens processed.
# TYPE ray_vllm_generation_tokens_total counter
ray_vllm_generation_tokens_total{Component="core_worker",NodeAddress="10.0.0.1",ReplicaId="27c3q7ik",engine="0",model_name="m"} 68.0
ray_vllm_generation_tokens_total{Component="core_worker",NodeAddress="10.0.0.1",ReplicaId="qmjpkszb",engine="0",model_name="m"} 84.0
ray_vllm_request_generation_tokens_sum{ReplicaId="x"} 999.0
ray_serve_num_router_requests_total{ReplicaId="x"} 5.0
"""
VLLM = b'vllm:num_requests_running{engine="0",model_name="m"} 7.0\nvllm:generation_tokens_total{engine="0",model_name="m"} 11.0'


def test_both_exporters_come_under_one_name() -> None:
    ray = samples(RAY)
    assert [(name, labels["ReplicaId"], value) for name, labels, value in ray] == [
        ("generation_tokens_total", "27c3q7ik", 68.0),
        ("generation_tokens_total", "qmjpkszb", 84.0),
    ]
    assert "Component" not in ray[0][1]
    assert sorted((name, value) for name, _, value in samples(VLLM)) == [("generation_tokens_total", 11.0), ("num_requests_running", 7.0)]


@pytest.fixture
def page() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(RAY)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()


def test_scraped_rows_have_a_zero_point_and_an_end(tmp_path: Path, page: str) -> None:
    before = time.perf_counter_ns()
    with Scraper(tmp_path, [page], interval_s=60) as scraper:
        inside = time.perf_counter_ns()
    table = records.read(tmp_path, "server")
    times = sorted(set(table.column("time_ns").to_pylist()))
    assert len(times) == 2
    assert before < times[0] < inside < times[1]
    assert table.num_rows == 4
    assert scraper.failures == {}


def test_a_target_that_is_gone_is_counted_not_fatal(tmp_path: Path) -> None:
    with Scraper(tmp_path, ["http://127.0.0.1:9/metrics"], interval_s=60) as scraper:
        pass
    assert list(scraper.failures) == ["http://127.0.0.1:9/metrics"]
    assert records.read(tmp_path, "server").num_rows == 0


def test_without_targets_nothing_is_written(tmp_path: Path) -> None:
    with Scraper(tmp_path, []):
        pass
    assert not (tmp_path / "server").exists()


def test_prometheus_finds_the_servers_pages(tmp_path: Path) -> None:
    """As file_sd wants them: an address of its own, the scheme and the path as labels; user and password are in no file."""
    write_targets(tmp_path, ["http://127.0.0.1:8080/metrics", "https://u:secret@host/v1/metrics"], "smoke", "demo")
    groups = json.loads((tmp_path / "targets" / "servers.json").read_text())
    labels = {"job": "servers", "cluster": "smoke", "model": "demo"}
    assert groups == [
        {"targets": ["127.0.0.1:8080"], "labels": labels | {"__scheme__": "http", "__metrics_path__": "/metrics"}},
        {"targets": ["host"], "labels": labels | {"__scheme__": "https", "__metrics_path__": "/v1/metrics"}},
    ]


@pytest.fixture
def silent() -> Iterator[str]:
    """A page that takes connections and never answers, as that of a node whose power has gone."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/metrics"


@pytest.mark.alone
def test_a_silent_page_keeps_no_other_waiting(tmp_path: Path, page: str, silent: str) -> None:
    with Scraper(tmp_path, [silent, page], interval_s=0.1):
        until_s = time.monotonic() + 4  # a page is missed after 5 s
        while time.monotonic() < until_s and len(set(records.read(tmp_path, "server").column("time_ns").to_pylist())) < 8:
            time.sleep(0.05)
        seen = len(set(records.read(tmp_path, "server").column("time_ns").to_pylist()))
    assert seen >= 8


def test_the_fleet_is_followed_and_its_changes_are_events(tmp_path: Path, page: str) -> None:
    def running(**fleet: str) -> dict[str, object]:
        held = [{"replica": name, "node": node, "state": "RUNNING"} for name, node in fleet.items()]
        return {"alive": True, "name": "s", "model": "m", "metrics": [page], "fleet": held, "routers": [one | {"replica": f"router-{len(held)}"} for one in held[:1]]}

    other = "http://10.255.0.2:1/metrics"
    two = running(a="127.0.0.1", b="10.255.0.2")
    states = iter([two | {"metrics": [page, other]}, running(a="127.0.0.1"), running(a="127.0.0.1", c="127.0.0.1")])
    last: dict[str, object] = {}

    def look() -> dict[str, object]:
        last.update(next(states, last))
        return dict(last)

    with Scraper(tmp_path, [page], interval_s=0.05, look=look):
        until_s = time.monotonic() + 20
        while time.monotonic() < until_s and len(records.read_events(tmp_path)) < 7:
            time.sleep(0.05)
    events = [(event["event"], event.get("replica") or event.get("router"), event["node"]) for event in records.read_events(tmp_path)]
    assert [event for event in events if "router" not in event[0]] == [
        ("node_lost", None, "10.255.0.2"), ("replica_lost", "b", "10.255.0.2"), ("replica_running", "c", "127.0.0.1")
    ]  # fmt: skip
    assert [(event, router) for event, router, _ in events if "router" in event] == [
        ("router_lost", "router-2"), ("router_running", "router-1"), ("router_lost", "router-1"), ("router_running", "router-2")
    ]  # fmt: skip
    assert json.loads((tmp_path / "targets" / "servers.json").read_text())[0]["targets"] == [page.removeprefix("http://").removesuffix("/metrics")]
