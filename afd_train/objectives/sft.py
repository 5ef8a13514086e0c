"""Supervised fine-tuning: flow matching on the teacher's videos, from a student that is there already.

The baseline that on-policy objectives are measured against: it learns what the teacher shows at every noise level, and
says nothing of the few steps that the student is sampled with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from afd_data.stream import Example
from afd_train.objective_config import SftConfig
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.distances import Distances
from afd_train.objectives.flow_matching import Forced, accumulate_teacher_forced, teacher_forced_parts
from afd_train.optimizer import Optimizer


class SupervisedFineTuning:
    """See the module's docstring."""

    def __init__(self, setup: Setup, config: SftConfig):
        self._setup = setup
        self._config = config
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Nothing to prepare."""

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """One update on the teacher's videos; the loss that is logged leaves the prior out."""
        if self._config.prior_weight:
            metrics = self._accumulate_with_prior(list(teacher_forced_parts(self._setup, examples, step)))
        else:
            metrics = {"student/loss": accumulate_teacher_forced(self._setup, examples, step)}
        return metrics | {"student/grad_norm": self._setup.trainee.step(step)}

    def _accumulate_with_prior(self, parts: Sequence[Forced]) -> Metrics:
        trainee, total, distances = self._setup.trainee, 0.0, Distances()
        with self._setup.watch("update"):
            for forced, v_reference in zip(parts, self._reference(parts), strict=True):
                v = forced.velocity(trainee.net)
                loss = forced.share * forced.loss(trainee.net, v)
                prior = distances.prior(forced.share, v, v_reference)
                trainee.accumulate(loss + self._config.prior_weight * prior)
                total += float(loss.detach())
        return {"student/loss": total} | distances.entries()

    def _reference(self, parts: Sequence[Forced]) -> list[Tensor]:
        """The reference's velocities: it takes the student's place once a step, before the student's own passes."""
        with self._setup.trainee.acting("reference") as net:
            return [forced.velocity(net) for forced in parts]
