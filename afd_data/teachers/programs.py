"""Programs that run in sessions of their own, so that Ctrl-C lets them finish, and how to end them all at once."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_running: set[int] = set()  # process ids, which are those of their sessions
_changing = threading.Lock()


@contextmanager
def watched(process: subprocess.Popen) -> Iterator[None]:
    """While it runs, `kill_all` ends it; `process` must have been started with `start_new_session`."""
    with _changing:
        _running.add(process.pid)
    try:
        yield
    finally:
        with _changing:
            _running.discard(process.pid)


def kill(process_id: int) -> None:
    """End a program and all that it started in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)


def kill_all() -> None:
    """For a process that ends without waiting for its threads.  May be called by a signal's handler: takes no lock."""
    for process_id in tuple(_running):
        kill(process_id)
