"""What a run reads of the cache: the teacher's videos of one generation, and what is computed from them once.

A run goes over to a newer complete generation only when a checkpoint is saved, and the checkpoint records it: what was
drawn before and what comes after then follows from the checkpoint alone, whatever the cache gets meanwhile.  A lease in
the cache keeps what the run and its checkpoints read from being pruned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from afd_data.errors import UserError
from afd_data.leases import Lease
from afd_data.origin import update_head
from afd_data.shards import read_manifest
from afd_data.stream import Stream
from afd_train.conditioning import CachedText, LatentCache
from afd_train.config import Recipe
from afd_train.parallel import Processes
from afd_train.runs import stream_folder
from afd_train.students import Student
from afd_train.validation import prompts_of

log = logging.getLogger(__name__)


class Feed:
    """Both streams, the embeddings of their prompts and, where it pays, their latents; all kept beside the shards.

    history: [step, generation] for every generation that was read, from that step on.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        student: Student,
        processes: Processes,
        recorded: Sequence[Sequence[int]] = (),
    ):
        """`recorded`: the history in the checkpoint that the run in folder `run` goes on from.

        Puts the prompts' embeddings in the place of the student's text encoder.
        """
        self._recipe, self._processes = recipe, processes
        self._decode = recipe.student.autoencoder != "wan"
        self._folder = stream_folder(recipe)
        manifest = read_manifest(self._folder)
        start = recorded[-1][1] if recorded else manifest.generation
        self.history = [list(entry) for entry in recorded] or [[0, processes.agree(start)]]
        generation = self.history[-1][1]
        # Before anything is read, so that nothing is pruned in between.
        leased = processes.main and manifest.shards
        self._lease = Lease(self._folder, generation, str(run.resolve())) if leased else None
        self.stream = self._open("train", generation)
        self.held_out = self._open("validation", generation) if recipe.prompts.validation > 0 else None
        self._streams = [self.stream, *([self.held_out] if self.held_out else [])]
        student.text = self._text = CachedText(student.text, self._folder)
        self._encoded: set[str] = set()  # prompt ids
        self.latents = None
        if not self._decode:
            self.latents = LatentCache(self._folder, student.autoencoder, recipe.video, processes.device)
        self._fill()

    @property
    def generation(self) -> int:
        """Whose view is read."""
        return self.stream.generation

    def follow(self, step: int) -> None:
        """Go over to the newest complete generation, from `step` on; all processes call it, before a checkpoint.

        Raises UserError when a sample that is new there cannot be used.
        """
        newest = self._processes.agree(self._newest())
        if newest <= self.generation:
            return
        if self._processes.local_main and not self._processes.main:
            update_head(self._folder)  # other machines have heads of their own
        if self._lease:
            self._lease.hold({*self._lease.generations, newest})
        self._processes.wait()
        log.info(f"{self._folder}: generation {newest} from step {step} on, {self.generation} before")
        for stream in self._streams:
            stream.switch(newest)
        self.history.append([step, newest])
        self._fill()

    def keep_since(self, step: int) -> None:
        """Hold the generations that checkpoints of `step` and later read, and let go of the others."""
        if self._lease:
            self._lease.hold(generations_since(self.history, step))

    def renew(self) -> None:
        """Between steps."""
        if self._lease:
            self._lease.renew()

    def release(self) -> None:
        """The run has ended; without this call its checkpoints stay resumable as long as a lease lasts."""
        if self._lease:
            self._lease.release()

    def close(self) -> None:
        """End the decoding processes."""
        for stream in self._streams:
            stream.close()

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

    def _newest(self) -> int:
        """The main process's answer counts."""
        if not self._processes.main or not self._recipe.stream.follow:
            return self.generation
        try:
            update_head(self._folder)
            return read_manifest(self._folder).generation
        except (UserError, OSError) as error:  # no reason to end a training that has all it needs
            log.warning(f"not looked for a newer generation: {error}")
            return self.generation

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

    def _open(self, split: str, generation: int) -> Stream:
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
            generation=generation,
        )


def generations_since(history: Sequence[Sequence[int]], step: int) -> set[int]:
    """Of a history as `Feed` has it: the generations that were read at `step` or later."""
    begun = [generation for first, generation in history if first <= step]
    return {*begun[-1:], *(generation for first, generation in history if first > step)}
