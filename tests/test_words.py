"""Assumed words per token: pages say that they are assumed, and what was counted stands beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from kilocopy import price
from kilocopy.page import render_html
from kilocopy.recompute import summarise
from kilocopy.spec import Spec
from tests import synthetic


def assumed(**words: float) -> dict[str, object]:
    return {"words": 500, "words_per_token": synthetic.quoted(**words)}


def test_counted_words_are_the_default(tmp_path: Path) -> None:
    through = summarise(synthetic.ideal(tmp_path)).stages[0].throughput
    assert through is not None
    assert (through.words_source, through.words_per_token, through.words_per_token_counted) == ("counted", 0.5, 0.5)


def test_assumed_words_make_pages_and_every_figure_from_them_assumed(tmp_path: Path) -> None:
    run = synthetic.ideal(tmp_path, synthetic.spec(page=assumed(value=0.75, low=0.6, high=0.9)))
    summary = summarise(run)
    stage = summary.stages[0]
    assert stage.throughput is not None
    assert stage.throughput.words_source == "assumed"
    assert stage.throughput.words_per_token_counted == 0.5
    assert stage.throughput.pages == pytest.approx(800 * 0.75 / 500)
    note = next(note for note in stage.verdict.notes if note.code == "words-assumed")
    assert "0.75 words per token" in note.sentence
    assert "0.5 were counted" in note.sentence
    assert "(assumed words per token)" in summary.headline.sentence
    assert "Pages are assumed, at 0.75 words per token" in (stage.cost.sentence if stage.cost else "")
    assert "counted, not assumed from tokens" not in render_html(summary)
    assert {"words_per_token"} <= {stated["name"] for stated in summary.prices}


def test_the_band_of_the_assumption_is_in_the_price_of_a_page(tmp_path: Path) -> None:
    """More words a token, fewer tokens a page, a cheaper page: 0.9 is the low end. Per token nothing is assumed."""
    stage = summarise(synthetic.ideal(tmp_path, synthetic.spec(page=assumed(value=0.75, low=0.6, high=0.9)))).stages[0]
    assert stage.cost is not None
    band = stage.cost.usd_per_page
    assert band is not None
    assert band.low == pytest.approx(band.mid * 0.75 / 0.9)
    assert band.high == pytest.approx(band.mid * 0.75 / 0.6)
    assert stage.cost.usd_per_m_output_tokens is not None
    assert stage.cost.usd_per_m_output_tokens.low is None
    assert price.corner_of(band, "mid") == band.mid


def test_random_weights_without_an_assumption_are_refused() -> None:
    tree = synthetic.spec()
    tree["cluster"]["engine"] = {"load_format": "dummy"}
    with pytest.raises(ValidationError, match=r"state page\.words_per_token"):
        Spec.model_validate(tree)
    with pytest.raises(ValidationError, match="no page would ever be full"):
        Spec.model_validate(synthetic.spec(page=assumed(value=0)))
