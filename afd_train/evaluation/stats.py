"""Statistics of a comparison: pure functions of arrays, seeded, no files and no plots.

The unit is the prompt.  Clips of one prompt are not independent, so their values are averaged first (`unit_means`) and
everything else works on one number a prompt.  A clip that could not be measured is NaN and is given the worst value
seen (`failures_as_worst`): dropping it would reward a student whose videos cannot even be tracked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Sign flips are enumerated up to this many prompts (2^13 = 8192 patterns), drawn at random beyond.
EXACT_UNITS = 13


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its interval; `lo` and `hi` are NaN where fewer than two prompts exist."""

    mean: float
    lo: float
    hi: float
    n: int


def failures_as_worst(values: np.ndarray, better: Literal["higher", "lower"], seen: np.ndarray) -> np.ndarray:
    """`values` with every NaN replaced by the worst finite number of `seen` (all clips of all policies).

    Raises ValueError when `seen` has no finite number: nothing is known of how bad a failure is.
    """
    finite = seen[np.isfinite(seen)]
    if finite.size == 0:
        raise ValueError("no clip could be measured")
    worst = finite.min() if better == "higher" else finite.max()
    return np.where(np.isfinite(values), values, worst)


def unit_means(units: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Mean of the values of each unit (prompt), in order of the unit's name.  values: [N], finite."""
    assert len(units) == len(values)
    assert np.isfinite(values).all()
    names, where = np.unique(np.asarray(units, dtype=object).astype(str), return_inverse=True)
    sums = np.bincount(where, weights=values, minlength=len(names))
    return dict(zip(names.tolist(), (sums / np.bincount(where)).tolist(), strict=True))


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int, level: float = 0.95) -> Interval:
    """Mean of one value a prompt with its bias-corrected and accelerated (BCa) bootstrap interval.  values: [N].

    All values equal: the interval is that value.  A single prompt: lo and hi are NaN.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan, len(values))
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean, len(values))
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(values))


def sign_flip_p(differences: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided p of "the paired differences are symmetric about 0", by flipping their signs.  differences: [N].

    Exact for up to `EXACT_UNITS` prompts, otherwise (1 + hits) / (1 + resamples), never 0.
    """
    n = len(differences)
    observed = abs(differences.sum())
    # Sums that differ only in rounding count as ties, or the exact test would lose the observed pattern itself.
    bar = observed - 1e-9 * np.abs(differences).sum()
    if n <= EXACT_UNITS:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((1 - 2 * bits) @ differences) >= bar).mean())
    generator = np.random.default_rng(seed)
    signs = generator.integers(0, 2, size=(resamples, n), dtype=np.int8) * np.int8(2) - np.int8(1)
    hits = int((np.abs(signs @ differences) >= bar).sum())
    return (1 + hits) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given: reject where the result is below the level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's interval of a proportion (95 % by default); sensible at 0 and at n, unlike the bootstrap."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
