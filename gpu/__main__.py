"""The command line of `make gpu`: measures what is missing, then collects everything into results.json and results.md.

    python -m gpu [--out runs/gpu] [--part NAME ...] [--within S] [--again] [--rehearse] [--collect] [--list]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from gpu import plan, table
from gpu.results import Results
from gpu.session import ERR, Session, alone, need_gpu
from kilocopy.problem import ProblemError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 everything asked for is measured, 1 something failed, 2 a mistake said in a sentence, 3 time ran out, 130 interrupted."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        return _run(_parser().parse_args(argv))
    except ProblemError as problem:
        print(f"gpu: {problem}", file=sys.stderr)
        return problem.code
    except KeyboardInterrupt:
        print("gpu: interrupted; what was measured is kept, the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpu", description="Measure one GPU host whole; what was measured is kept, a second call goes on.")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/gpu, rehearsing runs/rehearsal)")
    parser.add_argument("--part", action="append", default=[], metavar="NAME", help="only this unit or group; may be repeated (--list names them)")
    parser.add_argument("--within", type=float, metavar="S", help="start nothing that would not end within so many seconds")
    parser.add_argument("--again", action="store_true", help="measure also what was measured")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU: the same parts, small; its figures mean nothing")
    parser.add_argument("--collect", action="store_true", help="only write results.json and results.md from what is there")
    parser.add_argument("--list", action="store_true", help="only list the units, with about how long each takes and whether it is measured")
    return parser


def _run(asked: argparse.Namespace) -> int:
    if asked.within is not None and not asked.within > 0:
        raise ProblemError(f"--within: must be a number of seconds over 0, got {asked.within:g}")
    groups = plan.chosen(plan.groups(rehearse=asked.rehearse, cores=len(os.sched_getaffinity(0))), asked.part)
    results = Results(asked.out or Path("runs/rehearsal" if asked.rehearse else "runs/gpu"))
    if asked.list:
        for group in groups:
            for unit in group.units:
                state = "measured" if results.done(unit.name, unit.key) else "missing"
                print(f"{unit.name:<12} {state:<9} about {unit.length_s:.0f} s, after {group.start_s:.0f} s of starting")
        return 0
    if asked.collect:
        return _collect(results, rehearsed=asked.rehearse)
    if not asked.rehearse:
        need_gpu()
    with alone(results.folder):
        session = Session(results, within_s=asked.within, again=asked.again)
        try:
            session.work(groups)
        finally:
            _collect(results, rehearsed=asked.rehearse)
    if session.failed:
        return 1
    return 3 if session.left_out else 0


def _collect(results: Results, *, rehearsed: bool) -> int:
    path = table.collect(results, rehearsed=rehearsed)
    ERR.print(f"[bold]gpu[/]  {path} and {path.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
