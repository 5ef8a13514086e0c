"""State -> pixels: anti-aliased discs, boxes and walls on a plain background, at any resolution.

World coordinates are units, x to the right, y up, origin at the picture's lower left corner.  A pixel's value is the
share of its area that a body covers, so that centroids and areas measured in the picture are the world's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from afd_data.teacher_config import StyleConfig
from afd_data.teachers.scene import BACKGROUND, UNITS, WALL_COLOUR, Scene

Rectangle = tuple[float, float, float, float]  # left, bottom, right, top in units


class Drawable(Protocol):
    """What of a body is seen; `radius` of a box is half its side."""

    @property
    def shape(self) -> str: ...
    @property
    def rgb(self) -> tuple[int, int, int]: ...
    @property
    def radius(self) -> float: ...


def extent(width: int, height: int) -> tuple[float, float]:
    """Width and height of the world in units; the video's short side is `UNITS` long."""
    short = min(width, height)
    return UNITS * width / short, UNITS * height / short


def wall_rectangle(scene: Scene, width: int, height: int) -> Rectangle | None:
    """The wall that stands in the room, if any: 2 units thick; at a side 14, in the middle 8 units high."""
    wide = extent(width, height)[0]
    match scene.wall:
        case "left":
            return 0.0, 0.0, 2.0, 14.0
        case "right":
            return wide - 2.0, 0.0, wide, 14.0
        case "middle":
            return wide / 2 - 1.0, 0.0, wide / 2 + 1.0, 8.0
        case _:
            return None


def backdrop(scene: Scene, width: int, height: int) -> np.ndarray:
    """The picture without bodies, float32 [H, W, 3] in 0 to 255."""
    picture = np.full((height, width, 3), BACKGROUND, np.float32)
    wall = wall_rectangle(scene, width, height)
    if wall:
        left, bottom, right, top = wall
        scale = min(width, height) / UNITS
        across = _span(np.array([left * scale]), np.array([right * scale]), width)[0]
        up = _span(np.array([height - top * scale]), np.array([height - bottom * scale]), height)[0]
        picture += (up[:, None] * across)[..., None] * (np.array(WALL_COLOUR, np.float32) - picture)
    return picture


def draw(
    scene: Scene, bodies: Sequence[Drawable], positions: np.ndarray, visible: np.ndarray, width: int, height: int
) -> np.ndarray:
    """uint8 [F, H, W, 3] of bodies at `positions` [F, N, 2] (units) where `visible` [F, N]."""
    scale = min(width, height) / UNITS
    back = backdrop(scene, width, height)
    stamps = [
        _stamps(body, positions[:, index, 0] * scale, height - positions[:, index, 1] * scale, body.radius * scale)
        for index, body in enumerate(bodies)
    ]
    frames = np.empty((len(positions), height, width, 3), np.uint8)
    for frame in range(len(positions)):
        picture = back.copy()
        for index, body in enumerate(bodies):
            if visible[frame, index]:
                covers, corners = stamps[index]
                _paint(picture, back, covers[frame], corners[frame], body.rgb)
        frames[frame] = np.clip(np.rint(picture), 0, 255)
    return frames


def styled(frames: np.ndarray, style: StyleConfig) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] as another renderer draws them."""
    if style == StyleConfig():
        return frames
    faded = frames + style.dim * (np.array(BACKGROUND, np.float32) - frames)
    return np.clip(np.rint(faded * np.array(style.tint, np.float32)), 0, 255).astype(np.uint8)


def _stamps(body: Drawable, x: np.ndarray, y: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of a body in a small square around it, float32 [F, S, S], and the squares' corners [F, 2] (row, column).

    x, y [F] and radius in pixels.
    """
    side = 2 * math.ceil(radius) + 3
    corners = np.floor(np.stack([y, x], axis=1)).astype(int) - math.ceil(radius) - 1
    y, x = y - corners[:, 0], x - corners[:, 1]
    return (_disc if body.shape == "ball" else _box)(x, y, radius, side), corners


def _paint(picture: np.ndarray, back: np.ndarray, cover: np.ndarray, corner: np.ndarray, rgb: Sequence[int]) -> None:
    """Lay a stamp over the picture in place; what lies outside the picture is cut off."""
    top, left = corner
    rows = slice(max(0, top), max(0, min(len(picture), top + len(cover))))
    columns = slice(max(0, left), max(0, min(picture.shape[1], left + len(cover))))
    part = cover[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    if part.size and rows.stop > rows.start and columns.stop > columns.start:
        picture[rows, columns] += part[..., None] * (np.array(rgb, np.float32) - back[rows, columns])


def _span(start: np.ndarray, stop: np.ndarray, pixels: int) -> np.ndarray:
    """Share of every pixel of a row that lies between start and stop [F] (pixels): float32 [F, pixels]."""
    edge = np.arange(pixels, dtype=np.float32)
    inside = np.minimum(edge + 1, stop[:, None]) - np.maximum(edge, start[:, None])
    return np.clip(inside, 0, 1).astype(np.float32)


def _box(x: np.ndarray, y: np.ndarray, half: float, side: int) -> np.ndarray:
    """Exact coverage of upright squares, float32 [F, side, side]."""
    return _span(y - half, y + half, side)[:, :, None] * _span(x - half, x + half, side)[:, None, :]


def _disc(x: np.ndarray, y: np.ndarray, radius: float, side: int) -> np.ndarray:
    """Coverage of discs, float32 [F, side, side]: several chords in every pixel row, each exact in x."""
    lines = max(2, math.ceil(32 / max(radius, 1)))
    rows = (np.arange(side * lines, dtype=np.float32) + 0.5) / lines
    half = np.sqrt(np.clip(radius**2 - (rows - y[:, None]) ** 2, 0, None))
    chords = _span((x[:, None] - half).ravel(), (x[:, None] + half).ravel(), side)
    return chords.reshape(len(x), side, lines, side).mean(axis=2)
