"""One YAML file says everything about a run: the model, the cluster, the workload, the stages, the SLO, the page and the prices.

The models are frozen and strict: an unknown key is an error, nothing is patched after parsing, kinds are tagged unions so that
a field that does not apply cannot exist, and no price has a default. `load` answers a mistake with file, line, key and remedy.
"""

from __future__ import annotations

import datetime as dt
import difflib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from kilocopy.problem import ProblemError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
OpenFraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


# The tags of the unions: they stand in pydantic's error paths, not in the file.
TAGS = {
    "measured", "published", "cpu", "gpu", "synthetic", "file", "owned", "rented",
    "closed", "constant", "poisson", "gamma", "ramp", "steps", "trace", "search",
    "fixed", "uniform", "normal", "lognormal", "empirical", "dataset", "frontier", "scaling", "best_of_n", "k_shot",
    "claim", "uri", "redis", "rocksdb", "aws", "gcp",
}  # fmt: skip


# Fields of a request that kilocopy writes.
OWN_FIELDS = {
    "model", "stream", "stream_options", "prompt", "messages", "n", "max_tokens", "max_completion_tokens", "seed",
    "temperature", "top_p", "ignore_eos",
}  # fmt: skip


# Ray's names of GPU types (`ray.util.accelerators`): a name that no node carries would leave replicas waiting for ever.
ACCELERATORS = (
    "V100", "P100", "T4", "P4", "K80", "A10G", "L4", "L40S", "A100", "A100-40G", "A100-80G", "H100", "H200", "H20", "B200", "B300", "GB200",
    "GB300", "RTX-PRO-6000", "Intel-GPU-Max-1550", "Intel-GPU-Max-1100", "AMD-Instinct-MI100", "AMD-Instinct-MI250X",
    "AMD-Instinct-MI250X-MI250", "AMD-Instinct-MI210", "AMD-Instinct-MI300A", "AMD-Instinct-MI300X-OAM", "AMD-Instinct-MI300X-HF",
    "AMD-Instinct-MI308X", "AMD-Instinct-MI325X-OAM", "AMD-Instinct-MI350X-OAM", "AMD-Instinct-MI355X-OAM", "AMD-Radeon-R9-200-HD-7900",
    "AMD-Radeon-HD-7900",
)  # fmt: skip


class Strict(BaseModel):
    """A frozen part of the spec in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class Quoted(Strict):
    """A number that somebody stated: its value, where it is from and when. `low` and `high` band what is assumed."""

    value: NonNegative
    source: str = Field(min_length=3, description="Where the number is from; say 'assumed: ...' where it is a guess.")
    date: dt.date
    low: NonNegative | None = None
    high: NonNegative | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Quoted:
        if (self.low is not None and self.low > self.value) or (self.high is not None and self.high < self.value):
            raise ValueError("low <= value <= high does not hold")
        return self


class MeasuredTraining(Strict):
    """kilocopy trained the model: `training.json` beside the weights says what it cost, on the machine that it names."""

    kind: Literal["measured"]


class PublishedTraining(Strict):
    """Training cost from a model card or a paper. What is not published is left out, and its ratio is not printed."""

    kind: Literal["published"]
    source: str = Field(min_length=3)
    date: dt.date
    flops: Positive | None = Field(None, description="Total training FLOPs.")
    gpu_hours: Positive | None = None
    gpu_type: str | None = None
    gpus: Count | None = Field(None, description="GPUs that trained it at once; N_cluster needs it.")
    energy_j: Positive | None = None
    usd: Quoted | None = Field(None, description="Training cost in $; without it, gpu_hours x usd_per_gpu_hour.")
    usd_per_gpu_hour: Quoted | None = None
    tokens: Positive | None = Field(None, description="Training tokens.")


class Model(Strict):
    """The trained model: what is served, under which name, and what its training cost."""

    id: str = Field(min_length=1, description="The name under which it is served.")
    source: str = Field(
        min_length=1, description="Hugging Face id, directory, s3:// or gs:// URI. A path is relative to the current directory."
    )
    parameters_active: Positive = Field(description="Parameters that work on one token (N_active in 2 x N_active FLOPs/token).")
    training: Annotated[MeasuredTraining | PublishedTraining, Field(discriminator="kind")] | None = None


class CpuReplica(Strict):
    """A replica on CPU cores: vLLM's CPU build."""

    kind: Literal["cpu"]
    cpus_per_replica: Positive = 1
    kv_cache_gib: Count = Field(1, description="KV cache of one replica, GiB of host memory.")


class GpuReplica(Strict):
    """A replica on a fraction of a GPU, one GPU, or several (tensor x pipeline parallel)."""

    kind: Literal["gpu"]
    type: str | None = Field(None, description="Ray's accelerator type, e.g. H100; none takes any GPU.")
    gpus_per_replica: Positive = Field(1, description="A fraction below 1 shares a GPU; else tensor_parallel x pipeline_parallel.")

    @model_validator(mode="after")
    def _known(self) -> GpuReplica:
        if self.type is not None and self.type not in ACCELERATORS:
            near = difflib.get_close_matches(self.type.upper(), ACCELERATORS, 1, 0.3)
            said = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"Ray knows no accelerator type {self.type!r}: {said}none takes any GPU; Ray's names are {', '.join(ACCELERATORS)}")
        return self


class SimulatedEngine(Strict):
    """No model: replicas that answer at a stated speed, to try the control plane (cluster/simulated.py). Its figures are no measurements of a model.

    A step gives every running sequence a token and lasts step_s + step_s_per_copy x running + prefill_s_per_token x prompt tokens admitted.
    """

    step_s: Positive
    step_s_per_copy: NonNegative = 0
    prefill_s_per_token: NonNegative = 0
    running_max: Count = Field(256, description="Sequences that run at once; the rest waits.")


class Cluster(Strict):
    """Where the replicas run and how requests reach them."""

    address: str = Field("local", description="'local' starts a Ray of its own on loopback; else the address of a running Ray.")
    replicas: Count
    hardware: Annotated[CpuReplica | GpuReplica, Field(discriminator="kind")]
    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    routing: Literal["direct", "proxy"] = Field(
        "direct", description="direct: HAProxy to the replica's own server; proxy: Serve's Python proxy, for comparison."
    )
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    engine: dict[str, Any] = Field(default_factory=dict, description="Engine arguments passed to vLLM as they are.")
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment of the replicas; no secrets: they are written to the manifest."
    )
    start_timeout_s: Positive = 1800
    simulated_engine: SimulatedEngine | None = Field(None, description="Instead of vLLM: no model runs, and every report says so.")

    @property
    def devices(self) -> float:
        """GPUs that all replicas hold together; on CPUs the host counts as one device."""
        if isinstance(self.hardware, CpuReplica):
            return 1.0
        return self.replicas * self.hardware.gpus_per_replica

    @model_validator(mode="after")
    def _whole(self) -> Cluster:
        workers = self.tensor_parallel * self.pipeline_parallel
        if isinstance(self.hardware, GpuReplica):
            gpus = self.hardware.gpus_per_replica
            if gpus < 1 and workers > 1:
                raise ValueError(f"a fraction of a GPU ({gpus}) cannot hold {workers} parallel workers: use gpus_per_replica: {workers}")
            if gpus >= 1 and gpus != workers:
                raise ValueError(f"gpus_per_replica is {gpus:g} but tensor_parallel x pipeline_parallel is {workers}: make them equal")
        return self

    @model_validator(mode="after")
    def _simulated(self) -> Cluster:
        if self.simulated_engine is None:
            return self
        if not isinstance(self.hardware, CpuReplica) or self.tensor_parallel * self.pipeline_parallel > 1:
            raise ValueError("simulated_engine runs no model and takes no GPU: set hardware.kind: cpu, without parallelism")
        if self.routing != "direct" or self.engine:
            raise ValueError("simulated_engine stands in for vLLM behind direct routing: leave engine out, and routing at direct")
        return self


class UniformLength(Strict):
    """Every whole number from `low` to `high` as often as any other."""

    kind: Literal["uniform"]
    low: Count
    high: Count

    @model_validator(mode="after")
    def _ordered(self) -> UniformLength:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class NormalLength(Strict):
    """A normal distribution cut off at `min` and `max`; mean and stddev are those before the cut."""

    kind: Literal["normal"]
    mean: Positive
    stddev: Positive
    min: Count = 1
    max: Count

    @model_validator(mode="after")
    def _reachable(self) -> NormalLength:
        _reachable(self.min, self.max, (self.min - 0.5 - self.mean) / self.stddev, (self.max + 0.5 - self.mean) / self.stddev)
        return self


class LognormalLength(Strict):
    """A lognormal distribution cut off at `min` and `max`: its logarithm has the standard deviation `sigma`; median or mean before the cut."""

    kind: Literal["lognormal"]
    median: Positive | None = None
    mean: Positive | None = None
    sigma: Positive
    min: Count = 1
    max: Count

    @property
    def mu(self) -> float:
        """Mean of the logarithm: ln(median) = ln(mean) - sigma^2 / 2."""
        return math.log(self.median) if self.median is not None else math.log(self.mean or 1) - self.sigma**2 / 2

    @model_validator(mode="after")
    def _reachable(self) -> LognormalLength:
        if (self.median is None) == (self.mean is None):
            raise ValueError("give exactly one of median and mean")
        edges = ((math.log(edge) - self.mu) / self.sigma for edge in (self.min - 0.5, self.max + 0.5))
        _reachable(self.min, self.max, *edges)
        return self


class EmpiricalLength(Strict):
    """Lengths that were seen, each drawn as often as it stands there: `values`, or a column of a CSV, JSONL or Parquet file."""

    kind: Literal["empirical"]
    values: list[Count] | None = Field(None, min_length=1)
    path: str | None = Field(None, description="A path is relative to the current directory.")
    column: str | None = Field(None, description="The file's column; none takes its only one.")

    @model_validator(mode="after")
    def _one_source(self) -> EmpiricalLength:
        if (self.values is None) == (self.path is None):
            raise ValueError("give exactly one of values and path")
        if self.column is not None and self.path is None:
            raise ValueError("column goes with path")
        return self


def _reachable(low: int, high: int, low_sd: float, high_sd: float) -> None:
    """Refuse a cut that nothing of the distribution comes through (its edges given in standard deviations from the centre)."""
    if low > high:
        raise ValueError(f"min ({low}) is above max ({high})")
    if min(high_sd, -low_sd) < -6:
        raise ValueError(f"min {low} to max {high} lies more than six standard deviations off the centre: nothing would fall there")


def _length_tag(value: Any) -> Any:
    """A plain number is a fixed length; a mapping says its kind."""
    if isinstance(value, dict):
        return value.get("kind")
    return getattr(value, "kind", "fixed")


Length = Annotated[
    Annotated[Count, Tag("fixed")]
    | Annotated[UniformLength, Tag("uniform")]
    | Annotated[NormalLength, Tag("normal")]
    | Annotated[LognormalLength, Tag("lognormal")]
    | Annotated[EmpiricalLength, Tag("empirical")],
    Discriminator(
        _length_tag,
        custom_error_type="length_kind",
        custom_error_message="a length is a whole number, or a mapping whose kind is uniform, normal, lognormal or empirical",
    ),
]


class SyntheticPrompts(Strict):
    """Prompts of exactly `input_tokens` tokens by the model's own tokenizer, cut at seeded places from the corpus that comes with Python.

    No two begin alike, so no prefix cache answers in the model's place, unless a shared prefix is asked for. For completions a
    prompt's tokens are counted as the server counts them, with the tokens that it puts in front; for chat they are those of the
    messages' contents, without the chat template. Few-shot examples are part of `input_tokens`.
    """

    kind: Literal["synthetic"]
    input_tokens: Length = Field(description="Tokens of a prompt; in a conversation, of each turn's new text.")
    shared_prefix_fraction: Fraction = Field(0, description="This share of a prompt's tokens, from the first on, is the same text in all requests.")
    prefixes: Count = Field(1, description="So many different shared prefixes, each as often as any other.")


class FilePrompts(Strict):
    """One prompt per line of a text file, taken in a seeded order."""

    kind: Literal["file"]
    path: str


class DatasetPrompts(Strict):
    """Prompts from a data set: JSONL, ShareGPT JSON, CSV or Parquet, one per row, taken in a seeded order."""

    kind: Literal["dataset"]
    path: str = Field(description="A path is relative to the current directory; its ending says the format: .jsonl, .json, .csv, .parquet.")
    column: str | None = Field(None, description="Column of the prompt, text or messages; none looks for prompt, text, messages, conversations.")
    answer_column: str | None = Field(None, description="Column of the answer, which few-shot examples need; none looks for answer, response, completion.")
    output_tokens_column: str | None = Field(None, description="Column of max_tokens; without it, the workload's output_tokens.")


class Conversation(Strict):
    """Each copy talks on: every request carries the turns before it with the model's real answers."""

    turns: Annotated[int, Field(ge=2, le=1000)]


class Sampling(Strict):
    """How tokens are drawn; passed to the endpoint."""

    temperature: NonNegative = 1.0
    top_p: OpenFraction = 1.0
    seeded: bool = Field(
        default=False,
        description="Each request carries a seed of its own, worked out from workload.seed. vLLM draws the tokens of seeded requests one request after another, "
        "which costs it time that plain traffic does not.",
    )


class Timeouts(Strict):
    """When a silent server becomes a typed error."""

    connect_s: Positive = 10
    first_token_s: Positive = 120
    stall_s: Annotated[Positive, Field(description="Longest silence inside a stream.")] = 60


class Workload(Strict):
    """What every copy asks for."""

    endpoint: Literal["completions", "chat"] = "completions"
    prompts: Annotated[SyntheticPrompts | FilePrompts | DatasetPrompts, Field(discriminator="kind")]
    output_tokens: Length = Field(description="max_tokens of a request.")
    conversation: Conversation | None = Field(None, description="Requests come as conversations of so many turns; none asks once.")
    examples: Annotated[int, Field(ge=0, le=1000)] = Field(0, description="Few-shot: so many questions with their answers before the question.")
    examples_shared: bool = Field(False, description="Few-shot: the same examples before every question, as a prefix cache can hold them.")
    samples: Annotated[int, Field(ge=1, le=128)] = Field(1, description="Best-of-n: so many answers to each prompt (`n` of the request).")
    copies_per_prompt: Count = Field(1, description="So many copies of a closed stage ask each prompt, each in a request of its own.")
    keep_texts: bool = Field(False, description="Keep every request and its answers in the run directory (texts/*.arrow), as a verifier needs them.")
    ignore_eos: bool = Field(True, description="Every stream runs to its length (a vLLM extension).")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="Further fields of every request, passed through as they are.")
    sampling: Sampling = Sampling()
    timeouts: Timeouts = Timeouts()
    seed: int = 0

    @model_validator(mode="after")
    def _whole(self) -> Workload:
        if own := sorted(OWN_FIELDS & set(self.extra_body)):
            raise ValueError(f"extra_body: {', '.join(own)} is set by kilocopy itself from the spec's other keys: take it out")
        if self.examples and isinstance(self.prompts, FilePrompts):
            raise ValueError("examples need answers, and a text file of prompts has none: use prompts of kind dataset or synthetic")
        if self.examples and self.conversation:
            raise ValueError("examples and conversation do not go together: give one of them")
        if self.examples_shared and not isinstance(self.prompts, DatasetPrompts):
            raise ValueError("examples_shared is for prompts of a data set; synthetic prompts have shared_prefix_fraction for it")
        if self.copies_per_prompt > 1 and (self.conversation or self.samples > 1):
            raise ValueError("copies_per_prompt goes neither with conversation nor with samples: take one of them out")
        return self


class ClosedStage(Strict):
    """N copies, each asking again as soon as its stream ended, for a duration or a number of requests."""

    arrival: Literal["closed"]
    copies: Count
    duration_s: Positive | None = Field(None, description="Time after the warm-up during which copies go on asking.")
    requests: Count | None = Field(None, description="Requests after the warm-up, over all copies, instead of a duration.")
    warmup_s: NonNegative = Field(5, description="Time at the start that is not counted; the window may begin later still.")
    ramp_s: NonNegative = Field(2, description="Starts of the copies are spread evenly over this time.")

    @model_validator(mode="after")
    def _one_length(self) -> ClosedStage:
        if (self.duration_s is None) == (self.requests is None):
            raise ValueError("give exactly one of duration_s and requests")
        return self


class Open(Strict):
    """What open-loop stages share: requests arrive at times worked out beforehand, whether or not earlier ones have ended."""

    duration_s: Positive = Field(description="Time after the warm-up during which requests go on arriving.")
    warmup_s: NonNegative = Field(5, description="Time at the start that is not counted; the window may begin later still.")
    max_in_flight: Count = Field(1024, description="Streams that may be open at once; an arrival that finds none free is recorded as dropped.")


class ConstantStage(Open):
    """Requests at even distances."""

    arrival: Literal["constant"]
    rate_per_s: Positive


class PoissonStage(Open):
    """Requests of many independent users: exponential distances, a fixed mean rate."""

    arrival: Literal["poisson"]
    rate_per_s: Positive


class GammaStage(Open):
    """As Poisson, with gamma distances: burstiness is their shape, 1 is Poisson, below 1 comes in bursts, above 1 is more even."""

    arrival: Literal["gamma"]
    rate_per_s: Positive
    burstiness: Positive = Field(description="Shape of the gamma distribution; the distances' coefficient of variation is 1/sqrt(shape).")


class RampStage(Open):
    """A rate that rises or falls evenly over the duration (the warm-up runs at the first rate)."""

    arrival: Literal["ramp"]
    from_rate_per_s: NonNegative
    to_rate_per_s: NonNegative
    process: Literal["constant", "poisson"] = "poisson"

    @model_validator(mode="after")
    def _some(self) -> RampStage:
        if self.from_rate_per_s + self.to_rate_per_s == 0:
            raise ValueError("from_rate_per_s and to_rate_per_s are both 0: nothing would be asked")
        return self


class StepsStage(Strict):
    """One rate after another, each for `step_s` (the warm-up runs at the first rate)."""

    arrival: Literal["steps"]
    rates_per_s: tuple[NonNegative, ...] = Field(min_length=1)
    step_s: Positive
    process: Literal["constant", "poisson"] = "poisson"
    warmup_s: NonNegative = 0
    max_in_flight: Count = 1024

    @property
    def duration_s(self) -> float:
        """All steps together."""
        return len(self.rates_per_s) * self.step_s

    @model_validator(mode="after")
    def _some(self) -> StepsStage:
        if not any(self.rates_per_s):
            raise ValueError("every rate of rates_per_s is 0: nothing would be asked")
        return self


class TraceStage(Strict):
    """Requests as a production trace recorded them: its times, its lengths, its shared prefixes (which replace the workload's)."""

    arrival: Literal["trace"]
    path: str = Field(description="A path is relative to the current directory.")
    format: Literal["azure", "mooncake"] = Field(
        description="azure: CSV with TIMESTAMP,ContextTokens,GeneratedTokens; mooncake: JSONL with timestamp (ms), input_length, output_length, hash_ids."
    )
    from_s: NonNegative = Field(0, description="Begin this far into the trace.")
    duration_s: Positive | None = Field(None, description="Replay this much of the trace's time; none replays all of it.")
    speed: Positive = Field(1, description="2 replays twice as fast.")
    max_in_flight: Count = 1024
    warmup_s: NonNegative = Field(0, description="Time at the start of the replay that is not counted.")


class SearchStage(Strict):
    """Find the largest load that holds the SLO: double it until one misses, then halve the distance between held and missed."""

    arrival: Literal["search"]
    over: Literal["copies", "rate_per_s"] = Field("copies", description="copies: closed loop; rate_per_s: Poisson arrivals.")
    start: Positive = Field(1, description="The first load tried.")
    limit: Positive = Field(description="No load above it is tried.")
    precision_fraction: OpenFraction = Field(0.05, description="Stop when held and missed are this close (of the held load; 1 copy at least).")
    window_s: Positive = Field(30, description="Time of each level after its warm-up.")
    warmup_s: NonNegative = 5
    ramp_s: NonNegative = 2
    repeats: Annotated[int, Field(ge=0, le=10)] = Field(1, description="How often a level is tried again whose interval holds the SLO's quantile.")
    max_in_flight: Count = Field(1024, description="For rate_per_s: streams that may be open at once.")

    @model_validator(mode="after")
    def _reachable(self) -> SearchStage:
        if self.limit < self.start:
            raise ValueError(f"limit ({self.limit:g}) is below start ({self.start:g})")
        if self.over == "copies" and (self.start % 1 or self.limit % 1):
            raise ValueError("start and limit are whole numbers where copies are sought")
        return self

    def at(self, load: float) -> ClosedStage | PoissonStage:
        """The plain stage that one level of the search is."""
        times: dict[str, Any] = {"duration_s": self.window_s, "warmup_s": self.warmup_s}
        if self.over == "copies":
            return ClosedStage(arrival="closed", copies=round(load), ramp_s=self.ramp_s, **times)
        return PoissonStage(arrival="poisson", rate_per_s=load, max_in_flight=self.max_in_flight, **times)


OpenStage = ConstantStage | PoissonStage | GammaStage | RampStage | StepsStage | TraceStage
PlainStage = ClosedStage | OpenStage
Stage = Annotated[PlainStage | SearchStage, Field(discriminator="arrival")]


def streams_max(stage: PlainStage | SearchStage) -> int:
    """The most streams that a stage may have open at once: the driver holds a socket for each."""
    if isinstance(stage, ClosedStage):
        return stage.copies
    if isinstance(stage, SearchStage) and stage.over == "copies":
        return round(stage.limit)
    return stage.max_in_flight


class Timed(Strict):
    """How long each level of an experiment is held; every level is a closed stage."""

    duration_s: Positive = Field(30, description="Time of each level after its warm-up.")
    warmup_s: NonNegative = 5
    ramp_s: NonNegative = 2

    def at(self, copies: int) -> ClosedStage:
        """The closed stage of so many copies."""
        times = self.model_dump(include={"duration_s", "warmup_s", "ramp_s"})
        return ClosedStage(arrival="closed", copies=copies, **times)


def _levels(listed: tuple[int, ...] | None, most: int | None, factor: float) -> tuple[int, ...]:
    """The levels that were listed, else 1, factor, factor^2, ... up to `most`, in whole numbers."""
    if listed is not None:
        return tuple(sorted(listed))
    assert most is not None  # noqa: S101  the validators ask for one of the two
    found, at = [], 1.0
    while round(at) < most:
        found.append(round(at))
        at = max(at * factor, round(at) + 1)
    return (*found, most)


class _Leveled(Timed):
    """Levels listed, or geometric up to a largest one."""

    factor: Annotated[float, Field(gt=1, le=16)] = Field(2, description="Each level is so many times the one before; where they are not listed.")

    def _one_way(self, name: str, listed: tuple[int, ...] | None, most: int | None) -> None:
        if (listed is None) == (most is None):
            raise ValueError(f"give exactly one of {name} and {name}_max")
        if listed is not None and len(set(listed)) < len(listed):
            raise ValueError(f"{name}: a level stands twice; levels are repeated by the experiment itself where it repeats")


class FrontierExperiment(_Leveled):
    """Copies 1..N on the hardware as it stands: what each further copy adds, and how many hold a speed."""

    kind: Literal["frontier"]
    copies: tuple[Count, ...] | None = Field(None, min_length=1, description="The levels; or copies_max, for 1, 2, 4, ... up to it.")
    copies_max: Count | None = None
    random_order: bool = Field(False, description="Play the levels in a seeded random order, so that a drift of the machine is no trend.")
    speeds_tokens_per_s: tuple[Positive, ...] = Field((5, 10, 13.3, 20, 50), min_length=1, description="Speeds per copy for which N_SLO is told.")

    @property
    def levels(self) -> tuple[int, ...]:
        """Copies of each level, rising."""
        return _levels(self.copies, self.copies_max, self.factor)

    @model_validator(mode="after")
    def _whole(self) -> FrontierExperiment:
        self._one_way("copies", self.copies, self.copies_max)
        return self


class ScalingExperiment(_Leveled):
    """Replicas 1..R, each with the same number of copies, each level served anew several times in random order."""

    kind: Literal["scaling"]
    replicas: tuple[Count, ...] | None = Field(None, min_length=1, description="The levels; or replicas_max, for 1, 2, 4, ... up to it.")
    replicas_max: Count | None = None
    copies_per_replica: Count
    repeats: Annotated[int, Field(ge=1, le=100)] = Field(3, description="How often each level is served anew; fewer than 3 carry no interval and no fit.")

    @property
    def levels(self) -> tuple[int, ...]:
        """Replicas of each level, rising."""
        return _levels(self.replicas, self.replicas_max, self.factor)

    @model_validator(mode="after")
    def _whole(self) -> ScalingExperiment:
        self._one_way("replicas", self.replicas, self.replicas_max)
        return self


class Verifier(Strict):
    """A program that says whether a sample solves its prompt: the text on standard input, exit code 0: it does, 1: it does not.

    Anything else (another exit code, killed by a signal, not started) is the verifier's own failure, and such a sample is neither. The
    variable KILOCOPY_TASK names a JSON file with the request as it was sent and, from a data set, its `answer`.
    """

    command: tuple[str, ...] = Field(min_length=1, description="The program and its arguments. No shell reads it, unless you write one: [sh, -c, ...].")
    timeout_s: Positive = Field(10, description="A verifier that takes longer is ended, and its sample counts as not solved.")
    prompts: Count = Field(200, description="So many prompts are verified with all their samples, drawn with workload.seed from those that were answered.")

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("command"), str):
            raise ValueError("command is a list of the program and its arguments, such as [python, check.py]; where you want a shell, write it: [sh, -c, ...]")
        return value


class BestOfNExperiment(Timed):
    """n samples of one prompt in one request, for n of 1..N, with as many sequences in flight at every n; beside n separate requests."""

    kind: Literal["best_of_n"]
    samples: tuple[Annotated[int, Field(ge=1, le=128)], ...] = Field(min_length=1, description="The levels n; 1, separate requests with prompts of their own, among them.")
    sequences: Count = Field(description="Samples in flight at every level: n of each of sequences / n prompts. Every n divides it.")
    same_prompt_apart: bool = Field(True, description="Play n > 1 also as n separate requests of the same prompt.")
    repeats: Annotated[int, Field(ge=1, le=100)] = Field(3, description="How often each level is played, all in one random order. One carries no interval between repeats.")
    verifier: Verifier | None = Field(None, description="What says whether a sample solves its prompt; for pass@n.")

    @property
    def levels(self) -> tuple[int, ...]:
        """n of each level, rising."""
        return tuple(sorted(self.samples))

    @model_validator(mode="after")
    def _whole(self) -> BestOfNExperiment:
        if len(set(self.samples)) < len(self.samples):
            raise ValueError("samples: a level stands twice; repeats says how often each is played")
        if self.samples == (1,):
            raise ValueError("samples: 1 alone is nothing to compare: give further n, such as [1, 2, 4, 8]")
        if 1 not in self.samples:
            raise ValueError("samples: 1 is missing; it is what the others are compared with")
        if odd := [n for n in self.levels if self.sequences % n]:
            raise ValueError(f"sequences {self.sequences} is not a multiple of samples {odd[0]}: every level has as many sequences in flight")
        return self


class KShotExperiment(Timed):
    """k examples in front of each question: what a further one costs, with the engine's prefix cache on and off."""

    kind: Literal["k_shot"]
    examples: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = Field(min_length=1, description="The levels k; a slope takes three or more.")
    example_tokens: Count | None = Field(None, description="For synthetic prompts: tokens of one example, in front of the workload's input_tokens.")
    copies: Count
    prefix_cache: tuple[bool, ...] | None = Field((True, False), min_length=1, description="What is served, anew in each repeat: with the prefix cache, without; the order is drawn and turned round from repeat to repeat. null: the engine as it is.")
    repeats: Annotated[int, Field(ge=1, le=100)] = Field(3, description="How often each level is played; with prefix_cache each time on a serving of its own, the order in it random. One carries no interval between repeats.")

    @property
    def levels(self) -> tuple[int, ...]:
        """k of each level, rising."""
        return tuple(sorted(self.examples))

    @model_validator(mode="after")
    def _whole(self) -> KShotExperiment:
        if len(set(self.examples)) < len(self.examples):
            raise ValueError("examples: a level stands twice; repeats says how often each is played")
        if len(self.examples) < 3:
            raise ValueError(f"examples: {len(self.examples)} level{'' if len(self.examples) == 1 else 's'} carry no slope with an uncertainty: give three or more, such as [0, 2, 4, 8]")
        if self.prefix_cache is not None and len(set(self.prefix_cache)) < len(self.prefix_cache):
            raise ValueError("prefix_cache: true or false stands twice")
        return self


Experiment = Annotated[FrontierExperiment | ScalingExperiment | BestOfNExperiment | KShotExperiment, Field(discriminator="kind")]


class Slo(Strict):
    """What a copy must get to count: at least `quantile` of the streams hold the speed and TTFT, errors under their limit."""

    tokens_per_s_per_copy: Positive = 10
    quantile: OpenFraction = 0.9
    ttft_s: Positive = 2
    error_fraction_max: Fraction = 0.01


class Page(Strict):
    """A page of decoded output text, counted in words."""

    words: Count = 500
    words_per_token: Quoted | None = Field(
        default=None,
        description="Assumed words of text per output token, for a model whose text means nothing (random weights). Pages and what is priced by them "
        "are then marked assumed; the words that were counted stand beside. Without it words are counted.",
    )

    @model_validator(mode="after")
    def _some(self) -> Page:
        if self.words_per_token is not None and not self.words_per_token.value:
            raise ValueError("words_per_token is 0: no page would ever be full")
        return self


class Owned(Strict):
    """Hardware that was bought: capital per device-hour = price x (1 - residual) / (8760 x life x utilisation)."""

    kind: Literal["owned"]
    usd_per_device: Quoted
    residual_fraction: Annotated[float, Field(ge=0, lt=1)]
    life_years: Positive
    utilisation: OpenFraction = Field(description="Share of its life that the hardware earns its keep.")
    opex_usd_per_device_hour: Quoted | None = None


class Rented(Strict):
    """Hardware that is paid by the hour; its electricity is in the rent and is not added on top."""

    kind: Literal["rented"]
    usd_per_device_hour: Quoted
    utilisation: OpenFraction = Field(description="Share of the paid hours that serve.")


class Prices(Strict):
    """What things cost, with source and date: nothing here has a default. A device is a GPU, or the host where there is none."""

    hardware: Annotated[Owned | Rented, Field(discriminator="kind")]
    electricity_usd_per_kwh: Quoted
    pue: Quoted = Field(description="Facility energy over IT energy.")

    @model_validator(mode="after")
    def _pue(self) -> Prices:
        if min(self.pue.value, self.pue.low or self.pue.value) < 1:
            raise ValueError("pue is facility energy over IT energy and cannot be below 1")
        return self

    assumed_power_w: Quoted | None = Field(
        None, description="Power of the whole serving hardware where nothing measures it; every figure from it is marked assumed."
    )


DnsLabel = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$", max_length=63)]
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=253)]


class SecretKey(Strict):
    """Where a secret is, never what it is: a Kubernetes Secret's name and the key in it."""

    name: DnsName
    key: str = Field(pattern=r"^[A-Za-z0-9._-]+$")


class Node(Strict):
    """What serving may take of one node: of its whole, less what the system keeps."""

    gpus: Count | None = Field(None, description="GPUs of one node; a spec for CPUs has none.")
    cpus: Count
    memory_gib: Count
    shm_gib: Count = Field(16, description="Shared memory (/dev/shm), counted in memory_gib: NCCL and Ray's object store.")


class Head(Strict):
    """The head takes no work: it places, and watches."""

    cpus: Count = 4
    memory_gib: Count = 16


class Toleration(Strict):
    """A taint of the nodes that serving may run on, as Kubernetes has it."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Toleration:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("value goes with operator: Equal, and Equal with a value")
        if self.key is None and self.operator == "Equal":
            raise ValueError("operator: Equal needs a key")
        return self


class ModelStore(Strict):
    """A PersistentVolumeClaim that is there already, with models in it; mounted read-only on every node and in the driver."""

    claim: DnsName
    path: str = Field("/models", pattern=r"^/[^:]*$", description="Where it is mounted; model.source is a path below it.")


class DriverSize(Strict):
    """The Locust workers: how many streams one of them reads, and what it takes."""

    streams_per_worker: Count = Field(
        default=800, description="Streams that one driver process reads honestly at 50 tokens/s each, p99 too (docs/measurements.md); `make bench` measures yours."
    )
    workers: Count | None = Field(default=None, description="So many workers, whatever the stages ask; none works it out from streams_per_worker.")
    cpus: Positive = 1
    memory_gib: Positive = 2


class ClaimResults(Strict):
    """Run directories go to a PersistentVolumeClaim, which outlives `kilocopy deploy delete`."""

    kind: Literal["claim"]
    name: DnsName | None = Field(default=None, description="A claim that is there already; none makes one.")
    size_gib: Count = 50
    storage_class: DnsName | None = None
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = Field(default="ReadWriteOnce", description="The leader alone writes: all records come to it.")


class ObjectStoreResults(Strict):
    """Run directories are copied to an object store while they grow, and once more at the end."""

    kind: Literal["uri"]
    uri: str = Field(pattern=r"^(s3|gs)://[^/@?]+(/[^@?]*)?$", description="s3://bucket/folder or gs://bucket/folder; credentials come from the pod's service account.")
    service_account: DnsName | None = Field(None, description="Service account of the driver's pods, which may write there.")
    every_s: Annotated[float, Field(ge=5)] = Field(30, description="How often what changed is copied: what a lost node loses at most.")


class RedisFaultTolerance(Strict):
    """Ray's control state in a Redis that is there already: a lost head comes back without restarting the replicas."""

    kind: Literal["redis"]
    address: str = Field(pattern=r"^[^@/\s]+:[0-9]+$", description="host:port")
    password: SecretKey | None = None


class RocksDbFaultTolerance(Strict):
    """Ray's control state on a volume of the head's own, which the operator makes."""

    kind: Literal["rocksdb"]
    size_gib: Count = 1
    storage_class: DnsName | None = None


class Monitoring(Strict):
    """The Prometheus Operator's Prometheus, and Grafana beside it."""

    namespace: DnsLabel = Field(default="monitoring", description="Prometheus' namespace, which alone may read the metrics pages.")
    labels: dict[str, str] = Field(
        default_factory=lambda: {"release": "prometheus"}, description="Labels by which Prometheus selects its monitors and rules."
    )


class AwsLauncher(Strict):
    """`ray up` on EC2."""

    kind: Literal["aws"]
    region: str
    availability_zone: str | None = None
    head_instance: str = "m6i.2xlarge"
    worker_instance: str = Field(description="e.g. p5.48xlarge: deploy.node says what it has.")
    image_id: str = Field(pattern=r"^ami-[0-9a-f]+$", description="AMI with the NVIDIA driver and Docker, of that region.")
    disk_gib: Count = 500
    ssh_user: str = "ubuntu"


class GcpLauncher(Strict):
    """`ray up` on Compute Engine."""

    kind: Literal["gcp"]
    project: str
    region: str
    availability_zone: str
    head_machine: str = "n2-standard-8"
    worker_machine: str = Field(description="e.g. a3-highgpu-8g: deploy.node says what it has.")
    accelerator: str | None = Field(None, description="e.g. nvidia-l4, where the machine type does not bring its own GPUs.")
    source_image: str = Field(description="Boot image with the NVIDIA driver and Docker: projects/.../global/images/...")
    disk_gib: Count = 500
    ssh_user: str = "ubuntu"


class Deploy(Strict):
    """How the spec gets onto a cluster (`kilocopy deploy`). Nothing secret stands here: secrets are named, not told."""

    image: str = Field(description="The image, built from deploy/Dockerfile and pushed by you; with a tag or a digest.")
    name: DnsLabel | None = Field(None, max_length=47, description="Of everything that is made; none takes the spec's name.")
    namespace: DnsLabel = Field("kilocopy", description="It has to be there: `kubectl create namespace`.")
    image_pull_secret: DnsName | None = None
    node: Node
    hosts_per_replica: Count = Field(1, description="Nodes that one replica spans, for replicas larger than a node.")
    head: Head = Head()
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels of the nodes that serve.")
    tolerations: list[Toleration] = Field(default_factory=list)
    gpu_resource: str = Field("nvidia.com/gpu", description="The nodes' name for a GPU.")
    hf_token: SecretKey | None = Field(None, description="Hugging Face token, for gated models.")
    api_key: SecretKey | None = Field(None, description="Key that the driver sends with each request.")
    models: ModelStore | None = None
    driver: DriverSize = DriverSize()
    results: Annotated[ClaimResults | ObjectStoreResults, Field(discriminator="kind")] = ClaimResults(kind="claim")
    gcs_fault_tolerance: Annotated[RedisFaultTolerance | RocksDbFaultTolerance, Field(discriminator="kind")] | None = None
    monitoring: Monitoring | None = Field(Monitoring(), description="null where the cluster has no Prometheus Operator.")
    launcher: Annotated[AwsLauncher | GcpLauncher, Field(discriminator="kind")] | None = Field(None, description="Machines for --target ray.")

    @model_validator(mode="after")
    def _pinned(self) -> Deploy:
        name = self.image.rpartition("/")[2]
        if "@sha256:" not in name and (":" not in name or name.endswith(":latest")):
            raise ValueError(f"image {self.image}: give it a tag other than latest, or a digest: a report has to say what ran")
        if self.node.shm_gib >= self.node.memory_gib:
            raise ValueError(f"node.shm_gib {self.node.shm_gib} is part of node.memory_gib {self.node.memory_gib}: make it smaller")
        return self


class Spec(Strict):
    """A run, whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    model: Model
    cluster: Cluster
    workload: Workload
    stages: list[Stage] = Field([], description="What is played, one after the other; or give `experiment`.")
    experiment: Experiment | None = Field(None, description="A question that kilocopy makes the stages for, instead of `stages`.")
    slo: Slo = Slo()
    page: Page = Page()
    prices: Prices
    deploy: Deploy | None = None

    @model_validator(mode="after")
    def _words(self) -> Spec:
        if self.cluster.engine.get("load_format") == "dummy" and self.page.words_per_token is None:
            raise ValueError(
                "cluster.engine.load_format: dummy fills the weights at random, and the words of such a model are none to count: "
                "state page.words_per_token with its source (0.75 is usual for English)"
            )
        return self

    @model_validator(mode="after")
    def _simulated(self) -> Spec:
        if self.cluster.simulated_engine is None:
            return self
        if self.page.words_per_token is None:
            raise ValueError("cluster.simulated_engine writes no text: state page.words_per_token with its source (0.75 is usual for English)")
        if self.deploy is not None or self.model.training is not None or self.workload.samples > 1:
            raise ValueError("cluster.simulated_engine runs no model: leave deploy and model.training out, and workload.samples at 1")
        return self

    @model_validator(mode="after")
    def _something_to_play(self) -> Spec:
        if bool(self.stages) == (self.experiment is not None):
            raise ValueError("give exactly one of stages (with at least one stage) and experiment")
        return self

    @model_validator(mode="after")
    def _carries_the_experiment(self) -> Spec:
        """What an experiment sets itself stands nowhere else."""
        asked, work = self.experiment, self.workload
        if isinstance(asked, BestOfNExperiment | KShotExperiment) and (work.samples > 1 or work.examples or work.conversation or work.copies_per_prompt > 1):
            raise ValueError(f"experiment.kind {asked.kind} sets samples and examples itself: take workload.samples, examples, copies_per_prompt and conversation out")
        if isinstance(asked, KShotExperiment):
            _k_shot_prompts(asked, work.prompts)
            if asked.prefix_cache is not None and "enable_prefix_caching" in self.cluster.engine:
                raise ValueError("cluster.engine.enable_prefix_caching is set by experiment.prefix_cache: take one of them out")
        return self

    @property
    def sha256(self) -> str:
        """Hash of the spec as resolved: the same for two files that mean the same. How it gets onto a cluster is not in it."""
        said = self.model_dump(mode="json", exclude={"deploy"})
        if self.cluster.simulated_engine is None:
            del said["cluster"]["simulated_engine"]  # a spec from before it could be asked for means the same
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _k_shot_prompts(asked: KShotExperiment, prompts: SyntheticPrompts | FilePrompts | DatasetPrompts) -> None:
    """Where the examples come from. Raises ValueError."""
    if isinstance(prompts, FilePrompts):
        raise ValueError("experiment.kind k_shot: examples need answers, and a text file of prompts has none: use prompts of kind dataset or synthetic")
    if isinstance(prompts, DatasetPrompts):
        if asked.example_tokens is not None:
            raise ValueError("experiment.example_tokens is for synthetic prompts; a data set's examples are as long as they are")
        return
    if asked.example_tokens is None or not isinstance(prompts.input_tokens, int) or prompts.shared_prefix_fraction:
        raise ValueError(
            "experiment.kind k_shot with synthetic prompts needs experiment.example_tokens, a whole number of workload.prompts.input_tokens (the question's), and no "
            "shared_prefix_fraction: the examples are the shared prefix"
        )


def files_named(spec: Spec) -> Iterator[tuple[str, str]]:
    """The files that a spec names for the driver, with their keys."""
    prompts = spec.workload.prompts
    named = {
        "workload.prompts.path": prompts,
        "workload.prompts.input_tokens.path": getattr(prompts, "input_tokens", None),
        "workload.output_tokens.path": spec.workload.output_tokens,
        **{f"stages[{index}].path": stage for index, stage in enumerate(spec.stages)},
    }
    for key, part in named.items():
        path = getattr(part, "path", None)
        if path is not None:
            yield key, path


def load(path: Path) -> Spec:
    """Read a spec file. Raises ProblemError with file, line, key path, bad value and what is legal."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ProblemError(f"{path}: no such file; `kilocopy init` writes a spec to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(f"{path}: cannot be read: {error}") from None
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ProblemError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise ProblemError(f"{path}: not valid YAML: brackets or indents lie too deep in each other") from None
    except (YAMLError, ValueError, TypeError) as error:  # a control character; a date with a 13th month; a key that is a mapping
        raise ProblemError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ProblemError(
            f"{path}:1: a spec is a mapping of keys, this is {type(tree).__name__}; `kilocopy init` writes one to start from"
        )
    try:
        return Spec.model_validate(YAML(typ="safe", pure=True).load(text))
    except YAMLError as error:
        raise ProblemError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ProblemError("\n".join(_sentence(path, tree, item) for item in error.errors())) from None


def _line_of(node: Any, part: str | int) -> int:
    """Line (from 1) of a mapping's key or a sequence's item, as ruamel.yaml noted it; of a key that was merged in (`<<`), its mapping's."""
    try:
        noted = node.lc
        at = noted.item(part) if isinstance(node, list) else noted.key(part)
    except KeyError:
        return int(node.lc.line) + 1
    return int(at[0]) + 1


def _legal_keys(mapping: Any) -> str:
    """The keys of the part of the spec that a mapping resembles most."""
    schema = Spec.model_json_schema()
    shapes = [schema, *schema["$defs"].values()]
    nearest = max(shapes, key=lambda shape: len(set(shape.get("properties", {})) & set(mapping)))
    return ", ".join(nearest["properties"])


def _sentence(path: Path, tree: Any, item: Any) -> str:
    """One validation error of pydantic's as a sentence with the line of the key that is meant."""
    node: Any = tree
    parent: Any = tree
    line, keys = 1, []
    for part in item["loc"]:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            line, parent, node = _line_of(node, part), node, node[part]
        elif not isinstance(node, list) and part in TAGS:
            continue  # the tag of a union: in pydantic's path, not in the file
        keys.append(f"[{part}]" if isinstance(part, int) else f".{part}")
    key = "".join(keys).lstrip(".") or "(the whole file)"
    if item["type"] == "extra_forbidden":
        said = f"unknown key; legal here: {_legal_keys(parent)}"
    elif item["type"] == "missing":
        said = "missing"
    else:
        value = f", got {item['input']!r}" if not isinstance(item["input"], dict | list) else ""
        said = item["msg"].removeprefix("Value error, ") + value
    return f"{path}:{line}: {key}: {said}"
