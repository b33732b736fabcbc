"""A run that is going on, by its directory alone: which one, how far it is, and whether it has ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilocopy import schedule
from kilocopy.problem import ProblemError
from kilocopy.spec import Spec

SILENT_S = 20.0  # a driver writes each second; one that has not for so long is gone
STARTS_S = 120.0  # from the manifest to the driver's first record, at the worst
POLL_S = 0.5


class Ongoing:
    """A run directory that is being written. Nothing here reads its records: it stays as quick at the end as at the start."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        path = run_dir / "manifest.json"
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.spec = Spec.model_validate(self.manifest["spec"])
        except FileNotFoundError:
            raise ProblemError(f"{run_dir}: no run directory (it has no manifest.json); name one, or leave it out for the newest") from None
        except (OSError, ValueError, KeyError) as error:
            raise ProblemError(f"{path}: cannot be read ({str(error).splitlines()[0]}); was it written by this version?") from None
        self.id = run_dir.resolve().name

    def ended(self) -> str | None:
        """Why it is over: `complete`, `interrupted`, or `silent` where its driver no longer writes; None while it goes on."""
        leader = self.run_dir / "events" / "master.jsonl"
        if not leader.exists():
            leader = self.run_dir / "events" / "worker0.jsonl"
        for event in reversed(_events(leader)):
            if event.get("event") == "run_end":
                return str(event.get("reason"))
        written = list(self.run_dir.glob("driver/*.arrow"))
        newest = max((path.stat().st_mtime for path in (*written, self.run_dir / "manifest.json")), default=0.0)
        return "silent" if time.time() - newest > (SILENT_S if written else STARTS_S) else None

    def stage_left_s(self, stage: int, level: int) -> float | None:
        """Seconds until a stage stops asking; None where its length is not known beforehand, or it has not begun."""
        length_s = schedule.length_s(self.spec.stages[stage]) if stage < len(self.spec.stages) else None
        begun = [
            event["wall_ns"] / 1e9
            for path in (self.run_dir / "events").glob("worker*.jsonl")
            for event in _events(path)
            if event.get("event") == "stage_start" and (event.get("stage"), event.get("level")) == (stage, level)
        ]
        return max(0.0, min(begun) + length_s - time.time()) if length_s is not None and begun else None

    def left_s(self, stage: int, level: int) -> float | None:
        """Seconds of asking until the run's end, without the pauses between stages; None where a stage has no fixed length."""
        ahead = [schedule.length_s(each) for each in self.spec.stages[stage + 1 :]]
        here = self.stage_left_s(stage, level)
        return None if here is None or None in ahead else here + sum(length for length in ahead if length is not None)


def _events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an event file that may be being written."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def newest(runs: Path) -> Ongoing | None:
    """The newest run in a directory of runs that has not ended, of an experiment the part that is played; None where there is none."""
    made = (path for name in ("*", "*/parts/*") for path in runs.glob(f"{name}/manifest.json"))
    for path in sorted(made, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        found = Ongoing(path.parent)
        if found.spec.experiment is None:  # an experiment's own directory has no driver
            return found if found.ended() is None else None
    return None


def wait(runs: Path, on_waiting: Callable[[], None]) -> Ongoing:
    """The run that is going on, or the next that begins; `on_waiting` is called once, where it has to be waited for."""
    found = newest(runs)
    if found is None:
        on_waiting()
    while found is None:
        time.sleep(POLL_S)
        found = newest(runs)
    return found


