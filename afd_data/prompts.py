"""Prompts of any source -> `Prompt(id, text, split)`.

A prompt's id and its rank among others are hashes of its normalised text, so that neither the order of a file nor
its name decides which prompts are held out.  Knows nothing of teachers beyond the captions they bring along.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
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


def load_prompts(config: PromptsConfig, base: Path, teacher: Teacher | None = None) -> list[Prompt]:
    """All prompts of an experiment in an order that depends on their texts only; evaluation prompts stand first.

    `base` is the folder that relative paths start from (then the current one).  `test` prompts are the first by hash,
    `validation` the next, the rest trains, so a larger `limit` never moves a prompt out of the test set.  With
    `test_source` the test prompts come from there (`test` of them, or all where `test` is 0).
    Raises UserError: no such file or column, a bad line, too few prompts, evaluation prompts in training.
    """
    texts = _texts(config.source, config.column, base, teacher)[: config.limit]
    if config.test_source:
        test = _texts(config.test_source, config.column, base, teacher)[: config.test or None]
        rest = texts
    else:
        test, rest = texts[: config.test], texts[config.test :]
    validation, train = rest[: config.validation], rest[config.validation :]
    if config.test_source and len(test) < config.test:
        raise UserError(
            f"prompts: {len(test)} prompts in {config.test_source} are too few for test {config.test}. "
            "Ask for fewer or name a larger prompts.test_source."
        )
    if not train or len(validation) < config.validation or len(test) < config.test:
        raise UserError(
            f"prompts: {len(texts)} prompts in {config.source} are too few: validation {config.validation} and test "
            f"{config.test} leave {max(0, len(train))} for training. Ask for fewer or name a larger source."
        )
    _refuse_leaks(config, train, validation, test)
    chosen: dict[str, str] = {}
    for split, members in (("test", test), ("validation", validation), ("train", train)):
        for text in members:
            chosen.setdefault(text, split)  # a sample has one split: an allowed exact leak stays in evaluation
    return [Prompt(prompt_id(text), text, split) for text, split in chosen.items()]


def prompt_id(text: str) -> str:
    """The id of a normalised text."""
    return "p" + hashlib.sha256(text.encode()).hexdigest()[:16]


def normalise(text: str, where: str) -> str:
    """NFC, single spaces, no control or invisible characters.  Raises UserError naming `where`."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    text = " ".join(text.split())
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cc")
    if not text.strip():
        raise UserError(f"{where}: the prompt is empty. Remove the line or write a prompt.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: half a character (a lone surrogate) in the prompt. Save the file as UTF-8 again.")
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where}: the prompt has {len(text)} characters; at most {MAX_CHARACTERS} are allowed.")
    return text.strip()


def find_leaks(train: Iterable[str], evaluation: Iterable[str], threshold: float) -> list[Leak]:
    """Pairs whose word triples have a Jaccard similarity >= threshold, most similar first.

    Two sets that similar must share one of their rarest few triples, so only these are indexed and looked up.
    """
    train_sets = {text: _triples(text) for text in train}
    eval_sets = {text: _triples(text) for text in evaluation}
    frequency = Counter(triple for sets in (train_sets, eval_sets) for found in sets.values() for triple in found)

    def rarest(triples: frozenset) -> list:
        keep = len(triples) - ceil(threshold * len(triples) - 1e-9) + 1
        return sorted(triples, key=lambda triple: (frequency[triple], triple))[:keep]

    index = defaultdict(list)
    for text, triples in eval_sets.items():
        for triple in rarest(triples):
            index[triple].append(text)
    leaks = []
    for text, triples in train_sets.items():
        for candidate in {match for triple in rarest(triples) for match in index.get(triple, ())}:
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
    found = [normalise(text, where) for text, where in read_texts(source, column, base, teacher)]
    if not found:
        raise UserError(f"prompts.source: {source} holds no prompts")
    distinct = set(found)
    if len(distinct) < len(found):
        log.info("%s: %d duplicates of %d prompts left out", source, len(found) - len(distinct), len(found))
    return sorted(distinct, key=lambda text: hashlib.sha256(f"rank/{text}".encode()).digest())
