"""Rows of the journal's tables as the rest of the program sees them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from afd_data.plan import Planned


@dataclass(frozen=True)
class Row(Planned):
    """A row of `samples`, without its thumbnail."""

    id: int
    state: str
    reason: str
    shard: str
    perceptual_hash: str
    created_at: float  # seconds since 1970; 0.0 until there is a video


@dataclass(frozen=True)
class Round:
    """A refresh round: `facts` are what its fingerprints share, `why` how many samples each rule made due."""

    generation: int
    facts: dict
    why: dict
    started_at: float  # seconds since 1970
    finished_at: float  # 0.0 while it goes on


@dataclass(frozen=True)
class Attempt:
    """A row of `requests`: one order for a sample.  Moments are seconds since 1970."""

    job_id: str = ""  # "": the teacher never gave one
    intent_at: float = 0.0
    submitted_at: float = 0.0  # 0.0 without a job id
    estimate: float = 0.0
    cost: float | None = None  # None: not known yet, or never told


COLUMNS = ", ".join(field.name for field in fields(Row))
ATTEMPT_COLUMNS = ", ".join(field.name for field in fields(Attempt))
PLAN_COLUMNS = ", ".join(field.name for field in fields(Planned))
MARKS = ", ".join("?" * len(fields(Planned)))
