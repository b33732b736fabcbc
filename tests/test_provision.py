"""What is rendered for Prometheus and Grafana: read by Prometheus' own tool, and pointing at what is there."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from kilocopy import dashboards, provision, rules
from kilocopy.problem import ProblemError
from kilocopy.provision import Watched
from tests.test_cli import kilocopy, refused

PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)")
EVERYTHING = Watched(
    targets=["/runs/20261125T120000_demo/targets/*.json"],
    servers=["http://10.0.0.1:8080/metrics", "https://vllm.example/v1/metrics"],
    servers_files=["/tmp/ray/prom_metrics_service_discovery.json"],  # noqa: S108
    cluster="pays $1 an hour",
)


def load(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


@PROMTOOL
@pytest.mark.parametrize("watched", [EVERYTHING, Watched(targets=EVERYTHING.targets), Watched(servers=EVERYTHING.servers, cluster="c")])
def test_prometheus_takes_the_configuration(tmp_path: Path, watched: Watched) -> None:
    made = provision.render(tmp_path, watched)
    done = subprocess.run(["promtool", "check", "config", str(made["prometheus"])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules.RULES) + len(rules.ALERTS)} rules found" in done.stdout


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
    done = kilocopy("dashboards", "render", "out", "--run", "r1", cwd=tmp_path)
    assert done.stdout.splitlines() == ["out/prometheus/prometheus.yml", "out/grafana/provisioning"]
    assert f"{tmp_path}/r1/targets/*.json" in (tmp_path / "out/prometheus/prometheus.yml").read_text()
    assert "nothing to watch" in refused(kilocopy("dashboards", "render", "none", cwd=tmp_path))
