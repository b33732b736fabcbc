"""What breaks first with many replicas? The real Serve application with simulated engines, rung by rung, as many as the memory holds.

    python -m bench.ladder [--rungs 1 2 4 8 16 32 64] [--rung-s 240] [--step-s 0.5] [--out ladder.json]

No model runs and no speed is measured: a rung says how long the replicas took to start, what they hold of memory, what a scrape of Ray's metrics page
costs, and how many streams and connections the proxy kept. Each rung is bounded in time, and stands in the JSON file as soon as it is over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from rich.console import Console

from kilocopy import manifest
from kilocopy.scrape import read_page
from kilocopy.serving import MARK

RUNGS = (1, 2, 4, 8, 16, 32, 64)
STREAMS_EACH = 50
STEP_S = 0.5
FIRST_TOKEN_S = 20.0
HOLD_S = 4.0
IDLE_STEP, IDLE_MAX = 512, 6144
MEMORY_LEFT = 1.5 * 2**30
OUT = Console(highlight=False, width=None if sys.stdout.isatty() else 160)

Found = dict[str, Any]


def spec(replicas: int, step_s: float) -> str:
    """A spec of so many simulated replicas (JSON is YAML) and a stage of their streams, by which HAProxy's connection limit is set."""
    said = {"value": 1, "source": "no figure of money is read", "date": "2026-01-01"}
    return json.dumps({
        "name": f"ladder-{replicas}",
        "model": {"id": "simulated", "source": "simulated", "parameters_active": 1},
        "cluster": {"replicas": replicas, "hardware": {"kind": "cpu", "cpus_per_replica": 0.05}, "simulated_engine": {"step_s": step_s}, "start_timeout_s": 3600},
        "workload": {"prompts": {"kind": "synthetic", "input_tokens": 5}, "output_tokens": 64},
        "stages": [{"arrival": "closed", "copies": STREAMS_EACH * replicas, "duration_s": 5}],
        "slo": {"tokens_per_s_per_copy": 1, "ttft_s": 5},
        "page": {"words": 500, "words_per_token": said},
        "prices": {"hardware": {"kind": "rented", "usd_per_device_hour": said, "utilisation": 1}, "electricity_usd_per_kwh": said, "pue": said},
    })  # fmt: skip


class Rung:
    """`kilocopy serve` of so many replicas, in a state directory of its own."""

    def __init__(self, replicas: int, step_s: float, folder: Path) -> None:
        self._spec, self._folder = spec(replicas, step_s), folder
        self._environment = os.environ | {"KILOCOPY_STATE": str(folder / "state"), "PYTHONPATH": manifest.search_path()}

    def _kilocopy(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "kilocopy", *arguments]

    def start(self, until_s: float) -> Found:
        """Serve, noting when each phase began; `failed` where it does not come so far in time."""
        path = self._folder / "spec.yaml"
        path.write_text(self._spec)
        phases: dict[str, float] = {}
        began_s, most = time.monotonic(), 0.0
        with (self._folder / "serve.txt").open("wb") as said:
            process = subprocess.Popen(self._kilocopy("serve", str(path)), env=self._environment, stdout=said, stderr=said, start_new_session=True)
        while process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                phase = json.loads((self._folder / "state" / "state.json").read_text())["phase"]
                phases.setdefault(phase, round(time.monotonic() - began_s, 1))
            most = max(most, psutil.getloadavg()[0])
            if time.monotonic() > until_s:
                process.send_signal(signal.SIGINT)
                process.wait(60)
                return {"failed": f"not serving after {time.monotonic() - began_s:.0f} s", "phases_s": phases, "load_average": round(most, 1)}
            time.sleep(0.2)
        found: Found = {"ready_s": round(time.monotonic() - began_s, 1), "phases_s": phases, "load_average": round(most, 1)}
        if process.returncode:
            found["failed"] = (self._folder / "serve.txt").read_text()[-600:] + (self._folder / "state" / "serve.log").read_text()[-3000:]
        return found

    def state(self) -> Found:
        """What the serving process says."""
        return dict(json.loads((self._folder / "state" / "state.json").read_text()))

    def memory(self) -> Found:
        """Proportional memory of everything that was started, MiB, by kind of process."""
        mark = (self._folder / "state" / "mark").read_text()
        sizes, counts = Counter[str](), Counter[str]()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == mark:
                    kind = kind_of(process)
                    sizes[kind] += process.memory_full_info().pss
                    counts[kind] += 1
        total = sum(sizes.values())
        each = {kind: {"processes": counts[kind], "mib": round(size / 2**20)} for kind, size in sizes.most_common()}
        replica = sizes["replica"] / max(1, counts["replica"])
        return {"mib": round(total / 2**20), "mib_a_replica": round(replica / 2**20), "by_kind": each}

    def stop(self) -> None:
        """End it, whatever state it is in."""
        subprocess.run(self._kilocopy("down"), env=self._environment, capture_output=True, timeout=120, check=False)


def kind_of(process: psutil.Process) -> str:
    """What a process of Ray's is, by its title."""
    line = " ".join(process.cmdline())
    for word, kind in (("ServeReplica:kilocopy:LLMServer", "replica"), ("ServeReplica:kilocopy:LLMRouter", "router"), ("ServeController", "controller"),
                       ("ProxyActor", "proxy"), ("HAProxy", "proxy"), ("haproxy", "haproxy"), ("raylet/raylet", "raylet"), ("gcs_server", "gcs"),
                       ("dashboard/agent.py", "agent"), ("runtime_env/agent", "agent"), ("cluster.serve", "serving process"), ("ray::IDLE", "idle worker")):  # fmt: skip
        if word in line:
            return kind
    return "other"


def scrapes(targets: list[str]) -> Found:
    """Bytes, lines and seconds of Ray's pages, the quickest of three readings, and what kilocopy's own reading of them takes."""
    import urllib.request  # noqa: PLC0415

    took_s, own_s, size, lines = [], [], 0, 0
    for _ in range(3):
        began_s = time.perf_counter()
        pages = []
        for target in targets:
            with urllib.request.urlopen(target, timeout=60) as answer:
                pages.append(answer.read())
        took_s.append(time.perf_counter() - began_s)
        size, lines = sum(map(len, pages)), sum(line[:1] != b"#" for page in pages for line in page.splitlines())
        began_s = time.perf_counter()
        for target in targets:
            read_page(target)
        own_s.append(time.perf_counter() - began_s)
    return {"bytes": size, "series": lines, "read_s": round(min(took_s), 3), "read_and_parsed_s": round(min(own_s), 3)}


async def _stream(host: str, port: int, begun: list[float], until: asyncio.Event) -> str:
    """Hold one stream: `held`, or what went wrong."""
    body = json.dumps({"model": "simulated", "prompt": "a b c", "max_tokens": 64, "stream": True}).encode()
    asked_s = time.perf_counter()
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), FIRST_TOKEN_S)
    except (OSError, TimeoutError) as error:
        return f"connect: {type(error).__name__}"
    try:
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), FIRST_TOKEN_S)
        if b" 200 " not in head.split(b"\r\n")[0]:
            return head.split(b"\r\n")[0].decode("latin-1")
        await asyncio.wait_for(reader.readuntil(b"data: "), FIRST_TOKEN_S)
        begun.append(time.perf_counter() - asked_s)
        while not until.is_set():
            if not await asyncio.wait_for(reader.read(65536), FIRST_TOKEN_S):
                return "ended early"
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        return type(error).__name__
    finally:
        writer.close()
    return "held"


async def streams(url: str, count: int) -> Found:
    """Open so many streams at once, hold them for some seconds, and say what became of each."""
    parts, begun, until = urlsplit(url), list[float](), asyncio.Event()
    tasks = [asyncio.create_task(_stream(str(parts.hostname), int(parts.port or 80), begun, until)) for _ in range(count)]
    began_s = time.perf_counter()
    while len(begun) + sum(task.done() for task in tasks) < count and time.perf_counter() - began_s < FIRST_TOKEN_S:
        await asyncio.sleep(0.1)
    await asyncio.sleep(HOLD_S)
    until.set()
    ended = Counter(await asyncio.gather(*tasks))
    ordered = sorted(begun)
    at = {f"ttft_s_{name}": round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) for name, share in (("p50", 0.5), ("max", 1))} if ordered else {}
    return {"asked": count, "held": ended.pop("held", 0), "others": dict(ended), **at}


async def connections(url: str) -> Found:
    """Open connections that say nothing until a request on a new one is not answered any more."""
    parts, idle = urlsplit(url), list[asyncio.StreamWriter]()
    host, port = str(parts.hostname), int(parts.port or 80)
    try:
        while len(idle) < IDLE_MAX:
            for _ in range(IDLE_STEP):
                _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 5)
                idle.append(writer)
            reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 5)
            with contextlib.closing(writer):
                writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                await asyncio.wait_for(reader.readline(), 5)
    except (OSError, TimeoutError) as error:
        return {"idle": len(idle), "then": f"a request on one more was not answered within 5 s ({type(error).__name__})"}
    finally:
        for writer in idle:
            writer.close()
    return {"idle": len(idle), "then": "requests were still answered"}


def climb(replicas: int, step_s: float, rung_s: float, *, limit: bool) -> Found:
    """One rung; with `limit` also the proxy's own. Whatever breaks is in `failed`."""
    found: Found = {"replicas": replicas, "free_mib_before": psutil.virtual_memory().available >> 20}
    with tempfile.TemporaryDirectory(prefix="kilocopy-ladder-") as folder:
        rung = Rung(replicas, step_s, Path(folder))
        try:
            found |= rung.start(time.monotonic() + rung_s)
            if "failed" not in found:
                found["memory"] = rung.memory()
                state = rung.state()
                found["replicas_seen"] = state["replicas"]
                found["streams"] = asyncio.run(streams(state["url"], STREAMS_EACH * replicas))
                found["page"] = scrapes(state["metrics"])
                if limit:
                    found["connections"] = asyncio.run(connections(state["url"]))
        except Exception as error:
            found["failed"] = f"{type(error).__name__}: {error}"
        finally:
            rung.stop()
    return found


def main() -> None:
    """Climb until something breaks, the memory would not hold the next rung, or there is none."""
    parser = argparse.ArgumentParser(prog="python -m bench.ladder", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rungs", type=int, nargs="+", default=RUNGS)
    parser.add_argument("--rung-s", type=float, default=240, help="how long replicas may take to start")
    parser.add_argument("--step-s", type=float, default=STEP_S, help="a step of the simulated engines: at 0.5 s, 100 replicas' tokens fill two cores")
    parser.add_argument("--total-s", type=float, default=840, help="no rung is begun that could end after this")
    parser.add_argument("--out", type=Path, default=Path("ladder.json"))
    asked = parser.parse_args()
    began_s, found, last_s = time.monotonic(), list[Found](), 0.0
    for number, replicas in enumerate(asked.rungs):
        left_s = asked.total_s - (time.monotonic() - began_s)
        if found and left_s < 2 * last_s:
            OUT.print(f"{replicas} replicas: not begun, {left_s:.0f} s are left and the last rung took {last_s:.0f} s")
            break
        if found and "memory" in found[-1]:
            needs = found[-1]["memory"]["mib_a_replica"] * replicas * 2**20 + MEMORY_LEFT
            if needs > psutil.virtual_memory().available:
                OUT.print(f"{replicas} replicas: not begun, they would need {needs / 2**30:.1f} GiB")
                break
        rung_began_s = time.monotonic()
        found.append(climb(replicas, asked.step_s, min(asked.rung_s, left_s - 60), limit=number == 0 and 4 * STREAMS_EACH * replicas <= IDLE_MAX))
        last_s = time.monotonic() - rung_began_s
        found[-1]["took_s"] = round(last_s)
        asked.out.write_text(json.dumps({"host": manifest.hardware(), "versions": manifest.versions(), "rungs": found}, indent=1))
        OUT.print(json.dumps(found[-1]), soft_wrap=True)
        if "failed" in found[-1]:
            break


if __name__ == "__main__":
    main()
