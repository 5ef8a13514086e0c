"""One sample from the plan to the spool: submit, poll, fetch, check, keep; every step in the journal first.

Runs in worker threads.  What a teacher refuses, fails at or draws badly is a state with a reason, not an exception;
a UserError of the teacher (wrong key) ends the run.  Anything else that a teacher raises is a bug and ends the run,
except while a paid one is being asked: whether that request was charged cannot be told, so it becomes `unknown`.
A job that takes longer than `cache.longest_job_hours` is given up likewise, as what follows it cannot be sealed before.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from dataclasses import replace

from afd_data.acceptance import RejectedError, make_mp4, perceptual_hash, read_and_check, thumbnail
from afd_data.budget import Streak, booked, open_budget
from afd_data.config import DataConfig
from afd_data.errors import UserError
from afd_data.journal import Attempt, Journal, Row
from afd_data.record import reason_of, sample_of
from afd_data.sample import Sample
from afd_data.spool import Spool
from afd_data.teachers import (
    Delivery,
    FailedError,
    LostError,
    RefusedError,
    Teacher,
    UnknownError,
    UnreachableError,
)
from afd_data.video import Video

log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5  # between two polls; grows to cache.poll_s
MAX_REAL = 1e300  # seconds; "for ever" as SQLite can compare it


class _OverdueError(Exception):
    """A job of which nothing came for too long."""


class Asker:
    """Brings samples of one recipe from one teacher into the spool.  Thread-safe as far as the teacher is.

    Raises UserError when `cache.max_cost` cannot be kept: no price is known, or money of another currency was spent.
    """

    def __init__(self, recipe: DataConfig, teacher: Teacher, journal: Journal, spool: Spool) -> None:
        self.stop = threading.Event()  # set by `halt`: leave running jobs to the next command
        self.streak = Streak(recipe.cache.stop_after_failures)
        self.budget = open_budget(recipe.cache.max_cost, teacher.estimate(recipe.video), teacher.identity, journal)
        self._no_orders = threading.Event()  # set too when the streak breaks, while running jobs go on
        self._recipe = recipe
        self._teacher = teacher
        self._identity = teacher.identity
        self._journal = journal
        self._spool = spool

    def halt(self) -> None:
        """Ask for nothing more, and leave running jobs to the next command."""
        self.stop.set()
        self._no_orders.set()

    def ask(self, row: Row) -> None:
        """Carry one `planned` or already submitted sample as far as it goes.

        The price of a planned one must be reserved in `budget`.
        """
        if self.stop.is_set() or self.streak.broken:
            self._give_back(row)
            return
        new = row.state == "planned"
        attempt = Attempt(estimate=self.budget.price) if new else self._journal.last_attempt(row.fingerprint)
        if self._adopt(row, attempt):
            return
        try:
            self._carry(row, attempt)
        except RefusedError as error:
            self._end(row, attempt, "refused", reason_of("refused", error, self._spool.folder), error.cost)
            self.streak.succeeded()  # it answers, and it reads what it is sent
        except FailedError as error:
            self._end(row, attempt, "failed", reason_of("failed", error, self._spool.folder), error.cost)
            self._failed(error)
        except LostError as error:
            if not self._recover(row, attempt):
                self._lose(row, attempt, "lost", error)
        except (UnknownError, _OverdueError) as error:
            self._lose(row, attempt, "no answer" if isinstance(error, UnknownError) else "overdue", error)
        except UnreachableError as error:
            self._failed(error)
            if self._is_overdue(attempt):
                self._lose(row, attempt, "overdue", _OverdueError(str(error)))
            else:
                log.warning("%s: left as it is for the next run: %s", row.key, error)

    def _carry(self, row: Row, attempt: Attempt) -> None:
        if row.state == "planned":
            if not self._teacher.turn(self._no_orders) or self._no_orders.is_set():
                self._give_back(row)
                return
            if (job_id := self._submit(row, attempt)) is None:
                return
            attempt = replace(attempt, job_id=job_id, submitted_at=time.time())
        if self._wait(row, attempt):
            self._fetch(row, attempt)

    def _failed(self, error: Exception) -> None:
        self.streak.failed(str(error))
        if self.streak.broken:
            self._no_orders.set()

    def _lose(self, row: Row, attempt: Attempt, word: str, error: Exception) -> None:
        """No video comes of it; what a paid one costs stays reserved."""
        if self._identity.paid:
            self._journal.move(row.id, "unknown", reason=reason_of(word, error, self._spool.folder))
        else:
            self._end(row, attempt, "failed", reason_of(word, error, self._spool.folder), 0.0)
        if not isinstance(error, _OverdueError):
            self._failed(error)

    def _end(self, row: Row, attempt: Attempt, state: str, reason: str, told: float | None, **columns: object) -> None:
        """told: what the teacher says that it charged, None where it says nothing."""
        cost = booked(told, attempt.estimate, self._identity.paid)
        self._journal.move(row.id, state, reason=reason, cost=cost, **columns)
        if row.state == "planned":
            self.budget.settle(cost or 0.0)
        else:
            self.budget.correct(attempt.estimate, cost or 0.0)

    def _give_back(self, row: Row) -> None:
        if row.state == "planned":
            self.budget.settle(0.0)

    def _adopt(self, row: Row, attempt: Attempt) -> bool:
        """Take a video that was spooled before a crash and not yet recorded."""
        sample = self._spool.find(row)
        if sample is None:
            return False
        try:
            found = read_and_check(self._spool.path(row, "mp4"), self._recipe.video, self._recipe.cache)
        except RejectedError:  # damaged since: ask again
            self._spool.drop((row.generation, row.key))
            return False
        if row.state == "planned":
            self._journal.move(row.id, "intent", estimate=attempt.estimate, currency=self._identity.currency)
            self._journal.move(row.id, "submitted")
        if row.state != "ready":
            self._journal.move(row.id, "ready")
        self._record(row, attempt, sample, found, self._spool.path(row, "mp4").stat().st_mtime, sample.cost or None)
        return True

    def _recover(self, row: Row, attempt: Attempt) -> bool:
        """Take a video that was complete when a run died before it could say so, as the teacher has it no more."""
        bare, draft = self._spool.path(row, "mp4"), self._spool.path(row, "part.mp4")
        if not bare.exists():
            return False
        shutil.copyfile(bare, draft)
        if self._journal.select("SELECT state FROM samples WHERE id = ?", (row.id,)) != [("ready",)]:
            self._journal.move(row.id, "ready")
        self._take(row, attempt, Delivery(effective={"recovered": True}, provenance={"job": attempt.job_id}))
        return True

    def _submit(self, row: Row, attempt: Attempt) -> str | None:
        """The job id; None when told to stop before it was ordered.

        Raises as the teacher does; whatever else it raises is UnknownError if it is a paid one.
        """
        self._journal.move(row.id, "intent", estimate=attempt.estimate, currency=self._identity.currency)
        try:
            job_id = self._teacher.submit(row.request(self._recipe.video))
        except FailedError as error:
            if not self._no_orders.is_set() or error.cost != 0:
                raise
            self._journal.move(row.id, "planned")
            self._give_back(row)
            return None
        except (RefusedError, UnknownError):
            raise
        except UserError:  # it takes no orders, so it took none
            self._journal.move(row.id, "planned")
            self._give_back(row)
            raise
        except Exception as error:
            if not self._identity.paid:
                raise
            raise UnknownError(f"{type(error).__name__}: {error}") from error
        self._journal.move(row.id, "submitted", job_id=job_id)
        return job_id

    def _is_overdue(self, attempt: Attempt) -> bool:
        age_s = time.time() - attempt.submitted_at
        return attempt.submitted_at > 0 and age_s > 3600 * self._recipe.cache.longest_job_hours

    def _wait(self, row: Row, attempt: Attempt) -> bool:
        """Poll until the video is ready; False when the run is told to stop first."""
        if row.state == "ready":
            return True
        longest_s = self._recipe.cache.poll_s
        wait_s, running = min(FIRST_WAIT_S, longest_s), row.state == "running"
        while (progress := self._teacher.poll(attempt.job_id)).state != "ready":
            if progress.state == "running" and not running:
                self._journal.move(row.id, "running")
                running = True
            if self._is_overdue(attempt):
                raise _OverdueError(f"{progress.state} for more than {self._recipe.cache.longest_job_hours:g} hours")
            if self.stop.wait(wait_s):
                return False
            wait_s = min(1.5 * wait_s, longest_s)
        self._journal.move(row.id, "ready", fetch_before=min(progress.fetch_before, MAX_REAL))
        return True

    def _fetch(self, row: Row, attempt: Attempt) -> None:
        draft = self._spool.path(row, "part.mp4")
        try:
            delivery = self._teacher.fetch(attempt.job_id, row.request(self._recipe.video), draft)
        except RejectedError as error:
            self._reject(row, attempt, error, error.cost)
            return
        self._take(row, attempt, delivery)

    def _take(self, row: Row, attempt: Attempt, delivery: Delivery) -> None:
        """Check the draft and keep it, or turn it down."""
        video, draft = self._recipe.video, self._spool.path(row, "part.mp4")
        try:
            found = read_and_check(draft, video, self._recipe.cache)
        except RejectedError as error:
            self._reject(row, attempt, error, delivery.cost)
            return
        make_mp4(draft, found, video, self._recipe.cache.audio)
        cost = booked(delivery.cost, attempt.estimate, self._identity.paid) or 0.0
        look = perceptual_hash(found.frames)
        sample = sample_of(row, delivery, cost, self._identity, video, draft.read_bytes(), look)
        self._record(row, attempt, sample, found, self._spool.keep(row, sample), delivery.cost)
        self.streak.succeeded()

    def _reject(self, row: Row, attempt: Attempt, error: RejectedError, told: float | None) -> None:
        self._spool.path(row, "part.mp4").unlink(missing_ok=True)
        self._end(row, attempt, "rejected", reason_of("", error, self._spool.folder), told)
        if self._identity.paid:  # a folder may be full of clips that are too short
            self._failed(error)

    def _record(
        self, row: Row, attempt: Attempt, sample: Sample, found: Video, created_at: float, told: float | None
    ) -> None:
        looks = {"perceptual_hash": sample.perceptual_hash, "thumbnail": thumbnail(found.frames)}
        self._end(row, attempt, "spooled", "", told, created_at=created_at, **looks)
