"""`kilocopy watch`: a live picture of the run that is going on, from the means that this machine has.

Docker with compose, else `prometheus` and `grafana` from the PATH, else the terminal. All read the same pages by the same generated
configuration (kilocopy/provision.py). What is started listens on loopback, keeps its data in the run directory, and ends with this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live as RichLive

from kilocopy import ongoing, viewers
from kilocopy.live import Live
from kilocopy.ongoing import Ongoing
from kilocopy.problem import ProblemError
from kilocopy.screen import Screen

STEP_S = 2.0
PLAIN_EVERY_S = 10.0
NICE = 10  # whoever watches shall not slow down what is watched


@contextlib.contextmanager
def beside(runs: Path) -> Iterator[None]:
    """`kilocopy watch --quiet` in a process of its own for the time of a `with` block; the run goes on whatever becomes of it."""
    command = [sys.executable, "-m", "kilocopy", "watch", "--quiet", "--runs", str(runs)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(3 * viewers.STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


def watch(
    run_dir: Path | None, runs: Path, *, terminal: bool, prometheus_port: int | None, grafana_port: int | None, quiet: bool = False
) -> None:
    """Watch a run until it has ended (in the terminal), or until Ctrl-C; `quiet` says the addresses alone. Raises ProblemError."""
    console = Console(highlight=False)
    os.nice(NICE)
    with contextlib.suppress(KeyboardInterrupt):  # the way to end this
        waiting = f"no run is going on in {runs}; waiting for one (Ctrl-C ends)"
        run = Ongoing(run_dir) if run_dir else ongoing.wait(runs, lambda: None if quiet else console.print(waiting))
        while quiet and run_dir is None:
            run = _show_until_the_next(run, runs, console, prometheus_port, grafana_port)
        ended = run.ended()
        if ended and (terminal or not viewers.recorded(run)):
            raise ProblemError(
                f"{run.run_dir}: has ended ({ended}), and its live metrics are gone; `kilocopy report {run.run_dir}` says how it was"
            )
        with contextlib.nullcontext(()) if terminal else viewers.start(run, prometheus_port, grafana_port) as addresses:
            for address in addresses:
                console.print(address, soft_wrap=True)
            if not ended and not quiet:
                _follow(run, console, addresses)
            if addresses and not quiet:
                again = f"`kilocopy watch {run.run_dir}` brings it back"
                console.print(f"What was recorded can be looked at until Ctrl-C; {again}.", soft_wrap=True)
            while addresses:
                time.sleep(1)


def _show_until_the_next(run: Ongoing, runs: Path, console: Console, prometheus_port: int | None, grafana_port: int | None) -> Ongoing:
    """Prometheus and Grafana for a run until another begins, as an experiment's parts do one after the other; returns that one. Raises ProblemError."""
    with viewers.start(run, prometheus_port, grafana_port) as addresses:
        for address in addresses or ["watch  no Prometheus and no docker here: `kilocopy watch` in another terminal shows the run"]:
            console.print(address, soft_wrap=True)
        while (found := ongoing.newest(runs)) is None or found.run_dir == run.run_dir:
            time.sleep(1)
    return found


def _follow(run: Ongoing, console: Console, addresses: tuple[str, ...]) -> None:
    """Show the run in the terminal until it has ended; its last picture stays there."""
    live = Live(run.run_dir)
    screen = Screen(live, run, addresses)
    try:
        if console.is_terminal:
            with RichLive(console=console, screen=True, auto_refresh=False) as shown:
                for _ in _steps(run, live):
                    shown.update(screen.draw(console.width, console.height), refresh=True)
        else:
            for number, _ in enumerate(_steps(run, live)):
                if number % round(PLAIN_EVERY_S / STEP_S) == 0:
                    console.print(screen.sentence(), soft_wrap=True)
    finally:
        live.close()
        if sys.exc_info()[0] in {None, KeyboardInterrupt}:
            console.print(screen.draw(console.width, 10_000, run.ended()))
    console.print(f"{run.run_dir}: ended ({run.ended()}); its report: {run.run_dir / 'report.html'}", soft_wrap=True)


def _steps(run: Ongoing, live: Live) -> Iterator[None]:
    """Every STEP_S after a look at the pages, until the run has ended; then its last moment is what `live` tells."""
    due_s = time.monotonic()
    while run.ended() is None:
        live.step(time.monotonic())
        if run.ended() is not None:
            live.back()
            return
        yield
        due_s = max(due_s + STEP_S, time.monotonic())
        time.sleep(max(0.0, due_s - time.monotonic()))
