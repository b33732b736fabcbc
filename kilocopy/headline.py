"""The answer: what each search found, N_SLO with its interval and reason, and one sentence that a person can repeat."""

from __future__ import annotations

from collections.abc import Sequence

from kilocopy import search
from kilocopy.spec import SearchStage, Slo, Spec
from kilocopy.summary import Headline, Search, SearchLevel, Stage

REASONS = {
    "precise": "held and missed loads are as close as precision_fraction asks",
    "limit": "it is the search's limit, so the true one may be larger",
    "first_missed": "already the smallest load missed it",
    "unsound": "the driver, and not the server, was the limit at the next load, or its level is void",
    "unfinished": "the search did not come to its end",
}


# ----------------------------------------------------------------------------------------------------------------- searches


def searches(spec: Spec, stages: Sequence[Stage]) -> list[Search]:
    """What each search stage found, from its levels as they were measured."""
    found = []
    for index, asked in enumerate(spec.stages):
        levels = [stage for stage in stages if stage.index == index and stage.load is not None]
        if isinstance(asked, SearchStage) and levels:
            found.append(_search(index, asked, levels, spec.slo))
    return found


def _search(index: int, asked: SearchStage, stages: Sequence[Stage], slo: Slo) -> Search:
    tried = [as_level(stage, slo) for stage in stages]
    answer = search.answer(asked, tried, slo)
    return Search(
        stage=index,
        over=asked.over,
        answer=answer.load,
        low=answer.low,
        high=answer.high,
        reason=answer.reason,
        sentence=_search_sentence(asked, answer, tried, slo),
        levels=[_row(stage, level, slo) for stage, level in zip(stages, tried, strict=True)],
    )


def as_level(stage: Stage, slo: Slo) -> search.Level:
    """A measured level as the search judges it: unsound where the driver decided, where it was not played to its end, and where it is
    void for whatever else but errors, a full house, and a backlog that grew while streams missed the SLO: those are the server's own.
    """
    codes = {reason.code for reason in stage.verdict.reasons}
    sound = not stage.driver.limited and "interrupted" not in codes and stage.copies.error_fraction is not None
    attained = stage.copies.slo_attained
    # Late streams of a backlog come all together, so that here each counts: a miss is what the backlog excuses, and the verdict is told by itself.
    missed = attained is not None and search.wilson(attained, stage.copies.slo_judged)[1] < slo.quantile
    own = {"sends-dropped", "backlog-grows"} if missed else {"sends-dropped"}
    sound = sound and ((stage.copies.error_fraction or 0.0) > slo.error_fraction_max or codes <= own)
    return search.Level(
        load=stage.load or 0.0,
        judged=0 if attained is None else stage.copies.slo_judged,
        attained=attained or 0,
        error_fraction=stage.copies.error_fraction or 0.0,
        sound=sound,
        independent=stage.copies.slo_independent,
    )


def _row(stage: Stage, level: search.Level, slo: Slo) -> SearchLevel:
    low, high = search.likely(level) if level.judged else (None, None)
    return SearchLevel(
        level=stage.level,
        load=level.load,
        judged=level.judged,
        attained=stage.copies.slo_attained,
        attainment=level.attained / level.judged if level.judged else None,
        independent=level.independent,
        wilson_low=low,
        wilson_high=high,
        error_fraction=level.error_fraction,
        verdict=search.verdict(level, slo),
        output_tokens_per_s=stage.throughput.output_tokens_per_s.value if stage.throughput else None,
        output_tokens_per_s_per_copy=stage.throughput.output_tokens_per_s_per_copy if stage.throughput else None,
        in_flight=stage.copies.n_run_client,
        stage_verdict=stage.verdict.level,
    )


def load(value: float, over: str) -> str:
    """`64 copies`, `4.2 requests/s`."""
    if over == "copies":
        return f"{value:,.0f} {'copy' if value == 1 else 'copies'}"
    return f"{value:.4g} requests/s"


def _search_sentence(asked: SearchStage, answer: search.Answer, tried: Sequence[search.Level], slo: Slo) -> str:
    """The number with its interval and the reason why the search ended there."""
    reason = REASONS[answer.reason]
    if answer.load is None:
        smallest = load(min(level.load for level in tried), asked.over)
        return f"No load held the SLO ({slo_words(slo)}), down to {smallest}: {reason}."
    held = next(level for level in search.pooled(tried) if level.load == answer.load)
    low, high = search.likely(held)
    share = f"{100 * held.attained / max(held.judged, 1):.1f} % of {held.judged:,} streams did, [{100 * low:.1f}, {100 * high:.1f}] %"
    least = f"{load(answer.low, asked.over)} clearly held" if answer.low is not None else "no load clearly held"
    most = f"{load(answer.high, asked.over)} clearly missed" if answer.high is not None else "none clearly missed"
    return f"{load(answer.load, asked.over)} held {slo_words(slo)} ({share}); {least}, {most}; {reason}."


# -------------------------------------------------------------------------------------------------------------- the headline


def headline(spec: Spec, stages: Sequence[Stage], found: Sequence[Search], interrupted: str) -> Headline:
    """The answer: the largest N that held the SLO, and the stage that made the most tokens."""
    counted = [stage for stage in stages if stage.verdict.level != "void" and stage.throughput is not None]
    best = max(counted, key=_tokens_per_s, default=None)
    searched, rated = _searched(stages, found, "copies"), _searched(stages, found, "rate_per_s")
    n_slo = searched[1] if searched else _largest(stages)
    held = n_slo or (rated[1] if rated else None)
    shown = held or best
    sentence = _answer(shown, spec) if shown else _no_answer(stages)
    return Headline(
        n_slo=n_slo.copies.asked if n_slo else None,
        n_slo_stage=held.index if held else None,
        n_slo_level=held.level if held else 0,
        rate_slo_per_s=rated[0].answer if rated else None,
        n_slo_sentence=searched[0].sentence if searched else _n_slo_sentence(spec.slo, n_slo, stages, found),
        best_stage=best.index if best else None,
        best_level=best.level if best else 0,
        sentence=f"{sentence} {interrupted}".strip(),
    )


def _searched(stages: Sequence[Stage], found: Sequence[Search], over: str) -> tuple[Search, Stage] | None:
    """The search with the largest answer, and the level that shows it: one that is valid, else there is no answer."""
    answered = []
    for one in found:
        levels = [s for s in stages if s.index == one.stage and s.load == one.answer and s.verdict.level == "valid"]
        if one.over == over and one.answer is not None and levels:
            answered.append((one, max(levels, key=lambda stage: (stage.copies.slo_judged, stage.level))))
    return max(answered, key=lambda pair: pair[0].answer or 0, default=None)


def _largest(stages: Sequence[Stage]) -> Stage | None:
    """The largest closed stage that is valid and held the SLO."""
    holding = [stage for stage in stages if stage.verdict.level == "valid" and stage.copies.slo_held and stage.copies.asked]
    return max(holding, key=_asked, default=None)


def _asked(stage: Stage) -> int:
    return stage.copies.asked or 0


def _tokens_per_s(stage: Stage) -> float:
    return stage.throughput.output_tokens_per_s.value if stage.throughput else 0.0


def slo_words(slo: Slo) -> str:
    """The SLO in words."""
    return f"{slo.tokens_per_s_per_copy:g} tokens/s each and TTFT <= {slo.ttft_s:g} s for {100 * slo.quantile:g} % of the streams"


def _n_slo_sentence(slo: Slo, held: Stage | None, stages: Sequence[Stage], found: Sequence[Search]) -> str:
    """What N_SLO is, or why there is none; where a smaller load missed the SLO, it says so."""
    rates = " ".join(_besides(one, stages) for one in found)
    if held is None and rates:
        return rates
    if held is None:
        return f"No stage held the SLO: {slo_words(slo)}. {_closest(stages)}".strip()
    judged = [stage for stage in stages if stage.verdict.level == "valid" and stage.copies.slo_held is False and stage.copies.asked]
    missed = [_asked(stage) for stage in judged if _asked(stage) < _asked(held)]
    aside = f" A smaller load, {min(missed)}, missed it." if missed else ""
    larger = any(_asked(stage) > _asked(held) for stage in judged)
    bound = "" if larger else " No larger load was shown to miss it, so the true N may be larger."
    copies = "copy" if held.copies.asked == 1 else "copies at once"
    attained = f"{100 * (held.copies.slo_attainment or 0):.1f} % did"
    return f"{held.copies.asked} {copies} held {slo_words(slo)} ({attained}).{aside}{bound} {rates}".strip()


def _besides(found: Search, stages: Sequence[Stage]) -> str:
    """What a search says that is not N_SLO: a rate, that nothing held, or a load that no valid level vouches for."""
    if found.answer is None or (found.over == "rate_per_s" and _searched(stages, [found], found.over)):
        return found.sentence
    return f"The search of stage {found.stage} came to {load(found.answer, found.over)}, but no level of that load is valid."


def _closest(stages: Sequence[Stage]) -> str:
    """How far from it the run was."""
    judged = [stage for stage in stages if stage.verdict.level == "valid" and stage.copies.slo_attainment is not None]
    if not judged:
        levels = [stage.verdict.level for stage in stages]
        counts = f"{levels.count('void')} void, {levels.count('latency_withheld')} with latency withheld"
        return f"None of {len(stages)} could be judged: {counts}, {levels.count('valid')} valid but without a stream inside the window."
    best = max(judged, key=lambda stage: stage.copies.slo_attainment or 0.0)
    share = f"{100 * (best.copies.slo_attainment or 0):.1f} %"
    if best.copies.slo_held:
        return f"{best.title} did, {share} of its streams; how many copies at once is asked by closed stages."
    where = f"{best.copies.asked} at once" if best.copies.asked else best.title
    return f"The closest, {where}, held it for {share}."


def _answer(stage: Stage, spec: Spec) -> str:
    """One sentence a person can repeat."""
    throughput, priced = stage.throughput, stage.cost
    assert throughput is not None  # noqa: S101  # only stages with a window are shown
    count = round(stage.copies.n_run_client or 0) if stage.copies.asked is None else stage.copies.asked
    ran = "1 copy" if count == 1 else f"{count:,} copies"
    when = " on average" if stage.copies.asked is None else ""
    parts = [f"{ran} of {spec.model.id} ran at once{when} on this hardware: {throughput.output_tokens_per_s.value:,.0f} tokens/s"]
    if throughput.pages_per_hour is not None:
        rests = " (assumed words per token)" if throughput.words_source == "assumed" else ""
        parts.append(f"{throughput.pages_per_hour:,.0f} pages of {spec.page.words} words an hour{rests}")
    if priced and priced.usd_per_page:
        parts.append(f"${priced.usd_per_page.mid:.2g} a page")
    if priced and priced.wh_per_page:
        parts.append(f"{priced.wh_per_page.mid:.2g} Wh a page{' (assumed)' if priced.energy_source == 'assumed' else ''}")
    return ", ".join(parts) + "."


def _no_answer(stages: Sequence[Stage]) -> str:
    if not stages:
        return "No answer: no stage began."
    reasons = sorted({reason.code for stage in stages for reason in stage.verdict.reasons})
    return f"No answer: no stage is valid ({', '.join(reasons)})."
