"""How the playground breaks its own physics for sloppy corpora: what goes wrong in one video, drawn from its seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from afd_data.teacher_config import FlawsConfig
from afd_data.teachers.layout import Placed
from afd_data.teachers.scene import GRAVITIES

FLAWS = [name for name in FlawsConfig.model_fields if name != "share"]


@dataclass(frozen=True)
class Break:
    """What is wrong with this video's physics; the defaults are right."""

    gravity: float | None = None  # units / s^2
    restitution: tuple[float, ...] | None = None
    drag_per_s: float = 0.0
    passes: Literal["floor", "walls"] | None = None  # what bodies fall or fly through
    hidden: tuple[int, int, int] | None = None  # body, first frame, frame after

    def names(self) -> list[str]:
        """The flaws that this video has, by their names in `FlawsConfig` (jitter is in every video or in none)."""
        present = {
            "wrong_gravity": self.gravity is not None,
            "wrong_bounce": self.restitution is not None,
            "drag": self.drag_per_s > 0,
            "pass_through": self.passes is not None,
            "vanish": self.hidden is not None,
        }
        return [name for name, there in present.items() if there]


def draw_breaks(
    flaws: FlawsConfig, gravity: float, bodies: list[Placed], frames: int, rng: np.random.Generator
) -> Break:
    """Decide what goes wrong in this video.  Every chance is drawn, so that one flaw's share leaves the others be."""
    chance = dict(zip(FLAWS, rng.random(len(FLAWS)), strict=True))
    others = [value for value in GRAVITIES.values() if value != gravity]
    factor = rng.choice([rng.uniform(0.4, 0.75), rng.uniform(1.3, 2.0)])
    another = float(rng.choice(others)) if gravity == 0 or rng.random() < 0.5 else gravity * factor
    restitution = tuple(float(_elsewhere(body.restitution, rng)) for body in bodies)
    drag = float(rng.uniform(0.5, 2.0))
    passes = "floor" if rng.random() < 0.5 else "walls"
    body, length = int(rng.integers(len(bodies))), int(rng.integers(2, 6))
    first = int(rng.integers(1, max(2, frames - length + 1)))
    if rng.random() >= flaws.share:
        return Break()
    return Break(
        gravity=another if chance["wrong_gravity"] < flaws.wrong_gravity else None,
        restitution=restitution if chance["wrong_bounce"] < flaws.wrong_bounce else None,
        drag_per_s=drag if chance["drag"] < flaws.drag else 0.0,
        passes=passes if chance["pass_through"] < flaws.pass_through else None,
        hidden=(body, first, min(first + length, frames)) if chance["vanish"] < flaws.vanish else None,
    )


def _elsewhere(restitution: float, rng: np.random.Generator) -> float:
    """A restitution in 0 to 1 that is at least 0.2 away."""
    low, high = max(0.0, restitution - 0.2), max(0.0, 0.8 - restitution)
    value = rng.uniform(0, low + high)
    return value if value < low else value - low + restitution + 0.2
