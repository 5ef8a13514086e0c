"""Discriminators: how much a clip looks like the teacher's, given its prompt."""

from __future__ import annotations

from afd_train.config import DiscriminatorConfig
from afd_train.discriminators.spacetime import SpaceTime
from afd_train.students import Student


def new_discriminator(config: DiscriminatorConfig, student: Student, seed: int) -> SpaceTime:
    """A discriminator with random weights for clips of this student's shape."""
    match config.name:
        case "spacetime":
            shape = student.shape
            return SpaceTime(
                config,
                frames=shape.frames,
                channels=shape.channels,
                height=shape.height,
                width=shape.width,
                text_dim=student.config.text_dim,
                seed=seed,
            )
