"""Few-step distillation on the student's own rollouts: distribution matching, as Self-Forcing does it.

real = the frozen student this phase starts from (a flow-matching model, so its clean estimates follow the data),
fake = the same network trained online on the student's rollouts.  The rollout is left at a random step of
the sampler: there, on the clean context of its own chunks, the student's estimates move along real - fake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.config import DistilConfig
from afd_train.flow import clean_from_velocity, noised
from afd_train.losses import distribution_matching_loss
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.flow_matching import chunk_times, teacher_forced_loss
from afd_train.policies import descend, frozen_copy
from afd_train.rollout import Rollout
from afd_train.students import Clip
from afd_train.students.causal_wan import CausalWan, KVCache


class Distillation:
    """Distribution matching distillation of the student into its own sampler."""

    def __init__(self, setup: Setup, config: DistilConfig):
        self._setup = setup
        self._config = config
        self._real = frozen_copy(setup.trainee.net)
        self._fake = frozen_copy(setup.trainee.net).requires_grad_(True)
        optimizer = torch.optim.AdamW(self._fake.parameters(), lr=config.fake_learning_rate, betas=(0.0, 0.99))
        self.modules = {"real": self._real, "fake": self._fake}
        self.optimizers = {"fake": optimizer}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Nothing to prepare."""

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """`fake_updates` of the fake score, then one of the student; only the prompts of `examples` are used."""
        setup = self._setup
        text = setup.student.encode_text([example.prompt for example in examples])
        with setup.watch("rollout"):
            clips = [Clip(e.prompt_id, e.prompt, setup.rollout_seed(step), take=0) for e in examples]
            rollouts = setup.student.rollout(clips, text)
        fake_loss = 0.0
        with setup.watch("fake"):
            for index in range(self._config.fake_updates):
                generator = setup.generator(step, f"fake {index}")
                loss = teacher_forced_loss(self._fake, rollouts.clips, text, generator)
                descend(setup.accelerator, self.optimizers["fake"], loss, setup.config.max_grad_norm)
                fake_loss = float(loss.detach())
        with setup.watch("update"):
            loss = self._loss(rollouts, text, setup.generator(step, "distil"))
            norm = setup.trainee.update(loss, step)
        return {"student/loss": float(loss.detach()), "student/grad_norm": norm, "fake/loss": fake_loss}

    def _loss(self, rollouts: Rollout, text: Tensor, generator: torch.Generator) -> Tensor:
        times = self._setup.student.times
        leave = int(torch.randint(len(times), (), generator=generator))
        noisy = rollouts.visited[leave]
        t = torch.full(noisy.shape[:2], times[leave], device=noisy.device)
        v = self._setup.trainee.net.chunks(noisy, t, text, rollouts.cache)
        clean = clean_from_velocity(noisy, v, t)
        with torch.no_grad():
            t = chunk_times(len(clean), clean.shape[1], self._real.chunk_frames, generator).to(clean.device)
            noisy = noised(clean, torch.randn(clean.shape, generator=generator).to(clean.device), t)
            real = self._estimate(self._real, noisy, t, text, rollouts.clips)
            fake = self._estimate(self._fake, noisy, t, text, rollouts.clips)
        return distribution_matching_loss(clean, real, fake)

    @staticmethod
    def _estimate(net: CausalWan, noisy: Tensor, t: Tensor, text: Tensor, context: Tensor) -> Tensor:
        v = net.chunks(noisy, t, text, net.remember(context, text, KVCache()))
        return clean_from_velocity(noisy, v, t)
