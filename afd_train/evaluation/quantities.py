"""How the physics that videos show is distributed, against the teacher's: Wasserstein-1 of speed, gravity, restitution.

A single video says whether its own physics is right (`physics`); these say whether a policy's videos as a set are
thrown as fast, fall as hard and bounce as high as the teacher's.  Values of all prompts are pooled, so that a distance
is in the quantity's unit.  The unit of statistics is the prompt: all its videos are drawn, or swapped, together.
Works on arrays: `measured` gives the values of one video, `set_distances` compares sets.  Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from afd_train.evaluation import stats
from afd_train.evaluation.compare import PAIRS, Cell, Comparison
from afd_train.evaluation.metric import Metric
from afd_train.evaluation.physics import Observation, bounce_ratios

TEACHER = "teacher"
QUANTITIES = ("speed", "gravity", "restitution")
PREFIX = "w1_"
CHUNK = 4_000_000  # numbers that a resampled distance may hold in memory at once

_SETS = (
    "videos as sets, in the quantity's unit. Videos in which it cannot be measured are left out and counted. Chance "
    "alone keeps it above 0: the teacher's own value compares its even takes with its odd ones, the floor."
)
METRICS = {
    PREFIX + "speed": Metric(
        "lower",
        "units/s",
        "Wasserstein-1 distance of start speeds (of each body in its first interval without contact, averaged over "
        f"bodies) between the policy's and the teacher's {_SETS}",
    ),
    PREFIX + "gravity": Metric(
        "lower",
        "units/s2",
        "Wasserstein-1 distance of gravities (one fitted by least squares to all free flights of a video) between the "
        f"policy's and the teacher's {_SETS}",
    ),
    PREFIX + "restitution": Metric(
        "lower",
        "absolute",
        "Wasserstein-1 distance of restitutions (mean over a video's floor bounces of speed after / speed before) "
        f"between the policy's and the teacher's {_SETS}",
    ),
}
Values = Mapping[str, np.ndarray]  # prompt id -> [takes, 3] in the order of QUANTITIES, NaN: not measurable


def measured(observed: Observation) -> np.ndarray:
    """Start speed (units/s), gravity (units/s^2) and restitution of one video: [3], NaN where not measurable."""
    clean = observed.motion.clean
    moving = np.flatnonzero(clean.any(axis=1))
    first = clean[moving].argmax(axis=1)
    step = observed.seen.positions[moving, first + 1] - observed.seen.positions[moving, first]
    speed = np.hypot(*step.T).mean() * observed.fps if len(moving) else np.nan
    ratios = [ratio for _, ratio in bounce_ratios(observed)]
    return np.array([speed, observed.motion.gravity, np.mean(ratios) if ratios else np.nan])


def set_distances(
    policies: Mapping[str, Values], resamples: int, seed: int, pairs: Sequence[tuple[str, str]] = PAIRS
) -> tuple[list[Cell], list[Comparison], dict[str, str]]:
    """Cells, comparisons of `pairs` and skipped metrics of `METRICS`.  policies: name -> values, "teacher" included.

    Works on the prompts that every policy has; needs two of them.  A cell's `failed` counts the videos left out.
    """
    prompts = sorted(set.intersection(*(set(values) for values in policies.values())))
    if len(prompts) < 2:
        return [], [], dict.fromkeys(METRICS, "needs two prompts that every policy has")
    cells: list[Cell] = []
    comparisons: list[Comparison] = []
    skipped: dict[str, str] = {}
    drawn = stats.prompt_draws(len(prompts), resamples, seed)
    for column, quantity in enumerate(QUANTITIES):
        name = PREFIX + quantity
        samples = {policy: _sample(values, prompts, column) for policy, values in policies.items()}
        if empty := [policy for policy, sample in samples.items() if not len(sample.values)]:
            skipped[name] = f"in no video of {', '.join(empty)}"
        if TEACHER in empty:
            continue
        teacher = samples.pop(TEACHER)
        spreads = {policy: _spread(sample, teacher, drawn) for policy, sample in samples.items() if policy not in empty}
        cells += [_cell(name, policy, spread, samples[policy].clips) for policy, spread in spreads.items()]
        even, odd = (_sample(policies[TEACHER], prompts, column, half) for half in (0, 1))
        if len(even.values) and len(odd.values):
            cells.append(_cell(name, TEACHER, _spread(even, odd, drawn), teacher.clips))
        for a, b in pairs:
            if a in spreads and b in spreads:
                delta = spreads[a].distance - spreads[b].distance
                p = _swap_p(samples[a], samples[b], teacher, delta, resamples, seed)
                comparisons.append(_comparison(name, (a, b), spreads, len(prompts), p))
    return cells, comparisons, skipped


def wasserstein_1(x: np.ndarray, x_weights: np.ndarray, y: np.ndarray, y_weights: np.ndarray) -> np.ndarray:
    """Distance of the weighted samples x [N] and y [M] for K sets of weights, [K, N] and [K, M] >= 0: [K].

    The area between the two distribution functions.  NaN where all weights of a side are 0.
    """
    values = np.concatenate([x, y])
    order = np.argsort(values, kind="stable")
    gaps = np.diff(values[order])
    rows = max(1, CHUNK // len(values))
    distances = [np.empty(0)]
    for start in range(0, len(x_weights), rows):
        left, right = (weights[start : start + rows].astype(float) for weights in (x_weights, y_weights))
        with np.errstate(invalid="ignore"):
            mass = np.concatenate(
                [left / left.sum(axis=1, keepdims=True), -right / right.sum(axis=1, keepdims=True)], axis=1
            )
        distances.append(np.abs(np.cumsum(mass[:, order], axis=1)[:, :-1]) @ gaps)
    return np.concatenate(distances)


@dataclass(frozen=True)
class _Sample:
    """One quantity of one policy, pooled: values [N] that could be measured, the prompt's index of each."""

    values: np.ndarray
    prompts: np.ndarray
    clips: tuple[int, int, int]  # prompts, videos, videos that could not be measured


@dataclass(frozen=True)
class _Spread:
    """A distance and its bootstrap distribution [K]."""

    distance: float
    resampled: np.ndarray


def _sample(values: Values, prompts: Sequence[str], column: int, half: int | None = None) -> _Sample:
    """`half`: only the even (0) or odd (1) takes."""
    takes = [values[prompt][slice(half, None, None if half is None else 2), column] for prompt in prompts]
    pooled = np.concatenate(takes)
    known = np.isfinite(pooled)
    owner = np.repeat(np.arange(len(prompts)), [len(of_prompt) for of_prompt in takes])
    return _Sample(pooled[known], owner[known], (len(prompts), len(pooled), int((~known).sum())))


def _spread(x: _Sample, y: _Sample, drawn: np.ndarray) -> _Spread:
    once = np.ones((1, drawn.shape[1]))
    distance, resampled = (
        wasserstein_1(x.values, counts[:, x.prompts], y.values, counts[:, y.prompts]) for counts in (once, drawn)
    )
    return _Spread(float(distance[0]), resampled)


def _interval(distance: float, resampled: np.ndarray) -> tuple[float | None, float | None]:
    """The basic bootstrap interval, 2 d - quantiles: resampling adds to a distance what sampling has added before.

    Approximate: with 32 simulated prompts of 4 videos it held the true distance in 75 to 88 % of repetitions (the
    percentile interval: in none where the truth is 0).  The swap test kept its level, so p decides, not the interval.
    """
    known = resampled[np.isfinite(resampled)]
    if not len(known):
        return None, None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(2 * distance - high), float(2 * distance - low)


def _cell(name: str, policy: str, spread: _Spread, clips: tuple[int, int, int]) -> Cell:
    lo, hi = _interval(spread.distance, spread.resampled)
    if lo is not None and hi is not None:  # a distance is not negative, and the interval holds the estimate
        lo, hi = max(0.0, lo), max(spread.distance, hi)
    return Cell(name, policy, spread.distance, lo, hi, *clips)


def _comparison(name: str, pair: tuple[str, str], spreads: Mapping[str, _Spread], prompts: int, p: float) -> Comparison:
    a, b = (spreads[policy] for policy in pair)
    delta = a.distance - b.distance
    lo, hi = _interval(delta, a.resampled - b.resampled)
    return Comparison(name, "lower", *pair, prompts, a.distance, b.distance, delta, lo, hi, p)


def _swap_p(a: _Sample, b: _Sample, teacher: _Sample, observed: float, resamples: int, seed: int) -> float:
    """p of "a and b are exchangeable on each prompt": the difference of distances when prompts swap their videos."""
    prompts = a.clips[0]
    kept = stats.sign_patterns(prompts, resamples, seed) > 0
    values = np.concatenate([a.values, b.values])
    own = np.concatenate([kept[:, a.prompts], ~kept[:, b.prompts]], axis=1)
    once = np.broadcast_to(np.ones(1), (len(kept), len(teacher.values)))
    ours, others = (wasserstein_1(values, side, teacher.values, once) for side in (own, ~own))
    return stats.flipped_p(
        ours - others, observed, prompts, 1e-9 * float(np.ptp(np.concatenate([values, teacher.values])))
    )
