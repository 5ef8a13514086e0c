"""The truth about requests: an SQLite file that knows what was asked, what came of it, and what may be asked next.

One row a sample (`samples`; its `id` is the order of the plan), one row an attempt (`requests`), one a refresh round
(`rounds`).  States change in `Journal.move` alone, by the one table of `states`.  An intent is recorded before a
request and the job id right after it; with `patience_s=0` (paid teachers) every record is on disk before `move`
returns, otherwise records are committed together a few times a second, as asking a free teacher again costs nothing.
An attempt's cost goes from estimate (reserved, `cost` is NULL) to what was charged.
Knows nothing of videos, tars or teachers.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path

from afd_data.errors import UserError
from afd_data.journal_file import Mode, connect
from afd_data.journal_plan import add_planned
from afd_data.journal_rows import ATTEMPT_COLUMNS, COLUMNS, MARKS, PLAN_COLUMNS, Attempt, Round, Row
from afd_data.plan import Planned
from afd_data.states import IN_FLIGHT, OPEN, TRANSITIONS, check_transition

JOURNAL = "journal.sqlite"  # in the folder of a cache
LOCK = ".lock"  # held by the process that writes there
PLANNED = "planned"  # the fact that says what `Journal.plan` was told last
ATTEMPT = ("job_id", "fetch_before", "estimate", "cost", "currency")  # columns of `requests` that `move` takes


class Journal:
    """The journal of one cache, created when `writable`.  Thread-safe; one process writes, any number may read.

    patience_s: how long a record may wait for its commit.
    Raises UserError when the file is not a journal, or one of another version.
    """

    def __init__(self, path: Path, writable: bool = True, patience_s: float = 0.0, mode: Mode = "auto") -> None:
        self._lock = threading.RLock()
        self._patience_s = patience_s
        self._oldest = 0.0  # when the open transaction began, time.monotonic()
        self._broken: sqlite3.OperationalError | None = None
        self._path = path
        self._db = connect(path, writable, mode)

    # Writing

    def move(self, sample_id: int, to: str, reason: str = "", **columns: object) -> None:
        """Enter state `to`.  `columns`: further columns of `samples`, or of the attempt (ATTEMPT)."""
        attempt = {name: columns.pop(name) for name in ATTEMPT if name in columns}
        with self._writing():
            old, fingerprint = self._db.execute(
                "SELECT state, fingerprint FROM samples WHERE id = ?", (sample_id,)
            ).fetchone()
            if to == "sealed" and old != "spooled":
                raise UserError(
                    f"{self._path}: older than the shards: it does not know of videos that are in them. "
                    "Put the newest journal.sqlite back, or cache into another folder with --set out=FOLDER."
                )
            check_transition(old, to)
            self._update("samples", sample_id, {"state": to, "reason": reason, **columns})
            self._attempt(fingerprint, old, to, reason, attempt)

    def _attempt(self, fingerprint: str, old: str, to: str, reason: str, columns: dict) -> None:
        now = time.time()
        if to == "intent":
            known = {"fingerprint": fingerprint, "state": to, "intent_at": now, **columns}
            marks = ", ".join("?" * len(known))
            self._db.execute(f"INSERT INTO requests ({', '.join(known)}) VALUES ({marks})", tuple(known.values()))
            return
        last = self._db.execute("SELECT max(id) FROM requests WHERE fingerprint = ?", (fingerprint,)).fetchone()[0]
        if to == "planned":
            if old not in IN_FLIGHT:  # a sample planned again leaves its old attempt as it ended
                return
            to, columns = "failed", {"cost": 0.0, **columns}
        times = {"submitted_at": now} if to == "submitted" else {}
        if to not in OPEN and to != "sealed":
            times["ended_at"] = now
        self._update("requests", last, {"state": to, "reason": reason, **times, **columns})

    def note(self, sample_id: int, reason: str, **columns: object) -> None:
        """Say more about a sample that stays in its state; `columns`: of its last attempt (ATTEMPT)."""
        with self._writing():
            self._update("samples", sample_id, {"reason": reason})
            query = "SELECT max(r.id) FROM requests r JOIN samples s USING (fingerprint) WHERE s.id = ?"
            if columns:
                self._update("requests", self._db.execute(query, (sample_id,)).fetchone()[0], columns)

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
                self._db.execute("SAVEPOINT piece")
                try:
                    yield
                except BaseException:
                    self._db.execute("ROLLBACK TO piece")
                    raise
                finally:
                    self._db.execute("RELEASE piece")
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

    def plan(self, planned: Iterable[Planned], generation: int = 0, digest: str = "") -> int:
        """Add the samples that are new, durably; return how many.

        `digest` stands for `planned`: where it is that of the last call and no sample came or went since then, nothing
        is new, and `planned` is not read.
        Raises UserError when the generation holds samples that are not in `planned`, or others under their keys:
        a cache only grows.
        """
        if digest and self.fact(PLANNED) == self._so_far(generation, digest):
            return 0
        with self._writing(patience_s=0.0):
            added = add_planned(self._db, planned, generation)
            self._set_fact(PLANNED, self._so_far(generation, digest))
        return added

    def _so_far(self, generation: int, digest: str) -> dict:
        """What `plan` remembers; the count notices samples that came from elsewhere, out of another cache."""
        samples = self.select("SELECT count(*) FROM samples WHERE generation = ?", (generation,))
        return {"generation": generation, "digest": digest, "samples": samples[0][0]}

    def start_round(
        self, generation: int, facts: dict, why: dict, planned: Iterable[Planned] = (), digest: str = ""
    ) -> int:
        """Begin a refresh round with its samples, durably and all at once; return how many.  `digest`: see `plan`."""
        with self._writing(patience_s=0.0):
            values = (generation, json.dumps(facts), json.dumps(why), time.time(), 0.0)
            self._db.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?)", values)
            insert = f"INSERT INTO samples ({PLAN_COLUMNS}, state) VALUES ({MARKS}, 'planned')"
            added = self._db.executemany(insert, (astuple(sample) for sample in planned)).rowcount
            self._set_fact(PLANNED, self._so_far(generation, digest))
            return added

    def finish_round(self, generation: int) -> None:
        """Record that all of its samples have come to an end and are published."""
        with self._writing(patience_s=0.0):
            self._db.execute("UPDATE rounds SET finished_at = ? WHERE generation = ?", (time.time(), generation))

    def set_fact(self, name: str, value: object) -> None:
        """Record something about the whole cache, durably."""
        with self._writing(patience_s=0.0):
            self._set_fact(name, value)

    def _set_fact(self, name: str, value: object) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    # Reading

    def rounds(self) -> list[Round]:
        """All refresh rounds, the first first."""
        rows = self.select("SELECT generation, facts_json, why_json, started_at, finished_at FROM rounds ORDER BY 1")
        return [
            Round(generation, json.loads(facts), json.loads(why), *times) for generation, facts, why, *times in rows
        ]

    def fact(self, name: str) -> object | None:
        """What `set_fact` recorded, or None."""
        found = self.select("SELECT value_json FROM facts WHERE name = ?", (name,))
        return json.loads(found[0][0]) if found else None

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

    def last_attempt(self, fingerprint: str) -> Attempt:
        """The last one of a sample; an empty one where there was none."""
        query = f"SELECT {ATTEMPT_COLUMNS} FROM requests WHERE fingerprint = ? ORDER BY id DESC LIMIT 1"
        found = self.select(query, (fingerprint,))
        return Attempt(*found[0]) if found else Attempt()

    def job_id(self, fingerprint: str) -> str:
        """Job id of the last attempt; "" when the teacher never gave one."""
        return self.last_attempt(fingerprint).job_id

    def pending(self) -> Iterator[Row]:
        """What there is to do: first the videos that can be fetched, the soonest to expire first; then running jobs."""
        names = ", ".join(f"s.{field.name}" for field in fields(Row))
        ready = self.select(
            f"SELECT {names} FROM samples s JOIN requests r USING (fingerprint) WHERE s.state = 'ready' "
            "AND r.id = (SELECT max(id) FROM requests WHERE fingerprint = s.fingerprint) ORDER BY r.fetch_before, s.id"
        )
        yield from (Row(*row) for row in ready)
        yield from self.rows(states=("submitted", "running"))
        yield from self.rows(states=("planned",))

    def spend(self) -> dict[str, tuple[float, float]]:
        """Currency -> (charged, reserved for what is in flight or unknown)."""
        query = (
            "SELECT currency, sum(coalesce(cost, 0.0)), sum(CASE WHEN cost IS NULL THEN estimate ELSE 0.0 END) "
            "FROM requests GROUP BY currency"
        )
        return {currency: (charged, reserved) for currency, charged, reserved in self.select(query)}

    def counts(self) -> dict[str, int]:
        """Samples per state; states without samples are left out."""
        return dict(self.select("SELECT state, count(*) FROM samples GROUP BY state ORDER BY state"))


def open_journal(folder: Path) -> Journal:
    """The journal of an existing cache, for reading.  Raises UserError where there is none."""
    if not (folder / JOURNAL).exists():
        raise UserError(f"{folder}: no {JOURNAL} in it. Name the folder of a cache, for example OUT/cache.")
    return Journal(folder / JOURNAL, writable=False)
