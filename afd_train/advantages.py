"""Scores of rollouts -> advantages -> weights in [0, 1]: pure functions (AFD eq. 2)."""

from __future__ import annotations

from torch import Tensor


def group_advantages(scores: Tensor) -> Tensor:
    """r = (D - b(prompt)) / global standard deviation (AFD eq. 2).

    scores: [P, K], K rollouts of each of P prompts -> [P, K].  The baseline b is the mean of the prompt's own group,
    so every row sums to 0: a batch mean instead lets weights differ from 1/2 per prompt, and training collapses.
    """
    centred = scores - scores.mean(1, keepdim=True)
    return centred / (centred.square().mean().sqrt() + 1e-4)


def weights_from_advantages(advantages: Tensor, clip: float) -> Tensor:
    """Advantage -> weight of eq. 4: clipped to +-clip, mapped linearly to [0, 1]; 0 becomes 1/2.  Any shape."""
    return advantages.clamp(-clip, clip) / (2 * clip) + 0.5


def shuffled(advantages: Tensor, draws: Tensor) -> Tensor:
    """The control: the same advantages given to other rollouts of the same prompt.

    advantages: [P, K]; draws: [P, K] random numbers whose order is the new one -> [P, K].
    """
    return advantages.gather(1, draws.argsort(1))
