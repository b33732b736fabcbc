"""n samples of one prompt: what they cost beside separate requests, how long they take, and how often one of them passes.

Every level has as many sequences in flight, so the engine's batch is as large at every n, and what differs is the shared prompt alone: that it
is sent, tokenized and (where the engine can) read once. The cost of n samples is set beside separate requests with prompts of their
own, which share nothing, and beside separate requests of the same prompt, which share what the engine's prefix cache finds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

import numpy as np
from scipy.special import betaincinv

from kilocopy import price, repeats
from kilocopy.played import Beside, Played, notes_of
from kilocopy.ratios import Reading
from kilocopy.repeats import Spread
from kilocopy.spec import BestOfNExperiment, Spec
from kilocopy.summary import Arm, Band, BestOfNFinding, Estimate, PassAt, Saving, Verified

RESAMPLINGS = 2000
How = Literal["one_request", "same_prompt", "own_prompts"]
BESIDE: dict[str, str] = {"own_prompts": "requests with prompts of their own", "same_prompt": "requests of the same prompt"}


def find(spec: Spec, played: Sequence[Played], beside: Beside) -> BestOfNFinding:
    """The section of the report."""
    asked = spec.experiment
    assert isinstance(asked, BestOfNExperiment)  # noqa: S101
    groups: dict[tuple[int, How], list[Played]] = {}
    for one in played:
        if one.counts:
            groups.setdefault(_kind(one), []).append(one)
    groups = dict(sorted(groups.items(), key=lambda item: (item[0][0], item[0][1])))
    spread = repeats.pooled([[one.seconds(1) for one in group] for group in groups.values()])
    arms = [_arm(n, how, group, spread) for (n, how), group in groups.items()]
    savings = _savings(groups, spread)
    verified = _verified(asked, beside.verdicts, arms, spread) if asked.verifier is not None else None
    expected = asked.repeats * (len(asked.levels) + (len(asked.levels) - 1 if asked.same_prompt_apart else 0))
    notes = notes_of(played, expected)
    if spread.basis == "within_run":
        notes.append("Intervals are from inside the runs: what moves from one start of the driver to the next is not in them; more repeats would show it.")
    if spread.basis == "none" and arms:
        notes.append("No intervals: the levels are too short for one of their own, and do not repeat.")
    if asked.verifier is not None and verified is None:
        notes.append("No sample was verified yet.")
    return BestOfNFinding(
        sentence=_sentence(arms, savings, verified, asked.sequences),
        notes=[*notes, *_verifier_notes(verified)],
        sequences=asked.sequences,
        basis=spread.basis,
        arms=arms,
        savings=savings,
        verified=verified,
    )


def _kind(one: Played) -> tuple[int, How]:
    work = one.spec.workload
    if work.copies_per_prompt > 1:
        return work.copies_per_prompt, "same_prompt"
    return work.samples, "one_request" if work.samples > 1 else "own_prompts"


def _arm(n: int, how: How, group: Sequence[Played], spread: Spread) -> Arm:
    per_sample = [one.tokens_per_request / one.spec.workload.samples for one in group]
    rate = repeats.mean(_seconds(group), spread)
    costs = [one.stage.cost for one in group]
    source = {cost.energy_source if cost else "not_measured" for cost in costs}
    return Arm(
        samples=n,
        how=how,
        requests_in_flight=group[0].stage.copies.asked or 0,
        repeats=len(group),
        samples_per_s=_inverse(rate),
        usd_per_sample=mean_band([cost.usd_per_m_output_tokens if cost else None for cost in costs], [tokens / 1e6 for tokens in per_sample]),
        j_per_sample=mean_band([cost.j_per_output_token if cost else None for cost in costs], per_sample),
        energy_source=source.pop() if len(source) == 1 else "not_measured",
        ttft_p50_s=_latency(group, "ttft_s"),
        e2e_p50_s=_latency(group, "e2e_s"),
        prefix_hit_fraction=mean_known([one.prefix_hits for one in group]),
    )


def _inverse(value: Estimate) -> Estimate:
    low, high = (None if end is None else 1 / end for end in (value.high, value.low))
    return Estimate(value=1 / value.value, low=low, high=high)


def mean_band(bands: Sequence[Band | None], factors: Sequence[float]) -> Band | None:
    """The mean of bands, each times its factor; None where one is missing."""
    known = [price.scaled(band, factor) for band, factor in zip(bands, factors, strict=True) if band is not None]
    if not known or len(known) < len(bands):
        return None
    return price.banded(lambda corner: fmean(price.corner_of(band, corner) for band in known))


def mean_known(values: Sequence[float | None]) -> float | None:
    """The mean, where every value is known."""
    return fmean(value for value in values if value is not None) if values and None not in values else None


def _latency(group: Sequence[Played], name: str) -> float | None:
    found = [getattr(one.stage.latency, name) if one.stage.latency else None for one in group]
    return mean_known([None if one is None else one.p50 for one in found])


def _savings(groups: Mapping[tuple[int, How], Sequence[Played]], spread: Spread) -> list[Saving]:
    """Seconds of hardware for a sample, one request over separate ones."""
    found = []
    for (n, how), group in groups.items():
        if how != "one_request":
            continue
        beside: dict[Literal["own_prompts", "same_prompt"], Sequence[Played]] = {
            "own_prompts": groups.get((1, "own_prompts"), ()),
            "same_prompt": groups.get((n, "same_prompt"), ()),
        }
        for name, other in beside.items():
            if other:
                found.append(Saving(samples=n, beside=name, cost_ratio=repeats.ratio(_seconds(group), _seconds(other), spread)))
    return found


def _seconds(group: Sequence[Played]) -> list[Reading]:
    """Seconds of the hardware for a sample, in each repeat."""
    return [one.seconds(one.tokens_per_request / one.spec.workload.samples) for one in group]


# ----------------------------------------------------------------------------------------------------------------------- pass@k


def pass_at(k: int, samples: int, passed: int) -> float:
    """The unbiased estimate of the chance that one of k samples passes, 1 - C(n - c, k) / C(n, k), of n samples of which c passed.

    Source: M. Chen et al., Evaluating Large Language Models Trained on Code, 2021, section 2.1.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {passed} passed")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def mean_share(values: Sequence[float]) -> Estimate:
    """The mean of shares of independent prompts with its 95 % interval: Clopper and Pearson's with the effective number of prompts.

    The effective number is p (1 - p) over the mean's squared standard error, at least the prompts' own number; so graded shares count for more
    than ones and noughts, and all alike is no certainty. Source: E. L. Korn and B. I. Graubard, Survey Methodology 24, 1998.
    """
    shares = np.asarray(values, dtype=np.float64)
    p, count = float(shares.mean()), float(len(shares))
    if len(shares) > 1 and 0 < p < 1 and (squared := float(shares.var(ddof=1)) / count) > 0:
        count = max(count, p * (1 - p) / squared)
    hits = p * count
    low = float(betaincinv(hits, count - hits + 1, 0.025)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, count - hits, 0.975)) if hits < count else 1.0
    return Estimate(value=p, low=low, high=high)


def _verified(asked: BestOfNExperiment, verdicts: Sequence[Mapping[str, Any]], arms: Sequence[Arm], spread: Spread) -> Verified | None:
    """Prompts that were asked several times (a data set that begins again) have all their samples together."""
    if not verdicts:
        return None
    tasks: dict[str, list[str]] = {}
    for row in verdicts:
        tasks.setdefault(row["task"], []).append(row["verdict"])
    judged = {task: said for task, said in tasks.items() if "verifier_failed" not in said}
    counts = [(len(said), said.count("passed")) for said in judged.values()]
    said = Counter(row["verdict"] for row in verdicts)
    failures = Counter(_failure(row) for row in verdicts if row["verdict"] == "verifier_failed")
    prices = {arm.samples: arm.usd_per_sample for arm in arms if arm.how != "same_prompt"}
    most = min([max(asked.levels), *(samples for samples, _ in counts)])
    return Verified(
        prompts=len(judged),
        prompts_left_out=len(tasks) - len(judged),
        samples=len(verdicts),
        passed=said["passed"],
        not_passed=said["not_passed"] + said["timeout"],
        timeouts=said["timeout"],
        failures=said["verifier_failed"],
        failure=failures.most_common(1)[0][0] if failures else None,
        pass_at=[_pass_at(k, counts, prices.get(k)) for k in range(1, most + 1)] if counts else [],
        cheapest=_cheapest([arm for arm in arms if arm.how != "same_prompt" and arm.samples <= most], counts, spread),
    )


def _cheapest(arms: Sequence[Arm], counts: Sequence[tuple[int, int]], spread: Spread) -> list[int]:
    """Every n at which a solved prompt may be cheapest, the likeliest first: those that are in 2.5 % of resamplings or more; none where costs have no error.

    A resampling draws prompts with replacement, so pass@n moves at all n together, and each level's cost by its own error. The price is the
    same at every n and drops out.
    """
    known = [arm for arm in arms if arm.usd_per_sample is not None]
    if len(known) < 2 or spread.basis == "none" or not any(passed for _, passed in counts):
        return []  # without an error of the costs nothing says which n is cheaper
    draw = np.random.default_rng(0)
    passes = np.array([[pass_at(arm.samples, samples, passed) for arm in known] for samples, passed in counts])
    solved = np.array([passes[draw.integers(0, len(passes), len(passes))].mean(axis=0) for _ in range(RESAMPLINGS)])
    errors = [math.log(rate.high / rate.low) / 2 / spread.t if rate.low and rate.high else 0.0 for rate in (arm.samples_per_s for arm in known)]
    strays = draw.standard_t(max(spread.freedom, 1), (RESAMPLINGS, len(known))) * np.array(errors)
    costs = np.array([arm.samples * arm.usd_per_sample.mid for arm in known if arm.usd_per_sample]) * np.exp(strays)
    some = solved.max(axis=1) > 0
    with np.errstate(divide="ignore"):
        best = Counter(np.argmin(costs[some] / solved[some], axis=1).tolist())
    return [known[i].samples for i, times in best.most_common() if times >= 0.025 * RESAMPLINGS]


def _pass_at(k: int, counts: Sequence[tuple[int, int]], usd: Band | None) -> PassAt:
    value = mean_share([pass_at(k, samples, passed) for samples, passed in counts])
    return PassAt(k=k, value=value, usd_per_solved=price.scaled(usd, k / value.value) if usd and value.value else None)


def _failure(row: Mapping[str, Any]) -> str:
    code = row["exit_code"]
    how = "did not start" if code is None else f"was ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {row['said']}" if row["said"] else how


def _verifier_notes(verified: Verified | None) -> list[str]:
    if verified is None:
        return []
    notes = []
    if verified.failures:
        notes.append(
            f"The verifier itself failed on {verified.failures} of {verified.samples} samples ({verified.failure}): they count neither as passed nor as not, and "
            f"{verified.prompts_left_out} prompt{'' if verified.prompts_left_out == 1 else 's'} with such a sample are left out."
        )
    if verified.timeouts:
        notes.append(f"{verified.timeouts} samples count as not passed, since the verifier was not done with them in time.")
    return notes


# ------------------------------------------------------------------------------------------------------------------ the sentence


def told(value: Estimate, form: str = ".3g") -> str:
    """`value [low – high]`."""
    ends = "" if value.low is None or value.high is None else f" [{value.low:{form}} – {value.high:{form}}]"
    return f"{value.value:{form}}{ends}"


def _sentence(arms: Sequence[Arm], savings: Sequence[Saving], verified: Verified | None, sequences: int) -> str:
    """The answer in one sentence."""
    most = max((one.samples for one in savings), default=None)
    if most is None:
        return "No answer: no level of several samples and of separate requests that count stand beside each other."
    parts = [f"{told(one.cost_ratio)} of what {most} {BESIDE[one.beside]} do" for one in savings if one.samples == most]
    said = [f"{most} samples of one request cost {', and '.join(parts)}, at {sequences:,} sequences in flight"]
    unsure = [one for one in savings if one.samples == most and one.cost_ratio.low is not None and one.cost_ratio.high is not None and one.cost_ratio.low <= 1 <= one.cost_ratio.high]
    if unsure:
        said[0] += f" (no difference shown from {', '.join(BESIDE[one.beside] for one in unsure)})"
    ends = {arm.samples: arm.e2e_p50_s for arm in arms if arm.how != "same_prompt"}
    if ends.get(1) and ends.get(most):
        said.append(f"their last one is there after {ends[most]:.3g} s (p50), a single one after {ends[1]:.3g} s")
    if verified is not None and verified.pass_at:
        first, last = verified.pass_at[0], verified.pass_at[-1]
        said.append(f"pass@{last.k} is {told(last.value)} where pass@1 is {told(first.value)} ({verified.prompts:,} prompts)")
    if verified is not None and verified.cheapest:
        likely, *others = verified.cheapest
        may = f" (not told apart from {' or '.join(map(str, sorted(others)))})" if others else ""
        said.append(f"a solved prompt is cheapest with {likely} sample{'' if likely == 1 else 's'} of those played{may}")
    return "; ".join(said) + "."
