"""All samples of the caches that are merged, in one table: read, checked, in the order of a plan, twins found.

Cache 0 is the one that the others are merged into: what it holds, it keeps.  The order of a plan is that of an unbroken
run over all prompts, so that the parts of a plan end with the samples of such a run.  The table is a temporary database
of SQLite, which spills to disk.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

from afd_data.acceptance import Hashes, is_twin, thumbnail
from afd_data.errors import UserError
from afd_data.index import index_rows, update_index
from afd_data.journal import JOURNAL
from afd_data.journal_file import connect
from afd_data.members import read_member_at
from afd_data.plan import Planned
from afd_data.sample import parse_sample
from afd_data.shards import Manifest, Shard
from afd_data.states import IN_FLIGHT, OPEN
from afd_data.video import read_video

SAMPLE = (*(field.name for field in fields(Planned)), "state", "reason", "shard", "perceptual_hash", "thumbnail")
SAMPLE = (*SAMPLE, "created_at")  # columns of a journal's `samples`
REQUEST = ("fingerprint", "job_id", "state", "intent_at", "submitted_at", "ended_at", "fetch_before", "estimate")
REQUEST = (*REQUEST, "cost", "currency", "reason")  # columns of its `requests`
INDEX = ("key", "generation", "shard", "perceptual_hash", "created_at", "cost", "currency", "json_offset", "json_size")
INDEX = (*INDEX, "json_sha256", "mp4_sha256", "mp4_offset", "mp4_size", "width", "height", "frames", "fps")
MP4: tuple[str, ...] = ("key", "shard", "mp4_offset", "mp4_size", "mp4_sha256")  # what says where a video lies
SCHEMA = f"""
CREATE TABLE items (
    id INTEGER PRIMARY KEY, cache INTEGER, {", ".join(SAMPLE)}, mp4_sha256 TEXT DEFAULT '', mp4_offset, mp4_size, shape,
    journaled INTEGER, best INTEGER DEFAULT 0, twin_of TEXT DEFAULT '', UNIQUE (generation, key, cache));
CREATE INDEX items_by_prompt ON items (prompt_id);
CREATE INDEX items_by_shard ON items (cache, shard);
CREATE TABLE requests (cache INTEGER, {", ".join(REQUEST)});
CREATE INDEX requests_by_fingerprint ON requests (fingerprint);
CREATE TABLE rounds (cache INTEGER, generation INTEGER, facts_json, why_json, started_at, finished_at);
"""
PLAN_ORDER = "generation, CASE split WHEN 'test' THEN 0 WHEN 'validation' THEN 1 ELSE 2 END, rank(prompt), key"
# Of several rows of one sample the first in this order is taken over.
STATE_ORDER = ("sealed", "spooled", *reversed(IN_FLIGHT), "unknown", "rejected", "refused", "failed", "planned")
LIVE = ("sealed", "spooled", *IN_FLIGHT, "unknown")  # there is a video, or may be one
TWIN = "near-duplicate: shows the same as "
NAMED = "a.generation = b.generation AND a.key = b.key"


@dataclass(frozen=True)
class Source:
    """A cache as it is when the merge begins."""

    folder: Path
    manifest: Manifest
    has_journal: bool


class Table:
    """The samples of `caches`.

    Raises UserError: a damaged journal or index, a refresh round that goes on, caches that cannot be one.
    """

    def __init__(self, caches: Sequence[Source]) -> None:
        self.caches = caches
        self.db = sqlite3.connect("", isolation_level=None)
        self.db.create_function("rank", 1, _rank, deterministic=True)
        self.db.executescript(f"{SCHEMA} BEGIN;")
        for number, cache in enumerate(caches):
            if any(shard.generation > cache.manifest.generation for shard in cache.manifest.shards):
                raise UserError(f"{cache.folder}: {GOES_ON}")
            if cache.has_journal:
                self._read_journal(number, cache.folder)
            update_index(cache.folder)
            for split in cache.manifest.samples():
                self._read_index(number, cache.folder, split)
        self._choose()
        self._check()

    # Reading

    def _read_journal(self, number: int, folder: Path) -> None:
        rounds = ("generation", "facts_json", "why_json", "started_at", "finished_at")
        with closing(connect(folder / JOURNAL, writable=False)) as journal:
            for table, source, columns in (
                ("items", "samples", SAMPLE),
                ("requests", "requests", REQUEST),
                ("rounds", "rounds", rounds),
            ):
                names, marks = ", ".join(columns), ", ?" * len(columns)
                self.db.executemany(
                    f"INSERT INTO {table} (cache, {names}) VALUES ({number}{marks})",
                    journal.execute(f"SELECT {names} FROM {source} ORDER BY rowid"),
                )
        self.db.execute("UPDATE items SET journaled = 1 WHERE cache = ?", (number,))
        query = "SELECT 1 FROM rounds WHERE cache = ? AND generation > 0 AND finished_at = 0.0"
        if self.db.execute(query, (number,)).fetchone():
            raise UserError(f"{folder}: {GOES_ON}")

    def _read_index(self, number: int, folder: Path, split: str) -> None:
        """Where the videos lie; a cache may have no journal, or one that has not yet heard of a merge."""
        known = (
            "UPDATE items SET (shard, mp4_sha256, mp4_offset, mp4_size, shape) = (?, ?, ?, ?, ?), "
            "journaled = (state = 'sealed'), state = 'sealed', reason = '', perceptual_hash = ?, created_at = ? "
            "WHERE cache = ? AND generation = ? AND key = ?"
        )
        for row in index_rows(folder, split, INDEX):
            shape = f"{row['width']}x{row['height']}, {row['frames']} frames at {row['fps']:g} fps"
            place = (row["shard"], row["mp4_sha256"], row["mp4_offset"], row["mp4_size"], shape)
            made = (row["perceptual_hash"], row["created_at"])
            name = (number, row["generation"], row["key"])
            if not self.db.execute(known, (*place, *made, *name)).rowcount:
                self._add_unheard(number, folder, row)
                self.db.execute(known, (*place, *made, *name))

    def _add_unheard(self, number: int, folder: Path, row: dict) -> None:
        """A sample that the cache's journal, if any, does not tell of, with a request that says what it cost."""
        sample = parse_sample(read_member_at(folder, row, "json"), f"{folder / row['shard']}: {row['key']}.json")
        values = (*(getattr(sample, field.name) for field in fields(Planned)), "", "", "", "", b"", 0.0)
        marks = ", ?" * len(SAMPLE)
        self.db.execute(f"INSERT INTO items (cache, {', '.join(SAMPLE)}) VALUES ({number}{marks})", values)
        when = row["created_at"]
        request = (sample.fingerprint, "", "sealed", when, when, when, 0.0, sample.cost, sample.cost, sample.currency)
        marks = ", ?" * len(REQUEST)
        self.db.execute(f"INSERT INTO requests VALUES (-1{marks})", (*request, ""))

    # Choosing and checking

    def _choose(self) -> None:
        """Mark the row of each sample that is taken over; its thumbnail may stand in another row."""
        order = " ".join(f"WHEN '{state}' THEN {number}" for number, state in enumerate(STATE_ORDER))
        order = f"PARTITION BY generation, key ORDER BY CASE state {order} END, mp4_sha256 = '', cache"
        places = f"SELECT id, row_number() OVER ({order}) AS place FROM items"
        self.db.execute(f"UPDATE items SET best = 1 WHERE id IN (SELECT id FROM ({places}) WHERE place = 1)")
        self.db.execute(
            f"UPDATE items AS a SET thumbnail = coalesce((SELECT b.thumbnail FROM items b WHERE {NAMED} "
            "AND b.mp4_sha256 = a.mp4_sha256 AND length(b.thumbnail) > 0), a.thumbnail) "
            "WHERE a.best AND a.state = 'sealed' AND length(a.thumbnail) = 0"
        )
        # What an index tells stands in for a request only where no journal has the request itself.
        told = "SELECT fingerprint FROM requests WHERE cache >= 0"
        self.db.execute(f"DELETE FROM requests WHERE cache = -1 AND fingerprint IN ({told})")

    def _check(self) -> None:
        """Raises UserError naming two caches that cannot be one."""
        marks = ", ".join(f"'{state}'" for state in LIVE)
        self._refuse(
            "a.best AND b.mp4_sha256 != a.mp4_sha256 AND a.mp4_sha256 != '' AND b.mp4_sha256 != ''",
            "hold different videos of generation {generation} of {prompt!r} ({key}). Leave one of them out.",
        )
        self._refuse(
            f"a.best AND a.fingerprint != b.fingerprint AND a.state IN ({marks}) AND b.state IN ({marks}) "
            "AND (a.mp4_sha256 = '' OR b.mp4_sha256 = '')",
            "both asked for {prompt!r} ({key}), of other teachers or settings, and not both have it. "
            "Finish both caches first, or leave one out.",
        )
        self._refuse(
            "a.split != b.split",
            "have {prompt!r} in different splits ({splits}). Cache one of them again with the other's split.",
            "a.prompt_id = b.prompt_id",
        )
        shapes = self.db.execute(
            "SELECT shape, min(cache) FROM items WHERE shape IS NOT NULL GROUP BY shape ORDER BY 2 LIMIT 2"
        ).fetchall()
        if len(shapes) > 1:
            texts = " and ".join(f"{self.caches[number].folder} ({shape})" for shape, number in shapes)
            raise UserError(f"{texts} hold videos of different shapes; a cache has one. Cache one of them again.")

    def _refuse(self, condition: str, text: str, named: str = NAMED) -> None:
        found = self.db.execute(
            "SELECT a.cache, b.cache, a.generation, a.prompt, a.key, a.split, b.split FROM items a JOIN items b "
            f"ON {named} AND a.id != b.id WHERE {condition} ORDER BY a.id LIMIT 1"
        ).fetchone()
        if found is not None:
            one, other, generation, prompt, key, *splits = found
            said = text.format(generation=generation, prompt=prompt, key=key, splits=", ".join(splits))
            raise UserError(f"{self.caches[one].folder} and {self.caches[other].folder} {said}")

    # Deciding

    def find_twins(self, bits: int) -> int:
        """Mark new videos that show the same as an earlier one of another prompt; return how many.

        bits: perceptual hashes that differ in more are not compared further; -1: nothing is.
        """
        if bits < 0:
            return 0
        hashes, count = Hashes(), 0
        query = (
            "SELECT id, prompt_id, perceptual_hash, cache FROM items WHERE best AND mp4_sha256 != '' "
            f"ORDER BY cache > 0, {PLAN_ORDER}"
        )
        for sample_id, prompt_id, perceptual_hash, cache in self.db.execute(query).fetchall():
            twin = self._twin(sample_id, prompt_id, hashes.near(perceptual_hash, bits)) if cache else None
            if twin is None:
                hashes.add(sample_id, perceptual_hash)
            else:
                self.db.execute("UPDATE items SET twin_of = ? WHERE id = ?", (twin, sample_id))
                count += 1
        self.db.execute(
            f"UPDATE requests SET state = 'rejected', reason = '{TWIN}' || items.twin_of FROM items "
            "WHERE items.fingerprint = requests.fingerprint AND twin_of != '' AND requests.state = 'sealed'"
        )
        return count

    def _twin(self, sample_id: int, prompt_id: str, candidates: Iterable[int]) -> str | None:
        for other in candidates:
            key, others_prompt = self.db.execute("SELECT key, prompt_id FROM items WHERE id = ?", (other,)).fetchone()
            if others_prompt != prompt_id and is_twin(self._thumbnail(sample_id), self._thumbnail(other)):
                return key
        return None

    def _thumbnail(self, sample_id: int) -> bytes:
        """From the journal, else from the video."""
        query = f"SELECT thumbnail, cache, {', '.join(MP4)} FROM items WHERE id = ?"
        known, cache, *values = self.db.execute(query, (sample_id,)).fetchone()
        if known:
            return known
        folder, row = self.caches[cache].folder, dict(zip(MP4, values, strict=True))
        video = read_video(read_member_at(folder, row, "mp4"), decoder="pyav", name=str(folder / row["shard"]))
        made = thumbnail(video.frames)
        self.db.execute("UPDATE items SET thumbnail = ? WHERE id = ?", (made, sample_id))
        return made

    # What is taken over

    def keys_of(self, cache: int, shard: Shard) -> frozenset[str]:
        """Samples of a tar that are taken over."""
        query = "SELECT key FROM items WHERE (cache, shard) = (?, ?) AND mp4_sha256 != '' AND best AND twin_of = ''"
        return frozenset(key for (key,) in self.db.execute(query, (cache, shard.file)))

    def spooled(self, cache: int) -> Iterator[Planned]:
        """Samples whose video may lie in the spool of a cache, and that are taken over from there."""
        names = ", ".join(field.name for field in fields(Planned))
        states = ", ".join(f"'{state}'" for state in ("spooled", *OPEN))
        rows = self.db.execute(f"SELECT {names} FROM items WHERE cache = ? AND best AND state IN ({states})", (cache,))
        yield from (Planned(*row) for row in rows)


def _rank(prompt: str) -> bytes:
    """Where a prompt stands among the prompts of its split, as `load_prompts` orders them."""
    return hashlib.sha256(f"rank/{prompt}".encode()).digest()


GOES_ON = "a refresh round goes on there. Finish it with its `afd cache-teacher` first."
