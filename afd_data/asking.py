"""One sample from the plan to the spool: submit, poll, fetch, check, keep; every step in the journal first.

Runs in worker threads.  What a teacher refuses, fails at or draws badly is a state with a reason, not an exception;
a UserError of the teacher (wrong key) ends the run.  Anything else that a teacher raises is a bug and ends the run,
except while a paid one is being asked: whether that request was charged cannot be told, so it becomes `unknown`.
"""

from __future__ import annotations

import hashlib
import logging
import threading

import numpy as np

from afd_data.acceptance import RejectedError, make_mp4, perceptual_hash, read_and_check, thumbnail
from afd_data.budget import Budget, Streak
from afd_data.config import DataConfig
from afd_data.errors import UserError
from afd_data.journal import Journal, Row
from afd_data.plan import canonical_json
from afd_data.sample import SCHEMA_VERSION, Sample
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

log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5  # between two polls; grows to cache.poll_s
MAX_REAL = 1e300  # seconds; "for ever" as SQLite can compare it


class Asker:
    """Brings samples of one recipe from one teacher into the spool.  Thread-safe as far as the teacher is."""

    def __init__(self, recipe: DataConfig, teacher: Teacher, journal: Journal, spool: Spool) -> None:
        self.stop = threading.Event()  # set: ask for nothing more, leave running jobs to the next command
        self.estimate = teacher.estimate(recipe.video)
        self.streak = Streak(recipe.cache.stop_after_failures)
        charged, reserved = journal.spend().get(teacher.identity.currency, (0.0, 0.0))
        self.budget = Budget(recipe.cache.max_cost, charged + reserved)
        self._recipe = recipe
        self._teacher = teacher
        self._identity = teacher.identity
        self._journal = journal
        self._spool = spool

    def ask(self, row: Row) -> None:
        """Carry one `planned` or already submitted sample as far as it goes.

        A planned one must have its estimate reserved in `budget`.
        """
        if self.stop.is_set() or self.streak.broken:
            self._give_back(row)
            return
        if self._adopt(row):
            return
        try:
            job_id = self._submit(row) if row.state == "planned" else self._journal.job_id(row.fingerprint)
            if self._wait(row, job_id):
                self._fetch(row, job_id)
        except RefusedError as error:
            self._end(row, "refused", _reason("refused", error), error.cost)
            self.streak.succeeded()  # it answers, and it reads what it is sent
        except FailedError as error:
            self._end(row, "failed", _reason("failed", error), error.cost)
            self.streak.failed(str(error))
        except (LostError, UnknownError) as error:
            word = "lost" if isinstance(error, LostError) else "no answer"
            if self._identity.paid:  # what it cost stays reserved
                self._journal.move(row.id, "unknown", reason=_reason(word, error))
            else:
                self._end(row, "failed", _reason(word, error), 0.0)
            self.streak.failed(str(error))
        except UnreachableError as error:
            log.warning("%s: left as it is for the next run: %s", row.key, error)
            self.streak.failed(str(error))

    def _end(self, row: Row, state: str, reason: str, cost: float, **columns: object) -> None:
        self._journal.move(row.id, state, reason=reason, cost=cost, **columns)
        self.budget.settle(self.estimate, cost)

    def _give_back(self, row: Row) -> None:
        if row.state == "planned":
            self.budget.settle(self.estimate, 0.0)

    def _adopt(self, row: Row) -> bool:
        """Take a video that was spooled before a crash and not yet recorded."""
        sample = self._spool.find(row)
        if sample is None:
            return False
        try:
            frames = read_and_check(self._spool.path(row, "mp4"), self._recipe.video, self._recipe.cache)
        except RejectedError:  # damaged since: ask again
            self._spool.drop((row.generation, row.key))
            return False
        if row.state == "planned":
            self._journal.move(row.id, "intent", estimate=self.estimate, currency=self._identity.currency)
            self._journal.move(row.id, "submitted")
        if row.state != "ready":
            self._journal.move(row.id, "ready")
        self._record(row, sample, frames, self._spool.path(row, "mp4").stat().st_mtime)
        return True

    def _submit(self, row: Row) -> str:
        """The job id.  Raises as the teacher does; whatever else it raises is UnknownError if it is a paid one."""
        self._journal.move(row.id, "intent", estimate=self.estimate, currency=self._identity.currency)
        try:
            job_id = self._teacher.submit(row.request(self._recipe.video))
        except (RefusedError, FailedError, UnknownError):
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

    def _wait(self, row: Row, job_id: str) -> bool:
        """Poll until the video is ready; False when the run is told to stop first."""
        if row.state == "ready":
            return True
        longest_s = self._recipe.cache.poll_s
        wait_s, running = min(FIRST_WAIT_S, longest_s), row.state == "running"
        while (progress := self._teacher.poll(job_id)).state != "ready":
            if progress.state == "running" and not running:
                self._journal.move(row.id, "running")
                running = True
            if self.stop.wait(wait_s):
                return False
            wait_s = min(1.5 * wait_s, longest_s)
        self._journal.move(row.id, "ready", fetch_before=min(progress.fetch_before, MAX_REAL))
        return True

    def _fetch(self, row: Row, job_id: str) -> None:
        video, draft = self._recipe.video, self._spool.path(row, "part.mp4")
        delivery = Delivery()
        try:
            delivery = self._teacher.fetch(job_id, row.request(video), draft)
            frames = read_and_check(draft, video, self._recipe.cache)
        except RejectedError as error:
            draft.unlink(missing_ok=True)
            self._end(row, "rejected", str(error), self._cost(delivery))
            return
        make_mp4(draft, frames, video, self._recipe.cache.audio)
        sample = self._sample(row, delivery, frames)
        self._record(row, sample, frames, self._spool.keep(row, sample))
        self.streak.succeeded()

    def _cost(self, delivery: Delivery) -> float:
        return self.estimate if delivery.cost is None else float(delivery.cost)

    def _record(self, row: Row, sample: Sample, frames: np.ndarray, created_at: float) -> None:
        looks = {"perceptual_hash": sample.perceptual_hash, "thumbnail": thumbnail(frames)}
        self._end(row, "spooled", "", sample.cost, created_at=created_at, **looks)

    def _sample(self, row: Row, delivery: Delivery, frames: np.ndarray) -> Sample:
        identity, video = self._identity, self._recipe.video
        mp4 = self._spool.path(row, "part.mp4").read_bytes()
        terms = {"terms_url": identity.terms_url} if identity.terms_url else {}
        return Sample(
            schema_version=SCHEMA_VERSION,
            key=row.key,
            prompt_id=row.prompt_id,
            prompt=row.prompt,
            split=row.split,
            take=row.take,
            generation=row.generation,
            fingerprint=row.fingerprint,
            seed=row.seed,
            teacher=identity.name,
            teacher_version=identity.version,
            requested_json=canonical_json({"settings": identity.settings, "video": video.model_dump()}),
            effective_json=canonical_json(delivery.effective),
            provenance_json=canonical_json(delivery.provenance | terms),
            world_json=canonical_json(delivery.world),
            licence=identity.licence,
            distillation=identity.distillation,
            cost=self._cost(delivery),
            currency=identity.currency,
            width=video.width,
            height=video.height,
            frames=video.frames,
            fps=float(video.fps),
            duration_s=video.frames / video.fps,
            video_sha256=hashlib.sha256(mp4).hexdigest(),
            perceptual_hash=perceptual_hash(frames),
        )


def _reason(word: str, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{word}: {text}"
