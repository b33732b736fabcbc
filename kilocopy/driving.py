"""Starts the driver as a process of its own, shows how far it is, and asks the endpoint beforehand whether it can be driven at all.

The driver is Locust (loadtests/locustfile.py): it runs under gevent, which patches Python's sockets and threads, so it never
shares a process with anything else. It says how far it is in one JSON line a second.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kilocopy.manifest import CHECKOUT, search_path
from kilocopy.problem import ProblemError
from kilocopy.receiving import TOKEN, Receiver
from kilocopy.spec import Spec

WORDS_PER_TOKEN = 0.75  # for the live line only: the report counts words
STOP_WAIT_S = 20.0
WEB_STAYS_S = 5  # how long Locust's page can still be looked at after the last stage
PLAIN_EVERY_S = 5.0
INTERRUPTED = 130
JOIN_S = 60  # how long the workers may take to start
WORKER_ENDS_S = 10.0


def drive(
    run_dir: Path, url: str, spec: Spec, *, api_key: str | None, web: bool, on_progress: Callable[[dict[str, Any]], None], workers: int = 1,
    receiver: Receiver | None = None,
) -> int:  # fmt: skip
    """Play the spec in run_dir/manifest.json against `url`. Returns the driver's exit code: 0 complete, 130 interrupted.

    One process drives, or with `workers` > 1 as many as that, led by one more (Locust's master, on loopback). The driver works in the
    current directory, to which the spec's paths are relative. With a `receiver` the workers are those that joined it, and only the
    master is started here. Ctrl-C is passed on: the driver closes its streams and its records, then this returns. The driver's own
    words are in run_dir/driver.log; its last ones are repeated on standard error where it failed.
    """
    with (run_dir / "driver.log").open("wb") as log:
        port = _free_port() if workers > 1 or receiver else None

        def start(*role: str, output: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [*_command(url), *role], env=_environment(run_dir, api_key),
                stdin=subprocess.DEVNULL, stdout=output, stderr=log, start_new_session=True,
            )  # fmt: skip

        process = start(*_leading(web, workers, port), output=subprocess.PIPE)
        team: list[subprocess.Popen[bytes]] = []
        try:
            if port is not None and receiver is not None:
                receiver.begin(port)
            elif port is not None:
                team = [start("--worker", *_at("master", port), output=subprocess.DEVNULL) for _ in range(workers)]
            _follow(process, on_progress)
            code = process.wait()
        except KeyboardInterrupt:
            code = _stop(process)
        finally:
            if process.poll() is None:
                _stop(process)
            codes = [end_worker(worker) for worker in team]
    if code in {-signal.SIGINT, -signal.SIGTERM}:  # it was asked to end before it could listen
        code = INTERRUPTED
    failed = [worker for worker in codes if worker not in {0, INTERRUPTED}]
    if code not in {0, INTERRUPTED} or failed:
        repeat(run_dir / "driver.log")
    return code or max((worker for worker in failed if worker > 0), default=0)


def _command(url: str) -> list[str]:
    quiet = ["--only-summary", "--loglevel", "WARNING"]
    return [sys.executable, "-m", "locust", "-f", str(CHECKOUT / "loadtests/locustfile.py"), *quiet, "--host", url]


def _leading(web: bool, workers: int, port: int | None) -> list[str]:
    """The options of the process that leads, which is the only one where there are no workers."""
    seen = ["--autostart", "--autoquit", str(WEB_STAYS_S), "--web-host", "127.0.0.1"] if web else ["--headless"]
    if port is None:
        return seen
    # Locust's own wait for workers ends in an error message of its own; ours comes earlier and says more.
    return [*seen, "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", str(port), "--expect-workers", str(workers),
            "--expect-workers-max-wait", str(JOIN_S)]  # fmt: skip


def _at(who: str, port: int) -> list[str]:
    return [f"--{who}-host", "127.0.0.1", f"--{who}-port", str(port)]


def _free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return int(probe_socket.getsockname()[1])


def start_worker(url: str, port: int, more: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A worker whose master is reached at a port of this host; `more` are variables for it."""
    environment = _environment(Path.cwd(), os.environ.get("KILOCOPY_API_KEY")) | more
    del environment["KILOCOPY_RUN_DIR"]  # the master tells it
    return subprocess.Popen(
        [*_command(url), "--worker", *_at("master", port)], env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
    )  # fmt: skip


def end_worker(process: subprocess.Popen[bytes]) -> int:
    """A worker ends when its master does; where it does not, it is asked to, and then killed."""
    for ask in (None, signal.SIGINT, signal.SIGKILL):
        if ask is not None:
            process.send_signal(ask)
        try:
            return process.wait(WORKER_ENDS_S)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()


def _environment(run_dir: Path, api_key: str | None) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LOCUST_", "GRAFANA_", TOKEN))}
    environment |= {"KILOCOPY_RUN_DIR": str(run_dir.resolve()), "PYTHONPATH": search_path(), "KILOCOPY_API_KEY": api_key or ""}
    return environment


def _follow(process: subprocess.Popen[bytes], on_progress: Callable[[dict[str, Any]], None]) -> None:
    """Hand every progress line on until the driver closes its output."""
    assert process.stdout is not None  # noqa: S101
    for line in process.stdout:
        try:
            progress = json.loads(line)
        except ValueError:
            continue  # Locust's own words
        if isinstance(progress, dict) and "t" in progress:
            on_progress(progress)


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Ask the driver to end, and end it where it does not."""
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_WAIT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            process.communicate(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:
            break  # asked twice: at once
    if process.poll() is None:
        process.kill()
    return process.wait()


def repeat(log: Path) -> None:
    """The last of our own sentences in a driver's log, on standard error."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("kilocopy: ")]
    if lines:
        sys.stderr.write(lines[-1] + "\n")


def probe(url: str, model_id: str, api_key: str | None, timeout_s: float, endpoint: str = "completions") -> None:
    """One small request, so that what is wrong with an endpoint is said once and not a thousand times. Raises ProblemError."""
    shown = url.rsplit("@", maxsplit=1)[-1]
    asked: dict[str, Any] = {"model": model_id, "max_tokens": 1}
    asked |= {"messages": [{"role": "user", "content": "Hello"}]} if endpoint == "chat" else {"prompt": "Hello"}
    path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
    status, kind, body = _post(url, path, json.dumps(asked), api_key, timeout_s)
    said = _message(body)
    if api_key:
        said = said.replace(api_key, "***")
    if status in {401, 403}:
        raise ProblemError(f"{shown}: the endpoint wants a valid key (HTTP {status}: {said}); put it in KILOCOPY_API_KEY")
    if status == 404:
        raise ProblemError(f"{shown}: HTTP 404: {said}; is {model_id!r} (model.id) the name it serves, and is the address right up to /v1?")
    if status == 429:
        raise ProblemError(f"{shown}: the endpoint limits its requests (HTTP 429: {said}); raise its limit before loading it")
    if status >= 500:
        raise ProblemError(f"{shown}: the endpoint fails by itself (HTTP {status}: {said}); look into its log")
    if status >= 300:
        raise ProblemError(f"{shown}: the endpoint does not take the request (HTTP {status}: {said})")
    try:
        answer = json.loads(body)
        answer["choices"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        said = f"{kind or 'no content type'}: {said}"
        raise ProblemError(f"{shown}: answers, but not as an OpenAI-like endpoint ({said}); is this the model's address?") from None


def _post(url: str, path: str, body: str, api_key: str | None, timeout_s: float) -> tuple[int, str, bytes]:
    """Status, content type and body of the answer. Raises ProblemError where none comes."""
    shown, parts = url.rsplit("@", maxsplit=1)[-1], urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ProblemError(f"{shown!r} is not an address: give http://host:port or https://host:port")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    path = parts.path.rstrip("/").removesuffix("/v1") + path
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        connection = kind(parts.hostname, parts.port, timeout=timeout_s)
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Content-Type", ""), answer.read(2**20)
        finally:
            connection.close()
    except TimeoutError:
        raise ProblemError(f"{shown}: no answer within {timeout_s:g} s; is the model still being loaded, or does something else take the host's processors (kilocopy starts Ray at a low priority)?") from None
    except ssl.SSLError as error:
        raise ProblemError(f"{shown}: no TLS connection: {error.reason or error}; http instead of https?") from None
    except http.client.HTTPException as error:
        raise ProblemError(f"{shown}: what answers there does not speak HTTP ({type(error).__name__}); check host and port") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ProblemError(f"{shown}: cannot be reached: {why}; is it serving (`kilocopy serve`), and is the address right?") from None


def _message(body: bytes) -> str:
    """What an answer says, short."""
    text = body[:4096].decode("utf-8", "replace")
    try:
        value = json.loads(text)
        error = value.get("error") or value.get("message") or value.get("detail") or value
        text = str(error.get("message") or error) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:160] or "no text"


class ProgressPrinter:
    """Shows the newest progress: one live line on a terminal, else a plain line every 5 s. A context manager, and a callable."""

    def __init__(self, console: Console, spec: Spec) -> None:
        self._console, self._spec = console, spec
        self._live = Live(Text("drive  starting"), console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        self._next_s = 0.0
        self._place: tuple[int, str] | None = None

    def __enter__(self) -> ProgressPrinter:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, progress: dict[str, Any]) -> None:
        """Take one progress line of the driver's."""
        line = Text("drive  ", style="bold") + Text(self.line(progress), style="not bold")
        now_s, place = time.monotonic(), (progress["stage"], progress["phase"])
        if self._live:
            self._live.update(line)
        elif now_s >= self._next_s or place != self._place:
            self._console.print(line, soft_wrap=True)
            self._next_s = now_s + PLAIN_EVERY_S
        self._place = place

    def line(self, progress: dict[str, Any]) -> str:
        """The words: copies, tokens/s, per copy, pages/hour, errors by type, time left."""
        rate, in_flight = progress["tokens_per_s"], progress["in_flight"]
        pages_per_h = rate * WORDS_PER_TOKEN / self._spec.page.words * 3600
        parts = [
            f"stage {progress['stage'] + 1}/{progress['stages']} {progress['phase']}",
            _load(progress),
            f"{rate:,.0f} tokens/s",
            f"{rate / in_flight if in_flight else 0:,.1f} per copy",
            f"~{pages_per_h:,.0f} pages/h",
            f"{progress['requests_ok']:,} done",
        ]
        parts += [f"{outcome} {count:,}" for outcome, count in progress["errors"].items()]
        if progress["eta_s"] is not None:
            minutes, seconds = divmod(round(progress["eta_s"]), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return "  ".join(parts)


def _load(progress: dict[str, Any]) -> str:
    """What is asked and what is there: copies, or a rate of arrivals."""
    search = f"search {progress['level'] + 1}: " if progress["kind"] == "search" else ""
    if progress["copies"] is not None:
        return f"{search}copies {progress['in_flight']}/{progress['copies']}"
    rate = f" {progress['rate_per_s']:g}/s" if progress["rate_per_s"] is not None else ""
    kind = "poisson" if search else progress["kind"]
    return f"{search}{kind}{rate}, {progress['in_flight']} in flight"
