"""The model against its own training, worked by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kilocopy.page import render_html
from kilocopy.problem import ProblemError
from kilocopy.recompute import summarise
from kilocopy.report import corpus_lines
from kilocopy.spec import load
from kilocopy.summary import Corpus
from tests import synthetic
from tests.synthetic import ideal, quoted

TRAINING: dict[str, Any] = {"kind": "published", "source": "a test", "date": "2026-01-01", "tokens": 3.456e9, "gpus": 64, "usd": quoted(500, 400, 800)}


def corpus_of(path: Path, **training: Any) -> Corpus | None:
    tree = synthetic.spec()
    tree["model"]["training"] = {key: value for key, value in (TRAINING | training).items() if value is not None}
    return summarise(ideal(path, tree)).corpus


def test_days_copies_and_break_even(tmp_path: Path) -> None:
    """4 copies of 10 tokens/s on 2 GPUs: 20 tokens/s, 1,728,000 tokens a day for each."""
    found = corpus_of(tmp_path)
    assert found is not None
    assert found.output_tokens_per_day_per_device == pytest.approx(1_728_000, rel=0.01)
    assert found.days_one_device == pytest.approx(2000, rel=0.01)
    assert found.days_serving == pytest.approx(1000, rel=0.01)
    assert found.days_training_cluster == pytest.approx(31.25, rel=0.01)
    assert found.copies_on_training_cluster == pytest.approx(4 * 64 / 2, rel=0.01)
    # $2 an hour at half use: $4 x 2 GPUs an hour over 144 pages an hour
    running = found.running_usd_per_page
    assert running is not None
    assert running.mid == pytest.approx(8 / 144, rel=0.01)
    even = found.break_even_pages
    assert even is not None
    assert (even.mid, even.low, even.high) == tuple(pytest.approx(usd / running.mid) for usd in (500, 400, 800))
    at_even = next(one for one in found.lifetime if one.pages == pytest.approx(even.mid))
    assert at_even.usd_per_page.mid == pytest.approx(2 * running.mid)
    assert at_even.usd_per_page.high == pytest.approx(800 / even.mid + running.mid)
    assert found.lifetime[0].pages == pytest.approx(even.mid / 1000)
    assert found.missing == []


def test_what_is_not_stated_is_named_and_not_guessed(tmp_path: Path) -> None:
    found = corpus_of(tmp_path, tokens=None, gpus=None, usd=None, flops=1e20)
    assert found is not None
    assert (found.days_one_device, found.copies_on_training_cluster, found.break_even_pages, found.lifetime) == (None, None, None, [])
    said = " ".join(found.missing)
    assert all(name in said for name in ("model.training.tokens", "model.training.gpus", "neither its price nor GPU-hours"))


def test_it_stands_in_both_reports(tmp_path: Path) -> None:
    tree = synthetic.spec()
    tree["model"]["training"] = TRAINING
    summary = summarise(ideal(tmp_path, tree))
    lines = " ".join(corpus_lines(summary))
    assert re.search(r"3.46 billion tokens: 2,000 \[[\d,]+ – [\d,]+\] days on one device, 1,000 on the 2 that served, 31.2 on as many as trained it", lines)
    assert re.search(r"1.73 million \[1.7\d million – 1.7\d million\] tokens a day", lines)
    page = render_html(summary)
    assert "plot-lifetime" in page
    assert "Break-even at" in page


def test_without_a_training_there_is_none(tmp_path: Path) -> None:
    assert summarise(ideal(tmp_path)).corpus is None


def test_a_training_cost_without_a_date_is_refused(tmp_path: Path) -> None:
    tree = synthetic.spec()
    tree["model"]["training"] = {key: value for key, value in TRAINING.items() if key != "date"}
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(tree))
    with pytest.raises(ProblemError, match=r"model.training.date: missing"):
        load(path)


def test_llama_8b_by_its_published_figures(tmp_path: Path) -> None:
    """Model card: 15 T tokens, 1.46 M H100-hours. ML.ENERGY v3 at batch 511: 9,806 tokens/s on one H100: 847 M tokens a day, 48.5 years."""
    per_day = 9806 * 86_400
    assert per_day == pytest.approx(847e6, rel=1e-3)
    found = corpus_of(tmp_path, tokens=15e12)
    assert found is not None
    assert found.days_one_device is not None
    assert found.days_one_device * found.output_tokens_per_day_per_device == pytest.approx(15e12)
    assert 15e12 / per_day / 365.25 == pytest.approx(48.5, rel=1e-2)
