"""A spec as docker compose for one GPU host: the server, Prometheus, Grafana and DCGM's exporter, all on loopback, and the driver on demand.

The files are a pure function of the spec; `up` and `down` go through the user's own docker. The containers share the host's network, so that the endpoint, the metrics pages and Grafana stay on
127.0.0.1, and the driver's clock has no bridge in its way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilocopy import placement, provision
from kilocopy.application import IMAGE_CHECKOUT, connections, environment, files_for
from kilocopy.kuberay import EXPORT_PORT, GID, POWER_PORT, UID, instance
from kilocopy.problem import ProblemError
from kilocopy.spec import Deploy, GpuReplica, Spec
from kilocopy.tool import call, show

DCGM_IMAGE = "nvcr.io/nvidia/k8s/dcgm-exporter:4.6.0-4.8.3-distroless"
PROMETHEUS, GRAFANA, DCGM = 9090, 3000, 9400
RUN_POWER_PORT = POWER_PORT - 1  # the driver's page of the joules of its run
MOUNTED_SPEC, STATE, RUNS = "/etc/kilocopy/spec.yaml", "/state", "/runs"


def files(spec: Spec) -> dict[str, str]:
    """compose.yaml, the spec as it is served there, and what Prometheus and Grafana are configured with. Raises ProblemError."""
    placement.check(spec)
    placed, deploy = placement.place(spec), placement.needed(spec)
    if placed.nodes > 1:
        raise ProblemError(f"cluster: {spec.cluster.replicas} replicas need {placed.nodes} nodes as deploy.node has them; --target compose is one host")
    if deploy.models is not None:
        raise ProblemError("deploy.models: a claim is Kubernetes'; for --target compose give model.source as a Hugging Face id, s3:// or gs://")
    # A run's own targets folder is a directory of its own below RUNS, where file_sd cannot look: the driver's pages have ports that are known beforehand.
    ports = [POWER_PORT, RUN_POWER_PORT, *(EXPORT_PORT + worker for worker in range(placed.driver_workers))]
    pages = [f"http://127.0.0.1:{port}/metrics" for port in ports]
    watched = provision.Watched(targets=[f"{STATE}/targets/*.json"], own=pages, cluster=spec.name, model=spec.model.id)
    made = {f"watch/{name}": text for name, text in provision.files(watched, f"http://127.0.0.1:{PROMETHEUS}", "/watch").items()}
    if placed.gpus_per_node:
        config = provision.scrape_config(watched)
        dcgm = {"targets": [f"127.0.0.1:{DCGM}"], "labels": {"cluster": spec.name}}
        config["scrape_configs"].append({"job_name": "dcgm", "scrape_interval": "5s", "static_configs": [dcgm]})
        made["watch/prometheus/prometheus.yml"] = provision.yaml_text(config)
    return {"compose.yaml": provision.yaml_text(provision.for_compose(_compose(spec, deploy, placed))), **made}


def _compose(spec: Spec, deploy: Deploy, placed: placement.Placement) -> dict[str, Any]:
    services = {"server": _server(spec, deploy, placed), "power": _power(spec, deploy, placed), "driver": _driver(spec, deploy, placed)}
    services |= {"prometheus": _prometheus(), "grafana": _grafana()}
    if placed.gpus_per_node:
        services["dcgm-exporter"] = _dcgm()
    volumes: dict[str, Any] = {"state": {}, "hub": {}, "prometheus": {}, "grafana": {}}
    return {"name": instance(spec), "services": services, "volumes": volumes}


def _own(spec: Spec, deploy: Deploy) -> dict[str, Any]:
    """What server and driver share: the image, its user, no privileges, the spec and the state."""
    files = max(65536, files_for(connections(spec)))
    return {
        "image": deploy.image,
        "user": f"{UID}:{GID}",
        "network_mode": "host",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "ulimits": {"nofile": {"soft": files, "hard": files}},
        "volumes": [f"./spec.yaml:{MOUNTED_SPEC}:ro", f"state:{STATE}", "hub:/home/ray/.cache/huggingface"],
    }


def _server(spec: Spec, deploy: Deploy, placed: placement.Placement) -> dict[str, Any]:
    # A name without a value takes it from the shell that runs compose: nothing secret stands in the file.
    variables = environment(spec, IMAGE_CHECKOUT) | {"KILOCOPY_STATE": STATE}
    server = _own(spec, deploy) | {
        "command": ["python", "-m", "kilocopy", "serve", MOUNTED_SPEC, "--stay"],
        "environment": [f"{key}={value}" for key, value in variables.items()] + ["HF_TOKEN"],
        "shm_size": f"{deploy.node.shm_gib}gb",
        "stop_grace_period": "60s",
        "healthcheck": {
            "test": ["CMD-SHELL", f"grep -q '\"phase\": *\"ready\"' {STATE}/state.json && curl -fsS http://127.0.0.1:{spec.cluster.port}/v1/models"],
            "interval": "5s",
            "timeout": "5s",
            "retries": 1,
            "start_period": f"{spec.cluster.start_timeout_s:.0f}s",
        },
    }
    return server | _gpus(spec, placed)


def _gpus(spec: Spec, placed: placement.Placement) -> dict[str, Any]:
    """The GPUs that serve."""
    if not isinstance(spec.cluster.hardware, GpuReplica):
        return {}
    device = {"driver": "nvidia", "count": placed.gpus_per_node, "capabilities": ["gpu"]}
    return {"deploy": {"resources": {"reservations": {"devices": [device]}}}}


def _power(spec: Spec, deploy: Deploy, placed: placement.Placement) -> dict[str, Any]:
    """The power meters' page: of the server's GPUs, and of the CPU packages where the host lets a plain user read them."""
    meter = _own(spec, deploy) | {
        "command": ["python", "-m", "cluster.power", "--page", "--port", str(POWER_PORT)],
        "environment": [f"PYTHONPATH={IMAGE_CHECKOUT}"],
    }
    del meter["volumes"]
    return meter | _gpus(spec, placed)


def _driver(spec: Spec, deploy: Deploy, placed: placement.Placement) -> dict[str, Any]:
    """Started on demand (`docker compose run --rm driver`); it sees the server's processes, to know that it still lives."""
    driver = _own(spec, deploy) | {
        "command": ["python", "-m", "kilocopy", "drive", MOUNTED_SPEC, "--runs", RUNS, "--workers", str(placed.driver_workers),
                    "--power", f"http://127.0.0.1:{POWER_PORT}/metrics"],
        "environment": [f"PYTHONPATH={IMAGE_CHECKOUT}", f"KILOCOPY_STATE={STATE}", f"KILOCOPY_EXPORT_PORT={EXPORT_PORT}",
                        f"KILOCOPY_POWER_PORT={RUN_POWER_PORT}", "HF_TOKEN", "KILOCOPY_API_KEY"],
        "profiles": ["drive"],
        "pid": "service:server",
        "depends_on": {"server": {"condition": "service_healthy"}},
    }
    driver["volumes"] = [*driver["volumes"], f"./runs:{RUNS}"]
    return driver


def _prometheus() -> dict[str, Any]:
    return {
        "image": provision.IMAGES["prometheus"],
        "network_mode": "host",
        "command": [
            "--config.file=/watch/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus", f"--web.listen-address=127.0.0.1:{PROMETHEUS}",
        ],
        "volumes": ["./watch:/watch:ro", f"state:{STATE}:ro", "prometheus:/prometheus"],
    }  # fmt: skip


def _grafana() -> dict[str, Any]:
    """Whoever is on this host looks, and nobody logs in."""
    return {
        "image": provision.IMAGES["grafana"],
        "network_mode": "host",
        "environment": [
            "GF_SERVER_HTTP_ADDR=127.0.0.1", f"GF_SERVER_HTTP_PORT={GRAFANA}", "GF_PATHS_PROVISIONING=/watch/grafana/provisioning",
            "GF_AUTH_ANONYMOUS_ENABLED=true", "GF_AUTH_ANONYMOUS_ORG_ROLE=Viewer", "GF_AUTH_DISABLE_LOGIN_FORM=true",
            "GF_ANALYTICS_REPORTING_ENABLED=false", "GF_ANALYTICS_CHECK_FOR_UPDATES=false",
        ],
        "volumes": ["./watch:/watch:ro", "grafana:/var/lib/grafana"],
    }  # fmt: skip


def _dcgm() -> dict[str, Any]:
    device = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    return {
        "image": DCGM_IMAGE,
        "network_mode": "host",
        "cap_add": ["SYS_ADMIN"],  # for the profiling counters
        "environment": [f"DCGM_EXPORTER_LISTEN=127.0.0.1:{DCGM}", "DCGM_EXPORTER_INTERVAL=1000"],
        "deploy": {"resources": {"reservations": {"devices": [device]}}},
    }


# ---------------------------------------------------------------------------------------------------------- docker's own part


def up(spec: Spec, folder: Path, say: Callable[[str], None], *, poll_s: float = 2.0) -> None:
    """Start everything and wait until the server answers. Raises ProblemError."""
    _check()
    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    runs.chmod(0o1777)  # the driver's container writes there as a user of its own
    done = call(["docker", *_project(spec), "up", "--detach", "--quiet-pull"], timeout_s=3600, cwd=folder)
    if done.code:
        raise ProblemError(_cure(f"docker compose up: {done.said}"))
    until_s, said = time.monotonic() + spec.cluster.start_timeout_s, ""
    while True:
        server = _services(spec, folder).get("server")
        if server is None or server.get("State") in {"exited", "dead"}:
            log = call(["docker", *_project(spec), "logs", "--no-log-prefix", "--tail", "20", "server"], cwd=folder)
            raise ProblemError(f"the server ended (exit code {(server or {}).get('ExitCode')}):\n{(log.out or log.error).rstrip()}")
        log = call(["docker", *_project(spec), "logs", "--no-log-prefix", "--tail", "1", "server"], cwd=folder)
        words = f"server {server.get('Health') or server.get('State')}" + (f": {line}" if (line := log.out.strip()) else "")
        if words != said:
            said = words
            say(words)
        if server.get("Health") == "healthy":
            say(f"endpoint http://127.0.0.1:{spec.cluster.port}, Grafana http://127.0.0.1:{GRAFANA}")
            return
        if time.monotonic() > until_s:
            raise ProblemError(f"not serving after {spec.cluster.start_timeout_s:g} s (cluster.start_timeout_s): {words}; what was started is left as it is")
        time.sleep(poll_s)


def _check() -> None:
    """Docker, its compose plugin, its daemon. Raises ProblemError."""
    if call(["docker", "compose", "version"]).code:
        raise ProblemError("docker: has no compose plugin; install docker-compose-plugin (`docker compose version` shows it)")
    daemon = call(["docker", "info", "--format", "{{.ServerVersion}}"])
    if daemon.code:
        raise ProblemError(f"docker: its daemon does not answer: {daemon.said}")


def _project(spec: Spec) -> list[str]:
    return ["compose", "--project-name", instance(spec)]


def _services(spec: Spec, folder: Path) -> dict[str, dict[str, Any]]:
    """`docker compose ps`: an object a line, or in newer versions one list."""
    done = call(["docker", *_project(spec), "ps", "--all", "--format", "json"], cwd=folder)
    if done.code:
        raise ProblemError(f"docker compose ps: {done.said}")
    text = done.out.strip()
    found = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    return {service["Service"]: service for service in found}


def _cure(said: str) -> str:
    """What to do about what docker says."""
    if "could not select device driver" in said or ("nvidia" in said and "runtime" in said):
        return f"{said}; install the NVIDIA container toolkit and restart docker"
    if any(words in said for words in ("pull access denied", "manifest unknown", "not found", "unauthorized")):
        return f"{said}; is deploy.image built and pushed (or built here), and are you logged in to its registry?"
    return said


def drive(spec: Spec, folder: Path) -> int:
    """Drive in a container beside the server, its words on the terminal; returns its exit code. Run directories are in FOLDER/runs."""
    return show(["docker", *_project(spec), "--profile", "drive", "run", "--rm", "driver"], cwd=folder)


def down(spec: Spec, folder: Path, say: Callable[[str], None]) -> None:
    """Stop and remove the project's containers and volumes. Run directories stay. Raises ProblemError."""
    _check()
    done = call(["docker", *_project(spec), "--profile", "drive", "down", "--volumes"], timeout_s=600, cwd=folder)
    if done.code:
        raise ProblemError(f"docker compose down: {done.said}")
    say(f"removed the containers and volumes of {instance(spec)}; {folder / 'runs'} is kept")
