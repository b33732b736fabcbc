"""A run as it is now: reads the metrics pages that Prometheus would, and works out Prometheus' own rules from them.

Which pages there are stands in the run's targets/ folder. Nothing is computed here that a rule (kilocopy/rules.py) or a panel
(kilocopy/dashboards.py) says already: their expressions are evaluated as they are.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import promql_parser as pp
from prometheus_client.parser import text_string_to_metric_families

from kilocopy import metrics, rules
from kilocopy.promql import STALE, Labels, Samples, Vector, evaluate

KEEP_RAW_S, KEEP_RULES_S = 330.0, 660.0  # the longest ranges of rules: 5 min over counters, 10 min over what rules recorded
PAGE_S = 3.0  # a page that takes longer is missed, as by Prometheus


@dataclass(frozen=True, slots=True)
class Firing:
    """An alert that holds. `fires` once it has lasted long enough; before that it is pending."""

    name: str
    labels: Mapping[str, str]
    severity: str
    said: str
    fires: bool


class RuleGroup:
    """The recording and alert rules over samples in memory, one evaluation after the other, as Prometheus does."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._recorded: dict[str, set[Labels]] = {}
        self._since_s: dict[tuple[str, Labels], float] = {}
        self.alerts: list[Firing] = []
        self.failed: dict[str, str] = {}  # rules that could not be evaluated this time, and why

    def step(self, time_s: float) -> None:
        """Evaluate all rules at `time_s`, in order: later ones use what earlier ones found."""
        self.failed = {}
        for rule in rules.RULES:
            found = self._found(rule.record, rule.expr, time_s)
            for gone in self._recorded.get(rule.record, set()) - set(found):
                self._samples.add(rule.record, gone, time_s, STALE, KEEP_RULES_S)
            for labels, value in found.items():
                self._samples.add(rule.record, labels, time_s, value, KEEP_RULES_S)
            self._recorded[rule.record] = set(found)
        self.alerts = [alert for each in rules.ALERTS for alert in self._alert(each, time_s)]

    def _found(self, name: str, expr: str, time_s: float) -> Vector:
        try:
            return evaluate(expr, self._samples, time_s)
        except ValueError as error:  # as in Prometheus: series that do not match up fail this rule, and no other
            self.failed[name] = str(error)
            return {}

    def _alert(self, alert: rules.Alert, time_s: float) -> Iterator[Firing]:
        found = self._found(alert.name, alert.expr, time_s)
        for key in [key for key in self._since_s if key[0] == alert.name and key[1] not in found]:
            del self._since_s[key]
        lasting_s = pp.parse_duration(alert.lasting).total_seconds()
        for labels, value in found.items():
            since_s = self._since_s.setdefault((alert.name, labels), time_s)
            named = dict(labels)
            yield Firing(alert.name, named, alert.severity, _said(alert.summary, named, value), time_s - since_s >= lasting_s)


def _said(template: str, labels: Mapping[str, str], value: float) -> str:
    """An alert's sentence; of Prometheus' templates only what the rules use."""

    def fill(found: re.Match[str]) -> str:
        what = found[1].strip()
        if what.startswith("$labels."):
            return labels.get(what.removeprefix("$labels."), "")
        return {"$value": f"{value:g}", "$value | humanizePercentage": f"{100 * value:.4g}%"}[what]

    return re.sub(r"\{\{(.*?)\}\}", fill, template)


# ------------------------------------------------------------------------------------------------------------------ pages


@dataclass(frozen=True, slots=True)
class Target:
    """A metrics page: its address, and the labels that its series get where the page does not say otherwise."""

    url: str
    labels: tuple[tuple[str, str], ...]


def targets(run_dir: Path) -> list[Target]:
    """The pages that targets/*.json names; a file that is not whole yet is passed over, as Prometheus does."""
    found = []
    for path in sorted((run_dir / "targets").glob("*.json")):
        try:
            groups = json.loads(path.read_text(encoding="utf-8"))
            for group in groups:
                labels = group.get("labels", {})
                scheme, place = labels.get("__scheme__", "http"), labels.get("__metrics_path__", "/metrics")
                kept = {name: value for name, value in labels.items() if not name.startswith("__")}
                found += [Target(f"{scheme}://{at}{place}", tuple({**kept, "instance": at}.items())) for at in group["targets"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def read_page(target: Target) -> bytes | None:
    """The page; None where it does not answer in time."""
    try:
        with urllib.request.urlopen(target.url, timeout=PAGE_S) as answer:  # noqa: S310  addresses from the run's own files
            return bytes(answer.read())
    except (OSError, ValueError, HTTPException):
        return None


def parse(page: bytes, target: Target) -> Iterator[tuple[str, Labels, float]]:
    """Name, labels and value of what the rules can ask for. Labels on the page stand before the target's (`honor_labels`)."""
    ours = page if b"\nkilocopy_" in page else metrics.wanted(page, live=True)  # a node's page is about 1 MB: the rest is not parsed
    text = re.sub(r"^vllm:", "ray_vllm_", ours.decode("utf-8", "replace"), flags=re.MULTILINE)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {**dict(target.labels), **sample.labels}
            if sample.name.startswith("ray_vllm_"):
                labels.setdefault("ReplicaId", labels["instance"])  # a server that is no replica of Serve's is known by its address
            yield sample.name, frozenset(pair for pair in labels.items() if pair[1]), float(sample.value)


class Live:
    """The pages of a run, read again and again: `step`, then ask."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.samples = Samples()
        self.group = RuleGroup(self.samples)
        self.time_s = self._before_s = 0.0
        self.begun_s = 0.0  # the first step
        self.answered: dict[Target, bool] = {}
        self._there: dict[Target, set[tuple[str, Labels]]] = {}
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="page")

    def step(self, time_s: float) -> None:
        """Read every page, then evaluate the rules. `time_s` grows from call to call."""
        self._before_s, self.time_s = self.time_s, time_s
        self.begun_s = self.begun_s or time_s
        found = targets(self.run_dir)
        for target in [target for target in self._there if target not in found]:
            self._take(target, None, gone=True)
            del self._there[target]
        for target, page in zip(found, self._pool.map(read_page, found), strict=True):
            self._take(target, page)
        self.answered = {target: len(self._there[target]) > 1 for target in found}  # `up` is always there
        self.group.step(time_s)

    def _take(self, target: Target, page: bytes | None, *, gone: bool = False) -> None:
        """The samples of one page, and `up` as Prometheus has it; what it had before and has no more is stale, and all of it once nobody names it (`gone`)."""
        before, now = self._there.get(target, set()), set()
        try:
            parsed = list(parse(page, target)) if page is not None else []
        except ValueError:  # not a metrics page
            parsed, page = [], None
        if not gone:
            parsed.append(("up", frozenset(target.labels), float(page is not None)))
        for name, labels, value in parsed:
            self.samples.add(name, labels, self.time_s, value, KEEP_RAW_S)
            now.add((name, labels))
        for name, labels in before - now:
            self.samples.add(name, labels, self.time_s, STALE, KEEP_RAW_S)
        self._there[target] = now

    def ask(self, expr: str) -> dict[tuple[tuple[str, str], ...], float]:
        """An expression now: values by labels, in order."""
        found = evaluate(expr, self.samples, self.time_s)
        return dict(sorted((tuple(sorted(labels)), value) for labels, value in found.items()))

    def back(self) -> None:
        """Ask as of the step before: where a run ended during the last one, its pages were gone already."""
        self.time_s = self._before_s

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=False, cancel_futures=True)
