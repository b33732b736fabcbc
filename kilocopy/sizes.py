"""Cost of a page over model size: a power law through the sizes that were measured, and what it would say of larger ones.

`$/page ~ N^alpha` is a straight line on logarithms. Three sizes or more are asked for, since a line through two has no error to tell.
What lies beyond the largest measured size is an extrapolation, and is called one wherever it is shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

SIZES_MIN = 3
# What may differ between sizes: the model, and on how much of the same hardware a replica of it runs.
OF_THE_SIZE = re.compile(r"model\.|cluster\.(replicas|hardware\.(gpus_per_replica|kv_cache_gib)|engine\.(tensor|pipeline)_parallel_size)$")


@dataclass(frozen=True)
class PowerLaw:
    """$/page = scale x N^alpha over these sizes, with the 95 % interval of alpha."""

    alpha: float
    low: float
    high: float
    scale: float
    sizes: tuple[float, ...]
    _spread: float
    _middle: float
    _squares: float

    def at(self, size: float) -> tuple[float, float, float]:
        """$/page of a model of that size: middle and 95 % prediction interval (for one more model, not for the line)."""
        count, x = len(self.sizes), math.log(size)
        error = self._spread * math.sqrt(1 + 1 / count + (x - self._middle) ** 2 / self._squares)
        half = float(stdtrit(count - 2, 0.975)) * error
        middle = math.log(self.scale) + self.alpha * x
        return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def mixed(differences: Sequence[str]) -> str:
    """Why sides that differ so (Comparison.differences) make no line over size: something else than the model differs; empty where nothing does."""
    keys = dict.fromkeys(found[1] for said in differences if (found := re.search(r"\(([^()]+)\): ", said)))
    other = [key for key in keys if not OF_THE_SIZE.match(key)]
    if not other:
        return ""
    return (
        f"No fit over model size: the sides differ in more than their model ({', '.join(other)}), and a line through them would take that for size. "
        "Measure every size with the same hardware, versions, prices and settings."
    )


def fit(points: Sequence[tuple[float, float]]) -> PowerLaw | str:
    """Through (parameters, $/page); a sentence where the sizes do not carry a line."""
    sizes = sorted({size for size, _ in points})
    if len(sizes) < SIZES_MIN:
        return f"A fit over model size needs {SIZES_MIN} sizes; there {'is' if len(sizes) == 1 else 'are'} {len(sizes)}."
    x, y = np.log([size for size, _ in points]), np.log([usd for _, usd in points])
    middle, squares = float(x.mean()), float(((x - x.mean()) ** 2).sum())
    alpha = float(((x - middle) * y).sum()) / squares
    residual = y - y.mean() - alpha * (x - middle)
    spread = math.sqrt(float((residual**2).sum()) / (len(points) - 2))
    half = float(stdtrit(len(points) - 2, 0.975)) * spread / math.sqrt(squares)
    scale = math.exp(float(y.mean()) - alpha * middle)
    return PowerLaw(alpha, alpha - half, alpha + half, scale, tuple(size for size, _ in points), spread, middle, squares)
