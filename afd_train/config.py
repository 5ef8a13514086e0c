"""The training half of a recipe: student, discriminator, objectives, evaluation.  Torch-free.

`Recipe` is the whole experiment; `load_recipe` (afd_train/recipe.py) reads one from YAML.  A part of the program
receives its own section only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from afd_data.config import DataConfig
from afd_data.section import Config
from afd_train.student_config import StudentConfig


class DiscriminatorConfig(Config):
    """Scores a clip given its prompt; small space-time transformer over latents."""

    name: Literal["spacetime"] = "spacetime"
    dim: int = Field(default=96, ge=8)
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=2, ge=1)
    patch: int = Field(default=1, ge=1, description="latent pixels a side of a token")
    tubelet_frames: int = Field(default=2, ge=1, description="latent frames of a token")
    learning_rate: float = Field(default=1e-4, gt=0, description="while the student trains")
    weight_decay: float = Field(default=1e-2, ge=0)
    input_noise: float = Field(
        default=0.8, ge=0, description="largest standard deviation of the noise added to its input while it trains"
    )
    warmup_steps: int = Field(default=100, ge=0, description="updates on cached base rollouts before the student moves")
    warmup_learning_rate: float = Field(default=1e-3, gt=0)
    warmup_prompts: int = Field(default=32, ge=1, description="distinct prompts in a warm-up batch")

    @model_validator(mode="after")
    def _shapes_fit(self) -> DiscriminatorConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim: {self.dim} is not divisible by heads {self.heads}")
        return self


class FlowMatchingConfig(Config):
    """Teacher-forced flow matching on the cached videos.

    From random weights it is how a base student is born; from a base student it is supervised fine-tuning (SFT).
    """

    name: Literal["flow-matching"] = "flow-matching"


class DistilConfig(Config):
    """Few-step distillation on the student's own rollouts (distribution matching, as in Self-Forcing)."""

    name: Literal["distil"] = "distil"
    fake_learning_rate: float = Field(default=4e-4, gt=0, description="of the online score of the student's own videos")
    fake_updates: int = Field(default=2, ge=1, description="updates of that score for one of the student")


class AfdConfig(Config):
    """Adversarial Flow Distillation (arXiv 2605.26105)."""

    name: Literal["afd"] = "afd"
    policy_mix: float = Field(
        default=0.1, gt=0, le=1, description="beta of eq. 4: how far v+ and v- lie from the old policy"
    )
    old_policy_schedule: Literal["ema", "copy", "ramp", "late-ramp"] = Field(
        default="ema",
        description="decay d of old <- d old + (1 - d) student after step s: ema: old_policy_decay; copy: 0; "
        "ramp: min(0.001 s, 0.5); late-ramp: 0 for 75 steps, then 0.0075 (s - 75) up to 0.999 (DiffusionNFT's three)",
    )
    old_policy_decay: float = Field(default=0.99, ge=0, lt=1, description="of the schedule `ema`")
    prior_weight: float = Field(
        default=1e-4, ge=0, description="lambda of eq. 5: pull towards the frozen reference student"
    )
    advantage_clip: float = Field(default=5.0, gt=0, description="in global standard deviations")
    noisings_per_clip: int = Field(
        default=1, ge=1, description="times and noises drawn for a clip in a step; they share its clean context"
    )
    context_gradient: bool = Field(
        default=False,
        description="teacher forcing: the clean context carries gradient too; default: detached, as these students "
        "were distilled, in less memory",
    )
    shuffled_advantages: bool = Field(
        default=False, description="control: shuffle the advantages within each prompt's group"
    )


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


Objective = Annotated[AfdConfig | DistilConfig | FlowMatchingConfig, Field(discriminator="name")]


class TrainConfig(Config):
    """One training run: an objective, its budget and its book-keeping."""

    objective: Objective = AfdConfig()
    policy: FullConfig | LoraConfig = Field(default=FullConfig(), discriminator="name")
    steps: int = Field(default=200, ge=1, description="updates of the student")
    prompts_per_step: int = Field(default=8, ge=1, description="distinct prompts in a step, over all processes")
    rollouts_per_prompt: int = Field(default=8, ge=1, description="student videos (K) drawn for each of them")
    clips_per_pass: int | None = Field(
        default=None,
        ge=1,
        description="clips of a process that the student draws and learns from at once (gradients accumulate over a "
        "step); whole groups of a prompt's rollouts share its text; default: all",
    )
    chunk_by_chunk: bool = Field(
        default=False, description="one backward pass a chunk: the same gradient in the memory of one chunk"
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
    seconds: float | None = Field(default=None, gt=0, description="stop earlier, after this much training time")
    save_every_steps: int = Field(default=50, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    validate_every_steps: int = Field(
        default=50, ge=1, description="scores on held-out prompts and a strip of fixed videos"
    )
    validation_prompts: int = Field(default=16, ge=1, description="held-out prompts drawn at every validation")
    held_out_per_step: int = Field(
        default=4, ge=0, description="held-out prompts that the discriminator is checked on, every step"
    )
    stop_margin: float = Field(
        default=10.0, gt=0, description="stop when the discriminator's mean margin (teacher - student) exceeds this"
    )
    stop_reference_distance: float = Field(
        default=1.0,
        gt=0,
        description="stop when the student is this far from its reference (|v - v_ref|^2 / |v_ref|^2)",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)

    @model_validator(mode="after")
    def _groups_have_a_baseline(self) -> TrainConfig:
        if self.objective.name == "afd" and self.rollouts_per_prompt < 2:
            raise ValueError("rollouts_per_prompt: afd compares rollouts of one prompt and needs at least 2")
        if self.objective.name == "afd" and self.objective.context_gradient and self.chunk_by_chunk:
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
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
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
        if shape.frames % self.discriminator.tubelet_frames:
            raise ValueError(
                f"discriminator.tubelet_frames: {self.discriminator.tubelet_frames} does not divide the "
                f"{shape.frames} latent frames of a clip"
            )
        if shape.width % self.discriminator.patch or shape.height % self.discriminator.patch:
            raise ValueError(
                f"discriminator.patch: {self.discriminator.patch} does not divide the {shape.width} x {shape.height} "
                "latent pixels of a clip"
            )
        if "lora" in self.export.formats and self.train.policy.name != "lora":
            raise ValueError("export.formats: lora needs train.policy.name=lora; all weights are trained here")
        return self
