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


def prompt_draws(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn in each bootstrap resample: int [resamples, prompts], rows sum to `prompts`."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)


def ratio_interval(above: np.ndarray, below: np.ndarray, resamples: int, seed: int, level: float = 0.95) -> Interval:
    """mean(above) / mean(below) with its percentile bootstrap interval over prompts, which both share.  [N], [N].

    Raises ValueError where mean(below) is not positive.  A single prompt: lo and hi are NaN.
    """
    if not below.mean() > 0:
        raise ValueError("a ratio needs a positive mean below the line")
    ratio = float(above.mean() / below.mean())
    if len(above) < 2:
        return Interval(ratio, math.nan, math.nan, len(above))
    drawn = prompt_draws(len(above), resamples, seed)
    sums = drawn @ below
    lo, hi = np.quantile((drawn @ above)[sums > 0] / sums[sums > 0], [(1 - level) / 2, (1 + level) / 2])
    return Interval(ratio, float(lo), float(hi), len(above))


def sign_patterns(n: int, resamples: int, seed: int) -> np.ndarray:
    """Signs for a test by flipping: int8 [K, n] of +1 and -1; all 2^n for up to `EXACT_UNITS`, else K = resamples."""
    if n <= EXACT_UNITS:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return (1 - 2 * bits).astype(np.int8)
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2, size=(resamples, n), dtype=np.int8) * np.int8(2) - np.int8(1)


def flipped_p(flipped: np.ndarray, observed: float, n: int, rounding: float) -> float:
    """Two-sided p of `observed` among the statistics [K] of `sign_patterns(n, ...)`; a NaN among them counts against.

    Exact for up to `EXACT_UNITS` units, otherwise (1 + hits) / (1 + K), never 0.
    """
    # Values that differ only in rounding count as ties, or the exact test would lose the observed pattern itself.
    hits = ~(np.abs(flipped) < abs(observed) - rounding)
    return float(hits.mean()) if n <= EXACT_UNITS else (1 + int(hits.sum())) / (1 + len(flipped))


def sign_flip_p(differences: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided p of "the paired differences are symmetric about 0", by flipping their signs.  differences: [N]."""
    n = len(differences)
    sums = sign_patterns(n, resamples, seed) @ differences
    return flipped_p(sums, float(differences.sum()), n, 1e-9 * float(np.abs(differences).sum()))


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Mean of independent runs (seeds) with Student's interval, mean +- t_{n-1} sd / sqrt(n).  values: [N].

    A single run: lo and hi are NaN.
    """
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    from scipy.stats import t

    arm = float(t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - arm, mean + arm, n)


def paired_t_p(differences: np.ndarray) -> float:
    """Two-sided p of "the paired differences have mean 0" by Student's t test.  differences: [N], N >= 2.

    Equal differences leave no spread to judge by, as where a metric is saturated in every seed: 1.
    """
    n = len(differences)
    if n < 2:
        raise ValueError(f"a t test needs two pairs, got {n}")
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    if spread <= 1e-12 * abs(mean):
        return 1.0
    from scipy.stats import t

    return float(2 * t.sf(abs(mean) / (spread / math.sqrt(n)), n - 1))


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
