"""Several caches become one: the parts of a plan (`--partition`, Ray), or caches that were made apart.

    merge(parts_of(cache), cache, near_duplicate=0, move=True)      the parts of a plan, which are gone afterwards
    merge([one, other], both, near_duplicate=0)                     two caches, which stay as they are

What `out` holds already it keeps.  The rest comes in the order of a plan, so that of two videos that show the same the
one stays that an unbroken run would have kept, and the parts of a plan that came to its end make the samples of such a
run.  Tars of which everything is taken over are hard links (copies on another file system), others are written anew.
Journals are joined, costs and running jobs included: what is open in a source goes on in `out`, and there only.

The order on disk: a list of the tars to come (`merge.json`), tars, spooled files, manifest, journal, index and card;
then the list goes, and last the parts.  The manifest decides: until it is replaced, tars of the list are removed again,
after that the same command finds its samples in place.  Nobody else writes meanwhile: `out` and all sources are
locked, and `check_parts` refuses a cache in which a list lies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from afd_data.card import write_card
from afd_data.config import CacheConfig
from afd_data.errors import UserError
from afd_data.files import OLD, atomic_write, fsync, one_writer
from afd_data.index import update_index
from afd_data.journal import JOURNAL, LOCK, Journal, open_journal
from afd_data.merge_files import Tar, bring_spool, bring_tars
from afd_data.merge_journal import join_journals
from afd_data.merge_table import Source, Table
from afd_data.origin import publish
from afd_data.partition import MERGE, PARTS, Partition
from afd_data.sealing import Sealer
from afd_data.shards import MANIFEST, SHARD_FILE, Manifest, read_manifest, write_manifest
from afd_data.spool import Spool


@dataclass(frozen=True)
class Merged:
    """What came of a merge; `added` counts samples that `out` had not."""

    folder: Path
    caches: int
    manifest: Manifest
    added: int
    twins: int

    def text(self) -> str:
        """For the terminal."""
        samples = ", ".join(f"{count} {split}" for split, count in self.manifest.samples().items()) or "nothing"
        lines = [f"{self.folder}: {samples}; {self.added} new from {self.caches} caches"]
        if self.twins:
            lines.append(f"  {self.twins} left out: near-duplicate, they show the same as another prompt's video")
        return "\n".join(lines)


def merge(sources: Sequence[Path], out: Path, near_duplicate: int, move: bool = False) -> Merged:
    """Join caches into `out`, a new folder or a cache; with `move`, the sources are removed when all is done.

    near_duplicate: as `cache.near_duplicate` of the recipe.  Killed anywhere, the same call ends with the same cache.
    Raises UserError: no cache there, another writer, a round that goes on, a part that is missing, different videos
    of one sample, a prompt in two splits, videos of two shapes.
    """
    folders = _folders(sources, out)
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        for folder in (out, *folders):
            locks.enter_context(one_writer(folder / LOCK, f"cache {folder}"))
        begun = (out / MERGE).exists()
        _recover(out, folders, begun)
        caches = [Source(path, read_manifest(path), (path / JOURNAL).exists()) for path in (out, *folders)]
        _check_complete(caches)
        table = Table(caches)
        twins = table.find_twins(near_duplicate)
        tars, manifest = _plan(table)
        _check_free(out, tars)
        with atomic_write(out / MERGE) as file:
            file.write(json.dumps([tar.file for tar in tars]).encode())
        try:
            manifest = bring_tars(out, caches, tars, manifest)
            bring_spool(out, table)
        except BaseException:
            _forget_tars(out)
            if not begun:
                (out / MERGE).unlink()  # `out` is as it was
            raise
        write_manifest(out, manifest)
        if any(cache.has_journal for cache in caches):
            join_journals(table, out / JOURNAL, _new_names(caches, tars, manifest), near_duplicate)
        update_index(out)
        write_card(out)
        publish(out)
        (out / MERGE).unlink()
        fsync(out)
        if move:
            _remove(folders)
    return Merged(out, len(folders), manifest, sum(len(tar.keys) for tar in tars), twins)


def planned_near_duplicate(sources: Sequence[Path]) -> int:
    """The `cache.near_duplicate` that the sources were planned with; 0 where they do not agree, or do not say."""
    found = set()
    for path in sources:
        if (path / JOURNAL).exists():
            journal = open_journal(path)
            try:
                found |= {each.facts.get("cache", {}).get("near_duplicate", 0) for each in journal.rounds()}
            finally:
                journal.close()
    return found.pop() if len(found) == 1 else 0


def _folders(sources: Sequence[Path], out: Path) -> list[Path]:
    """Each source once, without `out`."""
    folders = {path.resolve(): path for path in sources if path.resolve() != out.resolve()}
    for folder in folders.values():
        if not (folder / MANIFEST).exists() and not (folder / JOURNAL).exists():
            raise UserError(f"{folder}: no cache (no {MANIFEST}, no {JOURNAL}). Name the folders of caches.")
        if (folder / MERGE).exists():
            raise UserError(f"{folder}: a merge into it was broken off. Run that `afd cache merge` again first.")
    if not folders:
        raise UserError(f"{out}: nothing to merge into it. Name the folders of other caches.")
    return list(folders.values())


def _recover(out: Path, folders: list[Path], begun: bool) -> None:
    """Finish what a crash left: of runs in any of the caches, or of a merge that was begun."""
    for path in (out / PARTS).glob(f"*{OLD}"):
        shutil.rmtree(path)
    if begun:
        _forget_tars(out)
    for folder in folders if begun else [out, *folders]:  # the journal of `out` may lag behind its manifest
        if (folder / JOURNAL).exists():
            journal = Journal(folder / JOURNAL)
            try:
                Sealer(folder, journal, Spool(folder / "spool"), CacheConfig()).recover()
            finally:
                journal.close()


def _forget_tars(out: Path) -> None:
    """Remove the tars of the list that did not become data."""
    named = {shard.file for shard in read_manifest(out).shards}
    for file in json.loads((out / MERGE).read_bytes()):
        if SHARD_FILE.fullmatch(file) and file not in named:
            (out / file).unlink(missing_ok=True)


def _check_complete(caches: list[Source]) -> None:
    """Raises UserError when parts of a refresh round are missing: half a round would become data."""
    newest = max(cache.manifest.generation for cache in caches)
    parts = [part for cache in caches if (part := Partition.of(cache.folder)) is not None]
    if not parts or newest <= caches[0].manifest.generation:
        return
    if missing := sorted(set(range(parts[0].count)) - {part.index for part in parts}):
        raise UserError(
            f"{caches[0].folder}: part {missing[0]} of {parts[0].count} of refresh round {newest} is missing. "
            f"Run its --partition {missing[0]}/{parts[0].count} first."
        )


def _plan(table: Table) -> tuple[list[Tar], Manifest]:
    """The tars to come, and the manifest as it will be (but for the sizes of those that are written anew)."""
    manifest, tars = table.caches[0].manifest, []
    for number, cache in enumerate(table.caches[1:], start=1):
        for shard in cache.manifest.shards:
            if keys := table.keys_of(number, shard):
                file = manifest.next_file(shard.split, shard.generation)
                tars.append(Tar(number, shard, file, keys))
                manifest = manifest.with_shard(replace(shard, file=file))
        for shard in cache.manifest.pruned:
            if shard.sha256 not in {known.sha256 for known in manifest.pruned}:
                gone = replace(shard, file=manifest.next_file(shard.split, shard.generation))
                manifest = replace(manifest, pruned=(*manifest.pruned, gone))
    newest = max(cache.manifest.generation for cache in table.caches)
    return tars, replace(manifest, generation=newest)


def _new_names(caches: list[Source], tars: list[Tar], manifest: Manifest) -> dict[tuple[int, str], str]:
    """(cache, tar there) -> tar here."""
    names = {(tar.cache, tar.shard.file): tar.file for tar in tars}
    pruned = {shard.sha256: shard.file for shard in manifest.pruned}
    for number, cache in enumerate(caches):
        names |= {(number, shard.file): pruned[shard.sha256] for shard in cache.manifest.pruned}
    return names


def _check_free(out: Path, tars: list[Tar]) -> None:
    for tar in tars:
        if (out / tar.file).exists():
            raise UserError(
                f"{out / tar.file}: no manifest names it. Finish what was being written there, or remove it."
            )


def _remove(folders: list[Path]) -> None:
    """All lose their names first: a part that is half removed is none."""
    gone = [folder.rename(folder.with_name(folder.name + OLD)) for folder in folders]
    for folder in gone:
        shutil.rmtree(folder)
    for parent in {folder.parent for folder in gone}:
        if parent.name == PARTS and not any(parent.iterdir()):
            parent.rmdir()
