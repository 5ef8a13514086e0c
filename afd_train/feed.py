"""What a run reads of the cache: the teacher's videos of one generation, and what is computed from them once.

A run goes over to what the cache has got only when a checkpoint is saved, and the checkpoint records the view that is
read: what was drawn before and what comes after then follows from the checkpoint alone, whatever the cache gets
meanwhile.  A lease in the cache keeps what the run and its checkpoints read from being pruned.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from afd_data.errors import UserError
from afd_data.files import is_held
from afd_data.journal import LOCK
from afd_data.leases import Lease
from afd_data.origin import update_head
from afd_data.origin_record import read_origin
from afd_data.shards import read_manifest
from afd_data.stream import Stream
from afd_data.view import View, first_round_goes_on, newest_views
from afd_train.conditioning import CachedText, LatentCache
from afd_train.config import Recipe
from afd_train.parallel import Processes
from afd_train.runs import stream_folder
from afd_train.students import Student
from afd_train.validation import prompts_of

log = logging.getLogger(__name__)


class Feed:
    """Both streams, the embeddings of their prompts and, where it pays, their latents; all kept beside the shards.

    history: [step, generation] for every view that was read, from that step on.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        student: Student,
        processes: Processes,
        kept: Sequence[Mapping[str, Any]] = (),
    ):
        """`kept`: `state_dict` of the checkpoints of the run in folder `run`; it goes on from the last.

        Puts the prompts' embeddings in the place of the student's text encoder.
        """
        self._recipe, self._processes = recipe, processes
        self._decode = recipe.student.autoencoder != "wan"
        self._folder = stream_folder(recipe)
        splits = ["train", *(["validation"] if recipe.prompts.validation > 0 else [])]
        states = dict(zip(splits, _positions(kept[-1]), strict=True)) if kept else {}
        views = {split: View.recorded(state["view"]) for split, state in states.items()}
        views = views or self._agreed(newest_views(self._folder, splits) if processes.main else None)
        assert views, splits
        self.history = [list(entry) for entry in kept[-1]["generations"]] if kept else [[0, views["train"].generation]]
        self._streams: list[Stream] = []
        self._lease, self._resumable = None, bool(kept)
        try:
            if processes.main and read_manifest(self._folder).shards:
                # Before anything is read, so that nothing is pruned in between.
                self._lease = Lease(self._folder, views["train"].generation, str(run.resolve()), *_needed(kept))
            for split in splits:
                self._streams.append(self._open(split, views[split], states[split]["shown"] if kept else ()))
            self.stream = self._streams[0]
            self.held_out = self._streams[1] if len(splits) > 1 else None
            self._hold_also()
            student.text = self._text = CachedText(student.text, self._folder)
            self._encoded: set[str] = set()  # prompt ids
            self.latents = None
            if not self._decode:
                self.latents = LatentCache(self._folder, student.autoencoder, recipe.video, processes.device)
            self._fill()
        except BaseException:
            self.close()
            raise
        if processes.main and not kept:
            self._warn_of_half()

    @property
    def generation(self) -> int:
        """Newest round of the view that is read."""
        return self.stream.generation

    def follow(self, step: int) -> None:
        """Go over to what the cache has now, from `step` on; all processes call it, before a checkpoint.

        To a newer complete generation, or to samples that came late to the one that is read.  Where one of the machines
        cannot get it, all stay with what they read.  Raises UserError when a sample that is new cannot be used.
        """
        views = self._agreed(self._newest())
        if views is None:
            return
        generation = views["train"].generation
        self._hold_also(generation)
        if not self._processes.all(self._fetched()):
            log.warning("not gone over to what is new in the cache: a machine could not get it")
            return
        log.info(f"{self._folder}: generation {generation} from step {step} on, {self.generation} before")
        for stream in self._streams:
            stream.switch(views[stream.split])
        self._hold_also()
        self.history.append([step, generation])
        self._fill()

    def keep(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Hold what these checkpoints read, given by their `state_dict`, and let go of everything else."""
        self._resumable = True
        if self._lease:
            self._lease.hold(*_needed(states))

    def renew(self) -> None:
        """Between steps."""
        if self._lease:
            self._lease.renew()

    def close(self, done: bool = False) -> None:
        """End the decoding processes, and the lease too where the run is `done` or has no checkpoint yet.

        Otherwise its checkpoints stay resumable as long as a lease lasts.
        """
        for stream in self._streams:
            stream.close()
        if self._lease and (done or not self._resumable):
            self._lease.release()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: what has been read so far."""
        return {
            "generations": [list(entry) for entry in self.history],
            "train": self.stream.state_dict(),
            "held_out": self.held_out.state_dict() if self.held_out else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.  Raises UserError when that data is not there any more, or another."""
        self.stream.load_state_dict(state["train"])
        if self.held_out:
            self.held_out.load_state_dict(state["held_out"])

    def _newest(self) -> dict[str, View] | None:
        """What to go over to, None for nothing; the main process's answer counts."""
        if not self._processes.main or not self._recipe.stream.follow:
            return None
        try:
            update_head(self._folder)
            views = newest_views(self._folder, [stream.split for stream in self._streams])
            if views["train"].generation > self.generation:
                return views
            # Half of what is being added is not gone over to; of a cache elsewhere it cannot be told whether it is.
            if self._elsewhere() or is_held(self._folder / LOCK) or first_round_goes_on(self._folder):
                return None
        except (UserError, OSError) as error:  # no reason to end a training that has all it needs
            log.warning(f"not looked for a newer generation: {error}")
            return None
        added = (set(views[stream.split].shards) - set(stream.view.shards) for stream in self._streams)
        return views if any(added) else None

    def _elsewhere(self) -> bool:
        origin = read_origin(self._folder)
        return origin is not None and not origin.writer

    def _agreed(self, views: Mapping[str, View] | None) -> dict[str, View] | None:
        """The main process's, on all of them."""
        record = {split: asdict(view) for split, view in views.items()} if views else None
        record = json.loads(self._processes.agree_text(json.dumps(record)))
        return {split: View.recorded(view) for split, view in record.items()} if record else None

    def _fetched(self) -> bool:
        """Whether this machine has what the main process has seen; other machines have heads of their own."""
        if not self._processes.local_main or self._processes.main:
            return True
        try:
            update_head(self._folder)
        except (UserError, OSError) as error:
            log.warning(f"{error}")
            return False
        return True

    def _hold_also(self, *generations: int) -> None:
        """Beside what is held: these generations, and what is read now."""
        if self._lease:
            shown = {file for stream in self._streams for file in stream.shown}
            self._lease.hold({*self._lease.generations, *generations, self.generation}, {*self._lease.shards, *shown})

    def _warn_of_half(self) -> None:
        if self.generation == 0 and first_round_goes_on(self._folder):
            log.warning(
                f"{self._folder}: holds {len(self.stream.keys)} training samples so far, and its first generation is "
                "still being made. Training reads these until a checkpoint is saved after that has ended."
            )

    def _fill(self) -> None:
        """Encode what is new in the view; then no encoder stays in memory."""
        self._check_alike()
        self._text.fill(self._new_prompts(), self._processes.index, self._processes.count)
        if self.latents is not None:
            for stream in self._streams:
                self.latents.fill(stream)

    def _new_prompts(self) -> Iterator[str]:
        for stream in self._streams:
            for prompt_id, text in prompts_of(stream, known=self._encoded):
                self._encoded.add(prompt_id)
                yield text

    def _check_alike(self) -> None:
        for stream in self._streams:
            own = int(stream.state_dict()["data_sha256"][:15], 16)
            if self._processes.agree(own) != own:
                raise UserError(
                    f"{self._folder}: not all processes see the same {stream.split} samples of generation "
                    f"{self.generation}. Run again when nothing is added to it, with one cache for all machines."
                )

    def _open(self, split: str, view: View, shown: Sequence[str]) -> Stream:
        recipe = self._recipe
        return Stream(
            self._folder,
            recipe.stream,
            split,
            seed=recipe.seed,
            rank=self._processes.index,
            ranks=self._processes.count,
            video=recipe.video,
            decode=self._decode,
            view=view,
            shown=shown,
        )


def _positions(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of the streams, in the order of `Feed`, in one of its states."""
    return [position for position in (state["train"], state["held_out"]) if position is not None]


def _needed(states: Sequence[Mapping[str, Any]]) -> tuple[set[int], set[str]]:
    """Generations and shards that runs going on from these states read."""
    positions = [position for state in states for position in _positions(state)]
    shards = {file for position in positions for file in position["shown"]}
    return {position["view"]["generation"] for position in positions}, shards
