"""Prometheus' recording and alert rules: from raw counters to copies, pages, joules and dollars per page, live.

The same formulas as the report's (kilocopy/price.py), over the last minute instead of a steady window, so they are for watching; the
report decides. Four rules of their own:

- No data stays no data. A ratio over nothing is absent (`> 0`), a price lacks what it needs to be whole (owned hardware without a
  meter has no price of a page, and no zero), and a counter whose page is gone stops at once, instead of fading over a minute.
- A replica has no counter before its first token, and one that has died keeps its counters on Ray's page: whether a replica is there is
  Serve's to say. A vLLM without Ray is there while its page is.
- Servers' gauges vanish when idle: beside a living counter that is a zero, and so it is beside a healthy replica that was never asked, if
  every page that would show it answers. Otherwise it is no data. They vanish between two reports as well, and that is no zero.
- Requests are counted when they end, so the client's rates follow the servers' by a request's length.

    python -m kilocopy.rules [--check]      writes dashboards/rules/kilocopy.yaml, or says whether it is as written here
"""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from kilocopy import metrics as m
from kilocopy.search import CPU_FRACTION_MAX, LAG_ITL_FRACTION, LAG_S_MAX, SEND_LAG_S_MAX

PATH = Path(__file__).resolve().parent.parent / "dashboards" / "rules" / "kilocopy.yaml"
RUN = "cluster, model, run"
MODEL = "cluster, model"
WINDOW = "1m"
REPORTED = "15s"  # Ray's agent shows a gauge once per report: each 10 s by default, 1 s where kilocopy starts Ray


@dataclass(frozen=True, slots=True)
class Rule:
    """A quantity: its name, how it comes about, its unit and what it means. `labels` are those that it keeps."""

    record: str
    expr: str
    unit: str
    help: str
    labels: tuple[str, ...] = ("cluster", "model", "run")


@dataclass(frozen=True, slots=True)
class Alert:
    """What somebody should look at: after how long, and in plain words what; `why` argues for its windows and bounds."""

    name: str
    expr: str
    lasting: str
    severity: str
    summary: str
    why: str


def rate(counter: m.Metric | str, window: str = WINDOW) -> str:
    """Growth per second of a counter that is still there."""
    name = counter if isinstance(counter, str) else counter.sample
    return f"(rate({name}[{window}]) and {name})"


def by_run(expr: str, how: str = "sum") -> str:
    """One value a run, over its workers and stages."""
    return f"{how} by ({RUN}) ({expr})"


def served(expr: str, how: str = "sum", keep: str = MODEL) -> str:
    """One value a model (and what else is kept) of the servers, whose label for it is `model_name`."""
    return f'{how} by ({keep}) (label_replace({expr}, "model", "$1", "model_name", "(.+)"))'


def or_zero(gauge: str, counter: str) -> str:
    """A servers' gauge that vanishes when idle, and between two reports: its last value, else zero where its counter lives."""
    return f"((last_over_time({gauge}[{REPORTED}]) and {counter}) or 0 * {counter})"


def quantile(q: float, histogram: m.Metric, by: str = RUN) -> str:
    """A quantile of a histogram over the last minute; absent where nothing was counted (NaN is not above -1)."""
    return f"histogram_quantile({q:g}, sum by ({by}, le) (rate({histogram.name}_bucket[{WINDOW}]))) > -1"


TOKENS = "ray_vllm_generation_tokens_total"
RUNNING, WAITING, KV = "ray_vllm_num_requests_running", "ray_vllm_num_requests_waiting", "ray_vllm_kv_cache_usage_perc"
PAGES = "kilocopy:pages_per_second:rate1m"
# Energy. A run's own meters come first, then those of the serving nodes' own pages (which know no run), then DCGM's: a GPU is counted once, by its UUID.
OF_RUN, OF_NODE = (m.ENERGY.sample + which for which in ('{run!="",boundary=~"gpu|host"}', '{run="",cluster!="",boundary="gpu"}'))
OWN_OF_RUN = f"max by (run, node, ip, device, boundary) {rate(OF_RUN)}"
OWN_OF_NODE = f"max by (cluster, node, ip, device, boundary) {rate(OF_NODE)}"
OURS = '{cluster!=""}'  # a cluster's DCGM knows every GPU; those of this deployment have its label


def named(expr: str, **labels: str) -> str:
    """A series under our label names: each label from another one."""
    for label, source in labels.items():
        expr = f'label_replace({expr}, "{label}", "$1", "{source}", "(.+)")'
    return expr


def by_gpu(dcgm: str) -> str:
    """One value a GPU of DCGM's: parts of a GPU (MIG) repeat what is the whole one's."""
    return f"max by (cluster, node, device) ({named(dcgm, device='UUID', node='Hostname')})"


def of_ray(gauge: str) -> str:
    """The same of the gauge that Ray's agent has for each GPU of its node, which knows it by its number; where DCGM knows the cluster, it speaks."""
    seen = f"last_over_time({gauge}{OURS}[{REPORTED}])"
    return f"max by (cluster, node, device) ({named(seen, device='GpuIndex', node='ip')}) unless on (cluster) {DCGM_BUSY}{OURS}"


DCGM_J, DCGM_W, DCGM_BUSY, DCGM_MEMORY = m.DCGM
DCGM_WATTS = (
    f"({by_gpu(rate(DCGM_J + OURS, '2m'))} / 1000 or {by_gpu(f'(avg_over_time({DCGM_W}{OURS}[{WINDOW}]) and {DCGM_W}{OURS})')})"
)
RUNS = f"0 * {by_run(m.DEVICES.sample, 'max')}"


def metered(how: str, boundary: str = "gpu|host") -> str:
    """`how` many or how much of a run's meters: its own, and those that only know its cluster."""
    watts = f'kilocopy:meter_watts:rate1m{{boundary=~"{boundary}",run'
    own = f'{RUNS} + on (run) group_left () {how} by (run) ({watts}!=""}})'
    more = f'{RUNS} + on (cluster) group_left () {how} by (cluster) ({watts}=""}})'
    return f"(({own}) + ({more}) or ({own}) or ({more}))"


# As the report: GPUs that serve need a meter each; a host that serves itself needs its own.
GPUS, HOSTS = (m.DEVICES.sample + f'{{kind="{kind}"}}' for kind in ("gpu", "cpu"))
COVERED_GPUS = f"{metered('count', 'gpu')} >= ceil({by_run(GPUS, 'max')})"
COVERED_HOST = f"{metered('count', 'host')} and {by_run(HOSTS, 'max')}"
ALL_BUT_CANCELLED = f'{m.REQUESTS.sample}{{outcome!="cancelled"}}'
OK = f'{m.REQUESTS.sample}{{outcome="ok"}}'
FAILED = f'{m.REQUESTS.sample}{{outcome!~"ok|cancelled"}}'


def healthy(which: str) -> str:
    """Serve's word on its replicas: each 10 s by default (1 s where kilocopy starts Ray), and a scrape can miss that, so it holds for a minute.

    The target says of which model; where it does not, the deployment's name does, in which Serve writes `/` as `--` and `.` as `_`.
    """
    said, unsaid = (f'last_over_time({m.HEALTHY}{{deployment=~"LLMServer.*",{which},model{op}""}}[{WINDOW}])' for op in ("!=", "="))
    return f'({said} or label_replace({unsaid}, "model", "$1", "deployment", "LLMServer:(?:simulated:)?(.+)"))'


REPLICA = f"{MODEL}, ReplicaId"
NAMED, NAMELESS = healthy('replica!=""'), healthy('replica=""')
HEALTHY = f'max by ({REPLICA}) (label_replace({NAMED}, "ReplicaId", "$1", "replica", "(.+)"))'
COUNTED = f"sum by ({MODEL}) (max by ({MODEL}, application, deployment) ({NAMELESS}))"  # by a Serve that leaves the replicas' names out
ENGINES = f"count by ({REPLICA}) ({served(TOKENS, 'count', REPLICA)})"
ALONE = TOKENS + '{WorkerId=""}'  # on vLLM's own pages, which Ray has no part in
BARE = f"count by ({REPLICA}) ({served(ALONE, 'count', REPLICA)})"
# Where every page answers, what a healthy replica does not say has not happened yet.
SEEN = 'unless on (cluster) (up{job="servers"} == 0)'
NEVER_ASKED = f"0 * (kilocopy:replicas > 0) {SEEN}"

# A page is known of while something names it, or while a driver drives its cluster; `server_pages_seen` remembers for as long as that.
DRIVEN = f"count by (cluster) ({m.IN_FLIGHT.sample})"
PAGE_ANSWERS = "unless on (cluster) (kilocopy:server_pages > 0)"

RULES = (
    # The servers' metrics pages
    Rule("kilocopy:server_pages", 'count by (cluster) (up{job="servers"} == 1) or 0 * count by (cluster) (up{job="servers"})', "pages",
         "Metrics pages of the servers that answer.", ("cluster",)),
    Rule("kilocopy:server_pages_seen",
         "count by (cluster) (kilocopy:server_pages > 0) or last_over_time(kilocopy:server_pages_seen[10m])"
         f" and on (cluster) (kilocopy:server_pages or {DRIVEN})", "1",
         "1 once a page of the servers has answered, for as long as one is named or a driver runs.", ("cluster",)),
    # Copies and speed
    Rule("kilocopy:copies", by_run(m.IN_FLIGHT.sample), "copies", "Streams open now, at the driver."),
    Rule("kilocopy:copies:mean1m", by_run(f"avg_over_time({m.IN_FLIGHT.sample}[{WINDOW}]) and {m.IN_FLIGHT.sample}"), "copies",
         "Mean of the copies in flight over the last minute."),
    Rule("kilocopy:replica_healthy", f"({HEALTHY} == 1) or {BARE} or {ENGINES} and on ({MODEL}) {COUNTED}", "1",
         "1 for each replica that Serve calls healthy; for each vLLM without Ray that answers. Where Serve names none, for each that has counters.", ("cluster", "model", "ReplicaId")),
    Rule("kilocopy:replicas",
         f"sum by ({MODEL}) ({HEALTHY}) or {COUNTED} or count by ({MODEL}) (kilocopy:replica_healthy)"
         ' or 0 * max_over_time(kilocopy:replicas[10m]) and on (cluster) (up{job="servers"} == 1)', "replicas",
         "Replicas that Serve calls healthy, or vLLMs without Ray that answer. 0 where all are dead and a page is there; no data where nobody says it.", ("cluster", "model")),
    Rule("kilocopy:server_copies", f"{served(or_zero(RUNNING, TOKENS))} or {NEVER_ASKED}", "copies", "Sequences that the engines run now (N_run).",
         ("cluster", "model")),
    Rule("kilocopy:server_waiting", f"{served(or_zero(WAITING, TOKENS))} or {NEVER_ASKED}", "requests", "Requests that wait in the engines' queues.",
         ("cluster", "model")),
    Rule("kilocopy:kv_cache_fraction:max", f"{served(or_zero(KV, TOKENS), 'max')} or {NEVER_ASKED}", "0-1", "KV cache in use, of the fullest replica.",
         ("cluster", "model")),
    Rule("kilocopy:output_tokens_per_second:rate1m", by_run(rate(m.OUTPUT_TOKENS)), "tokens/s", "Output tokens of requests that ended."),
    Rule("kilocopy:server_tokens_per_second:rate1m", f"{served(rate(TOKENS))} or {NEVER_ASKED}", "tokens/s",
         "Output tokens by the engines' own counters.", ("cluster", "model")),
    Rule("kilocopy:replica_tokens_per_second:rate1m",
         f"({served(rate(TOKENS), keep=REPLICA)} and kilocopy:replica_healthy) or 0 * kilocopy:replica_healthy {SEEN}", "tokens/s",
         "Output tokens of each replica that is there; 0 of one that was never asked.", ("cluster", "model", "ReplicaId")),
    Rule("kilocopy:replica_imbalance:rate1m",
         f"max by ({MODEL}) (kilocopy:replica_tokens_per_second:rate1m) / (avg by ({MODEL}) (kilocopy:replica_tokens_per_second:rate1m) > 0)", "1",
         "The busiest replica's tokens/s over the mean of all: 1 is even, the number of replicas is all on one.", ("cluster", "model")),
    Rule("kilocopy:tokens_per_second_per_copy:rate1m", "kilocopy:output_tokens_per_second:rate1m / (kilocopy:copies:mean1m > 0)",
         "tokens/s", "Speed of one copy."),
    Rule("kilocopy:tokens_per_second_per_device:rate1m",
         f"kilocopy:output_tokens_per_second:rate1m / {by_run(m.DEVICES.sample, 'max')}", "tokens/s",
         "Output tokens of one GPU (of the host, where there is none)."),
    Rule(PAGES, f"{by_run(rate(m.OUTPUT_WORDS))} / {by_run(m.PAGE_WORDS.sample, 'max')}", "pages/s", "Pages of decoded text."),
    # Energy and money
    Rule("kilocopy:own_watts:rate1m", f"{OWN_OF_RUN} or ({OWN_OF_NODE} unless on (device) {OWN_OF_RUN})", "W",
         "Power of each of kilocopy's own meters: by the run, or by the cluster where no run reads it.",
         ("cluster", "run", "node", "ip", "device", "boundary")),
    Rule("kilocopy:meter_watts:rate1m",
         f'kilocopy:own_watts:rate1m or (label_replace({DCGM_WATTS}, "boundary", "gpu", "", "") unless on (device) kilocopy:own_watts:rate1m)', "W",
         "Power of each meter; GPUs that kilocopy does not meter by DCGM's counter, over two minutes since it looks each 30 s, or by its gauge.",
         ("cluster", "run", "node", "ip", "device", "boundary")),
    Rule("kilocopy:facility_watts:rate1m",
         f"{by_run(m.PUE.sample, 'max')} * ({metered('sum')} and ({COVERED_GPUS} or {COVERED_HOST}))", "W",
         "Metered power times PUE; absent where a serving device has no meter."),
    Rule("kilocopy:joules_per_page:rate1m", f"kilocopy:facility_watts:rate1m / ({PAGES} > 0)", "J", "Facility energy of a page."),
    Rule("kilocopy:joules_per_output_token:rate1m",
         "kilocopy:facility_watts:rate1m / (kilocopy:output_tokens_per_second:rate1m > 0)", "J", "Facility energy of an output token."),
    Rule("kilocopy:wh_per_page:rate1m", "kilocopy:joules_per_page:rate1m / 3600", "Wh", "Facility energy of a page."),
    Rule("kilocopy:electricity_usd_per_page:rate1m",
         f"kilocopy:wh_per_page:rate1m / 1000 * {by_run(m.USD_PER_KWH.sample, 'max')}", "$",
         "Electricity of a page; absent for rented hardware, whose rent includes it."),
    Rule("kilocopy:hardware_usd_per_page:rate1m",
         f"max by ({RUN}, kind) ({m.USD_PER_DEVICE_HOUR.sample}) * on ({RUN}) group_left () "
         f"({by_run(m.DEVICES.sample, 'max')} / 3600 / ({PAGES} > 0))", "$",
         "Capital and opex, or rent, of a page.", ("cluster", "model", "run", "kind")),
    Rule("kilocopy:usd_per_page:rate1m",
         f'sum by ({RUN}) (kilocopy:hardware_usd_per_page:rate1m{{kind="rented"}})'
         f' or sum by ({RUN}) (kilocopy:hardware_usd_per_page:rate1m{{kind="owned"}}) + kilocopy:electricity_usd_per_page:rate1m', "$",
         "All of a page: the rent, or capital, opex and electricity; absent where electricity is owed and not measured."),
    Rule("kilocopy:pages_per_usd:rate1m", "1 / (kilocopy:usd_per_page:rate1m > 0)", "pages/$", "Pages that a dollar pays."),
    Rule("kilocopy:pages_per_kwh:rate1m", "1000 / (kilocopy:wh_per_page:rate1m > 0)", "pages/kWh", "Pages that a kWh makes."),
    # GPUs
    Rule("kilocopy:gpu_busy_fraction", f"({by_gpu(DCGM_BUSY + OURS)} or {of_ray('ray_node_gpus_utilization')}) / 100", "0-1",
         "Share of the time in which a kernel ran on the GPU; it may have been a small one.", ("cluster", "node", "device")),
    Rule("kilocopy:gpu_memory_bytes", f"({by_gpu(DCGM_MEMORY + OURS)} or {of_ray('ray_node_gram_used')}) * 1048576", "bytes",
         "GPU memory in use.", ("cluster", "node", "device")),
    # Quality
    Rule("kilocopy:slo_attained_fraction:rate1m", f"{by_run(rate(m.SLO_ATTAINED))} / ({by_run(rate(m.SLO_JUDGED))} > 0)", "0-1",
         "Share of the requests that held the SLO."),
    Rule("kilocopy:error_fraction:rate1m",
         f"({by_run(rate(FAILED))} or 0 * {by_run(rate(ALL_BUT_CANCELLED))}) / ({by_run(rate(ALL_BUT_CANCELLED))} > 0)", "0-1",
         "Share of the requests that failed; cancelled ones are in neither."),
    Rule("kilocopy:ttft_seconds:p50", quantile(0.5, m.TTFT), "s", "Time to the first token, median, from buckets."),
    Rule("kilocopy:ttft_seconds:p99", quantile(0.99, m.TTFT), "s", "Time to the first token, 99th percentile, from buckets."),
    Rule("kilocopy:inter_chunk_seconds:p50", quantile(0.5, m.ICL), "s", "Gap between chunks, median, from buckets."),
    Rule("kilocopy:inter_chunk_seconds:p99", quantile(0.99, m.ICL), "s", "Gap between chunks, 99th percentile, from buckets."),
    Rule("kilocopy:token_gap_fraction:rate2m",
         f"({served(rate(TOKENS, '2m'))} - sum by ({MODEL}) {rate(m.OUTPUT_TOKENS, '2m')}) / ({served(rate(TOKENS, '2m'))} > 0)", "-1-1",
         "What the servers counted more than the client, of the servers' tokens. Near 0 in a steady stage; other clients raise it.",
         ("cluster", "model")),
    Rule("kilocopy:token_gap_in_flight:rate2m",
         f"sum by ({MODEL}) (max_over_time(kilocopy:copies[2m])) * sum by ({MODEL}) {rate(m.OUTPUT_TOKENS, '2m')}"
         f" / (sum by ({MODEL}) {rate(OK, '2m')} > 0) / (120 * {served(rate(TOKENS, '2m'))} > 0)", "0-1",
         "What of that gap requests in flight can explain at most: the most copies times the mean request's tokens, of the servers' tokens.",
         ("cluster", "model")),
    # The driver
    Rule("kilocopy:driver_cpu_fraction:rate1m", f"sum by ({RUN}, worker) {rate(m.CPU)}", "0-1", "Of one core, for each driver worker.",
         ("cluster", "model", "run", "worker")),
    Rule("kilocopy:driver_loop_lag_seconds:p99", quantile(0.99, m.LOOP_LAG, f"{RUN}, worker"), "s", "How late a worker's event loop woke.",
         ("cluster", "model", "run", "worker")),
    Rule("kilocopy:driver_send_lag_seconds:p99", quantile(0.99, m.SEND_LAG, f"{RUN}, worker"), "s", "How late requests were sent.",
         ("cluster", "model", "run", "worker")),
    Rule("kilocopy:driver_events_per_second:rate1m", f"sum by ({RUN}, worker) {rate(m.EVENTS)}", "events/s", "Events read from streams.",
         ("cluster", "model", "run", "worker")),
)  # fmt: skip

_LAGS = "kilocopy:driver_loop_lag_seconds:p99"
ALERTS = (
    Alert("KilocopyDriverLimited",
          f"(({_LAGS} > {LAG_S_MAX:g}) unless ({_LAGS} <= on ({RUN}) group_left () ({LAG_ITL_FRACTION:g} * kilocopy:inter_chunk_seconds:p50)))"
          f" or kilocopy:driver_cpu_fraction:rate1m > {CPU_FRACTION_MAX:g} or kilocopy:driver_send_lag_seconds:p99 > {SEND_LAG_S_MAX:g}",
          "30s", "warning",
          "Worker {{ $labels.worker }} of run {{ $labels.run }} is the limit, not the servers: use more workers, or a quieter host.",
          "The report's own bounds, over the last minute. 30 s, because one late moment is in that minute for all of it."),
    Alert("KilocopySloBroken",
          f"kilocopy:slo_attained_fraction:rate1m < {by_run(m.SLO_QUANTILE.sample, 'max')}", "1m", "warning",
          "Only {{ $value | humanizePercentage }} of the streams of run {{ $labels.run }} hold the SLO.",
          "1 min, because a stage begins with requests that were sent together, and their minute has to pass."),
    Alert("KilocopyReplicaDown", "kilocopy:replicas < max_over_time(kilocopy:replicas[10m])", "15s", "critical",
          "{{ $value }} replicas of {{ $labels.model }} are healthy, and there were more in the last 10 minutes.",
          "Serve says so after three failed checks, 10 s apart, so it was waited for already. Ends when all are back, or after 10 min."),
    Alert("KilocopyServersGone",
          f"max_over_time(kilocopy:server_pages_seen[10m]) {PAGE_ANSWERS}", "15s", "critical",
          "No metrics page of the servers of {{ $labels.cluster }} answers any more, and one did: they are down, or cut off.",
          "Without a page there are no replicas, tokens or gauges to alarm about: all of them are no data. 15 s are three reads or more."
          " Remembered while a target names a page or a driver runs, and 10 min after."),
    Alert("KilocopyServersNeverSeen",
          f"((kilocopy:server_pages == 0) or 0 * {DRIVEN}) {PAGE_ANSWERS} unless on (cluster) max_over_time(kilocopy:server_pages_seen[10m])",
          "1m", "warning",
          "No metrics page of the servers of {{ $labels.cluster }} has answered yet: none is named (--metrics), or its address is wrong.",
          "1 min, because a page is named before its server answers. A driver without any page runs well; what the servers count is not checked."),
    Alert("KilocopyServerPageDown",
          'up{job="servers"} == 0 and on (cluster) (kilocopy:server_pages > 0)', "15s", "warning",
          "The metrics page {{ $labels.instance }} of {{ $labels.cluster }} does not answer, others do: what its replicas count is missing.",
          "A node that died, or is cut off. 15 s are three reads or more: a busy page may miss one."),
    Alert("KilocopyCountersDisagree",
          f"(abs(kilocopy:token_gap_fraction:rate2m) > on ({MODEL}) (0.1 + kilocopy:token_gap_in_flight:rate2m))"
          f" and on ({MODEL}) {served(TOKENS + ' offset 2m', 'count')}", "30s", "warning",
          "Client and servers count tokens of {{ $labels.model }} {{ $value | humanizePercentage }} apart: another client, or lost tokens.",
          "The client counts a request when it ends, the servers as they go. So over 2 min they may differ by what was in flight, and that is"
          " allowed on top of 10 % (a report of Ray's that comes 10 s late is 8 %). With that it holds on ramps too and needs no long stage: one of"
          " 1 min that loses a third fires as it ends. Not before the servers' counters are 2 min old: what they counted before their first report is not"
          " seen. Requests as long as the window leave nothing to tell: there the report's check, stage by stage and to the token, decides."),
    Alert("KilocopyIdlePaidFor",
          f"(kilocopy:server_copies == 0) and on ({MODEL}) (kilocopy:replicas > 0)"
          f" unless on ({MODEL}) (kilocopy:server_tokens_per_second:rate1m > 0)", "1m", "info",
          "The replicas of {{ $labels.model }} have run nothing for 2 minutes, and are paid for.",
          "No token for a minute, and that for a minute: 2 min. Pauses between stages are seconds, and no stage is awaited longer."),
    Alert("KilocopyGpuIdlePaidFor", "max_over_time(kilocopy:gpu_busy_fraction[1m]) < 0.01", "1m", "info",
          "GPU {{ $labels.device }} of {{ $labels.node }} has run nothing for 2 minutes, and is paid for.",
          "Each GPU for itself: one that no replica was placed on is idle while the others work. Under 1 % for a minute, and that for a minute;"
          " DCGM looks each 30 s by default, so two of its looks are in a minute."),
)  # fmt: skip


def document() -> dict[str, Any]:
    """The rules as Prometheus' rule file has them: one group, in which later rules use the values of earlier ones."""
    recorded = [{"record": rule.record, "expr": rule.expr} for rule in RULES]
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.why},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "kilocopy", "interval": "5s", "rules": recorded + alerts}]}


def text() -> str:
    """The rule file."""
    yaml, out = YAML(), io.StringIO()
    yaml.width = 10_000  # an expression on one line can be pasted into Prometheus
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(document(), out)
    return "# Written by `python -m kilocopy.rules` from kilocopy/rules.py: edit there.\n" + out.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Write the rule file, or check that it is as written here (exit code 1 where not)."""
    parser = argparse.ArgumentParser(prog="python -m kilocopy.rules", description="Prometheus rules.")
    parser.add_argument("--check", action="store_true")
    if parser.parse_args(argv).check:
        same = PATH.exists() and PATH.read_text(encoding="utf-8") == text()
        if not same:
            print(f"{PATH}: differs from kilocopy/rules.py; run `python -m kilocopy.rules`", file=sys.stderr)
        return 0 if same else 1
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
