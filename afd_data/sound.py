"""The sound track beside a video's frames: taken along, cut to the clip's time span, or taken away.

The video track is copied packet by packet, never encoded again; the same files give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from heapq import merge
from pathlib import Path

import av
import av.error
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer

from afd_data.files import whole_file
from afd_data.opening import main_track, open_video
from afd_data.video import MP4_OPTIONS

RATE = 48_000  # samples per second of what is written
FRAME_SAMPLES = 1024  # AAC's


def drop_sound(path: Path) -> None:
    """Take the sound tracks out of a video file in place; what is left is an mp4."""
    _mux(path, None)


def add_sound(path: Path, source: Path, start_s: float, duration_s: float) -> None:
    """Give the mp4 `path` the sound of `source` from `start_s` after its first frame, as AAC.

    Where the source has no sound that can be decoded, nothing is done.  What it lacks at the end, or holds damaged, is
    silence.
    """
    samples = _samples(source, start_s, round(duration_s * RATE))
    if samples is not None:
        _mux(path, samples)


def _mux(path: Path, samples: np.ndarray | None) -> None:
    with (
        whole_file(path) as part,
        open_video(path) as source,
        av.open(str(part), "w", format="mp4", options=MP4_OPTIONS) as out,
    ):
        track = main_track(source, str(path))
        copy = out.add_stream_from_template(track)
        pictures = (packet for packet in source.demux(track) if packet.dts is not None)
        sounds: Iterator[av.Packet] = iter(())
        if samples is not None:
            layout = "stereo" if len(samples) == 2 else "mono"
            sound = out.add_stream("aac", rate=RATE, layout=layout, options={"flags": "+bitexact"})
            sounds = _encoded(sound, samples, layout)
        for packet in merge(pictures, sounds, key=_time):
            if packet.stream is track:
                packet.stream = copy
            out.mux(packet)


def _time(packet: av.Packet) -> Fraction:
    assert packet.dts is not None
    return packet.dts * packet.time_base


def _encoded(stream: AudioStream, samples: np.ndarray, layout: str) -> Iterator[av.Packet]:
    for first in range(0, samples.shape[1], FRAME_SAMPLES):
        piece = np.ascontiguousarray(samples[:, first : first + FRAME_SAMPLES])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = RATE, first, Fraction(1, RATE)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _samples(source: Path, start_s: float, count: int) -> np.ndarray | None:
    """float32 [channels (1 or 2), count] at RATE; None where there is no sound track, or none that can be decoded."""
    with open_video(source) as container:
        stream = next((track for track in container.streams.audio if _is_decodable(track)), None)
        if stream is None:
            return None
        picture = main_track(container, str(source))
        first_frame_s = float((picture.start_time or 0) * (picture.time_base or 0))
        samples = np.zeros((min(stream.channels, 2), count), np.float32)
        for time_s, piece in _pieces(container, stream, len(samples)):
            at = round((time_s - first_frame_s - start_s) * RATE)
            if at >= count:
                break
            first, last = max(at, 0), min(at + piece.shape[1], count)
            if first < last:
                samples[:, first:last] = piece[:, first - at : last - at]
        return samples


def _is_decodable(stream: AudioStream) -> bool:
    """Streams of a codec that FFmpeg does not know have no context, and damaged headers tell of no channels."""
    return stream.codec_context is not None and stream.channels > 0


def _pieces(container: InputContainer, stream: AudioStream, channels: int) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, float32 [channels, n] at RATE) from there on.  Damaged sound is no reason to lose a video: skipped."""
    resampler = av.AudioResampler("fltp", "stereo" if channels == 2 else "mono", RATE)
    for packet in _packets(container, stream):
        try:
            pieces = [piece for frame in packet.decode() for piece in resampler.resample(frame)]
        except (av.error.FFmpegError, ValueError):
            continue
        for piece in pieces:
            if piece.pts is not None and piece.time_base is not None:
                yield float(piece.pts * piece.time_base), piece.to_ndarray()


def _packets(container: InputContainer, stream: AudioStream) -> Iterator[av.Packet]:
    """Up to where the file cannot be read any further."""
    with suppress(av.error.FFmpegError):
        yield from container.demux(stream)
