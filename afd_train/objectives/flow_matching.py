"""Teacher-forced flow matching on the cached videos: pre-training, and supervised fine-tuning of a base student."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from afd_data.stream import Example
from afd_train.draws import Draws
from afd_train.flow import noised, velocity
from afd_train.losses import flow_matching_loss
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.parts import parts_of
from afd_train.optimizer import Optimizer
from afd_train.students.causal_wan import CausalWan

SMALLEST_TIME = 0.02  # below it nothing is left to predict, and 1 / t of a clean-predicting student explodes


class FlowMatching:
    """Every chunk at a time of its own, on the clean chunks before it."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Nothing to prepare."""

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """One update on the teacher's videos."""
        setup = self._setup
        total = 0.0
        for part in parts_of(len(examples), 1, setup.config.clips_per_pass):
            some = examples[part.prompts]
            with setup.watch("encode"):
                clips, text = setup.latents(some), setup.text(some)
            with setup.watch("update"):
                draws = setup.draws(step, "flow matching", some)
                loss = teacher_forced_loss(setup.trainee.net, clips, text, draws) * len(some) / len(examples)
                setup.trainee.accumulate(loss)
                total += float(loss.detach())
        return {"student/loss": total, "student/grad_norm": setup.trainee.step(step)}


def teacher_forced_loss(net: CausalWan, clips: Tensor, text: Tensor, draws: Draws) -> Tensor:
    """Flow matching with one uniform time a chunk.  clips: [B, F, C, H, W]; text: [B, L, D] -> scalar."""
    t = chunk_times(clips.shape[1], net.chunk_frames, draws)
    noise = draws.normal(*clips.shape[1:])
    v = net(noised(clips, noise, t), t, text, clean=clips)
    return flow_matching_loss(v, velocity(clips, noise), frame_weight(net, t))


def chunk_times(frames: int, chunk: int, draws: Draws) -> Tensor:
    """Uniform times in [SMALLEST_TIME, 1], equal within a chunk: [B, F]."""
    t = draws.uniform(frames // chunk)
    return (SMALLEST_TIME + (1 - SMALLEST_TIME) * t).repeat_interleave(chunk, 1)


def frame_weight(net: CausalWan, t: Tensor) -> Tensor:
    """Weight of the velocity error: 1; for a network that predicts the clean clip t^2 / max(t, 1/2).

    The latter makes it the error of the clean clip over max(t, 1/2), which small worlds learn from best.
    """
    return torch.ones_like(t) if net.prediction == "velocity" else t.square() / t.clamp_min(0.5)
