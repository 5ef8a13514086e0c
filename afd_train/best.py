"""The averaged student that did best in validation so far: a policy of its own, in memory and in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from afd_data.errors import UserError
from afd_train.config import Recipe, TrainConfig
from afd_train.policies import Trainee

PREFIX = "validation/"


def measured_metric(recipe: Recipe, config: TrainConfig) -> str | None:
    """`train.best_metric` where validation measures it, which is exact physics on held-out prompts.

    Raises UserError where it names no metric.
    """
    if config.best_metric is None or recipe.teacher.name != "playground" or recipe.prompts.validation == 0:
        return None
    _sign(config.best_metric)
    return config.best_metric


class Best:
    """Follows one metric; `step`: None until it was measured."""

    def __init__(self, trainee: Trainee, metric: str | None):
        """`metric`: of `validation/...`, None where none is measured; else the trainee has a policy `best`."""
        self._trainee, self._metric = trainee, metric
        self._sign = _sign(metric) if metric else 1
        self.value, self.step = 0.0, None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """After a validation at `step`: keep the averaged student if none was better.  The earlier of equals stays."""
        if self._metric is None or self._metric not in metrics:
            return
        value = metrics[self._metric]
        if self.step is None or self._sign * value > self._sign * self.value:
            self.value, self.step = value, step
            self._trainee.keep_best()

    def state_dict(self) -> dict[str, float | int | None]:
        """JSON-able; the weights are among the trainee's."""
        return {"value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping) -> None:
        """Inverse of `state_dict`."""
        self.value, self.step = state["value"], state["step"]


def _sign(metric: str) -> int:
    """1 where higher is better, -1 where lower is."""
    from afd_train.evaluation.physics import METRICS

    name = metric.removeprefix(PREFIX)
    if not metric.startswith(PREFIX) or name not in METRICS:
        allowed = ", ".join(PREFIX + known for known in METRICS)
        raise UserError(f"train.best_metric: {metric!r} is not measured. Allowed: {allowed}; or null.")
    return 1 if METRICS[name].better == "higher" else -1
