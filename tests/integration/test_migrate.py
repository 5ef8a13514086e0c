"""A cache of version 1, made of SQL and files as the afd of then made it, and what becomes of it."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from afd_data.config import CacheConfig
from afd_data.errors import UserError
from afd_data.inspection import verify
from afd_data.journal import JOURNAL, open_journal
from afd_data.journal_file import SCHEMA
from afd_data.migration import migrate
from afd_data.shards import MANIFEST, read_manifest
from tests.parts import members, play, prompts, recipe

JOURNAL_1 = """
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
PRAGMA user_version = 1;
"""
REQUEST_1 = "id, fingerprint, job_id, state, intent_at, submitted_at, ended_at, cost, currency, reason"
PLAN = prompts(6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A finished cache of this version; what it had in version 1 is taken from it."""
    folder = tmp_path_factory.mktemp("cache")
    play(folder, PLAN)
    return folder


@pytest.fixture
def old(cache, tmp_path):
    """The same cache in version 1."""
    return make_old(cache, tmp_path / "old")


def make_old(cache: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in cache.glob("data/*/*"):
        (folder / path.relative_to(cache)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(cache)).write_bytes(path.read_bytes())
    record = json.loads((cache / MANIFEST).read_bytes())
    del record["pruned"]
    (folder / MANIFEST).write_text(json.dumps(record | {"version": 1}))
    with closing(sqlite3.connect(folder / JOURNAL)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(JOURNAL_1)
        db.execute("ATTACH ? AS new", (str(cache / JOURNAL),))
        db.execute("INSERT INTO samples SELECT * FROM new.samples")
        db.execute(f"INSERT INTO requests SELECT {REQUEST_1} FROM new.requests")
        facts = json.loads(db.execute("SELECT facts_json FROM new.rounds").fetchone()[0])
        facts["cache"] = {"frozen": 0.1, "near_duplicate": 0}
        db.execute("INSERT INTO facts VALUES ('recipe', ?)", (json.dumps(facts),))
        db.commit()
    return folder


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return sorted(db.iterdump())


def test_an_older_cache_is_refused_with_the_command_that_migrates_it(old):
    with pytest.raises(UserError, match="afd cache migrate"):
        play(old, PLAN)


def test_a_migrated_cache_goes_on_with_the_same_recipe(cache, old):
    said = migrate(old)
    assert "manifest.json 1 -> 2" in said
    assert "journal.sqlite 1 -> 2" in said
    before = read_manifest(old)
    assert play(old, PLAN).states == {"rejected": 1, "sealed": 5}
    assert read_manifest(old) == before
    assert members(old) == members(cache)
    assert verify(old) == []


def test_a_migrated_journal_has_the_tables_of_a_new_one(old):
    migrate(old)
    with closing(sqlite3.connect(old / JOURNAL)) as db, closing(sqlite3.connect(":memory:")) as new:
        new.executescript(SCHEMA)
        query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
        assert db.execute(query).fetchall() == new.execute(query).fetchall()


def test_the_old_recipe_becomes_round_0_with_the_rules_of_then(cache, old):
    migrate(old)
    journal, new = open_journal(old), open_journal(cache)
    assert journal.rounds()[0].facts == new.rounds()[0].facts
    assert journal.rounds()[0].facts["cache"]["black"] == CacheConfig().black
    assert journal.rounds()[0].finished_at > 0.0
    assert journal.fact("recipe") is None
    journal.close()
    new.close()


def test_costs_of_what_has_not_ended_are_not_known(old):
    with closing(sqlite3.connect(old / JOURNAL)) as db:
        ids = [row[0] for row in db.execute("SELECT fingerprint FROM samples ORDER BY id")]
        for fingerprint, sample, request in [
            (ids[0], "submitted", "submitted"),
            (ids[1], "unknown", "unknown"),
            (ids[2], "planned", "intent"),  # of a free teacher, planned again after a crash
            (ids[3], "sealed", "sealed"),
        ]:
            db.execute("UPDATE samples SET state = ? WHERE fingerprint = ?", (sample, fingerprint))
            db.execute("UPDATE requests SET state = ? WHERE fingerprint = ?", (request, fingerprint))
        db.execute("UPDATE requests SET cost = 0.25 WHERE fingerprint = ?", (ids[3],))
        db.commit()
    migrate(old)
    journal = open_journal(old)
    found = journal.select("SELECT s.id, r.state, r.cost FROM requests r JOIN samples s USING (fingerprint) ORDER BY 1")
    assert found[:4] == [(1, "submitted", None), (2, "unknown", None), (3, "failed", 0.0), (4, "sealed", 0.25)]
    assert journal.rounds()[0].finished_at == 0.0  # one is planned still
    journal.close()


def test_the_old_journal_is_kept_beside_the_new(old):
    before = dump(old / JOURNAL)
    migrate(old)
    assert dump(old / f"{JOURNAL}.v1") == before


def test_migrating_twice_does_nothing(old):
    migrate(old)
    before = dump(old / JOURNAL), (old / MANIFEST).read_bytes()
    assert "nothing to do" in migrate(old)
    assert (dump(old / JOURNAL), (old / MANIFEST).read_bytes()) == before


def test_a_newer_version_is_refused(old):
    with closing(sqlite3.connect(old / JOURNAL)) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(UserError, match="version 7, this afd reads 2"):
        migrate(old)
    (old / MANIFEST).write_text('{"version": 3}')
    with pytest.raises(UserError, match="version 3, this afd reads 2"):
        migrate(old)


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(UserError, match="no cache"):
        migrate(tmp_path)


def test_a_damaged_journal_is_refused_and_left_alone(old):
    (old / JOURNAL).write_bytes(b"not a database, by no means" * 100)
    with pytest.raises(UserError, match="as it was"):
        migrate(old)
    assert (old / JOURNAL).read_bytes() == b"not a database, by no means" * 100


# Dies at the n-th durable step, or inside the transaction.
DIES = """
import os
import signal
import sqlite3
import sys
from pathlib import Path

import afd_data.migration as migration

countdown = int(sys.argv[2])


def dying(function):
    def wrapped(*arguments, **options):
        global countdown
        countdown -= 1
        if countdown < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return wrapped


os.fsync, os.replace = dying(os.fsync), dying(os.replace)
migration._add_first_round = dying(migration._add_first_round)
migration.migrate(Path(sys.argv[1]))
"""


@pytest.mark.slow  # a start of Python for each of some 10 steps
def test_a_death_at_any_step_leaves_a_cache_that_migrates(cache, tmp_path):
    step, code, folder = 0, -signal.SIGKILL, tmp_path
    while code == -signal.SIGKILL:
        folder = make_old(cache, tmp_path / f"step-{step}")
        before = dump(folder / JOURNAL)
        command = [sys.executable, "-c", DIES, str(folder), str(step)]
        code = subprocess.run(command, check=False, timeout=100).returncode
        migrate(folder)
        assert dump(folder / f"{JOURNAL}.v1") == before
        assert play(folder, PLAN, config=recipe()).states == {"rejected": 1, "sealed": 5}
        step += 1
    assert code == 0
    assert step > 6
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]
