"""The report as a person reads it in a terminal, and the notation that the HTML page shares with it.

The answer comes first, as one sentence; then every stage with its verdict, then what it costs, then what did not add up. A figure
has its unit and three significant digits. A figure that does not exist is a dash and a reason, never a zero; a percentile that was
withheld says `withheld`. Names come from users and servers, so they are printed as they are and never read as markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kilocopy.summary import Band, Check, Estimate, Percentiles, Ratio, Stage, Summary

DASH = "–"
WIDTH = 120
BADGES = {"valid": "✓ valid", "latency_withheld": "◐ latency withheld", "void": "✗ void"}
SOURCES = {"measured": "measured", "assumed": "assumed", "not_measured": "not measured"}
CHECKS = {
    "client_tokens_vs_server": "Tokens: client against servers",
    "littles_law": "Little's law: L = λ × W",
    "copies_client_vs_server": "Copies: client against servers",
}
OUTCOMES = {"passed": "✓ passed", "failed": "✗ failed", "not_checked": "– not checked"}
RATIOS = {"usd": "money", "energy": "energy", "flop": "FLOPs", "gpu_hours": "GPU-hours"}
STYLES = {"valid": "green", "latency_withheld": "yellow", "void": "red"}
_BIG = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def number(value: float | None) -> str:
    """Three significant digits: 0.0321, 94.3, 1,960, 3.14 million, 3.20e-05; a dash for what does not exist."""
    if value is None:
        return DASH
    size = abs(float(f"{value:.3g}"))
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e15:
        return f"{value:.2e}"
    for scale, word in _BIG:
        if size >= scale:
            return f"{number(value / scale)} {word}"
    return f"{float(f'{value:.3g}'):,.0f}" if size >= 100 else f"{value:#.3g}"


def money(value: float | None) -> str:
    """Dollars: $1.23, $0.00123, $3.20e-05, $4.60 million; never $0.00 for what is not nothing."""
    return DASH if value is None else f"${number(value)}"


def money_small(value: float | None) -> str:
    """Dollars per page where they are readable, and per 1,000 pages beside it where they are not."""
    if value is None or value == 0 or value >= 1e-3:
        return ""
    return f"{money(value * 1000)} per 1,000 pages"


def percent(fraction: float | None) -> str:
    """A fraction as per cent: 96.2 %."""
    return DASH if fraction is None else f"{number(fraction * 100)} %"


def seconds(*values: float | None) -> str:
    """Times that share one unit, the largest's: `41.2 / 187 ms`."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms")) if max(known) >= s), (1e-6, "µs"))
    return " / ".join(DASH if value is None else number(value / scale) for value in values) + f" {unit}"


def interval(low: float | None, high: float | None, write: Callable[[float | None], str] = number) -> str:
    """`[low – high]`, or nothing where there is none."""
    return f"[{write(low)} – {write(high)}]" if low is not None and high is not None else ""


def estimate(value: Estimate) -> tuple[str, str]:
    """A value and its 95 % interval, both with four significant digits of the value, so that the interval shows its width."""
    places = max(0, 3 - math.floor(math.log10(value.value))) if value.value > 0 else 0

    def write(part: float | None) -> str:
        return DASH if part is None else f"{part:,.{places}f}"

    return write(value.value), interval(value.low, value.high, write)


def half_width(value: Estimate) -> str:
    """The interval as a share of the value: `±1.2 %`."""
    if value.low is None or value.high is None or value.value <= 0:
        return ""
    return f"±{number((value.high - value.low) / 2 / value.value * 100)} %"


def band(value: Band | None, write: Callable[[float | None], str] = number) -> str:
    """`mid [low – high]` over the assumed inputs."""
    if value is None:
        return DASH
    return f"{write(value.mid)} {interval(value.low, value.high, write)}".rstrip()


def latency(stage: Stage, which: str) -> str:
    """p50 / p99 of a latency, `withheld` where the verdict says so, a dash where no request finished in the window."""
    if stage.verdict.level == "latency_withheld":
        return "withheld"
    values: Percentiles | None = getattr(stage.latency, which) if stage.latency else None
    return seconds(values.p50, values.p99) if values else DASH


def errors(stage: Stage) -> str:
    """Errors of a stage with their share of the requests sent."""
    failed = sum(stage.requests.errors.values())
    return f"{failed:,} ({percent(failed / stage.requests.sent)})" if failed and stage.requests.sent else f"{failed:,}"


def wh_per_page(stage: Stage) -> str:
    """Wh per page, or why there is none."""
    if stage.cost is None:
        return DASH
    if stage.cost.energy_source == "not_measured":
        return "not measured"
    return number(stage.cost.wh_per_page.mid) if stage.cost.wh_per_page else DASH


def slo(stage: Stage) -> str:
    """Whether the stage held the SLO."""
    return {True: "yes", False: "no", None: DASH}[stage.copies.slo_held]


def shown_stage(summary: Summary) -> Stage | None:
    """The stage that the headline's figures are from: the one of N_SLO, else the fastest valid one, else none."""
    head = summary.headline
    index = head.n_slo_stage if head.n_slo_stage is not None else head.best_stage
    return next((stage for stage in summary.stages if stage.index == index), None)


def all_checks(summary: Summary) -> list[tuple[Stage, Check]]:
    """Every identity check with its stage, in order."""
    return [(stage, check) for stage in summary.stages for check in stage.checks]


def plain(text: str) -> str:
    """Text without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else "�" for character in text)


def print_report(summary: Summary, console: Console) -> None:
    """Print the report. Where the console is no terminal (a pipe, a file) lines are 120 columns and plain."""
    width = console.width
    console.width = width if console.is_terminal else WIDTH
    try:
        for part in _parts(summary):
            console.print(part, highlight=False)
    finally:
        console.width = width


def _parts(summary: Summary) -> Iterator[Text | Table | Padding]:
    """What the report says, in order."""
    yield _line(summary.headline.sentence, "bold")
    if summary.status == "interrupted":
        yield _line(f"INTERRUPTED: {summary.status_sentence}", "bold red")
    yield _line(_conditions(summary), "dim")
    if summary.stages:
        yield Text()
        yield _table(summary)
        yield _line(f"TTFT and TPOT: p50 / p99. N_run: time-mean of copies in flight, driver / servers. A page is {summary.page_words} words.", "dim")
    for title, sentences in _sections(summary):
        if sentences:
            yield Text()
            yield _line(title, "bold")
            yield from (Padding(_line(sentence), (0, 0, 0, 2), expand=False) for sentence in sentences)


def _sections(summary: Summary) -> Iterator[tuple[str, list[str]]]:
    """The lists of sentences below the table."""
    yield "SLO", [summary.headline.n_slo_sentence]
    stage = shown_stage(summary)
    if stage is not None and stage.cost is not None:
        yield f"Cost at {stage.copies.asked} copies (stage {stage.index})", list(_cost(stage))
    if summary.overhang is not None:
        yield f"Overhang: training over running, in {summary.overhang.ratio_unit}", list(_overhang(summary))
    yield "Verdicts", list(_verdicts(summary))
    yield "Checks", list(_checks(summary))


def _line(text: str, style: str = "") -> Text:
    return Text(plain(text), style=style)


def _conditions(summary: Summary) -> str:
    """One line: which run, of what, on what."""
    run = summary.run
    model = run.get("model")
    model = model.get("id") if isinstance(model, dict) else model
    parts = [run.get("id") or run.get("name"), model, f"spec {run['spec_sha256'][:12]}" if run.get("spec_sha256") else None]
    return " · ".join(str(part) for part in [*parts, f"kilocopy {summary.kilocopy_version}"] if part)


def _table(summary: Summary) -> Table:
    """A row per stage."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    heads = ("stage", "copies", "N_run", "verdict", "tokens/s", "95 %", "per copy", "pages/h", "TTFT", "TPOT", "errors", "$/page", "Wh/page", "SLO")
    for head in heads:
        table.add_column(head, justify="left" if head == "verdict" else "right", no_wrap=True)
    for stage in summary.stages:
        table.add_row(*(_line(cell) for cell in _row(stage)), style=STYLES[stage.verdict.level] if stage.verdict.level != "valid" else None)
    return table


def _row(stage: Stage) -> list[str]:
    """The cells of a stage, in the table's order."""
    copies, through, cost = stage.copies, stage.throughput, stage.cost
    return [
        str(stage.index),
        f"{copies.asked:,}",
        f"{number(copies.n_run_client)}/{number(copies.n_run_server)}",
        BADGES[stage.verdict.level].replace("latency withheld", "withheld"),
        number(through.output_tokens_per_s.value) if through else DASH,
        half_width(through.output_tokens_per_s).replace(" %", "%") if through else DASH,
        number(through.output_tokens_per_s_per_copy) if through else DASH,
        number(through.pages_per_hour) if through else DASH,
        latency(stage, "ttft_s").replace(" / ", "/"),
        latency(stage, "tpot_s").replace(" / ", "/"),
        f"{sum(stage.requests.errors.values()):,}",
        money(cost.usd_per_page.mid) if cost and cost.usd_per_page else DASH,
        "none" if wh_per_page(stage) == "not measured" else wh_per_page(stage),
        slo(stage),
    ]


def _cost(stage: Stage) -> Iterator[str]:
    """What a page costs at this stage, and what the figure holds."""
    cost = stage.cost
    assert cost is not None  # noqa: S101  # the caller looked
    yield " · ".join(
        part
        for part in (
            f"{band(cost.usd_per_page, money)} per page",
            money_small(cost.usd_per_page.mid if cost.usd_per_page else None),
            f"{band(cost.usd_per_m_output_tokens, money)} per million output tokens",
        )
        if part
    )
    if cost.energy_source == "not_measured":
        yield "Energy: not measured, so there is no Wh per page."
    else:
        yield f"Energy ({SOURCES[cost.energy_source]}, boundary {cost.energy_boundary or 'not stated'}): {band(cost.wh_per_page)} Wh per page."
    yield cost.sentence


def _overhang(summary: Summary) -> Iterator[str]:
    """A line per ratio, and N_cluster."""
    assert summary.overhang is not None  # noqa: S101  # the caller looked
    yield from (ratio_line(ratio) for ratio in summary.overhang.ratios)
    if summary.overhang.n_cluster is not None:
        yield f"N_cluster: the training cluster would hold {number(summary.overhang.n_cluster)} copies."


def ratio_line(ratio: Ratio) -> str:
    """One ratio as a line: its kind, its figure, its sentence."""
    return f"{RATIOS[ratio.name]}: {band(ratio.ratio_pages)}. {ratio.sentence}"


def _verdicts(summary: Summary) -> Iterator[str]:
    """Why a stage is not simply valid, and what else was noticed."""
    for stage in summary.stages:
        for reason in stage.verdict.reasons:
            yield f"stage {stage.index}, {BADGES[stage.verdict.level]}: {reason.sentence} ({reason.code})"
        for note in stage.verdict.notes:
            yield f"stage {stage.index}, note: {note.sentence} ({note.code})"


def _checks(summary: Summary) -> Iterator[str]:
    """Each check that failed or was not made, then how many there were."""
    checks = all_checks(summary)
    for stage, check in checks:
        if check.outcome != "passed":
            yield f"stage {stage.index}, {OUTCOMES[check.outcome]}: {check.sentence} ({check.name})"
    if checks:
        yield f"{sum(check.outcome == 'passed' for _, check in checks)} of {len(checks)} identity checks passed."
