"""A video of any size, rate and length -> the frames that a recipe asks for.

The rules, in this order:
* Time.  Frame k of the result is the source frame nearest to `start + k / fps` (the earlier one on a tie), so frames
  are dropped or repeated, never blended.  A wanted frame exists while its time lies within the clip's duration.
* Length.  `start` is 0 or such that the middle is taken; what is missing at the end is refused, held or played
  backwards and forwards (`short`).
* Size.  Scaled with one factor in both directions (non-square pixels made square first), then cut or padded with black
  around the centre.

Decodes as a stream: a long file costs no more memory than the clip that is taken from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import av
import av.error
import cv2
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from afd_data.acceptance import RejectedError
from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.opening import main_track, open_video, raise_if_local, whole_packets
from afd_data.teacher_config import Adaptation
from afd_data.video import upright_rgb

EPSILON_S = 1e-6


@dataclass(frozen=True)
class Clip:
    """uint8 [F, H, W, 3]; where in the source it starts; how many frames at the end are held or played again."""

    frames: np.ndarray
    start_s: float
    made_up: int


@dataclass(frozen=True)
class Timeline:
    """When the packets of a track are shown: the first is at 0 s."""

    origin_s: float  # time stamp of the first frame
    shown_s: list[float]
    duration_s: float
    pixel_aspect: float  # width of a coded pixel over its height


def bring_to(video: VideoConfig, path: Path, name: str, rules: Adaptation) -> Clip:
    """Take the clip that `video` describes from a file.

    Raises UserError (unreadable, damaged) and RejectedError (too short, where the rules forbid that).
    """
    try:
        with open_video(path) as container:
            line = _timeline(container, name)
        wanted_s = video.frames / video.fps
        start_s = max(0.0, (line.duration_s - wanted_s) / 2) if rules.start == "middle" else 0.0
        there = min(video.frames, ceil((line.duration_s - start_s - EPSILON_S) * video.fps))
        if there < video.frames and rules.short == "reject":
            raise RejectedError(f"too short: {name}: {line.duration_s:.2f} s, asked for {wanted_s:.2f} s")
        times = [start_s + k / video.fps for k in range(there)]
        frames = _pictures(path, name, line, times, video, rules.fit)
    except (av.error.FFmpegError, OSError) as error:
        raise_if_local(path, error)
        raise UserError(f"{name}: cannot be decoded ({type(error).__name__})") from None
    if not frames:
        raise UserError(f"{name}: no frame can be decoded")
    return Clip(_filled_up(frames, video, rules), start_s, video.frames - there)


def bring_frames(video: VideoConfig, frames: np.ndarray, name: str, rules: Adaptation) -> Clip:
    """Take the clip that `video` describes from uint8 [f, h, w, 3] at its own frame rate.

    Raises RejectedError: too short, where the rules forbid that.
    """
    if len(frames) < video.frames and rules.short == "reject":
        raise RejectedError(f"too short: {name}: {len(frames)} frames, asked for {video.frames}")
    first = max(0, len(frames) - video.frames) // 2 if rules.start == "middle" else 0
    taken = [fitted(frame, video, rules.fit) for frame in frames[first : first + video.frames]]
    return Clip(_filled_up(taken, video, rules), first / video.fps, video.frames - len(taken))


def is_as_asked(video: VideoConfig, path: Path, name: str) -> bool:
    """Whether `bring_to` would only copy: every frame there, in time, upright, of that size in square pixels.

    Raises UserError when the file cannot be read.
    """
    try:
        with open_video(path) as container:
            line = _timeline(container, name)
        with open_video(path) as container:
            first = next(iter(container.decode(main_track(container, name))), None)
    except (av.error.FFmpegError, OSError) as error:
        raise_if_local(path, error)
        raise UserError(f"{name}: cannot be decoded ({type(error).__name__})") from None
    if first is None or first.rotation % 360 or line.pixel_aspect != 1 or len(line.shown_s) != video.frames:
        return False
    in_time = all(abs(shown_s - k / video.fps) < 0.5 / video.fps for k, shown_s in enumerate(line.shown_s))
    return in_time and (first.width, first.height) == (video.width, video.height)


def _filled_up(frames: list[np.ndarray], video: VideoConfig, rules: Adaptation) -> np.ndarray:
    order = played_again(len(frames), video.frames) if rules.short == "loop" else held(len(frames), video.frames)
    return np.stack([frames[index] for index in order])


def held(there: int, wanted: int) -> list[int]:
    """Frame indices with the last one held: (3, 5) -> 0 1 2 2 2."""
    return [min(index, there - 1) for index in range(wanted)]


def played_again(there: int, wanted: int) -> list[int]:
    """Frame indices backwards and forwards without doubled ends: (3, 7) -> 0 1 2 1 0 1 2."""
    period = max(1, 2 * (there - 1))
    return [min(index % period, period - index % period) for index in range(wanted)]


def fitted(rgb: np.ndarray, video: VideoConfig, fit: str, pixel_aspect: float = 1.0) -> np.ndarray:
    """uint8 [h, w, 3] -> [H, W, 3]: one scale for both directions of the picture, then cut or padded centrally."""
    height, width = rgb.shape[0], rgb.shape[1] * pixel_aspect
    ratios = video.width / width, video.height / height
    scale = max(ratios) if fit == "crop" else min(ratios)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    kernel = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR  # averaging shrinks well and enlarges badly
    scaled = cv2.resize(rgb, size, interpolation=kernel) if size != (rgb.shape[1], rgb.shape[0]) else rgb
    if fit == "crop":
        top, left = (scaled.shape[0] - video.height) // 2, (scaled.shape[1] - video.width) // 2
        return np.ascontiguousarray(scaled[top : top + video.height, left : left + video.width])
    canvas = np.zeros((video.height, video.width, 3), np.uint8)
    top, left = (video.height - scaled.shape[0]) // 2, (video.width - scaled.shape[1]) // 2
    canvas[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled
    return canvas


def _pictures(
    path: Path, name: str, line: Timeline, times: list[float], video: VideoConfig, fit: str
) -> list[np.ndarray]:
    """The frames nearest to `times`, each fitted; a frame that is repeated is worked on once."""
    pictures: list[np.ndarray] = []
    previous, converter = None, VideoReformatter()
    for frame in _nearest(_shown(path, name, line.origin_s), times):
        if frame is not previous:
            aspect = 1 / line.pixel_aspect if frame.rotation % 180 else line.pixel_aspect
            pictures.append(fitted(upright_rgb(frame, converter), video, fit, aspect))
        else:
            pictures.append(pictures[-1])
        previous = frame
    return pictures


def _timeline(container: InputContainer, name: str) -> Timeline:
    """Read every packet's time stamp without decoding."""
    stream = main_track(container, name)
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if rate <= 0:
        raise UserError(f"{name}: the video states no frame rate")
    aspect = float(stream.sample_aspect_ratio or 1)
    stamps, count = [], 0  # the packets themselves may be more than memory holds
    for packet in whole_packets(container, stream):
        count += 1
        if packet.pts is not None and packet.time_base is not None:
            stamps.append(float(packet.pts * packet.time_base))
    if not count:
        raise UserError(f"{name}: the video has no frames")
    if stream.frames > count:
        raise UserError(f"{name}: truncated: it declares {stream.frames} frames and holds {count}")
    if len(stamps) < count:
        return Timeline(0.0, [k / rate for k in range(count)], count / rate, aspect)
    stamps.sort()
    shown_s = [stamp - stamps[0] for stamp in stamps]
    return Timeline(stamps[0], shown_s, shown_s[-1] + 1 / rate, aspect)


def _shown(path: Path, name: str, origin_s: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds after the first frame, frame) in the order of showing."""
    with open_video(path) as container:
        stream = main_track(container, name)
        rate = float(stream.average_rate or stream.guessed_rate or 1)
        for index, frame in enumerate(container.decode(stream)):
            yield (index / rate if frame.time is None else frame.time - origin_s), frame


def _nearest(shown: Iterator[tuple[float, av.VideoFrame]], times: list[float]) -> Iterator[av.VideoFrame]:
    """For each time (ascending, seconds) the frame nearest to it; the earlier one on a tie."""
    wanted = iter(times)
    time_s = next(wanted, None)
    last: tuple[float, av.VideoFrame] | None = None
    for shown_s, frame in shown:
        while time_s is not None and shown_s >= time_s - EPSILON_S:
            earlier = last is not None and time_s - last[0] <= shown_s - time_s + EPSILON_S
            yield last[1] if last is not None and earlier else frame
            time_s = next(wanted, None)
        if time_s is None:
            return
        last = shown_s, frame
    while time_s is not None and last is not None:
        yield last[1]
        time_s = next(wanted, None)
