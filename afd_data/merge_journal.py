"""The journals of merged caches become one: rounds, samples, requests, in one transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from afd_data.journal_file import connect
from afd_data.merge_table import PLAN_ORDER, REQUEST, SAMPLE, TWIN, Table
from afd_data.states import OPEN

UNFINISHED = (*OPEN, "spooled")


def join_journals(table: Table, path: Path, names: dict[tuple[int, str], str], near_duplicate: int) -> None:
    """Bring into the journal `path`, made where there is none, what the table knows and it does not.

    names: (cache, tar there) -> tar in the merged cache.  Rows that stand there keep their place; new ones follow in
    the order of a plan.  Doing it again changes nothing.
    """
    with closing(connect(path, writable=True)) as journal:
        journal.execute("BEGIN IMMEDIATE")
        _add_samples(table, journal, names)
        _add_requests(table, journal)
        _add_rounds(table, journal, near_duplicate)
        journal.execute("COMMIT")


def _add_samples(table: Table, journal: sqlite3.Connection, names: dict[tuple[int, str], str]) -> None:
    changing = [name for name in SAMPLE if name not in ("key", "generation")]
    journal.executemany(
        f"INSERT INTO samples ({', '.join(SAMPLE)}) VALUES ({', '.join('?' * len(SAMPLE))}) "
        f"ON CONFLICT (generation, key) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in changing)}",
        _news(table, names),
    )


def _news(table: Table, names: dict[tuple[int, str], str]) -> Iterator[list]:
    """Values of SAMPLE of everything that the merged cache's journal does not say yet."""
    state, reason, shard = (SAMPLE.index(name) for name in ("state", "reason", "shard"))
    query = (
        f"SELECT cache, twin_of, {', '.join(SAMPLE)} FROM items "
        f"WHERE best AND NOT (cache = 0 AND journaled IS 1) ORDER BY {PLAN_ORDER}"
    )
    for cache, twin_of, *values in table.db.execute(query):
        if twin_of:
            values[state], values[reason], values[shard] = "rejected", f"{TWIN}{twin_of}", ""
        elif values[state] == "sealed" and cache:
            values[shard] = names[cache, values[shard]]
        yield values


def _add_requests(table: Table, journal: sqlite3.Connection) -> None:
    """Oldest first, as the last attempt of a sample is the one that counts."""
    insert = (
        f"INSERT INTO requests ({', '.join(REQUEST)}) SELECT {', '.join('?' * len(REQUEST))} WHERE NOT EXISTS "
        "(SELECT 1 FROM requests WHERE fingerprint = ? AND intent_at = ?)"
    )
    at = [REQUEST.index(name) for name in ("fingerprint", "intent_at")]
    query = f"SELECT {', '.join(REQUEST)} FROM requests WHERE cache != 0 ORDER BY intent_at, cache, rowid"
    journal.executemany(insert, ((*values, *(values[place] for place in at)) for values in table.db.execute(query)))


def _add_rounds(table: Table, journal: sqlite3.Connection, near_duplicate: int) -> None:
    """A round is that of the first cache that has it; it goes on while any of its samples is open."""
    known = {generation for (generation,) in journal.execute("SELECT generation FROM rounds")}
    rows = table.db.execute("SELECT * FROM rounds ORDER BY generation, cache").fetchall()
    needed = {generation for (generation,) in table.db.execute("SELECT DISTINCT generation FROM items")}
    for generation in sorted((needed | {row[1] for row in rows}) - known) if rows else ():
        mine = [row for row in rows if row[1] == generation]
        facts = json.loads((mine or rows)[0][2])
        facts["cache"] = facts["cache"] | {"near_duplicate": near_duplicate}
        why = mine[0][3] if mine else "{}"
        started = min((row[4] for row in mine), default=0.0)
        values = (generation, json.dumps(facts), why, started)
        journal.execute("INSERT INTO rounds (generation, facts_json, why_json, started_at) VALUES (?, ?, ?, ?)", values)
        marks = ", ".join("?" * len(UNFINISHED))
        query = f"SELECT 1 FROM samples WHERE generation = ? AND state IN ({marks}) LIMIT 1"
        if not journal.execute(query, (generation, *UNFINISHED)).fetchone():
            finished = max((row[5] for row in mine), default=started) or started
            journal.execute("UPDATE rounds SET finished_at = ? WHERE generation = ?", (finished, generation))
