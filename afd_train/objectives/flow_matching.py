"""Teacher-forced flow matching on the cached videos: pre-training, and a part of other objectives.

Every chunk is noised to a time of its own and sees the clean chunks before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afd_data.stream import Example
from afd_train.draws import Draws
from afd_train.flow import noised, velocity
from afd_train.losses import flow_matching_loss
from afd_train.objective_config import OldPolicy
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.parts import parts_of
from afd_train.optimizer import Optimizer
from afd_train.students.causal_wan import CausalWan

SMALLEST_TIME = 0.02  # below it nothing is left to predict, and 1 / t of a clean-predicting student explodes


class FlowMatching:
    """See the module's docstring."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Nothing to prepare."""

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """One update on the teacher's videos."""
        loss = accumulate_teacher_forced(self._setup, examples, step)
        return {"student/loss": loss, "student/grad_norm": self._setup.trainee.step(step)}


@dataclass(frozen=True)
class Forced:
    """Clips noised for teacher forcing; clips, noise: [B, F, C, H, W]; t: [B, F]; text: [B, L, D].

    share: of all clips of the step.
    """

    clips: Tensor
    noise: Tensor
    t: Tensor
    text: Tensor
    share: float = 1.0

    @staticmethod
    def of(net: CausalWan, clips: Tensor, text: Tensor, draws: Draws, share: float = 1.0) -> Forced:
        """One uniform time a chunk."""
        t = chunk_times(clips.shape[1], net.chunk_frames, draws)
        return Forced(clips, draws.normal(*clips.shape[1:]), t, text, share)

    def velocity(self, net: CausalWan) -> Tensor:
        """What the network says: [B, F, C, H, W]."""
        return net(noised(self.clips, self.noise, self.t), self.t, self.text, clean=self.clips)

    def loss(self, net: CausalWan, v: Tensor) -> Tensor:
        """Flow matching of these velocities of `net`: a scalar."""
        return flow_matching_loss(v, velocity(self.clips, self.noise), frame_weight(net, self.t))


def teacher_forced_parts(
    setup: Setup, examples: Sequence[Example], step: int, purpose: str = "flow matching"
) -> Iterator[Forced]:
    """The teacher's videos of a step, noised, in parts of `train.clips_per_pass`."""
    for part in parts_of(len(examples), 1, setup.config.clips_per_pass):
        some = examples[part.prompts]
        with setup.watch("encode"):
            clips, text = setup.latents(some), setup.text(some)
        draws = setup.draws(step, purpose, some)
        yield Forced.of(setup.trainee.net, clips, text, draws, len(some) / len(examples))


def accumulate_teacher_forced(
    setup: Setup, examples: Sequence[Example], step: int, purpose: str = "flow matching", scale: float = 1.0
) -> float:
    """Add `scale` times the gradient of flow matching on these examples' videos to the student's; returns the loss.

    purpose: of the noise, where a step has others.  No update is made.
    """
    net, total = setup.trainee.net, 0.0
    for forced in teacher_forced_parts(setup, examples, step, purpose):
        with setup.watch("update"):
            loss = forced.share * forced.loss(net, forced.velocity(net))
            setup.trainee.accumulate(scale * loss)
            total += float(loss.detach())
    return total


def accumulate_anchor(setup: Setup, config: OldPolicy, examples: Sequence[Example], step: int, inner: int) -> Metrics:
    """Add the gradient of `sft_weight` to one of a step's updates; returns its log entry, none where it is off."""
    if not config.sft_weight:
        return {}
    purpose = "anchor" if inner == 0 else f"anchor {inner}"
    return {"student/anchor_loss": accumulate_teacher_forced(setup, examples, step, purpose, config.sft_weight)}


def warm_start(setup: Setup, steps: int, log: Callable[[int, Metrics], None]) -> None:
    """Supervised updates of the student before the first of another objective, and before its discriminator learns.

    They are logged as the steps before the discriminator's warm-up.  The old policy starts where they end; the
    reference stays the student that the run started from.
    """
    if not steps:
        return
    config = setup.config
    for index in range(steps):
        step = index - steps - setup.discriminator.warmup_steps
        examples = setup.stream.next_batch(config.prompts_per_step // setup.processes.count)
        loss = accumulate_teacher_forced(setup, examples, step)
        norm = setup.trainee.step(min(index, config.steps - 1))
        log(step, setup.processes.mean({"student/loss": loss, "student/grad_norm": norm}))
    if "old" in setup.trainee.copies:
        setup.trainee.follow("old", 0.0)


def teacher_forced_loss(net: CausalWan, clips: Tensor, text: Tensor, draws: Draws) -> Tensor:
    """Flow matching with one uniform time a chunk.  clips: [B, F, C, H, W]; text: [B, L, D] -> scalar."""
    forced = Forced.of(net, clips, text, draws)
    return forced.loss(net, forced.velocity(net))


def chunk_times(frames: int, chunk: int, draws: Draws) -> Tensor:
    """Uniform times in [SMALLEST_TIME, 1], equal within a chunk: [B, F]."""
    t = draws.uniform(frames // chunk)
    return (SMALLEST_TIME + (1 - SMALLEST_TIME) * t).repeat_interleave(chunk, 1)


def frame_weight(net: CausalWan, t: Tensor) -> Tensor:
    """Weight of the velocity error: 1; for a network that predicts the clean clip t^2 / max(t, 1/2).

    The latter makes it the error of the clean clip over max(t, 1/2), which small worlds learn from best.
    """
    return torch.ones_like(t) if net.prediction == "velocity" else t.square() / t.clamp_min(0.5)
