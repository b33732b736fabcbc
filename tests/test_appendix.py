"""The published arithmetic comes out as it is known, and a power law over sizes as it was put in."""

from __future__ import annotations

import numpy as np
import pytest
from markupsafe import escape

from kilocopy import appendix, sizes
from kilocopy.page import render_html
from tests import summaries


def results(lines: list[appendix.Line]) -> dict[str, float]:
    return {line.what: line.value for line in lines}


def test_gpt3s_row() -> None:
    """0.4 kWh for 100 pages; 500 pages/$ by the first reading of 5 x; $2 a page at 1,000 x; R_flop 1.3e9, R_energy 3.2e8."""
    row = results(appendix.gpt3())
    assert row["energy of a page"] == pytest.approx(4.0)
    assert row["pages for a dollar, first reading"] == pytest.approx(500)
    assert row["pages for a dollar, second reading"] == pytest.approx(416.7, rel=1e-3)
    assert row["a page of a model 1,000 x larger"] == pytest.approx(2.0)
    assert row["R_flop"] == pytest.approx(1.3e9, rel=0.04)
    assert row["R_energy"] == pytest.approx(3.2e8, rel=0.01)


def test_llamas_rows() -> None:
    """8B: 0.070 J x 667 = 47 J a page; 1.46 M hours at 700 W = 1,022 MWh. 405B: 1,373 J, 21,588 MWh."""
    small, large = (results(appendix.llama(model)) for model in appendix.LLAMAS)
    assert small["energy of a page"] == pytest.approx(46.67 / 3600, rel=1e-3)
    assert small["pages for a dollar, first reading"] == pytest.approx(1 / (5 * 0.10 * 46.67 / 3600 / 1000), rel=1e-3)
    assert small["R_energy"] == pytest.approx(1.022e9 / 0.012963, rel=1e-3)
    assert small["R_gpu_h"] == pytest.approx(1.46e6 * 9806 * 3600 / 666.7, rel=1e-3)
    assert large["R_energy"] == pytest.approx(21.588e9 / (2.06 * 666.67 / 3600), rel=1e-3)
    assert small["R_flop"] == large["R_flop"] == pytest.approx(6.75e10)
    assert "R_gpu_h" not in large, "no tokens/s of it was published beside the joules"


def test_the_report_has_it_with_the_runs_own_multiplier() -> None:
    summary = summaries.good()
    ratio, said = appendix.multiplier(summary)
    stage = next(s for s in summary.stages if s.index == summary.headline.n_slo_stage)
    assert stage.cost is not None
    assert stage.cost.usd_per_page is not None
    assert stage.cost.electricity_usd_per_page is not None
    assert ratio == pytest.approx(stage.cost.usd_per_page.mid / stage.cost.electricity_usd_per_page.mid)
    page = render_html(summary)
    assert str(escape(said)) in page
    assert "500 pages: the rule of 2020 says 500" in page
    assert "none, since" in appendix.multiplier(summaries.interrupted())[1]


def test_a_power_law_is_found_again() -> None:
    """$/page = 1e-12 N^0.9 under 5 % of noise, four sizes, 1,000 times: alpha's and the next size's intervals hold as they say."""
    draw, held, next_held = np.random.default_rng(1), 0, 0
    for _ in range(1000):
        points = [(n, 1e-12 * n**0.9 * float(np.exp(draw.normal(0, 0.05)))) for n in (1e9, 8e9, 70e9, 405e9)]
        law = sizes.fit(points)
        assert isinstance(law, sizes.PowerLaw)
        held += law.low <= 0.9 <= law.high
        _, low, high = law.at(4e12)
        next_held += low <= 1e-12 * 4e12**0.9 * float(np.exp(draw.normal(0, 0.05))) <= high
    assert 0.93 < held / 1000 < 0.97
    assert 0.93 < next_held / 1000 < 0.97


def test_sizes_of_other_hardware_prices_or_versions_are_no_line() -> None:
    said = "b (T_2) against a (T_1) ({}): 2 against 1"
    own = ["model.id", "model.parameters_active", "cluster.replicas", "cluster.hardware.gpus_per_replica", "cluster.engine.tensor_parallel_size"]
    assert sizes.mixed([said.format(key) for key in own]) == ""
    for key in ("prices.pue.value", "prices.hardware.usd_per_device_hour.value", "cluster.hardware.type", "cluster.engine.quantization", "vllm's version", "host's GPUs"):
        assert f"({key})" in sizes.mixed([said.format("model.id"), said.format(key)])


def test_two_sizes_are_no_line() -> None:
    assert sizes.fit([(1e9, 1.0), (8e9, 5.0), (8e9, 5.1)]) == "A fit over model size needs 3 sizes; there are 2."
