"""How unlike each other the rollouts of one prompt are: a pure function."""

from __future__ import annotations

import torch
from torch import Tensor


def diversity(clips: Tensor, takes: int) -> float:
    """Mean over prompts and pairs of root mean square distances.

    clips: [P K, F, C, h, w] by prompt, then take; takes: K >= 2.  0 where all are the same.
    """
    groups = clips.detach().float().flatten(1).unflatten(0, (-1, takes))
    scale = groups.shape[2] ** 0.5
    return float(torch.stack([torch.nn.functional.pdist(group).mean() for group in groups]).mean()) / scale
