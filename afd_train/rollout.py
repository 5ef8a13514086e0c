"""Few-step autoregressive sampling with a KV cache.  Training and evaluation use the same code.

Every random number follows from (prompt id, seed, take): a sample does not depend on its batch, rank or order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_train.flow import clean_from_velocity, noised
from afd_train.students.causal_wan import CausalWan, KVCache


@dataclass(frozen=True)
class Rollout:
    """Student clips and what an update needs of how they came about.

    clips: [B, F, C, H, W]; cache: keys and values of all clean chunks but the last (nothing follows that one);
    visited: what the network saw at each step of the sampler, [steps, B, F, C, H, W].
    """

    clips: Tensor
    cache: KVCache
    visited: Tensor


def clip_generator(prompt_id: str, seed: int, take: int) -> torch.Generator:
    """The source of all noise of one clip.  On the CPU, so that a clip does not depend on the device either."""
    digest = hashlib.sha256(f"{prompt_id}/{seed}/{take}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class NoiseSource:
    """Noise of a batch of clips, chunk after chunk and step after step, each clip from its own generator."""

    def __init__(self, generators: Sequence[torch.Generator], chunk_shape: Sequence[int], device: torch.device):
        self._generators = generators
        self._shape = tuple(chunk_shape)  # (chunk frames, C, H, W)
        self._device = device

    def __call__(self) -> Tensor:
        """The next [B, chunk, C, H, W] of standard normal noise."""
        draws = [torch.randn(self._shape, generator=generator) for generator in self._generators]
        return torch.stack(draws).to(self._device)


@torch.no_grad()
def rollout_chunks(
    net: CausalWan, text: Tensor, noise: NoiseSource, times: Sequence[float], chunks: int, cache: KVCache
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield finished chunks [B, chunk, C, H, W], each as soon as it is there, with what was visited on the way.

    A chunk starts as noise; at every time of `times` (falling, in (0, 1]) the network's clean estimate is taken and,
    but for the last, noised again to the next time with fresh noise.
    """
    for index in range(chunks):
        x = noise()
        clean = x
        visited = []
        for now, after in zip(times, [*times[1:], None], strict=True):
            visited.append(x)
            t = torch.full(x.shape[:2], now, device=x.device)
            clean = clean_from_velocity(x, net.chunk(x, t, text, cache), t)
            if after is not None:
                x = noised(clean, noise(), torch.full_like(t, after))
        if index + 1 < chunks:
            net.remember(clean, text, cache)
        yield clean, torch.stack(visited)


def rollout(net: CausalWan, text: Tensor, noise: NoiseSource, times: Sequence[float], chunks: int) -> Rollout:
    """All chunks of a batch of clips; text: [B, L, D]."""
    cache = KVCache()
    clips, visited = zip(*rollout_chunks(net, text, noise, times, chunks, cache), strict=True)
    return Rollout(torch.cat(clips, 1), cache, torch.cat(visited, 2))
