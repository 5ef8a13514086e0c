"""The `cache-teacher` stage: prompts -> teacher -> journal + spool -> sealed shards, index and card.

Resumable: the same command again finishes what is missing and asks for nothing twice.
Knows nothing of students or losses, and of a teacher only its Protocol.
"""

from __future__ import annotations

import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from afd_data.asking import Asker
from afd_data.card import write_card
from afd_data.config import DataConfig
from afd_data.errors import UserError
from afd_data.files import NO_ROOM, one_writer
from afd_data.index import update_index
from afd_data.journal import Journal, Row
from afd_data.plan import plan_samples, recipe_facts
from afd_data.progress import progress_bar
from afd_data.prompts import Prompt
from afd_data.sealing import Sealer
from afd_data.spool import Spool
from afd_data.states import IN_FLIGHT
from afd_data.teachers import Teacher

JOURNAL = "journal.sqlite"
LOCK = ".lock"
COMMIT_EVERY_S = 0.25  # records of a free teacher wait this long at most; what a crash loses is asked again


@dataclass(frozen=True)
class Summary:
    """What a cache holds after a run.  `reasons`: how often something was not taken, by the reason's first words."""

    folder: Path
    states: dict[str, int]
    reasons: dict[str, int]
    shards: int
    bytes: int

    @property
    def sealed(self) -> int:
        """Samples that a trainer can read."""
        return self.states.get("sealed", 0)

    def text(self) -> str:
        """For the terminal."""
        lines = [f"{self.folder}: {self.sealed} samples in {self.shards} shards, {self.bytes / 1e6:.1f} MB"]
        others = {state: count for state, count in self.states.items() if state != "sealed"}
        if others:
            lines.append("not in it: " + ", ".join(f"{count} {state}" for state, count in others.items()))
        lines += [f"  {count} x {reason}" for reason, count in self.reasons.items()]
        if self.states.get("unknown"):
            lines.append("  unknown: it cannot be told whether the teacher made and charged these; not asked again")
        return "\n".join(lines)


def cache_teacher(
    recipe: DataConfig, prompts: list[Prompt], folder: Path, teacher: Teacher, progress: bool = True
) -> Summary:
    """Ask the teacher for every video that the recipe wants and the cache `folder` lacks, and seal them.

    Raises UserError: another writer, a cache of another recipe, no room on the disk; KeyboardInterrupt after a clean
    stop on Ctrl-C.  Whatever ends it, the same call goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder / LOCK, f"cache {folder}"), _room_errors(folder):
        patience_s = 0.0 if teacher.identity.paid else COMMIT_EVERY_S
        journal = Journal(folder / JOURNAL, patience_s=patience_s)
        try:
            spool = Spool(folder / "spool")
            sealer = Sealer(folder, journal, spool, recipe.cache)
            _check_same_recipe(recipe, teacher, journal, folder)
            sealer.recover()
            _recover_requests(journal, spool, teacher.identity.paid)
            journal.plan(plan_samples(recipe, prompts, teacher.identity))
            _ask_all(Asker(recipe, teacher, journal, spool), journal, sealer, recipe.cache.workers, progress)
            sealer.finish()
            update_index(folder)
            write_card(folder, sealer.manifest, teacher.identity, recipe.video.model_dump())
            return summarise(folder, journal, sealer)
        finally:
            journal.close()


def summarise(folder: Path, journal: Journal, sealer: Sealer) -> Summary:
    """Count what there is."""
    reasons = Counter()
    rows = journal.select("SELECT reason, count(*) FROM samples WHERE reason != '' GROUP BY reason")
    for reason, count in rows:
        reasons[reason.partition(":")[0]] += count
    shards = sealer.manifest.shards
    return Summary(
        folder, journal.counts(), dict(reasons.most_common()), len(shards), sum(shard.bytes for shard in shards)
    )


def _check_same_recipe(recipe: DataConfig, teacher: Teacher, journal: Journal, folder: Path) -> None:
    """A cache holds the videos of one teacher, setting and seed, taken by one rule."""
    facts = recipe_facts(recipe, teacher.identity)
    facts |= {"cache": recipe.cache.model_dump(include={"frozen", "near_duplicate"})}
    known = journal.fact("recipe")
    if known is None:
        journal.set_fact("recipe", facts)
    elif isinstance(known, dict) and known != facts:
        changed = [
            f"{name} was {known.get(name)}, is now {facts[name]}" for name in facts if known.get(name) != facts[name]
        ]
        raise UserError(
            f"{folder} was made with other settings: {'; '.join(changed)}. "
            "Set them back, or cache into another folder with --set out=FOLDER."
        )


def _recover_requests(journal: Journal, spool: Spool, paid: bool) -> None:
    """Decide about requests that failed or that a crash cut off: free ones are asked again.

    Paid ones go on with their job.  Without a job id, those that failed are asked again, and those whose answer is not
    known become `unknown`.  Raises UserError when a paid video is gone from the spool.
    """
    for row in journal.rows(states=(*IN_FLIGHT, "failed", "spooled")):
        if row.state == "spooled":
            if spool.find(row) is None:
                if paid:
                    raise UserError(f"{spool.path(row, 'mp4')}: was paid for, spooled, and is gone. Put it back.")
                journal.move(row.id, "planned")
        elif not paid or (row.state == "failed" and not journal.job_id(row.fingerprint)):
            journal.move(row.id, "planned")
        elif row.state == "intent":
            journal.move(row.id, "unknown", reason="no answer: the run ended between the request and its answer")
    journal.flush()


def _ask_all(asker: Asker, journal: Journal, sealer: Sealer, workers: int, progress: bool) -> None:
    rows = journal.rows(states=("planned", "submitted", "running", "ready"))
    total = sum(journal.counts().get(state, 0) for state in ("planned", "submitted", "running", "ready"))
    bar = progress_bar(total, "video", "cache-teacher", disable=not progress, smoothing=0.05)
    with bar, _stop_on_interrupt(asker.stop, bar.write), ThreadPoolExecutor(workers, "teacher") as pool:
        in_flight: set[Future] = set()
        try:
            while _fill(pool, in_flight, rows, asker, 2 * workers) or in_flight:
                done, in_flight = wait(in_flight, timeout=COMMIT_EVERY_S, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                bar.update(len(done))
                sealer.advance()
                if not done:
                    journal.flush()
        except BaseException:
            asker.stop.set()
            raise
    if asker.stop.is_set():
        journal.flush()
        raise KeyboardInterrupt("stopped; the same command goes on from here")
    sealer.advance()


def _fill(pool: ThreadPoolExecutor, in_flight: set[Future], rows: Iterator[Row], asker: Asker, limit: int) -> bool:
    """Hand out work up to `limit`; whether anything was handed out."""
    before = len(in_flight)
    while len(in_flight) < limit and not asker.stop.is_set() and (row := next(rows, None)) is not None:
        in_flight.add(pool.submit(asker.ask, row))
    return len(in_flight) > before


@contextmanager
def _stop_on_interrupt(stop: threading.Event, say: Callable[[str], object]) -> Iterator[None]:
    """First Ctrl-C: finish what is in flight and stop.  Second: at once; the next run cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("Stopping after the videos in flight; the same command goes on from there. Ctrl-C again stops at once.")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
