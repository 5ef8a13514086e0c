"""What a teacher delivered -> the file that is taken, and what was done to it.

A video that is exactly as asked for (size, frames, rate; H.264 in mp4) keeps its bytes.  Anything else is brought to
that shape by `clip` and encoded anew, with its sound beside it, cut to the same span of time.  Whether the sound stays
is decided at acceptance.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from afd_data.acceptance import RejectedError, is_h264_mp4, shape_problem
from afd_data.errors import UserError
from afd_data.files import whole_file
from afd_data.sound import add_sound
from afd_data.teacher_config import Adaptation
from afd_data.teachers import Request, UnreachableError
from afd_data.teachers.clip import bring_to, is_as_asked
from afd_data.video import probe, write_mp4


def deliver(source: Path, target: Path, request: Request, rules: Adaptation, name: str) -> dict:
    """Write `source` to `target` (the same path is fine) as `request.video` asks; return `Delivery.effective`.

    `name` stands for the source in messages: the provider's name of it, or its place in a data set.
    Raises RejectedError: undecodable, too short; UnreachableError: this machine has failed (open files, memory, disk).
    The source stays.
    """
    video = request.video
    start_s, made_up, fps = 0.0, 0, video.fps
    try:
        facts = probe(source, name)
        kept = not shape_problem(facts, video) and is_as_asked(video, source, name) and is_h264_mp4(source, facts)
        with whole_file(target) as part:
            if kept:
                fps = facts.fps
                shutil.copyfile(source, part)
            else:
                clip = bring_to(video, source, name, rules)
                start_s, made_up = clip.start_s, clip.made_up
                write_mp4(part, clip.frames, video)
                add_sound(part, source, start_s, video.frames / video.fps)
    except UserError as error:
        raise RejectedError(f"undecodable: {error}") from None
    except (OSError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UnreachableError(f"{name} cannot be worked on here now: {reason or type(error).__name__}") from error
    return {
        "width": video.width,
        "height": video.height,
        "frames": video.frames,
        "fps": round(fps, 6),
        "start_s": round(start_s, 6),
        "frames_made_up": made_up,
        "fit": rules.fit,
        "encoded_again": not kept,
        "source": {
            "width": facts.width,
            "height": facts.height,
            "frames": facts.frames,
            "fps": round(facts.fps, 6),
            "codec": facts.codec,
        },
    }
