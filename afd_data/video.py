"""Videos: mp4 <-> uint8 [F, H, W, 3] (frame, row, column, RGB), and nothing of samples, tars or networks.

Writing is deterministic: the same frames and settings give the same bytes (one x264 thread, no dates).
Reading gives equal frames from either decoder.  decord is used where it is installed, able and faster; PyAV reads the
rest (decord 0.6 cannot return frames 8, 12, 16, 24, 48 or 72 pixels wide, and picks its own of several video tracks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.opening import Source, is_whole, main_track, name_of, opened, readable, whole_packets

Decoder = Literal["auto", "decord", "pyav"]
RGB_MATRIX, BT709 = 0, 1  # ITU-T H.273; BT.709 is 1 as matrix, as primaries and as transfer
MP4_OPTIONS = {"movflags": "+faststart", "fflags": "+bitexact"}  # index first; without the muxer's version
MAX_PIXELS = 2**30  # of all frames together: 3.2 GB decoded, five seconds of 3840 x 2160 at 24 fps
SMALLEST_PX = 256  # of a frame, as it counts: however small it is, it takes room
MAX_PACKED = 3 * 2**30  # bytes of all packets, which a damaged index may find in the file again and again
DECORD_MIN_WIDTH = 100  # below it PyAV takes less time (0.9 against 1.7 ms for 12 frames of 32 x 32)


@dataclass(frozen=True)
class Probe:
    """What a file says of its main video track, the frames counted by reading every packet."""

    width: int  # as coded, before any turn by 90 degrees
    height: int
    frames: int
    fps: float
    codec: str
    pixel_format: str
    declared_frames: int  # 0 where the container does not say
    video_tracks: int
    sound_tracks: int


@dataclass(frozen=True)
class Video:
    """Decoded frames, uint8 [F, H, W, 3] in RGB, of a file with these facts."""

    frames: np.ndarray
    facts: Probe

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.facts.fps


def write_mp4(path: Path, frames: np.ndarray, video: VideoConfig) -> None:
    """Write uint8 [F, H, W, 3] as H.264 in an mp4 whose index stands first (`Mp4Writer` says how)."""
    check_frames(frames)
    with Mp4Writer(path, video) as writer:
        writer.add(frames)


class Mp4Writer:
    """An H.264 mp4 that grows frame by frame; complete when its `with` block ends.

    Lossless is RGB inside H.264 and comes back bit for bit, in browsers too: without its matrix tag Chromium takes the
    planes for YUV.  (yuv444p crf 0 would be up to 2 levels off.)  Otherwise yuv420p at `video.crf`, tagged BT.709.
    The size is that of the frames, not of `video`, which gives rate and quality.
    """

    def __init__(self, path: Path, video: VideoConfig):
        self._video = video
        self._rate = Fraction(video.fps).limit_denominator(1001)
        self._container = av.open(str(path), "w", format="mp4", options=MP4_OPTIONS)
        self._stream: VideoStream | None = None
        self._frames = 0
        self._converter = VideoReformatter()

    def add(self, frames: np.ndarray) -> None:
        """Append uint8 [F, H, W, 3], all of one size."""
        stream = self._stream = self._stream or self._add_stream(*frames.shape[1:3])
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            if not self._video.lossless:
                frame = self._converter.reformat(
                    frame,
                    format=stream.pix_fmt,
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    threads=1,
                )
            frame.pts, frame.time_base = self._frames, 1 / self._rate
            self._container.mux(stream.encode(frame))
            self._frames += 1

    def _add_stream(self, height: int, width: int) -> VideoStream:
        lossless = self._video.lossless
        codec, pixels = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv420p")
        # Macroblock trees are not deterministic: the same frames give one of several files, in the same process even.
        options = {"crf": str(0 if lossless else self._video.crf), "x264-params": "mbtree=0"}
        stream = self._container.add_stream(codec, rate=self._rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        context = stream.codec_context
        context.thread_count = 1  # x264's own threads would change its decisions
        context.colorspace = RGB_MATRIX if lossless else BT709
        context.color_range = ColorRange.JPEG if lossless else ColorRange.MPEG
        context.color_primaries = context.color_trc = BT709
        return stream

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


def check_frames(frames: np.ndarray) -> None:
    """Raises ValueError unless frames is uint8 [F, H, W, 3] with even height and width."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames: expected uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames: height and width must be even for H.264, got {list(frames.shape)}")


def probe(source: Source, name: str | None = None) -> Probe:
    """Facts of the main video track, without decoding.  Raises UserError naming the file and what is wrong with it."""
    name = name or name_of(source)
    with opened(source, name) as container:
        stream = main_track(container, name)
        return _facts(container, stream, sum(1 for _ in whole_packets(container, stream)))


def _facts(container: InputContainer, stream: VideoStream, frames: int) -> Probe:
    context = stream.codec_context
    return Probe(
        width=context.width,
        height=context.height,
        frames=frames,
        fps=float(stream.average_rate or stream.guessed_rate or 0),
        codec=context.name,
        pixel_format=context.pix_fmt or "",
        declared_frames=stream.frames,
        video_tracks=len(container.streams.video),
        sound_tracks=len(container.streams.audio),
    )


def upright_rgb(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    """uint8 [H, W, 3], turned as the file asks (telephones film sideways); by the frame's own colour tags.

    One converter for all frames of a clip: making one takes longer than converting a small frame.
    """
    rgb = converter.reformat(frame, format="rgb24", threads=1)
    return np.rot90(rgb.to_ndarray(), k=frame.rotation // 90)


def read_video(
    source: Source, decoder: Decoder = "auto", name: str | None = None, check: Callable[[Probe], None] | None = None
) -> Video:
    """Decode a whole video.  `name` stands for bytes in messages; `check` sees the facts before frames are decoded.

    Raises UserError naming the file: not a video, an HTML page, truncated, without frames; and whatever `check` raises.
    """
    name = name or name_of(source)
    with opened(source, name) as container:
        stream = main_track(container, name)
        packets = _packets(container, stream, name)
        facts = _facts(container, stream, sum(map(is_whole, packets)))
        if facts.frames == 0 or facts.fps <= 0:
            raise UserError(f"{name}: the video has no frames")
        if facts.declared_frames > facts.frames:
            raise UserError(f"{name}: truncated: it declares {facts.declared_frames} frames and has {facts.frames}")
        if check is not None:
            check(facts)
        wanted = decoder == "decord" or (decoder == "auto" and facts.width >= DECORD_MIN_WIDTH)
        able = facts.video_tracks == 1
        frames = _decord_frames(source, name, required=decoder == "decord") if wanted and able else None
        if frames is None:
            frames = _pyav_frames(stream, packets, name)
    if len(frames) < facts.frames:
        raise UserError(f"{name}: damaged: {facts.frames} frames in the file, only {len(frames)} can be decoded")
    return Video(frames, facts)


def _packets(container: InputContainer, stream: VideoStream, name: str) -> list[av.Packet]:
    """All of the track, read once to be counted and to be decoded."""
    packets: list[av.Packet] = []
    pixels = size = 0
    frame_px = max(stream.codec_context.width * stream.codec_context.height, SMALLEST_PX)
    for packet in container.demux(stream):
        packets.append(packet)
        pixels += frame_px if packet.size else 0
        size += packet.size
        _check_pixels(pixels, name)
        if size > MAX_PACKED:
            raise UserError(f"{name}: more than {MAX_PACKED} bytes of video are not decoded. Make it smaller.")
    return packets


def _check_pixels(pixels: int, name: str) -> None:
    if pixels > MAX_PIXELS:
        raise UserError(f"{name}: more than {MAX_PIXELS} pixels in its frames are not decoded. Make it smaller.")


def _decord_frames(source: Source, name: str, required: bool) -> np.ndarray | None:
    """uint8 [F, H, W, 3], or None where decord is absent or unable and another decoder may try."""
    try:
        import decord
    except ImportError:
        if required:
            raise UserError("stream.decoder: decord is not installed; use `auto` or `pyav`") from None
        return None
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(readable(source), num_threads=1)
        return reader.get_batch(range(len(reader))).asnumpy()
    except (decord.DECORDError, RuntimeError):
        return None


def _pyav_frames(stream: VideoStream, packets: Sequence[av.Packet], name: str) -> np.ndarray:
    """uint8 [F, H, W, 3], decoded in one thread: a decoder's own threads would only compete with the callers'."""
    stream.codec_context.thread_count = 1
    converter = VideoReformatter()
    room = sum(1 for packet in packets if packet.size)
    frames, count = np.empty(0, np.uint8), 0
    for frame in (frame for packet in packets for frame in packet.decode()):
        rgb = upright_rgb(frame, converter)
        if count == 0:
            _check_pixels(room * rgb.shape[0] * rgb.shape[1], name)  # the file may have told of smaller ones
            frames = np.empty((room, *rgb.shape), np.uint8)
        if rgb.shape != frames.shape[1:]:
            raise UserError(f"{name}: the size changes inside")
        if count == room:
            raise UserError(f"{name}: damaged: more frames come out of it than are in it")
        frames[count] = rgb
        count += 1
    if not count:
        raise UserError(f"{name}: no frame can be decoded")
    return frames[:count]
