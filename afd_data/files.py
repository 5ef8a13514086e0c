"""Files that are either complete or absent, and folders with one writer.

A file under its final name is complete: it is written beside it as `NAME.part`, fsynced, renamed, and the rename itself
is made durable by fsyncing the folder.  Whatever dies in between leaves a `.part` that nobody reads.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from afd_data.errors import UserError

PART = ".part"
OLD = ".old"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file-size limit of the shell


def fsync(path: Path) -> None:
    """Make durable the content of a closed file, or the names in a folder.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """64 hex digits.  Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path, mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Open `path` for writing bytes or UTF-8 text: it appears complete and durable when the block ends, or not.

    The folder must exist.  When the block raises, the old file (if any) stays as it was.
    """
    part = path.with_name(path.name + PART)
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(part, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield another path to write to: what lies there becomes `path` when the block ends, or is removed.

    Not made durable: for what can be made again.
    """
    part = path.with_name(path.name + PART)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to put files in: it becomes `folder`, complete and durable, when the block ends, or not.

    A `folder` of that name is replaced, and kept as `NAME.old` while its name changes hands.  Missing parents are made.
    """
    part, old = folder.with_name(folder.name + PART), folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in [*part.rglob("*"), part]:
            fsync(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def one_writer(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` exclusively; the system releases it however the process ends.

    Raises UserError when another process holds it; `what` is the subject of the message.
    """
    with open(path, "a+", encoding="utf-8") as file:
        if not _lock(file, fcntl.LOCK_EX, patience_s=1.0):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"{what}: another afd process (pid {holder}) is writing here. Wait until it has ended, or stop it."
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_held(path: Path) -> bool:
    """Whether some process is inside `one_writer` of this lock file now."""
    try:
        with open(path, encoding="utf-8") as file:
            # Shared, as NFS gives an exclusive one only to files that are open for writing.
            return not _lock(file, fcntl.LOCK_SH, patience_s=0.0)
    except FileNotFoundError:
        return False


def _lock(file: IO[str], kind: int, patience_s: float) -> bool:
    """Whether the lock could be had; with patience, as `is_held` of another process holds it for an instant."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
