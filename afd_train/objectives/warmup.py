"""The discriminator before and beside the student's training: its warm-up, and how it does on held-out prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.losses import bradley_terry_loss
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.judge import Judge, told_apart
from afd_train.objectives.parts import parts_of
from afd_train.optimizer import Snapshot

logger = logging.getLogger(__name__)

WARMUP_TAKES = 4  # rollouts of a prompt that the warm-up chooses from
MEMORY = 0.9  # weight of the past in the mean of the held-out loss


def warm_up(setup: Setup, judge: Judge, log: Callable[[int, Metrics], None]) -> None:
    """Learn on base rollouts, drawn once a prompt and take, before the student moves (steps -warmup_steps .. -1).

    With `warmup_patience` it may end earlier, and the discriminator is that of the lowest held-out loss.
    """
    config = setup.discriminator
    lowest = Lowest(judge, config.warmup_patience) if config.warmup_patience else None
    drawn: dict[tuple[str, int], Tensor] = {}  # (prompt id, take) -> [F, C, H, W], in the CPU's memory
    for index in range(config.warmup_steps):
        step = index - config.warmup_steps
        examples = setup.stream.next_batch(config.warmup_prompts // setup.processes.count)
        takes = setup.draws(step, "warm-up", examples).integers(WARMUP_TAKES).tolist()
        for take in range(WARMUP_TAKES):
            _draw(setup, [e for e, chosen in zip(examples, takes, strict=True) if chosen == take], take, drawn)
        clips = torch.stack([drawn[e.prompt_id, take] for e, take in zip(examples, takes, strict=True)])
        metrics = judge.learn(examples, clips.to(setup.student.device), step, config.warmup_learning_rate)
        metrics = setup.processes.mean(metrics | held_out(setup, judge, step))
        if lowest is not None:
            metrics["discriminator/held_out_loss_mean"] = lowest.add(metrics["discriminator/held_out_loss"], step)
        log(step, metrics)
        if lowest is not None and lowest.is_past(step):
            break
    if lowest is not None and config.warmup_steps:
        lowest.restore()


class Lowest:
    """The discriminator of the warm-up's lowest mean held-out loss.

    The mean is exponential over steps: one step's loss is that of a few held-out prompts, whose chance (each step draws
    others) is larger than what a step of learning changes.  It lags by about ten steps, and the best one with it.
    """

    def __init__(self, judge: Judge, patience: int):
        self._judge, self._patience = judge, patience
        self._mean: float | None = None
        self._best, self._step = float("inf"), 0
        self._snapshot: Snapshot | None = None

    def add(self, loss: float, step: int) -> float:
        """The held-out loss after a step, the same on all processes; returns the mean."""
        self._mean = loss if self._mean is None else MEMORY * self._mean + (1 - MEMORY) * loss
        if self._mean < self._best:
            self._best, self._step = self._mean, step
            self._snapshot = self._judge.optimizer.snapshot()
        return self._mean

    def is_past(self, step: int) -> bool:
        """Whether the lowest loss was `patience` steps ago."""
        if step - self._step < self._patience:
            return False
        logger.info(
            f"warm-up ended at step {step}: the held-out loss has not improved on {self._best:.3f}, of step "
            f"{self._step}, for {self._patience} steps (discriminator.warmup_patience)"
        )
        return True

    def restore(self) -> None:
        """Make the discriminator and its optimiser what they were then."""
        if self._snapshot is None:
            return
        self._judge.optimizer.restore(self._snapshot)
        logger.info(f"training goes on with the discriminator of warm-up step {self._step}")


@torch.no_grad()
def held_out(setup: Setup, judge: Judge, step: int) -> Metrics:
    """The discriminator's accuracy, margin and Bradley-Terry loss on prompts that no training step uses.

    Nothing where there are none.
    """
    wanted = setup.config.held_out_per_step
    if setup.held_out is None or wanted == 0:
        return {}
    examples = setup.held_out.next_batch(wanted // setup.processes.count)
    parts = parts_of(len(examples), 1, setup.config.clips_per_pass)
    clips = torch.cat([setup.rollout(examples[part.prompts], step, part.takes).clips for part in parts])
    teacher, student = judge.score(examples, clips, step)
    loss = float(bradley_terry_loss(teacher.mean(1), student.mean(1)))
    return told_apart("held_out_", teacher, student) | {"discriminator/held_out_loss": loss}


def _draw(setup: Setup, examples: Sequence[Example], take: int, drawn: dict[tuple[str, int], Tensor]) -> None:
    """Add this take of the base's rollouts where it is not in `drawn` yet."""
    new = [example for example in examples if (example.prompt_id, take) not in drawn]
    # Sharded processes gather weights together, so all of them draw, and as much, if any has to.
    if lacking := setup.processes.largest(len(new)) - len(new):
        new += [setup.stream.example(setup.stream.keys[0])] * lacking
    for part in parts_of(len(new), 1, setup.config.clips_per_pass) if new else ():
        clips = setup.rollout(new[part.prompts], -1, range(take, take + 1)).clips.cpu()
        drawn |= {(e.prompt_id, take): clip for e, clip in zip(new[part.prompts], clips, strict=True)}
