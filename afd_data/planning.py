"""What a run has to ask for: the round that is going on, what was added, or a new round.

A cache holds the videos of one teacher, setting and seed, taken by one rule; only a refresh may go over to another
version or setting of the teacher.  Round 0 grows as prompts and takes are added, until a refresh has begun another;
from then on what is new makes a round of its own, so that a generation that trainers read stays what it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from afd_data.config import DataConfig
from afd_data.errors import UserError
from afd_data.journal import JOURNAL, Journal, Round, open_journal
from afd_data.margins import MARGINS, Margin, read_rows
from afd_data.partition import Partition
from afd_data.plan import Planned, canonical_json, plan_samples, recipe_facts
from afd_data.prompts import Prompt
from afd_data.refresh import AGAIN, Known, due, new_only
from afd_data.sealing import Sealer, is_over
from afd_data.states import LOST
from afd_data.teachers import Identity

log = logging.getLogger(__name__)

ACCEPTANCE = {"frozen", "black", "near_duplicate", "audio"}
TEACHER = {"teacher", "teacher_version", "settings"}  # facts that a refresh may change
LASTING = {"video", "seed"}  # facts that it may not: all videos of a cache have one shape
MAX_GENERATION = 9999  # names of shards have four digits for it


@dataclass(frozen=True)
class _Task:
    """What a run is told; `facts` as JSON has them."""

    recipe: DataConfig
    prompts: list[Prompt]
    identity: Identity
    facts: dict
    refresh: bool
    partition: Partition | None

    def samples(self, generation: int) -> Iterator[Planned]:
        """All that the recipe wants, as a round would ask for it."""
        return plan_samples(self.recipe, self.prompts, self.identity, generation)

    def digest(self) -> str:
        """Of everything that `samples` and `has` follow from."""
        takes = self.recipe.cache.model_dump(include={"takes", "eval_takes"})
        found = hashlib.sha256(canonical_json([self.facts, takes, str(self.partition)]).encode())
        for prompt in self.prompts:
            found.update(f"\0{prompt.id}\0{prompt.split}\0{prompt.text}".encode())
        return found.hexdigest()

    def has(self, sample: Planned) -> bool:
        """Whether it is this process's to ask for."""
        return self.partition is None or self.partition.has(sample.prompt_id)


def plan_round(
    recipe: DataConfig,
    prompts: list[Prompt],
    identity: Identity,
    journal: Journal,
    sealer: Sealer,
    refresh: bool,
    partition: Partition | None,
) -> None:
    """Put into the journal what the recipe wants and the cache lacks.

    A call that finds a round going on is for finishing it and begins no other, so that a refresh that a crash cut off
    is not bought twice.
    Raises UserError: the recipe's settings are not those of the round that is going on, prompts that changed their
    split, margins that cannot be read, a part of a cache that is not finished itself, no more numbers for rounds.
    """
    facts = recipe_facts(recipe, identity) | {"cache": recipe.cache.model_dump(include=ACCEPTANCE)}
    task = _Task(recipe, prompts, identity, json.loads(canonical_json(facts)), refresh, partition)
    rounds = journal.rounds()
    with _cache_above(sealer.folder, partition) as above:
        if not rounds:
            _first(task, journal, above, sealer.folder)
            return
        newest = rounds[-1]
        over = is_over(journal, newest.generation)
        if over and not newest.finished_at and (refresh or newest.generation > 0):
            sealer.finish()  # a crash kept it from being published
            _say_finished(newest)
        elif newest.generation == 0 and not (refresh and over):
            _go_on(task, newest, journal, sealer.folder)
            journal.plan(_lacking(task, above), digest="" if above else task.digest())
        elif not over:
            _go_on(task, newest, journal, sealer.folder)
            _say_finished(newest)
        elif partition is not None:
            log.info("this part is finished; merge the parts before another round")
        else:
            _next(task, journal, journal, sealer.folder)


def _say_finished(newest: Round) -> None:
    log.info(
        "generation %d: finishing the round that is going on; what is new or due waits for the next run",
        newest.generation,
    )


def check_same(facts: Mapping, known: Mapping, folder: Path) -> None:
    """Raises UserError naming what differs."""
    changed = [name for name in facts if known.get(name) != facts[name]]
    if changed:
        values = "; ".join(f"{name} was {known.get(name)}, is now {facts[name]}" for name in changed)
        go_over = "" if LASTING & {*changed} else "go over to them with --refresh, "
        raise UserError(
            f"{folder} was made with other settings: {values}. Set them back, "
            f"{go_over}or cache into another folder with --set out=FOLDER."
        )


def read_known(journal: Journal, paid: bool) -> dict[str, Known]:
    """What became of every key; no round may be going on.  paid: what failed may have been charged."""
    began = {one.generation: one.started_at for one in journal.rounds()}
    # SQLite takes the other columns from the row with the maximum.
    query = (
        "SELECT n.*, v.generation, v.created_at "
        "FROM (SELECT key, split, max(generation) AS generation, state, reason, fingerprint "
        "FROM samples GROUP BY key) n "
        "LEFT JOIN (SELECT key, max(generation) AS generation, created_at FROM samples WHERE state = 'sealed' "
        "GROUP BY key) v USING (key)"
    )
    known = {}
    for key, split, generation, state, reason, fingerprint, video_generation, made_at in journal.select(query):
        lost = state in LOST
        free = state == "failed" and not (paid and journal.job_id(fingerprint))
        again = free or (lost and reason.startswith(AGAIN))
        asked_at = max(began[generation], made_at or 0.0) if lost else made_at
        known[key] = Known(split, generation, video_generation, lost, again, asked_at)
    return known


def _first(task: _Task, journal: Journal, above: Journal | None, folder: Path) -> None:
    """Begin in an empty journal: with everything, or in a part with what the cache above it lacks."""
    before = above.rounds() if above else []
    if not above or not before:
        journal.start_round(0, task.facts, {}, _lacking(task, None), task.digest())
        return
    newest = before[-1]
    if newest.generation == 0 and not task.refresh:
        check_same(task.facts, newest.facts, folder)
        journal.start_round(0, task.facts, {}, _lacking(task, above))
    elif is_over(above, newest.generation):
        _next(task, journal, above, folder)
    else:
        raise UserError(f"{folder}: the cache above it has a round that is going on. Finish that without --partition.")


def _go_on(task: _Task, newest: Round, journal: Journal, folder: Path) -> None:
    """Ask again, in the round that is going on, for what failed and cost nothing."""
    check_same(task.facts, newest.facts, folder)
    for row in journal.rows(states=("failed",)):
        if row.generation == newest.generation and not (task.identity.paid and journal.job_id(row.fingerprint)):
            journal.move(row.id, "planned")
    journal.flush()


def _next(task: _Task, journal: Journal, past: Journal, folder: Path) -> None:
    """Begin the round that follows those of `past`, if anything is due."""
    rounds = past.rounds()
    lasting = {name: task.facts[name] for name in LASTING}
    check_same(lasting if task.refresh else task.facts, rounds[-1].facts, folder)
    known = read_known(past, task.identity.paid)
    generation = rounds[-1].generation + 1
    if generation > MAX_GENERATION:
        raise UserError(
            f"{folder}: has had {MAX_GENERATION} refresh rounds, and shards have no names for more. "
            "Cache into another folder with --set out=FOLDER."
        )
    wanted = _checked(task.samples(generation), known)
    if task.refresh:
        outdated = {one.generation for one in rounds if any(one.facts[name] != task.facts[name] for name in TEACHER)}
        reasons = due(task.recipe.refresh, wanted, known, outdated, _margins(task.recipe), time.time())
    else:
        reasons = new_only(wanted, known)
    if not reasons:
        log.info("nothing is due" if task.refresh else "nothing is new")
        return
    why = dict(Counter(reasons.values()))
    chosen = (sample for sample in task.samples(generation) if sample.key in reasons and task.has(sample))
    count = journal.start_round(generation, task.facts, why, chosen)
    rules = ", ".join(f"{number} {rule}" for rule, number in why.items())
    log.info("generation %d: %d videos to ask for (due: %s)", generation, count, rules)


def _lacking(task: _Task, above: Journal | None) -> Iterator[Planned]:
    """What round 0 asks for here: what is this process's, without what the cache above a part has asked for."""
    asked = {fingerprint for (fingerprint,) in above.select("SELECT fingerprint FROM samples")} if above else set()
    return (sample for sample in task.samples(0) if task.has(sample) and sample.fingerprint not in asked)


def _checked(wanted: Iterable[Planned], known: Mapping[str, Known]) -> Iterator[Planned]:
    """Raises UserError when a prompt has changed its split."""
    for sample in wanted:
        before = known.get(sample.key)
        if before is not None and before.split != sample.split:
            raise UserError(
                f"{sample.prompt!r} was in {before.split} and is now in {sample.split}, which would test on what was "
                "trained on. Undo that change of `prompts`, or cache into another folder with --set out=FOLDER."
            )
        yield sample


def _margins(recipe: DataConfig) -> dict[str, Margin]:
    """By prompt id; {} where no rule asks for them, or training has not written any yet."""
    if recipe.refresh.hardest == 0:
        return {}
    path = Path(recipe.refresh.margins or Path(recipe.out) / "train" / MARGINS)
    if recipe.refresh.margins is None and not path.exists():
        log.warning("%s: no margins yet, so refresh.hardest makes nothing due", path)
        return {}
    return {row.prompt_id: row for row in read_rows(path)}


@contextmanager
def _cache_above(folder: Path, partition: Partition | None) -> Iterator[Journal | None]:
    """The journal of the cache that a part belongs to; None where there is none."""
    above = folder.parents[1]
    if partition is None or not (above / JOURNAL).exists():
        yield None
        return
    journal = open_journal(above)
    try:
        yield journal
    finally:
        journal.close()
