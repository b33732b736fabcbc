"""The arithmetic of 2020, worked out from its published figures, beside what the run measured; and the same for two models of today.

Nothing here is measured but the last lines. A published figure says whose it is, an assumption says so, and what follows from them
is worked out in the open, so that a reader can put in other numbers. A page is 500 words; published pages do not state their length.
"""

from __future__ import annotations

from dataclasses import dataclass

from kilocopy.report import money, number, shown_stage
from kilocopy.summary import Summary

PAGE_WORDS = 500
WORDS_PER_TOKEN = 0.75  # assumed: English text, a tokenizer of 2020 or later
TOKENS_PER_PAGE = PAGE_WORDS / WORDS_PER_TOKEN

GPT3_PARAMETERS, GPT3_FLOPS, GPT3_TRAINING_WH = 175e9, 3.14e23, 1287e6
GPT3_PAGES, GPT3_PAGES_WH = 100, 400.0
RULE_USD_PER_KWH, RULE_MULTIPLE, LARGER = 0.10, 5, 1000

GPU_W = 700.0  # Llama 3.1's model card reckons its training energy with this for each H100
LLAMA_TOKENS = 15e12


@dataclass(frozen=True)
class Line:
    """One step: what, how it is worked out, and its result as a number with its unit."""

    what: str
    how: str
    value: float
    unit: str

    @property
    def said(self) -> str:
        """The result in words."""
        return f"{money(self.value)} {self.unit[1:]}".strip() if self.unit.startswith("$") else f"{number(self.value)} {self.unit}".strip()


@dataclass(frozen=True)
class Model:
    """A model of today: parameters, H100-hours of training, joules per output token at the largest batch, and that batch's tokens/s."""

    name: str
    parameters: float
    gpu_hours: float
    joules_per_token: float
    gpus: int
    tokens_per_s: float | None
    how: str


LLAMAS = (
    Model("Llama 3.1 8B", 8.03e9, 1.46e6, 0.070, 1, 9806.0, "batch 511 on one H100"),
    Model("Llama 3.1 405B", 405e9, 30.84e6, 2.06, 8, None, "FP8, largest batch, on eight H100s"),
)


def gpt3() -> list[Line]:
    """GPT-3's row: Brown et al. 2020, section 6.3 (0.4 kWh for 100 pages); Patterson et al. 2021 (training)."""
    wh = GPT3_PAGES_WH / GPT3_PAGES
    power_usd = wh / 1000 * RULE_USD_PER_KWH
    total, *readings = _readings(power_usd, "pages: the rule of 2020 says 500")
    flops_page = 2 * GPT3_PARAMETERS * TOKENS_PER_PAGE
    return [
        Line("energy of a page", f"{GPT3_PAGES_WH / 1000:g} kWh / {GPT3_PAGES} pages", wh, "Wh"),
        Line("its electricity", f"{wh:g} Wh at ${RULE_USD_PER_KWH:.2f}/kWh (the rule's price)", power_usd, "$"),
        total,
        *readings,
        Line("a page of a model 1,000 x larger", f"{LARGER:,} x {money(total.value)} (first reading), cost in proportion to size", LARGER * total.value, "$"),
        Line("tokens of a page", f"{PAGE_WORDS} words / {WORDS_PER_TOKEN:g} words per token (assumed)", TOKENS_PER_PAGE, "tokens"),
        Line("R_flop", f"3.14e23 FLOPs / (2 x 175e9 parameters x {TOKENS_PER_PAGE:.0f} tokens)", GPT3_FLOPS / flops_page, "pages"),
        Line("R_energy", f"1,287 MWh (data centre and all) / {wh:g} Wh (boundary unstated)", GPT3_TRAINING_WH / wh, "pages"),
    ]


def _readings(power_usd: float, unit: str = "pages") -> list[Line]:
    """$ of a page and pages for a dollar by the rule's two readings: the total is 5 x electricity, or 5 x comes on top of it."""
    total = Line("a page, if the total is 5 x electricity", f"{RULE_MULTIPLE} x {money(power_usd)}", RULE_MULTIPLE * power_usd, "$")
    above = Line("a page, if 5 x electricity comes on top of it", f"(1 + {RULE_MULTIPLE}) x {money(power_usd)}", (1 + RULE_MULTIPLE) * power_usd, "$")
    return [
        total,
        Line("pages for a dollar, first reading", f"1 / {money(total.value)}", 1 / total.value, unit),
        above,
        Line("pages for a dollar, second reading", f"1 / {money(above.value)}", 1 / above.value, "pages"),
    ]


def llama(model: Model) -> list[Line]:
    """The same for a Llama 3.1: training from its model card, running from ML.ENERGY's rows.

    GPUs alone on both sides; but the card reckons training with the GPU's rated power, and running is measured, below it: R_energy leans high.
    """
    wh = model.joules_per_token * TOKENS_PER_PAGE / 3600
    training_wh = model.gpu_hours * GPU_W
    power_usd = wh / 1000 * RULE_USD_PER_KWH
    lines = [
        Line("energy of a page", f"{model.joules_per_token:g} J/token ({model.how}) x {TOKENS_PER_PAGE:.0f} tokens", wh, "Wh, GPUs alone"),
        Line("its electricity", f"{number(wh)} Wh at ${RULE_USD_PER_KWH:.2f}/kWh (the rule's price)", power_usd, "$"),
        *_readings(power_usd),
        Line("training", f"{number(model.gpu_hours)} H100-hours x {GPU_W:g} W (the model card's own reckoning)", training_wh / 1e6, "MWh, GPUs alone"),
        Line("R_energy", f"{number(training_wh / 1e6)} MWh (rated power) / {number(wh)} Wh (measured power, so this leans high)", training_wh / wh, "pages"),
        Line("R_flop", f"6 N x 15e12 tokens / (2 N x {TOKENS_PER_PAGE:.0f} tokens)", 3 * LLAMA_TOKENS / TOKENS_PER_PAGE, "pages, whatever N"),
    ]
    if model.tokens_per_s:
        per_hour = model.tokens_per_s * 3600 / TOKENS_PER_PAGE / model.gpus
        how = f"{number(model.gpu_hours)} H100-hours x {number(per_hour)} pages per H100-hour ({model.tokens_per_s:,.0f} tokens/s)"
        lines.append(Line("R_gpu_h", how, model.gpu_hours * per_hour, "pages"))
    return lines


def multiplier(summary: Summary) -> tuple[float | None, str]:
    """The run's own total over electricity, where the rule of 2020 has 5; and the sentence that says it, or why there is none."""
    stage = shown_stage(summary)
    cost = stage.cost if stage else None
    if cost is None or cost.usd_per_page is None or cost.electricity_usd_per_page is None or not cost.electricity_usd_per_page.mid:
        return None, "This run's own multiplier of cost over electricity: none, since no price of a page, or no energy, is known."
    ratio = cost.usd_per_page.mid / cost.electricity_usd_per_page.mid
    kind = "rent, with its electricity in it" if cost.hardware_kind == "rented" else "owned hardware and electricity"
    known = {"measured": "energy measured", "assumed": "energy assumed, not measured"}.get(cost.energy_source, "")
    said = f"This run's own multiplier: {money(cost.usd_per_page.mid)} a page ({kind}) is {number(ratio)} times its electricity"
    return ratio, f"{said}, {money(cost.electricity_usd_per_page.mid)} ({known}), where the rule of 2020 has 5."


def tables() -> list[tuple[str, list[list[str]]]]:
    """Each part's title and its rows: what, how, result."""
    parts = [("GPT-3 (175 B), from its paper and from Patterson et al. 2021", gpt3())]
    parts += [(f"{model.name}, from its model card and the ML.ENERGY Leaderboard v3", llama(model)) for model in LLAMAS]
    return [(title, [[line.what, line.how, line.said] for line in lines]) for title, lines in parts]
