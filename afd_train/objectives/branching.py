"""Drawing branches: at every chunk M candidates from one cache, of which the first is followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from afd_data.stream import Example
from afd_train.flow import clean_from_velocity, nearby, noised
from afd_train.objectives import Setup
from afd_train.objectives.parts import parts_of
from afd_train.rollout import ClipNoise, Sampler
from afd_train.students.causal_wan import CausalWan


@dataclass(frozen=True)
class Branches:
    """Candidates for every chunk of P rollouts, and what the network remembered of the chunks that were followed.

    candidates: [P, M, F, C, h, w], where chunk k is drawn behind the followed chunks before k; context:
    [P, F - chunk, C, h, w]; starts: the noise that the followed chunks began as, [P, F, C, h, w].
    """

    candidates: Tensor
    context: Tensor
    starts: Tensor

    @property
    def followed(self) -> Tensor:
        """The first candidates, a rollout as any other: [P, F, C, h, w]."""
        return self.candidates[:, 0]


@torch.no_grad()
def draw_branches(setup: Setup, examples: Sequence[Example], step: int, spread: float = 1.0) -> Branches:
    """rollouts_per_prompt candidates a chunk and prompt, by the student as it is; spread: see `nearby`."""
    student, many = setup.student, setup.config.rollouts_per_prompt
    found: list[Branches] = []
    # Where not all fit, some prompts after others: the candidates of a prompt share its cache.
    together = max(1, (setup.config.clips_per_pass or many * len(examples)) // many)
    with setup.watch("rollout"), setup.processes.unsharded(student.net):
        for part in parts_of(len(examples), 1, together):
            some = examples[part.prompts]
            noise = student.noise(setup.clips(some, step, range(many)))
            text = setup.text(some)
            found.append(
                _draw(student.net, text, noise, Sampler.of(student.config, True), student.chunks, many, spread)
            )
    return Branches(*(torch.cat(parts) for parts in zip(*(vars(part).values() for part in found), strict=True)))


def _draw(
    net: CausalWan, text: Tensor, noise: ClipNoise, sampler: Sampler, chunks: int, many: int, spread: float
) -> Branches:
    """As `rollout.rollout_chunks`, with the candidates of a chunk as copies that share the cached context."""
    chunk = net.chunk_frames
    cache = net.memory(chunks * chunk)
    candidates, context, starts = [], [], []
    for index in range(chunks):
        times = sampler.times if index else sampler.first_times
        x = clean = _beside(noise.step(), many, spread)
        starts.append(x[:, :chunk])
        for now, after in zip(times, [*times[1:], None], strict=True):
            t = torch.full(x.shape[:2], now, device=x.device)
            clean = clean_from_velocity(x, net.chunks(x, t, text, cache, index * chunk, many), t)
            if after is not None:
                x = noised(clean, _beside(noise.step(), many, spread), torch.full_like(t, after))
        candidates.append(rearrange(clean, "p (m f) c h w -> p m f c h w", m=many))
        if index + 1 < chunks:
            followed = clean[:, :chunk]
            if sampler.context_noise:
                t = torch.full(followed.shape[:2], sampler.context_noise, device=x.device)
                followed = noised(followed, noise.context()[::many], t)
            net.remember(followed, text, cache, sampler.context_time)
            context.append(followed)
    contexts = torch.cat(context, 1) if context else candidates[0][:, 0, :0]
    return Branches(torch.cat(candidates, 2), contexts, torch.cat(starts, 1))


def _beside(noise: Tensor, many: int, spread: float) -> Tensor:
    """[P M, chunk, C, h, w] -> [P, M chunk, C, h, w], near the first of each M."""
    groups = rearrange(noise, "(p m) f c h w -> p m f c h w", m=many)
    groups = torch.cat([groups[:, :1], nearby(groups[:, :1], groups[:, 1:], spread)], 1)
    return groups.flatten(1, 2)
