"""The student's update: teacher forcing against a detached context, and noisings that share their clean half.

    python -m tests.benchmarks.update [--size tiny|few-layers|1.3B] [--device cpu|cuda] [--repeats N] [--json FILE]

An update is the student's forward and backward pass on rollouts, with gradients of all weights; drawing the rollouts,
the old policy's velocity and the optimiser are left out.  The detached forms are timed with the passes that fill their
cache; where the rollout has left one (`train.clips_per_pass` unset), those are saved too.  Prints markdown; ratios
matter, seconds depend on the machine.  Never fails on a number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from afd_train.flow import noised, velocity
from afd_train.losses import forward_process_loss
from afd_train.students import DTYPES
from afd_train.students.attention import KVCache
from afd_train.students.spans import block_causal_spans, continuation_spans, teacher_forcing_spans
from tests.benchmarks.sizes import NAMES, Size, pass_flops, size_of, update_flops
from tests.benchmarks.timing import device_options, gib, interleaved, machine, markdown, matmul_rate, write_json

Form = Literal["teacher forcing", "detached at once", "detached chunk by chunk"]
FORMS: tuple[Form, ...] = get_args(Form)
Case = tuple[Form, bool, int]  # with checkpointing or not, noisings
REPEATS = {"tiny": 20, "few-layers": 3, "1.3B": 3}
POLICY_MIX = 0.1


class Update:
    """Clips of a student of some size, noised `copies` times, and what to do with them."""

    def __init__(self, size: Size, device: torch.device, copies: int = 1):
        self.size, self.copies = size, copies
        self.net, self.text = size.net(device), size.text(device)
        generator = torch.Generator().manual_seed(2)
        shape = size.clips, *size.shape

        def normal(frames: int) -> Tensor:
            return torch.randn(shape[0], frames, *shape[2:], generator=generator).to(device)

        frames = copies * size.shape.frames
        self.clean, noise = normal(size.shape.frames), normal(frames)
        repeated = self.clean.repeat(1, copies, 1, 1, 1)
        self.t = torch.full((size.clips, frames), size.sampler.times[-1], device=device)
        self.noisy, self.target, self.old = noised(repeated, noise, self.t), velocity(repeated, noise), normal(frames)
        self.weight = torch.rand(size.clips, generator=generator).to(device)

    def run(self, form: Form, cache: KVCache | None = None) -> None:
        """Add the gradient to that of the weights.  `cache`: what `remembered` returned, where that is not timed."""
        frames, chunk = self.size.shape.frames, self.net.chunk_frames
        match form:
            case "teacher forcing":
                self._backward(self.net(self.noisy, self.t, self.text, self.clean), slice(None))
            case "detached at once":
                self._piece(cache or self.remembered(frames), 0, frames)
            case "detached chunk by chunk":
                cache = cache or self.remembered(chunk)
                for first in range(0, frames, chunk):
                    self._piece(cache, first, chunk)

    def remembered(self, together: int) -> KVCache:
        """A cache of all chunks but the last, which no chunk looks back at; filled by so many frames at once."""
        context = self.clean[:, : -self.net.chunk_frames]
        cache = self.net.memory(context.shape[1])
        for part in context.split(together, 1):
            self.net.remember(part, self.text, cache)
        return cache

    def _piece(self, cache: KVCache, first: int, size: int) -> None:
        frames = self.size.shape.frames
        piece = [copy * frames + frame for copy in range(self.copies) for frame in range(first, first + size)]
        v = self.net.chunks(self.noisy[:, piece], self.t[:, piece], self.text, cache, first, self.copies)
        self._backward(v, piece)

    def _backward(self, v: Tensor, piece: list[int] | slice) -> None:
        loss = forward_process_loss(v, self.old[:, piece], self.target[:, piece], self.weight[:, None], POLICY_MIX)
        (loss * v.shape[1] / self.noisy.shape[1]).backward()

    def flops(self, form: Form, checkpointing: bool) -> float:
        """What it takes, the passes that fill a cache included."""
        frames, chunk = self.size.shape.frames, self.net.chunk_frames
        if form == "teacher forcing":
            return update_flops(self.size, teacher_forcing_spans(frames, chunk, self.copies), checkpointing)
        filled = pass_flops(self.size, block_causal_spans(frames - chunk, chunk))
        return filled + update_flops(self.size, continuation_spans(0, frames, chunk, self.copies), checkpointing)


def compare(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time all forms with one noising and with two, and print."""
    updates = {copies: Update(size, device, copies) for copies in (1, 2)}
    updates[2].net = updates[1].net
    rate = matmul_rate(DTYPES[size.student.dtype], device)
    cases: list[Case] = [(form, check, copies) for check in (False, True) for copies in updates for form in FORMS]
    work: dict[str, Callable[[], None]] = {
        name_of(*case): partial(once, updates[case[2]], case[0], case[1]) for case in cases
    }
    found = interleaved(work, repeats, device)
    rows = []
    for form, check, copies in cases:
        one, single = found[name_of(form, check, copies)], found[name_of(form, check, 1)]
        row = {
            "update": form,
            "checkpointing": check,
            "noisings": copies,
            "seconds": one.median,
            "of teacher forcing": one.ratio_to(found[name_of(FORMS[0], check, copies)]),
            "of separate passes": one.ratio_to(single) / copies,
            "of its floor": one.median * rate / updates[copies].flops(form, check),
            "peak_bytes": one.peak_bytes,
        }
        rows.append(row)
    ratios = ("of teacher forcing", "of separate passes", "of its floor")
    cells = [
        [row["update"], "blocks" if row["checkpointing"] else "no", str(row["noisings"]), f"{row['seconds']:.3f}",
         *(f"{row[ratio]:.2f}" for ratio in ratios), gib(row["peak_bytes"])]
        for row in rows
    ]  # fmt: skip
    print(f"{size.clips} clips of {size.shape.frames} latent frames, {size.tokens} tokens each, "
          f"{size.student.layers} layers of {size.student.dim}; {rate / 1e9:,.0f} GFLOP/s")  # fmt: skip
    print(markdown(["update", "checkpointing", "noisings", "s", *ratios, "peak GiB"], cells))
    return {"size": size.name, "matmul": rate, "rows": rows}


def name_of(form: Form, checkpointing: bool, copies: int) -> str:
    """Of a row."""
    return f"{form}, {checkpointing}, {copies}"


def once(update: Update, form: Form, checkpointing: bool) -> None:
    """One update, whose gradient is thrown away."""
    transformer = update.net.transformer
    transformer.enable_gradient_checkpointing() if checkpointing else transformer.disable_gradient_checkpointing()
    update.run(form)
    transformer.zero_grad(set_to_none=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=NAMES, default="tiny")
    device_options(parser)
    options = parser.parse_args()
    size, device = size_of(options.size), torch.device(options.device)
    repeats = options.repeats or REPEATS[size.name]
    print(f"{size.name}, {machine(device)}, medians of {repeats}")
    write_json(options.json, compare(size, device, repeats))


if __name__ == "__main__":
    main()
