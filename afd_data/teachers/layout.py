"""What a prompt leaves open, drawn from a seed: colours, sizes, restitutions, where bodies start and how fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from afd_data.teachers.drawing import Rectangle
from afd_data.teachers.scene import BOUNCINESS, COLOURS, SIZES, Body, Scene


class Middle:
    """Draws without chance: the middle of every range."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2

    def choice(self, options: Sequence) -> Any:
        return options[len(options) // 2]

    def random(self) -> float:
        return 0.5


Draws = np.random.Generator | Middle


@dataclass(frozen=True)
class Placed:
    """A body with nothing left open.  Positions and velocities in units and units / s; a box's radius: half side."""

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    size: str
    radius: float
    restitution: float
    position: tuple[float, float]
    velocity: tuple[float, float]


def place(scene: Scene, gravity: float, wall: Rectangle | None, room: tuple[float, float], rng: Draws) -> list[Placed]:
    """Draw what the prompt leaves open, bodies apart from each other and from the wall."""
    taken = {body.colour for body in scene.bodies}
    placed: list[Placed] = []
    for body in scene.bodies:
        colour = body.colour or str(rng.choice([name for name in COLOURS if name not in taken]))
        taken.add(colour)
        size = body.size or str(rng.choice([*SIZES]))
        radius = SIZES[size] * (1.0 if body.shape == "ball" else math.sqrt(math.pi) / 2)
        restitution = BOUNCINESS[body.bounciness or str(rng.choice([*BOUNCINESS]))]
        reach = _reach(body.shape, radius)
        position, velocity = _launch(body, radius, gravity, wall, room, rng)
        for attempt in range(1000):
            if all(math.dist(position, other.position) > reach + _reach(other.shape, other.radius) for other in placed):
                break
            # A crowd that does not fit where its launches belong starts anywhere.
            lawful = body if attempt < 200 else replace(body, launch=None)
            position, _ = _launch(lawful, radius, gravity, wall, room, rng)
        placed.append(Placed(body.shape, colour, COLOURS[colour], size, radius, restitution, position, velocity))
    return placed


def _reach(shape: str, radius: float) -> float:
    """Radius of the circle around a body, and a little room."""
    return radius * (1.0 if shape == "ball" else math.sqrt(2)) + 0.5


def _launch(
    body: Body,
    radius: float,
    gravity: float,
    wall: Rectangle | None,
    room: tuple[float, float],
    rng: Draws,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """A start position and velocity that fit the body's launch."""
    kind, _, direction = (body.launch or "").partition("-")
    wide, high = room
    sign = {"left": -1.0, "right": 1.0}.get(direction) or float(rng.choice([-1.0, 1.0]))
    left, right = radius + 0.3, wide - radius - 0.3
    if wall:
        # Beside the wall: the wider side, or for a wall in the middle the side from which the launch goes.
        behind = wall[0] > wide - wall[2] or (wall[0] == wide - wall[2] and sign > 0)
        left, right = (left, wall[0] - radius - 0.3) if behind else (wall[2] + radius + 0.3, right)
    x, start = rng.uniform(left, right), rng.uniform(0.45 * high, high - radius - 0.5)
    behind_x = rng.uniform(left, left + 0.4 * (right - left))
    behind_x = behind_x if sign > 0 else left + right - behind_x
    low = rng.uniform(radius + 0.5, radius + 4.0)
    speed = rng.uniform(9, 17)
    match kind, direction:
        case "dropped", _:
            return (x, start), (rng.uniform(-1.5, 1.5), 0.0)
        case "rolled", _:
            return (behind_x, radius + 0.02), (sign * speed, 0.0)
        case "thrown", "up":
            rise = math.sqrt(2 * gravity * rng.uniform(0.35, 0.65) * high) if gravity else speed
            return (x, low), (rng.uniform(-4, 4), rise)
        case "thrown", "down":
            return (x, start), (rng.uniform(-4, 4), -speed)
        case "thrown", _:
            return (behind_x, 0.75 * start), (sign * speed, rng.uniform(0, 8) if gravity else rng.uniform(-3, 3))
        case _ if gravity == 0:
            angle = rng.uniform(0, 2 * math.pi)
            return (x, rng.uniform(radius + 0.5, start)), (speed * math.cos(angle), speed * math.sin(angle))
        case _:
            return (x, start), (rng.uniform(-12, 12), rng.uniform(-6, 8))
