"""The index of a split: `index/SPLIT.parquet`, one row a sample, with its place in its tar and its hashes.

Every row comes from the tars that the manifest names, so the index can be thrown away at any time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from afd_data.errors import UserError
from afd_data.files import atomic_write
from afd_data.sample import MEMBERS, SPLITS, Sample, parse_sample
from afd_data.shards import Shard, read_manifest, read_member, scan_shard

if TYPE_CHECKING:
    import pyarrow

FROM_SAMPLE = {
    "key": "string",
    "prompt_id": "string",
    "prompt": "string",
    "split": "string",
    "take": "int64",
    "generation": "int64",
    "fingerprint": "string",
    "teacher": "string",
    "teacher_version": "string",
    "frames": "int64",
    "fps": "float64",
    "width": "int64",
    "height": "int64",
    "duration_s": "float64",
    "cost": "float64",
    "currency": "string",
    "licence": "string",
    "perceptual_hash": "string",
}
FROM_TAR = {
    "created_at": "float64",  # seconds since 1970, from the tar header
    "shard": "string",
    **{f"{kind}_{what}": "int64" for kind in MEMBERS for what in ("offset", "size")},
    **{f"{kind}_sha256": "string" for kind in MEMBERS},
}


def schema() -> pyarrow.Schema:
    """Columns of the index."""
    import pyarrow

    return pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in (FROM_SAMPLE | FROM_TAR).items()])


def index_path(folder: Path, split: str) -> Path:
    """Where the index of a split lies in a cache."""
    return folder / "index" / f"{split}.parquet"


def read_index(folder: Path, split: str) -> pyarrow.Table:
    """The index of a split, one row a sample in the order of the tars.  Raises UserError when it is not one of ours."""
    import pyarrow
    import pyarrow.parquet

    path = index_path(folder, split)
    try:
        table = pyarrow.parquet.read_table(path)
        table.validate(full=True)  # a stranger's text need not be UTF-8
    except FileNotFoundError:
        raise UserError(
            f"{path}: no index. The same `afd cache-teacher` command makes it again from the tars."
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Remove it; it is made again from the tars.") from None
    if table.schema != schema():
        raise UserError(f"{path}: not an index of this version. Remove it; it is made again from the tars.")
    if any(column.null_count for column in table.columns):
        raise UserError(f"{path}: has empty cells, so afd did not write it. Remove it; it is made again from the tars.")
    return table


def shard_rows(folder: Path, shard: Shard) -> list[dict]:
    """Index rows of one shard, read from the tar itself.

    Raises UserError when a member's name, JSON, key, split or generation is off.
    """
    path = folder / shard.file
    rows = []
    with open(path, "rb") as file:
        for entry in scan_shard(path):
            data = {kind: read_member(file, entry, kind) for kind in MEMBERS}
            sample = parse_sample(data["json"], f"{path}: {entry.key}.json")
            check_sample(sample, entry.key, shard, path)
            row = {name: getattr(sample, name) for name in FROM_SAMPLE}
            row |= {"created_at": entry.created_at, "shard": shard.file}
            for kind in MEMBERS:
                row[f"{kind}_offset"], row[f"{kind}_size"] = entry.members[kind]
                row[f"{kind}_sha256"] = hashlib.sha256(data[kind]).hexdigest()
            if row["mp4_sha256"] != sample.video_sha256:
                raise UserError(f"{path}: {entry.key}.mp4 is not the video that its JSON was written for")
            rows.append(row)
    return rows


def check_sample(sample: Sample, key: str, shard: Shard, path: Path) -> None:
    """Raises UserError when a JSON member stands under another name, split or generation than its own."""
    found, expected = (sample.key, sample.split, sample.generation), (key, shard.split, shard.generation)
    if found != expected:
        raise UserError(f"{path}: {key}.json says key, split, generation {found}, it stands under {expected}")


def rebuild_index(folder: Path) -> None:
    """Write the index of every split anew from the tars that the manifest names.  Raises UserError on damage."""
    for split in SPLITS:
        index_path(folder, split).unlink(missing_ok=True)
    update_index(folder)


def update_index(folder: Path) -> None:
    """Bring the index into agreement with the manifest; reads only the tars that it does not know yet."""
    import pyarrow
    import pyarrow.parquet

    manifest = read_manifest(folder)
    for split in manifest.samples():
        try:
            known = read_index(folder, split).to_pylist()
        except UserError:
            known = []
        by_shard: dict[str, list[dict]] = {}
        for row in known:
            by_shard.setdefault(row["shard"], []).append(row)
        rows, changed = [], False
        for shard in manifest.of(split):
            mine = by_shard.pop(shard.file, [])
            if len(mine) != shard.samples:
                mine, changed = shard_rows(folder, shard), True
            rows += mine
        if changed or by_shard:
            index_path(folder, split).parent.mkdir(exist_ok=True)
            with atomic_write(index_path(folder, split)) as file:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema()), file)
