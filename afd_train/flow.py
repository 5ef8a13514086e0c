"""Rectified flow, the one convention of this repository.

t = 0 is the clean clip, t = 1 is noise, the velocity points from clean to noise.  Nobody else writes `1 - t`.
Shapes: B = batch, F = latent frame, C = channel, H, W = latent pixels; times are [B, F], one a latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def per_frame(t: Tensor) -> Tensor:
    """[B, F] -> [B, F, 1, 1, 1], to multiply a clip with."""
    return t[..., None, None, None]


def noised(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) clean + t noise (AFD eq. 3).  clean, noise: [B, F, C, H, W]; t: [B, F] in [0, 1]."""
    t = per_frame(t)
    return (1 - t) * clean + t * noise


def nearby(noise: Tensor, other: Tensor, spread: float) -> Tensor:
    """`noise` with `spread` of it exchanged for `other`: standard normal if both are, at correlation sqrt(1 - s^2)."""
    return math.sqrt(1 - spread**2) * noise + spread * other


def nearby_at_the_start(starts: Tensor, noise: Tensor, t: Tensor, spread: float) -> Tensor:
    """The noise of a clip that is noised to `t`: where that leaves noise alone (t = 1), near what it was drawn from.

    starts: what every chunk of the clip began as; noise: new; both [B, F, C, H, W]; t: [B, F].
    """
    return torch.where(per_frame(t) == 1, nearby(starts, noise, spread), noise)


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """v = noise - clean, the derivative of `noised` (AFD eq. 3)."""
    return noise - clean


def clean_from_velocity(noisy: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The clean clip that velocity `v` at `noisy` points back to: x_t - t v."""
    return noisy - per_frame(t) * v


def velocity_from_clean(noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """The inverse of `clean_from_velocity`: (x_t - clean) / t, for t > 0."""
    return (noisy - clean) / per_frame(t)


def warped(step: float, shift: float) -> float:
    """A step of the sampler (1000 = noise) as a time in [0, 1]: t = shift s / (1 + (shift - 1) s), s = step / 1000.

    With shift 5 the usual 1000, 750, 500, 250 become 1, 0.9375, 0.8333, 0.625.
    """
    s = step / 1000
    return shift * s / (1 + (shift - 1) * s)


def schedule(steps: Sequence[int], shift: float) -> list[float]:
    """The sampler's times, falling, from unwarped steps."""
    return [warped(step, shift) for step in steps]


def table(shift: float) -> Tensor:
    """The 1,000 times that Wan students were distilled on, falling from 1 to about shift / 1000: [1000], float64.

    It holds no 0: its smallest entry is what "clean" context is noised to while Self-Forcing trains.
    """
    return torch.tensor([warped(step, shift) for step in range(1000, 0, -1)], dtype=torch.float64)


def nearest_time(t: float, shift: float) -> float:
    """The entry of `table` that is nearest to t in [0, 1]."""
    times = table(shift)
    return float(times[(times - t).abs().argmin()])
