"""How the requests of a cache stand, from another terminal and while a run goes on: states, spend, pace, refusals."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from afd_data.errors import UserError
from afd_data.files import is_held
from afd_data.journal import JOURNAL, LOCK, Journal, open_journal
from afd_data.partition import parts_of
from afd_data.reconcile import GIVEN_UP
from afd_data.shards import MANIFEST, Manifest, read_manifest
from afd_data.states import LOST, OPEN, TRANSITIONS

LISTED = 10  # examples shown of what was not taken
_LOST = f"FROM samples WHERE state IN ({', '.join('?' * len(LOST))})"
PACE_S = 1800.0  # the pace is that of the requests that ended in this time


def status(folder: Path) -> str:
    """The state of a cache and of its parts.  Raises UserError where there is neither journal nor manifest."""
    folders = [own for own in (folder, *parts_of(folder)) if (own / JOURNAL).exists()]
    if not folders and (folder / MANIFEST).exists():
        raise UserError(
            f"{folder}: sealed data without a journal, so nothing is asked here. `afd cache inspect` shows it."
        )
    return "\n\n".join(_status(own) for own in folders or [folder])


def _status(folder: Path) -> str:
    journal = open_journal(folder)
    try:
        counts = journal.counts()
        lines = [f"{folder}: {sum(counts.values())} samples planned"]
        lines += [f"  {state:<10}{counts[state]:>8}" for state in TRANSITIONS if state in counts]
        going = is_held(folder / LOCK)
        lines.append("a run is going on" if going else "no run is going on")
        lines += _pace_lines(journal, counts) if going else []
        lines += spend_lines(journal) + _round_lines(journal) + _lost_lines(journal)
    finally:
        journal.close()
    return "\n".join([*lines, *shard_lines(read_manifest(folder))])


def spend_lines(journal: Journal) -> list[str]:
    """What was charged, and what is reserved for requests in flight or unknown; nothing for a free teacher."""
    lines = []
    for currency, (charged, reserved) in journal.spend().items():
        if charged or reserved:
            more = f", {reserved:.2f} more reserved for requests in flight or unknown" if reserved else ""
            lines.append(f"spent: {charged:.2f} {currency}{more}")
    return lines


def _pace_lines(journal: Journal, counts: dict[str, int]) -> list[str]:
    now = time.time()
    query = "SELECT count(*), min(ended_at) FROM requests WHERE ended_at > ?"
    ended, first = journal.select(query, (now - PACE_S,))[0]
    left = sum(counts.get(state, 0) for state in OPEN)
    if ended < 2 or now <= first:
        return [f"{left} to do"]
    per_s = ended / (now - first)
    return [f"{60 * per_s:.1f} a minute; {left} to do, about {_duration(left / per_s)} more"]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _round_lines(journal: Journal) -> list[str]:
    lines = []
    for each in journal.rounds()[1:]:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.started_at))
        why = ", ".join(f"{count} {name}" for name, count in each.why.items())
        lines.append(
            f"generation {each.generation}: {why}; started {day}{'' if each.finished_at else ', not complete yet'}"
        )
    return lines


def lost_kinds(journal: Journal) -> Counter[str]:
    """How many samples ended without a video, by state and the reason's first words."""
    kinds: Counter[str] = Counter()
    query = f"SELECT state, reason, count(*) {_LOST} GROUP BY state, reason"
    for state, reason, count in journal.select(query, LOST):
        kinds[f"{state} ({reason.partition(':')[0]})"] += count
    return kinds


def _lost_lines(journal: Journal) -> list[str]:
    kinds = lost_kinds(journal)
    lines = [f"{count} x {kind}" for kind, count in kinds.most_common()]
    # Every unknown one is listed, as each may be a bill, but those that a person has looked at and given up.
    asked = f"state = 'unknown' AND reason NOT LIKE '{GIVEN_UP}:%'"
    unknown = journal.select(f"SELECT key, prompt, reason FROM samples WHERE {asked} ORDER BY id")
    query = f"SELECT key, prompt, reason {_LOST} AND NOT ({asked}) ORDER BY state, id LIMIT ?"
    others = journal.select(query, (*LOST, LISTED))
    lines += [f"  {key} {prompt[:60]!r}: {reason}" for key, prompt, reason in [*unknown, *others]]
    more = sum(kinds.values()) - len(unknown) - len(others)
    return [*lines, f"  ... and {more} more"] if more else lines


def shard_lines(manifest: Manifest) -> list[str]:
    """Samples, shards and bytes per split."""
    return [
        f"{split}: {count} samples in {len(manifest.of(split))} shards, "
        f"{sum(shard.bytes for shard in manifest.of(split)) / 1e6:.1f} MB"
        for split, count in manifest.samples().items()
    ]
