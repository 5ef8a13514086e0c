"""The journal's file: its tables, its version, and how SQLite is opened for it.

Write-ahead logging needs memory that all processes share, which network file systems do not give: there SQLite's
rollback mode is used.  Every commit is on disk when it returns (`synchronous = FULL`).
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Literal

from afd_data.errors import UserError

SCHEMA_VERSION = 2
Mode = Literal["auto", "wal", "rollback"]
NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gluster", "beegfs", "gpfs", "afs", "fuse", "virtiofs")
PATIENCE_S = 30.0  # for another process's commit
WAL_HEADER = b"\x02\x02"  # bytes 18 and 19 of a file in write-ahead mode

SCHEMA = f"""
CREATE TABLE facts (name TEXT PRIMARY KEY, value_json TEXT NOT NULL);
CREATE TABLE rounds (
    generation INTEGER PRIMARY KEY, facts_json TEXT NOT NULL, why_json TEXT NOT NULL,
    started_at REAL NOT NULL, finished_at REAL NOT NULL DEFAULT 0.0);
CREATE TABLE samples (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, generation INTEGER NOT NULL, split TEXT NOT NULL,
    prompt_id TEXT NOT NULL, prompt TEXT NOT NULL, take INTEGER NOT NULL, seed INTEGER NOT NULL,
    fingerprint TEXT NOT NULL UNIQUE, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
    shard TEXT NOT NULL DEFAULT '', perceptual_hash TEXT NOT NULL DEFAULT '', thumbnail BLOB NOT NULL DEFAULT x'',
    created_at REAL NOT NULL DEFAULT 0.0,
    UNIQUE (generation, key));
CREATE INDEX samples_by_state ON samples (state, id);
CREATE TABLE requests (
    id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, job_id TEXT NOT NULL DEFAULT '', state TEXT NOT NULL,
    intent_at REAL NOT NULL, submitted_at REAL NOT NULL DEFAULT 0.0, ended_at REAL NOT NULL DEFAULT 0.0,
    fetch_before REAL NOT NULL DEFAULT 0.0, estimate REAL NOT NULL DEFAULT 0.0, cost REAL,
    currency TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT '');
CREATE INDEX requests_by_fingerprint ON requests (fingerprint);
CREATE INDEX requests_by_end ON requests (ended_at);
PRAGMA user_version = {SCHEMA_VERSION};
"""


def connect(path: Path, writable: bool, mode: Mode = "auto") -> sqlite3.Connection:
    """Open the journal, created when `writable`.

    Raises UserError when it is not a journal, or one of another version.
    """
    access = "rwc" if writable else "ro"
    if not writable and _in_wal_mode(path) and not path.with_name(f"{path.name}-wal").exists():
        access += "&immutable=1"  # nobody writes; an ordinary reader would leave a -wal and a -shm file behind
    address = f"{path.absolute().as_uri()}?mode={access}"
    try:
        db = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False, timeout=PATIENCE_S)
        _prepare(db, path, writable, mode)
    except sqlite3.OperationalError as error:
        raise UserError(f"{path}: cannot open the journal ({error}). Is this the folder of a cache?") from None
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: not a journal of afd ({error})") from None
    return db


def _prepare(db: sqlite3.Connection, path: Path, writable: bool, mode: Mode) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    new = version == 0 and writable and not db.execute("SELECT 1 FROM sqlite_master").fetchone()
    if version == 0 and not writable and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise UserError(f"{path}: is being made at this moment, or its run died doing so. Try again, or start the run.")
    if not new and version != SCHEMA_VERSION:
        older = f"`afd cache migrate {path.parent}` brings it up to it." if 0 < version < SCHEMA_VERSION else ""
        raise UserError(f"{path}: journal version {version}, this afd reads {SCHEMA_VERSION}. {older}".rstrip())
    if writable:
        wal = mode == "wal" or (mode == "auto" and not is_network(path.parent))
        db.execute(f"PRAGMA journal_mode = {'WAL' if wal else 'DELETE'}")
    if new:
        db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
    db.execute("PRAGMA synchronous = FULL")


def is_network(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether the folder lies on a network file system; False where the system does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    best, kind = "", ""
    real = os.path.realpath(folder)
    for line in lines:
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind.startswith(NETWORK)


def _in_wal_mode(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(20)[18:20] == WAL_HEADER
    except OSError:
        return False
