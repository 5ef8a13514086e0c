"""The training half of a recipe: student, discriminator, objectives, evaluation.  Torch-free.

`Recipe` is the whole experiment; `load_recipe` (afd_train/recipe.py) reads one from YAML.  A part of the program
receives its own section only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from afd_data.config import Config, DataConfig


class StudentConfig(Config):
    """A causal few-step video model: the stock Wan transformer, its sampler, autoencoder and text encoder."""

    init: str | None = Field(
        default=None,
        description="start from this student folder (`base` names the one afd ships); default: random weights",
    )
    dim: int = Field(default=128, ge=8, description="width of the transformer")
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=4, ge=1)
    ffn_dim: int = Field(default=512, ge=8)
    chunk_frames: int = Field(
        default=2, ge=1, description="latent frames generated together, attending to the chunks before"
    )
    steps: tuple[int, ...] = Field(
        default=(1000,),
        min_length=1,
        description="denoising steps of a chunk, 1000 = pure noise, before the shift's warp",
    )
    shift: float = Field(default=5.0, gt=0, description="warp of the schedule: t = shift s / (1 + (shift - 1) s)")
    prediction: Literal["velocity", "clean"] = Field(
        default="velocity",
        description="what the network's output means; Wan: velocity; small worlds learn `clean` better",
    )
    coordinates: bool = Field(
        default=False,
        description="two more input channels tell a latent pixel its place; small worlds with a floor need it",
    )
    autoencoder: Literal["pixels"] = Field(default="pixels", description="weight-free space-to-depth of centred pixels")
    pixel_factor: int = Field(default=4, ge=1, le=16, description="pixels a side folded into channels")
    pixel_centre: tuple[int, int, int] = Field(
        default=(128, 128, 128), description="RGB that becomes 0: the background"
    )
    pixel_scale: float = Field(
        default=5.0,
        gt=0,
        description="latents are this x (pixel - centre) / 127.5; should bring them near unit variance",
    )
    text_encoder: Literal["hashed-words"] = Field(default="hashed-words", description="weight-free bag of hashed words")
    text_tokens: int = Field(default=16, ge=1, le=512, description="words of a prompt that are kept")
    text_dim: int = Field(default=64, ge=4)

    @model_validator(mode="after")
    def _shapes_fit(self) -> StudentConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2 or self.dim // self.heads < 12:
            raise ValueError(f"dim: {self.dim} / heads {self.heads} must be an even number >= 12 (rotary embedding)")
        if any(not 0 < step <= 1000 for step in self.steps) or list(self.steps) != sorted(
            set(self.steps), reverse=True
        ):
            raise ValueError(f"steps: {list(self.steps)} must fall strictly from at most 1000 towards 0")
        return self


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
    old_policy_decay: float = Field(
        default=0.99, ge=0, lt=1, description="EMA of the student that serves as the old policy"
    )
    prior_weight: float = Field(
        default=1e-4, ge=0, description="lambda of eq. 5: pull towards the frozen reference student"
    )
    advantage_clip: float = Field(default=5.0, gt=0, description="in global standard deviations")
    shuffled_advantages: bool = Field(
        default=False, description="control: shuffle the advantages within each prompt's group"
    )


Objective = Annotated[AfdConfig | DistilConfig | FlowMatchingConfig, Field(discriminator="name")]


class TrainConfig(Config):
    """One training run: an objective, its budget and its book-keeping."""

    objective: Objective = AfdConfig()
    steps: int = Field(default=200, ge=1, description="updates of the student")
    prompts_per_step: int = Field(default=8, ge=1, description="distinct prompts in a step, over all processes")
    rollouts_per_prompt: int = Field(default=8, ge=1, description="student videos (K) drawn for each of them")
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
        return self


class EvalConfig(Config):
    """What `afd eval` generates and measures."""

    split: Literal["validation", "test"] = "test"
    prompts: int | None = Field(default=None, ge=1, description="use only this many prompts of the split")
    clips_per_prompt: int = Field(default=4, ge=1)
    seed: int = Field(default=1000, ge=0, description="noise of the generated videos; the same for every policy")
    policies: tuple[Literal["base", "student", "ema"], ...] = Field(default=("base", "student", "ema"), min_length=1)
    primary_metric: str = Field(default="object_permanence", description="the metric the report leads with")
    gallery_rows: int = Field(default=8, ge=0, description="rows of teacher | base | student videos in the report")
    resamples: int = Field(default=10_000, ge=100, description="bootstrap resamples")


class Recipe(DataConfig):
    """One experiment: the same file serves every command."""

    student: StudentConfig = StudentConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    pretrain: tuple[TrainConfig, ...] = Field(
        default=(), description="runs before `train`, each starting from the student of the one before"
    )
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Recipe:
        if self.video.frames % self.student.chunk_frames:
            raise ValueError(
                f"video.frames: {self.video.frames} is not divisible by student.chunk_frames "
                f"{self.student.chunk_frames}"
            )
        if self.video.frames % self.discriminator.tubelet_frames:
            raise ValueError(
                f"discriminator.tubelet_frames: {self.discriminator.tubelet_frames} does not divide video.frames "
                f"{self.video.frames}"
            )
        patch = self.student.pixel_factor * self.discriminator.patch
        if self.video.width % patch or self.video.height % patch:
            raise ValueError(
                f"discriminator.patch: {self.discriminator.patch} x student.pixel_factor {self.student.pixel_factor} "
                f"does not divide {self.video.width} x {self.video.height} pixels"
            )
        cell = 2 * self.student.pixel_factor
        if self.video.width % cell or self.video.height % cell:
            raise ValueError(
                f"video.width: {self.video.width} x {self.video.height} is not divisible by {cell} "
                "(2 x student.pixel_factor: pixels folded by the autoencoder, then by the transformer's patch)"
            )
        return self
