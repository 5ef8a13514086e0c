"""Seconds to open a complete cache of a million videos: by `afd cache status`, and by a run up to its first request.

    python -m tests.benchmarks.large_journal [--rows 1000000]

The cache is made by SQL: its tars are empty.  Half of the time goes into making it.
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from afd_data.asking import Asker
from afd_data.cache import recover_requests
from afd_data.config import DataConfig
from afd_data.journal import JOURNAL, Journal
from afd_data.planning import plan_round
from afd_data.prompts import Prompt, prompt_id
from afd_data.sealing import Sealer
from afd_data.shards import Manifest, Shard, write_manifest
from afd_data.spool import Spool
from afd_data.status import status
from afd_data.work import COMMIT_EVERY_S
from tests.benchmarks.caching import SIZES, Prepared, recipe
from tests.benchmarks.timing import markdown


def measure(rows: int, folder: Path) -> dict[str, float]:
    """Seconds of each part of opening, by two runs with the recipe that the cache was made with."""
    wanted = recipe(SIZES["small"][1])
    teacher = Prepared(np.zeros((1, 2, 2, 3), np.uint8), paid=False)
    prompts = []
    for number in range(rows):
        text = f"a red ball rolls over table {number} and falls into the grey box beside the window"
        prompts.append(Prompt(prompt_id(text), text, "train"))
    fill(folder, wanted, prompts, teacher)
    found = {"afd cache status": seconds(lambda: status(folder))}
    for run in ("first run", "second run"):
        found |= {f"{run}: {part}": took for part, took in _opened(folder, wanted, prompts, teacher).items()}
    return found


def _opened(folder: Path, wanted: DataConfig, prompts: list[Prompt], teacher: Prepared) -> dict[str, float]:
    """What `cache_teacher` does before it asks for anything."""
    began = time.perf_counter()
    journal = Journal(folder / JOURNAL, patience_s=COMMIT_EVERY_S)
    spool = Spool(folder / "spool")
    sealer = Sealer(folder, journal, spool, wanted.cache)
    found = {"open": time.perf_counter() - began}
    found["recover"] = seconds(sealer.recover) + seconds(lambda: recover_requests(journal, spool, paid=False))
    found["plan"] = seconds(lambda: plan_round(wanted, prompts, teacher.identity, journal, sealer, False, None))
    found["spend"] = seconds(lambda: Asker(wanted, teacher, journal, spool))
    found["what is pending"] = seconds(lambda: (next(journal.pending(), None), journal.counts()))
    journal.close()
    return found


def fill(folder: Path, wanted: DataConfig, prompts: list[Prompt], teacher: Prepared) -> None:
    """Make a complete cache of this recipe, but for what stands in its tars."""
    folder.mkdir()
    journal = Journal(folder / JOURNAL)
    sealer = Sealer(folder, journal, Spool(folder / "spool"), wanted.cache)
    plan_round(wanted, prompts, teacher.identity, journal, sealer, False, None)
    journal.finish_round(0)
    journal.close()
    db = sqlite3.connect(folder / JOURNAL)
    with db:
        db.execute(
            "UPDATE samples SET state = 'sealed', shard = printf('data/train/g0000-%06d.tar', (id - 1) / 1000), "
            "perceptual_hash = printf('%016x', id), thumbnail = zeroblob(768), created_at = 1e9"
        )
        db.execute(
            "INSERT INTO requests (fingerprint, job_id, state, intent_at, submitted_at, ended_at, estimate, cost, "
            "currency) SELECT fingerprint, 'job-' || id, 'sealed', 1e9, 1e9, 1e9, 0.5, 0.5, 'USD' FROM samples"
        )
    db.close()
    (folder / "data" / "train").mkdir(parents=True)
    sizes = [min(1000, len(prompts) - first) for first in range(0, len(prompts), 1000)]
    shards = [Shard(f"data/train/g0000-{n:06d}.tar", "train", 0, size, 0, "0" * 64) for n, size in enumerate(sizes)]
    for shard in shards:
        (folder / shard.file).touch()
    write_manifest(folder, Manifest(0, tuple(shards)))


def seconds(work: Callable[[], object]) -> float:
    """Of one call, by the clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory(prefix="journal-") as folder:
        found = measure(rows, Path(folder) / "cache")
    print(markdown([f"{rows} rows", "s"], [[part, f"{took:.2f}"] for part, took in found.items()]))


if __name__ == "__main__":
    main()
