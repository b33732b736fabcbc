"""Prices against examples worked by hand: a change of any formula fails here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilocopy import price
from kilocopy.recompute import summarise
from kilocopy.recording import Meters
from kilocopy.references import REFERENCES
from kilocopy.spec import Quoted, Spec
from kilocopy.summary import Band, Cost, Overhang, Ratio, Window
from tests import synthetic
from tests.summaries import good
from tests.synthetic import ideal, quoted

WINDOW = Window(start_s=10, end_s=20, duration_s=10, rule="a test")
OWNED = {
    "kind": "owned",
    "usd_per_device": quoted(17_520.0, 8_760.0, 35_040.0),
    "residual_fraction": 0.5,
    "life_years": 4,
    "utilisation": 0.5,
}


def prices(**changes: Any) -> dict[str, Any]:
    """Owned hardware: 17,520 x 0.5 / (8760 x 4 x 0.5) = $0.5 a device-hour; 0.25 at the low end, 1 at the high end."""
    tree = {"hardware": OWNED, "electricity_usd_per_kwh": quoted(0.1), "pue": quoted(1.25)}
    return tree | changes


def costed(path: Path, **changes: Any) -> Cost:
    """The cost of the ideal stage: 20 s, 2 GPUs, 0.8 pages, 800 tokens, 500 W in all: 10,000 J, 12,500 J with PUE."""
    cost = summarise(ideal(path, synthetic.spec(**changes))).stages[0].cost
    assert cost is not None
    return cost


def mid(band: Band | None) -> float:
    assert band is not None
    return band.mid


def ends(band: Band | None) -> tuple[float | None, float, float | None]:
    assert band is not None
    return band.low, band.mid, band.high


def meters(*readings: tuple[float, str, str, float], node: str = "n") -> Meters:
    times_s, devices, boundaries, joules = zip(*readings, strict=True) if readings else ((), (), (), ())
    return Meters(
        np.array(times_s, dtype=np.float64),
        np.array(devices, dtype=object),
        np.array(boundaries, dtype=object),
        np.array(joules, dtype=np.float64),
        np.array([node] * len(readings), dtype=object),
    )


def both(one: Meters, other: Meters, **counted: tuple[int, int]) -> Meters:
    """The meters of two nodes, and how many were found on each that was asked."""
    columns = ("time_s", "device", "boundary", "energy_j", "node")
    return Meters(*(np.concatenate([getattr(one, name), getattr(other, name)]) for name in columns), counted)


# ----------------------------------------------------------------------------------------------------------------- energy


def test_an_interval_of_a_ratio() -> None:
    """Where joules follow tokens there is no spread; where they do not, the interval is near 1.96 standard errors of the ratio."""
    draw = np.random.default_rng(5)
    tokens = draw.uniform(50, 150, 200)
    assert price.ratio_interval(3 * tokens, tokens) == pytest.approx((3, 3))
    joules = 3 * tokens + draw.normal(0, 30, 200)
    ratio = joules.sum() / tokens.sum()
    error = np.sqrt(((joules - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert price.ratio_interval(joules, tokens) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), rel=0.02)
    assert price.ratio_interval(joules, tokens) == price.ratio_interval(joules, tokens)


def test_measured_energy_has_an_interval_where_the_window_is_long_enough(tmp_path: Path) -> None:
    """40 s at 500 W: no spread in the joules, a little in the tokens at the blocks' edges; 20 s are too short for a meter."""
    stages = [{"arrival": "closed", "copies": 4, "duration_s": seconds, "warmup_s": 1, "ramp_s": 1} for seconds in (40, 20)]
    run, at_s = synthetic.Run(tmp_path, synthetic.spec(stages=stages)), 0.0
    for index, asks_s in enumerate((42.0, 22.0)):
        at_s = run.stage(index, at_s, asks_s) + 1
    for second in range(int(at_s) + 2):
        run.meter(second, 200 * second)
        run.meter(second, 300 * second, device="GPU-b")
    long, short = (stage.cost for stage in summarise(run.end(at_s)).stages)
    assert long is not None
    assert short is not None
    found = long.wh_per_page_measured
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.value == mid(long.wh_per_page)
    assert 0.98 * found.value < found.low <= found.value <= found.high < 1.02 * found.value
    assert short.wh_per_page_measured is None


def test_measured_energy_by_hand(tmp_path: Path) -> None:
    cost = costed(tmp_path)
    assert (cost.energy_source, cost.energy_boundary) == ("measured", "gpu × PUE")
    assert mid(cost.facility_j) == pytest.approx(12_500)
    assert mid(cost.wh_per_page) == pytest.approx(12_500 / 3600 / 0.8)
    assert mid(cost.pages_per_kwh) == pytest.approx(1000 / (12_500 / 3600 / 0.8))
    assert mid(cost.j_per_output_token) == pytest.approx(12_500 / 800)
    assert mid(cost.electricity_usd_per_page) == pytest.approx(12_500 / 3.6e6 * 0.1 / 0.8)


def test_the_counter_is_interpolated_at_the_edges() -> None:
    """Readings at 9, 11, 19, 21 s of 0, 20, 100, 140 J: 10 J at 10 s and 120 J at 20 s."""
    found = price.metered_j(meters((9, "a", "gpu", 0), (11, "a", "gpu", 20), (19, "a", "gpu", 100), (21, "a", "gpu", 140)), WINDOW)
    assert found == {("gpu", "n", "a"): pytest.approx(110)}


HOST_A, HOST_B = (9, "rapl:intel-rapl:0", "host", 0.0), (21, "rapl:intel-rapl:0", "host", 1200.0)


def test_packages_of_one_name_on_two_hosts_are_two_meters() -> None:
    """100 W on each for 10 s; counters that stand elsewhere do not mix."""
    other = meters((9, "rapl:intel-rapl:0", "host", 7e6), (21, "rapl:intel-rapl:0", "host", 7e6 + 1200), node="b")
    spec = Spec.model_validate(synthetic.spec(cluster={"replicas": 2, "hardware": {"kind": "cpu"}}))
    found = price.energy(spec, both(meters(HOST_A, HOST_B, node="a"), other, a=(0, 1), b=(0, 1)), WINDOW)
    assert found.facility_j is not None
    assert found.facility_j("mid") == pytest.approx(2 * 1000 * 1.25)
    assert found.sentence.startswith("Energy of 2 meters (host) on 2 nodes in the window")


def test_a_node_without_a_meter_is_named_and_nothing_is_measured() -> None:
    cpu = Spec.model_validate(synthetic.spec(cluster={"replicas": 2, "hardware": {"kind": "cpu"}}))
    one = both(meters(HOST_A, HOST_B, node="a"), meters(), a=(0, 1), b=(0, 0))
    assert price.energy(cpu, one, WINDOW).sentence == "Energy not measured: b had no meter of the host."
    gpus = both(meters((9, "x", "gpu", 0), (21, "x", "gpu", 9), node="a"), meters(), a=(1, 0), b=(0, 0))
    assert "1 of 2 GPUs had a meter, none on b" in price.energy(Spec.model_validate(synthetic.spec()), gpus, WINDOW).sentence


def test_a_host_without_a_meter_beside_metered_gpus_is_said_to_be_left_out() -> None:
    readings = [(t, name, "gpu", t * 10.0) for name in "xy" for t in (9, 21)]
    found = price.energy(Spec.model_validate(synthetic.spec()), both(meters(*readings, HOST_A, HOST_B, node="a"), meters(), a=(2, 1), b=(0, 0)), WINDOW)
    assert found.source == "measured"
    assert "; b had no meter of the host, whose CPUs and memory are not in it" in found.sentence


def test_a_node_that_died_in_the_window_is_named() -> None:
    gone = meters(HOST_A, (15, "rapl:intel-rapl:0", "host", 600), node="b")
    cpu = Spec.model_validate(synthetic.spec(cluster={"replicas": 2, "hardware": {"kind": "cpu"}}))
    found = price.energy(cpu, both(meters(HOST_A, HOST_B, node="a"), gone, a=(0, 1), b=(0, 1)), WINDOW)
    assert found.sentence == "Energy not measured: the meter of rapl:intel-rapl:0 on b does not cover the whole window."
    before = replace(both(meters(HOST_A, HOST_B, node="a"), gone, a=(0, 1), b=(0, 1)), lost_s={"b": 9.5})  # died before the window: no part of it
    assert price.energy(cpu, before, WINDOW).sentence.startswith("Energy of 1 meter (host) in the window")


def test_a_meter_that_began_again_at_zero() -> None:
    found = price.metered_j(meters((10, "a", "gpu", 500), (15, "a", "gpu", 600), (20, "a", "gpu", 50)), WINDOW)
    assert found == {("gpu", "n", "a"): pytest.approx(150)}


@pytest.mark.parametrize("readings", [[(11, "a", "gpu", 0), (21, "a", "gpu", 9)], [(9, "a", "gpu", 0), (19, "a", "gpu", 9)]])
def test_a_meter_that_misses_an_edge_measures_nothing(readings: list[tuple[float, str, str, float]]) -> None:
    assert price.metered_j(meters(*readings), WINDOW) == "the meter of a does not cover the whole window"


def test_a_gpu_without_a_meter_is_not_left_out_silently() -> None:
    spec = Spec.model_validate(synthetic.spec())
    found = price.energy(spec, meters((9, "a", "gpu", 0), (21, "a", "gpu", 9)), WINDOW)
    assert found.source == "not_measured"
    assert "1 of 2 GPUs had a meter" in found.sentence


def test_gpus_that_did_not_serve_are_named() -> None:
    spec = Spec.model_validate(synthetic.spec())
    readings = [(t, name, "gpu", t * 10.0) for name in "abc" for t in (9, 21)]
    assert "1 of the metered GPUs did not serve" in price.energy(spec, meters(*readings), WINDOW).sentence


def test_host_and_gpu_are_summed_under_their_name() -> None:
    """(100 + 100 + 300) J x 1.25."""
    spec = Spec.model_validate(synthetic.spec())
    readings = [(t, n, b, (t - 10) * w) for n, b, w in (("a", "gpu", 10), ("b", "gpu", 10), ("rapl", "host", 30)) for t in (9, 21)]
    found = price.energy(spec, meters(*readings), WINDOW)
    assert (found.source, found.boundary) == ("measured", "gpu+host × PUE")
    assert found.facility_j is not None
    assert found.facility_j("mid") == pytest.approx(625)


def test_cpu_replicas_need_a_meter_of_the_host() -> None:
    spec = Spec.model_validate(synthetic.spec(cluster={"replicas": 2, "hardware": {"kind": "cpu"}}))
    found = price.energy(spec, meters((9, "a", "gpu", 0), (21, "a", "gpu", 9)), WINDOW)
    assert (found.source, found.facility_j) == ("not_measured", None)
    assert "the host had no meter" in found.sentence


def test_assumed_power_is_marked_and_banded() -> None:
    """100 W (50..200) x 10 s x PUE 1.25 (1.1..1.5): 1,250 J (550..3,000)."""
    stated = prices(assumed_power_w=quoted(100, 50, 200), pue=quoted(1.25, 1.1, 1.5))
    found = price.energy(Spec.model_validate(synthetic.spec(prices=stated)), meters(), WINDOW)
    assert (found.source, found.boundary) == ("assumed", "facility")
    assert found.facility_j is not None
    assert ends(price.banded(found.facility_j)) == pytest.approx((550, 1250, 3000))
    assert "assumed, not measured" in found.sentence


# ------------------------------------------------------------------------------------------------------------------ money


def test_rent_by_hand(tmp_path: Path) -> None:
    """$2 / 0.5 x 2 GPUs x 20 s / 3600 / 0.8 pages, and no electricity on top."""
    cost = costed(tmp_path)
    assert mid(cost.usd_per_page) == pytest.approx(4 * 2 * 20 / 3600 / 0.8)
    assert cost.usd_per_page == cost.hardware_usd_per_page
    assert mid(cost.usd_per_m_output_tokens) == pytest.approx(4 * 2 * 20 / 3600 / 800 * 1e6)
    assert mid(cost.pages_per_usd) == pytest.approx(18)
    assert "in the rent" in cost.sentence


def test_owned_by_hand(tmp_path: Path) -> None:
    cost = costed(tmp_path, prices=prices())
    hardware, power = 0.5 * 2 * 20 / 3600 / 0.8, 12_500 / 3.6e6 * 0.1 / 0.8
    assert mid(cost.hardware_usd_per_page) == pytest.approx(hardware)
    assert mid(cost.usd_per_page) == pytest.approx(hardware + power)
    assert ends(cost.usd_per_page) == pytest.approx((hardware / 2 + power, hardware + power, 2 * hardware + power))
    assert ends(cost.pages_per_usd) == pytest.approx((1 / (2 * hardware + power), 1 / (hardware + power), 1 / (hardware / 2 + power)))


def test_opex_is_added_per_device_hour(tmp_path: Path) -> None:
    cost = costed(tmp_path, prices=prices(hardware=OWNED | {"opex_usd_per_device_hour": quoted(0.25)}))
    assert mid(cost.hardware_usd_per_page) == pytest.approx((0.5 + 0.25 / 0.5) * 2 * 20 / 3600 / 0.8)


def test_without_energy_the_price_says_that_electricity_is_missing() -> None:
    tree = synthetic.spec(prices=prices())
    stage = _stage_without_meter(tree)
    assert stage.electricity_usd_per_page is None
    assert stage.wh_per_page is None
    assert stage.usd_per_page == stage.hardware_usd_per_page
    assert "electricity is not in it" in stage.sentence
    assert "not measured" in stage.sentence


def _stage_without_meter(tree: dict[str, Any]) -> Cost:
    cost = price.cost(Spec.model_validate(tree), good().stages[0], meters())
    assert cost is not None
    return cost


def test_without_a_band_there_are_no_ends(tmp_path: Path) -> None:
    assert ends(costed(tmp_path).usd_per_page)[::2] == (None, None)


def test_prices_are_listed_with_source_and_date() -> None:
    spec = Spec.model_validate(synthetic.spec(prices=prices(assumed_power_w=quoted(100))))
    listed = {entry["name"]: entry for entry in price.prices_used(spec)}
    assert set(listed) == {"usd_per_device", "electricity_usd_per_kwh", "pue", "assumed_power_w"}
    assert listed["usd_per_device"] == {
        "name": "usd_per_device", "unit": "$", "value": 17520.0, "low": 8760.0, "high": 35040.0,
        "source": "assumed: a test", "date": "2026-01-02",
    }  # fmt: skip


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 1e5), st.floats(0.01, 1))
def test_halving_the_price_halves_the_cost(usd: float, utilisation: float) -> None:
    def cost(value: float) -> Cost:
        hardware = {"kind": "rented", "usd_per_device_hour": quoted(value), "utilisation": utilisation}
        return _stage_without_meter(synthetic.spec(prices=prices(hardware=hardware)))

    assert mid(cost(usd / 2).usd_per_page) == pytest.approx(mid(cost(usd).usd_per_page) / 2)
    assert mid(cost(usd / 2).pages_per_usd) == pytest.approx(mid(cost(usd).pages_per_usd) * 2)


@settings(deadline=None)
@given(st.floats(0.001, 1e6), st.floats(0, 1), st.floats(1, 10), st.floats(0.1, 1e6))
def test_bands_are_ordered(value: float, down: float, up: float, numerator: float) -> None:
    stated = Quoted.model_validate(quoted(value, value * down, value * up))
    band = price.banded(lambda corner: price.at(stated, corner))
    for one in (band, price.inverse(band, numerator)):
        if one is not None and one.low is not None and one.high is not None:
            assert one.low <= one.mid <= one.high


# ---------------------------------------------------------------------------------------------------------- the overhang

PUBLISHED = {
    "kind": "published", "source": "a model card", "date": "2024-07-23", "flops": 4e12, "gpu_hours": 1000, "gpu_type": "H100",
    "gpus": 16, "energy_j": 1e9, "usd_per_gpu_hour": quoted(2.0, 1.0, 4.0),
}  # fmt: skip
MEASURED = {"wall_s": 7200.0, "flops": 1e15, "energy_j": 3.6e6, "tokens": 10, "parameters": 1e6}


def overhang_of(path: Path, training: dict[str, Any], recorded: Any = None, **changes: Any) -> Overhang:
    model = {"id": "toy", "source": "/nowhere", "parameters_active": 1e6, "training": training}
    found = summarise(ideal(path, synthetic.spec(model=model, **changes), training=recorded)).overhang
    assert found is not None
    return found


def ratio(found: Overhang, name: str) -> Ratio:
    return next(ratio for ratio in found.ratios if ratio.name == name)


def test_published_training_by_hand(tmp_path: Path) -> None:
    """A page: $ 5/90, 15,625 J, 1,000 tokens of 2e6 FLOPs, 2 x 20 / 3600 / 0.8 = 1/72 device-hours."""
    found = overhang_of(tmp_path, PUBLISHED)
    usd_per_page = 4 * 2 * 20 / 3600 / 0.8
    assert ends(ratio(found, "usd").ratio_pages) == pytest.approx((1000 / usd_per_page, 2000 / usd_per_page, 4000 / usd_per_page))
    assert mid(ratio(found, "energy").ratio_pages) == pytest.approx(1e9 / 15_625)
    assert mid(ratio(found, "flop").ratio_pages) == pytest.approx(4e12 / (2 * 1e6 * 1000))
    assert mid(ratio(found, "gpu_hours").ratio_pages) == pytest.approx(1000 * 72)
    assert ratio(found, "gpu_hours").training_unit == "H100-hours"
    assert found.ratio_unit == "pages of 500 words"


def test_n_cluster(tmp_path: Path) -> None:
    """16 training GPUs / 2 serving GPUs x N_SLO of 4."""
    assert overhang_of(tmp_path, PUBLISHED).n_cluster == pytest.approx(32)


def test_measured_training_by_hand(tmp_path: Path) -> None:
    """2 device-hours at $4 rent; 3.6 MJ x PUE 1.25 against 15,625 J a page."""
    found = overhang_of(tmp_path, {"kind": "measured"}, MEASURED)
    assert ratio(found, "usd").training == pytest.approx(8)
    assert mid(ratio(found, "usd").ratio_pages) == pytest.approx(8 / (4 * 2 * 20 / 3600 / 0.8))
    assert ratio(found, "energy").training == pytest.approx(4.5e6)
    assert mid(ratio(found, "energy").ratio_pages) == pytest.approx(4.5e6 / 15_625)
    assert mid(ratio(found, "flop").ratio_pages) == pytest.approx(1e15 / 2e9)
    assert mid(ratio(found, "gpu_hours").ratio_pages) == pytest.approx(2 * 72)
    assert found.n_cluster is None


def test_measured_training_on_owned_hardware_pays_its_electricity(tmp_path: Path) -> None:
    """2 h x $0.5 + 1.25 kWh x $0.1."""
    found = overhang_of(tmp_path, {"kind": "measured"}, MEASURED, prices=prices())
    assert ratio(found, "usd").training == pytest.approx(1.125)


def test_prices_that_both_sides_share_move_together(tmp_path: Path) -> None:
    """Rent banded 1..4 is in the training and in the page alike, so the ratio has no band at all."""
    hardware = {"kind": "rented", "usd_per_device_hour": quoted(2, 1, 4), "utilisation": 0.5}
    found = overhang_of(tmp_path, {"kind": "measured"}, MEASURED, prices=prices(hardware=hardware))
    assert ends(ratio(found, "usd").ratio_pages)[::2] == (None, None)


def test_training_without_a_meter_takes_the_assumed_power(tmp_path: Path) -> None:
    """100 W x 7,200 s x 1.25."""
    recorded = MEASURED | {"energy_j": None}
    found = overhang_of(tmp_path, {"kind": "measured"}, recorded, prices=prices(assumed_power_w=quoted(100)))
    assert ratio(found, "energy").training == pytest.approx(900_000)
    assert "assumed" in ratio(found, "energy").sentence


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    bare = {"kind": "published", "source": "a blog", "date": "2024-01-01"}
    found = overhang_of(tmp_path, bare)
    assert [one.ratio_pages for one in found.ratios] == [None] * 4
    assert all(one.sentence.startswith("No ratio: of the training") for one in found.ratios)
    assert found.n_cluster is None


def test_a_manifest_without_the_measured_training(tmp_path: Path) -> None:
    found = overhang_of(tmp_path, {"kind": "measured"})
    assert [one.ratio_pages for one in found.ratios] == [None] * 4


def test_references_name_their_sources() -> None:
    assert all(len(reference.source) > 10 and reference.figure and reference.conditions for reference in REFERENCES)
    figures = " ".join(reference.figure for reference in REFERENCES)
    for known in ("4 Wh/page", "500 pages/$", "3.14e23", "1,287 MWh", "30.84 M", "0.070 J/token", "2.06 J/token", "$0.0861/kWh"):
        assert known in figures
