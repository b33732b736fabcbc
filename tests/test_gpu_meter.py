"""The power meter's check: against a counter that steps every 100 ms as NVML's does, and a stand-in for nvidia-smi that says what a real one would."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.power import GpuMeter
from gpu import meter
from kilocopy import manifest
from kilocopy.problem import ProblemError

pytestmark = pytest.mark.alone

STEP_S = 0.1
WATTS = 400.0


class Nvml:
    """pynvml with one GPU that draws WATTS; its counter moves every 100 ms and is read at once, in mJ, as the real one's."""

    NVMLError = OSError

    def __init__(self, step_s: float = STEP_S, watts: float = WATTS) -> None:
        self._step_s, self._watts, self._born_s = step_s, watts, time.perf_counter()

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802  # pynvml's names
        return "GPU-0"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        steps = int((time.perf_counter() - self._born_s) / self._step_s)
        return 7_000_000 + round(1e3 * self._watts * steps * self._step_s)


def smi(folder: Path, watts: float = WATTS, *, fields: tuple[str, ...] = ("power.draw", "power.draw.instant"), first: str = "") -> list[str]:
    """A program that answers as nvidia-smi: one value for a query, or a line every --loop-ms; a field that it does not know is an error."""
    program = folder / "nvidia_smi.py"
    program.write_text(
        f"""
import sys, time
options = dict(part.split("=", 1) for part in sys.argv[1:] if "=" in part)
asked = options["--query-gpu"].split(",")
unknown = [field for field in asked if field not in {fields!r}]
if unknown:
    print(f'Field "{{unknown[0]}}" is not a valid field to query.')
    sys.exit(2)
assert options["--id"] == "GPU-0"
line = ", ".join("{watts:.2f}" for _ in asked)
if "--loop-ms" not in options:
    print(line)
    sys.exit(0)
print({first!r} or line, flush=True)
while True:
    print(line, flush=True)
    time.sleep(int(options["--loop-ms"]) / 1e3)
"""
    )
    return [sys.executable, str(program)]


def test_the_counters_step_is_measured() -> None:
    found = meter.steps(GpuMeter(Nvml(), 0).read_j, 1.3)
    assert 8 <= found.steps <= 13
    assert found.interval_p50_s == pytest.approx(STEP_S, rel=0.15)
    assert found.step_p50_j == pytest.approx(STEP_S * WATTS, rel=0.01)
    assert found.read_p50_s < 0.01


def test_a_counter_that_stands_still_has_no_step() -> None:
    with pytest.raises(ProblemError, match="moved 0 times"):
        meter.steps(lambda: 5.0, 0.1)


@pytest.mark.parametrize(("smi_watts", "agrees"), [(WATTS, True), (WATTS * 1.2, False)])
def test_both_ways_to_the_joules_are_compared(tmp_path: Path, smi_watts: float, agrees: bool) -> None:
    seen = meter.Smi("GPU-0", tmp_path / "smi.csv", smi(tmp_path, smi_watts))
    assert seen.fields == ("power.draw", "power.draw.instant")
    said = meter.check(GpuMeter(Nvml(), 0), seen, lambda: time.sleep(3.0), delay_s=0.5, steps_s=1.0, edge_s=1.0)
    assert said["seconds"] == pytest.approx(3.0, abs=0.3)
    assert said["mean_w"] == pytest.approx(WATTS, rel=0.06)  # two edges of a step each, of 3 s
    for way in said["nvidia_smi"].values():
        assert way["agrees"] is agrees
        assert way["joules"] == pytest.approx(smi_watts * said["seconds"], rel=0.01)
    assert said["counter"]["interval_p50_s"] == pytest.approx(STEP_S, rel=0.2)
    assert len((tmp_path / "smi.csv").read_text().splitlines()) > 20  # what it said is kept


def profiled(folder: Path, shift_s: float) -> meter.Smi:
    """What nvidia-smi says of a GPU that idles at 100 W, draws 400 W from 10 to 50 s, and idles again; `power.draw` is the mean of the second before."""
    times_s = np.arange(0, 60.01, 0.1)
    watts = np.where((times_s >= 10) & (times_s < 50), 400.0, 100.0)
    seen = meter.Smi("GPU-0", folder / "smi.csv", smi(folder))
    seen.times_s = (times_s + shift_s).tolist()
    seen.watts = {"power.draw": [float(watts[max(0, at - 9) : at + 1].mean()) for at in range(len(watts))], "power.draw.instant": watts.tolist()}
    return seen


@pytest.mark.parametrize(("shift_s", "agrees"), [(0.0, True), (5.0, False)])
def test_a_load_that_comes_and_goes_is_integrated_where_it_was(tmp_path: Path, shift_s: float, agrees: bool) -> None:
    """From 5 to 30 s the counter gained 5 s of 100 W and 20 s of 400 W; samples that lie 5 s off miss a quarter of the load."""
    said = meter.compare(5 * 100 + 20 * 400, profiled(tmp_path, shift_s), 5, 30)
    assert {field: way["agrees"] for field, way in said["nvidia_smi"].items()} == {"power.draw": agrees, "power.draw.instant": agrees}


def test_an_old_nvidia_smi_is_asked_for_what_it_has(tmp_path: Path) -> None:
    assert meter.Smi("GPU-0", tmp_path / "smi.csv", smi(tmp_path, fields=("power.draw",))).fields == ("power.draw",)


def test_without_nvidia_smi_or_without_power_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProblemError, match="reports no power"):
        meter.Smi("GPU-0", tmp_path / "smi.csv", smi(tmp_path, fields=()))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProblemError, match="not on the PATH"):
        meter.Smi("GPU-0", tmp_path / "smi.csv")


def test_lines_that_are_no_numbers_are_no_samples(tmp_path: Path) -> None:
    with meter.Smi("GPU-0", tmp_path / "smi.csv", smi(tmp_path, first="[N/A], [N/A]")) as seen:
        time.sleep(1.0)
    assert seen.watts["power.draw"]
    assert set(seen.watts["power.draw"]) == {WATTS}


def test_an_interval_that_nvidia_smi_did_not_see_is_refused(tmp_path: Path) -> None:
    with meter.Smi("GPU-0", tmp_path / "smi.csv", smi(tmp_path)) as seen:
        time.sleep(0.8)
    now_s = time.perf_counter()
    with pytest.raises(ProblemError, match="do not cover"):
        seen.joules("power.draw", now_s - 0.2, now_s + 5)


def test_the_drivers_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(nvmlInit=lambda: None, nvmlSystemGetCudaDriverVersion=lambda: 13010, nvmlSystemGetDriverVersion=lambda: "580.65.06")
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert manifest.gpu_driver() == "580.65.06 (CUDA 13.1)"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert manifest.gpu_driver() is None
