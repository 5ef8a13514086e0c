"""What one update is: an objective a file, all driven by the same trainer.

To write one: a class with the members of `Objective`, a config section in `afd_train.objective_config`, a `case` here.
Every random number of step n follows from (seed, n) and its clip, so that a resumed run needs no generator states and
several processes do what one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from afd_data.stream import Example, Stream
from afd_train.conditioning import LatentCache
from afd_train.config import DiscriminatorConfig, TrainConfig
from afd_train.draws import Draws, generator
from afd_train.margins import Margins
from afd_train.objective_config import (
    AfdConfig,
    BranchConfig,
    DistilConfig,
    DmdConfig,
    FlowMatchingConfig,
    GanConfig,
    SftConfig,
)
from afd_train.optimizer import Optimizer
from afd_train.parallel import Processes
from afd_train.policies import Trainee
from afd_train.rollout import Rollout
from afd_train.runlog import Stopwatch
from afd_train.students import Clip, Student

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
    processes: Processes
    watch: Stopwatch
    teacher_latents: LatentCache | None = None  # of both streams, where encoding costs more than reading
    margins: Margins = field(default_factory=Margins)  # filled by objectives that compare student and teacher

    def latents(self, examples: Sequence[Example]) -> Tensor:
        """The teacher's videos as the student's latents: [B, F, C, h, w]."""
        if self.teacher_latents is not None:
            return self.teacher_latents.latents(examples).to(self.student.device)
        videos = torch.from_numpy(np.stack([example.video for example in examples]))
        return self.student.autoencoder.encode(videos.to(self.student.device))

    def text(self, examples: Sequence[Example]) -> Tensor:
        """[P, L, D]."""
        return self.student.encode_text([example.prompt for example in examples])

    def rollout(self, examples: Sequence[Example], step: int, takes: range) -> Rollout:
        """These takes of every prompt, a prompt's next to each other, by the policy that is acting."""
        with self.watch("rollout"), self.processes.unsharded(self.student.net):
            return self.student.rollout(self.clips(examples, step, takes), self.text(examples), training=True)

    def clips(self, examples: Sequence[Example], step: int, takes: range) -> list[Clip]:
        """What a step draws: these takes of every prompt."""
        # No two steps of any two small seeds share theirs.
        seed = self.seed * 1_000_003 + step
        return [Clip(e.prompt_id, e.prompt, seed, take) for e in examples for take in takes]

    def draws(self, step: int, purpose: str, examples: Sequence[Example], takes: range = range(1)) -> Draws:
        """Randomness of these clips in a step, for one purpose."""
        clips = [f"{example.key}/{take}" for example in examples for take in takes]
        return Draws(self.seed, step, purpose, clips, self.student.device)

    def shared(self, step: int, purpose: str) -> torch.Generator:
        """Randomness of a step that all processes have in common."""
        return generator(self.seed, step, purpose)

    def optimizer(self, net: nn.Module, weight_decay: float, betas: tuple[float, float]) -> Optimizer:
        """For what is trained of another network than the student."""
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        return Optimizer(trained, self.processes, self.config.max_grad_norm, weight_decay=weight_decay, betas=betas)


class Objective(Protocol):
    """One way to train a student."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Networks of its own, kept in checkpoints beside the student."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
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
        case BranchConfig() as config:
            from afd_train.objectives.branch import BranchedFlowDistillation

            return BranchedFlowDistillation(setup, config)
        case SftConfig() as config:
            from afd_train.objectives.sft import SupervisedFineTuning

            return SupervisedFineTuning(setup, config)
        case GanConfig() as config:
            from afd_train.objectives.gan import Adversarial

            return Adversarial(setup, config)
        case DmdConfig() as config:
            from afd_train.objectives.dmd import DistributionMatching

            return DistributionMatching(setup, config)
        case DistilConfig() as config:
            from afd_train.objectives.distil import Distillation

            return Distillation(setup, config)
        case FlowMatchingConfig():
            from afd_train.objectives.flow_matching import FlowMatching

            return FlowMatching(setup)
