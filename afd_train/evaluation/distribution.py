"""How far a policy's videos are from the teacher's as a set: unbiased squared MMD, with its interval and test.

A video is 8 evenly spaced frames reduced to 8 x 8 pixels, and the differences between them (no learnt features).  The
kernel is Gaussian with the median distance between teacher clips as its width.  The unit is the prompt: clips of one
prompt are never compared with each other, so the estimate is a U-statistic over prompts and its floor is 0 for equal
distributions.  Knows nothing of files or HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from afd_train.evaluation import stats
from afd_train.evaluation.compare import PAIRS, Cell, Comparison
from afd_train.evaluation.metric import Metric

NAME, TEACHER = "teacher_mmd", "teacher"
SIDE, FRAMES = 8, 8
SCALE = 1000.0

METRICS = {
    NAME: Metric(
        "lower",
        "x 1000",
        "Squared maximum mean discrepancy (unbiased, times 1000) between the policy's and the teacher's videos as "
        f"sets: {FRAMES} frames of {SIDE} x {SIDE} pixels and their differences, Gaussian kernel as wide as the median "
        "distance between teacher clips. 0 is the teacher's distribution and chance may take it below. The teacher's "
        "own value compares one half of its takes with the other: the floor.",
    )
}
Clips = Mapping[str, np.ndarray]  # prompt id -> features [takes, D]


def features(video: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3] -> float32 [D]: small frames in [0, 1], then the differences between them."""
    chosen = np.linspace(0, len(video) - 1, FRAMES).round().astype(int)
    small = np.stack([cv2.resize(video[index], (SIDE, SIDE), interpolation=cv2.INTER_AREA) for index in chosen])
    frames = small.astype(np.float32) / 255
    return np.concatenate([frames.ravel(), np.diff(frames, axis=0).ravel()])


def compare_sets(
    clips: Mapping[str, Clips], resamples: int, seed: int
) -> tuple[list[Cell], list[Comparison], dict[str, str]]:
    """Cells, comparisons and skipped metrics of `NAME`.  clips: policy -> prompt id -> [takes, D], teacher included.

    Works on the prompts that every policy has; needs two of them.
    """
    prompts = sorted(set.intersection(*(set(of_policy) for of_policy in clips.values())))
    if len(prompts) < 2:
        return [], [], {NAME: "needs two prompts that every policy has"}
    width = _median_distance(np.concatenate([clips[TEACHER][prompt] for prompt in prompts]))
    terms = {
        policy: pair_terms(of_policy, clips[TEACHER], prompts, width)
        for policy, of_policy in clips.items()
        if policy != TEACHER
    }
    cells = [_cell(policy, found, clips[policy], prompts, resamples, seed) for policy, found in terms.items()]
    floor = _floor(clips[TEACHER], prompts, width)
    if floor is not None:
        cells.append(_cell(TEACHER, floor, clips[TEACHER], prompts, resamples, seed))
    comparisons = [
        _comparison(a, b, clips, prompts, width, resamples, seed) for a, b in PAIRS if a in terms and b in terms
    ]
    return cells, comparisons, {}


def pair_terms(x: Clips, y: Clips, prompts: Sequence[str], width: float) -> np.ndarray:
    """h[p, q] = k(x_p, x_q) + k(y_p, y_q) - k(x_p, y_q) - k(y_p, x_q), takes averaged; 0 for p = q.  [P, P]."""
    cross = _kernel(x, y, prompts, width)
    return _kernel(x, x, prompts, width) + _kernel(y, y, prompts, width) - cross - cross.T


def squared_mmd(terms: np.ndarray) -> float:
    """Mean of h over ordered pairs of different prompts, times 1000.  terms: [P, P] with a zero diagonal."""
    return SCALE * float(terms.sum() / (len(terms) * (len(terms) - 1)))


def bootstrap(terms: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of `squared_mmd` over resampled prompts; a prompt drawn twice still skips itself."""
    count = len(terms)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    pairs = count * count - np.square(weights).sum(axis=1)
    sums = np.einsum("rp,rp->r", weights @ terms, weights)
    lo, hi = np.percentile(SCALE * sums[pairs > 0] / pairs[pairs > 0], [2.5, 97.5])
    return float(lo), float(hi)


def swap_contributions(a: Clips, b: Clips, teacher: Clips, prompts: Sequence[str], width: float) -> np.ndarray:
    """c [P] with mean(c) = mmd(a) - mmd(b), where swapping a and b on prompt p only flips the sign of c_p.

    That makes the sign-flip test of c the exact permutation test of "a and b are exchangeable on each prompt".
    """
    # In feature space c_p is (a_p - b_p) . (mean a + mean b - 2 mean teacher), the means without prompt p.
    to_both, to_teacher = (
        [_kernel(own, other, prompts, width) for own in (a, b) for other in others] for others in ((a, b), (teacher,))
    )
    gains = to_both[0] + to_both[1] - to_both[2] - to_both[3] - 2 * (to_teacher[0] - to_teacher[1])
    return SCALE * gains.sum(axis=1) / (len(prompts) - 1)


def _comparison(
    a: str, b: str, clips: Mapping[str, Clips], prompts: Sequence[str], width: float, resamples: int, seed: int
) -> Comparison:
    teacher = clips[TEACHER]
    terms_a = pair_terms(clips[a], teacher, prompts, width)
    terms_b = pair_terms(clips[b], teacher, prompts, width)
    lo, hi = bootstrap(terms_a - terms_b, resamples, seed)
    contributions = swap_contributions(clips[a], clips[b], teacher, prompts, width)
    mean_a, mean_b = squared_mmd(terms_a), squared_mmd(terms_b)
    p = stats.sign_flip_p(contributions, resamples, seed)
    return Comparison(NAME, "lower", a, b, len(prompts), mean_a, mean_b, mean_a - mean_b, lo, hi, p)


def _cell(policy: str, terms: np.ndarray, clips: Clips, prompts: Sequence[str], resamples: int, seed: int) -> Cell:
    lo, hi = bootstrap(terms, resamples, seed)
    count = sum(len(clips[prompt]) for prompt in prompts)
    return Cell(NAME, policy, squared_mmd(terms), lo, hi, len(prompts), count, failed=0)


def _floor(teacher: Clips, prompts: Sequence[str], width: float) -> np.ndarray | None:
    """Terms between the even and the odd takes of the teacher; None where a prompt has a single take."""
    if any(len(teacher[prompt]) < 2 for prompt in prompts):
        return None
    halves = [{prompt: teacher[prompt][half::2] for prompt in prompts} for half in (0, 1)]
    return pair_terms(halves[0], halves[1], prompts, width)


def _kernel(x: Clips, y: Clips, prompts: Sequence[str], width: float) -> np.ndarray:
    """Mean over takes of exp(-|x - y|^2 / (2 width^2)) between prompts, zero diagonal.  [P, P]."""
    left, right = (np.concatenate([clips[prompt] for prompt in prompts]) for clips in (x, y))
    kernel = np.exp(-_squared_distances(left, right) / (2 * width * width))
    rows, columns = (_averaging(clips, prompts) for clips in (x, y))
    means = rows @ kernel @ columns.T
    np.fill_diagonal(means, 0)
    return means


def _averaging(clips: Clips, prompts: Sequence[str]) -> np.ndarray:
    """[P, clips] with 1 / takes where a clip belongs to the prompt."""
    takes = [len(clips[prompt]) for prompt in prompts]
    return np.repeat(np.eye(len(prompts)) / np.array(takes)[:, None], takes, axis=1)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[N, D], [M, D] -> [N, M], in float64 so that equal clips are 0 apart."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return np.maximum(np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T, 0)


def _median_distance(clips: np.ndarray) -> float:
    """Median distance between different clips; 1 where all are equal."""
    distances = np.sqrt(_squared_distances(clips, clips)[np.triu_indices(len(clips), 1)])
    return float(np.median(distances)) or 1.0
