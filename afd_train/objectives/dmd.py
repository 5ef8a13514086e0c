"""Distribution matching to the teacher: a baseline that makes its own score of the teacher's videos.

real = a flow-matching model, fine-tuned on the teacher's videos before the student moves.  A teacher that is a black
box gives no score; how good this one is depends on how many videos there are to learn it from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from afd_data.stream import Example
from afd_train.objective_config import DmdConfig
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.flow_matching import teacher_forced_parts
from afd_train.objectives.score_difference import ScoreDifference, starting_score
from afd_train.optimizer import Optimizer


class DistributionMatching:
    """See the module's docstring."""

    def __init__(self, setup: Setup, config: DmdConfig):
        self._setup = setup
        self._config = config
        self.real = starting_score(setup, config.real)
        self._scores = ScoreDifference(setup, config, self.real)
        self.modules: dict[str, nn.Module] = {"real": self.real, "fake": self._scores.fake}
        self.optimizers = {"fake": self._scores.optimizer}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Fine-tune the real score (steps -real_steps .. -1); its optimiser ends with it."""
        config, setup = self._config, self._setup
        optimizer = setup.optimizer(self.real.requires_grad_(True), weight_decay=1e-2, betas=(0.9, 0.99))
        for step in range(-config.real_steps, 0):
            examples = setup.stream.next_batch(config.real_prompts // setup.processes.count)
            log(step, setup.processes.mean(self._learn(optimizer, examples, step)))
        self.real.requires_grad_(False)

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """See `ScoreDifference.step`."""
        return self._scores.step(examples, step)

    def _learn(self, optimizer: Optimizer, examples: Sequence[Example], step: int) -> Metrics:
        """One update of the real score on the teacher's videos."""
        total = 0.0
        for forced in teacher_forced_parts(self._setup, examples, step, "real score"):
            with self._setup.watch("real"):
                loss = forced.share * forced.loss(self.real, forced.velocity(self.real))
                optimizer.accumulate(loss)
                self.real.end_pass()
                total += float(loss.detach())
        return {"real/loss": total, "real/grad_norm": optimizer.step(self._config.real_learning_rate)}
