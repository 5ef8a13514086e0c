"""Pixel quality of one video without weights (`measure`), with definitions (`METRICS`).

These numbers have no best value of their own: they say how far a student's pictures stand from the teacher's.
Knows nothing of prompts, policies or files.
"""

from __future__ import annotations

import cv2
import numpy as np

from afd_train.evaluation.metric import Metric

METRICS = {
    "sharpness": Metric(
        "higher",
        "levels",
        "Standard deviation of the Laplacian of the brightness, mean over frames: edges, but grain too. Read it beside "
        "the teacher's.",
    ),
    "contrast": Metric("higher", "levels", "Standard deviation of the brightness within a frame, mean over frames."),
    "saturation": Metric(
        "higher",
        "levels",
        "Mean distance between a pixel's strongest and weakest channel. Read it beside the teacher's.",
    ),
    "clipping": Metric(
        "lower", "share of values", "Share of channel values at 0 or 255: detail lost in black or white."
    ),
}


def measure(video: np.ndarray) -> dict[str, float]:
    """All of `METRICS` for one video.  video: uint8 [F, H, W, 3]; levels are 8-bit levels, 0 to 255."""
    assert video.dtype == np.uint8
    assert video.ndim == 4, video.shape
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    edges = [cv2.Laplacian(frame, cv2.CV_32F, borderType=cv2.BORDER_REPLICATE).std() for frame in grey]
    return {
        "sharpness": float(np.mean(edges)),
        "contrast": float(np.mean([frame.std() for frame in grey])),
        "saturation": float((video.max(axis=-1) - video.min(axis=-1)).mean()),
        "clipping": float(((video == 0) | (video == 255)).mean()),
    }
