"""One sample from the plan to the spool: submit, poll, fetch, check, keep; every step in the journal first.

Runs in worker threads.  What a teacher refuses, fails at or draws badly is a state with a reason, not an exception;
anything else that a teacher raises is a bug and ends the run, except while a paid one is being asked: whether that
request was charged cannot be told, so it becomes `unknown`.
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np

from afd_data.acceptance import RejectedError, make_mp4, perceptual_hash, read_and_check, thumbnail
from afd_data.config import DataConfig
from afd_data.errors import UserError
from afd_data.journal import Journal, Row
from afd_data.plan import canonical_json
from afd_data.sample import SCHEMA_VERSION, Sample
from afd_data.spool import Spool
from afd_data.teachers import Delivery, FailedError, RefusedError, Teacher

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 10.0  # between two polls


class Asker:
    """Brings samples of one recipe from one teacher into the spool.  Thread-safe as far as the teacher is."""

    def __init__(self, recipe: DataConfig, teacher: Teacher, journal: Journal, spool: Spool) -> None:
        self.stop = threading.Event()  # set: ask for nothing more, leave running jobs to the next command
        self._recipe = recipe
        self._teacher = teacher
        self._journal = journal
        self._spool = spool

    def ask(self, row: Row) -> None:
        """Carry one `planned` or already submitted sample as far as it goes."""
        if self.stop.is_set() or self._adopt(row):
            return
        try:
            job_id = self._submit(row) if row.state == "planned" else self._journal.job_id(row.fingerprint)
            if job_id is not None and self._wait(row, job_id):
                self._fetch(row, job_id)
        except RefusedError as error:
            self._journal.move(row.id, "refused", reason=_reason("refused", error))
        except FailedError as error:
            self._journal.move(row.id, "failed", reason=_reason("failed", error))

    def _adopt(self, row: Row) -> bool:
        """Take a video that was spooled before a crash and not yet recorded."""
        sample = self._spool.find(row)
        if sample is None:
            return False
        try:
            frames = read_and_check(self._spool.path(row, "mp4"), self._recipe.video, self._recipe.cache.frozen)
        except RejectedError:  # damaged since: ask again
            self._spool.drop((row.generation, row.key))
            return False
        if row.state == "planned":
            self._journal.move(row.id, "intent")
            self._journal.move(row.id, "submitted")
        if row.state != "ready":
            self._journal.move(row.id, "ready")
        self._record(row, frames, self._spool.path(row, "mp4").stat().st_mtime, sample.cost, sample.currency)
        return True

    def _submit(self, row: Row) -> str | None:
        """The job id; None when the outcome is unknown."""
        self._journal.move(row.id, "intent")
        try:
            job_id = self._teacher.submit(row.request(self._recipe.video))
        except (RefusedError, FailedError):
            raise
        except Exception as error:
            if not self._teacher.identity.paid:
                raise
            self._journal.move(row.id, "unknown", reason=_reason("no answer", error))
            return None
        self._journal.move(row.id, "submitted", job_id=job_id)
        return job_id

    def _wait(self, row: Row, job_id: str) -> bool:
        """Poll until the video is ready; False when the run is told to stop first."""
        if row.state == "ready":
            return True
        wait_s, running = FIRST_WAIT_S, row.state == "running"
        while self._teacher.poll(job_id) == "running":
            if not running:
                self._journal.move(row.id, "running")
                running = True
            if self.stop.wait(wait_s):
                return False
            wait_s = min(1.5 * wait_s, LONGEST_WAIT_S)
        self._journal.move(row.id, "ready")
        return True

    def _fetch(self, row: Row, job_id: str) -> None:
        video, draft = self._recipe.video, self._spool.path(row, "part.mp4")
        delivery = Delivery()
        try:
            try:
                delivery = self._teacher.fetch(job_id, row.request(video), draft)
            except UserError as error:  # a source that the teacher cannot read
                raise RejectedError(f"undecodable: {error}") from None
            frames = read_and_check(draft, video, self._recipe.cache.frozen)
        except RejectedError as error:
            draft.unlink(missing_ok=True)
            self._journal.move(row.id, "rejected", reason=str(error), cost=delivery.cost, currency=delivery.currency)
            return
        make_mp4(draft, frames, video)
        created_at = self._spool.keep(row, self._sample(row, delivery, frames))
        self._record(row, frames, created_at, delivery.cost, delivery.currency)

    def _record(self, row: Row, frames: np.ndarray, created_at: float, cost: float, currency: str) -> None:
        self._journal.move(
            row.id,
            "spooled",
            perceptual_hash=perceptual_hash(frames),
            thumbnail=thumbnail(frames),
            created_at=created_at,
            cost=cost,
            currency=currency,
        )

    def _sample(self, row: Row, delivery: Delivery, frames: np.ndarray) -> Sample:
        identity, video = self._teacher.identity, self._recipe.video
        mp4 = self._spool.path(row, "part.mp4").read_bytes()
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
            provenance_json=canonical_json(delivery.provenance),
            world_json=canonical_json(delivery.world),
            licence=identity.licence,
            distillation=identity.distillation,
            cost=float(delivery.cost),
            currency=delivery.currency,
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
