"""Works out PromQL over samples in memory, so that the terminal view says what Prometheus would, by the same rules.

The part of the language that kilocopy's rules and dashboards use, parsed by promql-parser, with the semantics of Prometheus 3
(promql/engine.go, promql/functions.go, promql/quantile.go): instant vectors look back 5 minutes, ranges are open on the left, a
series that its page no longer has is stale at once, rates are extrapolated to the edges of their window. What is not known here is an
error and never a number. The tests put the same series and expressions to `promtool`, and compare.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import promql_parser as pp

LOOKBACK_S = 300.0
STALE = math.nan  # Prometheus' staleness marker; no page of ours has a NaN of its own
Labels = frozenset[tuple[str, str]]  # without the metric's name: nothing here matches on it
Vector = dict[Labels, float]
Series = tuple["array[float]", "array[float]"]  # times (s), values


class Samples:
    """Samples by metric name and labels, each series in order of time."""

    def __init__(self) -> None:
        self._series: dict[str, dict[Labels, Series]] = {}

    def add(self, name: str, labels: Labels, time_s: float, value: float, keep_s: float = math.inf) -> None:
        """Append one sample; times of a series grow. STALE says that the series is gone. What is older than `keep_s` may be dropped."""
        times_s, values = self._series.setdefault(name, {}).setdefault(labels, (array("d"), array("d")))
        times_s.append(time_s)
        values.append(value)
        old = bisect_right(times_s, time_s - keep_s)
        if old > 64:  # not sample by sample: cutting the head moves all the rest
            del times_s[:old], values[:old]

    def named(self, name: str) -> Mapping[Labels, Series]:
        """Times (s) and values of every series of a metric."""
        return self._series.get(name, {})


@lru_cache(maxsize=512)
def parse(expr: str) -> Any:
    """The expression's tree. Raises ValueError where it is no PromQL."""
    return pp.parse(expr)


def evaluate(expr: str, samples: Samples, time_s: float) -> Vector:
    """The instant vector that `expr` is at `time_s`. Raises NotImplementedError for what this file does not know."""
    found = _value(parse(expr), samples, time_s)
    return {frozenset(): found} if isinstance(found, float) else found


def _value(node: Any, samples: Samples, time_s: float) -> Vector | float:  # noqa: PLR0911  a kind of node each
    match node:
        case pp.NumberLiteral():
            return float(node.val)
        case pp.ParenExpr():
            return _value(node.expr, samples, time_s)
        case pp.UnaryExpr():
            inner = _value(node.expr, samples, time_s)
            return -inner if isinstance(inner, float) else {labels: -value for labels, value in inner.items()}
        case pp.VectorSelector():
            return _instant(node, samples, time_s)
        case pp.Call():
            return _call(node, samples, time_s)
        case pp.AggregateExpr():
            return _aggregate(node, _vector(node.expr, samples, time_s))
        case pp.BinaryExpr():
            return _binary(node, _value(node.lhs, samples, time_s), _value(node.rhs, samples, time_s))
    raise NotImplementedError(f"{type(node).__name__}: {node.prettify()}")


def _vector(node: Any, samples: Samples, time_s: float) -> Vector:
    found = _value(node, samples, time_s)
    if isinstance(found, float):
        raise NotImplementedError(f"a number where series belong: {node.prettify()}")
    return found


# -------------------------------------------------------------------------------------------------------------- selecting


def _selected(selector: Any, samples: Samples) -> Iterable[tuple[Labels, array[float], array[float]]]:
    if selector.name is None or selector.at is not None or selector.matchers.or_matchers:
        raise NotImplementedError(selector.prettify())
    wanted = [(m.name, _matcher(str(m.op), m.value)) for m in selector.matchers.matchers]
    for labels, (times_s, values) in samples.named(selector.name).items():
        if all(fits(dict(labels).get(name, "")) for name, fits in wanted):
            yield labels, times_s, values


def _matcher(op: str, value: str) -> Callable[[str], bool]:
    match op.rpartition(".")[2]:
        case "Equal":
            return lambda have: have == value
        case "NotEqual":
            return lambda have: have != value
        case "Re":
            return lambda have: re.fullmatch(value, have) is not None
        case "NotRe":
            return lambda have: re.fullmatch(value, have) is None
    raise NotImplementedError(op)


def _instant(selector: Any, samples: Samples, time_s: float) -> Vector:
    found = {}
    time_s -= selector.offset.total_seconds() if selector.offset else 0.0
    for labels, times_s, values in _selected(selector, samples):
        last = bisect_right(times_s, time_s) - 1
        if last >= 0 and times_s[last] > time_s - LOOKBACK_S and not math.isnan(values[last]):
            found[labels] = values[last]
    return found


def _range(node: Any, samples: Samples, time_s: float) -> Iterable[tuple[Labels, list[float], list[float]]]:
    """Times and values of each series in (time_s - range, time_s], without stale markers."""
    if not isinstance(node, pp.MatrixSelector):
        raise NotImplementedError(node.prettify())
    if node.vector_selector.offset is not None:
        raise NotImplementedError(node.prettify())
    start_s = time_s - node.range.total_seconds()
    for labels, times_s, values in _selected(node.vector_selector, samples):
        first, last = bisect_right(times_s, start_s), bisect_right(times_s, time_s)
        kept = [(t, v) for t, v in zip(times_s[first:last], values[first:last], strict=True) if not math.isnan(v)]
        if kept:
            yield labels, [t for t, _ in kept], [v for _, v in kept]


# -------------------------------------------------------------------------------------------------------------- functions


def _rate(times_s: list[float], values: list[float], start_s: float, end_s: float, *, per_s: bool = True) -> float | None:
    """`extrapolatedRate` of promql/functions.go, for counters."""
    if len(times_s) < 2:
        return None
    grown = values[-1] - values[0] + sum(before for before, after in itertools.pairwise(values) if after < before)
    sampled_s = times_s[-1] - times_s[0]
    between_s = sampled_s / (len(times_s) - 1)
    to_start_s, to_end_s = times_s[0] - start_s, end_s - times_s[-1]
    if to_start_s >= between_s * 1.1:
        to_start_s = between_s / 2
    if grown > 0 and values[0] >= 0:
        to_start_s = min(to_start_s, sampled_s * values[0] / grown)  # a counter was not below zero before
    if to_end_s >= between_s * 1.1:
        to_end_s = between_s / 2
    grown *= (sampled_s + to_start_s + to_end_s) / sampled_s
    return grown / (end_s - start_s) if per_s else grown


OVER_TIME: dict[str, Callable[[list[float]], float]] = {
    "avg_over_time": lambda values: sum(values) / len(values),
    "max_over_time": max,
    "min_over_time": min,
    "last_over_time": lambda values: values[-1],
}
BY_VALUE: dict[str, Callable[[float], float]] = {"ceil": math.ceil, "abs": abs, "round": lambda value: math.floor(value + 0.5)}


def _call(node: Any, samples: Samples, time_s: float) -> Vector:
    name, arguments = node.func.name, node.args
    if name in OVER_TIME:
        return {labels: OVER_TIME[name](values) for labels, _, values in _range(arguments[0], samples, time_s)}
    if name in {"rate", "increase"}:
        start_s = time_s - arguments[0].range.total_seconds()
        rates = {
            labels: _rate(times_s, values, start_s, time_s, per_s=name == "rate")
            for labels, times_s, values in _range(arguments[0], samples, time_s)
        }
        return {labels: value for labels, value in rates.items() if value is not None}
    if name in BY_VALUE and len(arguments) == 1:
        return {labels: float(BY_VALUE[name](value)) for labels, value in _vector(arguments[0], samples, time_s).items()}
    if name == "histogram_quantile":
        return _quantiles(float(arguments[0].val), _vector(arguments[1], samples, time_s))
    if name == "label_replace":
        target, template, source, pattern = (argument.val for argument in arguments[1:])
        return _relabelled(_vector(arguments[0], samples, time_s), target, template, source, pattern)
    if name == "vector":
        return {frozenset(): float(arguments[0].val)}
    raise NotImplementedError(f"{name}()")


def _relabelled(vector: Vector, target: str, template: str, source: str, pattern: str) -> Vector:
    found: Vector = {}
    for labels, value in vector.items():
        have = dict(labels)
        if matched := re.fullmatch(pattern, have.get(source, "")):
            have[target] = re.sub(r"\$(\d+)", lambda number, m=matched: m[int(number[1])], template)  # type: ignore[misc]
        made = frozenset((name, text) for name, text in have.items() if text)
        if made in found:
            raise ValueError("label_replace: two series became the same")
        found[made] = value
    return found


def _quantiles(q: float, buckets: Vector) -> Vector:
    """`histogram_quantile` of classic buckets (promql/quantile.go, bucketQuantile)."""
    grouped: dict[Labels, list[tuple[float, float]]] = {}
    for labels, count in buckets.items():
        edge = dict(labels)["le"]
        grouped.setdefault(frozenset(pair for pair in labels if pair[0] != "le"), []).append((float(edge), count))
    return {labels: quantile(q, sorted(counts)) for labels, counts in grouped.items()}


def quantile(q: float, counts: list[tuple[float, float]]) -> float:
    """The quantile of cumulative counts (edge, count) in order of edge; NaN where nothing was counted or +Inf is not among them."""
    edges, cumulative = [edge for edge, _ in counts], [count for _, count in counts]
    for index in range(1, len(cumulative)):  # scraped one after the other, they may not quite grow
        cumulative[index] = max(cumulative[index], cumulative[index - 1])
    if edges[-1] != math.inf or len(edges) < 2 or cumulative[-1] == 0:
        return math.nan
    rank = q * cumulative[-1]
    at = next(index for index, count in enumerate(cumulative) if count >= rank)
    if at == len(edges) - 1:
        return edges[-2]
    if at == 0 and edges[0] <= 0:
        return edges[0]
    below_edge, below = (edges[at - 1], cumulative[at - 1]) if at else (0.0, 0.0)
    return below_edge + (edges[at] - below_edge) * (rank - below) / (cumulative[at] - below)


AGGREGATED: dict[str, Callable[[list[float]], float]] = {
    "sum": math.fsum,
    "max": max,
    "min": min,
    "avg": lambda values: math.fsum(values) / len(values),
    "count": lambda values: float(len(values)),
}


def _aggregate(node: Any, vector: Vector) -> Vector:
    modifier = node.modifier
    if str(node.op) not in AGGREGATED or node.param is not None or (modifier and modifier.type != pp.AggModifierType.By):
        raise NotImplementedError(node.prettify())
    kept = set(modifier.labels) if modifier else set()
    grouped: dict[Labels, list[float]] = {}
    for labels, value in vector.items():
        grouped.setdefault(frozenset(pair for pair in labels if pair[0] in kept), []).append(value)
    return {labels: AGGREGATED[str(node.op)](values) for labels, values in grouped.items()}


# -------------------------------------------------------------------------------------------------------------- operators


def _divided(left: float, right: float) -> float:
    if right:
        return left / right
    return math.nan if left == 0 or math.isnan(left) else math.copysign(math.inf, left)


ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": _divided}
COMPARED = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne}


def _key(modifier: Any) -> Callable[[Labels], Labels]:
    """The part of the labels by which two sides are matched."""
    matching = modifier.matching if modifier else None
    if matching is None:
        return lambda labels: labels
    named, include = set(matching.labels), matching.type == pp.LabelModifierType.Include
    return lambda labels: frozenset(pair for pair in labels if (pair[0] in named) == include)


def _binary(node: Any, left: Vector | float, right: Vector | float) -> Vector | float:
    op, modifier = str(node.op), node.modifier
    if modifier and modifier.return_bool:
        raise NotImplementedError(node.prettify())
    if isinstance(left, float) and isinstance(right, float):
        return float(ARITHMETIC[op](left, right))
    if isinstance(left, float) or isinstance(right, float):
        return _with_number(op, left, right)
    key = _key(modifier)
    if op == "and":
        there = {key(labels) for labels in right}
        return {labels: value for labels, value in left.items() if key(labels) in there}
    if op == "unless":
        there = {key(labels) for labels in right}
        return {labels: value for labels, value in left.items() if key(labels) not in there}
    if op == "or":
        there = {key(labels) for labels in left}
        return left | {labels: value for labels, value in right.items() if key(labels) not in there}
    return _matched(op, modifier, key, left, right)


def _with_number(op: str, left: Vector | float, right: Vector | float) -> Vector:
    series = right if isinstance(left, float) else left
    assert not isinstance(series, float)  # noqa: S101

    def sides(value: float) -> tuple[Any, Any]:
        return (left, value) if isinstance(left, float) else (value, right)

    if op in COMPARED:
        return {labels: value for labels, value in series.items() if COMPARED[op](*sides(value))}
    return {labels: float(ARITHMETIC[op](*sides(value))) for labels, value in series.items()}


def _matched(op: str, modifier: Any, key: Callable[[Labels], Labels], left: Vector, right: Vector) -> Vector:
    """One to one, or with `group_left` many to one: the left side's labels stay, plus those named in the brackets."""
    many = modifier is not None and modifier.card == pp.VectorMatchCardinality.ManyToOne
    if modifier is not None and modifier.card == pp.VectorMatchCardinality.OneToMany:
        raise NotImplementedError("group_right")
    ones: dict[Labels, tuple[Labels, float]] = {}
    for labels, value in right.items():
        if key(labels) in ones:
            raise ValueError("many series match on the right side")
        ones[key(labels)] = (labels, value)
    found: Vector = {}
    for labels, value in left.items():
        matched = ones.get(key(labels))
        if matched is None or (op in COMPARED and not COMPARED[op](value, matched[1])):
            continue
        made = labels if many else key(labels)
        if many and modifier.group_labels:
            more = {pair for pair in matched[0] if pair[0] in modifier.group_labels}
            made = frozenset(pair for pair in labels if pair[0] not in modifier.group_labels) | more
        if made in found:
            raise ValueError("many series match on the left side")
        found[made] = value if op in COMPARED else float(ARITHMETIC[op](value, matched[1]))
    return found
