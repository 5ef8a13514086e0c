"""Copies of remote members on the local disk, by their sha256, up to a number of bytes; the longest unused go first.

Several processes share the folder: a copy appears under its name complete, and one that another process took away is
simply read again.  What is read here is compared with its hash by whoever asked, and dropped when it is another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from functools import lru_cache
from pathlib import Path

from afd_data.sample import SHA256

SLACK = 0.9  # of the limit is left after clearing, so that not every new copy clears again
LOOK = 0.02  # of the limit is written before a process looks again at what all of them wrote
LEFT_S = 3600.0  # an unfinished copy of this age belongs to nobody any more


@lru_cache(maxsize=8)
def open_disk_cache(folder: Path, limit_bytes: int) -> DiskCache:
    """One for all readers of a process, as they count together what they write."""
    return DiskCache(folder, limit_bytes)


class DiskCache:
    """Copies below `folder`, which is made when the first one comes.

    The limit holds for all processes that use the same one, give or take LOOK of it for each.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._unseen: float = limit_bytes  # bytes written since the last look; at first nothing is known
        self._lock = threading.Lock()

    def get(self, sha256: str) -> bytes | None:
        """The copy with that hash, or None.  A damaged one is dropped."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == sha256:
                os.utime(path)
                return data
            path.unlink()
        except OSError:  # never there, taken away meanwhile, or not to be read
            pass
        return None

    def put(self, sha256: str, data: bytes) -> None:
        """Keep a copy if there is room; a disk that is full or read-only only makes the next reading slower."""
        path = self._path(sha256)
        part = path.with_name(f"{sha256}.{os.getpid()}-{threading.get_ident()}.part")
        if len(data) > self.limit_bytes:
            return
        try:
            self._make_room(len(data))
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            os.replace(part, path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        assert SHA256.fullmatch(sha256), sha256  # a damaged copy is removed
        return self.folder / sha256[:2] / sha256

    def _make_room(self, size: int) -> None:
        with self._lock:
            self._unseen += size
            if self._unseen < LOOK * self.limit_bytes:
                return
            self._unseen = 0
            self._clear(self.limit_bytes - size)

    def _clear(self, limit: float) -> None:
        """Remove what has not been used for longest when there are more bytes than `limit`."""
        found = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                if path.suffix == ".part" and facts.st_mtime < time.time() - LEFT_S:
                    path.unlink()
                else:
                    found.append((facts.st_mtime, facts.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= limit:
            return
        for _, size, path in sorted(found):
            if total <= SLACK * limit:
                return
            path.unlink(missing_ok=True)
            total -= size
