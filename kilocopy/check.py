"""A run against a baseline, for CI: which figures got worse by more than a tolerance, as an exit code and as JUnit XML.

A figure *fails* when its ratio to the baseline is worse than the tolerance allows; `clearly` asks that its whole 95 % interval be.
A load that was valid in the baseline and is void now, or an SLO that no load holds any more, fails too: a gate that only looked at
what can be compared would pass a server that stopped answering.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from kilocopy.comparison import ALL_METRICS, BASES, OWN_N_SLO, Comparison, Row, compare
from kilocopy.problem import ProblemError
from kilocopy.report import interval, number
from kilocopy.sheet import Rows, Section, Sheet, print_sheet
from kilocopy.side_by_side import LABELS, prices_move, simulated
from kilocopy.summaries import Side, sides
from kilocopy.summary import Frozen

BETTER = {metric.name: metric.better for metric in ALL_METRICS}
NAMES = tuple(BETTER)


class Verdict(Frozen):
    """What a figure at a load came to."""

    at: str
    metric: str
    outcome: Literal["ok", "worse", "not_compared"]
    clear: bool  # the whole interval is beyond the tolerance
    sentence: str


def command(runs: Sequence[str], against: Sequence[str], given: Sequence[str], *, clearly: bool, xml: Path | None) -> int:
    """`kilocopy check`: print the verdicts, write JUnit XML, and return the exit code: 0, or 1 where a figure is worse."""
    run, baseline = (_one_side(arguments, what) for arguments, what in ((runs, "RUN"), (against, "--against")))
    verdicts, notes = check(run, baseline, tolerances(given), clearly=clearly)
    if xml is not None:
        junit(verdicts, run, xml)
    print_sheet(sheet(verdicts, notes, run, baseline), Console(highlight=False))
    return int(any(one.outcome == "worse" for one in verdicts))


def _one_side(arguments: Sequence[str], what: str) -> Side:
    found = sides(arguments)
    if len(found) > 1:
        raise ProblemError(f"{what}: {found[0].runs[0].id} and {found[1].runs[0].id} are no repeats of each other (another spec, engine version or host)")
    return found[0]


def tolerances(given: Sequence[str]) -> dict[str, float]:
    """`0.05` for every figure, `usd_per_page=0.02` for one, as fractions; `5%` is 0.05. Raises ProblemError."""
    found: dict[str, float] = {}
    for one in given:
        name, equals, value = one.rpartition("=")
        if equals and name not in NAMES:
            raise ProblemError(f"--tolerance {one}: no figure is called {name!r}; there are {', '.join(NAMES)}")
        try:
            fraction = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            raise ProblemError(f"--tolerance {one}: {value!r} is no number; say 0.05, 5% or usd_per_page=0.05") from None
        if not 0 <= fraction < 1:
            raise ProblemError(f"--tolerance {one}: a tolerance is a fraction from 0 to below 1; say 0.05 or 5%")
        found |= {name: fraction} if equals else {each: fraction for each in NAMES if each not in found}
    return found


def check(run: Side, baseline: Side, allowed: Mapping[str, float], *, clearly: bool = False) -> tuple[list[Verdict], list[str]]:
    """A verdict for each figure that has a tolerance, at each load of the baseline, and what is to be known of them.

    Raises ProblemError where they do not compare. A run with nothing left that could be compared is no mistake of the user's: its loads are lost.
    """
    lost = _lost(run, baseline)
    comparison = compare([baseline, run], empty=bool(lost))
    rows = [row for row in comparison.rows if row.metric in allowed]
    return [_verdict(row, allowed[row.metric], clearly) for row in rows] + lost, _notes(comparison, rows, allowed, clearly=clearly)


def _notes(comparison: Comparison, rows: Sequence[Row], allowed: Mapping[str, float], *, clearly: bool) -> list[str]:
    """What else differs, and whether the intervals carry a verdict at this tolerance."""
    known = [(row.ratio, allowed[row.metric]) for row in rows if row.ratio is not None and row.ratio.low is not None and row.ratio.high is not None]
    wide = sum(found.high / found.value - 1 > tolerance for found, tolerance in known if found.high is not None)
    notes = [*simulated(comparison), *comparison.differences, *comparison.tokens]
    notes += [f"Intervals: {BASES[basis]}." for basis in dict.fromkeys(found.basis for found, _ in known)]
    if wide and not clearly:
        notes.append(f"{wide} of {len(known)} intervals are wider than the tolerance: such a figure may be worse by chance. More repeats of both narrow them; --clearly fails only beyond them.")
    return notes


def _verdict(row: Row, tolerance: float, clearly: bool) -> Verdict:
    if row.ratio is None:
        lost = row.baseline is not None and row.other is None
        said = f"{LABELS[row.metric]} is not compared: {row.missing}"
        return Verdict(at=row.at, metric=row.metric, outcome="worse" if lost else "not_compared", clear=lost, sentence=said)
    lower = BETTER[row.metric] == "lower"
    ends = (row.ratio.low, row.ratio.high)
    limit = 1 + tolerance if lower else 1 - tolerance
    best = row.ratio.value if None in ends else ends[0] if lower else ends[1]

    def beyond(value: float | None) -> bool:
        return value is not None and (value > limit if lower else value < limit)

    clear = None not in ends and beyond(best)
    fails = clear if clearly and None not in ends else beyond(row.ratio.value)
    said = f"{LABELS[row.metric]} is {number(row.ratio.value)} {interval(*ends)}".strip() + f" times the baseline's, limit {limit:g}{prices_move(row)}"
    return Verdict(at=row.at, metric=row.metric, outcome="worse" if fails else "ok", clear=clear, sentence=said)


def _lost(run: Side, baseline: Side) -> list[Verdict]:
    """Loads that were valid in the baseline and are not in the run; an SLO that was held and is not."""
    found = []
    mine = run.loads()
    for place, before in baseline.loads().items():
        was = all(any(stage.verdict.level != "void" for stage in stages) for stages in before)
        now = place in mine and all(any(stage.verdict.level != "void" for stage in stages) for stages in mine[place])
        if was and not now:
            codes = sorted({reason.code for stages in mine.get(place, []) for stage in stages for reason in stage.verdict.reasons})
            said = f"valid in the baseline, {'void' if place in mine else 'gone'} now ({', '.join(codes) or 'not played'})"
            found.append(Verdict(at=place[1], metric="verdict", outcome="worse", clear=True, sentence=said))
    held = [all(one.summary.headline.n_slo is not None for one in side.runs) for side in (baseline, run)]
    if held == [True, False]:
        found.append(Verdict(at=OWN_N_SLO, metric="copies", outcome="worse", clear=True, sentence="no load holds the SLO any more"))
    return found


def sheet(verdicts: Sequence[Verdict], notes: Sequence[str], run: Side, baseline: Side) -> Sheet:
    """The verdicts as a table, the worse ones first."""
    worse = [one for one in verdicts if one.outcome == "worse"]
    names = f"{', '.join(one.id for one in run.runs)} against {', '.join(one.id for one in baseline.runs)}"
    head = f"{len(worse)} of {len(verdicts)} figures are worse than the tolerance allows" if worse else f"None of {len(verdicts)} figures is worse than the tolerance allows"
    order = {"worse": 0, "not_compared": 1, "ok": 2}
    rows = [
        [one.outcome.replace("_", " "), "clearly" if one.clear and one.outcome == "worse" else "", one.at, one.sentence]
        for one in sorted(verdicts, key=lambda one: order[one.outcome])
    ]
    return Sheet("check", f"{head}: {names}.", list(notes), [Section("Figures", table=Rows(("outcome", "", "at", ""), rows, words=4))])


def junit(verdicts: Sequence[Verdict], run: Side, path: Path) -> None:
    """JUnit XML: a test case a figure, in a class a load. Raises ProblemError where it cannot be written."""
    worse, skipped = (sum(one.outcome == outcome for one in verdicts) for outcome in ("worse", "not_compared"))
    counts = {"tests": str(len(verdicts)), "failures": str(worse), "errors": "0", "skipped": str(skipped)}
    top = ET.Element("testsuites", counts)
    suite = ET.SubElement(top, "testsuite", counts | {"name": f"kilocopy {run.name}"})
    for one in verdicts:
        case = ET.SubElement(suite, "testcase", {"classname": one.at, "name": one.metric})
        if one.outcome == "worse":
            ET.SubElement(case, "failure", {"message": one.sentence}).text = one.sentence
        elif one.outcome == "not_compared":
            ET.SubElement(case, "skipped", {"message": one.sentence})
        else:
            ET.SubElement(case, "system-out").text = one.sentence
    ET.indent(top)
    try:
        path.write_bytes(ET.tostring(top, encoding="utf-8", xml_declaration=True) + b"\n")
    except OSError as error:
        raise ProblemError(f"--junit {path}: cannot be written ({error.strerror}); name another file") from None

