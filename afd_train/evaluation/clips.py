"""The videos of an evaluation: the teacher's from the cache's tars, the students' generated once and kept as mp4.

The teacher's first takes are copied beside them.  A generated video counts when it lies under its final name; another
checkpoint, seed, format or sampler empties its folder first.  All videos are decoded from files, so that teacher and
students have gone through the same codec.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.examples import Place, Reading, read_example, read_places
from afd_data.files import whole_file
from afd_data.sample import sample_key
from afd_data.shards import read_manifest
from afd_data.video import Decoder, read_video, write_mp4
from afd_train.conditioning import CachedText
from afd_train.student_config import StudentConfig
from afd_train.students import SAMPLER, best_device
from afd_train.students.folder import open_student

SOURCE = "source.json"


@dataclass(frozen=True)
class Clip:
    """A video to be measured.  `load` decodes it: uint8 [F, H, W, 3].  `step`: -1 for the teacher.

    `sha256` is that of the teacher's file, which stays as it was sealed; "" for videos made here.
    """

    policy: str
    prompt_id: str
    prompt: str
    take: int
    step: int
    load: Callable[[], np.ndarray]
    sha256: str = ""


def teacher_clips(folder: Path, split: str, prompts: int | None, decoder: Decoder) -> list[Clip]:
    """All takes of the first `prompts` prompts (by id) of a cached split, the newest generation of each.

    Raises UserError when the split holds nothing, or a sample of it is damaged or gone.
    """
    if not read_manifest(folder).of(split):
        raise UserError(
            f"{folder}: no videos of the {split} split. Set prompts.{split} or prompts.test_source, "
            "and run `afd cache-teacher` again."
        )
    places = read_places(folder, split)
    chosen = set(sorted({place.prompt_id for place in places.values()})[:prompts])
    reading = Reading(folder, decoder, video=None, decode=False)
    examples = [read_example(reading, places[key]) for key in sorted(places) if places[key].prompt_id in chosen]
    return [
        Clip(
            "teacher",
            example.prompt_id,
            example.prompt,
            example.take,
            -1,
            _in_tar(reading, places[example.key]),
            example.mp4_sha256,
        )
        for example in examples
    ]


def set_sha256(clips: Sequence[Clip]) -> str:
    """One hash of the teacher's videos that were measured: prompts, takes and contents."""
    lines = sorted(f"{clip.prompt_id} {clip.take} {clip.sha256}" for clip in clips)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def keep_first_takes(clips: Sequence[Clip], target: Path, video: VideoConfig) -> None:
    """Write the teacher's first take of every prompt to `target`/KEY.mp4, to be shown where there is no cache."""
    _keep_only(target, {"teacher": set_sha256(clips), "video": video.model_dump()})
    first = {clip.prompt_id: clip for clip in sorted(clips, key=lambda clip: -clip.take)}
    for clip in first.values():
        path = _path(target, clip.prompt_id, 0)
        if not path.is_file():
            _write(path, clip.load(), video)


def prompts_of(clips: Sequence[Clip]) -> list[tuple[str, str]]:
    """(id, text) of every prompt, by id."""
    return sorted({clip.prompt_id: clip.prompt for clip in clips}.items())


def folder_sha256(folder: Path) -> str:
    """One hash of all files of a student folder: names and contents.  Raises UserError when there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no student here; run `afd train` first, or leave it out of eval.policies.")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def generate(
    student: Path,
    prompts: Sequence[tuple[str, str]],
    seed: int,
    takes: int,
    video: VideoConfig,
    sampler: StudentConfig,
    target: Path,
    conditioning: Path,
    batch: int = 64,
) -> Iterator[int]:
    """Write the videos of one student to `target`/KEY.mp4; yields how many prompts are done, as they are.

    Of `sampler` only the keys in SAMPLER are read; `conditioning` is the folder that keeps embeddings; `batch` videos
    are drawn at once.  Videos of the same student, seed, format and sampler that lie there already are kept.
    """
    source = {
        "student": folder_sha256(student),
        "seed": seed,
        "video": video.model_dump(),
        "sampler": sampler.model_dump(mode="json", include=set(SAMPLER)),
    }
    _keep_only(target, source)
    missing = [
        prompt for prompt in prompts if not all(_path(target, prompt[0], take).is_file() for take in range(takes))
    ]
    done = len(prompts) - len(missing)
    yield done
    if not missing:
        return
    opened = open_student(student)
    made, wanted = ((v.width, v.height, v.frames, v.fps) for v in (opened.video, video))
    if made != wanted:
        raise UserError(f"{student}: makes videos of (width, height, frames, fps) {made}, the recipe's are {wanted}")
    opened.net.to(best_device())
    opened.sample_as(sampler)
    opened.text = text = CachedText(opened.text, conditioning)
    text.fill([prompt for _, prompt in missing])
    together = max(1, batch // takes)  # and written together: what is lost when the process dies
    for start in range(0, len(missing), together):
        group = missing[start : start + together]
        videos = opened.videos(group, seed, takes, batch)
        for (prompt_id, _), of_prompt in zip(group, videos, strict=True):
            for take, frames in enumerate(of_prompt):
                _write(_path(target, prompt_id, take), frames, video)
        done += len(group)
        yield done


def generated_clips(
    policy: str, step: int, prompts: Sequence[tuple[str, str]], takes: int, target: Path, decoder: Decoder
) -> list[Clip]:
    """The videos that `generate` left in `target`."""
    return [
        Clip(policy, prompt_id, prompt, take, step, _in_file(_path(target, prompt_id, take), decoder))
        for prompt_id, prompt in prompts
        for take in range(takes)
    ]


def _path(target: Path, prompt_id: str, take: int) -> Path:
    return target / f"{sample_key(prompt_id, take)}.mp4"


def _keep_only(target: Path, source: dict) -> None:
    """Empty `target` unless it holds videos of exactly this source."""
    about = target / SOURCE
    text = json.dumps(source, sort_keys=True)
    if about.is_file() and about.read_text(encoding="utf-8") == text:
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    about.write_text(text, encoding="utf-8")


def _write(path: Path, frames: np.ndarray, video: VideoConfig) -> None:
    with whole_file(path) as part:
        write_mp4(part, frames, video)


def _in_file(path: Path, decoder: Decoder) -> Callable[[], np.ndarray]:
    return lambda: read_video(path, decoder).frames


def _in_tar(reading: Reading, place: Place) -> Callable[[], np.ndarray]:
    return lambda: read_example(replace(reading, decode=True), place).video
