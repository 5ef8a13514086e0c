"""Where the prompt fixes the whole video: how far a video's bodies are from where the teacher's are."""

from __future__ import annotations

import math

import numpy as np

from afd_train.evaluation.metric import Metric

NAME = "trajectory_error"

METRICS = {
    NAME: Metric(
        "lower",
        "units",
        "Mean distance between the bodies of a video and those of the teacher's video of the same prompt (its first "
        "take), frame by frame. A frame counts at most half the room's diagonal, and that much where a body is lost; "
        "frames in which the teacher's body is not found are left out.",
    )
}


def trajectory_error(positions: np.ndarray, teacher: np.ndarray, room: tuple[float, float]) -> float:
    """Mean over bodies and frames in units; NaN where the teacher's bodies are never found.

    positions, teacher: [N, F, 2] in units, NaN where a body is not found; room: width and height in units.
    """
    worst = math.hypot(*room) / 2
    apart = np.hypot(*np.moveaxis(positions - teacher, 2, 0))
    counted = np.isfinite(teacher).all(axis=2)
    if not counted.any():
        return math.nan
    return float(np.fmin(apart, worst)[counted].mean())
