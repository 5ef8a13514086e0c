"""How far the student of an update is from other policies, added up over the parts of its clips."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from afd_train.losses import per_clip_mse, prior_loss
from afd_train.objectives import Metrics


@dataclass
class Distances:
    """Sums over an update's parts, each counted by its share of the clips."""

    _deviation: float | None = None
    _prior: float = 0.0
    _reference: float = 0.0

    def deviate(self, share: float, v: Tensor, v_old: Tensor) -> None:
        """Note the student's velocities beside the old policy's: [B, F, C, H, W]."""
        self._deviation = (self._deviation or 0.0) + share * float(per_clip_mse(v.detach(), v_old).mean())

    def prior(self, share: float, v: Tensor, v_reference: Tensor) -> Tensor:
        """Eq. 5's second term, `share` of it, with gradient; noted beside the size of the reference's velocities."""
        loss = share * prior_loss(v, v_reference)
        self._prior += float(loss.detach())
        self._reference += share * float(v_reference.square().mean())
        return loss

    def entries(self) -> Metrics:
        """For the log: what was noted."""
        found = {} if self._deviation is None else {"student/old_policy_deviation": self._deviation}
        if self._reference:
            found["student/reference_distance"] = self._prior / self._reference
        return found
