"""Files that are either complete or absent, and folders with one writer.

A file under its final name is complete: it is written beside it as `NAME.part`, fsynced, renamed, and the rename itself
is made durable by fsyncing the folder.  Whatever dies in between leaves a `.part` that nobody reads.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from afd_data.errors import UserError

PART = ".part"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file-size limit of the shell


def fsync_file(path: Path) -> None:
    """Make the content of a written and closed file durable.  Raises OSError."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make names created, renamed or removed in `folder` durable.  Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open `path` for writing so that it appears complete and durable when the block ends, or not at all.

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
    fsync_folder(path.parent)


@contextmanager
def one_writer(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` exclusively; the system releases it however the process ends.

    Raises UserError when another process holds it; `what` is the subject of the message.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"{what}: another afd process (pid {holder}) is writing here. "
                "Wait until it has ended, or write to another folder with --set out=FOLDER."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
