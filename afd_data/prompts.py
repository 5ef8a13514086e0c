"""Prompts of any source -> `Prompt(id, text, split)`.

A prompt's id and its rank among others are hashes of its normalised text, so that neither the order of a file nor
its name decides which prompts are held out.  What a cache already holds keeps its split, so that a source may grow.
Knows nothing of teachers beyond the captions they bring along.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from afd_data.config import PromptsConfig
from afd_data.errors import UserError
from afd_data.prompt_sources import read_texts

if TYPE_CHECKING:
    from afd_data.teachers import Teacher

log = logging.getLogger(__name__)

MAX_CHARACTERS = 4000
# Invisible and direction marks; the two joiners stay, since Persian, Hindi and emoji are spelt with them.
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
SURROGATE = re.compile("[\ud800-\udfff]")
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")  # a CJK character counts as a word


@dataclass(frozen=True)
class Prompt:
    """`id` is "p" and 16 hex digits of the text's hash; `split` is train, validation or test."""

    id: str
    text: str
    split: str


class Leak(NamedTuple):
    """An evaluation prompt that occurs in training; similarity in (0, 1], 1 = the same words."""

    similarity: float
    evaluation: str
    training: str


def load_prompts(
    config: PromptsConfig,
    base: Path,
    teacher: Teacher | None = None,
    known: Mapping[str, str] = MappingProxyType({}),
) -> list[Prompt]:
    """All prompts of an experiment; evaluation prompts stand first, otherwise the order depends on the texts only.

    `base` is the folder that relative paths start from (then the current one).  `test` prompts are the first by hash,
    `validation` the next, the rest trains.  `known` is the split of every prompt id that a cache holds
    (`known_splits`): a known prompt keeps its split and its place within `limit`, and only new ones are held out, in
    the places that are free.  With `test_source` the test prompts come from there (`test` of them, or all where
    `test` is 0).
    Raises UserError: no such file or column, a bad line, too few prompts, evaluation prompts in training.
    """
    texts = _limited(_texts(config.source, config.column, base, teacher), config.limit, known)
    if config.test_source:
        found = _texts(config.test_source, config.column, base, teacher)
        in_test = {name: split for name, split in known.items() if split == "test"}
        test, rest = _held_out(found, "test", config.test or len(found), in_test)[0], texts
        if len(test) < config.test:
            raise UserError(
                f"prompts: {len(test)} prompts in {config.test_source} are too few for test {config.test}. "
                "Ask for fewer or name a larger prompts.test_source."
            )
    else:
        test, rest = _held_out(texts, "test", config.test, known)
    validation, train = _held_out(rest, "validation", config.validation, known)
    if not train or len(validation) < config.validation or len(test) < config.test:
        new = " Only new prompts can be held out: the cache trains on the others." if known else ""
        raise UserError(
            f"prompts: {len(texts)} prompts in {config.source} are too few: validation {config.validation} and test "
            f"{config.test} leave {max(0, len(train))} for training.{new} Ask for fewer or name a larger source."
        )
    _refuse_leaks(config, train, validation, test)
    chosen: dict[str, str] = {}
    for split, members in (("test", test), ("validation", validation), ("train", train)):
        for text in members:
            chosen.setdefault(text, split)  # a sample has one split: an allowed exact leak stays in evaluation
    return [Prompt(prompt_id(text), text, split) for text, split in chosen.items()]


def known_splits(folder: Path) -> dict[str, str]:
    """Prompt id -> split of everything that a cache holds or has asked for; {} where there is no cache.

    From the journals of the cache and its parts, else from the index.  Raises UserError when these are damaged.
    """
    from afd_data.index import index_path, index_rows
    from afd_data.journal import JOURNAL, open_journal
    from afd_data.partition import parts_of
    from afd_data.sample import SPLITS

    known: dict[str, str] = {}
    for own in (folder, *parts_of(folder)):
        if (own / JOURNAL).exists():
            journal = open_journal(own)
            try:
                known |= dict(journal.select("SELECT DISTINCT prompt_id, split FROM samples"))
            finally:
                journal.close()
            continue
        for split in SPLITS:
            if index_path(own, split).exists():
                known |= {row["prompt_id"]: split for row in index_rows(own, split, ["prompt_id"])}
    return known


def prompt_id(text: str) -> str:
    """The id of a normalised text."""
    return "p" + hashlib.sha256(text.encode()).hexdigest()[:16]


def normalise(text: str, where: str) -> str:
    """NFC, single spaces, no control or invisible characters.  Raises UserError naming `where`."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    text = CONTROL.sub("", " ".join(text.split()))
    if not text.strip():
        raise UserError(f"{where}: the prompt is empty. Remove the line or write a prompt.")
    if SURROGATE.search(text):
        raise UserError(f"{where}: half a character (a lone surrogate) in the prompt. Save the file as UTF-8 again.")
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where}: the prompt has {len(text)} characters; at most {MAX_CHARACTERS} are allowed.")
    return text.strip()


def find_leaks(train: Iterable[str], evaluation: Iterable[str], threshold: float) -> list[Leak]:
    """Pairs whose word triples have a Jaccard similarity >= threshold, most similar first.

    Two sets that similar must share one of their first few triples in any order that both are sorted by.  Here the
    rarest in evaluation come first, so those that occur in training only need no sorting: only evaluation is indexed,
    and training is read once.
    """
    eval_sets = {text: _triples(text) for text in evaluation}
    frequency = Counter(triple for found in eval_sets.values() for triple in found)

    def first(triples: frozenset) -> list:
        keep = len(triples) - ceil(threshold * len(triples) - 1e-9) + 1
        shared = [triple for triple in triples if triple in frequency]
        keep -= len(triples) - len(shared)
        return sorted(shared, key=lambda triple: (frequency[triple], triple))[:keep] if keep > 0 else []

    index = defaultdict(list)
    for text, triples in eval_sets.items():
        for triple in first(triples):
            index[triple].append(text)
    leaks = []
    for text in train if eval_sets else ():
        triples = _triples(text)
        for candidate in {match for triple in first(triples) for match in index.get(triple, ())}:
            other = eval_sets[candidate]
            similarity = len(triples & other) / len(triples | other)
            if similarity >= threshold:
                leaks.append(Leak(similarity, candidate, text))
    return sorted(leaks, key=lambda leak: (-leak.similarity, leak.evaluation, leak.training))


def _triples(text: str) -> frozenset:
    words = WORD.findall(text.lower())
    if len(words) < 3:
        return frozenset([tuple(words) or (text,)])
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def _refuse_leaks(config: PromptsConfig, train: list[str], validation: list[str], test: list[str]) -> None:
    leaks = find_leaks(train, [*test, *validation], config.near_duplicate)
    leaks += [Leak(1.0, text, text) for text in sorted({*test} & {*validation})]
    if not leaks:
        return
    shown = "\n".join(f"  {leak.similarity:.2f}  {leak.evaluation!r}\n     in  {leak.training!r}" for leak in leaks[:3])
    count = len({leak.evaluation for leak in leaks})
    message = f"prompts: {count} evaluation prompts occur in training (similarity >= {config.near_duplicate}):\n{shown}"
    if not config.allow_leakage:
        raise UserError(f"{message}\nRemove them, or set prompts.allow_leakage=true to go on all the same.")
    log.warning("%s", message)


def _texts(source: str, column: str, base: Path, teacher: Teacher | None) -> list[str]:
    """Normalised, distinct texts of a source in the order of their hashes."""
    count, distinct = 0, set()
    for text, where in read_texts(source, column, base, teacher):
        distinct.add(normalise(text, where))
        count += 1
    if not distinct:
        raise UserError(f"prompts.source: {source} holds no prompts")
    if len(distinct) < count:
        log.info("%s: %d duplicates of %d prompts left out", source, count - len(distinct), count)
    return sorted(distinct, key=lambda text: hashlib.sha256(f"rank/{text}".encode()).digest())


def _limited(texts: list[str], limit: int | None, known: Mapping[str, str]) -> list[str]:
    """The known ones and then the first, in the order of `texts`."""
    if limit is None or len(texts) <= limit:
        return texts
    chosen = {*sorted(texts, key=lambda text: prompt_id(text) not in known)[:limit]}
    return [text for text in texts if text in chosen]


def _held_out(texts: list[str], split: str, places: int, known: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Those that are known to be in `split`, with new ones in the places that are free; and the others."""
    splits = [known.get(prompt_id(text)) for text in texts]
    free = places - splits.count(split)
    chosen, others = [], []
    for text, before in zip(texts, splits, strict=True):
        if before == split or (before is None and free > 0):
            free -= before is None
            chosen.append(text)
        else:
            others.append(text)
    return chosen, others
