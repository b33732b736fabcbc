"""The same workload on the same replicas, driven by kilocopy and by `vllm bench serve` in turn: do two clients see the same server?

    kilocopy serve loadtests/specs/demo.yaml
    python -m bench.crosscheck loadtests/specs/demo.yaml --copies 8 --repeats 3

Both send the same prompts (cut by kilocopy's workload, handed to vllm as a data set), the same lengths, as many streams at once, and
both are counted in the same way: tokens that arrived between the moment when every stream had its first token and the moment when
the first stream stopped asking. vllm's own printed figure (all tokens over all time, ramp and tail included) stands beside it.

On a machine whose speed changes from minute to minute turns say little: with `--together` both ask at the same time, as many streams each, and both
are counted in kilocopy's window (one clock, CLOCK_MONOTONIC, for both). Whatever the servers do at a moment they do to both.

TTFT depends on whether a client's streams go in step: prompts that arrive together are prefilled in one step, which is longer. Where both clients' starts are
spread (vllm's by `--request-rate`) it compares clients, else their starts; `sent_together` says which.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy import stats

from bench.clients import vllm_bench
from kilocopy import manifest, records, run, serving
from kilocopy.problem import ProblemError
from kilocopy.recompute import summarise
from kilocopy.spec import Spec, load

Figures = dict[str, float]
Window = tuple[float, float]  # begin and end, seconds on the monotonic clock
TRIES = 3
TOGETHER_S = 0.02  # sent so close, two prompts wait for the same step of the engine
VLLM_START_S = 45.0  # what `vllm bench serve` takes to load on one core; then it has begun to ask


def with_stage(spec: Spec, copies: int, seconds: float) -> Spec:
    """The spec with one closed stage in place of its stages or its experiment."""
    tree = spec.model_dump(mode="json")
    tree["experiment"] = None
    tree["stages"] = [{"arrival": "closed", "copies": copies, "duration_s": seconds, "warmup_s": 2, "ramp_s": 2}]
    return Spec.model_validate(tree)


def by_kilocopy(spec: Spec, url: str, targets: list[str], runs: Path) -> tuple[Figures, Window]:
    """One stage by kilocopy's driver, as its report counts it, and its window on the monotonic clock, seconds.

    It is played again where the report withholds it. Raises ProblemError after three tries.
    """
    for _ in range(TRIES):
        run_dir = run.drive(spec, runs, url, targets=targets, web=False, shares_host=manifest.is_this_host(url))
        summary = summarise(run_dir)
        stage = summary.stages[0]
        if stage.window is not None and stage.throughput is not None and stage.latency is not None and stage.latency.ttft_s is not None and stage.latency.tpot_s is not None:
            break
        reasons = "; ".join(reason.sentence for reason in stage.verdict.reasons)
        print(f"{run_dir}: not counted, played again: {reasons}", file=sys.stderr)
    else:
        raise ProblemError(f"{run_dir}: kilocopy's own stage has no latency to compare, in {TRIES} tries: {reasons}")
    zero_s = (summary.wall_zero_s or 0.0) - (time.time() - time.perf_counter())
    start_s, end_s = zero_s + stage.window.start_s, zero_s + stage.window.end_s
    sent_s = records.read(run_dir, "requests")["sent_ns"].drop_null().to_numpy() / 1e9
    return {
        "tokens_per_s": stage.throughput.output_tokens_per_s.value,
        "ttft_p50_s": stage.latency.ttft_s.p50,
        "ttft_p99_s": stage.latency.ttft_s.p99,
        "tpot_p50_s": stage.latency.tpot_s.p50,
        "requests_per_s": stage.throughput.requests_per_s,
        "sent_together": sent_together(sent_s, start_s, end_s),
    }, (start_s, end_s)


def sent_together(sent_s: npt.NDArray[np.float64], start_s: float, end_s: float) -> float:
    """The share of the requests sent inside that went within `TOGETHER_S` of another one of the same client."""
    times_s = np.sort(sent_s[(sent_s >= start_s) & (sent_s < end_s)])
    near = np.diff(times_s, prepend=-np.inf, append=np.inf) < TOGETHER_S
    return float((near[:-1] | near[1:]).mean()) if len(times_s) else 0.0


def by_vllm(spec: Spec, url: str, prompts: Path, folder: Path, requests: int, rate_per_s: float | None) -> dict[str, Any]:
    """As many requests by `vllm bench serve`, as soon as a stream is free or, at most, at a rate: its detailed result."""
    copies = spec.stages[0].copies  # type: ignore[union-attr]  # with_stage made it closed
    result = folder / "vllm.json"
    options = {
        "--backend": "openai", "--base-url": url, "--endpoint": "/v1/completions", "--model": spec.model.id,
        "--tokenizer": spec.model.source, "--dataset-name": "custom", "--dataset-path": prompts,
        "--custom-output-len": spec.workload.output_tokens, "--max-concurrency": copies, "--num-prompts": requests,
        "--temperature": spec.workload.sampling.temperature, "--result-dir": folder, "--result-filename": result.name,
        "--percentile-metrics": "ttft,tpot,itl,e2el",
    }  # fmt: skip
    flags = ["--ignore-eos", "--skip-chat-template", "--save-result", "--save-detailed", "--disable-tqdm", "--disable-shuffle"]
    if rate_per_s:
        flags += ["--request-rate", str(rate_per_s)]
    command = [*vllm_bench(), *(str(part) for pair in options.items() for part in pair), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=900)
    return dict(json.loads(result.read_text(encoding="utf-8")))


def at_once(spec: Spec, state: dict[str, Any], runs: Path, prompts: Path, folder: Path, requests: int, rate_per_s: float | None) -> tuple[Figures, Figures]:
    """Both clients at the same time. Raises ProblemError where vllm's requests did not last for kilocopy's whole window."""
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(by_vllm, spec, state["url"], prompts, folder, requests, rate_per_s)
        time.sleep(VLLM_START_S)
        ours, window = by_kilocopy(spec, state["url"], state["metrics"], runs)
        return ours, figures_of(theirs.result(), spec.stages[0].copies, window)  # type: ignore[union-attr]


def figures_of(result: dict[str, Any], copies: int, window: Window | None = None) -> Figures:
    """vllm's detailed result in kilocopy's terms. `start_times`, `ttfts` and `itls` are seconds, one entry or list per request.

    Counted is from when every stream had its first token until the first stops asking, or the window that is given, if it lies in there.
    """
    starts, ttfts = np.array(result["start_times"]), np.array(result["ttfts"])
    arrivals, ends = [], []
    for start, ttft, gaps in zip(starts, ttfts, result["itls"], strict=True):
        times = start + ttft + np.concatenate([[0.0], np.cumsum(gaps)])
        arrivals.append(times)
        ends.append(times[-1])
    order = np.argsort(starts)
    begin_s = float(max((starts + ttfts)[order[:copies]]))  # the first wave is the first `copies` requests
    stop_s = float(np.sort(starts)[-1])  # the last request was sent: from here on fewer are open
    if window is not None:
        if not begin_s <= window[0] < window[1] <= stop_s:
            raise ProblemError(
                f"vllm bench serve had all streams open from {begin_s - window[0]:+.1f} s to {stop_s - window[0]:+.1f} s of kilocopy's window "
                f"of {window[1] - window[0]:.1f} s: not the whole of it; give it more --requests"
            )
        begin_s, stop_s = window
    times_s = np.concatenate(arrivals)
    inside = (times_s >= begin_s) & (times_s < stop_s)
    kept = (starts >= begin_s) & (np.array(ends) <= stop_s)
    lengths = np.array([len(times) for times in arrivals])
    spans: npt.NDArray[np.float64] = np.array(ends) - (starts + ttfts)
    return {
        "tokens_per_s": float(inside.sum()) / (stop_s - begin_s),
        "ttft_p50_s": float(np.percentile(ttfts[kept], 50)),
        "ttft_p99_s": float(np.percentile(ttfts[kept], 99)),
        "tpot_p50_s": float(np.percentile(spans[kept] / np.maximum(lengths[kept] - 1, 1), 50)),
        "requests_per_s": float(kept.sum()) / (stop_s - begin_s),
        "sent_together": sent_together(starts, begin_s, stop_s),
        "printed_tokens_per_s": float(result["output_throughput"]),
        "printed_ttft_p50_s": float(result["median_ttft_ms"]) / 1e3,
    }


def write_prompts(spec: Spec, path: Path, count: int) -> None:
    """The prompts that kilocopy would send, as vllm's custom data set. In a process of its own: loadtests imports gevent."""
    code = (
        "import json, sys; from kilocopy.spec import Spec; from loadtests.workload import Workload; "
        "work = Workload(Spec.model_validate_json(sys.stdin.read())); "
        f"print(*(json.dumps({{'prompt': json.loads(work.body(0, 0, 0, n))['prompt']}}) for n in range(1_000_000, 1_000_000 + {count})), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], input=spec.model_dump_json(), capture_output=True, text=True, check=True)
    path.write_text(done.stdout, encoding="utf-8")


def by_pairs(mine: Sequence[float], other: Sequence[float]) -> str:
    """Geometric mean of the ratios of neighbours in time, with Student's interval: a machine that gets slower does so to both of a pair."""
    logs = np.log(np.array(mine) / np.array(other))
    middle = float(logs.mean())
    if len(logs) < 3:
        return f"{np.exp(middle):.3f}"
    half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)))
    return f"{np.exp(middle):.3f} [{np.exp(middle - half):.3f} .. {np.exp(middle + half):.3f}]"


def show(ours: Sequence[Figures], theirs: Sequence[Figures]) -> None:
    """A row a figure: the median of each client, its range, and the ratio."""
    table = Table("figure", "kilocopy", "range", "vllm bench serve", "range", "of medians", "by pairs [95 %]")
    for name in theirs[0]:
        mine, other = [run_[name.removeprefix("printed_")] for run_ in ours], [run_[name] for run_ in theirs]
        unit = 1e3 if name.endswith("_s") and "per_s" not in name else 1
        label = name.removesuffix("_s") + "_ms" if unit > 1 else name
        digits = 2 if name == "sent_together" else 1
        cells = [f"{median(part) * unit:,.{digits}f}" for part in (mine, other)]
        ranges = [f"{min(part) * unit:,.{digits}f} .. {max(part) * unit:,.{digits}f}" for part in (mine, other)]
        ratios = ["", ""] if name == "sent_together" else [f"{median(mine) / median(other):.3f}", by_pairs(mine, other)]
        table.add_row(label, cells[0], ranges[0], cells[1], ranges[1], *ratios)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> None:
    """Alternate the two clients and print what each saw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--together", action="store_true", help="both at the same time, not in turn")
    parser.add_argument("--requests", type=int, default=600, help="with --together: so many by vllm, which have to outlast kilocopy's stage")
    parser.add_argument("--request-rate", type=float, help="vllm sends at most so many requests a second, so that its streams are not in step; above what the servers do")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    state = serving.status()
    if not state or not state["alive"]:
        raise SystemExit("nothing is being served here; `kilocopy serve SPEC` first")
    spec = with_stage(load(asked.spec), asked.copies, asked.seconds)
    ours: list[Figures] = []
    theirs: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        for number in range(asked.repeats):
            # Prompts of its own: a prefix cache would answer what the repeat before asked.
            fresh = spec.model_copy(update={"workload": spec.workload.model_copy(update={"seed": spec.workload.seed + number})})
            if asked.together:
                write_prompts(fresh, prompts, asked.requests)
                pair = at_once(fresh, state, asked.runs, prompts, Path(folder), asked.requests, asked.request_rate)
            else:
                mine, _ = by_kilocopy(fresh, state["url"], state["metrics"], asked.runs)
                requests = max(2 * asked.copies, round(mine["requests_per_s"] * asked.seconds))
                write_prompts(fresh, prompts, requests)
                pair = mine, figures_of(by_vllm(fresh, state["url"], prompts, Path(folder), requests, asked.request_rate), asked.copies)
            ours.append(pair[0])
            theirs.append(pair[1])
            print(f"pair {number + 1} of {asked.repeats}: {pair[0]['tokens_per_s']:,.0f} and {pair[1]['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
    show(ours, theirs)
    print(json.dumps({"copies": asked.copies, "seconds": asked.seconds, "kilocopy": ours, "vllm": theirs}))


if __name__ == "__main__":
    try:
        main()
    except ProblemError as problem:
        sys.stderr.write(f"crosscheck: {problem}\n")
        sys.exit(problem.code)
