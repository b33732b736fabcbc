"""The meter: packages and GPUs are found, counters only grow, a signal ends the record with a last sample."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import power
from kilocopy import records

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
    thread = threading.Thread(target=power.record, args=(found, records.Writer(tmp_path, "energy", "p"), 0.1, stop))
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
    (family,) = page.collect()
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
        (family,) = text_string_to_metric_families(text)
        assert {sample.name for sample in family.samples} <= {"kilocopy_energy_joules_total"}
        return {(s.labels["run"], s.labels["device"], s.labels["boundary"]): s.value for s in family.samples}

    assert seen() == {}  # nothing was read yet: no zero
    power.sample(found, writer, page)
    assert seen() == {("r1", "rapl:intel-rapl:0", "host"): 1.0, ("r1", "GPU-a", "gpu"): 1.5}
    path.unlink()
    power.sample(found, writer, page)
    assert seen() == {("r1", "GPU-a", "gpu"): 1.5}
    writer.close()
