"""Sealed shards: immutable tars of samples, and the manifest that says which of them are the data.

`data/SPLIT/gGGGG-NNNNNN.tar` (generation, number) appears under its name complete and is never changed;
`manifest.json` is the truth about data: a tar that it does not name does not count.  Tars may come from strangers:
`scan_shard` accepts plain files with our names and bounded sizes only, and nothing is ever unpacked by name.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from afd_data.errors import UserError
from afd_data.files import atomic_write, file_sha256, fsync
from afd_data.sample import KEY, MEMBERS, SPLITS, check_types

MANIFEST_VERSION = 2
MANIFEST = "manifest.json"
SHARD_FILE = re.compile(rf"data/({'|'.join(SPLITS)})/g(\d{{4}})-(\d{{6}})\.tar")
MEMBER_NAME = re.compile(rf"({KEY.pattern})\.({'|'.join(MEMBERS)})")
MAX_BYTES = {"mp4": 4 * 2**30, "json": 64 * 2**20}
MAX_SAMPLES = 10**6
BLOCK = 512  # bytes; tar's unit
MAX_PADDING = 10240  # bytes; what tar adds behind its last member


@dataclass(frozen=True)
class Shard:
    """A sealed tar as the manifest names it; `file` is relative to the cache."""

    file: str
    split: str
    generation: int
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All shards, in the order in which they were sealed; `generation` is the newest complete round.

    Shards of a later round are sealed but no data yet, so that nobody ever reads half a round.  `pruned` names tars
    that were taken away, and whose names are not given again.
    """

    generation: int = 0
    shards: tuple[Shard, ...] = ()
    pruned: tuple[Shard, ...] = ()

    def of(self, split: str, generation: int | None = None) -> list[Shard]:
        """Shards of one split, of all rounds up to `generation` (the newest complete one)."""
        newest = self.generation if generation is None else generation
        return [shard for shard in self.shards if shard.split == split and shard.generation <= newest]

    def samples(self) -> dict[str, int]:
        """Samples per split; splits without samples are left out."""
        totals = {split: sum(shard.samples for shard in self.of(split)) for split in SPLITS}
        return {split: total for split, total in totals.items() if total}

    def with_shard(self, shard: Shard) -> Manifest:
        """The manifest after one more shard."""
        return replace(self, shards=(*self.shards, shard))

    def without(self, gone: Iterable[Shard]) -> Manifest:
        """The manifest after shards were pruned."""
        gone = set(gone)
        left = tuple(shard for shard in self.shards if shard not in gone)
        return replace(self, shards=left, pruned=(*self.pruned, *(shard for shard in self.shards if shard in gone)))

    def next_file(self, split: str, generation: int) -> str:
        """A name for a new shard that no shard has had."""
        names = [SHARD_FILE.fullmatch(shard.file) for shard in (*self.shards, *self.pruned)]
        numbers = [int(name[3]) for name in names if name and (name[1], int(name[2])) == (split, generation)]
        return f"data/{split}/g{generation:04d}-{max(numbers, default=-1) + 1:06d}.tar"


@dataclass(frozen=True)
class Entry:
    """Where a sample lies in its tar: (offset, size) in bytes of each member's content, and when it was made."""

    key: str
    created_at: float  # seconds since 1970
    members: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Content:
    """A sample to be sealed: the bytes of its members."""

    key: str
    created_at: float
    mp4: bytes
    json: bytes


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache; an empty one where nothing has been sealed yet.

    Raises UserError when the file is damaged, of another version, or names files outside the cache.
    """
    path = folder / MANIFEST
    if not path.exists():
        return Manifest()
    try:
        record = json.loads(path.read_bytes())
        version = record["version"]
        if version != MANIFEST_VERSION:
            raise UserError(
                f"{path}: manifest version {version!r}, this afd reads {MANIFEST_VERSION}. "
                f"`afd cache migrate {folder}` brings an older cache up to it."
            )
        lists = (tuple(Shard(**shard) for shard in record[name]) for name in ("shards", "pruned"))
        manifest = Manifest(record["generation"], *lists)
        for checked in (manifest, *manifest.shards, *manifest.pruned):
            check_types(checked)
    except UserError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of afd ({type(error).__name__}: {error})") from None
    named = (*manifest.shards, *manifest.pruned)
    for shard in named:
        match = SHARD_FILE.fullmatch(shard.file)
        if match is None or (match[1], int(match[2])) != (shard.split, shard.generation):
            raise UserError(f"{path}: {shard.file!r} is not the name of a shard of {shard.split!r}")
    if len({shard.file for shard in named}) < len(named):
        raise UserError(f"{path}: names a shard twice")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest durably."""
    record = {
        "version": MANIFEST_VERSION,
        "generation": manifest.generation,
        "splits": manifest.samples(),
        "shards": [asdict(shard) for shard in manifest.shards],
        "pruned": [asdict(shard) for shard in manifest.pruned],
    }
    with atomic_write(folder / MANIFEST) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")


def write_shard(folder: Path, file: str, contents: Iterable[Content]) -> Shard:
    """Seal samples as the tar `file` of the cache `folder`; durable under its name when this returns.

    A sample's time stands in the headers only, so that member bytes depend on the request alone.
    """
    from webdataset.writer import TarWriter

    match = SHARD_FILE.fullmatch(file)
    assert match, file
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    fsync(path.parent.parent)
    count = 0
    with atomic_write(path) as out, TarWriter(cast(BinaryIO, out), user="afd", group="afd", encoder=False) as writer:
        for content in contents:
            writer.mtime = int(content.created_at)
            writer.write({"__key__": content.key, "mp4": content.mp4, "json": content.json})
            count += 1
    return Shard(file, match[1], int(match[2]), count, path.stat().st_size, file_sha256(path))


def describe_shard(folder: Path, file: str) -> Shard:
    """The manifest's line for a complete tar that lies in the cache.  Raises UserError when it is not a shard."""
    match = SHARD_FILE.fullmatch(file)
    if match is None:
        raise UserError(f"{folder / file}: not a name that afd gives to shards")
    path = folder / file
    return Shard(file, match[1], int(match[2]), len(scan_shard(path)), path.stat().st_size, file_sha256(path))


def scan_shard(path: Path) -> list[Entry]:
    """Where every sample of a tar lies.  Reads headers only, and trusts none of them.

    Raises UserError naming the tar and the first member that is not a plain file named KEY.mp4 or KEY.json, is too
    large, occurs twice, stands without its other half, or reaches beyond the end of the file.
    """
    entries: list[Entry] = []
    seen: set[str] = set()
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        offset = 0
        while (header := _header(file, offset, path)) is not None:
            key, kind = _checked_name(header, path)
            start = offset + BLOCK
            offset = start + -(-header.size // BLOCK) * BLOCK
            if offset > end:
                raise UserError(f"{path}: truncated in {header.name!r}. Copy it again, or cache into a new folder.")
            if not entries or entries[-1].key != key:
                _check_complete(entries, path)
                if key in seen or len(seen) >= MAX_SAMPLES:
                    raise UserError(f"{path}: {key!r} occurs twice, or more than {MAX_SAMPLES} samples")
                seen.add(key)
                entries.append(Entry(key, float(header.mtime), {}))
            if kind in entries[-1].members:
                raise UserError(f"{path}: two members {header.name!r}")
            entries[-1].members[kind] = (start, header.size)
        if end - offset > MAX_PADDING + BLOCK:
            raise UserError(f"{path}: {end - offset} bytes behind the end of the archive")
    _check_complete(entries, path)
    return entries


def read_member(file: BinaryIO, entry: Entry, kind: str) -> bytes:
    """The content of a member of an opened tar.  Raises UserError when the file has become shorter."""
    offset, size = entry.members[kind]
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise UserError(f"{getattr(file, 'name', 'shard')}: truncated in {entry.key}.{kind}")
    return data


def _header(file: BinaryIO, offset: int, path: Path) -> tarfile.TarInfo | None:
    """The plain header at `offset`; None at the end-of-archive mark.  Long-name and sparse extensions are not read."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) == BLOCK and not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: no tar header at byte {offset} ({error}); truncated or damaged") from None


def _checked_name(header: tarfile.TarInfo, path: Path) -> tuple[str, str]:
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise UserError(f"{path}: {header.name[:200]!r} is not a plain file (type {header.type!r}); refused")
    match = MEMBER_NAME.fullmatch(header.name)
    if match is None:
        raise UserError(
            f"{path}: member {header.name[:200]!r} is not KEY.mp4 or KEY.json with a key of a-z, 0-9, _ and -; refused"
        )
    if not 0 <= header.size <= MAX_BYTES[match[2]]:
        raise UserError(f"{path}: {header.name} claims {header.size} bytes, at most {MAX_BYTES[match[2]]} are read")
    return match[1], match[2]


def _check_complete(entries: list[Entry], path: Path) -> None:
    if entries and entries[-1].members.keys() != set(MEMBERS):
        raise UserError(f"{path}: {entries[-1].key!r} has no {' and '.join(MEMBERS)} side by side")
