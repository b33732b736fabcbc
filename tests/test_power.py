"""The meter: packages and GPUs are found, counters only grow, a signal ends the record with a last sample."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import power, power_pages
from kilocopy import records

pytestmark = pytest.mark.alone

RANGE_UJ = 262_143_328_850


class FakeNvmlError(Exception):
    """Stands where pynvml.NVMLError does."""


def fake_nvml(energy_mj: dict[str, list[int] | None]) -> SimpleNamespace:
    """pynvml with one GPU per UUID; its counter gives the values in turn. None: a GPU without a counter."""
    uuids = list(energy_mj)

    def energy(handle: int) -> int:
        values = energy_mj[uuids[handle]]
        if values is None:
            raise FakeNvmlError("Not Supported")
        return values.pop(0) if len(values) > 1 else values[0]

    return SimpleNamespace(
        NVMLError=FakeNvmlError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: len(uuids),
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetUUID=lambda handle: uuids[handle],
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )  # fmt: skip


def no_nvml() -> SimpleNamespace:
    def refuse() -> None:
        raise FakeNvmlError("Library not found")

    return SimpleNamespace(NVMLError=FakeNvmlError, nvmlInit=refuse)


def zone(powercap: Path, name: str, label: str, energy_uj: int) -> Path:
    path = powercap / name
    path.mkdir(parents=True)
    (path / "name").write_text(label + "\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path


def test_only_whole_packages_are_meters(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "dram", 1)  # part of package-0
    zone(tmp_path, "intel-rapl:1", "psys", 1)  # the platform: counts the package again
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1)  # the same package by another door
    (tmp_path / "intel-rapl").mkdir()
    (meter,) = power.meters(tmp_path, no_nvml())
    assert (meter.device, meter.boundary, meter.read_j()) == ("rapl:intel-rapl:0", "host", 5.0)


def test_rapl_grows_across_wraps(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 1_000_000) / "energy_uj"
    (meter,) = power.meters(tmp_path, no_nvml())
    first_j = meter.read_j()
    readings_j = []
    for value_uj in (2_000_000, 7_000_000, 1_000_000):  # wraps before the first and before the last
        path.write_text(str(value_uj))
        readings_j.append(meter.read_j() - first_j)
    assert readings_j == pytest.approx([3.0, 8.0, 2.0 + RANGE_UJ / 1e6])


def test_gpus_count_millijoules_and_one_without_a_counter_is_left_out(tmp_path: Path) -> None:
    nvml = fake_nvml({"GPU-a": [1_000, 2_500], "GPU-old": None, "GPU-b": [4_000]})
    found = [(meter.device, meter.boundary, meter.read_j()) for meter in power.meters(tmp_path, nvml)]
    assert found == [("GPU-a", "gpu", 2.5), ("GPU-b", "gpu", 4.0)]


def test_a_signal_ends_the_record_with_a_last_sample(tmp_path: Path) -> None:
    path = zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 1_000_000) / "energy_uj"

    def burn_then_stop() -> None:
        path.write_text("3000000")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.5, burn_then_stop)
    timer.start()
    try:
        argv = [str(tmp_path), "--interval-s", "0.1", "--process", "power-x"]
        assert power.main(argv, tmp_path / "powercap", fake_nvml({"GPU-a": [1_000]})) == 0
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    rows = records.read(tmp_path, "energy").to_pylist()
    host_j = [row["energy_j"] for row in rows if row["boundary"] == "host"]
    assert host_j[0] == 1.0
    assert host_j[-1] == 3.0
    assert 4 <= len(host_j) <= 8
    assert {row["device"] for row in rows} == {"rapl:intel-rapl:0", "GPU-a"}


def test_a_killed_meter_loses_at_most_a_second(tmp_path: Path) -> None:
    zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 1)
    found, stop = power.meters(tmp_path / "powercap", no_nvml()), threading.Event()
    writer = records.Writer(tmp_path, "energy", "p")
    thread = threading.Thread(target=power.record, args=(lambda: power.sample(found, writer), writer, 0.1, stop))
    thread.start()
    time.sleep(1.6)
    on_disk = records.read(tmp_path, "energy").num_rows
    stop.set()
    thread.join()
    assert on_disk >= 6


def test_no_meter_is_one_sentence_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert power.main([str(tmp_path)], tmp_path / "none", no_nvml()) == 0
    assert capsys.readouterr().err == power.NO_METER + "\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interval_s", ["0", "nan"])
def test_a_bad_interval_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], interval_s: str) -> None:
    assert power.main([str(tmp_path), "--interval-s", interval_s], tmp_path, no_nvml()) == 2
    assert capsys.readouterr().err.startswith("--interval-s: must be")


def test_the_page_names_the_node_as_ray_does(tmp_path: Path) -> None:
    """The dashboards choose a node by the address in Ray's metrics: the meter's has to be the same one."""
    from ray._raylet import node_ip_address_from_perspective

    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    page = power.Page("r1")
    power.sample(power.meters(tmp_path, no_nvml()), records.Writer(tmp_path, "energy", "p"), page)
    family = next(iter(page.collect()))
    assert [sample.labels["ip"] for sample in family.samples] == [node_ip_address_from_perspective()]


def test_the_page_says_what_the_meters_said_and_drops_one_that_is_gone(tmp_path: Path) -> None:
    path = zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 1_000_000) / "energy_uj"
    found, page = power.meters(tmp_path / "powercap", fake_nvml({"GPU-a": [1_500]})), power.Page("r1")
    writer = records.Writer(tmp_path, "energy", "p")
    page.serve(tmp_path, "power-x", "127.0.0.1", 0)
    (target,) = json.loads((tmp_path / "targets/power-x.json").read_text())

    def seen() -> dict[tuple[str, str, str], float]:
        with urllib.request.urlopen(f"http://{target['targets'][0]}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        assert {sample.name for sample in samples} <= {"kilocopy_energy_joules_total", "kilocopy_energy_meters"}
        joules = [sample for sample in samples if sample.name == "kilocopy_energy_joules_total"]
        return {(s.labels["run"], s.labels["device"], s.labels["boundary"]): s.value for s in joules}

    assert seen() == {}  # nothing was read yet: no zero
    power.sample(found, writer, page)
    assert seen() == {("r1", "rapl:intel-rapl:0", "host"): 1.0, ("r1", "GPU-a", "gpu"): 1.5}
    path.unlink()
    power.sample(found, writer, page)
    assert seen() == {("r1", "GPU-a", "gpu"): 1.5}
    writer.close()


# ------------------------------------------------------------------------------------------------------------- other nodes


def node(folder: Path, ip: str, energy_uj: int | None, gpus: SimpleNamespace | None = None) -> str:
    """A node's page of power meters, as it is served there; returns its address."""
    if energy_uj is not None:
        zone(folder, "intel-rapl:0", "package-0", energy_uj)
    found, place = power.meters(folder, gpus or no_nvml()), power.here(ip, folder)
    page = power.Page("", lambda page: power.sample(found, None, page, place))
    power.on_page(page, place, found)
    return f"http://{page.listen('127.0.0.1', 0)}/metrics"


def collected(run_dir: Path, *urls: str) -> tuple[set[tuple[str, str, float]], list[tuple[str, int, int]], dict[tuple[str, str], float]]:
    """What one round brings home: rows, events, and what is on the run's own page, by boundary and address."""
    page, writer = power.Page("r1"), records.Writer(run_dir, "energy", "power-x")
    with power_pages.Pages(list(urls), run_dir, writer, page) as pages:
        until_s = time.monotonic() + 10
        while len(pages._told) < len(urls) and time.monotonic() < until_s:
            pages.take()
    writer.close()
    rows = {(row["node"], row["device"], row["energy_j"]) for row in records.read(run_dir, "energy").to_pylist()}
    told = [(event["node"], event["gpu"], event["host"]) for event in records.read_events(run_dir) if event["event"] == "meters"]
    series = {(s.labels["boundary"], s.labels["ip"]): s.value for s in next(iter(page.collect())).samples}
    return rows, sorted(told), series


def test_packages_of_one_name_on_two_nodes_stay_two(tmp_path: Path) -> None:
    urls = node(tmp_path / "a", "10.0.0.1", 5_000_000), node(tmp_path / "b", "10.0.0.2", 7_000_000)
    rows, told, series = collected(tmp_path, *urls)
    assert rows == {("10.0.0.1", "rapl:intel-rapl:0", 5.0), ("10.0.0.2", "rapl:intel-rapl:0", 7.0)}
    assert told == [("10.0.0.1", 0, 1), ("10.0.0.2", 0, 1)]
    assert series == {("host", "10.0.0.1"): 5.0, ("host", "10.0.0.2"): 7.0}


def test_one_counter_seen_by_two_pods_counts_once(tmp_path: Path) -> None:
    """Two pods of one host see its packages both, and a GPU that they share."""
    gpu = {"GPU-a": [1_000]}
    urls = node(tmp_path / "a", "10.0.0.1", 5_000_000, fake_nvml(dict(gpu))), node(tmp_path / "b", "10.0.0.2", None, fake_nvml(dict(gpu)))
    rows, _, _ = collected(tmp_path, *urls)
    assert len(rows) == 2
    assert {(device, joules) for _, device, joules in rows} == {("GPU-a", 1.0), ("rapl:intel-rapl:0", 5.0)}
    here = tmp_path / "same"
    again, _, _ = collected(here, node(here, "10.0.0.1", 5_000_000), _second_door(here, "10.0.0.2"))
    assert len(again) == 1


def _second_door(folder: Path, ip: str) -> str:
    """Another pod on the host of `folder`."""
    found, place = power.meters(folder, no_nvml()), power.here(ip, folder)
    page = power.Page("", lambda page: power.sample(found, None, page, place))
    power.on_page(page, place, found)
    return f"http://{page.listen('127.0.0.1', 0)}/metrics"


def test_nodes_without_a_meter_or_an_answer_are_told_and_the_rest_is_no_whole(tmp_path: Path) -> None:
    """On the run's page the hosts' joules get another name then: rules that want all hosts have no data, not too little."""
    urls = node(tmp_path / "a", "10.0.0.1", 5_000_000), node(tmp_path / "b", "10.0.0.2", None), "http://127.0.0.2:9/metrics"
    rows, told, series = collected(tmp_path, *urls)
    assert rows == {("10.0.0.1", "rapl:intel-rapl:0", 5.0)}
    assert told == [("10.0.0.1", 0, 1), ("10.0.0.2", 0, 0), ("127.0.0.2", 0, 0)]
    assert series == {(power.PART, "10.0.0.1"): 5.0}


def test_a_page_alone_is_served_without_a_run(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    command = [sys.executable, "-m", "cluster.power", "--page"]
    process = subprocess.Popen(command, env=os.environ | {power.POWERCAP: str(tmp_path)}, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith("power meters at http://127.0.0.1:")
        read = power_pages.read_page(said.split()[3].rstrip(":"))
        assert [joules for (_, device, _), joules in read.joules.items() if device == "rapl:intel-rapl:0"] == [5.0]
    finally:
        process.terminate()
        process.wait(20)
    assert process.returncode == 0
