"""A sheet: what a command has to say beyond one run, as sentences, tables and plots, in the terminal and as one HTML file.

Both renderings are made from the same `Sheet`, so they cannot say different things. The page is as self-contained as a run's
report: nothing is fetched, and only the scripts that its policy names by their hash run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kilocopy.figures import Figure
from kilocopy.page import SCRIPT, figures_json, policy
from kilocopy.problem import ProblemError
from kilocopy.report import WIDTH, plain, wrapped


@dataclass(frozen=True)
class Rows:
    """A table: its heads, its rows as written, and how many columns at the left hold words."""

    heads: tuple[str, ...]
    rows: list[list[str]]
    words: int = 1
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One matter: sentences, then a table, then plots."""

    title: str
    sentences: list[str] = field(default_factory=list)
    table: Rows | None = None
    figures: list[Figure] = field(default_factory=list)


@dataclass(frozen=True)
class Sheet:
    """The answer in one sentence, what a reader must know of it, and its parts."""

    title: str
    headline: str
    notes: list[str]
    sections: list[Section]


def render_sheet(sheet: Sheet) -> str:
    """The sheet as one self-contained page; byte for byte the same from the same sheet."""
    drawn = [figure for section in sheet.sections for figure in section.figures]
    plotly = get_plotlyjs() if any(figure.plot is not None for figure in drawn) else ""
    environment = Environment(
        loader=PackageLoader("kilocopy"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("sheet.html.j2").render(
        sheet=sheet,
        figures_json=Markup(figures_json(drawn)),  # noqa: S704  # escaped in figures_json
        plotly=Markup(plotly),  # noqa: S704  # our dependency's own file
        script=Markup(SCRIPT),  # noqa: S704  # a constant
        policy=policy(plotly, SCRIPT),
    )


def write_sheet(sheet: Sheet, path: Path) -> None:
    """Write the page. Raises ProblemError where that cannot be done."""
    try:
        path.write_text(render_sheet(sheet), encoding="utf-8")
    except OSError as error:
        raise ProblemError(f"--html {path}: the page cannot be written there ({error.strerror}); name another file") from None


def print_sheet(sheet: Sheet, console: Console) -> None:
    """Print the sheet; where the console is no terminal, 120 columns wide."""
    width = console.width if console.is_terminal else WIDTH
    console.width = width
    console.print(wrapped(sheet.headline, width, style="bold"), highlight=False)
    for note in sheet.notes:
        console.print(wrapped(note, width), highlight=False)
    for section in sheet.sections:
        console.print()
        console.print(Text(plain(section.title), style="bold"), highlight=False)
        if section.table is not None and section.table.rows:
            console.print(_table(section.table), highlight=False)
            if section.table.note:
                console.print(wrapped(section.table.note, width, style="dim"), highlight=False)
        for sentence in section.sentences:
            console.print(wrapped(sentence, width, indent="  "), highlight=False)


def _table(rows: Rows) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for number, head in enumerate(rows.heads):
        table.add_column(head, justify="left" if number < rows.words else "right", overflow="fold")
    for row in rows.rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table
