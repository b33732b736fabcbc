"""The one place that knows the servers' metric names.

vLLM exports `vllm:generation_tokens_total`; the same through Ray's agents is `ray_vllm_generation_tokens_total`. Both become
`generation_tokens_total` here. Ray's histogram `_sum`s are invented from bucket midpoints, so none is read; gauges vanish when
idle, so a missing gauge beside a living counter means zero.
"""

from __future__ import annotations

import re

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

_LINE = re.compile(rb"^(?:ray_vllm_|vllm:)(" + "|".join(COUNTERS + GAUGES).encode() + rb")\{", re.MULTILINE)


def wanted(page: bytes) -> bytes:
    """The lines of a metrics page that are recorded; the rest is dropped before anything is parsed."""
    lines = []
    for match in _LINE.finditer(page):
        end = page.find(b"\n", match.start())
        lines.append(page[match.start() : end if end >= 0 else len(page)])
    return b"\n".join(lines) + b"\n"
