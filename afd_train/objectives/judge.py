"""The discriminator's side of the adversarial objectives: a step on pairs of one prompt (eq. 1), scores of clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.discriminators import open_discriminator
from afd_train.losses import (
    bradley_terry_loss,
    chunk_bradley_terry_loss,
    confidence_weight,
    finite_difference_penalty,
    logistic_loss,
    non_saturating_loss,
)
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.band import MarginController
from afd_train.objectives.pairing import Pairing, Pairs


@dataclass(frozen=True)
class Pull:
    """What clips lack to pass for the teacher's: a loss, and its gradient with respect to them, [B, F, C, H, W].

    teacher, student: the scores that it follows from, paired, [B, S] each.
    """

    loss: float
    gradient: Tensor
    teacher: Tensor
    student: Tensor


class Judge:
    """A discriminator and its optimiser."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._config = setup.discriminator
        self.net = open_discriminator(setup.discriminator, setup.student, setup.seed).to(setup.student.device)
        self.pairing = Pairing(setup, self.net)
        self.optimizer = setup.optimizer(self.net, setup.discriminator.weight_decay, betas=(0.5, 0.99))
        self.controller = MarginController(setup.discriminator.band)

    @property
    def rate(self) -> float:
        """Learning rate while the student trains, as the margins so far have made it."""
        return self._config.learning_rate * self.controller.factor

    def learn(self, examples: Sequence[Example], rollouts: Tensor, step: int, rate: float) -> Metrics:
        """One step on pairs of a rollout, [P K, F, C, h, w], and the teacher's video of its prompt."""
        found: list[Pairs] = []
        loss_sum = 0.0
        with self._setup.watch("discriminator"):
            for pairs in self.pairing.pairs(examples, rollouts, step, noisy=True):
                loss = self._loss(pairs) * len(pairs.student) / len(rollouts)
                self.optimizer.accumulate(loss)
                loss_sum += float(loss.detach())
                found.append(Pairs(pairs.teacher.detach(), pairs.student.detach(), pairs.takes))
            norm = self.optimizer.step(rate)
        return {
            "discriminator/loss": loss_sum,
            "discriminator/grad_norm": norm,
            **told_apart(
                "", *(torch.cat([getattr(pairs, side) for pairs in found]) for side in ("teacher", "student"))
            ),
        }

    def meet(self, examples: Sequence[Example], rollouts: Tensor, step: int) -> tuple[Metrics, Tensor]:
        """A step's rollouts, [P K, F, C, h, w]: learn from them, then score them clean.

        Sets the next step's learning rate and notes every prompt's margin.  Returns the log's entries and the student's
        scores, [P K, S]: eq. 2's D, of the updated discriminator.
        """
        metrics = self.learn(examples, rollouts, step, self.rate)
        teacher, student = self.score(examples, rollouts, step)
        return metrics | self.steer(examples, teacher, student, step), student

    @torch.no_grad()
    def score(self, examples: Sequence[Example], rollouts: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Scores of the teacher's and the student's clips without input noise, paired: [P K, S] each."""
        with self._setup.watch("discriminator"):
            pairs = list(self.pairing.pairs(examples, rollouts, step, noisy=False))
        return torch.cat([part.teacher for part in pairs]), torch.cat([part.student for part in pairs])

    @torch.no_grad()
    def score_branches(self, examples: Sequence[Example], followed: Tensor, candidates: Tensor, step: int) -> Tensor:
        """Scores of the candidates for every chunk, behind the followed chunks before it: [P, M, chunks].

        followed: [P, F, C, h, w]; candidates: [P, M, F, C, h, w].
        """
        with self._setup.watch("discriminator"):
            return self.pairing.branches(examples, followed, candidates, step)

    def pull(self, examples: Sequence[Example], rollouts: Tensor, step: int) -> Pull:
        """The student's loss on clean clips: the discriminator's with the sides exchanged; for `logistic` a GAN's own.

        Rounding to 8 bits passes the gradient on as it is.  For discriminators of latents only.
        """
        assert self.net.space == "latents"
        loss_sum, gradients, found = 0.0, [], []
        with self._setup.watch("discriminator"):
            for pairs in self.pairing.pairs(examples, rollouts, step, noisy=False, followed=True):
                assert pairs.drawn is not None
                loss = self._student_loss(pairs) * len(pairs.student) / len(rollouts)
                gradients += torch.autograd.grad(loss, pairs.drawn)
                loss_sum += float(loss.detach())
                found.append((pairs.teacher.detach(), pairs.student.detach()))
        teacher, student = (torch.cat(side) for side in zip(*found, strict=True))
        return Pull(loss_sum, torch.cat(gradients), teacher, student)

    def _student_loss(self, pairs: Pairs) -> Tensor:
        teacher, student = pairs.teacher.mean(1), pairs.student.mean(1)
        match self._config.loss:
            case "bt":
                return bradley_terry_loss(student, teacher)
            case "bt-chunk":
                chunks = chunk_bradley_terry_loss(pairs.student, pairs.teacher)
                return bradley_terry_loss(student, teacher) + self._config.chunk_loss_weight * chunks
            case "logistic":
                return non_saturating_loss(student)

    def steer(self, examples: Sequence[Example], teacher: Tensor, student: Tensor, step: int) -> Metrics:
        """Set the next step's learning rate by a step's clean scores, [P K, S] each, paired; returns its log entries.

        Notes every prompt's margin too.  All processes call it, once a step.
        """
        behind = (teacher - student).mean(1).unflatten(0, (len(examples), -1)).mean(1)
        self._setup.margins.add(examples, behind, step, self._setup.processes)
        metrics = told_apart("clean_", teacher, student) | {"discriminator/learning_rate": self.rate}
        self.controller.update(self._setup.processes.mean(metrics)["discriminator/clean_margin"])
        return metrics

    def _loss(self, pairs: Pairs) -> Tensor:
        config, teacher = self._config, pairs.teacher.mean(1)
        weight = None
        if config.confidence is not None:
            weight = confidence_weight(teacher, pairs.student.mean(1), pairs.takes, config.confidence)
        loss = self._compared(pairs.teacher, pairs.student, weight)
        if pairs.mismatched is not None:
            loss = loss + config.mismatch_weight * self._compared(pairs.teacher, pairs.mismatched, weight)
        if pairs.moved is not None:
            loss = loss + config.r1_weight * finite_difference_penalty(teacher, pairs.moved.mean(1), config.r1_step)
        return loss

    def _compared(self, teacher: Tensor, other: Tensor, weight: Tensor | None) -> Tensor:
        """Loss of the teacher's clips against others: scores [n, S], paired; weight: [n], of the teacher's."""
        match self._config.loss:
            case "bt":
                return bradley_terry_loss(teacher.mean(1), other.mean(1), weight)
            case "bt-chunk":
                clip = bradley_terry_loss(teacher.mean(1), other.mean(1), weight)
                return clip + self._config.chunk_loss_weight * chunk_bradley_terry_loss(teacher, other, weight)
            case "logistic":
                return logistic_loss(teacher.mean(1), other.mean(1), weight)


def told_apart(which: str, teacher: Tensor, student: Tensor) -> Metrics:
    """Log entries: share of pairs in which the teacher's clip wins, and by how much on average.  Scores: [B, S]."""
    gap = teacher.mean(1) - student.mean(1)
    return {
        f"discriminator/{which}accuracy": float((gap > 0).float().mean()),
        f"discriminator/{which}margin": float(gap.mean()),
    }
