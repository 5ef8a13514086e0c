"""Which prompts a report shows, and their clips side by side in one mp4, so that no player can drift.

Clips are enlarged by a whole factor (every pixel of a small world stays a square) or reduced by area, stand beside each
other under their names, and a bar runs along with the time.  Knows nothing of metrics' meaning or of HTML.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST, LARGEST = 160, 320  # shown pixels on a clip's short side and on its long side
LABEL, BAR, GAP = 22, 4, 6
BACKGROUND, INK, BLANK, TIME = (24, 26, 30), (235, 235, 235), (70, 72, 78), (90, 160, 250)

ClipId = tuple[str, int]  # prompt id, take


@dataclass(frozen=True)
class Choice:
    """A row of the gallery and why it is there."""

    prompt_id: str
    take: int
    reason: str


def choose(
    student: Mapping[ClipId, float],
    base: Mapping[ClipId, float],
    better: Literal["higher", "lower"],
    rows: int,
) -> list[Choice]:
    """The student's largest win and largest loss against the base, then evenly spaced prompts (their first take).

    student, base: clip -> value of the primary metric, finite.  The first two rows are picked to be extreme and say
    so; the others depend on the prompts' ids alone.
    """
    shared = sorted(student.keys() & base.keys())
    if not shared or rows == 0:
        return []
    sign = 1 if better == "higher" else -1
    gains = {clip: sign * (student[clip] - base[clip]) for clip in shared}
    win, loss = max(shared, key=gains.__getitem__), min(shared, key=gains.__getitem__)
    chosen = []
    if gains[win] > 0:
        chosen.append(Choice(*win, "largest win of all clips"))
    if gains[loss] < 0 and len(chosen) < rows:
        chosen.append(Choice(*loss, "largest loss of all clips"))
    first_takes = sorted(dict(reversed(shared)).items())  # the lowest take of each prompt
    rest = [clip for clip in first_takes if clip not in {(choice.prompt_id, choice.take) for choice in chosen}]
    spaced = np.linspace(0, len(rest) - 1, min(rows - len(chosen), len(rest))).round().astype(int)
    return chosen + [Choice(rest[index][0], rest[index][1], "evenly spaced prompt") for index in spaced.tolist()]


def compose(clips: Sequence[tuple[str, np.ndarray | None]], fps: float) -> bytes:
    """One mp4 (yuv420p, index first) of named clips side by side.

    clips: (name, uint8 [F, H, W, 3]); None is drawn as an empty field.  A shorter clip holds its last frame.
    Raises ValueError when no clip is given.
    """
    videos = [video for _, video in clips if video is not None]
    if not videos:
        raise ValueError("a gallery row needs at least one clip")
    width, height = shown_size(videos[0].shape[2], videos[0].shape[1])
    frames = max(len(video) for video in videos)
    canvas = np.empty((frames, LABEL + height + BAR, len(clips) * (width + GAP) - GAP, 3), np.uint8)
    canvas[:] = BACKGROUND
    for column, (name, video) in enumerate(clips):
        left = column * (width + GAP)
        canvas[:, :LABEL, left : left + width] = _label(name, width)
        for time in range(frames):
            canvas[time, LABEL : LABEL + height, left : left + width] = (
                BLANK if video is None else resize(video[min(time, len(video) - 1)], width, height)
            )
    for time in range(frames):
        canvas[time, -BAR:, : max(1, canvas.shape[2] * (time + 1) // frames)] = TIME
    return _encode(canvas, fps)


def shown_size(width: int, height: int) -> tuple[int, int]:
    """Size of a clip in the gallery, even: a whole multiple for small clips, reduced where larger than `LARGEST`."""
    if min(width, height) < SMALLEST and max(width, height) <= LARGEST:
        factor = max(1, min(-(-SMALLEST // min(width, height)), LARGEST // max(width, height)))
        width, height = width * factor, height * factor
    scale = min(1.0, LARGEST / max(width, height))
    return round(width * scale / 2) * 2, round(height * scale / 2) * 2


def resize(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """One frame at the shown size: nearest when enlarging, area when reducing.  uint8 [H, W, 3]."""
    method = cv2.INTER_NEAREST if width >= frame.shape[1] else cv2.INTER_AREA
    return cv2.resize(frame, (width, height), interpolation=method)


def _label(name: str, width: int) -> np.ndarray:
    """uint8 [LABEL, width, 3] with the name in it."""
    image = Image.new("RGB", (width, LABEL), BACKGROUND)
    ImageDraw.Draw(image).text((4, LABEL // 2), name, fill=INK, font=ImageFont.load_default(14), anchor="lm")
    return np.asarray(image)


def _encode(frames: np.ndarray, fps: float) -> bytes:
    """uint8 [F, H, W, 3] -> mp4 bytes; odd sizes are padded, since 4:2:0 needs even ones."""
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    # FFmpeg moves the index to the front by reading the finished file again: it needs a real one.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.mp4"
        with av.open(str(path), "w", format="mp4", options=options) as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream("libx264", rate=rate, options={"crf": "20"})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()
