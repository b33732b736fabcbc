"""summary.json: what a run says, as frozen models with a versioned schema. `measure` and `price` fill it, `report` shows it.

Figures that do not exist are null, never zero. Times are seconds since the run's first event. Fractions are 0..1.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1


class Frozen(BaseModel):
    """A frozen part of the summary."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(Frozen):
    """A value with its 95 % interval by batch means inside the window; low and high are null where it is too short for one."""

    value: float
    low: float | None = None
    high: float | None = None


class Percentiles(Frozen):
    """Percentiles of raw values (linear interpolation), how many values, and their mean. Unit in the owner's field name."""

    p50: float
    p90: float
    p99: float
    mean: float
    n: int


class Reason(Frozen):
    """Why a verdict is what it is: a code of the design's, and a sentence with the numbers."""

    code: str
    sentence: str


class Verdict(Frozen):
    """What a stage's numbers are worth."""

    level: Literal["valid", "latency_withheld", "void"]
    reasons: list[Reason]  # empty for valid
    notes: list[Reason]  # flags that do not change the level (Little's law, a driver on the serving host, ...)


class Window(Frozen):
    """The part of a stage that counts."""

    start_s: float
    end_s: float
    duration_s: float
    rule: str  # how it was found, in words


class Check(Frozen):
    """An identity check: two ways to the same number."""

    name: str  # client_tokens_vs_server | littles_law | copies_client_vs_server
    left: float | None
    right: float | None
    deviation_fraction: float | None
    limit_fraction: float
    outcome: Literal["passed", "failed", "not_checked"]
    sentence: str


class Copies(Frozen):
    """Copies, in the ways that are never mixed."""

    asked: int | None  # null in open loop, where a rate is asked
    n_run_client: float | None  # time-mean of requests in flight at the driver, in the window
    n_run_server: float | None  # time-mean of running sequences summed over replicas
    slo_held: bool | None  # null where it cannot be judged: latency withheld, no stream inside the window, or held by a void stage
    slo_attainment: float | None  # fraction of streams that held the speed and the TTFT; null where latency is withheld
    n_human: dict[str, float]  # throughput equivalents by words per minute: "238", "150", "600"


class Throughput(Frozen):
    """What arrived in the window."""

    output_tokens: float
    prompt_tokens: float
    output_tokens_per_s: Estimate
    output_tokens_per_s_per_copy: float | None  # total over n_run_client
    output_tokens_per_s_per_device: float
    output_tokens_per_s_per_replica: float
    words_per_token: float | None  # measured on decoded text
    words_per_s: float | None
    pages: float | None
    pages_per_hour: float | None
    requests_per_s: float


class Latency(Frozen):
    """Latency of the ok requests that were sent and finished inside the stage's window, seconds."""

    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    itl_s: Percentiles | None  # inter-chunk gap / tokens per chunk; equals icl where a chunk holds one token
    icl_s: Percentiles | None  # inter-chunk latency as read
    e2e_s: Percentiles | None
    send_lag_s: Percentiles | None


class Requests(Frozen):
    """All requests of the stage, warm-up and drain included: sent = ok + errors + cancelled."""

    sent: int
    ok: int
    errors: dict[str, int]  # by outcome
    cancelled: int
    in_window_ok: int


class Band(Frozen):
    """A figure over the low/mid/high of the assumed inputs; low and high are null where no input has a band."""

    mid: float
    low: float | None = None
    high: float | None = None


class Cost(Frozen):
    """Energy and money of one stage's window. `energy_source` says what the joules are worth."""

    energy_source: Literal["measured", "assumed", "not_measured"]
    energy_boundary: str | None  # what the joules enclose: "gpu × PUE", "gpu+host × PUE"; "facility" where assumed
    facility_j: Band | None
    wh_per_page: Band | None
    j_per_output_token: Band | None
    pages_per_kwh: Band | None
    electricity_usd_per_page: Band | None
    hardware_usd_per_page: Band | None  # capital (+ opex) or rent
    usd_per_page: Band | None  # owned: hardware + electricity; rented: rent alone
    usd_per_m_output_tokens: Band | None
    pages_per_usd: Band | None
    hardware_kind: Literal["owned", "rented"]
    sentence: str  # what is in the price and what is not


class Bin(Frozen):
    """One second of the timeline."""

    t_s: float
    stage: int  # -1 between stages
    output_tokens_per_s: float
    in_flight: float | None
    server_running: float | None
    server_waiting: float | None
    errors: int


class Stage(Frozen):
    """One load level, as measured."""

    index: int
    title: str  # "closed, 32 copies"
    verdict: Verdict
    start_s: float
    end_s: float
    window: Window | None
    copies: Copies
    throughput: Throughput | None
    latency: Latency | None  # null when withheld or void without a window
    ttft_values_s: list[float]  # a bounded sample (<= 2000, evenly spaced in sorted order) for plots; empty when withheld
    icl_values_s: list[float]
    requests: Requests
    checks: list[Check]
    cost: Cost | None


class Ratio(Frozen):
    """One side of the overhang: training over running."""

    name: Literal["usd", "energy", "flop", "gpu_hours"]
    training: float | None
    training_unit: str
    running_per_page: float | None
    running_unit: str
    ratio_pages: Band | None  # pages whose running equals the training
    training_source: str
    sentence: str


class Overhang(Frozen):
    """How lopsided training is to running, at the stage named."""

    stage: int
    ratios: list[Ratio]
    n_cluster: float | None
    ratio_unit: str  # "pages of 500 words"


class Headline(Frozen):
    """The answer, or why there is none."""

    n_slo: int | None  # largest asked copies whose stage is valid and held the SLO
    n_slo_stage: int | None
    n_slo_sentence: str
    best_stage: int | None  # highest valid tokens/s
    sentence: str  # one sentence a person can repeat


class Reference(Frozen):
    """A published figure to stand beside one's own."""

    name: str
    figure: str
    conditions: str
    source: str


class Summary(Frozen):
    """summary.json."""

    schema_version: int
    kilocopy_version: str
    run: dict[str, Any]  # from the manifest: id, name, started_at, spec_sha256, model, hardware, versions, ...
    status: Literal["complete", "interrupted"]
    status_sentence: str
    page_words: int
    stages: list[Stage]
    timeline: list[Bin]
    headline: Headline
    overhang: Overhang | None
    prices: list[dict[str, Any]]  # every price used: name, value, low, high, unit, source, date
    references: list[Reference]
