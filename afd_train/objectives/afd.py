"""Adversarial Flow Distillation (arXiv 2605.26105, algorithm 1), with the settings that a miniature found to work.

One step: roll out the current student on the prompts of the batch, let a prompt-paired Bradley-Terry discriminator
learn teacher from student (eq. 1), centre its scores within each prompt's group (eq. 2), and move the student's
velocity towards liked and away from disliked rollouts, all noised by the forward process (eqs. 3 to 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.advantages import advantages_of, shuffled, weights_from_advantages
from afd_train.diversity import diversity
from afd_train.objective_config import AfdConfig
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.forward_process import ForwardProcess, Step
from afd_train.objectives.judged import Judged
from afd_train.objectives.warmup import held_out
from afd_train.policies import old_policy_decay

HISTOGRAM = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)  # bins of the weights in the log


class AdversarialFlowDistillation(Judged):
    """See the module's docstring; `step` is the algorithm."""

    def __init__(self, setup: Setup, config: AfdConfig):
        super().__init__(setup)
        self._config = config
        self._forward_process = ForwardProcess(setup, config)

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """One update of the discriminator and one of the student on K rollouts of every prompt."""
        drawn = self._drawn(examples, step)
        metrics, scores = self.judge.meet(examples, drawn.clips, step)
        scores = scores.unflatten(0, (len(examples), drawn.takes))
        metrics["advantage/spread"] = float(scores.mean(2).std(1).mean())
        metrics["student/diversity"] = diversity(drawn.clips, drawn.takes)
        advantages = self._advantages(examples, scores, step).flatten(0, 1)
        weight = weights_from_advantages(advantages, self._config.advantage_clip)
        metrics |= self._forward_process.update(drawn, weight)
        self._setup.trainee.follow("old", old_policy_decay(self._config, step + 1))
        return metrics | histogram(weight.flatten()) | held_out(self._setup, self.judge, step)

    def _drawn(self, examples: Sequence[Example], step: int) -> Step:
        """K rollouts of every prompt, by the current student; by one that stays behind for the off-policy ablation."""
        trainee, every = self._setup.trainee, self._config.off_policy_steps
        if not every:
            return Step.drawn(self._setup, examples, step)
        if step % every == 0:
            trainee.follow("behind", 0.0)
        with trainee.acting("behind"):
            drawn = Step.drawn(self._setup, examples, step)
        return replace(drawn, cache=None)  # another policy's keys and values

    def _advantages(self, examples: Sequence[Example], scores: Tensor, step: int) -> Tensor:
        """Eq. 2: [P, K, S] -> [P, K, 1 or S], with the standard deviation over the groups of all processes."""
        processes, config = self._setup.processes, self._config
        if config.credit == "video":
            scores = scores.mean(2, keepdim=True)
        discount = config.discount if config.credit == "future" else 0.0
        gathered = advantages_of(processes.gather(scores), config.baseline, config.normalisation, discount)
        advantages = processes.own(gathered)
        if config.shuffled_advantages:
            return shuffled(advantages, self._setup.draws(step, "shuffle", examples).uniform(scores.shape[1]))
        return advantages


def histogram(weight: Tensor) -> Metrics:
    """Log entries: share of the weights in each bin.  weight: [N] in [0, 1]."""
    bins = torch.histogram(weight.cpu(), torch.tensor(HISTOGRAM)).hist / len(weight)
    ranges = zip(HISTOGRAM, HISTOGRAM[1:], bins, strict=False)
    return {f"weight/{low:.1f}_to_{high:.1f}": float(share) for low, high, share in ranges}
