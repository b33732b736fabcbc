"""Summaries as a run would leave them, made from a small model of a batching server: the reports are tested with these.

`good` is four valid stages on one GPU with its energy measured; `awkward` has a void stage, one whose latency is
withheld, and no meter; `interrupted` stopped before its first stage had a window.
"""

from __future__ import annotations

import math
import random
from typing import Any

from kilocopy.summary import (
    SCHEMA_VERSION,
    Band,
    Bin,
    Check,
    Copies,
    Cost,
    Driver,
    Estimate,
    Headline,
    Latency,
    Overhang,
    Percentiles,
    Rate,
    Ratio,
    Reason,
    Reference,
    Requests,
    Search,
    SearchLevel,
    Stage,
    Step,
    Summary,
    Throughput,
    Verdict,
    Window,
    Worker,
)

STAGE_S, WINDOW_S, WARMUP_S = 75.0, 60.0, 8.0
WORDS_PER_TOKEN, PAGE_WORDS = 0.74, 500
TOKENS_PER_PAGE = PAGE_WORDS / WORDS_PER_TOKEN
OUTPUT_TOKENS = 256  # of each request

REFERENCES = [
    Reference(
        name="GPT-3 paper, section 6.3",
        figure="4 Wh/page",
        conditions="0.4 kWh per 100 pages; boundary and page length unstated; 2020",
        source="Brown et al. 2020, arXiv:2005.14165",
    ),
    Reference(
        name="ML.ENERGY v3, Llama 3.1 8B on one H100, batch 511",
        figure="0.070 J/token",
        conditions="vLLM, GPU only, 9,806 tok/s",
        source="ML.ENERGY leaderboard v3",
    ),
    Reference(
        name="Rule of thumb, 2020",
        figure="500 pages/$",
        conditions="total = 5 × electricity",
        source="kilocopy design, section 6",
    ),
]


def run(name: str, model: str, hardware: dict[str, Any], speed: float, ttft_s: float) -> dict[str, Any]:
    """A manifest as `kilocopy run` writes it, with a spec cut down to what the reports read."""
    return {
        "schema_version": 1,
        "kilocopy_version": "0.1.0",
        "id": f"20261123T101500_{name}",
        "name": name,
        "started_at": "2026-11-23T10:15:00+00:00",
        "spec": {
            "name": name,
            "model": {"id": model, "source": model, "parameters_active": 8.03e9},
            "slo": {"tokens_per_s_per_copy": speed, "quantile": 0.9, "ttft_s": ttft_s, "error_fraction_max": 0.01},
            "page": {"words": PAGE_WORDS},
        },
        "spec_sha256": "9f2c1d7a4be05566778899aabbccddeeff00112233445566778899aabbccddee",
        "seed": 0,
        "url": "http://127.0.0.1:8000/v1",
        "driver_shares_host": True,
        "training": None,
        "versions": {"python": "3.11.9", "ray": "2.60.0", "vllm": "0.29.0", "locust": "2.43.0"},
        "git_commit": "a391873b6194cbeb00e01c27771aabd91281ed04",
        "hardware": hardware,
        "started_by": "kilocopy",
    }


H100 = {"processor": "Intel Xeon Platinum 8480+", "cores": 52, "memory_gib": 503.0, "gpus": ["NVIDIA H100 80GB HBM3"]}
CPU = {"processor": "AMD EPYC 7B13", "cores": 2, "memory_gib": 15.6, "gpus": []}


def percentiles(values: list[float]) -> Percentiles:
    """Percentiles of a list, as measured ones look."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Percentiles(p50=at(0.5), p90=at(0.9), p99=at(0.99), mean=sum(ordered) / len(ordered), n=len(ordered))


def checks(tokens: float, copies: float, *, servers: float | None = 1.0) -> list[Check]:
    """The three identity checks of a stage; `servers` is what the servers counted over what arrived, None where they were not read."""
    apart = None if servers is None else abs(servers - 1)
    told = f"{tokens:,.0f} tokens arrived"
    return [
        Check(
            name="client_tokens_vs_server",
            left=tokens,
            right=None if servers is None else tokens * servers,
            deviation_fraction=apart,
            limit_fraction=0.01,
            outcome="not_checked" if apart is None else "passed" if apart <= 0.01 else "failed",
            sentence=f"{told}; no server counter was read."
            if servers is None or apart is None
            else f"{told}, the servers counted {tokens * servers:,.0f}: {apart:.1%} apart, the limit is 1 %.",
        ),
        Check(
            name="littles_law",
            left=copies,
            right=copies * 0.988,
            deviation_fraction=0.012,
            limit_fraction=0.05,
            outcome="passed",
            sentence=f"{copies:.1f} copies in flight against {copies * 0.988:.1f} from rate times duration: 1.2 % apart, the limit is 5 %.",
        ),
        Check(
            name="copies_client_vs_server",
            left=copies,
            right=None if servers is None else copies * 0.996,
            deviation_fraction=None if servers is None else 0.004,
            limit_fraction=0.02,
            outcome="not_checked" if servers is None else "passed",
            sentence="No server gauge was read."
            if servers is None
            else f"{copies:.1f} copies in flight at the driver, {copies * 0.996:.1f} running and waiting on the servers: 0.4 % apart.",
        ),
    ]


def cost(tokens_per_s: float, power_w: float | None, usd_per_hour: float, sentence: str) -> Cost:
    """What a page costs at this speed, power and hourly price of the hardware, with a band over the electricity and capital."""
    pages_per_h = tokens_per_s * 3600 / TOKENS_PER_PAGE

    def spread(mid: float | None, low: float = 0.8, high: float = 1.25) -> Band | None:
        return None if mid is None else Band(mid=mid, low=mid * low, high=mid * high)

    wh = None if power_w is None else power_w * 1.2 / pages_per_h
    electricity = None if wh is None else wh / 1000 * 0.0861
    usd = usd_per_hour / pages_per_h + (electricity or 0)
    return Cost(
        energy_source="not_measured" if power_w is None else "measured",
        energy_boundary=None if power_w is None else "gpu+host × PUE",
        facility_j=spread(None if power_w is None else power_w * 1.2 * WINDOW_S, 0.9, 1.2),
        wh_per_page=spread(wh, 0.9, 1.2),
        j_per_output_token=spread(None if wh is None else wh * 3600 / TOKENS_PER_PAGE, 0.9, 1.2),
        pages_per_kwh=None if wh is None else Band(mid=1000 / wh),
        electricity_usd_per_page=spread(electricity),
        hardware_usd_per_page=spread(usd_per_hour / pages_per_h),
        usd_per_page=spread(usd),
        usd_per_m_output_tokens=spread(usd / TOKENS_PER_PAGE * 1e6),
        pages_per_usd=Band(mid=1 / usd, low=0.8 / usd, high=1.25 / usd),
        hardware_kind="owned" if power_w else "rented",
        sentence=sentence,
    )


def stage(
    index: int,
    copies: int,
    per_copy: float,
    power_w: float | None,
    *,
    slo_held: bool | None,
    verdict: Verdict,
    usd_per_hour: float,
    cost_sentence: str,
    servers: float | None = 1.003,
    devices: float = 1,
    errors: dict[str, int] | None = None,
) -> Stage:
    """A stage of `copies` copies at `per_copy` tokens/s each."""
    draw = random.Random(index)  # noqa: S311  # example data
    start = index * (STAGE_S + 5)
    running, total = copies * 0.994, copies * 0.994 * per_copy
    sent = max(1, round(total * (STAGE_S - 5) / OUTPUT_TOKENS))
    ttft = sorted(0.018 * (1 + copies / 24) * draw.lognormvariate(0, 0.35) for _ in range(min(400, 40 + sent)))
    icl = sorted(draw.lognormvariate(0, 0.18) / per_copy * (6 if draw.random() < 0.01 else 1) for _ in range(600))
    tpot = [draw.gauss(1, 0.04) / per_copy for _ in range(300)]
    hidden = verdict.level == "latency_withheld"
    words_per_s = total * WORDS_PER_TOKEN
    half = total * (0.02 if copies == 1 else 0.006)
    return Stage(
        index=index,
        kind="closed",
        title=f"closed, {copies} cop{'y' if copies == 1 else 'ies'}",
        verdict=verdict,
        start_s=start,
        end_s=start + STAGE_S,
        window=Window(
            start_s=start + WARMUP_S,
            end_s=start + WARMUP_S + WINDOW_S,
            duration_s=WINDOW_S,
            rule="from the moment every copy had its first token until the first copy stopped asking",
        ),
        copies=Copies(
            asked=copies,
            n_run_client=running,
            n_run_server=None if servers is None else running * 0.996,
            slo_held=slo_held,
            slo_attainment=None if slo_held is None else (0.984 if slo_held else 0.412),
            slo_judged=1000,
            slo_attained=None if slo_held is None else (984 if slo_held else 412),
            error_fraction=sum((errors or {}).values()) / sent,
            n_human={"238": words_per_s * 60 / 238, "150": words_per_s * 60 / 150, "600": words_per_s * 60 / 600},
        ),
        rate=None,
        steps=[],
        throughput=Throughput(
            output_tokens=total * WINDOW_S,
            prompt_tokens=total * WINDOW_S / OUTPUT_TOKENS * 512,
            output_tokens_per_s=Estimate(value=total, low=total - half, high=total + half),
            output_tokens_per_s_per_copy=per_copy,
            output_tokens_per_s_per_device=total / devices,
            output_tokens_per_s_per_replica=total / devices,
            words_per_token=WORDS_PER_TOKEN,
            words_per_s=words_per_s,
            pages=total * WINDOW_S / TOKENS_PER_PAGE,
            pages_per_hour=total * 3600 / TOKENS_PER_PAGE,
            requests_per_s=total / OUTPUT_TOKENS,
        ),
        latency=None
        if hidden
        else Latency(
            ttft_s=percentiles(ttft),
            ttft_from_send_s=percentiles(ttft),
            tpot_s=percentiles(tpot),
            itl_s=percentiles(icl),
            icl_s=percentiles(icl),
            e2e_s=percentiles([value * OUTPUT_TOKENS for value in tpot]),
            send_lag_s=percentiles([0.0001 * draw.random() for _ in range(200)]),
        ),
        ttft_values_s=[] if hidden else ttft,
        icl_values_s=[] if hidden else icl,
        requests=Requests(
            scheduled=sent,
            sent=sent,
            ok=sent - copies - sum((errors or {}).values()),
            errors=errors or {},
            cancelled=copies,
            dropped=0,
            in_window_ok=round(total * WINDOW_S / OUTPUT_TOKENS),
        ),
        driver=driver(total, lag_p99_s=0.031 if hidden else 0.0011),
        checks=checks(total * WINDOW_S, running, servers=servers),
        cost=cost(total, power_w, usd_per_hour, cost_sentence),
    )


def driver(events_per_s: float, *, lag_p99_s: float) -> Driver:
    """One driver process that reads so many events, at 14 us of CPU each."""
    limited, share = lag_p99_s > 0.005, min(0.99, events_per_s * 14e-6)
    worker = Worker(
        worker=0,
        loop_lag_p50_s=lag_p99_s / 10,
        loop_lag_p99_s=lag_p99_s,
        loop_lag_max_s=lag_p99_s * 2,
        loop_lag_counts=[5800, 100, 40, 20, 20, 20 if limited else 0, 0, 0, 0, 0],
        send_lag_p50_s=0.0001,
        send_lag_p99_s=0.0004,
        cpu_fraction=share,
        events_per_s=events_per_s,
        open_sockets_max=64,
        rss_bytes_max=210_000_000,
        near_zero_gap_fraction=0.002,
    )
    seen = f"1 driver process, {100 * share:.0f} % of a core at most, {events_per_s:,.0f} events/s"
    return Driver(
        workers=[worker],
        limited=limited,
        sentence=f"The driver was the limit (driver-lag): {seen}." if limited else f"The driver was not the limit: {seen}.",
        cure="Drive from another host: the serving processes take the cores when they need them." if limited else None,
        events_per_s=events_per_s,
        roofline_fraction=events_per_s / 50_000,
    )


def timeline(stages: list[Stage]) -> list[Bin]:
    """A second-by-second course of these stages: a ramp, a steady part, a drain, five idle seconds between."""
    draw, bins = random.Random(7), []  # noqa: S311  # example data
    for one in stages:
        total = one.throughput.output_tokens_per_s.value if one.throughput else 0.0
        copies = one.copies.asked or round(one.copies.n_run_client or 0)
        for second in range(int(STAGE_S) + 5):
            level = min(1.0, second / 3) if second < 70 else max(0.0, 1 - (second - 70) / 4)
            bins.append(
                Bin(
                    t_s=one.start_s + second,
                    stage=one.index if second < STAGE_S else -1,
                    output_tokens_per_s=total * level * draw.gauss(1, 0.03),
                    in_flight=math.ceil(copies * level),
                    server_running=None if one.copies.n_run_server is None else copies * level * 0.99,
                    server_waiting=None if one.copies.n_run_server is None else (2.0 if copies > 40 and second < 3 else 0.0),
                    errors=1 if one.requests.errors and second % 25 == 20 else 0,
                )
            )
    return bins


def good() -> Summary:
    """Four valid stages, one GPU, energy measured, training published; 64 copies are too many for the SLO."""
    host = Reason(code="driver-shares-host", sentence="The driver ran on the serving host and took part of its CPU.")
    sentence = "Capital and electricity of the one GPU and its host; networking, staff and idle hours beyond the utilisation are not in it."
    levels = [(1, 142.0, 430.0, True), (8, 131.0, 520.0, True), (32, 112.0, 610.0, True), (64, 76.0, 655.0, False)]
    stages = [
        stage(
            i,
            n,
            speed,
            watts,
            slo_held=held,
            verdict=Verdict(level="valid", reasons=[], notes=[host] if i == 0 else []),
            usd_per_hour=1.37,
            cost_sentence=sentence,
        )
        for i, (n, speed, watts, held) in enumerate(levels)
    ]
    return Summary(
        schema_version=SCHEMA_VERSION,
        kilocopy_version="0.1.0",
        run=run("llama8b", "meta-llama/Llama-3.1-8B", H100, 80.0, 0.5),
        status="complete",
        status_sentence="All 4 stages ran to their end.",
        page_words=PAGE_WORDS,
        stages=stages,
        searches=[],
        timeline=timeline(stages),
        headline=Headline(
            n_slo=32,
            n_slo_stage=2,
            best_stage=3,
            n_slo_sentence="32 is the largest load at which 90 % of the streams held 80 tokens/s and a TTFT under 0.5 s; 64 did not.",
            sentence="One H100 ran 32 copies of Llama-3.1-8B at 112 tokens/s each: 19,000 pages an hour for $0.0755 per 1,000 pages.",
        ),
        overhang=overhang(stages[2]),
        prices=prices(),
        references=REFERENCES,
    )


def overhang(at: Stage) -> Overhang:
    """Llama 3.1 8B's training over this stage's pages."""
    assert at.cost is not None
    assert at.cost.usd_per_page is not None
    assert at.cost.wh_per_page is not None
    assert at.throughput is not None
    assert at.throughput.pages_per_hour is not None
    usd, wh, pages_per_h = 1.46e6 * 2.0, at.cost.wh_per_page.mid, at.throughput.pages_per_hour
    source = "Llama 3.1 model card, 2024-07-23"
    pages = [usd / at.cost.usd_per_page.mid, 7.2e23 / (2 * 8.03e9 * TOKENS_PER_PAGE), 1.46e6 * pages_per_h]
    return Overhang(
        stage=at.index,
        n_cluster=512_000.0,
        ratio_unit=f"pages of {PAGE_WORDS} words",
        ratios=[
            Ratio(
                name="usd",
                training=usd,
                training_unit="$",
                running_per_page=at.cost.usd_per_page.mid,
                running_unit="$/page",
                ratio_pages=Band(mid=pages[0], low=pages[0] / 1.25, high=pages[0] / 0.8),
                training_source=f"{source}; $2.00 per GPU-hour assumed",
                sentence="Training cost as much as running 39 billion pages.",
            ),
            Ratio(
                name="energy",
                training=None,
                training_unit="Wh",
                running_per_page=wh,
                running_unit="Wh/page",
                ratio_pages=None,
                training_source=source,
                sentence="The training's energy is not published, so this ratio is not printed.",
            ),
            Ratio(
                name="flop",
                training=7.2e23,
                training_unit="FLOP",
                running_per_page=2 * 8.03e9 * TOKENS_PER_PAGE,
                running_unit="FLOP/page",
                ratio_pages=Band(mid=pages[1]),
                training_source=source,
                sentence="6 × 8.03 billion parameters × 15 trillion tokens, over 2 × 8.03 billion for each token of a page.",
            ),
            Ratio(
                name="gpu_hours",
                training=1.46e6,
                training_unit="GPU-h",
                running_per_page=1 / pages_per_h,
                running_unit="GPU-h/page",
                ratio_pages=Band(mid=pages[2]),
                training_source=source,
                sentence="Free of prices: 1.46 million GPU-hours times the pages of one GPU-hour.",
            ),
        ],
    )


def prices() -> list[dict[str, Any]]:
    """Prices with source and date."""
    return [
        {
            "name": "GPU and its share of the host",
            "value": 36000.0,
            "low": 30000.0,
            "high": 45000.0,
            "unit": "$/device",
            "source": "assumed: list prices of 2025",
            "date": "2025-11-01",
        },
        {
            "name": "Electricity",
            "value": 0.0861,
            "low": None,
            "high": None,
            "unit": "$/kWh",
            "source": "EIA, US industrial mean 2025",
            "date": "2026-02-24",
        },
        {
            "name": "PUE",
            "value": 1.2,
            "low": 1.09,
            "high": 1.54,
            "unit": "facility/IT",
            "source": "assumed: between best and industry mean",
            "date": "2025-12-01",
        },
    ]


def awkward() -> Summary:
    """On CPUs: a valid stage, one with its latency withheld, a void one; nobody metered the energy, and the hardware is rented."""
    sentence = "Rent alone: electricity is in the rent. Idle paid hours are in it at a utilisation of 60 %."
    lag = Reason(
        code="driver-loop-lag",
        sentence="The driver's loop woke up to 31.0 ms late (p99); the bound is 5.00 ms, so its clock is not trusted for latency.",
    )
    apart = Reason(
        code="counters-disagree",
        sentence="The driver saw 4.2 % fewer tokens than the servers say they made; the limit is 1 %.",
    )
    noisy = Reason(code="too-many-errors", sentence="37 of 452 requests failed (8.19 %); the limit is 1 %.")
    note = Reason(code="littles-law", sentence="Copies in flight and rate times duration are 6.1 % apart; the limit is 5 %.")
    stages = [
        stage(
            0,
            4,
            52.0,
            None,
            slo_held=True,
            verdict=Verdict(level="valid", reasons=[], notes=[]),
            usd_per_hour=0.21,
            cost_sentence=sentence,
            servers=None,
        ),
        stage(
            1,
            32,
            26.0,
            None,
            slo_held=None,
            verdict=Verdict(level="latency_withheld", reasons=[lag], notes=[]),
            usd_per_hour=0.21,
            cost_sentence=sentence,
        ),
        stage(
            2,
            128,
            13.0,
            None,
            slo_held=None,
            verdict=Verdict(level="void", reasons=[apart, noisy], notes=[note]),
            usd_per_hour=0.21,
            cost_sentence=sentence,
            servers=1.042,
            errors={"timeout_stall": 21, "http_5xx": 16},
        ),
    ]
    return Summary(
        schema_version=SCHEMA_VERSION,
        kilocopy_version="0.1.0",
        run=run("tiny-cpu", "tiny-llama-4m", CPU, 20.0, 2.0),
        status="complete",
        status_sentence="All 3 stages ran to their end.",
        page_words=PAGE_WORDS,
        stages=stages,
        searches=[],
        timeline=timeline(stages),
        headline=Headline(
            n_slo=4,
            n_slo_stage=0,
            best_stage=1,
            n_slo_sentence="4 copies held the SLO. At 32 the latency is withheld, so nobody can say whether it held; 128 is void.",
            sentence="Two CPU cores ran 4 copies of tiny-llama-4m at 52 tokens/s each: 1,100 pages an hour, rent of $0.191 per 1,000.",
        ),
        overhang=None,
        prices=[
            {
                "name": "Host",
                "value": 0.126,
                "low": None,
                "high": None,
                "unit": "$/device-hour",
                "source": "cloud price list",
                "date": "2026-01-15",
            }
        ],
        references=REFERENCES,
    )


def interrupted() -> Summary:
    """A run that was killed before its first stage had a window."""
    return Summary(
        schema_version=SCHEMA_VERSION,
        kilocopy_version="0.1.0",
        run=run("cut", "meta-llama/Llama-3.1-8B", H100, 80.0, 0.5),
        status="interrupted",
        status_sentence="The driver stopped 3.2 s after the start, before stage 0 had a window.",
        page_words=PAGE_WORDS,
        stages=[],
        searches=[],
        timeline=[],
        headline=Headline(
            n_slo=None,
            n_slo_stage=None,
            best_stage=None,
            n_slo_sentence="No stage was measured, so N_SLO is unknown.",
            sentence="No answer: the run was interrupted before anything was measured.",
        ),
        overhang=None,
        prices=[],
        references=REFERENCES,
    )


def searched() -> Summary:
    """An open-loop stage, one of steps with drops, and a search over copies whose last load the driver could not hold."""
    valid = Verdict(level="valid", reasons=[], notes=[])
    full = Reason(code="sends-dropped", sentence="12 of 300 arrivals (4.0 %) were never sent: max_in_flight (64) was reached.")
    design = Reason(code="not-steady-by-design", sentence="A steps stage changes its load all the time: no steady state is claimed.")
    cpu = Reason(code="driver-cpu", sentence="The driver used 99 % of a core (limit 95 %), so chunks waited to be read.")
    host = {"usd_per_hour": 1.37, "cost_sentence": "Capital and electricity of the one GPU and its host."}
    timed = stage(0, 24, 118.0, 560.0, slo_held=True, verdict=valid, **host).model_copy(
        update={"kind": "poisson", "title": "poisson, 4 requests/s", "rate": Rate(asked_per_s=4, planned_per_s=4.1, sent_per_s=4.1, ended_per_s=4.0)}
    )
    stepped = stage(1, 30, 110.0, 560.0, slo_held=None, verdict=Verdict(level="void", reasons=[full], notes=[design]), **host)
    ttft = percentiles([0.02, 0.03, 0.04, 0.11])
    rows = [
        Step(
            rate_asked_per_s=rate, start_s=90 + 20 * i, end_s=110 + 20 * i, arrivals=20 * rate, dropped=6 * i, errors=0,
            output_tokens_per_s=500.0 * rate, in_flight=5.5 * rate, ttft_s=ttft,
        )
        for i, rate in enumerate((2, 4, 8))
    ]  # fmt: skip
    requests = stepped.requests.model_copy(update={"scheduled": stepped.requests.sent + 18, "dropped": 18})
    stepped = stepped.model_copy(
        update={
            "kind": "steps", "title": "steps, 3 rates to 8 requests/s", "steps": rows, "requests": requests,
            "rate": Rate(asked_per_s=14 / 3, planned_per_s=4.7, sent_per_s=4.4, ended_per_s=4.4),
        }
    )  # fmt: skip
    timed, stepped = (one.model_copy(update={"copies": one.copies.model_copy(update={"asked": None})}) for one in (timed, stepped))
    tried = [(16, 125.0, True), (32, 112.0, True), (64, 76.0, False), (48, 88.0, True), (56, 81.0, None)]
    levels = []
    for level, (load, speed, held) in enumerate(tried):
        verdict = valid if held is not None else Verdict(level="latency_withheld", reasons=[cpu], notes=[])
        one = stage(2 + level, load, speed, 600.0, slo_held=held, verdict=verdict, **host)
        levels.append(one.model_copy(update={"index": 2, "level": level, "load": float(load), "title": f"search level {level + 1}: {load} copies"}))
    said = {True: "held", False: "missed", None: "unsound"}
    search = Search(
        stage=2,
        over="copies",
        answer=48,
        low=48,
        high=64,
        reason="unsound",
        sentence="48 copies held the SLO (98.4 % of 1,000 streams did, [97.4, 99.0] %); 48 clearly held, 64 clearly missed; "
        "the driver, and not the server, was the limit at the next load.",
        levels=[
            SearchLevel(
                level=level, load=load, judged=1000 if held is not None else 0, attained=one.copies.slo_attained,
                attainment=one.copies.slo_attainment, wilson_low=None if held is None else 0.974 if held else 0.382,
                wilson_high=None if held is None else 0.990 if held else 0.443, error_fraction=0.0, verdict=said[held],  # type: ignore[arg-type]
                output_tokens_per_s=load * speed, output_tokens_per_s_per_copy=speed, in_flight=load, stage_verdict=one.verdict.level,
            )
            for level, ((load, speed, held), one) in enumerate(zip(tried, levels, strict=True))
        ],
    )  # fmt: skip
    stages = [timed, stepped, *levels]
    tree = run("searched", "meta-llama/Llama-3.1-8B", H100, 80.0, 0.5)
    tree["driver_roofline"] = {
        "events_per_s": 48_000, "cpu_us_per_event": 14.6, "streams_at_50_per_s": 960, "cores": 52, "fd_limit": 65_536, "ephemeral_ports": 28_232,
    }  # fmt: skip
    return good().model_copy(
        update={
            "run": tree,
            "status_sentence": "Complete: 3 of 3 stages ran to the end.",
            "stages": stages,
            "searches": [search],
            "timeline": timeline(stages),
            "overhang": None,
            "headline": Headline(
                n_slo=48,
                n_slo_stage=2,
                n_slo_level=3,
                best_stage=2,
                best_level=2,
                n_slo_sentence=search.sentence,
                sentence="48 copies of Llama-3.1-8B ran at once on this hardware: 4,199 tokens/s.",
            ),
        }
    )


ALL = {"searched": searched, "good": good, "awkward": awkward, "interrupted": interrupted}
