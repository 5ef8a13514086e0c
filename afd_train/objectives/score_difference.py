"""Distribution matching (arXiv 2311.18828), as Self-Forcing does it, given a real score.

real = a flow-matching model of the videos that the student is to draw, fake = a network trained online on the student's
rollouts.  The rollout is left at a random step of the sampler: there, on the clean context of its own chunks, the
student's estimates move along real - fake.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from afd_data.errors import UserError
from afd_data.stream import Example
from afd_train.draws import Draws
from afd_train.flow import clean_from_velocity, noised
from afd_train.losses import distribution_matching_loss
from afd_train.objective_config import FakeScore
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.flow_matching import chunk_times, teacher_forced_loss
from afd_train.policies import frozen_copy
from afd_train.rollout import Rollout, Sampler
from afd_train.students import DTYPES, Student
from afd_train.students.causal_wan import CausalWan, cast_weights
from afd_train.students.folder import NETWORK, open_student


class ScoreDifference:
    """The updates of fake score and student; `real` is asked only."""

    def __init__(self, setup: Setup, config: FakeScore, real: CausalWan):
        self._setup = setup
        self._config = config
        self._real = real
        # A few-step student is a bad score even of its own videos: the fake one starts where the real one does.
        self.fake = frozen_copy(real).requires_grad_(True)
        self.optimizer = setup.optimizer(self.fake, weight_decay=1e-2, betas=(0.0, 0.99))

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """`fake_updates` of the fake score, then one of the student; only the prompts of `examples` are used."""
        setup = self._setup
        text = setup.text(examples)
        rollouts = setup.rollout(examples, step, range(1))
        fake_loss = 0.0
        with setup.watch("fake"):
            for index in range(self._config.fake_updates):
                draws = setup.draws(step, f"fake {index}", examples)
                loss = teacher_forced_loss(self.fake, rollouts.clips, text, draws)
                self.optimizer.accumulate(loss)
                self.fake.end_pass()
                self.optimizer.step(self._config.fake_learning_rate)
                fake_loss = float(loss.detach())
        with setup.watch("update"):
            loss = self._loss(rollouts, text, step, setup.draws(step, "distil", examples))
            setup.trainee.accumulate(loss)
            norm = setup.trainee.step(step)
        return {"student/loss": float(loss.detach()), "student/grad_norm": norm, "fake/loss": fake_loss}

    def _loss(self, rollouts: Rollout, text: Tensor, step: int, draws: Draws) -> Tensor:
        sampler = Sampler.of(self._setup.student.config, training=True)
        before_end = int(torch.randint(len(sampler.times), (), generator=self._setup.shared(step, "exit")))
        noisy, t = rollouts.left(sampler, before_end)
        v = self._setup.trainee.net.chunks(noisy, t, text, rollouts.cache)
        clean = clean_from_velocity(noisy, v, t)
        with torch.no_grad():
            t = chunk_times(clean.shape[1], self._real.chunk_frames, draws)
            noisy = noised(clean, draws.normal(*clean.shape[1:]), t)
            real = self._estimate(self._real, noisy, t, text, rollouts.clips)
            fake = self._estimate(self.fake, noisy, t, text, rollouts.clips)
        return distribution_matching_loss(clean, real, fake)

    @staticmethod
    def _estimate(net: CausalWan, noisy: Tensor, t: Tensor, text: Tensor, context: Tensor) -> Tensor:
        v = net.chunks(noisy, t, text, net.remember(context, text, net.memory(context.shape[1])))
        return clean_from_velocity(noisy, v, t)


def starting_score(setup: Setup, folder: str | None) -> CausalWan:
    """The score that a run starts with: the student's own weights, or those of a student folder; without gradient.

    folder: as in the recipe.  Raises UserError where that student has another network, autoencoder or size of clips,
    and where the processes share weights.
    """
    name = setup.config.objective.name
    if setup.processes.sharded:
        raise UserError(f"train.shard: {name} trains two networks and does not shard them; use train.shard=never")
    if folder is None:
        return frozen_copy(setup.trainee.net)
    found = open_student(folder)
    wanted = _facts(setup.student)
    if wrong := [f"{key} {has} (here: {wanted[key]})" for key, has in _facts(found).items() if has != wanted[key]]:
        raise UserError(
            f"train.objective.real: {folder} has {', '.join(wrong)}. A score must be of the student's own network and "
            "clips: name a flow-matching student that was trained with this recipe's sections student and video."
        )
    net = found.net
    cast_weights(net.transformer, DTYPES[setup.student.config.dtype])
    net.window = setup.student.net.window
    if setup.config.gradient_checkpointing:
        net.transformer.enable_gradient_checkpointing()
    return net.requires_grad_(False).eval().to(setup.student.device)


def _facts(student: Student) -> dict[str, object]:
    """What two students must have in common for one to score the other's clips."""
    config = student.config
    sizes = {"frequency_dim": config.frequency_dim or config.dim, "clips of latent size": tuple(student.shape)}
    return {key: getattr(config, key) for key in NETWORK} | sizes
