"""summary.json: what a run says, as frozen models with a versioned schema. `measure` and `price` fill it, `report` shows it.

Figures that do not exist are null, never zero. Times are seconds since the run's first event. Fractions are 0..1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 2


class Frozen(BaseModel):
    """A frozen part of the summary."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(Frozen):
    """A value with its 95 % interval by batch means inside the window; low and high are null where it is too short for one."""

    value: float
    low: float | None = None
    high: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        return {"value": given} if isinstance(given, int | float) else given  # summaries before 2026-11-26 have some figures without interval


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
    slo_judged: int  # ok streams that were sent in the window (open loop: planned in it)
    slo_attained: int | None  # how many of them held the speed and the TTFT; null where latency is withheld
    slo_independent: float = 1.0  # the part of those judged that counts as independent: streams of one moment are alike
    error_fraction: float | None  # errors over requests that were open in the window; open loop: and dropped arrivals over those planned
    n_human: dict[str, float]  # throughput equivalents by words per minute: "238", "150", "600"


class Rate(Frozen):
    """Requests per second in the window of an open loop: asked of the driver, planned by it, sent, ended."""

    asked_per_s: float | None  # mean; null for a trace, which has its own
    planned_per_s: float
    sent_per_s: float
    ended_per_s: float


class Step(Frozen):
    """One rate of a `steps` stage."""

    rate_asked_per_s: float
    start_s: float
    end_s: float
    arrivals: int
    dropped: int
    errors: int
    output_tokens_per_s: float
    in_flight: float
    ttft_s: Percentiles | None  # of the ok requests that were planned in the step, from their planned time; null where withheld


class Throughput(Frozen):
    """What arrived in the window."""

    output_tokens: float
    prompt_tokens: float
    output_tokens_per_s: Estimate
    output_tokens_per_s_per_copy: float | None  # total over n_run_client
    output_tokens_per_s_per_device: float
    output_tokens_per_s_per_replica: float
    words_per_token: float | None  # what pages are made of: counted on decoded text, or assumed
    words_per_token_counted: float | None = None  # counted on decoded text, also where pages rest on an assumption
    words_source: Literal["counted", "assumed"] = "counted"
    words_per_s: float | None
    pages: float | None
    pages_per_hour: float | None
    requests_per_s: float


class Latency(Frozen):
    """Latency of the ok requests that were sent and finished inside the stage's window, seconds."""

    ttft_s: Percentiles | None  # closed loop: from the send; open loop: from the planned time, so that a late send is in it
    ttft_from_send_s: Percentiles | None
    tpot_s: Percentiles | None
    itl_s: Percentiles | None  # inter-chunk gap / tokens per chunk; equals icl where a chunk holds one token
    icl_s: Percentiles | None  # inter-chunk latency as read
    e2e_s: Percentiles | None  # from where ttft_s counts
    send_lag_s: Percentiles | None


class Requests(Frozen):
    """All requests of the stage, warm-up and drain included: scheduled = sent + dropped, sent = ok + errors + cancelled.

    The second is checked where the stage was not cut off: nothing may vanish.
    """

    scheduled: int
    sent: int  # handed to a stream, whether or not a byte of it left (refused connections are among the errors)
    ok: int
    errors: dict[str, int]  # by outcome
    cancelled: int
    dropped: int  # arrivals of an open loop for which no stream was free
    in_window_ok: int

    @model_validator(mode="after")
    def _adds_up(self) -> Requests:
        ended = self.ok + sum(self.errors.values()) + self.cancelled
        if self.sent != ended or self.scheduled != self.sent + self.dropped:
            parts = f"scheduled {self.scheduled}, sent {self.sent}, ended {ended}, dropped {self.dropped}"
            raise ValueError(f"requests do not add up: {parts}")
        return self


class Worker(Frozen):
    """One driver process in the window of a stage; null where it was not recorded."""

    worker: int
    loop_lag_p50_s: float | None
    loop_lag_p99_s: float | None
    loop_lag_max_s: float | None
    loop_lag_counts: list[int]  # probes up to 1, 2, 5, 10, 20, 50, 100, 200, 500 ms, and beyond
    send_lag_p50_s: float | None
    send_lag_p99_s: float | None
    cpu_fraction: float | None  # of one core
    events_per_s: float | None  # chunks read
    open_sockets_max: int | None
    rss_bytes_max: int | None
    near_zero_gap_fraction: float | None


class Driver(Frozen):
    """The driver's own verdict: whether it, and not the servers, decided what was seen."""

    workers: list[Worker]
    limited: bool
    sentence: str
    cure: str | None  # what would do; null where it was not the limit
    events_per_s: float | None  # all workers together
    roofline_fraction: float | None  # of what this machine's driver processes were measured to read before the run


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
    wh_per_page_measured: Estimate | None = None  # the middle with its measurement interval (paired block bootstrap); null under 30 s
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
    level: int = 0
    output_tokens_per_s: float  # of streams that ended well
    broken_tokens_per_s: float = 0.0  # of streams that broke later: they arrived, and count nowhere else
    in_flight: float | None
    server_running: float | None
    server_waiting: float | None
    errors: int


class NodeShare(Frozen):
    """What one node did in a stage's window, by the servers' own counters; GPU figures are null where it has none."""

    node: str  # its address
    replicas: int  # seen there in the window; one that was replaced counts beside its successor
    gpus: float | None
    copies: float  # running sequences, mean over the scrapes
    output_tokens_per_s: float
    output_tokens_per_s_per_gpu: float | None
    pages_per_hour: float | None  # at the stage's words per token
    pages_per_hour_per_gpu: float | None


class Balance(Frozen):
    """Copies (running and waiting) on the replicas that were there for the whole window; off: over the limit and a copy more than the mean."""

    replicas: int
    replicas_asked: int
    busiest: str
    busiest_copies: float
    least_copies: float
    mean_copies: float
    ratio: float  # of the busiest to the mean
    limit: float
    off: bool
    sentence: str


class Outage(Frozen):
    """A replica, a router or a node that died while a stage was asking. Rates are of all tokens that arrived, those of broken streams too."""

    stage: int
    level: int = 0
    what: str
    at_s: float  # the first failure, else when it was noticed
    noticed_s: float
    replicas_lost: int
    routers_lost: int = 0
    before_tokens_per_s: float | None  # median of the seconds of up to 30 s; null where the stage had run under 3 s
    lowest_tokens_per_s: float | None  # the worst second
    depth_fraction: float | None
    recovered_after_s: float | None  # until 90 % of the rate before, in the mean of 3 s; null: not while the stage asked
    replaced_after_s: float | None  # until Serve had as many replicas (where a router alone died: a router) running again; null: not while the run went on
    watched_s: float  # from the loss to the end of the stage's asking
    errors: dict[str, int]  # of the stage from the loss on, by outcome
    sentence: str


class Stage(Frozen):
    """One load level, as measured: a stage of the spec, or one of the levels that a search tried."""

    index: int
    level: int = 0  # of a search, from 0
    kind: str  # closed | constant | poisson | gamma | ramp | steps | trace: how it was played, also where a search asked for it
    load: float | None = None  # of a search's level: copies, or requests/s
    title: str  # "closed, 32 copies"; "search level 3: 64 copies"
    verdict: Verdict
    start_s: float
    end_s: float
    window: Window | None
    copies: Copies
    rate: Rate | None  # null in closed loop
    steps: list[Step]  # of a `steps` stage, else empty
    throughput: Throughput | None
    latency: Latency | None  # null when withheld or void without a window
    ttft_values_s: list[float]  # a bounded sample (<= 2000, evenly spaced in sorted order) for plots; empty when withheld
    icl_values_s: list[float]
    requests: Requests
    driver: Driver
    checks: list[Check]
    cost: Cost | None
    nodes: list[NodeShare] = []  # the busiest first; empty where no server was scraped
    balance: Balance | None = None  # null with fewer than two replicas


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
    level: int = 0
    ratios: list[Ratio]
    n_cluster: float | None
    ratio_unit: str  # "pages of 500 words"


class LifetimeCost(Frozen):
    """What a page costs over the life of a model that writes so many: training $ / pages + running $ per page."""

    pages: float
    usd_per_page: Band


class Corpus(Frozen):
    """The model against its own training, at the stage named; what is not known is null, and `missing` says what would tell it."""

    stage: int
    level: int = 0
    output_tokens_per_day_per_device: float
    devices: float
    training_tokens: float | None
    days_one_device: float | None  # to write as many tokens as it was trained on
    days_serving: float | None  # on all devices that served
    days_training_cluster: float | None  # on as many devices as trained it
    training_gpus: float | None
    copies_on_training_cluster: float | None  # copies in flight x training GPUs / serving GPUs
    training_usd: Band | None
    running_usd_per_page: Band | None
    break_even_pages: Band | None  # pages at which training and running have cost the same
    lifetime: list[LifetimeCost]  # three decades on each side of the break-even
    missing: list[str]


class SearchLevel(Frozen):
    """One load that a search tried, as the records show it."""

    level: int
    load: float
    judged: int
    attained: int | None  # null where latency is withheld
    attainment: float | None
    wilson_low: float | None  # of as many streams as count as independent
    wilson_high: float | None
    error_fraction: float
    verdict: Literal["held", "missed", "unclear", "unsound"]  # unsound: the driver decided, not the server, or the level is void
    output_tokens_per_s: float | None
    output_tokens_per_s_per_copy: float | None
    in_flight: float | None
    stage_verdict: Literal["valid", "latency_withheld", "void"]
    independent: float = 1.0  # the part of those judged that counts as independent


class Search(Frozen):
    """What a search stage found, worked out again from the records: the largest load that held the SLO, with its interval."""

    stage: int
    over: Literal["copies", "rate_per_s"]
    answer: float | None
    low: float | None  # the largest load that clearly held
    high: float | None  # the smallest load that clearly missed
    reason: str  # precise | limit | first_missed | unsound | unfinished
    sentence: str
    levels: list[SearchLevel]


class Headline(Frozen):
    """The answer, or why there is none."""

    n_slo: int | None  # a search's answer where there is one, else the largest asked copies whose stage is valid and held the SLO
    n_slo_stage: int | None  # of n_slo, else of rate_slo_per_s
    n_slo_level: int = 0
    rate_slo_per_s: float | None = None  # the largest Poisson rate within the SLO, where a search over rates found one
    n_slo_sentence: str
    best_stage: int | None  # highest valid tokens/s
    best_level: int = 0
    sentence: str  # one sentence a person can repeat


class Reference(Frozen):
    """A published figure to stand beside one's own."""

    name: str
    figure: str
    conditions: str
    source: str


# ---------------------------------------------------------------------------------------------------------------- experiments


class FrontierLevel(Frozen):
    """One level of a frontier: so many copies at once. Figures are null where its stage is void, or nothing recorded them."""

    stage: int
    copies: int
    verdict: Literal["valid", "latency_withheld", "void"]
    output_tokens_per_s: Estimate | None
    output_tokens_per_s_per_copy: float | None
    usd_per_page: Band | None
    wh_per_page: Band | None
    energy_source: Literal["measured", "assumed", "not_measured"]
    kv_cache_fraction: float | None  # of its KV cache that a replica used, mean over the window and the replicas
    kv_cache_fraction_max: float | None  # the most that any replica used at any scrape
    speed: Estimate | None  # tokens/s that the SLO's quantile of the streams held at least, TTFT within its limit; 95 % by order statistics


class Marginal(Frozen):
    """What each further copy does between two neighbouring levels; 95 % from the intervals of the two."""

    from_copies: int
    to_copies: int
    gain_tokens_per_s: Estimate  # of the total, for each further copy
    share_of_a_copy: float  # the gain over what a copy had at the lower level
    others_lose_tokens_per_s: float  # by all that were there before, together, for each further copy
    wh_per_page: Estimate | None  # joules that came with the further copies over the pages that did; null where energy is not measured
    usd_per_page: Estimate | None  # money that came with them over those pages: electricity of owned hardware; rent is paid either way


class Knee(Frozen):
    """Where power, (tokens/s)^2 / copies, is largest; null where the sweep does not enclose it."""

    copies: float | None
    low: float | None
    high: float | None
    sentence: str


class SpeedLimit(Frozen):
    """N_SLO at one speed, from the sweep: the largest level that held, what encloses it, and where the quantile's curve crosses the speed."""

    tokens_per_s: float
    held: int | None  # the largest level that held, no smaller one having missed
    clearly_held: int | None  # the largest whose Wilson interval is wholly above the quantile
    clearly_missed: int | None  # the smallest above it whose interval is wholly below
    crossing: Estimate | None  # interpolated between levels; null where the curve does not cross inside the sweep
    n_cluster: float | None  # copies of the cluster that trained the model, at `held`
    sentence: str


class FrontierFinding(Frozen):
    """Copies 1..N on fixed hardware."""

    kind: Literal["frontier"] = "frontier"
    sentence: str
    notes: list[str]  # what could not be said, and why
    quantile: float
    levels: list[FrontierLevel]
    marginals: list[Marginal]
    knee: Knee
    speeds: list[SpeedLimit]
    n_human: dict[str, float]  # at the level of most tokens/s, by words per minute


class ScalingServing(Frozen):
    """One serving of so many replicas that counts."""

    stage: int
    replicas: int
    output_tokens_per_s: float


class Loss(Frozen):
    """Tokens/s for each copy asked, against one replica, as a product of four parts; each part 1 where nothing was lost on it.

    95 % between servings. What the router's uneven dealing costs is inside queue and engine, and is bounded: `router`.
    """

    driver: Estimate  # copies in flight over copies asked
    proxy: Estimate  # copies at the engines over copies in flight: what is between driver and engine
    queue: Estimate  # sequences running over copies at the engines: what waits for a place
    engine: Estimate  # tokens/s for each running sequence
    imbalance: float  # running sequences of the busiest replica over the mean of all, over the window
    router: float | None = None  # the least that uneven dealing can have left of queue x engine, moment by moment; 1: it was even, or cost nothing


class ScalingLevel(Frozen):
    """So many replicas, over all servings that count; intervals are between servings."""

    replicas: int
    servings: int
    output_tokens_per_s: Estimate
    efficiency: Estimate | None  # throughput per replica over that of one; null without a serving of one
    loss: Loss | None  # null where the servers' gauges were not recorded


class UslFit(Frozen):
    """X(R) = rate_of_one R / (1 + sigma (R - 1) + kappa R (R - 1)): the simplest law that the repeats do not contradict."""

    law: Literal["usl", "amdahl", "linear"]
    rate_of_one: Estimate
    sigma: Estimate
    kappa: Estimate
    peak: Estimate | None  # replicas of most throughput; null unless kappa's interval excludes 0
    lack_of_fit_p: float | None


class ScalingFinding(Frozen):
    """Replicas 1..R at a fixed load for each."""

    kind: Literal["scaling"] = "scaling"
    sentence: str
    notes: list[str]
    sharing: str | None  # what the replicas share, where it is less than a device each
    copies_per_replica: int
    levels: list[ScalingLevel]
    servings: list[ScalingServing]
    fit: UslFit | None


class Arm(Frozen):
    """One way to n samples of a prompt, over all its repeats that count; costs are of one sample."""

    samples: int
    how: Literal["one_request", "same_prompt", "own_prompts"]  # n of one request; n requests of one prompt; requests with prompts of their own
    requests_in_flight: int
    repeats: int
    samples_per_s: Estimate
    usd_per_sample: Band | None
    j_per_sample: Band | None
    energy_source: Literal["measured", "assumed", "not_measured"]
    ttft_p50_s: float | None  # null where a repeat's latency is withheld
    e2e_p50_s: float | None  # of a request: of n samples, to the end of the last one
    prefix_hit_fraction: float | None  # prompt tokens that the engines' prefix cache held; null where that was not recorded


class Saving(Frozen):
    """What n samples of one request cost over as many samples by separate requests, with as many sequences in flight; 1 is no difference."""

    samples: int
    beside: Literal["same_prompt", "own_prompts"]
    cost_ratio: Estimate  # of the hardware's time, and so of its price


class PassAt(Frozen):
    """The chance that at least one of k samples passes (Chen et al. 2021), mean over the prompts; and what a solved prompt costs then."""

    k: int
    value: Estimate
    usd_per_solved: Band | None  # k samples' price over the chance; null where k was not played, or nothing passed


class Verified(Frozen):
    """What the verifier said, of the level with the most samples."""

    prompts: int  # different ones whose samples were all judged
    prompts_left_out: int  # at least one of whose samples the verifier itself failed on
    samples: int
    passed: int
    not_passed: int
    timeouts: int  # among not_passed
    failures: int  # of the verifier itself: its samples are on neither side
    failure: str | None  # the commonest one, in words
    pass_at: list[PassAt]
    cheapest: list[int] = []  # every n at which a solved prompt may be cheapest (in 2.5 % of resamplings or more), the likeliest first


class BestOfNFinding(Frozen):
    """n samples of one prompt, beside separate requests, with as many sequences in flight at every n."""

    kind: Literal["best_of_n"] = "best_of_n"
    sentence: str
    notes: list[str]
    sequences: int
    basis: Literal["repeats", "within_run", "none"]  # where intervals are from
    arms: list[Arm]
    savings: list[Saving]
    verified: Verified | None  # null without a verifier


class ShotLevel(Frozen):
    """k examples, with or without the engine's prefix cache, over all repeats that count; costs are of one request."""

    examples: int
    prefix_cache: bool | None  # null: the engine as it was
    repeats: int
    prompt_tokens: float  # of the mean request, from the server's usage
    seconds: Estimate  # of the serving hardware, for one request
    usd_per_request: Band | None
    j_per_request: Band | None
    energy_source: Literal["measured", "assumed", "not_measured"]
    ttft_p50_s: float | None
    prefix_hit_fraction: float | None


class Slope(Frozen):
    """What each further example costs: the slope of a line through the levels, weighted by their errors; 95 %."""

    prefix_cache: bool | None
    levels: int
    seconds: Estimate  # of the serving hardware, for each further example
    at_zero: Estimate  # where the line meets k = 0
    of_a_request: Estimate  # seconds over at_zero
    usd: Estimate | None  # at the price's middle
    misfit_p: float | None  # that a line strays as far by chance; null where that cannot be told
    straight: bool  # whether it may be called a line


class KShotFinding(Frozen):
    """k examples in front of each question."""

    kind: Literal["k_shot"] = "k_shot"
    sentence: str
    notes: list[str]
    copies: int
    basis: Literal["repeats", "within_run", "none"]
    levels: list[ShotLevel]
    slopes: list[Slope]
    cache_saves: Estimate | None  # the part of the marginal cost that the cache takes off; null without both slopes and their intervals


Finding = Annotated[FrontierFinding | ScalingFinding | BestOfNFinding | KShotFinding, Field(discriminator="kind")]


class Part(Frozen):
    """One run directory of an experiment, as dashboards know it: a run of its own."""

    run: str
    levels: list[str]
    start_wall_s: float  # Unix times of its first and its last event
    end_wall_s: float
    grafana_url: str | None = None  # the Grafana that watched it


class Clock(Frozen):
    """How a process that joined from elsewhere was put on the leader's clock: by round trips all through the run."""

    process: str
    host: str
    same_clock: bool  # it read the leader's own clock, and nothing was shifted
    rounds: int
    offset_s: float  # its monotonic clock minus the leader's, at the end
    drift_s: float  # by how much that changed in the run
    error_s: float  # half the longest round trip that was used, which bounds the error of the offset there


class Summary(Frozen):
    """summary.json."""

    schema_version: int
    kilocopy_version: str
    run: dict[str, Any]  # from the manifest: id, name, started_at, spec_sha256, model, hardware, versions, ...
    status: Literal["complete", "interrupted"]
    status_sentence: str
    page_words: int
    stages: list[Stage]  # an entry per level, in order of time
    searches: list[Search]
    wall_zero_s: float | None = None  # Unix time at t_s = 0, the run's first event
    timeline: list[Bin]
    headline: Headline
    overhang: Overhang | None
    corpus: Corpus | None = None
    experiment: Finding | None = None  # what an experiment found
    outages: list[Outage] = []  # replicas and nodes that died while a stage was asking
    simulated: str | None = None  # where no model ran: what stood in for it, in words
    parts: list[Part] = []  # an experiment's run directories, in order of time
    clocks: list[Clock] = Field(default_factory=list)  # of processes on other hosts than the leader
    prices: list[dict[str, Any]]  # every price used: name, value, low, high, unit, source, date
    references: list[Reference]
