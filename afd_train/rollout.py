"""Few-step autoregressive sampling with a KV cache.  Training and evaluation use the same code.

Every random number follows from (prompt id, seed, take): a sample does not depend on its batch, rank or order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from afd_train.draws import generator
from afd_train.flow import clean_from_velocity, nearest_time, noised, schedule
from afd_train.student_config import StudentConfig

if TYPE_CHECKING:  # a student rolls out: its package imports this module
    from afd_train.students.attention import KVCache
    from afd_train.students.causal_wan import CausalWan


@dataclass(frozen=True)
class Sampler:
    """How a student draws a clip."""

    times: tuple[float, ...]  # of a chunk's steps, falling, in (0, 1]
    first_times: tuple[float, ...]  # of the first chunk that is drawn
    context_time: float = 0.0  # the time that finished chunks are remembered with
    context_noise: float = 0.0  # the time to which they are noised before that

    @staticmethod
    def of(config: StudentConfig, training: bool) -> Sampler:
        """The sampler of a student: for videos, or for the rollouts it learns from.

        Self-Forcing remembers clean chunks when it samples; while it trains it noises them to the entry of its
        schedule that is nearest to the context's time, which for 0 is its smallest.
        """
        renoised = config.renoised_context == "always" or (training and config.renoised_context == "training")
        time = config.context_noise / 1000
        return Sampler(
            times=tuple(schedule(config.steps, config.shift)),
            first_times=tuple(schedule(config.first_chunk_steps or config.steps, config.shift)),
            context_time=time,
            context_noise=nearest_time(time, config.shift) if renoised else 0.0,
        )


def step_times(sampler: Sampler, where: Tensor, frames: int, chunk: int) -> Tensor:
    """Times of a sampler's own steps: places in [0, 1), [B, n] -> [B, n, frames], one place for a whole clip.

    The first chunk's are those of `first_times`.
    """
    first, other = (
        torch.tensor(times, device=where.device)[(where * len(times)).long()][..., None]
        for times in (sampler.first_times, sampler.times)
    )
    return torch.cat([first.expand(-1, -1, chunk), other.expand(-1, -1, frames - chunk)], 2)


@dataclass(frozen=True)
class Rollout:
    """Student clips and what an update needs of how they came about.

    clips: [B, F, C, H, W]; context: what the student saw of all chunks but the last, [B, F - chunk, C, H, W]; cache:
    its keys and values; visited: for every chunk what the network saw at its steps, [steps, B, chunk, C, H, W].
    """

    clips: Tensor
    context: Tensor
    cache: KVCache
    visited: tuple[Tensor, ...]

    def left(self, sampler: Sampler, before_end: int) -> tuple[Tensor, Tensor]:
        """What the network saw so many steps before the last one of every chunk, or at its first where it has fewer.

        For the clips that `sampler` drew: [B, F, C, H, W] and times [B, F].
        """
        noisy, times = [], []
        for index, visited in enumerate(self.visited):
            of_chunk = sampler.times if index else sampler.first_times
            leave = max(0, len(of_chunk) - 1 - before_end)
            noisy.append(visited[leave])
            times.append(torch.full(visited.shape[1:3], of_chunk[leave], device=visited.device))
        return torch.cat(noisy, 1), torch.cat(times, 1)


class Noise(Protocol):
    """Where a rollout's noise comes from: [B, chunk, C, H, W], standard normal, in the order of use."""

    def step(self) -> Tensor:
        """For the start of a chunk and after each of its steps but the last."""
        ...

    def context(self) -> Tensor:
        """For a finished chunk that is noised before it is remembered."""
        ...


@dataclass(frozen=True)
class ClipNoise:
    """Noise of a batch of clips, (prompt id, seed, take) each, drawn from generators of their own.

    Steps and contexts have different ones, so that clips of both samplers start from the same noise.
    """

    steps: Sequence[torch.Generator]
    contexts: Sequence[torch.Generator]
    shape: tuple[int, ...]  # (chunk frames, C, H, W)
    device: torch.device

    @staticmethod
    def of(clips: Sequence[tuple[str, int, int]], shape: tuple[int, ...], device: torch.device) -> ClipNoise:
        """The noise that belongs to these clips."""
        steps = [generator(*clip) for clip in clips]
        return ClipNoise(steps, [generator(*clip, "context") for clip in clips], shape, device)

    def step(self) -> Tensor:
        """See `Noise`."""
        return self._draw(self.steps)

    def context(self) -> Tensor:
        """See `Noise`."""
        return self._draw(self.contexts)

    def _draw(self, sources: Sequence[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=source) for source in sources]).to(self.device)


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: [B, chunk, C, H, W]; as it was remembered (the last is not); what was seen at its steps."""

    clean: Tensor
    context: Tensor
    visited: Tensor


@torch.no_grad()
def rollout_chunks(
    net: CausalWan, text: Tensor, noise: Noise, sampler: Sampler, chunks: int, cache: KVCache
) -> Iterator[Chunk]:
    """Draw `chunks` chunks after those in `cache`, yielding each as soon as it is there.

    A chunk starts as noise; at every time of the sampler (falling, in (0, 1]) the network's clean estimate is taken
    and, but for the last, noised again to the next time with fresh noise.
    """
    for index in range(chunks):
        times = sampler.times if index else sampler.first_times
        x = noise.step()
        clean = x
        visited = []
        for now, after in zip(times, [*times[1:], None], strict=True):
            visited.append(x)
            t = torch.full(x.shape[:2], now, device=x.device)
            clean = clean_from_velocity(x, net.chunk(x, t, text, cache), t)
            if after is not None:
                x = noised(clean, noise.step(), torch.full_like(t, after))
        context = clean
        if index + 1 < chunks:
            if sampler.context_noise:
                t = torch.full(clean.shape[:2], sampler.context_noise, device=clean.device)
                context = noised(clean, noise.context(), t)
            net.remember(context, text, cache, sampler.context_time)
        yield Chunk(clean, context, torch.stack(visited))


def rollout(
    net: CausalWan, text: Tensor, noise: Noise, sampler: Sampler, chunks: int, prefix: Tensor | None = None
) -> Rollout:
    """All chunks of a batch of clips; text: [P, L, D], its P prompts with B / P clips each.

    `prefix`: clean latent frames to go on from, [B, n chunk, C, H, W] (image to video: one frame); it is part of the
    result.
    """
    given = 0 if prefix is None else prefix.shape[1]
    cache = net.memory(given + chunks * net.chunk_frames)
    if prefix is not None:
        net.remember(prefix, text, cache, sampler.context_time)
    done = list(rollout_chunks(net, text, noise, sampler, chunks, cache))
    start = [] if prefix is None else [prefix]
    return Rollout(
        clips=torch.cat([*start, *(chunk.clean for chunk in done)], 1),
        context=torch.cat([*start, *(chunk.context for chunk in done)], 1)[:, : -net.chunk_frames],
        cache=cache,
        visited=tuple(chunk.visited for chunk in done),
    )
