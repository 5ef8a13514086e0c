"""Looking at a cache without changing it: `status` (requests), `inspect` (data), `verify` (every hash again).

All three may run while another process writes.  `inspect` and `verify` need no journal, so they also serve caches
that came from elsewhere.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path

from afd_data.cache import JOURNAL, LOCK
from afd_data.errors import UserError
from afd_data.files import is_held
from afd_data.index import FROM_SAMPLE, FROM_TAR, read_index, shard_rows
from afd_data.journal import Journal
from afd_data.sample import parse_sample
from afd_data.shards import MANIFEST, Manifest, Shard, describe_shard, read_manifest
from afd_data.states import TRANSITIONS
from afd_data.video import read_video

SHEET_CLIPS, SHEET_FRAMES = 12, 8
CELL_PX, TEXT_PX, GAP_PX = 120, 18, 4
LISTED = 10  # examples shown of what was not taken


def status(folder: Path) -> str:
    """States and counts of samples, reasons, spend.  Raises UserError where there is no cache."""
    journal = open_journal(folder)
    try:
        counts = journal.counts()
        order = [state for state in TRANSITIONS if state in counts]
        lines = [f"{folder}: {sum(counts.values())} samples planned"]
        lines += [f"  {state:<10}{counts[state]:>8}" for state in order]
        lines.append("a run is going on" if is_held(folder / LOCK) else "no run is going on")
        lines += _reason_lines(journal) + _spend_lines(journal) + _shard_lines(read_manifest(folder))
    finally:
        journal.close()
    return "\n".join(lines)


def open_journal(folder: Path) -> Journal:
    """The journal of an existing cache, for reading.  Raises UserError where there is none."""
    if not (folder / JOURNAL).exists():
        raise UserError(f"{folder}: no {JOURNAL} in it. Name the folder of a cache, for example OUT/cache.")
    return Journal(folder / JOURNAL, writable=False)


def _reason_lines(journal: Journal) -> list[str]:
    rows = journal.select("SELECT state, key, prompt, reason FROM samples WHERE reason != '' ORDER BY state, id")
    kinds = Counter(f"{state} ({reason.partition(':')[0]})" for state, _, _, reason in rows)
    lines = [f"{count} x {kind}" for kind, count in kinds.most_common()]
    lines += [f"  {key} {prompt[:60]!r}: {reason}" for _, key, prompt, reason in rows[:LISTED]]
    return [*lines, f"  ... and {len(rows) - LISTED} more"] if len(rows) > LISTED else lines


def _spend_lines(journal: Journal) -> list[str]:
    rows = journal.select("SELECT currency, sum(cost), count(*) FROM requests WHERE cost > 0 GROUP BY currency")
    return [f"spent: {cost:.2f} {currency} on {count} requests" for currency, cost, count in rows]


def _shard_lines(manifest: Manifest) -> list[str]:
    return [
        f"{split}: {count} samples in {len(manifest.of(split))} shards, "
        f"{sum(shard.bytes for shard in manifest.of(split)) / 1e6:.1f} MB"
        for split, count in manifest.samples().items()
    ]


def inspect(folder: Path, out: Path | None = None) -> str:
    """Provenance, ages and durations of the sealed data; with `out`, also a contact sheet (PNG) of clips x frames.

    Raises UserError where nothing is sealed or a shard is damaged.
    """
    manifest = read_manifest(folder)
    rows = [row for shard in manifest.shards for row in _rows(folder, shard)]
    if not rows:
        raise UserError(
            f"{folder}: no {MANIFEST} with samples in it. Run `afd cache-teacher` first, or name OUT/cache."
        )
    lines = [f"{folder}: {len(rows)} samples, newest generation {manifest.generation}", *_shard_lines(manifest)]
    made = Counter((row["teacher"], row["teacher_version"], row["licence"]) for row in rows)
    lines += [
        f"teacher {name} version {version}, licence {licence}: {n}" for (name, version, licence), n in made.items()
    ]
    shapes = Counter((row["width"], row["height"], row["frames"], row["fps"]) for row in rows)
    lines += [f"{w}x{h}, {frames} frames at {fps:g} fps: {n}" for (w, h, frames, fps), n in shapes.items()]
    lines.append(f"{len({row['prompt_id'] for row in rows})} prompts, {sum(row['duration_s'] for row in rows):.0f} s")
    lines.append(
        f"made {_day(min(row['created_at'] for row in rows))} to {_day(max(row['created_at'] for row in rows))}"
    )
    first = parse_sample(_member(folder, rows[0], "json"), rows[0]["key"])
    lines += [
        f"asked for: {first.requested_json}",
        f"for example {first.key}: {first.prompt!r}, {first.provenance_json}",
    ]
    if out is not None:
        _contact_sheet(folder, rows, out)
        lines.append(f"contact sheet: {out}")
    return "\n".join(lines)


def _rows(folder: Path, shard: Shard) -> list[dict]:
    """Index rows of a shard, from the tar where the index does not have them."""
    try:
        table = read_index(folder, shard.split)
    except UserError:
        return shard_rows(folder, shard)
    rows = [row for row in table.to_pylist() if row["shard"] == shard.file]
    return rows if len(rows) == shard.samples else shard_rows(folder, shard)


def _day(seconds: float) -> str:
    """The local time; a tar's header may hold a number that is none."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s after 1970"


def _member(folder: Path, row: dict, kind: str) -> bytes:
    """Raises UserError when the index, which a stranger may have written, points outside the tar."""
    path, offset, size = folder / row["shard"], row[f"{kind}_offset"], row[f"{kind}_size"]
    with open(path, "rb") as file:
        if offset < 0 or size < 0 or offset + size > file.seek(0, io.SEEK_END):
            raise UserError(f"{path}: truncated in {row['key']}.{kind}, or the index is wrong. Run `afd cache verify`.")
        file.seek(offset)
        return file.read(size)


def _contact_sheet(folder: Path, rows: list[dict], out: Path) -> None:
    """One line of frames a clip, its prompt above; clips and frames are spread evenly over what there is."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    chosen = [rows[round(i)] for i in np.linspace(0, len(rows) - 1, min(SHEET_CLIPS, len(rows)))]
    line_px = CELL_PX + TEXT_PX + GAP_PX
    sheet = Image.new("RGB", (SHEET_FRAMES * (CELL_PX + GAP_PX), line_px * len(chosen)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TEXT_PX - 6)
    for line, row in enumerate(chosen):
        draw.text((2, line * line_px), f"{row['key']}  {row['prompt']}"[:150], fill="black", font=font)
        frames = read_video(_member(folder, row, "mp4"), "pyav", row["key"]).frames
        for column, index in enumerate(np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int)):
            scale = CELL_PX / max(frames.shape[1:3])
            size = (max(1, round(frames.shape[2] * scale)), max(1, round(frames.shape[1] * scale)))
            resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            cell = Image.fromarray(frames[index]).resize(size, resample)
            sheet.paste(cell, (column * (CELL_PX + GAP_PX), line * line_px + TEXT_PX))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(data.getvalue())


def verify(folder: Path) -> list[str]:
    """Check every hash, member and index row again; return what is wrong, [] if nothing is."""
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    problems = [] if manifest.shards else [f"{folder}: nothing is sealed in it"]
    rows: dict[str, list[dict]] = {}
    for shard in manifest.shards:
        try:
            problems += _shard_problems(folder, shard)
            rows[shard.file] = shard_rows(folder, shard)
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
    for split in manifest.samples():
        problems += _index_problems(folder, split, [row for s in manifest.of(split) for row in rows.get(s.file, [])])
    named = {shard.file for shard in manifest.shards}
    tars = {path.relative_to(folder).as_posix() for path in folder.glob("data/*/*.tar")}
    problems += [f"{folder / file}: not named in the manifest" for file in sorted(tars - named)]
    if (folder / JOURNAL).exists():
        problems += _journal_problems(folder, rows)
    return problems


def _written_since(folder: Path, manifest: Manifest) -> bool:
    """Whether index, journal and tars may be of another moment than `manifest`: hashing takes minutes.

    Raises UserError when the manifest can no longer be read.
    """
    return is_held(folder / LOCK) or read_manifest(folder) != manifest


def _shard_problems(folder: Path, shard: Shard) -> list[str]:
    found = describe_shard(folder, shard.file)
    return [
        f"{folder / shard.file}: {name} is {getattr(found, name)}, the manifest says {getattr(shard, name)}"
        for name in ("bytes", "sha256", "samples")
        if getattr(found, name) != getattr(shard, name)
    ]


def _key_problems(rows: dict[str, list[dict]]) -> list[str]:
    """A sample occurs once, and a prompt in one split only."""
    keys = Counter((row["generation"], row["key"]) for found in rows.values() for row in found)
    splits: dict[str, set[str]] = {}
    for found in rows.values():
        for row in found:
            splits.setdefault(row["prompt_id"], set()).add(row["split"])
    return [
        f"{key} of generation {generation} is sealed {n} times" for (generation, key), n in keys.items() if n > 1
    ] + [
        f"prompt {prompt_id} is in {' and '.join(sorted(found))}"
        for prompt_id, found in splits.items()
        if len(found) > 1
    ]


def _index_problems(folder: Path, split: str, rows: list[dict]) -> list[str]:
    try:
        known = {(row["generation"], row["key"]): row for row in read_index(folder, split).to_pylist()}
    except UserError as error:
        return [str(error)]
    found = {(row["generation"], row["key"]): row for row in rows}
    problems = [f"index of {split}: {key} is missing" for _, key in found.keys() - known.keys()]
    problems += [f"index of {split}: {key} is in no readable shard" for _, key in known.keys() - found.keys()]
    for name in sorted(found.keys() & known.keys()):
        odd = [column for column in FROM_SAMPLE | FROM_TAR if found[name][column] != known[name][column]]
        if odd:
            problems.append(f"index of {split}: {name[1]} differs from its tar in {', '.join(odd)}")
    return problems


def _journal_problems(folder: Path, rows: dict[str, list[dict]]) -> list[str]:
    """Whether the journal counts the same samples as sealed, from the same requests."""
    try:
        journal = open_journal(folder)
    except UserError as error:
        return [str(error)]
    sealed = set(journal.select("SELECT shard, key, fingerprint FROM samples WHERE state = 'sealed'"))
    journal.close()
    found = {(file, row["key"], row["fingerprint"]) for file, in_shard in rows.items() for row in in_shard}
    problems = [f"{file}: {key} is sealed, but not by the journal" for file, key, _ in sorted(found - sealed)]
    return problems + [f"journal: {key} is not in {file} as it was sealed" for file, key, _ in sorted(sealed - found)]
