"""A prompt and a student folder -> an mp4, written chunk by chunk as the student draws it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from afd_data.prompts import prompt_id
from afd_data.video import Mp4Writer
from afd_train.students import Clip
from afd_train.students.folder import open_student


def generate(
    student: Path | str,
    prompt: str,
    target: Path,
    seed: int = 0,
    chunks: int | None = None,
    progress: Callable[[int], None] = lambda frames: None,
) -> int:
    """Write a video of `prompt` to `target` and return its number of frames.

    `chunks`: length in chunks of the student, default the length it was trained for; longer is allowed.
    `progress` hears the number of frames after every chunk.  Raises UserError for a folder that holds no student.
    """
    opened = open_student(student)
    clip = Clip(prompt_id(prompt), prompt, seed, take=0)
    frames = 0
    with Mp4Writer(target, opened.video) as writer:
        for chunk in opened.stream(clip, chunks):
            writer.add(chunk)
            frames += len(chunk)
            progress(frames)
    return frames
