"""Teacher-forced flow matching on the cached videos: pre-training, and supervised fine-tuning of a base student."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from afd_data.stream import Example
from afd_train.flow import noised, velocity
from afd_train.losses import flow_matching_loss
from afd_train.objectives import Metrics, Setup
from afd_train.students.causal_wan import CausalWan

SMALLEST_TIME = 0.02  # below it nothing is left to predict, and 1 / t of a clean-predicting student explodes


class FlowMatching:
    """Every chunk at a time of its own, on the clean chunks before it."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Nothing to prepare."""

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """One update on the teacher's videos."""
        setup = self._setup
        with setup.watch("encode"):
            clips = setup.latents(examples)
            text = setup.student.encode_text([example.prompt for example in examples])
        with setup.watch("update"):
            generator = setup.generator(step, "flow matching")
            loss = teacher_forced_loss(setup.trainee.net, clips, text, generator)
            norm = setup.trainee.update(loss, step)
        return {"student/loss": float(loss.detach()), "student/grad_norm": norm}


def teacher_forced_loss(net: CausalWan, clips: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
    """Flow matching with one uniform time a chunk.  clips: [B, F, C, H, W]; text: [B, L, D] -> scalar."""
    t = chunk_times(clips.shape[0], clips.shape[1], net.chunk_frames, generator).to(clips.device)
    noise = torch.randn(clips.shape, generator=generator).to(clips.device)
    v = net(noised(clips, noise, t), t, text, clean=clips)
    return flow_matching_loss(v, velocity(clips, noise), frame_weight(net, t))


def chunk_times(batch: int, frames: int, chunk: int, generator: torch.Generator) -> Tensor:
    """Uniform times in [SMALLEST_TIME, 1], equal within a chunk: [B, F]."""
    t = torch.rand(batch, frames // chunk, generator=generator)
    return (SMALLEST_TIME + (1 - SMALLEST_TIME) * t).repeat_interleave(chunk, 1)


def frame_weight(net: CausalWan, t: Tensor) -> Tensor:
    """Weight of the velocity error: 1; for a network that predicts the clean clip t^2 / max(t, 1/2).

    The latter makes it the error of the clean clip over max(t, 1/2), which small worlds learn from best.
    """
    return torch.ones_like(t) if net.prediction == "velocity" else t.square() / t.clamp_min(0.5)
