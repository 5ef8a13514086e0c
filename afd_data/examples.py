"""A cache's samples by their place: which there are, and how one is read, checked and decoded.

Members are read at their offset in the tar, compared with their hash and decoded by our own two readers only
(`parse_sample`, `read_video`); nothing is unpickled.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.index import check_sample, index_path, read_index, shard_rows
from afd_data.sample import Sample, parse_sample
from afd_data.shards import MAX_BYTES, Shard, read_manifest
from afd_data.video import Decoder, Video, probe, read_video


@dataclass(frozen=True)
class Example:
    """A sample; `video` is uint8 [F, H, W, 3] in RGB and read-only, `fps` its frames per second.

    F is 0 where the stream was asked not to decode.
    """

    key: str
    prompt_id: str
    prompt: str
    split: str
    take: int
    generation: int
    video: np.ndarray
    fps: float
    mp4_sha256: str
    sample: Sample


@dataclass(frozen=True)
class Place:
    """Where a sample lies: (offset, size) in bytes of its members in a tar, and their sha256."""

    key: str
    prompt_id: str
    shard: Shard
    mp4: tuple[int, int]
    json: tuple[int, int]
    mp4_sha256: str
    json_sha256: str


@dataclass(frozen=True)
class Reading:
    """How samples are read; goes to worker processes as it is."""

    folder: Path
    decoder: Decoder
    video: VideoConfig | None
    decode: bool = True


def read_places(folder: Path, split: str) -> dict[str, Place]:
    """Places of a split's samples by key, the newest generation of each; from the index, else from the tars.

    Raises UserError when there are none, or when the index names what the manifest does not.
    """
    manifest = read_manifest(folder)
    rows = read_index(folder, split).to_pylist() if index_path(folder, split).exists() else []
    by_shard: dict[str, list[dict]] = {}
    for row in rows:
        by_shard.setdefault(row["shard"], []).append(row)
    places: dict[str, Place] = {}
    for shard in sorted(manifest.of(split), key=lambda shard: shard.generation):
        mine = by_shard.get(shard.file, [])
        if len(mine) != shard.samples:  # no index, or one that is behind
            mine = _rows_of_tar(folder, shard)
        for row in mine:
            places[row["key"]] = _place(row, shard)
    if not places:
        raise UserError(f"{folder}: no {split} samples. Run `afd cache-teacher` first, or name another stream.folder.")
    return places


def _rows_of_tar(folder: Path, shard: Shard) -> list[dict]:
    try:
        return shard_rows(folder, shard)
    except OSError as error:
        raise _unreadable(folder / shard.file, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}). Restore it, or cache into a new folder.")


def _place(row: dict, shard: Shard) -> Place:
    places = {kind: (row[f"{kind}_offset"], row[f"{kind}_size"]) for kind in MAX_BYTES}
    for kind, (offset, size) in places.items():
        if offset < 0 or not 0 <= size <= min(MAX_BYTES[kind], shard.bytes):
            raise UserError(
                f"{shard.file}: the index puts {row['key']}.{kind} at {offset} with {size} bytes; remove it"
            )
    return Place(
        row["key"], row["prompt_id"], shard, **places, mp4_sha256=row["mp4_sha256"], json_sha256=row["json_sha256"]
    )


def read_example(reading: Reading, place: Place) -> Example:
    """Read, check and, unless `reading.decode` is off, decode one sample.

    Raises UserError naming shard and key: missing, truncated, another hash, not a video, another shape than wanted.
    """
    path = reading.folder / place.shard.file
    try:
        with open(path, "rb") as file:
            mp4, json = (_member(file, path, place, kind) for kind in ("mp4", "json"))
    except OSError as error:
        raise _unreadable(path, error) from None
    sample = parse_sample(json, f"{path}: {place.key}.json")
    check_sample(sample, place.key, place.shard, path)
    where = f"{path}: {place.key}.mp4"
    if reading.video is not None:
        _check_shape(mp4, where, reading.video)
    if reading.decode:
        video = read_video(mp4, reading.decoder, where)
    else:
        video = Video(np.empty((0, sample.height, sample.width, 3), np.uint8), probe(mp4, where).fps)
    return Example(
        key=sample.key,
        prompt_id=sample.prompt_id,
        prompt=sample.prompt,
        split=sample.split,
        take=sample.take,
        generation=sample.generation,
        video=video.frames,
        fps=video.fps,
        mp4_sha256=place.mp4_sha256,
        sample=sample,
    )


def _member(file: BinaryIO, path: Path, place: Place, kind: Literal["mp4", "json"]) -> bytes:
    offset, size = place.mp4 if kind == "mp4" else place.json
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise UserError(f"{path}: truncated in {place.key}.{kind}. Copy it again, or cache into a new folder.")
    if hashlib.sha256(data).hexdigest() != (place.mp4_sha256 if kind == "mp4" else place.json_sha256):
        raise UserError(f"{path}: {place.key}.{kind} is not what was sealed (its hash differs). Copy the shard again.")
    return data


def _check_shape(mp4: bytes, where: str, video: VideoConfig) -> None:
    """Before decoding, so that a stranger's clip cannot fill the memory."""
    facts = probe(mp4, where)
    found = facts.frames, facts.height, facts.width
    if found != (video.frames, video.height, video.width) or abs(facts.fps - video.fps) > 0.01:
        raise UserError(
            f"{where}: {facts.frames} frames of {facts.width}x{facts.height} at {facts.fps:g} fps, the recipe wants "
            f"{video.frames} of {video.width}x{video.height} at {video.fps:g}. "
            "Set video.* to what the cache holds, or run `afd cache-teacher` into a new folder."
        )


class Memory:
    """Decoded examples up to a number of bytes; the longest unused go first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.bytes = limit_bytes, 0
        self._examples: OrderedDict[str, Example] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._examples

    def get(self, key: str) -> Example | None:
        if key in self._examples:
            self._examples.move_to_end(key)
        return self._examples.get(key)

    def put(self, example: Example) -> Example:
        example.video.flags.writeable = False  # it may be handed out again
        # What has no frames is cheap to read again, and would never reach the limit.
        if example.key not in self._examples and 0 < example.video.nbytes <= self.limit_bytes:
            self._examples[example.key] = example
            self.bytes += example.video.nbytes
        while self.bytes > self.limit_bytes:
            self.bytes -= self._examples.popitem(last=False)[1].video.nbytes
        return example
