"""Where are the bodies that a prompt names?  A tracker for plain-background worlds: pixels and prompt, no state.

Every pixel's difference from the empty room is read as a share of one body's colour; in every frame a body is the disc
of its size that holds most of its colour, refined to the centroid.  Nothing is smoothed over time: what a frame does
not show is not found in it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import cv2
import numpy as np

from afd_data.teachers.drawing import backdrop
from afd_data.teachers.scene import BACKGROUND, COLOURS, SIZES, UNITS, Scene

FLOOR_SHARE = 0.08  # coverage below this is noise: 10 to 17 levels of 8 bits
FOUND_SHARE = 0.35  # of a body's area that must be there for its place to be believed
MASS_RANGE = (0.72, 1.38)  # right size: covered area over expected area; the next sizes are at 0.5 and 1.8
COLOUR_COSINE = 0.92  # right colour: within 23 degrees of it, seen from the background
EXTRA_SHARE = 0.4  # of the smallest body's area that may lie together outside all bodies before it is one too many


@dataclass(frozen=True)
class Track:
    """Of N bodies in F frames, in the order of the scene.  Units of the world, y up; NaN where a body is not found."""

    positions: np.ndarray  # [N, F, 2]
    mass: np.ndarray  # [N, F] covered area near the body / its expected area
    colour: np.ndarray  # [N, F] cosine between the colour seen there and the expected one
    ghost: np.ndarray  # [F] share of the foreground that lies in no body
    extra: np.ndarray  # [F] most foreground in any disc outside all bodies / area of that disc, the smallest body's
    radii: np.ndarray  # [N] units; of a box the radius of the disc of equal area

    @property
    def found(self) -> np.ndarray:
        """bool [N, F]"""
        return ~np.isnan(self.positions[:, :, 0])

    @property
    def right(self) -> np.ndarray:
        """bool [F]: exactly the right bodies, each of the right size and colour, and nothing else."""
        low, high = MASS_RANGE
        each = (self.mass >= low) & (self.mass <= high) & (self.colour >= COLOUR_COSINE) & self.found
        return each.all(axis=0) & (self.extra <= EXTRA_SHARE)


def track(video: np.ndarray, scene: Scene) -> Track:
    """Find the bodies of `scene` in uint8 [F, H, W, 3].

    What the scene leaves open (a colour, a size) is read off the video once, then held constant.
    """
    height, width = video.shape[1:3]
    scale = min(width, height) / UNITS
    difference = video.astype(np.float32) - backdrop(scene, width, height)
    names, sizes = _resolve(difference, scene, scale)
    palette = sorted(set(names))
    shares = _shares(difference, np.array([_direction(name) for name in palette], np.float32))
    strength = np.linalg.norm(difference, axis=3) / np.mean([np.linalg.norm(_direction(name)) for name in palette])
    strength[strength < FLOOR_SHARE] = 0

    count, frames, owned = len(names), len(video), shares.sum(axis=0)
    positions = np.full((count, frames, 2), np.nan)
    mass, colour = np.zeros((count, frames)), np.zeros((count, frames))
    radii = np.array([SIZES[size] for size in sizes])
    inside = np.zeros(video.shape[:3], bool)
    for index in np.argsort(-radii, kind="stable"):
        radius = radii[index] * scale
        share = shares[palette.index(names[index])]
        centre = _best_disc(share, radius)
        window = _window(centre, radius + 1, height, width)
        mass[index] = (share * window).sum(axis=(1, 2)) / (math.pi * radius**2)
        own = window & (owned <= share)  # where bodies touch, pixels that are another one's say nothing
        colour[index] = _cosine((difference * (strength * own)[..., None]).sum(axis=(1, 2)), names[index])
        seen = mass[index] >= FOUND_SHARE
        positions[index, seen] = np.stack([centre[:, 1], height - centre[:, 0]], axis=1)[seen] / scale
        inside |= window & seen[:, None, None]
        share[window] = 0  # the next body of this colour is another one
    total = strength.sum(axis=(1, 2))
    strength[inside] = 0
    ghost = np.where(total > 0, strength.sum(axis=(1, 2)) / np.maximum(total, 1e-9), 1.0)
    smallest = radii.min() * scale
    extra = _in_discs(strength, smallest).max(axis=(1, 2)) / (math.pi * smallest**2)
    _keep_identities(positions, mass, colour, [*zip(names, sizes, strict=True)])
    return Track(positions, mass, colour, ghost, extra, radii)


def _direction(name: str) -> np.ndarray:
    """From the background to a colour, in 8-bit levels of RGB."""
    return np.array(COLOURS[name], np.float32) - np.array(BACKGROUND, np.float32)


def _cosine(vectors: np.ndarray, name: str) -> np.ndarray:
    """Cosine [F] between colours seen, [F, 3], and a colour's direction; 0 where nothing is seen."""
    wanted = _direction(name)
    return vectors @ wanted / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(wanted) + 1e-9)


def _shares(difference: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Coverage of every pixel by each colour: [F, H, W, 3] and [K, 3] -> [K, F, H, W]; one colour owns a pixel."""
    share = np.clip(difference @ (directions.T / (directions**2).sum(axis=1)), 0, 1.1)
    # |d|^2 - |d - s c|^2 = 2 s <d, c> - s^2 |c|^2: how much of the pixel a colour explains.
    explained = 2 * share * (difference @ directions.T) - share**2 * (directions**2).sum(axis=1)
    owner = explained.argmax(axis=3)[..., None] == np.arange(len(directions))
    return np.moveaxis(np.where(owner & (share >= FLOOR_SHARE), share, 0), 3, 0).copy()


def _resolve(difference: np.ndarray, scene: Scene, scale: float) -> tuple[list[str], list[str]]:
    """Colours and sizes of all bodies; open ones are those that explain the video best."""
    colours = [body.colour for body in scene.bodies]
    sizes = [body.size for body in scene.bodies]
    if None not in colours and None not in sizes:
        return [name for name in colours if name], [size for size in sizes if size]
    names = [*COLOURS]
    shares = _shares(difference, np.array([_direction(name) for name in names], np.float32))
    area = dict(zip(names, np.median(shares.sum(axis=(2, 3)), axis=1), strict=True))
    free = sorted((name for name in names if name not in colours), key=lambda name: -area[name])
    chosen = [name or free.pop(0) for name in colours]
    for index, size in enumerate(sizes):
        if size is None:
            one = area[chosen[index]] / chosen.count(chosen[index])
            radius = max(math.sqrt(one / math.pi) / scale, 1e-3)
            sizes[index] = min(SIZES, key=lambda name: abs(math.log(SIZES[name] / radius)))
    return chosen, [size for size in sizes if size]


def _in_discs(share: np.ndarray, radius: float) -> np.ndarray:
    """What a disc around every pixel holds: [F, H, W] -> [F, H, W]; radius in pixels."""
    side = math.ceil(radius) * 2 + 1
    offsets = np.arange(side, dtype=np.float32) - side // 2
    kernel = np.clip(radius + 0.5 - np.hypot(offsets[:, None], offsets), 0, 1)
    return np.stack([cv2.filter2D(frame, -1, kernel, borderType=cv2.BORDER_CONSTANT) for frame in share])


def _best_disc(share: np.ndarray, radius: float) -> np.ndarray:
    """Centres [F, 2] (row, column in pixels) of the discs that hold most of share [F, H, W]."""
    held = _in_discs(share, radius).reshape(len(share), -1)
    peaks = np.stack(np.unravel_index(held.argmax(axis=1), share.shape[1:]), axis=1)
    centre = peaks + 0.5
    rows, columns = np.arange(share.shape[1]) + 0.5, np.arange(share.shape[2]) + 0.5
    for _ in range(3):
        inside = share * _window(centre, radius + 1, *share.shape[1:])
        weight = inside.sum(axis=(1, 2))
        moved = np.stack([inside.sum(axis=2) @ rows, inside.sum(axis=1) @ columns], axis=1)
        centre = np.where(weight[:, None] > 0, moved / np.maximum(weight, 1e-9)[:, None], centre)
    return centre


def _window(centre: np.ndarray, radius: float, height: int, width: int) -> np.ndarray:
    """bool [F, H, W]: pixels whose centre lies within `radius` of the frame's centre [F, 2]."""
    rows = (np.arange(height) + 0.5 - centre[:, :1]) ** 2
    columns = (np.arange(width) + 0.5 - centre[:, 1:]) ** 2
    return rows[:, :, None] + columns[:, None, :] <= radius**2


def _keep_identities(positions: np.ndarray, mass: np.ndarray, colour: np.ndarray, looks: list) -> None:
    """Bodies that look alike keep the order, frame by frame, that moves them least (in place)."""
    for look in set(looks):
        alike = [index for index, other in enumerate(looks) if other == look]
        if len(alike) < 2:
            continue
        last = positions[alike, 0].copy()
        for frame in range(1, positions.shape[1]):
            now = positions[alike, frame]
            orders = [list(order) for order in itertools.permutations(range(len(alike)))]
            best = min(orders, key=lambda order: float(np.nansum(np.hypot(*(now[order] - last).T))))
            order = [alike[index] for index in best]
            for values in (positions, mass, colour):
                values[alike, frame] = values[order, frame]
            now = positions[alike, frame]
            last = np.where(np.isnan(now), last, now)
