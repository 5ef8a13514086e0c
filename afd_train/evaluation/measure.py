"""Clips -> rows (one a video and metric) and set features; which metrics apply to a teacher stands here.

`measure_video` works on an array, `measure_clips` on an evaluation's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from afd_data.progress import progress_bar
from afd_train.evaluation import distribution, motion, physics, quality, quantities, relative, trajectory
from afd_train.evaluation.clips import Clip
from afd_train.evaluation.compare import Row
from afd_train.evaluation.metric import Metric

# Decoding, resizing and optical flow leave Python's lock, so threads are enough.
THREADS = 2

Sets = dict[str, dict[str, np.ndarray]]  # policy -> prompt id -> [takes, D]
Groups = Mapping[str, Mapping[str, Metric]]  # heading -> name -> metric


@dataclass(frozen=True)
class World:
    """What is known of the teacher's world beyond its videos."""

    exact: bool = False  # the playground: the prompt says what physics is right
    determined: bool = False  # and fixes the whole video


@dataclass(frozen=True)
class Measured:
    """One video: values by metric, features for the distance between sets; what it shows, in an exact world."""

    values: dict[str, float]
    features: np.ndarray
    observed: physics.Observation | None


@dataclass(frozen=True)
class Measurements:
    """All videos of an evaluation.  `quantities` is empty where physics is not exact."""

    rows: list[Row]
    features: Sets
    quantities: Sets


def groups(world: World) -> Groups:
    """Heading -> metrics, in the report's order.  Exact physics exists only for the simulated world."""
    exact = {"Physics, exact": {**physics.METRICS, **relative.METRICS}} if world.exact else {}
    determined = {"Against the teacher's video": trajectory.METRICS} if world.determined else {}
    return {
        **exact,
        **determined,
        "Motion": motion.METRICS,
        "Pixels": quality.METRICS,
        "Distance to the teacher as a set": {**distribution.METRICS, **(quantities.METRICS if world.exact else {})},
    }


def per_video(groups: Groups) -> dict[str, Metric]:
    """The metrics that every video has a value of."""
    others = {*distribution.METRICS, *quantities.METRICS, *relative.METRICS}
    return {name: metric for group in groups.values() for name, metric in group.items() if name not in others}


def measure_video(video: np.ndarray, fps: float, prompt: str | None = None) -> Measured:
    """All that is measured on one video, uint8 [F, H, W, 3].  `prompt`: only where it says what physics is right."""
    observed = None if prompt is None else physics.observe(video, fps, prompt)
    values = {} if observed is None else physics.score(observed)
    values |= motion.measure(video, fps) | quality.measure(video)
    return Measured(values, distribution.features(video), observed)


def measure_clips(clips: Sequence[Clip], fps: float, world: World) -> Measurements:
    """Rows of every clip in the order given, and what sets are compared by, takes in order."""

    def measure(clip: Clip) -> Measured:
        return measure_video(clip.load(), fps, clip.prompt if world.exact else None)

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            found = [*progress_bar(len(clips), "video", "measure", iterable=pool.map(measure, clips))]
    finally:
        cv2.setNumThreads(threads)
    features = _by_prompt(clips, [each.features for each in found])
    observed = [each.observed for each in found if each.observed is not None]
    if not world.exact:
        return Measurements(_rows(clips, [each.values for each in found]), features, {})
    shown = [quantities.measured(each) for each in observed]
    named = [dict(zip(quantities.QUANTITIES, each.tolist(), strict=True)) for each in shown]
    errors = _trajectory_errors(clips, observed) if world.determined else [{} for _ in clips]
    values = [each.values | error | extra for each, error, extra in zip(found, errors, named, strict=True)]
    return Measurements(_rows(clips, values), features, _by_prompt(clips, shown))


def _trajectory_errors(clips: Sequence[Clip], observed: Sequence[physics.Observation]) -> list[dict[str, float]]:
    """`trajectory_error` of every clip against the teacher's first take of its prompt."""
    teacher: dict[str, tuple[int, np.ndarray]] = {}
    for clip, seen in zip(clips, observed, strict=True):
        first = teacher.get(clip.prompt_id)
        if clip.policy == "teacher" and (first is None or clip.take < first[0]):
            teacher[clip.prompt_id] = clip.take, seen.seen.positions
    return [
        {trajectory.NAME: trajectory.trajectory_error(seen.seen.positions, teacher[clip.prompt_id][1], seen.room)}
        for clip, seen in zip(clips, observed, strict=True)
    ]


def _rows(clips: Sequence[Clip], values: Sequence[Mapping[str, float]]) -> list[Row]:
    return [
        Row(clip.policy, clip.prompt_id, clip.prompt, clip.take, metric, float(value), clip.step)
        for clip, of_clip in zip(clips, values, strict=True)
        for metric, value in of_clip.items()
    ]


def _by_prompt(clips: Sequence[Clip], arrays: Sequence[np.ndarray]) -> Sets:
    listed: dict[str, dict[str, list[np.ndarray]]] = {}
    for clip, array in zip(clips, arrays, strict=True):
        listed.setdefault(clip.policy, {}).setdefault(clip.prompt_id, []).append(array)
    return {
        policy: {prompt: np.stack(takes) for prompt, takes in of_policy.items()} for policy, of_policy in listed.items()
    }
