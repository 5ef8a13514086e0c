"""One answer to a question for a video -> a whole video file, or an error that says which kind of nothing it was."""

from __future__ import annotations

from pathlib import Path

import requests

from afd_data.acceptance import RejectedError
from afd_data.errors import UserError
from afd_data.provider_config import TrafficConfig
from afd_data.teachers import LostError, UnreachableError
from afd_data.teachers.traffic import backoff_s
from afd_data.video import probe

CHUNK_BYTES = 2**20
HEAD = 64  # bytes that tell a page from a video
GONE = (400, 401, 403, 404, 410)  # what stores answer to an address that has expired


class ExpiredError(Exception):
    """The address no longer leads to the video; another one may."""


class NoVideoError(UnreachableError):
    """What came is as long as was announced, is no page of text either, and still no whole video."""


class Tries:
    """Those of one download: what went wrong so far, and how long to wait (seconds) before the next one."""

    def __init__(self, traffic: TrafficConfig) -> None:
        self._traffic = traffic
        self._failed = self._expired = 0

    def failed(self, said: str, whole: bool = False) -> float:
        """`whole`: it was a NoVideoError.

        After the last try raises RejectedError for such a file, else UnreachableError.
        """
        self._failed += 1
        if self._failed < self._traffic.attempts:
            return backoff_s(self._failed - 1, self._traffic.longest_wait_s)
        if whole:
            raise RejectedError(f"undecodable: {said}") from None
        raise UnreachableError(f"not downloaded in {self._failed} tries: {said}") from None

    def expired(self, said: str) -> float:
        """The first time another address is asked for at once.  Raises LostError after the last try."""
        self._expired += 1
        if self._expired == max(2, self._traffic.attempts):
            raise LostError(f"the video is no longer there: {said}") from None
        return backoff_s(self._expired - 2, self._traffic.longest_wait_s) if self._expired > 1 else 0.0


def save(answer: requests.Response, target: Path, max_mb: float) -> None:
    """Write the streamed body of a 200 to `target` and check that it is a whole video; do nothing with another status.

    Raises ExpiredError (a status of GONE), NoVideoError, UnreachableError (a page, truncated),
    requests.RequestException (broken off), UserError (larger than `max_mb` million bytes).
    """
    if answer.status_code in GONE:
        raise ExpiredError(f"{answer.status_code} {answer.reason}")
    if answer.status_code != 200:
        return
    size, head = 0, b""
    with open(target, "wb") as file:
        for chunk in answer.iter_content(CHUNK_BYTES):
            size, head = size + len(chunk), head or chunk[:HEAD]
            if size > max_mb * 1e6:
                raise UserError(f"a video is larger than {max_mb:g} MB. Raise teacher.traffic.max_video_mb.")
            file.write(chunk)
    try:
        check_whole(target)
    except UnreachableError as error:
        # An answer without a length ends where the connection does, which may be too early.
        announced = "Content-Length" in answer.headers or "chunked" in answer.headers.get("Transfer-Encoding", "")
        if announced and head and not head.lstrip().startswith((b"<", b"{")):
            raise NoVideoError(str(error)) from None
        raise


def check_whole(path: Path) -> None:
    """Raises UnreachableError unless the file is a video with all the frames that it declares."""
    try:
        facts = probe(path, "the download")
    except UserError as error:
        raise UnreachableError(str(error)) from None
    if facts.frames == 0 or facts.frames < facts.declared_frames:
        raise UnreachableError(f"the download is truncated: {facts.frames} of {facts.declared_frames} frames")
