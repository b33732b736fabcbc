"""What is rendered for Prometheus and Grafana: read by Prometheus' own tool, and pointing at what is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from kilocopy import dashboards, kuberay, provision, rules
from kilocopy.problem import ProblemError
from kilocopy.provision import Watched
from tests.deployments import spec
from tests.test_cli import kilocopy, refused

PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)")
EVERYTHING = Watched(
    targets=["/runs/20261125T120000_demo/targets/*.json"],
    servers=["http://10.0.0.1:8080/metrics", "https://vllm.example/v1/metrics"],
    servers_files=["/tmp/ray/prom_metrics_service_discovery.json"],  # noqa: S108
    cluster="pays $1 an hour",
    model="org/m-1.5",
    own=["http://127.0.0.1:9646/metrics"],
)


ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "deploy" / "compose.yaml"


def load(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


@PROMTOOL
@pytest.mark.parametrize("watched", [EVERYTHING, Watched(targets=EVERYTHING.targets), Watched(servers=EVERYTHING.servers, cluster="c")])
def test_prometheus_takes_the_configuration(tmp_path: Path, watched: Watched) -> None:
    made = provision.render(tmp_path, watched)
    done = subprocess.run(["promtool", "check", "config", str(made["prometheus"])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules.RULES) + len(rules.ALERTS)} rules found" in done.stdout


def test_pages_have_the_labels_that_rules_ask_for_whoever_finds_them() -> None:
    """`job`, `cluster` and `model`: in a Prometheus of ours and by the operator's monitors, whose own job would be `namespace/name`."""

    def named(relabelled: list[dict[str, Any]]) -> dict[str, str]:
        return {rule.get("target_label", rule.get("targetLabel")): rule["replacement"] for rule in relabelled if "action" not in rule}

    jobs = {job["job_name"]: named(job["relabel_configs"]) for job in provision.scrape_config(EVERYTHING)["scrape_configs"]}
    servers = {"cluster": "pays $$1 an hour", "model": "org/m-1.5", "job": "servers"}
    assert jobs == {"kilocopy": {}, "servers": {}, "more servers": servers, "more of kilocopy's": {"cluster": "pays $$1 an hour", "job": "kilocopy"}}
    deployed = spec("h100")
    monitors = [thing for thing in kuberay.objects(deployed)["monitoring.yaml"] if thing["kind"] == "PodMonitor"]
    found = [named(endpoint["relabelings"]) for monitor in monitors for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    assert {"cluster": deployed.name, "model": deployed.model.id, "job": "servers"} in found
    assert {"cluster": deployed.name, "job": "kilocopy"} in found
    assert {"cluster": deployed.name, "job": "dcgm"} in found
    assert {labels["job"] for labels in found} == {"servers", "kilocopy", "dcgm"}
    [duration] = [query for panel in dashboards.DRIVER.panels for query, _ in panel.queries if "scrape_duration" in query]
    assert 'job=~"kilocopy|servers"' in duration


def test_grafana_finds_the_dashboards_and_the_dashboards_their_source(tmp_path: Path) -> None:
    made = provision.render(tmp_path, EVERYTHING, prometheus_url="http://127.0.0.1:9999")
    [source] = load(made["grafana"] / "datasources/kilocopy.yaml")["datasources"]
    [provider] = load(made["grafana"] / "dashboards/kilocopy.yaml")["providers"]
    boards = [json.loads(path.read_text()) for path in Path(provider["options"]["path"]).glob("*.json")]
    assert {board["uid"] for board in boards} == {board.uid for board in dashboards.DASHBOARDS}
    assert {board["templating"]["list"][0]["current"]["value"] for board in boards} == {source["uid"]}
    assert (source["url"], source["access"], source["jsonData"]["timeInterval"]) == ("http://127.0.0.1:9999", "proxy", "2s")


def test_in_a_container_grafana_sees_another_path(tmp_path: Path) -> None:
    made = provision.render(tmp_path, EVERYTHING, seen_at="/etc/kilocopy")
    assert load(made["grafana"] / "dashboards/kilocopy.yaml")["providers"][0]["options"]["path"] == "/etc/kilocopy/grafana/dashboards"
    assert load(made["prometheus"])["rule_files"] == ["rules/kilocopy.yaml"]  # beside it, wherever that is


def test_rendering_again_touches_nothing(tmp_path: Path) -> None:
    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    provision.render(tmp_path, EVERYTHING)
    before = stamps()
    provision.render(tmp_path, EVERYTHING)
    assert stamps() == before
    assert not [path for path in before if path.suffix == ".tmp"]


@pytest.mark.parametrize(
    ("watched", "said"),
    [
        (Watched(), "nothing to watch"),
        (Watched(servers=["http://h:1/metrics"]), "name of their cluster"),
        (Watched(servers=["h:1"], cluster="c"), "h:1: a metrics page is http"),
        (Watched(targets=["/runs/*/targets/*.json"]), "not a pattern that Prometheus takes"),
    ],
)
def test_what_prometheus_would_refuse_is_refused_before(tmp_path: Path, watched: Watched, said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        provision.render(tmp_path, watched)
    assert list(tmp_path.iterdir()) == []


def test_kubernetes_gets_config_maps_for_grafanas_sidecar() -> None:
    maps = provision.config_maps("monitoring", {"app": "kilocopy"})
    assert {each["metadata"]["labels"]["grafana_dashboard"] for each in maps} == {"1"}
    inside = [json.loads(text) for each in maps for text in each["data"].values()]
    assert inside == [dashboards.document(board) for board in dashboards.DASHBOARDS]
    assert len({each["metadata"]["name"] for each in maps}) == len(maps)
    assert max(len(json.dumps(each)) for each in maps) < 2**20
    assert provision.prometheus_rule("monitoring")["spec"] == rules.document()


def test_the_command_renders_a_run(tmp_path: Path) -> None:
    (tmp_path / "r1").mkdir()
    assert "r1: not a run directory" in refused(kilocopy("dashboards", "render", "out", "--run", "r1", cwd=tmp_path))
    assert not (tmp_path / "out").exists()
    (tmp_path / "r1/manifest.json").write_text("{}")
    done = kilocopy("dashboards", "render", "out", "--run", "r1", cwd=tmp_path)
    assert done.stdout.splitlines() == ["out/prometheus/prometheus.yml", "out/grafana/provisioning"]
    assert f"{tmp_path}/r1/targets/*.json" in (tmp_path / "out/prometheus/prometheus.yml").read_text()
    assert "nothing to watch" in refused(kilocopy("dashboards", "render", "none", cwd=tmp_path))


def bound(path: Path) -> dict[str, Any]:
    """A folder that a container sees under its own name, and only reads; in the long form, since a path may have a `:`."""
    return {"type": "bind", "source": str(path), "target": str(path), "read_only": True}


def composed(tmp_path: Path) -> dict[str, Any]:
    """deploy/compose.yaml with its variables filled in as compose does, from the environment file that was rendered."""
    provision.render(tmp_path / "watched", Watched(targets=[f"{tmp_path}/runs/r1/targets/*.json"]), prometheus_url="http://127.0.0.1:9191")
    settings = dict(line.split("=", 1) for line in (tmp_path / "watched/compose.env").read_text().splitlines())
    settings = {name: value.strip("'") for name, value in settings.items()} | {"GRAFANA_PASSWORD": "chosen"}

    def fill(found: re.Match[str]) -> str:
        name, _, rest = found[1].partition(":")
        assert name in settings or rest.startswith("-"), f"nobody sets {name}"
        return settings.get(name, rest.removeprefix("-"))

    return dict(YAML(typ="safe").load(re.sub(r"\$\{([^}]+)\}", fill, COMPOSE.read_text())))


def test_compose_sees_what_was_rendered_and_nobody_else_sees_it(tmp_path: Path) -> None:
    services = composed(tmp_path)["services"]
    options = dict(option.removeprefix("--").split("=", 1) for option in services["prometheus"]["command"])
    settings = services["grafana"]["environment"]
    assert load(Path(options["config.file"]))["scrape_configs"][0]["file_sd_configs"][0]["files"] == [f"{tmp_path}/runs/r1/targets/*.json"]
    assert bound(tmp_path / "runs") in services["prometheus"]["volumes"]
    [source] = load(Path(settings["GF_PATHS_PROVISIONING"]) / "datasources/kilocopy.yaml")["datasources"]
    assert source["url"] == f"http://{options['web.listen-address']}" == "http://127.0.0.1:9191"
    [provider] = load(Path(settings["GF_PATHS_PROVISIONING"]) / "dashboards/kilocopy.yaml")["providers"]
    assert Path(provider["options"]["path"]) == Path(settings["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).parent
    assert settings["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    for service in services.values():
        assert re.fullmatch(r"[\w/.-]+:v?\d+\.\d+\.\d+", service["image"])
        assert "ports" not in service
        assert service["network_mode"] == "host"
        assert bound(tmp_path / "watched") in service["volumes"]
        assert service["user"] == f"{os.getuid()}:{os.getgid()}"
        [data] = [volume["source"] for volume in service["volumes"] if not volume.get("read_only")]
        assert os.access(data, os.W_OK)


def test_every_container_of_prometheus_and_grafana_is_of_one_version() -> None:
    """`provision.IMAGES` owns the tags; whatever else names such an image, in code, YAML or a document, says the same."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    texts = [(ROOT / name).read_text(errors="ignore") for name in listed if name.endswith((".py", ".yaml", ".md", ".sh")) and (ROOT / name).exists()]
    named = {found for text in texts for found in re.findall(r"\b(?:prom/prometheus|grafana/grafana(?:-oss)?):[\w.-]+", text)}
    assert named == set(provision.IMAGES.values())
    assert {service["image"] for service in YAML(typ="safe").load(COMPOSE.read_text())["services"].values()} == set(provision.IMAGES.values())


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed (Debian's package docker-compose)")
def test_compose_takes_the_file(tmp_path: Path) -> None:
    """Its own check against the schema; it needs no engine."""
    provision.render(tmp_path, EVERYTHING)
    command = ["docker-compose", "--env-file", str(tmp_path / "compose.env"), "-f", str(COMPOSE), "config"]
    without = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without | {"GRAFANA_PASSWORD": "chosen"})
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/prometheus/prometheus.yml" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without)
    assert done.returncode != 0
    assert "choose the password of Grafana's admin" in done.stderr
