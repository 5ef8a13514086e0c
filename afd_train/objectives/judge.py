"""The discriminator's side of AFD: a prompt-paired Bradley-Terry step (eq. 1), and scores of clean clips.

Both sides are latents of 8-bit video: the teacher's were decoded from a file, the student's make the same trip
(`Autoencoder.round_trip`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.discriminators import new_discriminator
from afd_train.draws import Draws
from afd_train.losses import bradley_terry_loss
from afd_train.objectives import Metrics, Setup


@dataclass(frozen=True)
class Part:
    """Clips of a step that are computed at once: some takes of some prompts."""

    prompts: slice  # of the step's examples
    takes: range
    rows: slice  # of the step's clips, which are ordered by prompt, then take


def parts_of(prompts: int, takes: int, limit: int | None) -> Iterator[Part]:
    """A step's clips in parts of at most `limit`, in order: whole groups where they fit, else takes of one prompt."""
    limit = limit or prompts * takes
    together, some = max(1, limit // takes), min(takes, limit)
    for first in range(0, prompts, together):
        last = min(first + together, prompts)
        for start in range(0, takes, some):
            stop = min(start + some, takes)
            rows = slice(first * takes + start, (last - 1) * takes + stop)
            yield Part(slice(first, last), range(start, stop), rows)


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
            for part in parts_of(len(examples), len(rollouts) // len(examples), self._setup.config.clips_per_pass):
                teacher, student = self._scores(examples[part.prompts], rollouts[part.rows], part.takes, step)
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
            parts = parts_of(len(examples), len(rollouts) // len(examples), self._setup.config.clips_per_pass)
            pairs = [self._scores(examples[p.prompts], rollouts[p.rows], p.takes, None) for p in parts]
        teacher, student = zip(*pairs, strict=True)
        return torch.cat(teacher), torch.cat(student)

    def _scores(
        self, examples: Sequence[Example], rollouts: Tensor, takes: range, step: int | None
    ) -> tuple[Tensor, Tensor]:
        """[P K] each; with a `step` its input noise is added."""
        setup, prompts = self._setup, len(examples)
        clips = torch.cat([setup.latents(examples), setup.student.autoencoder.round_trip(rollouts)])
        prompt = torch.arange(prompts)
        group = torch.cat([prompt, prompt.repeat_interleave(len(takes))])
        if step is not None:
            levels = setup.draws(step, "noise level", examples)
            noises = setup.draws(step, "teacher", examples), setup.draws(step, "student", examples, takes)
            clips = clips + input_noise(clips.shape, group, self._config.input_noise, levels, noises)
        scores = self.net(clips, setup.text(examples)[group])
        return scores[:prompts].repeat_interleave(len(takes)), scores[prompts:]


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
