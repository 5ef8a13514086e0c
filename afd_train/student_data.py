"""A cache -> what a student's publication must say of the videos it learned from: whose, how many, on which terms.

Read from the samples themselves, which carry their terms wherever the cache came from.  Torch-free.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from afd_data.card_facts import Terms, complete, read_facts
from afd_data.shards import read_manifest
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
    """Count the data of a cache; None where there is none.  Raises UserError: a damaged one.

    Every record is read; of tars that lie elsewhere only one for each teacher in each shard, for all its videos there.
    """
    manifest = complete(read_manifest(folder))
    if not manifest.shards:
        return None
    facts = read_facts(folder, manifest, every=True)
    videos: Counter[tuple[str, ...]] = Counter()
    for terms, count in facts.terms.items():
        videos[_public(terms)] += count
    teachers = tuple(TeacherFacts(*terms, videos=count) for terms, count in videos.most_common())
    return TeacherData(teachers, {split: (facts.videos[split], len(ids)) for split, ids in facts.prompts.items()})


def _public(terms: Terms) -> tuple[str, ...]:
    texts = terms.teacher, terms.version, json.dumps(without_machine(json.loads(terms.settings)), sort_keys=True)
    return (*(str(without_machine(text)) for text in (*texts, terms.licence)), terms.distillation)
