"""Which videos are taken: those that decode, have the shape that was asked for, move, and are nobody else's twin.

Works on decoded frames, uint8 [F, H, W, 3]; knows nothing of journals and shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.video import Video, probe, read_video, write_mp4

HASH_FRAMES, HASH_ROWS, HASH_COLUMNS = 4, 4, 4  # 64 bits
HASH_MARGIN = 2.0  # levels; smaller steps are compression noise and count as flat
THUMBNAIL_FRAMES, THUMBNAIL_SIDE = 4, 8
TWIN_LEVELS = 8  # two videos are twins when no patch of their thumbnails differs by more


class RejectedError(Exception):
    """A video that is not taken.  The text starts with the reason in a word or two and a colon."""


def read_and_check(path: Path, video: VideoConfig, frozen: float) -> np.ndarray:
    """Decode a delivered file completely and return its frames; raises RejectedError."""
    try:
        # one decoder for every machine: frames are equal, but decord dies of some damaged files
        delivered = read_video(path, decoder="pyav")
    except UserError as error:
        raise RejectedError(f"undecodable: {error}") from None
    check_shape(delivered, video)
    check_motion(delivered.frames, frozen)
    return delivered.frames


def check_shape(delivered: Video, video: VideoConfig) -> None:
    """Raises RejectedError unless size, frame count and rate are those of the recipe."""
    frames, height, width = delivered.frames.shape[:3]
    asked = (video.width, video.height, video.frames)
    if (width, height, frames) != asked or abs(delivered.fps - video.fps) > 1e-3 * video.fps:
        raise RejectedError(
            f"wrong shape: {width}x{height}, {frames} frames at {delivered.fps:g} fps; "
            f"asked for {asked[0]}x{asked[1]}, {asked[2]} frames at {video.fps:g} fps"
        )


def check_motion(frames: np.ndarray, frozen: float) -> None:
    """Raises RejectedError when neighbouring frames differ by less than `frozen` levels on average."""
    change = float(cv2.absdiff(frames[1:].reshape(-1), frames[:-1].reshape(-1)).mean())
    if change < frozen:
        raise RejectedError(f"frozen: frames differ by {change:.3f} levels on average, less than {frozen:g}")


def make_mp4(path: Path, frames: np.ndarray, video: VideoConfig) -> None:
    """See that `path` is H.264 in mp4: a delivered one keeps its bytes, anything else is encoded again in place."""
    with open(path, "rb") as file:
        is_mp4 = file.read(8)[4:] == b"ftyp"
    if not is_mp4 or probe(path).codec != "h264":
        write_mp4(path, frames, video)


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
