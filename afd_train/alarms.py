"""Stops a run that goes wrong, with a diagnosis, before it overwrites the last good checkpoint."""

from __future__ import annotations

import math

from afd_data.errors import UserError
from afd_train.config import TrainConfig

MEMORY = 0.9  # weight of the past in the running means that alarms look at
PATIENCE = 20  # steps before a running mean means something


class DivergedError(UserError):
    """A run that must not go on; the message is its diagnosis."""


class Alarms:
    """Watches the log of a run."""

    def __init__(self, config: TrainConfig):
        self._limits = {
            "discriminator/margin": (
                config.stop_margin,
                "the discriminator tells teacher from student with certainty, so that its scores no longer rank "
                "rollouts. Lower discriminator.learning_rate or warmup_steps, or raise discriminator.input_noise",
            ),
            "student/reference_distance": (
                config.stop_reference_distance,
                "the student has left its reference. Lower train.learning_rate, or raise objective.prior_weight",
            ),
        }
        self._means: dict[str, float] = {}
        self._seen = 0

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raises DivergedError for a value that is not finite or a running mean beyond its limit."""
        for key, value in metrics.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"step {step}: {key} is {value}. The last checkpoint is intact. Lower train.learning_rate or "
                    "train.max_grad_norm and run again with another `--set out=FOLDER --set stream.folder=THIS/cache`."
                )
        self._seen += 1
        for key, (limit, diagnosis) in self._limits.items():
            if key not in metrics:
                continue
            before = self._means.get(key, metrics[key])
            self._means[key] = MEMORY * before + (1 - MEMORY) * metrics[key]
            if self._seen > PATIENCE and self._means[key] > limit:
                raise DivergedError(
                    f"step {step}: {key} has reached {self._means[key]:.3g} (limit {limit:g}): {diagnosis}. "
                    "The last checkpoint is intact."
                )

    def state_dict(self) -> dict:
        """JSON-able."""
        return {"means": self._means, "seen": self._seen}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        self._means, self._seen = dict(state["means"]), int(state["seen"])
