"""The training half of a recipe: student, discriminator, objectives, evaluation.  Torch-free.

`Recipe` is the whole experiment; `load_recipe` (afd_train/recipe.py) reads one from YAML.  A part of the program
receives its own section only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from afd_data.config import DataConfig
from afd_data.section import Config
from afd_train.alarm_config import AlarmsConfig
from afd_train.discriminator_config import DiscriminatorConfig, SpaceTimeConfig
from afd_train.objective_config import ADVERSARIAL, AfdConfig, BranchConfig, GanConfig, ObjectiveConfig
from afd_train.student_config import StudentConfig


class FullConfig(Config):
    """All weights are trained; averaged and frozen policies are copies of them."""

    name: Literal["full"] = "full"
    offload: bool = Field(default=False, description="keep the copies (old, reference, averaged) in the CPU's memory")


class LoraConfig(Config):
    """Low-rank adapters (PEFT) are trained, the old policy is another adapter, the reference is none."""

    name: Literal["lora"] = "lora"
    rank: int = Field(default=256, ge=1)
    alpha: float = Field(default=256.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    targets: Literal["all", "attention"] = Field(
        default="all", description="linear layers of the blocks that are adapted: all of them, or attention's"
    )


class TrainConfig(Config):
    """One training run: an objective, its budget and its book-keeping."""

    objective: ObjectiveConfig = AfdConfig()
    policy: FullConfig | LoraConfig = Field(default=FullConfig(), discriminator="name")
    steps: int = Field(default=200, ge=1, description="each with one update of the student, or objective.inner_updates")
    prompts_per_step: int = Field(default=8, ge=1, description="distinct prompts in a step, over all processes")
    hardest: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of a step's prompts that is drawn from the quarter with the largest margins instead",
    )
    rollouts_per_prompt: int = Field(default=8, ge=1, description="student videos (K) drawn for each of them")
    clips_per_pass: int | None = Field(
        default=None,
        ge=1,
        description="clips of a process that the student draws and learns from at once (gradients accumulate over a "
        "step); whole groups of a prompt's rollouts share its text; default: all",
    )
    chunk_by_chunk: bool = Field(
        default=False,
        description="one backward pass a chunk: the same gradient in the memory of one chunk (afd, afd-branch, gan)",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="keep a block's input only and compute it again in the backward pass"
    )
    shard: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="weights and optimiser over the processes (FSDP2); auto: if `accelerate launch` says so",
    )
    gpu_memory_gb: float | None = Field(default=None, gt=0, description="of a GPU; --dry-run says whether it fits")
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup_steps: int = Field(default=20, ge=0, description="steps over which the learning rate rises from 0")
    final_learning_rate: float = Field(
        default=1.0, ge=0, le=1, description="share of the learning rate left at the end (cosine)"
    )
    weight_decay: float = Field(default=1e-4, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    evaluation_ema: float = Field(
        default=0.97, ge=0, lt=1, description="decay of the averaged student that is evaluated"
    )
    seconds: float | None = Field(
        default=None, gt=0, description="stop earlier, after this much training time, warm-ups included"
    )
    clock: Literal["wall", "cpu"] = Field(
        default="wall",
        description="what train.seconds counts: wall clock, or CPU seconds of this process's threads "
        "(time.process_time), which other programs do not disturb",
    )
    save_every_steps: int = Field(default=50, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    validate_every_steps: int = Field(
        default=50, ge=1, description="scores on held-out prompts and a strip of fixed videos"
    )
    validation_prompts: int = Field(default=16, ge=1, description="held-out prompts drawn at every validation")
    held_out_per_step: int = Field(
        default=4, ge=0, description="held-out prompts that the discriminator is checked on, every step"
    )
    stop_margin: float | None = Field(
        default=10.0, gt=0, description="alarm when the discriminator's mean margin (teacher - student) exceeds this"
    )
    stop_reference_distance: float | None = Field(
        default=1.0,
        gt=0,
        description="alarm when the student is this far from its reference (|v - v_ref|^2 / |v_ref|^2)",
    )
    alarms: AlarmsConfig = AlarmsConfig()
    on_alarm: Literal["stop", "warn", "best"] = Field(
        default="stop",
        description="stop: end with an error, the last checkpoint intact; warn: say it once and go on; best: end well, "
        "with the students of the best validation (a value that is not finite always ends a run)",
    )
    best_metric: str | None = Field(
        default="validation/object_permanence",
        description="of validation, by which students/best is kept where it is measured; null keeps none",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)

    @model_validator(mode="after")
    def _groups_have_a_baseline(self) -> TrainConfig:
        grouped = isinstance(self.objective, AfdConfig | BranchConfig)
        if grouped and self.rollouts_per_prompt < 2:
            raise ValueError(
                f"rollouts_per_prompt: {self.objective.name} compares rollouts of one prompt and needs at least 2"
            )
        if self.hardest and self.objective.name not in ADVERSARIAL:
            raise ValueError(f"hardest: {self.objective.name} measures no margins to choose prompts by; set it to 0")
        if isinstance(self.objective, AfdConfig) and self.objective.context_gradient and self.chunk_by_chunk:
            raise ValueError(
                "chunk_by_chunk: a context that carries gradient is computed with its clip; set "
                "train.objective.context_gradient=false"
            )
        return self


class EvalConfig(Config):
    """What `afd eval` generates and measures."""

    split: Literal["validation", "test"] = "test"
    prompts: int | None = Field(default=None, ge=1, description="use only this many prompts of the split")
    clips_per_prompt: int = Field(default=4, ge=1)
    clips_per_pass: int = Field(default=64, ge=1, description="videos that a student draws at once")
    seed: int = Field(default=1000, ge=0, description="noise of the generated videos; the same for every policy")
    policies: tuple[Literal["base", "student", "ema"], ...] = Field(default=("base", "student", "ema"), min_length=1)
    primary_metric: str = Field(default="object_permanence", description="the metric the report leads with")
    gallery_rows: int = Field(default=8, ge=0, description="rows of teacher | base | student videos in the report")
    resamples: int = Field(default=10_000, ge=100, description="bootstrap resamples")


class ExportConfig(Config):
    """What `afd run` leaves in OUT/export for other programs; `afd export` does the same for any student."""

    formats: tuple[Literal["diffusers", "original", "lora", "merged"], ...] = Field(
        default=(),
        description="diffusers: a folder for WanTransformer3DModel; original: a .pt for Self-Forcing's inference; "
        "lora: a PEFT folder; merged: a student folder",
    )
    policy: Literal["student", "ema"] = Field(default="ema", description="the student after training, or its average")


class Recipe(DataConfig):
    """One experiment: the same file serves every command."""

    student: StudentConfig = StudentConfig()
    discriminator: DiscriminatorConfig = SpaceTimeConfig()
    pretrain: tuple[TrainConfig, ...] = Field(
        default=(), description="runs before `train`, each starting from the student of the one before"
    )
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Recipe:
        if problem := self.student.problem_with(self.video):
            raise ValueError(problem)
        shape = self.student.latent_shape(self.video)
        runs = (*self.pretrain, self.train)
        if self.discriminator.space == "pixels" and any(isinstance(run.objective, GanConfig) for run in runs):
            raise ValueError(
                f"discriminator.name: gan takes the discriminator's gradient with respect to latents, and "
                f"{self.discriminator.name} looks at pixels, through whose decoder no gradient is computed; use "
                "spacetime or features, or train.objective.name afd"
            )
        if any(run.objective.name in ADVERSARIAL for run in runs) and (
            problem := self.discriminator.problem_with(shape, self.student.chunk_frames)
        ):
            raise ValueError(f"discriminator.{problem}")
        if self.discriminator.warmup_patience is not None:
            self._check_held_out(runs)
        if self.discriminator.confidence is not None and any(_splits_groups(run) for run in runs):
            raise ValueError(
                "discriminator.confidence: compares the teacher's clip with all rollouts of its prompt, which "
                "train.clips_per_pass is not to part; set it to train.rollouts_per_prompt or more"
            )
        if not self.discriminator.per_chunk and any(_wants_chunks(run.objective) for run in runs):
            raise ValueError(
                "discriminator.name: this objective weighs chunks one by one and needs a discriminator that scores "
                "them: spacetime with chunk_causal=true"
            )
        if "lora" in self.export.formats and self.train.policy.name != "lora":
            raise ValueError("export.formats: lora needs train.policy.name=lora; all weights are trained here")
        return self

    def _check_held_out(self, runs: Sequence[TrainConfig]) -> None:
        """A warm-up that stops itself looks at held-out prompts."""
        adversarial = [run for run in runs if run.objective.name in ADVERSARIAL]
        if adversarial and (self.prompts.validation == 0 or any(run.held_out_per_step == 0 for run in adversarial)):
            raise ValueError(
                "discriminator.warmup_patience: watches the loss on held-out prompts, and there are none; set "
                "prompts.validation and train.held_out_per_step above 0, or warmup_patience to null"
            )


def _splits_groups(run: TrainConfig) -> bool:
    """Whether a prompt's rollouts may come before the discriminator in several parts."""
    drawn = 1 if isinstance(run.objective, BranchConfig) else run.rollouts_per_prompt
    return run.objective.name in ADVERSARIAL and (run.clips_per_pass or drawn) < drawn


def _wants_chunks(objective: ObjectiveConfig) -> bool:
    return isinstance(objective, BranchConfig) or (isinstance(objective, AfdConfig) and objective.credit != "video")
