"""Video files that may be anybody's: opened without trusting them, and errors told apart from this machine's own."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import av
import av.error
from av.container import InputContainer

Source = Path | bytes
# What holds its video itself; scripts that name other files to play (ffconcat, HLS, DASH, SDP) are left out.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,gif,apng,h264,hevc,ivf,mxf,nut,obu,y4m,dv"
LOCAL = (errno.EMFILE, errno.ENFILE, errno.ESTALE)  # not ENOMEM: FFmpeg says so of lengths in damaged headers


def open_video(source: Source) -> InputContainer:
    """A container for reading.  Raises FFmpegError, also for a format that could play other files."""
    return av.open(readable(source), "r", container_options={"format_whitelist": FORMATS})


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
