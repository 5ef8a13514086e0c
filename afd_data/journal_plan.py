"""How a plan enters the journal: what is new is added, and nothing else may differ, as a cache only grows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import astuple

from afd_data.errors import UserError
from afd_data.journal_rows import MARKS, PLAN_COLUMNS
from afd_data.plan import Planned


def add_planned(db: sqlite3.Connection, planned: Iterable[Planned], generation: int) -> int:
    """Add the samples of a generation that are new, in the open transaction; return how many.

    Raises UserError as `Journal.plan` does.
    """
    values = (astuple(sample) for sample in planned)
    db.execute("CREATE TEMP TABLE wanted AS SELECT * FROM samples LIMIT 0")
    try:
        db.executemany(f"INSERT INTO wanted ({PLAN_COLUMNS}) VALUES ({MARKS})", values)
        db.execute("CREATE UNIQUE INDEX temp.wanted_keys ON wanted (generation, key)")
        _check_only_additions(db, generation)
        return db.execute(
            f"INSERT INTO samples ({PLAN_COLUMNS}, state) SELECT {PLAN_COLUMNS}, 'planned' FROM wanted "
            "WHERE (generation, key) NOT IN (SELECT generation, key FROM samples) ORDER BY wanted.rowid"
        ).rowcount
    finally:
        db.execute("DROP TABLE wanted")


def _check_only_additions(db: sqlite3.Connection, generation: int) -> None:
    odd = db.execute(
        "SELECT s.prompt, s.split, w.split, w.prompt, count(*) OVER () FROM samples s LEFT JOIN wanted w "
        "USING (generation, key) WHERE generation = ? AND "
        "(w.key IS NULL OR w.fingerprint != s.fingerprint OR w.split != s.split) LIMIT 1",
        (generation,),
    ).fetchone()
    if odd is None:
        return
    prompt, split, new_split, new_prompt, count = odd
    advice = "A cache only grows: add prompts or takes"
    if new_prompt is None:
        change = f"{prompt!r} is no longer among the prompts or takes"
    elif new_split != split:
        change = f"{prompt!r} moved from {split} to {new_split}"
        advice = (
            "Held out are the first prompts by hash, so an added prompt, prompts.test or prompts.validation can "
            "move others: undo that change"
        )
    else:
        change = f"{prompt!r} is now {new_prompt!r}"
    raise UserError(
        f"the recipe asks for other samples than this cache holds ({count} differ; {change}). "
        f"{advice}, or cache into another folder with --set out=FOLDER."
    )
