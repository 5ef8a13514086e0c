"""One share of a plan: several processes, each with a cache of its own below the common one, never ask twice.

`CACHE/parts/IIII-of-NNNN` is a whole cache with journal, spool and shards.  A prompt's hash decides whose it is, so
shares are disjoint on every machine.  What shows the same as another prompt's video is decided when the parts are
merged: a part cannot see the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd_data.config import DataConfig
from afd_data.errors import UserError
from afd_data.files import is_held
from afd_data.journal import JOURNAL, LOCK, open_journal
from afd_data.provider_config import ProviderConfig
from afd_data.teachers import Identity

PARTS = "parts"
MERGE = "merge.json"  # lies in a cache while others are merged into it
NAME = re.compile(r"(\d{4})-of-(\d{4})")


@dataclass(frozen=True)
class Partition:
    """Share `index` (from 0) of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Read `i/n`.  Raises UserError."""
        match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise UserError(f"--partition {text}: expected INDEX/COUNT with 0 <= INDEX < COUNT, for example 0/8")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, folder: Path) -> Partition | None:
        """The share that is cached in `folder`; None for any other folder."""
        match = NAME.fullmatch(folder.name)
        return cls(int(match[1]), int(match[2])) if match and folder.resolve().parent.name == PARTS else None

    def folder(self, cache: Path) -> Path:
        """Where this share is cached."""
        return cache / PARTS / f"{self.index:04d}-of-{self.count:04d}"

    def has(self, prompt_id: str) -> bool:
        """Whether a prompt belongs to this share."""
        return int(prompt_id[1:], 16) % self.count == self.index

    def share_of(self, recipe: DataConfig, cache: Path | None = None) -> DataConfig:
        """The recipe of this share: its part of money and rate, no decision about twins, nothing elsewhere.

        cache: the common one; what it has spent is not there to be shared.
        """
        limit, teacher = recipe.cache.max_cost, recipe.teacher
        changes: dict[str, Any] = {"near_duplicate": -1, "storage": None}
        if limit is not None:
            changes["max_cost"] = max(0.0, limit - _spent(recipe, cache)) / self.count
        if isinstance(teacher, ProviderConfig) and teacher.traffic.requests_per_minute is not None:
            rate = {"requests_per_minute": teacher.traffic.requests_per_minute / self.count}
            teacher = teacher.model_copy(update={"traffic": teacher.traffic.model_copy(update=rate)})
        return recipe.model_copy(update={"cache": recipe.cache.model_copy(update=changes), "teacher": teacher})


def _spent(recipe: DataConfig, cache: Path | None) -> float:
    """Charged or reserved in the common cache, in the teacher's currency."""
    if cache is None or not (cache / JOURNAL).exists():
        return 0.0
    currency = recipe.teacher.currency if isinstance(recipe.teacher, ProviderConfig) else Identity.currency
    journal = open_journal(cache)
    try:
        return sum(journal.spend().get(currency, (0.0, 0.0)))
    finally:
        journal.close()


def parts_of(cache: Path) -> list[Path]:
    """Folders of the parts that have not been merged yet."""
    return sorted(path for path in (cache / PARTS).glob("*-of-*") if NAME.fullmatch(path.name) and path.is_dir())


def check_parts(cache: Path, partition: Partition | None) -> None:
    """Raises UserError when a merge was broken off there, or somebody else asks, or has asked, for the same.

    The caller holds its own lock, and its folder is there: of two that start at once, at least one sees the other.
    """
    if partition is not None and is_held(cache / LOCK):
        raise UserError(f"{cache}: another afd process asks for all of it. Wait until it has ended.")
    if (cache / MERGE).exists():
        raise UserError(f"{cache}: a merge into it was broken off, or goes on. Run that `afd cache merge` again first.")
    for path in parts_of(cache):
        part = Partition.of(path)
        assert part is not None, path
        if partition is None:
            raise UserError(
                f"{path.parent}: parts that are not merged; their videos would be asked for again. "
                f"Finish them with --partition i/{part.count}, then `afd cache merge {path.parent}/* -o {cache}`."
            )
        if part.count != partition.count:
            raise UserError(
                f"{path}: the plan was partitioned by {part.count}, not {partition.count}; another number would "
                "ask for videos again. Use the same, or merge first."
            )
