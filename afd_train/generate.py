"""A prompt and a student folder -> an mp4, written chunk by chunk as the student draws it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.files import whole_file
from afd_data.prompts import prompt_id
from afd_data.video import Mp4Writer
from afd_train.students import Clip, best_device
from afd_train.students.folder import open_student


def generate(
    student: Path | str,
    prompt: str,
    target: Path,
    seed: int = 0,
    chunks: int | None = None,
    image: Path | None = None,
    progress: Callable[[int], None] = lambda frames: None,
) -> int:
    """Write a video of `prompt` to `target` and return its number of frames.

    `chunks`: length in chunks of the student, default the length it was trained for; longer is allowed.
    `image`: a picture that becomes the first frame, its middle where it has another shape (frame-wise students only).
    `progress` hears the number of frames after every chunk.  Raises UserError for a folder that holds no student.
    The file is complete or not there.
    """
    if target.is_dir():
        raise UserError(f"{target}: a folder; name the video's file")
    target.parent.mkdir(parents=True, exist_ok=True)
    opened = open_student(student)
    first = None if image is None else _picture(image, opened.video)
    opened.net.to(best_device())
    clip = Clip(prompt_id(prompt), prompt, seed, take=0)
    frames = 0
    with whole_file(target) as part, Mp4Writer(part, opened.video) as writer:
        for chunk in opened.stream(clip, chunks, first):
            writer.add(chunk)
            frames += len(chunk)
            progress(frames)
    return frames


def _picture(path: Path, video: VideoConfig) -> torch.Tensor:
    """uint8 [H, W, 3]."""
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            picture = ImageOps.fit(upright.convert("RGB"), (video.width, video.height))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {path}: not a picture ({error})") from None
    return torch.from_numpy(np.array(picture))
