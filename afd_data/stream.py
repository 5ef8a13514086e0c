"""Sealed shards -> an endless stream of examples, in an order that any process can work out.

A stream reads one view: the newest sample of every key among the shards that the view names.  The order is a function
of (the samples of the view, seed, epoch): neither shards, ranks nor worker processes change it.
Knows nothing of torch, devices or training.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

from afd_data.config import StreamConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.examples import Example, Memory, Reading, read_example
from afd_data.view import View, newest_views, read_view

AHEAD = 2  # examples that wait or are decoded per worker process


def epoch_order(keys_by_prompt: Mapping[str, Sequence[str]], seed: int, epoch: int) -> list[str]:
    """Every key once, in rounds: each round visits every prompt that has takes left, once, in random order."""

    def drawn(*what: object) -> bytes:
        return hashlib.sha256("/".join(map(str, (seed, epoch, *what))).encode()).digest()

    takes = {prompt: sorted(keys, key=drawn) for prompt, keys in keys_by_prompt.items()}
    rounds = max(map(len, takes.values()), default=0)
    order = []
    for number in range(rounds):
        prompts = [prompt for prompt, keys in takes.items() if len(keys) > number]
        order += [
            takes[prompt][number] for prompt in sorted(prompts, key=lambda prompt: drawn("round", number, prompt))
        ]
    return order


def leave_ctrl_c_to_the_parent() -> None:
    """Start of a worker process: the trainer stops it, not the terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Stream:
    """Endless examples of one split; `state_dict` and `load_state_dict` go on at the exact sample.

    `video`, where given, is what every clip must look like.  Without `decode`, clips are read and checked but have no
    frames: for training on cached latents.  Close it (or use `with`) when `config.workers` > 0.
    Rank r of n draws items r, r + n, r + 2 n ... of the endless order, so that ranks together read what one would.
    `view`: what is read, by default all that the cache has now; what it gets later is read after `switch` only.
    `shown`: shards that a recorded view showed, and must show again.
    Raises UserError: no samples, no such generation, an index that does not fit the manifest.
    """

    def __init__(
        self,
        folder: Path,
        config: StreamConfig,
        split: str,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        video: VideoConfig | None = None,
        decode: bool = True,
        view: View | None = None,
        shown: Sequence[str] = (),
    ) -> None:
        self.config, self.split, self.seed, self.rank, self.ranks = config, split, seed, rank, ranks
        self._reading = Reading(folder, config.decoder, video, decode, config.disk_mb)
        self._memory = Memory(config.memory_mb * 2**20)
        self._pool: ProcessPoolExecutor | None = None
        self._ahead: deque[tuple[str, Future[Example] | None]] = deque()
        self.history: list[list[int]] = []  # [generation, examples that all ranks drew from its view] before this one
        self._read(view or newest_views(folder, [split])[split], 0, shown)

    @property
    def generation(self) -> int:
        """Newest round of the view."""
        return self.view.generation

    @property
    def shown(self) -> list[str]:
        """Shards of which the view shows samples; the others that it names may be pruned."""
        return sorted({place.shard.file for place in self.places.values()})

    @property
    def keys(self) -> list[str]:
        """All keys of the split, sorted; the same on every rank."""
        return sorted(self.places)

    def example(self, key: str) -> Example:
        """One sample by name, outside the stream's order.  Raises UserError: unknown, damaged, of another shape."""
        if key not in self.places:
            raise UserError(f"{self._reading.folder}: no {self.split} sample {key!r}")
        return self._memory.get(key) or self._memory.put(read_example(self._reading, self.places[key]))

    def takes(self, prompt_id: str) -> Sequence[str]:
        """Keys of a prompt's samples, sorted; none for a prompt that the split does not have."""
        return self._by_prompt().get(prompt_id, ())

    def decoded(self, key: str) -> Example:
        """One sample with its frames, whatever `decode` says; not kept in memory.  Raises as `example` does."""
        if key not in self.places:
            raise UserError(f"{self._reading.folder}: no {self.split} sample {key!r}")
        return read_example(replace(self._reading, decode=True), self.places[key])

    def next_batch(self, size: int) -> list[Example]:
        """The next `size` examples of this rank.  Raises UserError naming shard and key of what cannot be used."""
        return [self._next() for _ in range(size)]

    def switch(self, view: View) -> None:
        """Go over to another view, all ranks at the same draw.  Raises UserError as the class does.

        Its epochs are counted on from those that were begun before, so that no two views begin in the same order.
        """
        drawn, samples = self.drawn * self.ranks, len(self.places)
        before = [self.generation, drawn]
        self._read(view, self.first_epoch + -(-drawn // samples), ())
        self.history.append(before)

    def state_dict(self) -> dict:
        """JSON-able: how many examples all ranks have drawn, from which data, in which order."""
        return {
            "view": asdict(self.view),
            "shown": self.shown,
            "drawn": self.drawn * self.ranks,  # since the last switch
            "first_epoch": self.first_epoch,
            "history": [list(entry) for entry in self.history],
            "seed": self.seed,
            "data_sha256": self._digest(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on where `state` was taken.  Raises UserError when it belongs to other data or another seed."""
        view = View.recorded(state["view"])
        if view != self.view or self.shown != state["shown"]:
            self._read(view, state["first_epoch"], state["shown"])
        if (state["seed"], state["data_sha256"]) != (self.seed, self._digest()):
            raise UserError(
                f"{self._reading.folder}: the {self.split} samples or the seed are not those that the interrupted run "
                "used. Restore the cache and the recipe, or train into a new folder."
            )
        if state["drawn"] % self.ranks:
            raise UserError(
                f"{self._reading.folder}: {state['drawn']} {self.split} samples were drawn so far, which {self.ranks} "
                "processes cannot have drawn. Go on with as many processes as before."
            )
        self.first_epoch, self.drawn = state["first_epoch"], state["drawn"] // self.ranks
        self.history = [list(entry) for entry in state["history"]]
        self._forget_ahead()

    def close(self) -> None:
        """End the worker processes."""
        self._forget_ahead()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, view: View, first_epoch: int, shown: Sequence[str]) -> None:
        """Begin to read a view; where it cannot be read, the stream stays as it was."""
        self.places, pinned = read_view(self._reading.folder, self.split, view, shown)
        self._reading = replace(self._reading, pinned=pinned)
        self.view, self.first_epoch, self.drawn = view, first_epoch, 0
        self._by_prompt = lru_cache(maxsize=1)(self._keys_by_prompt)
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(self._by_prompt(), self.seed, epoch))
        self._forget_ahead()
        # It goes by key, and a key's video may be another now.
        self._memory = Memory(self._memory.limit_bytes)

    def _next(self) -> Example:
        if self.config.workers == 0:
            example = self.example(self._key(self.drawn))
        else:
            example = self._from_workers()
        self.drawn += 1
        return example

    def _from_workers(self) -> Example:
        try:
            self._fill_ahead()
            key, future = self._ahead.popleft()
            return self.example(key) if future is None else self._memory.put(future.result())
        except BrokenProcessPool:  # at handing out work as well as at waiting for it
            raise UserError(
                "stream.workers: a decoding process died, probably for want of memory. Use fewer, or 0."
            ) from None

    def _fill_ahead(self) -> None:
        while len(self._ahead) < AHEAD * self.config.workers:
            key = self._key(self.drawn + len(self._ahead))
            known = key in self._memory
            future = None if known else self._workers().submit(read_example, self._reading, self.places[key])
            self._ahead.append((key, future))

    def _workers(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # spawned: decoders and torch's threads do not survive a fork
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.config.workers, spawn, leave_ctrl_c_to_the_parent)
        return self._pool

    def _forget_ahead(self) -> None:
        for _, future in self._ahead:
            if future is not None:
                future.cancel()
        self._ahead.clear()

    def _key(self, number: int) -> str:
        epoch, position = divmod(number * self.ranks + self.rank, len(self.places))
        return self._order(self.first_epoch + epoch)[position]

    def _keys_by_prompt(self) -> dict[str, list[str]]:
        keys_by_prompt: dict[str, list[str]] = {}
        for key in self.keys:
            keys_by_prompt.setdefault(self.places[key].prompt_id, []).append(key)
        return keys_by_prompt

    def _digest(self) -> str:
        lines = (f"{key} {self.places[key].mp4_sha256} {self.places[key].json_sha256}\n" for key in self.keys)
        return hashlib.sha256("".join(lines).encode()).hexdigest()
