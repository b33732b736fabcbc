"""`kilocopy join`: one driver worker on this host, for a leader elsewhere. It needs the leader's address and the token, nothing else.

Spec, address of the servers, share and seeds come from the leader. This process starts Locust's worker beside it, carries its connection
to the leader's port, and sends home what its files grew by, twice a second. The files stay here too: whatever the network does, the
worst is that they have to be copied by hand. Once a second the two clocks are compared by round trips.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilocopy import __version__, driving, limits, manifest, records
from kilocopy.problem import ProblemError
from kilocopy.receiving import clock_of_host, splice, sums
from kilocopy.spec import Spec, streams_max

SHIP_S = 0.5
CLOCK_S = 1.0
ROUNDS = 8
PART_BYTES = 2**20
TIMEOUT_S = 10.0
LOST_S = 30.0  # a leader that did not answer for so long is gone
KINDS = ("events", "requests", "driver", "texts")  # events first: what they say of rows has then been written before the rows are read
CLOCK = "clock.json"  # the offset as it is now, for the worker beside


class LeaderLostError(Exception):
    """The leader did not answer; it may later."""


class Leader:
    """The line to the leader: one connection, opened again where it broke."""

    def __init__(self, address: tuple[str, int], token: str) -> None:
        self.address, self._token, self.member = address, token, ""
        self._connection: http.client.HTTPConnection | None = None

    @property
    def shown(self) -> str:
        """HOST:PORT."""
        return f"{self.address[0]}:{self.address[1]}"

    @property
    def headers(self) -> dict[str, str]:
        """Who asks."""
        return {"Authorization": f"Bearer {self._token}", "X-Kilocopy-Member": self.member}

    def ask(self, method: str, path: str, body: bytes | dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of the answer. Raises LeaderLostError."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection(*self.address, timeout=TIMEOUT_S)
                self._connection.connect()
                self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connection.request(method, path, data, self.headers)
            answer = self._connection.getresponse()
            value = json.loads(answer.read() or b"{}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.hang_up()
            raise LeaderLostError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None
        if answer.will_close:
            self.hang_up()
        return answer.status, value if isinstance(value, dict) else {}

    def hang_up(self) -> None:
        """Close the connection; the next question opens one."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def offset(self) -> tuple[int, int, int]:
        """This host's monotonic clock minus the leader's, half the round trip that bounds its error, and when (here), ns.

        Of a few round trips the quickest: its error is at most half its length, however unequal the two ways are (Cristian 1989).
        """
        best: tuple[int, int, int] | None = None
        for _ in range(ROUNDS):
            asked_ns = time.perf_counter_ns()
            _, said = self.ask("GET", "/clock")
            heard_ns = time.perf_counter_ns()
            error_ns = (heard_ns - asked_ns + 1) // 2
            if "perf_ns" in said and (best is None or error_ns < best[1]):
                best = ((asked_ns + heard_ns) // 2 - int(said["perf_ns"]), error_ns, asked_ns)
        if best is None:
            raise LeaderLostError("no clock was given")
        return best

    def enter(self, wait_s: float, look: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Join, waiting for the leader to listen; returns what is to be played, which `look` may refuse. Raises ProblemError."""
        deadline, said = time.monotonic() + wait_s, False
        while True:
            try:
                run = self._welcome(*self.ask("GET", "/run"))
                look(run)
                own = {"hardware": manifest.hardware(), "versions": manifest.versions()}
                asked = {"host": socket.gethostname(), "clock": clock_of_host(), **own}
                joined = self._welcome(*self.ask("POST", "/join", asked))
                self.member = str(joined["id"])
                return run | joined
            except LeaderLostError as error:
                if time.monotonic() > deadline:
                    raise ProblemError(f"{self.shown}: no leader answers there ({error}); is `kilocopy drive ... --join N --bind` running?") from None
                if not said:
                    print(f"join   waiting for a leader at {self.shown} ({error})", flush=True)
                    said = True
                time.sleep(0.5)

    def _welcome(self, status: int, said: dict[str, Any]) -> dict[str, Any]:
        if status != 200 or not said:
            raise ProblemError(f"{self.shown}: {said.get('error') or f'HTTP {status}: this is not a leader of kilocopy'}")
        return said

    def begun(self) -> None:
        """Wait until everyone is there. Raises ProblemError where the leader goes away before."""
        while True:
            try:
                status, said = self.ask("POST", "/here", {})
            except LeaderLostError as error:
                raise ProblemError(f"{self.shown}: the leader was lost before the run began ({error}); see its terminal") from None
            if self._welcome(status, said).get("begun"):
                return
            time.sleep(0.2)


class Shipper:
    """Sends home what the files of a folder grew by."""

    def __init__(self, leader: Leader, folder: Path) -> None:
        self._leader, self._folder = leader, folder
        self._sent: dict[str, int] = {}

    def files(self) -> list[Path]:
        """The files of records there are, in the order in which they are sent."""
        return [path for kind in KINDS for path in sorted((self._folder / kind).glob("*.*"))]

    def ship(self) -> int:
        """Send what is new; returns how many bytes. Raises LeaderLostError."""
        return sum(self._send(path) for path in self.files())

    def _send(self, path: Path) -> int:
        name, total = f"{path.parent.name}/{path.name}", 0
        with path.open("rb") as file:
            while True:
                file.seek(self._sent.setdefault(name, 0))
                part = file.read(PART_BYTES)
                if not part:
                    return total
                status, said = self._leader.ask("PUT", f"/records/{name}?offset={self._sent[name]}", part)
                if status not in {200, 409} or "size" not in said:
                    raise LeaderLostError(str(said.get("error", f"HTTP {status}")))
                if int(said["size"]) == self._sent[name] and status == 409:
                    raise LeaderLostError(f"{name}: the leader does not go on")
                self._sent[name] = int(said["size"])
                total += len(part) if status == 200 else 0


class Liaison:
    """Between a process here and the leader: its records, its clock, and the word that the run is over."""

    def __init__(self, leader: Leader, folder: Path, *, same_clock: bool) -> None:
        self.leader, self.folder, self._same = leader, folder, same_clock
        self.shipper = Shipper(leader, folder)
        self._next_clock_s, self._heard_s = 0.0, time.monotonic()

    def compare(self) -> tuple[int, int]:
        """Compare the clocks, and keep the offset for the worker beside: (offset, error) in ns. Raises LeaderLostError."""
        offset_ns, error_ns, at_ns = self.leader.offset()
        records.write_json(self.folder / CLOCK, {"offset_ns": 0 if self._same else offset_ns})
        for process in sorted({path.stem for path in self.shipper.files()}):
            self.leader.ask("POST", "/here", {"of": process, "offset_ns": offset_ns, "error_ns": error_ns, "at_ns": at_ns, "same": self._same})
        return offset_ns, error_ns

    def carry_on(self, process: subprocess.Popen[bytes]) -> None:
        """Until the process ends, the leader says that the run is over, or it is gone for good."""
        while process.poll() is None and time.monotonic() - self._heard_s < LOST_S:
            with contextlib.suppress(LeaderLostError):  # tried again in half a second, from where it broke off
                self.shipper.ship()
                if time.monotonic() >= self._next_clock_s:
                    self._next_clock_s = time.monotonic() + CLOCK_S
                    self.compare()
                status, said = self.leader.ask("POST", "/here", {})
                self._heard_s = time.monotonic()
                if said.get("over") or status == 410:
                    return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SHIP_S)

    def bring_home(self, code: int) -> None:
        """The last bytes, and word that they were the last. Raises ProblemError where the leader is gone for good."""
        deadline = time.monotonic() + LOST_S
        while True:
            try:
                self.shipper.ship()
                with contextlib.suppress(LeaderLostError):
                    self.compare()
                self.leader.ask("POST", "/done", {"code": code})
                self.leader.hang_up()
                return
            except LeaderLostError as error:
                if time.monotonic() > deadline:
                    where = f"what it did not get is in {self.folder}: copy its folders over those of the run directory, then `kilocopy report`"
                    raise ProblemError(f"{self.leader.shown}: the leader does not answer any more ({error}); {where}") from None
                time.sleep(SHIP_S)


def join(address: tuple[str, int], folder: Path, token: str, wait_s: float) -> int:
    """Be a driver worker until the run ends; returns the worker's exit code. Raises ProblemError where the leader cannot be joined."""
    leader = Leader(address, token)
    prepare(folder)
    run = leader.enter(wait_s, fits)
    print(f"join   {run['run']}: joined, records in {folder}", flush=True)
    leader.begun()
    liaison = Liaison(leader, folder, same_clock=run["same_clock"])
    with contextlib.suppress(LeaderLostError):
        offset_ns, error_ns = liaison.compare()
        print(f"join   begins; clock {offset_ns / 1e6:+.3f} ms from the leader's, within {error_ns / 1e6:.3f} ms", flush=True)
    own = {"KILOCOPY_RECORDS_DIR": str(folder.resolve()), "KILOCOPY_RUN_ID": run["run"]}
    with Tunnel(leader) as tunnel, (folder / "driver.log").open("wb") as log:
        process = driving.start_worker(run["url"], tunnel.port, own, log)
        try:
            liaison.carry_on(process)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
        code = driving.end_worker(process)
    liaison.bring_home(code)
    if code not in {0, driving.INTERRUPTED}:
        driving.repeat(folder / "driver.log")
    return code


def prepare(folder: Path) -> None:
    """Make the folder for the records. Raises ProblemError where it is not a new or empty one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in folder.iterdir() if path.name != "lost+found")
    except OSError as error:
        raise ProblemError(f"--run {folder}: no directory can be made there ({error.strerror}); give another") from None
    if found:
        raise ProblemError(f"--run {folder}: the directory is not empty ({found[0]}); give a new one: each worker keeps its own records")


def fits(run: dict[str, Any]) -> None:
    """Whether this host can play it: the same kilocopy, the same data, sockets enough, the servers in reach. Raises ProblemError."""
    if run["version"] != __version__:
        raise ProblemError(f"the leader runs kilocopy {run['version']}, this worker {__version__}: install the same version on both")
    commit = manifest.commit()
    if commit and run["commit"] and commit != run["commit"]:
        raise ProblemError(f"the leader's checkout is at {_short(run['commit'])}, this worker's at {_short(commit)}: bring both to the same commit")
    spec = Spec.model_validate(run["spec"])
    for path, digest in sums(spec).items():
        if digest != run["files"].get(path):
            what = "is not here" if digest is None else "differs from the leader's"
            raise ProblemError(f"{path}, which the spec names, {what}: copy the leader's to the same path, relative to the current directory")
    limits.refuse(-(-max(streams_max(stage) for stage in spec.stages) // int(run["workers"])), 1)
    driving.probe(run["url"], spec.model.id, os.environ.get("KILOCOPY_API_KEY"), TIMEOUT_S, endpoint=spec.workload.endpoint)


def _short(commit: str) -> str:
    return commit[:12] + ("+changes" if commit.endswith("+changes") else "")


class Tunnel:
    """A loopback port here whose connections come out at Locust's master, by way of the leader's one port and its token."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Tunnel:
        threading.Thread(target=self._accept, name="tunnel", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._through, args=(near,), daemon=True).start()

    def _through(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._leader.address, timeout=TIMEOUT_S)
            head = "".join(f"{name}: {value}\r\n" for name, value in self._leader.headers.items())
            far.sendall(f"CONNECT /master HTTP/1.1\r\nHost: leader\r\n{head}\r\n".encode())
            far.settimeout(90)
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                if not (byte := far.recv(1)):
                    raise OSError("the leader hung up")
                answer += byte
            if answer.split(b" ", 2)[1] != b"200":
                raise OSError("the leader refused")
        except OSError as error:
            sys.stderr.write(f"kilocopy: no way to Locust's master: {error}\n")
            near.close()
            return
        splice(near, far)


