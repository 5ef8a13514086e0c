"""Adversarial training: the discriminator's gradient, through the last denoising step of every chunk.

The baseline that credits a rollout through the network that drew it.  A rollout's clips are what its last steps made
of noisy chunks, so that the gradient of the loss with respect to the clips, passed through these steps on the clean
context that the rollout remembered, is that of the student.  Earlier steps and contexts carry none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.diversity import diversity
from afd_train.flow import clean_from_velocity
from afd_train.objective_config import GanConfig
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.cached import remembered, velocities
from afd_train.objectives.distances import Distances
from afd_train.objectives.judged import Judged
from afd_train.objectives.parts import Part, parts_of
from afd_train.objectives.warmup import held_out
from afd_train.rollout import Sampler
from afd_train.students.attention import KVCache
from afd_train.students.causal_wan import CausalWan


@dataclass(frozen=True)
class Drawn:
    """Rollouts of a part of a step, left before the last step of every chunk.

    clips, noisy: [B, F, C, H, W]; t: [B, F]; text: [P, L, D]; context: [B, F - chunk, C, H, W]; cache: its keys and
    values where all clips of the step were drawn at once.
    """

    part: Part
    clips: Tensor
    noisy: Tensor
    t: Tensor
    text: Tensor
    context: Tensor
    cache: KVCache | None


class Adversarial(Judged):
    """See the module's docstring."""

    def __init__(self, setup: Setup, config: GanConfig):
        super().__init__(setup)
        self._config = config
        self._sampler = Sampler.of(setup.student.config, training=True)

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """One update of the discriminator and one of the student on K rollouts of every prompt."""
        setup = self._setup
        drawn = self._draw(examples, step)
        clips = torch.cat([some.clips for some in drawn])
        metrics = self.judge.learn(examples, clips, step, self.judge.rate)
        pull = self.judge.pull(examples, clips, step)  # of the updated one
        metrics |= self.judge.steer(examples, pull.teacher, pull.student, step)
        metrics["student/loss"] = pull.loss
        if (takes := setup.config.rollouts_per_prompt) > 1:
            metrics["student/diversity"] = diversity(clips, takes)
        with setup.watch("update"):
            metrics |= self._update(drawn, pull.gradient, step)
        return metrics | held_out(setup, self.judge, step)

    def _draw(self, examples: Sequence[Example], step: int) -> list[Drawn]:
        """Roll out the current student."""
        setup, drawn = self._setup, []
        parts = list(parts_of(len(examples), setup.config.rollouts_per_prompt, setup.config.clips_per_pass))
        for part in parts:
            some = examples[part.prompts]
            rollouts = setup.rollout(some, step, part.takes)
            noisy, t = rollouts.left(self._sampler, before_end=0)
            cache = rollouts.cache if len(parts) == 1 else None
            drawn.append(Drawn(part, rollouts.clips, noisy, t, setup.text(some), rollouts.context, cache))
            del rollouts  # a second cache would not fit beside it
        return drawn

    def _update(self, drawn: Sequence[Drawn], gradient: Tensor, step: int) -> Metrics:
        """One step along `gradient`, of the loss with respect to the clips: [P K, F, C, H, W]."""
        distances = Distances()
        for some, v_reference in zip(drawn, self._reference(drawn), strict=True):
            self._accumulate(some, gradient, v_reference, distances)
        return {"student/grad_norm": self._setup.trainee.step(step)} | distances.entries()

    def _accumulate(self, some: Drawn, gradient: Tensor, v_reference: Tensor | None, distances: Distances) -> None:
        """Add the gradient of a part of the clips."""
        share = len(some.clips) / len(gradient)
        for frames, v in self._velocities(self._setup.trainee.net, some, some.cache):
            clean = clean_from_velocity(some.noisy[:, frames], v, some.t[:, frames])
            loss = (clean * gradient[some.part.rows][:, frames]).sum()
            if v_reference is not None:
                size = share * v.shape[1] / some.noisy.shape[1]
                loss = loss + self._config.prior_weight * distances.prior(size, v, v_reference[:, frames])
            self._setup.trainee.accumulate(loss)

    def _reference(self, drawn: Sequence[Drawn]) -> list[Tensor] | list[None]:
        """The reference's velocities at the same places, [B, F, C, H, W] a part; it takes the student's place once."""
        if not self._config.prior_weight:
            return [None] * len(drawn)
        setup = self._setup
        with setup.trainee.acting("reference") as net, setup.processes.unsharded(net):
            return [torch.cat([v for _, v in self._velocities(net, some, None)], 1) for some in drawn]

    def _velocities(self, net: CausalWan, some: Drawn, cache: KVCache | None) -> Iterator[tuple[list[int], Tensor]]:
        """The network's velocities on the clean context, and of which frames."""
        if cache is None:
            with self._setup.processes.unsharded(net):
                cache = remembered(self._setup, net, some.context, some.text, self._sampler.context_time)
        yield from velocities(self._setup, net, some.noisy, some.t, some.text, cache)
