"""Motion metrics that need no weights: a video in, numbers out (`measure`), with their definitions (`METRICS`).

Optical flow is OpenCV's DIS (preset FAST) where VBench uses RAFT or AMT; such metrics end in `_dis`, since their values
are not VBench's.  Flow is computed at a short side of 256 pixels as in VBench.  Videos with a short side below 128 are
enlarged (bilinear) to 128 instead: enlarging further invents no detail, costs four times as much, and a ball of known
speed in a 16 x 16 world is measured no better (within 3 % at 128).  Lengths are always given in 256-pixel units.
Knows nothing of prompts, policies or files.
"""

from __future__ import annotations

import itertools

import cv2
import numpy as np

from afd_train.evaluation.metric import Metric

WORKING_SIDE, SMALL_SIDE = 256, 128
DUPLICATE_LEVELS = 0.5  # 8-bit levels of mean absolute difference
FASTEST_SHARE = 0.05

METRICS = {
    "dynamic_degree_dis": Metric(
        "higher",
        "share of videos",
        "Share of videos that move, by VBench's rule with DIS for RAFT: among frames about 1/8 s apart, enough pairs "
        "(a quarter of 16) have a mean flow of their fastest 5 % of pixels above 6 px at a short side of 256.",
    ),
    "motion_mag_dis": Metric(
        "higher",
        "px",
        "Mean flow of the fastest 5 % of pixels between frames about 1/8 s apart, in pixels at a short side of 256. "
        "Read it beside the teacher's: more than the teacher's is not better.",
    ),
    "warp_rmse_dis": Metric(
        "lower",
        "share of full scale",
        "Error left after each frame is warped to the next one along the flow, over pixels whose forward and backward "
        "flow agree. Flicker raises it; a still video has 0.",
    ),
    "inconsistent_flow_dis": Metric(
        "lower",
        "share of pixels",
        "Share of pixels whose forward and backward flow disagree: hidden, appearing or vanishing parts. They are left "
        "out of the warp error.",
    ),
    "smooth_dis": Metric(
        "higher",
        "share of full scale",
        "VBench's motion smoothness with half-way flow for AMT: every other frame is dropped and interpolated from its "
        "neighbours; 1 minus the mean absolute error. A still video has 1.",
    ),
    "flicker": Metric(
        "higher",
        "share of full scale",
        "VBench's temporal flickering, exact: 1 minus the mean absolute difference of neighbouring frames. A still "
        "video has 1, so it means nothing without the motion beside it.",
    ),
    "duplicate_frames": Metric(
        "lower",
        "share of frame pairs",
        "Share of neighbouring frames that differ by less than half an 8-bit level on average: freezes, or frames "
        "shown twice.",
    ),
}


def measure(video: np.ndarray, fps: float) -> dict[str, float]:
    """All of `METRICS` for one video.  video: uint8 [F, H, W, 3], F >= 2; `smooth_dis` is NaN for F < 3."""
    assert video.dtype == np.uint8
    assert video.ndim == 4, video.shape
    assert len(video) >= 2, video.shape
    flows = Flows(video)
    moving, magnitude = _dynamic_degree(flows, fps)
    warp_rmse, inconsistent = _warp_error(flows)
    change = np.abs(np.diff(video.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    return {
        "dynamic_degree_dis": moving,
        "motion_mag_dis": magnitude,
        "warp_rmse_dis": warp_rmse,
        "inconsistent_flow_dis": inconsistent,
        "smooth_dis": _smoothness(flows),
        "flicker": float((255 - change.mean()) / 255),
        "duplicate_frames": float((change < DUPLICATE_LEVELS).mean()),
    }


class Flows:
    """A video at its working size with the flow between any two of its frames, each computed once."""

    def __init__(self, video: np.ndarray):
        height, width = video.shape[1:3]
        side = WORKING_SIDE if min(height, width) >= SMALL_SIDE else SMALL_SIDE
        scale = side / min(height, width)
        size = (round(width * scale), round(height * scale))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        self.frames = [cv2.resize(frame, size, interpolation=method) for frame in video]
        self.unit = WORKING_SIDE / side  # working pixels -> 256-px units
        self._grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in self.frames]
        self._grid = np.stack(np.meshgrid(np.arange(size[0]), np.arange(size[1])), axis=-1).astype(np.float32)
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def between(self, first: int, second: int) -> np.ndarray:
        """Where each pixel of frame `first` has gone in frame `second`: float32 [H, W, 2] (x, y), working pixels."""
        if (first, second) not in self._known:
            still = np.zeros(self._grid.shape, np.float32)
            self._known[first, second] = self._dis.calc(self._grey[first], self._grey[second], still)
        return self._known[first, second]

    def sample(self, image: np.ndarray, flow: np.ndarray) -> np.ndarray:
        """`image` read at each pixel's position plus `flow`, bilinear, edges repeated."""
        x, y = cv2.split(self._grid + flow)
        return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _dynamic_degree(flows: Flows, fps: float) -> tuple[float, float]:
    """VBench's yes or no (1.0 or 0.0), and the mean magnitude that it is decided on, in 256-px units."""
    step = max(1, round(fps / 8))
    frames = range(0, len(flows.frames), step)
    magnitudes = []
    for first, second in itertools.pairwise(frames):
        length = np.sqrt(_squared(flows.between(first, second))).ravel()
        fastest = max(1, int(len(length) * FASTEST_SHARE))
        magnitudes.append(float(np.partition(length, -fastest)[-fastest:].mean()) * flows.unit)
    if not magnitudes:  # a clip shorter than 1/8 s
        return 0.0, 0.0
    # VBench's threshold is 6 * (short side / 256) px, which is 6 in 256-px units.
    enough = max(1, round(4 * len(frames) / 16))
    moving = sum(magnitude > 6 for magnitude in magnitudes) >= enough
    return float(moving), float(np.mean(magnitudes))


def _warp_error(flows: Flows) -> tuple[float, float]:
    """Root mean square error of warped frames where flows agree (mean over pairs), and the share that disagrees."""
    errors, inconsistent = [], []
    for first in range(len(flows.frames) - 1):
        forward, backward = flows.between(first, first + 1), flows.between(first + 1, first)
        returned = flows.sample(forward, backward)
        apart = _squared(backward + returned)
        size = _squared(backward) + _squared(returned)
        agrees = apart < 0.01 * size + 0.5
        inconsistent.append(1 - agrees.mean())
        if agrees.any():
            warped = flows.sample(flows.frames[first], backward)
            difference = cv2.absdiff(warped, flows.frames[first + 1])[agrees].ravel().astype(np.float32)
            errors.append(np.sqrt(difference @ difference / len(difference)) / 255)
    return float(np.mean(errors)) if errors else float("nan"), float(np.mean(inconsistent))


def _squared(flow: np.ndarray) -> np.ndarray:
    """Squared length of each vector: [H, W, 2] -> [H, W].  (Summing an axis of two is many times slower.)"""
    x, y = flow[..., 0], flow[..., 1]
    return x * x + y * y


def _smoothness(flows: Flows) -> float:
    """1 - mean |odd frame - interpolation between its even neighbours| / 255; NaN below three frames."""
    errors = []
    for middle in range(1, len(flows.frames) - 1, 2):
        before, after = middle - 1, middle + 1
        from_before = flows.sample(flows.frames[before], 0.5 * flows.between(after, before))
        from_after = flows.sample(flows.frames[after], 0.5 * flows.between(before, after))
        halfway = cv2.addWeighted(from_before, 0.5, from_after, 0.5, 0)
        errors.append(cv2.absdiff(halfway, flows.frames[middle]).mean())
    return float((255 - np.mean(errors)) / 255) if errors else float("nan")
