"""Videos of the fake provider: real mp4, a function of prompt and seed, made once and kept in a folder."""

from __future__ import annotations

import hashlib
import os
import threading
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from afd_data.config import VideoConfig
from afd_data.video import write_mp4

SOUND_RATE, SOUND_HZ = 16_000, 440.0


def parse_video(text: str) -> VideoConfig:
    """`64x48,24,12.0`: width x height, frames, frames per second."""
    size, frames, fps = text.split(",")
    width, height = size.split("x")
    return VideoConfig(width=int(width), height=int(height), frames=int(frames), fps=float(fps))


class Footage:
    """Makes and keeps videos.  Thread-safe."""

    def __init__(self, folder: Path, video: VideoConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lock = folder, threading.Lock()
        self.video = video

    def read(self, prompt: str, seed: int) -> bytes:
        """The mp4 of a prompt; with a sound track where the prompt contains `sound=yes`."""
        name = hashlib.sha256(f"{self.video!r}/{seed}/{prompt}".encode()).hexdigest()
        path = self._folder / f"{name}.mp4"
        with self._lock:
            if not path.is_file():
                part = path.with_suffix(".part")
                write_mp4(part, draw(prompt, seed, self.video), self.video)
                if "sound=yes" in prompt:
                    _add_sound(part, self.video.frames / self.video.fps)
                os.replace(part, path)
        return path.read_bytes()


def draw(prompt: str, seed: int, video: VideoConfig) -> np.ndarray:
    """uint8 [F, H, W, 3]: a bright square that bounces over a dim pattern; all of it follows from the hash."""
    digest = hashlib.sha256(f"{seed}/{prompt}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    height, width = video.height, video.width
    pattern = random.integers(10, 110, (3, 4, 3), dtype=np.uint8)
    frames = np.repeat(cv2.resize(pattern, (width, height))[None], video.frames, axis=0)
    colour = random.integers(170, 256, 3, dtype=np.uint8)
    side = max(2, min(height, width) // 3)
    room = np.array([height - side, width - side])
    start = random.uniform(0, 1, 2) * room
    travel = random.uniform(0.7, 1.6, 2) * room * random.choice([-1, 1], 2)
    for index, frame in enumerate(frames):
        along = (start + travel * index / video.frames) % (2 * room + 1e-9)
        row, column = np.rint(np.where(along > room, 2 * room - along, along)).astype(int)
        frame[row : row + side, column : column + side] = colour
    return frames


def _add_sound(path: Path, seconds: float) -> None:
    """Give the mp4 a sine of `seconds` as AAC; the pictures' packets stay as they are."""
    muxed = path.with_suffix(".sound")
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path)) as source, av.open(str(muxed), "w", format="mp4", options=options) as target:
        pictures = source.streams.video[0]
        copy = target.add_stream_from_template(pictures)
        sound = target.add_stream("aac", rate=SOUND_RATE, layout="mono")
        for packet in source.demux(pictures):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
        times = np.arange(int(seconds * SOUND_RATE)) / SOUND_RATE
        wave = (0.2 * np.sin(2 * np.pi * SOUND_HZ * times)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = SOUND_RATE, Fraction(1, SOUND_RATE), 0
        target.mux([*sound.encode(frame), *sound.encode(None)])
    os.replace(muxed, path)
