"""The rules by Prometheus' own tools: each quantity against numbers worked by hand, and what is absent where data is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kilocopy import live, promql, rules

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)")

RUN = 'cluster="c",model="m",run="r"'
KEY = {"cluster": "c", "model": "m", "run": "r"}
MODEL = {"cluster": "c", "model": "m"}
ENGINE = 'cluster="c",model_name="m",ReplicaId='
SCALE = 1e9  # promtool compares bit by bit: values are compared as whole billionths
Series = dict[str, str]
Wanted = dict[str, list[tuple[dict[str, str], float]]]


def worker(name: str, number: int, values: str, labels: str = "") -> Series:
    return {f'{name}{{{RUN},worker="{number}"{labels}}}': values}


def driver() -> Series:
    """Two workers, 64 copies, 2,000 tokens/s, 1,000 words/s; owned: $1.8 a GPU and hour for 2 GPUs, $0.1/kWh, PUE 1.2. A sample each 5 s."""
    stage = ',stage="1"'
    found: Series = {}
    for number, copies in ((0, 30), (1, 34)):
        found |= worker("kilocopy_in_flight", number, f"{copies}x60")
        found |= worker("kilocopy_output_tokens_total", number, "0+5000x60", stage)
        found |= worker("kilocopy_requests_total", number, "0+50x60", f'{stage},outcome="ok"')
        found |= worker("kilocopy_output_words_total", number, "0+2500x60", stage)
        found |= worker("kilocopy_page_words", number, "500x60")
        found |= worker("kilocopy_devices", number, "2x60", ',kind="gpu"')
        found |= worker("kilocopy_usd_per_device_hour", number, "1.8x60", ',kind="owned"')
        found |= worker("kilocopy_electricity_usd_per_kwh", number, "0.1x60")
        found |= worker("kilocopy_pue", number, "1.2x60")
        found |= worker("kilocopy_slo_quantile", number, "0.9x60")
    return found


def meters() -> Series:
    """300 W and 200 W."""
    meter = '{run="r",node="n",boundary="gpu",device='
    return {f'kilocopy_energy_joules_total{meter}"a"}}': "7+1500x60", f'kilocopy_energy_joules_total{meter}"b"}}': "9+1000x60"}


def promtool(tmp_path: Path, series: Series, wanted: Wanted, at: str = "2m", alerts: Any = None) -> None:
    """`promtool test rules`; an empty list wants no data. The rules are those of the description, not of the file on the disk."""
    (tmp_path / "rules.yaml").write_text(rules.text())
    expressions = [
        {
            "expr": f"round({SCALE:g} * {expr})",
            "eval_time": at,
            "exp_samples": [
                {"labels": "{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}", "value": round(value * SCALE)}
                for labels, value in samples
            ],
        }
        for expr, samples in wanted.items()
    ]
    test = {
        "interval": "5s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": expressions,
        "alert_rule_test": alerts or [],
    }
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "5s", "tests": [test]}
    (tmp_path / "test.yaml").write_text(json.dumps(document))  # JSON is YAML
    done = subprocess.run(["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    terminal(series, wanted, at, alerts or [])


def terminal(series: Series, wanted: Wanted, at: str, alerts: list[dict[str, Any]]) -> None:
    """The same series, numbers and alerts to what the terminal view works out by itself (kilocopy/live.py): it must not differ."""
    points = {name: expanded(values) for name, values in series.items()}
    for time_s in sorted({seconds(at), *(seconds(each["eval_time"]) for each in alerts)}):
        samples = promql.Samples()
        group = live.RuleGroup(samples)
        for step in range(time_s // 5 + 1):
            for name, values in points.items():
                if step < len(values) and (value := values[step]) is not None:
                    metric, _, labels = name.removesuffix("}").partition("{")
                    samples.add(metric, frozenset(re.findall(r'(\w+)="([^"]*)"', labels)), 5 * step, value)
            group.step(5 * step)
        assert group.failed == {}
        if time_s == seconds(at):
            for expr, expected in wanted.items():
                found = {labels: round(SCALE * value) for labels, value in promql.evaluate(expr, samples, time_s).items()}
                assert found == {frozenset(labels.items()): round(SCALE * value) for labels, value in expected}, expr
        for each in alerts:
            if seconds(each["eval_time"]) == time_s:
                said = [(fired.labels | {"severity": fired.severity}, fired.said) for fired in group.alerts if fired.fires and fired.name == each["alertname"]]
                assert said == [(fires["exp_labels"], fires["exp_annotations"]["summary"]) for fires in each["exp_alerts"]]


def seconds(duration: str) -> int:
    return sum(int(number) * {"s": 1, "m": 60}[unit] for number, unit in re.findall(r"(\d+)([sm])", duration))


def expanded(notation: str) -> list[float | None]:
    """promtool's short form of a series: `a+bxn` and `axn` are n + 1 values, `_xn` is n without a value."""
    values: list[float | None] = []
    for part in notation.split():
        if part == "stale":
            values.append(promql.STALE)
        elif part.startswith("_x"):
            values += [None] * int(part[2:])
        elif repeated := re.fullmatch(r"([\d.]+)(?:\+([\d.]+))?x(\d+)", part):
            values += [float(repeated[1]) + n * float(repeated[2] or 0) for n in range(int(repeated[3]) + 1)]
        else:
            values.append(float(part))
    return values


def test_the_committed_file_is_as_described_and_prometheus_reads_it() -> None:
    assert rules.main(["--check"]) == 0
    done = subprocess.run(["promtool", "check", "rules", str(rules.PATH)], capture_output=True, text=True, check=False)
    assert f"{len(rules.RULES) + len(rules.ALERTS)} rules found" in done.stdout


def test_copies_speed_pages(tmp_path: Path) -> None:
    wanted: Wanted = {
        "kilocopy:copies": [(KEY, 30 + 34)],
        "kilocopy:copies:mean1m": [(KEY, 64)],
        "kilocopy:output_tokens_per_second:rate1m": [(KEY, 2 * 5000 / 5)],
        "kilocopy:tokens_per_second_per_copy:rate1m": [(KEY, 2000 / 64)],
        "kilocopy:tokens_per_second_per_device:rate1m": [(KEY, 2000 / 2)],
        "kilocopy:pages_per_second:rate1m": [(KEY, 2 * 2500 / 5 / 500)],
    }
    promtool(tmp_path, driver(), wanted)


def test_joules_and_dollars_of_owned_hardware(tmp_path: Path) -> None:
    wanted: Wanted = {
        "kilocopy:facility_watts:rate1m": [(KEY, (300 + 200) * 1.2)],
        "kilocopy:joules_per_page:rate1m": [(KEY, 600 / 2)],
        "kilocopy:joules_per_output_token:rate1m": [(KEY, 600 / 2000)],
        "kilocopy:wh_per_page:rate1m": [(KEY, 1 / 12)],
        "kilocopy:pages_per_kwh:rate1m": [(KEY, 12_000)],
        "kilocopy:electricity_usd_per_page:rate1m": [(KEY, 0.000008333)],  # 1/12 Wh at $0.1/kWh
        "kilocopy:hardware_usd_per_page:rate1m": [(KEY | {"kind": "owned"}, 0.0005)],  # 2 x $1.8 / 7,200 pages an hour
        "kilocopy:usd_per_page:rate1m": [(KEY, 0.000508333)],
        "kilocopy:pages_per_usd:rate1m": [(KEY, 1 / (0.0005 + 1 / 120_000))],
    }
    promtool(tmp_path, driver() | meters(), wanted)


def dcgm(metric: str, device: str, values: str, cluster: str = 'cluster="c",') -> Series:
    return {f'DCGM_FI_DEV_{metric}{{{cluster}Hostname="n",UUID="{device}",gpu="0",device="nvidia0"}}': values}


def test_dcgm_meters_gpus_that_kilocopy_does_not(tmp_path: Path) -> None:
    """300 W and 200 W by DCGM's counters of millijoules, or by its gauges of watts: the price of an owned page is whole."""
    joules = dcgm("TOTAL_ENERGY_CONSUMPTION", "a", "7+1500000x60") | dcgm("TOTAL_ENERGY_CONSUMPTION", "b", "9+1000000x60")
    watts = dcgm("POWER_USAGE", "a", "300x60") | dcgm("POWER_USAGE", "b", "200x60")
    wanted: Wanted = {
        "kilocopy:facility_watts:rate1m": [(KEY, (300 + 200) * 1.2)],
        "kilocopy:wh_per_page:rate1m": [(KEY, 1 / 12)],
        "kilocopy:usd_per_page:rate1m": [(KEY, 0.000508333)],
    }
    for series in (joules, watts, joules | dict.fromkeys(watts, "999x60")):  # the counter stands before the gauge
        promtool(tmp_path, driver() | series, wanted)
    parts = {name.replace("gpu=", f'GPU_I_ID="{part}",gpu='): values for name, values in joules.items() for part in "12"}
    promtool(tmp_path, driver() | parts, wanted)  # MIG repeats the whole GPU's for each part
    nothing: Wanted = {name: [] for name in wanted}
    one = {name: values for name, values in joules.items() if '"b"' not in name}
    promtool(tmp_path, driver() | one, nothing)
    promtool(tmp_path, driver() | {name.replace('cluster="c",', ""): values for name, values in joules.items()}, nothing)  # whose are they?
    promtool(tmp_path, driver() | {name.replace('"c"', '"d"'): values for name, values in joules.items()}, nothing)


def test_a_gpu_with_two_meters_is_counted_once_and_kilocopys_comes_first(tmp_path: Path) -> None:
    other = dcgm("TOTAL_ENERGY_CONSUMPTION", "a", "0+4500000x60") | dcgm("TOTAL_ENERGY_CONSUMPTION", "b", "0+1000000x60")
    wanted: Wanted = {"kilocopy:facility_watts:rate1m": [(KEY, 600)]}
    promtool(tmp_path, driver() | meters() | other, wanted)
    first = {name: values for name, values in meters().items() if '"a"' in name}
    both = [({"run": "r", "node": "n", "device": "a", "boundary": "gpu"}, 300.0), ({"cluster": "c", "node": "n", "device": "b", "boundary": "gpu"}, 200.0)]
    promtool(tmp_path, driver() | first | other, wanted | {"kilocopy:meter_watts:rate1m": both, "kilocopy:own_watts:rate1m": both[:1]})


def test_nodes_own_pages_count_where_no_run_reads_them(tmp_path: Path) -> None:
    """A node's page knows its cluster and no run; CPU packages on it may be a part of the hosts, and a part of a sum is none."""
    node = {name.replace('run="r"', 'cluster="c"'): values for name, values in meters().items()}
    node |= {'kilocopy_energy_joules_total{cluster="c",node="n",boundary="host",device="rapl:0"}': "0+500x60"}
    wanted: Wanted = {"kilocopy:facility_watts:rate1m": [(KEY, 600)]}
    promtool(tmp_path, driver() | node, wanted)
    promtool(tmp_path, driver() | node | meters(), wanted)
    part = {'kilocopy_energy_joules_total{run="r",node="n",boundary="some hosts",device="rapl:0"}': "0+500x60"}
    promtool(tmp_path, driver() | meters() | part, wanted)
    whole = {name.replace("some hosts", "host"): values for name, values in part.items()}
    promtool(tmp_path, driver() | meters() | whole, {"kilocopy:facility_watts:rate1m": [(KEY, (500 + 100) * 1.2)]})


def test_each_gpu_that_idles_is_told(tmp_path: Path) -> None:
    """By DCGM; by Ray's agent where DCGM does not know the cluster."""
    name = "KilocopyGpuIdlePaidFor"
    a, b = ({"cluster": "c", "node": "n", "device": device} for device in "ab")
    busy = dcgm("GPU_UTIL", "a", "90x60") | dcgm("GPU_UTIL", "b", "0x60") | dcgm("FB_USED", "a", "1024x60")
    of_ray = 'ray_node_gpus_utilization{cluster="c",ip="10.0.0.1",GpuIndex="0"}'
    wanted: Wanted = {"kilocopy:gpu_busy_fraction": [(a, 0.9), (b, 0)], "kilocopy:gpu_memory_bytes": [(a, 2.0**30)]}
    said = fires("info", b, "GPU b of n has run nothing for 2 minutes, and is paid for.")
    promtool(tmp_path, busy | {of_ray: "0x60"}, wanted, alerts=[alert(name, "2m", [said]), alert(name, "45s", [])])
    ray = {"cluster": "c", "node": "10.0.0.1", "device": "0"}
    said = fires("info", ray, "GPU 0 of 10.0.0.1 has run nothing for 2 minutes, and is paid for.")
    promtool(tmp_path, {of_ray: "0x60"}, {"kilocopy:gpu_busy_fraction": [(ray, 0)]}, alerts=[alert(name, "2m", [said])])
    promtool(tmp_path, {of_ray: "0x12 5 0x60"}, {}, alerts=[alert(name, "2m", [])])


COST = ("kilocopy:usd_per_page:rate1m", "kilocopy:wh_per_page:rate1m", "kilocopy:electricity_usd_per_page:rate1m", "kilocopy:pages_per_usd:rate1m")


@pytest.mark.parametrize("missing", ["all", "one", "gone"])
def test_a_missing_meter_is_no_data_and_no_zero(tmp_path: Path, missing: str) -> None:
    """No meter at all, one of two GPUs without, one that fell silent after 100 s: capital is known, the price of a page is not."""
    series = meters()
    second = next(name for name in series if '"b"' in name)
    series = {"all": {}, "one": {k: v for k, v in series.items() if k != second}, "gone": series | {second: "9+1000x19 stale"}}[missing]
    wanted: Wanted = {name: [] for name in COST}
    wanted["kilocopy:hardware_usd_per_page:rate1m"] = [(KEY | {"kind": "owned"}, 0.0005)]
    promtool(tmp_path, driver() | series, wanted)


def test_rent_has_no_electricity_on_top_and_needs_no_meter(tmp_path: Path) -> None:
    series = {name.replace('"owned"', '"rented"'): values for name, values in driver().items() if "usd_per_kwh" not in name}
    wanted: Wanted = {"kilocopy:usd_per_page:rate1m": [(KEY, 0.0005)], "kilocopy:electricity_usd_per_page:rate1m": []}
    promtool(tmp_path, series | meters(), wanted | {"kilocopy:wh_per_page:rate1m": [(KEY, 1 / 12)]})
    promtool(tmp_path, series, wanted | {"kilocopy:wh_per_page:rate1m": []})


def test_a_host_that_serves_itself_needs_its_own_meter(tmp_path: Path) -> None:
    series = {name.replace('kind="gpu"', 'kind="cpu"'): values for name, values in driver().items()}
    promtool(tmp_path, series | meters(), {"kilocopy:facility_watts:rate1m": []})  # GPUs' meters, and CPUs serve
    host = {'kilocopy_energy_joules_total{run="r",node="n",boundary="host",device="rapl:0"}': "0+500x60"}
    promtool(tmp_path, series | host, {"kilocopy:facility_watts:rate1m": [(KEY, 100 * 1.2)]})


def test_another_runs_meter_is_not_ours(tmp_path: Path) -> None:
    others = {name.replace('run="r"', 'run="other"'): values for name, values in meters().items()}
    promtool(tmp_path, driver() | others, {"kilocopy:facility_watts:rate1m": []})


def test_nothing_made_has_no_price(tmp_path: Path) -> None:
    """Copies in flight that have not made a page, and none in flight: no ratio is infinite, none is zero."""
    idle = {name: "0x60" if "output" in name or "in_flight" in name else values for name, values in driver().items()}
    wanted: Wanted = {name: [] for name in (*COST, "kilocopy:tokens_per_second_per_copy:rate1m", "kilocopy:hardware_usd_per_page:rate1m")}
    promtool(tmp_path, idle | meters(), wanted | {"kilocopy:pages_per_second:rate1m": [(KEY, 0)], "kilocopy:copies": [(KEY, 0)]})


def test_a_run_that_ended_stops_at_once(tmp_path: Path) -> None:
    """Its pages are gone at 100 s: nothing fades out over the minute that follows."""
    ended = {name: values.replace("x60", "x19") + " stale" for name, values in (driver() | meters()).items()}
    names = (*COST, "kilocopy:copies", "kilocopy:copies:mean1m", "kilocopy:output_tokens_per_second:rate1m", "kilocopy:pages_per_second:rate1m")
    promtool(tmp_path, ended, {name: [] for name in names}, at="105s")


def test_a_counter_that_starts_again_is_never_negative(tmp_path: Path) -> None:
    """30,000 words at 60 s, then 0 at 65 s and 27,500 at 120 s: 27,500 words in 60 s, 500 a page."""
    series = {name: "0+2500x12 0+2500x40" if "words_total" in name else values for name, values in driver().items()}
    promtool(tmp_path, series, {"kilocopy:pages_per_second:rate1m": [(KEY, 2 * 27_500 / 60 / 500)]})


def test_every_quantity_bears_counters_that_start_again(tmp_path: Path) -> None:
    """Driver, engines and meters start again at 65 s: of a minute's 12 steps the one across the restart is lost, of two minutes' 23 too; ratios hold.

    They begin at 5 s: no sample lies on the edge of two minutes, which Prometheus 2 counts in and 3 does not.
    """
    stage = ',stage="1"'
    series = driver() | engines() | meters() | dcgm("TOTAL_ENERGY_CONSUMPTION", "d", "5+750000x60")
    series |= worker("kilocopy_slo_judged_total", 0, "0+10x60", stage) | worker("kilocopy_slo_attained_total", 0, "0+8x60", stage)
    series |= worker("kilocopy_requests_total", 0, "0+10x60", f'{stage},outcome="http_429"')
    series |= worker("kilocopy_driver_cpu_seconds_total", 0, "0+3x60") | worker("kilocopy_stream_events_total", 0, "0+6000x60")
    for name in ("ttft", "inter_chunk", "send_lag", "loop_lag"):
        for edge, step in (("0.1", 5), ("0.2", 10), ("+Inf", 10)):
            series |= worker(f"kilocopy_{name}_seconds_bucket", 0, f"0+{step}x60", f'{stage if name != "loop_lag" else ""},le="{edge}"')

    def restarted(values: str) -> str:
        counter = re.fullmatch(r"(\d+)\+(\d+)x60", values)
        return f"_x1 {int(counter[1]) + int(counter[2])}+{counter[2]}x11 0+{counter[2]}x40" if counter else values

    again = {name: restarted(values) for name, values in series.items()}
    kept, two = 11 / 12, 22 / 23
    one, a, b = KEY | {"worker": "0"}, MODEL | {"ReplicaId": "a"}, MODEL | {"ReplicaId": "b"}
    watts = [({"run": "r", "node": "n", "device": device, "boundary": "gpu"}, kept * watts) for device, watts in (("a", 300), ("b", 200))]
    wanted: Wanted = {
        "kilocopy:output_tokens_per_second:rate1m": [(KEY, 2000 * kept)],
        "kilocopy:tokens_per_second_per_copy:rate1m": [(KEY, 2000 * kept / 64)],
        "kilocopy:tokens_per_second_per_device:rate1m": [(KEY, 1000 * kept)],
        "kilocopy:server_tokens_per_second:rate1m": [(MODEL, 2010 * kept)],
        "kilocopy:replica_tokens_per_second:rate1m": [(a, 1005 * kept), (b, 1005 * kept)],
        "kilocopy:replica_imbalance:rate1m": [(MODEL, 1)],
        "kilocopy:pages_per_second:rate1m": [(KEY, 2 * kept)],
        "kilocopy:own_watts:rate1m": watts,
        "kilocopy:meter_watts:rate1m": [*watts, ({"cluster": "c", "node": "n", "device": "d", "boundary": "gpu"}, 150 * two)],
        "kilocopy:facility_watts:rate1m": [(KEY, 1.2 * (500 * kept + 150 * two))],
        "kilocopy:joules_per_page:rate1m": [(KEY, 1.2 * (500 * kept + 150 * two) / (2 * kept))],
        "kilocopy:joules_per_output_token:rate1m": [(KEY, 1.2 * (500 * kept + 150 * two) / (2000 * kept))],
        "kilocopy:hardware_usd_per_page:rate1m": [(KEY | {"kind": "owned"}, 0.0005 / kept)],
        "kilocopy:slo_attained_fraction:rate1m": [(KEY, 0.8)],
        "kilocopy:error_fraction:rate1m": [(KEY, 10 / 110)],
        "kilocopy:ttft_seconds:p50": [(KEY, 0.1)],
        "kilocopy:ttft_seconds:p99": [(KEY, 0.198)],
        "kilocopy:inter_chunk_seconds:p50": [(KEY, 0.1)],
        "kilocopy:inter_chunk_seconds:p99": [(KEY, 0.198)],
        "kilocopy:driver_send_lag_seconds:p99": [(one, 0.198)],
        "kilocopy:driver_loop_lag_seconds:p99": [(one, 0.198)],
        "kilocopy:driver_cpu_fraction:rate1m": [(one, 0.6 * kept)],
        "kilocopy:driver_events_per_second:rate1m": [(one, 1200 * kept)],
        "kilocopy:token_gap_fraction:rate2m": [(MODEL, 10 / 2010)],
        "kilocopy:token_gap_in_flight:rate2m": [(MODEL, 64 * 100 / (120 * 2010 * two))],
    }
    promtool(tmp_path, again, wanted)


def engines(more: str = "") -> Series:
    """Two replicas with 2,010 tokens/s; b has no gauges: it is idle. `more` labels: Ray's, or none on vLLM's own pages."""
    found = {f'ray_vllm_generation_tokens_total{{{ENGINE}"{replica}"{more}}}': "0+5025x60" for replica in "ab"}
    found[f'ray_vllm_num_requests_running{{{ENGINE}"a"{more}}}'] = "40x60"
    found[f'ray_vllm_num_requests_waiting{{{ENGINE}"a"{more}}}'] = "3x60"
    found[f'ray_vllm_kv_cache_usage_perc{{{ENGINE}"a"{more}}}'] = "0.25x60"
    return found


RAYS = ',WorkerId="w"'


def test_servers_side_and_the_gap_to_the_client(tmp_path: Path) -> None:
    wanted: Wanted = {
        "kilocopy:server_copies": [(MODEL, 40)],
        "kilocopy:server_waiting": [(MODEL, 3)],
        "kilocopy:kv_cache_fraction:max": [(MODEL, 0.25)],
        "kilocopy:replicas": [(MODEL, 2)],
        "kilocopy:server_tokens_per_second:rate1m": [(MODEL, 2 * 5025 / 5)],
        "kilocopy:token_gap_fraction:rate2m": [(MODEL, 10 / 2010)],
        "kilocopy:token_gap_in_flight:rate2m": [(MODEL, 64 * 100 / (120 * 2010))],  # 64 copies, each 100 tokens, of those of two minutes
    }
    promtool(tmp_path, driver() | engines(), wanted)


def healthy(replica: str, values: str, more: str = ',model="m"') -> Series:
    return {f'ray_serve_deployment_replica_healthy{{cluster="c",deployment="LLMServer:m",replica="{replica}"{more}}}': values}


def test_a_dead_replica_does_not_count_though_its_counters_stay(tmp_path: Path) -> None:
    """As Ray's page has it: Serve says each 10 s what is healthy; b dies after 2 min, and c comes in its place at 3 min 30 s, never asked."""
    up = "1 stale " * 12
    series = engines(RAYS) | healthy("a", up * 3) | healthy("b", up + "0 stale") | healthy("c", "_x41 " + up)
    series |= {'ray_serve_deployment_replica_healthy{cluster="c",model="m",deployment="LLMRouter",replica="r"}': up * 3}
    of_one = [({**MODEL, "ReplicaId": "a"}, 1.0)]
    down = fires("critical", MODEL, "1 replicas of m are healthy, and there were more in the last 10 minutes.")
    for at, count, said in (("1m50s", 2, []), ("2m5s", 1, []), ("2m20s", 1, [down]), ("3m20s", 1, [down]), ("4m", 2, [])):
        wanted: Wanted = {"kilocopy:replicas": [(MODEL, count)]} | ({"kilocopy:replica_healthy": of_one} if count == 1 else {})
        promtool(tmp_path, series, wanted, at=at, alerts=[alert("KilocopyReplicaDown", at, said)])
    none = fires("critical", MODEL, "0 replicas of m are healthy, and there were more in the last 10 minutes.")
    dead = healthy("a", up + "0 stale") | healthy("b", up + "0 stale")
    page = {'up{job="servers",cluster="c",instance="i"}': "1x60"}
    for series in (dead | page, dead | page | engines(RAYS)):  # Serve is silent of the dead after a minute, and their counters stay
        for at in ("2m30s", "4m"):
            promtool(tmp_path, series, {"kilocopy:replicas": [(MODEL, 0)]}, at=at, alerts=[alert("KilocopyReplicaDown", at, [none])])
    promtool(tmp_path, dead | dict.fromkeys(page, "1x30 0x30"), {"kilocopy:replicas": []}, at="4m")


def test_a_replica_that_was_never_asked_is_there_and_idle(tmp_path: Path) -> None:
    """No counter before the first token: a fleet of two that nobody asked, then one of which all the work is one's."""
    both = healthy("a", "1x60") | healthy("b", "1x60")
    page = {'up{job="servers",cluster="c",instance="i"}': "1x60"}
    nothing = ("kilocopy:server_copies", "kilocopy:server_waiting", "kilocopy:kv_cache_fraction:max", "kilocopy:server_tokens_per_second:rate1m")
    idle: Wanted = {name: [(MODEL, 0)] for name in nothing} | {"kilocopy:replicas": [(MODEL, 2)], "kilocopy:replica_imbalance:rate1m": []}
    promtool(tmp_path, both | page, idle)
    asked = both | page | {name: values for name, values in engines(RAYS).items() if '"a"' in name}
    wanted: Wanted = {
        "kilocopy:replicas": [(MODEL, 2)],
        "kilocopy:server_copies": [(MODEL, 40)],
        "kilocopy:replica_tokens_per_second:rate1m": [(MODEL | {"ReplicaId": "a"}, 1005), (MODEL | {"ReplicaId": "b"}, 0)],
        "kilocopy:replica_imbalance:rate1m": [(MODEL, 2)],
    }
    promtool(tmp_path, asked, wanted, alerts=[alert("KilocopyReplicaDown", "2m", [])])
    even = both | page | engines(RAYS)
    promtool(tmp_path, even, {"kilocopy:replica_imbalance:rate1m": [(MODEL, 1)]})
    # Where a page does not answer, what a replica there counted is not known, and is no zero.
    cut = both | page | {'up{job="servers",cluster="c",instance="j"}': "0x60"}
    promtool(tmp_path, cut, {name: [] for name in nothing} | {"kilocopy:replicas": [(MODEL, 2)]})


def test_the_model_of_a_replica_is_the_targets_else_the_deployments(tmp_path: Path) -> None:
    for name, model in (("LLMServer:m", "m"), ("LLMServer:simulated:org--m-1_5", "org--m-1_5")):
        said = {name.join(('ray_serve_deployment_replica_healthy{cluster="c",deployment="', '",replica="a"}')): "1x60"}
        promtool(tmp_path, said, {"kilocopy:replicas": [({"cluster": "c", "model": model}, 1)]})
        told = {name.replace('",replica', '",model="org/m-1.5",replica'): values for name, values in said.items()}
        promtool(tmp_path, told, {"kilocopy:replicas": [({"cluster": "c", "model": "org/m-1.5"}, 1)]})


def test_a_serve_that_names_no_replica_counts_them_and_another_clusters_says_nothing(tmp_path: Path) -> None:
    nameless = {'ray_serve_deployment_replica_healthy{cluster="c",deployment="LLMServer:m",model="m"}': "3x60"}
    each = [(MODEL | {"ReplicaId": replica}, 1.0) for replica in "ab"]
    promtool(tmp_path, engines(RAYS) | nameless, {"kilocopy:replicas": [(MODEL, 3)], "kilocopy:replica_healthy": each})
    promtool(tmp_path, engines(RAYS), {"kilocopy:replicas": []})  # the page of Serve's controller is not read: nobody knows
    elsewhere = {name.replace('cluster="c"', 'cluster="d"'): values for name, values in healthy("a", "1x60").items()}
    promtool(tmp_path, engines() | elsewhere, {"kilocopy:replicas": [(MODEL, 2), (MODEL | {"cluster": "d"}, 1)]})


def test_gauges_that_vanish_when_idle_are_zero_only_beside_a_living_counter(tmp_path: Path) -> None:
    gauges = ("kilocopy:server_copies", "kilocopy:server_waiting", "kilocopy:kv_cache_fraction:max")
    idle = {name: values for name, values in engines().items() if "generation" in name}
    promtool(tmp_path, idle, {name: [(MODEL, 0)] for name in gauges})
    promtool(tmp_path, dict.fromkeys(idle, "0+1x19 stale"), {name: [] for name in gauges})


def test_gauges_that_blink_between_two_reports_are_no_zero(tmp_path: Path) -> None:
    """On the page each 15 s only, as from an agent that reports seldom; 2 min 5 s is between two."""
    running = next(name for name in engines() if "running" in name)
    promtool(tmp_path, engines() | {running: "40 " + "stale stale 40 " * 20}, {"kilocopy:server_copies": [(MODEL, 40)]}, at="2m5s")
    promtool(tmp_path, engines() | {running: "40x19 stale"}, {"kilocopy:server_copies": [(MODEL, 0)]}, at="2m5s")


def test_slo_errors_and_latency(tmp_path: Path) -> None:
    stage = ',stage="1"'
    series = worker("kilocopy_slo_judged_total", 0, "0+10x60", stage) | worker("kilocopy_slo_attained_total", 0, "0+8x60", stage)
    for outcome, step in (("ok", 9), ("http_429", 1), ("cancelled", 3)):
        series |= worker("kilocopy_requests_total", 0, f"0+{step}x60", f'{stage},outcome="{outcome}"')
    for edge, step in (("0.1", 5), ("0.15", 10), ("+Inf", 10)):
        series |= worker("kilocopy_ttft_seconds_bucket", 0, f"0+{step}x60", f'{stage},le="{edge}"')
    wanted: Wanted = {
        "kilocopy:slo_attained_fraction:rate1m": [(KEY, 0.8)],
        "kilocopy:error_fraction:rate1m": [(KEY, 0.1)],  # 1 of 9 + 1: who cancelled did not fail
        "kilocopy:ttft_seconds:p50": [(KEY, 0.1)],
        "kilocopy:ttft_seconds:p99": [(KEY, 0.1 + 0.05 * (9.9 - 5) / 5)],
    }
    promtool(tmp_path, series, wanted)
    fine = {name: values for name, values in series.items() if "429" not in name}
    promtool(tmp_path, fine, {"kilocopy:error_fraction:rate1m": [(KEY, 0)]})
    silent = dict.fromkeys(series, "0x60")
    promtool(tmp_path, silent, {name: [] for name in wanted})


def lags(fraction_late: float) -> Series:
    """100 probes a second, of which some woke 20 to 50 ms late and the others under 0.5 ms."""
    late = round(500 * fraction_late)
    counts = {"0.0005": 500 - late, "0.02": 500 - late, "0.05": 500, "+Inf": 500}
    return {k: v for edge, step in counts.items() for k, v in worker("kilocopy_loop_lag_seconds_bucket", 0, f"0+{step}x60", f',le="{edge}"').items()}


def alert(name: str, at: str, fires: list[dict[str, Any]]) -> dict[str, Any]:
    [why] = [each.why for each in rules.ALERTS if each.name == name]
    fires = [each | {"exp_annotations": each["exp_annotations"] | {"description": why}} for each in fires]
    return {"alertname": name, "eval_time": at, "exp_alerts": fires}


def fires(severity: str, labels: dict[str, str], summary: str) -> dict[str, Any]:
    return {"exp_labels": labels | {"severity": severity}, "exp_annotations": {"summary": summary}}


def test_a_driver_that_lags_says_so_unless_the_models_own_pace_is_slower(tmp_path: Path) -> None:
    said = fires("warning", KEY | {"worker": "0"}, "Worker 0 of run r is the limit, not the servers: use more workers, or a quieter host.")
    promtool(tmp_path, lags(0.02), {}, alerts=[alert("KilocopyDriverLimited", "2m", [said])])
    promtool(tmp_path, lags(0.001), {}, alerts=[alert("KilocopyDriverLimited", "2m", [])])
    gaps = {"1": 0, "2": 10, "+Inf": 10}  # 1.5 s a token: 35 ms are nothing
    slow = {k: v for e, n in gaps.items() for k, v in worker("kilocopy_inter_chunk_seconds_bucket", 0, f"0+{n}x60", f',stage="0",le="{e}"').items()}
    promtool(tmp_path, lags(0.02) | slow, {}, alerts=[alert("KilocopyDriverLimited", "2m", [])])
    busy = worker("kilocopy_driver_cpu_seconds_total", 0, "0+4.9x60")
    promtool(tmp_path, busy, {"kilocopy:driver_cpu_fraction:rate1m": [(KEY | {"worker": "0"}, 0.98)]}, alerts=[alert("KilocopyDriverLimited", "2m", [said])])


def test_alerts_of_slo_and_replicas(tmp_path: Path) -> None:
    stage = ',stage="1"'
    slo = worker("kilocopy_slo_judged_total", 0, "0+10x60", stage) | worker("kilocopy_slo_attained_total", 0, "0+8x60", stage)
    slo |= worker("kilocopy_slo_quantile", 0, "0.9x60")
    broken = fires("warning", KEY, "Only 80% of the streams of run r hold the SLO.")
    promtool(tmp_path, slo, {}, alerts=[alert("KilocopySloBroken", "2m30s", [broken])])
    held = slo | worker("kilocopy_slo_attained_total", 0, "0+9x60", stage)
    promtool(tmp_path, held, {}, alerts=[alert("KilocopySloBroken", "2m30s", [])])

    second = f'ray_vllm_generation_tokens_total{{{ENGINE}"b"}}'
    down = fires("critical", MODEL, "1 replicas of m are healthy, and there were more in the last 10 minutes.")
    promtool(tmp_path, engines() | {second: "0+5025x19 stale"}, {}, alerts=[alert("KilocopyReplicaDown", "2m30s", [down])])
    promtool(tmp_path, engines(), {}, alerts=[alert("KilocopyReplicaDown", "2m30s", [])])


def test_counters_that_disagree_are_told_within_a_short_stage(tmp_path: Path) -> None:
    """From 3 min on engine b makes twice as many tokens, of which the client sees half; for good, or for a stage of one minute."""
    name, b = "KilocopyCountersDisagree", f'ray_vllm_generation_tokens_total{{{ENGINE}"b"}}'
    sound = {key: values.replace("x60", "x200") for key, values in (driver() | engines()).items()}
    promtool(tmp_path, sound, {}, at="10m", alerts=[alert(name, "10m", [])])
    for values, at, apart in (
        ("0+5025x36 190950+10050x150", "5m", "33.67%"),  # (3,015 - 2,000) / 3,015
        # Half of the window; no sample lies on its edge, which Prometheus 2 counts in and 3 does not: (1,005 + 175,875 / 115 - 2,000) of the servers'.
        ("0+5025x25 _x1 135675+5025x9 190950+10050x11 306525+5025x150", "4m10s", "21.08%"),
    ):
        said = fires("warning", MODEL, f"Client and servers count tokens of m {apart} apart: another client, or lost tokens.")
        promtool(tmp_path, sound | {b: values}, {}, at=at, alerts=[alert(name, at, [said])])


def test_counters_may_differ_by_what_is_in_flight_and_while_they_are_young(tmp_path: Path) -> None:
    """64 requests of 40 s and 1,250 tokens begin at once at 3 min: a minute later the servers count three times what the client does."""
    name, b = "KilocopyCountersDisagree", f'ray_vllm_generation_tokens_total{{{ENGINE}"b"}}'
    stage = ',stage="1"'
    series = {f'ray_vllm_generation_tokens_total{{{ENGINE}"{replica}"}}': "0x36 5025+5025x160" for replica in "ab"}
    for number in (0, 1):
        series |= worker("kilocopy_in_flight", number, "0x36 32x160")
        series |= worker("kilocopy_output_tokens_total", number, "0x44 5000+5000x150", stage)
        series |= worker("kilocopy_requests_total", number, "0x44 4+4x150", f'{stage},outcome="ok"')
    gap: Wanted = {"kilocopy:token_gap_fraction:rate2m": [(MODEL, 1 - 2000 * 20 / (2010 * 60))]}
    promtool(tmp_path, series, gap, at="4m", alerts=[alert(name, at, []) for at in ("3m35s", "4m", "5m30s")])
    # Before the first report of Ray's nothing of what the engines counted is seen.
    young = {key: f"_x48 {values.replace('x60', 'x150')}" for key, values in (driver() | engines() | {b: "0+10050x60"}).items()}
    said = fires("warning", MODEL, "Client and servers count tokens of m 33.67% apart: another client, or lost tokens.")
    promtool(tmp_path, young, {}, at="5m50s", alerts=[alert(name, "5m50s", []), alert(name, "7m", [said])])


def test_an_idle_fleet_is_told_after_two_minutes(tmp_path: Path) -> None:
    name = "KilocopyIdlePaidFor"
    said = fires("info", MODEL, "The replicas of m have run nothing for 2 minutes, and are paid for.")
    busy = {name: values.replace("x60", "x200") for name, values in engines().items()}
    promtool(tmp_path, busy, {}, at="10m", alerts=[alert(name, "10m", [])])
    rested = {name: "0+5025x60 301500x100" for name in busy if "generation" in name}  # nothing after 5 min
    promtool(tmp_path, rested, {}, at="6m30s", alerts=[alert(name, "6m30s", [])])
    promtool(tmp_path, rested, {}, at="7m15s", alerts=[alert(name, "7m15s", [said])])
    asked = healthy("a", "1x200") | {'up{job="servers",cluster="c",instance="i"}': "1x200"}
    promtool(tmp_path, asked, {}, at="2m", alerts=[alert(name, "2m", [said])])  # never asked
    promtool(tmp_path, asked | healthy("a", "0x200"), {}, at="2m", alerts=[alert(name, "2m", [])])  # nothing is there to pay for


def test_pages_that_went_and_pages_that_never_came(tmp_path: Path) -> None:
    """The only page dies; one of two dies; one never answers; a driver drives a cluster of which no page is named."""
    cluster = {"cluster": "c"}
    page = 'up{job="servers",cluster="c",model="m",instance="h:1"}'
    gone = fires("critical", cluster, "No metrics page of the servers of c answers any more, and one did: they are down, or cut off.")
    never = fires("warning", cluster, "No metrics page of the servers of c has answered yet: none is named (--metrics), or its address is wrong.")
    one = fires("warning", cluster | {"job": "servers", "model": "m", "instance": "h:1"},
                "The metrics page h:1 of c does not answer, others do: what its replicas count is missing.")  # fmt: skip

    def told(series: Series, at: str, **said: dict[str, Any]) -> None:
        names = {"gone": "KilocopyServersGone", "never": "KilocopyServersNeverSeen", "one": "KilocopyServerPageDown"}
        promtool(tmp_path, series, {}, at=at, alerts=[alert(name, at, [said[key]] if key in said else []) for key, name in names.items()])

    died = {page: "1x20 0x200"}
    told(died, "1m40s")
    told(died, "2m15s", gone=gone)
    told(died, "15m", gone=gone)  # for as long as it is named
    told({page: "1x20 stale"}, "2m15s", gone=gone)  # as on Kubernetes, where a pod's page goes with it
    told({page: "1x20 stale"}, "13m")
    driven = {page: "1x20 stale", f'kilocopy_in_flight{{{RUN},worker="0"}}': "4x200"}
    told(driven, "13m", gone=gone)
    promtool(tmp_path, driven, {"kilocopy:server_pages": [], "kilocopy:server_pages_seen": [(cluster, 1)]}, at="13m")
    told({page: "0x200"}, "30s")
    told({page: "0x200"}, "2m", never=never)
    promtool(tmp_path, {page: "0x200"}, {"kilocopy:server_pages": [(cluster, 0)], "kilocopy:server_pages_seen": []})
    told({name: values for name, values in driven.items() if name != page}, "2m", never=never)
    other = {'up{job="servers",cluster="c",model="m",instance="h:2"}': "1x200"}
    told(died | other, "2m15s", one=one)
    promtool(tmp_path, died | other, {"kilocopy:server_pages": [(cluster, 1)]}, at="2m15s")
    told({'up{job="kilocopy",instance="h:3"}': "1x20 0x200"}, "3m")  # a driver that has ended


def test_the_driver_by_its_workers(tmp_path: Path) -> None:
    series = worker("kilocopy_stream_events_total", 0, "0+50000x60") | worker("kilocopy_stream_events_total", 1, "0+40000x60")
    for edge, step in (("0.005", 50), ("0.01", 100), ("+Inf", 100)):
        series |= worker("kilocopy_send_lag_seconds_bucket", 1, f"0+{step}x60", f',stage="0",le="{edge}"')
        series |= worker("kilocopy_inter_chunk_seconds_bucket", 1, f"0+{step}x60", f',stage="0",le="{edge}"')
    wanted: Wanted = {
        "kilocopy:driver_events_per_second:rate1m": [(KEY | {"worker": "0"}, 10_000), (KEY | {"worker": "1"}, 8_000)],
        "kilocopy:driver_send_lag_seconds:p99": [(KEY | {"worker": "1"}, 0.005 + 0.005 * 49 / 50)],
        "kilocopy:driver_loop_lag_seconds:p99": [(KEY | {"worker": "0"}, 0.02 + 0.03 * 5 / 10)],
        "kilocopy:inter_chunk_seconds:p50": [(KEY, 0.005)],
        "kilocopy:inter_chunk_seconds:p99": [(KEY, 0.005 + 0.005 * 49 / 50)],
    }
    promtool(tmp_path, series | lags(0.02), wanted)


def test_every_quantity_and_alert_is_tested_here() -> None:
    here = Path(__file__).read_text()
    names = [rule.record for rule in rules.RULES] + [alert.name for alert in rules.ALERTS]
    assert [name for name in names if f'"{name}"' not in here] == []
