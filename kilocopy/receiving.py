"""The leader's side of a run with processes on other hosts: one port on which they join, compare clocks, reach Locust's master and send records home.

Everything is HTTP with a bearer token (KILOCOPY_JOIN_TOKEN), on loopback unless told otherwise; it is not encrypted, so between hosts it
belongs on a private network. Who joins writes its own files where it runs and sends what they grew by; here the bytes go straight
from the socket to the file of the same name in the run directory. Locust's master never sees a record, and itself listens on loopback only.

    GET  /run                       what is to be played            ->  {run, url, spec, workers, files, version, commit}
    POST /join                      {host, clock, ...}              ->  {id, same_clock}
    POST /here                      {of, offset_ns, error_ns, at_ns} or {}: still there, and its clock  ->  {begun, over}
    GET  /clock                     the leader's monotonic clock    ->  {perf_ns}
    PUT  /records/KIND/FILE?offset  appends, if the file ends there ->  {size}; 409 with {size} where it does not
    POST /done                      {code, said}: nothing more will come
    CONNECT /master                 from here on the bytes are Locust's
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kilocopy import __version__, manifest
from kilocopy.problem import ProblemError
from kilocopy.records import Events
from kilocopy.spec import Spec, files_named

TOKEN = "KILOCOPY_JOIN_TOKEN"  # noqa: S105  the variable's name
TOKEN_CHARS_MIN = 16
FILE = re.compile(r"(?:(?:requests|driver|texts)/worker\d+\.arrow|events/worker\d+\.jsonl)")
BYTES_MAX = 4 * 2**20  # of one request
SILENT_S = 15.0  # who was not heard for so long is not waited for
HOME_S = 60.0  # how long the last records may take
MASTER_S = 60.0  # how long Locust's master may take to listen


def need_token(value: str | None) -> str:
    """The shared secret. Raises ProblemError where there is none worth the name."""
    if not value or len(value) < TOKEN_CHARS_MIN or not value.isascii():
        how = "is not set" if not value else f"has {len(value)} characters, {TOKEN_CHARS_MIN} ASCII ones are needed"
        raise ProblemError(f"{TOKEN} {how}: put the same secret there for the leader and for each worker, for instance from `openssl rand -hex 16`")
    return value


def parse_address(text: str, option: str) -> tuple[str, int]:
    """HOST:PORT. Raises ProblemError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ProblemError(f"{option} {text}: give HOST:PORT, for instance 127.0.0.1:5557")
    return host.strip("[]"), int(port)


def clock_of_host() -> str:
    """What tells one CLOCK_MONOTONIC from another: the boot, and the time namespace's shift of it."""
    parts = []
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/timens_offsets"):
        with contextlib.suppress(OSError):
            parts.append(" ".join(Path(path).read_text(encoding="ascii").split()))
    return " ".join(parts) or socket.gethostname()


def sums(spec: Spec) -> dict[str, str | None]:
    """SHA-256 of each file that the spec names: every worker has to read the same. None where there is no such file."""

    def of(path: str) -> str | None:
        try:
            with Path(path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None

    return {path: of(path) for _, path in files_named(spec)}


@dataclass
class Member:
    """Who joined, and how it is doing."""

    host: str
    heard_s: float
    code: int | None = None  # how it ended; None: it has not said so
    about: dict[str, Any] = field(default_factory=dict)


class Receiver:
    """Listens for `workers` drivers while its `with` block runs. Raises ProblemError where the port cannot be had."""

    def __init__(self, run_dir: Path, bind: tuple[str, int], token: str, workers: int, spec: Spec, url: str) -> None:
        self.run_dir, self.token, self.workers, self.url = run_dir, token, workers, url
        self.spec, self.commit, self._sums = spec, manifest.commit(), sums(spec)
        self.members: dict[str, Member] = {}
        self.over = False
        self.master_port: int | None = None
        self._events: Events | None = None
        self._lock, self._locks = threading.Lock(), dict[str, threading.Lock]()
        self._news: list[str] = []
        try:
            self._server = _Server(bind, self)
        except OSError as error:
            why = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
            raise ProblemError(f"--bind {bind[0]}:{bind[1]}: cannot listen there: {why}; give an address of this host and a free port") from None
        self.port = int(self._server.server_address[1])
        self.bound = f"{bind[0]}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="receiver", daemon=True)

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def gather(self, say: Callable[[str], None], wait_s: float, check: Callable[[], None] = lambda: None) -> None:
        """Wait until all workers have joined, saying each; `check` may raise. Raises ProblemError where some never do."""
        deadline = time.monotonic() + wait_s
        while True:
            self._drop_silent()
            news, self._news = self._news, []
            for said in news:
                say(said)
            here = list(self.members.values())
            if len(here) >= self.workers:
                return
            check()
            if time.monotonic() > deadline:
                where = f" ({', '.join(sorted({member.host for member in here}))})" if here else ""
                raise ProblemError(
                    f"{len(here)} of {self.workers} workers joined within {wait_s:g} s{where}; "
                    f"start `kilocopy join HOST:{self.port} --run DIR` where they shall run, or lower --join"
                )
            time.sleep(0.1)

    def _drop_silent(self) -> None:
        """Before the run begins, who fell silent makes room for another."""
        with self._lock:
            for name, member in list(self.members.items()):
                if time.monotonic() - member.heard_s > SILENT_S or member.code is not None:
                    del self.members[name]
                    self._news.append(f"a worker on {member.host} is gone again")

    def begin(self, master_port: int) -> None:
        """Everyone is there: from now on Locust's master can be reached. Who they are is written down."""
        with self._lock:
            self._events = Events(self.run_dir, "receiver")
            for member in self.members.values():
                self._write_joined(member)
            self.master_port = master_port

    def finish(self, wait_s: float = HOME_S) -> list[str]:
        """Wait until each one has sent its last bytes; returns a sentence for each that fell silent before, or failed."""
        self.over = True
        deadline = time.monotonic() + wait_s
        while True:
            now_s = time.monotonic()
            missing = [member for member in list(self.members.values()) if member.code is None]
            if not missing or now_s > deadline or all(now_s - member.heard_s > SILENT_S for member in missing):
                break
            time.sleep(0.05)
        for member in missing:
            self._write("records_missing", on=member.host)
        return [f"the worker on {member.host} fell silent before it had sent everything: what came is kept, the rest is on that host" for member in missing]

    def admit(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Someone wants to join: status and answer."""
        member = Member(str(asked.get("host")), time.monotonic(), about=asked)
        with self._lock:
            if len(self.members) >= self.workers:
                return 409, {"error": f"all {self.workers} workers that the leader waits for (--join {self.workers}) are there already"}
            name = uuid.uuid4().hex
            self.members[name] = member
            self._news.append(f"a worker on {member.host} joined ({len(self.members)} of {self.workers})")
            if self._events is not None:
                self._write_joined(member)
        return 200, {"id": name, "same_clock": asked.get("clock") == clock_of_host()}

    def hear(self, name: str, said: dict[str, Any]) -> dict[str, Any]:
        """A sign of life, with or without a comparison of clocks."""
        if "of" in said and name in self.members and self._events is not None:
            kept = {key: said.get(key) for key in ("of", "offset_ns", "error_ns", "at_ns", "same")}
            self._write("clock", on=self.members[name].host, **kept)
        return {"begun": self.master_port is not None, "over": self.over}

    def part(self, name: str, said: dict[str, Any]) -> None:
        """Someone has sent everything and goes."""
        if name in self.members:
            self.members[name].code = int(said.get("code", 0))

    def _write_joined(self, member: Member) -> None:
        same = member.about.get("clock") == clock_of_host()
        about = {key: member.about.get(key) for key in ("hardware", "versions")}
        assert self._events is not None  # noqa: S101
        self._events.write("joined", on=member.host, same_clock=same, **about)

    def _write(self, event: str, **fields: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # the disk is full: the run says so in its own place
            if self._events is not None:
                self._events.write(event, **fields)

    def run(self) -> dict[str, Any]:
        """What is to be played."""
        told = {"run": self.run_dir.name, "url": self.url, "spec": self.spec.model_dump(mode="json"), "workers": self.workers}
        return {**told, "files": self._sums, "version": __version__, "commit": self.commit}

    def append(self, name: str, offset: int, part: bytes) -> tuple[int, dict[str, Any]]:
        """Append what a file grew by, where the file ends there. Raises OSError where the disk is full."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            path = self.run_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                if offset != size:
                    return 409, {"size": size}
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
                return 200, {"size": size + len(part)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, bind: tuple[str, int], receiver: Receiver) -> None:
        self.receiver = receiver
        self.address_family = socket.getaddrinfo(*bind, type=socket.SOCK_STREAM)[0][0]
        super().__init__(bind, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Someone hung up in the middle of a request: no news here; it comes back, or is missed by Locust."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # round trips compare clocks
    timeout = 120
    server: _Server

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  http.server's name
        """Nothing: the leader's terminal shows the run."""

    @property
    def _name(self) -> str:
        return self.headers.get("X-Kilocopy-Member", "")

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _heard(self) -> bytes | None:
        """The body, read before anything is answered (a connection closed over unread bytes takes the answer with it); None: refused."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= BYTES_MAX:
            self.close_connection = True
            self._answer(413, {"error": "too much at once"})
            return None
        body = self.rfile.read(length)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(errors="replace"), self.server.receiver.token.encode()):
            self.close_connection = True
            self._answer(403, {"error": f"the leader does not know this token: {TOKEN} has to be the same on both sides"})
            return None
        member = self.server.receiver.members.get(self._name)
        if member is not None:
            member.heard_s = time.monotonic()
        return body

    def do_GET(self) -> None:
        """/clock, /run."""
        if self._heard() is None:
            return
        if self.path == "/clock":
            self._answer(200, {"perf_ns": time.perf_counter_ns()})
        elif self.path == "/run":
            self._answer(200, self.server.receiver.run())
        else:
            self._answer(404, {"error": "no such thing"})

    def do_POST(self) -> None:
        """/join, /here, /done."""
        body = self._heard()
        if body is None:
            return
        receiver, said = self.server.receiver, json.loads(body or b"{}")
        if self.path == "/join":
            self._answer(*receiver.admit(said))
        elif self._name not in receiver.members:
            self._answer(410, {"error": "the leader does not count on this process any more"})
        elif self.path == "/here":
            self._answer(200, receiver.hear(self._name, said))
        elif self.path == "/done":
            receiver.part(self._name, said)
            self._answer(200, {})
        else:
            self._answer(404, {"error": "no such thing"})

    def do_PUT(self) -> None:
        """/records/KIND/FILE."""
        body = self._heard()
        if body is None:
            return
        parts = urlsplit(self.path)
        name, offset = parts.path.removeprefix("/records/"), parse_qs(parts.query).get("offset", [""])[0]
        if not FILE.fullmatch(name) or not offset.isdigit():
            self._answer(400, {"error": f"{name}: not a file of records"})
            return
        try:
            self._answer(*self.server.receiver.append(name, int(offset), body))
        except OSError as error:
            self._answer(507, {"error": f"the leader cannot write {name}: {error.strerror}"})

    def do_CONNECT(self) -> None:
        """/master: joins the two connections until one side hangs up."""
        if self._heard() is None:
            return
        self.close_connection = True
        port, deadline = self.server.receiver.master_port, time.monotonic() + MASTER_S
        while True:
            try:
                if port is None:
                    raise OSError
                master = socket.create_connection(("127.0.0.1", port), timeout=5)
                break
            except OSError:
                if port is None or time.monotonic() > deadline or self.server.receiver.over:
                    self._answer(409, {"error": "Locust's master does not listen"})
                    return
                time.sleep(0.1)
        self.send_response(200)
        self.end_headers()
        splice(self.connection, master)


def splice(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes between two connections, both ways, until either ends; closes both."""
    back = threading.Thread(target=_carry, args=(other, one), daemon=True)
    back.start()
    _carry(one, other)
    back.join()
    for end in (one, other):
        end.close()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        source.settimeout(None)
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while part := source.recv(2**16):
            sink.sendall(part)
    for end in (sink, source):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
