"""One answer to a question for a video -> a whole video file, or an error that says which kind of nothing it was."""

from __future__ import annotations

from pathlib import Path

import requests

from afd_data.errors import UserError
from afd_data.teachers import UnreachableError
from afd_data.video import probe

CHUNK_BYTES = 2**20
GONE = (400, 401, 403, 404, 410)  # what stores answer to an address that has expired


class ExpiredError(Exception):
    """The address no longer leads to the video; another one may."""


def save(answer: requests.Response, target: Path, max_mb: float) -> None:
    """Write the streamed body of a 200 to `target` and check that it is a whole video; do nothing with another status.

    Raises ExpiredError (a status of GONE), UnreachableError (a page, truncated), requests.RequestException (broken
    off), UserError (larger than `max_mb` million bytes).
    """
    if answer.status_code in GONE:
        raise ExpiredError(f"{answer.status_code} {answer.reason}")
    if answer.status_code != 200:
        return
    size = 0
    with open(target, "wb") as file:
        for chunk in answer.iter_content(CHUNK_BYTES):
            size += len(chunk)
            if size > max_mb * 1e6:
                raise UserError(f"a video is larger than {max_mb:g} MB. Raise teacher.traffic.max_video_mb.")
            file.write(chunk)
    check_whole(target)


def check_whole(path: Path) -> None:
    """Raises UnreachableError unless the file is a video with all the frames that it declares."""
    try:
        facts = probe(path, "the download")
    except UserError as error:
        raise UnreachableError(str(error)) from None
    if facts.frames == 0 or facts.frames < facts.declared_frames:
        raise UnreachableError(f"the download is truncated: {facts.frames} of {facts.declared_frames} frames")
