"""A cache -> what a student's publication must say of the videos it learned from: whose, how many, on which terms.

Read from the samples themselves, which carry their terms wherever the cache came from.  Torch-free.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from afd_data.sample import Sample, parse_sample
from afd_data.shards import read_manifest, read_member, scan_shard
from afd_train.public import without_machine


@dataclass(frozen=True)
class TeacherFacts:
    """One teacher with one setting; texts as the samples have them, without paths of a machine."""

    name: str
    version: str
    settings: str  # JSON
    licence: str
    distillation: str
    videos: int


@dataclass(frozen=True)
class TeacherData:
    """All videos of a cache; `splits` are split -> (videos, prompts)."""

    teachers: tuple[TeacherFacts, ...]
    splits: dict[str, tuple[int, int]]

    @property
    def distillation(self) -> str:
        """The strictest terms of any video: disallowed, then unknown, then allowed."""
        found = {teacher.distillation for teacher in self.teachers}
        return "disallowed" if "disallowed" in found else "allowed" if found == {"allowed"} else "unknown"


def read_teacher_data(folder: Path) -> TeacherData | None:
    """Read every sample's record; None where there is no cache or nothing in it.  Raises UserError: a damaged one."""
    videos: Counter[tuple[str, ...]] = Counter()
    prompts: dict[str, list[str]] = defaultdict(list)
    for shard in read_manifest(folder).shards:
        path = folder / shard.file
        entries = scan_shard(path)
        with open(path, "rb") as file:
            for entry in entries:
                sample = parse_sample(read_member(file, entry, "json"), f"{path}: {entry.key}")
                videos[_terms(sample)] += 1
                prompts[shard.split].append(sample.prompt_id)
    if not videos:
        return None
    teachers = tuple(TeacherFacts(*terms, videos=count) for terms, count in videos.most_common())
    return TeacherData(teachers, {split: (len(ids), len(set(ids))) for split, ids in prompts.items()})


def _terms(sample: Sample) -> tuple[str, ...]:
    texts = sample.teacher, sample.teacher_version, _settings(sample.requested_json), sample.licence
    return (*(str(without_machine(text)) for text in texts), sample.distillation)


def _settings(requested: str) -> str:
    try:
        asked = json.loads(requested)
    except (ValueError, RecursionError):  # free-form text of a stranger
        return "not readable"
    settings = asked.get("settings", asked) if isinstance(asked, dict) else asked
    return json.dumps(without_machine(settings), sort_keys=True)
