"""The model against its own training: how long it would take to write as much as it was trained on, and what a page costs over its life.

All of it is arithmetic over one measured stage and what is known of the training. Tokens are those that were generated, as drawn:
nothing is said about whether they are worth training on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kilocopy import price
from kilocopy.spec import PublishedTraining, Spec
from kilocopy.summary import Corpus, LifetimeCost, Stage

DAY_S = 86_400
DECADES = 3  # on each side of the break-even
PER_DECADE = 4


def corpus(spec: Spec, recorded: Mapping[str, Any] | None, stage: Stage | None) -> Corpus | None:
    """At one stage; None without a stage that counts or a training. `recorded`: the manifest's copy of training.json.

    days = training tokens / (tokens per second and device x 86,400 x devices); copies on the training cluster = copies in flight x training
    GPUs / serving GPUs; lifetime cost of a page = training $ / n + running $ per page, equal parts at n = training $ / running $ per page.
    """
    training = price.training_of(spec, recorded)
    if training is None or stage is None or stage.throughput is None:
        return None
    per_day = stage.throughput.output_tokens_per_s_per_device * DAY_S
    tokens, gpus = training_tokens(spec, recorded), training.gpus
    on_gpus = price.on_gpus(spec)
    running = stage.cost.usd_per_page if stage.cost else None
    trained = price.banded(training.usd) if training.usd else None
    even = None
    if training.usd is not None and running is not None and running.mid > 0:
        even = price.over(training.usd, running, training.shares_prices)
    return Corpus(
        stage=stage.index,
        level=stage.level,
        output_tokens_per_day_per_device=per_day,
        devices=spec.cluster.devices,
        training_tokens=tokens,
        days_one_device=tokens / per_day if tokens and per_day else None,
        days_serving=tokens / per_day / spec.cluster.devices if tokens and per_day else None,
        days_training_cluster=tokens / per_day / gpus if tokens and per_day and gpus and on_gpus else None,
        training_gpus=gpus,
        copies_on_training_cluster=_copies(stage, gpus, spec) if gpus and on_gpus else None,
        training_usd=trained,
        running_usd_per_page=running,
        break_even_pages=even,
        lifetime=[] if even is None or trained is None or running is None else [_lifetime(10 ** (place / PER_DECADE) * even.mid, trained, running)
                  for place in range(-DECADES * PER_DECADE, DECADES * PER_DECADE + 1)],
        missing=_missing(tokens, gpus, trained is not None, on_gpus, training.usd_how),
    )  # fmt: skip


def training_tokens(spec: Spec, recorded: Mapping[str, Any] | None) -> float | None:
    """Tokens that the model was trained on: published, or counted by the training beside the weights."""
    training = spec.model.training
    found = training.tokens if isinstance(training, PublishedTraining) else (recorded or {}).get("tokens")
    return float(found) if found else None


def _copies(stage: Stage, gpus: float, spec: Spec) -> float | None:
    in_flight = stage.copies.n_run_client
    return None if in_flight is None else in_flight * gpus / spec.cluster.devices


def _lifetime(pages: float, trained: Any, running: Any) -> LifetimeCost:
    def at(corner: price.Corner) -> float:
        return price.corner_of(trained, corner) / pages + price.corner_of(running, corner)

    return LifetimeCost(pages=pages, usd_per_page=price.banded(at))


def _missing(tokens: float | None, gpus: float | None, priced: bool, on_gpus: bool, how: str) -> list[str]:
    """What cannot be told, and what would tell it."""
    said = [] if tokens else ["Days to write its own training corpus: not told, model.training.tokens is not stated."]
    if not gpus:
        said.append("Copies on the training cluster: not told, model.training.gpus (how many trained it at once) is not stated.")
    elif not on_gpus:
        said.append("Copies on the training cluster: not told, since what was measured here ran on CPUs.")
    return said if priced else [*said, f"Lifetime cost of a page: not told; of the training, {how}."]
