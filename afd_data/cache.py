"""The `cache-teacher` stage: prompts -> teacher -> journal + spool -> sealed shards, index and card.

Resumable: the same command again finishes what is missing and asks for nothing twice.
Knows nothing of students or losses, and of a teacher only its Protocol.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from afd_data.asking import Asker
from afd_data.card import CARD, SHEET, write_card
from afd_data.config import DataConfig
from afd_data.errors import UserError
from afd_data.files import NO_ROOM, one_writer
from afd_data.index import update_index
from afd_data.journal import JOURNAL, LOCK, Journal, Row
from afd_data.origin import publish, set_origin
from afd_data.partition import Partition, check_parts
from afd_data.planning import plan_round
from afd_data.prompts import Prompt
from afd_data.pruning import prune_held
from afd_data.reconcile import GIVEN_UP
from afd_data.sealing import Sealer
from afd_data.shards import MANIFEST, read_manifest
from afd_data.spool import Spool
from afd_data.states import IN_FLIGHT, LOST
from afd_data.teachers import Teacher
from afd_data.work import COMMIT_EVERY_S, ask_all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a cache holds after a run.  `reasons`: how often something was not taken, by the reason's first words."""

    folder: Path
    states: dict[str, int]
    reasons: dict[str, int]
    shards: int
    bytes: int
    generation: int

    @property
    def sealed(self) -> int:
        """Samples that a trainer can read."""
        return self.states.get("sealed", 0)

    def text(self) -> str:
        """For the terminal."""
        newest = f", newest generation {self.generation}" if self.generation else ""
        lines = [f"{self.folder}: {self.sealed} samples in {self.shards} shards, {self.bytes / 1e6:.1f} MB{newest}"]
        others = {state: count for state, count in self.states.items() if state != "sealed"}
        if others:
            lines.append("not in it: " + ", ".join(f"{count} {state}" for state, count in others.items()))
        lines += [f"  {count} x {reason}" for reason, count in self.reasons.items()]
        if self.states.get("unknown", 0) > self.reasons.get(GIVEN_UP, 0):
            lines.append("  unknown: it cannot be told whether the teacher made and charged these; not asked again.")
            lines.append("  `afd cache reconcile RECIPE` asks the provider; `afd cache resubmit` orders again.")
        return "\n".join(lines)


def cache_teacher(
    recipe: DataConfig,
    prompts: list[Prompt],
    folder: Path,
    teacher: Teacher,
    progress: bool = True,
    refresh: bool = False,
    partition: Partition | None = None,
) -> Summary:
    """Ask the teacher for every video that the recipe wants and the cache `folder` lacks, and seal them.

    With `refresh`, finish the round that is going on, or where none is, ask anew for what the recipe's `refresh`
    section makes due.  With `partition`, do one share of the work in a folder of its own below `folder`.
    Raises UserError: another writer, a cache of another recipe, no room on the disk; KeyboardInterrupt after a clean
    stop on Ctrl-C.  Whatever ends it, the same call goes on from there.
    """
    own = folder if partition is None else partition.folder(folder)
    share = recipe if partition is None else partition.share_of(recipe, folder)
    own.mkdir(parents=True, exist_ok=True)
    with one_writer(own / LOCK, f"cache {own}"), _room_errors(own):
        check_parts(folder, partition)
        if share.cache.storage:
            set_origin(own, share.cache.storage)
        patience_s = 0.0 if teacher.identity.paid else COMMIT_EVERY_S
        journal = Journal(own / JOURNAL, patience_s=patience_s, mode=recipe.cache.journal)
        try:
            spool = Spool(own / "spool")
            sealer = Sealer(own, journal, spool, share.cache)
            sealer.recover()
            recover_requests(journal, spool, teacher.identity.paid)
            plan_round(recipe, prompts, teacher.identity, journal, sealer, refresh, partition)
            _do(Asker(share, teacher, journal, spool), journal, sealer, share.cache.workers, progress)
            if refresh and partition is None:
                _prune(own, sealer, recipe.refresh.keep_generations)
            return summarise(own, journal, sealer)
        finally:
            journal.close()


def _do(asker: Asker, journal: Journal, sealer: Sealer, workers: int, progress: bool) -> None:
    try:
        ask_all(asker, journal, sealer, workers, progress)
    except UserError:
        _finish(sealer)  # what was paid for so far can be trained on
        raise
    _finish(sealer)


def _finish(sealer: Sealer) -> None:
    sealer.finish()
    update_index(sealer.folder)
    if not _has_card(sealer.folder):
        write_card(sealer.folder)
    publish(sealer.folder)


def _has_card(folder: Path) -> bool:
    """Whether card and picture are there and younger than the manifest that they show."""
    try:
        card, sheet, manifest = ((folder / name).stat().st_mtime_ns for name in (CARD, SHEET, MANIFEST))
    except FileNotFoundError:
        return False
    return min(card, sheet) > manifest


def _prune(folder: Path, sealer: Sealer, keep_generations: int) -> None:
    if prune_held(folder, keep_generations):
        sealer.manifest = read_manifest(folder)
        write_card(folder)
        publish(folder)


def summarise(folder: Path, journal: Journal, sealer: Sealer) -> Summary:
    """Count what there is."""
    reasons = Counter()
    marks = ", ".join("?" * len(LOST))
    rows = journal.select(f"SELECT reason, count(*) FROM samples WHERE state IN ({marks}) GROUP BY reason", LOST)
    for reason, count in rows:
        reasons[reason.partition(":")[0]] += count
    shards = sealer.manifest.shards
    size = sum(shard.bytes for shard in shards)
    counts = dict(reasons.most_common())
    return Summary(folder, journal.counts(), counts, len(shards), size, sealer.manifest.generation)


def recover_requests(journal: Journal, spool: Spool, paid: bool) -> None:
    """Decide about requests that a crash cut off; those with a job id go on with their job.

    Without one, free requests are asked again, and paid ones whose answer is not known become `unknown`.  So it is with
    videos that were spooled and are gone or damaged, but that paid ones become `rejected`.
    """
    for row in journal.rows(states=(*IN_FLIGHT, "spooled")):
        if row.state == "spooled":
            if spool.find(row) is None:
                _note_loss(row, journal, spool, paid)
        elif row.state == "intent" and paid:
            journal.move(row.id, "unknown", reason="no answer: the run ended between the request and its answer")
        elif row.state == "intent" or not journal.job_id(row.fingerprint):
            journal.move(row.id, "planned")
    journal.flush()
    for name in spool.bare():
        state = journal.select("SELECT state FROM samples WHERE (generation, key) = (?, ?)", name)
        if state not in [[(one,)] for one in IN_FLIGHT]:
            spool.drop(name)


def _note_loss(row: Row, journal: Journal, spool: Spool, paid: bool) -> None:
    if not paid:
        journal.move(row.id, "planned")
        return
    what = "damaged" if spool.path(row, "mp4").exists() and spool.path(row, "json").exists() else "gone"
    log.error("%s: was paid for and spooled, and is %s; the run goes on without it", spool.path(row, "mp4"), what)
    journal.move(row.id, "rejected", reason=f"lost from the spool: {what}")


@contextmanager
def _room_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise _no_room(folder, error) from error
    except sqlite3.OperationalError as error:
        if "full" not in str(error) and "disk I/O" not in str(error):
            raise
        raise _no_room(folder, error) from error


def _no_room(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"{folder}: no room left on the disk ({error}). Nothing that was finished is lost: "
        "free some space and run the same command again."
    )
