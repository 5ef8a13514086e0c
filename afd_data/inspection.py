"""Looking at sealed data without changing it: `inspect` (what it is), `verify` (every hash again).

Both may run while another process writes, and need no journal, so they also serve caches
that came from elsewhere and heads of caches whose tars lie elsewhere.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from afd_data.card_facts import read_facts, read_record
from afd_data.errors import UserError
from afd_data.files import is_held
from afd_data.index import FROM_SAMPLE, FROM_TAR, read_index, schema, shard_rows
from afd_data.journal import JOURNAL, LOCK, open_journal
from afd_data.origin import address, whole
from afd_data.sample import SPLITS
from afd_data.shards import MANIFEST, Manifest, Shard, describe_shard, read_manifest
from afd_data.sheet import write_sheet
from afd_data.status import lost_kinds, shard_lines

if TYPE_CHECKING:
    import pyarrow


def inspect(folder: Path, out: Path | None = None) -> str:
    """Provenance, ages, durations and cost of the data; with `out`, also a contact sheet (PNG) of clips x frames.

    Where there is a journal, also what was asked for and did not come.  Raises UserError where nothing is sealed, or a
    shard or the journal is damaged.
    """
    manifest = read_manifest(folder)
    total = sum(manifest.samples().values())
    if not total:
        raise UserError(
            f"{folder}: no {MANIFEST} with samples in it. Run `afd cache-teacher` first, or name OUT/cache."
        )
    facts = read_facts(folder, manifest)
    lines = [f"{folder}: {total} samples, newest generation {manifest.generation}", *shard_lines(manifest)]
    lines += [
        f"teacher {made.teacher} version {made.version}, licence {made.licence}, distillation {made.distillation}: {n}"
        for made, n in facts.terms.items()
    ]
    lines += [f"{w}x{h}, {frames} frames at {fps:g} fps: {n}" for (w, h, frames, fps), n in facts.shapes.items()]
    prompts = {prompt_id for found in facts.prompts.values() for prompt_id in found}
    lines.append(f"{len(prompts)} prompts, {facts.seconds:.0f} s")
    first, last = (pick(r for o in facts.rounds.values() for r in (o.first, o.last)) for pick in (min, max))
    lines.append(f"made {_day(first)} to {_day(last)}")
    lines += [f"cost {cost:.2f} {currency} for {n} videos" for currency, (n, cost) in facts.costs.items()]
    lines += _lost_lines(folder)
    example = read_record(folder, facts.shown[0])
    lines += [
        f"asked for: {example.requested_json}",
        f"for example {example.key}: {example.prompt!r}, {example.provenance_json}",
    ]
    if out is not None:
        write_sheet(folder, facts.shown, out)
        lines.append(f"contact sheet: {out}")
    return "\n".join(lines)


def _lost_lines(folder: Path) -> list[str]:
    if not (folder / JOURNAL).exists():
        return []
    journal = open_journal(folder)
    try:
        kinds = lost_kinds(journal)
    except sqlite3.DatabaseError as error:
        raise UserError(f"{folder / JOURNAL}: damaged ({error}). Restore it; the data need no journal.") from None
    finally:
        journal.close()
    return [f"not in it: {count} x {kind}" for kind, count in kinds.most_common()]


def _day(seconds: float) -> str:
    """The local time; a tar's header may hold a number that is none."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s after 1970"


def verify(folder: Path) -> list[str]:
    """Check every hash, member and index row again; return what is wrong, [] if nothing is.

    Tars that lie elsewhere are fetched whole, one after the other.
    """
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    problems = [] if manifest.shards else [f"{folder}: nothing is sealed in it"]
    rows: dict[str, pyarrow.Table] = {}
    for shard in manifest.shards:
        try:
            with whole(folder, shard) as path:
                root = path.parents[2]
                problems += _shard_problems(root, shard, address(folder, shard.file))
                rows[shard.file] = _table(shard_rows(root, shard))
        except UserError as error:
            problems.append(str(error))
        except OSError as error:  # a failed read does not name its file
            problems.append(f"{folder / shard.file}: cannot be read ({error.strerror or error})")
    problems += _key_problems(rows)
    try:
        if _written_since(folder, manifest):
            return problems
    except UserError as error:
        return [*problems, str(error)]
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        if shards:
            problems += _index_problems(folder, split, {shard.file: rows.get(shard.file) for shard in shards})
    named = {shard.file for shard in manifest.shards}
    tars = {path.relative_to(folder).as_posix() for path in folder.glob("data/*/*.tar")}
    problems += [f"{folder / file}: not named in the manifest" for file in sorted(tars - named)]
    if (folder / JOURNAL).exists():
        problems += _journal_problems(folder, rows, {shard.file for shard in manifest.pruned})
    return problems


def _table(rows: list[dict]) -> pyarrow.Table:
    """A tenth of what the rows take up as Python objects."""
    import pyarrow

    return pyarrow.Table.from_pylist(rows, schema())


def _written_since(folder: Path, manifest: Manifest) -> bool:
    """Whether index, journal and tars may be of another moment than `manifest`: hashing takes minutes.

    Raises UserError when the manifest can no longer be read.
    """
    return is_held(folder / LOCK) or read_manifest(folder) != manifest


def _shard_problems(folder: Path, shard: Shard, where: str) -> list[str]:
    found = describe_shard(folder, shard.file)
    return [
        f"{where}: {name} is {getattr(found, name)}, the manifest says {getattr(shard, name)}"
        for name in ("bytes", "sha256", "samples")
        if getattr(found, name) != getattr(shard, name)
    ]


def _key_problems(rows: dict[str, pyarrow.Table]) -> list[str]:
    """A sample occurs once, and a prompt in one split only."""
    keys = Counter(name for table in rows.values() for name in _columns(table, "generation", "key"))
    splits: dict[str, set[str]] = {}
    for table in rows.values():
        for prompt_id, split in _columns(table, "prompt_id", "split"):
            splits.setdefault(prompt_id, set()).add(split)
    return [
        f"{key} of generation {generation} is sealed {n} times" for (generation, key), n in keys.items() if n > 1
    ] + [
        f"prompt {prompt_id} is in {' and '.join(sorted(found))}"
        for prompt_id, found in splits.items()
        if len(found) > 1
    ]


def _columns(table: pyarrow.Table, *names: str) -> list[tuple]:
    return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))


def _index_problems(folder: Path, split: str, rows: dict[str, pyarrow.Table | None]) -> list[str]:
    """`rows`: of each shard of the split what its tar says, None where that could not be read."""
    import pyarrow
    from pyarrow.compute import field

    try:
        index = read_index(folder, split)
    except UserError as error:
        return [str(error)]
    readable = pyarrow.array([file for file, table in rows.items() if table is not None], "string")
    strange = index.filter(~field("shard").isin(readable)).column("key").to_pylist()
    problems = [f"index of {split}: {key} is in no readable shard" for key in strange]
    for file, table in rows.items():
        if table is not None:
            known = index.filter(field("shard") == file)
            problems += [] if known.equals(table) else _row_problems(split, known.to_pylist(), table.to_pylist())
    return problems


def _row_problems(split: str, known: list[dict], found: list[dict]) -> list[str]:
    in_index, in_tar = ({(row["generation"], row["key"]): row for row in rows} for rows in (known, found))
    problems = [f"index of {split}: {key} is missing" for _, key in in_tar.keys() - in_index.keys()]
    problems += [f"index of {split}: {key} is in no readable shard" for _, key in in_index.keys() - in_tar.keys()]
    for name in sorted(in_tar.keys() & in_index.keys()):
        odd = [column for column in FROM_SAMPLE | FROM_TAR if in_tar[name][column] != in_index[name][column]]
        if odd:
            problems.append(f"index of {split}: {name[1]} differs from its tar in {', '.join(odd)}")
    return problems


def _journal_problems(folder: Path, rows: dict[str, pyarrow.Table], pruned: set[str]) -> list[str]:
    """Whether the journal counts the same samples as sealed, from the same requests."""
    try:
        journal = open_journal(folder)
    except UserError as error:
        return [str(error)]
    try:
        sealed = set(journal.select("SELECT shard, key, fingerprint FROM samples WHERE state = 'sealed'"))
    except sqlite3.DatabaseError as error:
        return [f"{folder / JOURNAL}: damaged ({error})"]
    finally:
        journal.close()
    found = {name for table in rows.values() for name in _columns(table, "shard", "key", "fingerprint")}
    sealed = {row for row in sealed if row[0] not in pruned}
    problems = [f"{file}: {key} is sealed, but not by the journal" for file, key, _ in sorted(found - sealed)]
    return problems + [f"journal: {key} is not in {file} as it was sealed" for file, key, _ in sorted(sealed - found)]
