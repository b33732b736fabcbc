"""Driver workers placed by Ray: for each an actor with one CPU slot, spread over the nodes, which starts `kilocopy join` as a process of its own.

    python -m cluster.workers ADDRESS N

`kilocopy drive --join N --place ray` starts it and speaks with it in JSON lines: it says what Ray has free, is told on standard input where
the leader listens, and says where each worker is and how it ended. When standard input ends, so do the workers. Secrets come in its
environment and go on to the workers' environments over Ray's own connections; no command line has them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SECRETS = ("KILOCOPY_JOIN_TOKEN", "KILOCOPY_API_KEY")
ENDS_S = 20.0  # a worker whose leader is done sends its last records and goes
SAID_CHARS = 1000


class Worker:
    """The actor. Gevent must not share a process with Ray, so the worker is a process beside it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def where(self) -> str:
        """The address of its node."""
        from ray.util import get_node_ip_address  # noqa: PLC0415

        return str(get_node_ip_address())

    def play(self, leader: str, secrets: dict[str, str], cwd: str) -> tuple[int, str]:
        """Join the leader and stay until the worker ends; returns its exit code and what it said last."""
        records = Path(tempfile.mkdtemp(prefix="kilocopy-worker-"))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | secrets
        command = [sys.executable, "-m", "kilocopy", "join", leader, "--run", str(records)]
        there = cwd if Path(cwd).is_dir() else None  # files that the spec names are found from where the user is
        self._process = subprocess.Popen(
            command, env=environment, cwd=there, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        if self._stopped:  # between being made and being told to play
            self._process.send_signal(signal.SIGINT)
        said = self._process.communicate()[0]
        if self._process.returncode == 0:
            shutil.rmtree(records, ignore_errors=True)  # everything is at the leader's
        return self._process.returncode, said[-SAID_CHARS:]

    def stop(self) -> None:
        """Ask it to end: it closes its streams and sends its records."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)


def say(**words: Any) -> None:
    """One line for whoever started this."""
    print(json.dumps(words), flush=True)


def refusal(address: str, asked: int, free: float, total: float) -> str | None:
    """Why so many workers cannot be placed; None where they can."""
    if int(free) >= asked:
        return None
    return (
        f"--join {asked} --place ray: a worker takes a CPU slot, and the Ray at {address} has {free:g} of {total:g} free; "
        "ask for fewer, add nodes, or start workers by hand (`kilocopy join`)"
    )


def main() -> int:
    """Place the workers, and end them. Returns 0, or 2 where that cannot be done."""
    address, asked = sys.argv[1], int(sys.argv[2])
    import ray  # noqa: PLC0415

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        say(error=f"--place ray: no Ray answers at {address} ({said}); `ray status` on its head says whether it runs")
        return 2
    refused = refusal(address, asked, ray.available_resources().get("CPU", 0.0), ray.cluster_resources().get("CPU", 0.0))
    if refused:
        say(error=refused)
        return 2
    say(here=ray.util.get_node_ip_address(), nodes=sum(node["Alive"] for node in ray.nodes()))
    told = sys.stdin.readline()
    if told:
        _play(asked, json.loads(told)["leader"])
    ray.shutdown()
    return 0


def _play(asked: int, leader: str) -> None:
    """Start the workers, say how each ends, and end what is left when standard input does."""
    import ray  # noqa: PLC0415

    from cluster.workers import Worker  # noqa: PLC0415  by name: this file runs as __main__, which nodes do not have

    made = ray.remote(Worker).options(num_cpus=1, scheduling_strategy="SPREAD", max_concurrency=2)
    workers = [made.remote() for _ in range(asked)]
    secrets = {name: os.environ[name] for name in SECRETS if os.environ.get(name)}
    placing = {worker.where.remote(): worker for worker in workers}
    playing = {worker.play.remote(leader, secrets, os.getcwd()): worker for worker in workers}
    over = threading.Event()

    def until_the_end() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=until_the_end, daemon=True).start()
    places: dict[Any, str] = {}
    ends_s = None
    while playing:
        for done in ray.wait([*placing, *playing], num_returns=1, timeout=0.5)[0]:
            try:
                answer, lost = ray.get(done), ""
            except ray.exceptions.RayError as error:
                answer, lost = None, str(error).strip().splitlines()[0]
            if worker := placing.pop(done, None):
                places[worker] = str(answer)
                if not placing:
                    say(placed=sorted(places.values()))
            elif worker := playing.pop(done, None):
                code, said = answer or (1, lost)
                say(ended=places.get(worker, "a node"), code=code, said=said)
        if over.is_set() and ends_s is None:
            ends_s = time.monotonic() + ENDS_S
        if ends_s is not None and time.monotonic() > ends_s:
            for worker in playing.values():
                worker.stop.remote()
            ray.wait(list(playing), num_returns=len(playing), timeout=ENDS_S)
            return


if __name__ == "__main__":
    sys.exit(main())
