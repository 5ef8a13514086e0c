"""A paid cache that is killed again and again: nothing is paid for twice, nothing that was paid for is lost.

    python -m tests.soak.paid_cache --kills 300

In episodes: `cache-teacher` with the Ark teacher against the fake provider, with prompts of every failure mode, and
now and then `reconcile` and `resubmit`, are killed with -9 at random moments.  Then a run gets through, unknown orders
are reconciled, what is provably absent is ordered again, and the books are compared with the provider's and with an
unbroken run.  Prints, for every state, how many samples were in it when a process died; a long run must have met all
but `rejected`, which nothing becomes here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

# What a run imports late, some of it for a second: children that have yet to do so would die before they seal anything.
import jinja2  # noqa: F401
import PIL.ImageDraw  # noqa: F401
import pyarrow.parquet  # noqa: F401
import webdataset.writer  # noqa: F401

from afd_data.cache import cache_teacher
from afd_data.config import CacheConfig, DataConfig, PromptsConfig
from afd_data.examples import Reading, read_example, read_places
from afd_data.inspection import verify
from afd_data.journal import JOURNAL, Journal, Row, open_journal
from afd_data.prompts import Prompt, prompt_id
from afd_data.provider_config import ArkConfig, TrafficConfig
from afd_data.reconcile import reconcile
from afd_data.resubmit import resubmit
from afd_data.shards import read_manifest
from afd_data.states import OPEN, TRANSITIONS
from afd_data.status import status
from afd_data.teachers import open_teacher, order_token
from tests.deaths import KILLED, exit_code, fork
from tests.provider import TEST_KEY, Provider, serving
from tests.provider.footage import parse_video

KEY_VARIABLE = "AFD_SOAK_KEY"
MODES = (
    *("ok", "ok", "429", "500-after-accept", "drop-after-accept", "timeout-after-accept", "drop-before-accept"),
    *("refuse", "refuse-late", "fail", "fail-after-billing", "expired", "gone", "truncated", "truncated-silently"),
    *("html", "forgets", "flaky", "slow", "slow", "slow"),  # the slow ones last, as what follows is sealed after them
)
SCENES = 3  # prompts of each mode
NEVER_TAKEN = ("refuse",)
WORKERS = 6
VIDEO = "32x32,8,8.0"  # small, as videos are not what is tested
LONGEST_LIFE = 0.3  # of a process that is to die, in unbroken runs; most live shorter
KILLS_AN_EPISODE = 40
PRICE, BILLED_TOKENS = 2.0, 100_000  # of a million tokens; of every video
LONG = 100  # kills, from which on every state must have been met
OWN = ("job", "created_at")  # of a sample's provenance: no two runs have the same
CENT = 1e-6  # by which sums may differ
GRACE_S = 0.5  # what a killed process has sent may arrive after its death
MEMORY = Path("/dev/shm")  # what a process wrote survives it, whatever the disk has of it


def recipe(provider: Provider) -> DataConfig:
    """Impatient, so that every mode is over in seconds; small shards, so that many are sealed."""
    return DataConfig(
        out="unused",
        video=parse_video(VIDEO),
        prompts=PromptsConfig(source="unused.txt"),
        teacher=ArkConfig(
            base_url=provider.base("ark"),
            key_variable=KEY_VARIABLE,
            model="seedance",
            price_per_million_tokens=PRICE,
            traffic=TrafficConfig(timeout_s=0.5, attempts=4, longest_wait_s=0.1),
        ),
        cache=CacheConfig(workers=WORKERS, poll_s=0.05, shard_samples=3, stop_after_failures=1000),
    )


def prompts() -> list[Prompt]:
    """Some of each mode; slow ones are queued and running for a while, so that deaths find them there."""
    texts = [f"mode={mode} scene {number}" for number, mode in enumerate(MODES * SCENES)]
    return [Prompt(prompt_id(text), text, "train") for text in texts]


class Episode:
    """One cache from nothing to its end."""

    def __init__(self, provider: Provider, folder: Path) -> None:
        self.provider, self.folder, self.recipe = provider, folder, recipe(provider)
        self.seen_in_state: Counter[str] = Counter()
        self.spooled: set[str] = set()
        self.gone = {prompt.id for prompt in prompts() if prompt.text.startswith("mode=gone ")}
        provider.reset(VIDEO)

    def cache(self) -> None:
        """What the children do."""
        cache_teacher(self.recipe, prompts(), self.folder, open_teacher(self.recipe.teacher), progress=False)

    def reconcile(self) -> set[str]:
        """Settle what is unknown; the prompts of what was found."""
        found = reconcile(self.folder, open_teacher(self.recipe.teacher), GRACE_S).found
        return {key.rpartition("-")[0] for key in found}

    def order_again(self) -> bool:
        """Plan again what is provably absent; whether there was any."""
        return bool(resubmit(self.folder, absent=True))

    def more(self) -> bool:
        """Whether reconciling, and ordering again what is absent, gives a run something to do."""
        time.sleep(GRACE_S)
        return bool(self.reconcile() - self.gone) or self.order_again()

    def settle(self) -> None:
        """Run, reconcile, order again what is absent, until that changes nothing (some videos are gone for good)."""
        while True:
            assert Child(self.cache).wait() == 0, "a run of its own accord failed"
            if not self.more():
                break
        assert Child(self.cache).wait() == 0, "a run of its own accord failed"

    def kill_one(self, random_lives: random.Random, longest_s: float) -> bool:
        """Start a process and kill it in the middle; False when it got through before."""
        work = self.cache
        if (self.folder / JOURNAL).exists() and random_lives.random() < 0.2:
            work, longest_s = random_lives.choice([self.reconcile, self.order_again]), longest_s / 10
        process = Child(work)
        time.sleep(longest_s * random_lives.random() ** 1.5)
        killed = process.kill()
        self._look()
        return killed

    def unfinished(self) -> bool:
        """Whether a run would have something to do."""
        counts = self.counts()
        return not counts or any(counts.get(state) for state in (*OPEN, "spooled"))

    def counts(self) -> dict[str, int]:
        """Samples by state; {} before there are any."""
        if not (self.folder / JOURNAL).exists():
            return {}
        with closing(Journal(self.folder / JOURNAL)) as journal:
            return journal.counts()

    def _look(self) -> None:
        """Note in which states the samples are, and which videos lie in the spool."""
        self.seen_in_state.update(self.counts())
        self.spooled |= {path.stem[6:] for path in (self.folder / "spool").glob("g0000-*.json")}

    def sealed(self) -> dict[str, dict]:
        """Key -> the record, with the video's sha256, and without what is its job's alone."""
        if not read_manifest(self.folder).samples():
            return {}
        reading = Reading(self.folder, "auto", None, decode=False)
        places = read_places(self.folder, "train")
        return {key: _lasting(asdict(read_example(reading, place).sample)) for key, place in places.items()}

    def check(self, expected: dict[str, dict]) -> None:
        """Raises AssertionError when the books are wrong."""
        accepted = self.provider.accepted()
        journal = open_journal(self.folder)
        rows = list(journal.rows())
        charged, reserved = journal.spend()["USD"]
        estimates = journal.select("SELECT estimate FROM requests WHERE cost IS NULL")
        journal.close()
        taken = {order_token(row.fingerprint) for row in rows if not row.prompt.startswith(MODE_NEVER)}
        assert max(accepted.values(), default=0) <= 1, f"paid for twice: {[k for k, n in accepted.items() if n > 1]}"
        assert accepted.keys() == taken, f"accepted {len(accepted)} jobs for {len(taken)} fingerprints"
        assert not [row for row in rows if row.state in OPEN], "something is left open"
        assert self.sealed() == expected, "other videos than an unbroken run's"
        assert self.spooled <= self.sealed().keys(), f"lost from the spool: {self.spooled - self.sealed().keys()}"
        shown = status(self.folder)
        assert all(row.key in shown for row in rows if row.state == "unknown"), "an unknown order is not listed"
        assert verify(self.folder) == []
        self._check_books(rows, charged)
        assert len(estimates) == self.counts().get("unknown", 0), "something else than what is unknown is reserved"
        assert abs(reserved - sum(estimate for (estimate,) in estimates)) < CENT

    def _check_books(self, rows: list[Row], charged: float) -> None:
        unknown = {order_token(row.fingerprint) for row in rows if row.state == "unknown"}
        billed = [job for job in self.provider.state()["jobs"] if job["billed"] and job["token"] not in unknown]
        price = PRICE * BILLED_TOKENS / 1e6
        assert abs(charged - price * len(billed)) < CENT, f"{charged} in the books for {len(billed)} jobs at {price}"


def _lasting(record: dict) -> dict:
    told = json.loads(record["provenance_json"])
    return {**record, "provenance_json": {name: told[name] for name in told if name not in OWN}}


MODE_NEVER = tuple(f"mode={mode} " for mode in NEVER_TAKEN)


class Child:
    """A fork of this process that does `work`."""

    def __init__(self, work: Callable[[], object]) -> None:
        sys.stdout.flush()
        self.pid = fork(work)

    def wait(self) -> int:
        """The exit code; negative: the signal that ended it."""
        return exit_code(self.pid)

    def kill(self) -> bool:
        """Kill it with -9; False when it had ended well."""
        os.kill(self.pid, signal.SIGKILL)
        code = self.wait()
        assert code in (0, KILLED), f"a run ended with {code}"
        return code != 0


def soak(kills: int, seed: int, folder: Path, say: Callable[[str], object] = print) -> Counter[str]:
    """Kill `kills` processes; returns how many samples were in each state at a death.  Raises AssertionError."""
    os.environ[KEY_VARIABLE] = TEST_KEY
    random_lives = random.Random(seed)
    seen: Counter[str] = Counter()
    with serving(folder / "provider") as provider:
        unbroken = Episode(provider, folder / "unbroken")
        unbroken.settle()
        expected = unbroken.sealed()
        unbroken.check(expected)
        say(f"an unbroken run: {len(expected)} videos of {len(prompts())} prompts")
        done, number, longest_s = 0, 0, LONGEST_LIFE * duration_s(Episode(provider, folder / "timed"))
        while done < kills:
            number += 1
            episode = Episode(provider, folder / f"episode-{number}")
            for _ in range(min(KILLS_AN_EPISODE, kills - done)):
                done += episode.kill_one(random_lives, longest_s)
                if not episode.unfinished() and not episode.more():
                    break
            episode.settle()
            episode.check(expected)
            seen += episode.seen_in_state
            say(f"episode {number}: {done} kills, {len(expected)} videos, nothing lost, nothing paid for twice")
    missed = TRANSITIONS.keys() - seen.keys() - {"rejected"}
    assert kills < LONG or not missed, f"no process died with a sample in {', '.join(sorted(missed))}"
    return seen


def duration_s(episode: Episode) -> float:
    """Of a run that nobody kills, with all videos drawn and all modules loaded, as the killed ones have them."""
    begin = time.monotonic()
    assert Child(episode.cache).wait() == 0
    return time.monotonic() - begin


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        seen = soak(arguments.kills, arguments.seed, Path(folder))
    print(f"{arguments.kills} kills in {time.monotonic() - start:.0f} s; samples by state when a process died:")
    print("\n".join(f"  {state:<10}{count:>8}" for state, count in seen.most_common()))


if __name__ == "__main__":
    main()
