"""The evaluator against Prometheus' own: the same ragged series and expressions to promtool, number by number."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from kilocopy import dashboards, rules
from kilocopy.promql import STALE, Samples, evaluate, parse

INTERVAL_S = 7
SCALE = 999_983.7  # promtool compares bit by bit: whole numbers are compared, and no value of these series falls on a half of them
TIMES_S = (202, 262, 335)  # no sample is on the edge of a range: Prometheus 2 counts it in, Prometheus 3 does not
SELECTED = 'a_total{b=~"x|y",c!="z"}'
EXPRESSIONS = (
    "rate(a_total[1m])",
    "increase(a_total[3m])",
    f"sum by (b) (rate({SELECTED}[1m])) / on (b) sum by (b) (rate(a_total[2m]))",
    "sum by (b) (rate(a_total[1m])) * on (b) group_left (unit) (0.5 * info)",
    "max by (c) (last_over_time(g[30s])) or 0 * max by (c) (a_total)",
    "(avg_over_time(g[1m]) and on (b, c) a_total) > 3",
    "g unless on (b) (g > 8)",
    "max_over_time(g[2m]) - g",
    "avg(g) / (count(g) > 0)",
    "g offset 1m + g",
    "histogram_quantile(0.99, sum by (c, le) (rate(h_bucket[1m]))) > -1",
    "histogram_quantile(0.5, sum by (le) (rate(h_bucket[2m])))",
    'sum by (model) (label_replace(a_total, "model", "$1!", "b", "(.+)"))',
    "abs(-g) + ceil(g / 3)",
    "1 / (g > 0) * 100",
    "vector(0.002)",
)


def ragged(random_: random.Random, *, counts: bool) -> list[float | None]:
    """60 values, some missing, some stale; a counter restarts now and then, high enough for the guess at its zero, which Prometheus 3 changed, not to count."""
    values: list[float | None] = []
    level = random_.uniform(500, 900)  # what a restart falls below
    for _ in range(60):
        level = random_.uniform(200, 400) if counts and random_.random() < 0.05 else level + random_.uniform(0, 40)
        sort = random_.random()
        values.append(None if sort < 0.1 else STALE if sort < 0.15 else round(level if counts else random_.uniform(0, 10), 3))
    return values


def series() -> dict[str, list[float | None]]:
    made = random.Random(7)  # noqa: S311
    found = {f'{name}{{b="{b}",c="{c}"}}': ragged(made, counts=name == "a_total") for name in ("a_total", "g") for b in "xyz" for c in "uvz"}
    found |= {f'info{{b="{b}",unit="{b}{b}"}}': [2.0] * 60 for b in "xyz"}
    for c in "uv":
        steps = {edge: [made.uniform(0, 9) for _ in range(60)] for edge in ("0.1", "0.5", "2", "+Inf")}
        below = [0.0] * 60
        for edge, rises in steps.items():
            below = [before + rise for before, rise in zip(below, rises, strict=True)]
            total, counted = 300.0, []
            for rise in below:
                total += rise
                counted.append(round(total, 3))
            found[f'h_bucket{{c="{c}",le="{edge}"}}'] = list(counted)
    return found


def stored(given: dict[str, list[float | None]]) -> Samples:
    samples = Samples()
    for name, values in given.items():
        metric, _, labels = name.removesuffix("}").partition("{")
        pairs = frozenset((pair.split("=")[0], json.loads(pair.split("=")[1])) for pair in labels.split(","))
        for step, value in enumerate(values):
            if value is not None:
                samples.add(metric, pairs, step * INTERVAL_S, value)
    return samples


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)")
def test_ragged_series_give_prometheus_own_numbers(tmp_path: Path) -> None:
    given, tests = series(), []
    samples = stored(given)
    for expr in EXPRESSIONS:
        for time_s in TIMES_S:
            found = evaluate(expr, samples, time_s)
            assert found, expr  # a comparison of nothing with nothing would say nothing
            expected = [
                {"labels": "{" + ",".join(f"{name}={json.dumps(value)}" for name, value in sorted(labels)) + "}", "value": round(SCALE * value)}
                for labels, value in found.items()
            ]
            tests.append({"expr": f"round({SCALE} * ({expr}))", "eval_time": f"{time_s}s", "exp_samples": expected})
    written = {
        name: " ".join("_" if value is None else "stale" if math.isnan(value) else repr(value) for value in values) for name, values in given.items()
    }
    test = {"interval": f"{INTERVAL_S}s", "input_series": [{"series": name, "values": text} for name, text in written.items()], "promql_expr_test": tests}
    (tmp_path / "test.yaml").write_text(json.dumps({"rule_files": [], "evaluation_interval": "7s", "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]


def test_every_rule_alert_and_panel_is_within_what_is_known() -> None:
    """Nothing to find, but nothing unknown either: an expression that the evaluator cannot do must not reach the screen."""
    filled = dict.fromkeys(("cluster", "model", "run", "stage", "node", "replica"), ".*") | {"__range": "5m"}
    asked = [rule.expr for rule in rules.RULES] + [alert.expr for alert in rules.ALERTS]
    asked += [dashboards.filled(expr, filled) for board in dashboards.DASHBOARDS for panel in board.panels for expr, _ in panel.queries]
    assert {tuple(evaluate(expr, Samples(), 1.0)) for expr in asked} <= {(), (frozenset(),)}


@pytest.mark.parametrize("expr", ["topk(1, a)", "rate(a[5m] offset 5m)", "rate(a[5m:1m])", "a > bool 1", "sum without (b) (a)", "time()", "a * group_right b"])
def test_what_is_not_known_is_no_number(expr: str) -> None:
    samples = Samples()
    samples.add("a", frozenset({("b", "c")}), 0, 1)
    with pytest.raises((NotImplementedError, ValueError)):
        evaluate(expr, samples, 1)


def test_many_on_one_side_is_an_error_as_in_prometheus() -> None:
    samples = Samples()
    for name in ("a", "b"):
        for label in "xy":
            samples.add(name, frozenset({("l", label)}), 0, 1)
    with pytest.raises(ValueError, match="many"):
        evaluate("a / on () b", samples, 1)


def test_old_samples_go() -> None:
    samples = Samples()
    for second in range(1000):
        samples.add("a", frozenset(), second, second, keep_s=100)
    times_s, values = samples.named("a")[frozenset()]
    assert times_s[0] >= 1000 - 100 - 66
    assert values[-1] == 999
    assert parse("a") is parse("a")
