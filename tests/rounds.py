"""Refresh rounds made by hand: new videos of old prompts, and videos of new prompts, as generations of a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from afd_data.config import VideoConfig
from afd_data.examples import Place, Reading, read_example, read_places
from afd_data.index import update_index
from afd_data.sample import sample_key
from afd_data.shards import Content, read_manifest, write_manifest, write_shard
from afd_data.video import write_mp4


def half_round(
    folder: Path, split: str, keys: Sequence[str], new_prompts: Sequence[str] = (), late: bool = False
) -> int:
    """Seal a shard of the next round and name it in the manifest; the round is not complete.  Returns its number.

    keys: whose videos are replaced, each by its negative; the new prompts' are copies of the first one's.
    late: they belong to the newest complete round.
    """
    manifest = read_manifest(folder)
    round_number = manifest.generation + (not late)
    places = read_places(folder, split)
    old = [_sample(folder, places[key], round_number) for key in keys]
    first = sorted(places)[0]
    new = [_sample(folder, places[first], round_number, prompt) for prompt in new_prompts]
    shard = write_shard(folder, manifest.next_file(split, round_number), [*old, *new])
    write_manifest(folder, manifest.with_shard(shard))
    return round_number


def complete_round(folder: Path) -> None:
    """What the newest round has sealed is data from now on."""
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, generation=manifest.generation + 1))
    update_index(folder)


def _sample(folder: Path, place: Place, generation: int, prompt: str | None = None) -> Content:
    example = read_example(Reading(folder, "auto", None), place)
    sample = example.sample
    frames, height, width, _ = example.video.shape
    video = VideoConfig(width=width, height=height, frames=frames, fps=example.fps, lossless=True)
    write_mp4(folder / "negative.part", 255 - example.video, video)
    mp4 = (folder / "negative.part").read_bytes()
    (folder / "negative.part").unlink()
    if prompt is not None:
        prompt_id = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        sample = replace(sample, prompt=prompt, prompt_id=prompt_id, key=sample_key(prompt_id, 0), take=0)
    sample = replace(sample, generation=generation, video_sha256=hashlib.sha256(mp4).hexdigest())
    return Content(sample.key, 2.0, mp4, sample.to_json())
