"""The `train.alarms` section: when a run is diagnosed to go wrong.  Torch-free.

A section or threshold of null switches that alarm off.  "At the start" is the mean of a metric's first five values
after the warm-up, and what is compared with it is the running mean that keeps 0.9 of its past, from the 21st step on;
of what validation measures, the first value and the last.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from afd_data.section import Config


class RewardHacking(Config):
    """The student does better with the discriminator on held-out prompts, and worse where it counts.

    What counts is object permanence where validation measures it (a frozen discriminator was seen to be pleased while
    it fell), and else the distance from the reference.
    """

    margin_fall: float | None = Field(
        default=1.0, gt=0, description="held-out margin (teacher - student) this far below that at the start, and ..."
    )
    permanence_fall: float = Field(
        default=0.1, gt=0, description="... object permanence this far below its best, as a share of frames; or ..."
    )
    distance_share: float = Field(
        default=0.5, gt=0, description="... where it is not measured: this share of train.stop_reference_distance"
    )


class Collapse(Config):
    """Rollouts of one prompt become alike, to look at or to the discriminator."""

    diversity: float | None = Field(
        default=0.3, gt=0, lt=1, description="student/diversity below this share of that at the start"
    )
    spread: float | None = Field(
        default=0.05, gt=0, lt=1, description="advantage/spread below this share of that at the start"
    )


class Drift(Config):
    """The student leaves its reference, or its videos move unlike those at the start."""

    motion: tuple[float, float] | None = Field(
        default=(0.4, 2.5),
        description="validation/motion outside these multiples of that at the start, where that is 0.5 units/s or more",
    )
    forecast_steps: int | None = Field(
        default=None,
        ge=1,
        description="steps in which the reference distance, at its present pace, would pass "
        "train.stop_reference_distance; default: only when it has",
    )

    @model_validator(mode="after")
    def _motion_is_a_range(self) -> Drift:
        if self.motion is not None and not 0 <= self.motion[0] < 1 < self.motion[1]:
            raise ValueError(f"motion: {list(self.motion)} must be two multiples with 1 between them")
        return self


class AlarmsConfig(Config):
    """Named diagnoses of adversarial training, beside train.stop_margin and train.stop_reference_distance."""

    reward_hacking: RewardHacking | None = RewardHacking()
    collapse: Collapse | None = Collapse()
    drift: Drift | None = Drift()
