"""Leases: what trainers that run on a cache still read, so that pruning leaves it there.

    CACHE/leases/<run>.json   {generations, shards, holder, host, pid, renewed_at}

A lease counts for KEPT_S after it was last renewed.  A run that ends well removes its lease; one that was stopped or
killed leaves it, so that its checkpoint can be resumed for that long.  A run that reads a cache at an address puts its
lease there too, for the owner to see.  Where that cannot be written (nor can the Hub, whose tags keep what was pushed)
there is no lease: its owner may prune what is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from afd_data.errors import UserError
from afd_data.files import atomic_write
from afd_data.origin_record import read_origin
from afd_data.storage import Storage, open_storage

log = logging.getLogger(__name__)

LEASES = "leases"
RENEW_S = 30.0  # at most so often
RENEW_AT_ORIGIN_S = 900.0
KEPT_S = 24 * 3600.0
MAX_BYTES = 2**24  # of a lease; what is larger was not written by afd
LEASE_FILE = re.compile(rf"{LEASES}/[\w-]+\.json")


class Lease:
    """One run's hold on the views of some generations, and on shards by name.

    A run that is resumed on the same machine takes its own again.

    `holder` tells runs apart (the run's folder); its last two components are written down.  `earlier`: generations that
    older checkpoints of the run read.
    """

    def __init__(
        self, folder: Path, generation: int, holder: str, earlier: Iterable[int] = (), shards: Iterable[str] = ()
    ) -> None:
        self._host = socket.gethostname()
        name = hashlib.sha256(f"{self._host}/{holder}".encode()).hexdigest()[:16]
        self.path = folder / LEASES / f"{name}.json"
        self._holder = "/".join(Path(holder).parts[-2:])
        self._failed = self._far_failed = False
        self._far = _place_of_leases(folder)
        self.hold([generation, *earlier], shards)

    def hold(self, generations: Iterable[int], shards: Iterable[str] = ()) -> None:
        """From now on the lease is on the views of these generations and on these shards, and on no others.

        Both, as a generation may get samples later that hide others.
        """
        self.generations, self.shards = sorted(set(generations)), sorted(set(shards))
        self._write()
        self._send()

    def renew(self) -> None:
        """Between steps; writes only where the last time is RENEW_S ago."""
        if time.monotonic() - self._written >= RENEW_S:
            self._write()
        if time.monotonic() - self._sent >= RENEW_AT_ORIGIN_S:
            self._send()

    def release(self) -> None:
        """The run has ended, and reads nothing any more."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)
        if self._far is not None:
            try:
                self._far.remove(f"{LEASES}/{self.path.name}")
            except (UserError, OSError) as error:
                self._tell(self._far, error)

    def _write(self) -> None:
        self._written = time.monotonic()
        about = {
            "generations": self.generations,
            "shards": self.shards,
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

    def _send(self) -> None:
        self._sent = time.monotonic()
        if self._far is None:
            return
        try:
            self._far.send(self.path, f"{LEASES}/{self.path.name}")
        except (UserError, OSError) as error:
            self._tell(self._far, error)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            log.warning(f"{self.path}: no lease can be kept ({error.strerror}); what is read may be pruned meanwhile")
        self._failed = True

    def _tell(self, far: Storage, error: Exception) -> None:
        if not self._far_failed:
            log.info(f"{far.url}: no lease can be kept there; what is read may be pruned meanwhile ({error})")
        self._far_failed = True


def live_generations(folder: Path, now: float | None = None) -> set[int]:
    """Generations whose views must stay readable at `now` (seconds since 1970): those of all leases that count.

    Leases in the folder and at its origin.  Files that are no leases count for nothing.  Raises UserError where one
    cannot be read, so that it is not known what it holds.
    """
    return {generation for about in _live(folder, now) for generation in about["generations"]}


def live_shards(folder: Path, now: float | None = None) -> set[str]:
    """Names of shards that must stay at `now`; otherwise as `live_generations`."""
    return {file for about in _live(folder, now) for file in about["shards"]}


def _live(folder: Path, now: float | None) -> Iterator[dict[str, Any]]:
    now = time.time() if now is None else now
    for data in (*_local(folder), *_at_origin(folder)):
        about = _parsed(data)
        # A time far ahead is not one of ours; a little ahead is another machine's clock.
        if about is not None and abs(now - about["renewed_at"]) < KEPT_S:
            yield about


def _place_of_leases(folder: Path) -> Storage | None:
    """Where leases are put beside the folder of a head; the owner's own folder is where the owner looks."""
    origin = read_origin(folder)
    if origin is None or origin.writer or origin.url.startswith("hf://"):
        return None
    return open_storage(origin.url)


def _local(folder: Path) -> Iterator[bytes]:
    for path in sorted((folder / LEASES).glob("*.json")):
        try:
            if not path.is_symlink() and path.is_file() and path.stat().st_size <= MAX_BYTES:
                yield path.read_bytes()
        except FileNotFoundError:  # released meanwhile
            pass
        except OSError as error:
            raise UserError(
                f"{path}: a lease that cannot be read ({error.strerror}), so nothing is pruned. Mend or remove it."
            ) from None


def _at_origin(folder: Path) -> Iterator[bytes]:
    origin = read_origin(folder)
    if origin is None:
        return
    storage = open_storage(origin.url)
    for file, size in storage.sizes(LEASES).items():
        if LEASE_FILE.fullmatch(file) and size <= MAX_BYTES:
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                yield storage.read(file, 0, MAX_BYTES)


def _parsed(data: bytes) -> dict[str, Any] | None:
    """A lease as its writer wrote it; None for anything else that lay there."""
    try:
        about = json.loads(data)
        generations, renewed_at = about["generations"], about["renewed_at"]
        shards = about.get("shards", [])
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    whole = isinstance(generations, list) and all(type(number) is int and number >= 0 for number in generations)
    named = isinstance(shards, list) and all(type(file) is str for file in shards)
    return {**about, "shards": shards} if whole and named and type(renewed_at) in (int, float) else None
