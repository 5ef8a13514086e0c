"""Which samples a refresh asks for again: a pure function of what the cache holds, what the recipe wants, and the time.

Training videos are due by age, as a share of the oldest, where the student is furthest behind, and when the teacher has
changed; prompts and takes that are new are due in every split.  Validation and test videos otherwise stay what they
are, so that results of different rounds can be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from afd_data.config import RefreshConfig
from afd_data.margins import Margin
from afd_data.plan import Planned

DAY_S = 86400.0
AGAIN = "again"  # first word of the reason of a sample without a video that a person wants asked for in a new round


@dataclass(frozen=True, slots=True)
class Known:
    """What became of a key so far.

    generation: the newest round that asked for it; video_generation: of the video that is in view, None without one;
    lost: that newest round brought no video; again: it failed and cost nothing, or a person wants it again;
    asked_at: when that round began, or when the video in view was made, whichever is later (seconds since 1970).
    """

    split: str
    generation: int
    video_generation: int | None
    lost: bool
    again: bool
    asked_at: float


def due(
    config: RefreshConfig,
    wanted: Iterable[Planned],
    known: Mapping[str, Known],
    outdated: Collection[int],
    margins: Mapping[str, Margin],
    now: float,
) -> dict[str, str]:
    """Key -> the first of the recipe's rules that makes it due, in the order of the plan.

    wanted: all samples of the recipe; known: by key; outdated: generations of another teacher version or setting;
    margins: by prompt id; now: seconds since 1970.
    """
    reasons: dict[str, str] = {}
    videos: list[tuple[Planned, Known]] = []
    for sample in wanted:
        before = known.get(sample.key)
        if before is None:
            if config.new_prompts:
                reasons[sample.key] = "new_prompts"
        elif before.again and before.video_generation is None:
            reasons[sample.key] = "failed"
        elif sample.split == "train":
            if config.changed_teacher and before.generation in outdated:
                reasons[sample.key] = "changed_teacher"
            if before.video_generation is not None:
                videos.append((sample, before))
    for rule, keys in (
        ("older_than_days", _old(config, videos, now)),
        ("fraction", _oldest(config, videos)),
        ("hardest", _hardest(config, videos, margins)),
    ):
        for key in keys:
            reasons.setdefault(key, rule)
    return reasons


def new_only(wanted: Iterable[Planned], known: Mapping[str, Known]) -> dict[str, str]:
    """What is due without a refresh: prompts and takes that were never asked for."""
    return {sample.key: "new_prompts" for sample in wanted if sample.key not in known}


def _old(config: RefreshConfig, videos: list[tuple[Planned, Known]], now: float) -> Iterator[str]:
    if config.older_than_days is not None:
        limit = now - config.older_than_days * DAY_S
        yield from (sample.key for sample, before in videos if before.asked_at < limit)


def _oldest(config: RefreshConfig, videos: list[tuple[Planned, Known]]) -> Iterator[str]:
    oldest = sorted(videos, key=lambda video: (video[1].asked_at, _digest(video[0].key)))
    yield from (sample.key for sample, _ in oldest[: _share(config.fraction, len(videos))])


def _hardest(
    config: RefreshConfig, videos: list[tuple[Planned, Known]], margins: Mapping[str, Margin]
) -> Iterator[str]:
    """All takes of the prompts with the largest margins.

    A margin counts where it was measured on the video in view, and where the newest request brought one: what the
    teacher cannot draw stays hard, and asking again and again would not help.
    """
    prompts = {sample.prompt_id for sample, _ in videos}
    scored = {
        sample.prompt_id: margins[sample.prompt_id].margin
        for sample, before in videos
        if sample.prompt_id in margins
        and not before.lost
        and margins[sample.prompt_id].generation == before.video_generation
    }
    hardest = sorted(scored, key=lambda prompt: (-scored[prompt], _digest(prompt)))
    chosen = set(hardest[: _share(config.hardest, len(prompts))])
    yield from (sample.key for sample, _ in videos if sample.prompt_id in chosen)


def _share(share: float, count: int) -> int:
    """A share above 0 is at least one; 0.1 of 30 is 3, whatever floating point makes of it."""
    return ceil(share * count - 1e-9)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
