"""Old generations are taken away: shards that no kept generation shows, and none that a trainer reads.

A shard goes from the manifest's `shards` to its `pruned` first; then its tar is removed, here and at the origin.  What
a crash leaves of that is finished by the next prune, and here also by the next run.  The journal keeps its rows.
"""

from __future__ import annotations

from pathlib import Path

from afd_data.errors import UserError
from afd_data.examples import read_places
from afd_data.files import one_writer
from afd_data.index import update_index
from afd_data.journal import LOCK
from afd_data.leases import live_generations, live_shards
from afd_data.origin import publish, remove, sizes
from afd_data.origin_record import read_origin
from afd_data.shards import MANIFEST, Manifest, Shard, read_manifest, write_manifest


def prune(folder: Path, keep_generations: int, now: float | None = None, dry_run: bool = False) -> list[Shard]:
    """`prune_held` by a process that is not the cache's writer; with `dry_run`, only say what would go.

    Raises UserError: no cache there or somebody else's, another process is writing, a damaged index or tar.
    """
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: no {MANIFEST} in it. Name the folder of a cache, for example OUT/cache.")
    origin = read_origin(folder)
    if origin is not None and not origin.writer:
        raise UserError(f"{folder}: a copy of what others write at {origin.url}; only they can prune it.")
    if dry_run:
        return prunable(folder, keep_generations, now)
    with one_writer(folder / LOCK, f"cache {folder}"):
        return prune_held(folder, keep_generations, now)


def prune_held(folder: Path, keep_generations: int, now: float | None = None) -> list[Shard]:
    """Remove what is `prunable`; the caller holds the cache's lock.  Returns what the manifest lost.

    Raises UserError: a damaged index or tar, no access to the origin.
    """
    gone = prunable(folder, keep_generations, now)
    manifest = read_manifest(folder).without(gone)
    if gone:
        write_manifest(folder, manifest)
        update_index(folder)
        publish(folder)
    remove_pruned(folder, manifest)
    for shard in _left_at_origin(folder, manifest):
        remove(folder, shard.file)
    return gone


def prunable(folder: Path, keep_generations: int, now: float | None = None) -> list[Shard]:
    """Shards without a sample in the view of the newest `keep_generations` generations or of any with a live lease.

    Nor those that a lease names: of a generation that got samples later, a trainer reads what it had before.

    `now`: seconds since 1970.  Raises UserError when the index or a tar that it lacks is damaged.
    """
    assert keep_generations >= 1, keep_generations
    manifest = read_manifest(folder)
    newest = manifest.generation
    views = {*range(max(0, newest - keep_generations + 1), newest + 1), *live_generations(folder, now)}
    if views >= set(range(newest + 1)):
        return []
    seen = live_shards(folder, now) | {
        place.shard.file
        for split in manifest.samples()
        for generation in views
        if manifest.of(split, generation)
        for place in read_places(folder, split, generation).values()
    }
    return [shard for shard in manifest.shards if shard.generation <= newest and shard.file not in seen]


def remove_pruned(folder: Path, manifest: Manifest) -> None:
    """Delete the local tars that the manifest names as pruned."""
    for shard in manifest.pruned:
        (folder / shard.file).unlink(missing_ok=True)


def _left_at_origin(folder: Path, manifest: Manifest) -> list[Shard]:
    if not manifest.pruned or read_origin(folder) is None:
        return []
    there = sizes(folder)
    return [shard for shard in manifest.pruned if shard.file in there]
