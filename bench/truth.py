"""The ground-truth server (server.c) and the loop in C (floor.c): compiled on demand, started, asked for what is true."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUILT = HERE.parent / ".cache/bench"


class NoCompilerError(RuntimeError):
    """The benchmark's server is in C, and there is no compiler."""


def build(name: str) -> Path:
    """The program of bench/<name>.c, compiled anew where the source is newer. Raises NoCompilerError, CalledProcessError."""
    source, program = HERE / f"{name}.c", BUILT / name
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoCompilerError("bench: its server is a small C program, and this machine has no C compiler (cc); install one")
    BUILT.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, "-O2", "-Wall", "-o", str(program), str(source)], check=True)
    return program


def pinned(core: int | None) -> list[str]:
    """The words before a command that keep it on one core; none where there is no such core to keep it on."""
    return [] if core is None else ["taskset", "-c", str(core)]


@dataclass(frozen=True)
class Schedule:
    """What every stream of the server is: the first event TTFT after the request, the others ITL apart."""

    ttft_s: float = 0.05
    itl_s: float = 0.02
    tokens: int = 100

    @property
    def stream_s(self) -> float:
        """From the request to the last event."""
        return self.ttft_s + (self.tokens - 1) * self.itl_s

    def ideal_events_per_s(self, streams: int) -> float:
        """Events a second of closed-loop streams whose client loses no time: tokens over the time of a stream, which the next follows."""
        return streams * self.tokens / self.stream_s


class Server:
    """The server while it runs."""

    def __init__(self, port: int, process: subprocess.Popen[str]) -> None:
        self.url, self.port, self.process = f"http://127.0.0.1:{port}", port, process

    def truth(self) -> dict[str, Any]:
        """What was sent since the last reset: events, streams, lateness, TTFT and ITL as handed to the kernel, microseconds."""
        with urllib.request.urlopen(f"{self.url}/truth", timeout=10) as answer:
            return dict(json.load(answer))

    def reset(self) -> None:
        """Begin a new count."""
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/reset", method="POST"), timeout=10).close()


@contextmanager
def server(schedule: Schedule, core: int | None = None) -> Iterator[Server]:
    """Serve a schedule on a free port of loopback for the time of a `with` block, on one core where one is named.

    Without a core of its own it goes before whoever has the core that it needs (SCHED_FIFO, where this user may): a server that waits
    for its clients' turn would be late by their doing, and they would look punctual.
    """
    times_us = [str(round(schedule.ttft_s * 1e6)), str(round(schedule.itl_s * 1e6))]
    command = [*pinned(core), str(build("server")), "0", *times_us, str(schedule.tokens), *(["own"] if core is not None else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None  # noqa: S101
    if core is None:
        with suppress(OSError):
            os.sched_setscheduler(process.pid, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield Server(int(process.stdout.readline()), process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def cores() -> tuple[int | None, int | None]:
    """A core for the client and one for the server; (None, None) where there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 and shutil.which("taskset") else (None, None)
