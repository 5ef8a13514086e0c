"""Scores of rollouts -> advantages -> weights in [0, 1]: pure functions (AFD eq. 2).

Scores are [P, K, S]: K rollouts of each of P prompts, S = 1 for whole videos or their number of chunks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SMALLEST_DEVIATION = 1e-4


def advantages_of(
    scores: Tensor,
    baseline: Literal["prompt", "batch"] = "prompt",
    normalisation: Literal["global", "prompt", "none"] = "global",
    discount: float = 0.0,
) -> Tensor:
    """r = (D - b) / standard deviation (AFD eq. 2): [P, K, S] -> [P, K, S].

    baseline: the mean of the prompt's own group, chunk by chunk, so that the advantages of a prompt add up to 0; the
    mean of the batch instead lets weights differ from 1/2 per prompt, and training collapses.
    discount: in [0, 1], a chunk is also credited with discount^n of what the n-th chunk after it is better than others.
    normalisation: by the deviation of all, by that of the prompt's own, or none.
    """
    centre = (0, 1) if baseline == "batch" else (1,)
    centred = discounted_future(scores - scores.mean(centre, keepdim=True), discount)
    match normalisation:
        case "global":
            return centred / (centred.square().mean().sqrt() + SMALLEST_DEVIATION)
        case "prompt":
            return centred / (centred.square().mean((1, 2), keepdim=True).sqrt() + SMALLEST_DEVIATION)
        case "none":
            return centred


def discounted_future(values: Tensor, discount: float) -> Tensor:
    """out_k = sum over n >= 0 of discount^n values_(k + n), along the last axis."""
    out = values.clone()
    for k in range(values.shape[-1] - 2, -1, -1):
        out[..., k] += discount * out[..., k + 1]
    return out


def clipped(advantages: Tensor, clip: float) -> Tensor:
    """Within +-clip, and centred again over the second axis, which clipping may have shifted.  [P, M, ...]."""
    within = advantages.clamp(-clip, clip)
    return within - within.mean(1, keepdim=True)


def weights_from_advantages(advantages: Tensor, clip: float) -> Tensor:
    """Advantage -> weight of eq. 4: clipped to +-clip, mapped linearly to [0, 1]; 0 becomes 1/2.  Any shape."""
    return advantages.clamp(-clip, clip) / (2 * clip) + 0.5


def shuffled(advantages: Tensor, draws: Tensor) -> Tensor:
    """The control: the same advantages given to other rollouts of the same prompt.

    advantages: [P, K, ...]; draws: [P, K] random numbers whose order is the new one -> as advantages.
    """
    order = draws.argsort(1)
    rows = torch.arange(len(order), device=order.device)[:, None]
    return advantages[rows, order]
