"""A cache of an older afd is brought to the versions that this one reads: by this command, never by the way.

Manifest 1 -> 2 gains `pruned`.  Journal 1 -> 2: what all samples share becomes round 0, and a cost that is not known is
NULL.  Tars, spool and samples stay as they are.
"""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from afd_data.config import CacheConfig
from afd_data.errors import UserError
from afd_data.files import PART, atomic_write, fsync, one_writer
from afd_data.journal import JOURNAL, LOCK
from afd_data.journal_file import PATIENCE_S, SCHEMA, SCHEMA_VERSION
from afd_data.planning import ACCEPTANCE
from afd_data.shards import MANIFEST, MANIFEST_VERSION, read_manifest
from afd_data.states import IN_FLIGHT, OPEN

TABLES = ("facts", "samples", "requests")  # of a journal of version 1


def migrate(folder: Path) -> str:
    """Bring manifest and journal of the cache `folder` to this version; returns what was done, for the terminal.

    The old journal stays as `journal.sqlite.v1`.  Killed anywhere, the same call finishes.  Raises UserError: no cache
    there, a newer version, a damaged file, another process is writing.
    """
    if not (folder / MANIFEST).exists() and not (folder / JOURNAL).exists():
        raise UserError(f"{folder}: no cache (no {MANIFEST}, no {JOURNAL}). Name the folder of a cache.")
    done = []
    with one_writer(folder / LOCK, f"cache {folder}"):
        if (folder / MANIFEST).exists():
            done += _migrate_manifest(folder)
        if (folder / JOURNAL).exists():
            done += _migrate_journal(folder / JOURNAL)
    return f"{folder}: {'; '.join(done) or 'is of this version already; nothing to do'}"


def _migrate_manifest(folder: Path) -> list[str]:
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_bytes())
        version = record["version"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of afd ({type(error).__name__}: {error})") from None
    if version == MANIFEST_VERSION:
        return []
    _check_version(path, version, MANIFEST_VERSION)
    with atomic_write(path) as file:
        file.write(json.dumps(record | {"version": MANIFEST_VERSION, "pruned": []}, indent=1).encode() + b"\n")
    read_manifest(folder)
    return [f"{MANIFEST} {version} -> {MANIFEST_VERSION}"]


def _migrate_journal(path: Path) -> list[str]:
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=PATIENCE_S)) as db:
            db.execute("PRAGMA synchronous = FULL")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == SCHEMA_VERSION:
                return []
            _check_version(path, version, SCHEMA_VERSION)
            backup = path.with_name(f"{path.name}.v{version}")
            _back_up(db, backup)
            db.execute("BEGIN IMMEDIATE")
            _rebuild(db)
            db.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: cannot be migrated ({error}); it is as it was") from None
    return [f"{JOURNAL} {version} -> {SCHEMA_VERSION} (the old one is {backup.name})"]


def _check_version(path: Path, version: object, newest: int) -> None:
    if type(version) is not int or version < 1:
        raise UserError(f"{path}: not of afd, or empty (version {version!r})")
    if version > newest:
        raise UserError(
            f"{path}: version {version}, this afd reads {newest}. Use the afd that wrote it, or a newer one."
        )
    assert version == 1, "there is no other older version"


def _back_up(db: sqlite3.Connection, backup: Path) -> None:
    part = backup.with_name(backup.name + PART)
    part.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(part),))
    fsync(part)
    os.replace(part, backup)
    fsync(backup.parent)


def _rebuild(db: sqlite3.Connection) -> None:
    """In the transaction that is open: the tables of this version, filled from the old ones."""
    for name in TABLES:
        db.execute(f"ALTER TABLE {name} RENAME TO old_{name}")
    for (index,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall():
        db.execute(f"DROP INDEX {index}")
    for statement in filter(str.strip, SCHEMA.split(";")):
        db.execute(statement)
    for name in TABLES:
        columns = ", ".join(row[1] for row in db.execute(f"PRAGMA table_info(old_{name})"))
        db.execute(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM old_{name} ORDER BY rowid")
        db.execute(f"DROP TABLE old_{name}")
    _add_first_round(db)
    _correct_requests(db)


def _add_first_round(db: sqlite3.Connection) -> None:
    """The old fact `recipe`.  Rules of acceptance that it does not name could not be set, so they are the defaults."""
    found = db.execute("SELECT value_json FROM facts WHERE name = 'recipe'").fetchone()
    if found is None:
        return  # the run died before it had planned anything
    facts = json.loads(found[0])
    defaults = CacheConfig().model_dump(include=ACCEPTANCE)
    facts["cache"] = defaults | facts["cache"]
    times = "SELECT min(intent_at), max(max(ended_at, submitted_at, intent_at)) FROM requests"
    begun, ended = db.execute(times).fetchone()
    query = f"SELECT 1 FROM samples WHERE state IN {(*OPEN, 'spooled')} LIMIT 1"
    goes_on = db.execute(query).fetchone() or ended is None
    values = (json.dumps(facts), begun or 0.0, 0.0 if goes_on else ended)
    db.execute("INSERT INTO rounds VALUES (0, ?, '{}', ?, ?)", values)
    db.execute("DELETE FROM facts WHERE name = 'recipe'")


def _correct_requests(db: sqlite3.Connection) -> None:
    """Costs of what is in flight or unknown are not known; attempts whose sample was planned again have failed."""
    last = "id IN (SELECT max(id) FROM requests GROUP BY fingerprint)"
    goes_on = f"{last} AND fingerprint IN (SELECT fingerprint FROM samples WHERE state = requests.state)"
    db.execute(f"UPDATE requests SET state = 'failed' WHERE state IN {IN_FLIGHT} AND NOT ({goes_on})")
    db.execute(f"UPDATE requests SET cost = NULL WHERE state IN {(*IN_FLIGHT, 'unknown')}")
