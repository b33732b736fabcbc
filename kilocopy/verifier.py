"""A user's verifier over the samples of a best-of-n experiment: one process a sample, the text on its standard input.

It runs when every level has been played, so that it takes no time from them, and what it said is recorded as it comes: cut off, it goes on where
it was. It is a program of the user's, started without a shell. What it makes of a model's text (code that it runs, say) is its affair: run
it where that may be run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilocopy import experiment, records, schedule
from kilocopy.problem import ProblemError
from kilocopy.receiving import TOKEN
from kilocopy.spec import BestOfNExperiment, Spec, Verifier

SAID_CHARS = 300
FLUSH_S = 0.5
PASSED, NOT_PASSED = 0, 1
Place = tuple[str, int, int, int]  # part, stage, copy, sequence


@dataclass(frozen=True)
class Sample:
    """One text to be judged, and the task that it answers."""

    place: Place
    sample: int
    text: str
    request: str
    answer: str | None

    @property
    def key(self) -> tuple[Place, int]:
        """What no other sample has."""
        return self.place, self.sample

    @property
    def task(self) -> str:
        """Digest of the prompt: samples of equal prompts belong together, whatever else the requests carry."""
        asked = json.loads(self.request)
        prompt = asked.get("prompt", asked.get("messages"))
        return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=12).hexdigest()


def of(spec: Spec) -> Verifier | None:
    """The spec's verifier, where it has one."""
    return spec.experiment.verifier if isinstance(spec.experiment, BestOfNExperiment) else None


def check(spec: Spec) -> None:
    """Refuse a verifier that cannot be started, before anything is served. Raises ProblemError."""
    asked = of(spec)
    if asked is not None and shutil.which(asked.command[0]) is None:
        raise ProblemError(
            f"experiment.verifier.command: {asked.command[0]!r} is no program that can be started; give its path (relative to the current directory, with ./), "
            "or a program of the PATH, and make it executable"
        )


def verdicts(home: Path) -> list[dict[str, Any]]:
    """What was said so far, a row (records.VERDICTS) for each sample; the newest, where one was judged again."""
    found = {}
    for row in records.read(home, "verdicts").to_pylist():
        found[(row["part"], row["stage"], row["copy"], row["sequence"]), row["sample"]] = row
    return list(found.values())


def samples(home: Path, spec: Spec, finished: Mapping[str, tuple[Path, int]]) -> list[Sample]:
    """All samples of the prompts to be verified: those of the finished levels with the most samples, so many prompts as asked, drawn by the seed."""
    asked = spec.experiment
    assert isinstance(asked, BestOfNExperiment)  # noqa: S101
    assert asked.verifier is not None  # noqa: S101
    requests = [
        ((part.name, stage, row["copy"], row["sequence"]), row)
        for part, stage in finished.values()
        for row in records.read(part, "texts").to_pylist()
        if row["stage"] == stage and len(row["texts"]) == max(asked.levels)
    ]
    requests.sort(key=lambda one: (schedule.draw(spec.workload.seed, "verified", *one[0]), one[0]))
    chosen = requests[: asked.verifier.prompts]
    return [Sample(place, number, text, row["request"], row["answer"]) for place, row in chosen for number, text in enumerate(row["texts"])]


def verify(home: Path, spec: Spec, finished: Mapping[str, tuple[Path, int]], on_progress: Callable[[int, int], None]) -> None:
    """Judge every sample that was not judged yet; `on_progress` is told how many are, of how many. Ctrl-C keeps what was said.

    A sample on which the verifier itself failed is tried again by a later call.
    """
    asked = of(spec)
    if asked is None:
        return
    every = samples(home, spec, finished)
    known = {((row["part"], row["stage"], row["copy"], row["sequence"]), row["sample"]) for row in verdicts(home) if row["verdict"] != "verifier_failed"}
    left = [one for one in every if one.key not in known]
    if not left:
        return
    number = len(list((home / "verdicts").glob("*.arrow")))
    writer = records.Writer(home, "verdicts", f"verifier{number:04}")
    done, flushed_s = len(every) - len(left), time.monotonic()
    try:
        for row in _judged(asked, left):
            writer.append(row)
            done += 1
            if time.monotonic() - flushed_s > FLUSH_S:
                writer.flush()
                on_progress(done, len(every))
                flushed_s = time.monotonic()
        on_progress(done, len(every))
    finally:
        writer.close()


def _judged(asked: Verifier, left: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """Verdicts as they come, as many at once as this host has cores."""
    cores = len(os.sched_getaffinity(0))
    running: set[Future[dict[str, Any]]] = set()
    waiting = iter(left)
    with tempfile.TemporaryDirectory(prefix="kilocopy-verify-") as folder, ThreadPoolExecutor(cores) as pool:
        try:
            while True:
                for one in waiting:
                    running.add(pool.submit(judge, asked, one, Path(folder)))
                    if len(running) >= 2 * cores:
                        break
                if not running:
                    return
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def judge(asked: Verifier, one: Sample, folder: Path) -> dict[str, Any]:
    """Run the verifier on one sample; a row of records.VERDICTS."""
    part, stage, copy, sequence = one.place
    task = folder / f"{one.task}-{part}-{copy}-{sequence}-{one.sample}.json"
    task.write_text(json.dumps({"request": json.loads(one.request), "answer": one.answer}), encoding="utf-8")
    began_s = time.monotonic()
    code, said, timeout = _run(asked, one.text, task)
    took_s = time.monotonic() - began_s
    task.unlink()
    verdict = "timeout" if timeout else {PASSED: "passed", NOT_PASSED: "not_passed"}.get(-1 if code is None else code, "verifier_failed")
    return {
        "part": part, "stage": stage, "copy": copy, "sequence": sequence, "sample": one.sample, "task": one.task, "verdict": verdict,
        "exit_code": code, "took_s": took_s, "said": said if verdict == "verifier_failed" else None,
    }  # fmt: skip


def _run(asked: Verifier, text: str, task: Path) -> tuple[int | None, str, bool]:
    """Exit code (None: did not start, or ended for its time), the end of what it wrote, and whether its time was over."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KILOCOPY_API", TOKEN, "GRAFANA_"))} | {"KILOCOPY_TASK": str(task)}
    try:
        process = subprocess.Popen(
            asked.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    except OSError as error:
        return None, str(error.strerror), False
    try:
        output, _ = process.communicate(text.encode(), asked.timeout_s)
    except subprocess.TimeoutExpired:
        return None, "", True
    finally:  # what it left behind goes too
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, " ".join(output.decode("utf-8", "replace").split())[-SAID_CHARS:], False


def finish(home: Path, spec: Spec, read: Callable[[Path], dict[str, Any]], on_progress: Callable[[int, int], None]) -> None:
    """The samples of an experiment whose levels of most samples are all there; nothing before that, so that its prompts are drawn once."""
    asked = spec.experiment
    if of(spec) is None or not isinstance(asked, BestOfNExperiment):
        return
    finished = experiment.done(home, read)
    wanted = {level for serving in experiment.plan(spec) for block in serving.blocks for level in block.levels if block.spec.workload.samples == max(asked.levels)}
    if wanted <= set(finished):
        verify(home, spec, {level: finished[level] for level in wanted}, on_progress)
