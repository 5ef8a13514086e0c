"""A step's clips in parts that fit into memory together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Clips of a step that are computed at once: some takes of some prompts."""

    prompts: slice  # of the step's examples
    takes: range
    rows: slice  # of the step's clips, which are ordered by prompt, then take


def parts_of(prompts: int, takes: int, limit: int | None) -> Iterator[Part]:
    """A step's clips in parts of at most `limit`, in order: whole groups where they fit, else takes of one prompt."""
    limit = limit or prompts * takes
    together, some = max(1, limit // takes), min(takes, limit)
    for first in range(0, prompts, together):
        last = min(first + together, prompts)
        for start in range(0, takes, some):
            stop = min(start + some, takes)
            rows = slice(first * takes + start, (last - 1) * takes + stop)
            yield Part(slice(first, last), range(start, stop), rows)
