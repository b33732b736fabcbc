"""The one place that knows metric names: the servers' that kilocopy reads, and its own that it exports.

vLLM exports `vllm:generation_tokens_total`; the same through Ray's agents is `ray_vllm_generation_tokens_total`. Both become
`generation_tokens_total` here. Ray's histogram `_sum`s are invented from bucket midpoints, so none is read; gauges vanish when
idle, so a missing gauge beside a living counter means zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# What a run's identity checks and replicas' picture need, and nothing else: a node's page is about 1 MB.
COUNTERS = (
    "generation_tokens_total",
    "prompt_tokens_total",
    "request_success_total",
    "num_preemptions_total",
    "prefix_cache_hits_total",
    "prefix_cache_queries_total",
)
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
LABELS = ("ReplicaId", "replica", "NodeAddress", "node", "engine", "finished_reason", "model_name", "WorkerId")

HEALTHY = "ray_serve_deployment_replica_healthy"  # by replica: 1, or 0; from Serve's controller, which outlives its replicas

_LINE = re.compile(rb"^(?:ray_vllm_|vllm:)(" + "|".join(COUNTERS + GAUGES).encode() + rb")\{", re.MULTILINE)


_SEEN = re.compile(_LINE.pattern + rb"|^(?:" + HEALTHY.encode() + rb"|ray_node_gpus_utilization|ray_node_gram_used)\{", re.MULTILINE)


def wanted(page: bytes, *, live: bool = False) -> bytes:
    """The lines of a metrics page that are recorded, with `live` also what only the rules ask for; the rest is dropped before anything is parsed."""
    lines = []
    for match in (_SEEN if live else _LINE).finditer(page):
        end = page.find(b"\n", match.start())
        lines.append(page[match.start() : end if end >= 0 else len(page)])
    return b"\n".join(lines) + b"\n"


# --------------------------------------------------------------------------------------------------- what kilocopy exports


@dataclass(frozen=True, slots=True, eq=False)  # each is itself: a key of dictionaries that are read for every request
class Metric:
    """One of kilocopy's own metrics: a counter's name has no `_total` here, its sample has. Units are in the name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def sample(self) -> str:
        """The name that a query uses, of a counter or a gauge."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


# On every series of a driver worker. A search's levels are not in them: hundreds of levels would be hundreds of series.
RUN_LABELS = ("cluster", "model", "run", "worker")

TTFT_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 30, 60)
ICL_BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
E2E_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600)
LAG_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)

REQUESTS = Metric("kilocopy_requests", "counter", "Requests that ended, by outcome.", ("stage", "outcome"))
SENT = Metric("kilocopy_requests_sent", "counter", "Requests that were begun.")
OUTPUT_TOKENS = Metric("kilocopy_output_tokens", "counter", "Output tokens of ok requests, from the server's usage, when they ended.", ("stage",))
PROMPT_TOKENS = Metric("kilocopy_prompt_tokens", "counter", "Prompt tokens of ok requests, from the server's usage, when they ended.", ("stage",))
OUTPUT_WORDS = Metric("kilocopy_output_words", "counter", "Words of the decoded text of ok requests.", ("stage",))
EVENTS = Metric("kilocopy_stream_events", "counter", "Events read from streams, as they came.")
SLO_JUDGED = Metric("kilocopy_slo_judged", "counter", "Requests judged against the SLO: all that ended but the cancelled.", ("stage",))
SLO_ATTAINED = Metric("kilocopy_slo_attained", "counter", "Requests that held the SLO's speed and TTFT.", ("stage",))
TTFT = Metric("kilocopy_ttft_seconds", "histogram", "Time to the first token: from the send, in open loop from when it was due.", ("stage",), TTFT_BUCKETS_S)
ICL = Metric("kilocopy_inter_chunk_seconds", "histogram", "Gaps between chunks that carried text.", ("stage",), ICL_BUCKETS_S)
E2E = Metric("kilocopy_e2e_seconds", "histogram", "From the send (open loop: when due) to the last token.", ("stage",), E2E_BUCKETS_S)
SEND_LAG = Metric("kilocopy_send_lag_seconds", "histogram", "How late requests were sent.", ("stage",), LAG_BUCKETS_S)
LOOP_LAG = Metric("kilocopy_loop_lag_seconds", "histogram", "How late the driver's event loop woke, probed each 10 ms.", (), LAG_BUCKETS_S)
IN_FLIGHT = Metric("kilocopy_in_flight", "gauge", "Requests open at this worker: copies being played.")
COPIES_ASKED = Metric("kilocopy_copies_asked", "gauge", "Copies this worker was asked to keep in flight; absent in open loop.")
STAGE = Metric("kilocopy_stage_info", "gauge", "1 for the stage that is being played.", ("stage", "level", "phase", "kind"))
CPU = Metric("kilocopy_driver_cpu_seconds", "counter", "CPU time of this worker.")
RSS = Metric("kilocopy_driver_resident_bytes", "gauge", "Resident memory of this worker.")
PAGE_WORDS = Metric("kilocopy_page_words", "gauge", "Words of a page.")
DEVICES = Metric("kilocopy_devices", "gauge", "GPUs that serve; a host without one counts as one device.", ("kind",))
USD_PER_DEVICE_HOUR = Metric(
    "kilocopy_usd_per_device_hour", "gauge", "What an hour of a device costs, its idle hours paid: capital and opex, or rent.", ("kind",)
)
USD_PER_KWH = Metric("kilocopy_electricity_usd_per_kwh", "gauge", "Price of electricity; absent where the rent includes it.")
PUE = Metric("kilocopy_pue", "gauge", "Facility energy over IT energy.")
SLO_QUANTILE = Metric("kilocopy_slo_quantile", "gauge", "Share of the streams that must hold the SLO.")
ENERGY = Metric("kilocopy_energy_joules", "counter", "Energy by a meter's own counter.", ("run", "device", "boundary", "node", "ip"))
METERS = Metric(
    "kilocopy_energy_meters", "gauge", "Power meters that a node has; 0: nothing counts its joules. `machine` is one for two nodes that read the same counters.",
    ("run", "boundary", "node", "ip", "machine"),
)  # fmt: skip

DRIVER_METRICS = (
    REQUESTS, SENT, OUTPUT_TOKENS, PROMPT_TOKENS, OUTPUT_WORDS, EVENTS, SLO_JUDGED, SLO_ATTAINED, TTFT, ICL, E2E, SEND_LAG, LOOP_LAG,
    IN_FLIGHT, COPIES_ASKED, STAGE, CPU, RSS, PAGE_WORDS, DEVICES, USD_PER_DEVICE_HOUR, USD_PER_KWH, PUE, SLO_QUANTILE,
)  # fmt: skip

# What rules ask of DCGM's exporter (its default counters, as of the 4.8.3 that kilocopy/compose.py names; 4.9 renames them): energy in mJ,
# power in W, utilisation in %, memory in MiB.
_DCGM_LABELS = ("gpu", "UUID", "device", "modelName", "Hostname")
DCGM = dict.fromkeys(
    ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "DCGM_FI_DEV_POWER_USAGE", "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED"), _DCGM_LABELS
)

# The servers' metrics that dashboards show and a run on CPUs does not have: what is on a GPU's node, and what comes with the first hit.
SERVERS_ON_DEMAND = {
    "ray_node_gpus_utilization": ("ip", "GpuIndex", "GpuDeviceName"),
    "ray_node_gram_used": ("ip", "GpuIndex", "GpuDeviceName"),
    "ray_vllm_prefix_cache_hits_total": ("ReplicaId", "WorkerId", "engine", "model_name"),
}
