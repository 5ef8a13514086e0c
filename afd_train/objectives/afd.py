"""Adversarial Flow Distillation (arXiv 2605.26105, algorithm 1), with the settings that a miniature found to work.

One step: roll out the current student on the prompts of the batch, let a prompt-paired Bradley-Terry discriminator
learn teacher from student (eq. 1), centre its scores within each prompt's group (eq. 2), and move the student's
velocity towards liked and away from disliked rollouts, all noised by the forward process (eqs. 3 to 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.advantages import group_advantages, shuffled, weights_from_advantages
from afd_train.diversity import diversity
from afd_train.objective_config import AfdConfig
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.forward_process import ForwardProcess, Step
from afd_train.objectives.judge import Judge
from afd_train.objectives.warmup import held_out, warm_up
from afd_train.policies import old_policy_decay

HISTOGRAM = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)  # bins of the weights in the log


class AdversarialFlowDistillation:
    """See the module's docstring; `step` is the algorithm."""

    def __init__(self, setup: Setup, config: AfdConfig):
        self._setup = setup
        self._config = config
        self.judge = Judge(setup)
        self._forward_process = ForwardProcess(setup, config)
        self.modules = {"discriminator": self.judge.net}
        self.optimizers = {"discriminator": self.judge.optimizer}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Warm the discriminator up."""
        warm_up(self._setup, self.judge, log)

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """One update of the discriminator and one of the student on K rollouts of every prompt."""
        drawn = Step.drawn(self._setup, examples, step)
        metrics = self.judge.learn(examples, drawn.clips, step, self.judge.rate)
        teacher, student = self.judge.score(examples, drawn.clips, step)  # the updated one
        metrics |= self.judge.steer(teacher, student)
        scores = student.mean(1).unflatten(0, (len(examples), drawn.takes))
        behind = (teacher - student).mean(1).unflatten(0, scores.shape).mean(1)
        self._setup.margins.add(examples, behind, step, self._setup.processes)
        metrics["advantage/spread"] = float(scores.std(1).mean())
        metrics["student/diversity"] = diversity(drawn.clips, drawn.takes)
        weight = weights_from_advantages(
            self._advantages(examples, scores, step).flatten(), self._config.advantage_clip
        )
        with self._setup.watch("update"):
            metrics |= self._forward_process.update(drawn, weight)
        self._setup.trainee.follow("old", old_policy_decay(self._config, step + 1))
        return metrics | histogram(weight) | held_out(self._setup, self.judge, step)

    def _advantages(self, examples: Sequence[Example], scores: Tensor, step: int) -> Tensor:
        """Eq. 2: [P, K] -> [P, K], with the standard deviation over the groups of all processes."""
        processes = self._setup.processes
        advantages = processes.own(group_advantages(processes.gather(scores)))
        if self._config.shuffled_advantages:
            return shuffled(advantages, self._setup.draws(step, "shuffle", examples).uniform(scores.shape[1]))
        return advantages


def histogram(weight: Tensor) -> Metrics:
    """Log entries: share of the weights in each bin.  weight: [B] in [0, 1]."""
    bins = torch.histogram(weight.cpu(), torch.tensor(HISTOGRAM)).hist / len(weight)
    ranges = zip(HISTOGRAM, HISTOGRAM[1:], bins, strict=False)
    return {f"weight/{low:.1f}_to_{high:.1f}": float(share) for low, high, share in ranges}
