"""A scene and a seed -> frames and the exact state behind them.

A closed room of `UNITS` units on its short side, one to three rigid bodies, pymunk's solver.  Contacts are frictionless
and bodies do not turn; a body bounces off whatever does not move with its own restitution.  The floor is rough: a hard
bounce redraws the sideways velocity from the seed, so that one prompt has many right videos.  The kick takes at most
half of the energy that the bounce loses, so energy never rises.  Knows nothing of files or teachers.
"""

from __future__ import annotations

import math

import numpy as np
import pymunk

from afd_data.config import VideoConfig
from afd_data.teacher_config import FlawsConfig, StyleConfig
from afd_data.teachers import RefusedError
from afd_data.teachers.drawing import Rectangle, draw, extent, styled, wall_rectangle
from afd_data.teachers.flaws import Break, draw_breaks
from afd_data.teachers.layout import Draws, Middle, Placed, place
from afd_data.teachers.scene import BACKGROUND, GRAVITIES, UNITS, Scene, parse

STEPS_PER_SECOND = 480  # of the solver: a body moves a tenth of a unit at most
HARD_BOUNCE = 4.0  # units / s downwards, from which the floor's roughness shows
_BODY, _FLOOR = 1, 2  # collision types
_FLOOR_BIT, _WALL_BIT = 0b01, 0b10  # collision categories


def simulate(
    scene: Scene | str,
    seed: int,
    video: VideoConfig,
    flaws: FlawsConfig | None = None,
    style: StyleConfig | None = None,
    determined: bool = False,
) -> tuple[np.ndarray, dict]:
    """Frames uint8 [F, H, W, 3] and the JSON-able state (`state` below lists it).

    The same arguments give the same video; the start is the same with and without flaws.  `determined`: without flaws
    the seed changes nothing.  Raises RefusedError for a prompt that names nothing the world can draw.
    """
    scene = parse(scene) if isinstance(scene, str) else scene
    flaws = flaws or FlawsConfig()
    if determined and len(scene.bodies) > 1:
        raise RefusedError(f"a determined world holds one body, the prompt names {len(scene.bodies)}")
    rng = Middle() if determined else np.random.default_rng([seed, 0])
    gravity = GRAVITIES[scene.gravity or str(rng.choice([*GRAVITIES]))]
    wall = wall_rectangle(scene, video.width, video.height)
    bodies = place(scene, gravity, wall, extent(video.width, video.height), rng)
    flaw_rng = np.random.default_rng([seed, 1])
    broken = draw_breaks(flaws, gravity, bodies, video.frames, flaw_rng)
    if broken.gravity is not None:
        gravity = broken.gravity
    positions, velocities = _roll_out(bodies, gravity, broken, wall, video, None if determined else rng)
    if flaws.jitter:
        radii = np.array([[body.radius] for body in bodies])
        positions += flaws.jitter * radii * flaw_rng.normal(size=positions.shape)
    visible = np.ones(positions.shape[:2], bool)
    if broken.hidden:
        body, first, after = broken.hidden
        visible[first:after, body] = False
    frames = styled(draw(scene, bodies, positions, visible, video.width, video.height), style or StyleConfig())
    return frames, _state(scene, bodies, gravity, broken, positions, velocities, visible, wall, video)


def _roll_out(
    bodies: list[Placed],
    gravity: float,
    broken: Break,
    wall: Rectangle | None,
    video: VideoConfig,
    rough: Draws | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities [F, N, 2] at the frame times k / fps; `rough`: where the floor's kicks come from."""
    space = pymunk.Space()
    space.gravity = (0, -gravity)
    space.damping = math.exp(-broken.drag_per_s)
    space.collision_slop = 0.005
    _add_room(space, extent(video.width, video.height), wall)
    movers = [_add_body(space, index, body, broken) for index, body in enumerate(bodies)]
    if rough is not None:
        space.on_collision(_BODY, _FLOOR, post_solve=lambda arbiter, _space, _data: _scatter(arbiter, rough))
    steps = math.ceil(STEPS_PER_SECOND / video.fps)
    positions = np.empty((video.frames, len(bodies), 2))
    velocities = np.empty_like(positions)
    for frame in range(video.frames):
        for _ in range(steps if frame else 0):
            space.step(1 / (video.fps * steps))
        for index, mover in enumerate(movers):
            positions[frame, index], velocities[frame, index] = mover.position, mover.velocity
    return positions, velocities


def _add_room(space: pymunk.Space, room: tuple[float, float], wall: Rectangle | None) -> None:
    """Floor, ceiling, side walls and the standing wall: thick slabs, so that nothing tunnels."""
    wide, high = room
    slab = 10.0
    slabs = [
        (_FLOOR_BIT, (-slab, -slab, wide + slab, 0)),
        (_WALL_BIT, (-slab, high, wide + slab, high + slab)),
        (_WALL_BIT, (-slab, -slab, 0, high + slab)),
        (_WALL_BIT, (wide, -slab, wide + slab, high + slab)),
    ]
    for bit, (left, bottom, right, top) in [*slabs, *([(_WALL_BIT, wall)] if wall else [])]:
        corners = [(left, bottom), (right, bottom), (right, top), (left, top)]
        shape = pymunk.Poly(space.static_body, corners)
        shape.elasticity, shape.friction = 1.0, 0.0
        shape.filter = pymunk.ShapeFilter(categories=bit)
        shape.collision_type = _FLOOR if bit == _FLOOR_BIT else 0
        space.add(shape)


def _add_body(space: pymunk.Space, index: int, body: Placed, broken: Break) -> pymunk.Body:
    mass = body.radius**2 * (1.0 if body.shape == "ball" else 4 / math.pi)
    mover = pymunk.Body(mass, math.inf)
    mover.position, mover.velocity = body.position, body.velocity
    shape = (
        pymunk.Circle(mover, body.radius)
        if body.shape == "ball"
        else pymunk.Poly.create_box(mover, (2 * body.radius, 2 * body.radius))
    )
    shape.elasticity = body.restitution if broken.restitution is None else broken.restitution[index]
    shape.friction = 0.0
    shape.collision_type = _BODY
    ghostly = {"floor": _FLOOR_BIT, "walls": _WALL_BIT, None: 0}[broken.passes]
    shape.filter = pymunk.ShapeFilter(mask=pymunk.ShapeFilter.ALL_MASKS() & ~ghostly)
    space.add(mover, shape)
    return mover


def _scatter(arbiter: pymunk.Arbiter, rng: Draws) -> None:
    """The rough floor: after a hard bounce the sideways velocity is drawn anew, within what the bounce has lost."""
    if not arbiter.is_first_contact:
        return
    shape = next(shape for shape in arbiter.shapes if shape.collision_type == _BODY)
    mover = shape.body
    assert mover is not None, "the shape was added with its body"
    across, up = mover.velocity
    restitution = shape.elasticity
    if up < HARD_BOUNCE * restitution or restitution == 0:
        return
    impact = up / restitution
    spare = 0.5 * min(restitution**2, 1 - restitution**2) * impact**2
    # The cosine prefers the ends: to the left or to the right, seldom straight up.
    mover.velocity = math.sqrt(across**2 + spare) * math.cos(math.pi * rng.random()), up


def _state(
    scene: Scene,
    bodies: list[Placed],
    gravity: float,
    broken: Break,
    positions: np.ndarray,
    velocities: np.ndarray,
    visible: np.ndarray,
    wall: Rectangle | None,
    video: VideoConfig,
) -> dict:
    """JSON-able: floats are floats, y points up, `[F]` lists per frame."""
    wide, high = extent(video.width, video.height)
    return {
        "units": UNITS,
        "extent": [wide, high],
        "background": list(BACKGROUND),
        "gravity": float(gravity),
        "gravity_asked": scene.gravity or "open",
        "wall": [float(edge) for edge in wall] if wall else [],
        "times_s": [round(frame / video.fps, 6) for frame in range(video.frames)],
        "flaws": broken.names(),
        "bodies": [
            {
                "shape": body.shape,
                "colour": body.colour,
                "rgb": list(body.rgb),
                "size": body.size,
                "radius": float(round(body.radius, 6)),
                "restitution": float(body.restitution if broken.restitution is None else broken.restitution[index]),
                "positions": _rounded(positions[:, index]),
                "velocities": _rounded(velocities[:, index]),
                "visible": visible[:, index].tolist(),
            }
            for index, body in enumerate(bodies)
        ],
    }


def _rounded(values: np.ndarray) -> list[list[float]]:
    """`+ 0.0` turns -0.0 into 0.0."""
    return (np.round(values, 5) + 0.0).tolist()
