"""A cache -> what a card tells of it: whose videos, on which terms, how many, of which prompts, at what cost.

Read from the index, and from one record of every shard and teacher in it: terms stand in the records alone.  Data are
the shards of complete rounds; works on heads, whose tars lie elsewhere.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median_low

from afd_data.index import index_path, index_rows, shard_rows
from afd_data.members import read_member_at
from afd_data.origin import address, is_remote
from afd_data.sample import Sample, parse_sample
from afd_data.shards import Manifest

COLUMNS = ("key", "prompt_id", "prompt", "split", "generation", "teacher", "teacher_version", "frames", "fps", "width",
           "height", "duration_s", "cost", "currency", "licence", "created_at", "shard", "json_offset", "json_size",
           "json_sha256", "mp4_offset", "mp4_size", "mp4_sha256")  # fmt: skip
EXAMPLES, SHOWN = 5, 12  # prompts in the card, clips in its picture


@dataclass(frozen=True)
class Terms:
    """A teacher with one setting, and what one may do with its videos; texts as the records have them."""

    teacher: str
    version: str
    settings: str  # JSON
    licence: str
    distillation: str
    url: str  # "" where the record names none


@dataclass
class Round:
    """One generation: videos, and when the first and the last were made (seconds since 1970)."""

    videos: int = 0
    first: float = float("inf")
    last: float = float("-inf")


@dataclass
class Facts:
    """Counts of all data of a cache.  Names are kept as their `hash`, so that a large cache needs little memory."""

    videos: Counter[str] = field(default_factory=Counter)  # by split
    prompts: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # split -> prompt ids
    words: Counter[int] = field(default_factory=Counter)  # number of words -> prompts
    examples: list[str] = field(default_factory=list)
    rounds: dict[int, Round] = field(default_factory=lambda: defaultdict(Round))
    newest: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))  # split -> key -> generation
    costs: dict[str, tuple[int, float]] = field(default_factory=dict)  # currency -> videos, total
    shapes: Counter[tuple[int, int, int, float]] = field(default_factory=Counter)  # width, height, frames, fps
    seconds: float = 0.0
    terms: Counter[Terms] = field(default_factory=Counter)
    shown: list[dict] = field(default_factory=list)  # rows spread evenly over all

    def median_words(self) -> int:
        """Words of a prompt in the middle."""
        return median_low(list(self.words.elements()))

    def current(self, split: str) -> list[int]:
        """Generations of which at least one video is the newest of its key."""
        return sorted(set(self.newest[split].values()))

    def superseded(self, split: str, manifest: Manifest) -> int:
        """Videos in `current` generations that a later one replaces."""
        shards = [shard for shard in manifest.of(split) if shard.generation in self.current(split)]
        return sum(shard.samples for shard in shards) - len(self.newest[split])


def complete(manifest: Manifest) -> Manifest:
    """Without the shards of a round that is not complete: what readers elsewhere may know."""
    shards = tuple(shard for shard in manifest.shards if shard.generation <= manifest.generation)
    return replace(manifest, shards=shards)


def read_facts(folder: Path, manifest: Manifest, every: bool = False) -> Facts:
    """Count everything; terms from one record of each shard and teacher, or from `every` one that lies in the folder.

    Raises UserError: a damaged index or record.
    """
    facts = Facts()
    found: dict[tuple[str, ...], tuple[dict, int]] = {}  # first row of a source, and how many it stands for
    total = sum(manifest.samples().values())
    shown = {index * total // SHOWN for index in range(SHOWN)}
    for index, row in enumerate(data_rows(folder, manifest)):
        _count(facts, row)
        if index in shown:
            facts.shown.append(row)
        if every and not is_remote(folder, row["shard"]):
            facts.terms[terms_of(read_record(folder, row))] += 1
            continue
        first, count = found.get(_source(row), (row, 0))
        found[_source(row)] = first, count + 1
    for row, count in found.values():
        facts.terms[terms_of(read_record(folder, row))] += count
    return facts


def read_all_records(folder: Path, manifest: Manifest) -> Iterator[tuple[Sample, bytes]]:
    """Every record, with its bytes; of tars that lie elsewhere only one for each teacher in each shard."""
    seen: set[tuple[str, ...]] = set()
    for row in data_rows(folder, manifest):
        if _source(row) in seen and is_remote(folder, row["shard"]):
            continue
        seen.add(_source(row))
        data = read_member_at(folder, row, "json")
        yield parse_sample(data, f"{address(folder, row['shard'])}: {row['key']}.json"), data


def data_rows(folder: Path, manifest: Manifest) -> Iterator[dict]:
    """Rows of the index (COLUMNS) of all data, split by split; from the tar where the index does not have them."""
    for split in manifest.samples():
        there = index_path(folder, split).exists()
        known = Counter(row["shard"] for row in index_rows(folder, split, ["shard"])) if there else Counter()
        whole = {shard.file for shard in manifest.of(split) if known[shard.file] == shard.samples}
        if there:
            yield from (row for row in index_rows(folder, split, COLUMNS) if row["shard"] in whole)
        for shard in manifest.of(split):
            if shard.file not in whole:
                yield from shard_rows(folder, shard)


def read_record(folder: Path, row: dict) -> Sample:
    """The record of a row of the index.  Raises UserError: gone, truncated, not a record."""
    return parse_sample(read_member_at(folder, row, "json"), f"{address(folder, row['shard'])}: {row['key']}.json")


def terms_of(sample: Sample) -> Terms:
    """What a record says of its teacher and the terms of its video."""
    requested, provenance = _object(sample.requested_json), _object(sample.provenance_json)
    settings, url = requested.get("settings", requested), provenance.get("terms_url", "")
    return Terms(
        teacher=sample.teacher,
        version=sample.teacher_version,
        settings=json.dumps(settings, sort_keys=True, ensure_ascii=False),
        licence=sample.licence,
        distillation=sample.distillation,
        url=url if isinstance(url, str) else "",
    )


def _source(row: dict) -> tuple[str, ...]:
    return row["shard"], row["teacher"], row["teacher_version"], row["licence"]


def _object(text: str) -> dict:
    """{} for what is no JSON object: free-form text of a stranger."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _count(facts: Facts, row: dict) -> None:
    split, generation, prompt, key = row["split"], row["generation"], hash(row["prompt_id"]), hash(row["key"])
    facts.videos[split] += 1
    if prompt not in facts.prompts[split]:
        facts.prompts[split].add(prompt)
        facts.words[len(row["prompt"].split())] += 1
        if len(facts.examples) < EXAMPLES:
            facts.examples.append(row["prompt"])
    newest = facts.newest[split]
    newest[key] = max(newest.get(key, 0), generation)
    this = facts.rounds[generation]
    this.videos += 1
    this.first, this.last = min(this.first, row["created_at"]), max(this.last, row["created_at"])
    if row["cost"]:
        count, total = facts.costs.get(row["currency"], (0, 0.0))
        facts.costs[row["currency"]] = count + 1, total + row["cost"]
    facts.shapes[row["width"], row["height"], row["frames"], row["fps"]] += 1
    facts.seconds += row["duration_s"]
