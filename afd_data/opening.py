"""Video files that may be anybody's: opened without trusting them, and errors told apart from this machine's own."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import av.error
from av.container import InputContainer
from av.video.stream import VideoStream

from afd_data.errors import UserError

Source = Path | bytes
# What holds its video itself; scripts that name other files to play (ffconcat, HLS, DASH, SDP) are left out.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,gif,apng,h264,hevc,ivf,mxf,nut,obu,y4m,dv"
LOCAL = (errno.EMFILE, errno.ENFILE, errno.ESTALE)  # not ENOMEM: FFmpeg says so of lengths in damaged headers


def open_video(source: Source) -> InputContainer:
    """A container for reading.  Raises FFmpegError, also for a format that could play other files."""
    return av.open(readable(source), "r", container_options={"format_whitelist": FORMATS})


@contextmanager
def opened(source: Source, name: str) -> Iterator[InputContainer]:
    """`open_video`; what FFmpeg does not like, then or inside the `with` block, is a UserError that says `name`."""
    try:
        with open_video(source) as container:
            yield container
    except UserError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise_if_local(source, error)
        raise UserError(f"{name}: {_diagnosis(source, error)}") from None


def main_track(container: InputContainer, name: str) -> VideoStream:
    """The video track that a player would show.  Raises UserError where there is none to decode."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise UserError(f"{name}: no video track in it")
    if stream.codec_context is None:
        raise UserError(f"{name}: truncated or damaged, or of a codec that PyAV cannot decode. Copy or convert it.")
    return stream


def whole_packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """One a coded frame; the last one of a truncated file, which is cut through, does not count."""
    return filter(is_whole, container.demux(stream))


def is_whole(packet: av.Packet) -> bool:
    """Whether it holds a frame that is not cut through."""
    return packet.size > 0 and not packet.is_corrupt


def name_of(source: Source) -> str:
    """What stands for it in messages."""
    return "video" if isinstance(source, bytes) else str(source)


def readable(source: Source) -> str | io.BytesIO:
    """As decoders take it."""
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)


def raise_if_local(source: Source, error: Exception) -> None:
    """Raises `error` again where this machine has failed (open files, disk) and the video may be sound."""
    number = error.errno if isinstance(error, OSError | av.error.FFmpegError) else None
    if number in LOCAL:
        raise error
    if number == errno.EIO and isinstance(source, Path):  # FFmpeg says so of a damaged file too
        with source.open("rb") as file:
            while file.read(2**20):
                pass


def _diagnosis(source: Source, error: Exception) -> str:
    """Why it cannot be opened, in words a user can act on."""
    if isinstance(source, Path):
        if not source.is_file():
            return "no such file"
        with source.open("rb") as file:
            head = file.read(512)
    else:
        head = source[:512]
    if not head:
        return "the file is empty"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "an HTML page, not a video; the download answered with an error page"
    if head[4:8] == b"ftyp":
        return "truncated or damaged mp4 (its index cannot be read). Copy it again."
    return f"not a video ({type(error).__name__})"
