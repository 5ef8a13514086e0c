"""The truth about requests: an SQLite file that knows what was asked, what came of it, and what may be asked next.

One row a sample (`samples`; its `id` is the order of the plan) and one row an attempt (`requests`).  States change in
`Journal.move` alone, by the one table of `states`.  An intent is recorded before a request and the job id right
after it; with `patience_s=0` (paid teachers) every record is on disk before `move` returns, otherwise records are
committed together a few times a second, as asking a free teacher again costs nothing.
Knows nothing of videos, tars or teachers.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from afd_data.errors import UserError
from afd_data.plan import Planned
from afd_data.states import OPEN, TRANSITIONS, check_transition

SCHEMA_VERSION = 1

SCHEMA = f"""
CREATE TABLE facts (name TEXT PRIMARY KEY, value_json TEXT NOT NULL);
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
    cost REAL NOT NULL DEFAULT 0.0, currency TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT '');
CREATE INDEX requests_by_fingerprint ON requests (fingerprint);
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass(frozen=True)
class Row(Planned):
    """A row of `samples`, without its thumbnail."""

    id: int
    state: str
    reason: str
    shard: str
    perceptual_hash: str
    created_at: float  # seconds since 1970; 0.0 until there is a video


COLUMNS = ", ".join(field.name for field in fields(Row))
PLAN_COLUMNS = ", ".join(field.name for field in fields(Planned))
MARKS = ", ".join("?" * len(fields(Planned)))


class Journal:
    """The journal of one cache, created when `writable`.  Thread-safe; one process writes, any number may read.

    patience_s: how long a record may wait for its commit.
    Raises UserError when the file is not a journal, or one of another version.
    """

    def __init__(self, path: Path, writable: bool = True, patience_s: float = 0.0) -> None:
        self._lock = threading.RLock()
        self._patience_s = patience_s
        self._oldest = 0.0  # when the open transaction began, time.monotonic()
        self._broken: sqlite3.OperationalError | None = None
        mode = "rwc" if writable else "ro"
        if not writable and not path.with_name(f"{path.name}-wal").exists():
            mode += "&immutable=1"  # nobody writes; an ordinary reader would leave a -wal and a -shm file behind
        address = f"{path.absolute().as_uri()}?mode={mode}"
        try:
            self._db = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False, timeout=30)
            self._prepare(path, writable)
        except sqlite3.OperationalError as error:
            raise UserError(f"{path}: cannot open the journal ({error}). Is this the folder of a cache?") from None
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: not a journal of afd ({error})") from None

    def _prepare(self, path: Path, writable: bool) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and writable and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            version = SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path}: journal version {version}, this afd reads {SCHEMA_VERSION}. "
                "Use the afd that wrote it, or cache into a new folder with --set out=FOLDER."
            )
        self._db.execute("PRAGMA synchronous = FULL")

    # Writing

    def move(self, sample_id: int, to: str, reason: str = "", **columns: object) -> None:
        """Enter state `to`.  `columns`: further columns of `samples`, or job_id, cost, currency of the attempt."""
        attempt = {name: columns.pop(name) for name in ("job_id", "cost", "currency") if name in columns}
        with self._writing():
            old, fingerprint = self._db.execute(
                "SELECT state, fingerprint FROM samples WHERE id = ?", (sample_id,)
            ).fetchone()
            check_transition(old, to)
            self._update("samples", sample_id, {"state": to, "reason": reason, **columns})
            self._attempt(fingerprint, to, reason, attempt)

    def _attempt(self, fingerprint: str, to: str, reason: str, columns: dict) -> None:
        now = time.time()
        if to == "intent":
            self._db.execute(
                "INSERT INTO requests (fingerprint, state, intent_at) VALUES (?, ?, ?)", (fingerprint, to, now)
            )
            return
        last = self._db.execute("SELECT max(id) FROM requests WHERE fingerprint = ?", (fingerprint,)).fetchone()[0]
        if last is None or to == "planned":  # a sample planned again leaves its old attempt as it ended
            return
        times = {"submitted_at": now} if to == "submitted" else {}
        if to not in OPEN and to != "sealed":
            times["ended_at"] = now
        self._update("requests", last, {"state": to, "reason": reason, **times, **columns})

    def _update(self, table: str, row_id: int, columns: dict) -> None:
        names = ", ".join(f"{name} = ?" for name in columns)
        self._db.execute(f"UPDATE {table} SET {names} WHERE id = ?", (*columns.values(), row_id))

    @contextmanager
    def _writing(self, patience_s: float | None = None) -> Iterator[None]:
        """A piece of the open transaction, which is committed when it has waited long enough.

        What a failed write leaves of a transaction is not ours to guess: the journal then takes nothing more.
        """
        with self._lock:
            if self._broken is not None:
                raise self._broken
            try:
                if not self._db.in_transaction:
                    self._db.execute("BEGIN IMMEDIATE")
                    self._oldest = time.monotonic()
                yield
                if time.monotonic() - self._oldest >= (self._patience_s if patience_s is None else patience_s):
                    self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                self._broken = error
                raise

    def flush(self) -> None:
        """Make everything recorded so far durable."""
        with self._writing(patience_s=0.0):
            pass

    def close(self) -> None:
        """Flush and close."""
        with self._lock:
            if self._broken is None and self._db.in_transaction:
                self.flush()
            self._db.close()

    def plan(self, planned: Iterable[Planned], generation: int = 0) -> int:
        """Add the samples that are new, durably; return how many.

        Raises UserError when the generation holds samples that are not in `planned`, or others under their keys:
        a cache only grows.
        """
        values = [astuple(sample) for sample in planned]
        with self._writing(patience_s=0.0):
            self._db.execute("CREATE TEMP TABLE wanted AS SELECT * FROM samples LIMIT 0")
            try:
                self._db.executemany(f"INSERT INTO wanted ({PLAN_COLUMNS}) VALUES ({MARKS})", values)
                self._db.execute("CREATE UNIQUE INDEX temp.wanted_keys ON wanted (generation, key)")
                self._check_only_additions(generation)
                return self._db.execute(
                    f"INSERT INTO samples ({PLAN_COLUMNS}, state) SELECT {PLAN_COLUMNS}, 'planned' FROM wanted "
                    "WHERE (generation, key) NOT IN (SELECT generation, key FROM samples) ORDER BY wanted.rowid"
                ).rowcount
            finally:
                self._db.execute("DROP TABLE wanted")

    def _check_only_additions(self, generation: int) -> None:
        odd = self._db.execute(
            "SELECT s.prompt, s.split, w.split, w.prompt, count(*) OVER () FROM samples s LEFT JOIN wanted w "
            "USING (generation, key) WHERE generation = ? AND "
            "(w.key IS NULL OR w.fingerprint != s.fingerprint OR w.split != s.split) LIMIT 1",
            (generation,),
        ).fetchone()
        if odd is None:
            return
        prompt, split, new_split, new_prompt, count = odd
        advice = "A cache only grows: add prompts or takes"
        if new_prompt is None:
            change = f"{prompt!r} is no longer among the prompts or takes"
        elif new_split != split:
            change = f"{prompt!r} moved from {split} to {new_split}"
            advice = (
                "Held out are the first prompts by hash, so an added prompt, prompts.test or prompts.validation can "
                "move others: undo that change"
            )
        else:
            change = f"{prompt!r} is now {new_prompt!r}"
        raise UserError(
            f"the recipe asks for other samples than this cache holds ({count} differ; {change}). "
            f"{advice}, or cache into another folder with --set out=FOLDER."
        )

    def set_fact(self, name: str, value: object) -> None:
        """Record something about the whole cache, durably."""
        with self._writing(patience_s=0.0):
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    # Reading

    def fact(self, name: str) -> object | None:
        """What `set_fact` recorded, or None."""
        with self._lock:
            row = self._db.execute("SELECT value_json FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def rows(self, after: int = 0, states: tuple[str, ...] = tuple(TRANSITIONS), page: int = 256) -> Iterator[Row]:
        """Samples in the order of the plan, from the one behind id `after`; read in pages, so states may change."""
        marks = ", ".join("?" * len(states))
        query = f"SELECT {COLUMNS} FROM samples WHERE id > ? AND state IN ({marks}) ORDER BY id LIMIT ?"
        while True:
            with self._lock:
                found = [Row(*row) for row in self._db.execute(query, (after, *states, page))]
            if not found:
                return
            yield from found
            after = found[-1].id

    def select(self, query: str, values: tuple = ()) -> list[tuple]:
        """Rows of a read-only query, for reports."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def job_id(self, fingerprint: str) -> str:
        """Job id of the last attempt; "" when the teacher never gave one."""
        found = self.select(
            "SELECT job_id FROM requests WHERE fingerprint = ? ORDER BY id DESC LIMIT 1", (fingerprint,)
        )
        return found[0][0] if found else ""

    def counts(self) -> dict[str, int]:
        """Samples per state; states without samples are left out."""
        return dict(self.select("SELECT state, count(*) FROM samples GROUP BY state ORDER BY state"))
