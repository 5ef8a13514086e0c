"""What became of orders whose outcome is unknown: asking the provider, and a person's decision to order again.

An order carries a token that the provider echoes.  One that the provider lists goes on with its job; one that it does
not list although it lists everything from before the order on was never taken, which only a person turns into a new
order (`resubmit`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from afd_data.errors import UserError
from afd_data.files import one_writer
from afd_data.journal import JOURNAL, LOCK, Journal, Row
from afd_data.partition import parts_of
from afd_data.states import LOST
from afd_data.teachers import Job, Listing, Teacher, order_token

ABSENT = "absent"  # first word of the reason of an order that was provably not taken
CLOCKS_S = 300.0  # how far the provider's clock may be off


@dataclass
class Reconciled:
    """Keys of samples: found (their jobs go on), absent (never taken), young (ask again later), open (cannot be told).

    grace_s: below which an order counts as young.
    """

    found: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    young: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    grace_s: float = 0.0

    def text(self) -> str:
        """For the terminal."""
        what = (
            (self.found, "found: `afd cache-teacher` goes on with their jobs"),
            (self.absent, "absent: never taken, not charged; `afd cache resubmit --absent` orders them again"),
            (self.young, f"ordered less than {self.grace_s / 60:g} minutes ago and not listed yet: try again later"),
            (self.open, "still unknown: their jobs are no longer listed; look at the provider's own list"),
        )
        lines = [line for keys, text in what if keys for line in (f"{len(keys)} {text}", *(f"  {key}" for key in keys))]
        return "\n".join(lines) or "nothing is unknown"


def reconcile(folder: Path, teacher: Teacher, grace_s: float = 900.0) -> Reconciled:
    """Ask the provider for its jobs and settle what is `unknown` in a cache and its parts.

    An order younger than `grace_s` is not called absent: listings lag behind.
    Raises UserError: no cache, a running process, a provider that lists no jobs or not that far back.
    """
    result = Reconciled(grace_s=grace_s)
    for own in journal_folders(folder):
        with _writing(own) as journal:
            _reconcile(journal, teacher, grace_s, result)
    return result


def _reconcile(journal: Journal, teacher: Teacher, grace_s: float, result: Reconciled) -> None:
    now = time.time()
    unknown = [(row, *_last_attempt(journal, row)) for row in journal.rows(states=("unknown",))]
    unknown = [(row, job_id, asked_at) for row, job_id, asked_at in unknown if not row.reason.startswith(ABSENT)]
    if not unknown:
        return
    if not isinstance(teacher, Listing):
        raise UserError(
            f"teacher {teacher.identity.name}: this provider lists no jobs, so nothing can be told about "
            f"{len(unknown)} orders. Look at its own list (the token of an order is afd- and 40 digits of its "
            "fingerprint), then decide with `afd cache resubmit`."
        )
    # Where the job is known, nothing follows from its absence: an old one need not be within the provider's list.
    oldest = min([asked_at for _, job_id, asked_at in unknown if not job_id] or [asked_at for *_, asked_at in unknown])
    earlier = _earlier_jobs(journal)
    listed = _by_token(job for job in teacher.jobs(oldest - CLOCKS_S) if job.job_id not in earlier)
    for row, job_id, asked_at in unknown:
        job = listed.get(order_token(row.fingerprint))
        if job is not None:
            journal.move(row.id, "submitted", job_id=job.job_id)
            result.found.append(row.key)
        elif job_id:
            result.open.append(row.key)
        elif asked_at > now - grace_s:
            result.young.append(row.key)
        else:
            reason = f"{ABSENT}: the provider lists no such order (asked {time.strftime('%Y-%m-%d %H:%M')})"
            journal.note(row.id, reason, cost=0.0)
            result.absent.append(row.key)


def _by_token(jobs: Iterable[Job]) -> dict[str, Job]:
    """The first job of each token: the one whose video a reader of the journal expects."""
    found: dict[str, Job] = {}
    for job in jobs:
        other = found.get(job.token)
        if job.token and (other is None or job.created_at < other.created_at):
            found[job.token] = job
    return found


def _earlier_jobs(journal: Journal) -> set[str]:
    """Jobs of attempts that have ended, after which a person ordered again with the same token."""
    last = "SELECT max(id) FROM requests GROUP BY fingerprint"
    return {job_id for (job_id,) in journal.select(f"SELECT job_id FROM requests WHERE id NOT IN ({last})")}


def _last_attempt(journal: Journal, row: Row) -> tuple[str, float]:
    query = "SELECT job_id, intent_at FROM requests WHERE fingerprint = ? ORDER BY id DESC LIMIT 1"
    return journal.select(query, (row.fingerprint,))[0]


def resubmit(
    folder: Path, keys: Sequence[str] = (), states: Sequence[str] = (), absent: bool = False, sure: bool = False
) -> list[str]:
    """Plan samples again that ended without a video; returns their keys.  The next run asks for them.

    keys: those samples; states: all in these states; absent: those that `reconcile` found were never taken.  What the
    teacher may have charged before is planned only when `sure`.
    Raises UserError: no cache, a running process, no such key, or what may be charged twice.
    """
    with ExitStack() as opened:
        chosen: list[tuple[Journal, Row]] = []
        for own in journal_folders(folder):
            journal = opened.enter_context(_writing(own))
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
        for journal, row in chosen:
            journal.move(row.id, "planned")
        return [row.key for _, row in chosen]


@contextmanager
def _writing(folder: Path) -> Iterator[Journal]:
    """The journal of a cache in which nobody else writes.  Raises UserError where somebody does."""
    with one_writer(folder / LOCK, f"cache {folder}"), closing(Journal(folder / JOURNAL)) as journal:
        yield journal


def _chosen(row: Row, keys: Sequence[str], states: Sequence[str], absent: bool) -> bool:
    return row.key in keys or row.state in states or (absent and row.reason.startswith(ABSENT))


def _may_be_charged(journal: Journal, row: Row) -> bool:
    """Whether the last attempt cost something, or may have."""
    query = "SELECT cost, estimate FROM requests WHERE fingerprint = ? ORDER BY id DESC LIMIT 1"
    cost, estimate = journal.select(query, (row.fingerprint,))[0]
    return (row.state == "unknown" and cost is None) or (estimate if cost is None else cost) > 0


def journal_folders(folder: Path) -> list[Path]:
    """A cache and its parts, those that have a journal.  Raises UserError where there is none."""
    found = [own for own in (folder, *parts_of(folder)) if (own / JOURNAL).is_file()]
    if not found:
        raise UserError(f"{folder}: no {JOURNAL} in it. Name the folder of a cache, for example OUT/cache.")
    return found
