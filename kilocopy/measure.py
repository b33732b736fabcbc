"""From raw records to the numbers of each stage: what arrived in its window, how fast, and what the numbers are worth.

Three ideas carry this. *Tokens count where they arrive*: a stream that straddles an edge of the window gives the window only the
tokens that came inside it, so throughput neither gains nor loses at the edges. *Every number has a second way to it* (identity.py).
*Latency is as good as the clock of the driver* (health.py): a driver that woke up late stamped late, so its percentiles are
withheld while the throughput stands.

In open loop TTFT and E2E count from the planned time of a request: a late send, the driver's or a full house's doing, makes users
wait and is in the figure (no coordinated omission). In closed loop nobody waits before the send, and they count from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from kilocopy import frontier, health, identity, summary, windows
from kilocopy.identity import check_copies, check_littles_law, check_tokens, gauge, gauge_mean
from kilocopy.recording import Recording, Samples
from kilocopy.records import DAMAGED
from kilocopy.spec import ClosedStage, PlainStage, Slo, Spec, StepsStage, SyntheticPrompts, TraceStage
from kilocopy.streams import Floats, Gaps, Mask, Streams
from kilocopy.summary import Check, Estimate, Percentiles, Reason
from kilocopy.windows import Span, busy_s, mean_in_flight

BATCHES = 20  # batch means: enough for the t quantile, few enough that a batch outlasts the correlation of tokens
BATCHED_WINDOW_S_MIN = 10.0
COPIES_FRACTION_MIN = 0.98
FEW_STREAMS = 100
INSIDE_FRACTION_MIN = 0.5  # of the streams that began inside the window: with fewer that end in it, they are the quick ones
INSIDE_FRACTION_AIM = 0.8  # what a longer window is told for: of streams of W s, 1 - W / T end in one of T
CACHED_FRACTION_SPARE = 0.02  # of the prompt tokens: templates and first tokens are alike everywhere
VALUES_MAX = 2000
HUMAN_WPM = (238, 150, 600)  # reading (Brysbaert 2019), speech, thought at 10 words/s


def percentiles(values: Floats) -> Percentiles | None:
    """Percentiles of raw values, numpy's linear interpolation; None without values."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    p50, p90, p99 = np.percentile(known, [50, 90, 99])
    return Percentiles(p50=float(p50), p90=float(p90), p99=float(p99), mean=float(known.mean()), n=len(known))


def sample(values: Floats) -> list[float]:
    """At most VALUES_MAX values, evenly spaced in sorted order, for plots."""
    ordered = np.sort(values[~np.isnan(values)])
    if len(ordered) > VALUES_MAX:
        ordered = ordered[np.linspace(0, len(ordered) - 1, VALUES_MAX).round().astype(np.int64)]
    return [float(value) for value in ordered]


def gap_percentiles(gaps: Gaps) -> Percentiles | None:
    """Percentiles of gaps; None without one."""
    if not gaps.n:
        return None
    p50, p90, p99 = gaps.quantiles_s([0.5, 0.9, 0.99])
    return Percentiles(p50=p50, p90=p90, p99=p99, mean=gaps.mean_s, n=gaps.n)


def gap_sample(gaps: Gaps) -> list[float]:
    """At most VALUES_MAX gaps, evenly spaced in sorted order, for plots."""
    places = np.arange(gaps.n) if gaps.n <= VALUES_MAX else np.linspace(0, gaps.n - 1, VALUES_MAX).round().astype(np.int64)
    return [float(value) for value in gaps.at_s(places)]


def batch_means(totals: Floats, start_s: float, end_s: float) -> Estimate:
    """A rate with its 95 % interval: what arrived in each of 20 equal parts of a window, mean +- t(0.975, 19) s / sqrt(20).

    Source: Law, Simulation Modeling and Analysis, section 9.5.3 (batch means). Under 10 s there is no interval.
    """
    rate = float(totals.sum()) / (end_s - start_s)
    if end_s - start_s < BATCHED_WINDOW_S_MIN:
        return Estimate(value=rate)
    rates = totals / ((end_s - start_s) / BATCHES)
    half = float(stdtrit(BATCHES - 1, 0.975) * rates.std(ddof=1) / np.sqrt(BATCHES))
    return Estimate(value=rate, low=max(0.0, rate - half), high=rate + half)


def error_fraction(streams: Streams, start_s: float, end_s: float, *, dropped: bool = False) -> float:
    """Errors over requests that were open inside the window, whenever they ended; those that the driver cancelled count on neither side.

    A request that hangs ends at its timeout, which is often longer than the window: counted by their ends alone, copies that hang
    would be in flight and fail nowhere. With `dropped`, arrivals that were planned in it and never sent count as errors: their user got nothing.
    """
    lay_in = (streams.finished_s > start_s) & (streams.scheduled_s < end_s)
    failed, ok = int((lay_in & streams.failed).sum()), int((lay_in & streams.ok).sum())
    if dropped:
        failed += int((streams.dropped & (streams.scheduled_s >= start_s) & (streams.scheduled_s < end_s)).sum())
    return failed / (failed + ok) if failed + ok else 0.0


def _error_reasons(streams: Streams, start_s: float, end_s: float, slo: Slo) -> list[Reason]:
    fraction = error_fraction(streams, start_s, end_s)
    if fraction <= slo.error_fraction_max:
        return []
    limit = f"slo.error_fraction_max is {100 * slo.error_fraction_max:g} %"
    return [Reason(code="too-many-errors", sentence=f"{100 * fraction:.2f} % of the requests failed ({limit}).")]


def _copies_reasons(streams: Streams, window: summary.Window, asked: int) -> list[Reason]:
    """Too few copies in flight: the driver's fault, unless errors kept them waiting to ask again."""
    in_flight = mean_in_flight(streams, window.start_s, window.end_s)
    if in_flight >= COPIES_FRACTION_MIN * asked:
        return []
    short = f"{in_flight:.2f} of {asked} copies were in flight (at least {100 * COPIES_FRACTION_MIN:g} % are needed)"
    if error_fraction(streams, window.start_s, window.end_s) > 0:
        return [Reason(code="too-many-errors", sentence=f"Errors kept copies from running: {short}.")]
    return [Reason(code="driver-too-slow", sentence=f"The driver did not keep up: {short} and nothing failed.")]


def _quick(began: Streams, window: summary.Window, asked: PlainStage) -> list[Reason]:
    """Whether latencies are of a part of the streams that tells little of the rest: those that ended in the window, where most did not.

    Of streams that begin evenly spread over a window of T and take W each, 1 - W / T end in it while W <= T; over streams of unlike W that is
    at least 1 - mean(W) / T. So a window of mean(W) / (1 - share) holds that share, if it goes on as it was.
    """
    ended = int((began.finished_s <= window.end_s).sum())
    if not len(began.stage) or ended >= INSIDE_FRACTION_MIN * len(began.stage):
        return []
    cure = ""
    if isinstance(asked, ClosedStage):  # in open loop what waits may grow with the window
        wanted_s = float((began.finished_s - begun_s(began, asked)).mean()) / (1 - INSIDE_FRACTION_AIM)
        cure = f"; a window of about {wanted_s:.0f} s would hold {100 * INSIDE_FRACTION_AIM:.0f} %"
    said = f"Of {len(began.stage)} streams that began inside the window and ended well {ended} ended in it"
    told = "so there are no latencies of them" if not ended else "and latencies are of these, rather the quick ones"
    return [Reason(code="quick-streams", sentence=f"{said}, {told}{cure}. Throughput and SLO are of all.")]


def _notes(checks: Sequence[Check], window: summary.Window, inside: Streams, judged: int, shares_host: bool) -> list[Reason]:
    """What a reader should know that does not change the verdict."""
    notes = {check.name.replace("_", "-"): check.sentence for check in checks[1:] if check.outcome == "failed"}
    if checks[0].outcome == "not_checked":
        notes["tokens-not-checked"] = checks[0].sentence
    if window.duration_s < BATCHED_WINDOW_S_MIN:
        notes["short-window"] = f"The window is {window.duration_s:.1f} s: under {BATCHED_WINDOW_S_MIN:g} s there is no interval."
    streams = len(inside.stage)
    if not judged:
        notes["slo-not-judged"] = "No stream that began inside the window ended well, so the SLO is not judged: lengthen the stage."
    elif 0 < streams < FEW_STREAMS:
        notes["few-streams"] = f"Only {streams} streams lie inside the window: their p99 is close to their maximum."
    if shares_host:
        notes["driver-shares-host"] = "The driver ran on the serving host and took some of its time."
    return [Reason(code=code, sentence=sentence) for code, sentence in notes.items()]


def _cached(spec: Spec, asked: PlainStage, recording: Recording, span: Span) -> list[Reason]:
    """A prefix cache that held more of the prompts than was asked to be alike, where prompts are made to be each their own."""
    work = spec.workload
    if not isinstance(work.prompts, SyntheticPrompts) or isinstance(asked, TraceStage) or work.conversation or work.copies_per_prompt > 1:
        return []
    shared, held = work.prompts.shared_prefix_fraction, identity.prefix_hits(recording.server, span)
    if held is None or held <= shared + CACHED_FRACTION_SPARE:
        return []
    said = f"The engines' prefix cache held {100 * held:.0f} % of the prompt tokens, where {100 * shared:g} % were asked to be alike"
    cure = "the same prompts were sent to this serving before: serve anew, or change workload.seed"
    return [Reason(code="prefix-cache-answered", sentence=f"{said}: {cure}.")]


def _assumed_words(spec: Spec, through: summary.Throughput) -> list[Reason]:
    """Pages that rest on an assumption say so, beside what was counted."""
    assumed = spec.page.words_per_token
    if assumed is None:
        return []
    beside = "; no words were counted" if through.words_per_token_counted is None else f"; {through.words_per_token_counted:.3g} were counted"
    sentence = f"Pages are assumed, not counted: {assumed.value:g} words per token ({assumed.source}){beside}."
    return [Reason(code="words-assumed", sentence=sentence)]


def _verdict(voids: list[Reason], withheld: list[Reason], notes: list[Reason]) -> summary.Verdict:
    level = "void" if voids else "latency_withheld" if withheld else "valid"
    return summary.Verdict(level=level, reasons=voids + withheld, notes=notes)  # type: ignore[arg-type]  # the literals above


# ------------------------------------------------------------------------------------------------------------------ a stage


def begun_s(streams: Streams, asked: PlainStage) -> Floats:
    """Where a request's time counts from: its send in closed loop, its planned time in open loop."""
    return streams.sent_s if isinstance(asked, ClosedStage) else streams.scheduled_s


def steps_of(streams: Streams, samples: int) -> Floats:
    """Tokens after the first of each request, or of the mean sample of one that asks for several: they come side by side."""
    return np.asarray(np.maximum(streams.output_tokens / samples - 1, 0), dtype=np.float64)


def attaining(streams: Streams, slo: Slo, asked: PlainStage, samples: int = 1) -> Mask:
    """Which ok streams held the speed, (tokens - 1) / (last - first), and the TTFT. One token alone has no speed to miss."""
    steps = steps_of(streams, samples)
    fast = steps >= slo.tokens_per_s_per_copy * (streams.last_s - streams.first_s)
    soon = streams.first_s - begun_s(streams, asked) <= slo.ttft_s
    return np.asarray(fast & soon)


def judged(streams: Streams, window: summary.Window, asked: PlainStage) -> Streams:
    """Every ok stream that began in the window, also one that outlasted it: the slow ones are the likeliest to."""
    from_s = begun_s(streams, asked)
    return streams.where(streams.ok & (from_s >= window.start_s) & (from_s <= window.end_s))


def _window_streams(spec: Spec, recording: Recording, span: Span) -> tuple[Streams, PlainStage]:
    """The streams of a level that are judged by the SLO, and the stage that asked for them."""
    asked, streams = windows.played(spec, span), _of(recording, span)
    window = windows.find(asked, span, streams, _end_s(span, recording)).window
    return (judged(streams, window, asked) if window else streams.where(np.zeros(len(streams.stage), dtype=bool))), asked


def held_speed(spec: Spec, recording: Recording, span: Span, slo: Slo) -> tuple[int, int]:
    """How many streams of a level are judged, and how many of them held this SLO's speed and TTFT."""
    counted, asked = _window_streams(spec, recording, span)
    return len(counted.stage), int(attaining(counted, slo, asked, spec.workload.samples).sum())


def effective_speeds(spec: Spec, recording: Recording, span: Span, slo: Slo) -> Floats:
    """Tokens/s of each judged stream of a level in the order of their begin, (tokens - 1) / (last - first); 0 where it missed the TTFT, infinite with one token."""
    counted, asked = _window_streams(spec, recording, span)
    steps, took_s = steps_of(counted, spec.workload.samples), counted.last_s - counted.first_s
    speeds = np.divide(steps, took_s, out=np.full(len(steps), np.inf), where=(steps > 0) & (took_s > 0))
    held = np.where(counted.first_s - begun_s(counted, asked) <= slo.ttft_s, speeds, 0.0)
    return np.asarray(held[np.argsort(begun_s(counted, asked), kind="stable")], dtype=np.float64)


def _words_per_token(streams: Streams, window: summary.Window) -> float | None:
    """Measured on the decoded text of the ok requests that overlap the window."""
    counted = streams.ok & ~np.isnan(streams.output_words) & ~np.isnan(streams.output_tokens)
    counted &= (streams.sent_s < window.end_s) & (streams.finished_s > window.start_s)
    tokens = float(streams.output_tokens[counted].sum())
    return float(streams.output_words[counted].sum()) / tokens if tokens else None


def _throughput(spec: Spec, streams: Streams, window: summary.Window, rate: Estimate, in_flight: float) -> summary.Throughput:
    """What arrived in the window, from the rate at which tokens did."""
    tokens = rate.value * window.duration_s
    counted, assumed = _words_per_token(streams, window), spec.page.words_per_token
    words_per_token = counted if assumed is None else assumed.value
    words = None if words_per_token is None else tokens * words_per_token
    pages = None if words is None else words / spec.page.words
    began = streams.ok & (streams.first_s >= window.start_s) & (streams.first_s < window.end_s)
    ended = streams.ok & (streams.finished_s > window.start_s) & (streams.finished_s <= window.end_s)
    return summary.Throughput(
        output_tokens=tokens,
        prompt_tokens=float(np.nansum(streams.prompt_tokens[began])),
        output_tokens_per_s=rate,
        output_tokens_per_s_per_copy=rate.value / in_flight if in_flight > 0 else None,
        output_tokens_per_s_per_device=rate.value / spec.cluster.devices,
        output_tokens_per_s_per_replica=rate.value / spec.cluster.replicas,
        words_per_token=words_per_token,
        words_per_token_counted=counted,
        words_source="counted" if assumed is None else "assumed",
        words_per_s=None if words is None else words / window.duration_s,
        pages=pages,
        pages_per_hour=None if pages is None else pages * 3600 / window.duration_s,
        requests_per_s=int(ended.sum()) / window.duration_s,
    )


def _latency(inside: Streams, asked: PlainStage, samples: int) -> summary.Latency:
    """Percentiles over the ok requests that were sent and finished inside the window.

    Several samples of a request come mixed in its stream: TPOT is then the mean sample's, and the gaps between chunks are nobody's ITL.
    """
    steps = steps_of(inside, samples)
    tpot_s = (inside.last_s - inside.first_s)[steps > 0] / steps[steps > 0]
    tokens_per_chunk = np.where(inside.output_tokens > 0, inside.output_tokens, np.nan) / (inside.gap_counts + 1)
    from_s, icl_s = begun_s(inside, asked), gap_percentiles(inside.gaps)
    single = bool((tokens_per_chunk == 1).all())  # a chunk is a token: a gap between chunks is one between tokens
    return summary.Latency(
        ttft_s=percentiles(inside.first_s - from_s),
        ttft_from_send_s=percentiles(inside.first_s - inside.sent_s),
        tpot_s=percentiles(tpot_s),
        itl_s=None if samples > 1 else icl_s if single else percentiles(inside.gaps_s / np.repeat(tokens_per_chunk, inside.gap_counts)),
        icl_s=icl_s,
        e2e_s=percentiles(inside.last_s - from_s),
        send_lag_s=percentiles(inside.sent_s - inside.scheduled_s),
    )


def _requests(streams: Streams, in_window_ok: int) -> summary.Requests:
    dropped = int(streams.dropped.sum())
    return summary.Requests(
        scheduled=len(streams.stage),
        sent=len(streams.stage) - dropped,
        ok=int(streams.ok.sum()),
        errors=streams.errors(),
        cancelled=int(streams.cancelled.sum()),
        dropped=dropped,
        in_window_ok=in_window_ok,
    )


INTERRUPTED = Reason(code="interrupted", sentence="The stage was cut off: streams in flight then are missing from the records.")


def _rows_missing(recording: Recording) -> list[Reason]:
    """Whether rows were lost: a file was damaged, or a worker that ended its records counted more requests as sent than it kept rows of.

    Then nobody knows which stage lacks them.
    """
    spoilt = [name for name, said in recording.damaged.items() if said == DAMAGED and name.startswith(("requests/", "driver/"))]
    if spoilt:
        return [Reason(code="rows-missing", sentence=f"The records are damaged ({', '.join(spoilt)}), and rows are missing.")]
    closed = {event.get("process") for event in recording.events if event["event"] == "run_end"}
    short = [
        f"worker {worker} sent {sent:,} and kept {recording.rows.sent[worker]:,}"
        for worker, sent in sorted(recording.sent.items())
        if f"worker{worker}" in closed and sent > recording.rows.sent[worker]
    ]
    return [Reason(code="rows-missing", sentence=f"Rows of requests are missing from the records: {', '.join(short)}.")] if short else []


def _end_s(span: Span, recording: Recording) -> float:
    """When the stage was over: drained, else the last record before the next stage."""
    return span.drained_s if span.drained_s is not None else max(span.start_s, min(span.next_s, recording.end_s))


def stage(spec: Spec, recording: Recording, span: Span, manifest: Mapping[str, Any]) -> summary.Stage:
    """One level of a stage as measured, without its cost. `manifest`: what the run was (driver_shares_host, driver_roofline)."""
    asked = windows.played(spec, span)
    streams = _of(recording, span)
    found = windows.find(asked, span, streams, _end_s(span, recording))
    if found.window is not None:
        return _measured(spec, recording, span, streams, found, found.window, manifest=manifest)
    voids = [*([INTERRUPTED] if span.cut_off else []), *_rows_missing(recording), *health.sockets(span)]
    voids += [*found.voids, *_error_reasons(streams, -np.inf, np.inf, spec.slo)]
    whole = summary.Window(start_s=span.start_s, end_s=_end_s(span, recording), duration_s=0, rule="the whole stage")
    return summary.Stage(
        **_identity(spec, span, recording),
        verdict=_verdict(voids, [], list(found.notes)),
        window=None,
        copies=_copies(asked),
        rate=None,
        steps=[],
        throughput=None,
        latency=None,
        ttft_values_s=[],
        icl_values_s=[],
        requests=_requests(streams, 0),
        driver=health.account(health.workers(recording.health, streams, streams.where(streams.ok), whole), span, manifest),
        checks=[check_tokens(streams, recording.server, span)],
        cost=None,
    )


def _identity(spec: Spec, span: Span, recording: Recording) -> dict[str, Any]:
    return {
        "index": span.index,
        "level": span.level,
        "kind": windows.played(spec, span).arrival,
        "load": span.load,
        "title": windows.title(spec, span),
        "start_s": span.start_s,
        "end_s": _end_s(span, recording),
    }


def _copies(asked: PlainStage, **known: Any) -> summary.Copies:
    unknown: dict[str, Any] = {"n_run_client": None, "n_run_server": None, "slo_held": None, "slo_attainment": None, "n_human": {}}
    unknown |= {"slo_judged": 0, "slo_attained": None, "error_fraction": None}
    return summary.Copies(asked=asked.copies if isinstance(asked, ClosedStage) else None, **(unknown | known))


def _measured(
    spec: Spec,
    recording: Recording,
    span: Span,
    streams: Streams,
    found: windows.Found,
    window: summary.Window,
    *,
    manifest: Mapping[str, Any],
) -> summary.Stage:
    """A stage that has a window."""
    asked, server = windows.played(spec, span), recording.server
    inside = streams.where(streams.ok & streams.within(window.start_s, window.end_s))
    in_flight = mean_in_flight(streams, window.start_s, window.end_s)
    arrived = _tokens_in(streams, window, BATCHES)
    rate = batch_means(arrived, window.start_s, window.end_s)
    throughput = _throughput(spec, streams, window, rate, in_flight)
    checks = [
        check_tokens(streams, server, span),
        check_littles_law(streams, window, in_flight),
        check_copies(in_flight, server, window, spec.workload.samples),
    ]
    samples = spec.workload.samples
    latency = _latency(inside, asked, samples)
    pace = latency.itl_s if samples == 1 else latency.tpot_s
    driver = health.judge(
        recording.health,
        streams,
        inside,
        window,
        span,
        itl_p50_s=pace.p50 if pace else None,
        samples=samples,
        max_in_flight=None if isinstance(asked, ClosedStage) else asked.max_in_flight,
        manifest=manifest,
        too_slow=_copies_reasons(streams, window, asked.copies) if isinstance(asked, ClosedStage) and span.whole else [],
    )
    withheld = driver.withheld
    slo = _slo(streams, window, spec, asked, withheld=bool(withheld))
    voids = [*([INTERRUPTED] if span.cut_off else []), *_rows_missing(recording), *driver.voids, *found.voids]
    voids += _void_reasons(spec, streams, window, checks[0], float(arrived.sum()))
    notes = [*_assumed_words(spec, throughput), *_cached(spec, asked, recording, span)]
    notes += _notes(checks, window, inside, slo["slo_judged"], bool(manifest.get("driver_shares_host")))
    notes += [] if withheld else _quick(judged(streams, window, asked), window, asked)
    return summary.Stage(
        **_identity(spec, span, recording),
        verdict=_verdict(voids, withheld, [*found.notes, *notes, *driver.notes]),
        window=window,
        copies=_copies(
            asked,
            n_run_client=in_flight,
            n_run_server=gauge_mean(server, ["num_requests_running"], window.start_s, window.end_s),
            n_human=n_human(throughput.words_per_s),
            **(slo | {"slo_held": None} if voids and slo["slo_held"] else slo),
        ),
        rate=None if isinstance(asked, ClosedStage) else _rate(asked, streams, window),
        steps=_steps(asked, span, streams, withheld=bool(withheld)) if isinstance(asked, StepsStage) else [],
        throughput=throughput,
        latency=None if withheld else latency,
        ttft_values_s=[] if withheld else sample(inside.first_s - begun_s(inside, asked)),
        icl_values_s=[] if withheld else gap_sample(inside.gaps),
        requests=_requests(streams, len(inside.stage)),
        driver=driver.driver,
        checks=checks,
        cost=None,
    )


def _slo(streams: Streams, window: summary.Window, spec: Spec, asked: PlainStage, *, withheld: bool) -> dict[str, Any]:
    """Whether the SLO was held: by enough streams, with few enough errors. Without a clock to trust nobody can say."""
    slo, counted = spec.slo, judged(streams, window, asked)
    errors = error_fraction(streams, window.start_s, window.end_s, dropped=True)
    told: dict[str, Any] = {"slo_judged": len(counted.stage), "error_fraction": errors, "slo_held": None}
    if withheld or not len(counted.stage):
        return told
    attained = attaining(counted, slo, asked, spec.workload.samples)
    held = int(attained.sum())
    share = held / len(counted.stage)
    return told | {
        "slo_attained": held,
        "slo_independent": frontier.independent_part(attained[np.argsort(begun_s(counted, asked), kind="stable")]),
        "slo_attainment": share,
        "slo_held": share >= slo.quantile and errors <= slo.error_fraction_max,
    }


def _rate(asked: PlainStage, streams: Streams, window: summary.Window) -> summary.Rate:
    """Rates of an open loop: what was asked, and what became of it."""

    def per_s(times_s: Floats) -> float:
        return int(((times_s >= window.start_s) & (times_s < window.end_s)).sum()) / window.duration_s

    first = streams.where((streams.sequence == 0) | streams.dropped)  # later turns of a conversation are nobody's arrival
    return summary.Rate(
        asked_per_s=windows.rate_asked_per_s(asked),
        planned_per_s=per_s(first.scheduled_s),
        sent_per_s=per_s(first.sent_s),
        ended_per_s=per_s(streams.where(~streams.dropped).finished_s),
    )


def _steps(asked: StepsStage, span: Span, streams: Streams, *, withheld: bool) -> list[summary.Step]:
    """A row per rate; its tokens are those that arrived during it, its TTFTs those of the requests that were planned in it."""
    ok, found = streams.where(streams.ok), []
    for rate, start_s, end_s in windows.steps(asked, span):
        mine = streams.where((streams.scheduled_s >= start_s) & (streams.scheduled_s < end_s))
        answered = mine.where(mine.ok)
        found.append(
            summary.Step(
                rate_asked_per_s=rate,
                start_s=start_s,
                end_s=end_s,
                arrivals=len(mine.stage),
                dropped=int(mine.dropped.sum()),
                errors=int(mine.failed.sum()),
                output_tokens_per_s=float(ok.tally(np.array([start_s, end_s]))[0]) / (end_s - start_s),
                in_flight=mean_in_flight(streams, start_s, end_s),
                ttft_s=None if withheld else percentiles(answered.first_s - answered.scheduled_s),
            )
        )
    return found


def n_human(words_per_s: float | None) -> dict[str, float]:
    """Throughput equivalents: how many humans would read, speak or think as many words, by their words per minute."""
    return {} if words_per_s is None else {str(wpm): words_per_s / (wpm / 60) for wpm in HUMAN_WPM}


def _of(recording: Recording, span: Span) -> Streams:
    """The requests of one level of a stage."""
    return recording.of(span.index, span.level)


def block_tokens(recording: Recording, span: Span, window: summary.Window, blocks: int) -> Floats:
    """Output tokens that arrived in each of so many equal parts of a window."""
    return _tokens_in(_of(recording, span), window, blocks)


def _tokens_in(streams: Streams, window: summary.Window, parts: int) -> Floats:
    """Tokens of the ok streams that arrived in each of so many equal parts of a window."""
    return streams.where(streams.ok).tally(np.linspace(window.start_s, window.end_s, parts + 1))


def _void_reasons(spec: Spec, streams: Streams, window: summary.Window, tokens: Check, arrived: float) -> list[Reason]:
    """What else leaves a measured stage without a headline: errors, counters that disagree, no token at all."""
    reasons = _error_reasons(streams, window.start_s, window.end_s, spec.slo)
    if tokens.outcome == "failed":
        reasons.append(Reason(code="counters-disagree", sentence=tokens.sentence))
    if not arrived:
        reasons.append(Reason(code="no-tokens", sentence="No token of a finished stream arrived in the window."))
    return reasons


# --------------------------------------------------------------------------------------------------------------- the timeline


def timeline(recording: Recording, found: Sequence[Span]) -> list[summary.Bin]:
    """The run second by second, from the first event to the last record; tokens of finished streams only."""
    bins = int(np.ceil(recording.end_s))
    if not bins:
        return []
    edges_s = recording.seconds_s
    courses = recording.courses()
    tokens, broken = (np.sum([np.zeros(bins), *(getattr(course, name) for course in courses)], axis=0) for name in ("tokens", "broken"))
    sent_s, finished_s, failed_s = (
        np.concatenate([np.zeros(0), *(getattr(course, name) for course in courses)]) for name in ("sent_s", "finished_s", "failed_s")
    )
    errors, _ = np.histogram(failed_s, bins=edges_s)
    in_flight = np.diff(busy_s(sent_s, finished_s, edges_s))
    middles_s = edges_s[:-1] + 0.5
    stage_of, level_of = np.full(bins, -1), np.zeros(bins, dtype=np.int64)
    for span in found:
        during = (middles_s >= span.start_s) & (middles_s < _end_s(span, recording))
        stage_of[during], level_of[during] = span.index, span.level
    running = _held(recording.server, "num_requests_running", middles_s)
    waiting = _held(recording.server, "num_requests_waiting", middles_s)
    return [
        summary.Bin(
            t_s=float(edges_s[i]),
            stage=int(stage_of[i]),
            level=int(level_of[i]),
            output_tokens_per_s=float(tokens[i]),
            broken_tokens_per_s=float(broken[i]),
            in_flight=max(0.0, float(in_flight[i])),
            server_running=None if np.isnan(running[i]) else float(running[i]),
            server_waiting=None if np.isnan(waiting[i]) else float(waiting[i]),
            errors=int(errors[i]),
        )
        for i in range(bins)
    ]


def _held(server: Samples, name: str, at_s: Floats) -> Floats:
    """A gauge summed over targets, interpolated between scrapes; NaN where no target was being scraped."""
    total, seen = np.zeros(len(at_s)), np.zeros(len(at_s), dtype=bool)
    for times_s, values in gauge(server, name).values():
        covered = (at_s >= times_s[0] - 0.5) & (at_s <= times_s[-1] + 0.5)
        total += np.where(covered, np.interp(at_s, times_s, values), 0.0)
        seen |= covered
    return np.where(seen, total, np.nan)
