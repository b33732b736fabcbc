"""Published figures to stand beside one's own. They are not measured here and enter no formula; each says where it is from."""

from __future__ import annotations

from kilocopy.summary import Reference

_GPT3 = "Brown et al. 2020, Language Models are Few-Shot Learners, arXiv:2005.14165, section 6.3"
_LLAMA = "Meta, Llama 3.1 model card (huggingface.co/meta-llama/Llama-3.1-8B)"
_ML_ENERGY = "The ML.ENERGY Leaderboard v3 (ml.energy/leaderboard)"
_H100 = "H100, vLLM, GPU only"

REFERENCES = (
    Reference(
        name="GPT-3, a page",
        figure="4 Wh/page",
        conditions="0.4 kWh for 100 pages; 175 B parameters; boundary and length of a page unstated",
        source=_GPT3,
    ),
    Reference(
        name="Rule of thumb of 2020",
        figure="500 pages/$",
        conditions="total cost = 5 x electricity; 4 Wh/page at $0.10/kWh; a model 1000 times larger: $2/page",
        source="derived from the GPT-3 paper's 4 Wh/page; a rule of thumb, not a measurement",
    ),
    Reference(
        name="GPT-3, training",
        figure="3.14e23 FLOPs, 1,287 MWh",
        conditions="175 B parameters, V100 GPUs; the energy includes the data centre's overhead",
        source="Patterson et al. 2021, Carbon Emissions and Large Neural Network Training, arXiv:2104.10350",
    ),
    Reference(name="Llama 3.1 8B, training", figure="1.46 M GPU-hours", conditions="H100 80GB, 15 T tokens", source=_LLAMA),
    Reference(name="Llama 3.1 70B, training", figure="7.0 M GPU-hours", conditions="H100 80GB, 15 T tokens", source=_LLAMA),
    Reference(name="Llama 3.1 405B, training", figure="30.84 M GPU-hours", conditions="H100 80GB, 15 T tokens", source=_LLAMA),
    Reference(
        name="Llama 3.1 8B, running",
        figure="0.455 J/token at batch 8; 0.070 J/token and 9,806 tokens/s at batch 511",
        conditions=f"1 {_H100}",
        source=_ML_ENERGY,
    ),
    Reference(
        name="Llama 3.1 70B, running",
        figure="3.76 J/token at the smallest batch, 0.373 J/token at the largest",
        conditions=f"4 {_H100}",
        source=_ML_ENERGY,
    ),
    Reference(
        name="Llama 3.1 405B FP8, running",
        figure="13.98 J/token at the smallest batch, 2.06 J/token at the largest",
        conditions=f"8 {_H100}",
        source=_ML_ENERGY,
    ),
    Reference(
        name="InferenceX, per GPU",
        figure="about 10,000 tokens/s a GPU at 50 tokens/s a user, 15 times an H200",
        conditions="GB200 NVL72, DeepSeek-R1, 8K tokens in and 1K out; another model and another load than here; whether prompt tokens count is not stated",
        source="SemiAnalysis InferenceMAX v1 (now InferenceX), October 2025, as shown in NVIDIA's technical blog on it, figure 1",
    ),
    Reference(
        name="US industrial electricity",
        figure="$0.0861/kWh",
        conditions="mean of 2025",
        source="US Energy Information Administration, Electric Power Monthly",
    ),
    Reference(
        name="Facility energy over IT energy (PUE)",
        figure="1.09 to 1.54",
        conditions="1.09: the best large fleets; 1.54: mean of the industry in 2025",
        source="Google, data centre efficiency (fleet mean); Uptime Institute, Global Data Center Survey 2025",
    ),
)
