"""Plans of the playground for tests of shares: two of the prompts show the same, and lie in different shares of 3."""

from __future__ import annotations

import hashlib
from pathlib import Path

from afd_data.cache import Summary, cache_teacher
from afd_data.config import CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig, VideoConfig
from afd_data.index import index_rows
from afd_data.journal import open_journal
from afd_data.partition import Partition
from afd_data.prompts import Prompt
from afd_data.shards import read_manifest
from afd_data.teachers import open_teacher

# With these ids, and hence seeds, the ball starts at the same place to within a tenth of a pixel.
TWINS = (
    Prompt("p0012", "a small dead blue ball is dropped in strong gravity", "train"),
    Prompt("p0050", "in strong gravity a small dead blue ball is dropped", "train"),
)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")


def prompts(count: int, first: int = 0) -> list[Prompt]:
    """Every fourth tests; the twins are among them.  In the order of `load_prompts`."""
    others = [
        Prompt(f"p{n + 0x100:04x}", f"a {COLOURS[n % 8]} ball falls, {n}", "train" if n % 4 else "test")
        for n in range(first, first + count - 2)
    ]
    splits = ("test", "validation", "train")
    return sorted(
        [*TWINS, *others],
        key=lambda p: (splits.index(p.split), hashlib.sha256(f"rank/{p.text}".encode()).digest()),
    )


def recipe(seed: int = 0, **cache: object) -> DataConfig:
    """Of the playground, with small shards."""
    return DataConfig(
        out="unused",
        seed=seed,
        video=VideoConfig(lossless=True),
        prompts=PromptsConfig(source="unused.txt"),
        teacher=PlaygroundConfig(),
        cache=CacheConfig.model_validate({"shard_samples": 3, **cache}),
    )


def play(
    folder: Path, wanted: list[Prompt], partition: Partition | None = None, config: DataConfig | None = None
) -> Summary:
    """Cache the playground's videos."""
    config = config or recipe()
    teacher = open_teacher(config.teacher)
    return cache_teacher(config, wanted, folder, teacher, progress=False, partition=partition)


def play_parts(folder: Path, wanted: list[Prompt], count: int = 3, config: DataConfig | None = None) -> list[Path]:
    """All shares of a plan; returns their folders."""
    shares = [Partition(index, count) for index in range(count)]
    for share in shares:
        play(folder, wanted, share, config)
    return [share.folder(folder) for share in shares]


def members(folder: Path) -> list[tuple[int, str, str, str]]:
    """(generation, key, sha256 of the mp4, sha256 of the json) of what is sealed, sorted: doubles would show."""
    names = ["generation", "key", "mp4_sha256", "json_sha256"]
    return sorted(
        tuple(row.values()) for split in read_manifest(folder).samples() for row in index_rows(folder, split, names)
    )


def states(folder: Path) -> dict[str, str]:
    """Key -> state, in the order of the plan."""
    journal = open_journal(folder)
    try:
        return {row.key: row.state for row in journal.rows()}
    finally:
        journal.close()
