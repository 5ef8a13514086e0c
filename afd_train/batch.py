"""The examples of a step: those that come next in the stream, and in the place of some the hardest prompts.

Chosen alike on all processes from (seed, step) and the margins so far, so that several choose as one does and a resumed
run chooses again what it chose before.  The stream moves on as if nothing was replaced: what it would have shown is
skipped, and comes again with its next take or epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from afd_data.errors import UserError
from afd_data.stream import Example
from afd_train.margins import Margins
from afd_train.objective_config import ADVERSARIAL
from afd_train.objectives import Setup

HARD = 0.25  # share of the prompts with a margin, those with the largest, that `train.hardest` draws from


def check_prompts(setup: Setup) -> None:
    """Raises UserError where the cache has too few prompts.

    Adversarial objectives' groups break where a batch holds a prompt twice.
    """
    if setup.config.objective.name not in ADVERSARIAL:
        return
    prompts = len({place.prompt_id for place in setup.stream.places.values()})
    wanted = {"train.prompts_per_step": setup.config.prompts_per_step}
    if setup.discriminator.warmup_steps:
        wanted["discriminator.warmup_prompts"] = setup.discriminator.warmup_prompts
    if setup.discriminator.mismatch_weight and prompts < 2:
        raise UserError("discriminator.mismatch_weight: the cache has one prompt only; cache more, or set it to 0.")
    for key, count in wanted.items():
        if count > prompts:
            raise UserError(
                f"{key}: {count} distinct prompts are wanted at once, and the cache has {prompts} for training. "
                f"Set it to {prompts} or less, or cache videos of more prompts."
            )


def next_examples(setup: Setup, step: int) -> list[Example]:
    """This process's share of the step's examples."""
    processes = setup.processes
    examples = setup.stream.next_batch(setup.config.prompts_per_step // processes.count)
    if not setup.config.hardest:
        return examples
    prompts = processes.gather_texts([example.prompt_id for example in examples])
    generator = setup.shared(step, "hardest")
    pool = [prompt for prompt in hardest(setup.margins) if setup.stream.takes(prompt)]
    drawn = [pool[index] for index in torch.randperm(len(pool), generator=generator).tolist()]
    # Every process draws for all of them, so that the next draw is the same too.
    takes = torch.rand(len(prompts), generator=generator).tolist()
    chosen = replaced(prompts, drawn, round(setup.config.hardest * len(prompts)))
    for position in range(processes.index, len(prompts), processes.count):
        if chosen[position] != prompts[position]:
            keys = setup.stream.takes(chosen[position])
            examples[position // processes.count] = setup.stream.example(keys[int(takes[position] * len(keys))])
    return examples


def hardest(margins: Margins) -> list[str]:
    """Prompts with the largest margins, a quarter of those that have one, the hardest first."""
    rows = sorted(margins.rows(), key=lambda row: (-row.margin, row.prompt_id))
    return [row.prompt_id for row in rows[: math.ceil(HARD * len(rows))]]


def replaced(prompts: Sequence[str], drawn: Sequence[str], count: int) -> list[str]:
    """`prompts` with the last `count` replaced by `drawn`, in that order, as far as none comes twice by it."""
    chosen = list(prompts)
    for position in range(len(prompts) - count, len(prompts)):
        others = {*chosen[:position], *chosen[position + 1 :]}
        free = [prompt for prompt in drawn if prompt not in others]
        if free:
            chosen[position] = free[0]
    return chosen
