"""The discriminator before and beside the student's training: its warm-up, and how it does on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.judge import Judge, told_apart
from afd_train.objectives.parts import parts_of

WARMUP_TAKES = 4  # rollouts of a prompt that the warm-up chooses from


def warm_up(setup: Setup, judge: Judge, log: Callable[[int, Metrics], None]) -> None:
    """Learn on base rollouts, drawn once a prompt and take, before the student moves (steps -warmup_steps .. -1)."""
    config = setup.discriminator
    drawn: dict[tuple[str, int], Tensor] = {}  # (prompt id, take) -> [F, C, H, W], in the CPU's memory
    for index in range(config.warmup_steps):
        step = index - config.warmup_steps
        examples = setup.stream.next_batch(config.warmup_prompts // setup.processes.count)
        takes = setup.draws(step, "warm-up", examples).integers(WARMUP_TAKES).tolist()
        for take in range(WARMUP_TAKES):
            _draw(setup, [e for e, chosen in zip(examples, takes, strict=True) if chosen == take], take, drawn)
        clips = torch.stack([drawn[e.prompt_id, take] for e, take in zip(examples, takes, strict=True)])
        metrics = judge.learn(examples, clips.to(setup.student.device), step, config.warmup_learning_rate)
        log(step, setup.processes.mean(metrics | held_out(setup, judge, step)))


@torch.no_grad()
def held_out(setup: Setup, judge: Judge, step: int) -> Metrics:
    """The discriminator's accuracy and margin on prompts that no training step uses; nothing where there are none."""
    wanted = setup.config.held_out_per_step
    if setup.held_out is None or wanted == 0:
        return {}
    examples = setup.held_out.next_batch(wanted // setup.processes.count)
    parts = parts_of(len(examples), 1, setup.config.clips_per_pass)
    clips = torch.cat([setup.rollout(examples[part.prompts], step, part.takes).clips for part in parts])
    return told_apart("held_out_", *judge.score(examples, clips, step))


def _draw(setup: Setup, examples: Sequence[Example], take: int, drawn: dict[tuple[str, int], Tensor]) -> None:
    """Add this take of the base's rollouts where it is not in `drawn` yet."""
    new = [example for example in examples if (example.prompt_id, take) not in drawn]
    # Sharded processes gather weights together, so all of them draw, and as much, if any has to.
    if lacking := setup.processes.largest(len(new)) - len(new):
        new += [setup.stream.example(setup.stream.keys[0])] * lacking
    for part in parts_of(len(new), 1, setup.config.clips_per_pass) if new else ():
        clips = setup.rollout(new[part.prompts], -1, range(take, take + 1)).clips.cpu()
        drawn |= {(e.prompt_id, take): clip for e, clip in zip(new[part.prompts], clips, strict=True)}
