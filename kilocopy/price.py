"""From what arrived in a window to what it cost: joules and money per page, and how lopsided training is to running.

A price is somebody's statement, not a measurement, so every figure here is a *band*: its middle from the stated values, its ends
from all low ends together and all high ends together. Every figure also says what its joules are worth: `measured` by a meter,
`assumed` from a stated power, or `not measured`; a data sheet's watts never pass for a reading.

Each formula stands in the docstring of its function. Its letters: window of tau seconds, D devices, P output pages, J joules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kilocopy.identity import rise
from kilocopy.recording import Meters
from kilocopy.spec import GpuReplica, MeasuredTraining, Owned, PublishedTraining, Quoted, Spec
from kilocopy.streams import Floats
from kilocopy.summary import Band, Cost, Estimate, Overhang, Ratio, Stage, Window

Corner = Literal["mid", "low", "high"]
Figure = Callable[[Corner], float]

HOURS_PER_YEAR = 8760
J_PER_KWH = 3.6e6
BLOCKS, RESAMPLES = 20, 1000
ENERGY_WINDOW_S_MIN = 30.0  # NVML's counter moves every 100 ms; shorter windows are coarse


def at(quoted: Quoted, corner: Corner) -> float:
    """A stated number at one end of its band; without that end, its value."""
    end = {"mid": quoted.value, "low": quoted.low, "high": quoted.high}[corner]
    return quoted.value if end is None else end


def banded(figure: Figure) -> Band:
    """A figure at the three corners; without low and high where no input has a band."""
    return _band(figure("mid"), figure("low"), figure("high"))


def _band(mid: float, one: float, other: float) -> Band:
    if math.isclose(one, mid, rel_tol=1e-9) and math.isclose(other, mid, rel_tol=1e-9):
        return Band(mid=mid)
    return Band(mid=mid, low=min(one, mid, other), high=max(one, mid, other))


def corner_of(band: Band, corner: Corner) -> float:
    """A band's value at one corner."""
    end = {"mid": band.mid, "low": band.low, "high": band.high}[corner]
    return band.mid if end is None else end


def scaled(band: Band, factor: float) -> Band:
    """A band times a constant."""
    return banded(lambda corner: corner_of(band, corner) * factor)


def inverse(band: Band, numerator: float = 1.0) -> Band | None:
    """A constant over a band; its low end is at the band's high end. None over zero."""
    if min(corner_of(band, "mid"), corner_of(band, "low")) <= 0:
        return None
    return _band(numerator / band.mid, numerator / corner_of(band, "low"), numerator / corner_of(band, "high"))


# Energy


@dataclass(frozen=True)
class Energy:
    """Joules of the facility in a window, what they are worth and what they enclose."""

    source: Literal["measured", "assumed", "not_measured"]
    boundary: str | None
    facility_j: Figure | None
    sentence: str


def metered_j(meters: Meters, window: Window) -> dict[tuple[str, str, str], float] | str:
    """Joules of each (boundary, node, device) in a window, its edges interpolated between readings; a sentence where they are not covered.

    A node that had died before the window is no part of it.
    """
    found = {}
    gone = {node for node, lost_s in meters.lost_s.items() if lost_s <= window.start_s}
    for boundary, node, device in sorted(set(zip(meters.boundary, meters.node, meters.device, strict=True))):
        if node in gone:
            continue
        mine = (meters.boundary == boundary) & (meters.node == node) & (meters.device == device)
        order = np.argsort(meters.time_s[mine], kind="stable")
        times_s, counter_j = meters.time_s[mine][order], meters.energy_j[mine][order]
        if times_s[0] > window.start_s or times_s[-1] < window.end_s:
            return f"the meter of {device}{f' on {node}' if meters.counted else ''} does not cover the whole window"
        steps = [rise(counter_j[i : i + 2]) for i in range(len(counter_j) - 1)]
        grown_j = np.concatenate([[0.0], np.cumsum(steps)])
        first_j, last_j = np.interp([window.start_s, window.end_s], times_s, grown_j)
        found[str(boundary), str(node), str(device)] = float(last_j - first_j)
    return found or "no meter was recorded"


def energy(spec: Spec, meters: Meters, window: Window) -> Energy:
    """J_facility = (J_gpu + J_host) x PUE: from the meters, else from the stated power, else not at all."""
    pue, power = spec.prices.pue, spec.prices.assumed_power_w
    metered = metered_j(meters, window)
    why = metered if isinstance(metered, str) else _uncovered(spec, metered, _there(meters, window))
    if not why and not isinstance(metered, str):
        total_j = sum(metered.values())
        boundary = "+".join(sorted({boundary for boundary, *_ in metered}))
        nodes = len({node for _, node, _ in metered})
        on = f" on {nodes} nodes" if nodes > 1 else ""
        sentence = f"Energy of {_counted(len(metered), 'meter')} ({boundary}){on} in the window times PUE {pue.value:g}"
        sentence += _caveats(spec, metered, _there(meters, window), window)
        return Energy("measured", f"{boundary} × PUE", lambda corner: total_j * at(pue, corner), sentence)
    if power is not None:
        sentence = f"Energy assumed, not measured ({why}): {power.value:g} W for all serving hardware times PUE {pue.value:g}."
        return Energy("assumed", "facility", lambda corner: at(power, corner) * window.duration_s * at(pue, corner), sentence)
    return Energy("not_measured", None, None, f"Energy not measured: {why}.")


def metered_blocks(meters: Meters, window: Window) -> Floats | None:
    """Joules of all meters together in each of BLOCKS equal parts of a window; None where they do not cover it."""
    edges_s = np.linspace(window.start_s, window.end_s, BLOCKS + 1)
    joules = np.zeros(BLOCKS)
    for i in range(BLOCKS):
        start_s, end_s = float(edges_s[i]), float(edges_s[i + 1])
        metered = metered_j(meters, Window(start_s=start_s, end_s=end_s, duration_s=end_s - start_s, rule="a block"))
        if isinstance(metered, str):
            return None
        joules[i] = sum(metered.values())
    return joules


def ratio_interval(over: Floats, under: Floats) -> tuple[float, float]:
    """95 % interval of sum(over) / sum(under) by the paired block bootstrap: 1,000 times as many pairs drawn as there are, seeded.

    Blocks, since neighbouring seconds are alike; pairs, since joules and tokens rise together. Source: Kuensch, The jackknife and
    the bootstrap for general stationary observations, Annals of Statistics 17, 1989 (percentiles of the resampled ratio).
    """
    drawn = np.random.default_rng(0).integers(0, len(over), (RESAMPLES, len(over)))
    low, high = np.percentile(over[drawn].sum(axis=1) / under[drawn].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def energy_interval(cost: Cost, stage: Stage, meters: Meters, block_tokens: Floats) -> Estimate | None:
    """Wh per page with its measurement interval, where the energy was measured long enough; apart from the band of assumed inputs.

    `block_tokens`: output tokens in each of BLOCKS equal parts of the window.
    """
    if cost.energy_source != "measured" or cost.wh_per_page is None or stage.window is None:
        return None
    joules = metered_blocks(meters, stage.window) if stage.window.duration_s >= ENERGY_WINDOW_S_MIN else None
    if joules is None or not joules.sum() or not (block_tokens > 0).any():
        return None
    low, high = ratio_interval(joules, block_tokens)
    scale = cost.wh_per_page.mid / (float(joules.sum()) / float(block_tokens.sum()))
    return Estimate(value=cost.wh_per_page.mid, low=low * scale, high=high * scale)


Metered = Mapping[tuple[str, str, str], float]
Counted = Mapping[str, tuple[int, int]]


def _uncovered(spec: Spec, metered: Metered, counted: Counted) -> str | None:
    """Why the meters' sum is not the serving hardware's energy: a GPU without a meter, or a host without one where CPUs serve."""
    gpus = sum(boundary == "gpu" for boundary, *_ in metered)
    if isinstance(spec.cluster.hardware, GpuReplica):
        needed = math.ceil(spec.cluster.devices)
        bare = _and(node for node, (on_it, _) in counted.items() if not on_it)
        return f"{gpus} of {needed} GPUs had a meter{f', none on {bare}' if bare else ''}" if gpus < needed else None
    if bare := _and(node for node, (_, of_host) in counted.items() if not of_host):
        return f"{bare} had no meter of the host"
    return "the host had no meter" if not any(boundary == "host" for boundary, *_ in metered) else None


def _there(meters: Meters, window: Window) -> Counted:
    """How many meters each node has that had not died before the window."""
    return {node: counted for node, counted in meters.counted.items() if meters.lost_s.get(node, math.inf) > window.start_s}


def _and(nodes: Iterable[str]) -> str:
    return ", ".join(sorted(nodes))


def _caveats(spec: Spec, metered: Metered, counted: Counted, window: Window) -> str:
    """The end of the sentence about metered energy: what else is in it, what is not, and how fine it is."""
    gpus = sum(boundary == "gpu" for boundary, *_ in metered)
    serving = math.ceil(spec.cluster.devices) if isinstance(spec.cluster.hardware, GpuReplica) else 0
    idle = f"; {gpus - serving} of the metered GPUs did not serve and are in it" if gpus > serving else ""
    coarse = f"; a window under {ENERGY_WINDOW_S_MIN:g} s is coarse for a meter" if window.duration_s < ENERGY_WINDOW_S_MIN else ""
    bare = _and(node for node, (_, of_host) in counted.items() if not of_host) if any(boundary == "host" for boundary, *_ in metered) else ""
    hosts = f"; {bare} had no meter of the host, whose CPUs and memory are not in it" if bare else ""
    return f"{idle}{hosts}{coarse}."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# Money


def usd_per_device_hour(spec: Spec, corner: Corner) -> float:
    """What one hour of one device costs while it serves.

    Owned: K (1 - r) / (8760 L u) + opex / u (price K, residual r, life of L years, utilisation u). Rented: rent / u.
    """
    hardware = spec.prices.hardware
    if not isinstance(hardware, Owned):
        return at(hardware.usd_per_device_hour, corner) / hardware.utilisation
    hours = HOURS_PER_YEAR * hardware.life_years * hardware.utilisation
    capital = at(hardware.usd_per_device, corner) * (1 - hardware.residual_fraction) / hours
    opex = at(hardware.opex_usd_per_device_hour, corner) if hardware.opex_usd_per_device_hour else 0.0
    return capital + opex / hardware.utilisation  # both are paid in idle hours too


def electricity_usd(spec: Spec, facility_j: Figure, corner: Corner) -> float:
    """Joules of the facility at the stated price of a kWh."""
    return facility_j(corner) / J_PER_KWH * at(spec.prices.electricity_usd_per_kwh, corner)


def cost(spec: Spec, stage: Stage, meters: Meters) -> Cost | None:
    """Energy and money of one stage's window; None without a window. All of its energy, prefill too, is over its output pages."""
    if stage.window is None or stage.throughput is None:
        return None
    window, pages, tokens = stage.window, stage.throughput.pages or 0.0, stage.throughput.output_tokens
    owned = isinstance(spec.prices.hardware, Owned)
    used = energy(spec, meters, window)
    device_hours = spec.cluster.devices * window.duration_s / 3600

    def each(total: Figure | None, count: float) -> Band | None:
        return banded(lambda corner: total(corner) / count) if total is not None and count > 0 else None

    def each_page(total: Figure | None) -> Band | None:
        return each((lambda corner: total(corner) * words_share(spec, corner)) if total is not None else None, pages)

    def hardware_usd(corner: Corner) -> float:
        return usd_per_device_hour(spec, corner) * device_hours

    def power_usd(corner: Corner) -> float:
        return electricity_usd(spec, used.facility_j, corner) if used.facility_j else 0.0

    def all_usd(corner: Corner) -> float:
        return hardware_usd(corner) + (power_usd(corner) if owned else 0.0)

    j_per_page, usd_per_page = each_page(used.facility_j), each_page(all_usd)
    return Cost(
        energy_source=used.source,
        energy_boundary=used.boundary,
        facility_j=banded(used.facility_j) if used.facility_j else None,
        wh_per_page=scaled(j_per_page, 1 / 3600) if j_per_page else None,
        j_per_output_token=each(used.facility_j, tokens),
        pages_per_kwh=inverse(j_per_page, J_PER_KWH) if j_per_page else None,
        electricity_usd_per_page=each_page(power_usd) if used.facility_j else None,
        hardware_usd_per_page=each_page(hardware_usd),
        usd_per_page=usd_per_page,
        usd_per_m_output_tokens=each(lambda corner: all_usd(corner) * 1e6, tokens),
        pages_per_usd=inverse(usd_per_page) if usd_per_page else None,
        hardware_kind=spec.prices.hardware.kind,
        sentence=_cost_sentence(spec, used, stage),
    )


def words_share(spec: Spec, corner: Corner) -> float:
    """What a page costs at one end of the assumed words per token, over what it costs at their value: more words a token, fewer tokens a page."""
    words = spec.page.words_per_token
    if words is None:
        return 1.0
    other: Corner = {"mid": "mid", "low": "high", "high": "low"}[corner]  # type: ignore[assignment]  # the literals beside it
    return words.value / max(at(words, other), 1e-12)


def _cost_sentence(spec: Spec, used: Energy, stage: Stage) -> str:
    """What is in the price of a page and what is not."""
    hardware = spec.prices.hardware
    share = f"used {100 * hardware.utilisation:g} % of the time"
    if isinstance(hardware, Owned):
        parts = "capital and opex" if hardware.opex_usd_per_device_hour else "capital"
        power = "and electricity" if used.facility_j else "alone: electricity is not in it"
        priced = f"Price of a page: {parts} of owned hardware {share} {power}; the electricity of its idle hours is not in it."
    else:
        priced = f"Price of a page: the rent of hardware {share}; its electricity is in the rent."
    mix = ""
    if stage.throughput and stage.throughput.output_tokens:
        mix = f" For each output token {stage.throughput.prompt_tokens / stage.throughput.output_tokens:.2g} prompt tokens were read."
    unpaged = "" if stage.throughput and stage.throughput.pages else " Words were not counted, so nothing is said per page."
    if words := spec.page.words_per_token:
        unpaged = f" Pages are assumed, at {words.value:g} words per token ({words.source})."
    return f"{priced} {used.sentence}{mix}{unpaged}"


def prices_used(spec: Spec) -> list[dict[str, Any]]:
    """Every stated number that enters a figure, with its band, unit, source and date."""
    prices, hardware = spec.prices, spec.prices.hardware
    stated: list[tuple[str, Quoted | None, str]]
    if isinstance(hardware, Owned):
        stated = [("usd_per_device", hardware.usd_per_device, "$"), ("opex_usd_per_device_hour", hardware.opex_usd_per_device_hour, "$/h")]
    else:
        stated = [("usd_per_device_hour", hardware.usd_per_device_hour, "$/h")]
    stated += [
        ("electricity_usd_per_kwh", prices.electricity_usd_per_kwh, "$/kWh"),
        ("pue", prices.pue, "facility J / IT J"),
        ("assumed_power_w", prices.assumed_power_w, "W"),
        ("words_per_token", spec.page.words_per_token, "words per output token"),
    ]
    if isinstance(training := spec.model.training, PublishedTraining):
        stated += [("training_usd", training.usd, "$"), ("training_usd_per_gpu_hour", training.usd_per_gpu_hour, "$/h")]
    return [{"name": name, "unit": unit, **quoted.model_dump(mode="json")} for name, quoted, unit in stated if quoted]


# The overhang


@dataclass(frozen=True)
class Training:
    """What training cost, as far as it is known. `shares_prices`: its money and joules rest on the same statements as the running's."""

    source: str
    flops: float | None
    device_hours: float | None
    device_unit: str
    gpus: float | None
    energy_j: Figure | None
    energy_how: str
    usd: Figure | None
    usd_how: str
    shares_prices: bool


def training_of(spec: Spec, recorded: Mapping[str, Any] | None) -> Training | None:
    """The training that the spec names: published, or measured beside the weights (`recorded`: the manifest's copy)."""
    training = spec.model.training
    if isinstance(training, PublishedTraining):
        return _published(training)
    if isinstance(training, MeasuredTraining):
        return _measured(spec, recorded or {})
    return None


def _published(training: PublishedTraining) -> Training:
    usd, hours, rate = training.usd, training.gpu_hours, training.usd_per_gpu_hour
    figure: Figure | None = None
    how = "neither its price nor GPU-hours with a price per hour are published"
    if usd is not None:
        figure, how = (lambda corner: at(usd, corner)), f"as stated by {usd.source}"
    elif hours is not None and rate is not None:
        figure, how = (lambda corner: hours * at(rate, corner)), f"{_said(hours)} GPU-hours at ${rate.value:g} an hour"
    return Training(
        source=f"published: {training.source} ({training.date})",
        flops=training.flops,
        device_hours=hours,
        device_unit=f"{training.gpu_type or 'GPU'}-hours",
        gpus=training.gpus,
        energy_j=_constant(training.energy_j),
        energy_how="as published" if training.energy_j else "it is not published",
        usd=figure,
        usd_how=how,
        shares_prices=False,
    )


def _measured(spec: Spec, recorded: Mapping[str, Any]) -> Training:
    """One device trained for `wall_s` seconds, at the price that the spec states for a device-hour of serving."""
    wall_s, metered_j_, power, pue = recorded.get("wall_s"), recorded.get("energy_j"), spec.prices.assumed_power_w, spec.prices.pue
    hours = None if wall_s is None else float(wall_s) / 3600
    joules: Figure | None = None
    how = "nothing measured it and no power is stated"
    if metered_j_ is not None:
        joules, how = (lambda corner: float(metered_j_) * at(pue, corner)), "measured, times PUE"
    elif power is not None and wall_s is not None:
        joules, how = (lambda corner: at(power, corner) * float(wall_s) * at(pue, corner)), "assumed from the stated power, times PUE"

    def usd(corner: Corner) -> float:
        power_usd = electricity_usd(spec, joules, corner) if joules and isinstance(spec.prices.hardware, Owned) else 0.0
        return (hours or 0.0) * usd_per_device_hour(spec, corner) + power_usd

    return Training(
        source="measured: training.json beside the weights" if recorded else "training.json is missing from the manifest",
        flops=recorded.get("flops"),
        device_hours=hours,
        device_unit="device-hours",
        gpus=None,
        energy_j=joules,
        energy_how=how,
        usd=usd if hours is not None else None,
        usd_how="its device-hours at the price of serving" if hours is not None else "its duration is not recorded",
        shares_prices=True,
    )


def overhang(spec: Spec, recorded: Mapping[str, Any] | None, stage: Stage | None, n_slo: int | None) -> Overhang | None:
    """Training over running, four ways, at one stage; None without a stage to price or a training to compare.

    R_usd = training $ / ($/page), R_energy = training J / (J/page), R_flop = C_train / (2 N_active x tokens per page)
    (2 FLOPs per parameter and token: Kaplan et al. 2020, section 2.1), R_gpu_h = training device-hours x pages per device-hour.
    Each is a number of pages; R_usd is also the break-even: so many pages cost as much to make as the model.
    """
    training = training_of(spec, recorded)
    if training is None or stage is None or stage.throughput is None or stage.window is None or stage.cost is None:
        return None
    n_cluster = training.gpus / spec.cluster.devices * n_slo if training.gpus and n_slo and on_gpus(spec) else None
    return Overhang(
        stage=stage.index,
        level=stage.level,
        ratios=[
            _ratio_usd(training, stage.cost),
            _ratio_energy(training, stage.cost),
            _ratio_flop(training, spec, stage),
            _ratio_hours(training, spec, stage),
        ],
        n_cluster=n_cluster,
        ratio_unit=f"pages of {spec.page.words} words",
    )


def on_gpus(spec: Spec) -> bool:
    """Whether devices are GPUs; else the host is one."""
    return isinstance(spec.cluster.hardware, GpuReplica)


def _ratio(
    name: Literal["usd", "energy", "flop", "gpu_hours"],
    training: Training,
    bands: tuple[Figure | None, Band | None],
    units: tuple[str, str],
    hows: tuple[str, str],
) -> Ratio:
    """One ratio, or the sentence that says which side is missing. `hows`: how training is known; how running is, or why not."""
    trained, running = bands
    ratio = None
    if trained is None:
        sentence = f"No ratio: of the training, {hows[0]}."
    elif running is None or running.mid <= 0:
        sentence = f"No ratio: of the running, {hows[1]}."
    else:
        ratio = over(trained, running, training.shares_prices)
        sides = f"Training {_said(trained('mid'), units[0])} ({hows[0]}), running {_said(running.mid, units[1])} ({hows[1]})"
        sentence = f"{sides}: {_said(ratio.mid)} pages of running equal the training."
    return Ratio(
        name=name,
        training=trained("mid") if trained is not None else None,
        training_unit=units[0],
        running_per_page=running.mid if running is not None else None,
        running_unit=units[1],
        ratio_pages=ratio,
        training_source=training.source,
        sentence=sentence,
    )


def over(trained: Figure, running: Band, shares_prices: bool) -> Band:
    """Training over running. Where both rest on the same prices, they move together; else the ends are the opposite corners."""
    low, high = (trained("low"), trained("high")) if shares_prices else (trained("high"), trained("low"))
    floor, ceiling = corner_of(running, "low"), corner_of(running, "high")
    mid = trained("mid") / running.mid
    return _band(mid, low / floor if floor > 0 else mid, high / ceiling if ceiling > 0 else mid)


def _ratio_usd(training: Training, priced: Cost) -> Ratio:
    how = "owned hardware" if priced.hardware_kind == "owned" else "rent"
    if priced.hardware_kind == "owned":
        how += ", electricity in it" if priced.electricity_usd_per_page else ", electricity not in it"
    known = how if priced.usd_per_page else "a page has no price, since words were not counted"
    return _ratio("usd", training, (training.usd, priced.usd_per_page), ("$", "$ per page"), (training.usd_how, known))


def _ratio_energy(training: Training, priced: Cost) -> Ratio:
    joules = scaled(priced.wh_per_page, 3600) if priced.wh_per_page else None
    known = f"{priced.energy_source}, {priced.energy_boundary}" if joules else "its energy per page is not measured"
    return _ratio("energy", training, (training.energy_j, joules), ("J", "J per page"), (f"energy {training.energy_how}", known))


def _ratio_flop(training: Training, spec: Spec, stage: Stage) -> Ratio:
    words_per_token = stage.throughput.words_per_token if stage.throughput else None
    per_page = Band(mid=2 * spec.model.parameters_active * spec.page.words / words_per_token) if words_per_token else None
    known = "2 x active parameters x tokens per page" if per_page else "words were not counted"
    hows = ("as stated" if training.flops else "its FLOPs are not stated", known)
    return _ratio("flop", training, (_constant(training.flops), per_page), ("FLOPs", "FLOPs per page"), hows)


def _ratio_hours(training: Training, spec: Spec, stage: Stage) -> Ratio:
    pages, duration_s = (stage.throughput.pages if stage.throughput else None), (stage.window.duration_s if stage.window else 0.0)
    per_page = Band(mid=spec.cluster.devices * duration_s / 3600 / pages) if pages else None
    hours, serving = training.device_hours, _serving_device(spec)
    known = f"on {serving}; no price is in this ratio" if per_page else "words were not counted"
    hows = (training.source if hours else "its device-hours are not stated", known)
    return _ratio("gpu_hours", training, (_constant(hours), per_page), (training.device_unit, "device-hours per page"), hows)


def _constant(value: float | None) -> Figure | None:
    """A figure without a band; None stays None, and so does a zero, which nobody's training cost."""
    return (lambda _corner: float(value)) if value else None


def _serving_device(spec: Spec) -> str:
    hardware = spec.cluster.hardware
    return f"{hardware.type or 'GPU'}s" if isinstance(hardware, GpuReplica) else "the host's CPUs as one device"


def _said(value: float, unit: str = "") -> str:
    """A number in a sentence: three figures, with thousands' commas where they fit; dollars before it, other units after."""
    number = f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    return f"${number}{unit[1:]}" if unit.startswith("$") else f"{number} {unit}".rstrip()
