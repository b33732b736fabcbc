"""The report as a person reads it in a terminal, and the notation that the HTML page shares with it.

The answer comes first, as one sentence; then every stage with its verdict, then what it costs, then what did not add
up. A figure has its unit and three significant digits. A figure that does not exist is a dash and a reason, never a
zero; a percentile that was withheld says `withheld`. Names come from users and servers, so they are printed as they
are and never read as markup.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kilocopy.summary import Band, Check, Estimate, Percentiles, Ratio, Search, Stage, Summary, Throughput

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
LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "E2E"}
STYLES = {"valid": "green", "latency_withheld": "yellow", "void": "red"}
_MONEY_HEADS = {1: "$/page", 1000: "$/1k", 1_000_000: "$/1M"}
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


def pages_unit(summary: Summary) -> int:
    """Pages that money is told for: 1, or a thousand or a million where fewer cost too little to read."""
    costs = [stage.cost.usd_per_page.mid for stage in summary.stages if stage.cost and stage.cost.usd_per_page]
    least = min(costs, default=1.0)
    return 1 if least >= 1e-2 else 1000 if least >= 1e-5 else 1_000_000


def percent(fraction: float | None) -> str:
    """A fraction as per cent: 96.2 %."""
    return DASH if fraction is None else f"{fraction * 100:.3g} %"


def seconds(*values: float | None) -> str:
    """Times that share one unit, the largest's: `41.2 / 187 ms`."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms")) if max(known) >= s), (1e-6, "µs"))
    return " / ".join(DASH if value is None else number(value / scale) for value in values) + f" {unit}"


def interval(low: float | None, high: float | None, write: Callable[[float | None], str] = number) -> str:
    """`[low – high]`, or nothing where there is none; one end alone says that the other lies open."""
    if low is None and high is None:
        return ""
    return f"[up to {write(high)}]" if low is None else f"[{write(low)} or more]" if high is None else f"[{write(low)} – {write(high)}]"


def estimate(value: Estimate) -> tuple[str, str]:
    """A value with four significant digits, and its 95 % interval to the same place, so that its width shows."""
    places = max(0, 3 - math.floor(math.log10(value.value))) if value.value > 0 else 0

    def write(part: float | None) -> str:
        return DASH if part is None else f"{part:,.{places}f}"

    return write(value.value), interval(value.low, value.high, write)


def counted(value: float | None) -> str:
    """A number to be set against another: whole from a thousand up, else four significant digits."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def place(stage: Stage) -> str:
    """Which stage: its index; a level of a search as `index.n`, its levels counted from 1 as in its title."""
    return str(stage.index) if stage.load is None else f"{stage.index}.{stage.level + 1}"


def copies_label(copies: int) -> str:
    """`1 copy`, `1,024 copies`."""
    return f"{copies:,} cop{'y' if copies == 1 else 'ies'}"


def load_label(stage: Stage) -> str:
    """What a stage asked for, in words: `32 copies`, `poisson, 4 requests/s`."""
    return stage.title.rpartition(": ")[2] if stage.copies.asked is None else copies_label(stage.copies.asked)


def asked(stage: Stage) -> str:
    """What a stage asked for, short: `32` copies, `4/s` requests; a trace has its own rate."""
    if stage.copies.asked is not None:
        return f"{stage.copies.asked:,}"
    rate = stage.rate.asked_per_s if stage.rate else None
    return f"{rate:.3g}/s" if rate is not None else stage.kind


def half_width(value: Estimate) -> str:
    """The interval as a share of the value: `±1.2 %`."""
    if value.low is None or value.high is None or value.value <= 0:
        return ""
    return f"±{(value.high - value.low) / 2 / value.value * 100:.2g} %"


def band(value: Band | None, write: Callable[[float | None], str] = number) -> str:
    """`mid [low – high]` over the assumed inputs."""
    if value is None:
        return DASH
    return f"{write(value.mid)} {interval(value.low, value.high, write)}".rstrip()


def times(value: Band, factor: float) -> Band:
    """A band in another unit."""
    low, high = (None if end is None else end * factor for end in (value.low, value.high))
    return Band(mid=value.mid * factor, low=low, high=high)


def latency(stage: Stage, which: str, points: tuple[str, ...] = ("p50", "p99")) -> str:
    """Percentiles of a latency, `withheld` where the verdict says so, a dash where no request finished in the window."""
    if stage.verdict.level == "latency_withheld":
        return "withheld"
    values: Percentiles | None = getattr(stage.latency, which) if stage.latency else None
    return seconds(*(getattr(values, point) for point in points)) if values else DASH


def latency_row(stage: Stage) -> list[str]:
    """p50 / p90 / p99 of each of LATENCIES, then words per token."""
    through = stage.throughput
    words = number(through.words_per_token if through else None)
    if through and through.words_source == "assumed":
        words += " (assumed)"
    return [*(latency(stage, which, ("p50", "p90", "p99")) for which in LATENCIES), words]


def assumed_words(summary: Summary) -> bool:
    """Whether pages rest on an assumed number of words per token."""
    return any(stage.throughput and stage.throughput.words_source == "assumed" for stage in summary.stages)


def words_source(through: Throughput) -> str:
    """What pages rest on: `measured` where words were counted, else `assumed words per token`."""
    return "measured" if through.words_source == "counted" else "assumed words per token"


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
    at = (head.n_slo_stage, head.n_slo_level) if head.n_slo_stage is not None else (head.best_stage, head.best_level)
    return next((stage for stage in summary.stages if (stage.index, stage.level) == at), None)


def from_spec(summary: Summary, part: str) -> dict[str, Any]:
    """A part of the run's spec, as the manifest has it; empty where it has none."""
    found = (summary.run.get("spec") or {}).get(part)
    return found if isinstance(found, dict) else {}


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
        for part in _parts(summary, console.width):
            console.print(part, highlight=False)
    finally:
        console.width = width


def answer(summary: Summary) -> str:
    """The headline, without how far the run came where that stands below it in red."""
    return summary.headline.sentence.replace(summary.status_sentence, "").strip() if summary.status == "interrupted" else summary.headline.sentence


def _parts(summary: Summary, width: int) -> Iterator[Text | Table]:
    """What the report says, in order."""
    yield wrapped(answer(summary), width, style="bold")
    if summary.status == "interrupted":
        yield wrapped(f"INTERRUPTED: {summary.status_sentence}", width, style="bold red")
    yield wrapped(_conditions(summary), width, style="dim")
    if summary.stages:
        yield Text()
        yield _table(summary)
        yield wrapped(_legend(summary), width, style="dim")
        yield Text()
        yield _latency_table(summary)
        yield wrapped("Latencies: p50 / p90 / p99, of requests sent and finished inside the window.", width, style="dim")
    yield from _titled(summary, width)
    for search in summary.searches:
        yield Text()
        yield wrapped(f"Search, stage {search.stage}: {search.sentence}", width)
        yield _rows(SEARCH_HEADS, search_rows(search))
    for stage in summary.stages:
        if stage.steps:
            yield Text()
            yield wrapped(f"Stage {place(stage)}, step by step", width, style="bold")
            yield _rows(STEP_HEADS, step_rows(stage))
    for title, sentences in _sections(summary):
        if sentences:
            yield Text()
            yield wrapped(title, width, style="bold")
            yield from (wrapped(sentence, width, indent="  ") for sentence in sentences)


def _titled(summary: Summary, width: int) -> Iterator[Text | Table]:
    """The sections with tables of their own: an experiment's, and the fleet's."""
    from kilocopy.sections import fleet, section  # noqa: PLC0415  they write with this module's notation

    for found in (section(summary, pages_unit(summary)), fleet(summary)):
        if found is None:
            continue
        yield Text()
        yield wrapped(found.title, width, style="bold")
        for table in found.tables:
            yield Text()
            yield wrapped(table.title, width)
            yield _rows(table.heads, table.rows)
            if table.legend:
                yield wrapped(table.legend, width, style="dim")
        if found.sentences:
            yield Text()
        yield from (wrapped(sentence, width, indent="  ") for sentence in found.sentences)


def _sections(summary: Summary) -> Iterator[tuple[str, list[str]]]:
    """The lists of sentences below the table."""
    if all(summary.headline.n_slo_sentence != search.sentence for search in summary.searches):
        yield "SLO", [summary.headline.n_slo_sentence]
    stage = shown_stage(summary)
    if stage is not None and stage.cost is not None:
        yield f"Cost at {load_label(stage)} (stage {place(stage)})", list(_cost(stage, pages_unit(summary)))
    if summary.overhang is not None:
        yield f"Overhang: training over running, in {summary.overhang.ratio_unit}", list(_overhang(summary))
    if summary.corpus is not None:
        yield "Own corpus: the model against its own training", list(corpus_lines(summary))
    yield "Verdicts", list(_verdicts(summary))
    yield "Driver", list(driver_lines(summary))
    yield "Checks", list(_checks(summary))
    yield "Beside yours: published figures", [f"{each.name}: {each.figure} ({each.conditions})" for each in summary.references]


def wrapped(text: str, width: int, *, indent: str = "", style: str = "") -> Text:
    """Text broken between words; a continued line is indented a little further."""
    hanging = indent + "  " if indent else ""
    lines = textwrap.wrap(plain(text), width, initial_indent=indent, subsequent_indent=hanging, break_on_hyphens=False)
    return Text("\n".join(lines), style=style)


def _legend(summary: Summary) -> str:
    """What the table's heads mean."""
    pages = pages_unit(summary)
    unit = f"{_MONEY_HEADS[pages]} is $ per {pages:,} pages. " if pages > 1 else ""
    means = "N_run: time-mean of copies in flight, driver / servers. TTFT, TPOT: p50 / p99."
    timed = " In open loop (asked: requests/s) TTFT counts from the planned time, and errors hold dropped arrivals." if open_loop(summary) else ""
    assumed = ", at an assumed number of words per token" if assumed_words(summary) else ""
    return f"{means}{timed} {unit}A page is {summary.page_words} words{assumed}."


def open_loop(summary: Summary) -> bool:
    """Whether any stage asked for a rate."""
    return any(stage.rate is not None for stage in summary.stages)


def load_head(summary: Summary) -> str:
    """The head of the column of loads."""
    return "asked" if open_loop(summary) else "copies"


def _conditions(summary: Summary) -> str:
    """One line: which run, of what, measured by what."""
    run = summary.run
    spec = f"spec {run['spec_sha256'][:12]}" if run.get("spec_sha256") else None
    parts = [run.get("id"), from_spec(summary, "model").get("id"), spec, f"kilocopy {summary.kilocopy_version}"]
    return " · ".join(str(part) for part in parts if part)


def _table(summary: Summary) -> Table:
    """A row per stage."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    pages = pages_unit(summary)
    heads = ("stage", load_head(summary), "N_run", "verdict", "tokens/s", "95 %", "per copy", "pages/h", "TTFT", "TPOT", "errors")
    for head in (*heads, _MONEY_HEADS[pages], "Wh/page", "SLO"):
        table.add_column(head, justify="left" if head == "verdict" else "right", overflow="fold")
    for stage in summary.stages:
        style = STYLES[stage.verdict.level] if stage.verdict.level != "valid" else None
        table.add_row(*(Text(plain(cell)) for cell in _row(stage, pages)), style=style)
    return table


def _latency_table(summary: Summary) -> Table:
    """A row of latencies per stage."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for head in ("stage", load_head(summary), "verdict", *LATENCIES.values(), "words/token"):
        table.add_column(head, justify="left" if head == "verdict" else "right", overflow="fold")
    for stage in summary.stages:
        style = STYLES[stage.verdict.level] if stage.verdict.level != "valid" else None
        badge = BADGES[stage.verdict.level].replace("latency withheld", "withheld")
        cells = [place(stage), asked(stage), badge, *(cell.replace(" / ", "/") for cell in latency_row(stage))]
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


SEARCH_HEADS = ("level", "load", "verdict", "attained", "95 % (Wilson)", "errors", "streams", "in flight", "tokens/s", "per copy", "stage")
STEP_HEADS = ("asked", "from – to", "arrivals", "dropped", "errors", "tokens/s", "in flight", "TTFT p50 / p99")


def search_rows(search: Search) -> list[list[str]]:
    """A row per level that a search tried, in SEARCH_HEADS' order."""
    return [
        [
            str(one.level + 1),
            f"{one.load:,.0f}" if search.over == "copies" else f"{one.load:.4g}/s",
            one.verdict,
            percent(one.attainment),
            DASH if one.wilson_low is None or one.wilson_high is None else f"{100 * one.wilson_low:.1f} – {100 * one.wilson_high:.1f} %",
            percent(one.error_fraction),
            f"{one.judged:,}",
            number(one.in_flight),
            number(one.output_tokens_per_s),
            number(one.output_tokens_per_s_per_copy),
            BADGES[one.stage_verdict],
        ]
        for one in search.levels
    ]


def step_rows(stage: Stage) -> list[list[str]]:
    """A row per rate of a `steps` stage, in STEP_HEADS' order."""
    hidden = "withheld" if stage.verdict.level == "latency_withheld" else DASH
    return [
        [
            f"{step.rate_asked_per_s:g}/s",
            f"{step.start_s:.0f} – {step.end_s:.0f} s",
            f"{step.arrivals:,}",
            f"{step.dropped:,}",
            f"{step.errors:,}",
            number(step.output_tokens_per_s),
            number(step.in_flight),
            seconds(step.ttft_s.p50, step.ttft_s.p99) if step.ttft_s else hidden,
        ]
        for step in stage.steps
    ]


def _rows(heads: tuple[str, ...], rows: list[list[str]]) -> Table:
    """A plain table."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in {"verdict", "stage"} else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def driver_lines(summary: Summary) -> Iterator[str]:
    """Where the driver was the limit, with what would cure it; else how far it was from being it."""
    limited = [stage for stage in summary.stages if stage.driver.limited]
    for stage in limited:
        cure = f" Cure: {stage.driver.cure}" if stage.driver.cure else ""
        yield f"stage {place(stage)}: {stage.driver.sentence}{cure}"
    if summary.stages and not limited:
        count = len(summary.stages)
        yield f"The driver was not the limit in {'the one stage' if count == 1 else f'any of {count} stages'}. At most: {worst(summary)}."
    for clock in summary.clocks:
        how = "is the leader's own" if clock.same_clock else f"was {clock.offset_s:+,.6f} s from the leader's, drifted {seconds(abs(clock.drift_s))}, and was put on it"
        yield f"The clock of {plain(clock.process)} on {plain(clock.host)} {how}; {clock.rounds:,} round trips know it to ±{seconds(clock.error_s)}."


def worst(summary: Summary) -> str:
    """The worst that any worker showed in any stage."""
    each = [worker for stage in summary.stages for worker in stage.driver.workers]
    known: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        ("of a core", [one.cpu_fraction for one in each], percent),
        ("loop lag (p99)", [one.loop_lag_p99_s for one in each], seconds),
        ("send lag (p99)", [one.send_lag_p99_s for one in each], seconds),
        ("of what this machine's driver can read", [stage.driver.roofline_fraction for stage in summary.stages], percent),
    ]
    said = [f"{write(max(v for v in values if v is not None))} {name}" for name, values, write in known if any(v is not None for v in values)]
    return ", ".join(said) or "nothing was recorded"


def _row(stage: Stage, pages: int) -> list[str]:
    """The cells of a stage, in the table's order."""
    copies, through, cost = stage.copies, stage.throughput, stage.cost
    return [
        place(stage),
        asked(stage),
        f"{number(copies.n_run_client)}/{number(copies.n_run_server)}",
        BADGES[stage.verdict.level].replace("latency withheld", "withheld"),
        number(through.output_tokens_per_s.value) if through else DASH,
        half_width(through.output_tokens_per_s).replace(" %", "%") if through else DASH,
        number(through.output_tokens_per_s_per_copy) if through else DASH,
        number(through.pages_per_hour).replace(" million", "M") if through else DASH,
        latency(stage, "ttft_s").replace(" / ", "/"),
        latency(stage, "tpot_s").replace(" / ", "/"),
        f"{sum(stage.requests.errors.values()) + stage.requests.dropped:,}",
        money(cost.usd_per_page.mid * pages) if cost and cost.usd_per_page else DASH,
        "none" if wh_per_page(stage) == "not measured" else wh_per_page(stage),
        slo(stage),
    ]


def _cost(stage: Stage, pages: int) -> Iterator[str]:
    """What a page costs at this stage, and what the figure holds."""
    cost = stage.cost
    assert cost is not None  # noqa: S101  # the caller looked
    if pages > 1 and cost.usd_per_page:
        yield f"{band(times(cost.usd_per_page, pages), money)} per {pages:,} pages ({money(cost.usd_per_page.mid)} a page)."
    else:
        yield f"{band(cost.usd_per_page, money)} per page."
    yield f"{band(cost.usd_per_m_output_tokens, money)} per million output tokens."
    if cost.energy_source == "not_measured":
        yield "Energy: not measured, so there is no Wh per page."
    else:
        how = f"{SOURCES[cost.energy_source]}, boundary {cost.energy_boundary or 'not stated'}"
        known = cost.wh_per_page_measured
        spread = f" Measurement, 95 %: {interval(known.low, known.high)}." if known else ""
        yield f"Energy ({how}): {band(cost.wh_per_page)} Wh per page.{spread}"
    yield cost.sentence


def _overhang(summary: Summary) -> Iterator[str]:
    """A line per ratio, and N_cluster."""
    assert summary.overhang is not None  # noqa: S101  # the caller looked
    yield from (ratio_line(ratio) for ratio in summary.overhang.ratios)
    if summary.overhang.n_cluster is not None:
        yield f"N_cluster: the training cluster would hold {number(summary.overhang.n_cluster)} copies, if its GPUs are as fast as those that served."


def corpus_lines(summary: Summary) -> Iterator[str]:
    """What the model would need to write its own training corpus, and what a page costs over its life."""
    told = summary.corpus
    assert told is not None  # noqa: S101  # the caller looked
    rate = next((s.throughput.output_tokens_per_s for s in summary.stages if (s.index, s.level) == (told.stage, told.level) and s.throughput), None)
    slow, fast = (end / rate.value if rate and end and rate.value else None for end in ((rate.low, rate.high) if rate else (None, None)))
    each = told.output_tokens_per_day_per_device
    ends = interval(slow and slow * each, fast and fast * each)
    yield f"{number(each)} {ends} tokens a day for each device, as generated: whether they are worth training on is another question.".replace("  ", " ")
    if told.training_tokens is not None and told.days_one_device is not None:
        ends = interval(fast and told.days_one_device / fast, slow and told.days_one_device / slow)
        days = f"{number(told.days_one_device)} {ends}".rstrip() + f" days on one device, {number(told.days_serving)} on the {told.devices:g} that served"
        days += f", {number(told.days_training_cluster)} on as many as trained it" if told.days_training_cluster is not None else ""
        yield f"Its own training corpus, {number(told.training_tokens)} tokens: {days}."
    if told.copies_on_training_cluster is not None:
        yield (
            f"The {told.training_gpus or 0:,.0f} GPUs that trained it would run {number(told.copies_on_training_cluster)} copies, "
            "if each held as many as a GPU that served."
        )
    if told.break_even_pages is not None:
        yield (
            f"Lifetime cost of a page: {band(told.training_usd, money)} of training over the pages written, and {band(told.running_usd_per_page, money)} of running. "
            f"Break-even at {band(told.break_even_pages)} pages: from there on running has cost more than training."
        )
    yield from told.missing


def ratio_line(ratio: Ratio) -> str:
    """One ratio as a line: its kind, its figure, its sentence."""
    return f"{RATIOS[ratio.name]}: {band(ratio.ratio_pages)}. {ratio.sentence}"


def _verdicts(summary: Summary) -> Iterator[str]:
    """Why a stage is not simply valid, and what else was noticed; what is said of several stages is said once."""
    for stage in summary.stages:
        for reason in stage.verdict.reasons:
            yield f"stage {place(stage)}, {BADGES[stage.verdict.level]}: {reason.sentence} ({reason.code})"
    notes = [(stage, f"{note.sentence} ({note.code})") for stage in summary.stages for note in stage.verdict.notes]
    yield from (f"{stages}, note: {said}" for stages, said in once(summary, notes))


def once(summary: Summary, said: list[tuple[Stage, str]]) -> Iterator[tuple[str, str]]:
    """Each sentence with the stages that it is said of: `stage 1`, `stages 0, 2 – 3.4` (from the first to the last in a row)."""
    order = [place(stage) for stage in summary.stages]
    for sentence in dict.fromkeys(sentence for _, sentence in said):
        at = sorted({order.index(place(stage)) for stage, other in said if other == sentence})
        runs = [[at[0], at[0]]]
        for number in at[1:]:
            if number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        parts = [order[a] if a == b else f"{order[a]}{', ' if b == a + 1 else ' – '}{order[b]}" for a, b in runs]
        yield f"stage{'s' if len(at) > 1 else ''} {', '.join(parts)}", sentence


def _checks(summary: Summary) -> Iterator[str]:
    """Each check that failed or was not made, then how many there were."""
    checks = all_checks(summary)
    amiss = [(stage, f"{_outcome(c)}{c.sentence} ({c.name})") for stage, c in checks if c.outcome != "passed"]
    yield from (f"{stages}, {said}" for stages, said in once(summary, amiss))
    if checks:
        yield f"{sum(check.outcome == 'passed' for _, check in checks)} of {len(checks)} identity checks passed."


def _outcome(check: Check) -> str:
    """A check's outcome before its sentence, where that does not say it itself."""
    return "" if check.sentence.startswith("Not checked: ") else f"{OUTCOMES[check.outcome]}: "
