"""The objective's section of a training run: one class an objective, each in a file of `objectives/`.  Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from afd_data.section import Config


class FlowMatchingConfig(Config):
    """Teacher-forced flow matching on the cached videos: how a base student is born from random weights."""

    name: Literal["flow-matching"] = "flow-matching"


class SftConfig(Config):
    """Supervised fine-tuning: flow matching on the teacher's videos, from a student that is already there."""

    name: Literal["sft"] = "sft"
    prior_weight: float = Field(default=0.0, ge=0, description="pull towards the student that it started from")


class FakeScore(Config):
    """The online score of the student's own videos."""

    fake_learning_rate: float = Field(default=4e-4, gt=0, description="of the online score of the student's own videos")
    fake_updates: int = Field(default=2, ge=1, description="updates of that score for one of the student")


class DistilConfig(FakeScore):
    """Few-step distillation on the student's own rollouts (distribution matching, as in Self-Forcing)."""

    name: Literal["distil"] = "distil"
    real: str | None = Field(
        default=None,
        description="folder of the flow-matching student whose score is the real one (afd ships `miniature/flow`); "
        "default: the starting student",
    )


class DmdConfig(FakeScore):
    """Distribution matching to the teacher: the real score is a flow-matching model fine-tuned on its videos."""

    name: Literal["dmd"] = "dmd"
    real: str | None = Field(
        default=None,
        description="folder of the flow-matching student that is fine-tuned (afd ships `miniature/flow`); "
        "default: the starting student, which few-step distillation has made a bad score",
    )
    real_steps: int = Field(default=300, ge=0, description="flow-matching updates of it before the student moves")
    real_learning_rate: float = Field(default=5e-4, gt=0, description="of these updates")
    real_prompts: int = Field(default=16, ge=1, description="clips of the teacher in such an update")


class GanConfig(Config):
    """The discriminator's gradient, through the last denoising step of every chunk."""

    name: Literal["gan"] = "gan"
    prior_weight: float = Field(default=1e-4, ge=0, description="pull towards the frozen reference student")


class OldPolicy(Config):
    """The lagging policy that velocities are compared with."""

    old_policy_schedule: Literal["ema", "copy", "ramp", "late-ramp"] = Field(
        default="ema",
        description="decay d of old <- d old + (1 - d) student after step s: ema: old_policy_decay; copy: 0; "
        "ramp: min(0.001 s, 0.5); late-ramp: 0 for 75 steps, then 0.0075 (s - 75) up to 0.999 (DiffusionNFT's three)",
    )
    old_policy_decay: float = Field(default=0.99, ge=0, lt=1, description="of the schedule `ema`")
    prior_weight: float = Field(
        default=1e-4, ge=0, description="lambda of eq. 5: pull towards the frozen reference student"
    )
    sft_steps: int = Field(default=0, ge=0, description="supervised steps on the teacher's videos before the first")
    sft_weight: float = Field(
        default=0.0, ge=0, description="anchor: flow matching on the teacher's videos, added to every update"
    )
    inner_updates: int = Field(
        default=1, ge=1, description="student updates a step, each with fresh times and noises on one clean context"
    )
    noise_spread: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="where the student learns at noise alone (t = 1): how much of that noise is new, the rest is what "
        "its clip was drawn from; 1: all (the paper); less: what is liked near a noise is learnt near that noise",
    )
    shuffled_advantages: bool = Field(
        default=False, description="control: shuffle the advantages within each prompt's group"
    )


class AfdConfig(OldPolicy):
    """Adversarial Flow Distillation (arXiv 2605.26105)."""

    name: Literal["afd"] = "afd"
    policy_mix: float = Field(
        default=0.1, gt=0, le=1, description="beta of eq. 4: how far v+ and v- lie from the old policy"
    )
    baseline: Literal["prompt", "batch"] = Field(
        default="prompt", description="b of eq. 2: the mean of the prompt's rollouts, or of all (which collapses)"
    )
    normalisation: Literal["global", "prompt", "none"] = Field(
        default="global", description="standard deviation that advantages are divided by: of all, of the prompt's, none"
    )
    credit: Literal["video", "chunk", "future"] = Field(
        default="video",
        description="what a chunk is weighed by: the video's advantage, its own, or the discounted sum of its own and "
        "later ones (the last two need a discriminator that scores chunks)",
    )
    discount: float = Field(default=0.8, ge=0, le=1, description="of a chunk's advantage for each chunk before it")
    advantage_clip: float = Field(default=5.0, gt=0, description="in standard deviations")
    times: Literal["sampler", "range", "uniform"] = Field(
        default="sampler",
        description="t of eq. 3: the sampler's own steps, uniform in time_range, or uniform in [0.02, 1]",
    )
    time_range: tuple[float, float] = Field(default=(0.6, 1.0), description="of times=range")
    adaptive_weight: bool = Field(
        default=False,
        description="divide each of a frame's two errors by its mean absolute deviation (DiffusionNFT's weighting, "
        "without its factor t)",
    )
    noisings_per_clip: int = Field(
        default=1, ge=1, description="times and noises drawn for a clip in a step; they share its clean context"
    )
    off_policy_steps: int = Field(
        default=0,
        ge=0,
        description="ablation: learn from rollouts of a student that the current one replaces every so many steps; "
        "0: on-policy",
    )
    context_gradient: bool = Field(
        default=False,
        description="teacher forcing: the clean context carries gradient too; default: detached, as these students "
        "were distilled, in less memory",
    )

    @model_validator(mode="after")
    def _times_are_times(self) -> AfdConfig:
        low, high = self.time_range
        if not 0 < low < high <= 1:
            raise ValueError(f"time_range: [{low:g}, {high:g}] must rise within (0, 1]")
        return self


class BranchConfig(OldPolicy):
    """Branching: candidates of every chunk from one cache, and one regression target for all of them."""

    name: Literal["afd-branch"] = "afd-branch"
    policy_mix: float = Field(
        default=0.1, gt=0, le=1, description="beta of eq. 4: the target lies 1 / beta times the candidates' shift away"
    )
    advantage_clip: float = Field(default=3.0, gt=0, description="in global standard deviations")


ObjectiveConfig = Annotated[
    AfdConfig | BranchConfig | SftConfig | GanConfig | DmdConfig | DistilConfig | FlowMatchingConfig,
    Field(discriminator="name"),
]
ADVERSARIAL = ("afd", "afd-branch", "gan")  # objectives that have a discriminator, and K rollouts of a prompt
SUPERVISED = ("flow-matching", "sft")  # objectives on the teacher's videos alone
MATCHING = ("distil", "dmd")  # objectives that have a real and a fake score


def policies_of(objective: ObjectiveConfig) -> tuple[Literal["old", "reference", "behind"], ...]:
    """The policies that it compares the student with."""
    match objective:
        case AfdConfig(off_policy_steps=steps) if steps:
            return ("old", "reference", "behind")
        case AfdConfig() | BranchConfig():
            return ("old", "reference")
        case GanConfig(prior_weight=weight) | SftConfig(prior_weight=weight) if weight:
            return ("reference",)
    return ()
