"""A cache anywhere -> a folder of this machine: shards, index, manifest, card and contact sheet.

What comes is a stranger's: only names that afd gives are fetched, and a tar gets its name when its sha256 is the one
that the manifest says.  The manifest is written after everything that it names.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

from afd_data.card import write_card
from afd_data.card_facts import complete
from afd_data.errors import UserError
from afd_data.files import file_sha256, fsync, one_writer
from afd_data.index import update_index
from afd_data.journal import LOCK
from afd_data.leases import live_generations
from afd_data.origin import is_remote, local_head, sizes
from afd_data.origin_record import CARD, MAX_BYTES, SHEET, index_file, read_origin
from afd_data.progress import progress_bar
from afd_data.shards import MANIFEST, Manifest, Shard, read_manifest, write_manifest
from afd_data.storage import open_storage

log = logging.getLogger(__name__)

PULLING = ".pull"  # in a folder that a pull has begun to fill
OWN = ("journal.sqlite", "spool", "parts", "origin.json")  # of caches that are more than a copy


def pull(source: str, folder: Path, progress: bool = True) -> Manifest:
    """Copy the data of the cache `source` to `folder`; returns its manifest and logs what was taken.

    source: hf://datasets/OWNER/NAME[@REVISION], another address that fsspec knows, or a path.  The same call again goes
    on: whole shards stay, and what was pulled before is brought up to date.  Raises UserError: nothing there, no
    access, no network, a shard that is not what its sha256 says, no room, or `folder` holds something else.
    """
    _check_target(folder)
    head = local_head(source)
    manifest = complete(read_manifest(head))
    if not manifest.shards:
        raise UserError(f"{source}: no cache there, or nothing is sealed in it. Look at the address.")
    pulling = folder / PULLING
    pulling.mkdir(parents=True, exist_ok=True)
    with one_writer(folder / LOCK, f"{folder}"):
        missing = _missing(source, head, folder, manifest)
        total = sum(shard.bytes for shard in missing)
        with progress_bar(total, "B", "pull", disable=not progress, unit_scale=True) as bar:
            for shard in missing:
                _take(source, head, shard, folder)
                bar.update(shard.bytes)
        _take_rest(head, folder, manifest)
        shutil.rmtree(pulling, ignore_errors=True)
    here = len(manifest.shards) - len(missing)
    log.info(f"{source}: {len(missing)} shards ({total / 1e6:.1f} MB) copied to {folder}, {here} were there already")
    return manifest


def _check_target(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if own := sorted(names & set(OWN)):
        raise UserError(f"{folder}: is a cache with {own[0]}, not a copy of one. Name another folder to copy to.")
    if names and not names & {MANIFEST, PULLING}:
        raise UserError(f"{folder}: holds {min(names)}, which is of no cache. Name an empty folder, or a new one.")


def _missing(source: str, head: Path, folder: Path, manifest: Manifest) -> list[Shard]:
    """Shards that `folder` lacks.  Raises UserError before anything is copied where that cannot end well."""
    known = {shard.file: shard.sha256 for shard in read_manifest(folder).shards}
    there = {shard.file: shard.sha256 for shard in (*manifest.shards, *manifest.pruned)}
    if odd := [file for file, sha256 in known.items() if there.get(file) != sha256]:
        raise UserError(f"{folder}: its {odd[0]} is of another cache than {source}. Name another folder to copy to.")
    missing = [shard for shard in manifest.shards if not _is_here(folder / shard.file, shard, shard.file in known)]
    remote = sizes(head)
    for shard in missing:
        found = remote.get(shard.file) if is_remote(head, shard.file) else _size(head / shard.file)
        if found != shard.bytes:
            what = "is not there" if found is None else f"has {found} bytes"
            raise UserError(f"{source}: {shard.file} {what}, the manifest says {shard.bytes}. It has to be sent again.")
    wanted, free = sum(shard.bytes for shard in missing), shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(f"{folder}: {wanted / 1e9:.1f} GB are to be copied, {free / 1e9:.1f} GB are free.")
    return missing


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _is_here(path: Path, shard: Shard, trusted: bool) -> bool:
    """Whether the whole shard lies there; what an earlier, finished pull named is not hashed again."""
    return _size(path) == shard.bytes and (trusted or file_sha256(path) == shard.sha256)


def _take(source: str, head: Path, shard: Shard, folder: Path) -> None:
    part = folder / PULLING / "shard"
    try:
        _copy(head, shard.file, part, shard.bytes)
    except FileNotFoundError:
        raise UserError(f"{source}: {shard.file} is gone. It may have been pruned; run the same again.") from None
    found = file_sha256(part)
    if found != shard.sha256:
        raise UserError(f"{source}: {shard.file} has sha256 {found}, the manifest says {shard.sha256}; not taken.")
    fsync(part)
    path = folder / shard.file
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, path)
    fsync(path.parent)


def _take_rest(head: Path, folder: Path, manifest: Manifest) -> None:
    """Index, manifest, card and contact sheet; then what was pruned goes, unless a trainer here may read it."""
    manifest = _with_leased(folder, manifest)
    (folder / "index").mkdir(exist_ok=True)
    for split in manifest.samples():
        _copy_if_there(head, index_file(split), folder)
    write_manifest(folder, manifest)
    update_index(folder)
    copied = [_copy_if_there(head, name, folder) for name in (SHEET, CARD)]
    if not all(copied):
        write_card(folder)
    for shard in manifest.pruned:
        (folder / shard.file).unlink(missing_ok=True)


def _with_leased(folder: Path, manifest: Manifest) -> Manifest:
    """`manifest`, with what was pruned there and a trainer here may read still among its data."""
    newest = max(live_generations(folder), default=-1)
    here = {shard for shard in read_manifest(folder).shards if (folder / shard.file).exists()}
    kept = tuple(shard for shard in manifest.pruned if shard in here and shard.generation <= newest)
    pruned = tuple(shard for shard in manifest.pruned if shard not in kept)
    return replace(manifest, shards=(*kept, *manifest.shards), pruned=pruned)


def _copy_if_there(head: Path, file: str, folder: Path) -> bool:
    """Whether a text or picture lay there.  Raises UserError: larger than it may be."""
    part = folder / PULLING / "text"
    limit = MAX_BYTES[Path(file).suffix]
    try:
        if (size := _size(head / file)) is not None and size > limit:
            raise UserError(f"{head / file}: has {size} bytes, at most {limit} are copied")
        _copy(head, file, part, limit)
    except FileNotFoundError:
        return False
    os.replace(part, folder / file)
    return True


def _copy(head: Path, file: str, target: Path, limit: int) -> None:
    """Raises FileNotFoundError."""
    origin = read_origin(head)
    if origin is None or (head / file).exists():
        shutil.copyfile(head / file, target)
    else:
        open_storage(origin.pinned).fetch(file, target, limit)
