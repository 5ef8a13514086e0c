"""From tracked positions to mechanics: where a body flies freely, which gravity bends its path, where it bounces.

Everything is read off the positions.  The prompt's physics is never used to decide what counts as flight, so a video
with wrong physics cannot have its faults sorted out as contacts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from afd_data.teachers.drawing import Rectangle
from afd_train.evaluation.tracking import Track

TOUCH = 0.35  # units: nearer than this to floor or ceiling counts as contact
KINK = 0.35  # units a frame^2 upwards: more than noise, and free flight only ever bends down


@dataclass(frozen=True)
class Bounce:
    """A body's contact with the floor between the frames `before` and `after`."""

    body: int
    before: int
    after: int


@dataclass(frozen=True)
class Motion:
    """What the positions of one video say.  Intervals t run from frame t to t + 1."""

    flights: list[tuple[int, int, int]]  # body, first frame, frame after the last
    bounces: list[Bounce]
    clean: np.ndarray  # bool [N, F-1]: found at both ends and no contact possible in between, resting aside
    gravity: float  # units / s^2, fitted to all flights together; NaN where they are too short
    residual: float  # units, root mean square about the fitted parabolas; NaN likewise


def analyse(
    track: Track, half: np.ndarray, boxes: np.ndarray, room: tuple[float, float], wall: Rectangle | None, fps: float
) -> Motion:
    """`half`: half heights of the N bodies; `boxes`: which are boxes; `room`: width and height; all in units."""
    flights, bounces = [], []
    clean = np.zeros((len(half), track.positions.shape[1] - 1), bool)
    for body in range(len(half)):
        x, y = track.positions[body].T
        obstructed = _touches_another(track, half, boxes, body) | _touches_wall(track.positions[body], half[body], wall)
        free = np.isfinite(np.diff(y)) & ~obstructed & ~_may_touch(room[1] - y - half[body], np.diff(y))
        for before, after in _kinks(y, y - half[body]):
            free[before:after] = False
            if not obstructed[before:after].any():
                bounces.append(Bounce(body, before, after))
        clean[body] = free & ~_may_touch(np.minimum(x, room[0] - x) - half[body], np.diff(x))
        with np.errstate(invalid="ignore"):
            airborne = (y - half[body] > TOUCH) & (room[1] - y - half[body] > TOUCH)
        flights += [(body, *run) for run in _runs(free & airborne[1:] & airborne[:-1])]
    gravity, residual = _fit(track, flights, fps)
    return Motion(flights, bounces, clean, gravity, residual)


def _kinks(y: np.ndarray, clearance: np.ndarray) -> list[tuple[int, int]]:
    """Frames (before, after) around every upward kick near the floor.  Two kinked frames in a row enclose the contact;
    a single one is dropped, since the contact may lie on either side of it."""
    fall = np.diff(y)
    with np.errstate(invalid="ignore"):
        reach = np.maximum(np.abs(fall[1:]), np.abs(fall[:-1])) + 0.5
        # A contact inside the first or last interval shows half of its kick only.
        limit = np.full(len(reach), KINK)
        limit[[0, -1]] = KINK / 3
        kinked = [*(np.flatnonzero((np.diff(fall) > limit) & (clearance[1:-1] <= reach)) + 1)]
    pairs = [(int(t), int(t) + 1) for t in kinked if t + 1 in kinked]
    alone = [(int(t) - 1, int(t) + 1) for t in kinked if t + 1 not in kinked and t - 1 not in kinked]
    return sorted(pairs + alone)


def _may_touch(gap: np.ndarray, travel: np.ndarray) -> np.ndarray:
    """bool [F-1]: contact is possible inside an interval.  A body that comes, touches and leaves covers the gap before
    and the gap after; it has no more way than its travel in this interval or in one beside it."""
    padded = np.pad(np.abs(travel), 1, constant_values=np.nan)
    longest = np.fmax(np.fmax(padded[:-2], padded[1:-1]), padded[2:])
    with np.errstate(invalid="ignore"):
        return np.clip(gap[1:], 0, None) + np.clip(gap[:-1], 0, None) < longest + TOUCH


def _touches_wall(positions: np.ndarray, half: float, wall: Rectangle | None) -> np.ndarray:
    """bool [F-1]: the standing wall may be touched."""
    if wall is None:
        return np.zeros(len(positions) - 1, bool)
    left, bottom, right, top = wall
    nearest = np.clip(positions, (left, bottom), (right, top))
    gap = np.hypot(*(positions - nearest).T) - half
    return _may_touch(gap, np.hypot(*np.diff(positions, axis=0).T))


def gaps(track: Track, half: np.ndarray, boxes: np.ndarray, one: int, other: int) -> np.ndarray:
    """Room [F] between two bodies in units, negative where they overlap; at a box's corner a little underestimated."""
    apart = np.abs(track.positions[one] - track.positions[other])
    distance = apart.max(axis=1) if boxes[one] or boxes[other] else np.hypot(*apart.T)
    return distance - half[one] - half[other]


def _touches_another(track: Track, half: np.ndarray, boxes: np.ndarray, body: int) -> np.ndarray:
    """bool [F-1]: another body may be touched, or is not found and could be anywhere."""
    touched = np.zeros(track.positions.shape[1] - 1, bool)
    for other in range(len(half)):
        if other == body:
            continue
        apart = track.positions[body] - track.positions[other]
        gap = gaps(track, half, boxes, body, other)
        travel = np.hypot(*np.diff(apart, axis=0).T)
        touched |= _may_touch(gap, travel) | np.isnan(travel)
    return touched


def _runs(linked: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of at least 3 frames whose intervals are all linked: (first frame, frame after the last)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], linked.astype(int), [0]])))
    return [
        (int(start), int(stop) + 1) for start, stop in zip(edges[::2], edges[1::2], strict=True) if stop > start + 1
    ]


@lru_cache(maxsize=512)
def _projector(frames: int) -> np.ndarray:
    """[n, n]: takes the best straight line out of n equally spaced values."""
    line = np.stack([np.ones(frames), np.arange(frames)], axis=1)
    return np.eye(frames) - line @ np.linalg.pinv(line)


def _fit(track: Track, flights: list[tuple[int, int, int]], fps: float) -> tuple[float, float]:
    """One gravity for all flights, each with its own start and speed, by least squares; and the residual."""
    if not any(stop - start >= 4 for _, start, stop in flights) and len(flights) < 3:
        return math.nan, math.nan
    bends, falls = [], []
    for body, start, stop in flights:
        project = _projector(stop - start)
        times = np.arange(stop - start) / fps
        bends.append(project @ (-(times**2) / 2))
        falls.append(project @ track.positions[body, start:stop, 1])
    bend, fall = np.concatenate(bends), np.concatenate(falls)
    gravity = float(bend @ fall / (bend @ bend))
    return gravity, float(np.sqrt(np.mean((fall - gravity * bend) ** 2)))
