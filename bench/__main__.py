"""`make bench`: how many streams does one core read honestly? kilocopy's driver, a loop in C, and other load generators in one run.

Everything is measured against the same server with known times (bench/server.c), one core for it and one for the client. See
docs/benchmark.md for the definitions.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit

from bench import clients, priority, rows
from bench.clients import PEERS, NotRunError
from bench.levels import Level, honest_streams
from bench.truth import BUILT, NoCompilerError, Schedule, cores, server
from kilocopy import manifest

LEVELS = (50, 100, 200, 400, 800, 1280, 1600, 2400, 3200)
PEER_LEVELS = (50, 100, 200, 400)
EXPORT_STREAMS = 1000
ROWS, ROWS_QUICK, ROWS_PLAIN = 10_000_000, 1_000_000, 100_000  # requests of the report that is timed, and of the one that is checked
MISSES_MAX = 2  # a client that was dishonest at so many levels in a row is not asked for more
OUT = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # a file or a pipe has no width of its own


def play(
    name: str, client: Callable[..., Level], levels: Sequence[int], schedule: Schedule, window_s: float, tries: int = 1
) -> list[Level]:
    """One client through the levels; what cannot be run is said and left out. A void level is played again, up to `tries` times in all:
    whether it is depends on the server's lateness alone, and every try is printed."""
    found: list[Level] = []
    mine, servers = cores()
    missed = 0
    for streams in levels:
        try:
            for left in reversed(range(tries)):
                with server(schedule, servers) as running:
                    level = client(running, schedule, streams, window_s, mine)
                if not level.void or not left:
                    break
                OUT.print(_line(level), soft_wrap=True)
                clients.settle()
        except (NotRunError, subprocess.SubprocessError, KeyError, OSError) as error:
            OUT.print(f"[yellow]{name}[/] at {streams} streams: not run: {type(error).__name__}: {error}")
            break
        found.append(level)
        OUT.print(_line(level), soft_wrap=True)
        missed = 0 if level.honest or level.void else missed + 1
        if missed >= MISSES_MAX and name not in {"kilocopy", "loop in C"}:
            break
        clients.settle()
    return found


def _line(level: Level) -> str:
    cpu = "" if level.cpu_s_per_event is None else f", {1e6 * level.cpu_s_per_event:.1f} us CPU an event"
    waited = (
        ""
        if level.server_waited_s is None
        else f" (p99 {1e3 * level.server_late_p99_s:.2f} ms; others had its core for {level.server_waited_s:.2f} s)"
    )
    said = f"void: the server was late{waited}" if level.void else "honest" if level.honest else "not honest"
    ttft_ms, itl_ms = 1e3 * (level.ttft_p50_s - level.true_ttft_p50_s), 1e3 * (level.itl_p50_s - level.true_itl_p50_s)
    share = 100 * level.events_per_s / level.ideal_events_per_s
    return f"{level.client:24} {level.streams:5} streams: {share:5.1f} % of the events, TTFT {ttft_ms:+.2f} ms, ITL {itl_ms:+.3f} ms{cpu}: {said}"


def show(found: dict[str, list[Level]]) -> None:
    """Every level of every client, then the answer."""
    table = Table(
        "client",
        "streams",
        "events/s",
        "of ideal",
        "us CPU/event",
        "TTFT error p50/p99 ms",
        "ITL error p50/p99 ms",
        "MiB",
        "server late p99 ms",
        "",
    )
    for levels in found.values():
        for level in levels:
            errors = [
                f"{1e3 * (level.ttft_p50_s - level.true_ttft_p50_s):+.2f}/{1e3 * (level.ttft_p99_s - level.true_ttft_p99_s):+.2f}",
                f"{1e3 * (level.itl_p50_s - level.true_itl_p50_s):+.3f}/"
                + ("-" if level.itl_p99_s is None else f"{1e3 * (level.itl_p99_s - level.true_itl_p99_s):+.2f}"),
            ]
            table.add_row(
                level.client, f"{level.streams:,}", f"{level.events_per_s:,.0f}", f"{100 * level.events_per_s / level.ideal_events_per_s:.1f} %",
                "-" if level.cpu_s_per_event is None else f"{1e6 * level.cpu_s_per_event:.1f}", *errors,
                "-" if level.rss_bytes is None else f"{level.rss_bytes / 2**20:.0f}", f"{1e3 * level.server_late_p99_s:.2f}",
                "void" if level.void else "honest" if level.honest else "not honest",
            )  # fmt: skip
    OUT.print(table)
    for name, levels in found.items():
        if levels:
            OUT.print(f"{name}: honest streams per core: {honest_streams(levels) or f'fewer than {levels[0].streams}'}")
    _against_floor(found)


def _against_floor(found: dict[str, list[Level]]) -> None:
    floor = {level.streams: level for level in found.get("loop in C", [])}
    for level in found.get("kilocopy", []):
        beside = floor.get(level.streams)
        if beside and beside.cpu_s_per_event and level.cpu_s_per_event:
            ratio = level.cpu_s_per_event / beside.cpu_s_per_event
            OUT.print(f"kilocopy / loop in C, CPU per event at {level.streams} streams: {ratio:.2f}")


def scaling(schedule: Schedule, window_s: float, streams: int) -> list[Level]:
    """One worker with `streams`, two workers with twice as many, on all cores: what do two read that one does not?"""
    found = []
    for workers in (1, 2):
        with server(schedule, None) as running:
            level = clients.kilocopy(running, schedule, workers * streams, window_s, None, workers=workers)
        found.append(level)
        OUT.print(_line(level), soft_wrap=True)
        clients.settle()
    OUT.print(f"events/s of two workers over one: {found[1].events_per_s / found[0].events_per_s:.2f}")
    return found


def exporting(schedule: Schedule, window_s: float, streams: int, pairs: int) -> list[Level]:
    """The driver with its metrics page, read once a second, and without: pairs in turn, which goes first alternates. What is the page's share
    of its CPU? A void level leaves its pair out of the answer."""
    mine, servers = cores()
    found, shares = [], []
    for pair in range(pairs):
        cost: dict[bool, float] = {}
        for watched in (pair % 2 == 0, pair % 2 == 1):
            with server(schedule, servers) as running:
                level = clients.kilocopy(running, schedule, streams, window_s, mine, watched=watched)
            level = replace(level, client=f"metrics {'on' if watched else 'off'}")
            found.append(level)
            OUT.print(_line(level), soft_wrap=True)
            if level.cpu_s_per_event and not level.void:
                cost[watched] = level.cpu_s_per_event
            clients.settle()
        if len(cost) == 2:
            shares.append(cost[True] / cost[False] - 1)
            OUT.print(f"pair {pair + 1}: metrics cost {100 * shares[-1]:+.2f} % of the CPU without them")
    OUT.print(f"{len(shares)} pairs: {told_share(shares)}")
    return found


def told_share(shares: Sequence[float]) -> str:
    """The mean of pairs with Student's 95 % interval, as far as there are two."""
    if len(shares) < 2:
        return "too few that count"
    half = float(stdtrit(len(shares) - 1, 0.975)) * stdev(shares) / len(shares) ** 0.5
    return f"metrics cost {100 * fmean(shares):+.2f} % [{100 * (fmean(shares) - half):+.2f} – {100 * (fmean(shares) + half):+.2f}] of the driver's CPU"


def soak(seconds: float) -> None:
    """Many short streams for long: does the driver's memory grow with the requests done? Their number stands for hours."""
    schedule = Schedule(tokens=10)
    mine, servers = cores()
    with server(schedule, servers) as running:
        seen = clients.soak(running, schedule, 200, seconds, mine)
    seen = seen[len(seen) // 10 :]  # the first tenth fills buffers
    (first, before), (last, after) = seen[0], seen[-1]
    OUT.print(f"{last:,} requests; from request {first:,} on resident memory went from {before / 2**20:.1f} to {after / 2**20:.1f} MiB,")
    OUT.print(f"{(after - before) / max(last - first, 1):+.2f} bytes a request; highest {max(rss for _, rss in seen) / 2**20:.1f} MiB")


def report_of(count: int) -> None:
    """So many generated requests, summarised: seconds and peak memory beside the goal for ten million."""
    with tempfile.TemporaryDirectory(prefix="kilocopy-rows-") as folder:
        apart = rows.plainly(rows.generate(Path(folder) / "few", min(count, ROWS_PLAIN)))
        seconds, peak, sent, verdicts = rows.measure(rows.generate(Path(folder) / "run", count))
    OUT.print(f"report of {sent:,} requests, {rows.TOKENS} tokens each, {rows.STAGES} stages ({', '.join(verdicts)}): {seconds:.1f} s,")
    OUT.print(f"{peak / 2**30:.2f} GiB at most; per million {1e6 * seconds / sent:.2f} s. Goal: 10 million under 30 s and 2 GB on 2 cores.")
    OUT.print(f"the same figures of {min(count, ROWS_PLAIN):,} requests, row by row in plain Python: {apart:.1e} apart at most, relative")


def main() -> None:
    """Parse, run, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--levels", default=",".join(map(str, LEVELS)), help="streams, comma separated")
    parser.add_argument("--peers", default="all", help=f"all, none, or some of {','.join(PEERS)}")
    parser.add_argument("--window", type=float, default=10, metavar="S", help="seconds that count, of each level")
    parser.add_argument("--tries", type=int, default=3, metavar="N", help="a void level is played so often at most")
    parser.add_argument("--quick", action="store_true", help="a minute: two levels, no peers")
    parser.add_argument("--scaling", type=int, metavar="STREAMS", help="only this: two workers of STREAMS each beside one")
    parser.add_argument("--export", type=int, metavar="PAIRS", help=f"only this: the driver at {EXPORT_STREAMS:,} streams with its metrics page read and without")
    parser.add_argument("--rows", type=float, metavar="N", help="only this: the report of so many generated requests, its time and memory")
    parser.add_argument("--soak", type=float, metavar="S", help="only this: 200 short streams for so long, and the driver's memory")
    asked = parser.parse_args()
    if asked.rows:
        report_of(int(asked.rows))
        return
    levels = [200, 800] if asked.quick else [int(level) for level in asked.levels.split(",")]
    peers = [] if asked.quick or asked.peers == "none" else list(PEERS) if asked.peers == "all" else asked.peers.split(",")
    schedule = Schedule()
    where = manifest.hardware()
    OUT.print(
        f"{where['cpu']}, {where['cores']} cores, {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC; TTFT 50 ms, ITL 20 ms, 100 tokens a stream"
    )
    if None in cores():
        OUT.print("[yellow]one core only: client and server share it, and no figure here says much[/]")
    try:
        if asked.soak:
            soak(asked.soak)
            return
        if asked.export:
            found = {"export": exporting(schedule, asked.window, EXPORT_STREAMS, asked.export)}
        elif asked.scaling:
            found = {"scaling": scaling(schedule, asked.window, asked.scaling)}
        else:
            found = {"loop in C": play("loop in C", clients.floor, levels, schedule, asked.window, asked.tries)}
            found["kilocopy"] = play("kilocopy", clients.kilocopy, levels, schedule, asked.window, asked.tries)
            for name in peers:
                found[name] = play(
                    name, PEERS[name], [level for level in levels if level in PEER_LEVELS], schedule, asked.window, asked.tries
                )
            show(found)
    except NoCompilerError as error:
        sys.exit(str(error))
    path = BUILT / f"results/{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}_{platform.node()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: [level.as_json() for level in part] for name, part in found.items()}
    path.write_text(json.dumps({"hardware": where, "versions": manifest.versions(), "levels": kept}, indent=1) + "\n", encoding="utf-8")
    OUT.print(f"kept in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    if "kilocopy" in found and (asked.quick or peers):  # after what was measured is kept: it takes memory and a disk
        report_of(ROWS_QUICK if asked.quick else ROWS)


if __name__ == "__main__":
    with priority.first() as granted:
        if not granted:
            OUT.print("[yellow]no priority over the machine's other processes (needs root and autogroups): run on an idle machine[/]")
        main()
