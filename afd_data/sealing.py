"""Spool -> shards, in the order of the plan, so that killed and unbroken runs end with the same data.

A sample is decided when every earlier one has come to an end.  Therefore it depends on the plan alone, and not on which
request was quicker, which of two twins stays and which samples share a shard.
The order on disk: tar, manifest, journal, and only then is the spool emptied; `Sealer.recover` finishes what a crash
left between any two of them.  A refresh round becomes data when all of it has come to an end, by the manifest's
`generation`.  Where the cache has an origin, everything is sent there every PUBLISH_S and at the end, and the tars are
dropped here: index and manifest, which grow, are sent whole each time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from afd_data.acceptance import Hashes, is_twin
from afd_data.config import CacheConfig
from afd_data.errors import UserError
from afd_data.files import PART
from afd_data.index import update_index
from afd_data.journal import Journal, Row
from afd_data.origin import address, publish, sizes, whole
from afd_data.origin_record import read_origin
from afd_data.pruning import remove_pruned
from afd_data.shards import (
    Manifest,
    describe_shard,
    read_manifest,
    scan_shard,
    write_manifest,
    write_shard,
)
from afd_data.spool import Spool
from afd_data.states import OPEN

PUBLISH_S = 300.0


class Sealer:
    """Decides about spooled samples and seals them; one a cache, used by one thread."""

    def __init__(self, folder: Path, journal: Journal, spool: Spool, config: CacheConfig) -> None:
        self.folder = folder
        self.manifest = Manifest()
        self._journal = journal
        self._spool = spool
        self._config = config
        self._hashes: Hashes | None = None
        self._decided = 0  # id of the last sample of the plan that was decided
        self._taken: dict[tuple[str, int], list[Row]] = defaultdict(list)  # (split, generation) -> not sealed yet
        self._taken_bytes: dict[tuple[str, int], int] = defaultdict(int)
        self._published = time.monotonic()

    # After a crash

    def recover(self) -> None:
        """Bring tars, manifest, journal and spool into agreement.  Raises UserError where only a person can."""
        self._spool.sweep()
        self._adopt_tars()
        self._note_sealed()
        self._empty_spool()
        self._publish()

    def _empty_spool(self) -> None:
        """Remove spooled files whose sample has been sealed or turned down."""
        for name in self._spool.names():
            query = "SELECT state FROM samples WHERE (generation, key) = (?, ?)"
            if self._journal.select(query, name) in ([("sealed",)], [("rejected",)]):
                self._spool.drop(name)

    def _adopt_tars(self) -> None:
        """Name in the manifest the complete tar that a crash kept from being named."""
        self.manifest = read_manifest(self.folder)
        for part in self.folder.glob(f"data/*/*{PART}"):
            part.unlink()
        remove_pruned(self.folder, self.manifest)
        known = {shard.file: shard.bytes for shard in self.manifest.shards}
        elsewhere = sizes(self.folder)
        for file, size in known.items():
            if not (self.folder / file).exists() and elsewhere.get(file) != size:
                raise UserError(
                    f"{address(self.folder, file)}: named in the manifest and gone. Put it back. {ELSEWHERE}"
                )
        for path in sorted(self.folder.glob("data/*/*.tar")):
            file = path.relative_to(self.folder).as_posix()
            if file not in known:
                shard = describe_shard(self.folder, file)
                self._check_ours(path, shard.generation)
                self.manifest = self.manifest.with_shard(shard)
                write_manifest(self.folder, self.manifest)

    def _check_ours(self, path: Path, generation: int) -> None:
        for entry in scan_shard(path):
            query = "SELECT state FROM samples WHERE (generation, key) = (?, ?)"
            if self._journal.select(query, (generation, entry.key)) != [("spooled",)]:
                raise UserError(
                    f"{path}: the manifest does not name it, and {entry.key!r} is not waiting to be sealed. "
                    f"Move it out of the cache."
                )

    def _note_sealed(self) -> None:
        """Let the journal know of shards that it has not heard of."""
        heard = dict(self._journal.select("SELECT shard, count(*) FROM samples WHERE state = 'sealed' GROUP BY shard"))
        for shard in self.manifest.shards:
            if heard.pop(shard.file, 0) == shard.samples:
                continue
            with whole(self.folder, shard) as path:
                entries = scan_shard(path)
            for entry in entries:
                found = self._journal.select(
                    "SELECT id, state FROM samples WHERE generation = ? AND key = ?", (shard.generation, entry.key)
                )
                if not found:
                    raise UserError(
                        f"{self.folder}: the journal knows nothing of {entry.key!r} in {shard.file}; the two are not "
                        f"of one cache. Put the right journal.sqlite back. {ELSEWHERE}"
                    )
                if found[0][1] != "sealed":
                    self._journal.move(found[0][0], "sealed", shard=shard.file)
        for shard in self.manifest.pruned:
            heard.pop(shard.file, None)
        if heard:
            raise UserError(
                f"{self.folder}: the journal knows of {next(iter(heard))}, the manifest does not. "
                f"Put the right manifest.json back. {ELSEWHERE}"
            )
        self._journal.flush()

    # Deciding and sealing

    def advance(self) -> None:
        """Decide what can be decided now, and seal the shards that are full."""
        for row in self._journal.rows(after=self._decided, states=(*OPEN, "spooled"), page=32):
            if row.state in OPEN:
                return
            self._decided = row.id
            if row.state == "spooled" and not self._reject_twin(row):
                self._take(row)

    def finish(self) -> None:
        """Seal what has been decided, full shard or not; the newest round is data when all of it has come to an end."""
        for split, generation in sorted(self._taken):
            self._seal(split, generation)
        rounds = self._journal.rounds()
        over = bool(rounds) and is_over(self._journal, rounds[-1].generation)
        if over and self.manifest.generation < rounds[-1].generation:
            self.manifest = replace(self.manifest, generation=rounds[-1].generation)
            write_manifest(self.folder, self.manifest)
        self._publish()
        if over and not rounds[-1].finished_at:
            self._journal.finish_round(rounds[-1].generation)

    def _publish(self) -> None:
        if read_origin(self.folder) is not None:
            update_index(self.folder)
            publish(self.folder)
        self._published = time.monotonic()

    def _reject_twin(self, row: Row) -> bool:
        bits = self._config.near_duplicate
        if bits < 0:
            return False
        for other in self._looks().near(row.perceptual_hash, bits):
            query = "SELECT a.thumbnail, b.thumbnail, b.prompt_id, b.key FROM samples a, samples b WHERE (a.id, b.id)"
            mine, theirs, prompt_id, key = self._journal.select(f"{query} = (?, ?)", (row.id, other))[0]
            if prompt_id != row.prompt_id and is_twin(mine, theirs):
                self._journal.move(row.id, "rejected", reason=f"near-duplicate: shows the same as {key}")
                self._journal.flush()
                self._spool.drop((row.generation, row.key))
                return True
        return False

    def _looks(self) -> Hashes:
        """Of all samples taken so far; those of earlier runs are read when the first one is to be decided."""
        if self._hashes is None:
            self._hashes, after = Hashes(), 0
            query = "SELECT id, perceptual_hash FROM samples WHERE state = 'sealed' AND id > ? ORDER BY id LIMIT 10000"
            while page := self._journal.select(query, (after,)):
                for sample_id, perceptual_hash in page:
                    self._hashes.add(sample_id, perceptual_hash)
                after = page[-1][0]
        return self._hashes

    def _take(self, row: Row) -> None:
        bin_ = (row.split, row.generation)
        if self._config.near_duplicate >= 0:
            self._looks().add(row.id, row.perceptual_hash)
        self._taken[bin_].append(row)
        self._taken_bytes[bin_] += self._spool.size(row)
        full = len(self._taken[bin_]) >= self._config.shard_samples
        if full or self._taken_bytes[bin_] >= self._config.shard_mb * 1e6:
            self._seal(*bin_)

    def _seal(self, split: str, generation: int) -> None:
        rows = self._taken.pop((split, generation))
        self._taken_bytes.pop((split, generation))
        self._journal.flush()  # what is sealed was durably spooled before
        file = self.manifest.next_file(split, generation)
        shard = write_shard(self.folder, file, (self._spool.read(row, row.created_at) for row in rows))
        self.manifest = self.manifest.with_shard(shard)
        write_manifest(self.folder, self.manifest)
        for row in rows:
            self._journal.move(row.id, "sealed", shard=file)
        self._journal.flush()
        for row in rows:
            self._spool.drop((row.generation, row.key))
        if time.monotonic() - self._published >= PUBLISH_S:
            self._publish()


def is_over(journal: Journal, generation: int) -> bool:
    """Whether every sample of a round has come to an end."""
    states = (*OPEN, "spooled")
    query = f"SELECT 1 FROM samples WHERE +generation = ? AND state IN ({', '.join('?' * len(states))}) LIMIT 1"
    return not journal.select(query, (generation, *states))


ELSEWHERE = "Or cache into another folder with --set out=FOLDER."
