"""What a playground video shows against what its prompt fixes: exact definitions, pixels and prompt only.

No simulator state is read, so teacher, base and student are judged alike.  Every value is finite: a video in which
something cannot be measured because it fails gets the worst value, never a gap.  Units are the world's: 24 units on
the short side, seconds.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from afd_data.teachers.drawing import extent, wall_rectangle
from afd_data.teachers.scene import BOUNCINESS, GRAVITIES, Scene, parse
from afd_train.evaluation.flight import Motion, analyse, gaps
from afd_train.evaluation.metric import Metric
from afd_train.evaluation.tracking import Track, track

__all__ = ["METRICS", "Observation", "bounce_ratios", "measure", "observe", "score", "track"]

WORST_RESIDUAL = 2.0  # units

METRICS: dict[str, Metric] = {
    "object_permanence": Metric(
        "higher",
        "share of frames",
        "Frames that show exactly the bodies that the prompt names: each covers 72 to 138 % of its size's area within "
        "one pixel of a disc of that size, its colour lies within 23 degrees of the named one, and no disc outside all "
        "bodies holds 40 % of the smallest body.",
    ),
    "ghost_mass": Metric(
        "lower",
        "share of foreground",
        "Foreground (difference from the empty room, summed over pixels) that lies in no body; 1 for an empty frame.",
    ),
    "gravity_error": Metric(
        "lower",
        "relative, at most 1",
        "One gravity fitted by least squares to all free flights of a video, against the prompt's: |difference| / "
        "max(prompt's, 15 units/s2). The prompt leaves it open: against the nearest of the four. No flight of 4 "
        "frames: 1, except where all bodies are said to roll.",
    ),
    "parabola_residual": Metric(
        "lower",
        "units, at most 2",
        "Root mean square distance of heights from the parabolas of that fit; 2 where nothing could be fitted.",
    ),
    "restitution_error": Metric(
        "lower",
        "absolute, at most 1",
        "Mean over floor bounces of |speed after / speed before - prompt's restitution|, from the vertical energy on "
        "both sides. Open in the prompt: only what exceeds 1 counts. No bounce: 0; nothing tracked or "
        "no flight: 1.",
    ),
    "energy_rise": Metric(
        "lower",
        "share of start energy, at most 1",
        "Largest rise of kinetic plus potential energy (0 at rest on the floor) over its earlier minimum, at frames "
        "without contact in the intervals before and after; 1 where fewer than two frames are such.",
    ),
    "jump": Metric(
        "lower",
        "share of videos",
        "1 if a body once moves farther between two frames than in any of the two intervals before and after, by more "
        "than gravity allows and 1.5 units on top; else 0.  A body that is lost in more than a fifth of the frames: 1.",
    ),
    "motion": Metric(
        "higher",
        "units/s",
        "Mean displacement of the bodies from frame to frame; 0 where none is found. Read it first.",
    ),
    "penetration": Metric(
        "lower",
        "radii",
        "Mean over frames of the deepest overlap of a body with another one, the walls or the floor; 1 in a frame "
        "where a body is lost.",
    ),
    "tracked": Metric("higher", "share of videos", "1 if every body is found in at least 80 % of the frames, else 0."),
    "physics_ok": Metric(
        "higher",
        "share of videos",
        "1 if all hold: object permanence above 0.9, of the world's four gravities the prompt's is the nearest to the "
        "fitted one, parabola residual below 0.4, energy rise below 0.3, no jump, and the bodies move at all (0.5 "
        "units/s).",
    ),
}


@dataclass(frozen=True)
class Observation:
    """What one video shows, before anything is judged: the bodies of its prompt (N), where they are, how they move."""

    scene: Scene
    seen: Track
    half: np.ndarray  # [N] half heights in units
    boxes: np.ndarray  # bool [N]
    room: tuple[float, float]  # width and height in units
    motion: Motion
    fps: float


def observe(video: np.ndarray, fps: float, prompt: str) -> Observation:
    """Track the prompt's bodies in uint8 [F, H, W, 3].  Raises RefusedError for a prompt without a known object."""
    scene = parse(prompt)
    height, width = video.shape[1:3]
    seen = track(video, scene)
    room, wall = extent(width, height), wall_rectangle(scene, width, height)
    boxes = np.array([body.shape == "box" for body in scene.bodies])
    half = seen.radii * np.where(boxes, math.sqrt(math.pi) / 2, 1.0)
    return Observation(scene, seen, half, boxes, room, analyse(seen, half, boxes, room, wall, fps), fps)


def measure(video: np.ndarray, fps: float, prompt: str) -> dict[str, float]:
    """All of `METRICS` for one uint8 video [F, H, W, 3].  Raises RefusedError for a prompt without a known object."""
    return score(observe(video, fps, prompt))


def score(observed: Observation) -> dict[str, float]:
    """All of `METRICS` for one video that has been observed."""
    scene, seen, motion, fps = observed.scene, observed.seen, observed.motion, observed.fps
    gravity_error, residual = _flight_errors(scene, motion)
    tracked = float((seen.found.mean(axis=1) >= 0.8).all())
    unknown = not tracked or (math.isnan(motion.gravity) and gravity_error > 0)
    values = {
        "object_permanence": float(seen.right.mean()),
        "ghost_mass": float(seen.ghost.mean()),
        "gravity_error": gravity_error,
        "parabola_residual": residual,
        "restitution_error": 1.0 if unknown else _restitution_error(observed),
        "energy_rise": _energy_rise(scene, seen, motion, observed.half, fps),
        "jump": _jump(scene, seen, fps) if tracked else 1.0,
        "motion": _mean_speed(seen, fps),
        "penetration": _penetration(seen, observed.half, observed.boxes, observed.room),
        "tracked": tracked,
    }
    values["physics_ok"] = float(
        values["object_permanence"] > 0.9
        and _is_prompts_gravity(scene, motion)
        and values["parabola_residual"] < 0.4
        and values["energy_rise"] < 0.3
        and values["jump"] == 0
        and values["motion"] >= 0.5
    )
    return values


def bounce_ratios(observed: Observation) -> list[tuple[int, float]]:
    """(body, speed after / speed before) of every floor bounce hard enough to tell, from the vertical energy."""
    seen, motion, fps = observed.seen, observed.motion, observed.fps
    gravity, ratios = _gravity(observed.scene, motion), []
    for bounce in motion.bounces:
        height = seen.positions[bounce.body, :, 1] - observed.half[bounce.body]
        others = [other.before for other in motion.bounces if other.body == bounce.body]
        start = max([0, bounce.before - 2, *(b + 1 for b in others if b < bounce.before)])
        stop = min([len(height), bounce.after + 3, *(b + 1 for b in others if b > bounce.before)])
        before = _vertical_energy(height[start : bounce.before + 1], gravity, fps)
        after = _vertical_energy(height[bounce.after : stop], gravity, fps)
        if before is None or after is None or before < 8.0:  # slower than 4 units/s: too slow to tell
            continue
        ratios.append((bounce.body, math.sqrt(max(after, 0.0) / before)))
    return ratios


def _flight_errors(scene: Scene, motion: Motion) -> tuple[float, float]:
    """gravity_error and parabola_residual."""
    if math.isnan(motion.gravity):
        rolls = all((body.launch or "").startswith("rolled") for body in scene.bodies)
        return (0.0, 0.0) if rolls else (1.0, WORST_RESIDUAL)
    asked = [GRAVITIES[scene.gravity]] if scene.gravity else [*GRAVITIES.values()]
    error = min(abs(motion.gravity - gravity) / max(gravity, GRAVITIES["weak"]) for gravity in asked)
    return min(error, 1.0), min(motion.residual, WORST_RESIDUAL)


def _is_prompts_gravity(scene: Scene, motion: Motion) -> bool:
    """Whether of the world's gravities the prompt's is the nearest to the one that was fitted."""
    if math.isnan(motion.gravity):
        return all((body.launch or "").startswith("rolled") for body in scene.bodies)
    nearest = min(GRAVITIES, key=lambda name: abs(GRAVITIES[name] - motion.gravity))
    return scene.gravity in (None, nearest)


def _gravity(scene: Scene, motion: Motion) -> float:
    """The video's own gravity where it can be measured, else the prompt's."""
    if not math.isnan(motion.gravity):
        return max(motion.gravity, 0.0)
    return GRAVITIES[scene.gravity or "normal"]


def _restitution_error(observed: Observation) -> float:
    errors = []
    for body, ratio in bounce_ratios(observed):
        asked = observed.scene.bodies[body].bounciness
        errors.append(abs(ratio - BOUNCINESS[asked]) if asked else max(0.0, ratio - 1.0))
    return min(float(np.mean(errors)), 1.0) if errors else 0.0


def _vertical_energy(height: np.ndarray, gravity: float, fps: float) -> float | None:
    """Mean of v^2 / 2 + g h over the intervals of a free stretch; None where there is none."""
    if len(height) < 2 or not np.isfinite(height).all():
        return None
    speed = np.diff(height) * fps
    # On a parabola the middle of an interval lies g dt^2 / 8 above the middle of its ends.
    middle = (height[1:] + height[:-1]) / 2 + gravity / (8 * fps**2)
    return float(np.mean(speed**2 / 2 + gravity * middle))


def _energy_rise(scene: Scene, seen: Track, motion: Motion, half: np.ndarray, fps: float) -> float:
    gravity = _gravity(scene, motion)
    weights = seen.radii**2 / (seen.radii**2).sum()
    # On a parabola the mean speed of two intervals is the speed in between; tracking errors weigh half as much.
    speed = (seen.positions[:, 2:] - seen.positions[:, :-2]) * fps / 2
    height = seen.positions[:, 1:-1, 1] - half[:, None]
    energy = weights @ ((speed**2).sum(axis=2) / 2 + gravity * height)
    clean = (motion.clean[:, 1:] & motion.clean[:, :-1]).all(axis=0)
    energy = energy[clean & np.isfinite(energy)]
    if len(energy) < 2:
        return 1.0
    rise = energy[1:] - np.minimum.accumulate(energy)[:-1]
    return float(np.clip(rise.max() / max(energy[0], 50.0), 0.0, 1.0))


def _jump(scene: Scene, seen: Track, fps: float) -> float:
    step = np.hypot(*np.moveaxis(np.diff(seen.positions, axis=1), 2, 0))
    padded = np.pad(step, ((0, 0), (2, 2)), constant_values=np.nan)
    # Two intervals on either side: a contact may shorten the one next to it.
    around = np.stack([padded[:, :-4], padded[:, 1:-3], padded[:, 3:-1], padded[:, 4:]])
    fastest = np.fmax.reduce(around)
    gravity = GRAVITIES[scene.gravity or "strong"]
    allowed = np.where(np.isnan(fastest), 60.0 / fps, fastest) + gravity / fps**2 + 1.5
    with np.errstate(invalid="ignore"):
        return float((step > allowed).any())


def _mean_speed(seen: Track, fps: float) -> float:
    step = np.hypot(*np.moveaxis(np.diff(seen.positions, axis=1), 2, 0))
    known = np.isfinite(step)
    return float(step[known].mean() * fps) if known.any() else 0.0


def _penetration(seen: Track, half: np.ndarray, boxes: np.ndarray, room: tuple[float, float]) -> float:
    """In radii of the body, or of the smaller of two; 1 where a body is not found."""
    reach = half[:, None]
    x, y = np.moveaxis(seen.positions, 2, 0)
    depth = np.stack([reach - x, reach - y, x + reach - room[0], y + reach - room[1]]).max(axis=0) / reach
    deepest = np.fmax(np.nan_to_num(depth, nan=1.0), 0.0).max(axis=0)
    for one, other in itertools.combinations(range(len(half)), 2):
        deepest = np.fmax(deepest, -gaps(seen, half, boxes, one, other) / min(half[one], half[other]))
    return float(deepest.mean())
