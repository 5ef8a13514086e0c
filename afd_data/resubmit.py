"""What a person decides about orders that ended without a video, or do not end: to order again, or to wait no longer.

Only the newest round is ordered again here: what an older one lacks is a refresh's to ask for, so that generations that
trainers have read stay what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from afd_data.errors import UserError
from afd_data.journal import Journal, Row
from afd_data.reconcile import ABSENT, GIVEN_UP, journal_folders, writing
from afd_data.refresh import AGAIN
from afd_data.states import IN_FLIGHT, LOST

log = logging.getLogger(__name__)


def give_up(folder: Path, keys: Sequence[str]) -> list[str]:
    """Wait no longer for samples whose job is under way or unknown; returns their keys.

    They become `unknown`, what they cost stays reserved, and nobody asks about them again by itself.
    Raises UserError: no cache, a running process, no such key.
    """
    with ExitStack() as opened:
        chosen: list[tuple[Journal, Row]] = []
        for own in journal_folders(folder):
            journal = opened.enter_context(writing(own))
            chosen += [(journal, row) for row in journal.rows(states=(*IN_FLIGHT, "unknown")) if row.key in keys]
        if missing := set(keys) - {row.key for _, row in chosen}:
            raise UserError(
                f"{folder}: no sample whose job is under way or unknown is called {', '.join(sorted(missing)[:5])}; "
                "`afd cache status` lists them. Nothing was changed."
            )
        for journal, row in chosen:
            if row.state != "unknown":
                journal.move(row.id, "unknown", reason=f"{GIVEN_UP}: it was {row.state}")
            elif not row.reason.startswith(GIVEN_UP):
                journal.note(row.id, f"{GIVEN_UP}: {row.reason}")
        return [row.key for _, row in chosen]


def resubmit(
    folder: Path, keys: Sequence[str] = (), states: Sequence[str] = (), absent: bool = False, sure: bool = False
) -> list[str]:
    """Plan samples again that ended without a video; returns their keys.  The next run asks for them.

    keys: those samples; states: all in these states; absent: those that `reconcile` found were never taken.  What the
    teacher may have charged before is planned only when `sure`.  Samples of older rounds than the newest are left to
    the next refresh, which asks for those that have no video; a warning says how many.
    Raises UserError: no cache, a running process, no such key, or what may be charged twice.
    """
    with ExitStack() as opened:
        chosen: list[tuple[Journal, Row]] = []
        for own in journal_folders(folder):
            journal = opened.enter_context(writing(own))
            chosen += [(journal, row) for row in journal.rows(states=LOST) if _chosen(row, keys, states, absent)]
        if missing := set(keys) - {row.key for _, row in chosen}:
            raise UserError(
                f"{folder}: no sample that ended without a video is called {', '.join(sorted(missing)[:5])}; "
                "`afd cache status` lists them. Nothing was changed."
            )
        twice = [row.key for journal, row in chosen if _may_be_charged(journal, row)]
        if twice and not sure:
            raise UserError(
                f"{len(twice)} of these may have been charged already, such as {', '.join(twice[:5])}: "
                "`afd cache reconcile` tells for some providers; --yes orders them again all the same. "
                "Nothing was changed."
            )
        newest = {journal: _newest_round(journal) for journal, _ in chosen}
        older = [(journal, row) for journal, row in chosen if row.generation < newest[journal]]
        for journal, row in older:
            journal.note(row.id, f"{AGAIN}: {row.reason.removeprefix(f'{AGAIN}: ')}")
        if older:
            log.warning(
                "%d of these, such as %s, belong to an older generation, which trainers may have read and which stays "
                "as it is: `afd cache-teacher --refresh` asks anew for those without a video.",
                len(older),
                older[0][1].key,
            )
        chosen = [(journal, row) for journal, row in chosen if row.generation == newest[journal]]
        for journal, row in chosen:
            journal.move(row.id, "planned")
        return [row.key for _, row in chosen]


def _newest_round(journal: Journal) -> int:
    return max((one.generation for one in journal.rounds()), default=0)


def _chosen(row: Row, keys: Sequence[str], states: Sequence[str], absent: bool) -> bool:
    return row.key in keys or row.state in states or (absent and row.reason.startswith(ABSENT))


def _may_be_charged(journal: Journal, row: Row) -> bool:
    """Whether the last attempt cost something, or may have: nobody told, and it was taken or may have been."""
    attempt = journal.last_attempt(row.fingerprint)
    if attempt.cost is None:
        return row.state == "unknown" or attempt.estimate > 0 or bool(attempt.job_id)
    return attempt.cost > 0
