"""The report, in the terminal and as a page: what it says, that it says the same twice, and that nothing in it can run or fetch.

`KILOCOPY_REGENERATE=1 pytest tests/test_report.py` rewrites the golden texts and fails, so that the diff is read.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from kilocopy.figures import _power, figures, log_ticks
from kilocopy.page import render_html
from kilocopy.report import WIDTH, latency_row, money, number, once, pages_unit, print_report, seconds
from kilocopy.summary import Stage, Summary, Verdict
from tests import summaries

GOLDEN = Path(__file__).parent / "golden"
SECTIONS = ("answer", "stages", "plots", "overhang", "checks", "prices", "references", "method")
EVIL = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>[red]&\x1b[31m"
NAMES = sorted(summaries.ALL)


def terminal(summary: Summary) -> str:
    """The terminal report as it goes into a pipe."""
    out = io.StringIO()
    print_report(summary, Console(file=out))
    return out.getvalue()


def without_plotly(page: str) -> str:
    """The page less the one file in it that is not ours."""
    plotly = get_plotlyjs()
    assert page.count(plotly) == 1
    return page.replace(plotly, "")


def hostile() -> Summary:
    """The awkward summary with a script for every name and sentence that others can set."""
    summary = summaries.awkward()
    tree = summary.model_dump(mode="json")
    tree["run"] |= {"name": EVIL, "id": EVIL, "spec": {"model": {"id": EVIL}}}
    tree["headline"]["sentence"] = tree["status_sentence"] = EVIL
    tree["overhang"] = summaries.good().model_dump(mode="json")["overhang"]
    tree["overhang"]["ratio_unit"] = EVIL
    tree["prices"][0]["source"] = EVIL
    for stage in tree["stages"]:
        stage["title"] = EVIL
        stage["checks"][0]["sentence"] = EVIL
    tree["stages"][2]["verdict"]["reasons"][0]["sentence"] = EVIL
    return Summary.model_validate(tree)


class Tags(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def policy_of(page: str) -> str:
    """The page's content security policy."""
    return next(attributes["content"] or "" for _, attributes in Tags(page).found if attributes.get("http-equiv"))


@pytest.mark.parametrize("name", NAMES)
def test_terminal_is_the_golden_text(name: str) -> None:
    golden, text = GOLDEN / f"{name}.txt", terminal(summaries.ALL[name]())
    if os.environ.get("KILOCOPY_REGENERATE") == "1":
        golden.write_text(text, encoding="utf-8")
        pytest.fail(f"{golden} was rewritten: read its diff, then run without KILOCOPY_REGENERATE")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_terminal_fits_and_is_plain_in_a_pipe(name: str) -> None:
    text = terminal(summaries.ALL[name]())
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert "\x1b" not in text
    assert "…" not in text  # nothing was cut off
    assert text.startswith(summaries.ALL[name]().headline.sentence[:60])


def test_terminal_prints_names_as_they_are() -> None:
    text = terminal(hostile())
    assert "[red]&" in text
    assert "\x1b" not in text


def test_terminal_is_coloured_where_it_is_a_terminal() -> None:
    out = io.StringIO()
    print_report(summaries.awkward(), Console(file=out, force_terminal=True, width=WIDTH, color_system="standard"))
    assert "\x1b[" in out.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_page_is_the_same_every_time(name: str) -> None:
    assert render_html(summaries.ALL[name]()) == render_html(summaries.ALL[name]())


@pytest.mark.parametrize("name", NAMES)
def test_page_has_every_section_and_fetches_nothing(name: str) -> None:
    summary = summaries.ALL[name]()
    page = without_plotly(render_html(summary))
    tags = Tags(page)
    ids = [attributes["id"] for _, attributes in tags.found if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert set(SECTIONS) <= set(ids)
    assert {figure.id for figure in figures(summary) if figure.plot} <= set(ids)
    assert f"<title>{summary.run['name']} – kilocopy report</title>" in page
    assert not [
        (tag, a) for tag, a in tags.found if {"src", "href", "srcset", "data"} & set(a) or tag in {"link", "iframe", "base", "object"}
    ]
    assert not re.search(r"url\(|@import", page)
    assert policy_of(page).startswith("default-src 'none'")


def test_page_escapes_what_others_wrote() -> None:
    page = without_plotly(render_html(hostile()))
    tags = Tags(page)
    assert [tag for tag, _ in tags.found].count("script") == 3  # the figures' data, Plotly, our own
    assert not [attributes for tag, attributes in tags.found if tag == "img" or "onerror" in attributes]
    assert "&lt;script&gt;alert(1)" in page


def test_page_names_its_scripts_by_hash() -> None:
    policy = policy_of(render_html(summaries.interrupted()))
    assert policy.count("'sha256-") == 2
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_interrupted_is_loud() -> None:
    assert "INTERRUPTED" in render_html(summaries.interrupted())
    assert "INTERRUPTED" in terminal(summaries.interrupted())


def test_how_far_a_cut_run_came_is_told_once() -> None:
    cut = summaries.interrupted()
    cut = cut.model_copy(update={"headline": cut.headline.model_copy(update={"sentence": f"No answer. {cut.status_sentence}"})})
    assert " ".join(terminal(cut).split()).count(cut.status_sentence) == 1
    header = render_html(cut).split("<header>")[1].split("</header>")[0]
    assert ">No answer.</p>" in header
    assert header.count(cut.status_sentence) == 1


def test_withheld_latency_is_not_plotted_and_void_is_off_the_line() -> None:
    drawn = figures(summaries.awkward())
    traces = {figure.id: figure.plot.data for figure in drawn if figure.plot is not None}
    assert [trace.name for trace in traces["plot-ttft"]] == ["4 copies", "128 copies (void)"]
    assert "Withheld at 32 copies" in next(figure.caption for figure in drawn if figure.id == "plot-ttft")
    for name in ("plot-throughput", "plot-cost"):
        assert {tuple(trace.x) for trace in traces[name] if trace.name == "measured"} == {(4, 32)}
        void = [trace for trace in traces[name] if trace.name == "void"]
        assert void
        assert {trace.mode for trace in void} == {"markers"}


def test_latency_table_shows_withheld_and_null() -> None:
    summary = summaries.awkward()
    withheld = next(stage for stage in summary.stages if stage.verdict.level == "latency_withheld")
    assert latency_row(withheld)[:4] == ["withheld"] * 4
    first = summary.stages[0]
    assert first.latency is not None
    row = latency_row(first.model_copy(update={"latency": first.latency.model_copy(update={"itl_s": None}), "throughput": None}))
    assert row[2] == row[4] == "–"
    assert row[0].count(" / ") == row[1].count(" / ") == row[3].count(" / ") == 2
    page = without_plotly(render_html(summary)).split('id="latency"')[1].split("</table>")[0]
    assert page.count("<td>withheld</td>") == 4
    assert f"<td>{latency_row(first)[3]}</td>" in page


def test_terminal_lists_the_published_figures() -> None:
    summary = summaries.good()
    assert summary.references
    text = " ".join(terminal(summary).split())
    assert all(f"{each.name}: {each.figure}" in text for each in summary.references)


def test_thirteen_wide_stages_fit_without_losing_a_digit() -> None:
    void = Verdict(level="void", reasons=[], notes=[])
    stages = [
        summaries.stage(i, 2**i, 100.0, None, slo_held=None, verdict=void, usd_per_hour=1, cost_sentence="Rent alone.") for i in range(13)
    ]
    text = terminal(summaries.good().model_copy(update={"stages": stages}))
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert "…" not in text
    assert "$/1M" in text
    assert render_html(summaries.good().model_copy(update={"stages": stages}))


def test_a_log_axis_names_three_of_its_values_at_least() -> None:
    """Fleets of 3, 4 and 5 replicas had 5 alone on their axis."""
    def ticks(*values: float) -> list[str]:
        return list(log_ticks(list(values))["ticktext"])

    assert ticks(3, 4, 5) == ["3", "4", "5"]
    assert ticks(3, 4) == ["3", "4"]
    assert ticks(200, 260) == ["200", "210", "220", "230", "240", "250", "260"]
    assert ticks(1, 10)[:4] == ["1", "2", "5", "10"]
    assert len(ticks(0.0012, 0.0019)) >= 3
    assert ticks(150, 50_000) == ["100", "200", "500", "1,000", "2,000", "5,000", "10,000", "20,000", "50,000", "100,000", "200,000", "500,000"][: len(ticks(150, 50_000))]
    assert ticks(1, 5_000) == ["1", "10", "100", "1,000", "10,000"]


def test_powers_of_ten_in_words() -> None:
    assert [_power(power) for power in (0, 3, 5, 6, 10, 14, 15)] == [
        "1", "1,000", "100,000", "1 million", "10 billion", "100 trillion", "1e+15",
    ]  # fmt: skip


def test_terminal_survives_the_soft_wrap_of_a_pipe() -> None:
    out = io.StringIO()
    print_report(summaries.good(), Console(file=out, highlight=False, soft_wrap=True))
    assert out.getvalue() == terminal(summaries.good())


def test_a_stage_of_nothing_is_reported_with_dashes() -> None:
    summary = summaries.awkward()
    empty: Stage = summary.stages[2].model_copy(
        update={
            "window": None,
            "throughput": None,
            "latency": None,
            "cost": None,
            "checks": [],
            "ttft_values_s": [],
            "icl_values_s": [],
        }
    )
    summary = summary.model_copy(update={"stages": [empty], "timeline": [], "headline": summaries.interrupted().headline})
    assert "–" in terminal(summary)
    assert "no window was found" in render_html(summary)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (0, "0"),
        (0.0321, "0.0321"),
        (94.27, "94.3"),
        (99.96, "100"),
        (1962.3, "1,960"),
        (3.14159e6, "3.14 million"),
        (999_999, "1.00 million"),
        (3.2e-5, "3.20e-05"),
        (3.14e23, "3.14e+23"),
        (-12.3, "-12.3"),
        (9.9999e-4, "0.00100"),
        (9.999e8, "1.00 billion"),
    ],
)
def test_numbers_have_three_digits(value: float | None, said: str) -> None:
    assert number(value) == said


def test_small_money_is_readable_and_never_nothing() -> None:
    assert money(3.2e-5) == "$3.20e-05"
    assert pages_unit(summaries.good()) == 1000
    assert pages_unit(summaries.interrupted()) == 1
    assert money(0.0123) == "$0.0123"


def test_times_share_a_unit() -> None:
    assert seconds(0.0412, 0.187) == "41.2 / 187 ms"
    assert seconds(0.9, 2.0) == "0.900 / 2.00 s"
    assert seconds(None, 2e-5) == "– / 20.0 µs"
    assert seconds(None) == "–"


@pytest.mark.browser
@pytest.mark.parametrize("name", [*NAMES, "hostile"])
def test_browser_draws_every_plot_without_complaint(name: str, tmp_path: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH: nothing drew the page")
    summary = hostile() if name == "hostile" else summaries.ALL[name]()
    page = tmp_path / "report.html"
    page.write_text(render_html(summary), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
        "--disable-sync --enable-logging=stderr --virtual-time-budget=10000 --window-size=1400,3000 --dump-dom"
    )
    done = subprocess.run(
        [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    drawn = done.stdout.split("</style>", 1)[1]
    for figure in figures(summary):
        if figure.plot is not None:
            assert re.search(rf'id="{figure.id}"[^>]*>.*?<svg class="main-svg"', drawn, re.DOTALL), f"{figure.id} was not drawn"
    assert drawn.count('<svg class="main-svg"') >= sum(figure.plot is not None for figure in figures(summary))


def test_figures_are_json_without_infinities() -> None:
    for make in summaries.ALL.values():
        for figure in figures(make()):
            assert figure.plot is None or json.dumps(figure.plot.to_plotly_json(), allow_nan=False)


def test_a_search_is_shown_level_by_level() -> None:
    summary = summaries.searched()
    text = terminal(summary)
    assert "Search, stage 2: 48 copies held the SLO" in text
    assert text.count("48 copies held the SLO") == 1  # not once more under SLO
    rows = [line for line in text.splitlines() if re.match(r" +4 +48 +held", line)]
    assert len(rows) == 1
    assert "97.4 – 99.0 %" in rows[0]
    assert "Cost at 48 copies (stage 2.4)" in text
    page = without_plotly(render_html(summary))
    assert "at 48 copies, stage 2.4" in page
    drawn = next(figure for figure in figures(summary) if figure.id == "plot-search-2").plot
    assert drawn is not None
    assert {trace.name: tuple(trace.x) for trace in drawn.data} == {"held": (16, 32, 48), "missed": (64,)}
    assert [shape.y0 for shape in drawn.layout.shapes] == [90, 0]  # the SLO's quantile; the answer is a vertical line


def test_open_loop_stages_say_their_rate_and_stay_off_the_line() -> None:
    summary = summaries.searched()
    text = terminal(summary)
    assert "4.67/s" in text
    assert "TTFT counts from the planned time" in " ".join(text.split())
    assert "Stage 1, step by step" in text
    traces = next(figure for figure in figures(summary) if figure.id == "plot-throughput").plot
    assert traces is not None
    assert {trace.name: tuple(trace.x) for trace in traces.data if trace.xaxis == "x" and trace.name != "perfect scaling"} == {
        "measured": (16, 32, 48, 56, 64),
        "open loop": (24 * 0.994,),
    }
    assert "no steady state is claimed" in text
    assert "asked" in text.splitlines()[3]
    assert "copies" in terminal(summaries.good()).splitlines()[3]


def test_the_drivers_limits_are_said_with_their_cure() -> None:
    text = " ".join(terminal(summaries.searched()).split())
    assert "stage 2.5: The driver was the limit" in text
    assert "Cure: " in text
    assert "not the limit in any of 4 stages. At most: " in " ".join(terminal(summaries.good()).split())
    page = without_plotly(render_html(summaries.searched())).split('id="driver"')[1].split("</section>")[0]
    assert "one driver process reads 48,000 events/s here, 14.6 µs of CPU an event" in page
    assert page.count("<tr>") == 1 + len(summaries.searched().stages)
    assert "was not measured" in render_html(summaries.good())


def test_what_is_said_of_many_stages_is_said_once() -> None:
    stages = summaries.searched().stages
    summary = summaries.searched()
    said = [(stages[i], "the same") for i in (0, 2, 3, 4, 6)] + [(stages[1], "another")]
    assert {sentence: at for at, sentence in once(summary, said)} == {"the same": "stages 0, 2.1 – 2.3, 2.5", "another": "stage 1"}
