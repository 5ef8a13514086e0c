"""Statistics over training seeds: means with Student's interval, paired t tests, Holm.  Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from afd_train.evaluation import stats

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Mean:
    """Over `n` seeds; `half`: of the 95 % interval, None for a single seed."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """a - b over the `n` seeds that both have; `p`: of the paired t test, two-sided; `p_holm`: over all methods."""

    difference: float
    half: float | None
    n: int
    p: float | None
    p_holm: float | None = None


def mean_of(values: Sequence[float]) -> Mean:
    """values: at least one, finite."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Mean(mean, None, len(values))
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return Mean(mean, float(half), len(values))


def paired(a: BySeed, b: BySeed) -> Paired | None:
    """None where they share no seed; no p for a single one."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    differences = np.array([a[seed] - b[seed] for seed in seeds])
    found = mean_of(differences.tolist())
    if found.half is None:
        return Paired(found.mean, None, 1, None)
    if found.half == 0:  # where the t statistic is 0 / 0 or infinite
        return Paired(found.mean, 0.0, found.n, 1.0 if found.mean == 0 else 0.0)
    from scipy.stats import t

    statistic = abs(found.mean) * math.sqrt(found.n) / differences.std(ddof=1)
    return Paired(found.mean, found.half, found.n, float(2 * t.sf(statistic, found.n - 1)))


def with_holm(tests: Mapping[str, Paired]) -> dict[str, Paired]:
    """The tests of one metric against one method, adjusted for how many there are."""
    tested = {name: test.p for name, test in tests.items() if test.p is not None}
    adjusted = dict(zip(tested, stats.holm(list(tested.values())), strict=True))
    return {name: replace(test, p_holm=adjusted.get(name)) for name, test in tests.items()}
