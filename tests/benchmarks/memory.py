"""Bytes that an update keeps for its backward pass: tensors saved by autograd, and the cache of keys and values.

    python -m tests.benchmarks.memory [--layers 2 4] [--json FILE]

Counted on a CPU with the 1.3B student's width on small latents, 21 latent frames in chunks of 3: every storage once,
weights left out, the most that is alive at any time.  The counts grow by the same number with every layer, and with the
tokens of a frame in proportion, which gives the row of 30 layers at 480 x 832: arithmetic, not measured.  They do not
depend on the machine's speed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from afd_data.config import VideoConfig
from afd_train.student_config import StudentConfig
from tests.benchmarks.sizes import Size, size_of
from tests.benchmarks.timing import markdown, write_json
from tests.benchmarks.update import FORMS, Form, Update

LIMIT = 0.35  # of the teacher-forcing update's bytes


class Saved:
    """Counts the storages of tensors that autograd saves, from the first time one is saved to its release."""

    def __init__(self, left_out: Sequence[Tensor]):
        self.bytes = self.peak = 0
        self._left_out = {tensor.untyped_storage().data_ptr() for tensor in left_out}
        self._alive: Counter[int] = Counter()

    def hooks(self) -> saved_tensors_hooks:
        """While these are active, saved tensors are counted."""
        return saved_tensors_hooks(lambda tensor: Held(tensor, self), lambda held: held.tensor)

    def add(self, storage: torch.UntypedStorage) -> None:
        """A tensor on this storage was saved."""
        key = storage.data_ptr()
        if key in self._left_out:
            return
        self._alive[key] += 1
        if self._alive[key] == 1:
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)

    def drop(self, storage: torch.UntypedStorage) -> None:
        """It is needed no more."""
        key = storage.data_ptr()
        if key in self._left_out:
            return
        self._alive[key] -= 1
        if not self._alive[key]:
            self.bytes -= storage.nbytes()


class Held:
    """A saved tensor, for as long as autograd holds it."""

    def __init__(self, tensor: Tensor, saved: Saved):
        self.tensor, self._saved = tensor, saved
        saved.add(tensor.untyped_storage())

    def __del__(self):
        self._saved.drop(self.tensor.untyped_storage())


@dataclass(frozen=True)
class Bytes:
    """What one update keeps: tensors saved by autograd at their peak, and the cache beside them."""

    saved: float
    cache: float

    @property
    def total(self) -> float:
        return self.saved + self.cache

    def plus(self, other: Bytes, times: float = 1.0) -> Bytes:
        """The sum with `times` other."""
        return Bytes(self.saved + times * other.saved, self.cache + times * other.cache)


def kept(update: Update, form: Form, checkpointing: bool) -> Bytes:
    """Run an update, which adds to the weights' gradients, and count."""
    transformer = update.net.transformer
    if checkpointing:
        # The other form of checkpointing keeps the same tensors, but those of its second pass out of our hooks' sight.
        transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    else:
        transformer.disable_gradient_checkpointing()
    cache = None if form == "teacher forcing" else update.remembered(update.net.chunk_frames)
    cached = [] if cache is None else [*cache.keys.values(), *cache.values.values()]
    cached += [] if cache is None else [tensor for pair in cache.text.values() for tensor in pair]
    saved = Saved([*update.net.parameters(), *cached])
    with saved.hooks():
        update.run(form, cache)
    return Bytes(saved.peak, sum(tensor.nbytes for tensor in cached))


def small(layers: int, **settings: Any) -> Size:
    """The 1.3B student with some layers on small latents: 24 tokens a frame, and text tokens in proportion."""
    student = StudentConfig(preset="self-forcing", layers=layers, text_tokens=8, **settings)
    return Size(f"{layers} layers", student, VideoConfig(width=96, height=64, frames=81, fps=16.0), clips=1)


def extrapolated(counts: dict[int, Bytes], layers: int, scale: float) -> Bytes:
    """From two numbers of layers to another one, and to `scale` times the tokens."""
    (few, first), (more, second) = sorted(counts.items())
    slope = Bytes(0, 0).plus(second.plus(first, -1), 1 / (more - few))
    return Bytes(0, 0).plus(first.plus(slope, layers - few), scale)


def measure(layers: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each form of an update, with checkpointing and without, and each number of layers."""
    full = size_of("1.3B")
    counts: dict[tuple[bool, Form], dict[int, Bytes]] = {(check, form): {} for check in (False, True) for form in FORMS}
    for number in layers:
        update = Update(small(number), torch.device("cpu"))
        for check, form in counts:
            counts[check, form][number] = kept(update, form, check)
    for found in counts.values():
        found[full.student.layers] = extrapolated(found, full.student.layers, full.tokens / small(1).tokens)
    rows = []
    for number in (*layers, full.student.layers):
        for (check, form), found in counts.items():
            one, forced = found[number], counts[check, FORMS[0]][number]
            row = {
                "layers": number,
                "measured": number in layers,
                "checkpointing": check,
                "update": form,
                "saved": one.saved,
                "cache": one.cache,
                "of teacher forcing": one.total / forced.total,
            }
            rows.append(row)
    return rows


def above_the_limit(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What to know of the rows of the last form that keep more than `LIMIT` of teacher forcing's bytes."""
    lines = []
    for row in rows:
        if row["update"] != FORMS[-1] or row["of teacher forcing"] <= LIMIT:
            continue
        total = row["saved"] + row["cache"]
        halved = row["of teacher forcing"] * (1 - row["cache"] / total / 2)
        lines.append(
            f"{row['layers']} layers, checkpointing {'blocks' if row['checkpointing'] else 'no'}: above {LIMIT}.  "
            f"{row['cache'] / total:.0%} of it are the cached keys and values of 18 context frames in every layer, of "
            "which teacher forcing with checkpointing keeps one layer's.  A cache of attention's inputs, from which "
            f"keys and values are computed again, would halve that: {halved:.2f}, by arithmetic; it is not built."
        )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4], help="two numbers of layers to measure with")
    parser.add_argument("--json", help="write the numbers to this file as well")
    options = parser.parse_args()
    rows = measure(options.layers)
    cells = [
        [f"{row['layers']}" if row["measured"] else f"{row['layers']}, 480 x 832, by arithmetic",
         "blocks" if row["checkpointing"] else "no", row["update"], f"{row['saved'] / 2**20:,.1f}",
         f"{row['cache'] / 2**20:,.1f}", f"{row['of teacher forcing']:.3f}"]
        for row in rows
    ]  # fmt: skip
    print(markdown(["layers", "checkpointing", "update", "saved MiB", "cache MiB", "of teacher forcing"], cells))
    print("\n".join(above_the_limit(rows)))
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
