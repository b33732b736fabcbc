"""Everything that a Prometheus and a Grafana need to show runs, rendered into one folder; and the same as Kubernetes objects.

    OUT/prometheus/prometheus.yml            what is scraped, how often, and under which names
    OUT/prometheus/rules/kilocopy.yaml       recording and alert rules (kilocopy/rules.py)
    OUT/grafana/provisioning/datasources/    the Prometheus data source, by a fixed uid
    OUT/grafana/provisioning/dashboards/     where Grafana finds the dashboards
    OUT/grafana/dashboards/*.json            the dashboards (kilocopy/dashboards.py)
    OUT/compose.env                          the folders and the port that deploy/compose.yaml asks for

    prometheus --config.file OUT/prometheus/prometheus.yml
    GF_PATHS_PROVISIONING=OUT/grafana/provisioning grafana server

A run's own pages (driver workers, power meter, the servers that it was told of) are found by the files in its targets/ folder, which
name their cluster; servers beyond that are given to `Watched`, with the name of their cluster: the label by which the dashboards
bring client and servers together. A replica that was never asked says nothing of its model, so the target does (`model`).
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ruamel.yaml import YAML

from kilocopy import dashboards, rules
from kilocopy.problem import ProblemError

SOURCE_UID, SOURCE_NAME = dashboards.SOURCE_UID, "kilocopy Prometheus"
FOLDER_UID, FOLDER_TITLE = "kilocopy", "kilocopy"
# One place for every container of either; deploy/compose.yaml repeats them and a test holds it to that. docs/deploy.md says where they were looked up.
IMAGES = {"prometheus": "prom/prometheus:v3.13.3", "grafana": "grafana/grafana:13.2.3"}
INTERVAL_S = 2
SERVERS_INTERVAL_S = 4  # a node's page is about 1 MB, and a busy one is slow to give it; three fit into the 15 s that rules look back
REFRESH_S = 5  # how soon a run that begins is seen
FILE_SD = re.compile(r"[^*]*(\*[^/]*)?\.(json|yml|yaml)")  # Prometheus' own rule: a star in the last part only


@dataclass(frozen=True, slots=True)
class Watched:
    """What Prometheus reads, as paths and addresses that Prometheus can reach.

    `targets` are file_sd patterns of runs, `RUN/targets/*.json`. Servers that no run's files name: `servers` are metrics pages of
    Ray's agents or of vLLM (`http://host:port/metrics`), `servers_files` are file_sd files, as Ray writes them
    (`prom_metrics_service_discovery.json`); both belong to `cluster`, which is the spec's `name`, and serve `model`, its `model.id` (left
    out: the name of Serve's deployment, which is the id without its `/` and `.`). `own` are pages of kilocopy's at known addresses:
    driver workers, power meters. Times are in seconds.
    """

    targets: Sequence[str] = ()
    servers: Sequence[str] = ()
    servers_files: Sequence[str] = ()
    cluster: str = ""
    model: str = ""
    own: Sequence[str] = ()
    interval_s: float = INTERVAL_S
    servers_interval_s: float = SERVERS_INTERVAL_S


def of_run(run_dir: Path) -> Watched:
    """What there is to watch of one run."""
    return Watched(targets=[f"{run_dir.resolve()}/targets/*.json"])


def render(folder: Path, watched: Watched, *, prometheus_url: str = "http://127.0.0.1:9090", seen_at: str | None = None) -> dict[str, Path]:
    """Write everything into `folder`, and say where: keys `prometheus` (prometheus.yml) and `grafana` (the provisioning folder).

    `prometheus_url` is where Grafana finds Prometheus; `seen_at` is the folder's own path as Grafana sees it, where that is another
    (in a container). Files that are the same already are left alone. Raises ProblemError where something cannot be written or read.
    """
    made = files(watched, prometheus_url, seen_at or str(folder.resolve()))
    write(folder, made | {"compose.env": compose_env(folder, watched, prometheus_url)})
    for name in ("prometheus", "grafana"):  # by us and not by the engine, whose they would be
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
    return {"prometheus": folder / "prometheus" / "prometheus.yml", "grafana": folder / "grafana" / "provisioning"}


def files(watched: Watched, prometheus_url: str, seen_at: str) -> dict[str, str]:
    """What `render` writes for the two servers: texts by their names in the folder, which Grafana sees as `seen_at`. Raises ProblemError."""
    made = {
        "prometheus/prometheus.yml": yaml_text(scrape_config(watched)),
        "prometheus/rules/kilocopy.yaml": rules.text(),
        "grafana/provisioning/datasources/kilocopy.yaml": yaml_text(
            {"apiVersion": 1, "datasources": [_provisioned(prometheus_url, watched)]}
        ),
        "grafana/provisioning/dashboards/kilocopy.yaml": yaml_text(
            {"apiVersion": 1, "providers": [_provider(f"{seen_at}/grafana/dashboards")]}
        ),
    }
    return made | {f"grafana/dashboards/{name}": text for name, text in dashboard_files().items()}


def compose_env(folder: Path, watched: Watched, prometheus_url: str) -> str:
    """What deploy/compose.yaml asks for: both containers see folders of this host under the names that they have here."""
    runs = [str(Path(pattern).parent.parent.parent) for pattern in watched.targets] or [str(folder.resolve())]
    settings = {"KILOCOPY_WATCHED": str(folder.resolve()), "KILOCOPY_RUNS": os.path.commonpath(runs)}
    settings |= {"KILOCOPY_USER": f"{os.getuid()}:{os.getgid()}"}  # who may read a run, and owns what the two store
    settings |= {"COMPOSE_PROJECT_NAME": "kilocopy-watch", "PROMETHEUS_PORT": str(urlsplit(prometheus_url).port or 9090)}
    return "".join(f"{name}='{value}'\n" for name, value in settings.items())  # quoted, so that a $ stays one


def for_compose(said: Any) -> Any:
    """A text, or all texts of a document, as a compose file has to have them: a `$` would begin a variable."""
    if isinstance(said, dict):
        return {key: for_compose(value) for key, value in said.items()}
    if isinstance(said, list):
        return [for_compose(each) for each in said]
    return said.replace("$", "$$") if isinstance(said, str) else said


def write(folder: Path, made: dict[str, str]) -> None:
    """Write files, by their names in `folder`; those that are the same already are left alone. Raises ProblemError."""
    for name, text in made.items():
        path = folder / name
        try:
            if path.is_file() and path.read_text(encoding="utf-8") == text:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.tmp")  # a server that reads its configuration again never sees half of it
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise ProblemError(f"{path}: cannot be written ({error.strerror}); name another folder") from None


def yaml_text(document: Any) -> str:
    """A document as YAML, an expression on one line."""
    yaml, out = YAML(), io.StringIO()
    yaml.width = 10_000
    yaml.representer.ignore_aliases = lambda _: True  # what stands twice is written twice
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(document, out)
    return out.getvalue()


def dashboard_files() -> dict[str, str]:
    """The dashboards' file names and their JSON."""
    return {path.name: text for path, text in dashboards.files().items() if path.suffix == ".json"}


# ------------------------------------------------------------------------------------------------------------- Prometheus


def scrape_config(watched: Watched) -> dict[str, Any]:
    """prometheus.yml as a document. Raises ProblemError for an address or a pattern that Prometheus would refuse."""
    jobs = []
    if watched.targets:
        found = {"file_sd_configs": [_file_sd(watched.targets)]}
        servers = {"source_labels": ["job"], "regex": "servers"}
        jobs.append(_job("kilocopy", watched.interval_s, found, {**servers, "action": "drop"}))
        jobs.append(_job("servers", watched.servers_interval_s, found, {**servers, "action": "keep"}))
    if watched.servers or watched.servers_files:
        if not watched.cluster:
            raise ProblemError("servers without the name of their cluster: give the `name` of the spec that they serve (--cluster)")
        named = server_labels(watched.cluster, watched.model)
        found = {"static_configs": target_groups(watched.servers)} if watched.servers else {}
        found |= {"file_sd_configs": [_file_sd(watched.servers_files)]} if watched.servers_files else {}
        jobs.append(_job("more servers", watched.servers_interval_s, found, *named))
    if watched.own:
        found = {"static_configs": target_groups(watched.own)}
        jobs.append(_job("more of kilocopy's", watched.interval_s, found, *own_labels(watched.cluster)))
    if not jobs:
        raise ProblemError("nothing to watch: give a run (--run RUN), or servers (--servers URL --cluster NAME)")
    return {"global": {"evaluation_interval": "5s"}, "rule_files": ["rules/kilocopy.yaml"], "scrape_configs": jobs}


def server_labels(cluster: str, model: str) -> list[dict[str, Any]]:
    """Relabelling that names the servers' pages as rules and dashboards ask for them, whatever found them."""
    return [_label("cluster", cluster), *([_label("model", model)] if model else []), _label("job", "servers")]


def own_labels(cluster: str) -> list[dict[str, Any]]:
    """The same for kilocopy's own pages: driver workers, power meters."""
    return [*([_label("cluster", cluster)] if cluster else []), _label("job", "kilocopy")]


def dcgm_labels(cluster: str) -> list[dict[str, Any]]:
    """The same for DCGM's exporter."""
    return [_label("cluster", cluster), _label("job", "dcgm")]


def _label(name: str, value: str) -> dict[str, Any]:
    return {"target_label": name, "replacement": value.replace("$", "$$")}


def target_groups(pages: Sequence[str], labels: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Metrics pages, by their addresses, as Prometheus' targets; `labels` are put on each. Raises ProblemError for a bad address."""
    groups = []
    for page in pages:
        parts = urlsplit(page)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ProblemError(f"{page}: a metrics page is http://host:port/path")
        where = {"__scheme__": parts.scheme, "__metrics_path__": parts.path or "/metrics"}
        groups.append({"targets": [parts.netloc.rpartition("@")[2]], "labels": {**where, **(labels or {})}})
    return groups


def _job(name: str, interval_s: float, found: dict[str, Any], *relabelled: dict[str, Any]) -> dict[str, Any]:
    """One job. Labels of a page stand before those of its target (`honor_labels`): a driver says itself of which cluster it is."""
    every = f"{max(1, round(1000 * interval_s))}ms"
    timed = {"scrape_interval": every, "scrape_timeout": every}
    more = {"relabel_configs": list(relabelled), "metric_relabel_configs": one_name_for_both()}
    return {"job_name": name, "honor_labels": True, **timed, **found, **more}


def one_name_for_both() -> list[dict[str, Any]]:
    """vLLM's own pages under the names that Ray's agents give; without what Ray makes up, and without what nobody here asks for."""
    return [
        # Histograms' sums from Ray are made from the middles of buckets.
        {"source_labels": ["__name__"], "regex": "ray_(vllm|serve)_.+_sum", "action": "drop"},
        {"source_labels": ["__name__"], "regex": "vllm:(.+)", "target_label": "__name__", "replacement": "ray_vllm_$1"},
        {"source_labels": ["__name__"], "regex": "(kilocopy|ray_vllm|ray_serve|ray_node)_.+", "action": "keep"},
        # A vLLM server that is no replica of Serve's is known by its address.
        {
            "source_labels": ["__name__", "ReplicaId", "instance"],
            "separator": ";",
            "regex": "ray_vllm_[^;]+;;(.+)",
            "target_label": "ReplicaId",
        },
    ]


def _file_sd(patterns: Sequence[str]) -> dict[str, Any]:
    for pattern in patterns:
        if not FILE_SD.fullmatch(pattern):
            raise ProblemError(f"{pattern}: not a pattern that Prometheus takes: a .json or .yml file, with * in the file's name only")
    return {"files": list(patterns), "refresh_interval": f"{REFRESH_S}s"}


# ---------------------------------------------------------------------------------------------------------------- Grafana


def data_source(prometheus_url: str, interval_s: float = INTERVAL_S) -> dict[str, Any]:
    """The Prometheus data source, as Grafana's API takes it: the server asks, not the browser."""
    return {
        "uid": SOURCE_UID,
        "name": SOURCE_NAME,
        "type": "prometheus",
        "access": "proxy",
        "url": prometheus_url,
        "jsonData": {"httpMethod": "POST", "timeInterval": f"{max(1, round(interval_s))}s"},
    }


def _provisioned(prometheus_url: str, watched: Watched) -> dict[str, Any]:
    return data_source(prometheus_url.replace("$", "$$"), watched.interval_s) | {"orgId": 1, "isDefault": True, "editable": False}


def _provider(path: str) -> dict[str, Any]:
    """Dashboards from files; Grafana looks again every 10 s."""
    return {
        "name": "kilocopy",
        "orgId": 1,
        "folder": FOLDER_TITLE,
        "folderUid": FOLDER_UID,
        "type": "file",
        "disableDeletion": True,
        "allowUiUpdates": False,
        "updateIntervalSeconds": 10,
        "options": {"path": path.replace("$", "$$"), "foldersFromFilesStructure": False},
    }


# ------------------------------------------------------------------------------------------------------------- Kubernetes


def config_maps(namespace: str, labels: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """A ConfigMap for each dashboard, labelled `grafana_dashboard: "1"`, which the sidecar of Grafana's Helm chart looks for."""
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": f"kilocopy-dashboard-{name.removesuffix('.json')}",
                "namespace": namespace,
                "labels": {"grafana_dashboard": "1", **(labels or {})},
                "annotations": {"grafana_folder": FOLDER_TITLE},
            },
            "data": {f"kilocopy-{name}": json.dumps(json.loads(text), separators=(",", ":"))},  # a ConfigMap holds 1 MiB
        }
        for name, text in dashboard_files().items()
    ]


def prometheus_rule(namespace: str, labels: dict[str, str] | None = None) -> dict[str, Any]:
    """The rules as the Prometheus Operator's object; `labels` are those that its Prometheus selects rules by (often `release`)."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "kilocopy", "namespace": namespace, "labels": dict(labels or {})},
        "spec": rules.document(),
    }
