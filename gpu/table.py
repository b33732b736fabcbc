"""What was measured, in one JSON file and one table: served beside bare, joules, money, verdicts, and the published figures with their conditions.

Everything is worked out again from the run directories, so that a folder brought home from another machine says the same there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.results import Results
from kilocopy.problem import ProblemError
from kilocopy.ratios import Reading, ratio
from kilocopy.recompute import summarise
from kilocopy.records import write_json
from kilocopy.references import REFERENCES
from kilocopy.summary import Cost, Percentiles, Stage

BESIDE = ("Llama 3.1 8B, running", "InferenceX, per GPU", "GPT-3, a page", "Rule of thumb of 2020")
HEADS = (
    "part", "copies", "verdict", "tokens/s", "95 %", "per copy", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms", "J/token", "Wh/page", "$/page",
    "serving tax", "window, s",
)  # fmt: skip
NONE = "–"
WINDOW_S_MIN = 30.0


def collect(results: Results, *, rehearsed: bool) -> Path:
    """Write results.json and results.md; returns the path of the latter."""
    found = results.all()
    rows = [_row(results, part) for part in found if part["status"] == "done"]
    for row in rows:
        row["serving_tax"] = tax(row, rows)
    said = {
        "rehearsal": rehearsed,
        "rows": rows,
        "meter": next((part["meter"] for part in found if part["name"] == "meter" and part["status"] == "done"), None),
        "missing": [{"part": part["name"], "status": part["status"], "why": part.get("why")} for part in found if part["status"] != "done"],
        "unfinished_runs": _unfinished(results, rows),
        "references": [reference.model_dump(mode="json") for reference in REFERENCES if reference.name in BESIDE],
    }
    path = results.folder / "results.md"
    write_json(path.with_suffix(".json"), said)
    temporary = path.with_suffix(".md.tmp")
    temporary.write_text("\n".join(_lines(said)) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _row(results: Results, part: dict[str, Any]) -> dict[str, Any]:
    """One unit's figures; those of a run directory that is gone are said to be gone."""
    about = {"part": part["name"], "kind": part["kind"], "group": part["group"], "run_dir": part["run_dir"], "machine": part["machine"], "cores": part["cores"]}
    try:
        summary = summarise(results.folder / part["run_dir"])
    except ProblemError as problem:
        return about | {"copies": None, "why": str(problem)}
    return about | {"prices": summary.prices, "page_words": summary.page_words} | _figures(summary.stages[0])


def _figures(stage: Stage) -> dict[str, Any]:
    through, latency, cost = stage.throughput, stage.latency, stage.cost
    rate = through.output_tokens_per_s if through else None
    return {
        "copies": stage.copies.asked,
        "copies_in_flight": stage.copies.n_run_client,
        "window_s": stage.window.duration_s if stage.window else None,
        "verdict": stage.verdict.level,
        "reasons": [reason.sentence for reason in stage.verdict.reasons],
        "tokens_per_s": rate.value if rate else None,
        "tokens_per_s_low": rate.low if rate else None,
        "tokens_per_s_high": rate.high if rate else None,
        "tokens_per_s_per_copy": through.output_tokens_per_s_per_copy if through else None,
        "pages_source": through.words_source if through else None,
        "ttft_s": _ends(latency.ttft_s if latency else None),
        "tpot_s": _ends(latency.tpot_s if latency else None),
        "slo_held": stage.copies.slo_held,
        "driver_limited": stage.driver.limited,
        "checks": {check.name: check.outcome for check in stage.checks},
    } | _priced(cost)


def _ends(values: Percentiles | None) -> dict[str, float] | None:
    return {"p50": values.p50, "p99": values.p99} if values else None


def _priced(cost: Cost | None) -> dict[str, Any]:
    def mid(name: str) -> float | None:
        band = getattr(cost, name) if cost else None
        return band.mid if band else None

    return {
        "energy_source": cost.energy_source if cost else None,
        "energy_boundary": cost.energy_boundary if cost else None,
        "j_per_token": mid("j_per_output_token"),
        "wh_per_page": mid("wh_per_page"),
        "usd_per_page": mid("usd_per_page"),
    }


def tax(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """1 - served / bare tokens/s at the same copies, on the same kind of GPU with the same versions; None where there is no such pair.

    `same_gpu` says whether it was the very card, by its UUID. A void side makes no ratio.
    """
    if row["kind"] != "served" or row["group"] != "8b" or not _counts(row):
        return None
    for other in rows:
        if other["kind"] == "bare" and other["copies"] == row["copies"] and _counts(other) and _alike(row, other):
            found = ratio([_reading(row)], [_reading(other)])
            return {
                "fraction": 1 - found.value,
                "low": None if found.high is None else 1 - found.high,
                "high": None if found.low is None else 1 - found.low,
                "bare_tokens_per_s": other["tokens_per_s"],
                "same_gpu": _uuids(row) == _uuids(other),
            }
    return None


def _reading(row: dict[str, Any]) -> Reading:
    return Reading(row["tokens_per_s"], row["tokens_per_s_low"], row["tokens_per_s_high"])


def _counts(row: dict[str, Any]) -> bool:
    return bool(row["copies"] and row.get("tokens_per_s") and row["verdict"] != "void")


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def kind(row: dict[str, Any]) -> tuple[Any, ...]:
        machine = row["machine"]
        return [gpu["name"] for gpu in machine["gpus"]], machine["cpu"], machine["cores"], machine["versions"]

    return kind(one) == kind(other)


def _uuids(row: dict[str, Any]) -> list[str]:
    return [gpu["uuid"] for gpu in row["machine"]["gpus"]] or [row["machine"]["host"]]


def _unfinished(results: Results, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Run directories that no unit's result names: units that were cut off, or measured anew since (`--again`, other versions). Their records are kept."""
    named = {row["run_dir"] for row in rows}
    return sorted(name for path in results.runs.iterdir() if path.is_dir() and (name := f"runs/{path.name}") not in named)


# ------------------------------------------------------------------------------------------------------------- as markdown


def _lines(said: dict[str, Any]) -> list[str]:
    """The table, and everything that has to be known to read it."""
    rows = said["rows"]
    lines = ["# One GPU host", ""]
    if said["rehearsal"]:
        lines += ["**A rehearsal on the CPU, with small models and short stages: these figures say that the parts work, and nothing about any GPU.**", ""]
    lines += [*_machines(rows), ""]
    lines += ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS), *(_cells(row) for row in rows), ""]
    lines += [*_legend(rows), *_reasons(rows), *_cores(rows), *_meter(said["meter"]), *_missing(said)]
    lines += ["", "## Published figures beside it", "", "| what | figure | conditions | source |", "|---|---|---|---|"]
    lines += [f"| {each['name']} | {each['figure']} | {each['conditions']} | {each['source']} |" for each in said["references"]]
    return lines


def _machines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Each machine that was measured on, once, with the parts that it gave."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        machine = row["machine"]
        gpus = ", ".join(f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['uuid']})" for gpu in machine["gpus"]) or "no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        commit = (machine["commit"] or "unknown")[:12]
        where = f"{gpus}; driver {machine['gpu_driver'] or 'none'}; {machine['cores']} cores, {machine['cpu']}; {versions}; commit {commit}"
        seen.setdefault(where, []).append(row["part"])
    return [f"- {where}: {', '.join(parts)}" for where, parts in seen.items()] or ["Nothing is measured yet."]


def _cells(row: dict[str, Any]) -> str:
    if row["copies"] is None:
        return f"| {row['part']} | " + " | ".join([row["why"], *[NONE] * (len(HEADS) - 2)]) + " |"
    assumed = " (assumed pages)" if row["pages_source"] == "assumed" else ""
    interval = NONE
    if row["tokens_per_s_low"] is not None:
        interval = f"±{(row['tokens_per_s_high'] - row['tokens_per_s_low']) / 2 / row['tokens_per_s'] * 100:.2g} %"
    cells = [
        row["part"], f"{row['copies']:,}", row["verdict"].replace("_", " "), _number(row["tokens_per_s"]), interval, _number(row["tokens_per_s_per_copy"]),
        _ms(row["ttft_s"]), _ms(row["tpot_s"]),
        _energy(row, "j_per_token"), _energy(row, "wh_per_page") + (assumed if row["wh_per_page"] is not None else ""),
        _number(row["usd_per_page"]) + (assumed if row["usd_per_page"] is not None else ""), _tax(row["serving_tax"]),
        NONE if row["window_s"] is None else f"{row['window_s']:.1f}{'' if row['window_s'] >= WINDOW_S_MIN else ' (short)'}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return NONE
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(ends: dict[str, float] | None) -> str:
    return "withheld" if ends is None else f"{ends['p50'] * 1e3:.3g} / {ends['p99'] * 1e3:.3g}"


def _energy(row: dict[str, Any], name: str) -> str:
    """A figure of joules; where no meter was read it says so, or that its power is assumed."""
    if row["energy_source"] == "not_measured" or row[name] is None:
        return "not measured"
    return f"{row[name]:.3g}" + ("" if row["energy_source"] == "measured" else " (assumed power)")


def _tax(found: dict[str, Any] | None) -> str:
    if found is None:
        return NONE
    interval = "" if found["low"] is None else f" [{100 * found['low']:.1f} – {100 * found['high']:.1f}]"
    return f"{100 * found['fraction']:.1f} %{interval}" + ("" if found["same_gpu"] else " (another card of the kind)")


def _legend(rows: Sequence[dict[str, Any]]) -> list[str]:
    stated = {f"{price['name']} {price['value']:g} {price['unit']} ({price['source']})" for row in rows if row["copies"] for price in row["prices"]}
    words = sorted({row["page_words"] for row in rows if row["copies"]})
    told = [
        "Served is the whole stack: Locust, HAProxy, Ray Serve's replica, vLLM. Bare is vLLM's AsyncLLM in one process, on the same engine arguments and prompts of",
        "the same lengths; serving tax is 1 - served / bare tokens/s, with a 95 % interval from the two windows' own (drift between them is not in it). TTFT of bare counts from the call of `generate`. Nothing vouches for the clock of the bare side,",
        "since it is the engine's own process. All joules of a window, prefill's too, are over its output tokens.",
    ]
    for boundary in sorted({row["energy_boundary"] for row in rows if row["copies"] and row["energy_boundary"]}):
        pues = sorted({f"{price['value']:g}" for row in rows if row["copies"] for price in row["prices"] if price["name"] == "pue"})
        told.append(f"Joules enclose {boundary}, with PUE {' or '.join(pues)}.")
    if several := sorted({len(row["machine"]["gpus"]) for row in rows if len(row["machine"]["gpus"]) > 1}):
        told.append(f"**This host has {' or '.join(map(str, several))} GPUs and the meters read all of them: the joules are also those of the ones that did not serve.**")
    if words:
        told.append(f"A page is {' or '.join(map(str, words))} words; pages are marked where its words per token are assumed.")
    if stated:
        told.append(f"Stated: {'; '.join(sorted(stated))}.")
    return told


def _reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    told = [f"- {row['part']}, {row['verdict'].replace('_', ' ')}: {reason}" for row in rows if row["copies"] for reason in row["reasons"]]
    told += [f"- {row['part']}: the driver was the limit" for row in rows if row.get("driver_limited")]
    return ["", "## Verdicts", "", *told] if told else []


def _cores(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which part of the stack used how many cores in the window: where to look when the tax is high."""
    parts = sorted({part for row in rows for part in row["cores"]})
    if not parts:
        return []
    lines = ["", "## Cores in use during the window", "", "| part | " + " | ".join(parts) + " |", "|---|" + "---|" * len(parts)]
    return lines + [f"| {row['part']} | " + " | ".join(f"{row['cores'].get(part, 0):.2f}" for part in parts) + " |" for row in rows]


def _meter(found: dict[str, Any] | None) -> list[str]:
    """The power meter against nvidia-smi, and its step."""
    lines = ["", "## The power meter", ""]
    if not found:
        return [*lines, "Not checked."]
    counter = found["counter"]
    if any(not way["agrees"] for way in found["nvidia_smi"].values()):
        lines += ["**The counter and nvidia-smi do not agree: take no joule above for measured until it is known which of them is wrong.**", ""]
    lines.append(f"NVML's counter: {found['counter_j']:,.1f} J in {found['seconds']:.1f} s ({found['mean_w']:.0f} W on average).")
    for field, way in found["nvidia_smi"].items():
        verdict = "agrees" if way["agrees"] else "DISAGREES"
        lines.append(
            f"- nvidia-smi's {field}, integrated over the same time: {way['joules']:,.1f} J, {100 * way['apart_fraction']:.2f} % apart: {verdict} "
            f"(limit {100 * found['limit_fraction']:g} %)."
        )
    edge = 2 * counter["step_max_j"] / found["counter_j"] if found["counter_j"] else 0.0
    lines.append(
        f"- The counter moves every {1e3 * counter['interval_p50_s']:.1f} ms (p99 {1e3 * counter['interval_p99_s']:.1f} ms), {counter['step_p50_j']:.3g} J a step under "
        f"load: two edges of a window like this one are uncertain by {100 * edge:.2g} %. A reading takes {1e3 * counter['read_p50_s']:.2g} ms."
    )
    return lines


def _missing(said: dict[str, Any]) -> list[str]:
    told = [f"- {each['part']}: {each['status']}, {each['why']}" for each in said["missing"]]
    told += [f"- {name}: cut off, or measured anew since; its records are kept, no figure above is from it" for name in said["unfinished_runs"]]
    return ["", "## Not in the table", "", *told] if told else []
