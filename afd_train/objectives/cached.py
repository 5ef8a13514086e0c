"""Velocities on a cached clean context: of all chunks at once, or one after the other (`train.chunk_by_chunk`)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from afd_train.objectives import Setup
from afd_train.students.attention import KVCache
from afd_train.students.causal_wan import CausalWan


def remembered(setup: Setup, net: CausalWan, context: Tensor, text: Tensor, time: float) -> KVCache:
    """A cache of a rollout's clean context, [B, F - chunk, C, H, W], which the network is told to have this time.

    Many small passes: callers put sharded weights together around it (`Processes.unsharded`).
    """
    cache = net.memory(context.shape[1])
    size = net.chunk_frames if setup.config.chunk_by_chunk else context.shape[1]
    for first in range(0, context.shape[1], max(1, size)):
        net.remember(context[:, first : first + size], text, cache, time)
    return cache


def velocities(
    setup: Setup, net: CausalWan, x: Tensor, t: Tensor, text: Tensor, cache: KVCache, copies: int = 1
) -> Iterator[tuple[list[int], Tensor]]:
    """Velocities, [B, n, C, H, W], and the n frames of `x` that they are for: piece by piece, each as long.

    x: [B, copies F, C, H, W], so many noisy versions of the F frames one after the other; t: [B, copies F].
    """
    frames = x.shape[1] // copies
    size = net.chunk_frames if setup.config.chunk_by_chunk else frames
    for first in range(0, frames, size):
        piece = [copy * frames + frame for copy in range(copies) for frame in range(first, first + size)]
        yield piece, net.chunks(x[:, piece], t[:, piece], text, cache, first, copies)
