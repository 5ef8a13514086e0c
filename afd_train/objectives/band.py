"""Control of the discriminator's learning rate by its margin (the paper's figure 5, where the rate decides).

The margin is the one between teacher and student on clean clips of the step's prompts, averaged over processes: these
are the clips whose scores become advantages.  It is taken as it is, since under Bradley-Terry it has a unit, log odds.
"""

from __future__ import annotations

from collections.abc import Mapping

from afd_train.discriminator_config import MarginBand


class MarginController:
    """Multiplies the learning rate by `factor`, within the band's limits; always 1 without a band."""

    def __init__(self, config: MarginBand | None):
        self._config = config
        self._mean: float | None = None
        self.factor = 1.0

    def update(self, margin: float) -> None:
        """After a step with this margin; the same number on all processes."""
        config = self._config
        if config is None:
            return
        self._mean = margin if self._mean is None else config.memory * self._mean + (1 - config.memory) * margin
        if self._mean > config.high:
            self.factor /= config.gain
        elif self._mean < config.low:
            self.factor *= config.gain
        self.factor = min(max(self.factor, config.smallest), config.largest)

    def state_dict(self) -> dict[str, float | None]:
        """JSON-able."""
        return {"mean": self._mean, "factor": self.factor}

    def load_state_dict(self, state: Mapping) -> None:
        """Inverse of `state_dict`."""
        self._mean, self.factor = state["mean"], float(state["factor"])
