"""Tars and spooled files of merged caches come to their new place: hard links, copies, or tars written anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from afd_data.errors import UserError
from afd_data.files import atomic_write, file_sha256, fsync
from afd_data.merge_table import Source, Table
from afd_data.origin import whole
from afd_data.shards import Content, Manifest, Shard, read_member, scan_shard, write_shard
from afd_data.spool import Spool


@dataclass(frozen=True)
class Tar:
    """A tar of which the samples `keys` are taken over, as `file`."""

    cache: int
    shard: Shard
    file: str
    keys: frozenset[str]


def bring_tars(out: Path, caches: list[Source], tars: list[Tar], manifest: Manifest) -> Manifest:
    """The manifest with what has become of the tars; all are durable under their names when this returns."""
    made: dict[str, Shard] = {}
    for tar in tars:
        (out / tar.file).parent.mkdir(parents=True, exist_ok=True)
        with whole(caches[tar.cache].folder, tar.shard) as path:
            if not path.exists():
                raise UserError(f"{path}: named in the manifest and gone. Put it back.")
            if len(tar.keys) == tar.shard.samples:
                _bring(path, out / tar.file)
                _check_copy(path, out / tar.file, tar.shard)
                made[tar.file] = replace(tar.shard, file=tar.file)
            else:
                made[tar.file] = write_shard(out, tar.file, _contents(path, tar.keys))
    for folder in sorted({(out / tar.file).parent for tar in tars}):
        fsync(folder)
        fsync(folder.parent)
    return replace(manifest, shards=tuple(made.get(shard.file, shard) for shard in manifest.shards))


def _bring(path: Path, target: Path) -> None:
    """A hard link; a copy where that cannot be."""
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        with atomic_write(target) as file, open(path, "rb") as source:
            shutil.copyfileobj(source, file)
        shutil.copystat(path, target)


def _check_copy(path: Path, target: Path, shard: Shard) -> None:
    """Raises UserError when the tar is not the one that its manifest names; a link is only measured."""
    same = os.path.samefile(path, target) or file_sha256(target) == shard.sha256
    if target.stat().st_size != shard.bytes or not same:
        target.unlink()
        raise UserError(f"{path}: not the tar that its manifest names; damaged. `afd cache verify` says more.")


def _contents(path: Path, keys: frozenset[str]) -> Iterator[Content]:
    with open(path, "rb") as file:
        for entry in scan_shard(path):
            if entry.key in keys:
                mp4, record = (read_member(file, entry, kind) for kind in ("mp4", "json"))
                yield Content(entry.key, entry.created_at, mp4, record)


def bring_spool(out: Path, table: Table) -> None:
    """Finished videos that no tar holds yet; those of a job that was being recorded when its run died, too."""
    spool = Spool(out / "spool")
    for number, cache in enumerate(table.caches[1:], start=1):
        source = Spool(cache.folder / "spool")
        for planned in table.spooled(number):
            if source.find(planned) is not None:
                for ending in ("mp4", "json"):  # the JSON last: it makes the sample count
                    _bring(source.path(planned, ending), spool.path(planned, ending))
    fsync(spool.folder)
