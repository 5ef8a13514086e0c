"""What one update is: an objective a file, all driven by the same trainer.

To write one: a class with the members of `Objective`, a config section in `afd_train.config.Objective`, a `case` here.
Every random number of step n follows from (seed, n), so that a resumed run needs no generator states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from afd_data.stream import Example, Stream
from afd_train.config import AfdConfig, DiscriminatorConfig, DistilConfig, FlowMatchingConfig, TrainConfig
from afd_train.policies import Trainee
from afd_train.runlog import Stopwatch
from afd_train.students import Student

Metrics = dict[str, float]


@dataclass
class Setup:
    """What an objective is given."""

    student: Student
    trainee: Trainee
    config: TrainConfig
    discriminator: DiscriminatorConfig
    stream: Stream  # the teacher's training videos
    held_out: Stream | None  # the teacher's videos of validation prompts
    seed: int
    accelerator: Accelerator
    watch: Stopwatch

    def latents(self, examples: Sequence[Example]) -> Tensor:
        """The teacher's videos as the student's latents: [B, F, C, h, w]."""
        videos = torch.from_numpy(np.stack([example.video for example in examples]))
        return self.student.autoencoder.encode(videos.to(self.student.device))

    def rollout_seed(self, step: int) -> int:
        """The seed of a step's rollouts: no two steps of any two small seeds share it."""
        return self.seed * 1_000_003 + step

    def generator(self, step: int, purpose: str) -> torch.Generator:
        """Randomness of a step, for one purpose, on this process."""
        where = f"{self.seed}/{step}/{purpose}/{self.accelerator.process_index}"
        digest = hashlib.sha256(where.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Objective(Protocol):
    """One way to train a student."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Networks of its own, kept in checkpoints beside the student."""
        ...

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Optimisers of its own."""
        ...

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Runs once, before step 0 and not on a resumed run (a discriminator's warm-up)."""
        ...

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """One update of each network."""
        ...


def open_objective(setup: Setup) -> Objective:
    """The objective that the recipe names."""
    match setup.config.objective:
        case AfdConfig() as config:
            from afd_train.objectives.afd import AdversarialFlowDistillation

            return AdversarialFlowDistillation(setup, config)
        case DistilConfig() as config:
            from afd_train.objectives.distil import Distillation

            return Distillation(setup, config)
        case FlowMatchingConfig():
            from afd_train.objectives.flow_matching import FlowMatching

            return FlowMatching(setup)
