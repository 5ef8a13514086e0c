"""Manifest and index of a cache at an address -> a folder; only as large as they may be, and only by names of ours."""

from __future__ import annotations

import os
from pathlib import Path

from afd_data.errors import UserError
from afd_data.origin_record import MAX_BYTES, index_file
from afd_data.sample import SPLITS
from afd_data.shards import MANIFEST, read_manifest
from afd_data.storage import Storage


def fetch_text(storage: Storage, file: str, target: Path) -> None:
    """Fetch what lies beside the tars, of a size that it may have.  Raises as `Storage.fetch` does."""
    storage.fetch(file, target, limit=MAX_BYTES[Path(file).suffix])


def fetch_manifest(storage: Storage, part: Path) -> None:
    """Fetch the manifest to the folder `part`.  Raises UserError: none there, not one of ours."""
    storage.forget()
    try:
        fetch_text(storage, MANIFEST, part / MANIFEST)
    except FileNotFoundError:
        raise UserError(f"{storage.url}: no cache there (no {MANIFEST}). Look at the address.") from None
    try:
        read_manifest(part)
    except UserError as error:
        raise UserError(str(error).replace(str(part), storage.url)) from None


def fetch_index(storage: Storage, part: Path) -> None:
    """Fetch the index of every split in `part`'s manifest; where there is none, the tars are read.

    Called after the manifest was read: an index is never older than the manifest that it was published with.
    """
    (part / "index").mkdir()
    for split in sorted({shard.split for shard in read_manifest(part).shards}):
        try:
            fetch_text(storage, index_file(split), part / index_file(split))
        except FileNotFoundError:
            (part / index_file(split)).unlink(missing_ok=True)


def is_whole(head: Path) -> bool:
    """Whether manifest and index lie there; where the origin has no index either, it is asked for again each time."""
    try:
        splits = {shard.split for shard in read_manifest(head).shards}
    except UserError:
        return False
    return (head / MANIFEST).exists() and all((head / index_file(split)).exists() for split in splits)


def take_over(part: Path, head: Path) -> None:
    """Put what was fetched in the place of what the head has, the manifest last."""
    (head / "index").mkdir(exist_ok=True)
    for split in SPLITS:
        if (part / index_file(split)).exists():
            os.replace(part / index_file(split), head / index_file(split))
        else:
            (head / index_file(split)).unlink(missing_ok=True)
    os.replace(part / MANIFEST, head / MANIFEST)
