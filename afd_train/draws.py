"""Random numbers of a step's clips, each from a generator of its own.

What a clip meets (noise, times) follows from (seed, step, purpose, clip) and not from its batch or process, so that
several processes train as one does, and a resumed run needs no generator states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(*what: object) -> torch.Generator:
    """A generator on the CPU that follows from the text of `what`."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Draws:
    """Draws for a list of clips: [clips, *shape] each time."""

    def __init__(self, seed: int, step: int, purpose: str, clips: Sequence[str], device: torch.device):
        self._generators = [generator(seed, step, purpose, clip) for clip in clips]
        self._device = device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return self._stack([torch.randn(shape, generator=source) for source in self._generators])

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1)."""
        return self._stack([torch.rand(shape, generator=source) for source in self._generators])

    def integers(self, below: int, *shape: int) -> Tensor:
        """In [0, below)."""
        return self._stack([torch.randint(below, shape, generator=source) for source in self._generators])

    def _stack(self, rows: list[Tensor]) -> Tensor:
        return torch.stack(rows).to(self._device)
