"""Few-step distillation: distribution matching to what the student's own teacher-forced model says of its videos.

real = the frozen student this phase starts from (a flow-matching model, so its clean estimates follow the data), or
another one that the recipe names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from afd_data.stream import Example
from afd_train.objective_config import DistilConfig
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.score_difference import ScoreDifference, starting_score


class Distillation:
    """Distribution matching distillation of the student into its own sampler."""

    def __init__(self, setup: Setup, config: DistilConfig):
        self.real = starting_score(setup, config.real)  # made again on a resumed run, so no checkpoint keeps it
        self._scores = ScoreDifference(setup, config, self.real)
        self.modules: dict[str, nn.Module] = {"fake": self._scores.fake}
        self.optimizers = {"fake": self._scores.optimizer}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Nothing to prepare."""

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """See `ScoreDifference.step`."""
        return self._scores.step(examples, step)
