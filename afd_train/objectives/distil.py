"""Few-step distillation on the student's own rollouts: distribution matching, as Self-Forcing does it.

real = the frozen student this phase starts from (a flow-matching model, so its clean estimates follow the data),
fake = the same network trained online on the student's rollouts.  The rollout is left at a random step of
the sampler: there, on the clean context of its own chunks, the student's estimates move along real - fake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from afd_data.errors import UserError
from afd_data.stream import Example
from afd_train.draws import Draws
from afd_train.flow import clean_from_velocity, noised
from afd_train.losses import distribution_matching_loss
from afd_train.objective_config import DistilConfig
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.flow_matching import chunk_times, teacher_forced_loss
from afd_train.policies import frozen_copy
from afd_train.rollout import Rollout, Sampler
from afd_train.students.causal_wan import CausalWan


class Distillation:
    """Distribution matching distillation of the student into its own sampler."""

    def __init__(self, setup: Setup, config: DistilConfig):
        if setup.processes.sharded:
            raise UserError("train.shard: distil trains two networks and does not shard them; use train.shard=never")
        self._setup = setup
        self._config = config
        self._real = frozen_copy(setup.trainee.net)
        self._fake = frozen_copy(setup.trainee.net).requires_grad_(True)
        self.modules = {"real": self._real, "fake": self._fake}
        self.optimizers = {"fake": setup.optimizer(self._fake, weight_decay=1e-2, betas=(0.0, 0.99))}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Nothing to prepare."""

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """`fake_updates` of the fake score, then one of the student; only the prompts of `examples` are used."""
        setup, fake = self._setup, self.optimizers["fake"]
        text = setup.text(examples)
        rollouts = setup.rollout(examples, step, range(1))
        fake_loss = 0.0
        with setup.watch("fake"):
            for index in range(self._config.fake_updates):
                draws = setup.draws(step, f"fake {index}", examples)
                loss = teacher_forced_loss(self._fake, rollouts.clips, text, draws)
                fake.accumulate(loss)
                fake.step(self._config.fake_learning_rate)
                fake_loss = float(loss.detach())
        with setup.watch("update"):
            loss = self._loss(rollouts, text, step, setup.draws(step, "distil", examples))
            setup.trainee.accumulate(loss)
            norm = setup.trainee.step(step)
        return {"student/loss": float(loss.detach()), "student/grad_norm": norm, "fake/loss": fake_loss}

    def _loss(self, rollouts: Rollout, text: Tensor, step: int, draws: Draws) -> Tensor:
        noisy, t = self._left(rollouts, step)
        v = self._setup.trainee.net.chunks(noisy, t, text, rollouts.cache)
        clean = clean_from_velocity(noisy, v, t)
        with torch.no_grad():
            t = chunk_times(clean.shape[1], self._real.chunk_frames, draws)
            noisy = noised(clean, draws.normal(*clean.shape[1:]), t)
            real = self._estimate(self._real, noisy, t, text, rollouts.clips)
            fake = self._estimate(self._fake, noisy, t, text, rollouts.clips)
        return distribution_matching_loss(clean, real, fake)

    def _left(self, rollouts: Rollout, step: int) -> tuple[Tensor, Tensor]:
        """What the network saw where the rollout is left, the same number of steps before the end of every chunk.

        [B, F, C, H, W] and times [B, F].
        """
        sampler = Sampler.of(self._setup.student.config, training=True)
        before_end = int(torch.randint(len(sampler.times), (), generator=self._setup.shared(step, "exit")))
        noisy, times = [], []
        for index, visited in enumerate(rollouts.visited):
            of_chunk = sampler.times if index else sampler.first_times
            leave = max(0, len(of_chunk) - 1 - before_end)
            noisy.append(visited[leave])
            times.append(torch.full(visited.shape[1:3], of_chunk[leave], device=visited.device))
        return torch.cat(noisy, 1), torch.cat(times, 1)

    @staticmethod
    def _estimate(net: CausalWan, noisy: Tensor, t: Tensor, text: Tensor, context: Tensor) -> Tensor:
        v = net.chunks(noisy, t, text, net.remember(context, text, net.memory(context.shape[1])))
        return clean_from_velocity(noisy, v, t)
