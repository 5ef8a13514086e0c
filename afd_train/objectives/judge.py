"""The discriminator's side of AFD: a prompt-paired Bradley-Terry step (eq. 1), and scores of clean clips.

Both sides are latents of 8-bit video: the teacher's were decoded from a file, the student's make the same trip
(`Autoencoder.round_trip`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.discriminators import new_discriminator
from afd_train.draws import Draws
from afd_train.losses import bradley_terry_loss
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.parts import Part, parts_of


class Judge:
    """A discriminator and its optimiser."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._config = setup.discriminator
        self.net = new_discriminator(setup.discriminator, setup.student, setup.seed).to(setup.student.device)
        self.optimizer = setup.optimizer(self.net, setup.discriminator.weight_decay, betas=(0.5, 0.99))

    def learn(self, examples: Sequence[Example], rollouts: Tensor, step: int, rate: float) -> Metrics:
        """One step on pairs of a rollout, [P K, F, C, h, w], and the teacher's video of its prompt."""
        teacher_scores, student_scores, loss_sum = [], [], 0.0
        with self._setup.watch("discriminator"):
            for teacher, student in self._pairs(examples, rollouts, step):
                loss = bradley_terry_loss(teacher, student) * len(student) / len(rollouts)
                self.optimizer.accumulate(loss)
                loss_sum += float(loss.detach())
                teacher_scores.append(teacher.detach())
                student_scores.append(student.detach())
            norm = self.optimizer.step(rate)
        return {
            "discriminator/loss": loss_sum,
            "discriminator/grad_norm": norm,
            **told_apart("", torch.cat(teacher_scores), torch.cat(student_scores)),
        }

    @torch.no_grad()
    def score(self, examples: Sequence[Example], rollouts: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the teacher's and the student's clips without input noise, paired: [P K] each."""
        with self._setup.watch("discriminator"):
            teacher, student = zip(*self._pairs(examples, rollouts, None), strict=True)
        return torch.cat(teacher), torch.cat(student)

    def _pairs(
        self, examples: Sequence[Example], rollouts: Tensor, step: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores of teacher and student, paired, part by part; with a `step` its input noise is added."""
        setup, takes = self._setup, len(rollouts) // len(examples)
        teacher, text = setup.latents(examples), setup.text(examples)
        for part in parts_of(len(examples), takes, setup.config.clips_per_pass):
            student = setup.student.autoencoder.round_trip(rollouts[part.rows])
            clips = torch.cat([teacher[part.prompts], student])
            prompt = torch.arange(len(clips) - len(student))
            group = torch.cat([prompt, prompt.repeat_interleave(len(part.takes))])
            if step is not None:
                clips = clips + self._noise(examples[part.prompts], part, step, clips.shape, group)
            scores = self.net(clips, text[part.prompts][group])
            yield scores[: len(prompt)].repeat_interleave(len(part.takes)), scores[len(prompt) :]

    def _noise(self, examples: Sequence[Example], part: Part, step: int, shape: Sequence[int], group: Tensor) -> Tensor:
        setup = self._setup
        levels = setup.draws(step, "noise level", examples)
        noises = setup.draws(step, "teacher", examples), setup.draws(step, "student", examples, part.takes)
        return input_noise(shape, group, self._config.input_noise, levels, noises)


def told_apart(which: str, teacher: Tensor, student: Tensor) -> Metrics:
    """Log entries: share of pairs in which the teacher's clip wins, and by how much on average.  Scores: [B] each."""
    return {
        f"discriminator/{which}accuracy": float((teacher > student).float().mean()),
        f"discriminator/{which}margin": float((teacher - student).detach().mean()),
    }


def input_noise(shape: Sequence[int], group: Tensor, largest: float, levels: Draws, noises: Sequence[Draws]) -> Tensor:
    """Noise for the discriminator's input: [B, F, C, H, W], drawn by `noises` in the order of the clips.

    group: [B] integers.  The clips of a group share one standard deviation, uniform in [0, largest], so that it tells
    no side from the other.  Rollouts are scored clean: a discriminator that only ever saw one level gives all clean
    clips the same score.
    """
    level = largest * levels.uniform()[group]
    noise = torch.cat([draws.normal(*shape[1:]) for draws in noises])
    return level[:, None, None, None, None] * noise
