"""What the adversarial objectives have in common: a discriminator that is warmed up, trained, kept and validated."""

from __future__ import annotations

from collections.abc import Callable

from afd_train.objective_config import OldPolicy
from afd_train.objectives import Metrics, Objective, Setup
from afd_train.objectives.flow_matching import warm_start
from afd_train.objectives.judge import Judge
from afd_train.objectives.warmup import warm_up


class Judged:
    """An objective's discriminator; what it does with its scores is `step`, of the classes below it."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self.judge = Judge(setup)
        self.modules = {"discriminator": self.judge.net}
        self.optimizers = {"discriminator": self.judge.optimizer}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Supervised steps where the recipe wants them, then the discriminator's warm-up."""
        config = self._setup.config.objective
        if isinstance(config, OldPolicy):
            warm_start(self._setup, config.sft_steps, log)
        warm_up(self._setup, self.judge, log)


def judge_of(objective: Objective) -> Judge | None:
    """The objective's discriminator, None where it has none."""
    return objective.judge if isinstance(objective, Judged) else None
