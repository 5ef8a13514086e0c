"""Clips -> rows (one a video and metric) and set features; which metrics apply to a teacher stands here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from afd_data.progress import progress_bar
from afd_train.evaluation import distribution, motion, physics, quality
from afd_train.evaluation.clips import Clip
from afd_train.evaluation.compare import Row
from afd_train.evaluation.metric import Metric

# Decoding, resizing and optical flow leave Python's lock, so threads are enough.
THREADS = 2

Features = dict[str, dict[str, np.ndarray]]  # policy -> prompt id -> [takes, D]


def groups(teacher: str) -> dict[str, Mapping[str, Metric]]:
    """Heading -> metrics, in the report's order.  Exact physics exists only for the simulated world."""
    exact = {"Physics, exact": physics.METRICS} if teacher == "playground" else {}
    return {
        **exact,
        "Motion": motion.METRICS,
        "Pixels": quality.METRICS,
        "Distance to the teacher as a set": distribution.METRICS,
    }


def measure_clip(clip: Clip, fps: float, exact: bool) -> tuple[dict[str, float], np.ndarray]:
    """All values of one video, and its features for the distance between sets."""
    video = clip.load()
    values = physics.measure(video, fps, clip.prompt) if exact else {}
    values |= motion.measure(video, fps) | quality.measure(video)
    return values, distribution.features(video)


def measure_clips(clips: Sequence[Clip], fps: float, exact: bool) -> tuple[list[Row], Features]:
    """Rows of every clip in the order given, and features by policy and prompt, takes in order."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda clip: measure_clip(clip, fps, exact), clips)
            measured = list(progress_bar(len(clips), "video", "measure", iterable=found))
    finally:
        cv2.setNumThreads(threads)
    rows = [
        Row(clip.policy, clip.prompt_id, clip.prompt, clip.take, metric, float(value), clip.step)
        for clip, (values, _) in zip(clips, measured, strict=True)
        for metric, value in values.items()
    ]
    features: dict[str, dict[str, list[np.ndarray]]] = {}
    for clip, (_, feature) in zip(clips, measured, strict=True):
        features.setdefault(clip.policy, {}).setdefault(clip.prompt_id, []).append(feature)
    stacked = {
        policy: {prompt: np.stack(takes) for prompt, takes in of_policy.items()}
        for policy, of_policy in features.items()
    }
    return rows, stacked
