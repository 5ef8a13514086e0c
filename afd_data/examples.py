"""A cache's samples by their place: which there are, and how one is read, checked and decoded.

Members are read at their offset in the tar, in the folder or at its origin, compared with their hash and decoded by our
own two readers only (`parse_sample`, `read_video`); nothing is unpickled.  What was fetched is kept on the local disk
as far as there is room, sample by sample.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afd_data.acceptance import shape_problem
from afd_data.config import StreamConfig, VideoConfig
from afd_data.disk_cache import open_disk_cache
from afd_data.errors import UserError
from afd_data.index import check_sample, index_path, index_rows, shard_rows
from afd_data.members import check_member, span, unreadable
from afd_data.origin import address, is_remote, read_range
from afd_data.origin_record import home
from afd_data.sample import MEMBERS, Sample, parse_sample
from afd_data.shards import BLOCK, Shard, read_manifest
from afd_data.video import Decoder, Probe, Video, probe, read_video


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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies: (offset, size) in bytes of its members in a tar, and their sha256."""

    key: str
    prompt_id: str
    shard: Shard
    mp4: tuple[int, int]
    json: tuple[int, int]
    mp4_sha256: str
    json_sha256: str

    def sha256(self, kind: str) -> str:
        """Of one member."""
        return self.mp4_sha256 if kind == "mp4" else self.json_sha256


PLACE_COLUMNS = (
    "key",
    "prompt_id",
    "shard",
    *(f"{kind}_{what}" for kind in MEMBERS for what in ("offset", "size", "sha256")),
)


@dataclass(frozen=True)
class Reading:
    """How samples are read; goes to worker processes as it is.  `disk_mb`: see `StreamConfig`.

    pinned: the address at which `origin.steady` found the tars when their places were read, so that nobody who updates
    the head takes them away; None: the head's of the moment.
    """

    folder: Path
    decoder: Decoder
    video: VideoConfig | None
    decode: bool = True
    disk_mb: int = StreamConfig().disk_mb
    pinned: str | None = None


def read_places(
    folder: Path, split: str, generation: int | None = None, names: Collection[str] | None = None
) -> dict[str, Place]:
    """Places of a split's samples by key: the newest of each among the rounds up to `generation`.

    The default is the newest complete round; `names`: of the shards called so alone.  From the index, else from the
    tars.  Raises UserError when there are none, or when the index names what the manifest does not.
    """
    shards = sorted(read_manifest(folder).of(split, generation), key=lambda shard: shard.generation)
    if names is not None:
        chosen = set(names)
        shards = [shard for shard in shards if shard.file in chosen]
    found: dict[str, list[Place]] = {shard.file: [] for shard in shards}
    by_file = {shard.file: shard for shard in shards}
    if index_path(folder, split).exists():
        for row in index_rows(folder, split, PLACE_COLUMNS):
            shard = by_file.get(row["shard"])
            if shard is not None and len(found[shard.file]) <= shard.samples:  # one too many is enough to know
                found[shard.file].append(_place(row, shard))
    places: dict[str, Place] = {}
    for shard in shards:
        mine = found.pop(shard.file)
        if len(mine) != shard.samples:  # no index, or one that is behind
            mine = [_place(row, shard) for row in _rows_of_tar(folder, shard)]
        for place in mine:
            places[place.key] = place
    if not places:
        raise UserError(f"{folder}: no {split} samples. Run `afd cache-teacher` first, or name another stream.folder.")
    return places


def _rows_of_tar(folder: Path, shard: Shard) -> list[dict]:
    try:
        return shard_rows(folder, shard)
    except OSError as error:
        raise unreadable(address(folder, shard.file), error) from None


def _place(row: dict, shard: Shard) -> Place:
    places = {kind: span(row, kind, shard.file, limit=shard.bytes) for kind in MEMBERS}
    return Place(
        row["key"], row["prompt_id"], shard, **places, mp4_sha256=row["mp4_sha256"], json_sha256=row["json_sha256"]
    )


def read_example(reading: Reading, place: Place) -> Example:
    """Read, check and, unless `reading.decode` is off, decode one sample.

    Raises UserError naming shard and key: missing, truncated, another hash, not a video, another shape than wanted.
    """
    path = address(reading.folder, place.shard.file)
    try:
        members = _members(reading, place, path)
    except OSError as error:
        raise unreadable(path, error) from None
    mp4 = members["mp4"]
    sample = parse_sample(members["json"], f"{path}: {place.key}.json")
    check_sample(sample, place.key, place.shard, path)
    where = f"{path}: {place.key}.mp4"
    video = _decoded(reading, mp4, where, sample)
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


def _members(reading: Reading, place: Place, path: str) -> dict[str, bytes]:
    """The bytes of both members, compared with their hashes; remote ones are kept on the disk."""
    if not is_remote(reading.folder, place.shard.file):
        return _sealed_members(reading, place, path)
    kept = open_disk_cache(home() / "samples", reading.disk_mb * 2**20)
    found = {kind: kept.get(place.sha256(kind)) for kind in MEMBERS}
    known = {kind: data for kind, data in found.items() if data is not None}
    if len(known) == len(MEMBERS):
        return known
    fetched = _sealed_members(reading, place, path)
    for kind, data in fetched.items():
        kept.put(place.sha256(kind), data)
    return fetched


def _sealed_members(reading: Reading, place: Place, path: str) -> dict[str, bytes]:
    def read(offset: int, size: int) -> bytes:
        return read_range(reading.folder, place.shard.file, offset, size, reading.pinned)

    spans = {"mp4": place.mp4, "json": place.json}
    start = min(offset for offset, _ in spans.values())
    end = max(offset + size for offset, size in spans.values())
    # Members adjoin, with a header and padding between them: one request.  A stranger's index may say otherwise.
    together = end - start <= sum(size for _, size in spans.values()) + 2 * BLOCK
    both = read(start, end - start) if together else b""
    members = {}
    for kind, (offset, size) in spans.items():
        data = both[offset - start : offset - start + size] if together else read(offset, size)
        check_member(data, size, place.sha256(kind), path, f"{place.key}.{kind}")
        members[kind] = data
    return members


def _decoded(reading: Reading, mp4: bytes, where: str, sample: Sample) -> Video:
    def check(facts: Probe) -> None:
        """Before decoding, so that a stranger's clip cannot fill the memory."""
        if reading.video is not None:
            _check_shape(facts, where, reading.video)

    if reading.decode:
        return read_video(mp4, reading.decoder, where, check)
    facts = probe(mp4, where)
    check(facts)
    return Video(np.empty((0, sample.height, sample.width, 3), np.uint8), facts)


def _check_shape(facts: Probe, where: str, video: VideoConfig) -> None:
    if shape_problem(facts, video):
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
