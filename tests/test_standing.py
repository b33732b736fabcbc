"""`kilocopy status`: each node as it is, from two readings of its pages."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kilocopy import standing
from kilocopy.spec import Spec
from tests.synthetic import spec

PAGE = (
    'ray_vllm_generation_tokens_total{{NodeAddress="10.0.0.{node}",ReplicaId="{replica}",engine="0"}} {made}\n'
    'ray_vllm_num_requests_running{{NodeAddress="10.0.0.{node}",ReplicaId="{replica}",engine="0"}} {running}\n'
)


class Pages(http.server.BaseHTTPRequestHandler):
    """Two replicas on node 1, one on node 2; each reading finds 100 tokens more for each running sequence."""

    readings = 0
    running: tuple[int, ...] = (1, 1, 2)

    def do_GET(self) -> None:
        Pages.readings += 1
        self.send_response(200)
        self.end_headers()
        for number, (node, running) in enumerate(zip((1, 1, 2), Pages.running, strict=True)):
            self.wfile.write(PAGE.format(node=node, replica=f"r{number}", made=100 * running * Pages.readings, running=running).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[str]:
    Pages.readings, Pages.running = 0, (1, 1, 2)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()


def state(*pages: str) -> dict[str, Any]:
    fleet = [{"replica": f"r{n}", "node": node, "state": "RUNNING"} for n, node in enumerate(("10.0.0.1", "10.0.0.1", "10.0.0.2"))]
    return {"metrics": list(pages), "fleet": [*fleet, {"replica": "r3", "node": None, "state": "STARTING"}]}


def test_copies_tokens_and_pages_by_node_and_gpu(page: str) -> None:
    found = standing.nodes(state(page), Spec.model_validate(spec()), 0.5)
    first, second = found["nodes"]
    assert [(row["node"], row["replicas"], row["gpus"], row["copies"]) for row in (first, second)] == [
        ("10.0.0.1", {"RUNNING": 2}, 2, 2), ("10.0.0.2", {"RUNNING": 1}, 1, 2),
    ]  # fmt: skip
    assert found["rate_over_s"] >= 0.5
    assert first["output_tokens_per_s"] == second["output_tokens_per_s"] == pytest.approx(200 / found["rate_over_s"])
    assert second["output_tokens_per_s_per_gpu"] == 2 * first["output_tokens_per_s_per_gpu"]
    assert first["pages_per_hour"] == pytest.approx(first["output_tokens_per_s"] * 0.75 / 500 * 3600)
    assert found["balance"].startswith("even")  # 2 against a mean of 4/3 is less than a copy more
    assert any(line.startswith("10.0.0.2") for line in standing.table(found))


def test_an_uneven_router_and_a_silent_page_are_said(page: str) -> None:
    Pages.running = (1, 1, 10)
    found = standing.nodes(state(page, "http://127.0.0.1:9/metrics"), Spec.model_validate(spec()), 0)
    assert found["balance"].startswith("uneven: the busiest of 3 replicas (r2) holds 10 copies, 2.50 times the mean")
    assert found["unread"] == ["http://127.0.0.1:9/metrics"]


def test_where_nothing_runs_it_answers_at_once(page: str) -> None:
    Pages.running = (0, 0, 0)
    found = standing.nodes(state(page), Spec.model_validate(spec()), 60)
    assert (Pages.readings, found["balance"]) == (1, None)
