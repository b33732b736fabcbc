"""Workers that Ray places: starts cluster/workers.py beside the leader, follows its words, and ends it with the drive.

kilocopy does not import Ray. What is started joins the Ray of what is served here, or that of RAY_ADDRESS, and has the join token in its environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from kilocopy import manifest
from kilocopy.problem import ProblemError
from kilocopy.receiving import TOKEN

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
ENDS_S = 60.0


class Placer:
    """A `with` block in which Ray holds `workers` driver workers, once `start` was called. Raises ProblemError where Ray has not so many CPU slots."""

    def __init__(self, address: str, workers: int, token: str) -> None:
        self._workers = workers
        environment = os.environ | {TOKEN: token, "PYTHONPATH": manifest.search_path()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.workers", address, str(workers)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        self._say: Callable[[str], None] = lambda _: None
        self._ended: list[dict[str, Any]] = []

    def __enter__(self) -> Placer:
        try:
            here = self._line()
            if here is None or "error" in here:
                raise ProblemError((here or {}).get("error") or f"--place ray: Ray could not be asked (exit code {self._process.wait()})")
        except BaseException:
            self._end()
            raise
        self.here, self.nodes = str(here["here"]), int(here["nodes"])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def bind(self) -> tuple[str, int]:
        """Where the leader should listen: on this node's address in Ray, and on loopback where Ray has no other node."""
        return ("127.0.0.1" if self.nodes == 1 else self.here), 0

    def reached(self, url: str) -> str:
        """The servers' address as every node reaches it: loopback is another host on each."""
        parts = urlsplit(url)
        if self.nodes == 1 or parts.hostname not in LOOPBACK:
            return url
        return urlunsplit(parts._replace(netloc=f"{self.here}:{parts.port}" if parts.port else self.here))

    def start(self, leader: str, say: Callable[[str], None]) -> None:
        """Have Ray place the workers, which join the leader at HOST:PORT."""
        self._say = say
        assert self._process.stdin is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):  # `check` says why
            self._process.stdin.write(json.dumps({"leader": leader}) + "\n")
            self._process.stdin.flush()
        threading.Thread(target=self._follow, name="placer", daemon=True).start()

    def check(self) -> None:
        """Raises ProblemError where a worker ended before the run began."""
        for ended in self._ended:
            said = str(ended["said"]).strip().splitlines() or ["no word"]
            raise ProblemError(f"the worker that Ray placed on {ended['ended']} ended with exit code {ended['code']}: {said[-1].removeprefix('kilocopy: ')}")
        if self._process.poll() is not None:
            raise ProblemError(f"--place ray: what places the workers ended with exit code {self._process.returncode}")

    def _line(self) -> dict[str, Any] | None:
        """The next of its words; None where there is none more."""
        assert self._process.stdout is not None  # noqa: S101
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict):
                    return said
        return None

    def _follow(self) -> None:
        while (said := self._line()) is not None:
            if "placed" in said:
                nodes = Counter(said["placed"])
                self._say(f"Ray placed {self._workers} workers on {', '.join(f'{node} ({nodes[node]})' for node in sorted(nodes))}")
            elif "ended" in said:
                self._ended.append(said)

    def _end(self) -> None:
        """Its standard input ends, and with it the workers; where it does not end, it is ended."""
        assert self._process.stdin is not None  # noqa: S101
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
