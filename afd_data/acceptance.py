"""Which videos are taken: those that decode, have the shape asked for, show something, move, and are nobody's twin.

Works on decoded frames, uint8 [F, H, W, 3]; knows nothing of journals and shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from afd_data.config import CacheConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.files import whole_file
from afd_data.sound import add_sound, drop_sound
from afd_data.video import Probe, Video, read_video, write_mp4

RATE_TOLERANCE = 0.002  # of the frame rate: 23.976 counts as 24
HASH_FRAMES, HASH_ROWS, HASH_COLUMNS = 4, 4, 4  # 64 bits
HASH_MARGIN = 2.0  # levels; smaller steps are compression noise and count as flat
THUMBNAIL_FRAMES, THUMBNAIL_SIDE = 4, 8
NAME = "the video"  # in reasons, which are kept and shown elsewhere
TWIN_LEVELS = 8  # two videos are twins when no patch of their thumbnails differs by more


class RejectedError(Exception):
    """A video that is not taken.  The text starts with the reason in a word or two and a colon.

    cost: what was charged, in the currency of the teacher's identity; None: not told.
    """

    def __init__(self, text: str, cost: float | None = None) -> None:
        super().__init__(text)
        self.cost = cost


def read_and_check(path: Path, video: VideoConfig, rules: CacheConfig) -> Video:
    """Decode a delivered file completely; `rules` are those about black and frozen videos.

    Raises RejectedError: undecodable, wrong shape, black, frozen; OSError, MemoryError where this machine has failed.
    """
    try:
        # one decoder for every machine: frames are equal, but decord dies of some damaged files
        found = read_video(path, decoder="pyav", name=NAME, check=lambda facts: check_shape(facts, video))
    except UserError as error:
        raise RejectedError(f"undecodable: {error}") from None
    height, width = found.frames.shape[1:3]
    if (width, height) != (video.width, video.height):
        raise RejectedError(f"wrong shape: shown turned, as {width}x{height}; asked for {video.width}x{video.height}")
    check_light(found.frames, rules.black)
    check_motion(found.frames, rules.frozen)
    return found


def shape_problem(facts: Probe, video: VideoConfig) -> str:
    """How size, frame count or rate, and with them the duration, differ from the recipe's; "" where they do not."""
    there = (facts.width, facts.height, facts.frames)
    asked = (video.width, video.height, video.frames)
    if there == asked and abs(facts.fps - video.fps) <= RATE_TOLERANCE * video.fps:
        return ""
    return f"{_shape(*there, facts.fps)}; asked for {_shape(*asked, video.fps)}"


def _shape(width: int, height: int, frames: int, fps: float) -> str:
    duration = f" ({frames / fps:.2f} s)" if fps > 0 else ""
    return f"{width}x{height}, {frames} frames at {fps:g} fps{duration}"


def check_shape(facts: Probe, video: VideoConfig) -> None:
    """Raises RejectedError as `shape_problem` tells."""
    if problem := shape_problem(facts, video):
        raise RejectedError(f"wrong shape: {problem}")


def check_light(frames: np.ndarray, black: float) -> None:
    """Raises RejectedError when no value of any pixel, red, green or blue, is above `black` levels."""
    brightest = int(frames.max())
    if brightest <= black:
        raise RejectedError(f"black: no pixel is brighter than {brightest} levels, the limit is {black:g}")


def check_motion(frames: np.ndarray, frozen: float) -> None:
    """Raises RejectedError when neighbouring frames differ by less than `frozen` levels on average."""
    change = sum(cv2.norm(a, b, cv2.NORM_L1) for a, b in pairwise(frames)) / frames[1:].size
    if change < frozen:
        raise RejectedError(f"frozen: frames differ by {change:.3f} levels on average, less than {frozen:g}")


def make_mp4(path: Path, found: Video, video: VideoConfig, audio: Literal["drop", "keep"]) -> None:
    """See that `path`, in which `found` was read, is H.264 in mp4, with or without its sound.

    A delivered one keeps its bytes, or where it loses its sound those of its video track; anything else is encoded
    again in place.
    """
    if not is_h264_mp4(path, found.facts):
        with whole_file(path) as part:
            write_mp4(part, found.frames, video)
            if audio == "keep":
                add_sound(part, path, 0.0, len(found.frames) / video.fps)
    elif audio == "drop" and found.facts.sound_tracks:
        drop_sound(path)


def is_h264_mp4(path: Path, facts: Probe) -> bool:
    """Whether the video at `path`, of these facts, can be sealed as it is."""
    with open(path, "rb") as file:
        return file.read(8)[4:] == b"ftyp" and facts.codec == "h264"


def perceptual_hash(frames: np.ndarray) -> str:
    """64 bits as 16 hex digits: where brightness rises to the right, on a 4 x 4 grid of 4 frames across the clip."""
    bits = []
    for index in _spread(len(frames), HASH_FRAMES):
        grey = cv2.cvtColor(frames[index], cv2.COLOR_RGB2GRAY).astype(np.float32)
        small = cv2.resize(grey, (HASH_COLUMNS + 1, HASH_ROWS), interpolation=cv2.INTER_AREA)
        bits.append(np.diff(small, axis=1) > HASH_MARGIN)
    return np.packbits(np.concatenate(bits)).tobytes().hex()


def thumbnail(frames: np.ndarray) -> bytes:
    """4 frames across the clip as 8 x 8 RGB patches: 768 bytes."""
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    patches = [
        cv2.resize(frames[index], side, interpolation=cv2.INTER_AREA)
        for index in _spread(len(frames), THUMBNAIL_FRAMES)
    ]
    return np.stack(patches).tobytes()


def is_twin(one: bytes, other: bytes) -> bool:
    """Whether two thumbnails show the same video, give or take compression."""
    a, b = (np.frombuffer(data, np.uint8).astype(np.int16) for data in (one, other))
    return a.shape == b.shape and int(np.abs(a - b).max()) <= TWIN_LEVELS


class Hashes:
    """Perceptual hashes of the samples taken so far, searched by Hamming distance; 16 bytes a sample."""

    def __init__(self) -> None:
        self._hashes = np.zeros(1024, np.uint64)
        self._ids = np.zeros(1024, np.int64)
        self._count = 0

    def add(self, sample_id: int, perceptual_hash: str) -> None:
        """Remember a sample."""
        if self._count == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._hashes[self._count] = int(perceptual_hash, 16)
        self._ids[self._count] = sample_id
        self._count += 1

    def near(self, perceptual_hash: str, bits: int) -> Iterator[int]:
        """Ids of samples whose hash differs in at most `bits` bits, in the order in which they were added."""
        differing = self._hashes[: self._count] ^ np.uint64(int(perceptual_hash, 16))
        if bits == 0:
            found = np.flatnonzero(differing == 0)
        else:
            distance = np.unpackbits(differing.view(np.uint8)).reshape(-1, 64).sum(axis=1)
            found = np.flatnonzero(distance <= bits)
        yield from (int(self._ids[index]) for index in found)


def _spread(frames: int, count: int) -> list[int]:
    """`count` frame numbers from the first to the last, evenly."""
    return [round(step * (frames - 1) / (count - 1)) for step in range(count)]
