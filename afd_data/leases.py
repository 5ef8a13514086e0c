"""Leases: what trainers that run on a cache still read, so that pruning leaves it there.

    CACHE/leases/<run>.json   {generations, holder, host, pid, renewed_at}

A lease counts for KEPT_S after it was last renewed.  A run that ends well removes its lease; one that was stopped or
killed leaves it, so that its checkpoint can be resumed for that long.  Where the cache cannot be written there is no
lease: its owner may prune what is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from afd_data.files import atomic_write

log = logging.getLogger(__name__)

LEASES = "leases"
RENEW_S = 30.0  # at most so often
KEPT_S = 24 * 3600.0
MAX_BYTES = 64 * 2**10  # of a lease; what is larger was not written by afd


class Lease:
    """One run's hold on the views of some generations; a run that is resumed on the same machine takes its own again.

    `holder` tells runs apart (the run's folder); its last two components are written down.
    """

    def __init__(self, folder: Path, generation: int, holder: str) -> None:
        self._host = socket.gethostname()
        name = hashlib.sha256(f"{self._host}/{holder}".encode()).hexdigest()[:16]
        self.path = folder / LEASES / f"{name}.json"
        self._holder = "/".join(Path(holder).parts[-2:])
        self._failed = False
        self.hold([generation])

    def hold(self, generations: Iterable[int]) -> None:
        """From now on the lease is on the views of these generations, and of no others."""
        self.generations = sorted(set(generations))
        self._write()

    def renew(self) -> None:
        """Between steps; writes only where the last time is RENEW_S ago."""
        if time.monotonic() - self._written >= RENEW_S:
            self._write()

    def release(self) -> None:
        """The run has ended, and reads nothing any more."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def _write(self) -> None:
        self._written = time.monotonic()
        about = {
            "generations": self.generations,
            "holder": self._holder,
            "host": self._host,
            "pid": os.getpid(),
            "renewed_at": time.time(),
        }
        try:
            self.path.parent.mkdir(exist_ok=True)
            with atomic_write(self.path, "w") as file:
                json.dump(about, file)
        except OSError as error:  # a full or read-only disk stops no training
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            log.warning(f"{self.path}: no lease can be kept ({error.strerror}); what is read may be pruned meanwhile")
        self._failed = True


def live_generations(folder: Path, now: float | None = None) -> set[int]:
    """Generations whose views must stay readable at `now` (seconds since 1970): those of all leases that count.

    Files that are no leases count for nothing.
    """
    now = time.time() if now is None else now
    found: set[int] = set()
    for path in sorted((folder / LEASES).glob("*.json")):
        about = _read(path)
        # A time far ahead is not one of ours; a little ahead is another machine's clock.
        if about is not None and abs(now - about["renewed_at"]) < KEPT_S:
            found.update(about["generations"])
    return found


def _read(path: Path) -> dict[str, Any] | None:
    """A lease as its writer wrote it; None for anything else that lies there."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        about = json.loads(path.read_bytes())
        generations, renewed_at = about["generations"], about["renewed_at"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    whole = isinstance(generations, list) and all(type(number) is int and number >= 0 for number in generations)
    return about if whole and type(renewed_at) in (int, float) else None
