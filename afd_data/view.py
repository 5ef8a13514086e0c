"""Views: which samples of a cache a trainer reads, so that it can read exactly these again.

A generation's number does not say: late videos are sealed into the round that asked for them, and the first round grows
as prompts are added.  A view therefore names its shards, and on the Hub the commit in which they lie.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from afd_data.errors import UserError
from afd_data.examples import Place, read_places
from afd_data.files import is_held
from afd_data.journal import JOURNAL, LOCK, open_journal
from afd_data.leases import KEPT_S
from afd_data.origin import local_head, steady
from afd_data.sealing import is_over
from afd_data.shards import read_manifest

HUB = "hf://"


@dataclass(frozen=True)
class View:
    """The newest sample of each key among `shards` of one split, names that the manifest gave when it was looked at.

    shards: of rounds up to `generation`, hidden ones too; commit: the address that tars on the Hub are read at.
    """

    generation: int
    shards: tuple[str, ...]
    commit: str | None = None

    @staticmethod
    def recorded(state: Mapping) -> View:
        """What `dataclasses.asdict` and JSON made of one."""
        return View(state["generation"], tuple(state["shards"]), state["commit"])


def newest_views(folder: Path, splits: Collection[str], generation: int | None = None) -> dict[str, View]:
    """What the manifest says now, by split: of `generation`, or of the newest complete one.

    Raises UserError: no such generation, a damaged manifest.
    """
    with steady(folder) as pinned:
        manifest = read_manifest(folder)
        generation = manifest.generation if generation is None else generation
        if generation > manifest.generation:
            raise UserError(
                f"{folder}: generation {generation} is not complete here, the newest is {manifest.generation}. "
                "Restore the cache, or train into a new folder."
            )
        names = {split: tuple(shard.file for shard in manifest.of(split, generation)) for split in splits}
    commit = pinned if pinned is not None and pinned.startswith(HUB) else None
    return {split: View(generation, names[split], commit) for split in splits}


def read_view(folder: Path, split: str, view: View, shown: Collection[str] = ()) -> tuple[dict[str, Place], str | None]:
    """Places of a view's samples by key, and the address that those tars are read at that do not lie in the folder.

    shown: shards of which samples were seen in it before, and which it cannot be read without; hidden ones may have
    been pruned.  Raises UserError: no samples, pruned or lost shards, a damaged index.
    """
    with steady(folder) as pinned:
        manifest = read_manifest(folder)
        named = {shard.file for shard in manifest.shards}
        lost = [file for file in shown if file not in named]
        if not lost:
            repository = (view.commit or "").rpartition("@")[0]
            same = view.commit is not None and (pinned or "").startswith(f"{repository}@")
            return read_places(folder, split, view.generation, view.shards), view.commit if same else pinned
    if view.commit is not None:  # a commit keeps what later ones have pruned
        head = local_head(view.commit)
        return read_places(head, split, view.generation, view.shards), view.commit
    if {shard.file for shard in manifest.pruned}.isdisjoint(lost):
        raise UserError(
            f"{folder}: the {split} samples are not those that the interrupted run used ({lost[0]} is not named). "
            "Restore the cache, or train into a new folder."
        )
    raise UserError(
        f"{folder}: {split} samples of generation {view.generation}, which the interrupted run reads, have been pruned "
        f"({len(lost)} shards, {lost[0]} among them); a stopped run's lease keeps them for {KEPT_S / 3600:g} "
        "hours. Train into a new folder."
    )


def first_round_goes_on(folder: Path) -> bool:
    """Whether the first generation of a cache in this folder has not come to its end yet, as its journal tells.

    Without a journal that can be read: whether somebody writes there.
    """
    if (folder / JOURNAL).exists():
        try:
            journal = open_journal(folder)
            try:
                rounds = journal.rounds()
                return bool(rounds) and rounds[-1].generation == 0 and not is_over(journal, 0)
            finally:
                journal.close()
        except (UserError, sqlite3.Error):
            pass
    return is_held(folder / LOCK)
