"""The training half of a recipe: student, discriminator, objectives, evaluation.  Torch-free.

`Recipe` is the whole experiment; `load_recipe` (afd_train/recipe.py) reads one from YAML.  A part of the program
receives its own section only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from afd_data.config import Config, DataConfig, VideoConfig
from afd_train.presets import Preset, Size, with_defaults

WAN_CHANNELS, WAN_FACTOR, WAN_STRIDE = 16, 8, 4  # latents of Wan 2.1's autoencoder: channels, pixels, frames a cell


class LatentShape(NamedTuple):
    """Size of a latent clip."""

    frames: int
    channels: int
    height: int
    width: int


class StudentConfig(Config):
    """A causal few-step video model: the stock Wan transformer, its sampler, autoencoder and text encoder."""

    preset: Preset | None = Field(
        default=None, description="a released student, whose values the other keys default to"
    )
    size: Size | None = Field(default=None, description="of Wan 2.1; dim, heads, layers and the text's default to it")
    init: str | None = Field(
        default=None,
        description="start from these weights: a student folder (`base` names the one afd ships), a diffusers folder, "
        "a .pt or .safetensors file, or hf://OWNER/REPO[@REVISION][/PATH]; default: random",
    )
    init_key: Literal["generator", "generator_ema"] | None = Field(
        default=None, description="which network of a .pt file; default: the averaged one where there is one"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the weights; bfloat16 keeps norms, modulation and the time embedding in float32, as diffusers",
    )
    dim: int = Field(default=128, ge=8, description="width of the transformer")
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=4, ge=1)
    ffn_dim: int = Field(default=512, ge=8)
    frequency_dim: int | None = Field(default=None, ge=2, multiple_of=2, description="of a time; default: dim")
    chunk_frames: int = Field(
        default=2, ge=1, description="latent frames generated together, attending to the chunks before"
    )
    steps: tuple[int, ...] = Field(
        default=(1000,),
        min_length=1,
        description="denoising steps of a chunk, 1000 = pure noise, before the shift's warp",
    )
    first_chunk_steps: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="of the first chunk that is drawn; default: as the others"
    )
    shift: float = Field(default=5.0, gt=0, description="warp of the schedule: t = shift s / (1 + (shift - 1) s)")
    window: int | None = Field(
        default=None, ge=1, description="latent frames that a frame attends to, its own chunk included; default: all"
    )
    sink: int = Field(default=0, ge=0, description="first latent frames that stay inside the window for good")
    context_noise: int = Field(
        default=0, ge=0, le=1000, description="the time that finished chunks are remembered with, 0 = clean"
    )
    renoised_context: Literal["never", "training", "always"] = Field(
        default="never",
        description="when finished chunks are noised to that time (at least the schedule's smallest) before they are "
        "remembered: Self-Forcing does so while it trains",
    )
    prediction: Literal["velocity", "clean"] = Field(
        default="velocity",
        description="what the network's output means; Wan: velocity; small worlds learn `clean` better",
    )
    coordinates: bool = Field(
        default=False,
        description="two more input channels tell a latent pixel its place; small worlds with a floor need it",
    )
    autoencoder: Literal["pixels", "wan"] = Field(
        default="pixels", description="pixels: weight-free space-to-depth of centred pixels; wan: Wan 2.1's VAE"
    )
    autoencoder_path: str = Field(
        default="hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae", description="folder of the wan autoencoder, or hf://..."
    )
    pixel_factor: int = Field(default=4, ge=1, le=16, description="pixels a side folded into channels")
    pixel_centre: tuple[int, int, int] = Field(
        default=(128, 128, 128), description="RGB that becomes 0: the background"
    )
    pixel_scale: float = Field(
        default=5.0,
        gt=0,
        description="latents are this x (pixel - centre) / 127.5; should bring them near unit variance",
    )
    text_encoder: Literal["hashed-words", "umt5"] = Field(
        default="hashed-words", description="hashed-words: a weight-free bag of words; umt5: Wan 2.1's encoder"
    )
    text_encoder_path: str = Field(
        default="hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        description="umt5: folder with text_encoder/ and tokenizer/, or hf://...",
    )
    text_tokens: int = Field(default=16, ge=1, le=512, description="words of a prompt that are kept")
    text_dim: int = Field(default=64, ge=4)

    @model_validator(mode="before")
    @classmethod
    def _preset_first(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # What this returns is validated as Python objects, where a list is no tuple.
        return {key: tuple(value) if isinstance(value, list) else value for key, value in with_defaults(given).items()}

    @model_validator(mode="after")
    def _shapes_fit(self) -> StudentConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2 or self.dim // self.heads < 12:
            raise ValueError(f"dim: {self.dim} / heads {self.heads} must be an even number >= 12 (rotary embedding)")
        for name, steps in (("steps", self.steps), ("first_chunk_steps", self.first_chunk_steps or self.steps)):
            if any(not 0 < step <= 1000 for step in steps) or list(steps) != sorted(set(steps), reverse=True):
                raise ValueError(f"{name}: {list(steps)} must fall strictly from at most 1000 towards 0")
        if self.window is not None and self.window < self.sink + self.chunk_frames:
            raise ValueError(
                f"window: {self.window} latent frames cannot hold the sink's {self.sink} and a chunk's "
                f"{self.chunk_frames}"
            )
        if self.sink and self.window is None:
            raise ValueError("sink: means nothing without a window; set student.window")
        return self

    @property
    def latent_channels(self) -> int:
        """Of the autoencoder."""
        return WAN_CHANNELS if self.autoencoder == "wan" else 3 * self.pixel_factor**2

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        """What the autoencoder makes of a clip; sizes that do not divide are rounded down."""
        wan = self.autoencoder == "wan"
        frames = 1 + (video.frames - 1) // WAN_STRIDE if wan else video.frames
        factor = WAN_FACTOR if wan else self.pixel_factor
        return LatentShape(frames, self.latent_channels, video.height // factor, video.width // factor)

    def problem_with(self, video: VideoConfig) -> str | None:
        """Why clips of this shape cannot be made, as `KEY: reason` of a recipe; None if they can."""
        name = "8" if self.autoencoder == "wan" else f"student.pixel_factor {self.pixel_factor}"
        cell = 2 * (WAN_FACTOR if self.autoencoder == "wan" else self.pixel_factor)
        frames = self.latent_shape(video).frames
        if self.autoencoder == "wan" and video.frames % WAN_STRIDE != 1:
            return f"video.frames: {video.frames} is not 1 more than a multiple of {WAN_STRIDE} (Wan's autoencoder)"
        if frames % self.chunk_frames:
            what = f"{frames} latent frames are" if frames != video.frames else f"{frames} is"
            return f"video.frames: {what} not divisible by student.chunk_frames {self.chunk_frames}"
        if video.width % cell or video.height % cell:
            return (
                f"video.width: {video.width} x {video.height} is not divisible by {cell} "
                f"(2 x {name}: pixels folded by the autoencoder, then by the transformer's patch)"
            )
        return None


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
        return self
