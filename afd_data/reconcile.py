"""What became of orders whose outcome is unknown: the provider is asked.

A job whose id is known is asked about itself.  Any other order carries a token that the provider echoes: one that the
provider lists goes on with its job, and one that it does not list, although it lists everything from before the order
on, was never taken, which only a person turns into a new order (`resubmit`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from afd_data.errors import UserError
from afd_data.files import one_writer
from afd_data.journal import JOURNAL, LOCK, Attempt, Journal, Row
from afd_data.partition import parts_of
from afd_data.plan import canonical_json
from afd_data.refresh import AGAIN
from afd_data.teachers import (
    FailedError,
    Identity,
    Job,
    Listing,
    LostError,
    RefusedError,
    Teacher,
    UnreachableError,
    order_token,
)

log = logging.getLogger(__name__)

ABSENT = "absent"  # first word of the reason of an order that was provably not taken
GIVEN_UP = "given up"  # first words of the reason of a sample that a person no longer waits for
SETTLED = (ABSENT, AGAIN, GIVEN_UP)  # first words of reasons of orders that need not be asked about any more
NOTHING = "nothing is unknown"
CLOCKS_S = 300.0  # how far the provider's clock may be off
READINGS = 2  # of the provider's list, before anything is called absent: what changes meanwhile may hide a job


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
            (
                self.open,
                "still unknown: no longer listed, or ordered with other teacher settings; look at its own list",
            ),
        )
        lines = [line for keys, text in what if keys for line in (f"{len(keys)} {text}", *(f"  {key}" for key in keys))]
        return "\n".join(lines) or NOTHING


def reconcile(folder: Path, teacher: Teacher, grace_s: float = 900.0) -> Reconciled:
    """Ask the provider for its jobs and settle what is `unknown` in a cache and its parts.

    A job whose id is known is asked about itself; other orders are looked for in the provider's list.  One younger than
    `grace_s` is not called absent: listings lag behind.
    Raises UserError: no cache, a running process, a provider that lists no jobs or not that far back.
    """
    result = Reconciled(grace_s=grace_s)
    unlisted: list[str] = []
    for own in journal_folders(folder):
        with writing(own) as journal:
            lost = _ask_about_jobs(journal, teacher, result)
            if isinstance(teacher, Listing):
                _look_for_orders(journal, lost, teacher, grace_s, result)
            else:
                result.open += [row.key for row, attempt in lost if attempt.job_id]
                unlisted += [row.key for row, attempt in lost if not attempt.job_id]
    if unlisted:
        raise UserError(
            f"{result.text()}\n".removeprefix(f"{NOTHING}\n")
            + f"teacher {teacher.identity.name}: this provider lists no jobs, so nothing can be told about "
            f"{len(unlisted)} orders. Look at its own list (the token of an order is afd- and 40 digits of its "
            "fingerprint), then decide with `afd cache resubmit` or `afd cache give-up`."
        )
    return result


def _ask_about_jobs(journal: Journal, teacher: Teacher, result: Reconciled) -> list[tuple[Row, Attempt]]:
    """Orders whose job is not known, or known to nobody any more; jobs that there are go on."""
    unknown = [row for row in journal.rows(states=("unknown",)) if not row.reason.startswith(SETTLED)]
    foreign = _foreign_rounds(journal, teacher.identity)
    result.open += [row.key for row in unknown if row.generation in foreign]
    lost = []
    for row in unknown:
        if row.generation in foreign:
            continue
        attempt = journal.last_attempt(row.fingerprint)
        try:
            known = bool(attempt.job_id) and _is_known(teacher, attempt.job_id)
        except UnreachableError as error:
            log.warning("%s: its job cannot be asked about now: %s", row.key, error)
            result.open.append(row.key)
            continue
        if known:
            journal.move(row.id, "submitted", job_id=attempt.job_id)
            result.found.append(row.key)
        else:
            lost.append((row, attempt))
    return lost


def _is_known(teacher: Teacher, job_id: str) -> bool:
    """Whether the provider has the job, however it stands.  Raises UnreachableError, UserError."""
    try:
        teacher.poll(job_id)
    except LostError:
        return False
    except (RefusedError, FailedError):  # the next run writes it down
        return True
    return True


def _look_for_orders(
    journal: Journal, lost: list[tuple[Row, Attempt]], teacher: Listing, grace_s: float, result: Reconciled
) -> None:
    if not lost:
        return
    now = time.time()
    # Where the job is known, nothing follows from its absence: an old one need not be within the provider's list.
    oldest = min(attempt.intent_at for _, attempt in [one for one in lost if not one[1].job_id] or lost)
    earlier = _earlier_jobs(journal)
    listed: dict[str, Job] = {}
    for _ in range(READINGS):
        jobs = [job for job in teacher.jobs(oldest - CLOCKS_S) if job.job_id not in earlier]
        listed = _by_token([*listed.values(), *jobs])
        if all(order_token(row.fingerprint) in listed for row, _ in lost):
            break
    for row, attempt in lost:
        job = listed.get(order_token(row.fingerprint))
        if job is not None:
            journal.move(row.id, "submitted", job_id=job.job_id)
            result.found.append(row.key)
        elif attempt.job_id:
            result.open.append(row.key)
        elif attempt.intent_at > now - grace_s:
            result.young.append(row.key)
        else:
            reason = f"{ABSENT}: the provider lists no such order (asked {time.strftime('%Y-%m-%d %H:%M')})"
            journal.note(row.id, reason, cost=0.0)
            result.absent.append(row.key)


def _foreign_rounds(journal: Journal, identity: Identity) -> set[int]:
    """Rounds whose jobs this teacher must not be handed."""
    own = {"teacher": identity.name, "teacher_version": identity.version, "settings": identity.settings}
    own = json.loads(canonical_json(own))
    return {one.generation for one in journal.rounds() if any(one.facts[name] != own[name] for name in own)}


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


@contextmanager
def writing(folder: Path) -> Iterator[Journal]:
    """The journal of a cache in which nobody else writes.  Raises UserError where somebody does."""
    with one_writer(folder / LOCK, f"cache {folder}"), closing(Journal(folder / JOURNAL)) as journal:
        yield journal


def journal_folders(folder: Path) -> list[Path]:
    """A cache and its parts, those that have a journal.  Raises UserError where there is none."""
    found = [own for own in (folder, *parts_of(folder)) if (own / JOURNAL).is_file()]
    if not found:
        raise UserError(f"{folder}: no {JOURNAL} in it. Name the folder of a cache, for example OUT/cache.")
    return found
