"""The index of a split: `index/SPLIT.parquet`, one row a sample, with its place in its tar and its hashes.

Every row comes from the tars that the manifest names, so the index can be thrown away at any time.  Tars of a round
that is not complete have their rows too: what is data, `Manifest.of` says.  One row group a tar, so that an index of
any length is read and brought up to date with the rows of one tar in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from afd_data.errors import UserError
from afd_data.files import atomic_write
from afd_data.members import unreadable
from afd_data.origin import address, whole
from afd_data.origin_record import index_file
from afd_data.sample import MEMBERS, SPLITS, Sample, parse_sample
from afd_data.shards import MAX_SAMPLES, Shard, read_manifest, read_member, scan_shard

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

MAX_GROUP_BYTES = 2**28  # of the rows of one tar, as they are stored and as they are read

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


def schema(packed: bool = False) -> pyarrow.Schema:
    """Columns of the index; `packed`: as they are read, with each different text once."""
    import pyarrow

    kinds = {name: pyarrow.type_for_alias(kind) for name, kind in (FROM_SAMPLE | FROM_TAR).items()}
    text = pyarrow.dictionary(pyarrow.int32(), pyarrow.string()) if packed else pyarrow.string()
    return pyarrow.schema([(name, text if kind == pyarrow.string() else kind) for name, kind in kinds.items()])


def index_path(folder: Path, split: str) -> Path:
    """Where the index of a split lies in a cache."""
    return folder / index_file(split)


def read_index(folder: Path, split: str) -> pyarrow.Table:
    """The index of a split, one row a sample in the order of the tars.  Raises UserError when it is not one of ours."""
    import pyarrow

    return pyarrow.concat_tables([schema().empty_table(), *_groups(folder, split)])


def index_rows(folder: Path, split: str, columns: Sequence[str]) -> Iterator[dict]:
    """Some columns of the index, row by row in the order of the tars.  Raises UserError when it is not one of ours."""
    for group in _groups(folder, split):
        for batch in group.select(list(columns)).to_batches(max_chunksize=1000):
            yield from batch.to_pylist()


def _groups(folder: Path, split: str) -> Iterator[pyarrow.Table]:
    """The row groups of an index, each checked: a stranger may have written it.  Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    path = index_path(folder, split)
    again = "Remove it; it is made again from the tars."
    try:
        texts = [name for name, kind in (FROM_SAMPLE | FROM_TAR).items() if kind == "string"]
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            if file.schema_arrow != schema(packed=True):
                raise UserError(f"{path}: not an index of this version. {again}")
            for number in range(file.num_row_groups):
                facts = file.metadata.row_group(number)
                if facts.num_rows > MAX_SAMPLES or facts.total_byte_size > MAX_GROUP_BYTES:
                    raise UserError(f"{path}: claims more in row group {number} than an index of afd has. {again}")
                group = file.read_row_group(number)
                if sum(_text_bytes(group.column(name)) for name in texts) > MAX_GROUP_BYTES:
                    raise UserError(f"{path}: unpacks to more in row group {number} than afd writes. {again}")
                group = group.cast(schema())
                group.validate(full=True)  # text need not be UTF-8
                if any(column.null_count for column in group.columns):
                    raise UserError(f"{path}: has empty cells, so afd did not write it. {again}")
                yield group
    except FileNotFoundError:
        raise UserError(
            f"{path}: no index. The same `afd cache-teacher` command makes it again from the tars."
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}). {again}") from None


def _text_bytes(column: pyarrow.ChunkedArray) -> int:
    """What a column of texts takes up when each row has its own: a text that repeats is stored once."""
    from pyarrow.compute import call_function

    lengths = (call_function("binary_length", [chunk.dictionary]).take(chunk.indices) for chunk in column.chunks)
    return sum(call_function("sum", [found]).as_py() or 0 for found in lengths)


def shard_rows(folder: Path, shard: Shard) -> list[dict]:
    """Index rows of one shard, read from the tar itself, which is fetched where it lies elsewhere.

    Raises UserError when a member's name, JSON, key, split or generation, or the number of samples is off, OSError
    where it cannot be read.
    """
    rows = []
    with whole(folder, shard) as path, open(path, "rb") as file:
        entries = scan_shard(path)
        if len(entries) != shard.samples:
            raise UserError(f"{path}: holds {len(entries)} samples, the manifest says {shard.samples}. Copy it again.")
        for entry in entries:
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


def check_sample(sample: Sample, key: str, shard: Shard, path: Path | str) -> None:
    """Raises UserError when a JSON member stands under another name, split or generation than its own."""
    found, expected = (sample.key, sample.split, sample.generation), (key, shard.split, shard.generation)
    if found != expected:
        raise UserError(f"{path}: {key}.json says key, split, generation {found}, it stands under {expected}")


def update_index(folder: Path) -> None:
    """Bring the index into agreement with the manifest; reads only the tars that it does not know yet.

    Raises UserError naming the tar that is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    manifest = read_manifest(folder)
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        known = _known_groups(folder, split)
        wanted = [(shard.file, shard.samples) for shard in shards]
        path = index_path(folder, split)
        if not shards:
            path.unlink(missing_ok=True)
            continue
        if [(file, rows) for file, (_, rows) in known.items()] == wanted:
            continue
        path.parent.mkdir(exist_ok=True)
        old = pyarrow.parquet.ParquetFile(path) if known else None
        with atomic_write(path) as file, pyarrow.parquet.ParquetWriter(file, schema()) as writer:
            for shard in shards:
                number, rows = known.get(shard.file, (0, -1))
                if old is not None and rows == shard.samples:
                    table = old.read_row_group(number)
                else:
                    table = pyarrow.Table.from_pylist(_rows(folder, shard), schema())
                writer.write_table(table, row_group_size=max(1, table.num_rows))
        if old is not None:
            old.close()


def _rows(folder: Path, shard: Shard) -> list[dict]:
    try:
        return shard_rows(folder, shard)
    except OSError as error:
        raise unreadable(address(folder, shard.file), error) from None


def _known_groups(folder: Path, split: str) -> dict[str, tuple[int, int]]:
    """Number and rows of each tar's row group in an index; {} where that cannot be used, or was made otherwise."""
    known: dict[str, tuple[int, int]] = {}
    try:
        for number, group in enumerate(_groups(folder, split)):
            files = group.column("shard").unique().to_pylist()
            if len(files) != 1 or files[0] in known:
                return {}
            known[files[0]] = number, group.num_rows
    except UserError:
        return {}
    return known
