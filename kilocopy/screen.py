"""The terminal view: one screen that says how a run stands, 80 columns by 24 lines or whatever more there is.

Every figure is a rule's (kilocopy/rules.py) or a panel's query (kilocopy/dashboards.py), asked of the pages as they are now. What has
no data says so.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kilocopy import dashboards
from kilocopy import metrics as m
from kilocopy.live import Live
from kilocopy.ongoing import Ongoing
from kilocopy.report import money, number, percent, seconds

BARS = "▁▂▃▄▅▆▇█"
NO_DATA = "no data"
LABEL, WORDS = 10, 44  # columns of the upper part; its lines have the rest
COLUMN_S = 2.5  # of a line, at least: a picture comes each 2 s
LINE_S_MAX = 600.0
HOLD_S = 6.0  # a picture that came late is no gap
MINUTE_S = 60.0  # rules.WINDOW
KEPT_UP, LIMITED = (dashboards.panel("kilocopy-driver", "Verdict").words[value][0] for value in ("0", "1"))
FIXED_ROWS = 14  # everything above the rows of replicas and workers but what is wrong, a line each
SEVERITY = {"critical": "red", "warning": "yellow", "info": "blue"}


class Screen:
    """Draws a run: `draw` for the size that the terminal has now."""

    def __init__(self, live: Live, run: Ongoing, addresses: Sequence[str] = ()) -> None:
        self.live, self.run, self.addresses = live, run, addresses
        spec = run.spec
        named = {"cluster": spec.name, "model": spec.model.id, "run": run.id}
        self._filled = {name: re.escape(value) for name, value in named.items()} | {"stage": ".*", "node": ".*", "replica": ".*"}

    # -------------------------------------------------------------------------------------------------------------- asking

    def value(self, name: str) -> float | None:
        """A metric's or rule's one value for this run, or for its model where it is the servers'; None: no data."""
        found = [value for labels, value in self.live.ask(name).items() if self._ours(dict(labels))]
        return found[0] if len(found) == 1 and math.isfinite(found[0]) else None

    def _ours(self, labels: dict[str, str]) -> bool:
        spec = self.run.spec
        mine = {"run": self.run.id, "cluster": spec.name, "model": spec.model.id, "model_name": spec.model.id}
        return all(labels[name] == value for name, value in mine.items() if name in labels)

    def rows(self, uid: str, title: str, label: str) -> dict[str, float]:
        """A panel's first query, by one of its labels."""
        expr = dashboards.filled(dashboards.panel(uid, title).queries[0][0], self._filled)
        return {dict(labels).get(label, "?"): value for labels, value in self.live.ask(expr).items()}

    def stage(self) -> dict[str, str] | None:
        """Labels of the stage that is being played: stage, level, phase, kind; None between stages."""
        found = [dict(labels) for labels, value in self.live.ask(m.STAGE.sample).items() if value and self._ours(dict(labels))]
        return found[0] if found else None

    # ------------------------------------------------------------------------------------------------------------- drawing

    def draw(self, width: int, height: int, ended: str | None = None) -> RenderableType:
        """The whole screen. `ended`: why the run is over; the figures are then its last ones."""
        upper = Table.grid(padding=(0, 1), expand=True)
        upper.add_column(width=LABEL, style="bold")
        upper.add_column(width=WORDS, no_wrap=True)
        upper.add_column(ratio=1, no_wrap=True, style="cyan")
        room = max(0, width - LABEL - WORDS - 3)
        for label, said, rule in self._quantities():
            upper.add_row(label, said, self.line(rule, room) if rule else "")
        wrong = self._health()
        below = max(1, height - FIXED_ROWS - len(wrong) - len(self.addresses))
        parts: list[RenderableType] = [self._head(width, ended), self._where(ended), *wrong, *map(Text, self.addresses), upper]
        return Group(*parts, self._note(), self._tables(below))

    def _note(self) -> Text:
        """Over which time the figures are: at the start of a run and of a stage that matters."""
        seen_s = self.live.time_s - self.live.begun_s
        if seen_s < MINUTE_S:
            return Text(f"Of the last minute only {seen_s:.0f} s were seen: rates still rise, and prices fall.", style="yellow")
        return Text("Rates, shares, prices and percentiles (from buckets) are over the last minute.", style="dim")

    def sentence(self) -> str:
        """How it stands, in one line: for where there is no terminal."""
        now = self.stage()
        where = f"stage {int(now['stage']) + 1}/{len(self.run.spec.stages)} {now['phase']}" if now else "between stages"
        return "  ".join([where, *(f"{label}: {said}" for label, said, _ in self._quantities()), *(line.plain for line in self._health())])

    def _head(self, width: int, ended: str | None) -> Text:
        spec = self.run.spec
        name = Text(f"kilocopy  {spec.model.id}  {self.run.id}", style="bold")
        name.truncate(width - 12, overflow="ellipsis")
        said = {None: "going on", "silent": "gone silent"}.get(ended, ended or "")
        name.append(" " * max(1, width - name.cell_len - len(said)))
        return name.append(said, style="green" if ended is None else "bold yellow")

    def _where(self, ended: str | None) -> Text:
        now, stages = self.stage(), len(self.run.spec.stages)
        if ended is not None:
            over = {"complete": "The run is complete", "silent": "The driver has not written for a while: it is gone"}
            return Text(f"{over.get(ended, 'The run was interrupted')}; what follows is its last picture.")
        if now is None:
            return Text(f"no stage is being played (of {stages})", style="dim")
        stage, level = int(now["stage"]), int(now["level"])
        parts = [f"stage {stage + 1}/{stages}: {now['kind']}" + (f", level {level + 1}" if now["kind"] == "search" else ""), now["phase"]]
        for what, left_s in (("this stage", self.run.stage_left_s(stage, level)), ("the run", self.run.left_s(stage, level))):
            parts += [f"{_minutes(left_s)} left of {what}"] if left_s is not None else []
        return Text("   ".join(parts))

    def _health(self) -> list[Text]:
        """The driver in the words of the dashboard's verdict, then what else is wrong, a line each."""
        firing = {alert.name: alert for alert in self.live.group.alerts if alert.fires}
        if self.value("kilocopy:copies") is None:
            said = [Text(f"driver: {NO_DATA}", style="dim")]
        elif dashboards.LIMITED in firing:
            said = [Text(self._here(firing[dashboards.LIMITED].said), style="red")]
        else:
            said = [Text(f"{KEPT_UP}.", style="green")]
        said += [Text(self._here(alert.said), style=SEVERITY[alert.severity]) for name, alert in firing.items() if name != dashboards.LIMITED]
        said += [Text(f"{rule}: {why}", style="red") for rule, why in self.live.group.failed.items()]
        for line in said:
            line.no_wrap, line.overflow = True, "ellipsis"
        return said

    def _here(self, said: str) -> str:
        """An alert's words without the name of the run, which the head has: 80 columns are few."""
        return said.replace(f" of run {self.run.id}", "")

    def _quantities(self) -> list[tuple[str, str, str]]:
        """Label, words, and the rule whose line stands beside them."""
        value = self.value
        asked = value(f"sum by (cluster, model, run) ({m.COPIES_ASKED.sample})")
        copies = [f"{_whole(value('kilocopy:copies'))} in flight"]
        copies += [f"{_whole(asked)} asked"] if asked is not None else []
        if self._served:
            copies += [f"{_whole(value('kilocopy:server_copies'))} on the servers", *_waiting(value("kilocopy:server_waiting"))]
        speed = [_with(value("kilocopy:output_tokens_per_second:rate1m"), "tokens/s"),
                 _with(value("kilocopy:tokens_per_second_per_copy:rate1m"), "a copy")]  # fmt: skip
        pages = value("kilocopy:pages_per_second:rate1m")
        ttft, gap = ([value(f"kilocopy:{name}_seconds:{q}") for q in ("p50", "p99")] for name in ("ttft", "inter_chunk"))
        return [
            ("Copies", ", ".join(copies), "kilocopy:copies"),
            ("Speed", ", ".join(speed), "kilocopy:output_tokens_per_second:rate1m"),
            ("Pages", _with(None if pages is None else 3600 * pages, "an hour"), "kilocopy:pages_per_second:rate1m"),
            ("Price", self._price(), "kilocopy:usd_per_page:rate1m"),
            ("Energy", self._energy(), "kilocopy:wh_per_page:rate1m"),
            ("TTFT", _points(ttft), "kilocopy:ttft_seconds:p99"),
            ("ICL", _points(gap), "kilocopy:inter_chunk_seconds:p99"),
            ("SLO", self._slo(), "kilocopy:slo_attained_fraction:rate1m"),
            ("Errors", self._errors(), "kilocopy:error_fraction:rate1m"),
        ]

    def _price(self) -> str:
        page, pages = self.value("kilocopy:usd_per_page:rate1m"), self.value("kilocopy:pages_per_usd:rate1m")
        if page is not None:
            return f"{money(page)} a page" + (f", {number(pages)} pages a dollar" if pages is not None else "")
        owed = self.value(m.USD_PER_KWH.sample) is not None and not self._metered()
        return "not known: its electricity is not measured" if owed else NO_DATA

    def _metered(self) -> bool:
        return any(dict(labels).get("run") == self.run.id for labels in self.live.ask(m.ENERGY.sample))

    def _energy(self) -> str:
        page, watts = self.value("kilocopy:wh_per_page:rate1m"), self.value("kilocopy:facility_watts:rate1m")
        if page is not None:
            return f"{number(page)} Wh a page, {number(watts)} W with PUE"
        if not self._metered():
            return "not measured (no power meter)"
        return NO_DATA if watts is None else f"{number(watts)} W with PUE"

    def _slo(self) -> str:
        held, must = self.value("kilocopy:slo_attained_fraction:rate1m"), self.run.spec.slo.quantile
        return f"{percent(held) if held is not None else NO_DATA} held it, {percent(must)} must"

    def _errors(self) -> str:
        counted: dict[str, float] = {}
        for labels, count in self.live.ask(f"sum by (run, outcome) ({m.REQUESTS.sample})").items():
            if dict(labels).get("run") == self.run.id:
                counted[dict(labels)["outcome"]] = count
        if not counted:
            return NO_DATA
        failed = [f"{count:,.0f} {outcome}" for outcome, count in sorted(counted.items()) if outcome != "ok" and count]
        return f"{', '.join(failed) or 'none'} of {sum(counted.values()):,.0f} requests"

    def line(self, rule: str, room: int) -> str:
        """A rule's last minutes in `room` characters, from zero to its largest value; a gap stays a gap."""
        series = [points for labels, points in self.live.samples.named(rule).items() if self._ours(dict(labels))]
        if len(series) != 1 or room < 1:
            return ""
        times_s, values = series[0]
        room = min(room, int(LINE_S_MAX / COLUMN_S))
        column_s = min(max(times_s[-1] - times_s[0], room * COLUMN_S), LINE_S_MAX) / room
        first_s = self.live.begun_s + (MINUTE_S if "rate1m" in rule else 0)  # before that a rate is only on its way up
        columns = []
        for column in range(room):  # each shows the last value that it knew when it ended
            end_s = self.live.time_s - (room - 1 - column) * column_s
            last = bisect.bisect_right(times_s, end_s) - 1
            known = last >= 0 and times_s[last] >= max(first_s, end_s - max(column_s, HOLD_S))
            columns.append(values[last] if known else math.nan)
        return bars(columns)

    def _tables(self, below: int) -> Table:
        both = Table.grid(padding=(0, 2), expand=True)
        both.add_column(ratio=1)
        both.add_column(ratio=1)
        both.add_row(self._replicas(below), self._workers(below))
        return both

    @property
    def _served(self) -> bool:
        """Whether the servers' metrics pages are known."""
        return any(("job", "servers") in target.labels for target in self.live.answered)

    def _replicas(self, below: int) -> Table | Text:
        if not self._served:
            return Text("replicas: no metrics page of the servers\nis known (--metrics)", style="dim")
        asked = {"run": "Running", "wait": "Waiting", "KV": "KV cache", "tokens/s": "Tokens/s"}
        columns = {head: self.rows("kilocopy-replicas", title, "ReplicaId") for head, title in asked.items()}
        written = {"run": _whole, "wait": _whole, "KV": _share, "tokens/s": number}
        # An engine's gauges vanish when idle: where its counter lives, that is a zero (rules.or_zero).
        columns = {
            head: found if head == "tokens/s" else dict.fromkeys(columns["tokens/s"], 0.0) | found for head, found in columns.items()
        }
        # One that died leaves its counters on Ray's page, and would look idle.
        healthy = {dict(labels)["ReplicaId"] for labels in self.live.ask("kilocopy:replica_healthy") if self._ours(dict(labels))}
        down = set(columns["tokens/s"]) - healthy if self.value("kilocopy:replicas") is not None else set()
        return _table("replica", columns, written, below, down)

    def _workers(self, below: int) -> Table:
        rules = {"CPU": "driver_cpu_fraction:rate1m", "lag": "driver_loop_lag_seconds:p99", "events/s": "driver_events_per_second:rate1m"}
        columns = {"copies": self._by_worker(m.IN_FLIGHT.sample)} | {head: self._by_worker(f"kilocopy:{rule}") for head, rule in rules.items()}
        return _table("worker", columns, {"copies": _whole, "CPU": _share, "lag": seconds, "events/s": number}, below)

    def _by_worker(self, name: str) -> dict[str, float]:
        return {dict(labels)["worker"]: value for labels, value in self.live.ask(name).items() if self._ours(dict(labels))}


def bars(values: Sequence[float]) -> str:
    """A line of block characters: the largest value is full, zero the lowest, what is not there a space."""
    top = max((value for value in values if math.isfinite(value)), default=0.0)
    return "".join(" " if not math.isfinite(v) else BARS[min(7, int(8 * v / top))] if top > 0 and v > 0 else BARS[0] for v in values)


def _table(
    head: str, columns: dict[str, dict[str, float]], written: Mapping[str, Callable[[float], str]], below: int, down: Collection[str] = ()
) -> Table:
    """A row for each that any column knows, as many as there is room for; the last are those that are `down`."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    table.add_column(head, no_wrap=True, overflow="ellipsis")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    known = sorted({row for column in columns.values() for row in column}, key=lambda row: (row in down, len(row), row))
    if not known:
        table.add_row(NO_DATA, style="dim")
    shown = known if len(known) <= below else known[: below - 1]
    for row in shown:
        if row in down:
            table.add_row(row, *[""] * (len(columns) - 1), "down", style="red")
            continue
        cells = [written[name](column[row]) if row in column else "–" for name, column in columns.items()]
        table.add_row(row, *cells)
    if len(shown) < len(known):
        table.add_row(f"and {len(known) - len(shown)} more", style="dim")
    return table


def _whole(value: float | None) -> str:
    return NO_DATA if value is None else f"{value:,.0f}"


def _share(value: float) -> str:
    """A share in whole per cent: there is no room for more."""
    return f"{100 * value:.0f} %"


def _waiting(value: float | None) -> list[str]:
    return [f"{value:,.0f} waiting"] if value else []


def _with(value: float | None, unit: str) -> str:
    return NO_DATA if value is None else f"{number(value)} {unit}"


def _points(values: Sequence[float | None]) -> str:
    p50, p99 = values
    return NO_DATA if p50 is None and p99 is None else f"p50 {seconds(p50)}, p99 {seconds(p99)}"


def _minutes(left_s: float) -> str:
    minutes, rest = divmod(round(left_s), 60)
    return f"{minutes}:{rest:02d}"
